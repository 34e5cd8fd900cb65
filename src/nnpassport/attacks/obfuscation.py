"""Removal at no cost at all: other weights that compute the same function.

A network with ReLUs and norms computes the same if a channel is negated before its norm, moved,
scaled, doubled, or joined by others that cancel. Whoever holds the weights can do that without
data, training or loss, and a mark that is read off the weights as they lie is gone. It is not off
the network: the owner's filters are all still there, up to order, sign and scale, for whoever
looks for them.

Each leaves the network that it was given as it was and returns a changed copy in the same mode.
Outputs are equal up to rounding *in evaluation mode*. In training mode a batch norm whose own rows
were scaled has another eps to its variance. AlexNet and ResNet only: see `channels`.

[Yan22] Yan, Pan, Zhang, Yang: Cracking White-box DNN Watermarks via Invariant Neuron Transforms,
        arXiv 2205.00199.
[Yan23] Yan, Pan, Zhang, Yang: Rethinking White-Box Watermarks on Deep Learning Models under Neural
        Structural Obfuscation, USENIX Security 2023.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.alignment.channels import (
    Channels,
    Producer,
    affine,
    channels_of,
    common_groups,
    group_size,
    keeps_statistics,
    negate,
    parts_of,
    reorder,
    scale_before_norm,
    scale_columns,
    scale_rows,
    spread_over,
    take,
    width,
)
from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.attacks.perturbation import check_share
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

Obfuscation = Callable[[nn.Module, torch.Generator], Attacked]


@torch.no_grad()
def flip_signs(model: nn.Module, rng: torch.Generator, *, share: float = 0.5) -> Attacked:
    """Negate channels between a convolution and its norm, which negates them back.       [Yan22]

        W_i, b_i, μ_i, γ_i  →  −W_i, −b_i, −μ_i, −γ_i

    `share`, in [0, 1], is of all there are. A group norm takes one mean and variance for a group,
    so there it is whole groups, and a layer norm's layer as a whole or not at all. Layers without a
    norm are left alone: a ReLU does not let a sign pass.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: the network is not known to `channels_of`, or has no norm.
    """
    stop = stopwatch("W")
    check_share(share)
    hosts = _normed(channels_of(model))
    if not hosts:
        raise UnsuitableModelError(
            f"no layer of {type(model).__name__} has a norm, and a ReLU does not let a sign pass; "
            "needed: a norm after a convolution. Without one permute and rescale work"
        )
    flipped = deepcopy(model)
    sizes = [group_size(flipped, host.norm) for host in hosts]
    groups = [len(affine(flipped, h)["weight"]) // s for h, s in zip(hosts, sizes, strict=True)]
    chosen = torch.randperm(sum(groups), generator=rng) < round(share * sum(groups))
    for host, mask, size in zip(hosts, chosen.split(groups), sizes, strict=True):
        sign = torch.where(mask.repeat_interleave(size), -1.0, 1.0)
        negate(flipped, host, sign)
    return Attacked(flipped, stop())


@torch.no_grad()
def permute(model: nn.Module, rng: torch.Generator) -> Attacked:
    """Put the channels of every hidden layer in another order, and their readers' columns. [Yan22]

    All layers that add to a residual stream get the same order. With a group norm, channels move
    inside their group and groups move as wholes.

    Raises:
        UnsuitableModelError: the network is not known to `channels_of`.
    """
    stop = stopwatch("W")
    found = channels_of(model)
    permuted = deepcopy(model)
    for channels in found:
        count = width(permuted, channels)
        inner, outer = common_groups(permuted, channels)
        inside = torch.rand(count // inner, inner, generator=rng).argsort(1)
        order = (inside + torch.arange(0, count, inner)[:, None]).view(count // outer, outer)
        wholes = torch.randperm(count // outer, generator=rng)
        reorder(permuted, channels, order[wholes].flatten())
    return Attacked(permuted, stop())


@torch.no_grad()
def rescale(model: nn.Module, rng: torch.Generator, *, spread: float = 2.0) -> Attacked:
    """Scale every hidden channel, and its readers' columns by the inverse.                [Yan22]

        γ_i, β_i  →  s_i·γ_i, s_i·β_i      (without a norm: W_i, b_i)
        W_i, b_i, μ_i, σ_i²  →  t_i·W_i, t_i·b_i, t_i·μ_i, t_i²·σ_i²     (running statistics only)

    s and t are log-uniform in [1/`spread`, `spread`]. All layers that add to a residual stream get
    the same s. The second line changes nothing behind the norm, once γ_i makes up for eps. No bit
    of a layer that reads the images can change: its rows are only multiplied by positive numbers.

    Raises:
        BadRecipeError: `spread` is below 1 or not finite.
        UnsuitableModelError: the network is not known to `channels_of`.
    """
    stop = stopwatch("W")
    if not 1 <= spread < math.inf:
        raise BadRecipeError(f"spread is {spread}; needed: a finite factor of at least 1")
    found = channels_of(model)
    rescaled = deepcopy(model)
    for channels in found:
        factor = _log_uniform(width(rescaled, channels), spread, rng)
        for producer in channels.producers:
            for values in affine(rescaled, producer).values():
                scale_rows(values, factor)
        for name in channels.consumers:
            scale_columns(rescaled.get_submodule(name).get_parameter("weight"), 1 / factor)
    for producer in _normed(found):
        layer, norm = parts_of(rescaled, producer)
        if keeps_statistics(norm):
            scale_before_norm(
                layer, norm, _log_uniform(len(norm.get_buffer("running_var")), spread, rng)
            )
    return Attacked(rescaled, stop())


@torch.no_grad()
def insert_dummies(model: nn.Module, rng: torch.Generator, *, share: float = 0.1) -> Attacked:
    """Add channels in pairs, at random places, whose contributions cancel.               [Yan23]

    `share`, in [0, 1], is how many are added to each layer for each that it has, but one pair at
    least unless it is 0. Two twins compute the same from random filters, as large as an existing
    channel's and with a copy of its norm; whoever reads them does so with opposite random columns,
    as large as that channel's (only the next layer's dummies, which cancel themselves, read them
    anyhow). With a group norm the twins are whole groups.

    Only layers that alone write their channels get them: residual streams are left as they are,
    and so are layers with one group for all channels (layer norm), where more channels would move
    the mean. The twins are equal row for row until one of the other attacks comes after.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: the network is not known to `channels_of`, or no layer is left.
    """
    stop = stopwatch("W")
    check_share(share)
    found = _growable(model)
    grown = deepcopy(model)
    for channels in found:
        size = group_size(grown, channels.producers[0].norm)
        groups = width(grown, channels) // size
        pairs = _at_least_one(share, groups / 2)
        alike = torch.randint(groups, (pairs,), generator=rng)
        places = _duplicate(grown, channels, alike.repeat(2), rng)[groups:]
        first, second = (spread_over(half, size) for half in places.view(2, pairs))
        weight = grown.get_submodule(channels.producers[0].layer).get_parameter("weight")
        weight[first] = weight[second] = _noise_like(weight[first], rng)
        for name in channels.consumers:
            readers = grown.get_submodule(name).get_parameter("weight").transpose(0, 1)
            block = len(readers) // width(grown, channels)
            one, other = spread_over(first, block), spread_over(second, block)
            readers[one] = _noise_like(readers[one], rng)
            readers[other] = -readers[one]
    return Attacked(grown, stop())


@torch.no_grad()
def split_channels(model: nn.Module, rng: torch.Generator, *, share: float = 0.1) -> Attacked:
    """Give channels a twin, at a random place, that takes over a part of what they did.   [Yan23]

        w_i·x_i  →  f_i·w_i·x_i + (1 − f_i)·w_i·x_i,    f_i uniform in [0.1, 0.9]

    `share`, in [0, 1], is of each layer's channels, whole groups with a group norm, but one at
    least unless it is 0. The same layers are left alone as by `insert_dummies`.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: the network is not known to `channels_of`, or no layer is left.
    """
    stop = stopwatch("W")
    check_share(share)
    found = _growable(model)
    grown = deepcopy(model)
    for channels in found:
        size = group_size(grown, channels.producers[0].norm)
        groups = width(grown, channels) // size
        chosen = torch.randperm(groups, generator=rng)[: _at_least_one(share, groups)]
        places = _duplicate(grown, channels, chosen, rng)
        fraction = torch.rand(len(chosen) * size, generator=rng, dtype=torch.float64) * 0.8 + 0.1
        factor = torch.ones(len(places) * size, dtype=torch.float64)
        factor[spread_over(places[chosen], size)] = fraction
        factor[spread_over(places[groups:], size)] = 1 - fraction
        for name in channels.consumers:
            scale_columns(grown.get_submodule(name).get_parameter("weight"), factor)
    return Attacked(grown, stop())


def combine(
    model: nn.Module, rng: torch.Generator, *, attacks: Sequence[Obfuscation] | None = None
) -> Attacked:
    """One attack after the other, each on what the one before left.

    By default all that keep the shapes, which is the most that can be done within the architecture:
    `flip_signs` (where there is a norm), `permute` and `rescale`, at their own strengths.

    Raises:
        UnsuitableModelError: one of them cannot be done on this network.
    """
    stop = stopwatch("W")
    if attacks is None:
        attacks = [permute, rescale]
        if _normed(channels_of(model)):
            attacks = [flip_signs, *attacks]
    combined = deepcopy(model)
    for attack in attacks:
        combined = attack(combined, rng).model
    return Attacked(combined, stop())


def _normed(found: list[Channels]) -> list[Producer]:
    return [p for channels in found for p in channels.producers if p.norm is not None]


def _growable(model: nn.Module) -> list[Channels]:
    """The axes that may get more channels: one producer, and more than one group if any."""
    found = [
        channels
        for channels in channels_of(model)
        if len(channels.producers) == 1
        and group_size(model, channels.producers[0].norm) < width(model, channels)
    ]
    if not found:
        raise UnsuitableModelError(
            f"no layer of {type(model).__name__} can get more channels: those that alone write "
            "theirs have a norm with one group for all, whose mean would move; needed: batch, "
            "group or instance norm, or none. Here flip_signs, permute and rescale work"
        )
    return found


def _log_uniform(count: int, spread: float, rng: torch.Generator) -> Float[Tensor, " count"]:
    exponent = torch.rand(count, generator=rng, dtype=torch.float64) * 2 - 1
    return (exponent * math.log(spread)).exp()


def _at_least_one(share: float, count: float) -> int:
    return max(1, round(share * count)) if share else 0


def _duplicate(
    model: nn.Module, channels: Channels, sources: Int64[Tensor, " new"], rng: torch.Generator
) -> Int64[Tensor, " groups"]:
    """Copy these groups to random places among the others, in place.

    Returns where each group is now: first the old ones in their order, then the new ones.
    """
    size = group_size(model, channels.producers[0].norm)
    old = torch.arange(width(model, channels) // size)
    gaps = torch.rand(len(sources), generator=rng) * (len(old) + 1)
    order = torch.cat([old + 1.0, gaps]).argsort()
    take(model, channels, spread_over(torch.cat([old, sources])[order], size))
    return order.argsort()


def _noise_like(rows: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian rows, each with the mean square of the row in its place."""
    noise = torch.randn(rows.shape, generator=rng, dtype=torch.float64)
    power = [each.double().flatten(1).square().mean(1).sqrt().cpu() for each in (rows, noise)]
    scale_rows(noise, power[0] / power[1])
    return noise.to(rows)
