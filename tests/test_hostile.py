"""Whatever is in a file, only our own errors come out; bombs take neither memory nor time."""

import base64
import contextlib
import inspect
import json
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path

import hostile
import pyarrow as pa
import pytest
from hostile import hostile_input, outcome, parsers
from pyarrow import parquet

from nnpassport import scheme
from nnpassport.claims.signing import load_public_key, load_signing_key
from nnpassport.claims.timestamp import load_roots, request_timestamp
from nnpassport.data.decoding import Encoded, Wanted, decode_all
from nnpassport.data.images import read_images
from nnpassport.embedding.network.equations import Geometry
from nnpassport.keys.context import Context, LayerShape
from nnpassport.scheme import (
    NoTimestampError,
    OwnershipError,
    UnreadableDataError,
    UnreadableKeyError,
)

INPUTS = 300
OURS = {name for name, kind in inspect.getmembers(scheme, inspect.isclass)} | {"read"}


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    return parsers(tmp_path_factory.mktemp("hostile"))


with tempfile.TemporaryDirectory() as _folder:
    NAMES = list(parsers(Path(_folder)))


@pytest.mark.filterwarnings("ignore")  # the libraries' own, about files that are damaged
@pytest.mark.parametrize("name", NAMES)
def test_only_errors_of_ours_come_out(ways, name, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    parser = ways[name]
    for number in range(INPUTS // min(parser.share, 30)):
        found = outcome(parser, hostile_input(name, parser, number))
        assert found in OURS, f"input {number} of {name}"


@pytest.mark.parametrize("name", NAMES)
def test_hostile_inputs_are_the_same_in_every_run(ways, name, tmp_path):
    again = parsers(tmp_path)[name]
    if name != "answer of an authority":
        assert again.seeds == ways[name].seeds
    for number in range(20):
        assert hostile_input(name, again, number) == hostile_input(name, ways[name], number)


# Of these the seeds alone are nothing that could be read: an old answer, half a key, no weights.
@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"answer of an authority", "protected key", "config"})
)
def test_what_is_not_spoiled_is_read(ways, name):
    assert "read" in {outcome(ways[name], seed) for seed in ways[name].seeds}


# What the fuzzing found, each once


def test_a_public_key_of_an_unknown_kind_is_an_error_of_ours(tmp_path):
    for number, bytes_ in enumerate(OF_NO_KNOWN_KIND):
        (tmp_path / f"{number}.pem").write_bytes(bytes_)
    for load in (load_public_key, load_signing_key, load_roots):
        for path in tmp_path.iterdir():
            with pytest.raises(UnreadableKeyError):
                load(path)


def altered(lines, old, new):
    """A PEM file in which one stretch of the DER is another."""
    head, *body, tail = lines.strip().splitlines()
    der = base64.b64decode(b"".join(body))
    assert old in der
    return b"\n".join([head, base64.b64encode(der.replace(old, new, 1)), tail, b""])


ED25519 = bytes.fromhex("06032b6570")
OF_NO_KNOWN_KIND = (
    altered(hostile._pems()[0][0], ED25519, bytes.fromhex("06032b7f70")),
    altered(hostile._pems()[1][0], ED25519, bytes.fromhex("06032b7f70")),
    altered(
        (hostile.GOLDEN / "claim-v1-root.pem").read_bytes(),
        bytes.fromhex("a003020102"),
        bytes.fromhex("a00302010c"),  # version 13 of X.509
    ),
)


def test_messages_cannot_drive_a_terminal_and_are_short():
    error = OwnershipError("a\nb\x1b[2J\u202e\ud800é" + "x" * 100_000)
    assert str(error).startswith("a\nb\\x1b[2J\\u202e\\ud800é")
    assert len(str(error)) < 5_000
    assert str(UnreadableDataError("plain")) == "plain"


