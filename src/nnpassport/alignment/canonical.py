"""One form for all networks that differ in nothing but where their scales are kept.

A batch norm's scale over its deviation belongs into the filters before it, a layer norm's gain into
what reads it, and a constant that a layer norm takes away is nobody's. What is left of two copies
of a network differs by reordering, rotating and mixing alone, which `solve` undoes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Axis, Place, Statistics

Weights = dict[str, NDArray[np.float64]]


def canonical(
    axes: Axes, tensors: Mapping[str, NDArray[np.float64]], *, centred: bool = True
) -> Weights:
    """Copies of the tensors in that form; where a norm is missing its layers stay as they are.

    Unless `centred`, what a layer norm takes away stays where it is.
    """
    found: Weights = {name: np.array(tensor, np.float64) for name, tensor in tensors.items()}
    _fold_batch_norms(axes, tensors, found)
    for name, gain in axes.gains.items():
        if name in found and gain in tensors:
            _scale(found[name], writing(axes, name), _gain_of(axes, name, tensors))
    for name, (dimension, before) in axes.reads.items():
        known = before is not None and before in tensors and before in axes.norms
        if name in found and before is not None and known:
            factor = np.ravel(tensors[before]) + axes.norms[before].added
            times = _parts(axes, name, dimension, len(factor), found[name].shape)
            _scale(found[name], dimension, factor, times)
            if centred and axes.norms[before].centred:
                _centre(found[name], dimension, times)
    streams = [axis for axis in axes.axes if centred and _centred(axes, axis)]
    for place in (place for axis in streams for place in axis.places):
        tensor = found.get(place.tensor)
        if tensor is not None and tensor.ndim > 1 and not reads(axes, place):
            tensor -= tensor.mean(place.dimension, keepdims=True)
    return found


def _fold_batch_norms(
    axes: Axes, tensors: Mapping[str, NDArray[np.float64]], found: Weights
) -> None:
    for name, norm in axes.batch_norms.items():
        if name not in found or norm.variance not in tensors:
            continue
        _scale(found[name], writing(axes, name), before_norm(norm, tensors))


def before_norm(
    norm: Statistics, tensors: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """What a batch norm multiplies each channel by."""
    scale = 1 / np.sqrt(np.abs(np.ravel(tensors[norm.variance])) + norm.epsilon)
    gain = None if norm.weight is None else tensors.get(norm.weight)
    return scale if gain is None or gain.size != scale.size else scale * np.ravel(gain)


def restored(
    axes: Axes,
    reference: Mapping[str, NDArray[np.float64]],
    name: str,
    tensor: NDArray[np.float64],
) -> NDArray[np.float64]:
    """A tensor in canonical form as it is in the reference's own, whose scales are taken out again.

    A mean that was taken away stays away: the reference's own would bring its bits along. A scale
    of zero is left alone.
    """
    found = np.array(tensor)
    norm, gain = axes.batch_norms.get(name), axes.gains.get(name)
    if norm is not None and norm.variance in reference:
        _scale(found, writing(axes, name), _inverse(before_norm(norm, reference)))
    if gain is not None and gain in reference:
        _scale(found, writing(axes, name), _inverse(_gain_of(axes, name, reference)))
    dimension, before = axes.reads.get(name, (0, None))
    if before is not None and before in reference and before in axes.norms:
        back = _inverse(np.ravel(reference[before]) + axes.norms[before].added)
        _scale(found, dimension, back, _parts(axes, name, dimension, len(back), found.shape))
    return found


def _gain_of(
    axes: Axes, name: str, tensors: Mapping[str, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """The vector behind a layer, as often as it has heads where that is of each of them.

    Behind a norm any positive factor of the whole vector is nobody's: of it the signs count.
    """
    norm = axes.norms.get(axes.gains[name])
    gain = np.ravel(tensors[axes.gains[name]]) + (0.0 if norm is None else norm.added)
    times = tensors[name].shape[writing(axes, name)] if name in tensors else len(gain)
    return np.tile(gain, times // len(gain)) if len(gain) and times % len(gain) == 0 else gain


def _inverse(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / np.where(scale == 0, 1.0, scale)


def reads(axes: Axes, place: Place) -> bool:
    """Whether a place is where a tensor meets what the network computed, and not what it writes."""
    return place.tensor in axes.reads and axes.reads[place.tensor][0] == place.dimension


def writing(axes: Axes, name: str) -> int:
    """The dimension along which a layer's weight writes its output."""
    return 1 if name in axes.reads and axes.reads[name][0] == 0 else 0


def _centred(axes: Axes, axis: Axis) -> bool:
    """Whether all that reads an axis has its mean taken away: then what is written has none."""
    if "layer norm" not in axis.traits:
        return False
    readers = [place.tensor for place in axis.places if reads(axes, place)]
    gains = [axes.reads[name][1] for name in readers]
    return bool(gains) and all(
        gain is not None and gain in axes.norms and axes.norms[gain].centred for gain in gains
    )


def _parts(
    axes: Axes, name: str, dimension: int, size: int, shape: tuple[int, ...]
) -> list[NDArray[np.int64]]:
    """Where a norm's channels are in what reads it: several times where that is side by side."""
    if dimension >= len(shape):
        return []
    if shape[dimension] == size:
        return [np.arange(size)]
    places = [
        place.positions(size)
        for axis in axes.axes
        if axis.size == size
        for place in axis.places
        if (place.tensor, place.dimension) == (name, dimension)
    ]
    parts = [part for positions in places for part in positions.T]
    return [part for part in parts if part.max() < shape[dimension]]


def _centre(
    tensor: NDArray[np.float64], dimension: int, parts: Sequence[NDArray[np.int64]]
) -> None:
    by_reader = np.moveaxis(tensor, dimension, 0)
    for part in parts:
        by_reader[part] -= by_reader[part].mean(0)


def _scale(
    tensor: NDArray[np.float64],
    dimension: int,
    factor: NDArray[np.float64],
    parts: Sequence[NDArray[np.int64]] | None = None,
) -> None:
    if parts is None:
        there = dimension < tensor.ndim and tensor.shape[dimension] == len(factor)
        parts = [np.arange(len(factor))] if there else []
    if parts:
        by_reader = np.moveaxis(tensor, dimension, -1)
        for part in parts:
            by_reader[..., part] *= factor
