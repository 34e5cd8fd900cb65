"""Files that were made to break the reader, the report or the folder, each once."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnpassport.cli import app as cli
from nnpassport.cli import terminal
from nnpassport.embedding.checkpoint import load_model, load_suspect, load_training, save_model
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.files.config import ModelConfig, config_bytes, read_config_file
from nnpassport.files.disk import write_atomically
from nnpassport.files.pickles import torchfile
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.report import curves
from nnpassport.report import page as report
from nnpassport.report import verdict as verdictpage
from nnpassport.scheme import UnreadableModelError, UnwritableOutputError

CONFIG = ModelConfig(
    architecture="alexnet",
    arguments={"classes": 3, "width": 0.25, "norm": "group"},
    classes=("cat", "dog", "cow"),
    input_size=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
)
PATIENCE = 60  # seconds for an input that is to be refused, on a busy machine

# Reads each file that it is asked for in a fork of its own: torch is imported once for all. Says
# what came out, and how many MiB the fork and its children took at their peak beyond what it had.
READING = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from nnpassport.files.pickles import torchfile
from nnpassport.scheme import OwnershipError
from nnpassport.embedding.network.tensors import read_weights
torch.set_num_threads(1)  # before anything is forked: a pool of threads does not survive it
def peak(who):
    return resource.getrusage(who).ru_maxrss // 1024
def read(path, seconds, patience):
    signal.alarm(patience)
    torchfile.MAX_SECONDS = seconds
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)
    before = peak(resource.RUSAGE_SELF)
    try:
        said = f"read {sorted(read_weights(Path(path)).tensors)}"
    except OwnershipError as error:
        said = f"{type(error).__name__} {error}"
    grown = peak(resource.RUSAGE_SELF) - before + peak(resource.RUSAGE_CHILDREN)
    print(json.dumps([said.replace("\\n", " "), grown]), flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            read(*json.loads(line))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""


@pytest.fixture(scope="module")
def reading():
    """A function: what `read_weights` says in a process of its own, and MiB at its peak."""
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(path, seconds=1):
        server.stdin.write(json.dumps([str(path), seconds, PATIENCE]) + "\n")
        server.stdin.flush()
        answers = [json.loads(server.stdout.readline())]
        while isinstance(answers[-1], list):
            answers.append(json.loads(server.stdout.readline()))
        said, code = answers
        assert code == 0
        return said

    yield ask
    server.communicate(timeout=PATIENCE)


# Pickles, as opcodes

TORCH_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)


def checkpoint(pickled, **storages):
    """An archive as `torch.save` writes it, but with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def old_checkpoint(pickled):
    """The same as PyTorch wrote it before 1.6, without storages."""
    about = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return TORCH_MAGIC + b"".join(
        (pickle.dumps(1001, 2), pickle.dumps(about, 2), pickled, pickle.dumps([], 2))
    )


def nested_keys(depth):
    """{(((…), …), …): 1}: each tuple holds the one before twice, so hashing takes 2^depth steps."""
    memo = b")q\x00" + b"".join(
        b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(depth)
    )
    return b"\x80\x02" + memo + b"}h%cK\x01s." % depth


def deep_key(depth):
    """A tuple in a tuple in a tuple …, as a key: hashing it runs out of the stack."""
    return b"\x80\x02})" + b"\x85" * depth + b"K\x01s."


def called(module, name, argument):
    """{"x": module.name(argument)}."""
    return b"\x80\x02}X\x01\x00\x00\x00x" + f"c{module}\n{name}\n".encode() + argument + b"\x85Rs."


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def dictionaries(depth):
    """A dictionary whose two values are the same dictionary, and so on: 2^depth paths."""
    inner = b"}q\x00"
    for level in range(depth):
        inner += b"}X\x01\x00\x00\x00ah%csX\x01\x00\x00\x00bh%csq%c" % (level, level, level + 1)
    return b"\x80\x02" + inner + b"."


