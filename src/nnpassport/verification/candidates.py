"""Which tensors of a file could be the layers that a key names, and what reading them all costs.

A bare file of weights does not say which of its tensors the function reads. The owner's names can
stand on tensors that nobody reads, and his weights under any. So where the tensors under the key's
names do not carry the mark, every tensor of a layer's shape is read in its place. Each layer is
read off the one that matches best; chance could have matched as well in any of the ways to choose,

    P[max over choices ≥ m]  ≤  Π_l k_l · P[Binomial(n, ½) ≥ m],

with k_l candidates for layer l: so the p-value is exact as before and multiplied by their product.

Bits of channels are read together with the scale of the norm behind the layer. Every vector of a
layer's length may be that, or it was folded into the filters and is all ones: these are candidates
too, and multiply those of the layer.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from nnpassport.files.arrays import Array, Described, is_floating
from nnpassport.keys.chance import LOG10_BY_NAME, LOG10_BY_SHAPE, TENSORS
from nnpassport.keys.context import LayerShape
from nnpassport.keys.counts import Counts, Reading
from nnpassport.keys.key import Key
from nnpassport.keys.patches import filters, mean_patch, own_shape
from nnpassport.keys.reading import channel_products, check_host, scales
from nnpassport.scheme import UnreadableModelError

Headers = Mapping[str, Array | Described]
"""By name, what is known of tensors without their numbers."""

_SHOWN = 3
MOST_LISTED = 40
"""So many names of tensors are listed, and of the others the number."""


class Candidate(NamedTuple):
    """A tensor that may be a layer; `axes`: the order in which its own become the layer's."""

    name: str
    axes: tuple[int, ...] = ()


def candidates_for(described: Headers, layer: LayerShape) -> list[Candidate]:
    """The tensors that hold as many filters as the layer, of as many numbers each.

    A matrix may be a convolution as wide as what it reads, and may be turned. A kernel may have its
    axes in the orders of other frameworks: space first and the outputs last, or the inputs last.
    """
    shape = _shape(layer)
    found = []
    for name, tensor in described.items():
        if not is_floating(tensor) or len(tensor.shape) < 2:
            continue
        rows, numbers = tensor.shape[0], math.prod(tensor.shape[1:])
        alike = tensor.shape == shape or len(tensor.shape) != len(shape)
        if alike and (rows, numbers) == (shape[0], math.prod(shape[1:])):
            found.append(Candidate(name))
        if len(tensor.shape) == 2 and (numbers, rows) == (shape[0], math.prod(shape[1:])):
            found.append(Candidate(name, (1, 0)))
        if len(tensor.shape) == len(shape) > 2:
            orders = _orders(len(shape))
            there = {order: tuple(tensor.shape[axis] for axis in order) for order in orders}
            found += [Candidate(name, order) for order in orders if there[order] == tuple(shape)]
    return found


def _orders(axes: int) -> tuple[tuple[int, ...], ...]:
    """Of kernels of TensorFlow and Flax (space, in, out; depthwise space, out, in), and of MLX."""
    *space, last, outermost = range(axes)
    return (outermost, last, *space), (last, outermost, *space), (0, outermost, *range(1, axes - 1))


def rivals(described: Headers, key: Key) -> list[str]:
    """Tensors that could be a layer of the key other than the one whose name they have."""
    return sorted(
        {
            candidate.name
            for layer in key.context.layers
            for candidate in candidates_for(described, layer)
            if candidate != Candidate(f"{layer.name}.weight")
        }
    )


def enough(described: Headers, key: Key) -> bool:
    """Whether there is a tensor for each of the key's layers, and none needed twice."""
    wanted: dict[tuple[Candidate, ...], int] = {}
    for layer in key.context.layers:
        found = tuple(candidates_for(described, layer))
        wanted[found] = wanted.get(found, 0) + 1
    return all(len({each.name for each in found}) >= count for found, count in wanted.items())


