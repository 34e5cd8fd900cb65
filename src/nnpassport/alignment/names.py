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
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.alignment.channels import (
    Channels,
    Producer,
    affine,
    channels_of,
    fold_statistics,
    group_size,
    keeps_statistics,
    negate,
    per_channel,
    scale_columns,
    scale_rows,
    take,
    width,
)
from nnpassport.alignment.unfold import completed
from nnpassport.scheme import UnsuitableModelError

MOST_TIMES_WIDER = 64
"""A suspect with a layer that is more times wider than the reference's is not looked at. Channels
that cancel each other can be put in again and again; so wide, they make a network that nobody runs.
"""

MOST_CHANNELS = 8192
"""Nor is one with more channels than this on one axis: matching takes their square in memory."""

_MOST_CLASSES = 2**20
_TWINS = 1e-2  # sine of the angle between a channel and its copy, at most; half precision rounds
_UNREAD = 1e-5  # columns this small beside the median channel's: nobody reads that channel

Forms = Mapping[str, Float[Tensor, "forms columns"]]
"""By layer, what V multiplies a flattened filter with to read a bit."""


class Aligned(NamedTuple):
    """A suspect in the reference's order.

    Attributes:
        model: the suspect's own weights, with as many channels as the reference has; running
            statistics are folded into the norms' scale and shift.
        cosines: mean |cosine| between matched filters, by layer; without the part that V reads.
        dropped: channels that were left out because they are copies, or read by nobody.
        missing: channels of the reference for which the suspect had none: they are zero.
        whole: the suspect as wide as it is, statistics folded and copies given to what they are
            copies of: it computes what the suspect does.
        places: by axis, as in `channels_of`, how each channel of `whole` was matched.
    """

    model: nn.Module
    cosines: Mapping[str, float]
    dropped: int
    missing: int
    whole: nn.Module
    places: Sequence["Places"]


class Places(NamedTuple):
    """How the channels of one axis of a suspect were matched to the reference's.

    Attributes:
        source: for each channel of the reference, which of the suspect's it got; −1 is none.
        cosine: |cosine| of each such pair.
        nearest: for each channel of the suspect, the largest |cosine| to any of the reference's.
    """

    source: Int64[Tensor, " reference"]
    cosine: Float[Tensor, " reference"]
    nearest: Float[Tensor, " suspect"]


class Prepared(NamedTuple):
    """A reference that many suspects are aligned to: `folded` has its statistics in its norms."""

    plain: nn.Module
    folded: nn.Module
    axes: list[Channels]
    bases: Forms


@torch.no_grad()
def prepared(reference: nn.Module, forms: Forms) -> Prepared:
    """What `align` needs to know of a reference.

    Raises:
        UnsuitableModelError: it is not known which layers of this kind of network share channels.
    """
    axes, folded = channels_of(reference), deepcopy(reference)
    for producer in (each for axis in axes for each in axis.producers):
        fold_statistics(folded, producer)
    return Prepared(reference, folded, axes, bases_of(forms))


def align(weights: Mapping[str, Tensor], reference: nn.Module, forms: Forms) -> Aligned:
    """The network with these weights, its channels moved, negated and scaled back.

    `weights` is a state dict with the reference's names; layers may have more or fewer channels.
    What has no place in such a network is left out, what changes nothing may be missing, and norms
    may be folded into their layers. The reference is in its released form. Neither is changed.

    Raises:
        UnsuitableModelError: they are not networks of one kind, or it is not known which layers of
            this kind share channels.
    """
    return align_to(prepared(reference, forms), weights)


@torch.no_grad()
def align_to(against: Prepared, weights: Mapping[str, Tensor]) -> Aligned:
    """The same with a reference that is prepared, and stays as it is."""
    _, reference, axes, bases = against
    suspect = _as_wide(weights, against.plain, axes)
    for producer in (each for axis in axes for each in axis.producers):
        fold_statistics(suspect, producer)
    dropped = sum(_drop_copies(suspect, axis, width(reference, axis)) for axis in axes)
    whole, found = deepcopy(suspect), {}
    for axis, ready in in_order(axes):
        found[axis] = _place(suspect, reference, axis, ready, bases)
    missing = sum(int((order < 0).sum()) for order, _ in found.values())
    for axis in axes:  # streams once more, now that all who write them can be compared
        if len(axis.producers) > 1:
            order, _ = _place(suspect, reference, axis, axis.producers, bases)
            first, nearest = found[axis]
            found[axis] = (torch.where(order < 0, -1, first[order]), nearest)
    cosines, places = {}, []
    for axis in axes:
        alike = torch.zeros(width(reference, axis))
        for producer in axis.producers:
            along = _cosines(suspect, reference, producer, bases).diagonal()
            if producer.norm is not None:
                negate(suspect, producer, torch.where(along < 0, -1.0, 1.0))
            cosines[producer.layer] = float(along.abs().mean())
            alike += along.abs() / len(axis.producers)
        source, nearest = found[axis]
        places.append(Places(source, alike, nearest))
    _restore_groups(suspect, reference)
    return Aligned(suspect.eval(), cosines, dropped, missing, whole.eval(), places)


