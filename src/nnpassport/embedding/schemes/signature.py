"""Read a passport signature, or a trigger set's answers, and say how likely they are by chance."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation, evaluation_batches
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import filters, mean_patch
from nnpassport.embedding.network.layers import own_statistics
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.schemes.pan import encode_norms
from nnpassport.embedding.train.fidelity import recalibrate
from nnpassport.keys import reading
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import LayerShape
from nnpassport.keys.counts import as_published, matching, verdict_on
from nnpassport.keys.key import Key
from nnpassport.keys.reading import check_host, read_passports
from nnpassport.scheme import Verdict

__all__ = [
    "as_published",
    "host_weight",
    "matching",
    "presented",
    "read_answers",
    "read_signature",
    "secret_of",
    "secrets_of",
]


def secrets_of(key: Key) -> dict[str, surgery.Secret]:
    """What surgery needs of a key: each layer's mean patch and signs, by the layer's name."""
    return {layer.name: secret_of(key, layer) for layer in key.context.layers}


def secret_of(key: Key, layer: LayerShape) -> surgery.Secret:
    """The same of one layer."""
    if layer.channels is not None:
        parts = [torch.from_numpy(m).float() for _, m in key.channel_arrays(layer.name)]
        carries = torch.from_numpy(layer.channels.carrying(layer.weight[0]))
        return surgery.Secret(torch.cat(parts, 1), torch.ones(layer.weight[0]), carries)
    return surgery.Secret(
        mean_patch(key.layer_passport(layer.name), layer.weight, layer.geometry),
        key.layer_signs(layer.name),
    )


def read_signature(
    weights: Mapping[str, Tensor],
    key: Key,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Verdict:
    """V: read sign(Avg(W ∗ P_γ)) off the weights, and how likely so many matches are by chance.

    `weights` is a state dict, or one whose tensors are read when they are asked for: they are, one
    after the other, and one at a time is kept. Derived bits are uniform and independent of any
    network that was not trained on them, so their matches are Binomial(n, ½) whatever the weights:
    the p-value is exact. A key whose passports or bits were chosen freely has no p-value, because a
    linear system finds passports for any bits.

    Raises:
        UnsuitableModelError: a layer that the key names is missing or has another shape.
    """
    return verdict_on(read_passports(ArraysOf(weights), key), key, log10_alpha=log10_alpha)


def read_answers(
    answers: Int64[Tensor, " triggers"],
    key: Key,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Verdict:
    """V of the trigger set: `keys.reading.read_answers`, and the exact verdict.

    Raises:
        UnsuitableModelError: the key has no triggers, the answers are not one for each, or none
            of them was answered.
    """
    counts = reading.read_answers(answers.cpu().numpy(), key)
    return verdict_on(counts, key, log10_alpha=log10_alpha)


@torch.no_grad()
def presented(
    model: nn.Module,
    key: Key,
    data: ImageSet,
    normalise: Normalisation,
    *,
    two_branches: bool,
    encoded: bool = False,
) -> nn.Module:
    """A copy of a plain network that runs on the key's passports, in evaluation mode.

    Running statistics of a private branch are measured from `data` (no label is used), since a
    released network does not hold them. `encoded`: the passport is heard through small networks
    that say what the norms say (see `pan`).
    """
    copy = deepcopy(model).eval()
    example = normalise(data.images[:2]).to(next(copy.parameters()))
    surgery.wrap(copy, secrets_of(key), example, two_branches=two_branches)
    if encoded:
        encode_norms(copy)
    surgery.present(copy)
    private = own_statistics(copy)
    if private:
        parts = evaluation_batches(data, normalise, size=256, device=example.device)
        recalibrate(copy, private, parts)
    return copy


def host_weight(weights: Mapping[str, Tensor], layer: LayerShape) -> Tensor:
    """Weight of a host layer out of a state dict, its output channels first.

    Raises:
        UnsuitableModelError: it is missing or has another shape.
    """
    check_host(weights, layer)
    return filters(weights[f"{layer.name}.weight"], layer.geometry)
