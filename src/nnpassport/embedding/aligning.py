"""Alignment of networks in memory: what `alignment.names` does with arrays, as networks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from nnpassport.alignment import names
from nnpassport.alignment.channels import Network
from nnpassport.embedding.network.channels import network_of, with_arrays
from nnpassport.embedding.network.tensors import ArraysOf, as_array
from nnpassport.scheme import Verdict


class Aligned(NamedTuple):
    """A suspect in the reference's order; all else as in `names.Aligned`.

    Attributes:
        model: the aligned network, in evaluation mode.
        whole: the suspect as wide as it is, the same.
    """

    model: nn.Module
    cosines: Mapping[str, float]
    dropped: int
    missing: int
    whole: nn.Module
    places: Sequence[names.Places]


class AlignedVerdict(NamedTuple):
    """The verdict on an aligned network, and that network; None if only its filters were read."""

    verdict: Verdict
    aligned: Aligned | None


def align(
    weights: Mapping[str, Tensor], reference: nn.Module, forms: Mapping[str, Tensor]
) -> Aligned:
    """The network with these weights, its channels moved, negated and scaled back.

    Raises:
        UnsuitableModelError: they are not networks of one kind, or it is not known which layers of
            this kind share channels.
    """
    rows = {name: as_array(form) for name, form in forms.items()}
    found = names.align(dict(ArraysOf(weights)), network_of(reference), rows)
    return as_models(found, reference)


def as_models(found: names.Aligned, reference: nn.Module) -> Aligned:
    """What was aligned as networks that run."""

    def model(network: Network) -> nn.Module:
        return with_arrays(reference, network).eval()

    return Aligned(model(found.network), *found[1:4], model(found.whole), found.places)
