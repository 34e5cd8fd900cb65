"""Ed25519 keys in PEM files, and DSSE envelopes: a payload and its type under one signature.

signed bytes = "DSSEv1" ␣ |type| ␣ type ␣ |payload| ␣ payload          [DSSE v1.0, PAE]
"""

import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nnpassport.claims import curve
from nnpassport.files.disk import write_atomically
from nnpassport.keys.context import base64_bytes, base64_text
from nnpassport.scheme import (
    BadSignatureError,
    OwnershipError,
    UnreadableClaimError,
    UnreadableKeyError,
    UnwritableOutputError,
)

_MAX_PEM = 2**16
_BOUND = re.compile(r".* \(ed25519:([0-9a-f]{64})\)", re.DOTALL)
_FIELDS = {"payload", "payloadType", "signatures"}


class Envelope(NamedTuple):
    """A payload nobody has checked yet. `open_envelope` is the only way to what is inside.

    Attributes:
        keyid: the public key that the signature is said to be by, in hexadecimal.
    """

    payload: bytes
    payload_type: str
    signature: bytes
    keyid: str


def sign(payload: bytes, payload_type: str, signing: Ed25519PrivateKey) -> Envelope:
    """`payload` and its type in an envelope, signed. The same input gives the same bytes."""
    signature = signing.sign(_pre_authentication(payload, payload_type))
    return Envelope(payload, payload_type, signature, public_hex(signing.public_key()))


def open_envelope(envelope: Envelope, payload_type: str, owner: Ed25519PublicKey) -> bytes:
    """The payload, now that its signature, its type and its signer have been checked.

    Raises:
        BadSignatureError: nothing in the envelope may be believed.
    """
    if envelope.payload_type != payload_type:
        raise BadSignatureError(
            f"the envelope holds {ascii(envelope.payload_type)[:80]}, but needed is "
            f"{payload_type!r}; give a claim"
        )
    if envelope.keyid != public_hex(owner):
        raise BadSignatureError(
            f"the envelope names the signer {ascii(envelope.keyid)[:80]}, but the owner's public "
            f"key is {public_hex(owner)}; give the public key of whoever signed"
        )
    if not is_sound(owner):
        raise BadSignatureError(
            f"{public_hex(owner)} is no public key that one secret belongs to (of small order, or "
            "not encoded in the one way), so a signature under it holds for anything; needed: a "
            "key that `claim keygen` made"
        )
    try:
        owner.verify(envelope.signature, _pre_authentication(envelope.payload, payload_type))
    except InvalidSignature:
        raise BadSignatureError(
            f"the signature does not match the public key {public_hex(owner)}: the claim was "
            "altered, or somebody else signed it; use the original file"
        ) from None
    return envelope.payload


def document_of(envelope: Envelope) -> dict[str, Any]:
    """The envelope as DSSE's JSON object."""
    return {
        "payload": base64_text(envelope.payload),
        "payloadType": envelope.payload_type,
        "signatures": [{"keyid": envelope.keyid, "sig": base64_text(envelope.signature)}],
    }


def envelope_from(document: Any) -> Envelope:
    """The envelope in DSSE's JSON object: exactly one signature, and no other field.

    Raises:
        UnreadableClaimError: anything but what `document_of` gives.
    """
    try:
        (signature,) = document["signatures"]
        envelope = Envelope(
            base64_bytes(document["payload"]),
            document["payloadType"],
            base64_bytes(signature["sig"]),
            signature["keyid"],
        )
        texts = isinstance(envelope.payload_type, str) and isinstance(envelope.keyid, str)
        known = texts and set(document) == _FIELDS and set(signature) == {"keyid", "sig"}
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known:
        raise UnreadableClaimError(
            f"the envelope is not an object with {', '.join(sorted(_FIELDS))} and one signature "
            "with keyid and sig in base64; use the original claim file"
        )
    return envelope


def public_hex(owner: Ed25519PublicKey) -> str:
    """The 32 bytes of a public key in hexadecimal: how claims write it."""
    return owner.public_bytes_raw().hex()


def is_sound(owner: Ed25519PublicKey) -> bool:
    """Whether signatures under this public key prove that its secret was there: see `curve`."""
    return curve.is_sound(owner.public_bytes_raw())


def bound_name(name: str, owner: Ed25519PublicKey) -> str:
    """An owner's name with his public key in it, for the context of a key.

    Every secret of the key then depends on the public key, and a claim to it that another has
    signed does not hold.
    """
    return f"{name} (ed25519:{public_hex(owner)})"


