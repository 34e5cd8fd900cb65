"""Removal that costs next to nothing: blocks that are put in or left out, and other names.

A residual network computes the same with a block in front whose writers into the stream are zero:
every later block has another number, and a reading by names sees other layers. One left out moves
the answers a little. Both are for networks whose blocks are in lists.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.canonical import reads
from nnpassport.embedding.axes import axes_of, untied
from nnpassport.embedding.network.outputs import Example, call, logits_of
from nnpassport.scheme import UnsuitableModelError

TOLERANCE = 1e-4
"""How far outputs may move, relative to the largest, in the network's own precision."""
_COUNTS = ("num_hidden_layers", "n_layer")


@torch.no_grad()
def insert_block(model: nn.Module, example: Example, rng: torch.Generator) -> nn.Module:
    """A copy with a block of random numbers that adds nothing, as far in front as one can be.

    Raises:
        UnsuitableModelError: the network has no list of blocks that one could be put into.
    """
    before = logits_of(call(model.eval(), example))
    axes = axes_of(model, example)
    for name, blocks in _lists(model):
        for number, block in enumerate(blocks):
            found = untied(deepcopy(model))
            new = _silent(block, _writers(axes, f"{name}.{number}."), rng)
            kept = list(found.get_submodule(name))  # type: ignore[call-overload]
            _put(found, name, [*kept[:number], new, *kept[number:]])
            if _apart(found, example, before) < TOLERANCE:
                return found
    raise _no_blocks(model)


@torch.no_grad()
def drop_block(model: nn.Module, example: Example, number: int) -> nn.Module:
    """A copy without one of the blocks that it runs without, counted from 0.

    Raises:
        UnsuitableModelError: the network has not so many.
    """
    before = logits_of(call(model.eval(), example))
    for name, blocks in _lists(model):
        for own in range(len(blocks)):
            if _matrices(blocks[own]) < 2:
                continue  # a layer, and no block
            found = untied(deepcopy(model))
            kept = list(found.get_submodule(name))  # type: ignore[call-overload]
            _put(found, name, [each for n, each in enumerate(kept) if n != own])
            if math.isinf(_apart(found, example, before)):
                continue
            if number == 0:
                return found
            number -= 1
    raise _no_blocks(model)


def rename(weights: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """The tensors under names that say nothing, in an order by lot."""
    return {new: weights[old] for new, old in _new_names(list(weights), rng).items()}


def _new_names(names: Sequence[str], rng: torch.Generator) -> dict[str, str]:
    order = torch.randperm(len(names), generator=rng).tolist()
    return {f"t{number}": names[index] for number, index in enumerate(order)}


class Renamed(nn.Module):
    """A copy of a network whose tensors have such names; it computes what the network does."""

    def __init__(self, model: nn.Module, rng: torch.Generator) -> None:
        super().__init__()
        self._inside = (deepcopy(model).eval(),)  # in a tuple, so that it is not registered as well
        self._names = _new_names(list(model.state_dict()), rng)
        parameters = dict(self._inside[0].named_parameters(remove_duplicate=False))
        for new, old in self._names.items():
            if old in parameters:
                self.register_parameter(new, parameters[old])
            else:
                self.register_buffer(new, self._inside[0].get_buffer(old))

    def forward(self, *given: Any, **named: Any) -> Any:
        """What the network says."""
        state = {old: getattr(self, new) for new, old in self._names.items()}
        return functional_call(self._inside[0], state, given, named, tie_weights=False)


def _lists(model: nn.Module) -> list[tuple[str, Sequence[nn.Module]]]:
    """Lists of modules with parameters, those first whose modules are alike."""
    lists = [
        (name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and type(module) in {nn.ModuleList, nn.Sequential}  # others may run theirs otherwise
    ]
    found = [(name, blocks) for name, blocks in lists if any(map(_matrices, blocks))]
    return sorted(found, key=lambda pair: not _are_alike(pair[1]))


def _are_alike(blocks: Sequence[nn.Module]) -> bool:
    shapes = [{n: p.shape for n, p in each.named_parameters()} for each in blocks]
    return len(blocks) > 1 and all(each == shapes[0] for each in shapes)


def _matrices(block: nn.Module) -> int:
    return sum(parameter.dim() > 1 for parameter in block.parameters())


def _silent(block: nn.Module, writers: Collection[str], rng: torch.Generator) -> nn.Module:
    """Another block like this one, which adds nothing to what it is given."""
    found = deepcopy(block)
    for own, parameter in found.named_parameters():
        spread = parameter.std() if parameter.numel() > 1 else 0.0
        parameter.add_(spread * torch.randn(parameter.shape, generator=rng))
        if own in writers:
            parameter.zero_()
    return found


def _writers(axes: Axes, prefix: str) -> set[str]:
    """Names, within a block, of what it writes into an axis that others are on too."""
    found = set[str]()
    for axis in axes.axes:
        inside = [place for place in axis.places if place.tensor.startswith(prefix)]
        if len(inside) < len(axis.places):
            for place in inside:
                weight = f"{place.tensor.rpartition('.')[0]}.weight"
                if not reads(axes, place) and weight in axes.reads:
                    norm = axes.batch_norms.get(weight)
                    behind = [] if norm is None else [norm.weight, norm.bias]
                    found |= {each for each in (place.tensor, *behind) if each is not None}
    return {each.removeprefix(prefix) for each in found}


def _put(model: nn.Module, name: str, blocks: list[nn.Module]) -> None:
    """Another list of blocks under this name, in place; what counts them counts anew."""
    home, _, own = name.rpartition(".")
    kind = type(model.get_submodule(name))
    several = nn.ModuleList(blocks) if kind is nn.ModuleList else nn.Sequential(*blocks)
    setattr(model.get_submodule(home), own, several)
    for number, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # Hugging Face's caches
                module.layer_idx = number  # type: ignore[assignment]
    for module in model.modules():
        config = getattr(module, "config", None)
        for count in _COUNTS:
            if isinstance(getattr(config, count, None), int):
                setattr(config, count, len(blocks))


def _apart(model: nn.Module, example: Example, before: Tensor) -> float:
    try:
        after = logits_of(call(model.eval(), example))
    except (
        RuntimeError,
        ValueError,
        IndexError,
        TypeError,
        AttributeError,
    ):  # its code wants as many as there were
        return math.inf
    if after.shape != before.shape:
        return math.inf
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))


def _no_blocks(model: nn.Module) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"{type(model).__name__} has no list of blocks alike that one can be put into or left out "
        "of, or not so many; needed: a residual network whose blocks are in lists"
    )
