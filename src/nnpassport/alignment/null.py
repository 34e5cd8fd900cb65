"""How well networks match after alignment that have nothing to do with the owner's.

Without alignment committed bits match any independent network as Binomial(n, ½), exactly. Alignment
looks at the reference, which was trained on the bits, so that is no longer certain: each bit may
match with a chance above ½. How far above is measured on unrelated networks, and the tail is taken
at the highest rate that any of them reached, if that is more than ½.

Where nobody gives unrelated networks, they are made of the suspect: mixtures of its own filters.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.alignment.names import Aligned, Forms, align_to, prepared
from nnpassport.alignment.shapes import Choice, Placed, Search, mixed
from nnpassport.keys.chance import log10_binomial_tail, log10_corrected
from nnpassport.scheme import UnsuitableModelError, Verdict

MIXTURES = 8
"""How many networks are made of the suspect's own filters where no unrelated ones are given."""

READINGS = 2
"""A suspect can be read as it stands and aligned; whoever shows one may have looked at both."""

RELATED = 0.5
"""How far from the best unrelated network's cosines to 1 a copy's must be, over the layers' median.

A network that was trained from the reference's weights stays near 1, one of its own start at 0.
"""

Read = Callable[[Mapping[str, Tensor]], Verdict]
"""V with one key, on a state dict."""


class Unrelated(NamedTuple):
    """Networks that have nothing to do with the reference, and where they are from."""

    networks: Iterable[Mapping[str, Tensor]]
    origin: str


class AlignedVerdict(NamedTuple):
    """The verdict on an aligned network, and that network; None if only its filters were read."""

    verdict: Verdict
    aligned: Aligned | None


class ShapedVerdict(NamedTuple):
    """The verdict on tensors that were known by their shapes, which still has to pay for it.

    Attributes:
        taken: by layer, the name of the tensor that was read.
        log10_choices: of how many ways to choose them this is one.
    """

    verdict: Verdict
    taken: Mapping[str, str]
    log10_choices: float


def aligned_verdict(
    read: Read,
    weights: Mapping[str, Tensor],
    reference: nn.Module,
    forms: Forms,
    unrelated: Unrelated,
) -> AlignedVerdict:
    """V on the suspect with these weights once it is aligned to `reference`.

    Its p-value is the more cautious of the analytic one and the one at the rate of the unrelated
    network that matches best, and corrected for the choice between reading with and without.

    An unrelated network that cannot be aligned is left out and counted.

    Raises:
        UnsuitableModelError: suspect and reference cannot be aligned, or no unrelated network can.
    """
    against = prepared(reference, forms)
    aligned = align_to(against, weights)
    found = read(aligned.model.state_dict())
    others: list[_Other] = []
    skipped = 0
    for each in unrelated.networks:
        try:
            other = align_to(against, each)
        except UnsuitableModelError:
            skipped += 1
            continue
        others.append(_Other(read(other.model.state_dict()).matches, other.cosines))
    _require(others, unrelated.origin)
    return AlignedVerdict(_against(found, aligned, others, unrelated.origin, skipped), aligned)


def verdict_by_shape(
    read: Read,
    weights: Mapping[str, Tensor],
    reference: nn.Module,
    forms: Forms,
    unrelated: Unrelated | None,
    rng: torch.Generator,
) -> ShapedVerdict:
    """V on tensors of the suspect that are the reference's layers by their shapes (`byshape`).

    Of the few choices that fit best the one that matches best is taken. What is unrelated is as
    for `aligned_verdict`, and `MIXTURES` of what was chosen in any case.

    Raises:
        UnsuitableModelError: no choice of tensors fits, or no unrelated network can be aligned.
    """
    search = Search(weights, reference, forms)
    choices: dict[object, Choice] = {}
    for each in search.best():
        choices.setdefault(search.alike(each), each)
    tried = [(each, search.placed(search.matrices(each))) for each in choices.values()]
    choice, placed = max(tried, key=lambda each: read(each[1].tensors).matches)
    found = read(placed.tensors)
    others: list[_Other] = []
    skipped = 0
    for network in () if unrelated is None else unrelated.networks:
        try:
            other = Search(network, reference, forms)
            aligned = other.placed(other.matrices(other.best()[0]))
        except UnsuitableModelError:
            skipped += 1
            continue
        others.append(_Other(read(aligned.tensors).matches, aligned.cosines))
    if unrelated is not None:
        _require(others, unrelated.origin)
    chosen = search.matrices(choice)
    for _ in range(MIXTURES):
        aligned = search.placed(mixed(chosen, rng))
        others.append(_Other(read(aligned.tensors).matches, aligned.cosines))
    origin = f"{MIXTURES} mixtures of the suspect's own filters"
    origin = origin if unrelated is None else f"{unrelated.origin} and {origin}"
    verdict = _against(found, placed, others, origin, skipped)
    taken = {layer: each.name for layer, each in choice.taken.items()}
    return ShapedVerdict(verdict, taken, search.log10_choices)