# Storage 0, of four numbers
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
STORAGE += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
ATTACKS = {
    "nested keys": nested_keys(100),
    "a deep key": deep_key(500_000),
    "bytearray": called("builtins", "bytearray", number(3 * 2**30)),
    "bytearray of Python 2": called("__builtin__", "bytearray", number(3 * 2**30)),
}
# PyTorch's own reader does not know these; Python's does.
FURTHER = {
    "paths": dictionaries(100),
    "counted bytearray": b"\x80\x05\x96" + struct.pack("<Q", 8 * 2**30) + b".",
    "counted bytes": b"\x80\x04\x8e" + struct.pack("<Q", 8 * 2**30) + b".",
    "counted text": b"\x80\x04\x8d" + struct.pack("<Q", 8 * 2**30) + b".",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 8 * 2**30) + b"}.",
    "a text of digits": b"\x80\x02}I" + b"9" * 10**6 + b"\nK\x01s.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary that holds itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "a class that is changed": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "a function that is changed": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    b"N}X\x08\x00\x00\x00__code__Ns\x86b.",
    "a name that is no text": b"\x80\x04\x8c\x02os\x8c\x05a\x00b.c\x93.",
    "an extension": b"\x80\x02\x82\x01.",
    "a storage of nobody": b"\x80\x02(X\x07\x00\x00\x00storageNNNNtQ.",
    "nothing": b"",
    "a tensor that is moved": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    + STORAGE
    + b"K\x00K\x01\x85K\x01\x85tRN}X\x05\x00\x00\x00placeK\x00s\x86b.",
}


def many_tensors(count, *, distinct):
    """A state dict of so many names, each of a tensor of its own or all of one."""
    opened = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00("
    opened += STORAGE + b"K\x00K\x01\x85K\x01\x85\x89}tq\x01Rq\x02}("
    value = b"h\x00h\x01R" if distinct else b"h\x02"
    return opened + b"".join(b"X\x07\x00\x00\x00%07d" % n + value for n in range(count)) + b"u."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distinct", "seconds", "words"),
    [
        (True, 1, "takes more than 1 s|holds more than 300000 tensors"),
        (False, 20, "has 400000 tensors, but at most 100000"),
    ],
)
def test_many_tensors_of_one_storage_take_little_memory(
    reading, tmp_path, distinct, seconds, words
):
    few = checkpoint(many_tensors(3, distinct=distinct), **{"0": bytes(16)})
    (tmp_path / "few.pt").write_bytes(few)
    assert len(read_weights(tmp_path / "few.pt").tensors) == 3
    many = checkpoint(many_tensors(400_000, distinct=distinct), **{"0": bytes(16)})
    (tmp_path / "x.pt").write_bytes(many)
    said, grown = reading(tmp_path / "x.pt", seconds)
    assert re.match(f"UnreadableModelError .*({words})", said), said
    assert grown < 1_400


def test_tensors_that_are_negated_by_a_bit_take_no_more_than_the_file(reading, tmp_path):
    base = torch.ones(2**18, dtype=torch.complex64).conj().imag
    torch.save({str(n): base.view_as(base) for n in range(2_000)}, tmp_path / "x.pt")
    said, grown = reading(tmp_path / "x.pt")
    assert re.match("UnreadableModelError .*more memory than the file", said), said
    assert grown < 400


@pytest.mark.parametrize("pack", [checkpoint, old_checkpoint])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_pickle_takes_the_time_or_the_memory_of_who_reads_it(reading, tmp_path, pack, name):
    (tmp_path / "x.pt").write_bytes(pack(ATTACKS[name]))
    said, grown = reading(tmp_path / "x.pt")
    assert said.startswith("UnreadableModelError"), said
    assert grown < 1_400  # MiB, of them at most 1,024 in the process that reads the pickle


@pytest.mark.parametrize("pack", [checkpoint, old_checkpoint])
@pytest.mark.parametrize("name", FURTHER)
def test_what_python_s_own_unpickler_would_do_is_bounded_as_well(reading, tmp_path, pack, name):
    (tmp_path / "x.pt").write_bytes(pack(FURTHER[name]))
    said, grown = reading(tmp_path / "x.pt")
    assert said.startswith("UnreadableModelError"), said
    assert grown < 1_400


