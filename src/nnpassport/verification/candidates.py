"""Which tensors of a file could be the layers that a key names, and what reading them all costs.

A bare file of weights does not say which of its tensors the function reads. The owner's names can
stand on tensors that nobody reads, and his weights under any. So where the tensors under the key's
names do not carry the mark, every tensor of a layer's shape is read in its place. Each layer is
read off the one that matches best; chance could have matched as well in any of the ways to choose,

    P[max over choices ≥ m]  ≤  Π_l k_l · P[Binomial(n, ½) ≥ m],

with k_l candidates for layer l: so the p-value is exact as before and multiplied by their product.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnpassport.embedding.network.equations import filters, read_bits
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.signature import host_weight, secret_of
from nnpassport.keys.chance import LOG10_BY_NAME, LOG10_BY_SHAPE
from nnpassport.keys.context import LayerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableModelError, Verdict

MOST_LISTED = 40
"""So many names of tensors are listed, and of the others the number."""


class Candidate(NamedTuple):
    """A tensor that may be a layer; `turned`: with its two axes exchanged."""

    name: str
    turned: bool = False


def candidates_for(described: Mapping[str, Tensor], layer: LayerShape) -> list[Candidate]:
    """The tensors that hold as many filters as the layer, of as many numbers each.

    A matrix may be a convolution as wide as what it reads, and may be turned.
    """
    shape = _shape(layer)
    found = []
    for name, tensor in described.items():
        if not tensor.is_floating_point() or tensor.dim() < 2:
            continue
        rows, numbers = len(tensor), math.prod(tensor.shape[1:])
        alike = tensor.shape == shape or tensor.dim() != len(shape)
        if alike and (rows, numbers) == (shape[0], math.prod(shape[1:])):
            found.append(Candidate(name))
        if tensor.dim() == 2 and (numbers, rows) == (shape[0], math.prod(shape[1:])):
            found.append(Candidate(name, turned=True))
    return found


def rivals(described: Mapping[str, Tensor], key: Key) -> list[str]:
    """Tensors that could be a layer of the key other than the one whose name they have."""
    return sorted(
        {
            candidate.name
            for layer in key.context.layers
            for candidate in candidates_for(described, layer)
            if candidate != Candidate(f"{layer.name}.weight")
        }
    )


def enough(described: Mapping[str, Tensor], key: Key) -> bool:
    """Whether there is a tensor for each of the key's layers, and none needed twice."""
    wanted: dict[tuple[Candidate, ...], int] = {}
    for layer in key.context.layers:
        found = tuple(candidates_for(described, layer))
        wanted[found] = wanted.get(found, 0) + 1
    return all(len({each.name for each in found}) >= count for found, count in wanted.items())


def verify_by_shape(
    scheme: Scheme,
    weights: Mapping[str, Tensor],
    described: Mapping[str, Tensor],
    key: Key,
    *,
    log10_alpha: float,
) -> Verdict:
    """V on the tensors that match best, of all that have the shapes of the key's layers.

    The verdict pays for every way to choose. `described` has the tensors' shapes; of `weights` that
    are read when they are asked for, one tensor at a time is kept.

    Raises:
        UnsuitableModelError: a layer has no candidate.
        UnreadableModelError: none of its candidates can be read.
    """
    found = {layer.name: candidates_for(described, layer) for layer in key.context.layers}
    for layer in key.context.layers:
        if not found[layer.name]:
            host_weight(described, layer)  # it says what is missing
    best = _best(scheme, weights, key, found, log10_alpha)
    shapes = {layer.name: _shape(layer) for layer in key.context.layers}
    chosen = _Chosen(weights, best, shapes)
    verdict = scheme.verify(chosen, key, log10_alpha=log10_alpha)
    log10_choices = sum(math.log10(len(each)) for each in found.values())
    facts = by_shape({n: each.name for n, each in best.items()}, described, log10_choices)
    reason = (
        f"read from the tensors of the layers' shapes that match best, 10^{log10_choices:.1f} "
        "ways to choose them being paid for"
    )
    paid = verdict.paid(LOG10_BY_SHAPE + log10_choices, reason)
    return replace(paid, candidates=facts)


def by_name(verdict: Verdict, unread: list[str]) -> Verdict:
    """The verdict on the tensors under the key's names, where others could have been read."""
    paid = verdict.paid(LOG10_BY_NAME, "read from the tensors under the key's names")
    facts = {"read": "by name", "log10_choices": LOG10_BY_NAME, "taken": {}, **_listed(unread)}
    return replace(paid, candidates=facts)


def by_shape(
    taken: Mapping[str, str], weights: Mapping[str, Tensor], log10_choices: float
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
    scheme: Scheme,
    weights: Mapping[str, Tensor],
    key: Key,
    found: Mapping[str, list[Candidate]],
    log10_alpha: float,
) -> dict[str, Candidate]:
    """By layer, the candidate that matches best; the first of several that do.

    One that cannot be read, as it holds NaN, matches nothing.
    """
    layers = {layer.name: layer for layer in key.context.layers}
    if len(layers) == 1:
        ((name, each),) = found.items()
        shapes = {name: _shape(layers[name])}

        def matches(candidate: Candidate) -> int:
            chosen = _Chosen(weights, {name: candidate}, shapes)
            try:
                return scheme.verify(chosen, key, log10_alpha=log10_alpha).matches
            except UnreadableModelError:
                return -1

        return {name: max(each, key=matches)}
    secrets = {name: secret_of(key, layer) for name, layer in layers.items()}
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
            read = read_bits(rows.cpu(), secrets[name].mean_patch)
            count = int((read == secrets[name].signs).sum())
            if name not in best or count > best[name][0]:
                best[name] = (count, candidate)
    if unreadable is not None and len(best) < len(found):
        raise unreadable
    return {name: candidate for name, (_, candidate) in best.items()}


class _Chosen(Mapping[str, Tensor]):
    """The chosen tensors under the layers' names, each read when it is asked for."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        chosen: Mapping[str, Candidate],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._weights, self._shapes = weights, shapes
        self._chosen = {f"{name}.weight": (name, each) for name, each in chosen.items()}

    def __getitem__(self, name: str) -> Tensor:
        layer, candidate = self._chosen[name]
        return _as(self._weights[candidate.name], candidate, self._shapes[layer])

    def __iter__(self) -> Iterator[str]:
        return iter(self._chosen)

    def __len__(self) -> int:
        return len(self._chosen)


def _as(tensor: Tensor, candidate: Candidate, shape: tuple[int, ...]) -> Tensor:
    return (tensor.t() if candidate.turned else tensor).reshape(shape)


def _shape(layer: LayerShape) -> tuple[int, ...]:
    """Of the layer's weight, as a file has it."""
    return tuple(filters(torch.empty(layer.weight, device="meta"), layer.geometry).shape)
