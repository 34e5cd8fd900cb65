"""How well networks match after alignment that have nothing to do with the owner's.

Without alignment committed bits match any independent network as Binomial(n, ½), exactly. Alignment
looks at the reference, which was trained on the bits, so that is no longer certain: each bit may
match with a chance above ½. How far above is measured on unrelated networks, and the tail is taken
at the highest rate that any of them reached, if that is more than ½.

Where nobody gives unrelated networks, they are made of the suspect: mixtures of its own filters.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.channels import Floats, Network, flat
from nnpassport.alignment.names import Aligned, Forms, align_to, prepared
from nnpassport.alignment.rate import MIXTURES, Other, against, beside, exact
from nnpassport.alignment.shapes import Choice, Placed, Search
from nnpassport.files.arrays import Array, arrays_digest
from nnpassport.keys.counts import Counts, Reading

Draws = np.random.RandomState
"""Of PyTorch's generator on the processor, which has the same twister: see `normals`."""


class Unrelated(NamedTuple):
    """Networks that have nothing to do with the reference, and where they are from."""

    networks: Iterable[Mapping[str, Array]]
    origin: str


class AlignedCounts(NamedTuple):
    """What an aligned network has, and that network; None if only its filters were read."""

    counts: Counts
    aligned: Aligned | None


class ShapedCounts(NamedTuple):
    """What tensors have that were known by their shapes; it still has to be paid for.

    Attributes:
        taken: by layer, the name of the tensor that was read.
        log10_choices: of how many ways to choose them this is one.
    """

    counts: Counts
    taken: Mapping[str, str]
    log10_choices: float


def aligned_by_name(
    read: Reading,
    weights: Mapping[str, Array],
    reference: Network,
    forms: Forms,
    unrelated: Unrelated,
) -> AlignedCounts:
    """What the key reads of these weights once they are aligned to `reference`.

    Their p-value is the more cautious of the analytic one and the one at the rate of the unrelated
    network that matches best, and corrected for the choice between reading with and without.

    An unrelated network that cannot be aligned is left out and counted.

    Raises:
        UnsuitableModelError: suspect and reference cannot be aligned, or no unrelated network can.
    """
    ready = prepared(reference, forms)
    aligned = align_to(ready, weights)
    origin = unrelated.origin
    others, skipped = beside(read, unrelated.networks, partial(align_to, ready), origin)
    return AlignedCounts(against(read, aligned, others, origin, skipped), aligned)


def anchored_by_name(
    read: Reading, weights: Mapping[str, Array], anchor: Network, stranger: Mapping[str, Array]
) -> AlignedCounts:
    """What the key reads of these weights once they are aligned to the network before the mark.

    Nothing is hidden from alignment, and no null is taken: see `rate.exact`. The `stranger` is
    another network's weights, by which likeness is measured.

    Raises:
        UnsuitableModelError: suspect and anchor cannot be aligned, or the stranger cannot.
    """
    ready = prepared(anchor, {})
    aligned, other = align_to(ready, weights), align_to(ready, stranger)
    return AlignedCounts(exact(read, aligned, other.cosines), aligned)


def anchored_by_shape(
    read: Reading, weights: Mapping[str, Array], anchor: Network, draws: Draws
) -> ShapedCounts:
    """The same of tensors that are the anchor's layers by their shapes (`shapes`).

    Of the few choices that fit best the one that matches best is taken, and all have still to be
    paid for. `read` is given filters alone, with the anchor's signs and lengths.

    Raises:
        UnsuitableModelError: no choice of tensors fits.
    """
    search = Search(weights, anchor, {})
    choice, placed = _best_of(search, read)
    stranger = search.placed(mixed(search.matrices(choice), draws))
    counts = exact(read, placed, stranger.cosines)
    return ShapedCounts(counts, _taken(choice), search.log10_choices)