def test_a_file_of_a_few_hundred_bytes_is_refused_in_seconds(reading, tmp_path):
    data = checkpoint(nested_keys(40))
    assert len(data) < 1_000
    (tmp_path / "x.pt").write_bytes(data)
    said, _ = reading(tmp_path / "x.pt")
    assert "takes more than 1 s" in said


def test_a_reader_that_never_ends_is_ended(tmp_path, monkeypatch):
    (tmp_path / "x.pt").write_bytes(checkpoint(nested_keys(40)))
    monkeypatch.setattr(torchfile, "MAX_WAIT", 0.5)  # of the clock, where processor time is not
    with pytest.raises(UnreadableModelError, match="to read"):
        read_weights(tmp_path / "x.pt")


def test_a_reader_that_cannot_be_started_is_an_error_of_ours(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    for nothing in ("", str(tmp_path / "none")):
        monkeypatch.setattr(sys, "executable", nothing)
        with pytest.raises(UnreadableModelError, match="no process could be started"):
            read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("pack", [checkpoint, old_checkpoint])
def test_nobody_is_told_to_load_a_stranger_s_file_unsafely(tmp_path, pack):
    for name, pickled in {
        "code": called("os", "system", number(1)),
        "class": pickle.dumps(CONFIG, 2),
        "opcode": b"\x80\x02}0.",
        "none": b"none",
    }.items():
        (tmp_path / f"{name}.pt").write_bytes(pack(pickled))
        for read in (read_weights, load_training, lambda path: load_suspect(path, CONFIG)):
            with pytest.raises(UnreadableModelError) as caught:
                read(tmp_path / f"{name}.pt")
            for advice in ("weights_only", "Weights only", "trust", "allowlist", "safe_globals"):
                assert advice not in str(caught.value)


# Archives


def stored(name, data, *, packed=False, shown=None):
    """A local header with its data, and what the directory has of it but the offset."""
    content = data
    if packed:
        deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
        content = deflate.compress(data) + deflate.flush()
    method, whole = (8 if packed else 0), len(data) if shown is None else shown
    fields = struct.pack("<4HLLLHH", 0, method, 0, 0, 0, len(content), whole, len(name), 0)
    local = b"PK\3\4" + struct.pack("<H", 20) + fields + name.encode() + content
    entry = b"PK\1\2" + struct.pack("<HH", 20, 20) + fields + bytes(10)
    return local, entry, name.encode()


def zipped(parts, *, before=b"", between=b"", end=None, after=b""):
    """An archive of `stored` parts; `end` replaces the directory's count, size and offset."""
    body, directory = before, b""
    for local, entry, name in parts:
        directory += entry + struct.pack("<L", len(body)) + name
        body += local
    found = (len(parts), len(directory), len(body)) if end is None else end
    last = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, found[0], *found, 0)
    return body + directory + between + last + after


def tensor_pickle(names=("w",), count=4):
    """A state dict of vectors that are all in storage 0."""
    out = io.BytesIO()
    base = torch.zeros(count)
    torch.save(dict.fromkeys(names, base), out)
    with zipfile.ZipFile(out) as archive:
        return archive.read("archive/data.pkl")


NUMBERS = struct.pack("<4f", 1, 2, 3, 4)
PLAIN = (
    stored("archive/data.pkl", tensor_pickle()),
    stored("archive/byteorder", b"little"),
    stored("archive/data/0", NUMBERS),
    stored("archive/version", b"3\n"),
)


def test_an_archive_made_by_hand_is_read(tmp_path):
    (tmp_path / "x.pt").write_bytes(zipped(PLAIN))
    assert read_weights(tmp_path / "x.pt").tensors["w"].tolist() == [1, 2, 3, 4]