def _as_wide(
    weights: Mapping[str, Tensor], reference: nn.Module, axes: list[Channels]
) -> nn.Module:
    """A network of the reference's kind, as wide as the suspect, that holds its weights."""
    suspect = deepcopy(reference)
    weights = _heard(completed(weights, reference, axes), reference, axes)
    _adopt_heads(suspect, axes, weights)
    _adopt_biases(suspect, axes, weights)
    for axis in axes:
        name, most = f"{axis.producers[0].layer}.weight", width(reference, axis)
        count = _count(weights, axis)
        if not 0 < count <= MOST_TIMES_WIDER * most:
            raise UnsuitableModelError(
                f"the suspect has {count or 'no'} channels at {name}, and the reference {most}; "
                f"needed for alignment: at most {MOST_TIMES_WIDER} times as many, and no more than "
                f"{MOST_CHANNELS}; verify without "
                "it, or give the reference that the suspect is a copy of"
            )
        if count != most:
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
    # A finite float64 may be infinite in the reference's own dtype.
    if any(not values.isfinite().all() for values in suspect.state_dict().values()):
        raise UnsuitableModelError(
            "the suspect's numbers are too large for the reference's type; needed for alignment: "
            "weights that can be stored in it"
        )
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


def _adopt_biases(model: nn.Module, axes: list[Channels], weights: Mapping[str, Tensor]) -> None:
    """Give layers the biases that the suspect's have, before their norms say."""
    for name in {producer.layer for axis in axes for producer in axis.producers}:
        layer = model.get_submodule(name)
        if layer._parameters.get("bias") is None and f"{name}.bias" in weights:
            weight = layer.get_parameter("weight")
            layer.bias = nn.Parameter(weight.new_zeros(len(weight)))


def _heard(
    weights: Mapping[str, Tensor], reference: nn.Module, axes: list[Channels]
) -> dict[str, Tensor]:
    """The weights without channels that nobody reads, where there are too many to look at all.

    Nobody reads a channel if every column for it is zero. What is read too softly to matter is
    dropped later.
    """
    state = dict(weights)
    for axis in axes:
        count, most = _count(state, axis), MOST_TIMES_WIDER * width(reference, axis)
        names = [f"{name}.weight" for name in axis.consumers]
        readers = [state[name] for name in names if name in state and state[name].dim() > 1]
        if count <= most or len(readers) < len(names):
            continue
        size = max(group_size(reference, producer.norm) for producer in axis.producers)
        if any(each.shape[1] % count for each in readers) or count % size:
            continue
        columns = [each.unflatten(1, (count, -1)).transpose(0, 1).flatten(1) for each in readers]
        read = torch.cat([each != 0 for each in columns], dim=1).any(1)
        # Whole groups of a norm only: the others' mean would move.
        kept = read.view(-1, size).any(1).repeat_interleave(size)
        for part in (each for producer in axis.producers for each in producer if each):
            for own in ("weight", "bias", "running_mean", "running_var"):
                values = state.get(f"{part}.{own}")
                if values is not None and values.dim() and len(values) == count:
                    state[f"{part}.{own}"] = values[kept]
        for name, each in zip(names, readers, strict=True):
            state[name] = each.unflatten(1, (count, -1))[:, kept].flatten(1, 2)
    return state


def _count(weights: Mapping[str, Tensor], axis: Channels) -> int:
    """How many channels these weights have on an axis; 0 if that cannot be told."""
    there = weights.get(f"{axis.producers[0].layer}.weight")
    return 0 if there is None or there.dim() == 0 else len(there)


def _drop_copies(model: nn.Module, axis: Channels, enough: int) -> int:
    """Give what reads a channel's copy to the channel, and leave out what nobody reads; how many.

    Two channels are copies if everything that comes out of one is a positive multiple of what
    comes out of the other: parallel filters, and parallel scale and shift behind the norm.
    """
    directions = [_direction(model, producer) for producer in axis.producers]
    size = torch.cat([_effect(model, producer) for producer in axis.producers], dim=1)
    angles = [unit @ unit.T for unit in (*directions, _unit(size))]
    first = first_of_each(torch.stack(angles).amin(0))
    own = first == torch.arange(len(first))
    scale = _ratio(size.norm(dim=1), size.norm(dim=1)[first])
    read = torch.zeros(len(first), dtype=torch.float64)
    for name in axis.consumers:
        weight = model.get_submodule(name).get_parameter("weight")
        columns = weight.unflatten(1, (len(first), -1)).double()
        if not own.all():
            scaled = columns * scale.view(-1, *[1] * (columns.dim() - 2))
            columns = torch.zeros_like(scaled).index_add_(1, first, scaled)
            weight.copy_(columns.flatten(1, 2))
        read += columns.transpose(0, 1).flatten(1).square().sum(1)
    heard = read.sqrt() * size.norm(dim=1)  # small columns may read what is loud
    kept = own & (heard > _UNREAD * heard[own].median())
    if kept.sum() < enough:  # a network that was pruned: whatever is there may still be read
        kept = own
    if not kept.all():
        take(model, axis, kept.nonzero().flatten())
    return len(kept) - int(kept.sum())


