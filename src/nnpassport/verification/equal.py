"""Tensors that two networks both hold, under whichever names and in whichever kind of numbers."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnpassport.files.arrays import Array, is_floating
from nnpassport.verification.lineage import Equal

Matrix = NDArray[np.float64]
FEWEST_DISTINCT = 64
"""A tensor of fewer different numbers may be equal in unrelated networks: ones, zeros, a mask."""


def equal_tensors(
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    others: Sequence[Mapping[str, Array]] = (),
) -> tuple[Equal, ...]:
    """Tensors of numbers with a point that both hold, told by content, whatever their kind or name.

    Kinds of numbers do not matter, so far as the numbers themselves are equal.
    """
    known = _by_digest(a)
    elsewhere = [_by_digest(each) for each in others]
    found = list[Equal]()
    for name in b:
        array = b[name]
        if not _holds_numbers(array):
            continue
        digests = _contents(array)
        for mine, theirs, how in (
            ("equal", "equal", "equal"),
            ("transposed", "equal", "transposed"),
            ("set", "set", "in another order"),
        ):
            names = known.get((mine, digests[theirs]), [])
            if names:
                first = name if name in names else names[0]
                telling = array.ndim > 1 and _is_telling(array)
                taken = any(("set", digests["set"]) in each for each in elsewhere)
                found.append(Equal(first, name, array.size, how, telling, taken))
                break
    return tuple(found)


def _by_digest(tensors: Mapping[str, Array]) -> dict[tuple[str, str], list[str]]:
    known: dict[tuple[str, str], list[str]] = {}
    for name in tensors:
        array = tensors[name]
        if _holds_numbers(array):
            for how, digest in _contents(array).items():
                known.setdefault((how, digest), []).append(name)
    return known


def _holds_numbers(array: Array) -> bool:
    return is_floating(array) and array.size > 1


def _contents(array: Array) -> dict[str, str]:
    """Digests of the numbers in their order, in the order of the transpose, and of their set."""
    wide = np.ascontiguousarray(array, np.float64) + 0.0  # −0 is 0
    found = {"equal": _digest(wide), "set": _digest(np.sort(wide, axis=None))}
    if wide.ndim == 2 and min(wide.shape) > 1:
        found["transposed"] = _digest(np.ascontiguousarray(wide.T))
    return found


def _digest(array: Matrix) -> str:
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def _is_telling(array: Array) -> bool:
    return len(np.unique(np.asarray(array, np.float64).reshape(-1)[: 2**20])) >= FEWEST_DISTINCT
