"""Are the hidden units of two networks in one order?

Nothing in a network's task says which hidden unit comes first. Weights that were drawn alike for
all units, and trained by a rule that treats units alike, are as likely in any other order of them.
So if unit i of one network is matched with unit π(i) of an independent one, π is uniform among all
n! permutations, and the number of i with π(i) = i is known exactly. It is about 1, whatever n is;
in a copy it is about n.

    P[X = j] = (1/j!) · Σ_{i ≤ n−j} (−1)^i / i!          fixed points of a uniform permutation

This needs that the units moved are exchangeable, that nothing but the order of these units enters
the matching twice (`counted_axes`), and that ties are broken by lot (`fixed_points`).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Place
from nnpassport.keys.validity import FEWEST_UNITS, MOST_UNITS
from nnpassport.scheme import MiscountedError

Matrix = NDArray[np.float64]
_MOST_NUMBERS = 8192
"""Of a row, at most so many numbers are compared, drawn by lot."""


class Order(NamedTuple):
    """What was found along one axis.

    Attributes:
        what: the axis in words.
        units: how many were matched.
        fixed: how many of them were matched with the unit in their own place.
        tensors: whose rows were compared.
    """

    what: str
    units: int
    fixed: int
    tensors: tuple[str, ...]

    @property
    def log10_p(self) -> float:
        """Of this axis alone."""
        return log10_fixed_points(self.fixed, [self.units])


def log10_fixed_points(count: int, sizes: Sequence[int]) -> float:
    """The log₁₀ of P[independent uniform permutations of these sizes have `count` fixed points].

    Or more of them, all together. Exact to rounding, also far below what a float holds.

    Raises:
        MiscountedError: not 0 to Σ sizes, or no axis at all.
    """
    from scipy.special import logsumexp  # noqa: PLC0415 - slow to import

    if not sizes or min(sizes) < 1 or not 0 <= count <= sum(sizes):
        raise MiscountedError(
            f"got {count} fixed points on axes of {list(sizes)!r:.80} units; needed: at least one "
            "axis, and no more fixed points than units"
        )
    if count == 0:
        return 0.0

    laws = [_log_law(size) for size in sizes]
    if count == sum(sizes):
        return float(sum(law[-1] for law in laws) / np.log(10))
    tilt = _tilt(laws, count)
    total, scale = np.ones(1), 0.0
    for law in laws:
        terms = law + tilt * np.arange(len(law))
        most = float(logsumexp(terms))
        total, scale = np.convolve(total, np.exp(terms - most)), scale + most
    with np.errstate(divide="ignore"):
        logs = np.log(total[count:]) - tilt * np.arange(count, len(total))
    return min(0.0, float((logsumexp(logs) + scale) / np.log(10)))


def _tilt(laws: Sequence[Matrix], count: int) -> float:
    """θ from 0 for which Σ e^(θj)·P[X = j] has its mean at `count`, where no term underflows."""
    low, high = 0.0, 64.0
    for _ in range(50):
        middle = (low + high) / 2
        mean = 0.0
        for law in laws:
            terms = law + middle * np.arange(len(law))
            weights = np.exp(terms - terms.max())
            mean += float(weights @ np.arange(len(law)) / weights.sum())
        low, high = (middle, high) if mean < count else (low, middle)
    return low


def _log_law(size: int) -> Matrix:
    """Log P[X = j] for j = 0 … size."""
    from scipy.special import gammaln  # noqa: PLC0415 - slow to import

    signs = np.where(np.arange(size + 1) % 2, -1.0, 1.0)
    without = np.cumsum(signs * np.exp(-gammaln(np.arange(size + 1) + 1)))  # D_m / m!
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(without[::-1], 0)) - gammaln(np.arange(size + 1) + 1))


def fixed_points(similarity: Matrix, rng: np.random.Generator) -> int:
    """How many diagonal places the best assignment of rows to columns has."""
    return int((assigned(similarity, rng) == np.arange(len(similarity))).sum())


def assigned(similarity: Matrix, rng: np.random.Generator) -> NDArray[np.int64]:
    """By row, the column that it has in the best assignment; between equal ones a lot decides.

    Rows and columns are put into orders by lot first. Whoever solves for an assignment goes through
    them one by one: of rows that are equal the first would get the best column, the next the second
    best, and columns that somebody has sorted would be matched in their own order.
    """
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - slow to import

    rows, columns = rng.permutation(len(similarity)), rng.permutation(similarity.shape[1])
    found = np.empty(len(rows), np.int64)
    chosen = linear_sum_assignment(similarity[np.ix_(rows, columns)], maximize=True)[1]
    found[rows] = columns[chosen]
    return found


def order_of(
    what: str,
    pairs: Sequence[tuple[str, Matrix, Matrix]],
    rng: np.random.Generator,
) -> Order:
    """The order along one axis, seen in all these tensors together.

    Args:
        what: the axis in words.
        pairs: a name, and rows (units numbers) of one network and of the other.
        rng: for ties, and for which units and numbers are compared where there are many.
    """
    units = len(pairs[0][1])
    some = np.sort(rng.permutation(units)[:MOST_UNITS])
    similarity = np.zeros((len(some), len(some)))
    for _, mine, theirs in pairs:
        length = mine.shape[1]
        seen = np.sort(rng.permutation(length)[:_MOST_NUMBERS]) if length > _MOST_NUMBERS else ...
        a, b = (unit_rows(each[some][:, seen]) for each in (mine, theirs))
        similarity += a @ b.T
    fixed = fixed_points(np.nan_to_num(similarity), rng)
    return Order(what, len(some), fixed, tuple(name for name, _, _ in pairs))


def unit_rows(rows: Matrix) -> Matrix:
    """Rows of length 1, those of zeros left as they are."""
    wide = np.asarray(rows, np.float64)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / np.maximum(length, 1e-300)


def counted_axes(axes: Axes, usable: Mapping[str, int]) -> list[tuple[int, tuple[Place, ...]]]:
    """Axes whose orders are independent, with the places that each is matched by.

    The orders that two axes are found in are independent if each tensor serves but one of them,
    and serves the last one, of all axes it has, in some sequence of axes: given the orders of those
    before, the order of this one is still uniform. A tensor that has an axis twice serves neither.

    Args:
        axes: the table.
        usable: by name, the numbers in each tensor that can be compared.
    """
    on: dict[str, set[int]] = {}
    twice: set[tuple[int, str]] = set()
    for number, axis in enumerate(axes.axes):
        where: dict[str, set[int]] = {}
        for place in axis.places:
            on.setdefault(place.tensor, set()).add(number)
            where.setdefault(place.tensor, set()).add(place.dimension)
            if len(where[place.tensor]) > 1:
                twice.add((number, place.tensor))
    waiting = {n for n, axis in enumerate(axes.axes) if axis.size >= FEWEST_UNITS}
    found: list[tuple[int, tuple[Place, ...]]] = []
    while waiting:
        serving = {
            number: [
                place
                for place in axes.axes[number].places
                if place.tensor in usable
                and (number, place.tensor) not in twice
                and not (on[place.tensor] & waiting) - {number}
            ]
            for number in waiting
        }
        size = {n: sum(usable[place.tensor] for place in serving[n]) for n in waiting}
        best = max(waiting, key=lambda n: (size[n], -n))
        if size[best] == 0:  # two that are everywhere together: the smaller is not counted
            waiting.discard(min(waiting, key=lambda n: (axes.axes[n].size, n)))
            continue
        found.append((best, tuple(serving[best])))
        waiting.discard(best)
    return found
