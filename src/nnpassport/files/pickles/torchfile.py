"""Files of `torch.save` from anybody: the tensors in them, and nothing else of them.

The pickle goes to a process of its own (`unpickling`), which may take little time and memory and
comes back with where each tensor lies. Whatever happens there, here it is one error. What it says
is checked against the file, and then the numbers are copied out of it.
"""

import itertools
import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from nnpassport.files.arrays import DTYPES, Array
from nnpassport.files.disk import brief
from nnpassport.files.pickles import archive
from nnpassport.files.quantised import dequantise
from nnpassport.scheme import UnreadableModelError

MAX_SECONDS = 20
"""Of processor time for one pickle; a hundred thousand tensors take one."""
MAX_WAIT = 120.0
MAX_MEMORY = 2**30
MAX_PICKLED_BYTES = 2**27
_MAX_OUTLINE_BYTES = 2**25
_MOST_TENSORS = 100_000
_MOST_COMMAS = 2**21  # a value takes two bytes of JSON and a hundred of memory
_MOST_AXES = 8
_LARGEST = 2**62
_WRAPPERS = ("state_dict", "model")
_PLAIN = 7  # what is said of a tensor that is not quantised
_WEIGHTS = "data/weights"
_EXPORTED = f"{_WEIGHTS}/model_weights_config.json"
_OF_EXPORT = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float16",
    7: "float32",
    8: "float64",
    12: "bool",
    13: "bfloat16",
    29: "float8_e4m3fn",
    30: "float8_e5m2",
}
_QUANTISED = {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}

Stored = Callable[[str], memoryview]


class Outline(NamedTuple):
    """What a pickle holds, by `unpickling.read`.

    Attributes:
        stored: the bytes of a storage.
        swapped: whether they are in the other order than this machine's.
        size: bytes of the whole file.
    """

    said: dict[str, Any]
    stored: Stored
    swapped: bool
    size: int


def read_torch(data: bytes, path: Path) -> dict[str, Array]:
    """The state dict in the bytes of a checkpoint: alone, or under "state_dict" or "model".

    No code in it is run, nothing that it names is imported, and what else is in it is left alone.
    Tensors that share memory in the file share it here; none requires a gradient.

    Raises:
        UnreadableModelError: damaged, hostile, or without a state dict.
    """
    try:
        outline = _outline(data)
        tensors, left_out = _tensors(_state_dict(outline.said), outline)
        if left_out:
            raise ValueError(next(iter(left_out.values())))
        return tensors
    except (ValueError, TypeError, LookupError) as error:
        raise _no_checkpoint(path, error) from error


def read_all_torch(
    data: bytes, path: Path, *, whole: bool = False
) -> tuple[dict[str, Array], dict[str, str]]:
    """All tensors of a checkpoint from anybody, and those that cannot be had, by name, and why.

    A file does not say which of its dictionaries is loaded. Those of the state dict, as above, have
    their own names, and the others those of the dictionaries that they are in before them; with
    `whole` all have these, and one tensor is there under each of its names.

    Raises:
        UnreadableModelError: damaged, hostile, or without a tensor.
    """
    try:
        outline = _outline(data)
        names = _everything(outline.said, whole)
        if not names:
            _state_dict(outline.said)  # says what it holds
        return _tensors(names, outline)
    except (ValueError, TypeError, LookupError) as error:
        raise _no_checkpoint(path, error) from error


def read_each_alone(saved: Sequence[bytes]) -> list[Array]:
    """The tensor in each of these archives of `torch.save`, which hold one and nothing else.

    Raises:
        ValueError: one is damaged, hostile, or holds anything else.
    """
    directories = [archive.read_directory(each) for each in saved]
    pickled = [
        archive.content(data, directory, "data.pkl")
        for data, directory in zip(saved, directories, strict=True)
    ]
    if (total := sum(len(each) + 8 for each in pickled)) > MAX_PICKLED_BYTES:
        raise ValueError(f"its pickles take {total} bytes; at most {MAX_PICKLED_BYTES} are read")
    framed = b"".join(len(each).to_bytes(8, "little") + bytes(each) for each in pickled)
    arrays: list[Array] = []
    said = outline_of(memoryview(framed), "parts")["parts"]
    for data, directory, alone in zip(saved, directories, said, strict=True):
        outline = _of_archive(data, directory, alone)
        found, left_out = _tensors({"a piece": 0}, outline)
        if left_out:
            raise ValueError(next(iter(left_out.values())))
        arrays += found.values()
    return arrays


