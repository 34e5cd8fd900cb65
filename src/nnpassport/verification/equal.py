"""Tensors that two networks both hold, under whichever names and in whichever kind of numbers."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.inside import described
from nnpassport.files.arrays import Array, is_floating
from nnpassport.verification.lineage import Equal

Matrix = NDArray[np.float64]
FEWEST_DISTINCT = 64
"""A tensor of fewer different numbers may be equal in unrelated networks: ones, zeros, a mask."""

_BLOCK = 2**20
_MIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)  # SplitMix64's


def equal_tensors(
    a: Mapping[str, Array],
    b: Mapping[str, Array],
    others: Sequence[Mapping[str, Array]] = (),
) -> tuple[Equal, ...]:
    """Tensors of numbers with a point that both hold, told by content, whatever their kind or name.

    Kinds of numbers do not matter, so far as the numbers themselves are equal.
    """
    sizes = _sizes(a) & _sizes(b)
    known = _by_digest(a, sizes)
    elsewhere = [_by_digest(each, sizes) for each in others]
    found = list[Equal]()
    for name in _of_sizes(b, sizes):
        array = b[name]
        digests = _contents(array)
        for mine, theirs, how in (
            ("equal", "equal", "equal"),
            ("transposed", "equal", "transposed"),
            ("set", "set", "in another order"),
        ):
            names = known.get((mine, digests[theirs]), [])
            first = name if name in names else names[0] if names else None
            if first is not None and (how != "in another order" or _same_set(a[first], array)):
                telling = array.ndim > 1 and _is_telling(array)
                taken = any(("set", digests["set"]) in each for each in elsewhere)
                found.append(Equal(first, name, array.size, how, telling, taken))
                break
    return tuple(found)


def _sizes(tensors: Mapping[str, Array]) -> set[int]:
    return {each.size for each in described(tensors).values() if is_floating(each)} - {0, 1}


def _of_sizes(tensors: Mapping[str, Array], sizes: set[int]) -> list[str]:
    known = described(tensors)
    return [name for name, each in known.items() if is_floating(each) and each.size in sizes]


def _by_digest(tensors: Mapping[str, Array], sizes: set[int]) -> dict[tuple[str, str], list[str]]:
    known: dict[tuple[str, str], list[str]] = {}
    for name in _of_sizes(tensors, sizes):
        for how, digest in _contents(tensors[name]).items():
            known.setdefault((how, digest), []).append(name)
    return known


def _contents(array: Array) -> dict[str, str]:
    """Digests of the numbers in their order, in the order of the transpose, and of their set."""
    found = {"equal": _digest(array), "set": _set_digest(array)}
    if array.ndim == 2 and min(array.shape) > 1:
        found["transposed"] = _digest(array.T)
    return found


def _blocks(array: Array) -> Iterator[Matrix]:
    flat = np.ascontiguousarray(array).reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK].astype(np.float64) + 0.0  # −0 is 0


def _digest(array: Array) -> str:
    digest = hashlib.sha256()
    for block in _blocks(array):
        digest.update(block.view(np.uint8).data)
    return digest.hexdigest()


def _set_digest(array: Array) -> str:
    """Equal for equal sets: a sum over all numbers, in whichever order.

    Somebody could make other numbers of the same sum, so `_same_set` has the last word.
    """
    total = np.uint64(0)
    for block in _blocks(array):
        bits = block.view(np.uint64)
        for shift, factor in _MIX:
            bits = (bits ^ (bits >> shift)) * factor
        total = np.add(total, (bits ^ (bits >> np.uint64(31))).sum(dtype=np.uint64))
    return f"{array.size}:{int(total):x}"


def _same_set(a: Array, b: Array) -> bool:
    one, other = (np.sort(np.asarray(each, np.float64), axis=None) for each in (a, b))
    return bool(np.array_equal(one, other))


def _is_telling(array: Array) -> bool:
    return len(np.unique(np.asarray(array.reshape(-1)[:_BLOCK], np.float64))) >= FEWEST_DISTINCT
