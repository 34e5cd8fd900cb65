"""Removal at no cost, on any network: moves along its axes that leave what it computes as it is.

`obfuscation` knows two architectures by name; here the network is traced, and every move is tried:
in double precision, on the inputs that were given. One that moves the outputs is taken back. What
an attacker can do without data, training or loss is therefore what is done, whatever the network.

    reorder    indices of every axis
    negate     channels before a norm, the norm's weight with them
    scale      channels before a batch norm, its statistics with them
    stretch    channels behind a norm or a layer by positive factors, readers by the inverse
    regain     norms' weights, readers by the inverse; vectors that multiply a layer's output
    fix        the mean that a layer norm takes away: into writers, and out of readers
    rotate     residual streams, once norms' weights are in their readers
    mix        linear bottlenecks by any invertible matrix
    heads      the inside of every attention head by any invertible matrix
    pairs      pairs of queries and keys that positions rotate: turned and stretched, keys back
    balance    the two factors of a product of hidden units (gated layers), signs too
    mirror     kernels, and the pictures with them: what runs the network has to turn these
    split      hidden units into two that share what one did: the network grows
    dummies    pairs of hidden units that cancel each other, loud ones: the same
    widen      a pair of heads that cancel each other in every attention: the same
    groups     inside each group of a convolution in groups, in an order of its own

Table of these: `docs/attacks.md`. Rounding in the network's own precision is all that is lost.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nnpassport.alignment.axes import Axes, Axis, Norm, Place, Statistics
from nnpassport.alignment.canonical import reads, writing
from nnpassport.alignment.heads import attentions, inside_of
from nnpassport.alignment.mirrors import AS_IT_IS, Orientation, possible, turned
from nnpassport.alignment.solve import Unit, grouped
from nnpassport.alignment.spots import Spot, spots_of
from nnpassport.alignment.table import sides_of
from nnpassport.attacks.outcome import Attacked, Cost, stopwatch
from nnpassport.embedding.axes import axes_of, put_tensor, untied
from nnpassport.embedding.network.outputs import Example, with_tensors
from nnpassport.embedding.network.prove import exact_copy, outputs, reordered, with_pairs
from nnpassport.embedding.network.survey import Site, survey
from nnpassport.ground.progress import counted
from nnpassport.scheme import BadRecipeError

SPREAD = 4.0
"""Factors are log-uniform between its inverse and it."""
MIXED = 2.0
"""Singular values of invertible matrices are between its inverse and it."""
SHARE = 0.1
"""Of the units of an axis that `split` splits."""

State = dict[str, Tensor]
Act = Callable[[State, torch.Generator], None]
"""Changes a state dict, whose tensors it may overwrite."""


class Moved(NamedTuple):
    """A network that computes the same with other weights.

    Attributes:
        model: the changed copy; tied parameters are no longer tied.
        cost: what the attacker spent.
        done: by kind of move, in how many places it was made.
        undone: by kind of move, in how many places it would have moved the outputs.
        error: how far the outputs moved in double precision, relative to the largest.
        shown: how pictures have to be turned for it, which the copy does by a hook: its weights
            alone do not.
    """

    model: nn.Module
    cost: Cost
    done: Mapping[str, int]
    undone: Mapping[str, int]
    error: float
    shown: Orientation = AS_IT_IS

    @property
    def attacked(self) -> Attacked:
        """The same as what every removal attack returns."""
        return Attacked(self.model, self.cost)


@torch.no_grad()
def move(
    model: nn.Module,
    example: Example,
    rng: torch.Generator,
    *,
    kinds: Sequence[str] | None = None,
) -> Moved:
    """Make all free moves of these kinds, one kind after the other; None is all, in their order.

    `example` is what the network takes, a batch of one or two: random numbers will do for images.

    Raises:
        BadRecipeError: there is no such kind.
        UnsuitableModelError: the network is wrapped, or its scores are not found.
    """
    stop = stopwatch("W")
    chosen = tuple(KINDS) if kinds is None else tuple(kinds)
    if unknown := sorted(set(chosen) - KINDS.keys()):
        raise BadRecipeError(f"there is no move {unknown[0]!r}; needed: some of {', '.join(KINDS)}")
    subject = _Subject(model, example)
    done, undone = dict[str, int](), dict[str, int]()
    for kind in counted(chosen, "free moves"):
        if kind == "mirror":
            done[kind], undone[kind] = subject.mirror(rng)
            continue
        acts = list(KINDS[kind](subject))
        made = subject.attempt(acts, rng) if acts else 0
        done[kind], undone[kind] = made, len(acts) - made
    return Moved(subject.result(model), stop(), done, undone, subject.error(), subject.shown)


class _Subject:
    """A copy of the network in double precision, its axes, and the state as it is by now."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        exact = exact_copy(untied(deepcopy(model)), example)
        self.exact, self.inputs, self.tolerance = exact.model, exact.inputs, exact.tolerance
        self.axes = axes_of(self.exact, self.inputs)
        if _add_biases(self.exact, self.axes):  # they are along axes as well
            self.axes = axes_of(self.exact, self.inputs)
        self.sites = survey(self.exact, self.inputs).sites
        self.kind = exact.before.dtype
        self.state: State = {
            n: t.detach().clone().double() if t.is_floating_point() else t.detach().clone()
            for n, t in self.exact.state_dict().items()
        }
        self.shapes = {n: tuple(t.shape) for n, t in self.state.items()}
        self.shown = AS_IT_IS
        self.before = self._outputs(self.state)

    def mirror(self, rng: torch.Generator) -> tuple[int, int]:
        """Turn kernels and pictures, in the first way by lot that leaves the outputs alone.

        Returns whether one did, and how many did not.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        ways = list(possible(self.axes, shapes))
        order = torch.randperm(len(ways), generator=rng).tolist()
        inputs, arrays = self.inputs, {n: t.numpy() for n, t in self.state.items()}
        for number, way in enumerate(ways[index] for index in order):
            tried = {n: torch.from_numpy(a) for n, a in turned(self.axes, arrays, way).items()}
            self.inputs, self.shown = with_tensors(inputs, partial(_turned_picture, way)), way
            if self._error(tried) <= self.tolerance:
                self.state = {name: tensor.clone() for name, tensor in tried.items()}
                return 1, number
        self.inputs, self.shown = inputs, AS_IT_IS
        return 0, len(ways)

    def attempt(self, acts: Sequence[Act], rng: torch.Generator) -> int:
        """Do what leaves the outputs where they are, found by halves; returns how many acts."""
        tried = {name: tensor.clone() for name, tensor in self.state.items()}
        if self._done(acts, tried, rng) and self._error(tried) <= self.tolerance:
            self.state = tried
            return len(acts)
        if len(acts) == 1:
            return 0
        half = len(acts) // 2
        return self.attempt(acts[:half], rng) + self.attempt(acts[half:], rng)

    def error(self) -> float:
        """How far the outputs have moved, relative to the largest."""
        return self._error(self.state)

    def result(self, model: nn.Module) -> nn.Module:
        """A copy of the network with the state, in its own precision and mode."""
        found = untied(deepcopy(model))
        _add_biases(found, self.axes)
        _fit(found, self.state)
        for name, tensor in found.state_dict(keep_vars=True).items():
            value = self.state[name].to(tensor.dtype)
            if value.shape == tensor.shape:
                tensor.detach().copy_(value)
            else:
                put_tensor(found, name, value)
        if self.shown != AS_IT_IS:
            before: Any = _Turning(self.shown)
            after: Any = _TurningBack(self.shown)
            found.register_forward_pre_hook(before, with_kwargs=True)
            found.register_forward_hook(after)
        return found

    def _done(self, acts: Sequence[Act], state: State, rng: torch.Generator) -> bool:
        """Whether these fit the network at all; what the table takes for a reader may be more."""
        try:
            for act in acts:
                act(state, rng)
        except RuntimeError:
            return False
        return True

    def _error(self, state: State) -> float:
        try:
            after = self._outputs(state)
        except (RuntimeError, ValueError, IndexError, AttributeError, TypeError):
            return math.inf  # shapes that do not fit: its code reads this axis elsewhere too
        largest = self.before.abs().max().clamp(min=torch.finfo(self.before.dtype).tiny)
        error = float((after - self.before).abs().max() / largest)
        return math.inf if math.isnan(error) else error

    def _outputs(self, state: State) -> Tensor:
        _fit(self.exact, state)
        state = {n: t.to(self.kind) if t.is_floating_point() else t for n, t in state.items()}
        return _turned_picture(self.shown.inverse, outputs(self.exact, state, self.inputs))


class _Turning(NamedTuple):
    """Turns the pictures that a network is given, as whoever runs it does."""

    way: Orientation

    def __call__(self, _: nn.Module, given: Any, named: Any) -> tuple[Any, Any]:
        change = partial(_turned_picture, self.way)
        return with_tensors(given, change), with_tensors(named, change)


class _TurningBack(NamedTuple):
    """Turns maps that a network gives back to how its pictures came."""

    way: Orientation

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Any:
        return with_tensors(output, partial(_turned_picture, self.way.inverse))


def _turned_picture(way: Orientation, tensor: Tensor) -> Tensor:
    """A tensor of four dimensions turned, or of numbers in time reversed; others as they are."""
    signal = tensor.dim() == 3 and tensor.is_floating_point() and not way.transposed
    if tensor.dim() == 4:
        tensor = tensor.transpose(-1, -2) if way.transposed else tensor
        return tensor.flip(way.flipped) if way.flipped else tensor
    return tensor.flip(-1) if signal and -1 in way.flipped else tensor


# The moves


def _reorder(subject: _Subject) -> Iterator[Act]:
    def act(axis: Axis) -> Act:
        def do(state: State, rng: torch.Generator) -> None:
            state |= reordered(state, axis, torch.randperm(axis.size, generator=rng))

        return do

    yield from map(act, subject.axes.axes)


def _negate(subject: _Subject) -> Iterator[Act]:
    for weight, norm, groups in _normed(subject):

        def do(
            state: State,
            rng: torch.Generator,
            weight: str = weight,
            norm: str = norm,
            groups: int | None = groups,
        ) -> None:
            if f"{norm}.weight" not in state:
                return
            count = len(state[f"{norm}.weight"])
            signs = _signs(groups or count, rng).repeat_interleave(count // (groups or count))
            _times(state, weight, writing(subject.axes, weight), signs)
            for name in (_bias(weight), f"{norm}.weight", f"{norm}.running_mean"):
                if name in state:
                    state[name] *= signs

        yield do


def _scale(subject: _Subject) -> Iterator[Act]:
    for weight, norm in subject.axes.batch_norms.items():

        def do(
            state: State, rng: torch.Generator, weight: str = weight, norm: Statistics = norm
        ) -> None:
            if norm.weight is None:
                return
            factor = _factors(len(state[norm.mean]), rng)
            _times(state, weight, writing(subject.axes, weight), factor)
            for name in (_bias(weight), norm.mean):
                if name in state:
                    state[name] *= factor
            before = state[norm.variance] + norm.epsilon
            state[norm.variance] = (before * factor**2 - norm.epsilon).clamp(min=0)
            state[norm.weight] *= ((state[norm.variance] + norm.epsilon) / before).sqrt() / factor

        yield do


def _stretch(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    normed = {weight for weight, _, _ in _normed(subject)}
    statistics = {n for each in axes.batch_norms.values() for n in (each.mean, each.variance)}
    left_alone = normed | {_bias(weight) for weight in normed} | statistics
    for traits, spots in _whole(axes):
        if "rectified" not in traits or traits & {"layer norm", "bilinear"}:
            continue
        yield _stretched(spots, left_alone, normed)
        if "product" not in traits:
            continue
        for gate in spots:  # what is multiplied with the channels stays as it is
            matrix = subject.state[gate.tensor].dim() > 1
            if matrix and not gate.reads and gate.tensor not in left_alone:
                yield _stretched(spots, left_alone | {gate.tensor, _bias(gate.tensor)}, normed)


def _whole(axes: Axes) -> Iterator[tuple[set[str], Sequence[Spot]]]:
    """Traits of all axes, and where they are; inside groups of a convolution, by group and index.

    Groups themselves are then in their insides.
    """
    in_groups = grouped(axes)
    taken = {number for unit in in_groups for number in unit.numbers}
    for unit in in_groups:
        yield set(axes.axes[unit.last].traits), unit.spots
    for number, axis in enumerate(axes.axes):
        if number not in taken:
            yield set(axis.traits), spots_of(axes, axis)


def _stretched(spots: Sequence[Spot], left_alone: Collection[str], normed: Collection[str]) -> Act:
    def do(state: State, rng: torch.Generator) -> None:
        factor = _factors(len(spots[0].positions), rng)[:, None]
        for spot in spots:
            kernels = spot.dimension == 0 and state[spot.tensor].shape[1:2] == (1,)
            if spot.reads or (kernels and spot.tensor in normed):  # depthwise: they read
                _put_spot(state, spot, _rows_of_spot(state, spot) / factor)
            elif spot.tensor not in left_alone:
                _put_spot(state, spot, _rows_of_spot(state, spot) * factor)

    return do


def _regain(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for gain, norm in axes.norms.items():

        def norms(state: State, rng: torch.Generator, gain: str = gain, norm: Norm = norm) -> None:
            factor = _factors(len(state[gain]), rng) * _signs(len(state[gain]), rng)
            _times_gain(axes, state, gain, factor)
            if norm.shift is not None:
                state[norm.shift] *= factor
            for name, dimension in _readers(axes, gain):
                _times(state, name, dimension, 1 / factor)

        yield norms
    for weight, gain in axes.gains.items():

        def layers(
            state: State, rng: torch.Generator, weight: str = weight, gain: str = gain
        ) -> None:
            count = state[gain].numel()
            factor = _factors(count, rng) * _signs(count, rng)
            if gain in axes.norms:  # the norm in between takes sizes away, or what is not of all
                factor = _signs(1 if axes.norms[gain].centred else count, rng).expand(count)
            _times(state, weight, writing(axes, weight), factor)
            if _bias(weight) in state:
                state[_bias(weight)] *= factor
            _times_gain(axes, state, gain, 1 / factor.view(state[gain].shape))

        yield layers


def _fix(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for name, (dimension, gain) in axes.reads.items():
        if gain is not None and gain in axes.norms and axes.norms[gain].centred:
            yield _fixed_reader(axes, name, dimension, gain)
    for axis in axes.axes:
        if "layer norm" in axis.traits:
            yield _fixed_writers(axes, axis)


def _fixed_reader(axes: Axes, name: str, dimension: int, gain: str) -> Act:
    """Add to every column of a reader what a centred input cancels."""

    def do(state: State, rng: torch.Generator) -> None:
        weight, shift = state[name], axes.norms[gain].shift
        if weight.dim() != 2 or _bias(name) not in state:
            return
        by_reader = weight.movedim(dimension, 1)[:, : len(state[gain])]
        constant = torch.randn(len(by_reader), generator=rng, dtype=weight.dtype)
        constant *= 3 * by_reader.norm(dim=1) / by_reader.shape[1] ** 0.5
        by_reader += constant[:, None] / state[gain]
        if shift is not None:
            state[_bias(name)] -= constant * (state[shift] / state[gain]).sum()

    return do


def _fixed_writers(axes: Axes, axis: Axis) -> Act:
    """Add to all that a stream is given a constant, which its norms take away."""

    def do(state: State, rng: torch.Generator) -> None:
        for place in axis.places:
            if state[place.tensor].dim() > 1 and not reads(axes, place):
                rows = _rows(state, place, axis.size)
                added = torch.randn(rows.shape[1], generator=rng, dtype=rows.dtype)
                _put(state, place, rows + added * rows.std())

    return do


def _rotate(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for axis in axes.axes:
        if axis.kind != "orthogonal":
            continue

        def do(state: State, rng: torch.Generator, axis: Axis = axis) -> None:
            vectors = _fold_gains(state, axes, axis)
            fixed = torch.ones(axis.size) if "layer norm" in axis.traits else None
            turn = _rotation(axis.size, rng, fixed)
            for place in axis.places:
                if place.tensor not in vectors:
                    _put(state, place, turn @ _rows(state, place, axis.size))

        yield do


def _mix(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for axis in axes.axes:
        if axis.kind != "invertible":
            continue

        def do(state: State, rng: torch.Generator, axis: Axis = axis) -> None:
            by, back = _invertible(axis.size, rng)
            settled = set[str]()
            for place in axis.places:
                norm = axes.batch_norms.get(place.tensor)
                if reads(axes, place):
                    _put(state, place, back.T @ _rows(state, place, axis.size))
                elif norm is not None and norm.weight is not None and norm.bias is not None:
                    _fold_statistics(state, place.tensor, norm, writing(axes, place.tensor))
                    _put(state, place, by @ _rows(state, place, axis.size))
                    state[norm.bias] = by @ state[norm.bias]
                    settled |= {norm.weight, norm.bias, norm.mean, norm.variance}
                    settled.add(_bias(place.tensor))
                elif place.tensor not in settled and state[place.tensor].dim() > 1:
                    _put(state, place, by @ _rows(state, place, axis.size))

        yield do


def _heads(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for attention in attentions(axes):
        for inside in attention.insides:
            first, second = (side.whole for side in inside.sides)

            def do(
                state: State,
                rng: torch.Generator,
                spots: Sequence[Spot] = tuple(inside_of(axes, attention.heads, inside.number)),
                second: Spot = second,
                fused: bool = first.tensor == second.tensor,
                size: tuple[int, int] = (attention.size[0], axes.axes[inside.number].size),
            ) -> None:
                turns = [_invertible(size[1], rng) for _ in range(size[0])]
                there = torch.block_diag(*(by for by, _ in turns))
                back = torch.block_diag(*(inverse.T for _, inverse in turns))
                for spot in spots:
                    by = back if _is_of(spot, second, fused=fused) else there
                    _put_spot(state, spot, by @ _rows_of_spot(state, spot))

            yield do


def _pairs(subject: _Subject) -> Iterator[Act]:
    for axis in subject.axes.pairs:

        def do(state: State, rng: torch.Generator, axis: Axis = axis) -> None:
            both = sides_of(axis)
            keys = min(one.positions(axis.size).shape[1] for side in both or () for one, _ in side)
            state |= with_pairs(state, axis, rng, heads=keys)

        yield do


def _balance(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for axis in axes.axes:
        if "product" not in axis.traits:
            continue
        for writer in axis.places:
            if reads(axes, writer) or subject.state[writer.tensor].dim() < 2:
                continue

            def do(
                state: State, rng: torch.Generator, axis: Axis = axis, writer: Place = writer
            ) -> None:
                factor = _factors(axis.size, rng) * _signs(axis.size, rng)
                for place in axis.places:
                    if reads(axes, place):
                        _times_at(state, place, axis.size, 1 / factor)
                    elif place.tensor in {writer.tensor, _bias(writer.tensor)}:
                        _times_at(state, place, axis.size, factor)

            yield do


def _split(subject: _Subject) -> Iterator[Act]:
    for axis in _growable(subject):

        def do(state: State, rng: torch.Generator, axis: Axis = axis) -> None:
            size = _length(state, axis)
            count = max(1, round(SHARE * axis.size))
            chosen = torch.randperm(size, generator=rng)[:count]
            share = torch.rand(count, generator=rng, dtype=torch.float64) * 0.8 + 0.1
            order = torch.randperm(size + count, generator=rng)
            for place in axis.places:
                tensor = state[place.tensor].movedim(place.dimension, 0)
                twins = tensor[chosen]
                if reads(subject.axes, place):
                    by = share.view(-1, *[1] * (tensor.dim() - 1))
                    twins = twins * (1 - by)
                    tensor = tensor.clone()
                    tensor[chosen] *= by
                grown = torch.cat([tensor, twins])[order]
                state[place.tensor] = grown.movedim(0, place.dimension).contiguous()

        yield do


def _in_groups(subject: _Subject) -> Iterator[Act]:
    for unit in grouped(subject.axes):

        def do(state: State, rng: torch.Generator, unit: Unit = unit) -> None:
            inside = unit.size // unit.groups
            orders = [torch.randperm(inside, generator=rng) for _ in range(unit.groups)]
            order = torch.cat([number * inside + own for number, own in enumerate(orders)])
            for spot in unit.spots:
                _put_spot(state, spot, _rows_of_spot(state, spot)[order])

        yield do


def _dummies(subject: _Subject) -> Iterator[Act]:
    for axis in _growable(subject):

        def do(state: State, rng: torch.Generator, axis: Axis = axis) -> None:
            size = _length(state, axis)
            count = max(1, round(SHARE * axis.size))
            like = torch.randperm(size, generator=rng)[:count]
            order = torch.randperm(size + 2 * count, generator=rng)
            for place in axis.places:
                tensor = state[place.tensor].movedim(place.dimension, 0)
                added = _cancelling(tensor[like], rng, reader=reads(subject.axes, place))
                grown = torch.cat([tensor, added])[order]
                state[place.tensor] = grown.movedim(0, place.dimension).contiguous()

        yield do


def _widen(subject: _Subject) -> Iterator[Act]:
    axes = subject.axes
    for attention in attentions(axes):
        if attention.heads is None or not _is_whole(subject, axes.axes[attention.heads]):
            continue
        axis = axes.axes[attention.heads]

        def do(state: State, rng: torch.Generator, axis: Axis = axis) -> None:
            like = torch.randperm(axis.size, generator=rng)[:1]
            order = torch.randperm(axis.size + 2, generator=rng)
            for place in axis.places:
                tensor = state[place.tensor].movedim(place.dimension, 0)
                by_head = tensor.reshape(axis.size, -1, *tensor.shape[1:])
                added = _cancelling(by_head[like], rng, reader=reads(axes, place))
                grown = torch.cat([by_head, added])[order].flatten(0, 1)
                state[place.tensor] = grown.movedim(0, place.dimension).contiguous()

        yield do


def _cancelling(rows: Tensor, rng: torch.Generator, *, reader: bool) -> Tensor:
    """Rows like these but in no order, each twice; what reads them takes one from the other."""
    flat = rows.reshape(len(rows), -1)
    order = torch.randperm(flat.shape[1], generator=rng)
    found = flat[:, order].reshape(rows.shape)
    return torch.cat([found, -found if reader else found])


def _growable(subject: _Subject) -> Iterator[Axis]:
    """Axes that may get more indices: those that are all of a dimension wherever they are."""
    for axis in subject.axes.axes:
        lengths = {subject.shapes[place.tensor][place.dimension] for place in axis.places}
        if axis.kind == "permute" and lengths == {axis.size}:
            yield axis


def _is_whole(subject: _Subject, axis: Axis) -> bool:
    """Whether an axis is all of a dimension wherever it is, index by index with its repeats."""
    shapes = subject.shapes
    return all(
        np.array_equal(
            place.positions(axis.size).reshape(-1), np.arange(shapes[place.tensor][place.dimension])
        )
        for place in axis.places
    )


def _length(state: State, axis: Axis) -> int:
    place = axis.places[0]
    return state[place.tensor].shape[place.dimension]


def _mirror(_: _Subject) -> Iterator[Act]:
    """Nothing along an axis: `_Subject.mirror` does it, since it changes the pictures as well."""
    yield from ()


KINDS: Mapping[str, Callable[[_Subject], Iterator[Act]]] = {
    "negate": _negate,
    "scale": _scale,
    "stretch": _stretch,
    "regain": _regain,
    "fix": _fix,
    "balance": _balance,
    "heads": _heads,
    "pairs": _pairs,
    "mix": _mix,
    "rotate": _rotate,
    "reorder": _reorder,
    "mirror": _mirror,
    "split": _split,
    "dummies": _dummies,
    "widen": _widen,
    "groups": _in_groups,
}
"""All kinds of moves, in the order in which `move` makes them; they have numbers, so new ones come
last."""
GROWING = ("split", "dummies", "widen")
KEEPING = tuple(kind for kind in KINDS if kind not in GROWING)
"""Those after which tensors have other shapes, and the others."""


# What they are made of


def _normed(subject: _Subject) -> Iterator[tuple[str, str, int | None]]:
    """Weights that a norm follows, the norm, and how many groups it takes; None: one a channel."""
    there = set[str]()
    for site in subject.sites.values():
        if site.norm is not None:
            there.add(f"{site.name}.weight")
            yield f"{site.name}.weight", site.norm, _groups(subject.exact, site)
    for weight, norm in subject.axes.batch_norms.items():
        if weight not in there:
            yield weight, norm.mean.rpartition(".")[0], None


def _groups(model: nn.Module, site: Site) -> int | None:
    assert site.norm is not None  # noqa: S101 - the caller has looked
    norm = model.get_submodule(site.norm)
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    return None if isinstance(norm, nn.modules.batchnorm._NormBase) else 1


def _fold_gains(state: State, axes: Axes, axis: Axis) -> set[str]:
    """Put norms' weights and shifts, and layers' factors, into matrices; returns the vectors."""
    on_axis = {place.tensor for place in axis.places}
    found = set[str]()
    for gain, norm in axes.norms.items():
        if gain not in on_axis:
            continue
        for name, dimension in _readers(axes, gain):
            by_reader = state[name].movedim(dimension, 1)
            if norm.shift is not None and _bias(name) in state and by_reader.dim() == 2:
                shift = _repeated(state[norm.shift], by_reader.shape[1])
                state[_bias(name)] += by_reader @ shift
            _times(state, name, dimension, state[gain] + norm.added)
        state[gain].fill_(1 - norm.added)
        found.add(gain)
        if norm.shift is not None:
            state[norm.shift].zero_()
            found.add(norm.shift)
    for weight, gain in axes.gains.items():
        if gain in on_axis:
            added = axes.norms[gain].added if gain in axes.norms else 0.0
            factor = state[gain].flatten() + added
            _times(state, weight, writing(axes, weight), factor)
            if _bias(weight) in state:
                state[_bias(weight)] *= factor
            state[gain].fill_(1 - added)
            found.add(gain)
    return found


def _times_gain(axes: Axes, state: State, gain: str, factor: Tensor) -> None:
    """Multiply what a norm or a layer is multiplied with, in place."""
    added = axes.norms[gain].added if gain in axes.norms else 0.0
    state[gain] += added
    state[gain] *= factor
    state[gain] -= added


def _readers(axes: Axes, gain: str) -> Iterator[tuple[str, int]]:
    """Tensors that read what a norm gives, and along which dimension."""
    for name, (dimension, before) in axes.reads.items():
        if before == gain:
            yield name, dimension


def _fold_statistics(state: State, weight: str, norm: Statistics, dimension: int) -> None:
    """Put a batch norm into the layer before it; what is left of it is a bias."""
    assert norm.weight is not None and norm.bias is not None  # noqa: S101, PT018
    factor = state[norm.weight] / (state[norm.variance] + norm.epsilon).sqrt()
    added = state[norm.bias] - factor * state[norm.mean]
    if _bias(weight) in state:
        added = added + factor * state[_bias(weight)]
        state[_bias(weight)].zero_()
    _times(state, weight, dimension, factor)
    state[norm.bias] = added
    state[norm.mean].zero_()
    state[norm.variance].fill_(1 - norm.epsilon)
    state[norm.weight].fill_(1)


def _is_of(spot: Spot, second: Spot, *, fused: bool) -> bool:
    """Whether a spot, or the bias of one, is on the second side of a head.

    `fused`: both sides are rows of one tensor, and told apart by where they are.
    """
    if spot.tensor not in {second.tensor, _bias(second.tensor)}:
        return False
    return not fused or np.array_equal(spot.positions, second.positions)


def _bias(weight: str) -> str:
    """Name of a layer's bias, by that of its weight."""
    return f"{weight.removesuffix('weight')}bias"


