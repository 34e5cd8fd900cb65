"""What a mark may have moved of each filter: the directions that its channel's passports span.

A filter with a passport of its own moves in the plane of m_γ and m_β: by training along m itself,
by a graft along (C + λ)⁻¹m, the least change of what the layer puts out. A rotation or a mixture
that is fitted to whole filters takes up a part of that, and with it a part of the mark. So it is
fitted to what is left of the filters once these directions are free.

Only lines count here: −m gives the same, to the last bit. Signs of bits are drawn apart from the
passports, so whatever is done with lines alone leaves bits of independent networks fair coins.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.match import unit_rows
from nnpassport.keys.context import LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.patches import filters, mean_patch
from nnpassport.keys.reading import READERS, read_passports

Matrix = NDArray[np.float64]
_DEPENDENT = 1e-6
MOST_NUMBERS = 2**27
"""Of a layer's directions, at most: one GiB. Larger layers count less, and no direction is free."""


class Free(NamedTuple):
    """Orthonormal directions of each filter of a tensor (filters directions numbers), or zeros."""

    basis: Matrix
    geometry: Geometry

    def of_rows(self, positions: NDArray[np.int64], dimension: int) -> Matrix | None:
        """Directions of rows along a dimension (rows directions numbers), if they are filters.

        `positions` are the rows' indices in it (rows repeats).
        """
        along = 1 if self.geometry.transposed else 0
        several = self.geometry.transposed and self.geometry.groups > 1
        if positions.shape[1] != 1 or dimension != along or several:
            return None
        return self.basis[positions[:, 0]]

    def taken(self, mine: Matrix, theirs: Matrix) -> Matrix:
        """`theirs` with what `mine`, of the same shape, has along the free directions."""
        return theirs + self.along(mine - theirs)

    def along(self, weight: Matrix) -> Matrix:
        """Of a tensor of this shape, what lies along the free directions of its filters."""
        rows = filters(weight, self.geometry)
        flat = rows.reshape(len(rows), -1)
        along = np.matmul(self.basis, flat[:, :, None])
        found = np.matmul(self.basis.swapaxes(1, 2), along)[:, :, 0].reshape(rows.shape)
        return filters(found, self.geometry)


def cosines_outside(directions: Matrix, wanted: Matrix, rows: Matrix) -> Matrix:
    """Cosines of rows to each of those wanted, both without what lies along its directions.

    Shapes: (wanted directions numbers), (wanted numbers), (rows numbers) → (wanted rows).
    """
    along = np.matmul(directions, wanted[:, :, None])
    kept = wanted - np.matmul(directions.swapaxes(1, 2), along)[:, :, 0]
    power = np.square(rows).sum(1)[None] - sum(
        np.square(directions[:, at] @ rows.T) for at in range(directions.shape[1])
    )
    least = _DEPENDENT * np.square(rows).sum(1)[None]
    return np.asarray(unit_rows(kept) @ rows.T / np.sqrt(np.maximum(power, least) + 1e-300))


def spanned(key: Key, layer: LayerShape) -> Matrix:
    """Directions in which the key's mark moves each filter (directions, filters, numbers).

    Empty where the scheme's marks are no passports, or these take too much memory.
    """
    out, numbers = layer.weight[0], int(np.prod(layer.weight[1:]))
    none = np.zeros((0, out, numbers))
    if READERS.get(key.context.scheme) is not read_passports or 4 * out * numbers > MOST_NUMBERS:
        return none
    if layer.channels is None:
        patch = mean_patch(key.passport_array(layer.name), layer.weight, layer.geometry)
        return np.repeat(patch, out // patch.shape[1], axis=1)
    whole = [part for _, part in key.channel_arrays(layer.name)]
    found = _without_sign(np.concatenate(whole, axis=1))
    metric = (key.metrics or {}).get(layer.name)
    return found if metric is None else np.concatenate([found, _least(found, metric)])


def free_in(vectors: Sequence[Matrix], geometry: Geometry) -> Free:
    """Of directions that have a weight's own shape, each filter's orthonormal ones."""
    rows = np.stack([filters(each, geometry) for each in vectors])
    flat = rows.reshape(len(rows), rows.shape[1], -1).swapaxes(0, 1)  # filters directions numbers
    length = np.linalg.norm(flat, axis=2, keepdims=True)
    unit = flat / np.maximum(length, 1e-300)
    for at in range(unit.shape[1]):  # Gram and Schmidt, twice: it is a handful
        for _ in range(2):
            before, own = unit[:, :at], unit[:, at : at + 1]
            own -= np.matmul(np.matmul(own, before.swapaxes(1, 2)), before)
        length = np.linalg.norm(own, axis=2, keepdims=True)
        unit[:, at : at + 1] = np.where(length > _DEPENDENT, own / np.maximum(length, 1e-300), 0.0)
    return Free(unit, geometry)


def _without_sign(vectors: Matrix) -> Matrix:
    """Of each vector and its negative the one whose largest number is positive."""
    at = np.abs(vectors).argmax(-1)[..., None]
    sign = np.sign(np.take_along_axis(vectors, at, -1))
    return vectors * np.where(sign == 0, 1.0, sign)


def _least(vectors: Matrix, metric: NDArray[np.int16]) -> Matrix:
    """(C + λ)⁻¹m up to a factor: m = R·z with R = (C + λ)^½, of which the metric has directions."""
    strengths, directions = metric[:, 0] * 2.0**-8, metric[:, 1:] * 2.0**-15
    there = strengths > -1
    by = np.where(there, np.maximum(1 + strengths, 2.0**-8), 1.0) ** -2.0 - 1
    moved: Matrix = vectors + (vectors @ directions.T * by) @ directions
    return moved
