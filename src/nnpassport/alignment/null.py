"""How well networks match after alignment that have nothing to do with the owner's.

Without alignment committed bits match any independent network as Binomial(n, ½), exactly. Alignment
looks at the reference, which was trained on the bits, so that is no longer certain: each bit may
match with a chance above ½. How far above is measured on unrelated networks, and the tail is taken
at the highest rate that any of them reached, if that is more than ½.

Where nobody gives unrelated networks, they are made of the suspect: mixtures of its own filters.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.alignment.names import Aligned, Forms, align_to, prepared
from nnpassport.alignment.rate import MIXTURES, Other, against, exact
from nnpassport.alignment.shapes import Choice, Placed, Search, mixed
from nnpassport.scheme import UnsuitableModelError, Verdict

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
    ready = prepared(reference, forms)
    aligned = align_to(ready, weights)
    found = read(aligned.model.state_dict())
    others: list[Other] = []
    skipped = 0
    for each in unrelated.networks:
        try:
            other = align_to(ready, each)
        except UnsuitableModelError:
            skipped += 1
            continue
        others.append(Other(read(other.model.state_dict()).matches, other.cosines))
    _require(others, unrelated.origin)
    return AlignedVerdict(against(found, aligned, others, unrelated.origin, skipped), aligned)


def anchored_verdict(
    read: Read, weights: Mapping[str, Tensor], anchor: nn.Module, stranger: Mapping[str, Tensor]
) -> AlignedVerdict:
    """V on the suspect with these weights once it is aligned to the network before the mark.

    Nothing is hidden from alignment, and no null is taken: see `rate.exact`. The `stranger` is
    another network's weights, by which likeness is measured.

    Raises:
        UnsuitableModelError: suspect and anchor cannot be aligned, or the stranger cannot.
    """
    ready = prepared(anchor, {})
    aligned, other = align_to(ready, weights), align_to(ready, stranger)
    return AlignedVerdict(exact(read(aligned.model.state_dict()), aligned, other.cosines), aligned)


def anchored_by_shape(
    read: Read, weights: Mapping[str, Tensor], anchor: nn.Module, rng: torch.Generator
) -> ShapedVerdict:
    """V on tensors of the suspect that are the anchor's layers by their shapes (`shapes`).

    Of the few choices that fit best the one that matches best is taken, and the verdict has still
    to pay for all. `read` is given filters alone, with the anchor's signs and lengths.

    Raises:
        UnsuitableModelError: no choice of tensors fits.
    """
    search = Search(weights, anchor, {})
    choice, placed = _best_of(search, read)
    stranger = search.placed(mixed(search.matrices(choice), rng))
    verdict = exact(read(placed.tensors), placed, stranger.cosines)
    return ShapedVerdict(verdict, _taken(choice), search.log10_choices)


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
    choice, placed = _best_of(search, read)
    found = read(placed.tensors)
    others: list[Other] = []
    skipped = 0
    for network in () if unrelated is None else unrelated.networks:
        try:
            other = Search(network, reference, forms)
            aligned = other.placed(other.matrices(other.best()[0]))
        except UnsuitableModelError:
            skipped += 1
            continue
        others.append(Other(read(aligned.tensors).matches, aligned.cosines))
    if unrelated is not None:
        _require(others, unrelated.origin)
    chosen = search.matrices(choice)
    for _ in range(MIXTURES):
        aligned = search.placed(mixed(chosen, rng))
        others.append(Other(read(aligned.tensors).matches, aligned.cosines))
    origin = f"{MIXTURES} mixtures of the suspect's own filters"
    origin = origin if unrelated is None else f"{unrelated.origin} and {origin}"
    verdict = against(found, placed, others, origin, skipped)
    return ShapedVerdict(verdict, _taken(choice), search.log10_choices)


def _best_of(search: Search, read: Read) -> tuple[Choice, Placed]:
    """Of the choices that fit best, the one that matches best."""
    choices: dict[object, Choice] = {}
    for each in search.best():
        choices.setdefault(search.alike(each), each)
    tried = [(each, search.placed(search.matrices(each))) for each in choices.values()]
    return max(tried, key=lambda each: read(each[1].tensors).matches)


def _taken(choice: Choice) -> dict[str, str]:
    return {layer: each.name for layer, each in choice.taken.items()}


def _require(others: Sequence[Other], origin: str) -> None:
    if not others:
        raise UnsuitableModelError(
            f"none of {origin} can be aligned to the reference, so there is no null; "
            "needed: networks of the owner's architecture, or none"
        )


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
