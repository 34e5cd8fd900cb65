"""Find the owner's layers among a suspect's tensors by their shapes, whatever these are called.

A bare file of weights does not say which of its tensors the function reads. Names are free: they
can be changed, and the owner's can be put on tensors that nobody reads. So every tensor that has
the shape for it, in some width, is a candidate for a layer; which one is taken follows from how
well its filters fit the reference's, layer by layer from the images on, and every choice that there
was is paid for in the p-value (`log10_choices`), whether it was looked at or not.

Only filters are looked at here. Norms, biases and counters have no shapes to be told by, and
nothing hangs on them: of two layers one after the other, rows are compared by their angles, which
no scale changes, and the scale at which a layer reads a channel is that of its columns, brought to
the reference's. So it does not matter either whether norms were folded into filters. Alignment by
names (`names`), which knows the norms, sees more: twins that take from each other what they
add to what is read.

Blind, as `names`: what a bit is read with is projected out of both sides. Lengths of what is
left do not depend on the bits: they are the same for a filter and for its mirror image.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, final

import numpy as np

from nnpassport.alignment.channels import Floats, Network, Order, flat, weight_of, width
from nnpassport.alignment.match import assigned
from nnpassport.alignment.names import MOST_CHANNELS, Forms, bases_of, first_of_each, in_order
from nnpassport.files.arrays import Array, is_floating
from nnpassport.scheme import UnsuitableModelError

KEPT = 6
"""How many ways to choose the layers so far are followed, those that fit best."""

MOST_KEPT = 100
"""As many are followed where they fit alike: the same filters in other orders, say."""

MOST_PRODUCTS = 2**44
"""Products that the whole search may take, a quarter of an hour of one processor.

Each layer has an equal share, and what those before it left of theirs. Decoys cost a thief next to
nothing, and each is compared once for every choice that is followed: where there are too many,
fewer choices are.
"""

_ROUNDS = 3  # of rows to length one and columns to the reference's
_SMALLEST = 2.0**-60
_SHORTEST = 1e-12  # filters are divided by this at least
_ALIKE = 1e-9  # of fits: rounding is far below
_LEAST_PRODUCTS = 2**27  # what comparing two small tensors takes, in the same time


class Candidate(NamedTuple):
    """A tensor that may be a layer; `turned`: with its two axes exchanged."""

    name: str
    turned: bool


class Placed(NamedTuple):
    """A suspect's filters in the reference's order.

    Attributes:
        arrays: a state dict of the layers that were looked for, each "LAYER.weight".
        cosines: mean |cosine| between matched filters, by layer; without the part that V reads.
        dropped: channels whose filter is another's too; what is read of them is added up.
        missing: channels of the reference for which the suspect had none: they are zero.
    """

    arrays: Mapping[str, Array]
    cosines: Mapping[str, float]
    dropped: int
    missing: int


class Choice(NamedTuple):
    """Which tensor is which layer, and how well that fits: the sum of the layers' cosines."""

    taken: Mapping[str, Candidate]
    fit: float


class _Layer(NamedTuple):
    """A layer of the reference, and which axes it stands between.

    Attributes:
        turns: whether a norm takes a sign back.
        rows: its filters by input channel (out channels block).
        basis: orthonormal rows for what V reads (forms columns), or None.
        unit: the filters without what V reads, of length one (out columns).
        loud: the squares of `unit`, summed up by channel (out channels).
    """

    name: str
    writes: int | None
    reads: int | None
    turns: bool
    shape: tuple[int, ...]
    rows: Floats
    basis: Floats | None
    unit: Floats
    loud: Floats


class _State(NamedTuple):
    """A choice of the layers so far; `orders` says where each of the reference's channels is."""

    fit: float
    taken: dict[str, Candidate]
    sums: dict[int, Floats]
    firsts: dict[int, Order]
    orders: dict[int, Order]


_START = _State(0.0, {}, {}, {}, {})


