"""Put a suspect's channels back where the owner's reference network has them, before bits are read.

Whoever permutes, negates, rescales, doubles or pads channels keeps a network's function and makes
its bits unreadable where they lie. The filters are all still there. Each is matched to one of the
reference's by the angle between them, and what was done to it is undone by moves that keep the
function: nothing is fitted to the bits, and no weight is invented.

*Blind*: what a bit is read with is projected out of both sides before they are compared. The
reference was trained on its bits, so matching by whole filters would prefer those that read right.
What is left of that preference is measured on networks that are unrelated; see `null`.

[Li22]  Li, Wang, Zhu: Fostering the Robustness of White-Box Deep Neural Network Watermarks by
        Neuron Alignment, ICASSP 2022, arXiv 2112.14108 (channels in the order of the owner's).
[Ain23] Ainsworth, Hayase, Srinivasa: Git Re-Basin, ICLR 2023 (two networks' weights matched layer
        by layer, as linear assignments).
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from nnpassport.channels import (
    Channels,
    Producer,
    affine,
    channels_of,
    keeps_statistics,
    negate,
    per_channel,
    scale_before_norm,
    scale_columns,
    scale_rows,
    take,
    width,
)
from nnpassport.scheme import UnsuitableModelError

MOST_TIMES_WIDER = 8
"""A suspect with a layer that is this many times wider than the reference's is not looked at."""

_MOST_CLASSES = 2**20
_TWINS = 1e-2  # sine of the angle between a channel and its copy, at most; half precision rounds
_UNREAD = 1e-5  # columns this small beside the median channel's: nobody reads that channel

Forms = Mapping[str, Float[Tensor, "forms columns"]]
"""By layer, what V multiplies a flattened filter with to read a bit."""


class Aligned(NamedTuple):
    """A suspect in the reference's order.

    Attributes:
        model: the suspect's own weights, with as many channels as the reference has.
        cosines: mean |cosine| between matched filters, by layer; without the part that V reads.
        dropped: channels that were left out because they are copies, or read by nobody.
        missing: channels of the reference for which the suspect had none: they are zero.
    """

    model: nn.Module
    cosines: Mapping[str, float]
    dropped: int
    missing: int


@torch.no_grad()
def align(weights: Mapping[str, Tensor], reference: nn.Module, forms: Forms) -> Aligned:
    """The network with these weights, its channels moved, negated and scaled back.

    `weights` is a state dict with the reference's names; layers may have more or fewer channels.
    The reference is in its released form. Neither is changed.

    Raises:
        UnsuitableModelError: they are not networks of one kind, or it is not known which layers of
            this kind share channels.
    """
    axes = channels_of(reference)
    suspect = _as_wide(weights, reference, axes)
    dropped = sum(_drop_copies(suspect, axis, width(reference, axis)) for axis in axes)
    missing = 0
    for axis, ready in _in_order(axes):
        missing += _place(suspect, reference, axis, ready, forms)
    for axis in axes:  # streams once more, now that all who write them can be compared
        if len(axis.producers) > 1:
            _place(suspect, reference, axis, axis.producers, forms)
    cosines = {}
    for producer in (each for axis in axes for each in axis.producers):
        along = _cosines(suspect, reference, producer, forms).diagonal()
        if producer.norm is not None:
            negate(suspect, producer, torch.where(along < 0, -1.0, 1.0))
        cosines[producer.layer] = float(along.abs().mean())
    _restore_groups(suspect, reference)
    return Aligned(suspect.eval(), cosines, dropped, missing)


