"""What a claimant's diary dates: the first of its checkpoints that the suspect was made from.

Four things have to hold, and each is against a diary that somebody makes up:

- the chain, under the key that signed the claim, and it names the network that the claim commits
  to: a diary of something else says nothing here;
- its kept checkpoints are those that it names, and each comes from the one before and from the
  first (`continuity`): against one that jumps to another's network, or walks there straight;
- a token over the checkpoint, or over what follows, is proved older than the suspect: against one
  that was made afterwards;
- the suspect was made from the checkpoint by more than the diary's *first* explains, which is taken
  as an unrelated network: against one that begins at what others have too. So of a fine-tuning only
  what is beyond its base counts, and of a training from a seed only what is beyond that start.

A line bent from an old network of one's own to another's passes the second. It dates nothing
earlier all the same: what it has from before is not what the suspect was made from.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509

from nnpassport.claims.claim import Claim
from nnpassport.claims.diary import Finding, check, kept_in, time_of
from nnpassport.claims.entries import Entry
from nnpassport.claims.signing import public_from_hex
from nnpassport.claims.timestamp import Timestamp
from nnpassport.files.suspect import Suspect
from nnpassport.scheme import NoTimestampError
from nnpassport.verification.bridge import RELATIONS, running
from nnpassport.verification.continuity import continuity, kept_entries, spaced

MOST_TRIED = 8
"""Checkpoints that are compared with the suspect, from the first to the last."""


_Token = tuple[Entry, Timestamp]


class Trained(NamedTuple):
    """What a diary dates.

    Attributes:
        between: the first and the last moment of the token; None where it dates nothing.
        entry: which checkpoint it is of.
        note: what was found, in words.
    """

    between: tuple[datetime, datetime] | None
    entry: int | None
    note: str


def trained_by(
    folder: Path,
    claim: Claim,
    suspect: Suspect | Path,
    *,
    roots: Sequence[x509.Certificate],
    appeared: datetime | None,
    unrelated: tuple[Path, ...] = (),
) -> Trained:
    """What the diary in `folder` dates of the suspect, under a claim that holds.

    Raises:
        OwnershipError: the diary or a checkpoint cannot be read, or PyTorch is not installed.
    """
    found = _checked(folder, claim, roots)
    end = None if claim.reference is None else found.naming(claim.reference)
    kept = kept_entries(folder, found.entries)
    kept = [each for each in kept if end is not None and each.number <= end.number]
    dated = [] if appeared is None else _dated(found, kept[1:], appeared)
    fault = _fault(found, end, appeared, dated)
    if fault is None and (whole := continuity(folder, kept)).continued is not True:
        fault = whole.reason
    if fault is not None:
        return _nothing(fault)
    return _first(Suspect.of(suspect), folder, kept[0], dated, unrelated)


def _fault(
    found: Finding, end: Entry | None, appeared: datetime | None, dated: Sequence[_Token]
) -> str | None:
    """Why it dates nothing, before any network is compared."""
    if not found.holds:
        return f"it does not hold: {found.reason}"
    if end is None:
        return "it does not name the network that the claim commits to"
    if not found.stamps:
        return found.reason
    if appeared is None:
        return "when the suspect appeared was not said"
    if not dated:
        return "no checkpoint that was kept, but the first, is proved older than the suspect"
    return None


def _first(
    suspect: Suspect,
    folder: Path,
    beginning: Entry,
    dated: Sequence[_Token],
    unrelated: tuple[Path, ...],
) -> Trained:
    """The first of these that the suspect was made from."""
    relations_of = running(f"{RELATIONS}:relations_of", "to compare a diary with the suspect")
    strangers = (*unrelated, kept_in(folder, beginning.number))
    tokens = {entry.number: token for entry, token in dated}
    notes: list[str] = []
    for entry in spaced([entry for entry, _ in dated], MOST_TRIED):
        at = {"diary": kept_in(folder, entry.number)}
        facts: Any = relations_of(suspect, at, unrelated=strangers)["diary"]
        if facts.related:
            token = tokens[entry.number]
            return Trained((token.earliest, token.latest), entry.number, _said(entry, token))
        notes += facts.notes
    why = f": {notes[0]}" if notes else ""
    return _nothing(
        "the suspect was made from none of its dated checkpoints by more than its beginning "
        f"explains{why}"
    )


def _checked(folder: Path, claim: Claim, roots: Sequence[x509.Certificate]) -> Finding:
    owner = public_from_hex(claim.owner_key)
    try:
        return check(folder, owner, roots=roots or None)
    except NoTimestampError as error:
        return Finding(False, str(error))


def _dated(found: Finding, entries: Sequence[Entry], appeared: datetime) -> list[_Token]:
    """Those that are proved older than the suspect, with the token that proves it."""
    tokens = [(each, found.dated(each.number)) for each in entries]
    return [(each, t) for each, t in tokens if t is not None and t.latest < appeared]


def _said(entry: Entry, token: Timestamp) -> str:
    return (
        f"its diary has a checkpoint that the suspect was made from, entry {entry.number} (step "
        f"{entry.facts.step}), by {time_of(token.latest)}; `diary replay` shows whether it was "
        "trained as it says"
    )


def _nothing(why: str) -> Trained:
    return Trained(None, None, f"its diary dates nothing: {why}")
