"""Integers back to weights: what tools that quantise write beside them, and how it is undone.

A file of 8- or 4-bit integers under the layers' own names says elsewhere what they stand for: a
scale and a zero point in a neighbour. Which tool wrote it can be told from the neighbours' names:

    W = (q − zero) · scale      compressed-tensors, NNCF, quanto, torchao, plain exporters
    W = q · SCB / 127           bitsandbytes, 8 bits
    W = q · scale               8-bit floats: llm-compressor, vLLM; with a block's inverse: DeepSeek
    W = table[q] · absmax       bitsandbytes, NF4 and FP4, in blocks
    W = (q − zero) · scale      GPTQ and AWQ, eight 4-bit integers in one of 32 bits, in groups

Integers without any of these are no weights, and 8-bit floats are what they say. A scale may be
one number, one for each row, one for each block of a row, or one for each square block.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from nnpassport.files.arrays import DTYPES, MAX_MODEL_BYTES, Array, Described
from nnpassport.scheme import UnreadableModelError

_FLOAT8 = {DTYPES[name] for name in DTYPES if name.startswith("float8")}
_NARROW = {np.dtype(np.int8), np.dtype(np.uint8), np.dtype(np.int16), *_FLOAT8}
_SCALES = ("{}_scale", "{}._scale", "{}.scale", "{}_scales", "{}.scales")
_INVERSE = "{}_scale_inv"
_ZEROS = ("{}_zero_point", "{}._zero_point", "{}.zero_point", "{}_zero", "{}.zero")
_DATA = ("._data", ".int_data", ".tensor_impl.data", ".tensor_impl.int_data", ".qdata")
_HOOKS = "__nncf_hooks."
_BITS, _EACH = 4, 8
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
_PACKED = (".qweight", "weight_packed")
_BLOCK = 16  # numbers, or a multiple of it, that have one scale where they do not divide a side
_AXES = 2  # of a weight, or more


class Restored(NamedTuple):
    """Arrays by name, those that were integers as the weights that they stand for.

    Attributes:
        layouts: by name, how they were written.
        unknown: by name, why integers of a layer's shape could not be restored.
    """

    arrays: dict[str, Array]
    layouts: dict[str, str]
    unknown: dict[str, str]


def is_quantised(described: Mapping[str, Array | Described]) -> bool:
    """Whether a file with such tensors may hold weights as integers or as 8-bit floats."""
    return any(
        name.endswith(_PACKED) or (_is_weight(name) and each.ndim > 1 and each.dtype in _NARROW)
        for name, each in described.items()
    )


def _is_weight(name: str) -> bool:
    return name.endswith(("weight", *_DATA))


def dequantise(array: Array, scale: Any, zero: Any = None, axis: int | None = None) -> Array:
    """(q − zero) · scale in float32, in the shape of q; both for all, or for places of `axis`.

    Raises:
        ValueError: they do not fit q, or are not finite.
    """
    if axis is not None:
        place = [1] * array.ndim
        place[axis] = -1
        scale, zero = (np.asarray(each, np.float64).reshape(place) for each in (scale, zero))
        if scale.size != array.shape[axis]:
            raise ValueError(f"it has {scale.size} scales for {array.shape[axis]} places")
    with np.errstate(all="ignore"):
        found = array.astype(np.float32)
        if zero is not None:
            found -= np.asarray(zero, np.float32)
        found *= np.asarray(scale, np.float32)
    if not np.isfinite(found).all():
        raise ValueError("it has a scale or a zero point that is not finite")
    return found


def restored(arrays: Mapping[str, Array]) -> Restored:
    """The same, with weights in place of integers wherever their layout is known.

    Scales and zero points stay beside them: they are small, and no layer has their shapes.

    Raises:
        UnreadableModelError: the weights would take more than `MAX_MODEL_BYTES`.
    """
    found = Restored(dict(arrays), {}, {})
    size = 0
    for name, array in arrays.items():
        for layout, target, make in _ways(name, array, arrays):
            size += 4 * _count(array, arrays, name)
            if size > MAX_MODEL_BYTES:
                raise UnreadableModelError(
                    f"what its integers stand for takes more than {MAX_MODEL_BYTES} bytes as "
                    "float32; needed: a smaller network, or one that is not quantised"
                )
            try:
                weight = make()
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                found.unknown[name] = f"{name!r} is written as {layout} does, but {error}"
                continue
            del found.arrays[name]
            found.arrays[target] = weight
            found.layouts[target] = layout
            found.unknown.pop(name, None)
            break
        else:
            if name not in found.unknown and _is_unsaid(name, array):
                found.unknown[name] = (
                    f"{name!r} holds {array.dtype.name} numbers, and nothing beside it says in a "
                    "known way which weights they stand for"
                )
    return found


def _is_unsaid(name: str, array: Array) -> bool:
    return array.ndim > 1 and array.dtype in _NARROW and _is_weight(name)


def _count(array: Array, arrays: Mapping[str, Array], name: str) -> int:
    """How many numbers the integers stand for."""
    packed = array.dtype == np.int32 or f"{name}.absmax" in arrays
    return array.size * (_EACH if packed else 1)


def _ways(name: str, array: Array, arrays: Mapping[str, Array]) -> Iterator[tuple[str, str, Any]]:
    """Layouts that a tensor may be in: who writes so, the weight's name, and what restores it."""
    if name.endswith(".qweight") and array.dtype == np.int32:
        yield from _in_words(name.removesuffix("qweight"), array, arrays)
    if name.endswith("weight_packed") and array.dtype == np.int32:
        base = name.removesuffix("_packed")
        yield "compressed-tensors", base, lambda: _compressed(array, base, arrays)
    if array.dtype not in _NARROW or array.ndim < _AXES:
        return
    if f"{name}.absmax" in arrays:
        yield "bitsandbytes, 4 bits", name, lambda: _by_table(array, name, arrays)
        return
    base = next((name.removesuffix(end) for end in _DATA if name.endswith(end)), name)
    owner = base.removesuffix("weight")
    if base.endswith("weight") and f"{owner}SCB" in arrays:
        rows = arrays[f"{owner}SCB"].astype(np.float64) / 127
        yield "bitsandbytes, 8 bits", base, lambda: _scaled(array, rows, None)
    if (inverse := arrays.get(_INVERSE.format(base))) is not None:
        yield "DeepSeek, 8-bit floats", base, lambda: _scaled(array, inverse, None)
    scale, zero = _beside(base, arrays, _SCALES), _beside(base, arrays, _ZEROS)
    if scale is None:
        scale, zero = _hooked(base, arrays)
    if scale is not None:
        yield "a scale in a neighbour", base, lambda: _scaled(array, scale, zero)
    elif array.dtype in _FLOAT8:
        yield "8-bit floats", base, lambda: array.astype(np.float32)


