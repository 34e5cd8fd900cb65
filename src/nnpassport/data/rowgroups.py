"""Row groups of Parquet files: where they lie, and reading them piece by piece in bounded memory.

Nothing is decoded here, and no file is believed: each is checked against what it was when the set
was opened, and one that unpacks to more than it declares is refused.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

from pyarrow import parquet

from nnpassport.data.decoding import Encoded
from nnpassport.data.source import Columns, index_of
from nnpassport.scheme import UnreadableDataError

_ROWS = 128  # that are unpacked at a time, at most
_UNPACKED = 2**22  # bytes that these should not pass
_BUFFER = 2**20  # bytes that are read at a time: a whole column chunk may be gigabytes
_SLACK = 2**20  # bytes that any piece may take


class Group(NamedTuple):
    """A row group that begins with row `first` of its file; `size` is in bytes, as declared."""

    shard: int
    number: int
    first: int
    rows: int
    size: int


class Piece(NamedTuple):
    """Rows `start` to before `stop` of the row group at `group`, about `size` bytes."""

    group: int
    start: int
    stop: int
    size: int


@final
@dataclass(frozen=True, slots=True)
class Shard:
    """A file as it was when the set was opened; `changed` is in nanoseconds since 1970."""

    path: Path
    size: int
    changed: int
    footer: str
    metadata: Any = field(repr=False)

    def check(self) -> None:
        """Check that the file is still what it was, by size and time of change.

        Raises:
            UnreadableDataError: it has changed or is gone.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            raise UnreadableDataError(
                f"{self.path} was there when the set was opened and cannot be read any more: "
                f"{error}; needed: the same files until the end. Put it back and resume"
            ) from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.changed):
            raise UnreadableDataError(
                f"{self.path} has changed since the set was opened; needed: the same files until "
                "the end. Put the old file back and resume, or begin again with the new one"
            )


def shards_of(files: Sequence[Path]) -> tuple[Shard, ...]:
    """The files, with a digest of each footer.

    Raises:
        UnreadableDataError: a file cannot be read.
    """
    return tuple(map(_shard, files))


def _shard(path: Path) -> Shard:
    try:
        stat = path.stat()
        with path.open("rb") as file:
            file.seek(-8, 2)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, 2)
            footer = hashlib.sha256(file.read(length)).hexdigest()
        metadata = parquet.read_metadata(path)
    except Exception as error:  # pyarrow's own and others; bytes from anybody
        raise UnreadableDataError(
            f"{path} is not a readable Parquet file: {error}; needed: a complete .parquet file"
        ) from error
    return Shard(path, stat.st_size, stat.st_mtime_ns, footer, metadata)


def groups_of(shards: Sequence[Shard], columns: Columns) -> tuple[Group, ...]:
    """All row groups that have rows, in stored order.

    Raises:
        UnreadableDataError: a footer contradicts itself.
    """
    groups = []
    for number, shard in enumerate(shards):
        first = 0
        for each in range(shard.metadata.num_row_groups):
            declared = shard.metadata.row_group(each)
            rows, size = declared.num_rows, _size(declared, columns)
            if rows < 0 or size < 0:
                raise UnreadableDataError(
                    f"{shard.path}: row group {each} declares {rows} rows and {size} bytes; "
                    "needed: a file that is whole; fetch it again"
                )
            if rows:
                groups.append(Group(number, each, first, rows, max(size, rows)))
            first += rows
        if first != shard.metadata.num_rows:
            raise UnreadableDataError(
                f"{shard.path} declares {shard.metadata.num_rows} rows, and {first} in its row "
                "groups; needed: a file that is whole; fetch it again"
            )
    return tuple(groups)