def first_of_each(cosines: Float[Tensor, "channels channels"]) -> Int64[Tensor, " channels"]:
    """For each channel the first that it is a copy of, itself if there is none before it.

    To be a copy is not transitive, so only those count that are nobody's copy themselves.
    """
    twins = (cosines > 1 - _TWINS**2 / 2).tril_(-1).nonzero().tolist()
    first = list(range(len(cosines)))
    for index, before in twins:  # by index, then by what is before it
        if first[index] == index and first[before] == before:
            first[index] = before
    return torch.tensor(first, dtype=torch.long)


def in_order(axes: list[Channels]) -> Iterator[tuple[Channels, list[Producer]]]:
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
    bases: Forms,
) -> tuple[Int64[Tensor, " reference"], Float[Tensor, " suspect"]]:
    """Bring an axis into the reference's order and scale.

    Returned are the old place of each channel, −1 where one is missing, and how near each of the
    suspect's came to any of the reference's.
    """
    # Slow to import, and readings without alignment do not need it.
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

    likeness = torch.zeros(width(reference, axis), width(suspect, axis))
    for producer in compared:
        cosines = _cosines(suspect, reference, producer, bases)
        likeness += cosines.abs() if producer.norm is not None else cosines
    if not likeness.isfinite().all():
        raise UnsuitableModelError(
            f"filters of {axis.producers[0].layer} are too long to be compared; needed for "
            "alignment: weights whose squares can be summed up"
        )
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
    return order, likeness.amax(0) / max(1, len(compared))


def _cosines(
    suspect: nn.Module, reference: nn.Module, producer: Producer, bases: Forms
) -> Float[Tensor, "reference suspect"]:
    """Between each filter of the reference's layer and of the suspect's, without what V reads."""
    basis, sides = bases.get(producer.layer), []
    for model in (reference, suspect):
        rows = model.get_submodule(producer.layer).get_parameter("weight").flatten(1).float()
        if basis is not None:
            rows = rows - rows @ basis.T @ basis
        sides.append(_unit(rows))
    return sides[0] @ sides[1].T


def bases_of(forms: Forms) -> Forms:
    """Orthonormal rows for what V reads, by layer."""
    for name, read in forms.items():
        if len(read) >= read.shape[1]:
            raise UnsuitableModelError(
                f"V reads {len(read)} bits off filters of {read.shape[1]} numbers in {name}, so "
                "nothing is left to align them by; verify without alignment"
            )
    return {name: torch.linalg.qr(read.float().T).Q.T for name, read in forms.items()}


def _direction(model: nn.Module, producer: Producer) -> Float[Tensor, "channels columns"]:
    """Unit filters, turned the way in which they come out of the norm."""
    weight = model.get_submodule(producer.layer).get_parameter("weight").double().flatten(1)
    if producer.norm is not None:
        weight = weight * affine(model, producer)["weight"].double().sign()[:, None]
    return _unit(weight)


def _effect(model: nn.Module, producer: Producer) -> Float[Tensor, "channels parts"]:
    """How large what comes out of each channel is, and its shift.

    Behind running statistics, which are folded by now, a longer filter gives more.
    """
    last = affine(model, producer)
    scale = last["weight"].double().reshape(len(last["weight"]), -1).norm(dim=1)
    if producer.norm is not None and keeps_statistics(model.get_submodule(producer.norm)):
        scale = scale.abs() * _lengths(model, producer)
    return torch.stack([scale, last.get("bias", torch.zeros_like(scale)).double()], dim=1)


def _lengths(model: nn.Module, producer: Producer) -> Float[Tensor, " channels"]:
    weight = model.get_submodule(producer.layer).get_parameter("weight")
    return weight.double().flatten(1).norm(dim=1)


def _size(model: nn.Module, producers: Sequence[Producer]) -> Float[Tensor, " channels"]:
    effects = [_effect(model, producer) for producer in producers]
    return torch.cat(effects, dim=1).norm(dim=1)


def _match_before_norm(suspect: nn.Module, reference: nn.Module, producer: Producer) -> None:
    """Bring rows to the reference's length, where folded statistics let the norm undo it."""
    if producer.norm is None or not keeps_statistics(suspect.get_submodule(producer.norm)):
        return
    longer = _ratio(_lengths(reference, producer), _lengths(suspect, producer))
    for values in per_channel(suspect.get_submodule(producer.layer)).values():
        scale_rows(values, longer)
    scale_rows(affine(suspect, producer)["weight"], 1 / longer)


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
