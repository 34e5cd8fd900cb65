"""Derive a key's bits, passports and labels with nothing but Python's own library.

A judge who trusts nobody's code can run this, or write it again from `docs/derivation.md`:

    python examples/derive_independently.py SEED_HEX context.json
"""

import hashlib
import hmac
import json
import math
import pathlib
import sys


def prefixed(*parts: bytes) -> bytes:
    """Each part after its length as 8 bytes."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def stream(seed: bytes, context: bytes, purpose: str, layer: str, count: int) -> bytes:
    """The first `count` bytes of one stream: HKDF-SHA256, then SHAKE-256."""
    extracted = hmac.digest(hashlib.sha256(context).digest(), seed, "sha256")
    info = prefixed(b"nnpassport/v1", purpose.encode(), layer.encode())
    return hashlib.shake_256(hmac.digest(extracted, info + b"\x01", "sha256")).digest(count)


def derive(seed: bytes, context: bytes, text: str = "") -> dict:
    """Bits (0 or 1), passport integers (−127…127) and labels of the key of `seed`."""
    document = json.loads(context)
    layers = document["layers"]
    bits, passports = {}, {}
    for layer in layers:
        name, out = layer["name"], layer.get("bits", layer["weight"][0])
        packed = stream(seed, context, "signs", name, out // 8 + 1)
        bits[name] = [packed[i // 8] >> (7 - i % 8) & 1 for i in range(out)]
        purpose, size = "passport", 2 * math.prod(layer["passport"])
        if "bits" in layer:  # a projection: a row for each bit
            purpose, size = "projection", out * math.prod(layer["passport"])
        drawn = stream(seed, context, purpose, name, 2 * size + 64)
        passports[name] = [b - 256 * (b > 127) for b in drawn if b != 128][:size]
    spelled = [byte >> shift & 1 for byte in text.encode("ascii") for shift in range(7, -1, -1)]
    places = [(layer["name"], i) for layer in layers for i in range(len(bits[layer["name"]]))]
    for (name, i), bit in zip(places, spelled, strict=False):
        bits[name][i] ^= bit
    labels = []
    if document["triggers"] is not None:
        count, classes = document["triggers"]["count"], document["triggers"]["classes"]
        drawn = stream(seed, context, "trigger-labels", "", 8 * count + 256)
        words = [int.from_bytes(drawn[i : i + 4], "big") for i in range(0, len(drawn), 4)]
        labels = [w % classes for w in words if w < 2**32 // classes * classes][:count]
    ending = [b"text", text.encode("ascii")] if text else [b"no text"]
    fingerprint = hashlib.sha256(prefixed(b"nnpassport/key/v1", seed, context, *ending)).hexdigest()
    return {"bits": bits, "passports": passports, "labels": labels, "fingerprint": fingerprint}


if __name__ == "__main__":
    key = derive(bytes.fromhex(sys.argv[1]), pathlib.Path(sys.argv[2]).read_bytes())
    print(json.dumps(key))
