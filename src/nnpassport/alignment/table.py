"""A table of axes from anybody: read within limits, and held against the network that it is of.

A table says what alignment may undo. Its author may have read this file, so nothing is believed
that the tensors do not bear out: every place is in a tensor of the network, no index is in an axis
twice, and two axes share indices only as rows and columns of one grid, as heads and their insides
do. What it costs to solve is bounded before anything is solved.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.files.disk import read_once
from nnpassport.scheme import UnreadableModelError

AXES_FILE = "axes.json"
MAX_AXES_BYTES = 2**24
LONGEST = 8192
"""Indices on one axis, at most: to solve one takes the square of them in memory."""

LONGEST_OF_KIND = {"orthogonal": 4096, "invertible": 512, "inner": 4096}
"""The same for kinds that take longer: Sylvester's equation for thousands takes hours."""

MOST_WORK = 2**33
"""Operations to solve all such axes once, at most, as cubes of their sizes."""

_MOST_SHARED = 4
"""In so many axes an index may be: a group, its inside, heads and their copies."""

Shapes = Mapping[str, tuple[int, ...]]


def read_table(path: Path) -> Axes:
    """The table in a file.

    Raises:
        UnreadableModelError: missing, too large, or no such table.
    """
    return Axes.from_bytes(read_once(path, MAX_AXES_BYTES))


def check_table(axes: Axes, shapes: Shapes) -> None:
    """Refuse a table that is not of the network with tensors of these shapes.

    Raises:
        UnreadableModelError: naming the first thing that does not fit.
    """
    work = sum(axis.size**3 for axis in axes.axes if axis.kind in LONGEST_OF_KIND)
    if work > MOST_WORK:
        raise _refused(f"its axes take {work:.0e} operations to solve; needed: {MOST_WORK:.0e}")
    for number, axis in enumerate((*axes.axes, *axes.pairs)):
        most = LONGEST_OF_KIND.get(axis.kind, LONGEST)
        if axis.size > most:
            raise _refused(
                f"axis {number} of kind {axis.kind} has {axis.size} indices; needed: at most {most}"
            )
    check_places(axes, shapes)
    _check_vectors(axes, shapes)


def check_places(axes: Axes, shapes: Shapes) -> None:
    """Refuse a table with a place that is not in tensors of these shapes, or two that clash.

    Raises:
        UnreadableModelError: naming the first thing that does not fit.
    """
    for number, axis in enumerate((*axes.axes, *axes.pairs)):
        paired = number < len(axes.axes) or sides_of(axis) is not None
        fault = _axis_fault(axis, shapes) if paired else "is no pairs of two sides"
        if fault is not None:
            raise _refused(f"axis {number} {fault}")
    for place, numbers in _by_dimension(axes):
        if (fault := _shared_fault(axes, numbers, place, shapes)) is not None:
            raise _refused(f"dimension {place[1]} of {place[0]!r:.100} {fault}")


def _check_vectors(axes: Axes, shapes: Shapes) -> None:
    for name, (dimension, gain) in axes.reads.items():
        there = name in shapes and dimension < len(shapes[name])
        if not there or (gain is not None and gain not in shapes):
            raise _refused(f"{name!r:.100} is read where the network has nothing")
    for name, vector in _vectors(axes):
        sides = [side for side in shapes.get(vector, (0, 0)) if side != 1]
        if name not in shapes or len(sides) > 1:
            raise _refused(f"{vector!r:.100} is no vector beside {name!r:.100}")


def sides_of(axis: Axis) -> tuple[list[tuple[Place, Place]], list[tuple[Place, Place]]] | None:
    """Of rotated pairs the places of first and second members, of queries and then of keys.

    Of one module for both, a tensor has four: of its queries, and then of its keys.
    """
    by_module: dict[str, dict[str, list[Place]]] = {}
    for place in axis.places:
        module = by_module.setdefault(place.tensor.rpartition(".")[0], {})
        module.setdefault(place.tensor, []).append(place)
    if len(by_module) == 1:
        (fused,) = by_module.values()
        sides = [{n: each[at : at + 2] for n, each in fused.items()} for at in (0, 2)]
        if any(len(each) != 4 for each in fused.values()):
            return None
    else:
        sides = list(by_module.values())
    found = []
    for tensors in sides:
        if any(len(places) != 2 for places in tensors.values()):
            return None
        pairs = [(places[0], places[1]) for places in tensors.values()]
        counts = {one.positions(axis.size).shape == two.positions(axis.size).shape and
                  one.dimension == two.dimension for one, two in pairs}  # fmt: skip
        if counts != {True}:
            return None
        found.append(pairs)
    return (found[0], found[1]) if len(found) == 2 else None