@final
class Search:
    """What of one suspect may be which layer of one reference.

    Attributes:
        candidates: by layer, the tensors that fit it and, in their widths, each other.
    """

    def __init__(self, weights: Mapping[str, Array], reference: Network, forms: Forms) -> None:
        self._weights = weights
        self._layers = _layers(reference, forms)
        self.candidates = _candidates(weights, self._layers, len(reference.axes))
        self._last = {
            axis: [e.name for e in self._layers if e.writes == axis and _is_early(e, self._layers)][
                -1
            ]
            for axis in {layer.writes for layer in self._layers} - {None}
        }
        self._contents: dict[Candidate, tuple[object, ...]] = {}
        self._orders: dict[bytes, Order] = {}

    @property
    def log10_choices(self) -> float:
        """log₁₀ of how many ways there are to choose a tensor for each layer, or more."""
        return sum(math.log10(len(each)) for each in self.candidates.values())

    def best(self) -> list[Choice]:
        """The choices that fit best, the best one first."""
        states, left = [_START], 0
        for layer in self._layers:
            seen: dict[tuple[object, ...], _State | None] = {}
            left += MOST_PRODUCTS // len(self._layers)
            products = self._products(layer)
            states = states[: left // products]
            left -= len(states) * products
            tried = [
                found
                for state in states
                for each in self.candidates[layer.name]
                if each not in state.taken.values()
                and (found := self._with(state, layer, each, seen)) is not None
            ]
            best = _that_fit_best(tried)
            settled: dict[tuple[object, ...], Order] = {}
            states = [self._settled(state, layer, settled) for state in best]
        if not states:
            raise UnsuitableModelError(
                "the suspect's tensors are of the shapes of the reference's layers, but no choice "
                f"of them fits together in its widths; {_NEEDED}"
            )
        return [Choice(state.taken, state.fit) for state in states]

    def alike(self, choice: Choice) -> tuple[object, ...]:
        """Equal for choices of tensors that hold the same numbers: they are placed alike."""
        return tuple(self._content(each) for each in choice.taken.values())

    def _products(self, layer: _Layer) -> int:
        """What it takes to compare all of a layer's candidates with it, for one choice so far."""
        sizes = [self._weights[each.name].size for each in self.candidates[layer.name]]
        products = sum(max(_LEAST_PRODUCTS, size * len(layer.rows)) for size in sizes)
        if products > MOST_PRODUCTS // len(self._layers):
            raise UnsuitableModelError(
                f"the suspect has {len(sizes)} tensors that could be {layer.name}, and to compare "
                f"them all would take more than {MOST_PRODUCTS} products; {_NEEDED}"
            )
        return products

    def matrices(self, choice: Choice) -> dict[str, Floats]:
        """What was chosen, in float64, each (out channels block)."""
        return {
            layer.name: _matrix(self._weights, choice.taken[layer.name], layer)
            for layer in self._layers
        }

    def placed(self, matrices: Mapping[str, Floats]) -> Placed:
        """These filters in the reference's order, with its signs and lengths."""
        state, matrices = _START, _read(matrices, self._layers)
        for layer in self._layers:
            state = self._settled(self._seen(state, layer, matrices[layer.name]), layer, {})
        for axis in state.orders:  # once more: now all who write it can be compared, and as scaled
            likeness = [
                self._likeness(layer, matrices[layer.name], state)
                for layer in self._layers
                if layer.writes == axis
            ]
            state.orders[axis] = _order(np.sum(likeness, axis=0), state.firsts[axis])
        found = [self._restored(layer, matrices[layer.name], state) for layer in self._layers]
        names = [layer.name for layer in self._layers]
        return Placed(
            {f"{name}.weight": rows for name, (rows, _) in zip(names, found, strict=True)},
            {name: cosine for name, (_, cosine) in zip(names, found, strict=True)},
            sum(int((f != np.arange(len(f))).sum()) for f in state.firsts.values()),
            sum(int((order < 0).sum()) for order in state.orders.values()),
        )

    def _with(
        self,
        state: _State,
        layer: _Layer,
        candidate: Candidate,
        seen: dict[tuple[object, ...], _State | None],
    ) -> _State | None:
        """The state once this tensor is taken for the layer; None if its widths do not fit.

        What is `seen` of a layer is kept: many states differ only in which of several tensors of
        the same numbers they took, or in layers that have nothing to do with this one.
        """
        situation = (self._content(candidate), *_situation(state, layer))
        if situation not in seen:
            matrix = _matrix(self._weights, candidate, layer)
            sides = ((layer.writes, len(matrix)), (layer.reads, matrix.shape[1]))
            wrong = any(axis in state.firsts and len(state.firsts[axis]) != n for axis, n in sides)
            seen[situation] = None if wrong else self._seen(state._replace(fit=0.0), layer, matrix)
        if (found := seen[situation]) is None:
            return None
        sums, firsts, axis = state.sums, state.firsts, layer.writes
        if axis is not None and axis in found.firsts:
            firsts = {**firsts, axis: found.firsts[axis]}
        if axis is not None and axis in found.sums:
            sums = {**sums, axis: found.sums[axis]}
        taken = {**state.taken, layer.name: candidate}
        return _State(state.fit + found.fit, taken, sums, firsts, state.orders)

    def _content(self, candidate: Candidate) -> tuple[object, ...]:
        """Equal for tensors of the same numbers."""
        if candidate not in self._contents:
            array = np.ascontiguousarray(self._weights[candidate.name])
            digest = hashlib.sha256(array.reshape(-1).view(np.uint8).data).digest()
            facts = (digest, array.dtype, array.shape, candidate.turned)
            self._contents[candidate] = facts
        return self._contents[candidate]

    def _kept(self, order: Order) -> Order:
        """The same order, one object for all that are equal."""
        return self._orders.setdefault(order.tobytes(), order)

    def _seen(self, state: _State, layer: _Layer, matrix: Floats) -> _State:
        """The state once these filters have been compared with the layer's."""
        likeness, axis = self._likeness(layer, matrix, state), layer.writes
        if axis is None or axis in state.orders:
            fit = _along(likeness, self._rows_of(layer, state))
            return state._replace(fit=state.fit + fit)
        firsts = dict(state.firsts)
        if axis not in firsts:
            rows = flat(matrix)
            unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SHORTEST)
            cosines = unit @ unit.T
            firsts[axis] = self._kept(first_of_each(np.abs(cosines) if layer.turns else cosines))
        before = state.sums.get(axis, np.zeros_like(likeness))
        added = (before + likeness).max(1) - before.max(1)  # all who write it, in one order
        return state._replace(
            fit=state.fit + float(added.mean()),
            sums={**state.sums, axis: before + likeness},
            firsts=firsts,
        )

    def _settled(
        self, state: _State, layer: _Layer, settled: dict[tuple[object, ...], Order]
    ) -> _State:
        """The state, its channels in order if this layer was the last that says which."""
        axis = layer.writes
        if axis is None or axis in state.orders or layer.name != self._last[axis]:
            return state
        situation = (id(state.sums[axis]), id(state.firsts[axis]))
        if situation not in settled:
            settled[situation] = self._kept(_order(state.sums[axis], state.firsts[axis]))
        sums = {each: total for each, total in state.sums.items() if each != axis}
        return state._replace(sums=sums, orders={**state.orders, axis: settled[situation]})

    def _likeness(self, layer: _Layer, matrix: Floats, state: _State) -> Floats:
        """How alike the layer's filters and these are, the sign apart where it is free."""
        order = state.orders.get(layer.writes) if layer.writes is not None else None
        rows = self._columns(layer, matrix, state)
        rows, lengths = _measured(layer, rows * _scale(layer, rows, order)[:, None])
        cosines = layer.unit @ flat(rows).T
        cosines /= lengths
        return np.abs(cosines, out=cosines) if layer.turns else cosines

    def _columns(self, layer: _Layer, matrix: Floats, state: _State) -> Floats:
        """The filters' columns in the reference's order; those of copies are added up."""
        if layer.reads is None:
            return matrix
        first, order = state.firsts[layer.reads], state.orders[layer.reads]
        copies = np.flatnonzero(first != np.arange(len(first)))
        if len(copies):
            matrix = matrix.copy()
            for copy in copies:
                matrix[:, first[copy]] += matrix[:, copy]
        return _taken(matrix, order, axis=1)

    def _rows_of(self, layer: _Layer, state: _State) -> Order:
        if layer.writes is None:
            return np.arange(len(layer.rows))
        return state.orders[layer.writes]

    def _restored(self, layer: _Layer, matrix: Floats, state: _State) -> tuple[Floats, float]:
        """The layer's weight as the reference would have it, and how well its filters fit."""
        order = self._rows_of(layer, state)
        rows = _taken(self._columns(layer, matrix, state), order, axis=0)
        there = np.where(order >= 0, np.arange(len(order)), -1)
        rows = rows * _scale(layer, rows, there)[:, None]
        blind, least = _measured(layer, rows)
        along = (layer.unit * flat(blind)).sum(1) / least
        lengths, own = (np.sqrt(_squares(each).sum(1)) for each in (layer.rows, rows))
        factor = np.divide(lengths, own, out=np.zeros_like(own), where=own > 0)
        if layer.turns:
            factor = np.where(along < 0, -factor, factor)
        weight = (rows * factor[:, None, None]).reshape(layer.shape)
        return weight, float(np.abs(along).mean())