def _times(state: State, name: str, dimension: int, factor: Tensor) -> None:
    tensor = state[name]
    values = _repeated(factor.to(tensor), tensor.shape[dimension])
    tensor *= values.view([-1 if n == dimension else 1 for n in range(tensor.dim())])


def _repeated(values: Tensor, length: int) -> Tensor:
    """As often as a dimension holds them, where the same is read several times side by side."""
    return values.repeat(max(1, length // len(values)))


def _times_at(state: State, place: Place, size: int, factor: Tensor) -> None:
    _put(state, place, _rows(state, place, size) * factor[:, None])


def _rows(state: State, place: Place, size: int) -> Tensor:
    """A tensor's rows along an axis (size rest), a copy."""
    at = torch.from_numpy(place.positions(size))
    return state[place.tensor].movedim(place.dimension, 0)[at.flatten()].reshape(size, -1)


def _put(state: State, place: Place, rows: Tensor) -> None:
    at = torch.from_numpy(place.positions(len(rows))).flatten()
    moved = state[place.tensor].movedim(place.dimension, 0)
    moved[at] = rows.reshape(len(at), *moved.shape[1:])


def _rows_of_spot(state: State, spot: Spot) -> Tensor:
    return torch.from_numpy(spot.rows(state[spot.tensor].numpy()))


def _put_spot(state: State, spot: Spot, rows: Tensor) -> None:
    placed = spot.with_rows(state[spot.tensor].numpy(), rows.numpy())
    state[spot.tensor] = torch.from_numpy(placed)


def _signs(count: int, rng: torch.Generator) -> Tensor:
    return torch.randint(2, (count,), generator=rng, dtype=torch.float64) * 2 - 1


def _factors(count: int, rng: torch.Generator) -> Tensor:
    exponent = torch.rand(count, generator=rng, dtype=torch.float64) * 2 - 1
    return (exponent * math.log(SPREAD)).exp()


def _rotation(size: int, rng: torch.Generator, fixed: Tensor | None = None) -> Tensor:
    """A random rotation (size size); of `fixed` it leaves every multiple where it is."""
    random = torch.randn(size, size, generator=rng, dtype=torch.float64)
    if fixed is None:
        return torch.linalg.qr(random).Q
    random[:, 0] = fixed
    basis = torch.linalg.qr(random).Q
    inside = _rotation(size - 1, rng)
    turn = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inside)
    return basis @ turn @ basis.T


def _invertible(size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random matrix (size size) of bounded condition, and its inverse."""
    left, right = _rotation(size, rng), _rotation(size, rng)
    exponent = torch.rand(size, generator=rng, dtype=torch.float64) * 2 - 1
    values = (exponent * math.log(MIXED)).exp()
    return left @ torch.diag(values) @ right, right.T @ torch.diag(1 / values) @ left.T


def _add_biases(model: nn.Module, axes: Axes) -> bool:
    """Zeros where a Linear that reads a norm has no bias: they can take the norm's shift.

    Whether there was one that had none.
    """
    added = False
    for name, (_, gain) in axes.reads.items():
        module = model.get_submodule(name.rpartition(".")[0])
        shifted = gain is not None and gain in axes.norms and axes.norms[gain].shift is not None
        if shifted and isinstance(module, nn.Linear) and module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(len(module.weight)))
            added = True
    return added


def _fit(model: nn.Module, state: State) -> None:
    """Let modules that keep a width of their own have that of the state."""
    for name, module in model.named_modules():
        weight = state.get(f"{name}.weight")
        if weight is None:
            continue
        if isinstance(module, nn.modules.conv._ConvNd):
            if module.groups == module.in_channels > 1:  # depthwise
                each = module.out_channels // module.groups
                module.groups = module.in_channels = len(weight) // each
                module.out_channels = len(weight)
        elif isinstance(getattr(module, "nf", None), int):  # Hugging Face's Conv1D
            module.nf = weight.shape[1]