def _no_checkpoint(path: Path, error: Exception) -> UnreadableModelError:
    return UnreadableModelError(
        f"{path} cannot be read as a checkpoint ({brief(error)}); needed: a state dict as "
        "`torch.save(model.state_dict(), FILE)` writes it, alone or under 'state_dict' or "
        "'model'; a .safetensors file would work"
    )


def _outline(data: bytes) -> Outline:
    if not data.startswith(archive.MAGIC):
        said = outline_of(memoryview(data)[:MAX_PICKLED_BYTES], "legacy")
        return Outline(said, _legacy_storages(data, said), sys.byteorder == "big", len(data))
    directory = archive.read_directory(data)
    if f"{directory.folder}/{_EXPORTED}" in directory.parts:
        return _exported(data, directory)
    pickled = archive.content(data, directory, "data.pkl")
    if len(pickled) > MAX_PICKLED_BYTES:
        raise ValueError(f"its pickle takes more than {MAX_PICKLED_BYTES} bytes")
    return _of_archive(data, directory, outline_of(pickled, "archive"))


def _of_archive(data: bytes, directory: archive.Archive, said: dict[str, Any]) -> Outline:
    """What a pickle says, and the storages that are beside it in its archive."""
    order = "little"
    if f"{directory.folder}/byteorder" in directory.parts:
        order = bytes(archive.content(data, directory, "byteorder")[:7]).decode("ascii", "replace")
    if order not in ("little", "big"):
        raise ValueError(f"its byte order is {order!r}")
    declared = said["storages"]

    def stored(key: str) -> memoryview:
        found, needed = archive.content(data, directory, f"data/{key}"), _bytes_of(declared[key])
        if len(found) != needed:
            raise ValueError(f"storage {key[:100]!r} has {len(found)} bytes instead of {needed}")
        return found

    return Outline(said, stored, order != sys.byteorder, len(data))


def _exported(data: bytes, directory: archive.Archive) -> Outline:
    """What an archive of `torch.export` says in JSON of its weights, each in a part of its own."""
    config = archive.content(data, directory, _EXPORTED)
    if len(config) > _MAX_OUTLINE_BYTES or bytes(config).count(b",") > _MOST_COMMAS:
        raise ValueError(f"its list of weights takes more than {_MAX_OUTLINE_BYTES} bytes")
    try:
        entries = json.loads(bytes(config))["config"]
    except RecursionError as error:
        raise ValueError("its list of weights is nested too deep") from error
    if not isinstance(entries, dict) or len(entries) > _MOST_TENSORS:
        raise ValueError(f"its list of weights is none, or of more than {_MOST_TENSORS}")
    tensors: dict[str, int] = {}
    places: list[list[Any]] = []
    storages: dict[str, tuple[str, int]] = {}
    for name, entry in entries.items():
        key, about = str(entry["path_name"]), entry["tensor_meta"]
        kind = _OF_EXPORT.get(about["dtype"], f"number {about['dtype']!r:.20} of torch.export")
        sides, strides = (
            [int(each["as_int"]) for each in about[of]] for of in ("sizes", "strides")
        )
        part = archive.content(data, directory, f"{_WEIGHTS}/{key}")
        storages[key] = kind, len(part) // _kind(kind).itemsize
        tensors[name] = len(places)
        start = int(about["storage_offset"]["as_int"])
        pickled = [None, "pickled on its own"]
        places.append(
            pickled if entry.get("use_pickle") else [key, kind, 0, start, sides, strides, []]
        )
    said = {
        "root": "dict",
        "maps": [{"path": [], "inside": False, "tensors": tensors, "others": [], "empty": False}],
        "tensors": places,
        "storages": storages,
    }

    def stored(key: str) -> memoryview:
        return archive.content(data, directory, f"{_WEIGHTS}/{key}")

    return Outline(said, stored, sys.byteorder == "big", len(data))