def _beside(base: str, arrays: Mapping[str, Array], forms: tuple[str, ...]) -> Array | None:
    names = (form.format(base) for form in forms)
    return next((arrays[name] for name in names if name in arrays), None)


def _hooked(base: str, arrays: Mapping[str, Array]) -> tuple[Array | None, Array | None]:
    """NNCF keeps both with a hook whose name has the weight's, dots as colons."""
    wanted = base.replace(".", ":")
    scale = zero = None
    for name, array in arrays.items():
        if _HOOKS in name and f".{wanted}__" in name:
            scale = array if name.endswith("_scale") else scale
            zero = array if name.endswith("_zero_point") else zero
    return scale, zero


def _scaled(array: Array, scale: Array, zero: Array | None) -> Array:
    wide = _spread(scale, array.shape)
    return dequantise(array, wide, None if zero is None else _spread(zero, array.shape))


def _spread(few: Array, shape: tuple[int, ...]) -> Array:
    """One number for all, for each row, for each block of a row, or for each square block."""
    values = np.asarray(few, np.float32)
    if values.size == 1:
        return values.reshape(())
    rows, columns = shape[0], math.prod(shape[1:])
    if values.ndim == len(shape) and all(
        a in (1, b) for a, b in zip(values.shape, shape, strict=True)
    ):
        return values
    if values.size == rows:
        return values.reshape(rows, *[1] * (len(shape) - 1))
    table = values.reshape(len(values), -1)
    down, across = (math.ceil(n / m) for n, m in zip((rows, columns), table.shape, strict=True))
    wide = np.repeat(np.repeat(table, down, 0)[:rows], across, 1)[:, :columns]
    whole = all(
        n % m == 0 or (block % _BLOCK == 0 and block * (m - 1) < n)
        for n, m, block in zip((rows, columns), table.shape, (down, across), strict=True)
    )
    if not whole or wide.shape != (rows, columns):
        raise ValueError(f"it has scales of shape {values.shape} for weights of shape {shape}")
    return wide.reshape(shape)


