"""Classes under other names or in another order: which map fits best, and what choosing it costs.

Trigger labels are drawn from the owner's seed. Whatever an independent service answers, and however
its answers are mapped to classes, a map that was fixed beforehand matches Binomial(n, 1/K). Whoever
may choose the map when he has seen the answers has so many tries as there are maps of the labels
that came up: p is multiplied by their number (a union bound), and then is exact again.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln, logsumexp

from nnpassport.scheme import Verdict

_MOST_CELLS = 2**24


def log10_injections(labels: int, classes: int) -> float:
    """log₁₀ of the one-to-one maps of as many labels to classes as there are of both."""
    larger, smaller = max(labels, classes), min(labels, classes)
    return float(gammaln(larger + 1) - gammaln(larger - smaller + 1)) / math.log(10)


def log10_partial_injections(labels: int, classes: int) -> float:
    """log₁₀ of the one-to-one maps of any of the labels to classes: Σ_j C(d, j)·K! / (K − j)!."""
    j = np.arange(min(labels, classes) + 1)
    chosen = gammaln(labels + 1) - gammaln(j + 1) - gammaln(labels - j + 1)
    placed = gammaln(classes + 1) - gammaln(classes - j + 1)
    return max(0.0, float(logsumexp(chosen + placed))) / math.log(10)


def log10_maps(labels: int, classes: int) -> float:
    """log₁₀ of all maps of labels to classes or to none: (K + 1)^d."""
    return labels * math.log10(classes + 1)


def best_map(said: Sequence[int], wanted: Sequence[int]) -> dict[int, int] | None:
    """The one-to-one map under which most of what was `said` is what was `wanted`.

    Labels that it leaves out match nothing. None where there are too many of both to look at.
    """
    labels, rows = np.unique(np.asarray(said, dtype=np.int64), return_inverse=True)
    classes, columns = np.unique(np.asarray(wanted, dtype=np.int64), return_inverse=True)
    if len(labels) * len(classes) > _MOST_CELLS:
        return None
    together = np.zeros((len(labels), len(classes)), dtype=np.int64)
    np.add.at(together, (rows, columns), 1)
    pairs = zip(*linear_sum_assignment(together, maximize=True), strict=True)
    return {
        int(labels[row]): int(classes[column]) for row, column in pairs if together[row, column]
    }


def corrected(verdict: Verdict, choices: Mapping[str, float]) -> Verdict:
    """The verdict at the p-value of the best of 10^`choices` tries, all of them together."""
    for name, number in choices.items():
        verdict = verdict.paid(number, of=name)
    return verdict


def plain(name: str) -> str:
    """A class's name without what its spelling may differ in: case, blanks, composed letters."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
