"""Arrays from anybody: which kinds of numbers there are, what is refused, and their digest.

Weights are numpy's, with bfloat16 and the 8-bit floats of `ml_dtypes`; torch has the same kinds
under the same names.
"""

import hashlib
import math
import struct
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from nnpassport.files.disk import is_text

Array = NDArray[Any]
MAX_MODEL_BYTES = 16 * 2**30
_MOST_AXES = 8
_BLOCK = 2**22
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
_SUPPORTED = ("float16", "bfloat16", "float32", "float64", *_INTEGERS)
DTYPES: Mapping[str, np.dtype[Any]] = {
    **{name: np.dtype(name) for name in _SUPPORTED if name != "bfloat16"},
    **{name: np.dtype(name) for name in ("uint16", "uint32", "uint64", "complex64", "complex128")},
    "bfloat16": BFLOAT16,
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
}
"""All kinds that are read from files, by the name that torch has for them."""


class Described(NamedTuple):
    """What a header says of an array that was not read."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)


def is_floating(array: Array | Described) -> bool:
    """Whether these are real numbers with a point: no integers, no truth values."""
    return array.dtype.kind == "f" or array.dtype in _EXTENDED


_EXTENDED = {DTYPES[name] for name in DTYPES if name.startswith(("bfloat", "float8"))}


def is_finite(array: Array) -> bool:
    """Whether no number is NaN or Inf; little memory is taken for it."""
    if not is_floating(array) or array.size == 0:
        return True
    if array.dtype.kind == "f" and array.dtype.itemsize > 2:  # extremes propagate NaN
        return math.isfinite(array.min()) and math.isfinite(array.max())
    flat = array.reshape(-1)
    parts = (flat[at : at + _BLOCK] for at in range(0, len(flat), _BLOCK))
    return all(bool(np.isfinite(part.astype(np.float32)).all()) for part in parts)


def finite_fault(name: str, array: Array) -> str | None:
    """What is wrong with an array that holds NaN or Inf; None with all others."""
    if is_finite(array):
        return None
    return (
        f"tensor {name!r} holds NaN or Inf, but a model needs finite numbers; "
        "give a checkpoint from before its training diverged"
    )


def defect(arrays: Mapping[str, Array]) -> str | None:
    """What is wrong with the first array that cannot be used, or None."""
    faults = (fault_of(name, array) for name, array in arrays.items())
    return next((fault for fault in faults if fault is not None), None) or too_large(arrays)


def fault_of(name: str, array: Array) -> str | None:
    """What is wrong with this array, or None."""
    if not is_text(name):
        return f"the name {name[:100]!r} is too long or holds control characters"
    if array.dtype.name not in _SUPPORTED:
        supported = ", ".join(sorted(_SUPPORTED))
        return f"{name!r} is {array.dtype.name}; needed: one of {supported}"
    if not _is_held(array):
        return f"{name!r} of shape {array.shape} does not hold all its numbers"
    if array.ndim > _MOST_AXES:
        return f"{name!r} has more than {_MOST_AXES} axes"
    return finite_fault(name, array)


def too_large(arrays: Mapping[str, Array]) -> str | None:
    """What is wrong with so many bytes, or None."""
    total = sum(array.nbytes for array in arrays.values())
    return f"its tensors exceed {MAX_MODEL_BYTES} bytes" if total > MAX_MODEL_BYTES else None


def _is_held(array: Array) -> bool:
    # A few stored bytes may pose as any shape (stride 0); using such an array would expand it.
    steps = zip(array.shape, array.strides, strict=True)
    return all(side <= 1 or step for side, step in steps)


def arrays_digest(arrays: Mapping[str, Array]) -> str:
    """SHA-256, in hex, of every name, dtype, shape and (little-endian) byte.

    The order of the mapping and memory layout play no part. Every part is length-prefixed, so that
    no two different mappings are hashed as the same bytes. Kinds are called as torch calls them.
    """
    digest = hashlib.sha256(b"nnpassport tensors v1\0")
    digest.update(struct.pack("<Q", len(arrays)))
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name]).reshape(-1)
        shape = arrays[name].shape
        if sys.byteorder == "big":
            array = array.byteswap()
        packed = struct.pack(f"<{len(shape)}Q", *shape)
        for part in (name.encode(), f"torch.{array.dtype.name}".encode(), packed):
            digest.update(struct.pack("<Q", len(part)) + part)
        digest.update(struct.pack("<Q", array.nbytes))
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
