"""The program that reads a stranger's pickle: what its tensors are called and where they lie.

It runs by itself, with the standard library alone, within limits on memory and processor time:

    python -I -S files/pickles/unpickling.py FORM SECONDS BYTES < pickle > outline

with "archive", "legacy", "parts" or "distributed" for FORM.

Nothing that a pickle names is imported or called. Every global is a placeholder, but for the few
that say how a tensor lies in its storage, or an array in its bytes. The outline, a line of JSON,
has the dictionaries that hold tensors, by path, and of each tensor storage, offset, sizes and
strides. The bytes of arrays, which lie in the pickle itself, follow the line as they are.
"""

import io
import json
import math
import os
import pickle
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_OUTLINE_BYTES = 2**25
_MOST_TENSORS = 300_000  # of a network and its optimizer
_DEEPEST = 32
_MOST_OTHERS = 5
_LONGEST_LIST = 10_000
_PLAIN = (int, float, str, bytes, type(None))
_STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "Untyped": "uint8",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
}
_MOST_AXES = 8
_LARGEST = 2**48
_SIZES = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e5m2"), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
_ARRAYS = {"b1": "bool", "c8": "complex64", "c16": "complex128"} | {
    f"{letter}{size}": f"{word}{8 * size}"
    for letter, word, sizes in (("f", "float", "248"), ("i", "int", "1248"), ("u", "uint", "1248"))
    for size in map(int, sizes)
}
_NUMPY = ("numpy.core", "numpy._core")
_INTEGERS_OF = {"qint8": "int8", "quint8": "uint8", "qint32": "int32"}


class Inert:
    """What stands for anything that is no tensor, number, text or plain container.

    Attributes:
        state: the dictionary that it was given as its state, or None: a module's has its tensors.
    """

    said: ClassVar[str] = "object"
    state: Any
    __slots__ = ("state",)

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """Of whatever it is made, nothing is kept."""
        made = object.__new__(cls)
        made.state = None
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        """Nothing is kept."""

    def __call__(self, *_: Any) -> "Inert":
        """What a function gives that is none of ours."""
        return Inert()

    def __setstate__(self, state: Any) -> None:
        """Only a dictionary is kept, or that of two, as of classes with slots."""
        if type(state) is tuple and len(state) == 2:
            state = state[0]
        self.state = state if isinstance(state, dict) else None

    def append(self, item: Any) -> None:
        """What a list does."""

    def extend(self, items: Any) -> None:
        """What a list does."""

    def add(self, item: Any) -> None:
        """What a set does."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """What a dictionary does."""


class Mapping(dict):  # type: ignore[type-arg]
    """What stands for the dictionaries of `collections`."""

    said: ClassVar[str] = "dict"

    def __new__(cls, *_: Any) -> "Mapping":
        """Empty; a default's factory is not kept."""
        return dict.__new__(cls)

    def __init__(self, *args: Any) -> None:
        super().__init__()
        if args and isinstance(args[0], list | dict):  # as Python 2 wrote them
            self.update(args[0])

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""


class Storage:
    """Numbers in one piece: their name in the file, and from which to which they are meant."""

    __slots__ = ("count", "dtype", "key", "offset")

    def __init__(self, key: str, dtype: str, count: int, offset: int = 0) -> None:
        self.key, self.dtype, self.count, self.offset = key, dtype, count, offset

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes what a storage is")


class Tensor:
    """A tensor's place as it stands in JSON, or None and why it has none."""

    __slots__ = ("place",)

    def __init__(self, *place: Any) -> None:
        self.place = place

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes where a tensor lies")


