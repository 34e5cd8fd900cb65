"""From the tensors of a graph to a state dict: what was folded in for speed is told apart again."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nnpassport.alignment.channels import Channels, Producer, channels_of, keeps_statistics
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
        if weight is None or _is_there(name, tensors):
            continue
        norm = model.get_submodule(name)
        ones = torch.ones(len(weight), dtype=weight.dtype)
        values = (ones, tensors.get(f"{layer}.bias", 0 * ones), 0 * ones, ones - float(norm.eps))  # type: ignore[arg-type]
        state |= {f"{name}.{each}": v for each, v in zip(_STATISTICS, values, strict=True)}
        tensors = {**tensors, f"{layer}.bias": 0 * ones}
    return state | {name: tensor for name, tensor in tensors.items() if name in expected}


def without_strangers(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors without those that have no place in `model`; counters that are missing are zero.

    A bias that a layer of the model does not have stays, unless it is zero: it changes what is
    computed.
    """
    expected, layers = model.state_dict(), dict(model.named_modules())
    counters = {n: torch.tensor(0) for n in expected if n.endswith("num_batches_tracked")}
    return counters | {
        name: tensor
        for name, tensor in tensors.items()
        if name in expected
        or (name.endswith(".bias") and name.removesuffix(".bias") in layers and tensor.any())
    }


def completed(
    tensors: Mapping[str, Tensor], model: nn.Module, axes: list[Channels]
) -> dict[str, Tensor]:
    """A state dict for a network like `model`, of other widths perhaps, out of what there is.

    What has no place there is left out, but a bias of a layer on these axes: such a layer may have
    one. Folded norms are told apart, and what a norm or layer lacks is filled in by what changes
    nothing. Matrices and convolutions that multiply the same numbers are each other.
    """
    layers = {each.layer: each for axis in axes for each in axis.producers}
    ends = {name for axis in axes for name in axis.consumers} - layers.keys()
    tensors = dict(tensors)
    for name in (*layers, *ends):
        wanted = model.get_submodule(name).get_parameter("weight")
        if (there := tensors.get(f"{name}.weight")) is not None:
            tensors[f"{name}.weight"] = _reshaped(there, wanted)
    folded = {layer for layer, norm in _norms(model) if not _is_there(norm, tensors)}
    biases = {f"{name}.bias" for name in layers.keys() - folded}
    added = {name: tensor for name, tensor in tensors.items() if name in biases}
    state = {**added, **state_from(tensors, model)}
    for name in (*layers, *ends):
        weight = state.get(f"{name}.weight")
        if weight is None or weight.dim() == 0:
            continue
        rows = len(weight)
        if model.get_submodule(name)._parameters.get("bias") is not None:
            state.setdefault(f"{name}.bias", weight.new_zeros(rows))
        if name in layers:
            state = {**_plain(model, layers[name], weight.new_ones(rows)), **state}
    return state


def _plain(model: nn.Module, producer: Producer, ones: Tensor) -> dict[str, Tensor]:
    """The tensors of a norm that changes nothing."""
    if producer.norm is None:
        return {}
    norm = model.get_submodule(producer.norm)
    values = {"weight": ones, "bias": 0 * ones}
    if keeps_statistics(norm):
        values |= {"running_mean": 0 * ones, "running_var": ones - float(norm.eps)}  # type: ignore[arg-type]
    return {f"{producer.norm}.{name}": each for name, each in values.items()}


def _reshaped(there: Tensor, wanted: Tensor) -> Tensor:
    """A convolution as wide as what it reads as a matrix, and the reverse, where `wanted` is so."""
    if there.dim() == wanted.dim() or there.dim() < 2 or there.numel() == 0:
        return there
    if wanted.dim() == 2:
        return there.flatten(1)
    kernel = wanted.shape[2:]
    if there.dim() == 2 and there.shape[1] % kernel.numel() == 0:
        return there.reshape(len(there), -1, *kernel)
    return there


def _is_there(norm: str, tensors: Mapping[str, Tensor]) -> bool:
    return any(f"{norm}.{each}" in tensors for each in _STATISTICS)


def _norms(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each layer that a norm with running statistics follows, and that norm."""
    try:
        axes = channels_of(model)
    except UnsuitableModelError:  # another network: which norm is whose is not known
        return
    for producer in (each for axis in axes for each in axis.producers):
        if producer.norm is not None and keeps_statistics(model.get_submodule(producer.norm)):
            yield producer.layer, producer.norm
