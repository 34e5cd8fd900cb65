"""Where an axis lies in tensors, row by row, and where two of them cross."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Axis
from nnpassport.alignment.canonical import reads

Matrix = NDArray[np.float64]


class Spot(NamedTuple):
    """Rows of a tensor along an axis: indices into one dimension (size repeats).

    A convolution in `groups` has inputs of its own in each: its rows are by group, and by input of
    it (`dimension` 1), and there are so many times more of them than the dimension is long.
    """

    tensor: str
    dimension: int
    positions: NDArray[np.int64]
    reads: bool
    groups: int = 1

    def rows(self, tensor: Matrix) -> Matrix:
        """The tensor's rows (size rest), a copy."""
        moved = self._first(tensor)
        return moved[self.positions.reshape(-1)].reshape(len(self.positions), -1)

    def of(self, rows: Matrix, tensor: Matrix) -> Matrix:
        """These rows in their places, and nothing else, where `tensor` had others."""
        rest = [side for n, side in enumerate(tensor.shape) if n != self.dimension]
        found = np.zeros((self.positions.size, *rest))
        found[self.positions.reshape(-1)] = rows.reshape(self.positions.size, *rest)
        return np.moveaxis(found, 0, self.dimension)

    def with_rows(self, tensor: Matrix, rows: Matrix) -> Matrix:
        """The tensor with such rows in their places, a copy."""
        found = self._first(np.array(tensor))
        found[self.positions.reshape(-1)] = rows.reshape(self.positions.size, *found.shape[1:])
        return self._back(found, tensor.shape)

    def along(self, tensor: Matrix) -> "Spot":
        """The spot in a tensor of another length: its rows lie there as they do in the reference's.

        Side by side, each in one piece; or a number of each in turn. Of another kind there are
        none.
        """
        return self.of_length(tensor.shape[self.dimension])

    def of_length(self, length: int) -> "Spot":
        """The same in a dimension that is so long."""
        size, repeats = self.positions.shape
        count, over = divmod(length, repeats)
        places, wide = np.arange(size * repeats), np.arange(count * repeats)
        if not over and np.array_equal(self.positions, places.reshape(size, repeats)):
            return self._replace(positions=wide.reshape(count, repeats))
        if not over and np.array_equal(self.positions, places.reshape(repeats, size).T):
            return self._replace(positions=wide.reshape(repeats, count).T)
        return self._replace(positions=np.zeros((0, repeats), np.int64))

    def _first(self, tensor: Matrix) -> Matrix:
        """The tensor with its rows first: a view, but of a convolution in groups a copy."""
        if self.groups == 1:
            return np.moveaxis(tensor, self.dimension, 0)
        parted = tensor.reshape(self.groups, -1, *tensor.shape[1:])
        return np.moveaxis(parted, 2, 1).reshape(-1, *parted.shape[1:2], *tensor.shape[2:])

    def _back(self, rows: Matrix, shape: tuple[int, ...]) -> Matrix:
        """What `_first` made rows of, as it was."""
        if self.groups == 1:
            return np.moveaxis(rows, 0, self.dimension)
        parted = rows.reshape(self.groups, shape[1], -1, *shape[2:])
        return np.moveaxis(parted, 2, 1).reshape(shape)


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
