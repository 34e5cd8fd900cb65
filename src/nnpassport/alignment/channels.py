"""Which layers of a network write and read a channel, and the moves that keep what it computes.

What one layer does to its outputs can be undone only where they are read, so whoever renames,
scales, copies or splits a channel has to know both sides. Between the two there may be a norm,
ReLUs, pools and dropout: they treat every channel alike and commute with a positive factor.

No network runs here: it is arrays, and which of them share channels (`Network`). Of networks in
memory `embedding.network.channels` knows it, of model folders `alignment.folders`.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.files.arrays import Array
from nnpassport.scheme import UnsuitableModelError

Floats = NDArray[np.floating[Any]]
Order = NDArray[np.int64]

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var")
_STATISTICS = ("running_mean", "running_var")


class Producer(NamedTuple):
    """A convolution or linear layer, and the norm that its output feeds (None: there is none)."""

    layer: str
    norm: str | None


class Channels(NamedTuple):
    """One axis of channels; all names are dotted, as in `named_modules`.

    Attributes:
        producers: one, or for a residual stream all whose outputs are added up in it.
        consumers: layers with a block of input columns for each channel: one column, or after a
            flatten one for each position.
    """

    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]


class Norm(NamedTuple):
    """A norm behind a layer.

    Attributes:
        eps: what it adds to a variance.
        tracked: whether it keeps a running mean and variance, which rows can be scaled against.
        groups: into how many parts it divides its channels, each with one mean and variance; 0
            where every channel has its own.
    """

    eps: float
    tracked: bool
    groups: int


@final
@dataclass(slots=True, repr=False)
class Network:
    """Weights by name, and which of them share channels.

    The arrays are never written into, so copies share them: a move puts new ones in their places.

    Attributes:
        arrays: as in a state dict.
        axes: every hidden axis of channels, each once.
        norms: by name, those behind the layers on these axes.
    """

    arrays: dict[str, Array]
    axes: tuple[Channels, ...]
    norms: dict[str, Norm]

    def copy(self) -> "Network":
        """Another one, which moves leave this one out of."""
        return Network(dict(self.arrays), self.axes, dict(self.norms))


def weight_of(network: Network, layer: str) -> Floats:
    """A layer's weight, output channels first (out in *kernel)."""
    found: Floats = network.arrays[f"{layer}.weight"]
    return found


def width(network: Network, channels: Channels) -> int:
    """How many channels there are on this axis."""
    return len(weight_of(network, channels.producers[0].layer))


def group_size(network: Network, norm: str | None) -> int:
    """Over how many neighbouring channels this norm takes its mean and variance together."""
    groups = 0 if norm is None else network.norms[norm].groups
    return len(network.arrays[f"{norm}.weight"]) // groups if groups else 1


def common_groups(network: Network, channels: Channels) -> tuple[int, int]:
    """Sizes of the blocks of channels that may be permuted inside, and as wholes.

    The first lies inside one group of every norm on this axis, the second is made of whole groups
    of each: (1, 1) where no norm has groups, and the size of a group twice where all agree.
    """
    sizes = [group_size(network, producer.norm) for producer in channels.producers]
    return math.gcd(*sizes), math.lcm(*sizes)


def parts_of(producer: Producer) -> list[str]:
    """The layer, and its norm if it has one."""
    return [name for name in producer if name is not None]


def per_channel(network: Network, part: str) -> list[str]:
    """Names of a layer's or norm's tensors whose first axis is its output channels."""
    return [name for own in _PER_CHANNEL if (name := f"{part}.{own}") in network.arrays]


def spread_over(order: Order, size: int) -> Order:
    """Indices of the entries of blocks of `size` neighbours that are taken in this order."""
    return (order[:, None] * size + np.arange(size)).reshape(-1)


def scaled_rows(values: Floats, factor: NDArray[Any]) -> Floats:
    """What belongs to each output channel times its factor, in the kind of numbers that it has."""
    return values * factor.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))


def scale_rows(network: Network, names: Collection[str], factor: NDArray[Any]) -> None:
    """The same with these tensors, in place."""
    for name in names:
        network.arrays[name] = scaled_rows(network.arrays[name], factor)


