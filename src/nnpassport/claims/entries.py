"""Entries of a diary of training: signed, and each names the one before. Nothing is dated here.

line n   = canonical JSON of a DSSE envelope of entry n, and a line feed
entry n  = canonical JSON; its "before" is SHA-256 of line n − 1, signature and all, without the
           line feed

So whoever signs or timestamps one line vouches for all lines before it. `docs/diary.md` is the
specification for those who do not read Python.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nnpassport.claims.claimfile import canonical_object
from nnpassport.claims.signing import document_of, envelope_from, open_envelope, public_hex, sign
from nnpassport.keys.context import canonical_json
from nnpassport.scheme import BadSignatureError, UnreadableClaimError

PAYLOAD_TYPE = "application/vnd.nnpassport.diary.v1+json"
MAX_ENTRY_BYTES = 2**14
"""The longest line that is read."""

MOST_ENTRIES = 2**17
"""As many as fifteen years have hours."""

_MOST_METRICS = 32
_LONGEST_NAME = 100
_LONGEST_NOTE = 200
_MOST_STEPS = 2**53
_DIGEST = re.compile("[0-9a-f]{64}")
_FIELDS = {
    *("before", "checkpoint", "configuration", "data", "date", "metrics", "note", "number"),
    *("owner_key", "state", "step"),
}


class Facts(NamedTuple):
    """What a training has come to; every digest is 64 hexadecimal digits, or None.

    Attributes:
        step: optimiser steps so far, of the run that `configuration` describes.
        checkpoint: digest of the network's tensors (`files.arrays.arrays_digest`).
        state: SHA-256 of the file that this training goes on from (optimiser, random numbers).
        configuration: SHA-256 of the bytes that say how it is trained.
        data: digest of what it is trained on.
        metrics: finite numbers by name.
        note: up to 200 printable characters.
    """

    step: int
    checkpoint: str | None = None
    state: str | None = None
    configuration: str | None = None
    data: str | None = None
    metrics: Mapping[str, float] = {}
    note: str = ""


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """One entry. There is no floating-point number in its encoding, and nothing secret.

    Attributes:
        number: from 0, without a gap.
        before: SHA-256 (hex) of the line before; None in the first.
        owner_key: the Ed25519 public key that signs this diary, in hexadecimal.
        date: by the owner's own clock, such as "2026-01-31T12:00:00Z". Only a timestamp proves one.
    """

    number: int
    before: str | None
    owner_key: str
    date: str
    facts: Facts = field(default=Facts(0))

    def __post_init__(self) -> None:
        facts = self.facts
        for count in (self.number, facts.step):
            known = type(count) is int and 0 <= count < _MOST_STEPS
            _require(known, f"the count {count!r:.40}", f"a whole number from 0 to {_MOST_STEPS}")
        given = (self.before, facts.checkpoint, facts.state, facts.configuration, facts.data)
        for digest in (self.owner_key, *(each for each in given if each is not None)):
            known = isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None
            _require(known, f"the digest or key {digest!a:.80}", "64 hex digits")
        first = (self.before is None) == (self.number == 0)
        _require(first, f"number {self.number} before {self.before!s:.8}", "the digest before it")
        _require(
            _is_moment(self.date), f"the date {self.date!a:.40}", "one as 2026-01-31T12:00:00Z"
        )
        note = facts.note
        sound = isinstance(note, str) and note.isprintable() and len(note) <= _LONGEST_NOTE
        _require(sound, f"the note {note!a:.40}", f"at most {_LONGEST_NOTE} printable characters")
        _require(len(facts.metrics) <= _MOST_METRICS, "too many metrics", f"{_MOST_METRICS}")
        for name, value in facts.metrics.items():
            sound = isinstance(name, str) and name.isprintable() and len(name) <= _LONGEST_NAME
            finite = type(value) is float and math.isfinite(value)
            _require(sound and finite, f"{name!a:.40} of {value!r:.40}", "finite numbers by name")

    def encode(self) -> bytes:
        """The one encoding of this entry; numbers with a point are texts, as in a claim's facts."""
        facts = self.facts
        return canonical_json(
            {
                **facts._asdict(),
                "metrics": {name: repr(value) for name, value in facts.metrics.items()},
                "number": self.number,
                "before": self.before,
                "owner_key": self.owner_key,
                "date": self.date,
            }
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        facts = {**self.facts._asdict(), "metrics": dict(self.facts.metrics)}
        return {"number": self.number, "date": self.date, "before": self.before, **facts}


class Line(NamedTuple):
    """A line whose signature holds, and its SHA-256 (hex): what the next one has to name."""

    entry: Entry
    digest: str


def written(
    facts: Facts, signing: Ed25519PrivateKey, before: Line | None, *, date: datetime | None = None
) -> bytes:
    """The line of an entry after `before`, signed, without the line feed.

    Raises:
        BadSignatureError: the entry before is signed with another key.
        UnreadableClaimError: the facts cannot be written into an entry.
    """
    owner = public_hex(signing.public_key())
    if before is not None and before.entry.owner_key != owner:
        raise BadSignatureError(
            f"the diary is signed with {before.entry.owner_key}, but the signing key given is "
            f"that of {owner}; go on with the key that it was begun with"
        )
    now = datetime.now(UTC) if date is None else date.astimezone(UTC)
    entry = Entry(
        number=0 if before is None else before.entry.number + 1,
        before=None if before is None else before.digest,
        owner_key=owner,
        date=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        facts=facts._replace(metrics={n: float(value) for n, value in facts.metrics.items()}),
    )
    line = canonical_json(document_of(sign(entry.encode(), PAYLOAD_TYPE, signing)))
    _require(len(line) <= MAX_ENTRY_BYTES, f"{len(line)} bytes", f"at most {MAX_ENTRY_BYTES}")
    return line


def opened(line: bytes, owner: Ed25519PublicKey) -> Line:
    """The entry in a line without its line feed: the signature is checked first, then it is parsed.

    Raises:
        BadSignatureError: nothing in the line may be believed.
        UnreadableClaimError: it is not in the one form that there is.
    """
    _require(len(line) <= MAX_ENTRY_BYTES, f"{len(line)} bytes", f"at most {MAX_ENTRY_BYTES}")
    document = canonical_object(line, "entry of a diary")
    entry = _parsed(open_envelope(envelope_from(document), PAYLOAD_TYPE, owner))
    if entry.owner_key != public_hex(owner):
        raise BadSignatureError(
            f"entry {entry.number} names the public key {entry.owner_key}, but {public_hex(owner)} "
            "signed it; an owner signs for himself"
        )
    return Line(entry, hashlib.sha256(line).hexdigest())


def chained(lines: Iterable[bytes], owner: Ed25519PublicKey) -> Iterator[Line]:
    """The entries of a whole diary in order, each once it is known to follow the one before.

    Raises:
        BadSignatureError: a signature does not hold, or an entry does not name the one before it.
        UnreadableClaimError: a line is not in the one form that there is, or there are too many.
    """
    before: Line | None = None
    for number, line in enumerate(lines):
        _require(number < MOST_ENTRIES, "more entries", f"at most {MOST_ENTRIES}")
        found = opened(line, owner)
        wanted = None if before is None else before.digest
        if (found.entry.number, found.entry.before) != (number, wanted):
            raise BadSignatureError(
                f"line {number + 1} does not name the one before it: an entry was taken out, put "
                "in or exchanged; use the original diary"
            )
        before = found
        yield found


def _parsed(payload: bytes) -> Entry:
    document = canonical_object(payload, "entry of a diary")
    try:
        metrics = {name: float(text) for name, text in document["metrics"].items()}
        names = set(Facts._fields) - {"metrics"}
        facts = Facts(**{name: document[name] for name in names}, metrics=metrics)
        others = {name: document[name] for name in ("number", "before", "owner_key", "date")}
        entry = Entry(**others, facts=facts)
        known = set(document) == _FIELDS and entry.encode() == payload
    except UnreadableClaimError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    _require(known, "fields of another form", f"{', '.join(sorted(_FIELDS))}")
    return entry


def _require(holds: bool, given: str, needed: str) -> None:
    if not holds:
        raise UnreadableClaimError(
            f"an entry of the diary has {given}, but needs {needed}; write it with `diary add`, or "
            "use the original diary"
        )


def _is_moment(text: object) -> bool:
    try:
        if not isinstance(text, str):
            return False
        moment = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ")
        return moment.strftime("%Y-%m-%dT%H:%M:%SZ") == text
    except ValueError:
        return False