def _situation(state: _State, layer: _Layer) -> Iterator[int]:
    """What a layer's filters are compared with; orders that are equal are one object."""
    for axis in (layer.reads, layer.writes):
        for each in (state.sums, state.firsts, state.orders):
            yield id(each.get(axis)) if axis is not None else 0


def _that_fit_best(states: Sequence[_State]) -> list[_State]:
    """The best `KEPT`, and those that fit as well as the last of these, up to `MOST_KEPT`."""
    ranked = sorted(states, key=lambda each: -each.fit)
    least = ranked[:KEPT][-1].fit - _ALIKE if ranked else 0.0
    return [state for state in ranked[:MOST_KEPT] if state.fit >= least]


def _order(likeness: Floats, first: Order) -> Order:
    """Where each of the reference's channels is, of those that are nobody's copy; −1: nowhere.

    `likeness` is between the reference's channels and the suspect's (reference suspect).
    """
    if not np.isfinite(likeness).all():
        raise UnsuitableModelError(
            "the suspect's filters are too long to be compared; needed for alignment: weights "
            "whose squares can be summed up"
        )
    own = np.flatnonzero(first == np.arange(len(first)))
    order = assigned(likeness[:, own])
    return np.where(order < 0, -1, own[order])


_NEEDED = (
    "needed for alignment: the layers of the reference, under any names, each with the kernel that "
    f"it has there and at most {MOST_CHANNELS} channels"
)