def _axis_fault(axis: Axis, shapes: Shapes) -> str | None:
    """What is wrong with an axis on its own."""
    if not axis.places:
        return "is nowhere"
    for place in axis.places:
        if place.tensor not in shapes or place.dimension >= len(shapes[place.tensor]):
            return f"is in {place.tensor!r:.100}, where the network has no such dimension"
        length = shapes[place.tensor][place.dimension]
        if _extent(place, axis.size) > length or _last(place, axis.size) >= length:
            return f"is longer than {place.tensor!r:.100}, or leaves it"
    return None


def _extent(place: Place, size: int) -> int:
    """How many indices it has; known before any of them is written down."""
    for count, _ in place.repeats:
        size *= max(1, count)
    return size


def _last(place: Place, size: int) -> int:
    steps = [(size, place.stride), *place.repeats]
    return place.offset + sum(max(0, count - 1) * step for count, step in steps)


def _by_dimension(axes: Axes) -> Iterator[tuple[tuple[str, int], list[tuple[int, Place]]]]:
    found: dict[tuple[str, int], list[tuple[int, Place]]] = {}
    for number, axis in enumerate(axes.axes):
        for place in axis.places:
            found.setdefault((place.tensor, place.dimension), []).append((number, place))
    yield from found.items()


def _shared_fault(
    axes: Axes, places: Sequence[tuple[int, Place]], where: tuple[str, int], shapes: Shapes
) -> str | None:
    """What is wrong with all axes of one dimension together."""
    length = shapes[where[0]][where[1]]
    total = sum(_extent(place, axes.axes[number].size) for number, place in places)
    if total > _MOST_SHARED * length:
        return f"has {length} indices, and its axes {total}"
    index_of: dict[int, NDArray[np.int64]] = {}
    for number, place in places:
        at = place.positions(axes.axes[number].size)
        mine = index_of.setdefault(number, np.full(length, -1))
        if at.size != len(np.unique(at)) or (mine[at] >= 0).any():
            return f"has an index twice in axis {number}"
        mine[at] = np.arange(len(at))[:, None]
    numbers = list(index_of)
    held = np.zeros(length, np.int64)
    for number in numbers:
        held += index_of[number] >= 0
    if (held > 1).any():
        crowded = [n for n in numbers if (held[index_of[n] >= 0] > 1).any()]
        return _grid_fault(axes, crowded, index_of)
    return None


def _grid_fault(
    axes: Axes, numbers: Sequence[int], index_of: Mapping[int, NDArray[np.int64]]
) -> str | None:
    """Two axes that share indices are rows and columns of one grid, or one of them is no axis."""
    for at, one in enumerate(numbers):
        for other in numbers[at + 1 :]:
            both = (index_of[one] >= 0) & (index_of[other] >= 0)
            if not both.any():
                continue
            rows, columns = axes.axes[one].size, axes.axes[other].size
            cells = index_of[one][both] * columns + index_of[other][both]
            if rows * columns > len(both):
                return f"has axes {one} and {other}, which overlap without being a grid"
            counts = np.bincount(cells, minlength=rows * columns)
            if counts.min() != counts.max():
                return f"has axes {one} and {other}, which overlap without being a grid"
    return None


def _vectors(axes: Axes) -> Iterator[tuple[str, str]]:
    """Names of layers, and of vectors that canonical form scales them with."""
    yield from axes.gains.items()
    for name, norm in axes.batch_norms.items():
        yield from ((name, each) for each in norm[:4] if isinstance(each, str))
    for gain, known in axes.norms.items():
        yield gain, gain
        if known.shift is not None:
            yield gain, known.shift


def _refused(what: str) -> UnreadableModelError:
    return UnreadableModelError(
        f"the table of axes is not of this network: {what}; needed: the {AXES_FILE} that "
        "`claim axes` wrote for it"
    )