def two_directories(size):
    """One directory lists a part of `size` zeros, packed; the one before the end lists none such.

    Python's reader goes by the place of the end record, PyTorch's by the offset in it.
    """
    pickled = stored("archive/data.pkl", tensor_pickle(count=size // 4))
    bomb = (pickled, PLAIN[1], stored("archive/data/0", bytes(size), packed=True), PLAIN[3])
    whole = zipped(bomb)
    hidden = whole[-22:]
    count, length, start = struct.unpack("<2xH2L", hidden[8:20])
    other = zipped((pickled, *PLAIN[1:]), before=whole[:-22])
    assert struct.unpack("<2xH2L", other[-22:][8:20])[:2] == (count, length)
    return other[:-22] + b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count, count, length, start, 0)


def test_an_archive_with_two_directories_is_refused_before_it_takes_memory(reading, tmp_path):
    (tmp_path / "x.pt").write_bytes(two_directories(2**27))
    assert (tmp_path / "x.pt").stat().st_size < 2**20
    said, grown = reading(tmp_path / "x.pt")
    assert re.match("UnreadableModelError .*(two directories|bomb)", said), said
    assert grown < 100


def test_an_archive_whose_directory_depends_on_the_reader_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(two_directories(64))
    with pytest.raises(UnreadableModelError, match="two directories"):
        read_weights(tmp_path / "x.pt")


def test_parts_that_overlap_or_are_there_twice_are_refused(tmp_path):
    other = stored("archive/data/0", NUMBERS[::-1])
    upper = stored("archive/DATA/0", NUMBERS)
    twice = zipped((*PLAIN, other))
    local = PLAIN[2][0]
    inside = local.replace(NUMBERS, stored("archive/data/1", b"abcd")[0])
    outer = stored("archive/data/0", inside)
    whole = zipped((outer, *PLAIN[:2], PLAIN[3]))
    hidden = whole.index(b"archive/data/1") - 30
    extra = stored("archive/data/1", b"abcd")
    size = len(whole) - 22 - struct.unpack("<L", whole[-6:-2])[0]
    overlap = (
        whole[:-22]
        + extra[1]
        + struct.pack("<L", hidden)
        + extra[2]
        + b"PK\5\6"
        + struct.pack("<4H2LH", 0, 0, 5, 5, size + 60, len(whole) - 22 - size, 0)
    )
    for data, words in (
        (twice, "two parts"),
        (zipped((*PLAIN, upper)), "cannot be read|w"),
        (overlap, "overlap"),
    ):
        (tmp_path / "x.pt").write_bytes(data)
        if words.startswith("cannot"):
            assert read_weights(tmp_path / "x.pt").tensors["w"].tolist() == [1, 2, 3, 4]
            continue
        with pytest.raises(UnreadableModelError, match=words):
            read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "data",
    [
        zipped(PLAIN, end=(4, 2**32 - 1, 2**32 - 1)),
        zipped(PLAIN, end=(2**16 - 1, 300, 100)),
        zipped(PLAIN, end=(4, 0, 0)),
        zipped(PLAIN, end=(0, 0, 0)),
        zipped((stored("archive/data.pkl", b"x", shown=5), *PLAIN[1:])),
        zipped((*PLAIN[:2], stored("archive/data/0", NUMBERS + b"more"), PLAIN[3])),
        zipped((*PLAIN[:2], stored("archive/data/0", NUMBERS[:-1]), PLAIN[3])),
        zipped((*PLAIN[:2], PLAIN[3])),
        zipped((PLAIN[0], stored("archive/byteorder", b"middle"), *PLAIN[2:])),
        zipped(PLAIN)[:-1],
        b"PK\3\4",
        b"PK\3\4" + bytes(200),
        b"PK\3\4" + bytes(70_000) + zipped(PLAIN)[-22:],
    ],
)
def test_a_damaged_archive_is_one_error_of_ours(tmp_path, data):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UnreadableModelError, match="cannot be read as a checkpoint"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("change", ["appended", "packed", "explained", "spread"])
def test_what_costs_a_thief_nothing_and_pytorch_reads_is_read(tmp_path, change):
    out = io.BytesIO()
    torch.save({"w": torch.arange(1000.0)}, out)
    data = out.getvalue()
    if change == "appended":
        data += b"PK\5" + bytes(1_000)
    else:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [(name, archive.read(name)) for name in archive.namelist()]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED * (change == "packed")) as archive:
            for name, part in parts:
                archive.writestr(name, part)
            if change == "explained":
                archive.comment = b"what came after the end record " * 9
        data = out.getvalue()
    if change == "spread":
        data = data[:-22] + bytes(100) + data[-22:]
    (tmp_path / "x.pt").write_bytes(data)
    genuine = torch.load(tmp_path / "x.pt", weights_only=True)
    assert tensors_digest(read_weights(tmp_path / "x.pt").tensors) == tensors_digest(genuine)


