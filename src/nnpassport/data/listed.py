"""Pictures that a table of text lists: a CSV of file names and classes beside them."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from nnpassport.data.decoding import Encoded
from nnpassport.data.source import LABELS, Asked, Source, classes_of, index_of
from nnpassport.scheme import UnreadableDataError

FILES = ("file_name", "filename", "file", "path", "filepath", "image_path", "image", "img", "id")
"""What such tables call the column of file names, in order of preference."""
_ALSO = ("class_name", "label_name", "diagnosis", "species")
_MOST_BYTES = 2**30
_ENDINGS = ("", ".jpg", ".jpeg", ".png", ".webp")


def lists_pictures(file: Path, asked: Asked) -> bool:
    """Whether the head of a CSV names a column of files and one of classes."""
    head = _head(file)
    return bool(_column(asked.image, FILES, head) and _column(asked.label, (*LABELS, *_ALSO), head))


def in_lists(files: Sequence[Path], name: str, asked: Asked) -> Source:
    """The pictures that CSV or TSV files list, each beside its file.

    Columns are separated by commas, semicolons or tabs, and named in the first line. An extension
    that is left out is looked for. Classes are whole numbers from 0, or names.

    Raises:
        UnreadableDataError: a file has no such columns, is empty or cannot be read.
    """
    rows = [(file.parent, each, label) for file in files for each, label in _rows(file, asked)]
    if not rows:
        raise UnreadableDataError(f"{name}: the files list no pictures; needed: a line for each")
    classes = classes_of((label for *_, label in rows), name)
    index = {each: label for label, each in enumerate(classes)}
    found = [(each, _picture(folder, each), label) for folder, each, label in rows]
    pictures = (Encoded(each, path, index_of(label, index)) for each, path, label in found)
    paths = tuple(path for _, path, _ in found if path is not None)
    return Source(name, len(rows), classes, (*files, *paths), pictures)


def _rows(file: Path, asked: Asked) -> Iterator[tuple[str, int | str | None]]:
    head = _head(file)
    image = _column(asked.image, FILES, head)
    label = _column(asked.label, (*LABELS, *_ALSO), [each for each in head if each != image])
    if image is None or label is None:
        raise UnreadableDataError(
            f"{file} has the columns {', '.join(head) or 'none'}, and which are the files and "
            "their classes cannot be told; name them with --image-column and --label-column "
            "(in Python image_column= and label_column=)"
        )
    at, kind = head.index(image), head.index(label)
    stored = []
    for row in _lines(file)[1:]:
        if not row:
            continue
        if len(row) <= max(at, kind):
            raise UnreadableDataError(
                f"{file}: the line {','.join(row)[:80]!r} has {len(row)} columns and the first one "
                f"{len(head)}; needed: as many in each"
            )
        stored.append((row[at].strip(), row[kind].strip()))
    # All of them numbers, or all of them names: "10" beside "cat" is a name.
    whole = all(each.isascii() and each.isdigit() and len(each) < 10 for _, each in stored if each)
    for name, each in stored:
        yield name, None if not each else int(each) if whole else each


def _picture(folder: Path, name: str) -> Path | None:
    if not name:
        return None
    paths = (folder / f"{name}{ending}" for ending in _ENDINGS)
    return next((path for path in paths if path.is_file()), folder / name)


def _column(asked: str | None, usual: Sequence[str], head: Sequence[str]) -> str | None:
    if asked is not None:
        return asked if asked in head else None
    lower = {each.lower(): each for each in reversed(head)}
    return next((lower[name] for name in usual if name in lower), None)


def _head(file: Path) -> list[str]:
    rows = _lines(file, most=1)
    return [each.strip() for each in rows[0]] if rows else []


def _lines(file: Path, most: int | None = None) -> list[list[str]]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise UnreadableDataError(f"{file} is larger than {_MOST_BYTES} bytes; split it")
        with file.open(encoding="utf-8-sig", newline="") as text:
            first = text.readline()
            text.seek(0)
            separator = max(",;\t", key=first.count)
            reader = csv.reader(text, delimiter=separator)
            return [row for row, _ in zip(reader, range(most), strict=False)] if most else [*reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableDataError(
            f"{file} cannot be read as CSV: {error}; needed: text in UTF-8, columns named in the "
            "first line"
        ) from error
