"""Was one network made from another, and does what was taken do anything there?

That all channels of A are found in B says that B *holds* A, not that B is A: anybody can put the
channels of a network of his own beside another's, and let them be heard next to nothing. So what
a part of B does is measured by running B: with nothing but the part, and without it.

*Carries*: what the part alone explains of the variance of B's outputs, on B's own scale. A part
that says the right thing in a whisper carries little. *Changes*: the share of B's answers that are
others once nobody hears the part any more. A part and its mirror image that cancel would change
much and carry nothing.

Both depend on what B is run on. On images of its task it does what it is for. On noise a network
may do anything, whatever its part in the answers that matter is, because whoever puts one in can
make it speak on noise and be silent on images; no ruling rests on that.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from statistics import median
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnpassport.channels import Channels, channels_of, spread_over, width
from nnpassport.evidence.alignment import Aligned, Places, align
from nnpassport.evidence.judge import Work
from nnpassport.evidence.null import RELATED, Unrelated, likeness
from nnpassport.scheme import UnsuitableModelError

_ABOVE = 0.25
"""How far from the best unrelated network's mean cosine to 1 that of one channel is, to be a copy.

Half of what a whole layer needs, because some channels of a fine-tuned layer are further off.
"""

_NEAR_TWIN = 0.9
"""A channel as near as this to one of the reference's is of its making too, matched or not."""


class Relation(NamedTuple):
    """How much of one network another is made of.

    Attributes:
        likeness: where its filters' cosines lie between the best unrelated network's (0) and 1.
        whole: the network that was looked at, as it computes; None if it could only be compared.
        parts: by axis, which of its channels were made from the other's.
    """

    likeness: float
    whole: nn.Module | None
    parts: Sequence[tuple[Channels, Bool[Tensor, " channels"]]]

    @property
    def related(self) -> bool:
        """Whether it was made from the other, or holds it."""
        return self.likeness >= RELATED


@torch.no_grad()
def relation(weights: Mapping[str, Tensor], reference: nn.Module, unrelated: Unrelated) -> Relation:
    """How much of the network with these weights was made from `reference`.

    Whole filters are compared: no bit is read here, so nothing has to be projected out.

    Raises:
        UnsuitableModelError: the two cannot be compared, or no unrelated network can.
    """
    aligned = align(weights, reference, {})
    others = []
    for each in unrelated.networks:
        try:
            others.append(align(each, reference, {}).cosines)
        except UnsuitableModelError:
            continue
    if not others:
        raise UnsuitableModelError(
            f"none of {unrelated.origin} can be compared with the reference; needed: networks of "
            "its architecture, or none"
        )
    best = {name: max(other[name] for other in others) for name in aligned.cosines}
    return Relation(likeness(aligned.cosines, others), aligned.whole, _parts(aligned, best))


@torch.no_grad()
def relation_in_place(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Relation:
    """The same without moving a channel, for networks of any kind: filters of one name and place.

    What unrelated networks reach is taken from pairs of filters of different places.

    Raises:
        UnsuitableModelError: no layer of the two has one name and one shape.
    """
    own, other = [], []
    for name, theirs in reference.items():
        mine = weights.get(name)
        if mine is None or mine.shape != theirs.shape or mine.dim() < 2 or len(mine) < 2:
            continue
        if not (mine.is_floating_point() and theirs.is_floating_point()):
            continue
        rows = [nn.functional.normalize(each.double().flatten(1)) for each in (mine, theirs)]
        own.append(float((rows[0] * rows[1]).sum(1).abs().mean()))
        other.append(float((rows[0] * rows[1].roll(1, 0)).sum(1).abs().mean()))
    if not own:
        raise UnsuitableModelError(
            "no layer of the two networks has one name and one shape; needed: networks of one kind"
        )
    layers = [
        (one - two) / (1 - two) if two < 1 else 0.0 for one, two in zip(own, other, strict=True)
    ]
    return Relation(median(layers), None, ())


@torch.no_grad()
def work_of(found: Relation, images: Float[Tensor, "images ..."]) -> Work | None:
    """What the part that was taken does in the network, on these inputs as it takes them.

    None where the network could not be run, or says the same of all of them.
    """
    if found.whole is None:
        return None
    whole = found.whole(images).double()
    only = _heard(found.whole, found, keep=True)(images).double()
    without = _heard(found.whole, found, keep=False)(images).double()
    if not all(each.isfinite().all() for each in (whole, only, without)):
        return None
    variance = (whole - whole.mean(0)).square().sum()
    if variance == 0:
        return None
    missed = ((whole - whole.mean(0)) - (only - only.mean(0))).square().sum()
    changed = whole.argmax(1) != without.argmax(1)
    carries = float((1 - missed / variance).clamp(0, 1))
    return Work(carries, float(changed.double().mean()), len(images))


def _heard(whole: nn.Module, found: Relation, *, keep: bool) -> nn.Module:
    """The network, in which nobody hears the other channels, or else those of the part."""
    model = deepcopy(whole)
    for axis, part in found.parts:
        silent = ~part if keep else part
        for name in axis.consumers:
            weight = model.get_submodule(name).get_parameter("weight")
            columns = spread_over(silent.nonzero().flatten(), weight.shape[1] // len(part))
            weight[:, columns] = 0
    return model


def _parts(
    aligned: Aligned, best: Mapping[str, float]
) -> list[tuple[Channels, Bool[Tensor, " channels"]]]:
    """By axis, the channels of the whole network that were made from the reference's."""
    found = []
    for axis, places in zip(channels_of(aligned.whole), aligned.places, strict=True):
        strangers = sum(best[each.layer] for each in axis.producers) / len(axis.producers)
        found.append((axis, _part(aligned.whole, axis, places, strangers)))
    return found


def _part(
    whole: nn.Module, axis: Channels, places: Places, strangers: float
) -> Bool[Tensor, " channels"]:
    enough = strangers + _ABOVE * (1 - strangers)
    matched = (places.source >= 0) & (places.cosine >= enough)
    part = torch.zeros(width(whole, axis), dtype=torch.bool)
    part[places.source[matched]] = True
    return part | (places.nearest >= max(enough, _NEAR_TWIN))
