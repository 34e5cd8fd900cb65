"""Exact tails of the binomial, and how many matches a verdict needs.

Committed bits that were drawn uniformly match any independent network as Binomial(n, ½), whatever
its weights are. Everything here is in logarithms: a genuine mark of a thousand bits has a p-value
that no float can hold.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

from nnpassport.scheme import MiscountedError, check_counts

LOG10_ALPHA_COMMITTED = -9.0
"""log₁₀ α for a claim that is proved to be older than the suspect: α = 10⁻⁹."""

LOG10_ALPHA_UNCOMMITTED = -100 * math.log10(2)
"""log₁₀ α without that proof: α = 2⁻¹⁰⁰.

A claimant who has seen the suspect can try seeds until one fits; N tries reach p ≈ 1/N. Nobody
tries 2¹⁰⁰ seeds, and a genuine mark of a few hundred bits passes by far.
"""


_OTHERS = 2.0**-10  # the share of α for readings of a kind by shape: they are many, or not needed
_KINDS = 4  # turned, less a part of the anchor, both, by content
TENSORS = "choices of tensors"
"""What a reading of one of several tensors pays for."""

LOG10_BY_NAME = -math.log10(1 - _KINDS * _OTHERS)
"""What the reading of the tensors under the names that are expected costs, where others could be.

A file of weights does not say which of its tensors the function reads. Readings share α: this one
has nearly all of it, and the others, of which there are four kinds, 2⁻¹⁰ each.
"""

LOG10_BY_SHAPE = -math.log10(_OTHERS)
"""What all readings of a kind cost together; each pays for their number as well."""


def log_binomial_tail(matches: int, trials: int, chance: float = 0.5) -> float:
    """Natural logarithm of P[X ≥ matches] for X ~ Binomial(trials, chance).

    Exact up to rounding (relative error of the logarithm about 1e-12) at both ends, also where
    the probability itself underflows. Linear in `trials` in time and memory.

    Raises:
        MiscountedError: not 0 to `trials` matches, no trial, or no whole numbers.
        ValueError: `chance` is not inside (0, 1).
    """
    check_counts(matches, trials)
    if trials < 1:
        raise MiscountedError(f"got {trials} trials; needed: at least one, or there is no p-value")
    if not 0 < chance < 1:
        raise ValueError(f"chance must lie strictly between 0 and 1, got {chance}")
    return _log_tail(matches, trials, chance)


@functools.lru_cache(maxsize=4_096)
def _log_tail(matches: int, trials: int, chance: float) -> float:
    from scipy.special import logsumexp  # noqa: PLC0415 - slow to import

    if matches == 0:
        return 0.0
    mode = int((trials + 1) * chance)
    terms = _log_terms(trials, chance, min(mode, trials))
    total = logsumexp(terms)
    if matches > mode:
        return float(logsumexp(terms[matches:]) - total)
    return math.log1p(-math.exp(logsumexp(terms[:matches]) - total))


def _log_terms(trials: int, chance: float, mode: int) -> np.ndarray:
    # log P[X = i] − log P[X = mode], summed outwards from the mode: not through lgamma, which
    # is near 1e6 for n = 1e5 and would leave an error of 1e-9 in a logarithm near zero.
    i = np.arange(trials, dtype=np.float64)
    steps = np.log((trials - i) / (i + 1) * (chance / (1 - chance)))
    below = -np.cumsum(steps[:mode][::-1])[::-1]
    return np.concatenate([below, [0.0], np.cumsum(steps[mode:])])


def log10_binomial_tail(matches: int, trials: int, chance: float = 0.5) -> float:
    """log₁₀ P[X ≥ matches] for X ~ Binomial(trials, chance): the p-value of a match count.

    Raises:
        ValueError: as `log_binomial_tail`.
    """
    return log_binomial_tail(matches, trials, chance) / math.log(10)


def matches_needed(trials: int, log10_alpha: float, chance: float = 0.5) -> int:
    """Smallest number of matches whose tail is at most α.

    `trials` + 1 where not even a perfect match is enough.

    Raises:
        ValueError: as `log_binomial_tail`.
    """
    low, high = 0, trials + 1
    while low < high:
        middle = (low + high) // 2
        if log10_binomial_tail(middle, trials, chance) <= log10_alpha:
            high = middle
        else:
            low = middle + 1
    return low


def log10_signs_tail(weights: Sequence[int], total: int) -> float:
    """log₁₀ P[Σ s_i·w_i ≥ total] for fair and independent signs s_i, whole weights w_i from 0.

    With weights of 1 it is the binomial tail. Exact up to rounding at both ends: the sum's
    distribution is computed under a tilt that has its mean at `total`, where nothing cancels.

    Raises:
        MiscountedError: a weight is no whole number from 0, or no sum reaches `total`.
    """
    there = [weight for weight in weights if weight]
    most = sum(there)
    if any(type(w) is not int or w < 0 for w in there) or type(total) is not int or total > most:
        raise MiscountedError(
            f"got a sum of {total!r:.40} of weights that sum to {most!r:.40}; needed: whole "
            "weights from 0, and no more than all of them"
        )
    least = (total + most + 1) // 2  # of the weights whose sign is +
    if least <= 0:
        return 0.0
    if least == most:
        return -len(there) * math.log10(2)
    tilt = _tilt(np.array(there, np.float64), float(least)) if 2 * least > most else 0.0
    chances = 1 / (1 + np.exp(-tilt * np.array(there, np.float64)))
    reached, masses = 0, np.zeros(most + 1)
    masses[0] = 1.0
    for weight, chance in zip(there, chances.tolist(), strict=True):
        moved = masses[: reached + 1] * chance
        masses[: reached + 1] *= 1 - chance
        masses[weight : reached + weight + 1] += moved
        reached += weight
    beyond = float(masses[least:] @ np.exp(-tilt * np.arange(most - least + 1)))
    weighed = tilt * np.array(there, np.float64)
    factors = float((np.logaddexp(0, weighed) - math.log(2)).sum())
    return min(0.0, (math.log(beyond) - tilt * least + factors) / math.log(10))


def _tilt(weights: np.ndarray, mean: float) -> float:
    """θ > 0 with Σ w_i·σ(θ·w_i) = `mean`, which is below Σ w_i."""
    low, high = 0.0, 1.0
    while (weights / (1 + np.exp(-high * weights))).sum() < mean and high < 2**10:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        below = (weights / (1 + np.exp(-middle * weights))).sum() < mean
        low, high = (middle, high) if below else (low, middle)
    return high
