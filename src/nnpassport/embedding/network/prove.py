"""Try every axis: reorder it everywhere, in double precision, and see whether an output moves."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nnpassport.alignment.axes import Axes, Axis
from nnpassport.alignment.table import sides_of
from nnpassport.embedding.network.outputs import Example, logits_of, with_tensors
from nnpassport.ground.progress import counted
from nnpassport.scheme import UnsuitableModelError

TOLERANCE = 1e-6
"""How far outputs may move, relative to the largest; double precision moves them by some 1e-14."""
SINGLE = 1e-4
"""The same for networks that do not run in double precision; single moves them by some 1e-6."""
_ROTATED = ("rotated",)
_FAILED = (RuntimeError, TypeError, ValueError, IndexError)

Moved = Callable[[Sequence[Axis]], float]
"""How far the outputs move when these axes are reordered together."""


class Exact(NamedTuple):
    """A copy of a network in evaluation mode, as precise as it runs.

    Attributes:
        inputs: what it takes, in its precision.
        before: what it says.
        tolerance: how far its outputs may move by rounding.
    """

    model: nn.Module
    inputs: Example
    before: Tensor
    tolerance: float


def exact_copy(model: nn.Module, example: Example) -> Exact:
    """In double precision; in single where the network does not run in that.

    A cast that its code makes, or a copy of its weights that it keeps for itself, may hinder it.

    Raises:
        UnsuitableModelError: it runs in neither, or its scores are not found.
    """
    failed: Exception | None = None
    for kind, tolerance in ((torch.float64, TOLERANCE), (torch.float32, SINGLE)):
        copy = deepcopy(model).to(kind).eval()
        inputs = with_tensors(example, partial(_as_kind, kind))
        try:
            with torch.no_grad():
                before = outputs(copy, dict(copy.state_dict(keep_vars=True)), inputs)
        except UnsuitableModelError:
            raise
        except _FAILED as error:
            failed = failed or error
            continue
        return Exact(copy, inputs, before, tolerance)
    raise UnsuitableModelError(
        f"{type(model).__name__} runs neither in double nor in single precision ({failed!r:.200}), "
        "so no axis of it can be tried; needed: a network that does, whose weights are all in its "
        "state dict"
    ) from failed


class Tried(NamedTuple):
    """An axis, and how far reordering it alone moved the outputs."""

    axis: Axis
    moved: float


def prove(model: nn.Module, example: Example, axes: Axes, *, seed: int = 0) -> Axes:
    """The axes along which the network can be reordered; the others are left out.

    In a copy of it in evaluation mode and double precision, if it runs in that. Many axes are
    reordered at once, in so many rounds that of any two each is somewhere reordered without the
    other: two that can only be reordered together are no axes. Where a round moves the outputs, its
    axes are tried one by one.

    Raises:
        UnsuitableModelError: the network runs neither in double nor in single precision.
    """
    exact = exact_copy(model, example)
    moved = _mover(exact, seed)
    wrong: set[int] = set()
    numbers = range(len(axes.axes))
    bits = range(max(1, (len(numbers) - 1).bit_length()))
    rounds = [(bit, value) for bit in bits for value in (0, 1)]
    for bit, value in counted(rounds, "trying the network's axes"):
        chosen = [n for n in numbers if (n >> bit) & 1 == value and n not in wrong]
        wrong |= _wrong(chosen, axes.axes, moved, exact.tolerance)
    pairs = tuple(axis for axis in axes.pairs if axis.traits == _ROTATED)
    turned, negated = (_mover(exact, seed, with_pairs) for _ in range(2))
    false = _wrong(range(len(pairs)), pairs, turned, exact.tolerance)
    whole = {
        place.tensor for n, axis in enumerate(pairs) if n not in false for place in axis.places
    }
    lesser = tuple(
        replace(pairs[n], traits=("negated", *_ROTATED))
        for n in sorted(false)
        if not whole & {place.tensor for place in pairs[n].places}
    )
    wrong_too = _wrong(range(len(lesser)), lesser, negated, exact.tolerance)
    kept = [axis for n, axis in enumerate(pairs) if n not in false]
    kept += [axis for n, axis in enumerate(lesser) if n not in wrong_too]
    return replace(
        axes,
        axes=tuple(axes.axes[n] for n in numbers if n not in wrong),
        pairs=tuple(sorted(kept, key=lambda axis: (axis.size, axis.places))),
    )


def try_all(model: nn.Module, example: Example, axes: Axes, *, seed: int = 0) -> list[Tried]:
    """Reorder each axis on its own, and measure how far the outputs move."""
    moved = _mover(exact_copy(model, example), seed)
    return [Tried(axis, moved([axis])) for axis in axes.axes]


def reordered(state: Mapping[str, Tensor], axis: Axis, order: Tensor) -> dict[str, Tensor]:
    """A state dict in which index j of the axis is what index `order[j]` was."""
    changed = dict(state)
    for place in axis.places:
        tensor = changed[place.tensor]
        at = torch.from_numpy(place.positions(axis.size))
        source = torch.arange(tensor.shape[place.dimension])
        source[at] = at[order]
        changed[place.tensor] = tensor.index_select(place.dimension, source.to(tensor.device))
    return changed


def with_pairs(
    state: Mapping[str, Tensor], axis: Axis, rng: torch.Generator, heads: int = 1
) -> dict[str, Tensor]:
    """A state dict in which each pair of queries is turned and stretched, and of keys undone.

    Complex numbers say it: q is multiplied by z, k by z/|z|². Each of `heads` has its own. Where
    both are normed, and the trait is "negated", z is 1 or −1.
    """
    changed, both = dict(state), sides_of(axis)
    if both is None:
        return changed
    angle = torch.rand(axis.size, heads, generator=rng, dtype=torch.float64) * 2 * torch.pi
    length = (torch.rand(axis.size, heads, generator=rng, dtype=torch.float64) * 2 - 1).exp()
    if "negated" in axis.traits:
        angle[torch.randint(axis.size, (), generator=rng)] = 2 * torch.pi  # one at least moves
        angle, length = (angle > torch.pi) * torch.pi, torch.ones_like(length)
    for pairs, size in zip(both, (length, 1 / length), strict=True):
        for one, two in pairs:
            tensor = changed[one.tensor].clone()
            rows = tensor.movedim(one.dimension, 0)
            at, to = (torch.from_numpy(each.positions(axis.size)) for each in (one, two))
            times = at.shape[1] // heads
            cos, sin = (
                (size * of(angle)).repeat_interleave(times, 1).flatten().to(tensor)
                for of in (torch.cos, torch.sin)
            )
            a, b = rows[at.flatten()], rows[to.flatten()]
            cos, sin = (each.view(-1, *[1] * (a.dim() - 1)) for each in (cos, sin))
            rows[at.flatten()], rows[to.flatten()] = cos * a - sin * b, sin * a + cos * b
            changed[one.tensor] = tensor
    return changed


def _cycled(state: Mapping[str, Tensor], axis: Axis, rng: torch.Generator) -> dict[str, Tensor]:
    return reordered(state, axis, _cycle(axis.size, rng))


Change = Callable[[Mapping[str, Tensor], Axis, torch.Generator], dict[str, Tensor]]


def _wrong(chosen: Sequence[int], axes: Sequence[Axis], moved: Moved, tolerance: float) -> set[int]:
    """Those of the chosen axes that move the outputs, found by halves."""
    if not chosen or moved([axes[number] for number in chosen]) <= tolerance:
        return set()
    if len(chosen) == 1:
        return set(chosen)
    half = len(chosen) // 2
    parts = chosen[:half], chosen[half:]
    found = set[int]().union(*(_wrong(part, axes, moved, tolerance) for part in parts))
    # Each half moves nothing and both do: the two depend on one another, and none is an axis.
    return found or set(chosen)


def _mover(exact: Exact, seed: int, change: Change = _cycled) -> Moved:
    state = dict(exact.model.state_dict(keep_vars=True))
    rng = torch.Generator().manual_seed(seed)
    before = exact.before
    largest = before.abs().max().clamp(min=torch.finfo(before.dtype).tiny)

    @torch.no_grad()
    def moved(axes: Sequence[Axis]) -> float:
        changed: Mapping[str, Tensor] = state
        for axis in axes:
            changed = change(changed, axis, rng)
        try:
            after = outputs(exact.model, changed, exact.inputs)
        except _FAILED:  # its code looks at the weights
            return math.inf
        return float((after - before).abs().max() / largest)

    return moved


def _cycle(size: int, rng: torch.Generator) -> Tensor:
    """A random order that leaves nothing in its place: a random permutation of two may."""
    order = torch.randperm(size, generator=rng)
    found = torch.empty_like(order)
    found[order] = order.roll(1)
    return found


def _as_kind(kind: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(kind) if tensor.is_floating_point() else tensor


def outputs(model: nn.Module, state: Mapping[str, Tensor], inputs: Example) -> Tensor:
    """Scores of the network with the tensors of another state."""
    if isinstance(inputs, Mapping):
        output = functional_call(model, dict(state), (), dict(inputs), tie_weights=False)
    else:
        given = inputs if isinstance(inputs, tuple) else (inputs,)
        output = functional_call(model, dict(state), given, tie_weights=False)
    return logits_of(output).detach()
