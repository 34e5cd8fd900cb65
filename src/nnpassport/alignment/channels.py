"""Which layers share a channel: who writes it and who reads it.

What one layer does to its outputs can be undone only where they are read, so whoever renames,
scales, copies or splits a channel has to know both sides. Between the two there may be a norm,
ReLUs, pools and dropout: they treat every channel alike and commute with a positive factor.
"""

import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.scheme import UnsuitableModelError


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


def channels_of(model: nn.Module) -> list[Channels]:
    """Every hidden axis of channels of an AlexNet or a ResNet of `models/`, each once.

    A network is recognised by the names of its class and layers, and refused if it has anything
    that these two do not have.

    Raises:
        UnsuitableModelError: it is another network, or still carries a passport.
    """
    kind = type(model).__name__
    found = _KINDS[kind](model) if kind in _KINDS else []
    reason = _refusal(model, found) if kind in _KINDS else "its layers' order is not known"
    if reason is not None:
        raise UnsuitableModelError(
            f"cannot tell which layers of {kind} share a channel: {reason}; needed: a plain "
            f"network of class {', '.join(_KINDS)} of "
            "nnpassport.embedding.network.models, with any of their "
            "norms. A marked network is plain once it is released"
        )
    return found


def width(model: nn.Module, channels: Channels) -> int:
    """How many channels there are on this axis."""
    return len(model.get_submodule(channels.producers[0].layer).get_parameter("weight"))


def group_size(model: nn.Module, norm: str | None) -> int:
    """Over how many neighbouring channels this norm takes its mean and variance together."""
    module = None if norm is None else model.get_submodule(norm)
    return module.num_channels // module.num_groups if isinstance(module, nn.GroupNorm) else 1


def common_groups(model: nn.Module, channels: Channels) -> tuple[int, int]:
    """Sizes of the blocks of channels that may be permuted inside, and as wholes.

    The first lies inside one group of every norm on this axis, the second is made of whole groups
    of each: (1, 1) where no norm has groups, and the size of a group twice where all agree.
    """
    sizes = [group_size(model, producer.norm) for producer in channels.producers]
    return math.gcd(*sizes), math.lcm(*sizes)


def parts_of(model: nn.Module, producer: Producer) -> list[nn.Module]:
    """The layer, and its norm if it has one."""
    return [model.get_submodule(name) for name in producer if name is not None]


def per_channel(module: nn.Module) -> dict[str, Tensor]:
    """The module's own tensors whose first axis is its output channels, buffers included."""
    named = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor for name, tensor in named if tensor.dim()}


