"""Claims: what an owner commits to before any dispute, signed, and timestamped if he likes.

`docs/claim-format.md` is the specification for those who do not read Python. Verify, then parse:
the only way from bytes to a `Claim` is through a checked signature.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from typing import Any, NamedTuple, final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nnpassport.claims.claimfile import (
    MAX_CLAIM_BYTES,
    MOST_TOKENS,
    SignedClaim,
    canonical_object,
    encode_signed,
    timestamped_bytes,
)
from nnpassport.claims.facts import Facts, facts_from
from nnpassport.claims.signing import Envelope, binding_of, open_envelope, public_hex, sign
from nnpassport.claims.statement import STATEMENT_TYPE, stated, statement_in
from nnpassport.claims.timestamp import (
    MAX_RESPONSE_BYTES,
    Timestamp,
    check_timestamp,
    request_timestamp,
)
from nnpassport.keys.context import Context, canonical_json
from nnpassport.keys.key import Key
from nnpassport.scheme import BadSignatureError, NoTimestampError, UnreadableClaimError

PAYLOAD_TYPE = "application/vnd.nnpassport.claim.v1+json"
MILLION = 1_000_000
_FORMAT = "nnpassport-claim"
_VERSION = 1
_LEAST_ALPHA = -1_000
_DIGEST = re.compile("[0-9a-f]{64}")


class Declared(NamedTuple):
    """The fidelity test that the owner declares: accuracy and ε_f, in parts per million."""

    target_ppm: int
    tolerance_ppm: int


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """What the owner commits to. Nothing in it is secret, and there is no floating-point number.

    The context is there in full and not as a digest: whoever reads the claim can hold its owner to
    scheme, layers and number of bits before any key is disclosed.

    Attributes:
        owner_key: the owner's Ed25519 public key, 32 bytes in hexadecimal.
        fingerprint: of the key, which stays secret; see `Key.fingerprint`.
        context: what the key was drawn for; its `owner` is the owner's name.
        reference: digest of the owner's released weights (`weights.tensors_digest`), or None.
        log10_alpha: the threshold on the p-value, a power of ten.
        fidelity: the declared target and tolerance, or None.
        date: the day by the owner's own clock, ISO 8601. Only a timestamp proves one.
        network: what the weights of `reference` do not say; None in claims from before there was
            such a field, and where there is no config.
        axes: SHA-256 (hex) of the table of axes (`alignment.table`) of the network that suspects
            are aligned to: the anchor that the context names, or else the reference. None in claims
            from before there was such a field, and where nothing was traced.
    """

    owner_key: str
    fingerprint: str
    context: Context
    reference: str | None
    log10_alpha: int
    fidelity: Declared | None
    date: str
    network: Facts | None = None
    axes: str | None = None

    def __post_init__(self) -> None:
        digests = [self.owner_key, self.fingerprint]
        digests += [each for each in (self.reference, self.axes) if each is not None]
        for digest in digests:
            _require(_is_digest(digest), f"the digest or key {digest!a:.80}", "64 hex digits")
        names = (self.context.owner, *(layer.name for layer in self.context.layers))
        for name in names:  # they will be printed, and come from anybody
            _require(name.isprintable(), f"the name {name!a:.80}", "printable characters")
        bound = binding_of(self.context.owner)
        if bound not in (None, self.owner_key):
            raise BadSignatureError(
                f"the key was drawn for the owner of the public key {bound}, and the claim is by "
                f"{self.owner_key!s:.64}; nobody but the first can claim it"
            )
        alpha = self.log10_alpha
        sound = type(alpha) is int and _LEAST_ALPHA <= alpha <= -1
        _require(sound, f"log10_alpha {alpha!r:.20}", f"an integer from {_LEAST_ALPHA} to -1")
        for share in self.fidelity or ():
            sound = type(share) is int and 0 <= share <= MILLION
            _require(sound, f"the share {share!r:.20}", f"an integer from 0 to {MILLION}")
        _require(_is_date(self.date), f"the date {self.date!a:.20}", "one such as 2026-01-31")
        if self.network is not None:
            committed = self.reference is not None
            _require(committed, "facts of a network, and no reference", "both, or no facts")
            if (fault := self.network.fault()) is not None:
                _require(False, *fault)
        anchor = self.context.anchor
        traced = self.axes is None or self.reference is not None or anchor is not None
        _require(traced, "axes of a network, and no reference", "both, or no axes")
        if anchor is not None:
            apart = "one network as reference and as anchor"
            needed = "the network before the mark as anchor: whoever has it can subtract the mark"
            _require(anchor != self.reference, apart, needed)

    def encode(self) -> bytes:
        """The one encoding of this claim: sorted keys, ASCII, no whitespace, no floats."""
        # Absent, not null: claims without it encode as ever.
        facts: dict[str, Any] = {}
        facts |= {} if self.network is None else {"network": self.network.as_json()}
        facts |= {} if self.axes is None else {"axes": self.axes}
        return canonical_json(
            {
                **facts,
                "format": _FORMAT,
                "version": _VERSION,
                "owner": self.context.owner,
                "owner_key": self.owner_key,
                "fingerprint": self.fingerprint,
                "context": self.context.encode().decode("ascii"),
                "reference": self.reference,
                "log10_alpha": self.log10_alpha,
                "fidelity": None if self.fidelity is None else self.fidelity._asdict(),
                "date": self.date,
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """What a reader wants to know, as plain JSON values."""
        layers = [f"{layer.name} {list(layer.weight)}" for layer in self.context.layers]
        return {
            "owner": self.context.owner,
            "owner_key": self.owner_key,
            "fingerprint": self.fingerprint,
            "scheme": self.context.scheme,
            "bits": self.context.bits,
            "layers": layers,
            "reference": self.reference,
            "log10_alpha": self.log10_alpha,
            "fidelity": None if self.fidelity is None else self.fidelity._asdict(),
            "date": self.date,
            "network": None if self.network is None else self.network.as_json(),
            "axes": self.axes,
            "anchor": self.context.anchor,
        }


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """Outcome of checking a claim file. `claim` is None where nothing in it may be believed."""

    holds: bool
    reason: str
    claim: Claim | None = None
    timestamp: Timestamp | None = None

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "holds": self.holds,
            "reason": self.reason,
            "claim": None if self.claim is None else self.claim.as_dict(),
            "timestamp": None if self.timestamp is None else self.timestamp.as_dict(),
        }


def claim_of(
    key: Key,
    owner: Ed25519PublicKey,
    *,
    reference: str | None = None,
    log10_alpha: int = -9,
    fidelity: Declared | None = None,
    date: str | None = None,
    network: Facts | None = None,
    axes: str | None = None,
) -> Claim:
    """The commitment to `key`; today's date if none is given.

    Raises:
        UnreadableClaimError: a part cannot be written into a claim.
    """
    return Claim(
        owner_key=public_hex(owner),
        fingerprint=key.fingerprint,
        context=key.context,
        reference=reference,
        log10_alpha=log10_alpha,
        fidelity=fidelity,
        date=Date.today().isoformat() if date is None else date,
        network=network,
        axes=axes,
    )


def sign_claim(claim: Claim, signing: Ed25519PrivateKey) -> SignedClaim:
    """The claim, signed by its owner; without a timestamp.

    Raises:
        BadSignatureError: the claim is for another public key.
        UnreadableClaimError: it is larger than what is read back.
    """
    return _signed(claim, claim.encode(), PAYLOAD_TYPE, signing)


def sign_statement(
    claim: Claim, subject: Mapping[str, str], signing: Ed25519PrivateKey
) -> SignedClaim:
    """The same as an in-toto statement: tools that know these check its signature.

    Args:
        claim: what is committed to.
        subject: SHA-256 (hex) of the files of the network that it commits to, by name.
        signing: the owner's.

    Raises:
        BadSignatureError: the claim is for another public key.
        UnreadableClaimError: it commits to no network, or is larger than what is read back.
    """
    committed = claim.reference is not None
    _require(committed, "no reference, so no files to be a statement of", "a reference")
    return _signed(claim, stated(claim.encode(), subject), STATEMENT_TYPE, signing)


def _signed(
    claim: Claim, payload: bytes, payload_type: str, signing: Ed25519PrivateKey
) -> SignedClaim:
    if claim.owner_key != public_hex(signing.public_key()):
        raise BadSignatureError(
            f"the claim names the public key {claim.owner_key}, but the signing key is another's; "
            "sign with the owner's own"
        )
    signed = SignedClaim(sign(payload, payload_type, signing), None)
    size = len(encode_signed(signed)) + MOST_TOKENS * 4 * MAX_RESPONSE_BYTES // 3
    _require(size <= MAX_CLAIM_BYTES, f"{size} bytes", f"at most {MAX_CLAIM_BYTES}")
    return signed


def stamp_claim(signed: SignedClaim, url: str, roots: Sequence[x509.Certificate]) -> SignedClaim:
    """The same claim with a timestamp by the authority at `url`, checked against `roots`.

    Beside those that it has: two authorities are harder to bribe, or to lose, than one.

    Raises:
        NoTimestampError: the authority gave no token that holds.
        UnreadableClaimError: it has as many as are read.
    """
    count = len(signed.responses)
    _require(count < MOST_TOKENS, f"{count} timestamps", f"at most {MOST_TOKENS}")
    return signed.with_token(request_timestamp(timestamped_bytes(signed.envelope), url, roots))


def open_claim(signed: SignedClaim, owner: Ed25519PublicKey) -> Claim:
    """Check the signature, and only then parse. A timestamp is not looked at.

    Raises:
        BadSignatureError: nothing in the envelope may be believed.
        UnreadableClaimError: its owner signed what is not a claim of this version.
    """
    return _parsed(_payload(signed.envelope, owner), owner)


def subject_of(signed: SignedClaim, owner: Ed25519PublicKey) -> Mapping[str, str] | None:
    """SHA-256 (hex) of the files that a statement is about, by name; None of a plain claim.

    Raises:
        BadSignatureError: nothing in the envelope may be believed.
        UnreadableClaimError: its owner signed what is no statement of ours.
    """
    if signed.envelope.payload_type != STATEMENT_TYPE:
        return None
    return statement_in(open_envelope(signed.envelope, STATEMENT_TYPE, owner)).subject


def _payload(envelope: Envelope, owner: Ed25519PublicKey) -> bytes:
    """The claim's encoding, once the signature over it, in the form it says it has, is checked."""
    if envelope.payload_type == STATEMENT_TYPE:
        return statement_in(open_envelope(envelope, STATEMENT_TYPE, owner)).claim
    return open_envelope(envelope, PAYLOAD_TYPE, owner)


