"""A diary of training: a folder that a run writes, and that anybody can check. No network is run.

    diary.jsonl               the entries, each signed and naming the one before (`entries`)
    stamps.jsonl              RFC 3161 responses over lines of it
    configurations/SHA.json   how it was trained, by the SHA-256 that entries name
    kept/00000012/            the checkpoint of entry 12: weights, config, and the state to go on

A token over one line dates it and all before it: they were there at its latest moment. What nobody
stamped was there when anybody says; the owner's own clock is a remark.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from nnpassport.claims.claimfile import canonical_object
from nnpassport.claims.entries import MAX_ENTRY_BYTES, Entry, Facts, Line, chained, opened, written
from nnpassport.claims.signing import envelope_from, public_from_hex, read_small
from nnpassport.claims.timestamp import (
    MAX_RESPONSE_BYTES,
    Timestamp,
    check_timestamp,
    request_timestamp,
)
from nnpassport.files.disk import locked, make_folder, write_atomically, writing
from nnpassport.keys.context import base64_bytes, base64_text, canonical_json
from nnpassport.scheme import (
    BadSignatureError,
    NoTimestampError,
    UnreadableClaimError,
    UnwritableOutputError,
)

DIARY_FILE, STAMPS_FILE = "diary.jsonl", "stamps.jsonl"
KEPT, CONFIGURATIONS = "kept", "configurations"
STATE_FILE = "training.pt"
MAX_DIARY_BYTES = 2**27
MOST_STAMPS = 2**13
MAX_CONFIGURATION_BYTES = 2**20


class Stamped(NamedTuple):
    """A token that holds, and the number of the entry that it is over."""

    number: int
    timestamp: Timestamp


@final
@dataclass(frozen=True, slots=True)
class Finding:
    """Outcome of checking a diary; without entries where nothing in it may be believed.

    Attributes:
        holds: whether every entry is signed by one key and names the one before.
        stamps: tokens that one of the roots vouches for.
        undated: what is wrong with the others, in words.
    """

    holds: bool
    reason: str
    entries: tuple[Entry, ...] = ()
    stamps: tuple[Stamped, ...] = ()
    undated: tuple[str, ...] = ()

    def dated(self, number: int) -> Timestamp | None:
        """The token that proves entry `number` oldest, of those over it or a later one."""
        over = [each.timestamp for each in self.stamps if each.number >= number]
        return min(over, key=lambda each: each.latest, default=None)

    def naming(self, checkpoint: str) -> Entry | None:
        """The first entry that names a network of this digest."""
        return next((e for e in self.entries if e.facts.checkpoint == checkpoint), None)

    @property
    def checkpoints(self) -> tuple[Entry, ...]:
        """Entries that name a network."""
        return tuple(each for each in self.entries if each.facts.checkpoint is not None)

    @property
    def spread(self) -> timedelta | None:
        """How long before its last entry was stamped the first token over any entry is proved.

        Zero, or None without tokens: nothing shows that the diary was not made in one go.
        """
        moments = [each.timestamp for each in self.stamps]
        if not moments:
            return None
        first = min(each.latest for each in moments)
        return max(timedelta(0), max(each.earliest for each in moments) - first)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        last = self.entries[-1] if self.entries else None
        spread = self.spread
        return {
            "holds": self.holds,
            "reason": self.reason,
            "entries": len(self.entries),
            "checkpoints": len(self.checkpoints),
            "last": None if last is None else last.as_dict(),
            "stamps": [{"entry": n, **stamp.as_dict()} for n, stamp in self.stamps],
            "spread_seconds": None if spread is None else spread.total_seconds(),
            "undated": list(self.undated),
        }


def begin(folder: Path, signing: Ed25519PrivateKey, note: str = "") -> Line:
    """Begin a diary in `folder`, which must not have one.

    Raises:
        UnwritableOutputError: there is a diary already, or the folder cannot be written.
    """
    with writing(folder), make_folder(folder):
        if os.path.lexists(folder / DIARY_FILE):
            raise UnwritableOutputError(
                f"{folder} has a diary already, and one that is overwritten is lost for good; "
                "needed: another folder, or `diary add` to go on with this one"
            )
        line = written(Facts(0, note=note), signing, None)
        write_atomically(folder / DIARY_FILE, line + b"\n")
    return opened(line, signing.public_key())


def add(folder: Path, signing: Ed25519PrivateKey, facts: Facts) -> Line:
    """Append an entry; a line that was torn when a run was killed is taken off first.

    Only the last line is checked here: `check` looks at all of them.

    Raises:
        BadSignatureError: the last entry is not signed with this key.
        UnreadableClaimError: there is no diary, or its last line is none.
        UnwritableOutputError: it cannot be written.
    """
    path = folder / DIARY_FILE
    with writing(path), locked(folder):
        whole, last = _last_line(path)
        before = opened(last, signing.public_key())
        line = written(facts, signing, before)
        with path.open("r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
    return opened(line, signing.public_key())


def configured(folder: Path, configuration: bytes) -> str:
    """Put how it is trained beside the diary; its SHA-256 (hex), for an entry to name.

    Raises:
        UnreadableClaimError: it is too large.
        UnwritableOutputError: it cannot be written.
    """
    if len(configuration) > MAX_CONFIGURATION_BYTES:
        raise UnreadableClaimError(
            f"the configuration has {len(configuration)} bytes; needed: at most "
            f"{MAX_CONFIGURATION_BYTES}; give a file that says how it is trained, and no data"
        )
    digest = hashlib.sha256(configuration).hexdigest()
    path = folder / CONFIGURATIONS / f"{digest}.json"
    if not path.exists():
        write_atomically(path, configuration)
    return digest


def configuration(folder: Path, digest: str) -> bytes:
    """The configuration that an entry names.

    Raises:
        UnreadableClaimError: it is not there, or is another.
    """
    path = folder / CONFIGURATIONS / f"{digest}.json"
    data = read_small(path, "configuration", MAX_CONFIGURATION_BYTES, UnreadableClaimError)
    if hashlib.sha256(data).hexdigest() != digest:
        raise UnreadableClaimError(
            f"{path} is not the configuration that the entry names; use the original file"
        )
    return data


def kept_in(folder: Path, number: int) -> Path:
    """Where the checkpoint of this entry is, if it was kept."""
    return folder / KEPT / f"{number:08}"


def stamp(folder: Path, url: str, roots: Sequence[x509.Certificate]) -> int:
    """Have the last entry timestamped, and so all before it; which one that is.

    Several authorities may stamp one entry: call this for each.

    Raises:
        NoTimestampError: the authority gave no token that holds.
        UnreadableClaimError: there is no diary.
        UnwritableOutputError: the token cannot be written.
    """
    _, line = _last_line(folder / DIARY_FILE)
    keyid = envelope_from(canonical_object(line, "entry of a diary")).keyid
    number = opened(line, public_from_hex(keyid)).entry.number
    response = request_timestamp(line, url, roots)
    told = canonical_json({"entry": number, "response": base64_text(response)})
    path = folder / STAMPS_FILE
    with writing(path), locked(folder), path.open("ab") as file:
        file.write(told + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return number


def check(
    folder: Path, owner: Ed25519PublicKey, *, roots: Sequence[x509.Certificate] | None = None
) -> Finding:
    """Does the chain hold, and when were its entries there?

    With `roots` tokens that none of them vouches for are left out, and said to be. Without, there
    must be none.

    Raises:
        NoTimestampError: there are tokens and no root to check them against.
        UnreadableClaimError: it is no diary, or its owner signed what is no entry.
    """
    lines = _lines(folder / DIARY_FILE)
    try:
        entries = tuple(found.entry for found in chained(lines, owner))
    except BadSignatureError as error:
        return Finding(False, str(error))
    told = list(_stamps(folder / STAMPS_FILE))
    if roots is None and told:
        raise NoTimestampError(
            "the chain holds, but the diary has timestamps and there is no root certificate to "
            "check them against; needed: the authority's root as PEM, from a source you trust"
        )
    stamps, undated = _checked(told, lines, roots or ())
    found = Finding(True, "", entries, tuple(stamps), tuple(undated))
    return Finding(True, _said(found), entries, tuple(stamps), tuple(undated))


def check_chain(folder: Path, owner: Ed25519PublicKey) -> Finding:
    """Does the chain hold? Tokens are not looked at.

    Raises:
        UnreadableClaimError: it is no diary, or its owner signed what is no entry.
    """
    try:
        entries = tuple(found.entry for found in chained(_lines(folder / DIARY_FILE), owner))
    except BadSignatureError as error:
        return Finding(False, str(error))
    return Finding(True, f"{len(entries)} entries hold", entries)


def _checked(
    told: Sequence[tuple[int, bytes]], lines: Sequence[bytes], roots: Sequence[x509.Certificate]
) -> tuple[list[Stamped], list[str]]:
    stamps, undated = list[Stamped](), list[str]()
    for number, response in told:
        if number >= len(lines):
            undated.append(f"a token is over entry {number}, which is not there")
            continue
        try:
            stamps.append(Stamped(number, check_timestamp(response, lines[number], roots)))
        except BadSignatureError as error:
            undated.append(f"the token over entry {number} dates nothing: {error}")
    return stamps, undated


def _said(found: Finding) -> str:
    """What a diary that holds proves, in words."""
    count, key = len(found.entries), found.entries[0].owner_key
    proved = [f"{count} entries hold, each signed with {key[:16]}… and naming the one before"]
    spread = found.spread
    if spread is None:
        return (
            f"{proved[0]}; nothing dates any of them: a diary like this can be made in one go, "
            "afterwards"
        )
    first = min(found.stamps, key=lambda each: each.timestamp.latest)
    proved.append(f"entry {first.number} and all before it were there by {_day(first)}")
    last = max(each.number for each in found.stamps)
    if last + 1 < count:
        proved.append(f"nothing dates what is after entry {last}")
    proved.append(
        f"its tokens are {_long(spread)} apart"
        if spread
        else "its tokens are of one moment, so nothing shows that it was not made in one go"
    )
    return "; ".join(proved)


def _day(stamped: Stamped) -> str:
    return str(stamped.timestamp.as_dict()["latest"])


def _long(spread: timedelta) -> str:
    hours = spread.total_seconds() / 3600
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def _lines(path: Path) -> list[bytes]:
    """The lines of a diary; one that was torn at the end is none."""
    data = read_small(path, "diary", MAX_DIARY_BYTES, UnreadableClaimError)
    lines = data.split(b"\n")[:-1]
    if not lines:
        raise UnreadableClaimError(
            f"{path} has no entry; needed: a diary that `diary new` began; check the path"
        )
    return lines


def _last_line(path: Path) -> tuple[int, bytes]:
    """How many bytes are whole lines, and the last of these."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - 2 * MAX_ENTRY_BYTES - 2))
            start = file.tell()
            tail = file.read()
    except OSError as fault:
        raise UnreadableClaimError(
            f"the diary {path} cannot be read ({fault.strerror}); needed: one that `diary new` "
            "began; check the path"
        ) from fault
    whole = tail.rfind(b"\n") + 1
    lines = tail[:whole].split(b"\n")[:-1]
    if not lines or (len(lines) == 1 and start > 0):
        raise UnreadableClaimError(
            f"{path} ends in no entry of ours; needed: a diary that `diary new` began"
        )
    return start + whole, lines[-1]


