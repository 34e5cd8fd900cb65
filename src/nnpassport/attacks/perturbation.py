"""Removal by changing the weights alone: pruning, rounding, noise. No data, no training.

Each leaves the network that it was given as it was, and returns a changed copy in evaluation mode.

[Li17] Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient ConvNets, ICLR 2017.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.embedding.network.survey import Site, survey
from nnpassport.scheme import BadRecipeError, UnsuitableModelError


@torch.no_grad()
def prune(model: nn.Module, *, share: float) -> Attacked:
    """Zero the `share` of all parameters, in [0, 1], that is smallest in magnitude. [Fan19, fig. 3]

    Class-blind: one ranking over everything, norms and biases included, as in the paper's code. Of
    equal magnitudes the first go first, so that the number of zeros is exact.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
    """
    stop = stopwatch("W")
    check_share(share)
    pruned = deepcopy(model)
    values = [p for p in pruned.parameters() if p.is_floating_point()]
    # Not a quantile: torch.quantile takes 16 million values at most, and ties would blur the share.
    smallest = least(torch.cat([p.abs().flatten() for p in values]), share)
    for value, mask in zip(values, smallest.split([p.numel() for p in values]), strict=True):
        value.masked_fill_(mask.view(value.shape), 0)
    return Attacked(pruned.eval(), stop())


@torch.no_grad()
def prune_layerwise(model: nn.Module, *, share: float) -> Attacked:
    """Zero the smallest `share`, in [0, 1], of each convolution's and linear layer's weight.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: there is no such layer.
    """
    stop = stopwatch("W")
    check_share(share)
    pruned = deepcopy(model)
    for weight in _weights(pruned):
        weight.masked_fill_(least(weight.abs().flatten(), share).view(weight.shape), 0)
    return Attacked(pruned.eval(), stop())


@torch.no_grad()
def prune_channels(model: nn.Module, example: Tensor, *, share: float) -> Attacked:
    """Silence the `share`, in [0, 1], of each convolution's outputs with the least Σ|W|.   [Li17]

    `example` is an input that the network runs on (batch channels height width); it tells which
    norm belongs to which convolution. See `silence` for what is zeroed.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: there is no convolution before the last layer.
    """
    stop = stopwatch("W")
    check_share(share)
    pruned = deepcopy(model)
    for site in convolutions(pruned, example):
        magnitude = site.layer.get_parameter("weight").abs().flatten(1).sum(1)
        silence(pruned, site, least(magnitude, share))
    return Attacked(pruned.eval(), stop())


@torch.no_grad()
def add_noise(model: nn.Module, rng: torch.Generator, *, strength: float) -> Attacked:
    """Add N(0, (strength · std(W))²) to each convolution's and linear layer's weight W.

    Raises:
        BadRecipeError: `strength` is below 0.
        UnsuitableModelError: there is no such layer.
    """
    stop = stopwatch("W")
    if not strength >= 0:
        raise BadRecipeError(f"strength is {strength}; needed: 0 or more standard deviations")
    noisy = deepcopy(model)
    for weight in _weights(noisy):
        noise = torch.randn(weight.shape, generator=rng).to(weight)
        weight.add_(noise * (strength * weight.std(correction=0)))
    return Attacked(noisy.eval(), stop())


@torch.no_grad()
def quantise(model: nn.Module, kind: str) -> Attacked:
    """Round to the grid `kind` of `KINDS`; simulated, so the parameters keep their type.

    Floating-point kinds round every parameter and buffer. Integer kinds round the weights of
    convolutions and linear layers, symmetrically, with max |W| on the last value of the grid.

    Raises:
        BadRecipeError: `kind` is unknown.
        UnsuitableModelError: an integer kind finds no convolution and no linear layer.
    """
    stop = stopwatch("W")
    if kind not in KINDS:
        raise BadRecipeError(f"kind {kind!r} is unknown; it is one of: {', '.join(KINDS)}")
    quantised = deepcopy(model)
    KINDS[kind](quantised)
    return Attacked(quantised.eval(), stop())


def _to_floats(model: nn.Module, dtype: torch.dtype) -> None:
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.copy_(value.to(dtype))


def _to_steps_of_tensors(model: nn.Module, bits: int) -> None:
    for weight in _weights(model):
        weight.copy_(_rounded(weight, weight.abs().amax(), bits))


def _to_steps_of_channels(model: nn.Module, bits: int) -> None:
    for weight in _weights(model):
        largest = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True)
        weight.copy_(_rounded(weight, largest, bits))


def _rounded(weight: Tensor, largest: Tensor, bits: int) -> Tensor:
    step = largest / (2 ** (bits - 1) - 1)
    step = torch.where(step > 0, step, torch.ones_like(step))  # a channel of zeros stays one
    return (weight / step).round() * step


KINDS: Mapping[str, Callable[[nn.Module], None]] = {
    "float16": partial(_to_floats, dtype=torch.float16),
    "bfloat16": partial(_to_floats, dtype=torch.bfloat16),
    "int8-tensor": partial(_to_steps_of_tensors, bits=8),
    "int8-channel": partial(_to_steps_of_channels, bits=8),
    "int4-channel": partial(_to_steps_of_channels, bits=4),
}
"""Grids by name: those of a floating-point type, or the integers from −(2ᵇ⁻¹ − 1) to 2ᵇ⁻¹ − 1 times
one step for each weight tensor, or for each channel of it (its first axis)."""


def silence(model: nn.Module, site: Site, channels: Tensor) -> None:
    """Zero these output channels, a mask (out,), in place: rows of W, bias, scale and shift.

    The channel is then 0 on any input, and could be cut out. Only a norm that has no scale and
    shift still moves what it is given.
    """
    parts = [site.layer] if site.norm is None else [site.layer, model.get_submodule(site.norm)]
    for part in parts:
        for values in part.parameters(recurse=False):
            values.data[channels.to(values.device)] = 0


def convolutions(model: nn.Module, example: Tensor) -> list[Site]:
    """The convolutions that run once and not last, in the order they run, with their norms.

    Raises:
        UnsuitableModelError: there is none.
    """
    found = [site for site in survey(model, example).sites.values() if site.geometry.axes]
    if not found:
        raise UnsuitableModelError(
            f"{type(model).__name__} has no convolution whose channels could be pruned; "
            "needed: a Conv1d, Conv2d or Conv3d before the last layer"
        )
    return found


def least(values: Tensor, share: float) -> Tensor:
    """Mask (values,) of the `share`, in [0, 1], that is smallest; of equal ones the first."""
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.argsort(stable=True)[: round(share * len(values))]] = True
    return mask


def check_share(share: float) -> None:
    """Refuse a share that is not in [0, 1].

    Raises:
        BadRecipeError: it is not.
    """
    if not 0 <= share <= 1:
        raise BadRecipeError(f"share is {share}; needed: a fraction from 0 to 1")


def _weights(model: nn.Module) -> list[Tensor]:
    """The weights of all convolutions and linear layers, each once."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if not layers:
        raise UnsuitableModelError(
            f"{type(model).__name__} has no weights to change; "
            "needed: at least one convolution or linear layer"
        )
    return list(dict.fromkeys(layer.weight for layer in layers))
