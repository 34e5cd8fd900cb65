"""Tables of labelled pictures: Parquet files in the hub's schema, and the hub itself."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from nnpassport.data.decoding import Encoded
from nnpassport.data.sources import Columns, Source, classes_of, index_of
from nnpassport.scheme import UnreadableDataError

_ROWS = 1_024  # that are in memory together
_MOST_ROWS = 50_000_000


def in_parquet(files: Sequence[Path], name: str, columns: Columns) -> Source:
    """The rows of Parquet files, one after the other, in the hub's schema for pictures.

    Raises:
        UnreadableDataError: a file is corrupt, lacks a column, or the files differ in classes.
    """
    total, found = 0, list[tuple[str, ...] | None]()
    for file in files:
        schema, rows = _schema(file)
        total += rows
        _check_columns(schema, file, columns)
        found.append(_named_classes(schema.metadata, columns.label))
    if len(set(found)) != 1:
        raise UnreadableDataError(
            f"{name}: {len(files)} Parquet files name different classes; "
            f"needed: parts of one data set. Files: {', '.join(f.name for f in files[:6])}"
        )
    if total == 0:
        raise UnreadableDataError(f"{name}: the Parquet files have no rows; needed: pictures")
    classes = found[0] or classes_of(
        (row[0] for file in files for row in _rows(file, [columns.label])), name
    )
    index = {each: label for label, each in enumerate(classes)}

    def pictures() -> Iterator[Encoded]:
        for file in files:
            for number, (image, label) in enumerate(_rows(file, list(columns))):
                # A plain binary column holds the bytes alone; the hub's also holds a name.
                content, path = (
                    (image.get("bytes"), image.get("path"))
                    if isinstance(image, dict)
                    else (image, None)
                )
                called = f"{file.name} row {number}" + (f" ({path})" if path else "")
                yield Encoded(called, content, index_of(label, index))

    return Source(name, total, classes, tuple(files), pictures())


def column_names(file: Path) -> list[str]:
    """The columns of a Parquet file.

    Raises:
        UnreadableDataError: it is not one.
    """
    return list(_schema(file)[0].names)


def _schema(file: Path) -> tuple[Any, int]:
    try:
        with parquet.ParquetFile(file) as table:
            schema, rows = table.schema_arrow, table.metadata.num_rows
    except Exception as error:  # pyarrow's own and others; bytes from anybody
        raise UnreadableDataError(
            f"{file} is not a readable Parquet file: {error}; needed: a complete .parquet file"
        ) from error
    # Run-length encoding: a few bytes may stand for any number of rows.
    if not 0 <= rows <= _MOST_ROWS:
        raise UnreadableDataError(
            f"{file} declares {rows} rows; needed: at most {_MOST_ROWS}; split the file"
        )
    return schema, rows


def _check_columns(schema: Any, file: Path, columns: Columns) -> None:
    for column in columns:
        if column not in schema.names:
            raise UnreadableDataError(
                f"{file} has no column {column!r}; its columns are: {', '.join(schema.names)}. "
                "Name them with image_column= and label_column="
            )
    image, label = (schema.field(column).type for column in columns)
    inner = image.field("bytes").type if _has_bytes(image) else image
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner)):
        raise UnreadableDataError(
            f"{file}: column {columns.image!r} is {image}; "
            "needed: encoded pictures, as binary or as struct<bytes, path>"
        )
    stored = label.value_type if pa.types.is_dictionary(label) else label
    if not (
        pa.types.is_integer(stored)
        or pa.types.is_string(stored)
        or pa.types.is_large_string(stored)
    ):
        raise UnreadableDataError(
            f"{file}: column {columns.label!r} is {label}; needed: integers or class names"
        )


def _has_bytes(kind: Any) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _named_classes(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _rows(file: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                yield from zip(*(batch.column(c).to_pylist() for c in columns), strict=True)
    except Exception as error:  # as above
        raise UnreadableDataError(f"{file} is damaged: {error}; fetch it again") from error


def on_hub(name: str, split: str | None, columns: Columns) -> Source:
    """A data set of the Hugging Face hub, through its own library and under its own cache.

    Raises:
        UnreadableDataError: the library is not installed, or it cannot load the data set.
    """
    try:
        import datasets  # noqa: PLC0415 - an extra that few install
    except ImportError:
        raise UnreadableDataError(
            f"{name!r} is nothing on this machine, and reading it from the hub needs the package "
            'datasets; pip install "nnpassport[hub]"'
        ) from None
    try:
        loaded = datasets.load_dataset(name, split=split)
    # The library passes on whatever its network and file layers raise.
    except Exception as error:
        raise UnreadableDataError(f"the hub's {name!r} cannot be loaded: {error}") from error
    if split is None:
        if len(loaded) != 1:
            raise UnreadableDataError(
                f"the hub's {name!r} has the splits {', '.join(loaded)} and none was chosen; "
                "pass split="
            )
        (loaded,) = loaded.values()
    for column in columns:
        if column not in loaded.features:
            raise UnreadableDataError(
                f"the hub's {name!r} has no column {column!r}; its columns are: "
                f"{', '.join(loaded.features)}. Name them with image_column= and label_column="
            )
    names = getattr(loaded.features[columns.label], "names", None)
    classes = tuple(names) if names else classes_of(iter(loaded[columns.label]), name)
    index = {each: label for label, each in enumerate(classes)}
    stored = loaded.cast_column(columns.image, datasets.Image(decode=False))

    def pictures() -> Iterator[Encoded]:
        for number, row in enumerate(stored):
            image = row[columns.image] or {}
            path = image.get("path")
            content = image.get("bytes") or (Path(path) if path else None)
            yield Encoded(f"{name} row {number}", content, index_of(row[columns.label], index))

    full = f"{name}/{split}" if split else name
    return Source(full, len(stored), classes, (), pictures())