def open_stamped_claim(
    signed: SignedClaim, owner: Ed25519PublicKey, roots: Sequence[x509.Certificate]
) -> tuple[Claim, Timestamp]:
    """Check the signature, then the timestamps, and only then parse.

    Of several tokens that hold the one counts that proves the claim oldest: whose last possible
    moment, by the accuracy that it states, is the earliest.

    Raises:
        BadSignatureError: signature or timestamp does not hold, or there is no timestamp.
        UnreadableClaimError: its owner signed what is not a claim of this version.
    """
    payload = _payload(signed.envelope, owner)
    held, faults = _tokens(signed, roots)
    if not held:
        raise BadSignatureError("; ".join(faults))
    return _parsed(payload, owner), min(held, key=lambda each: each.latest)


def _tokens(
    signed: SignedClaim, roots: Sequence[x509.Certificate]
) -> tuple[list[Timestamp], list[str]]:
    """The tokens that one of `roots` vouches for, and why others prove nothing."""
    held, faults = list[Timestamp](), list[str]()
    if not signed.responses:
        faults.append(
            "the claim has no timestamp, so nothing proves its age; to check the signature alone, "
            "give no root certificate"
        )
    for response in signed.responses:
        try:
            held.append(check_timestamp(response, timestamped_bytes(signed.envelope), roots))
        except BadSignatureError as error:
            faults.append(str(error))
    return held, faults


