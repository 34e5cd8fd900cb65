"""V on a suspect that is aligned to a key's anchor, under whatever names and however it is turned.

What was aligned to knows nothing of the bits, so they are coins whatever alignment did. Readings
share α all the same: the one of the tensors under the anchor's names has nearly all of it, and the
others pay for every way that there was to choose tensors and orientations (`keys.chance`).

A mean with the anchor, or with a network that was tuned from it, is read once a part of the anchor
is taken off.

It is read by the names first. Where the key's layers are not in place then, the kernels may be
turned (`mirrors`); or blocks were put in or left out, or everything has other names (`naming`).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from nnpassport.alignment.byaxes import Placed, Reference, alike, strangers_of
from nnpassport.alignment.canonical import Weights
from nnpassport.alignment.layouts import laid_out
from nnpassport.alignment.mirrors import AS_IT_IS, Orientation, possible, turned
from nnpassport.alignment.naming import FITS, Naming, loose_in, named
from nnpassport.alignment.rate import exact
from nnpassport.files.arrays import Array, is_floating
from nnpassport.keys.chance import LOG10_BY_NAME, LOG10_BY_SHAPE, TENSORS
from nnpassport.keys.counts import Counts, Reading
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError

_LISTED = 40
_NAMED = 3
UPRIGHT = 0.7
"""Kernels that fit less are looked at in other orientations too: of a symmetric kernel much stays
in place when it is turned, and rows that are matched one by one then look alike to 0.3."""


MERGED = (0.25, 0.5, 0.75)
"""Shares of a suspect that may be the anchor's, or a fine-tuning's of it: each is one reading."""


class _Tried(NamedTuple):
    """Counts that are paid for.

    Attributes:
        in_place: whether the key's layers are, in what it is of.
        turned: whether most kernels are not, so that they may be turned.
        placed: what it is of.
        alike: how well the tensors fit, in the median, that the key does not read.
        log10_ways: of how many orientations it is one.
    """

    counts: Counts
    in_place: bool
    turned: bool
    placed: Placed
    alike: float
    log10_ways: float = 0.0


def verify_anchored(read: Reading, suspect: Mapping[str, Array], anchor: Reference) -> Counts:
    """What the key reads of the suspect once it is aligned to the network before the mark.

    Their p-value is exact.

    Raises:
        UnsuitableModelError: nothing of the suspect can be aligned; it says what was looked for.
            Or layers of the key are not there, and what is proves no mark: that is no "no".
        UnreadableModelError: what could be cannot be read.
    """
    read = read.through(anchor.with_own_scales)
    suspect = laid_out(suspect, anchor.tensors)
    refused: UnsuitableModelError | UnreadableModelError | None = None
    first: _Tried | None = None
    try:
        first = _by_name(read, suspect, anchor)
    except (UnsuitableModelError, UnreadableModelError) as error:
        refused = error
    if first is not None and first.in_place and not first.turned:
        return _merged(read, first, anchor)
    ways = [AS_IT_IS, *possible(anchor.axes, {n: t.shape for n, t in anchor.tensors.items()})]
    if first is not None:
        tried = [first]
        way = _best_way(suspect, anchor, ways)
        if way != AS_IT_IS:
            tried.append(_by_name(read, suspect, anchor, way, len(ways)))
        first = min(tried, key=lambda each: read.log10_p(each.counts))
        if any(read.marked(each.counts) or each.in_place for each in tried):
            return min((_merged(read, each, anchor) for each in tried), key=read.log10_p)
    found, missing = _by_content(read, suspect, anchor, ways)
    if found is not None and (read.marked(found) or (first is None and not missing)):
        return found
    if found is not None and first is None:
        raise _hidden(read, found, f"{missing} of the key's layers are not among its tensors")
    if first is not None:
        return _by_names_alone(read, first, suspect, anchor)
    sought = ", ".join(f"{name} {anchor.tensors[name].shape}" for name in sorted(anchor.layers))
    raise UnsuitableModelError(
        f"{refused}; nor does any of the suspect's {len(suspect)} tensors, under whatever name, "
        f"fit a layer of the key: looked for were {sought:.300}, as they are, with their axes "
        f"exchanged, as parts of fused projections, and in {len(ways)} orientations; needed: a "
        "network that has them"
    )


def _by_names_alone(
    read: Reading, first: _Tried, suspect: Mapping[str, Array], anchor: Reference
) -> Counts:
    """The reading of tensors under the anchor's names, where nothing else fits its layers better.

    Raises:
        UnsuitableModelError: they may be there for show.
    """
    more = [n for n, t in suspect.items() if n not in anchor.tensors and _is_matrix(t)]
    if more and first.alike >= FITS:
        raise _hidden(
            read,
            first.counts,
            "its other layers are the anchor's, the key's layers are not, and it has "
            f"{len(more)} tensors more that none of them can be read from",
        )
    return first.counts.remarked(
        "under other names and in other orientations nothing of it fits better"
    )


def _hidden(read: Reading, counts: Counts, why: str) -> UnsuitableModelError:
    """No verdict that says no: what a layer is made of may be there in a form that is not known."""
    return UnsuitableModelError(
        f"{why}, so that it cannot be said that the mark is not there: {counts.matches} of "
        f"{counts.bits} bits match (p = 10^{read.log10_p(counts):.1f}); needed: a network that has "
        "them, each as one tensor, or as two or three as is described for alignment"
    )


def _is_matrix(tensor: Array) -> bool:
    return is_floating(tensor) and tensor.ndim > 1


def _merged(read: Reading, first: _Tried, anchor: Reference) -> Counts:
    """The counts, or where they prove no mark V on a mean of the marked network and the anchor.

    Of W = (1 − t)·marked + t·anchor what is left without t·anchor has the mark's signs in all bits,
    where W itself has the anchor's in some. The anchor knows no bit, nor does t.
    """
    if read.marked(first.counts):
        return first.counts
    readings = []
    for share in MERGED:
        arrays = dict(first.placed.arrays)
        for name in anchor.layers:
            theirs = anchor.tensors[name]
            if name in arrays and arrays[name].shape == theirs.shape:
                arrays[name] = arrays[name] - share * theirs
        reason = f"read once {share:g} of the network before the mark is taken off it"
        log10_choices = LOG10_BY_SHAPE + first.log10_ways + math.log10(len(MERGED))
        found = read(arrays).paid(log10_choices, reason, of=TENSORS)
        facts = {**(first.counts.alignment or {}), "merged": share}
        readings.append(found._replace(alignment=facts))
    return min((first.counts, *readings), key=read.log10_p)


def _by_name(
    read: Reading,
    suspect: Mapping[str, Array],
    anchor: Reference,
    way: Orientation = AS_IT_IS,
    ways: int = 1,
) -> _Tried:
    """The reading under the anchor's names, of kernels that are turned back."""
    if way != AS_IT_IS:
        suspect = turned(anchor.axes, suspect, way)
    placed = anchor.place(suspect)
    found = _read(read, suspect, placed, anchor)
    counts = found.counts
    if ways == 1:
        paid = counts.paid(LOG10_BY_NAME, "aligned by the tensors' names", of=TENSORS)
        return found._replace(counts=paid)
    reason = f"its kernels were {way.inverse.name}, of {ways} orientations that are paid for"
    paid = counts.paid(LOG10_BY_SHAPE + math.log10(ways), reason, of=TENSORS)
    facts = {**(paid.alignment or {}), "orientation": way.inverse.name, "orientations": ways}
    return found._replace(counts=paid._replace(alignment=facts), log10_ways=math.log10(ways))