def read_by_shape(read: Reading, weights: Mapping[str, Array], described: Headers) -> Counts:
    """What the key reads of the tensors that match best, of all that have its layers' shapes.

    Every way to choose is paid for. `described` has the tensors' shapes; of `weights` that
    are read when they are asked for, one tensor at a time is kept.

    Raises:
        UnsuitableModelError: a layer has no candidate.
        UnreadableModelError: none of its candidates can be read.
    """
    key = read.key
    found = {layer.name: candidates_for(described, layer) for layer in key.context.layers}
    for layer in key.context.layers:
        if not found[layer.name]:
            check_host(described, layer)  # it says what is missing
    shapes = {layer.name: _shape(layer) for layer in key.context.layers}
    log10_choices = sum(math.log10(len(each)) for each in found.values())
    if any(layer.channels is not None for layer in key.context.layers):
        vectors = {layer.name: _scales(described, layer) for layer in key.context.layers}
        best, scales = _best_of_channels(weights, key, found, vectors)
        counts = read({**_Chosen(weights, best, shapes), **scales})
        log10_choices += sum(math.log10(1 + len(each)) for each in vectors.values())
    else:
        best = _best(read, weights, found)
        counts = read(_Chosen(weights, best, shapes))
    facts = by_shape({n: each.name for n, each in best.items()}, described, log10_choices)
    reason = (
        f"read from the tensors of the layers' shapes that match best, {_where(best)}, of "
        f"10^{log10_choices:.1f} ways to choose them"
    )
    paid = counts.paid(LOG10_BY_SHAPE + log10_choices, reason, of=TENSORS)
    return paid._replace(candidates=facts)


def _where(best: Mapping[str, Candidate]) -> str:
    """Which tensors were read, in words: of networks that lie in one file this says which."""
    starts = {each.name.removesuffix(f"{layer}.weight") for layer, each in best.items()}
    under = starts.pop()
    if not starts and all(each.name == f"{under}{layer}.weight" for layer, each in best.items()):
        return f"those under {under.rstrip('.')[:100]!r}" if under else "those under its own names"
    shown = [f"{each.name[:100]!r} for {layer}" for layer, each in [*best.items()][:_SHOWN]]
    return ", ".join(shown) + (", …" if len(best) > _SHOWN else "")


def by_name(counts: Counts, unread: list[str]) -> Counts:
    """The counts of the tensors under the key's names, where others could have been read."""
    reason = "read from the tensors under the key's names"
    paid = counts.paid(LOG10_BY_NAME, reason, of=TENSORS)
    facts = {"read": "by name", "log10_choices": LOG10_BY_NAME, "taken": {}, **_listed(unread)}
    return paid._replace(candidates=facts)


def by_shape(
    taken: Mapping[str, str], weights: Mapping[str, Any], log10_choices: float
) -> dict[str, Any]:
    """What `Verdict.candidates` says of a reading by shape."""
    unread = sorted(weights.keys() - set(taken.values()))
    return {
        "read": "by shape",
        "log10_choices": LOG10_BY_SHAPE + log10_choices,
        "taken": dict(taken),
        **_listed(unread),
    }


def _listed(unread: list[str]) -> dict[str, Any]:
    return {"unread": unread[:MOST_LISTED], "unread_count": len(unread)}