def outline_of(pickled: memoryview, form: str) -> dict[str, Any]:
    """What `unpickling.read` says of these bytes, from a process that may take little.

    Raises:
        ValueError: it is no pickle, or took too much time or memory, or could not be started.
    """
    said, arrays = _said_of(pickled, form)
    outline: dict[str, Any] = json.loads(said)
    if "fault" in outline:
        raise ValueError(outline["fault"])
    begins = itertools.accumulate(outline.get("inline", {}).values(), initial=0)
    outline["inline"] = {
        key: memoryview(arrays)[begin : begin + length]
        for begin, (key, length) in zip(begins, outline.get("inline", {}).items(), strict=False)
    }
    return outline


def _said_of(pickled: memoryview, form: str) -> tuple[bytes, bytes]:
    """The outline as the other process wrote it, and the bytes of the arrays in it.

    Raises:
        ValueError: as for `outline_of`.
    """
    program = str(Path(__file__).with_name("unpickling.py"))
    command = [sys.executable, "-I", "-S", "-B", program, form, str(MAX_SECONDS), str(MAX_MEMORY)]
    pipe = subprocess.PIPE
    try:
        child = subprocess.Popen(  # noqa: S603 - our own program
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL
        )
    except OSError as error:
        raise ValueError(f"no process could be started to read it: {error.strerror}") from error
    assert child.stdin is not None  # noqa: S101 - both are pipes
    assert child.stdout is not None  # noqa: S101
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    watch = threading.Timer(MAX_WAIT, end)
    feeding = threading.Thread(target=_feed, args=(child.stdin, pickled), daemon=True)
    try:
        watch.start()
        feeding.start()
        said = child.stdout.readline(_MAX_OUTLINE_BYTES + 2)
        arrays = child.stdout.read(len(pickled) + 1)  # which were in it
        if len(said) > _MAX_OUTLINE_BYTES + 1 or len(arrays) > len(pickled):
            child.kill()
        child.wait()
    finally:
        watch.cancel()
        child.kill()
        child.wait()
        feeding.join()
        child.stdout.close()
    if late.is_set() or child.returncode == -getattr(signal, "SIGXCPU", 0):
        raise ValueError(f"its pickle takes more than {MAX_SECONDS} s to read")
    if child.returncode != 0 or not said.endswith(b"\n"):
        raise ValueError(f"reading its pickle ended with {child.returncode}")
    return said, arrays


def _feed(file: IO[bytes], data: memoryview) -> None:
    with suppress(OSError, ValueError):  # whoever reads may have left
        file.write(data)
    with suppress(OSError, ValueError):
        file.close()


def _legacy_storages(data: bytes, said: Mapping[str, Any]) -> Stored:
    """Of an old file: its storages follow the pickles, each after its count of numbers."""
    places, at = {}, said["end"]
    for key in said["keys"]:
        if key not in said["storages"] or key in places:
            raise ValueError(f"storage {key[:100]!r} is in it twice or is nobody's")
        needed = _bytes_of(said["storages"][key])
        count = int.from_bytes(data[at : at + 8], "little")
        if count != said["storages"][key][1] or at + 8 + needed > len(data):
            raise ValueError(f"storage {key[:100]!r} is cut short or not as large as it says")
        places[key] = memoryview(data)[at + 8 : at + 8 + needed]
        at += 8 + needed

    def stored(key: str) -> memoryview:
        if key not in places:
            raise ValueError(f"it has no storage {key[:100]!r}")
        return places[key]

    return stored


def _bytes_of(declared: tuple[str, int]) -> int:
    kind, count = declared
    return count * _kind(kind).itemsize


def _kind(name: str) -> np.dtype[Any]:
    """What the numbers of a storage are; those of quantised tensors are integers."""
    return DTYPES.get(_QUANTISED.get(name, name), np.dtype(np.uint8))


def _state_dict(said: Mapping[str, Any]) -> dict[str, int]:
    chosen = _chosen(said)
    if chosen is not None and chosen["tensors"] and not chosen["others"]:
        tensors: dict[str, int] = chosen["tensors"]
        return tensors
    if chosen is None:
        found = said["root"]
    else:
        found = "an empty dict" if chosen["empty"] else ", ".join(chosen["others"])
    raise ValueError(f"it holds {found}, but a state dict maps names to tensors")


def _chosen(said: Mapping[str, Any]) -> dict[str, Any] | None:
    """The dictionary that is the state dict, if any is."""
    maps = {tuple(found["path"]): found for found in said["maps"] if not found["inside"]}
    wrapped = [maps[name,] for name in _WRAPPERS if (name,) in maps]
    return wrapped[0] if len(wrapped) == 1 else maps.get(())