class Numbers(Tensor):
    """An array of numpy's: as a tensor, whose storage are the bytes that the pickle has of it."""

    __slots__ = ("raw",)

    def __init__(self, *_: Any) -> None:
        super().__init__(None, "an array without numbers")
        self.raw: bytes | bytearray = b""

    def __setstate__(self, state: Any) -> None:
        """What numpy gives an array: version, shape, kind, whether columns come first, bytes."""
        match state:
            case (int(), tuple(shape), Kind() as kind, bool(turned), bytes() | bytearray() as raw):
                self._hold(raw, kind, shape, turned)
            case (int(), tuple(shape), Kind() as kind, bool(turned), str(text)):  # of Python 2
                self._hold(text.encode("utf-8", "surrogateescape"), kind, shape, turned)

    @classmethod
    def of_buffer(cls, raw: Any, kind: Any, shape: Any, order: Any, *_: Any) -> Tensor:
        """As protocol 5 has it."""
        made = cls()
        made.__setstate__((1, shape, kind, order == "F", raw))
        return made

    def _hold(self, raw: bytes | bytearray, kind: "Kind", shape: Any, turned: bool) -> None:
        sides = all(type(side) is int and 0 <= side < _LARGEST for side in shape)
        if self.raw or not kind.dtype or not sides or len(shape) > _MOST_AXES:
            return
        if math.prod(shape) * kind.size != len(raw):
            self.place = None, "an array that does not hold all its numbers"
            return
        self.raw, stride, step = kind.ordered(raw), [], 1
        for side in shape if turned else reversed(shape):
            stride.append(step)
            step *= max(1, side)
        strides = tuple(stride if turned else reversed(stride))
        self.place = None, kind.dtype, 0, 0, tuple(shape), strides, ""  # None: not numbered yet


class Kind:
    """What numbers an array has, as numpy says it: a letter and bytes, and in which order."""

    __slots__ = ("_swapped", "dtype", "size", "unit")

    def __init__(self, said: Any, *_: Any) -> None:
        name = said if isinstance(said, str) else _said(said).rpartition(".")[2]
        self._swapped = name[:1] == ">"
        name = _ARRAYS.get(name.lstrip("<>=|"), name)
        self.size = _SIZES.get(name, 0)
        self.dtype = name if self.size else ""
        self.unit = self.size // 2 if name.startswith("complex") else self.size

    def __setstate__(self, state: Any) -> None:
        """Of what numpy tells it only the order of bytes is kept."""
        match state:
            case (int(), str(order), *_):
                self._swapped = order == ">"

    def ordered(self, raw: bytes | bytearray) -> bytes | bytearray:
        """The bytes in this machine's order."""
        if self._swapped is (sys.byteorder == "big") or self.unit == 1:
            return raw
        swapped = array({2: "H", 4: "I", 8: "Q"}[self.unit], bytes(raw))
        swapped.byteswap()
        return swapped.tobytes()


def _encoded(text: Any, encoding: Any) -> Any:
    """Bytes, as protocols before 3 write them."""
    return text.encode("latin-1") if isinstance(text, str) and encoding == "latin1" else Inert()


def _no_bytes(*args: Any) -> Any:
    """No bytes at all, as protocols before 3 write them."""
    return Inert() if args else b""


