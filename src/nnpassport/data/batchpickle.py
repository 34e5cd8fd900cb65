"""The pickles of CIFAR's Python version, read by walking through their instructions.

A pickle is a program for a stack machine. Here nothing of it runs: plain values and containers are
put together, a call of numpy's is noted down as what it was called with, and any other instruction
ends the reading. Memory is a few times the file's size, and no global is ever looked up.
"""

import operator
import pickletools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import numpy as np

from nnpassport.files.disk import brief
from nnpassport.scheme import UnreadableDataError

_MOST_STEPS = 20_000_000  # CIFAR-100 for training has less than half a million

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


@final
class _Global(NamedTuple):
    """A name that the pickle means to import."""

    module: str
    name: str


@final
class _Call:
    """A call that is not made: of what, with what, and what it would be told afterwards."""

    def __init__(self, called: Any, arguments: Any) -> None:
        self.called, self.arguments = called, arguments
        self.state: Any = None


def batch(content: bytes, name: str) -> dict[str, Any]:
    """The dictionary in a pickle: texts, whole numbers, lists of them, and arrays of uint8.

    Raises:
        UnreadableDataError: it is damaged, or holds something else.
    """
    try:
        found = _Walk().over(content)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not a dictionary")
        return {_text(key): _value(value) for key, value in found.items()}
    # pickletools raises what it likes on damaged files.
    except Exception as error:
        raise UnreadableDataError(
            f"{name} cannot be read as a pickle of CIFAR's Python version ({brief(error)}); "
            "needed: the file as its authors give it; fetch it again"
        ) from error


@final
class _Walk:
    """The stack machine, with what it cannot do left out."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def over(self, content: bytes) -> Any:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if step > _MOST_STEPS:
                raise ValueError(f"it takes more than {_MOST_STEPS} steps")
            if opcode.name == "STOP":
                return self.stack.pop()
            self._do(opcode.name, argument)
        raise ValueError("it has no end")

    def _do(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self.stack.append(_LITERALS[name](argument))
        elif name in _DEEDS:
            _DEEDS[name](self, argument)
        else:
            raise ValueError(f"it has the instruction {name}, which no such file needs")

    def taken(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        above, self.stack = self.stack, self.marks.pop()
        return above

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def memoize(self, number: int | None) -> None:
        self.memo[len(self.memo) if number is None else int(number)] = self.stack[-1]

    def recall(self, number: int) -> None:
        self.stack.append(self.memo[int(number)])

    def tuple_of(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def extend(self, items: list[Any]) -> None:
        _of(list, self.stack[-1]).extend(items)

    def update(self, items: list[Any]) -> None:
        keys = [_text(key) for key in items[::2]]
        _of(dict, self.stack[-1]).update(zip(keys, items[1::2], strict=True))

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_Global(module, name))

    def name_on_stack(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_Global(_text(module), _text(name)))

    def call(self, _: Any) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.stack.append(_Call(called, _of(tuple, arguments)))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        _of(_Call, self.stack[-1]).state = state


_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LATIN = operator.methodcaller("encode", "latin-1")  # Python 2's texts are bytes
_LITERALS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"), lambda n: n),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _LATIN),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), bytes),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), str),
}
_DEEDS: dict[str, Callable[[_Walk, Any], None]] = {
    "MARK": _Walk.mark,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Walk.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Walk.recall),
    "TUPLE1": lambda walk, _: walk.tuple_of(1),
    "TUPLE2": lambda walk, _: walk.tuple_of(2),
    "TUPLE3": lambda walk, _: walk.tuple_of(3),
    "TUPLE": lambda walk, _: _then(walk, tuple),
    "LIST": lambda walk, _: _then(walk, list),
    "DICT": lambda walk, _: _dictionary(walk),
    "APPEND": lambda walk, _: walk.extend([walk.stack.pop()]),
    "APPENDS": lambda walk, _: walk.extend(walk.taken()),
    "SETITEM": lambda walk, _: walk.update([walk.stack.pop(-2), walk.stack.pop()]),
    "SETITEMS": lambda walk, _: walk.update(walk.taken()),
    "GLOBAL": _Walk.name,
    "STACK_GLOBAL": _Walk.name_on_stack,
    "REDUCE": _Walk.call,
    "BUILD": _Walk.build,
}


def _then(walk: _Walk, make: Callable[[list[Any]], Any]) -> None:
    made = make(walk.taken())
    walk.stack.append(made)


def _dictionary(walk: _Walk) -> None:
    items = walk.taken()
    walk.stack.append({})
    walk.update(items)


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} is where a {kind.__name__} belongs")
    return value


def _value(value: Any) -> Any:
    if isinstance(value, _Call):
        return _array(value)
    if isinstance(value, list):
        return [_said(each) for each in value]
    return _said(value)


def _said(value: Any) -> Any:
    return _text(value) if isinstance(value, bytes | str | _Call) else value


def _text(value: Any) -> str:
    if isinstance(value, _Call):  # bytes as Python 3 writes them for Python 2
        value = _bytes(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(_of(str, value))


def _bytes(value: Any) -> bytes:
    if isinstance(value, _Call) and value.called == _Global("_codecs", "encode"):
        return str(_of(str, value.arguments[0])).encode("latin-1")
    return bytes(_of(bytes, value))


def _array(call: _Call) -> Any:
    """The array that numpy would make: of uint8, in the usual order; other calls are texts."""
    called = _of(_Global, call.called)
    if called == _Global("_codecs", "encode"):
        return _text(call)
    if called.module.split(".")[0] != "numpy":
        raise ValueError(f"it calls {called.module}.{called.name}"[:80])
    if called.name == "_frombuffer":
        data, dtype, shape, order = call.arguments
        fortran = order == "F"
    elif called.name == "_reconstruct":
        _, shape, dtype, fortran, data = call.state
    else:
        raise ValueError(f"it calls {called.module}.{called.name}"[:80])
    kind = _text(_of(tuple, _of(_Call, dtype).arguments)[0])
    if kind not in {"u1", "|u1"}:
        raise ValueError(f"an array is of {kind[:20]}, not of bytes")
    sides = tuple(int(_of(int, side)) for side in _of(tuple, shape))
    flat = np.frombuffer(_bytes(data), np.uint8)
    return flat.reshape(sides, order="F" if fortran else "C")


def rows(found: dict[str, Any], labels: str, name: str) -> Iterator[Bytes]:
    """The classes (n, 1) and the pixels (n, 3072) of a batch.

    Raises:
        UnreadableDataError: they are not there, or do not belong together.
    """
    pixels, stored = found.get("data"), found.get(labels)
    classes = stored if isinstance(stored, list) else [None]
    whole = all(type(n) is int and 0 <= n < 2**8 for n in classes)
    if not whole or not isinstance(pixels, np.ndarray) or pixels.shape != (len(classes), 3072):
        raise UnreadableDataError(
            f"{name} has {', '.join(map(repr, found))[:80] or 'nothing'}; needed: 'data', an array "
            f"of 3072 bytes a picture, and {labels!r}, a class for each"
        )
    yield np.array(classes, np.uint8)[:, None]
    yield pixels