def _best(
    read: Reading, weights: Mapping[str, Array], found: Mapping[str, list[Candidate]]
) -> dict[str, Candidate]:
    """By layer, the candidate that matches best; the first of several that do.

    One that cannot be read, as it holds NaN, matches nothing.
    """
    key = read.key
    layers = {layer.name: layer for layer in key.context.layers}
    if len(layers) == 1:
        ((name, each),) = found.items()
        shapes = {name: _shape(layers[name])}

        def matches(candidate: Candidate) -> int:
            chosen = _Chosen(weights, {name: candidate}, shapes)
            try:
                return read(chosen).matches
            except UnreadableModelError:
                return -1

        return {name: max(each, key=matches)}
    patches = {
        name: mean_patch(key.passport_array(name), layer.weight, layer.geometry)
        for name, layer in layers.items()
    }
    signs = {name: key.signs_array(name) for name in layers}
    best: dict[str, tuple[int, Candidate]] = {}
    unreadable: UnreadableModelError | None = None
    for candidate in dict.fromkeys(each for several in found.values() for each in several):
        try:
            tensor = weights[candidate.name]
        except UnreadableModelError as error:
            unreadable = unreadable or error
            continue
        for name in (name for name, several in found.items() if candidate in several):
            rows = filters(_as(tensor, candidate, _shape(layers[name])), layers[name].geometry)
            count = int((np.sign(scales(rows, patches[name])) == signs[name]).sum())
            if name not in best or count > best[name][0]:
                best[name] = (count, candidate)
    if unreadable is not None and len(best) < len(found):
        raise unreadable
    return {name: candidate for name, (_, candidate) in best.items()}


def _scales(described: Headers, layer: LayerShape) -> list[str]:
    """Vectors that may be the scale of the norm behind a layer, if one is read with its bits."""
    if layer.channels is None or not layer.channels.norm:
        return []
    shape = (layer.weight[0],)
    return [n for n, each in described.items() if is_floating(each) and each.shape == shape]


def _best_of_channels(
    weights: Mapping[str, Array],
    key: Key,
    found: Mapping[str, list[Candidate]],
    vectors: Mapping[str, list[str]],
) -> tuple[dict[str, Candidate], dict[str, Array]]:
    """By layer the candidate that matches best with any scale; and by name the norms' scales."""
    best, scales = dict[str, Candidate](), dict[str, Array]()
    for layer in key.context.layers:
        products, most = channel_products(key, layer), -1
        ones = np.ones(layer.weight[0])
        read = [ones, *(weights[each] for each in _readable(weights, vectors[layer.name]))]
        signs = np.sign(np.stack(read).astype(np.float64))
        readable = _readable(weights, [each.name for each in found[layer.name]])
        for each in (one for one in found[layer.name] if one.name in readable):
            rows = filters(_as(weights[each.name], each, _shape(layer)), layer.geometry)
            matches = (signs * np.sign(products(rows)) > 0).sum(1)
            if matches.max() > most:
                most, best[layer.name] = int(matches.max()), each
                if layer.channels is not None and layer.channels.norm:
                    scales[f"{layer.channels.norm}.weight"] = read[int(matches.argmax())]
        if layer.name not in best:
            weights[found[layer.name][0].name]  # it says why none of them can be read
    return best, scales


def _readable(weights: Mapping[str, Array], names: list[str]) -> list[str]:
    """Of these tensors those that hold numbers alone."""
    readable = []
    for name in dict.fromkeys(names):
        with suppress(UnreadableModelError):
            weights[name]
            readable.append(name)
    return readable


class _Chosen(Mapping[str, Array]):
    """The chosen tensors under the layers' names, each read when it is asked for."""

    def __init__(
        self,
        weights: Mapping[str, Array],
        chosen: Mapping[str, Candidate],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._weights, self._shapes = weights, shapes
        self._chosen = {f"{name}.weight": (name, each) for name, each in chosen.items()}

    def __getitem__(self, name: str) -> Array:
        layer, candidate = self._chosen[name]
        return _as(self._weights[candidate.name], candidate, self._shapes[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)


def _as(tensor: Array, candidate: Candidate, shape: tuple[int, ...]) -> Array:
    return (tensor.transpose(candidate.axes) if candidate.axes else tensor).reshape(shape)


def _shape(layer: LayerShape) -> tuple[int, ...]:
    """Of the layer's weight, as a file has it."""
    return own_shape(layer.weight, layer.geometry)
