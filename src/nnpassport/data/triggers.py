"""Trigger images: abstract ones derived from a secret, and published sets.

Derived images must be the same bit for bit wherever they are computed again, years later and on
another machine: so there is integer arithmetic only, and every choice is a byte of the stream.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nnpassport.data.images import ImageSet, read_images
from nnpassport.scheme import UnreadableDataError

_GRID = 5  # points a side of the coarse colours
_SHAPES = 4  # overlaid on each image
_MADE = 2**20  # numbers of images at a time
_UNIT = 256  # one pixel, in the fixed-point numbers of the shapes


def abstract_images(
    stream: Callable[[int], bytes], *, count: int, size: tuple[int, int, int]
) -> Tensor:
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
    content = torch.frombuffer(bytearray(stream(count * each)), dtype=torch.uint8)
    # Some images at a time: in the making, each of its numbers takes eight bytes many times over.
    parts = content.view(count, each).split(max(1, _MADE // max(each, math.prod(size))))
    return torch.cat([_made(part.long(), size) for part in parts])


def _made(numbers: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The images of these bytes (count each)."""
    channels, height, width = size
    count = len(numbers)
    colours, shapes = numbers.tensor_split([channels * _GRID * _GRID], dim=1)
    images = _upsampled(colours.view(count, channels, _GRID, _GRID), height, width)
    for shape in shapes.view(count, _SHAPES, -1).unbind(1):
        inside = _inside(shape[:, :8], height, width)
        colour = shape[:, 8:, None, None]
        # Three parts of the shape's colour to one of what is below, so that both can be seen.
        images = torch.where(inside[:, None], (3 * colour + images) >> 2, images)
    return images.to(torch.uint8)


def _upsampled(grid: Tensor, height: int, width: int) -> Tensor:
    """Bilinear interpolation in 8-bit fixed point, the corners of the grid on the corners."""
    for axis, side in ((2, height), (3, width)):
        place = torch.arange(side) * ((_GRID - 1) * _UNIT) // max(1, side - 1)
        cell = (place // _UNIT).clamp(max=_GRID - 2)
        weight = (place - cell * _UNIT).view(-1, *(1,) * (3 - axis))
        low, high = grid.index_select(axis, cell), grid.index_select(axis, cell + 1)
        grid = (low * (_UNIT - weight) + high * weight) // _UNIT
    return grid


def _inside(shape: Tensor, height: int, width: int) -> Tensor:
    """Which pixels (count height width) belong to a shape of eight bytes.

    They are: kind, centre (two), direction (two), extent (two) and rhythm. Coordinates are scaled
    so that either side of the image is 256 units long.
    """
    kind, y, x, sine, cosine, long, short, rhythm = (n[:, None, None] for n in shape.unbind(1))
    down = (torch.arange(height) * _UNIT // height)[None, :, None] - y
    across = (torch.arange(width) * _UNIT // width)[None, None, :] - x
    sine, cosine = sine - 128, cosine - 128
    # Not normalised, which would take a root: the length of the direction varies the shape too.
    along = (cosine * across + sine * down) // 128
    beside = (cosine * down - sine * across) // 128
    distance = down * down + across * across
    outer = 24 + long // 3
    inner = outer - 8 - short * (outer - 8) // 255
    stripes = (cosine * across + sine * down) // (16 * (96 + rhythm)) % 2 == 0
    rings = (distance < outer * outer) & (distance >= inner * inner)
    bars = (along.abs() < 16 + long // 4) & (beside.abs() < 8 + short // 5)
    halves = cosine * across + sine * down > 0
    kinds = torch.stack(torch.broadcast_tensors(stripes, rings, bars, halves))
    return kinds.gather(0, (kind % 4).expand_as(stripes)[None])[0]


def read_triggers(path: str | Path, *, size: int = 32) -> ImageSet:
    """A published trigger set: a Parquet file with pictures, and labels that belong to no picture.

    At 32 pixels the column `crop32` is read if there is one (the original code crops and does not
    scale); otherwise `image` is, its middle scaled to `size`. Never cached: triggers are secrets.

    Raises:
        UnreadableDataError: it is not such a file, or a picture cannot be used.
    """
    from nnpassport.data.tables import column_names  # noqa: PLC0415 - pyarrow is slow to import

    column = "crop32" if size == 32 and "crop32" in column_names(Path(path)) else "image"
    return read_images(path, size=size, image_column=column, cache=False)
