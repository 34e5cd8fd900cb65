"""From the tensors of a graph to a state dict: what was folded in for speed is told apart again."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nnpassport.alignment.channels import Network, Producer, keeps_statistics, weight_of
from nnpassport.files.arrays import Array

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


class Frame(NamedTuple):
    """What a state dict of some network has.

    Attributes:
        names: of its tensors.
        parts: of everything in it, layers among them.
        norms: by layer, the norm with running statistics that follows it, and its eps.
    """

    names: frozenset[str]
    parts: frozenset[str]
    norms: Mapping[str, tuple[str, float]]


def frame(network: Network) -> Frame:
    """The same of a network that is known by its channels."""
    names = frozenset(network.arrays)
    norms = {
        each.layer: (str(each.norm), network.norms[str(each.norm)].eps)
        for axis in network.axes
        for each in axis.producers
        if keeps_statistics(network, each)
    }
    return Frame(names, frozenset(name.rpartition(".")[0] for name in names), norms)


def state_from(tensors: Mapping[str, Array], to: Frame) -> dict[str, Array]:
    """The tensors that have a place in such a network; a graph's own constants are left out.

    A batch norm none of whose tensors are there was folded into its layer: in its place comes one
    that does nothing but add the layer's bias,

        γ = 1, β = bias, μ = 0, σ² = 1 − eps

    and the network computes what the graph did. Counters of batch norms are in no graph. What else
    is missing stays missing.
    """
    state = _counters(to)
    for layer, (norm, eps) in to.norms.items():
        weight = tensors.get(f"{layer}.weight")
        if weight is None or _is_there(norm, tensors):
            continue
        ones = np.ones(len(weight), weight.dtype)
        bias, variance = tensors.get(f"{layer}.bias", 0 * ones), (ones - eps).astype(ones.dtype)
        values = (ones, bias, 0 * ones, variance)
        state |= {f"{norm}.{own}": v for own, v in zip(_STATISTICS, values, strict=True)}
        tensors = {**tensors, f"{layer}.bias": 0 * ones}
    return state | {name: tensor for name, tensor in tensors.items() if name in to.names}


def without_strangers(tensors: Mapping[str, Array], to: Frame) -> dict[str, Array]:
    """The tensors without those that have no place in such a network; missing counters are zero.

    A bias that a layer does not have there stays, unless it is zero: it changes what is computed.
    """
    return _counters(to) | {
        name: tensor
        for name, tensor in tensors.items()
        if name in to.names
        or (name.endswith(".bias") and name.removesuffix(".bias") in to.parts and tensor.any())
    }


def completed(tensors: Mapping[str, Array], network: Network) -> dict[str, Array]:
    """A state dict for such a network, of other widths perhaps, out of what there is.

    What has no place there is left out, but a bias of a layer on these axes: such a layer may have
    one. Folded norms are told apart, and what a norm or layer lacks is filled in by what changes
    nothing. Matrices and convolutions that multiply the same numbers are each other.
    """
    layers = {each.layer: each for axis in network.axes for each in axis.producers}
    ends = {name for axis in network.axes for name in axis.consumers} - layers.keys()
    tensors, to = dict(tensors), frame(network)
    for name in (*layers, *ends):
        if (there := tensors.get(f"{name}.weight")) is not None:
            tensors[f"{name}.weight"] = _reshaped(there, weight_of(network, name))
    folded = {layer for layer, (norm, _) in to.norms.items() if not _is_there(norm, tensors)}
    biases = {f"{name}.bias" for name in layers.keys() - folded}
    added = {name: tensor for name, tensor in tensors.items() if name in biases}
    state = {**added, **state_from(tensors, to)}
    for name in (*layers, *ends):
        weight = state.get(f"{name}.weight")
        if weight is None or weight.ndim == 0:
            continue
        if f"{name}.bias" in network.arrays:
            state.setdefault(f"{name}.bias", np.zeros(len(weight), weight.dtype))
        if name in layers:
            ones = np.ones(len(weight), weight.dtype)
            state = {**_plain(network, layers[name], ones), **state}
    return state


def _counters(to: Frame) -> dict[str, Array]:
    return {n: np.zeros((), np.int64) for n in to.names if n.endswith("num_batches_tracked")}


def _plain(network: Network, producer: Producer, ones: Array) -> dict[str, Array]:
    """The tensors of a norm that changes nothing."""
    if producer.norm is None:
        return {}
    values = {"weight": ones, "bias": 0 * ones}
    if keeps_statistics(network, producer):
        variance = (ones - network.norms[producer.norm].eps).astype(ones.dtype)
        values |= {"running_mean": 0 * ones, "running_var": variance}
    return {f"{producer.norm}.{name}": each for name, each in values.items()}


def _reshaped(there: Array, wanted: Array) -> Array:
    """A convolution as wide as what it reads as a matrix, and the reverse, where `wanted` is so."""
    if there.ndim == wanted.ndim or there.ndim < 2 or there.size == 0:
        return there
    if wanted.ndim == 2:
        return there.reshape(len(there), -1)
    kernel = wanted.shape[2:]
    if there.ndim == 2 and there.shape[1] % int(np.prod(kernel)) == 0:
        return there.reshape(len(there), -1, *kernel)
    return there


def _is_there(norm: str, tensors: Mapping[str, Array]) -> bool:
    return any(f"{norm}.{each}" in tensors for each in _STATISTICS)