def _layers(reference: Network, forms: Forms) -> list[_Layer]:
    """The layers that write an axis or are read by V, each after all that it is compared through.

    Those that write an axis come before it is read, as far as their own inputs are in order.
    """
    axes, bases = reference.axes, bases_of(forms)
    reads = {name: number for number, axis in enumerate(axes) for name in axis.consumers}
    writes = {each.layer: number for number, axis in enumerate(axes) for each in axis.producers}
    turns = {p.layer: p.norm is not None for axis in axes for p in axis.producers}
    names: list[str] = []
    settled: set[int | None] = {None}
    later = [*writes, *(name for name in reads if name not in writes and name in forms)]
    for axis, ready in in_order(axes):
        names += [each.layer for each in ready]
        settled.add(axes.index(axis))
        names += [
            name
            for name in later
            if name not in names and reads.get(name) in settled and writes.get(name) in settled
        ]
    layers = []
    for name in names:
        weight, read = weight_of(reference, name), reads.get(name)
        inputs = weight.shape[1] if read is None else width(reference, axes[read])
        rows = weight.astype(np.float64).reshape(len(weight), inputs, -1)
        basis = bases[name].astype(np.float64) if name in bases else None
        turned = turns.get(name, False)
        layer = _Layer(name, writes.get(name), read, turned, weight.shape, rows, basis, rows, rows)
        blind, lengths = _measured(layer, rows)
        unit = blind / lengths[:, None, None]
        layers.append(layer._replace(unit=flat(unit), loud=_squares(unit)))
    return layers


def _is_early(layer: _Layer, layers: Sequence[_Layer]) -> bool:
    """Whether the layer comes before any that reads what it writes."""
    readers = [n for n, each in enumerate(layers) if each.reads == layer.writes]
    return not readers or layers.index(layer) < readers[0]


def _candidates(
    weights: Mapping[str, Array], layers: Sequence[_Layer], axes: int
) -> dict[str, list[Candidate]]:
    """By layer, what may be it: of its kernel, and of widths that fit all the others' in turn."""
    fits = {layer.name: list(_shaped(weights, layer)) for layer in layers}
    while True:
        before = {name: len(each) for name, each in fits.items()}
        for axis in range(axes):
            writers = [layer.name for layer in layers if layer.writes == axis]
            readers = [layer.name for layer in layers if layer.reads == axis]
            sides = [{out for _, out, _ in fits[n]} for n in writers]
            sides += [{inputs for _, _, inputs in fits[n]} for n in readers]
            common = set.intersection(*sides)
            for name in writers:
                fits[name] = [each for each in fits[name] if each[1] in common]
            for name in readers:
                fits[name] = [each for each in fits[name] if each[2] in common]
        if before == {name: len(each) for name, each in fits.items()}:
            break
    for layer in layers:
        if not fits[layer.name]:
            raise UnsuitableModelError(
                f"none of the suspect's {len(weights)} tensors can be {layer.name}, which is "
                f"{layer.shape} in the reference: none has its kernel and widths that fit the "
                f"other layers'; {_NEEDED}; verify without alignment, or give the reference that "
                "the suspect is a copy of"
            )
    return {name: [candidate for candidate, _, _ in each] for name, each in fits.items()}


