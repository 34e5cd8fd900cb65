"""The table of axes of a network whose channels are known by its layers: nothing is traced."""

from collections.abc import Iterator

from nnpassport.alignment.axes import Axes, Axis, Place, Statistics
from nnpassport.alignment.channels import (
    Channels,
    Network,
    common_groups,
    keeps_statistics,
    parts_of,
    per_channel,
    weight_of,
    width,
)


def table_of(network: Network) -> Axes:
    """Its axes, as tracing and proving them would find them.

    Without those behind instance norms, which tracing leaves out as well.
    """
    producers = [each for axis in network.axes for each in axis.producers]
    layers = {each.layer for each in producers}
    layers |= {name for axis in network.axes for name in axis.consumers}
    statistics = {
        f"{each.layer}.weight": Statistics(
            weight=f"{each.norm}.weight",
            bias=f"{each.norm}.bias",
            mean=f"{each.norm}.running_mean",
            variance=f"{each.norm}.running_var",
            epsilon=network.norms[str(each.norm)].eps,
        )
        for each in producers
        if keeps_statistics(network, each)
    }
    axes = [axis for channels in network.axes for axis in _axes(network, channels)]
    return Axes(
        axes=tuple(sorted(axes, key=lambda axis: -axis.size)),
        reads={f"{name}.weight": (1, None) for name in sorted(layers)},
        norms={},
        batch_norms=statistics,
        gains={},
    )


def _axes(network: Network, channels: Channels) -> Iterator[Axis]:
    """One, or where norms take means of groups one inside of them and one of them."""
    norms = [network.norms[each.norm] for each in channels.producers if each.norm is not None]
    if any(not norm.tracked and not norm.groups for norm in norms):
        return
    kinds = ("group norm" if norms[0].groups else "batch norm",) if norms else ()
    traits = (*kinds, "rectified")
    count, (inside, group) = width(network, channels), common_groups(network, channels)
    if inside in (1, count):
        yield Axis(count, "permute", traits, tuple(_places(network, channels, 1, ())))
        return
    blocks = tuple(_places(network, channels, 1, ((count // inside, inside),)))
    yield Axis(inside, "permute", traits, blocks)
    wholes = tuple(_places(network, channels, group, ((group, 1),)))
    yield Axis(count // group, "permute", traits, wholes)


def _places(
    network: Network, channels: Channels, stride: int, repeats: tuple[tuple[int, int], ...]
) -> Iterator[Place]:
    """Where the axis is, in all that writes it and in all that reads it."""
    for producer in channels.producers:
        for name in (name for part in parts_of(producer) for name in per_channel(network, part)):
            yield Place(name, 0, 0, stride, repeats)
    count = width(network, channels)
    for layer in channels.consumers:
        block = weight_of(network, layer).shape[1] // count
        wide = tuple((times, step * block) for times, step in repeats)
        inner = ((block, 1),) if block > 1 else ()
        yield Place(f"{layer}.weight", 1, 0, stride * block, (*wide, *inner))
