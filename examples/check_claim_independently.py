"""Check a claim against a suspect without a line of nnpassport's code.

    python examples/check_claim_independently.py CLAIM OWNER.pub.pem KEY SUSPECT.safetensors

KEY is the disclosed key file, without a passphrase. Exit code 0: p is at most α, which is the
claim's own if it is timestamped and 2^-100 if not. 1: it is above, or the claim does not hold. 2:
a kind of key that is not read here. Whoever trusts nobody can write this again from
docs/claim-format.md and docs/derivation.md.
"""

import base64
import hashlib
import hmac
import itertools
import json
import math
import pathlib
import re
import sys
from fractions import Fraction

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from safetensors.numpy import load

PLAIN, STATEMENT = "application/vnd.nnpassport.claim.v1+json", "application/vnd.in-toto+json"
PREDICATE = "https://nnpassport.example/attestation/claim/v1"
SCHEMES = ("passport-v1", "passport-v2", "passport-v3", "pan")


def require(holds: bool, what: str, code: int = 1) -> None:
    """Stop unless it holds."""
    if not holds:
        print("REFUSED:" if code == 1 else "NOT CHECKED:", what)
        sys.exit(code)


def parsed(data: bytes) -> dict:
    """JSON in its one form."""
    document = json.loads(data)
    again = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    require(again.encode() == data, "JSON that is not canonical")
    return document