# What PyTorch reads, read by ours


def contents():
    """State dicts with everything that tensors of a network can be, by name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        base = torch.randn(6, 8)
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        ints = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
        kinds = {str(each): (10 * torch.randn(3, 2)).to(each) for each in (*floats, *ints)}
    tied = nn.Parameter(torch.ones(3))
    turned = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    return {
        "state_dict of a network": net.state_dict(),
        "parameters": dict(net.named_parameters()),
        "every kind of number": kinds,
        "strides": {"t": base.T, "step": base[1:5:2, ::3], "row": base[2], "whole": base},
        "tied": OrderedDict(a=tied, b=tied, c=tied[1:]),
        "empty and scalar": {"e": torch.empty(0, 3), "s": torch.tensor(2.5), "z": torch.empty(0)},
        "negated by a bit": {"n": turned, "plain": turned.clone()},
        "data parallel": {f"module.{k}": v for k, v in net.state_dict().items()},
        "channels last": {"w": net[0].weight.detach().to(memory_format=torch.channels_last)},
        "attributes": {"w": with_attribute(torch.ones(2)), "v": with_attribute(tied)},
    }


def with_attribute(tensor):
    tensor = tensor.detach().clone()
    tensor.remark = "kept by pickle"
    return tensor


FORMS = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", contents())
def test_what_pytorch_reads_is_read_with_equal_tensors(tmp_path, name, form, wrap):
    state = contents()[name]
    torch.save({wrap: state, "epoch": 3} if wrap else state, tmp_path / "x.pt", **FORMS[form])
    genuine = torch.load(tmp_path / "x.pt", weights_only=False)
    genuine = genuine[wrap] if wrap else genuine
    read = read_weights(tmp_path / "x.pt").tensors
    assert list(read) == list(genuine)
    assert tensors_digest(read) == tensors_digest(genuine)
    if name != "negated by a bit":  # numbers that were negated lie where there is room
        assert [t.stride() for t in read.values()] == [t.stride() for t in genuine.values()]
    assert not any(t.requires_grad or vars(t) for t in read.values())


def test_tensors_that_share_memory_share_it_once_read(tmp_path):
    torch.save(contents()["tied"], tmp_path / "x.pt")
    read = read_weights(tmp_path / "x.pt").tensors
    read["a"][1] = 7
    assert read["b"].tolist() == [1, 7, 1]
    assert read["c"].tolist() == [7, 1]


def test_big_endian_archives_are_turned(tmp_path):
    parts = (*PLAIN[:1], stored("archive/byteorder", b"big"))
    parts += (stored("archive/data/0", struct.pack(">4f", 1, 2, 3, 4)), PLAIN[3])
    (tmp_path / "x.pt").write_bytes(zipped(parts))
    assert read_weights(tmp_path / "x.pt").tensors["w"].tolist() == [1, 2, 3, 4]


def test_what_is_beside_the_weights_is_left_alone(tmp_path):
    beside = {
        "when": Path("x"),
        "who": SimpleNamespace(a=1),
        "net": nn.Linear(1, 1),
    }
    torch.save({"state_dict": {"w": torch.ones(2)}, **beside}, tmp_path / "x.pt")
    assert read_weights(tmp_path / "x.pt").tensors["w"].tolist() == [1, 1]
    torch.save({"w": torch.ones(2), "epoch": 3, "name": "x", "loss": 0.5}, tmp_path / "x.pt")
    assert list(read_weights(tmp_path / "x.pt").tensors) == ["w"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "'w' is a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "'w' is a sparse tensor"),
        (lambda: torch.ones(3, device="meta"), "'w' is a meta tensor"),
        (lambda: torch.ones(2, dtype=torch.complex64), "'w' is complex64"),
        (lambda: torch.ones(1).expand(10, 10), "'w' of shape .10, 10. does not hold"),
    ],
)
def test_a_tensor_of_another_kind_is_refused_by_its_name(tmp_path, make, words):
    torch.save({"v": torch.ones(1), "w": make()}, tmp_path / "x.pt")
    with pytest.raises(UnreadableModelError, match=words):
        read_weights(tmp_path / "x.pt")


def laid(offset, size, stride):
    """A state dict whose one tensor lies so in a storage of four numbers."""
    out = io.BytesIO()
    torch.save({"w": Laid(offset, size, stride)}, out)
    return out.getvalue()


class Laid:
    """Pickled, it is a tensor that lies as it likes."""

    def __init__(self, *place):
        self.place = place

    def __reduce__(self):
        storage = torch.tensor([1.0, 2.0, 3.0, 4.0]).storage()
        return torch._utils._rebuild_tensor_v2, (storage, *self.place, False, OrderedDict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (4,), (1,)),
        (5, (0,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (2**62, 4), (0, 0)),
        (0, (0, 2**62, 2**62), (1, 1, 1)),
        (0, (2**70,), (1,)),
        (0, (1,), (2**70,)),
        (2**70, (1,), (1,)),
        (0, (True,), (1,)),
        (0, ("4",), (1,)),
        (0, [4], [1]),
        (0, (1,) * 100, (1,) * 100),
    ],
)
def test_a_tensor_that_is_not_in_its_storage_is_refused(tmp_path, offset, size, stride):
    (tmp_path / "x.pt").write_bytes(laid(0, (2, 2), (2, 1)))
    assert read_weights(tmp_path / "x.pt").tensors["w"].tolist() == [[1, 2], [3, 4]]
    (tmp_path / "x.pt").write_bytes(laid(offset, size, stride))
    with pytest.raises(UnreadableModelError, match="'w'"):
        read_weights(tmp_path / "x.pt")


# Folders: old or new, and never of both

KILLED = """
import json, os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.files.config import ModelConfig
from nnpassport.scheme import OwnershipError
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
import test_redteam_files as cases

