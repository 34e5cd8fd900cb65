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

import numpy as np
import torch
from torch import Tensor, nn

from nnpassport.alignment.channels import (
    Channels,
    Floats,
    Network,
    Order,
    Producer,
    affine,
    common_groups,
    flat,
    group_size,
    keeps_statistics,
    negate,
    scale_before_norm,
    scale_columns,
    scale_rows,
    scaled_rows,
    spread_over,
    take,
    weight_of,
    width,
)
from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.attacks.perturbation import check_share
from nnpassport.embedding.network.channels import network_of, with_arrays
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
    flipped = network_of(model)
    hosts = _normed(flipped)
    if not hosts:
        raise UnsuitableModelError(
            f"no layer of {type(model).__name__} has a norm, and a ReLU does not let a sign pass; "
            "needed: a norm after a convolution. Without one permute and rescale work"
        )
    sizes = [group_size(flipped, host.norm) for host in hosts]
    groups = [len(weight_of(flipped, h.layer)) // s for h, s in zip(hosts, sizes, strict=True)]
    chosen = torch.randperm(sum(groups), generator=rng) < round(share * sum(groups))
    for host, mask, size in zip(hosts, chosen.split(groups), sizes, strict=True):
        negate(flipped, host, np.where(np.repeat(mask.numpy(), size), -1.0, 1.0))
    return Attacked(with_arrays(model, flipped), stop())


@torch.no_grad()
def permute(model: nn.Module, rng: torch.Generator) -> Attacked:
    """Put the channels of every hidden layer in another order, and their readers' columns. [Yan22]

    All layers that add to a residual stream get the same order. With a group norm, channels move
    inside their group and groups move as wholes.

    Raises:
        UnsuitableModelError: the network is not known to `channels_of`.
    """
    stop = stopwatch("W")
    permuted = network_of(model)
    for channels in permuted.axes:
        count = width(permuted, channels)
        inner, outer = common_groups(permuted, channels)
        inside = torch.rand(count // inner, inner, generator=rng).argsort(1)
        order = (inside + torch.arange(0, count, inner)[:, None]).view(count // outer, outer)
        wholes = torch.randperm(count // outer, generator=rng)
        take(permuted, channels, order[wholes].flatten().numpy())
    return Attacked(with_arrays(model, permuted), stop())


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
    rescaled = network_of(model)
    for channels in rescaled.axes:
        factor = _log_uniform(width(rescaled, channels), spread, rng)
        for producer in channels.producers:
            scale_rows(rescaled, affine(rescaled, producer), factor)
        for name in channels.consumers:
            scale_columns(rescaled, name, 1 / factor)
    for producer in _normed(rescaled):
        if keeps_statistics(rescaled, producer):
            count = len(weight_of(rescaled, producer.layer))
            scale_before_norm(rescaled, producer, _log_uniform(count, spread, rng))
    return Attacked(with_arrays(model, rescaled), stop())


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
    grown = network_of(model)
    for channels in _growable(grown, type(model).__name__):
        size = group_size(grown, channels.producers[0].norm)
        groups = width(grown, channels) // size
        pairs = _at_least_one(share, groups / 2)
        alike = torch.randint(groups, (pairs,), generator=rng)
        places = _duplicate(grown, channels, alike.repeat(2), rng)[groups:]
        first, second = (spread_over(half, size) for half in places.reshape(2, pairs))
        layer = channels.producers[0].layer
        weight = weight_of(grown, layer).copy()
        weight[first] = weight[second] = _noise_like(weight[first], rng)
        grown.arrays[f"{layer}.weight"] = weight
        for name in channels.consumers:
            columns = weight_of(grown, name).copy()
            readers = np.swapaxes(columns, 0, 1)
            block = len(readers) // width(grown, channels)
            one, other = spread_over(first, block), spread_over(second, block)
            readers[one] = _noise_like(readers[one], rng)
            readers[other] = -readers[one]
            grown.arrays[f"{name}.weight"] = columns
    return Attacked(with_arrays(model, grown), stop())


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
    grown = network_of(model)
    for channels in _growable(grown, type(model).__name__):
        size = group_size(grown, channels.producers[0].norm)
        groups = width(grown, channels) // size
        chosen = torch.randperm(groups, generator=rng)[: _at_least_one(share, groups)]
        places = _duplicate(grown, channels, chosen, rng)
        share_of = torch.rand(len(chosen) * size, generator=rng, dtype=torch.float64).numpy()
        fraction = share_of * 0.8 + 0.1
        factor = np.ones(len(places) * size)
        factor[spread_over(places[chosen.numpy()], size)] = fraction
        factor[spread_over(places[groups:], size)] = 1 - fraction
        for name in channels.consumers:
            scale_columns(grown, name, factor)
    return Attacked(with_arrays(model, grown), stop())


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
        if _normed(network_of(model)):
            attacks = [flip_signs, *attacks]
    combined = deepcopy(model)
    for attack in attacks:
        combined = attack(combined, rng).model
    return Attacked(combined, stop())


def _normed(network: Network) -> list[Producer]:
    return [p for axis in network.axes for p in axis.producers if p.norm is not None]


def _growable(network: Network, kind: str) -> list[Channels]:
    """The axes that may get more channels: one producer, and more than one group if any."""
    found = [
        channels
        for channels in network.axes
        if len(channels.producers) == 1
        and group_size(network, channels.producers[0].norm) < width(network, channels)
    ]
    if not found:
        raise UnsuitableModelError(
            f"no layer of {kind} can get more channels: those that alone write "
            "theirs have a norm with one group for all, whose mean would move; needed: batch, "
            "group or instance norm, or none. Here flip_signs, permute and rescale work"
        )
    return found


def _log_uniform(count: int, spread: float, rng: torch.Generator) -> Floats:
    exponent = torch.rand(count, generator=rng, dtype=torch.float64) * 2 - 1
    found: Floats = np.exp(exponent.numpy() * math.log(spread))
    return found


def _at_least_one(share: float, count: float) -> int:
    return max(1, round(share * count)) if share else 0


def _duplicate(
    network: Network, channels: Channels, sources: Tensor, rng: torch.Generator
) -> Order:
    """Copy these groups to random places among the others, in place.

    Returns where each group is now: first the old ones in their order, then the new ones.
    """
    size = group_size(network, channels.producers[0].norm)
    old = torch.arange(width(network, channels) // size)
    gaps = torch.rand(len(sources), generator=rng) * (len(old) + 1)
    order = torch.cat([old + 1.0, gaps]).argsort()
    take(network, channels, spread_over(torch.cat([old, sources])[order].numpy(), size))
    places: Order = order.argsort().numpy()
    return places


def _noise_like(rows: Floats, rng: torch.Generator) -> Floats:
    """Gaussian rows, each with the mean square of the row in its place."""
    noise = torch.randn(rows.shape, generator=rng, dtype=torch.float64).numpy()
    if not rows.size:
        return rows
    power = [np.sqrt(np.square(flat(each).astype(np.float64)).mean(1)) for each in (rows, noise)]
    return scaled_rows(noise, power[0] / power[1]).astype(rows.dtype)
