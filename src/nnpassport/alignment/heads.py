"""The heads of attentions in a table of axes: what is inside them, and between which matrices.

Where heads can be reordered there is an axis of them, and one of the copies of queries that share a
key. Where they cannot (positions told by another slope in each) or there is one key for all, the
inside alone is an axis; it then says by its repeats how many blocks may be turned apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.alignment.spots import Spot, crossed, meeting, spots_of


class Side(NamedTuple):
    """One of the two matrices that the inside of a head is between.

    Attributes:
        whole: rows by head and inside.
        single: the same by head, copy and inside, where heads share what the other side has.
    """

    whole: Spot
    single: Spot | None


class Inside(NamedTuple):
    """The inside of heads: number of its axis, and the matrices that it is between."""

    number: int
    sides: tuple[Side, Side]


class Attention(NamedTuple):
    """The heads of one attention.

    Attributes:
        heads: number of their axis, if they can be reordered.
        copies: of the axis of queries that share one key and value, if there is one.
        size: how many heads, and how many copies of each.
        insides: what they have inside.
    """

    heads: int | None
    copies: int | None
    size: tuple[int, int]
    insides: tuple[Inside, ...]

    @property
    def numbers(self) -> set[int]:
        """Of all its axes."""
        outer = {each for each in (self.heads, self.copies) if each is not None}
        return outer | {inside.number for inside in self.insides}


def attentions(axes: Axes) -> list[Attention]:
    """Heads that are computed side by side, with the insides that they have."""
    batched = [n for n, axis in enumerate(axes.axes) if "batched" in axis.traits]
    found: dict[tuple[int | None, int | None, int | None], list[Inside]] = {}
    blocks: dict[int | None, int] = {n: axes.axes[n].size for n in batched}
    for number, axis in enumerate(axes.axes):
        if axis.kind != "inner" or number in batched:
            continue
        around = [heads for heads in batched if len(_matrices(axes, heads, number)) == 2]
        # Where keys and values are shared, their heads are in more tensors than queries' copies.
        heads = max(around, key=lambda each: len(axes.axes[each].places), default=None)
        spots = _matrices(axes, heads, number)
        if len(spots) != 2:
            continue
        count = len(spots[0].positions) // axis.size
        copies = _copies(axes, heads, spots, batched) if heads is not None or count == 1 else None
        alone = number if heads is None and copies is None else None
        blocks[alone if heads is None else heads] = count
        first, second = (_side(axes, heads, copies, number, spot) for spot in spots)
        found.setdefault((heads, copies, alone), []).append(Inside(number, (first, second)))
    return [
        Attention(
            heads,
            copies,
            (
                blocks[alone] if alone is not None else 1 if heads is None else blocks[heads],
                1 if copies is None else axes.axes[copies].size,
            ),
            tuple(insides),
        )
        for (heads, copies, alone), insides in found.items()
    ]


def inside_of(axes: Axes, heads: int | None, number: int) -> list[Spot]:
    """All places of the inside of heads, vectors too: rows by head and inside."""
    if heads is not None:
        return crossed(axes, axes.axes[heads], axes.axes[number])
    spots = spots_of(axes, axes.axes[number])
    blocks = min((spot.positions.shape[1] for spot in spots), default=1)
    if any(spot.positions.shape[1] % blocks for spot in spots):
        return []
    return [spot._replace(positions=_by_block(spot, blocks)) for spot in spots]


def pairs_of(
    axes: Axes,
    both: Sequence[Sequence[tuple[Place, Place]]],
    size: int,
    heads: Sequence[Axis],
) -> list[tuple[Spot, Spot]] | None:
    """Of queries' and keys' matrices, the rows of first and second members, head by head."""
    matrices = [pair for side in both for pair in side if pair[0].tensor in axes.reads]
    for outer in heads:
        found = []
        for pair in matrices:
            inside = [Axis(size, "inner", (), (place,)) for place in pair]
            spots = [crossed(axes, outer, each) for each in inside]
            if all(len(each) == 1 for each in spots):
                found.append((spots[0][0], spots[1][0]))
        # Where keys are shared, their heads are in both, and those of queries' copies are not.
        if len(found) == len(both) and len({len(one.positions) for one, _ in found}) == 1:
            return found
    return _pairs_by_repeats(axes, matrices, size) if len(matrices) == len(both) else None


def _pairs_by_repeats(
    axes: Axes, matrices: Sequence[tuple[Place, Place]], size: int
) -> list[tuple[Spot, Spot]] | None:
    """The same where no axis is the heads: as many blocks as all of them have repeats of."""
    spots = [spots_of(axes, Axis(size, "inner", (), pair)) for pair in matrices]
    blocks = min(each.positions.shape[1] for pair in spots for each in pair)
    if any(each.positions.shape[1] % blocks for pair in spots for each in pair):
        return None
    turned = [[s._replace(positions=_by_block(s, blocks)) for s in pair] for pair in spots]
    return [(one, two) for one, two in turned]


def _matrices(axes: Axes, heads: int | None, number: int) -> list[Spot]:
    """Matrices, not biases, that have heads and their inside in one dimension."""
    return [spot for spot in inside_of(axes, heads, number) if spot.tensor in axes.reads]


def _by_block(spot: Spot, blocks: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Positions (size repeats) by block and index, what is left of the repeats side by side."""
    size, repeats = spot.positions.shape
    apart = spot.positions.reshape(size, blocks, repeats // blocks)
    return apart.swapaxes(0, 1).reshape(blocks * size, repeats // blocks)


def _copies(
    axes: Axes, heads: int | None, spots: Sequence[Spot], batched: Sequence[int]
) -> int | None:
    """The axis, if any, of the copies of each head, in one of the sides of an inside."""
    for number in batched:
        there = spots_of(axes, axes.axes[number]) if number != heads else []
        if sum(any(_within(each, spot) for each in there) for spot in spots) == 1:
            return number
    return None


def _side(axes: Axes, heads: int | None, copies: int | None, number: int, spot: Spot) -> Side:
    """A side of an inside, and where copies of heads are told apart in it."""
    if copies is None:
        return Side(spot, None)
    outer, inside = axes.axes[copies], axes.axes[number]
    both = spots_of(axes, outer) if heads is None else crossed(axes, axes.axes[heads], outer)
    rows = next((each for each in both if _within(spot, each)), None)
    column = next((each for each in spots_of(axes, inside) if _within(spot, each)), None)
    if rows is None or column is None:
        return Side(spot, None)
    positions = meeting(rows.positions, column.positions)
    return Side(spot, None if positions is None else spot._replace(positions=positions))


def _within(spot: Spot, other: Spot) -> bool:
    """Whether two spots are the same rows of one tensor, in whatever order."""
    if (spot.tensor, spot.dimension) != (other.tensor, other.dimension):
        return False
    mine, theirs = (np.sort(each.positions, axis=None) for each in (spot, other))
    return np.array_equal(mine, theirs)
