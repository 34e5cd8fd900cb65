"""Does each checkpoint that a diary kept come from the one before? Nothing is run.

Each is compared with the one before it and with the first, as `compare` does: an order of hidden
units in common is what training leaves, and what a network that was exchanged on the way does not
have. And none may be a mixture of its neighbours: whoever walks from one network to another in a
straight line is always near the last step, and never trains. Somebody who bends the line passes
here; running a stretch again (`replay`) is what he does not pass.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

from nnpassport.alignment.table import AXES_FILE
from nnpassport.claims.diary import kept_in
from nnpassport.claims.entries import Entry
from nnpassport.files.disk import refuse_leaving
from nnpassport.files.weights import digest_of
from nnpassport.scheme import OwnershipError
from nnpassport.verification.alike import mixture_of
from nnpassport.verification.compare import compare
from nnpassport.verification.lineage import Network, Outcome, open_network

MOST_COMPARED = 24
"""Checkpoints that are looked at; of more, so many from the first to the last."""

STRAIGHT = 1e-3
"""A checkpoint that is a sum of its neighbours but for this share of the way between them."""

FEWEST_STRAIGHT = 2
"""One in a line may be a step that was short; so many are a line that somebody drew."""


class Step(NamedTuple):
    """A kept checkpoint beside the one before it.

    Attributes:
        before: what `compare` says of it and the one before; None for the first.
        first: what it says of it and the first.
        off: how far it is off the line between its neighbours, as a share of the way between
            them; None for the first and the last.
    """

    number: int
    before: str | None
    first: str | None
    off: float | None


@final
@dataclass(frozen=True, slots=True)
class Continuity:
    """What the kept checkpoints show: `continued` is None where they do not tell.

    Attributes:
        missing: entries whose checkpoint is there and is not the one named, with why.
    """

    continued: bool | None
    reason: str
    steps: tuple[Step, ...] = ()
    missing: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "continued": self.continued,
            "reason": self.reason,
            "steps": [each._asdict() for each in self.steps],
            "missing": list(self.missing),
        }


def kept_entries(folder: Path, entries: Sequence[Entry]) -> list[Entry]:
    """Entries whose checkpoint lies in the folder, whatever is in it."""
    return [
        each
        for each in entries
        if each.facts.checkpoint is not None and os.path.lexists(kept_in(folder, each.number))
    ]


def spaced(entries: Sequence[Entry], most: int) -> list[Entry]:
    """So many of them at most, from the first to the last."""
    if len(entries) <= most:
        return list(entries)
    places = {round(n * (len(entries) - 1) / (most - 1)) for n in range(most)}
    return [entries[place] for place in sorted(places)]


def is_named(folder: Path, entry: Entry) -> str | None:
    """Why the kept checkpoint of an entry is not the one that it names, or None."""
    path = kept_in(folder, entry.number)
    try:
        refuse_leaving(folder, path)
        same = digest_of(path) == entry.facts.checkpoint
    except OwnershipError as error:
        return f"entry {entry.number}: {error}"
    return None if same else f"entry {entry.number}: its checkpoint is not the one it names"


def continuity(folder: Path, entries: Sequence[Entry]) -> Continuity:
    """What the checkpoints of a diary, whose chain holds, say of how they were made."""
    chosen = spaced(kept_entries(folder, entries), MOST_COMPARED)
    faults = [(each, is_named(folder, each)) for each in chosen]
    missing = tuple(fault for _, fault in faults if fault is not None)
    there = [each for each, fault in faults if fault is None]
    if missing:
        return Continuity(False, f"not what the diary names: {'; '.join(missing)}", (), missing)
    if len(there) < 2:
        return Continuity(None, "fewer than two checkpoints were kept, so nothing can be compared")
    axes = folder / AXES_FILE if (folder / AXES_FILE).is_file() else None
    networks = [open_network(kept_in(folder, each.number), axes) for each in there]
    steps = tuple(_step(there, networks, place) for place in range(len(there)))
    return Continuity(*_said(steps), steps)


def _step(entries: Sequence[Entry], networks: Sequence[Network], place: int) -> Step:
    mine = networks[place]
    before = None if place == 0 else compare(mine, networks[place - 1]).outcome.value
    first = before if place < 2 else compare(mine, networks[0]).outcome.value
    inner = 0 < place < len(networks) - 1
    off = _off(networks[place - 1], mine, networks[place + 1]) if inner else None
    return Step(entries[place].number, before, first, off)


def _off(before: Network, mine: Network, after: Network) -> float | None:
    """How far a network is off the line of the two beside it, as a share of their distance."""
    apart = mixture_of(after, [before])
    found = mixture_of(mine, [before, after])
    if apart is None or found is None:
        return None
    if apart.residual <= 1e-9:
        return None  # the same network twice: there is no line
    return found.residual / apart.residual


def _said(steps: Sequence[Step]) -> tuple[bool | None, str]:
    broken = [each.number for each in steps if each.before == Outcome.NONE]
    if broken:
        return False, (
            f"entries {_list(broken)} have nothing in common with the checkpoint before them: "
            "another network was put in"
        )
    strange = [each.number for each in steps if each.first == Outcome.NONE]
    if strange:
        return False, (
            f"entries {_list(strange)} have nothing in common with the first checkpoint: on the "
            "way one network became another, which training does not do"
        )
    straight = [each.number for each in steps if each.off is not None and each.off <= STRAIGHT]
    if len(straight) >= FEWEST_STRAIGHT:
        return False, (
            f"entries {_list(straight)} lie on straight lines between the checkpoints beside them: "
            "they are mixtures, and no training"
        )
    open_ = [n for n, *found, _ in steps if Outcome.UNDECIDED in found]
    if open_:
        return None, (
            f"of entries {_list(open_)} it does not show whether they come from those before; a "
            f"table of axes ({AXES_FILE} in the diary's folder, from `claim axes`) may tell"
        )
    return True, f"{len(steps)} kept checkpoints each come from the one before and from the first"


def _list(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"{shown}, …" if len(numbers) > 5 else shown