def check_claim(
    signed: SignedClaim,
    owner: Ed25519PublicKey,
    *,
    roots: Sequence[x509.Certificate] | None = None,
    key: Key | None = None,
) -> Finding:
    """Does the claim hold: signature, timestamp, and does `key`, if disclosed, open it?

    With `roots` a timestamp is required; without, there must be none.

    Raises:
        NoTimestampError: there is a timestamp and no root to check it against.
        UnreadableClaimError: its owner signed what is not a claim of this version.
    """
    timestamp, others = None, list[str]()
    try:
        if roots is None:
            claim = open_claim(signed, owner)
        else:
            claim, timestamp = open_stamped_claim(signed, owner, roots)
            others = _others(signed, roots, timestamp)
    except BadSignatureError as error:
        return Finding(False, str(error))
    if roots is None and signed.responses:
        raise NoTimestampError(
            "the signature holds, but the claim has a timestamp and there is no root certificate "
            "to check it against; needed: the authority's root as PEM, from a source you trust"
        )
    if key is not None and (fault := _fault_of(key, claim)) is not None:
        return Finding(False, fault, claim, timestamp)
    proved = ["the owner's signature holds"]
    if timestamp is None:
        proved += ["there is no timestamp, so nothing proves the claim's age"]
    else:
        proved += [f"the timestamp proves that it is from {timestamp.as_dict()['latest']} or older"]
    proved += others
    if key is not None:
        proved += ["the disclosed key is the one committed to"]
    return Finding(True, "; ".join(proved), claim, timestamp)