def binding_of(name: str) -> str | None:
    """The public key, in hexadecimal, that an owner's name is bound to, or None."""
    found = _BOUND.fullmatch(name)
    return None if found is None else found[1]


def public_from_hex(text: str) -> Ed25519PublicKey:
    """The public key that `public_hex` wrote.

    Raises:
        BadSignatureError: `text` is no public key.
    """
    try:
        owner = Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))
        known = public_hex(owner) == text
    except ValueError:
        known = False
    if not known:
        raise BadSignatureError(
            f"{ascii(text)[:80]} is no public key; needed: 64 lower-case hexadecimal digits; give "
            "the owner's public key yourself"
        )
    return owner


def save_signing_key(
    signing: Ed25519PrivateKey, path: Path, public: Path, *, passphrase: str | None = None
) -> None:
    """Write both halves as PEM: the secret one (PKCS#8) with mode 0600 from its first byte.

    A passphrase goes through PBKDF2 with 2,048 rounds, which is all that this PEM writer has: it
    stops who finds the file, but only a long one stops whoever is ready to search.

    Raises:
        UnwritableOutputError: one of the files exists already or cannot be written.
        UnreadableKeyError: the passphrase is empty.
    """
    for each in (path, public):
        if os.path.lexists(each):
            raise UnwritableOutputError(
                f"{each} exists already; a key that is overwritten is lost for good: choose "
                "another name"
            )
    if passphrase == "":
        raise UnreadableKeyError(
            "the passphrase is empty; needed: at least one character; leave it out altogether to "
            "have no protection"
        )
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        protection = serialization.BestAvailableEncryption(passphrase.encode("utf-8"))
    pem = serialization.Encoding.PEM
    secret = signing.private_bytes(pem, serialization.PrivateFormat.PKCS8, protection)
    write_atomically(path, secret, mode=0o600)
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    write_atomically(public, signing.public_key().public_bytes(pem, spki))


def load_signing_key(path: Path, *, passphrase: str | None = None) -> Ed25519PrivateKey:
    """The secret Ed25519 key in a PEM file.

    Raises:
        UnreadableKeyError: missing, corrupt, of another kind, or another passphrase is needed.
    """
    secret = None if passphrase is None else passphrase.encode("utf-8")
    data = read_small(path, "signing key", _MAX_PEM, UnreadableKeyError)
    try:
        signing = serialization.load_pem_private_key(data, secret)
    except Exception:  # the library has many, and this is a TypeError: a passphrase too many
        signing = None
    # Raised out here so that no error about the secret's bytes is carried along as the context.
    if not isinstance(signing, Ed25519PrivateKey):
        given = "no" if passphrase is None else "this"
        raise UnreadableKeyError(
            f"{path} does not open as an Ed25519 signing key with {given} passphrase; needed: a "
            "PEM file (PKCS#8) and its passphrase if it has one; make one with `claim keygen`"
        )
    return signing


def load_public_key(path: Path) -> Ed25519PublicKey:
    """The public Ed25519 key in a PEM file.

    Raises:
        UnreadableKeyError: missing, corrupt, of another kind, or weak.
    """
    data = read_small(path, "public key", _MAX_PEM, UnreadableKeyError)
    try:
        owner = serialization.load_pem_public_key(data)
    except Exception:  # as above
        owner = None
    if not isinstance(owner, Ed25519PublicKey):
        raise UnreadableKeyError(
            f"{path} is no Ed25519 public key; needed: a PEM file as `claim keygen` writes beside "
            "the signing key; ask the owner for it"
        )
    if not is_sound(owner):
        raise UnreadableKeyError(
            f"{path} holds a public key that no one secret belongs to (of small order, or not "
            "encoded in the one way): signatures under it hold for anything; needed: a key that "
            "`claim keygen` made; ask the owner for it"
        )
    return owner


def read_small(path: Path, what: str, limit: int, error: type[OwnershipError]) -> bytes:
    """All bytes of a small regular file.

    Raises:
        OwnershipError: of the kind `error`: missing, no regular file, or over `limit` bytes.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise error(f"{path} is no {what} file; needed: a regular file; check the path")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as fault:
        raise error(
            f"the {what} {path} cannot be read ({fault.strerror}); needed: a file that exists and "
            "may be read; check the path"
        ) from fault
    if len(data) > limit:
        raise error(
            f"{path} has more than {limit} bytes, the most a {what} file may have; give the "
            f"{what} itself"
        )
    return data


def _pre_authentication(payload: bytes, payload_type: str) -> bytes:
    # The type is signed too, so that no other signed document passes for a claim.
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
