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
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnpassport.alignment.channels import Channels, channels_of, spread_over, width
from nnpassport.alignment.names import Aligned, Places, align
from nnpassport.alignment.null import Unrelated
from nnpassport.alignment.rate import RELATED, likeness
from nnpassport.claims.rules import Work
from nnpassport.scheme import UnsuitableModelError

_ABOVE = 0.25
"""How far from the best unrelated network's mean cosine to 1 that of one channel is, to be a copy.

Half of what a whole layer needs, because some channels of a fine-tuned layer are further off.
"""

_NEAR_TWIN = 0.9
"""A channel as near as this to one of the reference's is of its making too, matched or not."""


AKIN = 0.2
"""Likeness from which on two networks have something to do with each other.

Below `RELATED`: what was made from a network and then pushed away from it is no stranger yet, and
networks of their own starts are at 0.
"""


class Relation(NamedTuple):
    """How much of one network another is made of.

    Attributes:
        likeness: where its filters' cosines lie between the best unrelated network's (0) and 1.
        whole: the network that was looked at, as it computes.
        parts: by axis, which of its channels were made from the other's.
    """

    likeness: float
    whole: nn.Module
    parts: Sequence[tuple[Channels, Bool[Tensor, " channels"]]]

    @property
    def related(self) -> bool:
        """Whether it was made from the other, or holds it."""
        return self.likeness >= RELATED

    @property
    def akin(self) -> bool:
        """Whether the two have anything to do with each other."""
        return self.likeness >= AKIN


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
def work_of(found: Relation, images: Float[Tensor, "images ..."]) -> Work | None:
    """What the part that was taken does in the network, on these inputs as it takes them.

    None where the network says nothing finite, or the same of all of them.
    """
    whole = found.whole(images).double()
    only = _heard(found, keep=True)(images).double()
    without = _heard(found, keep=False)(images).double()
    if not all(each.isfinite().all() for each in (whole, only, without)):
        return None
    variance = (whole - whole.mean(0)).square().sum()
    if variance == 0:
        return None
    missed = ((whole - whole.mean(0)) - (only - only.mean(0))).square().sum()
    changed = whole.argmax(1) != without.argmax(1)
    carries = float((1 - missed / variance).clamp(0, 1))
    return Work(carries, float(changed.double().mean()), len(images))


def _heard(found: Relation, *, keep: bool) -> nn.Module:
    """The network, in which nobody hears the other channels, or else those of the part."""
    model = deepcopy(found.whole)
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
