"""Safetensors, one tensor at a time: networks that are larger than the memory, from anybody.

A header says where each tensor lies. It is checked whole before anything is believed: tensors that
overlap, leave gaps, leave the file or are not as large as their shape says are refused, as the
library does, and so are names that are given twice. A folder of shards is read by its index. Then
a tensor is read when it is asked for, and nothing of it is kept. No file is mapped into memory: one
that shrinks meanwhile would end the process.
"""

import hashlib
import io
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self, final

import numpy as np

from nnpassport.files.arrays import BFLOAT16, DTYPES, Array, Described, finite_fault
from nnpassport.files.disk import (
    brief,
    is_text,
    read_once,
    reading,
    refuse_leaving,
    without_duplicates,
)
from nnpassport.scheme import UnreadableModelError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX_FILE = f"model{INDEX_SUFFIX}"
MAX_SHARDED_BYTES = 2**40
"""A limit on time, not on memory: every byte goes through SHA-256, which takes minutes for so many,
and a file of that size may take no space at all. 5·10¹¹ numbers in half precision fit in."""
MAX_TENSOR_BYTES = 16 * 2**30
MAX_INDEX_BYTES = 2**25
MAX_SHARD_HEADER_BYTES = 2**25  # a hundred thousand tensors need half of it
_MOST_TENSORS = 100_000
_MOST_COMMAS = 2**21  # a value takes two bytes of JSON and a hundred of memory
_MOST_AXES = 8
_TORCH_AXES = 64  # that a tensor of PyTorch's can have
_MOST_NUMBERS = 2**62
_BLOCK = 2**24
_FIELDS = {"dtype", "shape", "data_offsets"}
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
}


class Source(NamedTuple):
    """A file, and what tells that it is still the same: device, node, size, times of change."""

    path: Path
    identity: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity[2]


class Place(NamedTuple):
    """Where a tensor lies: bytes `begin` to `end` of a file."""

    source: Source
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


