"""Whose copy is it? The order of hidden units that each licensee's copy was given.

Before a copy is handed out, the units of each axis are put into an order that is derived from the
owner's seed and the licensee's name (`keys.order`). To read it, the order is undone in the suspect,
and units that stand where they stand in the original are counted. The p-value is exact without any
assumption about how anybody trained: the order was drawn by lot, by the owner, after everything
else was there. Every name that is tried is paid for.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.reorder import orderable, restored_order
from nnpassport.alignment.table import AXES_FILE, check_table
from nnpassport.files.arrays import Array, arrays_digest
from nnpassport.files.disk import refuse_leaving
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import read_arrays
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.counts import verdict_on
from nnpassport.keys.key import Key
from nnpassport.keys.order import derive_order
from nnpassport.keys.ordered import Reference, placed, reference_of
from nnpassport.keys.reading import READERS
from nnpassport.scheme import OwnershipError, UnsuitableModelError, Verdict
from nnpassport.verification.lineage import open_network

MOST_LICENSEES = 10_000


class Original(NamedTuple):
    """The network that all copies were made of, in its own order.

    Attributes:
        digest: of its arrays (`arrays_digest`).
        table: digest of its axes.
        reference: what units of a copy are told by.
    """

    arrays: Mapping[str, Array]
    axes: Axes
    digest: str
    table: str
    reference: Reference

    def orders(self, key: Key, licensee: str) -> dict[int, NDArray[np.int64]]:
        """The order of each axis in the copy of one licensee."""
        return {
            number: derive_order(
                key,
                licensee,
                network=self.digest,
                axes=self.table,
                number=number,
                size=size,
            )
            for number, size in orderable(self.axes).items()
        }


class Found(NamedTuple):
    """What of one licensee's order is in the suspect.

    Attributes:
        fixed: units in their place, of `units`; by chance one on each axis.
        log10_p: corrected for the number of names.
    """

    name: str
    fixed: int
    units: int
    axes: int
    log10_p: float


@final
@dataclass(frozen=True, slots=True)
class Leak:
    """Whose copies a suspect may be.

    Attributes:
        found: for each licensee, the least likely first.
        log10_alpha: the threshold.
        verdict: V of the key on the suspect, once the order of who is named is undone; None where
            nobody is, or the key's mark is not read from weights.
    """

    found: tuple[Found, ...]
    log10_alpha: float
    verdict: Verdict | None

    @property
    def named(self) -> tuple[str, ...]:
        """Licensees whose order is there, which chance does not give."""
        return tuple(each.name for each in self.found if each.log10_p <= self.log10_alpha)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "named": list(self.named),
            "log10_alpha": self.log10_alpha,
            "licensees": [each._asdict() for each in self.found],
            "verdict": None if self.verdict is None else self.verdict.as_dict(),
        }


def read_original(folder: Path) -> Original:
    """The owner's release without any licensee's order, and the table of axes in its folder.

    Raises:
        UnreadableModelError: one of them cannot be read, or the table is of another network.
    """
    refuse_leaving(folder, folder / AXES_FILE)
    table = open_network(folder, folder / AXES_FILE).axes
    return original_of(read_arrays(folder).arrays, table)


def original_of(arrays: Mapping[str, Array], axes: Axes | None) -> Original:
    """The same of arrays in memory.

    Raises:
        UnreadableModelError: the table is of another network.
        UnsuitableModelError: there is no axis whose order says anything.
    """
    if axes is None or not orderable(axes):
        raise _no_axis()
    check_table(axes, {name: each.shape for name, each in arrays.items()})
    digest = arrays_digest(arrays)
    reference = reference_of(axes, arrays, anchor=digest)
    if not reference.chosen:
        raise _no_axis()
    return Original(arrays, axes, digest, axes.digest, reference)


def _no_axis() -> UnsuitableModelError:
    return UnsuitableModelError(
        "the network has no axis whose units can be put into another order; needed: a table of "
        "axes, from `claim axes`, with one that is long enough"
    )


def trace_order(
    suspect: Suspect | Path,
    key: Key,
    original: Original,
    licensees: Iterable[str],
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Leak:
    """Whose copies a network from anybody may be.

    Raises:
        UnreadableModelError: it cannot be read.
        UnsuitableModelError: there are no names, too many, or no tensor of it can be compared.
    """
    there = Suspect.of(suspect).arrays.arrays
    return trace_arrays(there, key, original, licensees, log10_alpha=log10_alpha)


def trace_arrays(
    suspect: Mapping[str, Array],
    key: Key,
    original: Original,
    licensees: Iterable[str],
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Leak:
    """As `trace_order`, on arrays."""
    names = list(dict.fromkeys(licensees))
    if not 1 <= len(names) <= MOST_LICENSEES:
        raise UnsuitableModelError(
            f"{len(names)} licensees were given; needed: 1 to {MOST_LICENSEES}, all who got a copy"
        )
    found = []
    for name in names:
        read = placed(suspect, original.reference, original.orders(key, name))
        paid = min(0.0, read.log10_tail + math.log10(len(names)))
        found.append(Found(name, read.fixed, read.units, len(read.axes), paid))
    found.sort(key=lambda each: each.log10_p)
    leak = Leak(tuple(found), log10_alpha, None)
    if not leak.named:
        return leak
    return Leak(leak.found, log10_alpha, _mark(suspect, key, original, leak.named[0], log10_alpha))


def _mark(
    suspect: Mapping[str, Array], key: Key, original: Original, name: str, log10_alpha: float
) -> Verdict | None:
    """What V reads of the key's own mark, once the order is undone."""
    reader = READERS.get(key.context.scheme)
    if reader is None:
        return None
    undone = restored_order(original.axes, suspect, original.orders(key, name))
    try:
        return verdict_on(reader(undone, key), key, log10_alpha=log10_alpha)
    except OwnershipError:  # the order is found all the same
        return None
