"""Which rows belong together, and which mixture turns some into others."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
_TINY = 1e-300


def assigned(cosines: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """By row, the column that it is matched with, −1 for none: the largest sum there is."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 - slow to import

    rows, columns = linear_sum_assignment(np.nan_to_num(cosines), maximize=True)
    found = np.full(len(cosines), -1)
    found[rows] = columns
    return found


def in_groups(cosines: Matrix, groups: int) -> NDArray[np.int64]:
    """By row, its column, where groups stay together: inside each pair, and then of the groups.

    There may be more groups of columns, each of as many.
    """
    inside = len(cosines) // groups
    others = cosines.shape[1] // inside
    orders = np.zeros((groups, others, inside), np.int64)
    sums = np.zeros((groups, others))
    for a in range(groups):
        for b in range(others):
            block = cosines[a * inside : (a + 1) * inside, b * inside : (b + 1) * inside]
            orders[a, b] = assigned(block)
            sums[a, b] = block[np.arange(inside), orders[a, b]].sum()
    chosen = assigned(sums)
    return np.concatenate([b * inside + orders[a, b] for a, b in enumerate(chosen)])


def unit_rows(rows: Matrix) -> Matrix:
    """Rows of length one; those of zeros stay zeros."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(length, _TINY)


def mixture(
    pairs: Sequence[tuple[Matrix, Matrix]], written: Sequence[bool], trust: Sequence[float]
) -> tuple[Matrix, Matrix]:
    """G⁻¹ and G, where writers are about G·reference and readers G⁻ᵀ·reference.

    Least squares in G over writers (|W - G R|²) and over readers (|Gᵀ W - R|²), each divided by the
    reference's energy and times how far it is trusted, is Sylvester's equation B·G + G·A = C.
    """
    from scipy.linalg import solve_sylvester  # noqa: PLC0415 - slow to import

    own, size = len(pairs[0][0]), len(pairs[0][1])
    a, b, c = np.zeros((size, size)), np.zeros((own, own)), np.zeros((own, size))
    for (mine, theirs), writes, trusted in zip(pairs, written, trust, strict=True):
        weight = trusted / max(float(np.square(theirs).sum()), _TINY)
        if writes:
            a += weight * theirs @ theirs.T
        else:
            b += weight * mine @ mine.T
        c += weight * mine @ theirs.T
    ridge = 1e-12 * (np.trace(a) + np.trace(b)) / size
    if own == size:  # what nothing tells stays as it is
        c += 2 * ridge * np.eye(size)
    mixed = np.asarray(solve_sylvester(b + ridge * np.eye(own), a + ridge * np.eye(size), c))
    try:
        return np.linalg.inv(mixed) if own == size else np.linalg.pinv(mixed), mixed
    except np.linalg.LinAlgError:
        return np.eye(size, own), np.eye(own, size)