torch.set_num_threads(1)  # before anything is forked: a pool of threads does not survive it

def network(seed, width):
    config = replace(cases.CONFIG, arguments={**cases.CONFIG.arguments, "width": width})
    torch.manual_seed(seed)
    return config.build(), replace(config, notes={"seed": str(seed)})

def dying(calls):
    left = [calls]
    def wrap(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("replace", "rename", "unlink", "fsync", "open", "fdopen", "link"):
        setattr(os, name, wrap(getattr(os, name)))

def outcomes(root, same_shape, again):
    old, new = network(0, 0.1), network(1, 0.1 if same_shape else 0.05)
    names = {tensors_digest(m.state_dict()): c.notes["seed"] for m, c in (old, new)}
    found = []
    for calls in range(100):
        folder = root / str(calls)
        if again:
            save_model(folder, *old)
        child = os.fork()
        if child == 0:
            dying(calls)
            save_model(folder, *new)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        try:
            loaded = load_model(folder)
            weights = names[tensors_digest(loaded.model.state_dict())]
            found.append([weights, loaded.config.notes["seed"]])
        except OwnershipError:
            found.append(["none", "none" if not (folder / "config.json").exists() else "config"])
        save_model(folder, *new)
        assert sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) == [
            "config.json", "model.safetensors"]
        if status == 0:
            return found

print(json.dumps({f"{shapes} {before}": outcomes(Path(sys.argv[1], shapes, before),
                                                 shapes == "same", before == "again")
                  for shapes in ("same", "other") for before in ("again", "first")}))
"""


@pytest.fixture(scope="module")
def killed_saves(tmp_path_factory):
    """What was found after a save that was killed at each of its calls, for each kind of save."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(folder)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs to kill a process in the middle")
@pytest.mark.parametrize("shapes", ["same", "other"])
@pytest.mark.parametrize("before", ["again", "first"])
def test_whenever_a_save_is_killed_the_folder_is_old_or_new(killed_saves, shapes, before):
    found = killed_saves[f"{shapes} {before}"]
    assert len(found) > 10
    earlier = ["0", "0"] if before == "again" else ["none", "none"]
    assert found[0] == earlier
    assert found[-1] == ["1", "1"]
    assert {tuple(each) for each in found} == {tuple(earlier), ("1", "1")}
    assert found == sorted(found, key=lambda each: each == ["1", "1"])