def prefixed(*parts: bytes) -> bytes:
    """Each part after its length as 8 bytes."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def stream(seed: bytes, context: bytes, purpose: bytes, layer: str, count: int) -> np.ndarray:
    """The first `count` bytes of one stream: HKDF-SHA256, then SHAKE-256."""
    extracted = hmac.digest(hashlib.sha256(context).digest(), seed, "sha256")
    info = prefixed(b"nnpassport/v1", purpose, layer.encode())
    key = hmac.digest(extracted, info + b"\x01", "sha256")
    return np.frombuffer(hashlib.shake_256(key).digest(count), np.uint8)


def mean_patch(passport: np.ndarray, layer: dict) -> np.ndarray:
    """m(P), (in, kernel…): the mean of what each place of the kernel meets as it slides over P."""
    geometry, kernel = layer["geometry"], layer["weight"][2:]
    require(geometry["padding_mode"] == "zeros", "padding other than with zeros", 2)
    if not kernel:  # fully connected
        return passport.mean(1)
    padded = np.pad(passport, [(0, 0), *geometry["padding"]])
    patch = np.empty((len(passport), *kernel))
    slides = kernel, geometry["dilation"], geometry["stride"], padded.shape[1:]
    axes = list(zip(*slides, strict=True))
    for place in itertools.product(*map(range, kernel)):
        met = [
            slice(at * dilation, size - (width - 1 - at) * dilation, stride)
            for at, (width, dilation, stride, size) in zip(place, axes, strict=True)
        ]
        patch[(slice(None), *place)] = padded[(slice(None), *met)].reshape(len(patch), -1).mean(1)
    return patch


def read_signs(weight: np.ndarray, layer: dict, seed: bytes, context: bytes) -> np.ndarray:
    """The sign of γ_o = ⟨W_o, m(P_γ)⟩ for each output channel o; 0 matches nothing."""
    size = math.prod(layer["passport"])
    drawn = stream(seed, context, b"passport", layer["name"], 2 * size + 64).view(np.int8)
    numbers = drawn[drawn != -128][:size].astype(np.float32) / np.float32(127)
    patch = mean_patch(numbers.astype(np.float64).reshape(layer["passport"]), layer)
    groups = layer["geometry"]["groups"]
    patches = patch.reshape(groups, -1).repeat(len(weight) // groups, axis=0)
    return np.sign((weight.reshape(len(weight), -1).astype(np.float64) * patches).sum(1))


def spelled(tensors: dict) -> bytes:
    """Tensors of 16-bit integers as a fingerprint has them."""
    parts = []
    for name, array in sorted(tensors.items()):
        require(array.dtype == np.int16, "tensors that were chosen, not derived: no p-value")
        shape = ",".join(map(str, array.shape)).encode()
        parts += [name.encode(), b"int16", shape, array.astype("<i2").tobytes()]
    return prefixed(*parts)


def read_channels(
    suspect: dict, layer: dict, seed: bytes, context: bytes, metric: np.ndarray | None
) -> np.ndarray:
    """The sign of γ_norm,o · ⟨W_o, m_o⟩ for each channel o that carries a bit."""
    form, name = layer["channels"], layer["name"]
    weight = suspect[f"{name}.weight"]
    rows = weight.reshape(len(weight), -1).astype(np.float64)
    root, z = stream(seed, context, b"channels", name, 32).tobytes(), np.empty(rows.shape)
    for o in range(len(rows)):
        drawn = hashlib.shake_256(root + o.to_bytes(8, "big")).digest(2 * rows.shape[1] + 64)
        numbers = np.frombuffer(drawn, np.int8)
        z[o] = numbers[numbers != -128][: rows.shape[1]]
    digest = ""
    if metric is not None:
        digest = hashlib.sha256(spelled({"metric": metric})).hexdigest()
        based = int(metric[0, 0] == -(2**15))  # no direction, but the weight of each input
        weights, metric = metric[0, 1:] * 2.0**-8 if based else 1.0, metric[based:]
        strengths, directions = metric[:, 0].astype(float), metric[:, 1:].astype(float)
        along = np.rint(z @ directions.T * (strengths * 2.0**-15))
        z = weights * z + (along @ directions) * 2.0**-23
    require(digest == form["metric"], f"another metric of {name} than the context's")
    scale = suspect.get(f"{form['norm']}.weight", np.ones(len(rows)))
    require(scale.shape == (len(rows),), f"a norm of another width behind {name}", 2)
    carriers = np.ones(len(rows), bool)
    if form["carriers"] is not None:
        bitmap = np.frombuffer(bytes.fromhex(form["carriers"]), np.uint8)
        carriers = np.unpackbits(bitmap)[: len(rows)].astype(bool)
    return (np.sign((rows * z).sum(1)) * np.sign(scale.astype(np.float64)))[carriers]


def opened_claim(file: dict, pem: bytes) -> dict:
    """What the owner signed, once the signature has been checked: a claim, or a statement of it."""
    envelope, owner = file["envelope"], serialization.load_pem_public_key(pem)
    payload = base64.b64decode(envelope["payload"], validate=True)
    (signature,) = envelope["signatures"]
    kind = envelope["payloadType"]
    require(kind in {PLAIN, STATEMENT}, f"an envelope of kind {kind!a:.80}", 2)
    spoken = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
    try:
        owner.verify(base64.b64decode(signature["sig"], validate=True), spoken)
    except InvalidSignature:
        require(False, "the signature does not hold")
    raw = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    signed, public = parsed(payload), owner.public_bytes(*raw).hex()
    claim = predicate_of(signed) if kind == STATEMENT else signed
    bound = re.fullmatch(r".* \(ed25519:([0-9a-f]{64})\)", claim["owner"], re.DOTALL)
    names = {claim["owner_key"], signature["keyid"], bound[1] if bound else public}
    require(names == {public}, "another public key is named than the one that signed")
    require(parsed(claim["context"].encode())["owner"] == claim["owner"], "two owners are named")
    print(f"signature: holds, by {claim['owner']!a}, {public}")
    return claim


def predicate_of(statement: dict) -> dict:
    """The claim in an in-toto statement, and which files it is about."""
    kind = statement["_type"], statement["predicateType"]
    require(kind == ("https://in-toto.io/Statement/v1", PREDICATE), "another statement", 2)
    for each in statement["subject"]:
        print(f"statement: of the file {each['name']!a}, {each['digest']['sha256']}")
    return statement["predicate"]


def matches(suspect: dict, secret: dict, tensors: dict) -> tuple[int, int]:
    """How many bits the weights read as the disclosed seed says, and how many there are."""
    seed, context = bytes.fromhex(secret["seed"]), secret["context"].encode()
    read, bits, layers = [], [], parsed(context)["layers"]
    # Of one name there is one stream: its bits would count as often as the layer is there.
    require(len({layer["name"] for layer in layers}) == len(layers), "one layer several times")
    for layer in layers:
        require("bits" not in layer, "bits that a projection reads", 2)
        weight = suspect.get(f"{layer['name']}.weight", np.empty(0))
        require(list(weight.shape) == layer["weight"], f"no {layer['name']} of this shape", 2)
        if "channels" in layer:
            metric = tensors.get(f"metrics/{layer['name']}")
            read.append(read_channels(suspect, layer, seed, context, metric))
        else:
            read.append(read_signs(weight, layer, seed, context))
        count = len(read[-1])
        drawn = stream(seed, context, b"signs", layer["name"], count // 8 + 1)
        bits.append(np.unpackbits(drawn)[:count])
    signs, text = np.concatenate(bits), (secret["text"] or "").encode()
    signs[: 8 * len(text)] ^= np.unpackbits(np.frombuffer(text, np.uint8))
    return int((np.concatenate(read) == signs * 2.0 - 1).sum()), len(signs)


def main(claim_path: str, owner_path: str, key_path: str, suspect_path: str) -> None:
    """Signature, commitment, derivation, bits, p-value: in this order."""
    file = parsed(pathlib.Path(claim_path).read_bytes())
    claim = opened_claim(file, pathlib.Path(owner_path).read_bytes())
    secret = parsed(pathlib.Path(key_path).read_bytes())["secret"]
    require(isinstance(secret, dict), "a key that is under a passphrase", 2)
    scheme = parsed(secret["context"].encode())["scheme"]
    require(scheme in SCHEMES, f"a key of scheme {scheme!a:.80}: here are {', '.join(SCHEMES)}", 2)
    given = base64.b64decode(secret["tensors"]) if secret["tensors"] else None
    tensors = {} if given is None else load(given)
    named = {f"metrics/{e['name']}" for e in parsed(secret["context"].encode())["layers"]}
    require(set(tensors) <= named, "tensors that were chosen, not derived: no p-value")
    require(secret["context"] == claim["context"], "the key is for another context")
    text = (secret["text"] or "").encode()
    parts = [bytes.fromhex(secret["seed"]), secret["context"].encode()]
    parts += [b"text", text] if text else [b"no text"]
    said = prefixed(b"nnpassport/key/v1", *parts) + spelled(tensors)
    fingerprint = hashlib.sha256(said).hexdigest()
    require(fingerprint == claim["fingerprint"], "the key has another fingerprint")
    print(f"key: the one committed to, {fingerprint}")
    read = pathlib.Path(suspect_path).read_bytes()
    print(f"suspect: {hashlib.sha256(read).hexdigest()}")
    k, n = matches(load(read), secret, tensors)
    p = Fraction(sum(math.comb(n, i) for i in range(k, n + 1)), 2**n)
    p = min(Fraction(1), p * 96 ** (len(text) + 1)) if text else p  # of all texts that could be
    print(f"bits: {k} of {n} match")
    print(f"p-value: 10^{math.log10(p.numerator) - math.log10(p.denominator):.6f}")
    stamped = file["timestamp"] is not None
    alpha = Fraction(1, 10 ** -claim["log10_alpha"]) if stamped else Fraction(1, 2**100)
    print(f"p is {'at most' if p <= alpha else 'above'} α = 10^{math.log10(alpha):.6f}")
    if stamped:
        data = json.dumps(file["envelope"], sort_keys=True, separators=(",", ":")).encode()
        also = file["timestamp"].get("also", [])
        print("if the suspect is younger than the timestamp, which these check and show:")
        if also:
            print(f"(there are {1 + len(also)}, of several authorities: one that holds is enough)")
        places = [".timestamp.response", *(f".timestamp.also[{n}]" for n in range(len(also)))]
        digest = hashlib.sha256(data).hexdigest()
        for place in places:
            print(f"  jq -j -r '{place}' {claim_path} | base64 -d > response")
            print(f"  openssl ts -verify -digest {digest} -in response -CAfile root.pem")
            print("  openssl ts -reply -in response -text")
    else:
        print("there is no timestamp: nothing proves how old the claim is")
    sys.exit(0 if p <= alpha else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