class _Maker:
    """A function that a pickle may call; nothing of it can be set."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes how tensors are made")


def _tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
) -> Tensor:
    return _laid(storage, "", offset, size, stride, metadata)


def _typed_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    return _laid(storage, _said(dtype).removeprefix("torch."), offset, size, stride, metadata)


def _laid(storage: Any, dtype: str, offset: Any, size: Any, stride: Any, metadata: Any) -> Tensor:
    if not isinstance(storage, Storage):
        return Tensor(None, "a tensor without a storage")
    numbers = (offset, *size, *stride) if type(size) is type(stride) is tuple else (None,)
    if not all(type(number) is int and number >= 0 for number in numbers):
        return Tensor(None, "a tensor whose place is no numbers")
    flags = ",".join(
        flag for flag in ("conj", "neg") if isinstance(metadata, dict) and metadata.get(flag)
    )
    kind = dtype or storage.dtype
    return Tensor(storage.key, kind, storage.offset, offset, size, stride, flags)


def _quantised(storage: Any, offset: Any, size: Any, stride: Any, how: Any, *_: Any) -> Tensor:
    """One of integers with a scale and a zero point, for all or for each place of an axis."""
    made = _laid(storage, "", offset, size, stride, None)
    match how:
        case (_, float(scale), int(zero)):
            return _scaled(made, scale, zero, None)
        case (_, Tensor() as scales, Tensor() as zeros, int(axis)) if 0 <= axis < len(size):
            return _scaled(made, scales.place, zeros.place, axis)
    return Tensor(None, "a quantised tensor of an unknown kind")


def _scaled(made: Tensor, scale: Any, zero: Any, axis: int | None) -> Tensor:
    place = made.place
    if place[0] is None or place[1] not in _INTEGERS_OF:
        return made if place[0] is None else Tensor(None, f"a quantised tensor of {place[1]}")
    key, kind, *rest = place
    return Tensor(key, _INTEGERS_OF[kind], *rest, [scale, zero, axis])


def _parameter(data: Any, *_: Any) -> Any:
    return data if isinstance(data, Tensor) else Inert()


def _of_type(make: Any, kind: Any, args: Any, _state: Any = None) -> Any:
    made = make(*args) if callable(make) and type(args) is tuple else None
    if not isinstance(made, Tensor):
        return Tensor(None, "a tensor of an unknown kind")
    if _said(kind) in ("torch._tensor.Tensor", "torch.Tensor", "torch.nn.parameter.Parameter"):
        return made
    return Tensor(None, f"a {_said(kind)[:100]}")


def _size(sides: Any) -> Any:
    return tuple(sides) if type(sides) in (list, tuple) else Inert()


def _strange(what: str) -> Callable[..., Tensor]:
    return lambda *_: Tensor(None, what)


_MAKERS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _tensor,
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _typed_tensor,
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
    "_rebuild_qtensor": _quantised,
    "_rebuild_sparse_tensor": _strange("a sparse tensor"),
    "_rebuild_sparse_csr_tensor": _strange("a sparse tensor"),
    "_rebuild_nested_tensor": _strange("a nested tensor"),
    "_rebuild_meta_tensor_no_storage": _strange("a meta tensor, which has no numbers,"),
    "_rebuild_wrapper_subclass": _strange("a wrapper of a tensor"),
    "_rebuild_device_tensor_from_numpy": _strange("a tensor of another device"),
    "_rebuild_device_tensor_from_cpu_tensor": _strange("a tensor of another device"),
}
_OTHER_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("numpy", "dtype"): Kind,
    ("_codecs", "encode"): _encoded,
    **{(module, "bytes"): _no_bytes for module in ("__builtin__", "builtins")},
    **{(f"{numpy}.multiarray", "_reconstruct"): Numbers for numpy in _NUMPY},
    **{(f"{numpy}.numeric", "_frombuffer"): Numbers.of_buffer for numpy in _NUMPY},
}
_MAPPINGS = ("OrderedDict", "defaultdict", "Counter")


class Outliner(pickle.Unpickler):
    """An unpickler that can make nothing but plain values, placeholders and places of tensors."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.storages: dict[str, Storage] = {}
        self._views: dict[str, Storage] = {}
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global; the same for the same name."""
        if (module, name) not in self._known:
            self._known[module, name] = _stand_in(module, name)
        return self._known[module, name]

    def persistent_load(self, saved: Any) -> Any:
        """The storage that torch wrote beside the pickle, or the module that it wrapped."""
        match saved:
            case ("module", inner, *_):
                return inner
            case ("storage", kind, str(key), _, int(count), *view) if (
                count >= 0 and key.isprintable()
            ):
                # The first to name a storage says what it holds: so it is for torch.
                whole = self.storages.setdefault(key, Storage(key, _dtype(kind), count))
                return self._view(whole, *view) if view else whole
        raise pickle.UnpicklingError("it names a storage in an unknown way")

    def _view(self, whole: Storage, view: Any) -> Storage:
        match view:
            case None:
                return whole
            case (str(key), int(offset), int(count)) if offset >= 0:
                part = Storage(whole.key, whole.dtype, count, offset)
                return self._views.setdefault(key, part)
        raise pickle.UnpicklingError("it names a storage in an unknown way")


def _stand_in(module: str, name: str) -> Any:
    if module in ("torch._utils", "torch._tensor", "torch.tensor"):
        if name == "_rebuild_from_type_v2":
            return _Maker(_of_type)
        if name in _MAKERS:
            return _Maker(_MAKERS[name])
    if (module, name) in _OTHER_MAKERS:
        return _Maker(_OTHER_MAKERS[module, name])
    if module == "collections" and name in _MAPPINGS:
        return type("Mapping", (Mapping,), {"said": name})
    return type("Inert", (Inert,), {"said": f"{module}.{name}"[:200], "__slots__": ()})


def _said(value: Any) -> str:
    """What a value is called: the class that it stands for, or its own."""
    said = getattr(value, "said", None)
    return said if isinstance(said, str) else type(value).__name__


def _dtype(kind: Any) -> str:
    name = _said(kind).rpartition(".")[2].removesuffix("Storage")
    return _STORAGES.get(name, _said(kind)[:100])


def read(file: io.BytesIO, form: str) -> tuple[dict[str, Any], list[bytes | bytearray]]:
    """The outline of a pickle ("archive") or of the five that an old file begins with ("legacy").

    Of many ("parts"), each of one tensor and behind its length in eight bytes, the outline of each;
    of what `torch.distributed.checkpoint` says of a folder ("distributed"), where its pieces lie.

    Returns:
        It, and the bytes of the arrays in it, which "inline" names in this order.

    Raises:
        Exception: of whatever kind, if it is none.
    """
    if form == "parts":
        return {"parts": [_alone(part) for part in _parts_of(file)]}, []
    if form == "distributed":
        return _distributed(Outliner(file).load()), []
    keys: Any = []
    outliner = Outliner(file)
    root = outliner.load()
    if form == "legacy" and root == LEGACY_MAGIC:
        outliner, root, keys = _after_magic(file)
    tensors: dict[int, int] = {}
    places: list[tuple[Any, ...]] = []
    inline: dict[str, bytes | bytearray] = {}
    storages = {each.key: [each.dtype, each.count] for each in outliner.storages.values()}

    def number(tensor: Tensor) -> int:
        if id(tensor) not in tensors:
            if len(places) == _MOST_TENSORS:
                raise ValueError(f"it holds more than {_MOST_TENSORS} tensors")
            tensors[id(tensor)] = len(places)
            if isinstance(tensor, Numbers) and len(tensor.place) > 2:
                key, kind = f"\0{len(inline)}", tensor.place[1]
                inline[key] = tensor.raw
                storages[key] = [kind, len(tensor.raw) // _SIZES[kind]]
                tensor.place = key, *tensor.place[1:]
            places.append(tensor.place)
        return tensors[id(tensor)]

    said = {
        "root": _kind(root),
        "maps": [_map(found, number) for found in _dictionaries(root)],
        "tensors": places,
        "storages": storages,
        "keys": keys,
        "end": file.tell(),
        "inline": {key: len(raw) for key, raw in inline.items()},
    }
    return said, [*inline.values()]


def _after_magic(file: io.BytesIO) -> tuple[Outliner, Any, list[str]]:
    """What an old file of `torch.save` holds behind its first number, and its storages' names."""
    Outliner(file).load()
    about = Outliner(file).load()
    if not isinstance(about, dict) or about.get("little_endian", True) is not True:
        raise ValueError("it was written by a machine of another byte order")
    outliner = Outliner(file)
    root = outliner.load()
    keys = Outliner(file).load()
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("its storages have no names")
    return outliner, root, keys