def _size(declared: Any, columns: Columns) -> int:
    chunks = (declared.column(number) for number in range(declared.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if any(chunk.path_in_schema.partition(f"{name}.")[0] in {"", name} for name in columns)
    )


def pieces_of(group: int, rows: Group, start: int, stop: int, most: int) -> list[Piece]:
    """Rows `start` to before `stop` of a row group, cut where they would pass `most` bytes."""
    each = max(1, most * rows.rows // rows.size)
    return [
        Piece(group, first, last, -(-rows.size * (last - first) // rows.rows))
        for first in range(start, stop, each)
        for last in (min(first + each, stop),)
    ]


def labels_in(
    shards: Sequence[Shard], groups: Sequence[Group], columns: Columns
) -> Iterator[list[Any]]:
    """The labels as they are stored, some at a time; nothing else is read.

    Raises:
        UnreadableDataError: a file is damaged, has changed or is gone.
    """
    for number, shard in enumerate(shards):
        wanted = [group.number for group in groups if group.shard == number]
        shard.check()
        try:
            with parquet.ParquetFile(shard.path, metadata=shard.metadata) as file:
                for batch in file.iter_batches(row_groups=wanted, columns=[columns.label]):
                    yield batch.column(columns.label).unique().to_pylist()
        except Exception as error:  # as above
            raise UnreadableDataError(
                f"{shard.path} is damaged: {error}; fetch it again"
            ) from error


@final
class Rows:
    """Encoded pictures in memory: those of a few pieces, one piece after the other."""

    def __init__(self) -> None:
        self._starts, self._names, self._rows = list[int](), list[str](), list[int]()
        self._images, self._labels = list[Any](), list[list[int | None]]()
        self._count, self.bytes = 0, 0

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, at: int) -> Encoded:
        chunk = bisect_right(self._starts, at) - 1
        offset = at - self._starts[chunk]
        name = f"{self._names[chunk]} row {self._rows[chunk] + offset}"
        return Encoded(name, self._images[chunk][offset].as_py(), self._labels[chunk][offset])

    def add(self, images: Any, labels: list[int | None], name: str, first: int) -> None:
        """Keep an Arrow array of encoded pictures, whose first is row `first` of its file."""
        self._starts.append(self._count)
        self._names.append(name)
        self._rows.append(first)
        self._images.append(images)
        self._labels.append(labels)
        self._count += len(images)
        self.bytes += images.nbytes


@final
class Cursor:
    """Reads pieces of row groups. Going on in a row group costs what is read and no more.

    Going back, or on in another one, opens that one and reads past what comes before the piece.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        groups: Sequence[Group],
        columns: Columns,
        index: Mapping[str, int],
    ) -> None:
        self._shards, self._groups, self._columns = shards, groups, columns
        self._index = dict(index)
        self._file: Any = None
        self._batches: Iterator[Any] = iter(())
        self._group, self._position, self._rest = -1, 0, None

    def load(self, pieces: Sequence[Piece], most: int) -> Rows:
        """The pieces' rows, of `most` bytes, or twice what their footers declare if that is more.

        Raises:
            UnreadableDataError: they are more, or a file is damaged, has changed or is gone.
        """
        loaded = Rows()
        allowed = max(most, 2 * sum(piece.size for piece in pieces)) + _SLACK
        for piece in pieces:
            group = self._groups[piece.group]
            shard, row = self._shards[group.shard], group.first + piece.start
            for batch in self._read(piece):
                image, label = (batch.column(name) for name in self._columns)
                if hasattr(image.type, "get_field_index") and image.type.num_fields:
                    image = image.flatten()[image.type.get_field_index("bytes")]
                labels = [index_of(each, self._index) for each in label.to_pylist()]
                loaded.add(image, labels, shard.path.name, row)
                row += len(batch)
                if loaded.bytes > allowed:
                    raise UnreadableDataError(
                        f"{shard.path}: row group {group.number} holds more than the {group.size} "
                        f"bytes that it declares, and more than the {allowed} that may be in "
                        "memory; write the file again with use_dictionary=False, or pass a larger "
                        "buffer="
                    )
        return loaded

    def close(self) -> None:
        """Close the file, if one is open."""
        self._batches, self._rest, self._group = iter(()), None, -1
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self, piece: Piece) -> Iterator[Any]:
        shard = self._shards[self._groups[piece.group].shard]
        try:
            if self._group != piece.group or self._position > piece.start:
                self._open(piece.group)
            yield from self._forward(piece)
            if self._position == self._groups[piece.group].rows:
                self.close()
        except Exception as error:  # pyarrow's own and others; bytes from anybody
            self.close()
            shard.check()
            raise UnreadableDataError(
                f"{shard.path} is damaged: {error}; fetch it again"
            ) from error
        shard.check()

    def _open(self, group: int) -> None:
        self.close()
        opened = self._groups[group]
        shard, rows = self._shards[opened.shard], _UNPACKED * opened.rows // opened.size
        shard.check()
        # Left to itself, pyarrow holds all that will be read of a row group, however large.
        self._file = parquet.ParquetFile(
            shard.path, metadata=shard.metadata, buffer_size=_BUFFER, pre_buffer=False
        )
        self._batches = self._file.iter_batches(
            max(1, min(_ROWS, rows)),
            row_groups=[opened.number],
            columns=list(self._columns),
            use_threads=False,
        )
        self._group, self._position = group, 0

    def _forward(self, piece: Piece) -> Iterator[Any]:
        while self._position < piece.stop:
            batch = next(self._batches, None) if self._rest is None else self._rest
            if batch is None:
                raise ValueError(f"row group {self._group} has fewer rows than it declares")
            stop = min(len(batch), piece.stop - self._position)
            start = max(0, min(stop, piece.start - self._position))
            self._rest = batch.slice(stop) if stop < len(batch) else None
            self._position += stop
            if start < stop:
                yield batch.slice(start, stop - start)