def _read(read: Reading, suspect: Mapping[str, Array], placed: Placed, anchor: Reference) -> _Tried:
    stranger = strangers_of(suspect, anchor).cosines
    fits = {
        name: (cosine - stranger[name]) / max(1e-9, 1 - stranger[name])
        for name, cosine in placed.cosines.items()
    }
    layers = [fits[name] for name in anchor.layers if name in fits]
    kernels = [fits[name] for name in fits if math.prod(anchor.tensors[name].shape[2:]) > 1]
    in_place = bool(layers) and min(layers) >= FITS
    return _Tried(
        exact(read, placed, stranger),
        in_place,
        bool(kernels) and median(kernels) < UPRIGHT,
        placed,
        median([fit for name, fit in fits.items() if name not in anchor.layers] or [0.0]),
    )


def _best_way(
    suspect: Mapping[str, Array], anchor: Reference, ways: Sequence[Orientation]
) -> Orientation:
    """The orientation in which what meets the pictures is most like the anchor's."""
    units = anchor.to.units
    first = [
        name
        for name, theirs in anchor.tensors.items()
        if theirs.ndim > 1
        and name in anchor.to.on
        and any(anchor.to.on[name] <= set(unit.numbers) for unit in units)
    ]
    there = alike({n: suspect[n] for n in first if n in suspect}, anchor.tensors)
    vectors = {n: suspect[n] for n in suspect if n in anchor.tensors and suspect[n].ndim < 2}

    def likeness(way: Orientation) -> float:
        tensors = {**alike(vectors, anchor.tensors), **turned(anchor.axes, there, way)}
        try:
            placed = anchor.place(tensors)
        except UnsuitableModelError:
            return 0.0
        return float(np.mean([placed.cosines.get(name, 0.0) for name in there] or [0.0]))

    return max(ways, key=likeness)


