"""Arrays as `numpy.savez` writes them, from anybody: no pickle in them is read."""

import io
import math
from pathlib import Path

import numpy as np

from nnpassport.files.arrays import DTYPES, Array
from nnpassport.files.disk import brief
from nnpassport.files.pickles import archive
from nnpassport.scheme import UnreadableModelError

SUFFIX = ".npz"
_MEMBER = ".npy"
_LONGEST_HEADER = 10_000


def read_npz(data: bytes, path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays in the bytes of an archive, and those that are not numbers, by name, and why.

    Raises:
        UnreadableModelError: damaged, hostile, or without an array.
    """
    arrays: dict[str, Array] = {}
    left_out: dict[str, str] = {}
    try:
        directory = archive.read_directory(data)
        for name in directory.parts:
            if not name.endswith(_MEMBER):
                continue
            stored = archive.stored(data, directory, name)
            try:
                arrays[name.removesuffix(_MEMBER)] = _array(stored)
            except ValueError as error:
                left_out[name.removesuffix(_MEMBER)] = f"{name[:100]!r} {brief(error)}"
    except (ValueError, LookupError) as error:
        raise UnreadableModelError(
            f"{path} is no sound archive of arrays ({brief(error)}); needed: a file as "
            "`numpy.savez` writes it; copy it again"
        ) from error
    if not arrays and not left_out:
        raise UnreadableModelError(f"{path} holds no array; needed: weights by name")
    return arrays, left_out


def _array(stored: memoryview) -> Array:
    file = io.BytesIO(stored)
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"is of version {version}; needed: (1, 0) or (2, 0)")
    shape, turned, dtype = readers[version](file, max_header_size=_LONGEST_HEADER)
    if dtype.hasobject or dtype.newbyteorder("=") not in DTYPES.values():
        raise ValueError(f"holds {dtype}; needed: one of {', '.join(DTYPES)}")
    begin = file.tell()
    if math.prod(shape) * dtype.itemsize != len(stored) - begin or min(shape, default=0) < 0:
        raise ValueError(f"of shape {shape} does not hold all its numbers")
    flat = np.frombuffer(bytearray(stored[begin:]), dtype).astype(dtype.newbyteorder("="))
    return flat.reshape(shape, order="F" if turned else "C")