def test_weights_that_were_exchanged_are_not_taken_for_the_config_s(tmp_path):
    with torch.random.fork_rng(devices=[]):
        one, other = CONFIG.build(), CONFIG.build()
    save_model(tmp_path / "one", one, CONFIG)
    save_model(tmp_path / "other", other, CONFIG)
    data = (tmp_path / "other" / "model.safetensors").read_bytes()
    (tmp_path / "one" / "model.safetensors").write_bytes(data)
    with pytest.raises(UnreadableModelError, match="other weights than its config"):
        load_model(tmp_path / "one")
    # What a stranger's config says of his weights is not asked: it would be a way not to be read.
    suspect = load_suspect(tmp_path / "one").model
    assert tensors_digest(suspect.state_dict()) == tensors_digest(other.state_dict())


def test_a_folder_from_before_there_were_digests_is_read(tmp_path):
    with torch.random.fork_rng(devices=[]):
        model = CONFIG.build()
    save_model(tmp_path, model, CONFIG)
    (tmp_path / "config.json").write_bytes(config_bytes(CONFIG))
    assert tensors_digest(load_model(tmp_path).model.state_dict()) == tensors_digest(
        model.state_dict()
    )


@pytest.mark.parametrize("value", [3, "", "x" * 64, "A" * 64, None, ["0" * 64]])
def test_a_digest_that_is_none_is_refused(tmp_path, value):
    values = json.loads(config_bytes(CONFIG)) | {"weights_sha256": value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UnreadableModelError, match="weights_sha256"):
        read_config_file(tmp_path / "config.json")


# Names in reports and on terminals

FORMULA, REVERSED, DRIVING = r"$\frac{1}$", "bob\u202egnp.exe", "mallory\x1b[2J\x1b]0;x\x07"
NAMES = (FORMULA, REVERSED, DRIVING, "[/b]", "<script>alert(1)</script>", "| x |\n# y", "W" * 200)
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def verdict(owner):
    """What `verify --json` says of a key of this owner, without a network."""
    return {
        "scheme": "passport-v2",
        "accepted": True,
        "marked": True,
        "reason": f"the key of {owner} matches",
        "matches": 64,
        "bits": 64,
        "match_rate": 1.0,
        "log10_p_value": -19.3,
        "log10_alpha": -9.0,
        "layers": {owner: [64, 64]},
        "fidelity": None,
        "alignment": None,
        "claim": None,
        "digests": {f"{owner}.safetensors": "0" * 64},
        "read": "as it stands",
        "suspect": {"file": owner, "appeared": None},
        "key": {"owner": owner, "fingerprint": "0" * 64},
        "made_with": None,
    }