def _as_wide(
    weights: Mapping[str, Tensor], reference: nn.Module, axes: list[Channels]
) -> nn.Module:
    """A network of the reference's kind, as wide as the suspect, that holds its weights."""
    suspect = deepcopy(reference)
    _adopt_heads(suspect, axes, weights)
    for axis in axes:
        name, most = f"{axis.producers[0].layer}.weight", width(reference, axis)
        there = weights.get(name)
        count = 0 if there is None or there.dim() == 0 else len(there)
        if not 0 < count <= MOST_TIMES_WIDER * most:
            raise UnsuitableModelError(
                f"the suspect has {count or 'no'} channels at {name}, and the reference {most}; "
                f"needed for alignment: from 1 to {MOST_TIMES_WIDER} times as many; verify without "
                "it, or give the reference that the suspect is a copy of"
            )
        take(suspect, axis, torch.arange(count) % most)
    expected = suspect.state_dict()
    faults = [
        name
        for name in sorted(expected.keys() | weights.keys())
        if name not in expected
        or name not in weights
        or expected[name].shape != weights[name].shape
        or expected[name].is_floating_point() != weights[name].is_floating_point()
    ]
    if faults:
        named = ", ".join(repr(name[:100]) for name in faults[:5])
        raise UnsuitableModelError(
            f"the suspect is no network of the reference's kind: {len(faults)} tensors are "
            f"missing, strange or of a shape that fits no other ({named}); needed for "
            "alignment: the same layers, though their channels may be more or fewer"
        )
    suspect.load_state_dict(dict(weights))
    return suspect


def _adopt_heads(model: nn.Module, axes: list[Channels], weights: Mapping[str, Tensor]) -> None:
    """Give the last layers as many outputs as the suspect's have: its task may be another."""
    written = {producer.layer for axis in axes for producer in axis.producers}
    for name in {name for axis in axes for name in axis.consumers} - written:
        for own, values in per_channel(model.get_submodule(name)).items():
            there = weights.get(f"{name}.{own}")
            if there is None or there.dim() != values.dim():
                continue
            if 0 < len(there) <= _MOST_CLASSES:
                resized = values.new_zeros(len(there), *values.shape[1:])
                setattr(model.get_submodule(name), own, nn.Parameter(resized))


def _drop_copies(model: nn.Module, axis: Channels, enough: int) -> int:
    """Give what reads a channel's copy to the channel, and leave out what nobody reads; how many.

    Two channels are copies if everything that comes out of one is a positive multiple of what
    comes out of the other: parallel filters, and parallel scale and shift behind the norm.
    """
    directions = [_direction(model, producer) for producer in axis.producers]
    size = torch.cat([_effect(model, producer) for producer in axis.producers], dim=1)
    angles = [unit @ unit.T for unit in (*directions, _unit(size))]
    twins = torch.stack(angles).amin(0) > 1 - _TWINS**2 / 2
    twins.fill_diagonal_(True)
    first = twins.int().argmax(1)  # of all that it is parallel to, itself included
    scale = size.norm(dim=1) / size.norm(dim=1)[first]
    read = torch.zeros(len(first), dtype=torch.float64)
    for name in axis.consumers:
        weight = model.get_submodule(name).get_parameter("weight")
        columns = weight.unflatten(1, (len(first), -1))
        scaled = columns.double() * scale.view(-1, *[1] * (columns.dim() - 2))
        gathered = torch.zeros_like(scaled).index_add_(1, first, scaled)
        weight.copy_(gathered.flatten(1, 2))
        read += gathered.transpose(0, 1).flatten(1).square().sum(1)
    own = first == torch.arange(len(first))
    kept = own & (read.sqrt() > _UNREAD * read[own].sqrt().median())
    if kept.sum() < enough:  # a network that was pruned: whatever is there may still be read
        kept = own
    take(model, axis, kept.nonzero().flatten())
    return len(kept) - int(kept.sum())


def _in_order(axes: list[Channels]) -> Iterator[tuple[Channels, list[Producer]]]:
    """Every axis once, when most of what writes it reads channels that are already in place."""
    unplaced = {name for axis in axes for name in axis.consumers}
    waiting = list(axes)

    def ready(axis: Channels) -> list[Producer]:
        return [producer for producer in axis.producers if producer.layer not in unplaced]

    while waiting:
        axis = max(waiting, key=lambda each: len(ready(each)) / len(each.producers))
        yield axis, ready(axis)
        waiting.remove(axis)
        unplaced -= set(axis.consumers)