def table(path, rows, *, declared=None, metadata=None):
    """A Parquet file of `rows` labelled pictures that says that it has `declared`."""
    picture = hostile._pictures()[4]
    columns = {"image": [picture] * rows, "label": list(range(rows))}
    made = pa.table(columns).replace_schema_metadata(metadata)
    parquet.write_table(made, path)
    if declared is not None:
        data = path.read_bytes()
        size = int.from_bytes(data[-8:-4], "little")
        body, footer = data[: -8 - size], data[-8 - size : -8]
        # Field 3 of FileMetaData, 64 bits, is the first of its kind.
        footer = footer.replace(b"\x16" + varint(rows), b"\x16" + varint(declared), 1)
        path.write_bytes(body + footer + struct.pack("<I", len(footer)) + b"PAR1")
        assert parquet.ParquetFile(path).metadata.num_rows == declared
    return path


def varint(number):
    """As Thrift writes integers."""
    number, out = number << 1 ^ number >> 63, b""
    while number >= 0x80:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


@pytest.mark.parametrize("declared", [-1, 0, 1, 3, 10**6, 5 * 10**9, 2**62])
def test_a_table_with_other_rows_than_it_declares_is_refused(tmp_path, declared):
    assert len(read_images(table(tmp_path / "fine.parquet", 2), cache=False)) == 2
    path = table(tmp_path / "x.parquet", 2, declared=declared)
    with pytest.raises(UnreadableDataError, match=r"declare|no rows"):
        read_images(path, cache=False)


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_other_than_declared_are_refused(count):
    pictures = [Encoded(str(n), hostile._pictures()[4], 0) for n in range(2)]
    with pytest.raises(UnreadableDataError, match=f"2 pictures where {count} are"):
        decode_all(iter(pictures), count, Wanted(None, 3), source="it")


def test_class_names_that_are_nested_too_deeply_are_no_class_names(tmp_path):
    path = table(tmp_path / "x.parquet", 2, metadata={"huggingface": "[" * 100_000})
    assert read_images(path, cache=False).classes == ("0", "1")


def npz(path, **members):
    """A .npz file whose members are these bytes, packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


def npy(shape, data=b"", dtype="|u1"):
    """The bytes of an array that says it has this shape."""
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


@pytest.mark.parametrize(
    ("member", "data"),
    [
        ("images", b"no array"),
        ("labels", b"no array"),
        ("classes", npy((), struct.pack("<2I", 0x110000, 1), "<U2")),  # beyond Unicode
        ("images", npy((2, 5, 5), b"x")),
        ("images", npy((10**15, 5, 5))),
        ("images", npy((2**63, 2**63))),
        ("labels", npy((2,), bytes(16), "|O")),
    ],
)
def test_arrays_that_are_none_are_refused(tmp_path, member, data):
    members = {"images": npy((2, 5, 5), bytes(50)), "labels": npy((2,), b"\x00\x01")}
    fine = npz(tmp_path / "fine.npz", **members)
    assert len(read_images(fine, cache=False, channels=1)) == 2
    path = npz(tmp_path / "x.npz", **members | {member: data})
    with pytest.raises(UnreadableDataError):
        read_images(path, cache=False, channels=1)


def test_one_class_name_that_is_no_list_is_read(tmp_path):
    members = {"images": npy((2, 5, 5), bytes(50)), "labels": npy((2,), b"\x00\x00")}
    path = npz(tmp_path / "x.npz", **members, classes=npy((), b"a\x00\x00\x00", "<U1"))
    with pytest.raises(UnreadableDataError, match="images of 1 class"):
        read_images(path, cache=False, channels=1)


def test_a_context_cannot_ask_for_endless_work():
    def context(weight, passport, padding):
        geometry = Geometry((1, 1), (padding,) * 2, (1, 1))
        return Context("v2", "A", (LayerShape("a", weight, passport, geometry),), None, bytes(16))

    large = context((512, 512, 3, 3), (512, 74, 74), (1, 1))  # as a real network's
    assert Context.decode(large.encode()) == large
    with pytest.raises(UnreadableKeyError, match="with padding"):
        context((8, 3, 3, 3), (3, 8, 8), (2**24, 2**24))
    with pytest.raises(UnreadableKeyError, match="products"):
        context((1, 1, 4096, 4096), (1, 8192, 8192), (0, 0))


def test_headers_that_never_end_are_given_up(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    over = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not over.wait(0.02):
                connection.sendall(b"a: b\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        try:
            with pytest.raises(NoTimestampError, match="does not answer within"):
                request_timestamp(b"data", url, [], timeout=0.5)
        finally:
            over.set()
            thread.join()


# Bombs: each in a fork that may not take much more memory than it has


BOMBS = """
import json, os, resource, sys
from pathlib import Path
import torch
import hostile, nnpassport.data.tables
from nnpassport.data.images import read_images
from nnpassport.keys.keyfile import load_key
from nnpassport.scheme import OwnershipError
from nnpassport.embedding.network.tensors import read_weights
torch.set_num_threads(1)  # before anything is forked: a pool of threads does not survive it
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def light(path):
    read = load_key if path.suffix == ".key" else lambda path: read_images(path, cache=False)
    read = read_weights if path.suffix == ".safetensors" else read
    before, said = peak(), "read"
    try:
        read(path)
    except OwnershipError as error:
        said = f"{type(error).__name__} {str(error)[:200]}".replace("\\n", " ")
    print(json.dumps([str(path), said, peak() - before]), flush=True)