def scale_columns(network: Network, layer: str, factor: NDArray[Any]) -> None:
    """Multiply the columns of a layer that read each channel by its factor, in place."""
    weight = weight_of(network, layer)
    columns = np.repeat(factor.astype(weight.dtype), weight.shape[1] // len(factor))
    network.arrays[f"{layer}.weight"] = weight * columns.reshape(-1, *[1] * (weight.ndim - 2))


def by_reader(weight: Floats, channels: int) -> Floats:
    """A reader's weight, its columns by channel (out channels block)."""
    return weight.reshape(len(weight), channels, math.prod(weight.shape[1:]) // channels)


def flat(rows: NDArray[Any]) -> NDArray[Any]:
    """Filters as rows (out columns)."""
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def take(network: Network, channels: Channels, source: Order) -> None:
    """Make as many channels as `source` names, in place, each a copy of an old one; −1 is zeros.

    The consumers read each copy in full: it is the caller's to scale their columns. A group norm
    gets more or fewer groups of the same size.
    """
    old, there = width(network, channels), source >= 0
    complete = bool(there.all())
    for producer in channels.producers:
        size = group_size(network, producer.norm)
        for name in (name for part in parts_of(producer) for name in per_channel(network, part)):
            network.arrays[name] = network.arrays[name].take(source, axis=0)
            if not complete and not name.endswith(_STATISTICS):
                scale_rows(network, [name], there)
        if producer.norm is not None and (norm := network.norms[producer.norm]).groups:
            groups = max(1, len(source) // size)
            network.norms[producer.norm] = norm._replace(groups=groups)
    for layer in channels.consumers:
        weight = weight_of(network, layer)
        columns = spread_over(source % old, weight.shape[1] // old)
        network.arrays[f"{layer}.weight"] = weight.take(columns, axis=1)
        if not complete:
            scale_columns(network, layer, there)


def affine(network: Network, producer: Producer) -> list[str]:
    """Names of weight and bias of what comes last: the norm, or the layer that has none."""
    last = parts_of(producer)[-1]
    return [name for own in ("weight", "bias") if (name := f"{last}.{own}") in network.arrays]


def negate(network: Network, producer: Producer, sign: NDArray[Any]) -> None:
    """Multiply channels by ±1 between a layer and its norm, in place; the norm takes it back.

    Exact where all channels of a norm's group have one sign; see `group_size`.

    Raises:
        UnsuitableModelError: no norm follows the layer.
    """
    layer, norm = producer
    if norm is None:
        raise UnsuitableModelError(
            f"no norm follows {layer}, so nothing takes a sign back; needed: a layer with one"
        )
    turned = (f"{norm}.{own}" for own in ("weight", "running_mean"))
    names = [*per_channel(network, layer), *(name for name in turned if name in network.arrays)]
    scale_rows(network, names, sign)


def keeps_statistics(network: Network, producer: Producer) -> bool:
    """Whether a norm follows with a running mean and variance, which rows can be scaled against."""
    return producer.norm is not None and network.norms[producer.norm].tracked


def fold_statistics(network: Network, producer: Producer) -> None:
    """Write running statistics into the norm's scale and shift, in place: one form for all.

        γ/√(σ² + eps), β − γ·μ/√(σ² + eps)  with  μ = 0, σ² = 1 − eps

    Of all the norms that compute the same in evaluation mode this is the only one.
    """
    if not keeps_statistics(network, producer):
        return
    arrays, eps = network.arrays, network.norms[str(producer.norm)].eps
    names = [f"{producer.norm}.{own}" for own in _PER_CHANNEL]
    weight, bias, mean, variance = (arrays[name].astype(np.float64) for name in names)
    scale = weight / np.sqrt(variance + eps)
    shift = bias - scale * mean
    if (own := arrays.get(f"{producer.layer}.bias")) is not None:
        shift += scale * own.astype(np.float64)
        arrays[f"{producer.layer}.bias"] = np.zeros_like(own)
    folded = (scale, shift, np.zeros_like(mean), np.full_like(variance, 1 - eps))
    for name, values in zip(names, folded, strict=True):
        arrays[name] = values.astype(arrays[name].dtype)


def scale_before_norm(network: Network, producer: Producer, factor: NDArray[Any]) -> None:
    """Scale a layer's rows and its norm's running statistics, in place; γ makes up for eps."""
    norm, eps = producer.norm, network.norms[str(producer.norm)].eps
    variance = network.arrays[f"{norm}.running_var"]
    wide = variance.astype(np.float64)
    scaled = np.square(factor) * wide
    scale_rows(network, [*per_channel(network, producer.layer), f"{norm}.running_mean"], factor)
    scale_rows(network, [f"{norm}.weight"], np.sqrt((scaled + eps) / (wide + eps)) / factor)
    network.arrays[f"{norm}.running_var"] = scaled.astype(variance.dtype)


# The axes of the two kinds of network that are known by their layers


def chain(layers: Sequence[str], norms: Mapping[str, str]) -> tuple[Channels, ...]:
    """AlexNet: layers that run one after the other, some with a norm behind them."""
    return tuple(
        Channels((Producer(one, norms.get(one)),), (two,)) for one, two in pairwise(layers)
    )


def residual(names: Sequence[str], norm_at: Callable[[str], str | None]) -> tuple[Channels, ...]:
    """ResNet: inside each block a chain; a stream runs from one downsampling to the next.

    `names` has those of its layers, in the order in which they run; `norm_at` gives back the name
    of a norm that is there, and None for one that is not.
    """
    there = set(names)

    def producer(layer: str, norm: str) -> Producer:
        return Producer(layer, norm_at(norm))

    found = []
    stream, readers = [producer("conv1", "bn1")], list[str]()
    for block in (name[:-6] for name in names if re.fullmatch(r"layer\d+\.\d+\.conv1", name)):
        convs = [name for name in (f"{block}.conv{i}" for i in (1, 2, 3)) if name in there]
        *inner, last = [producer(name, name.replace("conv", "bn")) for name in convs]
        pairs = zip(inner, convs[1:], strict=True)
        found += [Channels((each,), (following,)) for each, following in pairs]
        readers.append(convs[0])
        if (shortcut := f"{block}.downsample.0") in there:
            readers.append(shortcut)
            found.append(Channels(tuple(stream), tuple(readers)))
            stream, readers = [producer(shortcut, f"{block}.downsample.1")], []
        stream.append(last)
    return (*found, Channels(tuple(stream), (*readers, "fc")))


def mismatch(arrays: Mapping[str, Any], axes: Sequence[Channels]) -> str | None:
    """Which layer's shape does not fit the others', if one's does not; arrays have shapes."""
    return next((reason for each in axes if (reason := _mismatch(arrays, each))), None)


def _mismatch(arrays: Mapping[str, Any], channels: Channels) -> str | None:
    count = arrays[f"{channels.producers[0].layer}.weight"].shape[0]
    for producer in channels.producers:
        names = (f"{part}.{own}" for part in parts_of(producer) for own in _PER_CHANNEL)
        if any(name in arrays and arrays[name].shape[:1] != (count,) for name in names):
            return f"{producer.layer} or its norm does not have {count} channels"
    for name in channels.consumers:
        columns = arrays[f"{name}.weight"].shape[1]
        if columns % count:
            return f"{name} has {columns} columns for {count} channels"
    return None
