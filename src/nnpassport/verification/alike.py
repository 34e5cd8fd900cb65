"""Likeness of two networks once one is aligned to the other, and one as a mixture of others."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.inside import described
from nnpassport.alignment.solve import aligner
from nnpassport.files.arrays import Array, is_floating
from nnpassport.verification.lineage import AlignedReading, Mixture, Network

Matrix = NDArray[np.float64]
MIXTURES = 8
"""So many networks are made of the suspect's own rows: alignment makes that much of strangers."""

FEWEST_STRANGERS = 5
"""Fewer unrelated networks say too little of how far alignment gets with them."""


def aligned_reading(
    a: Network,
    b: Network,
    axes: Axes,
    unrelated: Sequence[Network],
    rng: np.random.Generator,
) -> AlignedReading | None:
    """How alike matched units are, and what alignment makes of strangers."""
    names = {place.tensor for axis in axes.axes for place in axis.places} | set(axes.reads)
    reference = _floats(b.tensors, names)
    to = aligner(axes, reference)

    def likeness(tensors: Mapping[str, Matrix]) -> float | None:
        try:
            found = to.align(tensors).likeness.values()
        except (ValueError, IndexError, np.linalg.LinAlgError):
            return None
        return float(np.mean(list(found))) if found else None

    suspect = _floats(a.tensors, set(reference))
    mine = likeness(suspect)
    if mine is None:
        return None
    strangers = [likeness(_floats(each.tensors, set(reference))) for each in unrelated]
    mixed = [likeness(_mixed(suspect, rng)) for _ in range(MIXTURES)]
    known = tuple(each for each in strangers if each is not None)
    mixtures = tuple(each for each in mixed if each is not None)
    log10_p = None
    if len(known) >= FEWEST_STRANGERS and len(mixtures) >= FEWEST_STRANGERS:
        log10_p = max(_log10_beyond(mine, each) for each in (known, mixtures))
    return AlignedReading(mine, known, mixtures, log10_p)


def _floats(tensors: Mapping[str, Array], names: set[str]) -> dict[str, Matrix]:
    known = described(tensors)
    return {
        name: np.asarray(tensors[name], np.float64)
        for name in sorted(names)
        if name in known and is_floating(known[name])
    }


def _mixed(tensors: Mapping[str, Matrix], rng: np.random.Generator) -> dict[str, Matrix]:
    """The same with the rows of every matrix rotated among themselves at random."""
    found = dict(tensors)
    for name, array in tensors.items():
        if array.ndim > 1 and 1 < len(array) <= 4096:
            turn = np.linalg.qr(rng.standard_normal((len(array), len(array))))[0]
            found[name] = (turn @ array.reshape(len(array), -1)).reshape(array.shape)
    return found


def _log10_beyond(value: float, others: Sequence[float]) -> float:
    """log₁₀ of the chance that one more like `others`, were they normal, is as large as `value`."""
    from scipy.stats import t  # noqa: PLC0415 - slow to import

    spread = float(np.std(others, ddof=1)) * math.sqrt(1 + 1 / len(others))
    if spread == 0:
        return 0.0
    score = (value - float(np.mean(others))) / spread
    return float(t.logsf(score, len(others) - 1)) / math.log(10)


def mixture_of(a: Network, others: Sequence[Network]) -> Mixture | None:
    """`a` as a sum of the others, by least squares over all tensors that all of them have."""
    known = [described(each.tensors) for each in (a, *others)]
    names = [
        name
        for name, each in known[0].items()
        if is_floating(each)
        and len(each.shape) > 1
        and all(name in k and tuple(k[name].shape) == tuple(each.shape) for k in known[1:])
    ]
    if not names:
        return None
    size = len(others)
    squares, products, energy, numbers = np.zeros((size, size)), np.zeros(size), 0.0, 0
    for name in names:
        mine = np.asarray(a.tensors[name], np.float64).reshape(-1)
        theirs = np.stack([np.asarray(o.tensors[name], np.float64).reshape(-1) for o in others])
        squares += theirs @ theirs.T
        products += theirs @ mine
        energy += float(mine @ mine)
        numbers += len(mine)
    inverse = np.linalg.pinv(squares)
    found = inverse @ products
    left = max(0.0, energy - float(found @ products))
    errors = np.sqrt(np.maximum(np.diag(inverse), 0) * left / max(1, numbers - size))
    return Mixture(
        {o.name: (float(c), float(e)) for o, c, e in zip(others, found, errors, strict=True)},
        math.sqrt(left / max(energy, 1e-300)),
    )