def _by_content(
    read: Reading, suspect: Mapping[str, Array], anchor: Reference, ways: Sequence[Orientation]
) -> tuple[Counts | None, int]:
    """The reading of tensors that fit best under any names; None where none fits a key's layer.

    And how many of the key's layers none fits.
    """
    best: tuple[int, float, Naming, Orientation] | None = None
    tried = 0
    for way in ways:
        tried += 1
        found = named(anchor.to, turned(anchor.axes, suspect, way))
        layers = [name for name in anchor.layers if name in found.taken]
        fit = float(np.mean([*found.fits.values(), 0.0]))
        if best is None or (len(layers), fit) > best[:2]:
            best = (len(layers), fit, found, way)
        if len(layers) == len(anchor.layers):
            break
    if best is None or not best[0]:
        return None, len(anchor.layers)
    _, _, found, way = best
    tensors = found.tensors(turned(anchor.axes, suspect, way), anchor.to.reference)
    placed = anchor.place(tensors, loose_in(anchor.to) - found.scales.keys())
    counts = _read(read, tensors, _whole(placed, anchor), anchor).counts
    missing = len(anchor.layers - found.taken.keys())
    return _paid(counts, found, suspect, anchor, way, tried), missing


def _whole(placed: Placed, anchor: Reference) -> Placed:
    """With zeros, which match no bit, for layers of the key that the suspect does not have."""
    none: Weights = {
        name: np.zeros(anchor.tensors[name].shape)
        for name in anchor.layers
        if name not in placed.arrays or placed.arrays[name].shape != anchor.tensors[name].shape
    }
    return placed._replace(arrays={**placed.arrays, **none})


def _paid(
    counts: Counts,
    found: Naming,
    suspect: Mapping[str, Array],
    anchor: Reference,
    way: Orientation,
    ways: int,
) -> Counts:
    """The counts once all choices are paid for, and which tensors were read."""
    read = {name: found.taken[name] for name in anchor.layers if name in found.taken}
    log10_choices = math.log10(ways) + sum(math.log10(found.choices[name]) for name in read)
    shown = ", ".join(f"{each.said} for {name}" for name, each in list(read.items())[:_NAMED])
    missing = len(anchor.layers) - len(read)
    reason = (
        f"read from the tensors that fit best under any name, {shown}"
        f"{', …' if len(read) > _NAMED else ''}, 10^{log10_choices:.1f} ways to choose them and "
        "to turn them being paid for"
        + (f"; {missing} of the key's layers are not there" if missing else "")
        + (f"; its kernels were {way.inverse.name}" if way != AS_IT_IS else "")
    )
    paid = counts.paid(LOG10_BY_SHAPE + log10_choices, reason, of=TENSORS)
    taken = {name: " and ".join(each.names) for name, each in read.items()}
    unread = sorted(
        n
        for n, t in suspect.items()
        if is_floating(t)
        and t.ndim > 1
        and n not in {each for e in found.taken.values() for each in e.names}
    )
    candidates = {
        "read": "by shape",
        "log10_choices": LOG10_BY_SHAPE + log10_choices,
        "taken": taken,
        "unread": unread[:_LISTED],
        "unread_count": len(unread),
    }
    facts = {**(paid.alignment or {}), "orientation": way.inverse.name, "orientations": ways}
    return paid._replace(candidates=candidates, alignment=facts)
