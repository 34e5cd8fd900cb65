"""Channels that compute the same, made one.

A thief splits a channel into two that are written alike and read in shares, or adds some that are
written alike and read with opposite signs, so that they cancel however loud they are. No output
feels it, but a channel that is matched with one half has lost the other. Of rows that are written
alike in every tensor (behind a ReLU up to a positive factor, as a factor of a product of either
sign) one is kept, and reads what all of them did.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.canonical import before_norm
from nnpassport.alignment.spots import Spot

Matrix = NDArray[np.float64]
ALIKE = 0.01
"""Twins differ by less, as a share of their length: tuning and rounding make them differ a little,
and rows of one layer differ by about √2 of it."""
_PROJECTED, _NEIGHBOURS = 8, 8
_LEAST = 1e-9  # of the longest row: what is shorter is a row of zeros
_TINY = 1e-300


class Twins(NamedTuple):
    """How rows along a longer axis are made fewer.

    Attributes:
        kept: the rows that stay, in their order.
        of_row: of each row, which of `kept` it is one with.
        factors: of each row, what its readers are multiplied with to read that one.
    """

    kept: NDArray[np.int64]
    of_row: NDArray[np.int64]
    factors: Matrix

    def of(self, spot: Spot, tensor: Matrix) -> Matrix:
        """A tensor along whose axis there is one of each."""
        wide = spot.along(tensor)
        if len(wide.positions) != len(self.factors):
            return tensor
        rows, fewer = wide.rows(tensor), spot.of_length(len(self.kept) * spot.positions.shape[1])
        if not spot.reads:
            return fewer.of(rows[self.kept], tensor)
        read = np.zeros((len(self.kept), rows.shape[1]))
        np.add.at(read, self.of_row, rows * self.factors[:, None])
        return fewer.of(read, tensor)


def twins_of(
    axes: Axes,
    spots: Sequence[Spot],
    weights: Mapping[str, Matrix],
    size: int,
    *,
    scaled: bool,
    signed: bool,
) -> Twins | None:
    """Twins along an axis that is longer than `size`; None: there are none.

    Weights are in canonical form. Rows may be `scaled` by a positive factor, or be `signed`. The
    most alike are made one first, until there are no more than `size` rows.
    """
    writers = [spot for spot in spots if not spot.reads and weights[spot.tensor].ndim > 1]
    if not writers:
        return None
    count = len(spots[0].along(weights[spots[0].tensor]).positions)
    factors, features = np.ones(count), list[Matrix]()
    for spot in writers:
        rows = spot.along(weights[spot.tensor]).rows(weights[spot.tensor])
        whole = np.hstack([rows, _shift(axes, spot.tensor, weights, count)[:, None]])
        length = np.linalg.norm(rows, axis=1)
        length = np.maximum(length, max(_LEAST * float(length.max()), _TINY))
        if signed:
            length = length * _signs(rows)
        if not (scaled or signed):
            length = np.full(count, np.abs(length).max())
        features.append(whole / length[:, None])
        factors *= length
    return _made_one(np.hstack(features), factors, size)


def _signs(rows: Matrix) -> Matrix:
    """Of the largest number of each row."""
    sign = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])
    return np.where(sign == 0, 1.0, sign)


def _shift(axes: Axes, name: str, weights: Mapping[str, Matrix], count: int) -> Matrix:
    """What is added to each channel behind the layer, and its batch norm, of this name."""
    shift = _vector(f"{name.removesuffix('weight')}bias", weights, count)
    norm = axes.batch_norms.get(name)
    if norm is None or norm.variance not in weights or weights[norm.variance].size != count:
        return shift
    moved = (shift - _vector(norm.mean, weights, count)) * before_norm(norm, weights)
    return moved + _vector(norm.bias, weights, count)


def _vector(name: str | None, weights: Mapping[str, Matrix], count: int) -> Matrix:
    """A tensor of so many numbers, or zeros."""
    found = None if name is None else weights.get(name)
    return np.ravel(found) if found is not None and found.size == count else np.zeros(count)


def _made_one(features: Matrix, factors: Matrix, size: int) -> Twins | None:
    parent = np.arange(len(features))

    def first(row: int) -> int:
        while parent[row] != row:
            parent[row] = row = parent[parent[row]]
        return row

    left = len(features)
    for one, two in _pairs(features):
        a, b = sorted((first(one), first(two)))
        if a != b and left > size:
            parent[b] = a
            left -= 1
    if left == len(features):
        return None
    roots = np.array([first(row) for row in range(len(features))])
    kept = np.unique(roots)
    return Twins(kept, np.searchsorted(kept, roots), factors / factors[roots])


def _pairs(features: Matrix) -> NDArray[np.int64]:
    """Rows that differ by less than `ALIKE` of their length (pairs 2), the most alike first.

    Of each row a few neighbours are looked at: a file may have any number of rows that are one.
    """
    from scipy.spatial import KDTree  # noqa: PLC0415 - slow to import

    length = np.maximum(np.linalg.norm(features, axis=1), _TINY)
    rng = np.random.default_rng(0)
    few = features @ rng.standard_normal((features.shape[1], _PROJECTED)) / _PROJECTED**0.5
    few /= length[:, None]
    near, at = KDTree(few).query(few, _NEIGHBOURS, distance_upper_bound=3 * ALIKE)
    one, which = np.nonzero(np.isfinite(near))
    pairs = np.unique(np.sort(np.stack([one, at[one, which]], 1), axis=1), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    apart = np.array(
        [np.linalg.norm(features[a] - features[b]) / max(length[a], length[b]) for a, b in pairs]
    )
    order = np.argsort(apart, kind="stable")
    return np.asarray(pairs[order[apart[order] < ALIKE]], np.int64)
