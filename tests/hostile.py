"""Files that mean harm: for each parser valid bytes, how to spoil them, and what is to read them.

Input n of a parser is the same everywhere and for ever: `hostile_input(name, parser, n)`.
`test_hostile.py` tries some hundred of each, `benchmarks/fuzz.py` as many as it is asked for.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import pickle
import pickletools
import queue
import re
import socket
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from PIL import Image
from pyarrow import parquet

from nnpassport.alignment.graph import axes_of_graph
from nnpassport.claims import diary, entries, timestamp
from nnpassport.claims.claim import PAYLOAD_TYPE, check_claim, claim_of, sign_claim
from nnpassport.claims.claimfile import (
    SignedClaim,
    decode_signed,
    encode_signed,
    timestamped_bytes,
)
from nnpassport.claims.signing import (
    document_of,
    envelope_from,
    load_public_key,
    load_signing_key,
    open_envelope,
    public_from_hex,
    public_hex,
    sign,
)
from nnpassport.claims.statement import STATEMENT_TYPE, stated
from nnpassport.data.decoding import Encoded, Wanted, decode_all
from nnpassport.data.images import read_images
from nnpassport.data.triggers import read_triggers
from nnpassport.embedding.checkpoint import load_suspect, load_training
from nnpassport.embedding.network.equations import Geometry
from nnpassport.embedding.network.tensors import read_weights
from nnpassport.files.config import ModelConfig, config_bytes
from nnpassport.files.onnx import read_graph
from nnpassport.keys.context import Context, LayerShape, TriggerShape, canonical_json
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import OwnershipError
from nnpassport.verification import cards

GOLDEN = Path(__file__).parent / "golden"
PASSPHRASE = "correct horse"
SIGNING = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"a hostile owner").digest())
OWNER = SIGNING.public_key()
# What could drive a terminal; a line may be broken.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_LONGEST_MESSAGE = 5_000

Seeds = tuple[bytes, ...]


class Parser(NamedTuple):
    """One way in.

    Attributes:
        seeds: files as they should be.
        mutate: makes a hostile one out of them.
        read: the function under test.
        share: one input in so many is worth its time (scrypt is slow on purpose).
    """

    seeds: Seeds
    mutate: Callable[[Random, Seeds], bytes]
    read: Callable[[bytes], object]
    share: int = 1


def hostile_input(name: str, parser: Parser, number: int) -> bytes:
    """Input `number` of the parser called `name`."""
    return parser.mutate(Random(f"{name} {number}"), parser.seeds)


def outcome(parser: Parser, data: bytes) -> str:
    """ "read", the name of an error of ours, or a text that starts with "BUG"."""
    return result(parser, data)[0]


def result(parser: Parser, data: bytes) -> tuple[str, object]:
    """The same, and what was read."""
    try:
        value = parser.read(data)
    except OwnershipError as error:
        said = str(error)
        if len(said) > _LONGEST_MESSAGE:
            return f"BUG: a message of {len(said)} characters in {type(error).__name__}", None
        if _CONTROL.search(said):
            return f"BUG: control characters in the message of {type(error).__name__}", None
        return type(error).__name__, None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"BUG: {type(error).__name__}: {ascii(str(error))[:100]}", None
    return "read", value


# Bytes


def spoil(rng: Random, data: bytes, others: Seeds = ()) -> bytes:
    """One to four of: flip, overwrite, cut, remove, repeat, splice; or something else."""
    if rng.random() < 0.02:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 5_000]))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = _spoiled_once(rng, data, others)
    return data


def _spoiled_once(rng: Random, data: bytes, others: Seeds) -> bytes:
    place, size = rng.randrange(len(data) + 1), rng.choice([1, 1, 2, 4, 8, 30])
    match rng.randrange(8):
        case 0 if data:
            place = min(place, len(data) - 1)
            return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        case 1:
            return data[:place] + rng.randbytes(size) + data[place + size :]
        case 2:
            return data[:place]
        case 3:
            return data[:place] + data[place + size :]
        case 4:
            return data[: place + size] + data[place:]
        case 5 if others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            return data[:place] + other[start : start + rng.choice([4, 50, 10**6])] + data[place:]
        case 6:
            number = rng.choice([0, 1, 2**7, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
            order = rng.choice(["<Q", ">Q"])
            return data[:place] + struct.pack(order, number) + data[place + 8 :]
    return data[:place] + rng.choice(_WORDS) + data[place + len(_WORDS[0]) :]


_WORDS = (
    *(b"\x00\x00\x00\x00", b"\xff\xff\xff\x7f", b"\x80\x80\x80\x80\x80\x01"),
    *(b"%s%n", b"\r\n\r\n"),
)


# JSON


class Literal(NamedTuple):
    """Text that goes into the JSON as it stands."""

    text: str


def _nest(rng: Random) -> Literal:
    # Around 1,000 is where Python's parser and printer give up, not always at the same depth.
    depth = rng.choice([5, 100, rng.randrange(900, 1_000), 3_000, 100_000])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    return Literal(opened * depth + "1" + closed * depth)


def _value(rng: Random) -> Any:
    return rng.choice(
        [
            *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**9, 10**18, 10**400),
            *(0.5, -0.0, 1e300, 1e-300, 65_536, 2**24, 2**28, 10_000),
            *(Literal("NaN"), Literal("-Infinity"), Literal("1e999"), Literal("1" * 5_000)),
            *(Literal("01"), Literal("1.0"), Literal("'a'"), Literal(""), Literal("\x00")),
            *("", "a", "0" * 64, "\x00", "\x1b[2J", "\ud800", "\u202e", "é", "e\u0301", "😀", "٣"),
            *("A" * 5_000, "null", "NaN", "../../etc/passwd", "=", "AA==", "AB==", "zz", " 00"),
            *([], {}, [[]], [None], {"": None}, [1, 2, 3], [[0, 0]], {"a": {"a": {}}}, [1] * 300),
            _nest(rng),
        ]
    )


def spoil_json(rng: Random, data: bytes) -> bytes:
    """The document with one to three values or keys changed; mostly still in canonical form."""
    document = json.loads(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        document = _changed(rng, document)
    literals: list[str] = []
    tight = rng.random() < 0.9
    text = json.dumps(
        _with_marks(document, literals), sort_keys=tight, separators=(",", ":") if tight else None
    )
    for number, literal in enumerate(literals):
        text = text.replace(f'"<literal {number}>"', literal)
    if rng.random() < 0.05 and (keys := re.findall(r'"\w+":', text)):
        key = rng.choice(keys)
        text = text.replace(key, key + "1," + key, 1)
    spoiled = text.encode("utf-8", "surrogatepass")
    return spoil(rng, spoiled) if rng.random() < 0.1 else spoiled


def _changed(rng: Random, node: Any) -> Any:
    """A copy of `node` in which something, here or further in, is something else."""
    inner = _as_json(node)
    if inner is not None and rng.random() < 0.9:  # JSON in a string, as contexts are
        return spoil_json(rng, inner).decode("utf-8", "replace")
    if isinstance(node, dict | list) and node and rng.random() < 0.85:
        copy = node.copy()
        place = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        match rng.randrange(10):
            case 0:
                del copy[place]
            case 1 if isinstance(copy, dict):
                copy[rng.choice(["", "more", "\x1b", place + " "])] = _value(rng)
            case 1:
                copy.insert(place, rng.choice([node[place], _value(rng)]))
            case 2 if isinstance(copy, dict):
                copy[rng.choice(list(node))] = copy.pop(place)
            case _:
                copy[place] = _changed(rng, node[place])
        return copy
    if isinstance(node, str) and node and rng.random() < 0.5:
        return spoil(rng, node.encode("utf-8", "replace")).decode("utf-8", "replace")
    if type(node) is int and rng.random() < 0.5:
        return node + rng.choice([-1, 1, 2**8, 2**20, -(2**20)])
    return _value(rng)


def _as_json(node: Any) -> bytes | None:
    if not isinstance(node, str) or not node.startswith("{"):
        return None
    try:
        json.loads(node)
    except (ValueError, RecursionError):  # spoiled already
        return None
    return node.encode("utf-8", "surrogatepass")


def _with_marks(node: Any, literals: list[str]) -> Any:
    if isinstance(node, Literal):
        literals.append(node.text)
        return f"<literal {len(literals) - 1}>"
    if isinstance(node, dict):
        return {key: _with_marks(value, literals) for key, value in node.items()}
    return [_with_marks(each, literals) for each in node] if isinstance(node, list) else node


def _json(rng: Random, seeds: Seeds) -> bytes:
    seed = rng.choice(seeds)
    return spoil_json(rng, seed) if rng.random() < 0.85 else spoil(rng, seed, seeds)


def _bytes(rng: Random, seeds: Seeds) -> bytes:
    return spoil(rng, rng.choice(seeds), seeds)


# Containers: what is inside is spoiled, and the container is whole again


def _pem(rng: Random, seeds: Seeds) -> bytes:
    seed = rng.choice(seeds)
    if rng.random() < 0.2:
        return spoil(rng, seed, seeds)
    head, *body, tail = seed.strip().splitlines()
    other = rng.choice(seeds).strip().splitlines()[1:-1]
    der = spoil(rng, base64.b64decode(b"".join(body)), (base64.b64decode(b"".join(other)),))
    return b"\n".join([head, base64.b64encode(der), tail, b""])


def _safetensors(rng: Random, seeds: Seeds) -> bytes:
    seed = rng.choice(seeds)
    if rng.random() < 0.3:
        return spoil(rng, seed, seeds)
    end = 8 + int.from_bytes(seed[:8], "little")
    header = spoil_json(rng, seed[8:end].rstrip())
    return struct.pack("<Q", len(header)) + header + seed[end:]


def _zip(rng: Random, seeds: Seeds) -> bytes:
    seed = rng.choice(seeds)
    if not seed.startswith(b"PK") or rng.random() < 0.3:
        return spoil(rng, seed, seeds)
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    # The first holds the pickle, or the header of an array: there is most to spoil.
    place = 0 if rng.random() < 0.6 else rng.randrange(len(parts))
    name, part = parts[place]
    parts[place] = name, spoil(rng, part, tuple(p for _, p in parts))
    if rng.random() < 0.1:
        parts[place] = name + rng.choice(["\x1b", ".npy", "/../x"]), part
    out = io.BytesIO()
    kind = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(out, "w", kind) as archive:
        for name, part in parts:
            archive.writestr(zipfile.ZipInfo(name), part, kind)  # no date: the same in every run
    return out.getvalue()


# Pickles: opcodes put in and taken out where others end, in an archive that is whole

_GLOBALS = (
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "torch FloatStorage"),
    *("torch._utils _rebuild_tensor_v3", "torch._tensor _rebuild_from_type_v2", "torch Size"),
    *("torch._utils _rebuild_sparse_tensor", "collections OrderedDict", "collections Counter"),
    *("builtins bytearray", "builtins dict", "builtins getattr", "os system", "a.b c.d", "\x1b é"),
    *("collections defaultdict", "copyreg _reconstructor", "numpy dtype", "torch float32"),
)
_PICKLED = (
    *(
        b"}",
        b"]",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
        b"N",
        b"\x88",
        b"\x8f",
        b"\x90",
        b"\x91",
    ),
    *(
        b"R",
        b"R",
        b"b",
        b"b",
        b"\x81",
        b"\x92",
        b"s",
        b"u",
        b"a",
        b"e",
        b"0",
        b"1",
        b"2",
        b"Q",
        b"\x93",
    ),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"h\x02", b"\x94", b"r\xff\xff\xff\x7f", b"\x82\x01"),
    *(
        b"K\x00",
        b"K\x02",
        b"J\xff\xff\xff\x7f",
        b"J\xff\xff\xff\xff",
        b"\x8a\x09" + bytes(8) + b"\x10",
    ),
    *(b"X\x01\x00\x00\x00w", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"\x8c\x03cpu"),
    *(
        b"G\x7f\xf8" + bytes(6),
        b"I9\n",
        b"S'a'\n",
        b"\x96" + struct.pack("<Q", 2**40) + b"x",
        b"\x97",
    ),
    *(b"\x8d" + struct.pack("<Q", 2**62), b"\x95" + struct.pack("<Q", 2**40), b"\x80\x05", b"."),
    *(b")" + b"2\x86" * 40 + b"K\x01", b"\x85" * 10_000, b"}" + b"(h\x00h\x00h\x00h\x00" * 100),
)


def _pickle(rng: Random, seeds: Seeds) -> bytes:
    """A torch archive, or an old file, whose pickle is one that no program of sense would write."""
    seed = rng.choice([seed for seed in seeds if seed.startswith(b"PK")])
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        parts = [(info.filename, archive.read(info)) for info in archive.infolist()]
    name, whole = parts[0]
    pickled = whole if rng.random() < 0.7 else b"\x80\x02" + _opcodes(rng, 20) + b"."
    for _ in range(rng.choice([1, 1, 2, 4, 10])):
        places = [place for _, _, place in pickletools.genops(whole)] if pickled is whole else []
        start = rng.choice(places) if places else rng.randrange(len(pickled))
        end = start + rng.choice([0, 0, 1, 2, 5])
        pickled = pickled[:start] + _opcodes(rng, rng.choice([1, 1, 2, 5])) + pickled[end:]
    if rng.random() < 0.2:
        first = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
        return b"".join((*(pickle.dumps(each, 2) for each in first), pickled, b"\x80\x02]."))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for each, part in ((name, pickled), *parts[1:]):
            archive.writestr(zipfile.ZipInfo(each), part)
    return out.getvalue()


def _opcodes(rng: Random, count: int) -> bytes:
    known = [f"c{each}\n".replace(" ", "\n", 1).encode() for each in _GLOBALS]
    return b"".join(rng.choice(known if rng.random() < 0.25 else _PICKLED) for _ in range(count))


def _parquet(rng: Random, seeds: Seeds) -> bytes:
    seed = rng.choice(seeds)
    size = int.from_bytes(seed[-8:-4], "little")
    body, footer = seed[: -8 - size], seed[-8 - size : -8]
    if rng.random() < 0.6:
        footer = spoil(rng, footer)
    else:
        body = spoil(rng, body)
    return body + footer + struct.pack("<I", len(footer)) + b"PAR1"


def _picture(rng: Random, seeds: Seeds) -> bytes:
    spoiled = spoil(rng, rng.choice(seeds), seeds)
    return _with_checksums(spoiled) if rng.random() < 0.5 else spoiled


def _with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks have the right CRC, so that what is in them is read."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, place = data[:8], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunk = data[place + 4 : place + 8 + size]
        out += data[place : place + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        place += 12 + size
    return out + data[place:]


# The parsers


def parsers(folder: Path) -> dict[str, Parser]:
    """Every parser of something that others send; `folder` is for the files they read."""
    return {**_of_evidence(folder), **_of_models(folder), **_of_images(folder)}


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Reads bytes as the content of `path`."""

    def reading(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return reading


def example_key() -> Key:
    """A derived key with everything that a context can have."""
    conv = LayerShape("a.0", (8, 3, 3, 3), (3, 5, 5), Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
    linear = LayerShape("fc", (4, 10), (10, 2), Geometry())
    triggers = TriggerShape(2, 3, (1, 4, 4))
    context = Context("passport-v3", "Zoë", (conv, linear), triggers, bytes(range(16)))
    return Key(hashlib.sha256(b"a seed").digest(), context)


def _saved(key: Key, path: Path) -> bytes:
    save_key(key, path, overwrite=True)
    return path.read_bytes()


def _explicit(key: Key) -> Key:
    tensors = {layer.name: key.layer_passport(layer.name) for layer in key.context.layers}
    signs = {layer.name: key.layer_signs(layer.name) for layer in key.context.layers}
    images, labels = key.trigger_set()
    given = {"passports": tensors, "signs": signs}
    return Key(key.seed, key.context, trigger_images=images, trigger_labels=labels, **given)


def _spoiled_key(rng: Random, seeds: Seeds) -> bytes:
    seed = rng.choice(seeds)
    document = json.loads(seed)
    secret = document["secret"]
    if rng.random() < 0.3 and secret["tensors"]:
        tensors = _safetensors(rng, (base64.b64decode(secret["tensors"]),))
        secret["tensors"] = base64.b64encode(tensors).decode()
        return canonical_json(document)
    return _json(rng, (seed,))


def _sealed(rng: Random, seeds: Seeds) -> bytes:
    """A protected key: its header spoiled, or its content before it was sealed."""
    (payload,) = seeds
    if rng.random() < 0.3:
        return _json(rng, (_protected(payload),))
    return _protected(spoil_json(rng, payload))


def _protected(payload: bytes) -> bytes:
    """A key file as `save_key` writes it, but with a fixed salt and the least cost."""
    cost = {"n": 2**14, "r": 8, "p": 1}
    protection = {"kdf": "scrypt", **cost, "cipher": "AES-256-GCM"}
    protection |= {"salt": bytes(16).hex(), "nonce": bytes(12).hex()}
    header = {"format": "nnpassport-key", "version": 1, "protection": protection}
    sealed = AESGCM(_stretched()).encrypt(bytes(12), payload, canonical_json(header))
    return canonical_json({**header, "secret": base64.b64encode(sealed).decode()})


@functools.cache
def _stretched() -> bytes:
    secret, salt = PASSPHRASE.encode(), bytes(16)
    return hashlib.scrypt(secret, salt=salt, n=2**14, r=8, p=1, maxmem=2**25, dklen=32)


def _of_evidence(folder: Path) -> dict[str, Parser]:
    key = example_key()
    claim = claim_of(key, OWNER, reference="0" * 64, date="2026-01-31")
    file = encode_signed(sign_claim(claim, SIGNING))
    golden = (GOLDEN / "claim-v1-stamped.json").read_bytes()
    stamped = decode_signed(golden)
    roots = timestamp.load_roots(GOLDEN / "claim-v1-root.pem")
    plain = _saved(key, folder / "key")
    text = _saved(Key(key.seed, key.context, text="A"), folder / "key")
    explicit = _saved(_explicit(key), folder / "key")

    def open_file(data: bytes) -> None:
        signed = decode_signed(data)
        owner = public_from_hex(signed.envelope.keyid)
        check_claim(signed, owner, key=key, roots=None if signed.response is None else roots)

    def envelope(data: bytes) -> None:
        open_file(b'{"envelope":' + data + b',"timestamp":null}')

    def payload(data: bytes) -> None:
        signed = decode_signed(encode_signed(SignedClaim(sign(data, PAYLOAD_TYPE, SIGNING), None)))
        check_claim(signed, OWNER, key=key)

    def statement(data: bytes) -> None:
        check_claim(SignedClaim(sign(data, STATEMENT_TYPE, SIGNING), None), OWNER, key=key)

    covered = timestamped_bytes(stamped.envelope)

    def response(data: bytes) -> None:
        timestamp.check_timestamp(timestamp._in_order(data), covered, roots)

    def stamped_file(data: bytes) -> None:
        open_file(encode_signed(stamped._replace(response=data)))

    told = diary_parsers(folder)
    public, secret = _pems()
    root = (GOLDEN / "claim-v1-root.pem").read_bytes()
    projected = LayerShape("fc", (4, 10), (10, 1), Geometry(), 6)
    uchida = Context("uchida", "Zoë", (projected,), None, bytes(16))
    context = (key.context.encode(), stamped_context(golden), uchida.encode())
    url = _answering(answers := queue.SimpleQueue())

    def answer(data: bytes) -> None:
        answers.put(data)
        timestamp.request_timestamp(covered, url, roots, timeout=5.0)

    return {
        "context": Parser(context, _json, Context.decode),
        "key": Parser((plain, text, explicit), _spoiled_key, _file(folder / "key", load_key)),
        "protected key": Parser(
            (canonical_json(json.loads(plain)["secret"]),),
            _sealed,
            _file(folder / "key", lambda path: load_key(path, passphrase=PASSPHRASE)),
            share=50,
        ),
        "claim file": Parser((file, golden), _json, open_file),
        "envelope": Parser((timestamped_bytes(stamped.envelope),), _json, envelope),
        "signed claim": Parser((claim.encode(),), _json, payload),
        "bill of materials": Parser(
            (json.dumps(_BILL).encode(),),
            _json,
            _file(folder / cards.BOM_FILE, lambda path: cards.declared_ancestors(path.parent)),
        ),
        "in-toto statement": Parser(
            (stated(claim.encode(), {"model.safetensors": "0" * 64}),), _json, statement
        ),
        "timestamp": Parser((stamped.response or b"",), _bytes, response),
        "claim with timestamp": Parser((stamped.response or b"",), _bytes, stamped_file),
        "answer of an authority": Parser(
            _answers(stamped.response or b""), _bytes, answer, share=20
        ),
        **told,
        "public key": Parser(public, _pem, _file(folder / "pub.pem", load_public_key)),
        "public key in hex": Parser(
            (public_hex(OWNER).encode(),),
            _bytes,
            lambda data: public_from_hex(data.decode("utf-8", "surrogateescape")),
        ),
        "signing key": Parser(secret, _pem, _file(folder / "key.pem", load_signing_key)),
        "root certificates": Parser(
            (root,), _pem, _file(folder / "root.pem", timestamp.load_roots)
        ),
    }


_BILL = {
    "bomFormat": "CycloneDX",
    "specVersion": "1.6",
    "metadata": {
        "component": {
            "type": "machine-learning-model",
            "name": "mine",
            "pedigree": {
                "ancestors": [
                    {
                        "type": "machine-learning-model",
                        "name": "theirs",
                        "hashes": [{"alg": "SHA-256", "content": "ab" * 32}],
                        "components": [{"hashes": [{"alg": "SHA-256", "content": "cd" * 32}]}],
                    }
                ]
            },
        }
    },
}


def diary_parsers(folder: Path) -> dict[str, Parser]:
    """Diaries: a whole file, what an owner signed into one, and tokens beside it."""
    golden = GOLDEN / "diary-v1"
    lines = (golden / diary.DIARY_FILE).read_bytes()
    stamps = (golden / diary.STAMPS_FILE).read_bytes()
    owner = load_public_key(GOLDEN / "claim-v1-owner.pub.pem")
    roots = timestamp.load_roots(golden / "root.pem")
    home = folder / "diary"
    home.mkdir(exist_ok=True)

    def read(_: object) -> None:
        found = diary.check(home, owner, roots=roots)
        found.as_dict()

    def whole(data: bytes) -> None:
        (home / diary.STAMPS_FILE).write_bytes(stamps)
        (home / diary.DIARY_FILE).write_bytes(data)
        read(None)

    def tokens(data: bytes) -> None:
        (home / diary.DIARY_FILE).write_bytes(lines)
        (home / diary.STAMPS_FILE).write_bytes(data + b"\n")
        read(None)

    def payload(data: bytes) -> None:
        document = document_of(sign(data, entries.PAYLOAD_TYPE, SIGNING))
        entries.opened(canonical_json(document), OWNER)

    facts, day = (
        entries.Facts(3, "ab" * 32, metrics={"loss": 0.5}),
        datetime(2026, 1, 1, tzinfo=UTC),
    )
    begun = entries.written(facts, SIGNING, None, date=day)
    return {
        "diary": Parser((lines,), _bytes, whole),
        "entry of a diary": Parser(
            (open_envelope(envelope_from(json.loads(begun)), entries.PAYLOAD_TYPE, OWNER),),
            _json,
            payload,
        ),
        "timestamps of a diary": Parser((stamps.rstrip(b"\n"),), _json, tokens),
    }


def _answers(response: bytes) -> Seeds:
    """What an authority's web server may say."""
    kind = b"Content-Type: application/timestamp-reply\r\n"
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(response), response)
    return (
        b"HTTP/1.1 200 OK\r\n%bContent-Length: %d\r\n\r\n%b" % (kind, len(response), response),
        b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n%b" % (kind, chunks),
        b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    )


def _answering(answers: queue.SimpleQueue[bytes]) -> str:
    """The address of a server that answers each request with the next of `answers`, raw."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65_536)
                connection.sendall(answers.get())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65_536):  # the request's body, so that nothing is reset
                    pass

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/"


def stamped_context(file: bytes) -> bytes:
    """The context in the bytes of a claim file."""
    return json.loads(decode_signed(file).envelope.payload)["context"].encode()


def _pems() -> tuple[Seeds, Seeds]:
    """Public and secret keys: the right kind and others."""
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    spki, pkcs8 = serialization.PublicFormat.SubjectPublicKeyInfo, serialization.PrivateFormat.PKCS8
    number = int(hashlib.sha256(b"elliptic").hexdigest(), 16) >> 8
    # From fixed bytes, so that the inputs are the same in every run.
    keys = [
        SIGNING,
        x25519.X25519PrivateKey.from_private_bytes(bytes(range(32))),
        ed448.Ed448PrivateKey.from_private_bytes(bytes(range(57))),
        ec.derive_private_key(number, ec.SECP256R1()),
    ]
    public = [each.public_key().public_bytes(pem, spki) for each in keys]
    public += [rsa.RSAPublicNumbers(65_537, 2**1024 + 643).public_key().public_bytes(pem, spki)]
    return tuple(public), tuple(each.private_bytes(pem, pkcs8, none) for each in keys)


def _torch_saved(content: object, **options: bool) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    # The old format names storages by their address; here they are numbered.
    names: dict[bytes, bytes] = {}

    def numbered(found: re.Match[bytes]) -> bytes:
        return b"X\x04\x00\x00\x00" + names.setdefault(found[1], b"%04d" % len(names))

    return re.sub(rb"X.\x00\x00\x00(\d{9,})(?=q)", numbered, out.getvalue(), flags=re.DOTALL)


def _of_models(folder: Path) -> dict[str, Parser]:
    rng = torch.Generator().manual_seed(0)
    half = torch.rand(4, generator=rng).half()
    tensors = {"a.weight": torch.rand(2, 3, generator=rng), "n": torch.tensor(3), "h": half}
    plain = _torch_saved(tensors)
    one = {"a.weight": tensors["a.weight"]}  # the order of several would depend on addresses
    legacy = _torch_saved({"state_dict": one}, _use_new_zipfile_serialization=False)
    wrapped = _torch_saved({"model": tensors, "epoch": 3, "history": {"loss": [1.0, 2.0]}})
    arguments = {"classes": 3, "width": 0.25, "norm": "group"}
    images = {"classes": tuple("abc"), "input_size": (3, 32, 32)}
    scale = {"mean": (0.5,) * 3, "std": (0.2,) * 3, "metrics": {"accuracy": 0.7}}
    configs = [
        ModelConfig("alexnet", arguments, **images, **scale, notes={"origin": "drawn"}),
        ModelConfig(
            "resnet18", {"classes": 3, "width": 0.25, "stem": "imagenet"}, **images, **scale
        ),
    ]
    suspect = folder / "suspect"
    suspect.mkdir(exist_ok=True)
    (suspect / "model.safetensors").write_bytes(safetensors.torch.save(tensors))
    return {
        "config": Parser(
            tuple(map(config_bytes, configs)),
            _json,
            _file(suspect / "config.json", lambda path: load_suspect(path.parent)),
        ),
        "safetensors": Parser(
            (safetensors.torch.save(tensors, {"format": "pt"}),),
            _safetensors,
            _file(folder / "model.safetensors", read_weights),
        ),
        "ONNX": Parser((_onnx(),), _bytes, _file(folder / "model.onnx", read_weights)),
        "ONNX graph": Parser(
            (_onnx(),),
            _bytes,
            _file(folder / "graph.onnx", lambda path: axes_of_graph(read_graph(path)).to_bytes()),
        ),
        "checkpoint": Parser(
            (plain, legacy, wrapped), _zip, _file(folder / "model.pt", read_weights), share=5
        ),
        "pickle": Parser((plain, wrapped), _pickle, _file(folder / "p.pt", read_weights), share=5),
        "training state": Parser(
            (wrapped, legacy), _zip, _file(folder / "training.pt", load_training)
        ),
    }


def _onnx() -> bytes:
    """Two layers as ONNX, on the wire: one keeps its name, of one the node says which it is."""

    def field(number: int, content: int | bytes) -> bytes:
        if isinstance(content, int):
            return bytes([number << 3, content])
        return bytes([number << 3 | 2, len(content)]) + content

    def tensor(name: bytes, kind: int, numbers: bytes) -> bytes:
        return field(1, 2) + field(1, 3) + field(2, kind) + field(8, name) + numbers

    plain = tensor(b"a.weight", 1, field(9, struct.pack("<6f", *range(6))))
    bits = b"".join(bytes([number | 128, 120]) for number in range(6))  # half precision, as varints
    half = tensor(b"val_1", 10, field(5, bits))
    scopes = field(1, b"pkg.torch.onnx.name_scopes") + field(2, b"['', 'b', 'linear']")
    named = field(1, b"y") + field(1, b"val_1") + field(4, b"MatMul") + field(9, scopes)
    first = field(1, b"x") + field(1, b"a.weight") + field(2, b"y") + field(4, b"Gemm")
    graph = field(1, first) + field(1, named) + field(5, plain) + field(5, half)
    size = len(graph)
    return field(1, 8) + b"\x3a" + bytes([size & 127 | 128, size >> 7]) + graph


def _pictures() -> Seeds:
    """Small pictures in every format that is read."""
    rng = Random(0)
    pixels = np.frombuffer(rng.randbytes(8 * 8 * 4), np.uint8).reshape(8, 8, 4)
    colours, made = Image.fromarray(pixels), []
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    kinds = [("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")]
    kinds += [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGBA"), ("GIF", "P")]
    kinds += [("BMP", "RGB"), ("TIFF", "RGBA"), ("TIFF", "I;16"), ("PPM", "RGB")]
    for form, mode in kinds:
        grey = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
        stored, out = grey if mode == "I;16" else colours.convert(mode), io.BytesIO()
        stored.save(out, form, **({"exif": exif} if form in {"JPEG", "PNG"} else {}))
        made.append(out.getvalue())
    return tuple(made)


def _table(columns: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    table = pa.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata), out, compression="snappy")
    return out.getvalue()


def _of_images(folder: Path) -> dict[str, Parser]:
    pictures = _pictures()
    png = pictures[4:6]
    named = [{"bytes": each, "path": "a.png"} for each in png]
    names = {"info": {"features": {"label": {"names": ["cat", "dog"]}}}}
    tables = (
        _table({"image": named, "label": [0, 1]}),
        _table({"image": named, "label": [0, 1]}, {"huggingface": json.dumps(names)}),
        _table({"image": list(png), "label": ["cat", "dog"]}),
        _table({"image": named, "crop32": named, "label": pa.array([3, 1], pa.uint64())}),
        _table({"image": list(png), "label": pa.array(["a", "b"]).dictionary_encode()}),
    )
    arrays = io.BytesIO()
    grey = np.zeros((4, 5, 5), np.uint8)
    np.savez(arrays, images=grey, labels=np.arange(4), classes=np.array(list("abcd")))
    packed = io.BytesIO()
    np.savez_compressed(packed, images=grey, labels=np.arange(4))
    classes = folder / "classes"
    for name in "ab":
        (classes / name).mkdir(parents=True, exist_ok=True)
        (classes / name / "0.png").write_bytes(png[0])

    def decoded(data: bytes) -> object:
        return decode_all(iter([Encoded("it", data, 0)]), 1, Wanted(8, 3), source="hostile")

    return {
        "picture": Parser(pictures, _picture, decoded),
        "folder of pictures": Parser(
            pictures,
            _picture,
            _file(
                classes / "b" / "0.png",
                lambda _: read_images(classes, size=8, channels=1, cache=False),
            ),
        ),
        "Parquet": Parser(
            tables,
            _parquet,
            _file(folder / "x.parquet", lambda path: read_images(path, size=8, cache=False)),
        ),
        "triggers": Parser(tables, _parquet, _file(folder / "t.parquet", read_triggers)),
        "arrays": Parser(
            (arrays.getvalue(), packed.getvalue()),
            _zip,
            _file(folder / "x.npz", lambda path: read_images(path, cache=False)),
        ),
    }