def _stamps(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers of entries, and responses over them; nothing of it is checked."""
    if not os.path.lexists(path):
        return
    data = read_small(path, "file of timestamps", MAX_DIARY_BYTES, UnreadableClaimError)
    lines = data.split(b"\n")[:-1]
    if len(lines) > MOST_STAMPS:
        raise UnreadableClaimError(
            f"{path} has {len(lines)} timestamps; needed: at most {MOST_STAMPS}; leave some out"
        )
    for line in lines:
        document = canonical_object(line, "timestamp of a diary")
        try:
            number, response = document["entry"], base64_bytes(document["response"])
            known = set(document) == {"entry", "response"} and type(number) is int and number >= 0
            known = known and len(response) <= MAX_RESPONSE_BYTES
        except (AttributeError, KeyError, TypeError, ValueError):
            known = False
        if not known:
            raise UnreadableClaimError(
                f"{path} has a line that is no timestamp; needed: the number of an entry and a "
                "response of at most a quarter of a MiB; use the original file"
            )
        yield number, response


def stated(document: Mapping[str, Any]) -> bytes:
    """A configuration as bytes: sorted, indented, numbers as Python writes them."""
    return json.dumps(document, indent=1, sort_keys=True, default=str).encode() + b"\n"


def time_of(moment: datetime) -> str:
    """A moment in words."""
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
