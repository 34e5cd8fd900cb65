"""Where labelled pictures come from: Parquet files, image folders, arrays, the hub, scikit-learn.

Nothing is decoded here.
"""

import glob
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from nnpassport.data.cache import Table
from nnpassport.data.decoding import Encoded
from nnpassport.data.listed import in_lists, lists_pictures
from nnpassport.data.source import Asked, Source, classes_of
from nnpassport.data.webdataset import in_archives
from nnpassport.scheme import UnreadableDataError

_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"}
_TABLES = (".parquet", ".pq"), (".arrow", ".feather")
_ARCHIVES, _LISTS = (".tar",), (".csv", ".tsv")
_KINDS = (*_TABLES, _ARCHIVES, _LISTS)
_MOST_SHARDS = 100_000
_ALWAYS_UNPACKED = 2**28  # bytes
_MOST_PACKED = 100  # times: pictures are packed tenfold at best, zeros a thousandfold


def find(location: str, split: str | None, asked: Asked) -> Source:
    """The pictures that `location` names.

    Raises:
        UnreadableDataError: there is no such thing, or it is not a set of labelled pictures.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return _in_folder(path, split, asked)
    if location.startswith("hub:"):
        return _on_hub(location.removeprefix("hub:"), split, asked)
    matches = [path] if path.is_file() else _matching(str(path))
    if matches:
        return _in_files(matches, location, split, asked)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", location):
        return _on_hub(location, split, asked)
    raise UnreadableDataError(
        f"there is nothing at {location!r}; needed: digits; a file {_kinds()} or .npz; a folder of "
        "such files, or of one folder of pictures a class; a pattern such as "
        "'cifar10-train-*.parquet'; or hub:owner/name"
    )


def _kinds() -> str:
    return ", ".join(suffix for kind in _KINDS for suffix in kind)


def _matching(pattern: str) -> list[Path]:
    """Files by a pattern as of a shell; {000..011} stands for the numbers in between."""
    counted = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if counted is None:
        return sorted(map(Path, glob.glob(pattern)))
    before, first, last, after = counted.groups()
    if not 0 <= int(last) - int(first) < _MOST_SHARDS:
        return []
    numbers = range(int(first), int(last) + 1)
    named = [Path(f"{before}{number:0{len(first)}d}{after}") for number in numbers]
    if missing := [str(path) for path in named if not path.is_file()]:
        raise UnreadableDataError(
            f"of the {len(named)} files {pattern!r} {len(missing)} are not there, such as "
            f"{missing[0]}; needed: all of them, or a pattern of those that there are"
        )
    return named


def _in_files(files: Sequence[Path], location: str, split: str | None, asked: Asked) -> Source:
    if split is not None:
        raise UnreadableDataError(
            f"split {split!r} was asked of {location!r}, which names its files already; "
            "name the files of that split, or pass the folder that they are in"
        )
    name = re.sub(r"\W*[*?\[{].*", "", Path(location).stem) or "images"
    for kind in _KINDS:
        if all(file.suffix.lower() in kind for file in files):
            return _read_as(kind, files, name, asked)
    first = files[0].suffix.lower()
    others = [file.name for file in files if file.suffix.lower() != first] or [files[0].name]
    raise UnreadableDataError(
        f"{others[0]!r} is not a data set that can be read; needed: files of one kind, {_kinds()}, "
        "or .npz"
    )


def _read_as(kind: Sequence[str], files: Sequence[Path], name: str, asked: Asked) -> Source:
    if kind == _ARCHIVES:
        return in_archives(files, name, asked)
    if kind == _LISTS:
        return in_lists(files, name, asked)
    from nnpassport.data.tables import in_tables  # noqa: PLC0415 - pyarrow is slow to import

    return in_tables(files, name, asked)


def _in_folder(folder: Path, split: str | None, asked: Asked) -> Source:
    name = folder.resolve().name
    inner = {each.name for each in folder.iterdir() if each.is_dir()}
    if split is not None and split in inner:
        return _in_folder(folder / split, None, asked)._replace(name=f"{name}/{split}")
    kind, files = _files_in(folder, asked)
    tokens = {file: set(re.split(r"[\W_]+", file.stem.lower())) for file in files}
    there = set().union(*tokens.values()) if files else {each.lower() for each in inner}
    present = sorted(_SPLITS & there)
    if split is not None:
        files = [file for file in files if split.lower() in tokens[file]]
        if not files:
            raise UnreadableDataError(
                f"{folder} has no split {split!r}; there are: {', '.join(present) or 'none'}"
            )
        return _read_as(kind, files, f"{name}/{split}", asked)
    if len(present) > 1 or (present and not files and there <= _SPLITS):
        raise UnreadableDataError(
            f"{folder} has the splits {', '.join(present)} and none was chosen; choose one with "
            f"--split {present[0]} (in Python split={present[0]!r}), or name the files. If these "
            "are classes of the task, give their folders other names"
        )
    return _read_as(kind, files, name, asked) if files else in_classes(folder)


def _files_in(folder: Path, asked: Asked) -> tuple[Sequence[str], list[Path]]:
    """Files of the first kind that the folder has any of, and that kind."""
    there = sorted(each for each in folder.iterdir() if each.is_file() and _seen(each))
    below = sorted(each for each in folder.glob("data/*") if each.is_file() and _seen(each))
    for kind in (*_TABLES, _ARCHIVES):
        for files in (there, below):
            if found := [file for file in files if file.suffix.lower() in kind]:
                return kind, found
    lists = [file for file in there if file.suffix.lower() in _LISTS]
    if lists:
        return _LISTS, [file for file in lists if lists_pictures(file, asked)]
    return _LISTS, []


def _on_hub(name: str, split: str | None, asked: Asked) -> Source:
    from nnpassport.data.tables import on_hub  # noqa: PLC0415 - as above

    return on_hub(name, split, asked)


def in_classes(folder: Path) -> Source:
    """A folder of one folder a class; everything in those that is not hidden counts as a picture.

    Raises:
        UnreadableDataError: there are no classes, or a class has no pictures.
    """
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and _seen(each))
    # Files beside the class folders have no label: decoding will name them, not pass them over.
    stray = sorted(each for each in folder.iterdir() if each.is_file() and _seen(each))
    files: list[tuple[Path, int | None]] = [(file, None) for file in stray]
    for label, name in enumerate(classes):
        within = (folder / name).rglob("*")
        own = sorted(
            file
            for file in within
            if file.is_file() and all(map(_seen, [file, *file.relative_to(folder).parents[:-1]]))
        )
        if not own:
            raise UnreadableDataError(
                f"class folder {folder / name} is empty; add pictures or remove it"
            )
        files += [(file, label) for file in own]
    if not classes:
        raise UnreadableDataError(
            f"{folder} holds no folders and no files of pictures; "
            f"needed: one folder of pictures for each class, or files {_kinds()}"
        )
    if len(classes) == 1 and any(each.is_dir() for each in (folder / classes[0]).iterdir()):
        raise UnreadableDataError(
            f"{folder} holds one folder, {classes[0]}, and folders in that; if they are the "
            f"classes, name {folder / classes[0]}"
        )
    pictures = (Encoded(str(file.relative_to(folder)), file, label) for file, label in files)
    paths = tuple(file for file, _ in files)
    return Source(folder.resolve().name, len(files), tuple(classes), paths, pictures)


def _seen(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in {
        "Thumbs.db",
        "desktop.ini",
        "__MACOSX",
    }


def digits(split: str | None) -> Table:
    """The 1,797 handwritten digits of 8×8 grey pixels that scikit-learn ships (UCI, CC BY 4.0).

    There is no official split: here "train" is a fixed random 80 % and "test" the rest.

    Raises:
        UnreadableDataError: there is no such split.
    """
    if split not in {None, "train", "test"}:
        raise UnreadableDataError(f"digits has no split {split!r}; there are: train, test")
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow to import

    stored = load_digits()
    images = np.round(stored.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = stored.target.astype(np.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    cut = round(0.8 * len(labels))
    chosen = np.sort({"train": order[:cut], "test": order[cut:]}[split]) if split else slice(None)
    return Table(images[chosen], labels[chosen], tuple("0123456789"))


def in_arrays(path: Path) -> Table:
    """A .npz file with arrays `images` (uint8), `labels` (integers) and perhaps `classes` (names).

    Images are (n height width), (n height width channels) or (n channels height width).

    Raises:
        UnreadableDataError: it is something else, or holds pickled objects, which are never run.
    """
    try:
        # Opened here: numpy leaves a file open when it finds that it is no archive.
        with path.open("rb") as file:
            _refuse_bombs(file)
            with np.load(file, allow_pickle=False) as stored:
                # asarray: numpy hands out as bytes what is no array
                arrays = {name: np.asarray(stored[name]) for name in stored.files}
        names = tuple(map(str, np.ravel(arrays.get("classes", ()))))
    # Damaged zip and array headers raise many types.
    except Exception as error:
        raise UnreadableDataError(
            f"{path} cannot be read: {error}; needed: a .npz file of plain arrays, "
            "written by numpy.savez"
        ) from error
    if not {"images", "labels"} <= arrays.keys():
        raise UnreadableDataError(
            f"{path} has the arrays {', '.join(arrays) or 'none'}; needed: images and labels"
        )
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise UnreadableDataError(
            f"{path}: images are {images.dtype} and labels are {labels.dtype} {labels.shape}; "
            "needed: uint8 pixels and one whole number for each image"
        )
    ordered = _channels_first(images, path)
    classes = names or classes_of(iter(labels.tolist()), path.name)
    return Table(np.ascontiguousarray(ordered), labels.astype(np.int64), classes)


def _refuse_bombs(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
    if declared > max(_ALWAYS_UNPACKED, _MOST_PACKED * size):
        raise ValueError(
            f"it unpacks to {declared} bytes from {size}, as a decompression bomb does"
        )
    file.seek(0)


def _channels_first(images: np.ndarray[Any, Any], path: Path) -> np.ndarray[Any, Any]:
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in {1, 3} for axis in (1, 3))
    if first == last:
        raise UnreadableDataError(
            f"{path}: images have shape {images.shape}, and which axis is the channels cannot be "
            "told; needed: (n height width), (n height width 3) or (n 3 height width)"
        )
    return images if first else images.transpose(0, 3, 1, 2)
