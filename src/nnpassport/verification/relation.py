"""Was one network made from another, and which of its channels are the other's?

That all channels of A are found in B says that B *holds* A, not that B is A: anybody can put the
channels of a network of his own beside another's, and let them be heard next to nothing. So what
a part of B does is measured by running B: see `embedding.work`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.channels import Channels, Network, width
from nnpassport.alignment.names import Aligned, Places, align_to, prepared
from nnpassport.alignment.null import Unrelated
from nnpassport.alignment.rate import RELATED, likeness
from nnpassport.files.arrays import Array
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

Part = tuple[Channels, NDArray[np.bool_]]
"""An axis, and which of its channels are meant."""


class Relation(NamedTuple):
    """How much of one network another is made of.

    Attributes:
        likeness: where its filters' cosines lie between the best unrelated network's (0) and 1.
        whole: the network that was looked at, as it computes.
        parts: by axis, which of its channels were made from the other's.
    """

    likeness: float
    whole: Network
    parts: Sequence[Part]

    @property
    def related(self) -> bool:
        """Whether it was made from the other, or holds it."""
        return self.likeness >= RELATED

    @property
    def akin(self) -> bool:
        """Whether the two have anything to do with each other."""
        return self.likeness >= AKIN


def relation(weights: Mapping[str, Array], reference: Network, unrelated: Unrelated) -> Relation:
    """How much of the network with these weights was made from `reference`.

    Whole filters are compared: no bit is read here, so nothing has to be projected out.

    Raises:
        UnsuitableModelError: the two cannot be compared, or no unrelated network can.
    """
    ready, others = prepared(reference, {}), []
    aligned = align_to(ready, weights)
    for each in unrelated.networks:
        try:
            others.append(align_to(ready, each).cosines)
        except UnsuitableModelError:
            continue
    if not others:
        raise UnsuitableModelError(
            f"none of {unrelated.origin} can be compared with the reference; needed: networks of "
            "its architecture, or none"
        )
    best = {name: max(other[name] for other in others) for name in aligned.cosines}
    return Relation(likeness(aligned.cosines, others), aligned.whole, _parts(aligned, best))


def _parts(aligned: Aligned, best: Mapping[str, float]) -> list[Part]:
    """By axis, the channels of the whole network that were made from the reference's."""
    found = []
    for axis, places in zip(aligned.whole.axes, aligned.places, strict=True):
        strangers = sum(best[each.layer] for each in axis.producers) / len(axis.producers)
        found.append((axis, _part(width(aligned.whole, axis), places, strangers)))
    return found


def _part(channels: int, places: Places, strangers: float) -> NDArray[np.bool_]:
    enough = strangers + _ABOVE * (1 - strangers)
    matched = (places.source >= 0) & (places.cosine >= enough)
    part = np.zeros(channels, bool)
    part[places.source[matched]] = True
    return part | (places.nearest >= max(enough, _NEAR_TWIN))
