"""What kind of difference there is between two tensors that are in one place of two networks.

    none        the same numbers
    cast        the same numbers in a narrower kind of number
    rounded     one of them lies on a grid: so many bits, for the tensor or for each row
    pruned      one is the other with zeros
    sparse      few numbers differ
    low rank    the difference has few singular values: a merged adapter
    noise       the difference has no structure: one size everywhere, a spectrum of chance
    training    alike, and the difference has structure
    unlike      no more alike than chance allows, or hardly

A kind says how a copy was changed. It does not say that there is a copy: that is what the order of
hidden units is asked.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.files.arrays import DTYPES, Array

Matrix = NDArray[np.float64]
KINDS = (
    *("none", "cast", "rounded", "pruned", "sparse", "low rank", "noise", "training", "unlike"),
)
ALIKE = 0.5
"""Correlation from which on a difference is worth describing."""

_FEW = 0.05  # share of numbers that differ in a sparse difference
_ENERGY = 0.999
_MOST_SIDE = 768  # of the part of a difference whose singular values are computed
_MOST_NUMBERS = 2**22
_KINDS_OF_NUMBER = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32")


class Difference(NamedTuple):
    """How a tensor of one network differs from that of another.

    Attributes:
        kind: one of `KINDS`.
        detail: figures in words, with what chance gives beside them.
        correlation: Pearson's, of all numbers; 0 ± 1/√numbers for tensors that have nothing to do
            with each other and no common pattern.
        relative: size of the difference over the size of the second tensor.
        numbers: how many there are.
    """

    kind: str
    detail: str
    correlation: float
    relative: float
    numbers: int


def difference(a: Array, b: Array) -> Difference:
    """How `a` differs from `b`, of the same shape; either may have been made from the other."""
    if a.size > _MOST_NUMBERS and a.ndim > 1 and not np.array_equal(a, b):
        step = -(-a.size // _MOST_NUMBERS)
        some = difference(a[::step], b[::step])
        detail = some.detail if step >= len(a) else f"of every {step}th row: {some.detail}"
        return some._replace(detail=detail, numbers=a.size)
    mine, theirs = (np.asarray(each, np.float64) for each in (a, b))
    size = float(np.linalg.norm(theirs))
    gap = mine - theirs
    relative = float(np.linalg.norm(gap)) / max(size, 1e-300) if gap.any() else 0.0
    alike = _correlation(mine.ravel(), theirs.ravel())
    kind, detail = _kind(mine, theirs, alike)
    return Difference(kind, detail, alike, relative, mine.size)


def _correlation(a: Matrix, b: Matrix) -> float:
    a, b = a - a.mean(), b - b.mean()
    lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(a @ b) / lengths if lengths > 0 else 1.0 if not (a.any() or b.any()) else 0.0


def _kind(mine: Matrix, theirs: Matrix, alike: float) -> tuple[str, str]:
    if np.array_equal(mine, theirs):
        return "none", "the same numbers"
    if (cast := _cast(mine, theirs)) is not None:
        return "cast", f"the same numbers in {cast}"
    if alike < ALIKE:
        chance = 1 / math.sqrt(mine.size)
        return "unlike", f"correlation {alike:.3f}; unrelated random numbers give 0 ± {chance:.1g}"
    return _in_few_numbers(mine, theirs) or _by_spectrum(mine - theirs, theirs)


def _in_few_numbers(mine: Matrix, theirs: Matrix) -> tuple[str, str] | None:
    """Pruned, sparse or rounded."""
    if (zeros := _pruned(mine, theirs)) is not None:
        return "pruned", f"{100 * zeros:.1f} % of the numbers are zero in one, the others are equal"
    differ = float((mine != theirs).mean())
    if differ <= _FEW:
        return "sparse", f"{100 * differ:.2f} % of the numbers differ"
    bits = _rounded(mine, theirs)
    return None if bits is None else ("rounded", bits)


def _cast(mine: Matrix, theirs: Matrix) -> str | None:
    few = slice(0, _MOST_SIDE)
    if min(float(np.ptp(mine)), float(np.ptp(theirs))) == 0:  # of nothing but zeros, say
        return None
    for name in _KINDS_OF_NUMBER:
        for fine, coarse in ((mine, theirs), (theirs, mine)):
            parts = ((e.reshape(-1)[few] for e in (fine, coarse)), (fine, coarse))
            if all(_is_cast(one, other, name) for one, other in parts):
                return name
    return None


def _is_cast(fine: Matrix, coarse: Matrix, name: str) -> bool:
    with np.errstate(all="ignore"):
        return np.array_equal(fine.astype(DTYPES[name]).astype(np.float64), coarse)


def _pruned(a: Matrix, b: Matrix) -> float | None:
    """Share of zeros that one has more than the other, where all else is equal."""
    differ = a != b
    for one in (a, b):
        if not one[differ].any():
            return float((one == 0).mean())
    return None


def _rounded(a: Matrix, b: Matrix) -> str | None:
    """Bits of the grid that one of them lies on, and whether each row has its own."""
    for one, other in ((a, b), (b, a)):
        flat = one.reshape(len(one), -1)
        found = []
        for rows, where in ((flat.reshape(1, -1), "the tensor"), (flat, "each row")):
            bits = _grid(rows)
            finer = None if bits is None else _grid(other.reshape(rows.shape))
            if bits is not None and (finer is None or finer > bits):
                found.append((bits, where))
        if found:
            bits, where = min(found, key=lambda each: each[0])
            return f"{bits} bits, one grid for {where}"
    return None


def _grid(rows: Matrix) -> int | None:
    """Bits of a grid through zero that every row lies on, at most 8; None where there is none."""
    some = rows[np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(int)]
    most = np.abs(some).max(1, keepdims=True)
    if not (most > 0).any():
        return None
    some, most = some[most[:, 0] > 0], most[most[:, 0] > 0]
    if some.shape[1] < 6:
        return None
    for bits in range(2, 9):
        for top in (2 ** (bits - 1) - 1, 2 ** (bits - 1)):
            steps = some * top / most
            if np.abs(steps - np.round(steps)).max() < 2e-3:
                return bits
    levels = max(len(np.unique(row)) for row in some)
    if levels <= 256 and some.shape[1] >= 4 * levels:
        return max(1, math.ceil(math.log2(levels)))
    return None


def _by_spectrum(gap: Matrix, theirs: Matrix) -> tuple[str, str]:
    """Low rank, noise, or training: what the singular values of the difference say."""
    flat = gap.reshape(len(gap), -1)
    rng = np.random.default_rng(0)
    rows, columns = (np.sort(rng.permutation(side)[:_MOST_SIDE]) for side in flat.shape)
    part = flat[np.ix_(rows, columns)]
    least, most = sorted(part.shape)
    values = np.linalg.svd(part, compute_uv=False)
    energy = np.cumsum(values**2) / max(float((values**2).sum()), 1e-300)
    rank = int(np.searchsorted(energy, _ENERGY)) + 1
    if least >= 8 and rank <= least // 4:
        at_random = math.ceil(_ENERGY * least)
        return "low rank", f"rank {rank}; noise of this shape has about {at_random}"
    sigma = float(part.std())
    edge = sigma * (math.sqrt(least) + math.sqrt(most))
    detail = (
        f"σ = {sigma:.3g}; largest singular value {values[0] / max(edge, 1e-300):.2f} of noise’s"
    )
    if least >= 8 and values[0] <= 1.1 * edge and _even(part) and _free(flat, theirs):
        return "noise", detail
    return "training", f"{detail}, which is 1 ± 0.1"


def _even(part: Matrix) -> bool:
    """Whether rows and columns have one size each, as those of noise have."""
    for axis in (0, 1):
        count = part.shape[axis]
        sizes = (part**2).mean(axis) / max(float((part**2).mean()), 1e-300)
        if float(sizes.std()) > 2 * math.sqrt(2 / count):
            return False
    return True


def _free(gap: Matrix, theirs: Matrix) -> bool:
    """Whether the difference does not follow the numbers, nor its size theirs."""
    a, b = gap.ravel()[:_MOST_NUMBERS], theirs.ravel()[:_MOST_NUMBERS]
    chance = 5 / math.sqrt(len(a)) + 0.02
    return abs(_correlation(a, b)) < chance and abs(_correlation(np.abs(a), np.abs(b))) < chance
