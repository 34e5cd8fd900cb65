"""The eight ways to lay a picture, and what they do to the weights of a network that looks at it.

Kernels that are mirrored or turned answer to a picture that is mirrored or turned as the network
did before. So does what reads a map place by place (a matrix behind a flattened map, embeddings of
positions): its places change with it. Signals in time have two ways.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from nnpassport.alignment.axes import Axes
from nnpassport.files.arrays import Array


class Orientation(NamedTuple):
    """One of the eight.

    Attributes:
        name: for people: what was done to the picture.
        transposed: whether rows and columns change places, before all else.
        flipped: which of the last two dimensions are then reversed.
    """

    name: str
    transposed: bool
    flipped: tuple[int, ...]

    def of(self, picture: Array) -> Array:
        """An array whose last two dimensions are space, turned; another view of it."""
        turned = picture.swapaxes(-1, -2) if self.transposed else picture
        return np.flip(turned, self.flipped) if self.flipped else turned

    @property
    def inverse(self) -> "Orientation":
        """What turns it back."""
        if not self.transposed or len(self.flipped) != 1:
            return self
        return next(
            each
            for each in ORIENTATIONS
            if each.transposed and len(each.flipped) == 1 and each != self
        )


AS_IT_IS = Orientation("as it is", False, ())
ORIENTATIONS = (
    AS_IT_IS,
    Orientation("mirrored left to right", False, (-1,)),
    Orientation("mirrored top to bottom", False, (-2,)),
    Orientation("turned by a half", False, (-2, -1)),
    Orientation("transposed", True, ()),
    Orientation("turned by a quarter to the left", True, (-2,)),
    Orientation("turned by a quarter to the right", True, (-1,)),
    Orientation("transposed across", True, (-2, -1)),
)


def turned(axes: Axes, tensors: Mapping[str, Array], to: Orientation) -> dict[str, Array]:
    """A network's tensors as they are where pictures are turned like this.

    Those that differ are new arrays.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim >= 4:
            found[name] = to.of(tensor).copy()
        elif tensor.ndim == 3 and name in axes.reads:
            if -1 in to.flipped:
                found[name] = np.flip(tensor, -1).copy()
        elif tensor.ndim == 3 and tensor.shape[0] == 1:
            found[name] = _tokens(tensor, to)
    for name, (channels, side) in _flattened(axes).items():
        matrix = found.get(name)
        if matrix is not None and matrix.ndim == 2 and matrix.shape[1] == channels * side * side:
            maps = matrix.reshape(len(matrix), channels, side, side)
            found[name] = to.of(maps).copy().reshape(matrix.shape)
    return found


def possible(axes: Axes, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Orientation]:
    """The orientations that change kernels of these shapes, and differ from one another."""
    kernels = [shape[-2:] for name, shape in shapes.items() if len(shape) >= 4]
    square = bool(kernels) and all(height == width for height, width in kernels)
    signals = any(len(shape) == 3 and name in axes.reads for name, shape in shapes.items())
    long = {
        -2: any(height > 1 for height, _ in kernels),
        -1: signals or any(width > 1 for _, width in kernels),
    }
    for each in ORIENTATIONS[1:]:
        if each.transposed and not (square and long[-1]):
            continue
        if all(long[side] for side in each.flipped):
            yield each


def _tokens(tensor: Array, to: Orientation) -> Array:
    """Embeddings of positions (1 tokens size): a square of them, up to two of no place before."""
    count = tensor.shape[1]
    for before in (0, 1, 2):
        side = math.isqrt(max(0, count - before))
        if side > 1 and side * side == count - before:
            grid = np.arange(count - before).reshape(side, side)
            order = np.concatenate([np.arange(before), before + to.of(grid).ravel()])
            return tensor[:, order]
    return tensor


def _flattened(axes: Axes) -> dict[str, tuple[int, int]]:
    """Matrices that read a flattened square map: how many channels, and places a side."""
    found = {}
    for axis in axes.axes:
        for place in axis.places:
            dimension = axes.reads.get(place.tensor, (-1, None))[0]
            places = math.prod(count for count, _ in place.repeats)
            side = math.isqrt(places)
            inner = place.stride == places and place.offset == 0
            if dimension == place.dimension == 1 and inner and side > 1 and side**2 == places:
                found[place.tensor] = (axis.size, side)
    return found
