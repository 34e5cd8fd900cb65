"""Rotations and mixtures fitted to what no mark moves of the filters.

With G = 1 + E, layers that write an axis are about G·reference, and those that read it G⁻ᵀ. What is
left of both, once the free directions D_o of each marked filter are taken out,

    Σ_t w_t ‖P_t (W_t − R_t + L_t(E))‖²,     L_t(E) = −E·W_t (writes), Eᵀ·W_t (reads),

is least squares in E: Gauss and Newton's method, each step by conjugate gradients. With no P_t its
equations would be Σ_r·E + E·Σ_w, Σ_r the Gram matrix of rows that read and Σ_w of those that write,
which two eigenproblems solve: that is the preconditioner. w_t is one over what was left of tensor t
in the step before, so that those of which a mark left more count less.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.directions import Free

Matrix = NDArray[np.float64]
STEPS, MOST_PRODUCTS = 12, 50
"""Of Newton's method, and of conjugate gradients in each."""
_WEAKEST = 1e-4  # of the strongest direction: weaker ones are not amplified further
_ENOUGH = 1e-7
_FINEST = 1e-6  # of a tensor's energy: below it nothing more is told apart
_LONGEST = 0.5
_TINY = 1e-300


class Place(Protocol):
    """Rows of a tensor along an axis, as `solve.Spot`."""

    @property
    def tensor(self) -> str:
        """Whose rows they are."""

    @property
    def dimension(self) -> int:
        """Along which dimension they lie."""

    @property
    def positions(self) -> NDArray[np.int64]:
        """At which indices of it (size repeats)."""

    @property
    def reads(self) -> bool:
        """Whether the tensor reads the axis there."""

    def rows(self, tensor: Matrix) -> Matrix:
        """The rows (size rest), a copy."""

    def with_rows(self, tensor: Matrix, rows: Matrix) -> Matrix:
        """The tensor with these rows."""


class Fit(NamedTuple):
    """What is fitted: spots of one axis, or of the inside of several heads.

    Attributes:
        sides: spots, and whether each is like a layer that reads.
        heads: how many blocks of rows are turned apart.
        orthogonal: whether only rotations are allowed.
    """

    sides: Sequence[tuple[Place, bool]]
    heads: int
    orthogonal: bool


def begun(
    fit: Fit,
    weights: Mapping[str, Matrix],
    reference: Mapping[str, Matrix],
    free: Mapping[str, Free],
) -> list[tuple[Matrix, Matrix]] | None:
    """The same at first, told by one side alone: each of its rows is its own least squares,

        min_h ‖P_o (Wᵀh − R_o)‖,

    for a side whose rows are filters, or one that no mark is in. None where there is none.
    """
    best: tuple[float, list[tuple[Matrix, Matrix]]] | None = None
    for spot, reads in fit.sides:
        basis = _basis_of(spot, free.get(spot.tensor))
        if basis is not None:
            found, left = _alone(fit, spot, basis, weights, reference)
            if best is None or left < best[0]:
                turned = [(_other(by), by) if reads else (by, _other(by)) for by in found]
                best = left, turned
    return None if best is None else best[1]


def _basis_of(spot: Place, free: Free | None) -> Matrix | None:
    """Free directions of each of the rows (rows directions numbers), if the rows are filters."""
    if free is not None:
        return free.of_rows(spot.positions, spot.dimension)
    return np.zeros((len(spot.positions), 0, 0)) if spot.positions.shape[1] == 1 else None


def _alone(
    fit: Fit,
    spot: Place,
    basis: Matrix,
    weights: Mapping[str, Matrix],
    reference: Mapping[str, Matrix],
) -> tuple[list[Matrix], float]:
    """By head, what turns the rows of one side; and the share of their energy that is left."""
    mine = _blocks(spot, weights[spot.tensor], fit.heads)
    theirs = _blocks(spot, reference[spot.tensor], fit.heads)
    size, found, left = mine.shape[1], [], 0.0
    for head, (rows, wanted) in enumerate(zip(mine, theirs, strict=True)):
        turn = np.empty((size, size))
        for row in range(size):
            directions = basis[head * size + row]
            columns, target = rows.T, wanted[row]
            if directions.size:
                columns = columns - directions.T @ (directions @ columns)
                target = target - directions.T @ (directions @ target)
            turn[row] = np.linalg.lstsq(columns, target, rcond=1e-9)[0]
            left += float(np.square(columns @ turn[row] - target).sum())
        found.append(turn)
    return found, left / max(float(np.square(theirs).sum()), _TINY)


def _other(by: Matrix) -> Matrix:
    """What the other side is turned by: the inverse, transposed."""
    return np.asarray(np.linalg.pinv(by, rcond=1e-6).T)