for path in map(Path, sys.argv[1:]):
    child = os.fork()
    if child == 0:
        try:
            light(path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


def packed_zeros(path):
    """A .npz file of a third of a megabyte: 300 MiB of pixels."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("labels.npy", npy((2,), b"\x00\x01"))
        with archive.open("images.npy", "w") as file:
            file.write(npy((300, 1024, 1024)))
            for _ in range(300):
                file.write(bytes(2**20))


def flat_key(path):
    """A key file of 48 MB in which there are 24 million lists."""
    path.write_bytes(b'{"a":[' + b"[]," * 16_000_000 + b"[]]}")


def many_tensors(path):
    """A safetensors header of 50 MB that names a million tensors of no size."""
    entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b",".join(entry % n for n in range(1_000_000)) + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def huge_picture(path):
    """A folder with pictures of a few bytes that say they have 3,600 million pixels."""
    for name in "ab":
        (path / name).mkdir(parents=True)
        header = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10**6))), (b"IEND", b"")]
        data = b"".join(struct.pack(">I", len(c)) + k + c + bytes(4) for k, c in chunks)
        picture = hostile._with_checksums(b"\x89PNG\r\n\x1a\n" + data)
        (path / name / "0.png").write_bytes(picture)


def many_rows(path):
    table(path, 2, declared=40_000_000)


BOMBED = {
    "x.npz": (packed_zeros, "UnreadableDataError .*bomb"),
    "x.key": (flat_key, "UnreadableKeyError .*commas"),
    "x.safetensors": (many_tensors, "UnreadableModelError .*declares a header of 58000001 bytes"),
    "pictures": (huge_picture, "UnreadableDataError .*pixels"),
    "x.parquet": (many_rows, "UnreadableDataError .*2 pictures where 40000000"),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """What reading each said, and MiB that it took beyond what there was, by name."""
    folder = tmp_path_factory.mktemp("bombs")
    for name, (make, _) in BOMBED.items():
        make(folder / name)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BOMBS, *(str(folder / name) for name in BOMBED)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = map(json.loads, done.stdout.splitlines())
    return {Path(path).name: (said, grown) for path, said, grown in lines}


@pytest.mark.parametrize("name", BOMBED)
def test_a_bomb_takes_little_memory(bombs, name):
    said, grown = bombs[name]
    assert re.match(BOMBED[name][1], said), said
    assert grown < 250  # MiB