def _parts_of(file: io.BytesIO) -> Iterator[io.BytesIO]:
    while length := file.read(8):
        yield io.BytesIO(file.read(int.from_bytes(length, "little")))


def _alone(part: io.BytesIO) -> dict[str, Any]:
    """The outline of a pickle that is one tensor and nothing else."""
    outliner = Outliner(part)
    root = outliner.load()
    if not isinstance(root, Tensor):
        root = Tensor(None, f"a {_kind(root)}")
    return {
        "tensors": [root.place],
        "storages": {each.key: [each.dtype, each.count] for each in outliner.storages.values()},
    }


def _distributed(root: Any) -> dict[str, Any]:
    """By name, the sizes of each tensor, and of its pieces file, first byte, length and place."""
    about = _state(root)
    if _kind(root) != "Metadata" or not isinstance(about.get("state_dict_metadata"), dict):
        raise ValueError(f"it is a {_kind(root)}, and no metadata of a checkpoint")
    tensors: dict[str, dict[str, Any]] = {}
    shapes: dict[tuple[str, Any], Any] = {}
    for name, said in about["state_dict_metadata"].items():
        if type(name) is str and type(chunks := _state(said).get("chunks")) is list:
            tensors[name] = {"size": _state(said)["size"], "pieces": []}
            for each in map(_state, chunks):
                shapes[name, each["offsets"]] = each["sizes"]
    if len(shapes) > _MOST_TENSORS:
        raise ValueError(f"it holds more than {_MOST_TENSORS} pieces of tensors")
    for which, where in about["storage_data"].items():
        place = _state(which)
        at = place.get("fqn"), place.get("offset")
        if at in shapes:
            held = _state(where)
            packed = held.get("transform_descriptors") is not None
            stored = held["relative_path"], held["offset"], held["length"], packed
            tensors[at[0]]["pieces"].append([*stored, at[1], shapes.pop(at)])
    return {"tensors": tensors}


