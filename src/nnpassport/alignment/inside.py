"""Which rows of two bare files of weights are hidden units: told by shapes, and doubted.

A file of weights has no graph. What meets the outside (classes, tokens, positions, pixels) is in
one order in all networks that do one job, so a size counts only if tensors of other shapes both
write it and read it. That alone is not enough: what a network reads and writes may have one size,
as in an autoencoder, or where inputs skip layers. So

- where the file does not show both ends (a size that is only read, and one that is only written),
  one of the sizes may be outside, and at least two have to be there;
- *all* sizes have to agree, and of each more than half of its tensors: what is outside may be
  among them, but at least one size, and most tensors of it, are inside;
- a square matrix does not count: its columns may be the same units as its rows;
- nor does one whose numbers lie on a diagonal, such as one that began as an identity.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.order import Order, order_of, unit_rows
from nnpassport.files.arrays import Array, Described, is_floating
from nnpassport.keys.validity import FEWEST_UNITS

Matrix = NDArray[np.float64]
Tensors = Mapping[str, Array]
MOST_PAIRS, MOST_SIZES = 24, 64
"""Tensors of one size that are matched, and sizes, at most; of more as many are drawn by lot."""

_SKETCH = 4096
_MOST_OF_A_SHAPE = 512
_DIAGONAL = 8.0  # standard errors


class Pair(NamedTuple):
    """A tensor of each network, of one shape, and among how many it was chosen."""

    a: str
    b: str
    choices: int


class Sizes(NamedTuple):
    """What shapes say of two networks together.

    Attributes:
        inside: sizes that are written and read in both, by tensors of other shapes.
        outside: sizes that are only written, or only read, in one of them.
        open_ends: whether the file does not show where the network begins, or where it ends.
    """

    inside: tuple[int, ...]
    outside: tuple[int, ...]
    open_ends: bool


class Agreement(NamedTuple):
    """All tensors of one size.

    Attributes:
        orders: of each pair that was matched.
        choices: of each, among how many tensors its partner was chosen.
    """

    size: int
    orders: tuple[Order, ...]
    choices: tuple[int, ...]

    @property
    def log10_p(self) -> float:
        """Of the claim that fewer than half of these rows, and one more, are in one order.

        The p-value of the u-th best of N, u more than half, times N − u + 1; each of them times the
        choices among tensors. No independence is assumed.
        """
        each = sorted(
            order.log10_p + math.log10(choices)
            for order, choices in zip(self.orders, self.choices, strict=True)
        )
        most = len(each) // 2
        return min(0.0, each[most] + math.log10(len(each) - most))

    @property
    def log10_least(self) -> float:
        """The smallest p-value times the number of pairs: of the claim that any are."""
        each = min(
            order.log10_p + math.log10(choices)
            for order, choices in zip(self.orders, self.choices, strict=True)
        )
        return min(0.0, each + math.log10(len(self.orders)))


def described(tensors: Tensors) -> dict[str, Array | Described]:
    """Shapes and kinds, without reading where that can be had."""
    known = getattr(tensors, "described", None)
    return dict(tensors) if known is None else known()


def sides(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a matrix, a kernel, or one with ones before it; None of a vector."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return (shape[0], shape[1]) if len(shape) > 1 else None


def sizes_of(a: Tensors, b: Tensors) -> Sizes:
    """Which sizes are inside both networks."""
    inside, outside, open_ends = set[int](), set[int](), False
    for number, network in enumerate((a, b)):
        shapes = {
            found
            for each in described(network).values()
            if is_floating(each) and (found := sides(tuple(each.shape))) is not None
        }
        written = {rows for rows, _ in shapes}
        read = {columns for _, columns in shapes if columns > 1}
        both = {
            size
            for size in written & read
            if any(r == size and c != size for r, c in shapes)
            and any(c == size and r != size for r, c in shapes)
        }
        inside = both if number == 0 else inside & both
        outside |= (written ^ read) | ((written & read) - both)
        open_ends |= not (written - read and read - written)
    enough = tuple(sorted(size for size in inside - outside if size >= FEWEST_UNITS))
    return Sizes(enough, tuple(sorted(outside)), open_ends)


def pairs_of(a: Tensors, b: Tensors, rng: np.random.Generator) -> list[Pair]:
    """Tensors of one shape of two or more dimensions, paired by what is in them, names aside."""
    found = list[Pair]()
    shapes: dict[tuple[int, ...], tuple[list[str], list[str]]] = {}
    for index, network in enumerate((a, b)):
        for name, each in described(network).items():
            if is_floating(each) and len(each.shape) > 1 and each.size:
                shapes.setdefault(tuple(each.shape), ([], []))[index].append(name)
    for shape, (mine, theirs) in shapes.items():
        if mine and theirs:
            found += _by_content(
                a, b, shape, mine[:_MOST_OF_A_SHAPE], theirs[:_MOST_OF_A_SHAPE], rng
            )
    return found


def _by_content(
    a: Tensors,
    b: Tensors,
    shape: tuple[int, ...],
    mine: Sequence[str],
    theirs: Sequence[str],
    rng: np.random.Generator,
) -> Iterator[Pair]:
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - slow to import

    if len(mine) == len(theirs) == 1:
        yield Pair(mine[0], theirs[0], 1)
        return
    size = math.prod(shape)
    places = rng.integers(0, size, min(size, _SKETCH))
    sketches = [
        unit_rows(np.stack([_centred(network[name].reshape(-1)[places]) for name in names]))
        for network, names in ((a, mine), (b, theirs))
    ]
    alike = np.nan_to_num(sketches[0] @ sketches[1].T)
    same = np.array([[one == other for other in theirs] for one in mine])
    rows, columns = linear_sum_assignment(alike + 1e-6 * same, maximize=True)
    for row, column in zip(rows, columns, strict=True):
        yield Pair(mine[row], theirs[column], len(mine))


def _centred(values: Array) -> Matrix:
    wide = np.asarray(values, np.float64)
    return wide - wide.mean()


def agreements(
    a: Tensors,
    b: Tensors,
    sizes: Sequence[int],
    pairs: Sequence[Pair],
    rng: np.random.Generator,
) -> list[Agreement]:
    """The order of rows of each size that is inside; sizes without rows to compare are left out."""
    found = []
    for size in sorted(sizes[index] for index in rng.permutation(len(sizes))[:MOST_SIZES]):
        usable = [
            pair
            for pair in pairs
            if (both := sides(tuple(described(a)[pair.a].shape))) is not None
            and both[0] == size != both[1]
        ]
        some = [usable[index] for index in rng.permutation(len(usable))[:MOST_PAIRS]]
        orders, choices = list[Order](), list[int]()
        for pair in some:
            mine, theirs = (
                np.asarray(network[name], np.float64).reshape(size, -1)
                for network, name in ((a, pair.a), (b, pair.b))
            )
            columns = sides(tuple(described(a)[pair.a].shape))
            if columns is None or any(_linked(e, columns[1]) for e in (mine, theirs)):
                continue
            names = pair.a if pair.a == pair.b else f"{pair.a} and {pair.b}"
            what = f"{size} rows of {names}"
            orders.append(order_of(what, [(pair.a, mine, theirs)], rng))
            choices.append(pair.choices)
        if orders:
            found.append(Agreement(size, tuple(orders), tuple(choices)))
    return found


def _linked(rows: Matrix, columns: int) -> bool:
    """Whether large numbers lie on a diagonal, so that rows may be tied to their own columns."""
    size = np.abs(rows).reshape(len(rows), columns, -1).sum(2)
    size = np.minimum(size, np.quantile(size, 0.99))
    spread = float(size.std()) / math.sqrt(len(rows))
    if spread == 0 or columns < 2:
        return False
    places = (np.arange(len(rows))[:, None] + np.arange(columns)) % columns
    diagonals = np.take_along_axis(size, places, 1).mean(0)
    # What every row has in a column is no diagonal: the median of all is taken away.
    return float((diagonals - np.median(diagonals)).max() / spread) > _DIAGONAL