def _others(
    signed: SignedClaim, roots: Sequence[x509.Certificate], counted: Timestamp
) -> list[str]:
    """What further tokens say, in words."""
    held, faults = _tokens(signed, roots)
    said = [
        f"{each.authority} says {each.as_dict()['latest']} or older too"
        for each in held
        if each != counted
    ]
    return said + [f"another timestamp proves nothing: {fault}" for fault in faults]


def _parsed(payload: bytes, owner: Ed25519PublicKey) -> Claim:
    document = canonical_object(payload, "claim")
    try:
        fidelity = document["fidelity"]
        claim = Claim(
            owner_key=document["owner_key"],
            fingerprint=document["fingerprint"],
            context=Context.decode(document["context"].encode("ascii")),
            reference=document["reference"],
            log10_alpha=document["log10_alpha"],
            fidelity=None if fidelity is None else Declared(**fidelity),
            date=document["date"],
            network=facts_from(document["network"]) if "network" in document else None,
            axes=document.get("axes"),
        )
        # Encoding again also catches unknown fields, another version, and an owner who is not
        # the one of the context.
        known = claim.encode() == payload
    except (UnreadableClaimError, BadSignatureError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    _require(known, "fields of another form", f"those of {_FORMAT} version {_VERSION}")
    if claim.owner_key != public_hex(owner):
        raise BadSignatureError(
            f"the claim names the public key {claim.owner_key}, but {public_hex(owner)} signed it; "
            "an owner signs for himself"
        )
    return claim


def _fault_of(key: Key, claim: Claim) -> str | None:
    """Why `key` does not open the commitment, or None."""
    if key.context != claim.context:
        return "the disclosed key is for another context than the one committed to"
    if key.fingerprint != claim.fingerprint:
        return "the disclosed key has another fingerprint than the one committed to"
    return None


def _require(holds: bool, given: str, needed: str) -> None:
    if not holds:
        raise UnreadableClaimError(
            f"the claim has {given}, but needs {needed}; make it with `claim new`, or use the "
            "original file"
        )


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _is_date(text: object) -> bool:
    try:
        return isinstance(text, str) and Date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
