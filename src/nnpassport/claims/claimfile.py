"""Claim files: a signed envelope, and what a timestamp authority said about it. Nothing is checked.

claim file = {"envelope": DSSE envelope of the claim, "timestamp": null or
              {"response": RFC 3161 response, "also": further ones, of other authorities, if any}}
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

MOST_TOKENS = 4
"""Timestamps of one claim, at most."""


class SignedClaim(NamedTuple):
    """What is in a claim file. Nobody has checked it, and nothing in it may be believed yet.

    Attributes:
        response: an RFC 3161 response over `timestamped_bytes`, or None.
        also: those of further authorities, over the same bytes.
    """

    envelope: Envelope
    response: bytes | None
    also: tuple[bytes, ...] = ()

    @property
    def responses(self) -> tuple[bytes, ...]:
        """All of them, in the order in which they were asked for."""
        return (*(() if self.response is None else (self.response,)), *self.also)

    def undated(self) -> "SignedClaim":
        """The same without any."""
        return self._replace(response=None, also=())

    def with_token(self, response: bytes) -> "SignedClaim":
        """The same with one more."""
        if self.response is None:
            return self._replace(response=response)
        return self._replace(also=(*self.also, response))


def timestamped_bytes(envelope: Envelope) -> bytes:
    """The bytes that a timestamp is over: the envelope as it stands in the claim file.

    The signature is among them, so the token proves that claim *and* signature were there.
    """
    return canonical_json(document_of(envelope))


def encode_signed(signed: SignedClaim) -> bytes:
    """The bytes of a claim file."""
    stamp: dict[str, Any] | None = None
    if signed.response is not None:
        # Absent, not empty: claims with one token encode as ever.
        also = {"also": [base64_text(each) for each in signed.also]} if signed.also else {}
        stamp = {"response": base64_text(signed.response), **also}
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
        also = () if stamp is None else tuple(map(base64_bytes, stamp.get("also", [])))
        signed = SignedClaim(envelope_from(envelope), response, also)
        sizes = [len(each) for each in signed.responses]
        # Encoding again also catches fields that are not known.
        known = encode_signed(signed) == data and len(sizes) <= MOST_TOKENS
        known = known and max(sizes, default=0) <= MAX_RESPONSE_BYTES
    except UnreadableClaimError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known:
        raise UnreadableClaimError(
            "the claim file has unknown or missing fields, but needs an envelope, and at most "
            f"{MOST_TOKENS} timestamps of at most {MAX_RESPONSE_BYTES} bytes, or null; use the "
            "original file"
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
