"""Networks in memory as `alignment` has them: their arrays, and which layers share channels."""

from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise

import torch
from torch import nn

from nnpassport.alignment.channels import Channels, Network, Norm, chain, mismatch, residual
from nnpassport.alignment.unfold import Frame
from nnpassport.embedding.network.tensors import as_array, as_tensor
from nnpassport.scheme import UnsuitableModelError

_LAYERS = (nn.Conv2d, nn.Linear)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
_BETWEEN = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Identity)
_BLOCKS = ("BasicBlock", "Bottleneck")
_KINDS = ("AlexNet", "ResNet")


def channels_of(model: nn.Module) -> list[Channels]:
    """Every hidden axis of channels of an AlexNet or a ResNet of `models/`, each once.

    A network is recognised by the names of its class and layers, and refused if it has anything
    that these two do not have.

    Raises:
        UnsuitableModelError: it is another network, or still carries a passport.
    """
    kind = type(model).__name__
    found = _axes_in(model) if kind in _KINDS else ()
    reason = _refusal(model, found) if kind in _KINDS else "its layers' order is not known"
    if reason is not None:
        raise UnsuitableModelError(
            f"cannot tell which layers of {kind} share a channel: {reason}; needed: a plain "
            f"network of class {', '.join(_KINDS)} of "
            "nnpassport.embedding.network.models, with any of their "
            "norms. A marked network is plain once it is released"
        )
    return list(found)


def network_of(model: nn.Module) -> Network:
    """The network's numbers, in its own memory where that is the processor's, and its channels.

    Raises:
        UnsuitableModelError: as `channels_of`.
    """
    axes = channels_of(model)
    arrays = {name: as_array(tensor) for name, tensor in model.state_dict().items()}
    return Network(arrays, tuple(axes), norms_of(model, axes))


def norms_of(model: nn.Module, axes: list[Channels]) -> dict[str, Norm]:
    """What is known of the norms on these axes."""
    names = [each.norm for axis in axes for each in axis.producers if each.norm is not None]
    return {name: _norm(model.get_submodule(name)) for name in names}


def frame_of(model: nn.Module) -> Frame:
    """What a state dict for this network has; it may be on the meta device."""
    try:
        axes = channels_of(model)
    except UnsuitableModelError:  # another network: which norm is whose is not known
        axes = []
    norms = norms_of(model, axes)
    after = {
        each.layer: (each.norm, norms[each.norm].eps)
        for axis in axes
        for each in axis.producers
        if each.norm is not None and norms[each.norm].tracked
    }
    return Frame(frozenset(model.state_dict()), frozenset(dict(model.named_modules())), after)


@torch.no_grad()
def with_arrays(model: nn.Module, network: Network) -> nn.Module:
    """A copy of the model with these arrays, which may be of other widths, in the same mode."""
    copy = deepcopy(model)
    for home, module in copy.named_modules():
        for name, old in (*module._parameters.items(), *module._buffers.items()):
            array = network.arrays.get(f"{home}.{name}" if home else name)
            if array is not None and (old is not None or name == "bias"):
                _put(module, name, old, as_tensor(array))
        if home in network.norms and isinstance(module, nn.GroupNorm):
            module.num_groups = network.norms[home].groups
        _state_widths(module)
    return copy


def _put(module: nn.Module, name: str, old: torch.Tensor | None, values: torch.Tensor) -> None:
    """Another tensor in the place of a parameter or buffer, laid out as that was."""
    if old is None:
        setattr(module, name, nn.Parameter(values.clone()))
        return
    last = old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    values = values.to(old, copy=True).contiguous(memory_format=layout)
    if isinstance(old, nn.Parameter):
        values = nn.Parameter(values, requires_grad=old.requires_grad)
    setattr(module, name, values)


def _state_widths(module: nn.Module) -> None:
    """Let the module's own attributes say how many channels it has now."""
    match module:
        case nn.Conv2d():
            module.out_channels, inputs = module.weight.shape[:2]
            module.in_channels = inputs * module.groups
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.GroupNorm(affine=True):
            module.num_channels = len(module.weight)
        case nn.modules.batchnorm._NormBase(affine=True):
            module.num_features = len(module.weight)


def _norm(module: nn.Module) -> Norm:
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else 0
    tracked = getattr(module, "running_var", None) is not None
    return Norm(float(module.eps), tracked, groups)  # type: ignore[arg-type]


def _axes_in(model: nn.Module) -> tuple[Channels, ...]:
    if type(model).__name__ == "AlexNet":
        leaves = [(n, part) for n, part in model.named_modules() if not list(part.children())]
        pairs = pairwise(leaves)
        norms = {name: norm for (name, _), (norm, part) in pairs if isinstance(part, _NORMS)}
        return chain([name for name, part in leaves if isinstance(part, _LAYERS)], norms)
    parts = dict(model.named_modules())

    def norm_at(name: str) -> str | None:
        return None if isinstance(parts.get(name), nn.Identity) else name

    return residual(list(parts), norm_at)


def _refusal(model: nn.Module, found: tuple[Channels, ...]) -> str | None:
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
    return mismatch(_state(model), found)


def _state(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


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
