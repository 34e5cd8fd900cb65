"""Encoded pictures to pixels: many at a time, on all processors, and never silently fewer.

Pictures may be hostile: only plain raster formats are opened (Pillow would hand PostScript to an
interpreter), nothing above `MOST_PIXELS` is decoded, and a picture that cannot be decoded is
named, either in the error or in the list of what was skipped.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from nnpassport.scheme import UnreadableDataError

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 64_000_000
_CHUNK = 256  # pictures whose files are in memory together
_TASK = 32  # pictures a thread takes at a time


class Encoded(NamedTuple):
    """A picture that nobody has decoded yet, as a file or as its bytes, and its class index."""

    name: str
    content: bytes | Path | None
    label: int | None


class Wanted(NamedTuple):
    """What the pixels should be: side in pixels and channels, or None for as they are stored."""

    size: int | None
    channels: int | None


class Decoded(NamedTuple):
    """uint8 (images channels height width), int64 (images,), and the names that were skipped."""

    images: Pixels
    labels: npt.NDArray[np.int64]
    skipped: tuple[str, ...]


def decode_all(
    pictures: Iterator[Encoded],
    count: int,
    wanted: Wanted,
    *,
    source: str,
    skip_corrupt: bool = False,
    progress: Progress | None = None,
) -> Decoded:
    """Decode `count` pictures into one array, in order.

    Raises:
        UnreadableDataError: a picture cannot be decoded and `skip_corrupt` is false, pictures
            differ in size or channels, none is left, or they do not fit into memory.
    """
    images: Pixels | None = None
    labels, done, skipped = list[int](), 0, list[str]()
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(pictures, _CHUNK)):
            done += len(chunk)
            _as_declared(done, count, source, complete=False)
            tasks = [chunk[i : i + _TASK] for i in range(0, len(chunk), _TASK)]
            results = [
                r for task in pool.map(lambda t: decode_some(t, wanted), tasks) for r in task
            ]
            good = _sift(chunk, results, source, skipped if skip_corrupt else None)
            if good:
                images = _reserve(count, good[0][1].shape, source) if images is None else images
                same_shape(images.shape[1:], good, source)
                for picture, pixels in good:
                    images[len(labels)] = pixels
                    labels.append(picture.label or 0)
            if progress is not None:
                progress(done, count)
    _as_declared(done, count, source, complete=True)
    if images is None:
        raise UnreadableDataError(
            f"{source}: none of {count} pictures can be decoded ({_some(skipped)}); "
            f"needed: pictures in one of {', '.join(FORMATS)}"
        )
    return Decoded(images[: len(labels)], np.array(labels, np.int64), tuple(skipped))


def _as_declared(found: int, count: int, source: str, *, complete: bool) -> None:
    if found > count or (complete and found < count):
        raise UnreadableDataError(
            f"{source}: there are {'at least ' * (not complete)}{found} pictures where {count} are "
            "declared; needed: a file that is whole; fetch it again"
        )


def _sift(
    chunk: Sequence[Encoded],
    results: Sequence[Pixels | str],
    source: str,
    skipped: list[str] | None,
) -> list[tuple[Encoded, Pixels]]:
    good = []
    for picture, pixels in zip(chunk, results, strict=True):
        if not isinstance(pixels, str):
            good.append((picture, pixels))
        elif skipped is not None:
            skipped.append(f"{picture.name}: {pixels}")
        else:
            raise unusable(picture, pixels, source)
    return good


def unusable(picture: Encoded, why: str, source: str) -> UnreadableDataError:
    """The error that names a picture and says what is wrong with it."""
    return UnreadableDataError(
        f"{source}: {picture.name} cannot be used ({why}); needed: a labelled picture "
        f"in one of {', '.join(FORMATS)}. Repair or remove it, or leave out what is corrupt with "
        "--skip-corrupt (in Python read_images_skipping)"
    )


def _reserve(count: int, shape: tuple[int, ...], source: str) -> Pixels:
    try:
        return np.empty((count, *shape), np.uint8)
    except (MemoryError, ValueError):  # ValueError: more than an address can say
        gigabytes = count * int(np.prod(shape)) / 1e9
        raise UnreadableDataError(
            f"{source}: {count} pictures of {_geometry(shape)} take {gigabytes:.0f} GB, more than "
            "there is; pass a smaller size, or fewer pictures"
        ) from None


def same_shape(
    expected: tuple[int, ...], good: Sequence[tuple[Encoded, Pixels]], source: str
) -> None:
    """Check that all pictures are of one shape.

    Raises:
        UnreadableDataError: one is not, and how to make them equal.
    """
    alike([expected, *(pixels.shape for _, pixels in good)], source)


def alike(shapes: Sequence[tuple[int, ...]], source: str) -> None:
    """Check that these shapes (channels height width) are one.

    Raises:
        UnreadableDataError: they are not, and how to make them equal.
    """
    found = Counter(shapes)
    if len(found) > 1:
        shown = [_geometry(shape) for shape, _ in found.most_common(6)]
        raise UnreadableDataError(
            f"{source}: pictures differ, among the first are {', '.join(shown)}; needed: one "
            "size and one number of channels. Pass size= (pixels) and channels= to make them equal"
        )


def _geometry(shape: Sequence[int]) -> str:
    channels, height, width = shape
    return f"{width}x{height} ({channels} channel{'' if channels == 1 else 's'})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more


def decode_some(pictures: Sequence[Encoded], wanted: Wanted) -> list[Pixels | str]:
    """uint8 (channels height width) of each, in order, or why it cannot be used."""
    return [_decode(picture, wanted) for picture in pictures]


def _decode(picture: Encoded, wanted: Wanted) -> Pixels | str:
    if picture.content is None:
        return "there is no picture"
    if picture.label is None:
        return "it has no label, or one that is no class"
    try:
        with _opened(picture.content) as stored:
            if stored.width * stored.height > MOST_PIXELS:
                return f"{stored.width}x{stored.height} is more than {MOST_PIXELS:,} pixels"
            return fitted(stored, wanted)
    # Pillow's decoders raise a dozen types on corrupt files, not all of them documented.
    except Exception as error:
        return str(error) or type(error).__name__


def fitted(picture: Image.Image, wanted: Wanted) -> Pixels:
    """uint8 (channels height width) of a picture that is decoded, upright and scaled.

    Raises:
        ValueError: its pixels have no known range.
    """
    return _pixels(_scaled(_flat(picture, wanted.channels), wanted.size))


def _opened(content: bytes | Path) -> Image.Image:
    file = io.BytesIO(content) if isinstance(content, bytes) else content
    return Image.open(file, formats=FORMATS)


def _flat(picture: Image.Image, channels: int | None) -> Image.Image:
    """Upright, without transparency (on white), in mode L or RGB."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):
        upright = Image.fromarray(_eight_bits(np.asarray(upright)))
    if upright.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if upright.has_transparency_data:
        seen = upright.convert("RGBA")
        white = Image.new("RGBA", seen.size, "white")
        grey = upright.mode in {"LA", "La", "L"}
        upright = Image.alpha_composite(white, seen).convert("L" if grey else "RGB")
    if channels is None:
        return upright.convert("L" if upright.mode in {"1", "L"} else "RGB")
    return upright.convert("L" if channels == 1 else "RGB")


def _eight_bits(levels: npt.NDArray[np.integer]) -> Pixels:
    """Grey of 16 bits or more, of which 8, 12 or 16 are in use; Pillow would clip it to white.

    By the largest value: cameras and scanners store 12 bits in files of 16, and their upper 8 bits
    alone would be nearly black.
    """
    clipped = levels.astype(np.int64).clip(0, 65_535)
    top = int(clipped.max(initial=0))
    shift = 0 if top < 2**8 else 4 if top < 2**12 else 8
    return (clipped >> shift).astype(np.uint8)


def _scaled(picture: Image.Image, size: int | None) -> Image.Image:
    """The square in the middle, scaled to `size`."""
    if size is None or picture.size == (size, size):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    # Not scaled first and cropped then: a picture of 1x1000000 pixels would grow to a huge one.
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)


def _pixels(picture: Image.Image) -> Pixels:
    pixels = np.asarray(picture, np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