def _state(value: Any) -> dict[str, Any]:
    """What an object was given as its state, if that is a dictionary."""
    state = value.state if isinstance(value, Inert) else None
    return state if isinstance(state, dict) else {}


class _Found(NamedTuple):
    """A dictionary, the names that lead to it, and whether an object or a list is on the way."""

    path: list[str]
    content: dict[Any, Any]
    inside: bool


def _dictionaries(root: Any) -> Iterator[_Found]:
    """Every dictionary with a tensor, and those at the top; each once, the nearest first.

    Objects are what they were given as state; of a module that is its parameters, its buffers and
    its modules, under no names of their own. Lists and tuples are dictionaries of their places.
    """
    seen, waiting = {id(root)}, deque[_Found]()
    if (top := _within(root)) is not None:
        waiting.append(_Found([], top, inside=not isinstance(root, dict)))
    while waiting:
        found = waiting.popleft()
        if len(found.path) < 2 or any(
            isinstance(value, Tensor) for value in found.content.values()
        ):
            yield found
        if len(found.path) == _DEEPEST:
            continue
        for name, value in found.content.items():
            inner = _within(value)
            if inner is None or type(name) not in (str, int) or id(value) in seen:
                continue
            seen.add(id(value))
            path = found.path if name in _PARTS else [*found.path, str(name)]
            waiting.append(_Found(path, inner, found.inside or not isinstance(value, dict)))


_PARTS = ("_parameters", "_buffers", "_modules")


def _within(value: Any) -> dict[Any, Any] | None:
    """What may hold tensors in turn, as a dictionary; None of all else."""
    if isinstance(value, Inert):
        return value.state if isinstance(value.state, dict) else None
    if isinstance(value, list | tuple):
        return dict(enumerate(value)) if len(value) <= _LONGEST_LIST else None
    return value if isinstance(value, dict) else None


def _map(found: _Found, number: Callable[[Tensor], int]) -> dict[str, Any]:
    content = found.content
    named = {k: v for k, v in content.items() if type(k) is str and isinstance(v, Tensor)}
    # A number or a text beside tensors is no network; anything else might hold one.
    beside = (Tensor, *_PLAIN) if named else Tensor
    others = {
        f"{_kind(name)} → {_kind(value)}"
        for name, value in content.items()
        if type(name) is not str or not isinstance(value, beside)
    }
    return {
        "path": found.path,
        "inside": found.inside,
        "tensors": {name: number(tensor) for name, tensor in named.items()},
        "others": sorted(others)[:_MOST_OTHERS],
        "empty": not content,
    }


def _kind(value: Any) -> str:
    if isinstance(value, _Maker):
        return "function"
    if isinstance(value, type):
        return f"class {_said(value)}"
    return _said(value).rpartition(".")[2]


def limit(seconds: int, memory: int) -> None:
    """Bound what this process may take, as far as the system can."""
    try:
        import resource  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        return
    for kind, most, beyond in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_CPU, seconds, 1),  # the signal of the first limit says why
        (resource.RLIMIT_AS, memory, 0),
    ):
        _, hard = resource.getrlimit(kind)
        with suppress(ValueError, OSError):
            end = most + beyond if hard == resource.RLIM_INFINITY else min(most + beyond, hard)
            resource.setrlimit(kind, (min(most, end), end))


def main(form: str, seconds: str, memory: str) -> None:
    """Read stdin, write the outline or why there is none, and leave without tidying up."""
    limit(int(seconds), int(memory))
    arrays: list[bytes | bytearray] = []
    try:
        file = io.BytesIO(sys.stdin.buffer.read())
        outline, arrays = read(file, form)
        said = json.dumps(outline).encode("ascii")
        if len(said) > MAX_OUTLINE_BYTES:
            raise ValueError(f"its outline takes {len(said)} bytes")
    except MemoryError:
        said, arrays = (
            b'{"fault": "reading it takes more than %d bytes of memory"}' % int(memory),
            [],
        )
    except Exception as error:
        arrays = []
        said = json.dumps({"fault": str(error)[:300] or type(error).__name__}).encode()
    sys.stdout.buffer.write(said + b"\n")
    for raw in arrays:
        sys.stdout.buffer.write(raw)
    sys.stdout.buffer.flush()
    os._exit(0)  # taking a deep structure apart could end in a crash


if __name__ == "__main__":
    main(*sys.argv[1:])
