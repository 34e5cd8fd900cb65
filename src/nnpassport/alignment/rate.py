"""How far above chance alignment makes unrelated networks match, and what that costs a verdict.

Without alignment committed bits match any independent network as Binomial(n, ½), exactly. Alignment
looks at the reference, which was trained on the bits, so that is no longer certain: each bit may
match with a chance above ½. How far above is measured on unrelated networks, and the tail is taken
at the highest rate that any of them reached, if that is more than ½.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, Protocol

from nnpassport.files.arrays import Array
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.keys.counts import Counts, Reading
from nnpassport.scheme import UnsuitableModelError

MIXTURES = 8
"""How many networks are made of the suspect's own filters where no unrelated ones are given."""

READINGS = 2
"""A suspect can be read as it stands and aligned; whoever shows one may have looked at both."""

ANCHOR = "anchor"
"""What an alignment was to, if to the network before the mark."""
REFERENCE = "reference"
"""What it was to, if to the one that has the mark."""

RELATED = 0.5
"""How far from the best unrelated network's cosines to 1 a copy's must be, over the layers' median.

A network that was trained from the reference's weights stays near 1, one of its own start at 0.
"""


class Matched(Protocol):
    """What alignment says of a network that it has put in order."""

    @property
    def arrays(self) -> Mapping[str, Array]:
        """Its tensors, in the reference's order."""

    @property
    def cosines(self) -> Mapping[str, float]:
        """By layer, the mean |cosine| of filters that were matched."""

    @property
    def dropped(self) -> int:
        """How many channels were left out."""

    @property
    def missing(self) -> int:
        """How many the suspect lacked."""


class Other(NamedTuple):
    """An unrelated network, aligned."""

    matches: int
    cosines: Mapping[str, float]


def beside(
    read: Reading,
    networks: Iterable[Mapping[str, Array]],
    place: Callable[[Mapping[str, Array]], Matched],
    origin: str,
) -> tuple[list[Other], int]:
    """Networks that are unrelated, aligned and read; and how many could not be aligned.

    Raises:
        UnsuitableModelError: none can be.
    """
    others, skipped = list[Other](), 0
    for each in networks:
        try:
            there = place(each)
            others.append(Other(read(there.arrays).matches, there.cosines))
        except UnsuitableModelError:
            skipped += 1
    if not others:
        raise UnsuitableModelError(
            f"none of {origin} can be aligned to the reference, so there is no null; needed: "
            "networks of the owner's architecture, or none"
        )
    return others, skipped


def against(
    read: Reading, aligned: Matched, others: Sequence[Other], origin: str, skipped: int
) -> Counts:
    """What the key reads, at the rate of the unrelated networks, and all that alignment found."""
    found = read(aligned.arrays)
    matches = [other.matches for other in others]
    log10_p = read.verdict(found).log10_p_value
    null = {
        "networks": origin,
        "matches": matches,
        "skipped": skipped,
        "log10_p_empirical": None if log10_p is None else _at_rate_of_best(found, log10_p, matches),
        "bits": found.bits,
        "log10_p_analytic": log10_p,
    }
    strangers = [other.cosines for other in others]
    cautious = found if log10_p is None else with_null(found, matches)
    return cautious._replace(alignment=_facts(aligned, REFERENCE, strangers, null))


def exact(read: Reading, aligned: Matched, stranger: Mapping[str, float]) -> Counts:
    """What the key reads of a network aligned to one that knows nothing of its bits.

    Committed bits are then coins whatever alignment did, so the binomial tail is exact; only that
    there is a reading without alignment too is paid for. The cosines of a `stranger`, by layer, say
    what is alike by chance.
    """
    found = read(aligned.arrays)
    null = {
        "networks": "none is needed: what it was aligned to knows nothing of the bits",
        "matches": [],
        "skipped": 0,
        "log10_p_empirical": None,
        "bits": found.bits,
        "log10_p_analytic": read.verdict(found).log10_p_value,
    }
    reason = "aligned to the network before the mark, for which bits are coins"
    paid = found.paid(math.log10(READINGS), reason, of="readings")
    return paid._replace(alignment=_facts(aligned, ANCHOR, [stranger], null))


def _facts(
    aligned: Matched,
    to: str,
    strangers: Sequence[Mapping[str, float]],
    null: Mapping[str, Any],
) -> dict[str, Any]:
    """What `Verdict.alignment` says."""
    alike = likeness(aligned.cosines, strangers)
    return {
        "to": to,
        "bound": to == ANCHOR,
        "likeness": alike,
        "related": alike >= RELATED,
        "cosines": dict(aligned.cosines),
        "dropped": aligned.dropped,
        "missing": aligned.missing,
        "null": dict(null),
        "readings": READINGS,
    }


def with_null(counts: Counts, matches: Sequence[int]) -> Counts:
    """The counts, were every bit matched as often as in the best of networks with these matches.

    And were this the better of `READINGS` readings.
    """
    rate = max([0.5, *(count / counts.bits for count in matches)])
    found = (
        f"aligned, {counts.matches} of {counts.bits} match, and unrelated networks reach "
        f"{rate:.3f} of the bits at most"
    )
    tail = max(counts.tail, _at_rate_of_best(counts, counts.tail, matches))
    cautious = counts._replace(log10_tail=tail, found=found)
    return cautious.paid(math.log10(READINGS), of="readings")


def _at_rate_of_best(counts: Counts, log10_p: float, matches: Sequence[int]) -> float:
    """What becomes of a p-value if the chance of a match is not ½ but the best rate.

    It may be below the analytic one, where all of them match less than half: the verdict counts the
    larger of the two.
    """
    rate = max(count / counts.bits for count in matches) if matches else 0.5
    if rate >= 1:
        return 0.0
    analytic = log10_binomial_tail(counts.matches, counts.bits)
    empirical = log10_binomial_tail(counts.matches, counts.bits, max(rate, 1e-9))
    return min(0.0, log10_p + empirical - analytic)


def likeness(cosines: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> float:
    """Where the suspect's cosines lie between the best unrelated network's (0) and 1."""
    layers = []
    for name, cosine in cosines.items():
        best = max(other[name] for other in others)
        layers.append((cosine - best) / (1 - best) if best < 1 else 0.0)
    return median(layers)
