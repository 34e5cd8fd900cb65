"""Removal that costs next to nothing: blocks that are put in or left out, and other names.

A residual network computes the same with a block in front whose writers into the stream are zero:
every later block has another number, and a reading by names sees other layers. One left out moves
the answers a little. Both are for networks whose blocks are alike and in one list.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from nnpassport.alignment.canonical import reads
from nnpassport.embedding.axes import axes_of, untied
from nnpassport.embedding.network.outputs import Example, call, logits_of
from nnpassport.scheme import UnsuitableModelError

TOLERANCE = 1e-4
"""How far outputs may move, relative to the largest, in the network's own precision."""
_COUNTS = ("num_hidden_layers", "n_layer")


@torch.no_grad()
def insert_block(model: nn.Module, example: Example, rng: torch.Generator) -> nn.Module:
    """A copy with a block of random numbers in front that adds nothing.

    Raises:
        UnsuitableModelError: the network has no list of blocks that one could be put into.
    """
    before = logits_of(call(model.eval(), example))
    for name, blocks in _lists(model):
        found = untied(deepcopy(model))
        block = deepcopy(blocks[-1])
        writers = _writers(model, example, f"{name}.{len(blocks) - 1}.")
        for own, parameter in block.named_parameters():
            spread = parameter.std() if parameter.numel() > 1 else 0.0
            parameter.add_(spread * torch.randn(parameter.shape, generator=rng))
            if own in writers:
                parameter.zero_()
        _put(found, name, [block, *found.get_submodule(name)])  # type: ignore[misc]
        if _apart(found, example, before) < TOLERANCE:
            return found
    raise _no_blocks(model)


@torch.no_grad()
def drop_block(model: nn.Module, number: int) -> nn.Module:
    """A copy without one of its blocks, counted from 0.

    Raises:
        UnsuitableModelError: the network has no list of so many blocks.
    """
    for name, blocks in _lists(model):
        if 0 <= number < len(blocks):
            found = untied(deepcopy(model))
            kept = list(found.get_submodule(name))  # type: ignore[call-overload]
            _put(found, name, [each for n, each in enumerate(kept) if n != number])
            return found
    raise _no_blocks(model)


def rename(weights: Mapping[str, Tensor], rng: torch.Generator) -> dict[str, Tensor]:
    """The tensors under names that say nothing, in an order by lot."""
    names = list(weights)
    order = torch.randperm(len(names), generator=rng).tolist()
    return {f"t{number}": weights[names[index]] for number, index in enumerate(order)}


def _lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Lists of blocks that are of one class and have parameters of the same names and shapes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            shapes = [{n: p.shape for n, p in each.named_parameters()} for each in module]
            if shapes[0] and all(each == shapes[0] for each in shapes):
                yield name, module


def _writers(model: nn.Module, example: Example, prefix: str) -> set[str]:
    """Names, within a block, of what it writes into an axis that others are on too."""
    axes, found = axes_of(model, example), set[str]()
    for axis in axes.axes:
        inside = [place for place in axis.places if place.tensor.startswith(prefix)]
        if len(inside) < len(axis.places):
            for place in inside:
                weight = f"{place.tensor.rpartition('.')[0]}.weight"
                writes = not reads(axes, place) and weight in axes.reads
                found |= {place.tensor.removeprefix(prefix)} if writes else set()
    return found


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
    except (RuntimeError, ValueError, IndexError):  # its code wants as many as there were
        return float("inf")
    return float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))


def _no_blocks(model: nn.Module) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"{type(model).__name__} has no list of blocks alike that one can be put into or left out "
        "of; needed: a residual network whose blocks are in one list"
    )