def spread_over(order: Int64[Tensor, " blocks"], size: int) -> Int64[Tensor, " entries"]:
    """Indices of the entries of blocks of `size` neighbours that are taken in this order."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def scale_rows(values: Tensor, factor: Float[Tensor, " out"]) -> None:
    """Multiply what belongs to each output channel by its factor, in place."""
    values.mul_(factor.to(values).reshape(-1, *[1] * (values.dim() - 1)))


def scale_columns(weight: Tensor, factor: Float[Tensor, " channels"]) -> None:
    """Multiply the columns that read each channel by its factor, in place."""
    block = weight.shape[1] // len(factor)
    columns = factor.to(weight).repeat_interleave(block)
    weight.mul_(columns.reshape(-1, *[1] * (weight.dim() - 2)))


def reorder(model: nn.Module, channels: Channels, order: Int64[Tensor, " channels"]) -> None:
    """Permute the channels in place: the new channel i is the old channel `order[i]`.

    Exact where no norm's group is torn apart; see `group_size`.
    """
    for producer in channels.producers:
        for part in parts_of(model, producer):
            for values in per_channel(part).values():
                values.copy_(values[order.to(values.device)])
    for name in channels.consumers:
        weight = model.get_submodule(name).get_parameter("weight")
        columns = spread_over(order, weight.shape[1] // len(order))
        weight.copy_(weight[:, columns.to(weight.device)])


def take(model: nn.Module, channels: Channels, source: Int64[Tensor, " taken"]) -> None:
    """Make as many channels as `source` names, in place, each a copy of an old one; −1 is zeros.

    The consumers read each copy in full: it is the caller's to scale their columns. A group norm
    gets more or fewer groups of the same size.
    """
    old, there = width(model, channels), source >= 0
    for producer in channels.producers:
        size = group_size(model, producer.norm)
        for part in parts_of(model, producer):
            for name, values in per_channel(part).items():
                _replace(part, name, values[source.to(values.device)])
            _state_outputs(part, len(source), size)
            for values in part.parameters(recurse=False):
                scale_rows(values.detach(), there)
    for name in channels.consumers:
        layer = model.get_submodule(name)
        weight = layer.get_parameter("weight")
        columns = spread_over(source % old, weight.shape[1] // old)
        _replace(layer, "weight", weight[:, columns.to(weight.device)])
        scale_columns(layer.get_parameter("weight").detach(), there)
        if isinstance(layer, nn.Conv2d):
            layer.in_channels = len(columns)
        elif isinstance(layer, nn.Linear):
            layer.in_features = len(columns)


def affine(model: nn.Module, producer: Producer) -> dict[str, Tensor]:
    """Weight and bias of what comes last: the norm, or the layer that has none."""
    return dict(parts_of(model, producer)[-1].named_parameters(recurse=False))


def negate(model: nn.Module, producer: Producer, sign: Float[Tensor, " channels"]) -> None:
    """Multiply channels by ±1 between a layer and its norm, in place; the norm takes it back.

    Exact where all channels of a norm's group have one sign; see `group_size`.
    """
    layer, norm = map(per_channel, parts_of(model, producer))
    turned = [norm[name] for name in ("weight", "running_mean") if name in norm]
    for values in (*layer.values(), *turned):
        scale_rows(values, sign)


def keeps_statistics(norm: nn.Module) -> bool:
    """Whether the norm has a running mean and variance, which rows can be scaled against."""
    return getattr(norm, "running_var", None) is not None


def fold_statistics(model: nn.Module, producer: Producer) -> None:
    """Write running statistics into the norm's scale and shift, in place: one form for all.

        γ/√(σ² + eps), β − γ·μ/√(σ² + eps)  with  μ = 0, σ² = 1 − eps

    Of all the norms that compute the same in evaluation mode this is the only one.
    """
    if producer.norm is None or not keeps_statistics(norm := model.get_submodule(producer.norm)):
        return
    layer, values = model.get_submodule(producer.layer), per_channel(norm)
    mean, variance = values["running_mean"], values["running_var"]
    eps = float(norm.eps)  # type: ignore[arg-type]
    scale = values["weight"].double() / (variance.double() + eps).sqrt()
    shift = values["bias"].double() - scale * mean.double()
    if (bias := per_channel(layer).get("bias")) is not None:
        shift += scale * bias.double()
        bias.zero_()
    values["weight"].copy_(scale)
    values["bias"].copy_(shift)
    mean.zero_()
    variance.fill_(1 - eps)


def scale_before_norm(
    layer: nn.Module, norm: nn.Module, factor: Float[Tensor, " channels"]
) -> None:
    """Scale a layer's rows and its norm's running statistics, in place; γ makes up for eps."""
    for values in per_channel(layer).values():
        scale_rows(values, factor)
    statistics = per_channel(norm)
    variance = statistics["running_var"].double()
    factor = factor.to(variance)
    scaled, eps = factor.square() * variance, float(norm.eps)  # type: ignore[arg-type]
    scale_rows(statistics["running_mean"], factor)
    scale_rows(statistics["weight"], ((scaled + eps) / (variance + eps)).sqrt() / factor)
    statistics["running_var"].copy_(scaled)


def _replace(module: nn.Module, name: str, values: Tensor) -> None:
    """Put a tensor of another shape in the place of a parameter or buffer, laid out as that was."""
    old = per_channel(module)[name]
    if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        values = values.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    setattr(module, name, values)


def _state_outputs(module: nn.Module, channels: int, group: int) -> None:
    """Let the module's own attributes say how many channels it has now."""
    match module:
        case nn.Conv2d():
            module.out_channels = channels
        case nn.Linear():
            module.out_features = channels
        case nn.GroupNorm():
            module.num_channels, module.num_groups = channels, max(1, channels // group)
        case nn.modules.batchnorm._NormBase():
            module.num_features = channels


_LAYERS = (nn.Conv2d, nn.Linear)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_BETWEEN = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Identity)
_BLOCKS = ("BasicBlock", "Bottleneck")