def _by_table(array: Array, name: str, arrays: Mapping[str, Array]) -> Array:
    """Two to a byte, the higher half first; each block has a largest value."""
    kind = next(n for n in arrays if n.startswith(f"{name}.quant_state."))
    said = json.loads(arrays[kind].astype(np.uint8).tobytes())
    shape, block = tuple(int(side) for side in said["shape"]), int(said["blocksize"])
    bytes_ = array.reshape(-1).view(np.uint8)
    indices = np.stack([bytes_ >> _BITS, bytes_ & 15], 1).reshape(-1)
    if not shape or min(shape) < 1 or block < 1 or math.prod(shape) > len(indices):
        raise ValueError(f"it says shape {shape} for {len(indices)} numbers")
    table = arrays[f"{name}.quant_map"].astype(np.float32).reshape(-1)
    largest = arrays[f"{name}.absmax"]
    if f"{name}.nested_absmax" in arrays:
        nested = arrays[f"{name}.nested_quant_map"].astype(np.float32)[largest.astype(np.int64)]
        outer = np.repeat(arrays[f"{name}.nested_absmax"], int(said["nested_blocksize"]))
        largest = nested * outer[: len(nested)] + float(said["nested_offset"])
    scale = np.repeat(largest.astype(np.float32).reshape(-1), block)[: math.prod(shape)]
    numbers = table[indices[: math.prod(shape)]]
    if len(scale) != len(numbers):
        raise ValueError(f"it has {largest.size} blocks of {block} for {len(numbers)} numbers")
    return dequantise(numbers, scale).reshape(shape)


def _in_words(
    base: str, packed: Array, arrays: Mapping[str, Array]
) -> Iterator[tuple[str, str, Any]]:
    """GPTQ packs along what is read, AWQ along what is written; the shapes tell which."""
    scales, zeros = arrays.get(f"{base}scales"), arrays.get(f"{base}qzeros")
    if scales is None or packed.ndim != _AXES or scales.ndim != _AXES:
        return
    if packed.shape[1] == scales.shape[1]:
        yield (
            "GPTQ",
            f"{base}weight",
            lambda: _gptq(packed, scales, zeros, arrays.get(f"{base}g_idx")),
        )
    elif packed.shape[1] * _EACH == scales.shape[1]:
        yield "AWQ", f"{base}weight", lambda: _awq(packed, scales, zeros)


def _nibbles(words: Array, axis: int, order: tuple[int, ...] = tuple(range(_EACH))) -> Array:
    """Eight 4-bit integers of each word, side by side along `axis`."""
    raw = words.view(np.uint32)
    parts = [(raw >> np.uint32(_BITS * place)) & np.uint32(15) for place in order]
    stacked = np.stack(parts, axis + 1)
    shape = list(words.shape)
    shape[axis] *= _EACH
    return stacked.reshape(shape).astype(np.int8)


def _gptq(packed: Array, scales: Array, zeros: Array | None, groups: Array | None) -> Array:
    """(out, in): integers of 4 bits, for each group of inputs a scale and a zero point less one."""
    q = _nibbles(packed, 0)
    if groups is None or groups.size != len(q):
        groups = np.arange(len(q)) // math.ceil(len(q) / len(scales))
    groups = groups.reshape(-1).astype(np.int64)
    if groups.min() < 0 or groups.max() >= len(scales):
        raise ValueError("its groups are not those that it has scales for")
    zero = np.full(scales.shape, 8) if zeros is None else _nibbles(zeros, 1) + 1
    return np.ascontiguousarray(dequantise(q, scales[groups], zero[groups]).T)


def _awq(packed: Array, scales: Array, zeros: Array | None) -> Array:
    """(out, in): as the other, packed in another order along the outputs."""
    q = _nibbles(packed, 1, _AWQ_ORDER)
    size = math.ceil(len(q) / len(scales))
    zero = np.full(scales.shape, 8) if zeros is None else _nibbles(zeros, 1, _AWQ_ORDER)
    scales, zero = (np.repeat(each, size, 0)[: len(q)] for each in (scales, zero))
    return np.ascontiguousarray(dequantise(q, scales, zero).T)


def _compressed(packed: Array, base: str, arrays: Mapping[str, Array]) -> Array:
    """Integers of 4 bits around 8, eight to a word along what is read."""
    shape = tuple(int(side) for side in arrays[f"{base}_shape"].reshape(-1))
    q = _nibbles(packed, 1)
    if len(shape) != _AXES or shape[0] != len(q) or not 0 < shape[1] <= q.shape[1]:
        raise ValueError(f"it says shape {shape} for integers of shape {q.shape}")
    zero = np.float32(8)
    return _scaled(q[:, : shape[1]] - np.int8(zero), arrays[f"{base}_scale"], None)