def hearing(owner):
    """What `judge --json` says where this owner and another claim a network."""
    found = verdict(owner)
    claimants = [
        {
            "name": name,
            "owner": name,
            "fingerprint": "0" * 64,
            "proves": name == owner,
            "refused": None,
            "unchecked": None,
            "readings": {"as it stands": found},
            "elsewhere": {"other": {"as it stands": found}} if name == owner else {},
            "related": None,
            "akin": {},
            "work": None,
            "notes": [name],
            "standing": None,
        }
        for name in (owner, "other")
    ]
    return {
        "ruling": "owner",
        "owner": owner,
        "owners": [owner],
        "reasons": [f"{owner} was first"],
        "claimants": claimants,
        "suspect": {"file": owner, "appeared": None, "digests": {owner: "0" * 64}},
        "made_with": None,
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_on_every_page(name):
    for page in (verdictpage.verdict_page(verdict(name)), verdictpage.hearing_page(hearing(name))):
        assert not UNSEEN.search(page)
        assert "<script>alert" not in page
        if name == FORMULA:
            assert name in page
            assert re.search(r"<text[^>]*>[^<]*\$\\frac\{1\}\$", page)
        if name == REVERSED:
            assert r"bob\u202egnp.exe" in page
            assert all(
                r"\u202e" in label for label in re.findall('aria-label="([^"]*bob[^"]*)', page)
            )
        for text in re.findall("<text[^>]*>([^<]*)</text>", page):
            assert len(text) < 120


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_every_figure_of_ours(name):
    figure = report.png(
        [
            report.Panel(
                name, [report.Row(name, [1.0], "plain", name)], name, (0, 2), {1: "one"}, (1, name)
            )
        ]
    )
    assert figure.startswith(b"\x89PNG")
    drawn = report.svg(
        report.Panel(
            name, [report.Row(name, [1.0], "plain", name)], name, (0, 2), {1: "one"}, (1, name)
        ),
        "x",
    )
    assert not UNSEEN.search(drawn)
    curve = curves.Line(name, [(0.0, 0.5), (1.0, 1.0)], "plain")
    assert not UNSEEN.search(curves.plot_svg(curves.Plot(name, [curve], name, (0.5, name)), "x"))


def test_every_figure_of_ours_is_drawn_in_the_one_style():
    root = Path(report.__file__).parents[3]
    for path in (*(root / "src").rglob("*.py"), *(root / "benchmarks").glob("*.py")):
        source = path.read_text()
        assert "pyplot" not in source or "not pyplot" in source.lower(), path
        if "savefig(" in source:
            assert re.search(r"with styled\(", source), path
            assert source.count("savefig(") == len(
                re.findall(r"as_text\(.+\)\.savefig\(", source)
            ), path
    with report.styled():
        import matplotlib as mpl

        assert mpl.rcParams["text.parse_math"] is False


@pytest.mark.parametrize("name", NAMES)
def test_a_name_cannot_drive_a_terminal(name, capsys):
    terminal.print_ruling(hearing(name))
    terminal.print_table((name, ""), [(name, name)])
    with terminal.progress_bar(name) as show:
        show(0.5, 1, name)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not re.search("\x1b\\[2J|\x1b\\]0|\x07|[\u202a-\u202e]", text)
    assert len(said.out) > 100


def judged(monkeypatch, capsys, name, folder, failing=None):
    """Exit code, stdout and stderr of `judge --report` where a claimant has this name."""
    facts = hearing(name)
    outcome = SimpleNamespace(value="owner")
    heard = SimpleNamespace(as_dict=lambda: facts, ruling=SimpleNamespace(outcome=outcome))
    monkeypatch.setattr("nnpassport.verification.hearing.hear", lambda *_, **__: heard)
    if failing is not None:
        monkeypatch.setattr(verdictpage, "page", failing)
    page = folder / "page.html"
    monkeypatch.setattr(sys, "argv", ["nnpassport", "judge", "x", "y", "--report", str(page)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("name", NAMES)
def test_a_claimant_s_name_keeps_nobody_from_a_ruling(monkeypatch, capsys, tmp_path, name):
    code, out, _ = judged(monkeypatch, capsys, name, tmp_path)
    assert code == 0
    assert "OWNER" in out
    assert (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_made_is_said_and_the_ruling_stands(monkeypatch, capsys, tmp_path):
    def failing(*_):
        raise ZeroDivisionError("a\x1b[2Jb")

    code, out, err = judged(monkeypatch, capsys, "alice", tmp_path, failing)
    assert code == 0
    assert "OWNER: alice" in out
    assert "was not written" in err
    assert r"ZeroDivisionError: a\x1b[2Jb" in err
    assert "Traceback" not in err


def test_a_page_that_cannot_be_written_is_said_and_the_ruling_stands(monkeypatch, capsys, tmp_path):
    (tmp_path / "page.html").mkdir()
    code, out, err = judged(monkeypatch, capsys, "alice", tmp_path)
    assert code == 0
    assert "OWNER: alice" in out
    assert "was not written" in err


# Where results go


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_no_file_takes_the_place_of_a_device_or_a_pipe(tmp_path):
    """As the superuser `--report /dev/null` would leave a machine without one."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    context = Context("passport-v2", "Alice", (_LAYER,), None, bytes(16))
    for write in (
        lambda: write_atomically(pipe, b"x"),
        lambda: save_key(Key(bytes(32), context), pipe, overwrite=True),
    ):
        with pytest.raises(UnwritableOutputError, match="would take its place"):
            write()
        assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


_LAYER = LayerShape("a", (4, 3), (3, 64), Geometry())
