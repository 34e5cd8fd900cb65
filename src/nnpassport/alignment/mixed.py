"""What a bottleneck was mixed with, where no norm on either side of it is known.

A layer W₀ writes a bottleneck through a batch norm, V₀ reads it, and a batch norm follows that as
well. A thief mixes the bottleneck by any invertible matrix and has other norms; then, with unknown
diagonal N (his norm behind the writer) and D (behind the reader), and an unknown order P,

    N·W = G·W₀,    D·V·G = P·V₀,    so with M = W·W₀⁺ = N⁻¹·G:    D·V·N = P·V₀·M⁻¹.

So V is a known matrix but for the order of its rows and a factor for each row and column. The sizes
of factors follow from balance: of the squares of a matrix there is one scaling with equal sums in
all rows and all columns. Their signs follow from any row that is taken for the right one, and how
well the others fit then says whether it was.
"""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
SEEDS, TRIED, TESTED = 8, 16, 48
"""Rows that are taken for known ones, for how many each, and rows that say whether it was right."""
ROUNDS = 5
_BALANCED = 50
_TINY = 1e-300


def column_scales(rows: Matrix, wanted: Matrix) -> tuple[Matrix, float]:
    """Factors of the columns with which rows are, up to a factor each, those wanted in some order.

    Also returned is the mean |cosine| of rows to the best of those wanted, in [0, 1].
    """
    (mine, own), (theirs, other) = _balanced(rows), _balanced(wanted)
    some = mine[np.linspace(0, len(mine) - 1, min(len(mine), TESTED)).astype(int)]
    alike = _centred(mine) @ _centred(theirs).T
    best, fit = np.ones(rows.shape[1]), 0.0
    for seed in np.argsort(-alike.max(1))[:SEEDS]:
        for at in np.argsort(-alike[seed])[:TRIED]:
            signs = np.sign(mine[seed] * theirs[at])
            reached = _fit(some * signs, theirs)
            if reached > fit:
                best, fit = signs, reached
    for _ in range(ROUNDS):
        signs = _signs(mine, best, theirs)
        reached = _fit(some * signs, theirs)
        if reached <= fit:
            break
        best, fit = signs, reached
    return best * own / other, _fit(mine * best, theirs)


def own_scales(back: Matrix, rows: Matrix, wanted: Matrix) -> Matrix:
    """The n with the least |back·diag(n)·rows − wanted|²: (BᵀB ∘ R·Rᵀ)·n = diag(Bᵀ·wanted·Rᵀ)."""
    left = (back.T @ back) * (rows @ rows.T)
    right = ((back.T @ wanted) * rows).sum(1)
    return np.asarray(np.linalg.lstsq(left, right, rcond=1e-9)[0])


def _balanced(rows: Matrix) -> tuple[Matrix, Matrix]:
    """Rows and columns scaled until all are of one length, and the columns' factors."""
    squares = np.square(rows)
    columns = np.ones(rows.shape[1])
    for _ in range(_BALANCED):
        lines = 1 / np.maximum(squares @ columns, _TINY)
        columns = len(rows) / rows.shape[1] / np.maximum(lines @ squares, _TINY)
    factors = np.sqrt(columns)
    return _unit(rows * factors), factors


def _signs(mine: Matrix, signs: Matrix, theirs: Matrix) -> Matrix:
    """Signs of the columns by all rows, as they are matched with these signs."""
    cosines = _unit(mine * signs) @ theirs.T
    at = np.abs(cosines).argmax(1)
    reached = cosines[np.arange(len(mine)), at]
    return np.sign((mine * theirs[at] * (np.sign(reached) * reached**8)[:, None]).sum(0))


def _fit(rows: Matrix, wanted: Matrix) -> float:
    return float(np.abs(rows @ wanted.T).max(1).mean())


def _centred(rows: Matrix) -> Matrix:
    """Sizes of numbers, without what all rows have in common."""
    sizes = np.abs(rows)
    return _unit(sizes - sizes.mean(0))


def _unit(rows: Matrix) -> Matrix:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _TINY)
