"""From the tensors of a graph to a state dict: what was folded in for speed is told apart again."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nnpassport.channels import channels_of, keeps_statistics
from nnpassport.scheme import UnsuitableModelError

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


def state_from(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors that have a place in `model`; a graph's own constants are left out.

    A batch norm none of whose tensors are there was folded into its layer: in its place comes one
    that does nothing but add the layer's bias,

        γ = 1, β = bias, μ = 0, σ² = 1 − eps

    and the network computes what the graph did. Counters of batch norms are in no graph. What else
    is missing stays missing. The model is only looked at, and may be on the meta device.
    """
    expected = model.state_dict()
    state = {n: torch.tensor(0) for n in expected if n.endswith("num_batches_tracked")}
    for layer, name in _norms(model):
        weight = tensors.get(f"{layer}.weight")
        if weight is None or any(f"{name}.{each}" in tensors for each in _STATISTICS):
            continue
        norm = model.get_submodule(name)
        ones = torch.ones(len(weight), dtype=weight.dtype)
        values = (ones, tensors.get(f"{layer}.bias", 0 * ones), 0 * ones, ones - float(norm.eps))  # type: ignore[arg-type]
        state |= {f"{name}.{each}": v for each, v in zip(_STATISTICS, values, strict=True)}
        tensors = {**tensors, f"{layer}.bias": 0 * ones}
    return state | {name: tensor for name, tensor in tensors.items() if name in expected}


def _norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each layer that a norm with running statistics follows, and that norm."""
    try:
        axes = channels_of(model)
    except UnsuitableModelError:  # another network: which norm is whose is not known
        return
    for producer in (each for axis in axes for each in axis.producers):
        if producer.norm is not None and keeps_statistics(model.get_submodule(producer.norm)):
            yield producer.layer, producer.norm
