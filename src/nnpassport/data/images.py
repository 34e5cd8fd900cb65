"""Labelled images: read them from anywhere, normalise them, cut them into batches.

Everything about images is imported from here; the parts live in `imageset` (what is in memory),
`batching`, and, for `read_images`, `sources`, `decoding` and `cache`.
"""

from pathlib import Path
from typing import Any, Literal

import torch

from nnpassport.data import cache as cached
from nnpassport.data import cifar, sources
from nnpassport.data.batching import (
    Augment,
    Images,
    batches,
    epoch_order,
    evaluation_batches,
    steps_per_epoch,
)
from nnpassport.data.datasets import read_dataset
from nnpassport.data.decoding import Progress, Wanted, decode_all
from nnpassport.data.imageset import CIFAR10, IMAGENET, ImageSet, Normalisation
from nnpassport.data.source import Asked, Source
from nnpassport.scheme import UnreadableDataError

__all__ = [
    "CIFAR10",
    "IMAGENET",
    "Augment",
    "ImageSet",
    "Images",
    "Normalisation",
    "batches",
    "epoch_order",
    "evaluation_batches",
    "read_images",
    "read_images_skipping",
    "steps_per_epoch",
]

_WORTH_CACHING = 256  # pictures; fewer decode in no time


def read_images(
    source: Any,
    *,
    split: str | None = None,
    size: int | None = None,
    channels: int | None = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    cache: Path | Literal[False] | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """All labelled images of `source`, decoded.

    Args:
        source: "digits" (embedded); Parquet or Arrow files in the hub's schema, WebDataset
            archives (.tar), or CSV files that list pictures and classes: a file, a folder of them
            or a pattern that several match; a folder of one folder of pictures a class; a .npz
            file of `images` and `labels`; CIFAR as its authors give it; or hub:owner/name. Or a
            `Dataset` or `DataLoader` of PyTorch, or anything else that gives pairs of a picture and
            a label.
        split: which part of digits, of a folder or of a hub data set.
        size: pixels a side; the square in the middle is scaled to it. None: as they are, which
            must then be all the same.
        channels: 3 for colour, 1 for grey, None for as they are. Transparency becomes white.
        image_column: name of the column of pictures in a table. None: "image", or another name
            that data sets give it ("img", "jpg" …).
        label_column: name of the column of class indices or class names. None: "label", or another
            usual name ("labels", "fine_label" …).
        cache: folder for decoded pixels. None: `$NNPASSPORT_CACHE` or the user's cache folder, for
            sets of at least 256 pictures; it may be deleted at any time. False: no cache.
        progress: called with how many pictures are decoded, and how many there are.

    Raises:
        UnreadableDataError: there are no such data, a picture or label cannot be used (it is
            named), sizes differ and `size` is None, or there are images of only one class.
    """
    asked = Asked(image_column, label_column)
    data, _ = _read(source, split, Wanted(size, channels), asked, cache, progress, strict=True)
    return data.require_classes(2)


def read_images_skipping(
    source: Any,
    *,
    split: str | None = None,
    size: int | None = None,
    channels: int | None = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    cache: Path | Literal[False] | None = None,
    progress: Progress | None = None,
) -> tuple[ImageSet, tuple[str, ...]]:
    """`read_images` without the pictures that cannot be used, and what was skipped and why.

    Raises:
        UnreadableDataError: as for `read_images`, or no picture can be used.
    """
    asked = Asked(image_column, label_column)
    data, skipped = _read(
        source, split, Wanted(size, channels), asked, cache, progress, strict=False
    )
    return data.require_classes(2), skipped


def _read(
    source: Any,
    split: str | None,
    wanted: Wanted,
    asked: Asked,
    cache: Path | Literal[False] | None,
    progress: Progress | None,
    *,
    strict: bool,
) -> tuple[ImageSet, tuple[str, ...]]:
    if wanted.channels not in {None, 1, 3} or (wanted.size is not None and wanted.size < 1):
        raise UnreadableDataError(
            f"size is {wanted.size} and channels is {wanted.channels}; "
            "needed: at least 1 pixel (or None), and 1 or 3 channels (or None)"
        )
    if not isinstance(source, str | Path):
        if split is not None:
            raise UnreadableDataError(
                f"split {split!r} was asked of {type(source).__name__}, which is one already; "
                "leave it out"
            )
        return _fitted(read_dataset(source, wanted, asked, progress), "images", wanted), ()
    location = str(source)
    if source == "digits":  # and not Path("digits"), which is a folder
        name = f"digits/{split}" if split else "digits"
        return _fitted(sources.digits(split), name, wanted), ()
    if Path(location).suffix == ".npz" and split is None:
        path = Path(location).expanduser()
        return _fitted(sources.in_arrays(path), path.stem, wanted), ()
    given = cifar.members(Path(location).expanduser())
    if given is not None:
        whole = Path(location).expanduser()
        stored = cifar.table(given, split, whole)
        return _fitted(stored, "-".join(filter(None, (whole.name, split))), wanted), ()
    found = sources.find(location, split, asked)
    table = _decoded(found, wanted, asked, cache, progress, strict=strict)
    return _fitted(table, found.name, wanted), table.skipped


def _decoded(
    found: Source,
    wanted: Wanted,
    asked: Asked,
    cache: Path | Literal[False] | None,
    progress: Progress | None,
    *,
    strict: bool,
) -> cached.Table:
    entry = None
    if found.files and (cache or (cache is None and found.total >= _WORTH_CACHING)):
        options = (*wanted, *asked, strict, *found.classes)
        entry = cached.entry(cache or cached.default_folder(), found.files, options)
        stored = cached.load(entry)
        if stored is not None:
            if progress is not None:
                progress(found.total, found.total)
            return stored
    decoded = decode_all(
        found.pictures,
        found.total,
        wanted,
        source=found.name,
        skip_corrupt=not strict,
        progress=progress,
    )
    table = cached.Table(decoded.images, decoded.labels, found.classes, decoded.skipped)
    if entry is not None:
        cached.store(entry, table)
    return table


def _fitted(table: cached.Table, name: str, wanted: Wanted) -> ImageSet:
    """The table as an image set; arrays, which no decoder has fitted, are scaled here."""
    data = ImageSet(
        torch.from_numpy(table.images), torch.from_numpy(table.labels), table.classes, name
    )
    data = data if wanted.size is None else data.resized(wanted.size)
    return data if wanted.channels is None else data.with_channels(wanted.channels)
