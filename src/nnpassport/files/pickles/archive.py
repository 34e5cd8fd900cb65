"""The parts of a zip archive, by the one directory that PyTorch's own reader goes by.

That reader takes the last end record of the file and the offset in it as it stands. Others look for
a directory right before that record, so one file can show different parts to different readers;
such a file is refused. What is stored once is in one part: parts do not overlap, and none may
unpack to many times its size.
"""

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

MAGIC = b"PK\3\4"
MAX_GROWTH = 8
"""Times its size that a file may unpack to. `torch.save` compresses nothing; somebody may have done
so since, and weights shrink little, even pruned ones."""
MAX_UNPACKED_BYTES = 2**32
_HARMLESS = 2**26  # bytes: of a small archive's code and tables, which are only text
_END, _END64, _LOCATOR, _ENTRY = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2"
_LONGEST_TAIL = 2**16 - 1  # what may come after the end record
_MOST_PARTS = 200_000
_STORED, _DEFLATED = 0, 8


class Part(NamedTuple):
    """Bytes `begin` to `end` of the file, and how many bytes they stand for."""

    begin: int
    end: int
    size: int
    packed: bool


class Archive(NamedTuple):
    """Parts by name below the folder that all are in; of a name that is there twice, None."""

    folder: str
    parts: dict[str, Part | None]


def read_directory(data: bytes) -> Archive:
    """Which parts the archive has, and where; nothing is unpacked.

    Raises:
        ValueError: it is damaged, ambiguous, encrypted, or would grow by more than `MAX_GROWTH`.
    """
    entries = list(_entries(data))
    if not entries:
        raise ValueError("its directory is empty")
    parts: dict[str, Part | None] = {}
    known: set[str] = set()
    for name, part in entries:
        # PyTorch compares names without regard to case.
        parts[name] = None if name.lower() in known else part
        known.add(name.lower())
    places = sorted(part for _, part in entries)
    if any(after.begin < part.end for part, after in pairwise(places)):
        raise ValueError("its parts overlap")
    declared = sum(part.size for part in places)
    most = min(max(MAX_GROWTH * len(data), _HARMLESS), MAX_UNPACKED_BYTES)
    if declared > max(len(data), most):
        raise ValueError(
            f"its parts unpack to {declared} bytes from {len(data)}, as in a decompression bomb"
        )
    return Archive(entries[0][0].split("/", 1)[0], parts)


def content(data: bytes, archive: Archive, name: str) -> memoryview:
    """The bytes of one part; a view of `data` unless they have to be unpacked.

    Raises:
        ValueError: there is no such part, there are two, or it is not as large as it says.
    """
    return stored(data, archive, f"{archive.folder}/{name}")


def stored(data: bytes, archive: Archive, whole: str) -> memoryview:
    """The same of a part by its whole name.

    Raises:
        ValueError: as above.
    """
    if whole not in archive.parts:
        raise ValueError(f"it has no part {whole[:100]!r}")
    part = archive.parts[whole]
    if part is None:
        raise ValueError(f"it has two parts {whole[:100]!r}")
    held = memoryview(data)[part.begin : part.end]
    if not part.packed:
        return held
    try:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        unpacked = unpacker.decompress(held, part.size + 1)
    except zlib.error as error:
        raise ValueError(f"its part {whole[:100]!r} cannot be unpacked: {error}") from error
    if len(unpacked) != part.size or not unpacker.eof:
        raise ValueError(f"its part {whole[:100]!r} is not as large as it says")
    return memoryview(unpacked)


def _entries(data: bytes) -> Iterator[tuple[str, Part]]:
    count, size, start = _directory(data)
    if count > _MOST_PARTS:
        raise ValueError(f"it has {count} parts, but at most {_MOST_PARTS} are read")
    at, end = start, start + size
    for _ in range(count):
        fields = _unpacked("<4s4x2H8xLLHHH8xL", data, at)
        mark, flags, method, packed, whole, *lengths, local = fields
        if mark != _ENTRY:
            raise ValueError("its directory is damaged")
        text, after = at + 46, at + 46 + sum(lengths)
        if after > end:
            raise ValueError("its directory is longer than it says")
        name = data[text : text + lengths[0]].decode("utf-8", "surrogateescape")
        extra = data[text + lengths[0] : text + lengths[0] + lengths[1]]
        whole, packed, local = _wide(extra, whole, packed, local)
        yield name, _part(data, name, (flags, method), (packed, whole, local))
        at = after


def _directory(data: bytes) -> tuple[int, int, int]:
    """How many entries, in how many bytes, from where."""
    tail = max(0, len(data) - _LONGEST_TAIL - 22)
    end = data.rfind(_END, tail, max(0, len(data) - 18))
    if end < 0:
        raise ValueError("it has no directory; it is cut short, or not an archive")
    count, size, start = _unpacked("<10xHLL", data, end)
    before = end
    if end >= 20 and data[end - 20 : end - 16] == _LOCATOR:
        (before,) = _unpacked("<8xQ", data, end - 20)
        if before > end - 20 - 56 or data[before : before + 4] != _END64:
            raise ValueError("its directory is damaged")
        count, size, start = _unpacked("<32xQQQ", data, before)
    if start + size > before:
        raise ValueError("its directory is damaged")
    other = before - size
    if other != start and data[other : other + 4] == _ENTRY:
        raise ValueError("it has two directories, and which one counts depends on the reader")
    return count, size, start


def _part(data: bytes, name: str, kind: tuple[int, int], place: tuple[int, int, int]) -> Part:
    (flags, method), (packed, whole, local) = kind, place
    mark, *lengths = _unpacked("<4s22xHH", data, local)
    begin = local + 30 + sum(lengths)
    if mark != MAGIC or begin + packed > len(data):
        raise ValueError(f"its part {name[:100]!r} is not where the directory says")
    if flags & 1 or method not in (_STORED, _DEFLATED):
        raise ValueError(f"its part {name[:100]!r} is encrypted or packed in an unknown way")
    if method == _STORED and packed != whole:
        raise ValueError(f"its part {name[:100]!r} has two sizes")
    return Part(begin, begin + packed, whole, method == _DEFLATED)


def _wide(extra: bytes, *numbers: int) -> list[int]:
    """The numbers, where 2³² − 1 stands for one in the field of 64-bit numbers."""
    wanted = numbers.count(2**32 - 1)
    while wanted and len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1 and length >= 8 * wanted and len(extra) >= 4 + 8 * wanted:
            wide = iter(struct.unpack(f"<{wanted}Q", extra[4 : 4 + 8 * wanted]))
            return [next(wide) if number == 2**32 - 1 else number for number in numbers]
        extra = extra[4 + length :]
    return list(numbers)


def _unpacked(form: str, data: bytes, at: int) -> tuple[Any, ...]:
    size = struct.calcsize(form)
    if at + size > len(data):
        raise ValueError("its directory is damaged")
    return struct.unpack(form, data[at : at + size])
