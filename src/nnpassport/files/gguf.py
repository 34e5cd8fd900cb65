"""GGUF, as llama.cpp writes it, from anybody: a header, and tensors whose numbers come in blocks.

F32, F16, BF16, F64 and integers are the numbers themselves; what blocks of Q2_K to Q8_0 stand for
is in `gguf_blocks`. Other kinds are not read, and say so. No size is believed before it is compared
with the file.                      [github.com/ggml-org/ggml/blob/master/docs/gguf.md]

Of Llama's architecture the rows of queries and keys lie in pairs (2i, 2i + 1) where the hub's have
(i, i + d/2) in each head of d rows; they are put back.   [conversion of llama.cpp: `permute`]
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from nnpassport.files.arrays import BFLOAT16, MAX_MODEL_BYTES, Array
from nnpassport.files.disk import brief, is_text
from nnpassport.files.gguf_blocks import FORMS
from nnpassport.scheme import UnreadableModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_TENSORS = 100_000
_MOST_VALUES = 5_000_000  # of all that is said about the network: vocabularies are long
_MOST_AXES = 8
_LARGEST_ALIGNMENT = 2**20
_ALIGNMENT = "general.alignment"
_TEXT, _LIST = 8, 9
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_PLAIN: Mapping[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    24: np.dtype("i1"),
    25: np.dtype("<i2"),
    26: np.dtype("<i4"),
    27: np.dtype("<i8"),
    28: np.dtype("<f8"),
}
_BFLOAT16 = 30


class _Place(NamedTuple):
    shape: tuple[int, ...]
    kind: int
    offset: int


def read_gguf(data: bytes, path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors in the bytes of a file, and those of kinds that are not read, by name, and why.

    Raises:
        UnreadableModelError: damaged, hostile, too large, or without a tensor.
    """
    try:
        header = _Header(data)
        places, begin = header.read()
        if not places:
            raise ValueError("it holds no tensor")
        total = sum(4 * math.prod(each.shape) for each in places.values())
        if total > MAX_MODEL_BYTES:
            raise ValueError(f"its numbers take {total} bytes, and at most {MAX_MODEL_BYTES} fit")
        arrays, left_out = {}, {}
        for name, place in places.items():
            if place.kind in _PLAIN or place.kind in FORMS or place.kind == _BFLOAT16:
                arrays[name] = _in_halves(_array(data, begin, place), name, header.numbers)
            else:
                kinds = "F32, F16, BF16 and " + ", ".join(each.name for each in FORMS.values())
                left_out[name] = f"{name[:100]!r} is of GGUF's kind {place.kind}; read are {kinds}"
    except (ValueError, struct.error, OverflowError) as error:
        raise UnreadableModelError(
            f"{path} is no sound GGUF file ({brief(error)}); needed: a complete file as llama.cpp "
            "writes it; copy it again"
        ) from error
    return arrays, left_out


@final
class _Header:
    """Goes through what comes before the numbers."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at, self._left = data, len(MAGIC), _MOST_VALUES
        self.numbers: dict[str, int] = {}  # facts that are whole numbers

    def read(self) -> tuple[dict[str, _Place], int]:
        """Where each tensor is, from the place at which tensors begin."""
        version, tensors, facts = self._take("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; read are {' and '.join(map(str, _VERSIONS))}")
        if tensors > _MOST_TENSORS or facts > _MOST_TENSORS:
            raise ValueError(f"{tensors} tensors and {facts} facts; at most {_MOST_TENSORS} each")
        for _ in range(facts):
            name = self._text()
            (kind,) = self._take("<I")
            if isinstance(value := self._value(kind), int):
                self.numbers[name] = value
        alignment = self.numbers.get(_ALIGNMENT, 32)
        if not 0 < alignment <= _LARGEST_ALIGNMENT:
            raise ValueError(f"an alignment of {alignment}")
        places: dict[str, _Place] = {}
        for _ in range(tensors):
            name = self._text()
            (axes,) = self._take("<I")
            if name in places or not is_text(name) or axes > _MOST_AXES:
                raise ValueError(f"{ascii(name)[:100]} is there twice, no name, or of {axes} axes")
            sides = self._take(f"<{axes}Q")
            kind, offset = self._take("<IQ")
            places[name] = _Place(tuple(reversed(sides)), kind, offset)
        return places, -(-self._at // alignment) * alignment

    def _take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        found = struct.unpack_from(form, self._data, self._at)
        self._at += size
        return found

    def _text(self) -> str:
        (size,) = self._take("<Q")
        if size > len(self._data) - self._at:
            raise ValueError("a text leaves the file")
        self._at += size
        return self._data[self._at - size : self._at].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        """A number; texts and lists are passed over."""
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"more than {_MOST_VALUES} facts")
        if kind in _SCALARS:
            return self._take(f"<{_SCALARS[kind]}")[0]
        if kind == _TEXT:
            self._text()
            return None
        if kind != _LIST:
            raise ValueError(f"a fact of kind {kind}")
        inner, count = self._take("<IQ")
        if inner in _SCALARS:
            size = count * struct.calcsize(f"<{_SCALARS[inner]}")
            if size > len(self._data) - self._at:
                raise ValueError("a list leaves the file")
            self._at += size
        elif inner == _TEXT:
            for _ in range(count):
                self._value(inner)
        else:
            raise ValueError("a list of lists")
        return None


def _in_halves(array: Array, name: str, numbers: Mapping[str, int]) -> Array:
    """The rows of a head's queries or keys as the hub has them, if this is such a matrix."""
    of = {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(name.split(".")[-2:][0], "")
    heads = numbers.get(f"llama.attention.{of}", 0)
    if heads < 1 or array.ndim > 2 or not len(array) or len(array) % (2 * heads):
        return array
    pairs = array.reshape(heads, len(array) // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _array(data: bytes, begin: int, place: _Place) -> Array:
    count = math.prod(place.shape)
    form = FORMS.get(place.kind)
    dtype = np.dtype("<u2") if place.kind == _BFLOAT16 else _PLAIN.get(place.kind)
    if form is not None:
        if not place.shape or place.shape[-1] % form.numbers:
            raise ValueError(f"rows of {place.shape[-1:]} numbers in blocks of {form.numbers}")
        size = count // form.numbers * form.size
    else:
        size = count * dtype.itemsize if dtype is not None else 0
    start = begin + place.offset
    if start + size > len(data):
        raise ValueError(f"a tensor of shape {place.shape} leaves the file")
    raw = np.frombuffer(data, np.uint8, size, start)
    if form is not None:
        with np.errstate(all="ignore"):
            return form.read(raw.reshape(-1, form.size)).reshape(place.shape)
    assert dtype is not None  # noqa: S101 - the caller has looked
    numbers = np.frombuffer(raw.tobytes(), dtype).astype(dtype.newbyteorder("="))
    return (numbers.view(BFLOAT16) if place.kind == _BFLOAT16 else numbers).reshape(place.shape)
