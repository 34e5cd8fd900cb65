"""Tables of labelled pictures: Parquet and Arrow files in the hub's schema, and the hub itself."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

from nnpassport.data.decoding import Encoded
from nnpassport.data.source import LABELS, Asked, Columns, Source, classes_of, index_of
from nnpassport.scheme import UnreadableDataError

_ROWS = 1_024  # that are in memory together
_MOST_ROWS = 50_000_000
_MOST_JSON = 16 * 2**20  # bytes
_ARROW = {".arrow", ".feather"}
IMAGES = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")
"""What data sets call the column of pictures, in order of preference."""


def in_tables(files: Sequence[Path], name: str, asked: Asked) -> Source:
    """The rows of Parquet or Arrow files, one after the other, in the hub's schema for pictures.

    Raises:
        UnreadableDataError: a file is corrupt, lacks a column, or the files differ in classes.
    """
    total, found, chosen = 0, list[tuple[str, ...] | None](), set[Columns]()
    for file in files:
        schema, rows = _schema(file)
        total += rows
        named = columns_in(schema, str(file), asked)
        chosen.add(named)
        found.append(
            _named_classes(schema.metadata, named.label) or _named_beside(file, named.label)
        )
    if len(set(found)) != 1 or len(chosen) != 1:
        raise UnreadableDataError(
            f"{name}: {len(files)} files name different classes or columns; "
            f"needed: parts of one data set. Files: {', '.join(f.name for f in files[:6])}"
        )
    if total == 0:
        raise UnreadableDataError(f"{name}: the files have no rows; needed: pictures")
    (columns,) = chosen
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


def columns_in(schema: Any, where: str, asked: Asked) -> Columns:
    """The columns of pictures and labels: those that were named, or those usually called so.

    Raises:
        UnreadableDataError: there is no such column, or it holds something else.
    """
    pictures = [name for name in schema.names if _is_pictures(schema.field(name).type)]
    found = _columns(asked, schema.names, pictures, where)
    _check_columns(schema, where, found)
    return found


def _columns(asked: Asked, there: Sequence[str], pictures: Sequence[str], where: str) -> Columns:
    image = asked.image or _usual(IMAGES, there) or (pictures[0] if len(pictures) == 1 else None)
    label = asked.label or _usual(LABELS, [name for name in there if name != image])
    for what, column in (("pictures", image), ("labels", label)):
        if column not in there:
            lacks = f"no column {column!r}" if column else f"no column of {what} by a usual name"
            raise UnreadableDataError(
                f"{where} has {lacks}; its columns are: {', '.join(there)}. Name them with "
                "--image-column and --label-column (in Python image_column= and label_column=)"
            )
    return Columns(str(image), str(label))


def _usual(usual: Sequence[str], there: Sequence[str]) -> str | None:
    return next((name for name in usual if name in there), None)


def column_names(file: Path) -> list[str]:
    """The columns of a Parquet file.

    Raises:
        UnreadableDataError: it is not one.
    """
    return list(_schema(file)[0].names)


def schema_of(file: Path) -> Any:
    """The Arrow schema of a table.

    Raises:
        UnreadableDataError: it cannot be read.
    """
    return _schema(file)[0]


def _schema(file: Path) -> tuple[Any, int]:
    try:
        if file.suffix in _ARROW:
            with pa.memory_map(str(file)) as source:
                schema, batches = _arrow(source)
                rows = sum(batch.num_rows for batch in batches)
        else:
            with parquet.ParquetFile(file) as table:
                schema, rows = table.schema_arrow, table.metadata.num_rows
    except Exception as error:  # pyarrow's own and others; bytes from anybody
        kind = "Arrow" if file.suffix in _ARROW else "Parquet"
        raise UnreadableDataError(
            f"{file} is not a readable {kind} file: {error}; needed: a complete file"
        ) from error
    # Run-length encoding: a few bytes may stand for any number of rows.
    if not 0 <= rows <= _MOST_ROWS:
        raise UnreadableDataError(
            f"{file} declares {rows} rows; needed: at most {_MOST_ROWS}; split the file"
        )
    return schema, rows


def _arrow(source: Any) -> tuple[Any, Iterator[Any]]:
    """Schema and batches of a stream, as `datasets` saves it, or of a file with a footer."""
    try:
        reader = ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        whole = ipc.open_file(source)
        return whole.schema, map(whole.get_batch, range(whole.num_record_batches))
    return reader.schema, iter(reader)


def _check_columns(schema: Any, where: str, columns: Columns) -> None:
    image, label = (schema.field(column).type for column in columns)
    if not _is_pictures(image):
        raise UnreadableDataError(
            f"{where}: column {columns.image!r} is {image}; "
            "needed: encoded pictures, as binary or as struct<bytes, path>"
        )
    stored = label.value_type if pa.types.is_dictionary(label) else label
    if not (
        pa.types.is_integer(stored)
        or pa.types.is_string(stored)
        or pa.types.is_large_string(stored)
    ):
        raise UnreadableDataError(
            f"{where}: column {columns.label!r} is {label}; needed: integers or class names"
        )


def _is_pictures(kind: Any) -> bool:
    inner = kind.field("bytes").type if _has_bytes(kind) else kind
    return bool(pa.types.is_binary(inner) or pa.types.is_large_binary(inner))


def _has_bytes(kind: Any) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _named_classes(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    try:
        info = json.loads((metadata or {})[b"huggingface"])["info"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return _names_in(info, column)


def _named_beside(file: Path, column: str) -> tuple[str, ...] | None:
    """Class names in the `dataset_info.json` that `datasets` saves beside its files."""
    path = file.with_name("dataset_info.json")
    if file.suffix not in _ARROW or not path.is_file() or path.stat().st_size > _MOST_JSON:
        return None
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return _names_in(info, column)


def _names_in(info: Any, column: str) -> tuple[str, ...] | None:
    try:
        names = info["features"][column]["names"]
    except (KeyError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _rows(file: Path, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    try:
        if file.suffix in _ARROW:
            with pa.memory_map(str(file)) as source:
                for batch in _arrow(source)[1]:
                    for part in range(0, batch.num_rows, _ROWS):
                        rows = batch.slice(part, _ROWS)
                        yield from zip(*(rows.column(c).to_pylist() for c in columns), strict=True)
            return
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                yield from zip(*(batch.column(c).to_pylist() for c in columns), strict=True)
    except Exception as error:  # as above
        raise UnreadableDataError(f"{file} is damaged: {error}; fetch it again") from error


def on_hub(name: str, split: str | None, asked: Asked) -> Source:
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
    pictures_in = [n for n, f in loaded.features.items() if type(f).__name__ == "Image"]
    columns = _columns(asked, list(loaded.features), pictures_in, f"the hub's {name!r}")
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