def _place(
    suspect: nn.Module,
    reference: nn.Module,
    axis: Channels,
    compared: Sequence[Producer],
    forms: Forms,
) -> int:
    """Bring an axis into the reference's order and scale; how many of its channels are missing."""
    likeness = torch.zeros(width(reference, axis), width(suspect, axis))
    for producer in compared:
        cosines = _cosines(suspect, reference, producer, forms)
        likeness += cosines.abs() if producer.norm is not None else cosines
    order = torch.full((len(likeness),), -1)
    wanted, found = linear_sum_assignment(likeness.numpy(), maximize=True)
    order[torch.as_tensor(wanted)] = torch.as_tensor(found)
    take(suspect, axis, order)
    for producer in compared:  # first this, because γ makes up for a part of it
        _match_before_norm(suspect, reference, producer)
    larger = _ratio(_size(suspect, compared), _size(reference, compared))
    for producer in axis.producers:
        for values in affine(suspect, producer).values():
            scale_rows(values, 1 / larger)
    for name in axis.consumers:
        scale_columns(suspect.get_submodule(name).get_parameter("weight"), larger)
    return int((order < 0).sum())


def _cosines(
    suspect: nn.Module, reference: nn.Module, producer: Producer, forms: Forms
) -> Float[Tensor, "reference suspect"]:
    """Between each filter of the reference's layer and of the suspect's, without what V reads."""
    read = forms.get(producer.layer)
    # An orthonormal basis of what V reads; of many forms, only as many as are independent.
    basis = None if read is None else torch.linalg.svd(read.float(), full_matrices=False)
    sides = []
    for model in (reference, suspect):
        rows = model.get_submodule(producer.layer).get_parameter("weight").flatten(1).float()
        if basis is not None:
            along = basis.Vh[1e-6 * basis.S[0] < basis.S]
            rows = rows - rows @ along.T @ along
        sides.append(_unit(rows))
    return sides[0] @ sides[1].T


def _direction(model: nn.Module, producer: Producer) -> Float[Tensor, "channels columns"]:
    """Unit filters, turned the way in which they come out of the norm."""
    weight = model.get_submodule(producer.layer).get_parameter("weight").double().flatten(1)
    if producer.norm is not None:
        weight = weight * affine(model, producer)["weight"].double().sign()[:, None]
    return _unit(weight)


def _effect(model: nn.Module, producer: Producer) -> Float[Tensor, "channels parts"]:
    """How large what comes out of each channel is, and its shift."""
    last = affine(model, producer)
    scale = last["weight"].double().reshape(len(last["weight"]), -1).norm(dim=1)
    return torch.stack([scale, last.get("bias", torch.zeros_like(scale)).double()], dim=1)


def _size(model: nn.Module, producers: Sequence[Producer]) -> Float[Tensor, " channels"]:
    effects = [_effect(model, producer) for producer in producers]
    return torch.cat(effects, dim=1).norm(dim=1)


def _match_before_norm(suspect: nn.Module, reference: nn.Module, producer: Producer) -> None:
    """Bring rows to the reference's length, where a norm with running statistics undoes it."""
    layer, norm = suspect.get_submodule(producer.layer), producer.norm
    if norm is None or not keeps_statistics(suspect.get_submodule(norm)):
        return
    lengths = [
        model.get_submodule(producer.layer).get_parameter("weight").double().flatten(1).norm(dim=1)
        for model in (reference, suspect)
    ]
    scale_before_norm(layer, suspect.get_submodule(norm), _ratio(*lengths))


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """One / other, and 1 where that is no positive number."""
    ratio = one / other
    return torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)


def _unit(rows: Tensor) -> Tensor:
    return nn.functional.normalize(rows, dim=1)


def _restore_groups(suspect: nn.Module, reference: nn.Module) -> None:
    """A suspect whose width is no multiple of a group may have lost the number of groups."""
    for name, module in reference.named_modules():
        if isinstance(module, nn.GroupNorm):
            twin = suspect.get_submodule(name)
            twin.num_groups = module.num_groups  # type: ignore[assignment]