def refined(
    fit: Fit,
    weights: Mapping[str, Matrix],
    reference: Mapping[str, Matrix],
    free: Mapping[str, Free],
) -> list[tuple[Matrix, Matrix]]:
    """By head, what writers and what readers are to be multiplied with from the left."""
    names = sorted({spot.tensor for spot, _ in fit.sides})
    mine = {name: weights[name] for name in names}
    size = len(fit.sides[0][0].rows(mine[fit.sides[0][0].tensor])) // fit.heads
    there = [np.eye(size) for _ in range(fit.heads)]
    back = [np.eye(size) for _ in range(fit.heads)]
    left = dict.fromkeys(names, 1.0)
    for step in range(STEPS):
        rest = {n: _outside(mine[n] - reference[n], free.get(n)) for n in names}
        energy = {n: max(float(np.square(reference[n]).sum()), _TINY) for n in names}
        share = {n: float(np.square(rest[n]).sum()) / energy[n] for n in names}
        if step > 1:
            left = {n: max(share[n], _FINEST) for n in names}
        scale = {n: (energy[n] * left[n]) ** -0.5 for n in names}
        moved = _step(fit, mine, rest, scale, free, size)
        longest = float(np.sqrt(np.square(moved).sum((1, 2)).max()))
        if longest > _LONGEST:
            moved *= _LONGEST / longest
        turns = [_turn(each, orthogonal=fit.orthogonal) for each in moved]
        for head, (by, inverse) in enumerate(turns):
            back[head], there[head] = inverse @ back[head], by.T @ there[head]
        for spot, reads in fit.sides:
            rows = _blocks(spot, mine[spot.tensor], fit.heads)
            new = np.stack(
                [(by.T if reads else inverse) @ rows[h] for h, (by, inverse) in enumerate(turns)]
            )
            mine[spot.tensor] = spot.with_rows(mine[spot.tensor], new.reshape(fit.heads * size, -1))
        if longest < _ENOUGH * size:
            break
    return list(zip(back, there, strict=True))


def _turn(small: Matrix, *, orthogonal: bool) -> tuple[Matrix, Matrix]:
    """G about 1 + E, and its inverse."""
    one = np.eye(len(small))
    if orthogonal:  # Cayley's: a rotation for every E = −Eᵀ
        by = np.asarray(np.linalg.solve(one - small / 2, one + small / 2), np.float64)
        return by, by.T
    return one + small, np.asarray(np.linalg.inv(one + small), np.float64)


def _step(
    fit: Fit,
    mine: Mapping[str, Matrix],
    rest: Mapping[str, Matrix],
    scale: Mapping[str, float],
    free: Mapping[str, Free],
    size: int,
) -> Matrix:
    """The E (heads size size) that leaves least, to first order."""
    rows = [_blocks(spot, mine[spot.tensor], fit.heads) for spot, _ in fit.sides]

    def moves(small: Matrix) -> dict[str, Matrix]:
        found: dict[str, Matrix] = {}
        for (spot, reads), block in zip(fit.sides, rows, strict=True):
            by = small.swapaxes(1, 2) if reads else -small
            zero = np.zeros_like(mine[spot.tensor])
            moved = spot.with_rows(zero, np.matmul(by, block).reshape(fit.heads * size, -1))
            before = found.get(spot.tensor)
            found[spot.tensor] = moved if before is None else before + moved
        return {n: scale[n] * _outside(each, free.get(n)) for n, each in found.items()}

    def felt(tensors: Mapping[str, Matrix]) -> Matrix:
        total = np.zeros((fit.heads, size, size))
        for (spot, reads), block in zip(fit.sides, rows, strict=True):
            outside = scale[spot.tensor] * tensors[spot.tensor]  # it lies outside already
            theirs = _blocks(spot, outside, fit.heads)
            total += (
                np.matmul(block, theirs.swapaxes(1, 2))
                if reads
                else -np.matmul(theirs, block.swapaxes(1, 2))
            )
        return (total - total.swapaxes(1, 2)) / 2 if fit.orthogonal else total

    solved = _preconditioner(fit, rows, scale)
    residual = -felt({name: scale[name] * each for name, each in rest.items()})
    direction = solved(residual)
    found, power = np.zeros_like(residual), float((residual * direction).sum())
    least = power * 1e-20
    for _ in range(MOST_PRODUCTS):
        if power <= max(least, _TINY):
            break
        there = felt(moves(direction))
        length = power / max(float((direction * there).sum()), _TINY)
        found, residual = found + length * direction, residual - length * there
        eased = solved(residual)
        before, power = power, float((residual * eased).sum())
        direction = eased + power / before * direction
    return found


def _preconditioner(
    fit: Fit, rows: Sequence[Matrix], scale: Mapping[str, float]
) -> Callable[[Matrix], Matrix]:
    """Solves the equations of a step as if nothing were free (heads size size)."""
    read, write = np.zeros((2, *rows[0].shape[:2], rows[0].shape[1]))
    for (spot, reads), block in zip(fit.sides, rows, strict=True):
        gram = scale[spot.tensor] ** 2 * np.matmul(block, block.swapaxes(1, 2))
        if reads:
            read += gram
        else:
            write += gram
    if fit.orthogonal:
        read = write = (read + write) / 2
    (left, into), (right, onto) = np.linalg.eigh(read), np.linalg.eigh(write)
    power = left[:, :, None] + right[:, None, :]
    power = np.maximum(power, max(_WEAKEST * float(power.max()), _TINY))

    def solved(residual: Matrix) -> Matrix:
        inside = into.swapaxes(1, 2) @ residual @ onto
        return np.asarray(into @ (inside / power) @ onto.swapaxes(1, 2))

    return solved


def _blocks(spot: Place, tensor: Matrix, heads: int) -> Matrix:
    rows = spot.rows(tensor)
    return rows.reshape(heads, len(rows) // heads, -1)


def _outside(moved: Matrix, free: Free | None) -> Matrix:
    """What is left of a tensor outside the free directions of its filters."""
    return moved if free is None else moved - free.along(moved)