def _everything(said: Mapping[str, Any], whole: bool) -> dict[str, int]:
    chosen = None if whole else _chosen(said)
    names: dict[str, int] = {} if chosen is None else dict(chosen["tensors"])
    numbers = set(names.values())  # under two names a tensor would be two candidates
    for found in said["maps"]:
        for name, number in found["tensors"].items():
            if whole or number not in numbers:
                names.setdefault(".".join((*found["path"], name)), number)
                numbers.add(number)
    return names


def _tensors(names: Mapping[str, int], outline: Outline) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors, and those that cannot be had, by name, and why."""
    if len(names) > _MOST_TENSORS:
        raise ValueError(f"it has {len(names)} tensors, but at most {_MOST_TENSORS} are read")
    storages: dict[str, Array] = {}
    made: dict[int, Array] = {}
    copied = 0
    tensors, left_out = {}, {}
    for name, number in names.items():
        if number not in made:
            try:
                place = outline.said["tensors"][number]
                array = _array(place, outline, storages)
                if place[6] or len(place) > _PLAIN:
                    # One storage may be in a hundred thousand tensors, and each would be a copy.
                    copied += array.nbytes
                    if copied > outline.size:
                        raise ValueError("and others would take more memory than the file")
                made[number] = _changed(array, place, outline, storages)
            except ValueError as error:
                left_out[name] = f"{name[:100]!r} {error}"
                continue
        tensors[name] = made[number].view()
    return tensors, left_out


def _changed(array: Array, place: list[Any], outline: Outline, storages: dict[str, Array]) -> Array:
    """What the tensor is of these numbers: their conjugates, their negatives, or scaled."""
    array = array.conj() if "conj" in place[6] else array
    array = -array if "neg" in place[6] else array
    if len(place) == _PLAIN:
        return array
    scale, zero, axis = place[_PLAIN]
    if axis is not None:
        scale, zero = (_array(each, outline, storages) for each in (scale, zero))
    return dequantise(array, scale, zero, axis)


def _array(place: list[Any], outline: Outline, storages: dict[str, Array]) -> Array:
    if place[0] is None:
        raise ValueError(f"is {place[1]}; needed: a plain tensor, dense and with all its numbers")
    key, kind, start, offset, size, stride = place[: _PLAIN - 1]
    declared = outline.said["storages"][key][0]
    if kind not in DTYPES or _QUANTISED.get(declared, declared) not in DTYPES:
        raise ValueError(f"has numbers of kind {kind[:100]!r}; needed: one of {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if key not in storages:
        inline = outline.said.get("inline", {}).get(key)
        stored = outline.stored(key) if inline is None else inline
        swapped = outline.swapped and inline is None
        storages[key] = _storage(stored, _kind(declared), swapped)
    there = storages[key].size // dtype.itemsize
    # A few stored bytes may pose as any shape (stride 0); using such a tensor would expand it.
    last = sum((side - 1) * step for side, step in zip(size, stride, strict=False))
    if len(size) != len(stride) or len(size) > _MOST_AXES:
        raise ValueError(f"has {len(size)} sizes and {len(stride)} strides; at most {_MOST_AXES}")
    # A side of zero hides no other: PyTorch computes with all of them.
    largest = max(start + offset, *stride, math.prod(max(1, side) for side in size))
    if min(start, offset, *size, *stride) < 0 or largest > _LARGEST:
        raise ValueError("has a shape that no tensor can have")
    held = start + offset + last < there if all(size) else start + offset <= there
    if not held or math.prod(size) > there:
        raise ValueError(f"of shape {tuple(size)} does not hold all its numbers"[:300])
    flat = storages[key][: there * dtype.itemsize].view(dtype)
    steps = [step * dtype.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(flat[start + offset :], size, steps)


def _storage(stored: memoryview, dtype: np.dtype[Any], swapped: bool) -> Array:
    if not stored:
        return np.empty(0, np.uint8)
    raw = np.frombuffer(bytearray(stored), np.uint8)
    unit = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.ascontiguousarray(raw.reshape(-1, unit)[:, ::-1]).reshape(-1) if swapped else raw
