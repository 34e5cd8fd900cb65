"""CIFAR-10 and CIFAR-100 as their authors give them, binary and for Python: folders and tar.gz.

Rows of a class (CIFAR-100: a coarse and a fine one) and 3072 bytes, red, green and blue planes of
32×32 pixels; in the Python version the same in pickles. Krizhevsky, Learning Multiple Layers of
Features from Tiny Images, 2009.
"""

import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple, final

import numpy as np

from nnpassport.data import batchpickle
from nnpassport.data.cache import Table
from nnpassport.scheme import UnreadableDataError

_PIXELS = 3 * 32 * 32
_MOST_FILE = 2**29  # bytes; CIFAR-100's training file has 154 million


@final
class Layout(NamedTuple):
    """How one of the two is stored.

    Attributes:
        labels: bytes in front of the pixels; the last is the class.
        files: by split.
        names: file of class names, one a line, or of a pickle that has them.
        pickled: under what a pickle has its classes, and the file of names theirs; () if binary.
    """

    labels: int
    classes: int
    files: Mapping[str, tuple[str, ...]]
    names: str
    pickled: tuple[str, ...] = ()


LAYOUTS = (
    Layout(
        1,
        10,
        {
            "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        "batches.meta.txt",
    ),
    Layout(2, 100, {"train": ("train.bin",), "test": ("test.bin",)}, "fine_label_names.txt"),
    Layout(
        1,
        10,
        {
            "train": tuple(f"data_batch_{number}" for number in range(1, 6)),
            "test": ("test_batch",),
        },
        "batches.meta",
        ("labels", "label_names"),
    ),
    Layout(
        1,
        100,
        {"train": ("train",), "test": ("test",)},
        "meta",
        ("fine_labels", "fine_label_names"),
    ),
)
_UNTELLING = {"train", "test"}  # names that say nothing without the file of class names beside them
FOLDERS = (
    *("cifar-10-batches-bin", "cifar-100-binary"),
    *("cifar-10-batches-py", "cifar-100-python"),
)
"""What the archives unpack to."""
_ARCHIVES = (".tar.gz", ".tgz", ".tar")


def members(path: Path) -> dict[str, bytes | Path] | None:
    """By name, the files of such a folder, of the one inside it, or of an archive; None: of none.

    Raises:
        UnreadableDataError: an archive of that name cannot be read.
    """
    if path.is_dir():
        for folder in (path, *(path / name for name in FOLDERS)):
            if folder.is_dir():
                found: dict[str, bytes | Path] = {
                    each.name: each for each in folder.iterdir() if each.is_file()
                }
                if _layout(found):
                    return found
        return None
    if path.is_file() and path.name.startswith("cifar-10") and path.name.endswith(_ARCHIVES):
        return _unpacked(path)
    if path.is_file() and any(path.name in f for each in LAYOUTS for f in each.files.values()):
        beside = {each.names: path.parent / each.names for each in LAYOUTS}
        named = {name: file for name, file in beside.items() if file.is_file()}
        found = {path.name: path, **named}
        return found if _layout(found) else None
    return None


def _layout(found: Mapping[str, object]) -> Layout | None:
    for layout in LAYOUTS:
        there = {name for names in layout.files.values() for name in names if name in found}
        if there - _UNTELLING or (there and layout.names in found):
            return layout
    return None


def _unpacked(path: Path) -> dict[str, bytes | Path]:
    known = {name for each in LAYOUTS for names in each.files.values() for name in names}
    known |= {layout.names for layout in LAYOUTS}
    found: dict[str, bytes | Path] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isreg() and name in known and member.size <= _MOST_FILE:
                    content = archive.extractfile(member)
                    found[name] = b"" if content is None else content.read()
    except Exception as error:  # tarfile's own and its decompressors'
        raise UnreadableDataError(
            f"{path} is not a readable archive: {error}; needed: the whole file; fetch it again"
        ) from error
    if not _layout(found):
        raise UnreadableDataError(
            f"{path} holds none of CIFAR's files; needed: the archive that is called "
            "cifar-10-binary.tar.gz or cifar-10-python.tar.gz (or 100), or Parquet files"
        )
    return found


def table(found: Mapping[str, bytes | Path], split: str | None, where: Path) -> Table:
    """Pixels, fine labels and class names of one split, or of a single file.

    Raises:
        UnreadableDataError: there are several splits and none was chosen, or a file is damaged.
    """
    layout = _layout(found)
    if layout is None:
        raise UnreadableDataError(f"{where} holds no file of CIFAR's")
    there = {n: [f for f in files if f in found] for n, files in layout.files.items()}
    splits = [name for name, files in there.items() if files]
    if split is None and len(splits) > 1:
        raise UnreadableDataError(
            f"{where} has the splits {', '.join(splits)} and none was chosen; choose one with "
            f"--split {splits[0]} or --test-split {splits[-1]} (in Python split={splits[0]!r})"
        )
    chosen = split or splits[0]
    if chosen not in splits:
        raise UnreadableDataError(
            f"{where} has no split {chosen!r}; there are: {', '.join(splits)}"
        )
    read = _pickled if layout.pickled else _rows
    rows = np.concatenate([read(found[name], name, layout) for name in there[chosen]])
    names = _names(found.get(layout.names), layout)
    pixels = rows[:, layout.labels :].reshape(-1, 3, 32, 32)
    return Table(np.ascontiguousarray(pixels), rows[:, layout.labels - 1].astype(np.int64), names)


def _pickled(
    file: bytes | Path, name: str, layout: Layout
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    found = batchpickle.batch(_content(file, name), name)
    rows = np.concatenate([*batchpickle.rows(found, layout.pickled[0], name)], axis=1)
    return _with_known_classes(rows, name, layout)


def _content(file: bytes | Path, name: str) -> bytes:
    if not isinstance(file, Path):
        return file
    if file.stat().st_size > _MOST_FILE:
        raise UnreadableDataError(f"{name} is larger than {_MOST_FILE} bytes; CIFAR's are smaller")
    return file.read_bytes()


def _rows(
    file: bytes | Path, name: str, layout: Layout
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    width = layout.labels + _PIXELS
    if isinstance(file, Path):
        size = file.stat().st_size
        content = file.read_bytes() if size <= _MOST_FILE else b""
    else:
        size, content = len(file), file
    if not content or size % width:
        raise UnreadableDataError(
            f"{name} has {size} bytes, which are not rows of {width}; needed: a file of CIFAR's "
            "binary version, whole; fetch it again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(-1, width)
    return _with_known_classes(rows, name, layout)


def _with_known_classes(
    rows: np.ndarray[tuple[int, int], np.dtype[np.uint8]], name: str, layout: Layout
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    if not len(rows):
        raise UnreadableDataError(f"{name} holds no pictures; fetch it again")
    if rows[:, layout.labels - 1].max() >= layout.classes:
        raise UnreadableDataError(
            f"{name} has a class {rows[:, layout.labels - 1].max()}; needed: below {layout.classes}"
        )
    return rows


def _names(file: bytes | Path | None, layout: Layout) -> tuple[str, ...]:
    numbers = tuple(map(str, range(layout.classes)))
    if file is None:
        return numbers
    content = _content(file, layout.names)
    if layout.pickled:
        stored = batchpickle.batch(content, layout.names).get(layout.pickled[1])
        listed = stored if isinstance(stored, list) else []
        names = tuple(name for name in listed if isinstance(name, str))
        return names if len(set(names)) == layout.classes else numbers
    names = tuple(line.strip() for line in content.decode("utf-8", "replace").split("\n"))
    names = tuple(name for name in names if name)
    return names if len(set(names)) == layout.classes else numbers