@final
@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Shards(Mapping[str, Array]):
    """Arrays by name, each read from its file and checked whenever it is asked for.

    Attributes:
        places: where each tensor lies.
        files: every file that was looked at, the index first if there is one.
        left_out: tensors that no layer can be, by name, and why: of another kind of number, say.
    """

    places: Mapping[str, Place]
    files: tuple[Source, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Array:
        """Read one tensor; the next call reads it again.

        Raises:
            UnreadableModelError: it is too large, holds NaN or Inf, or its file has changed.
        """
        array = self.unchecked(name)
        if (fault := finite_fault(name, array)) is not None:
            raise UnreadableModelError(f"{self.places[name].source.path} cannot be used: {fault}")
        return array

    def unchecked(self, name: str) -> Array:
        """The same, though it may hold NaN or Inf.

        Raises:
            UnreadableModelError: it is too large, or its file has changed.
        """
        with _opened(self.places[name].source) as file:
            return _read(file, name, self.places[name])

    def whole(self) -> tuple[dict[str, Array], dict[str, str]]:
        """All tensors, though they may hold NaN or Inf, and all digests; a file is opened once.

        Raises:
            UnreadableModelError: as `unchecked` and `digests`.
        """
        within: dict[Path, list[str]] = {}
        for name, place in self.places.items():
            within.setdefault(place.source.path, []).append(name)
        arrays, digests = dict[str, Array](), dict[str, str]()
        for source in self.files:
            with _opened(source) as file:
                arrays |= {n: _read(file, n, self.places[n]) for n in within.get(source.path, ())}
                file.seek(0)
                digests[source.path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return {name: arrays[name] for name in self.places}, digests

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places  # Mapping's own would read the tensor

    @property
    def bytes(self) -> int:
        """Of all tensors together."""
        return sum(place.end - place.begin for place in self.places.values())

    def described(self) -> dict[str, Described]:
        """Names, shapes and dtypes; nothing is read."""
        return {name: Described(place.dtype, place.shape) for name, place in self.places.items()}

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same tensors under other names: `names` has the present one of each."""
        places = {new: self.places[old] for new, old in names.items()}
        return type(self)(places, self.files, self.left_out)

    def digests(self) -> dict[str, str]:
        """SHA-256 (hex) of every file, in blocks, by its name.

        Raises:
            UnreadableModelError: a file cannot be read, or is not what it was when it was opened.
        """
        digests = {}
        for source in self.files:
            with _opened(source) as file:
                digests[source.path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return digests


def open_shards(path: Path, *, limit: int = MAX_SHARDED_BYTES) -> Shards:
    """The tensors of a `.safetensors` file, or of all the shards that an index names.

    Only headers are read. `limit` is on the bytes of all files together. An index is as the hub has
    it: which shard, a file beside it, each tensor is in, and it decides: loaders take a tensor from
    the shard that it names and from no other. What the two disagree on is left out, with what they
    say, and so is what the format allows and no layer can be: one such tensor that nobody reads
    costs a thief four bytes.

    Raises:
        UnreadableModelError: missing, corrupt, hostile, or too large.
    """
    if not is_index(path):
        source = _source(path)
        _check_total([source], limit, path)
        own, unfit = _places(source)
        return Shards(own, (source,), unfit)
    index = _source(path)
    homes = homes_of(path, SUFFIX)
    sources = {name: _beside(path, name) for name in dict.fromkeys(homes.values())}
    _check_total(list(sources.values()), limit, path)
    places: dict[str, Place] = {}
    left_out: dict[str, str] = {}
    for shard, source in sources.items():
        found, others = _places(source)
        for name in (*found, *others):
            if homes.get(name) != shard:
                left_out[f"{shard}: {name}"] = disagreement(path, name, shard, homes.get(name))
        places |= {name: each for name, each in found.items() if homes.get(name) == shard}
        left_out |= {name: why for name, why in others.items() if homes.get(name) == shard}
    for name, shard in homes.items():
        if name not in places and name not in left_out:
            left_out[name] = f"{name[:100]!r} is not in {shard}, where {path.name} has it"
    if not places:
        raise _bad_index(path, next(iter(left_out.values())))
    return Shards(places, (index, *sources.values()), left_out)


def disagreement(index: Path, name: str, shard: str, home: str | None) -> str:
    """What is said of a tensor that a shard holds and the index does not have in it."""
    where = "nowhere" if home is None else f"in {home}"
    return f"{name[:100]!r} is in {shard}, and {index.name} has it {where}"


def is_index(path: Path) -> bool:
    """Whether this is, by its name, an index of shards."""
    return path.name.lower().endswith(INDEX_SUFFIX)


def _beside(index: Path, name: str) -> Source:
    """A shard: whoever gives an index names files of its folder, and a link can lead anywhere."""
    source = _source(index.parent / name)
    refuse_leaving(index.parent, source.path)
    return source


def _source(path: Path) -> Source:
    with reading(path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
        raise UnreadableModelError(f"{path} is not a regular file; give the file itself")
    if not found.st_size:
        raise UnreadableModelError(f"{path} is empty; needed: a complete file; copy it again")
    return Source(path, _identity(found))


def _identity(found: os.stat_result) -> tuple[int, ...]:
    # The time of the last change of the node, too: whoever writes may set that of the content.
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def _opened(source: Source) -> Iterator[io.FileIO]:
    """The file, the same before and after; what was read of it in between is then of one piece."""
    _check_same(source, _source(source.path).identity)
    with reading(source.path), source.path.open("rb", buffering=0) as file:
        _check_same(source, _identity(os.fstat(file.fileno())))
        yield file
        _check_same(source, _identity(os.fstat(file.fileno())))


def _check_same(source: Source, identity: tuple[int, ...]) -> None:
    if identity != source.identity:
        raise _changed(source.path)


def _changed(path: Path) -> UnreadableModelError:
    return UnreadableModelError(
        f"{path} changed while it was read; needed: a file that nobody writes to; copy it elsewhere"
    )


def _fill(file: io.FileIO, raw: Array, path: Path) -> None:
    view, done = memoryview(raw.data), 0
    while done < len(view):
        count = file.readinto(view[done : done + _BLOCK])
        if not count:
            raise _changed(path)
        done += count


def _read(file: io.FileIO, name: str, place: Place) -> Array:
    size = place.end - place.begin
    if size > MAX_TENSOR_BYTES:
        raise UnreadableModelError(
            f"tensor {name!r} in {place.source.path} has {size} bytes, but at most "
            f"{MAX_TENSOR_BYTES} are read of one; needed: layers that fit in memory"
        )
    raw = np.empty(size, np.uint8)
    file.seek(place.begin)
    _fill(file, raw, place.source.path)
    array = raw.view(place.dtype).reshape(place.shape)
    return array.byteswap() if sys.byteorder == "big" else array


def _check_total(sources: list[Source], limit: int, path: Path) -> None:
    total = sum(source.size for source in sources)
    if total > limit:
        raise UnreadableModelError(
            f"{path} stands for {total} bytes, but at most {limit} are read; needed: a smaller "
            "network, or `verify` without data and alignment, which reads one tensor at a time and "
            f"takes {MAX_SHARDED_BYTES}"
        )


def homes_of(path: Path, suffix: str) -> dict[str, str]:
    """Which file, beside the index, each tensor is in; its name ends in `suffix`.

    Raises:
        UnreadableModelError: it is no index, or names something else.
    """
    data = read_once(path, MAX_INDEX_BYTES)
    try:
        document = _parsed(data)
        homes = document.get("weight_map")
        if not isinstance(homes, dict) or not 1 <= len(homes) <= _MOST_TENSORS:
            raise ValueError(f"weight_map is not an object of 1 to {_MOST_TENSORS} names")
        for home in homes.values():
            if not _is_beside(home, suffix):
                raise ValueError(f"{home!r:.100} is not the name of a {suffix} file in its folder")
    except (ValueError, RecursionError) as error:
        raise _bad_index(path, brief(error)) from error
    return homes


def _is_beside(name: Any, suffix: str) -> bool:
    return (
        is_text(name)
        and name.endswith(suffix)
        and not any(letter in name for letter in "/\\:")
        and name == Path(name).name
    )


def _bad_index(path: Path, fault: str) -> UnreadableModelError:
    return UnreadableModelError(
        f"{path} does not fit its shards ({fault}); needed: the index and all the files that "
        "`save_pretrained` wrote, unchanged; copy them again"
    )


def _places(source: Source) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors of a file lie, and which of them are left out, and why."""
    with _opened(source) as file:
        declared = int.from_bytes(file.read(8), "little")
        if declared > min(source.size - 8, MAX_SHARD_HEADER_BYTES):
            raise UnreadableModelError(
                f"{source.path} declares a header of {declared} bytes in a file of {source.size}, "
                f"but it must lie in the file and have at most {MAX_SHARD_HEADER_BYTES}; it is "
                "truncated or not a safetensors file: copy it again"
            )
        raw = np.empty(declared, np.uint8)
        _fill(file, raw, source.path)
    data = raw.tobytes()
    if (count := data.count(b"{")) > _MOST_TENSORS:
        raise UnreadableModelError(
            f"{source.path} has a header of {count} entries, but at most {_MOST_TENSORS} tensors "
            "are read; split it"
        )
    try:
        return _checked(_parsed(data), source, 8 + declared)
    except (ValueError, RecursionError) as error:
        raise UnreadableModelError(
            f"{source.path} is not a sound safetensors file ({brief(error)}); needed: a complete "
            "file as `safetensors` writes it; copy it again"
        ) from error


def _checked(
    header: dict[str, Any], source: Source, start: int
) -> tuple[dict[str, Place], dict[str, str]]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not an object of texts")
    stored = {name: _stored(name, entry) for name, entry in header.items()}
    reached = 0
    for name, (_, _, begin, end) in sorted(stored.items(), key=lambda each: each[1][2:]):
        if begin != reached:
            raise ValueError(f"{name[:100]!r} overlaps another tensor, or there is a gap before it")
        reached = end
    if start + reached != source.size:
        raise ValueError(f"its tensors end at byte {start + reached} of {source.size}")
    left_out = {
        name: fault
        for name, (kind, shape, _, _) in stored.items()
        if (fault := _unfit(name, kind, shape)) is not None
    }
    places = {
        name: Place(source, _DTYPES[kind], tuple(shape), start + begin, start + end)
        for name, (kind, shape, begin, end) in stored.items()
        if name not in left_out
    }
    return places, left_out


def _unfit(name: str, kind: str, shape: list[int]) -> str | None:
    """Why no layer can be this tensor, which the format allows."""
    if not is_text(name):
        return f"the name {name[:100]!r} is too long or holds control characters"
    if kind not in _DTYPES:
        return f"{name[:100]!r} is {kind!r:.40}; needed: one of {', '.join(_DTYPES)}"
    if len(shape) > _MOST_AXES:
        return f"{name[:100]!r} has {len(shape)} axes; needed: at most {_MOST_AXES}"
    return None


def _stored(name: str, entry: Any) -> tuple[str, list[int], int, int]:
    """A tensor's kind of number, shape, and the bytes from and to which it lies."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"{name[:100]!r} does not have the fields {', '.join(sorted(_FIELDS))}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str):
        raise ValueError(f"{name[:100]!r} is {kind!r:.40}; needed: one of {', '.join(_DTYPES)}")
    if not _are_counts(shape) or len(shape) > _TORCH_AXES or _numbers(shape) > _MOST_NUMBERS:
        raise ValueError(f"{name[:100]!r} has shape {shape!r:.100}; needed: integers from 0")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(
            f"{name[:100]!r} has offsets {offsets!r:.100}; needed: two integers from 0"
        )
    begin, end = offsets
    # How many bytes a number takes of a kind that is not known here, nobody asks.
    known = kind not in _DTYPES or end - begin == math.prod(shape) * _DTYPES[kind].itemsize
    if end < begin or not known:
        raise ValueError(
            f"{name[:100]!r} has {end - begin} bytes, which {kind} of shape {shape} does not"
        )
    return kind, shape, begin, end


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _numbers(shape: list[int]) -> int:
    """As `math.prod`, but a side of zero hides no other."""
    return math.prod(max(1, side) for side in shape)


def _parsed(data: bytes) -> dict[str, Any]:
    """The JSON object that these bytes are.

    Raises:
        ValueError: they are none, say a name twice, or hold too many values.
    """
    if not data.startswith(b"{") or data.count(b",") > _MOST_COMMAS:
        raise ValueError(f"it is not a JSON object of at most {_MOST_COMMAS} values")
    document: dict[str, Any] = json.loads(
        data.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=_refused
    )
    return document


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
