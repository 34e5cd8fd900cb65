"""The pictures that a seed gives: the trigger images of keys without pictures of their own.

They must be the same bit for bit wherever they are computed again, years later and on another
machine: so there is integer arithmetic only, and every choice is a byte of the stream.
`docs/derivation.md` is the same specification for those who do not read Python.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nnpassport.scheme import UnreadableDataError

_GRID = 5  # points a side of the coarse colours
_SHAPES = 4  # overlaid on each image
_MADE = 2**20  # numbers of images at a time
_UNIT = 256  # one pixel, in the fixed-point numbers of the shapes


def abstract_images(
    stream: Callable[[int], bytes], *, count: int, size: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """`count` abstract images, uint8 (count channels height width): size is the last three.

    Each is a coarse grid of random colours, smoothly upsampled, under stripes, rings, rectangles
    and half planes of random place, angle and colour. `stream(n)` gives the first n bytes of a
    secret stream; equal bytes give equal images on every platform.

    Raises:
        UnreadableDataError: a count or a side is below 1.
    """
    channels = size[0]
    if min(count, *size) < 1:
        raise UnreadableDataError(
            f"{count} images of {size} were asked for; needed: at least 1 of everything"
        )
    each = channels * _GRID * _GRID + _SHAPES * (8 + channels)
    content = np.frombuffer(stream(count * each), np.uint8).reshape(count, each)
    # Some images at a time: in the making, each of its numbers takes eight bytes many times over.
    step = max(1, _MADE // max(each, math.prod(size)))
    parts = (content[start : start + step] for start in range(0, count, step))
    return np.concatenate([_made(part.astype(np.int64), size) for part in parts])


def _made(numbers: NDArray[np.int64], size: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The images of these bytes (count each)."""
    channels, height, width = size
    count = len(numbers)
    colours, shapes = np.split(numbers, [channels * _GRID * _GRID], axis=1)
    images = _upsampled(colours.reshape(count, channels, _GRID, _GRID), height, width)
    for shape in shapes.reshape(count, _SHAPES, -1).swapaxes(0, 1):
        inside = _inside(shape[:, :8], height, width)
        colour = shape[:, 8:, None, None]
        # Three parts of the shape's colour to one of what is below, so that both can be seen.
        images = np.where(inside[:, None], (3 * colour + images) >> 2, images)
    return images.astype(np.uint8)


def _upsampled(grid: NDArray[np.int64], height: int, width: int) -> NDArray[np.int64]:
    """Bilinear interpolation in 8-bit fixed point, the corners of the grid on the corners."""
    for axis, side in ((2, height), (3, width)):
        place = np.arange(side, dtype=np.int64) * ((_GRID - 1) * _UNIT) // max(1, side - 1)
        cell = np.minimum(place // _UNIT, _GRID - 2)
        weight = (place - cell * _UNIT).reshape(-1, *(1,) * (3 - axis))
        low, high = grid.take(cell, axis), grid.take(cell + 1, axis)
        grid = (low * (_UNIT - weight) + high * weight) // _UNIT
    return grid


def _inside(shape: NDArray[np.int64], height: int, width: int) -> NDArray[np.bool_]:
    """Which pixels (count height width) belong to a shape of eight bytes.

    They are: kind, centre (two), direction (two), extent (two) and rhythm. Coordinates are scaled
    so that either side of the image is 256 units long.
    """
    kind, y, x, sine, cosine, long, short, rhythm = (n[:, None, None] for n in shape.T)
    down = (np.arange(height, dtype=np.int64) * _UNIT // height)[None, :, None] - y
    across = (np.arange(width, dtype=np.int64) * _UNIT // width)[None, None, :] - x
    sine, cosine = sine - 128, cosine - 128
    # Not normalised, which would take a root: the length of the direction varies the shape too.
    along = (cosine * across + sine * down) // 128
    beside = (cosine * down - sine * across) // 128
    distance = down * down + across * across
    outer = 24 + long // 3
    inner = outer - 8 - short * (outer - 8) // 255
    stripes = (cosine * across + sine * down) // (16 * (96 + rhythm)) % 2 == 0
    rings = (distance < outer * outer) & (distance >= inner * inner)
    bars = (np.abs(along) < 16 + long // 4) & (np.abs(beside) < 8 + short // 5)
    halves = cosine * across + sine * down > 0
    return np.choose(kind % 4, (stripes, rings, bars, halves))