def _sequential(model: nn.Module) -> list[Channels]:
    """AlexNet: its layers run in the order in which they were made."""
    leaves = [(name, part) for name, part in model.named_modules() if not list(part.children())]
    norms = {name: norm for (name, _), (norm, part) in pairwise(leaves) if isinstance(part, _NORMS)}
    layers = [name for name, part in leaves if isinstance(part, _LAYERS)]
    return [
        Channels((Producer(name, norms.get(name)),), (following,))
        for name, following in pairwise(layers)
    ]


def _residual(model: nn.Module) -> list[Channels]:
    """ResNet: inside each block a chain; a stream runs from one downsampling to the next."""
    parts = dict(model.named_modules())

    def producer(layer: str, norm: str) -> Producer:
        return Producer(layer, None if isinstance(parts.get(norm), nn.Identity) else norm)

    found = []
    stream, readers = [producer("conv1", "bn1")], []
    for block in (name[:-6] for name in parts if re.fullmatch(r"layer\d+\.\d+\.conv1", name)):
        convs = [name for name in (f"{block}.conv{i}" for i in (1, 2, 3)) if name in parts]
        *inner, last = [producer(name, name.replace("conv", "bn")) for name in convs]
        pairs = zip(inner, convs[1:], strict=True)
        found += [Channels((each,), (following,)) for each, following in pairs]
        readers.append(convs[0])
        if isinstance(parts.get(f"{block}.downsample"), nn.Sequential):
            readers.append(f"{block}.downsample.0")
            found.append(Channels(tuple(stream), tuple(readers)))
            stream, readers = [producer(f"{block}.downsample.0", f"{block}.downsample.1")], []
        stream.append(last)
    return [*found, Channels(tuple(stream), (*readers, "fc"))]


_KINDS: Mapping[str, Callable[[nn.Module], list[Channels]]] = {
    "AlexNet": _sequential,
    "ResNet": _residual,
}


def _refusal(model: nn.Module, found: list[Channels]) -> str | None:
    """Why this is not the network that its class is named after, or None if it is."""
    parts = dict(model.named_modules(remove_duplicate=False))
    producers = [producer for channels in found for producer in channels.producers]
    layers = {each.layer for each in producers} | {c for each in found for c in each.consumers}
    norms = {each.norm for each in producers if each.norm is not None}
    if len({id(part) for part in parts.values()}) < len(parts) or _tied(model):
        return "one part of it stands in two places"
    strange = [
        name
        for name, part in parts.items()
        if name and not _known(part, read=name in layers, normalises=name in norms)
    ]
    if strange:
        return f"{strange[0]} is {type(parts[strange[0]]).__name__}, which is not known there"
    missing = sorted((layers | norms) - set(parts))
    if missing or not found:
        return f"it has no {', '.join(missing) or 'hidden layer'}"
    parameters = {f"{name}.{own}" for name in layers | norms for own in parts[name]._parameters}
    stray = [name for name, _ in model.named_parameters() if name not in parameters]
    if stray:
        return f"{stray[0]} belongs to no layer that is known"
    return next((reason for each in found if (reason := _mismatch(model, each))), None)


def _known(part: nn.Module, *, read: bool, normalises: bool) -> bool:
    """Whether such a part may stand where it is listed as a layer, as a norm, or as neither."""
    if isinstance(part, _LAYERS):
        plain = "weight" in part._parameters and type(part) in _LAYERS
        return read and plain and (isinstance(part, nn.Linear) or part.groups == 1)
    if isinstance(part, _NORMS):
        return normalises and part._parameters.get("weight") is not None
    if isinstance(part, nn.Sequential) or type(part).__name__ in _BLOCKS:
        return True
    return isinstance(part, _BETWEEN) and not (read or normalises)


def _tied(model: nn.Module) -> bool:
    everywhere = list(model.named_parameters(remove_duplicate=False))
    return len(everywhere) > len(list(model.parameters()))


def _mismatch(model: nn.Module, channels: Channels) -> str | None:
    """Which layer's shape does not fit the others', if one's does not."""
    count = width(model, channels)
    for producer in channels.producers:
        for part in parts_of(model, producer):
            if any(len(values) != count for values in per_channel(part).values()):
                return f"{producer.layer} or its norm does not have {count} channels"
    for name in channels.consumers:
        columns = model.get_submodule(name).get_parameter("weight").shape[1]
        if columns % count:
            return f"{name} has {columns} columns for {count} channels"
    return None