class _Other(NamedTuple):
    """An unrelated network, aligned."""

    matches: int
    cosines: Mapping[str, float]


def _require(others: Sequence[_Other], origin: str) -> None:
    if not others:
        raise UnsuitableModelError(
            f"none of {origin} can be aligned to the reference, so there is no null; "
            "needed: networks of the owner's architecture, or none"
        )


def _against(
    found: Verdict, aligned: Aligned | Placed, others: Sequence[_Other], origin: str, skipped: int
) -> Verdict:
    """The verdict, at the rate of the unrelated networks, and all that alignment found."""
    matches = [other.matches for other in others]
    cautious = with_null(found, matches)
    alike = likeness(aligned.cosines, [other.cosines for other in others])
    facts = {
        "likeness": alike,
        "related": alike >= RELATED,
        "cosines": dict(aligned.cosines),
        "dropped": aligned.dropped,
        "missing": aligned.missing,
        "null": {
            "networks": origin,
            "bits": found.bits,
            "matches": matches,
            "log10_p_analytic": found.log10_p_value,
            "skipped": skipped,
            "log10_p_empirical": _at_rate_of_best(found, matches),
        },
        "readings": READINGS,
    }
    return replace(cautious, alignment=facts)


def with_null(verdict: Verdict, matches: Sequence[int], chance: float = 0.5) -> Verdict:
    """The verdict, were every bit matched as often as in the best of networks with these matches.

    And were this the better of `READINGS` readings. A verdict without p-value is returned as it is.
    """
    if verdict.log10_p_value is None:
        return verdict
    rate = max([chance, *(count / verdict.bits for count in matches)])
    cautious = max(verdict.log10_p_value, _at_rate_of_best(verdict, matches, chance) or 0.0)
    log10_p = log10_corrected(cautious, math.log10(READINGS))
    marked = log10_p <= verdict.log10_alpha
    relation = "at or below" if marked else "above"
    return replace(
        verdict,
        log10_p_value=log10_p,
        marked=marked,
        reason=f"aligned, {verdict.matches} of {verdict.bits} match; unrelated networks reach "
        f"{rate:.3f} of the bits at most, so p = 10^{log10_p:.1f} (for {READINGS} readings) is "
        f"{relation} α = 10^{verdict.log10_alpha:.1f}",
    )


def _at_rate_of_best(verdict: Verdict, matches: Sequence[int], chance: float = 0.5) -> float | None:
    """log₁₀ of the tail at the rate of the best match, with the verdict's own corrections.

    It may be below the analytic one, where all of them match less than half: the verdict counts the
    larger of the two.
    """
    if verdict.log10_p_value is None:
        return None
    rate = max(count / verdict.bits for count in matches) if matches else chance
    if rate >= 1:
        return 0.0
    analytic = log10_binomial_tail(verdict.matches, verdict.bits, chance)
    empirical = log10_binomial_tail(verdict.matches, verdict.bits, max(rate, 1e-9))
    return min(0.0, verdict.log10_p_value + empirical - analytic)


def likeness(cosines: Mapping[str, float], others: Sequence[Mapping[str, float]]) -> float:
    """Where the suspect's cosines lie between the best unrelated network's (0) and 1."""
    layers = []
    for name, cosine in cosines.items():
        best = max(other[name] for other in others)
        layers.append((cosine - best) / (1 - best) if best < 1 else 0.0)
    return median(layers)


def mixtures(
    weights: Mapping[str, Tensor], layers: Iterable[str], rng: torch.Generator, count: int
) -> Iterator[dict[str, Tensor]]:
    """Networks whose filters in each of `layers` are random rotations among the suspect's own.

    They have the suspect's filters' second moments, so they look to alignment like a network of
    that kind, and no filter of it is left.
    """
    names = [f"{layer}.weight" for layer in layers]
    for _ in range(count):
        mixed = dict(weights)
        for name in names:
            rows = weights[name].flatten(1).double()
            noise = torch.randn(len(rows), len(rows), generator=rng, dtype=torch.float64)
            rotation = torch.linalg.qr(noise).Q
            mixed[name] = (rotation @ rows).view_as(weights[name]).to(weights[name])
        yield mixed