def aligned_by_shape(
    read: Reading,
    weights: Mapping[str, Array],
    reference: Network,
    forms: Forms,
    unrelated: Unrelated | None,
    draws: Draws,
) -> ShapedCounts:
    """What the key reads of tensors that are the reference's layers by their shapes (`shapes`).

    Of the few choices that fit best the one that matches best is taken. What is unrelated is as
    for `aligned_by_name`, and `MIXTURES` of what was chosen in any case.

    Raises:
        UnsuitableModelError: no choice of tensors fits, or no unrelated network can be aligned.
    """
    search = Search(weights, reference, forms)
    choice, placed = _best_of(search, read)
    others, skipped = list[Other](), 0
    origin = f"{MIXTURES} mixtures of the suspect's own filters"
    if unrelated is not None:

        def place(network: Mapping[str, Array]) -> Placed:
            other = Search(network, reference, forms)
            return other.placed(other.matrices(other.best()[0]))

        others, skipped = beside(read, unrelated.networks, place, unrelated.origin)
        origin = f"{unrelated.origin} and {origin}"
    chosen = search.matrices(choice)
    strangers = (mixed(chosen, draws) for _ in range(MIXTURES))
    others += beside(read, strangers, search.placed, origin)[0]
    counts = against(read, placed, others, origin, skipped)
    return ShapedCounts(counts, _taken(choice), search.log10_choices)


def _best_of(search: Search, read: Reading) -> tuple[Choice, Placed]:
    """Of the choices that fit best, the one that matches best."""
    choices: dict[object, Choice] = {}
    for each in search.best():
        choices.setdefault(search.alike(each), each)
    tried = [(each, search.placed(search.matrices(each))) for each in choices.values()]
    return max(tried, key=lambda each: read(each[1].arrays).matches)


def _taken(choice: Choice) -> dict[str, str]:
    return {layer: each.name for layer, each in choice.taken.items()}


def of_its_own(weights: Mapping[str, Array], reference: Network) -> Unrelated:
    """Mixtures of the filters of the network with these weights, always the same, as the null."""
    layers = [p.layer for axis in reference.axes for p in axis.producers]
    there = [n for n in layers if f"{n}.weight" in weights and weights[f"{n}.weight"].ndim > 1]
    origin = f"{MIXTURES} mixtures of the suspect's own filters"
    return Unrelated(mixtures(weights, there, seeded(weights), MIXTURES), origin)


def mixtures(
    weights: Mapping[str, Array], layers: Iterable[str], draws: Draws, count: int
) -> Iterator[dict[str, Array]]:
    """Networks whose filters in each of `layers` are random rotations among the suspect's own.

    They have the suspect's filters' second moments, so they look to alignment like a network of
    that kind, and no filter of it is left.
    """
    names = [f"{layer}.weight" for layer in layers]
    for _ in range(count):
        rotated = mixed({name: weights[name] for name in names}, draws)
        mine = {name: rows.astype(weights[name].dtype) for name, rows in rotated.items()}
        yield {**weights, **mine}


def mixed(matrices: Mapping[str, Array], draws: Draws) -> dict[str, Floats]:
    """The same with filters that are random rotations among those of each matrix, in float64."""
    found = dict[str, Floats]()
    for name, rows in matrices.items():
        rotation = np.linalg.qr(normals(draws, len(rows) ** 2).reshape((len(rows),) * 2))[0]
        found[name] = (rotation @ flat(rows).astype(np.float64)).reshape(rows.shape)
    return found


def seeded(weights: Mapping[str, Array]) -> Draws:
    """What draws for these weights: whoever repeats it finds the same."""
    return Draws(int(arrays_digest(weights)[:15], 16) % 2**32)


def normals(draws: Draws, count: int) -> NDArray[np.float64]:
    """Standard normal numbers, as `torch.randn` draws 16 of them or more in float64.

    Verdicts of before, when PyTorch drew them, are repeated by that. Of fewer it has others.
    """
    sixteens, rest = divmod(max(count, 16), 16)
    found = _uniform(draws, max(count, 16))
    found[: 16 * sixteens] = _from_uniform(found[: 16 * sixteens])
    if rest:
        found[-16:] = _from_uniform(_uniform(draws, 16))
    return found[:count]


def _uniform(draws: Draws, count: int) -> NDArray[np.float64]:
    words = draws.randint(0, 2**32, 2 * count, dtype=np.uint32).astype(np.uint64)
    return ((words[::2] << 32 | words[1::2]) & (2**53 - 1)).astype(np.float64) * 2.0**-53


def _from_uniform(uniform: NDArray[np.float64]) -> NDArray[np.float64]:
    """Box and Muller's, eight pairs at a time."""
    one, other = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius, angle = np.sqrt(-2 * np.log1p(-one)), 2 * np.pi * other
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)
