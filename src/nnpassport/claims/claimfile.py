"""Claim files: a signed envelope, and what a timestamp authority said about it. Nothing is checked.

claim file = {"envelope": DSSE envelope of the claim, "timestamp": RFC 3161 response or null}
"""

from pathlib import Path
from typing import Any, NamedTuple

from nnpassport.claims.signing import Envelope, document_of, envelope_from, read_small
from nnpassport.claims.timestamp import MAX_RESPONSE_BYTES
from nnpassport.files.disk import write_atomically
from nnpassport.keys.context import base64_bytes, base64_text, canonical_json, parse_canonical
from nnpassport.scheme import UnreadableClaimError, UnreadableKeyError

MAX_CLAIM_BYTES = 2**22
"""The largest claim file that is read."""


class SignedClaim(NamedTuple):
    """What is in a claim file. Nobody has checked it, and nothing in it may be believed yet.

    Attributes:
        response: an RFC 3161 response over `timestamped_bytes`, or None.
    """

    envelope: Envelope
    response: bytes | None


def timestamped_bytes(envelope: Envelope) -> bytes:
    """The bytes that a timestamp is over: the envelope as it stands in the claim file.

    The signature is among them, so the token proves that claim *and* signature were there.
    """
    return canonical_json(document_of(envelope))


def encode_signed(signed: SignedClaim) -> bytes:
    """The bytes of a claim file."""
    response = signed.response
    stamp = None if response is None else {"response": base64_text(response)}
    return canonical_json({"envelope": document_of(signed.envelope), "timestamp": stamp})


def decode_signed(data: bytes) -> SignedClaim:
    """What is in the bytes of a claim file; the claim itself is not parsed.

    Raises:
        UnreadableClaimError: too large, or anything but what `encode_signed` gives.
    """
    document = canonical_object(data, "claim file")
    try:
        envelope, stamp = document["envelope"], document["timestamp"]
        response = None if stamp is None else base64_bytes(stamp["response"])
        signed = SignedClaim(envelope_from(envelope), response)
        # Encoding again also catches fields that are not known.
        known = encode_signed(signed) == data and len(response or b"") <= MAX_RESPONSE_BYTES
    except UnreadableClaimError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known:
        raise UnreadableClaimError(
            "the claim file has unknown or missing fields, but needs an envelope, and a timestamp "
            f"of at most {MAX_RESPONSE_BYTES} bytes or null; use the original file"
        )
    return signed


def write_signed(signed: SignedClaim, path: Path) -> None:
    """Write a claim file, whole or not at all.

    Raises:
        UnwritableOutputError: it could not be written; what was at `path` is untouched.
    """
    write_atomically(path, encode_signed(signed))


def read_signed(path: Path) -> SignedClaim:
    """What is in a claim file, from anybody; see `open_claim`.

    Raises:
        UnreadableClaimError: missing, too large, corrupt or edited.
    """
    return decode_signed(read_small(path, "claim", MAX_CLAIM_BYTES, UnreadableClaimError))


def canonical_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object that `data` is the canonical encoding of.

    Raises:
        UnreadableClaimError: too large, or not in canonical form.
    """
    try:
        return parse_canonical(data, what, limit=MAX_CLAIM_BYTES)
    except UnreadableKeyError as error:
        raise UnreadableClaimError(str(error)) from None
