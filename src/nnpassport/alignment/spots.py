"""Where an axis lies in tensors, row by row, and where two of them cross."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Axis
from nnpassport.alignment.canonical import reads

Matrix = NDArray[np.float64]


class Spot(NamedTuple):
    """Rows of a tensor along an axis: indices into one dimension (size repeats)."""

    tensor: str
    dimension: int
    positions: NDArray[np.int64]
    reads: bool

    def rows(self, tensor: Matrix) -> Matrix:
        """The tensor's rows (size rest), a copy."""
        moved = np.moveaxis(tensor, self.dimension, 0)
        return moved[self.positions.reshape(-1)].reshape(len(self.positions), -1)

    def of(self, rows: Matrix, tensor: Matrix) -> Matrix:
        """These rows in their places, and nothing else, where `tensor` had others."""
        rest = [side for n, side in enumerate(tensor.shape) if n != self.dimension]
        found = np.zeros((self.positions.size, *rest))
        found[self.positions.reshape(-1)] = rows.reshape(self.positions.size, *rest)
        return np.moveaxis(found, 0, self.dimension)

    def with_rows(self, tensor: Matrix, rows: Matrix) -> Matrix:
        """The tensor with such rows in their places, a copy."""
        found = np.array(tensor)
        moved = np.moveaxis(found, self.dimension, 0)
        moved[self.positions.reshape(-1)] = rows.reshape(self.positions.size, *moved.shape[1:])
        return found


def spots_of(axes: Axes, axis: Axis) -> list[Spot]:
    """Where an axis is."""
    return [
        Spot(place.tensor, place.dimension, place.positions(axis.size), reads(axes, place))
        for place in axis.places
    ]


def crossed(axes: Axes, outer: Axis, inner: Axis) -> list[Spot]:
    """Where both axes are in one dimension: rows by the outer index, then by the inner one."""
    found = []
    for place in inner.places:
        columns = place.positions(inner.size)
        for other in outer.places:
            if (place.tensor, place.dimension) != (other.tensor, other.dimension):
                continue
            positions = meeting(other.positions(outer.size), columns)
            if positions is not None:
                found.append(Spot(place.tensor, place.dimension, positions, reads(axes, place)))
    return found


def meeting(rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Positions that row r and column c share, (rows · columns repeats); None: not equally many."""
    length = int(max(rows.max(), columns.max())) + 1
    row_of, column_of = np.full(length, -1), np.full(length, -1)
    row_of[rows] = np.arange(len(rows))[:, None]
    column_of[columns] = np.arange(len(columns))[:, None]
    both = np.flatnonzero((row_of >= 0) & (column_of >= 0))
    cell = row_of[both] * len(columns) + column_of[both]
    counts = np.bincount(cell, minlength=len(rows) * len(columns))
    if not counts.min() or counts.min() != counts.max():
        return None
    return both[np.argsort(cell, kind="stable")].reshape(len(counts), -1)