def _shaped(weights: Mapping[str, Array], layer: _Layer) -> Iterator[tuple[Candidate, int, int]]:
    """Tensors of the layer's kernel, with how many channels they write and read."""
    block, kernel = layer.rows.shape[2], layer.shape[2:]
    for name, tensor in weights.items():
        if tensor.ndim < 2 or not is_floating(tensor) or tensor.size == 0:
            continue
        if tensor.ndim == len(layer.shape) and tensor.shape[2:] != kernel:
            continue
        sizes = [(False, len(tensor), math.prod(tensor.shape[1:]))]
        if tensor.ndim == len(layer.shape) == 2:
            sizes.append((True, tensor.shape[1], len(tensor)))
        for turned, out, columns in sizes:
            fixed = layer.reads is None and columns != math.prod(layer.rows.shape[1:])
            answers = layer.writes is None and out != len(layer.rows)
            small = out <= MOST_CHANNELS and columns // block <= MOST_CHANNELS
            if columns % block == 0 and small and not fixed and not answers:
                yield Candidate(name, turned), out, columns // block


def _matrix(weights: Mapping[str, Array], candidate: Candidate, layer: _Layer) -> Floats:
    weight = weights[candidate.name].astype(np.float64)
    weight = np.ascontiguousarray(weight.T) if candidate.turned else weight
    return weight.reshape(len(weight), -1, layer.rows.shape[2])


def _read(matrices: Mapping[str, Floats], layers: Sequence[_Layer]) -> dict[str, Floats]:
    """The filters without those of channels for which every reader's column is zero.

    A filter that nobody reads could be anybody's. But of a network that has no more channels than
    the reference, all are looked at: it may have been pruned.
    """
    found = dict(matrices)
    axes = [axis for axis in {layer.reads for layer in layers} if axis is not None]
    before = -1
    while before != (before := sum(each.size for each in found.values())):
        for axis in axes:
            read = np.any([found[e.name].any((0, 2)) for e in layers if e.reads == axis], axis=0)
            writers = [each for each in layers if each.writes == axis]
            if int(read.sum()) < len(writers[0].rows) or read.all():
                continue
            for layer in layers:
                if layer.reads == axis:
                    found[layer.name] = found[layer.name][:, read]
                if layer.writes == axis:
                    found[layer.name] = found[layer.name][read]
    return found


def _scale(layer: _Layer, rows: Floats, order: Order | None) -> Floats:
    """How much louder the reference's layer reads each channel than these filters do.

    Both without what V reads with. Rows have length one, and columns in the mean that which the
    reference's have: over the rows in this order if there is one, or over all.
    """
    scale = np.ones(rows.shape[1])
    if layer.reads is None:
        return scale
    wanted = layer.loud
    if order is not None:
        there = order >= 0
        rows, wanted = rows[order[there]], wanted[there]
    wanted = wanted.mean(0)
    squares = _squares(rows) if layer.basis is None else None
    for _ in range(_ROUNDS):
        if squares is None:
            loud = _squares(_blind(layer, rows * scale[:, None]))
        else:
            loud = squares * np.square(scale)
        found = (loud / np.square(_length(loud))[:, None]).mean(0)
        ratio = np.sqrt(wanted / np.maximum(found, _SMALLEST))
        scale = scale * np.where((found > _SMALLEST) & (wanted > _SMALLEST), ratio, 1.0)
    return scale


def _measured(layer: _Layer, rows: Floats) -> tuple[Floats, Floats]:
    """Filters without what V reads, and what they have to be divided by to be of length one."""
    blind = _blind(layer, rows)
    return blind, _length(_squares(blind))


def _squares(rows: Floats) -> Floats:
    """Sums of squares, by channel (out channels)."""
    found: Floats = np.einsum("ocb,ocb->oc", rows, rows)
    return found


def _length(squares: Floats) -> Floats:
    found: Floats = np.maximum(np.sqrt(squares.sum(1)), _SHORTEST)
    return found


def _blind(layer: _Layer, rows: Floats) -> Floats:
    if layer.basis is None:
        return rows
    seen = flat(rows)
    return (seen - seen @ layer.basis.T @ layer.basis).reshape(rows.shape)


def _taken(rows: Floats, order: Order, axis: int) -> Floats:
    """These rows or columns in this order; −1 is zeros."""
    found = rows.take(np.maximum(order, 0), axis=axis)
    if (order < 0).any():
        np.moveaxis(found, axis, 0)[order < 0] = 0
    return found


def _along(cosines: Floats, order: Order) -> float:
    """The mean of those that are matched; what is missing counts as zero."""
    there = np.flatnonzero(order >= 0)
    return float(cosines[there, order[there]].sum() / len(order))
