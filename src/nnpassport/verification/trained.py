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

Whether the suspect was made from a checkpoint is read over the table of axes that the claim commits
to, where there is one: for any architecture. Without one networks of the package's own
architectures are compared. None runs.

A line bent from an old network of one's own to another's passes the second. It dates nothing
earlier all the same: what it has from before is not what the suspect was made from.
"""

from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cryptography import x509

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.rate import RELATED
from nnpassport.claims.claim import Claim
from nnpassport.claims.diary import Finding, check, kept_in, time_of
from nnpassport.claims.entries import Entry
from nnpassport.claims.signing import public_from_hex
from nnpassport.claims.timestamp import Timestamp
from nnpassport.files.suspect import Suspect
from nnpassport.scheme import NoTimestampError
from nnpassport.verification.aligning import read_committed
from nnpassport.verification.alike import aligned_reading
from nnpassport.verification.continuity import continuity, kept_entries, spaced
from nnpassport.verification.lineage import open_network
from nnpassport.verification.relations import relations_of

_MOST_DATED = 256  # of more checkpoints, so many from the first to the last

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
    traced: Path | None = None,
) -> Trained:
    """What the diary in `folder` dates of the suspect, under a claim that holds.

    `traced` is the folder of the network whose table of axes the claim commits to, if it does.

    Raises:
        OwnershipError: the diary or a checkpoint cannot be read.
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
    axes = None if traced is None or claim.axes is None else read_committed(traced, claim)[0]
    strangers = (*unrelated, kept_in(folder, kept[0].number))
    made_from = _by_filters if axes is None else partial(_by_axes, axes)
    return _first(partial(made_from, Suspect.of(suspect), strangers), folder, dated)


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
    made_from: Callable[[Path], tuple[bool, str]], folder: Path, dated: Sequence[_Token]
) -> Trained:
    """The first of these that the suspect was made from."""
    tokens = {entry.number: token for entry, token in dated}
    notes = ""
    for entry in spaced([entry for entry, _ in dated], MOST_TRIED):
        related, note = made_from(kept_in(folder, entry.number))
        if related:
            token = tokens[entry.number]
            return Trained((token.earliest, token.latest), entry.number, _said(entry, token))
        notes = notes or note
    return _nothing(
        "the suspect was made from none of its dated checkpoints by more than its beginning "
        f"explains{notes}"
    )


def _by_filters(suspect: Suspect, strangers: tuple[Path, ...], at: Path) -> tuple[bool, str]:
    """Whether the suspect was made from the checkpoint, by its filters."""
    facts = relations_of(suspect, {"diary": at}, unrelated=strangers)["diary"]
    return bool(facts.related), f": {facts.notes[0]}" if facts.notes else ""


def _by_axes(
    axes: Axes, suspect: Suspect, strangers: tuple[Path, ...], at: Path
) -> tuple[bool, str]:
    """The same by units of each axis, put into the checkpoint's order."""
    mine, theirs = open_network(suspect), open_network(at)
    rng = np.random.default_rng(0)
    others = [open_network(path) for path in strangers]
    found = aligned_reading(mine, theirs, axes, others, rng)
    if found is None or not found.strangers:
        return False, ": over the claim's axes it cannot be compared"
    best = max(*found.strangers, *found.mixtures)
    said = f": {found.likeness:.2f} alike, its beginning and unrelated networks {best:.2f}"
    return found.likeness >= best + RELATED * (1 - best), said


def _checked(folder: Path, claim: Claim, roots: Sequence[x509.Certificate]) -> Finding:
    owner = public_from_hex(claim.owner_key)
    try:
        return check(folder, owner, roots=roots or None)
    except NoTimestampError as error:
        return Finding(False, str(error))


def _dated(found: Finding, entries: Sequence[Entry], appeared: datetime) -> list[_Token]:
    """Those that are proved older than the suspect, with the token that proves it."""
    some = spaced(entries, _MOST_DATED)
    tokens = [(each, found.dated(each.number)) for each in some]
    return [(each, t) for each, t in tokens if t is not None and t.latest < appeared]


def _said(entry: Entry, token: Timestamp) -> str:
    return (
        f"its diary has a checkpoint that the suspect was made from, entry {entry.number} (step "
        f"{entry.facts.step}), by {time_of(token.latest)}; `diary replay` shows whether it was "
        "trained as it says"
    )


def _nothing(why: str) -> Trained:
    return Trained(None, None, f"its diary dates nothing: {why}")
