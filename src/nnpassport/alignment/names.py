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
from typing import NamedTuple

import numpy as np

from nnpassport.alignment.channels import (
    Channels,
    Floats,
    Network,
    Order,
    Producer,
    affine,
    by_reader,
    flat,
    fold_statistics,
    group_size,
    keeps_statistics,
    negate,
    per_channel,
    scale_columns,
    scale_rows,
    take,
    weight_of,
    width,
)
from nnpassport.alignment.match import assigned
from nnpassport.alignment.unfold import completed
from nnpassport.files.arrays import Array, is_finite, is_floating
from nnpassport.scheme import UnsuitableModelError

MOST_TIMES_WIDER = 64
"""A suspect with a layer that is more times wider than the reference's is not looked at. Channels
that cancel each other can be put in again and again; so wide, they make a network that nobody runs.
"""

MOST_CHANNELS = 8192
"""Nor is one with more channels than this on one axis: matching takes their square in memory."""

_MOST_CLASSES = 2**20
_REAL = np.zeros(0)
_TWINS = 1e-2  # sine of the angle between a channel and its copy, at most; half precision rounds
_SHORTEST = 1e-12  # rows are divided by this at least
_UNREAD = 1e-5  # columns this small beside the median channel's: nobody reads that channel

Forms = Mapping[str, Floats]
"""By layer, what V multiplies a flattened filter with to read a bit (forms columns)."""


class Aligned(NamedTuple):
    """A suspect in the reference's order.

    Attributes:
        network: the suspect's own weights, with as many channels as the reference has; running
            statistics are folded into the norms' scale and shift.
        cosines: mean |cosine| between matched filters, by layer; without the part that V reads.
        dropped: channels that were left out because they are copies, or read by nobody.
        missing: channels of the reference for which the suspect had none: they are zero.
        whole: the suspect as wide as it is, statistics folded and copies given to what they are
            copies of: it computes what the suspect does.
        places: by axis of it, how each channel of `whole` was matched.
    """

    network: Network
    cosines: Mapping[str, float]
    dropped: int
    missing: int
    whole: Network
    places: Sequence["Places"]

    @property
    def arrays(self) -> Mapping[str, Array]:
        """The tensors of `network`."""
        return self.network.arrays


class Places(NamedTuple):
    """How the channels of one axis of a suspect were matched to the reference's.

    Attributes:
        source: for each channel of the reference, which of the suspect's it got; −1 is none.
        cosine: |cosine| of each such pair.
        nearest: for each channel of the suspect, the largest |cosine| to any of the reference's.
    """

    source: Order
    cosine: Floats
    nearest: Floats


class Prepared(NamedTuple):
    """A reference that many suspects are aligned to: `folded` has its statistics in its norms.

    `units` are its filters of length one, by layer, without what V reads.
    """

    plain: Network
    folded: Network
    bases: Forms
    units: Mapping[str, Floats]


def prepared(reference: Network, forms: Forms) -> Prepared:
    """What `align` needs to know of a reference."""
    folded, bases = reference.copy(), bases_of(forms)
    producers = [each for axis in reference.axes for each in axis.producers]
    for producer in producers:
        fold_statistics(folded, producer)
    units = {each.layer: _blind(folded, each, bases) for each in producers}
    return Prepared(reference, folded, bases, units)


def align(weights: Mapping[str, Array], reference: Network, forms: Forms) -> Aligned:
    """The network with these weights, its channels moved, negated and scaled back.

    `weights` is a state dict with the reference's names; layers may have more or fewer channels.
    What has no place in such a network is left out, what changes nothing may be missing, and norms
    may be folded into their layers. The reference is in its released form. Neither is changed.

    Raises:
        UnsuitableModelError: they are not networks of one kind.
    """
    return align_to(prepared(reference, forms), weights)


def align_to(against: Prepared, weights: Mapping[str, Array]) -> Aligned:
    """The same with a reference that is prepared, and stays as it is."""
    reference, axes = against.folded, against.folded.axes
    suspect = _as_wide(weights, against.plain)
    for producer in (each for axis in axes for each in axis.producers):
        fold_statistics(suspect, producer)
    dropped = sum(_drop_copies(suspect, axis, width(reference, axis)) for axis in axes)
    whole, found = suspect.copy(), {}
    for axis, ready in in_order(axes):
        found[axis] = _place(suspect, against, axis, ready)
    missing = sum(int((order < 0).sum()) for order, _ in found.values())
    for axis in axes:  # streams once more, now that all who write them can be compared
        if len(axis.producers) > 1:
            order, _ = _place(suspect, against, axis, axis.producers)
            first, nearest = found[axis]
            found[axis] = (np.where(order < 0, -1, first[order]), nearest)
    cosines, places = {}, []
    for axis in axes:
        alike = np.zeros(width(reference, axis), np.float32)
        for producer in axis.producers:
            rows = _blind(suspect, producer, against.bases)
            along = np.einsum("oc,oc->o", against.units[producer.layer], rows)
            if producer.norm is not None:
                negate(suspect, producer, np.where(along < 0, -1.0, 1.0))
            cosines[producer.layer] = float(np.abs(along).mean())
            alike += np.abs(along) / len(axis.producers)
        source, nearest = found[axis]
        places.append(Places(source, alike, nearest))
    # A suspect whose width is no multiple of a group may have lost the number of groups.
    suspect.norms = dict(reference.norms)
    return Aligned(suspect, cosines, dropped, missing, whole, places)


def _as_wide(weights: Mapping[str, Array], reference: Network) -> Network:
    """A network of the reference's kind, as wide as the suspect, that holds its weights."""
    weights, suspect = _heard(completed(weights, reference), reference), reference.copy()
    expected = _shapes(weights, suspect)
    _require_kind(weights, expected, reference)
    for name in expected:
        like = reference.arrays.get(name)
        if like is None:  # a bias that the reference's layer does not have
            like = weight_of(reference, name.removesuffix(".bias"))
        with np.errstate(over="ignore"):
            suspect.arrays[name] = weights[name].astype(like.dtype, copy=False)
    # A finite float64 may be infinite in the reference's own dtype.
    if not all(is_finite(values) for values in suspect.arrays.values()):
        raise UnsuitableModelError(
            "the suspect's numbers are too large for the reference's type; needed for alignment: "
            "weights that can be stored in it"
        )
    return suspect


def _shapes(weights: Mapping[str, Array], suspect: Network) -> dict[str, tuple[int, ...]]:
    """The shapes of such a network's tensors, were it as wide as the suspect; its groups are set.

    Its last layer may have another task, and layers may have biases before their norms say.
    """
    shapes = {name: array.shape for name, array in suspect.arrays.items()}
    layers = {each.layer for axis in suspect.axes for each in axis.producers}
    heads = {name for axis in suspect.axes for name in axis.consumers} - layers
    for name in (name for head in heads for name in per_channel(suspect, head)):
        there = weights.get(name)
        if there is not None and there.ndim == len(shapes[name]) and len(there) <= _MOST_CLASSES:
            shapes[name] = (len(there) or len(suspect.arrays[name]), *shapes[name][1:])
    for name in (f"{layer}.bias" for layer in layers):
        if name in weights:
            shapes.setdefault(name, (0,))  # as many as there are channels
    for axis in suspect.axes:
        _widen(shapes, suspect, axis, _count(weights, axis))
    return shapes


def _widen(
    shapes: dict[str, tuple[int, ...]], suspect: Network, axis: Channels, count: int
) -> None:
    """So many channels on one axis."""
    name, most = f"{axis.producers[0].layer}.weight", width(suspect, axis)
    if not 0 < count <= MOST_TIMES_WIDER * most:
        raise UnsuitableModelError(
            f"the suspect has {count or 'no'} channels at {name}, and the reference {most}; "
            f"needed for alignment: at most {MOST_TIMES_WIDER} times as many, and no more than "
            f"{MOST_CHANNELS}; verify without "
            "it, or give the reference that the suspect is a copy of"
        )
    for producer in axis.producers:
        size = group_size(suspect, producer.norm)
        names = [own for part in producer if part for own in per_channel(suspect, part)]
        for each in (*names, f"{producer.layer}.bias"):
            if each in shapes:
                shapes[each] = (count, *shapes[each][1:])
        if producer.norm is not None and (norm := suspect.norms[producer.norm]).groups:
            groups = max(1, count // size)
            suspect.norms[producer.norm] = norm._replace(groups=groups)
    for each in (f"{name}.weight" for name in axis.consumers):
        out, columns, *kernel = shapes[each]
        shapes[each] = (out, columns // most * count, *kernel)


def _require_kind(
    weights: Mapping[str, Array], expected: Mapping[str, tuple[int, ...]], reference: Network
) -> None:
    """Refuse what is no network of the reference's kind."""
    faults = [
        name
        for name in sorted(expected.keys() | weights.keys())
        if name not in expected
        or name not in weights
        or expected[name] != weights[name].shape
        or is_floating(reference.arrays.get(name, _REAL)) != is_floating(weights[name])
    ]
    if faults:
        named = ", ".join(repr(name[:100]) for name in faults[:5])
        raise UnsuitableModelError(
            f"the suspect is no network of the reference's kind: {len(faults)} tensors are "
            f"missing, strange or of a shape that fits no other ({named}); needed for "
            "alignment: the same layers, though their channels may be more or fewer"
        )


def _heard(weights: Mapping[str, Array], reference: Network) -> dict[str, Array]:
    """The weights without channels that nobody reads, where there are too many to look at all.

    Nobody reads a channel if every column for it is zero. What is read too softly to matter is
    dropped later.
    """
    state = dict(weights)
    for axis in reference.axes:
        count, most = _count(state, axis), MOST_TIMES_WIDER * width(reference, axis)
        names = [f"{name}.weight" for name in axis.consumers]
        readers = [state[name] for name in names if name in state and state[name].ndim > 1]
        if count <= most or len(readers) < len(names):
            continue
        size = max(group_size(reference, producer.norm) for producer in axis.producers)
        if any(each.shape[1] % count for each in readers) or count % size:
            continue
        read = np.stack([(by_reader(each, count) != 0).any((0, 2)) for each in readers]).any(0)
        # Whole groups of a norm only: the others' mean would move.
        kept = np.repeat(read.reshape(-1, size).any(1), size)
        for part in (each for producer in axis.producers for each in producer if each):
            for own in ("weight", "bias", "running_mean", "running_var"):
                values = state.get(f"{part}.{own}")
                if values is not None and values.ndim and len(values) == count:
                    state[f"{part}.{own}"] = values[kept]
        for name, each in zip(names, readers, strict=True):
            block = each.shape[1] // count
            few = each.reshape(len(each), count, block, *each.shape[2:])[:, kept]
            state[name] = few.reshape(len(each), int(kept.sum()) * block, *each.shape[2:])
    return state


def _count(weights: Mapping[str, Array], axis: Channels) -> int:
    """How many channels these weights have on an axis; 0 if that cannot be told."""
    there = weights.get(f"{axis.producers[0].layer}.weight")
    return 0 if there is None or there.ndim == 0 else len(there)


def _drop_copies(network: Network, axis: Channels, enough: int) -> int:
    """Give what reads a channel's copy to the channel, and leave out what nobody reads; how many.

    Two channels are copies if everything that comes out of one is a positive multiple of what
    comes out of the other: parallel filters, and parallel scale and shift behind the norm.
    """
    size = np.concatenate([_effect(network, producer) for producer in axis.producers], axis=1)
    alike, loud = _own_cosines(_unit(size)), np.linalg.norm(size, axis=1)
    for producer in axis.producers:
        np.minimum(alike, _own_cosines(_direction(network, producer)), out=alike)
    first = first_of_each(alike)
    own = first == np.arange(len(first))
    read = np.zeros(len(first))
    for layer in axis.consumers:
        weight = weight_of(network, layer)
        if not own.all():
            weight = _given_to(weight, first, _ratio(loud, loud[first]))
            network.arrays[f"{layer}.weight"] = weight
        columns = by_reader(weight.astype(np.float64, copy=False), len(first))
        read += np.einsum("ocb,ocb->c", columns, columns)
    heard = np.sqrt(read) * loud  # small columns may read what is loud
    kept = own & (heard > _UNREAD * _median(heard[own]))
    if kept.sum() < enough:  # a network that was pruned: whatever is there may still be read
        kept = own
    if not kept.all():
        take(network, axis, np.flatnonzero(kept))
    return len(kept) - int(kept.sum())


def _given_to(weight: Floats, first: Order, scale: Floats) -> Floats:
    """A reader's weight whose columns for copies, so much louder, are added to the channel's."""
    columns = by_reader(weight.astype(np.float64), len(first)) * scale[:, None]
    for copy in np.flatnonzero(first != np.arange(len(first))):
        columns[:, first[copy]] += columns[:, copy]
        columns[:, copy] = 0
    return columns.reshape(weight.shape).astype(weight.dtype)


def _median(values: Floats) -> float:
    """The lower one where there are two in the middle."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def first_of_each(cosines: Floats) -> Order:
    """For each channel the first that it is a copy of, itself if there is none before it.

    To be a copy is not transitive, so only those count that are nobody's copy themselves.
    `cosines` are between channels (channels channels).
    """
    first = np.arange(len(cosines))
    # By index, then by what is before it.
    for index, before in np.argwhere(np.tril(cosines > 1 - _TWINS**2 / 2, -1)):
        if first[index] == index and first[before] == before:
            first[index] = before
    return first


def in_order(axes: Sequence[Channels]) -> Iterator[tuple[Channels, list[Producer]]]:
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
    suspect: Network, against: Prepared, axis: Channels, compared: Sequence[Producer]
) -> tuple[Order, Floats]:
    """Bring an axis into the reference's order and scale.

    Returned are the old place of each channel, −1 where one is missing, and how near each of the
    suspect's came to any of the reference's.
    """
    reference = against.folded
    likeness = np.zeros((width(reference, axis), width(suspect, axis)), np.float32)
    for producer in compared:
        cosines = against.units[producer.layer] @ _blind(suspect, producer, against.bases).T
        likeness += np.abs(cosines) if producer.norm is not None else cosines
    if not np.isfinite(likeness).all():
        raise UnsuitableModelError(
            f"filters of {axis.producers[0].layer} are too long to be compared; needed for "
            "alignment: weights whose squares can be summed up"
        )
    order = assigned(likeness)
    take(suspect, axis, order)
    for producer in compared:  # first this, because γ makes up for a part of it
        _match_before_norm(suspect, reference, producer)
    larger = _ratio(_size(suspect, compared), _size(reference, compared))
    for producer in axis.producers:
        scale_rows(suspect, affine(suspect, producer), 1 / larger)
    for layer in axis.consumers:
        scale_columns(suspect, layer, larger)
    return order, likeness.max(0) / max(1, len(compared))


def _blind(network: Network, producer: Producer, bases: Forms) -> Floats:
    """Filters of length one, without what V reads (channels columns)."""
    rows = flat(weight_of(network, producer.layer)).astype(np.float32, copy=False)
    basis = bases.get(producer.layer)
    return _unit(rows if basis is None else rows - rows @ basis.T @ basis)


def bases_of(forms: Forms) -> Forms:
    """Orthonormal rows for what V reads, by layer."""
    for name, read in forms.items():
        if len(read) >= read.shape[1]:
            raise UnsuitableModelError(
                f"V reads {len(read)} bits off filters of {read.shape[1]} numbers in {name}, so "
                "nothing is left to align them by; verify without alignment"
            )
    return {n: np.linalg.qr(read.astype(np.float32).T)[0].T for n, read in forms.items()}


def _direction(network: Network, producer: Producer) -> Floats:
    """Unit filters, turned the way in which they come out of the norm (channels columns)."""
    rows = flat(weight_of(network, producer.layer)).astype(np.float64)
    if producer.norm is not None:
        rows *= np.sign(network.arrays[f"{producer.norm}.weight"].astype(np.float64))[:, None]
    return _unit(rows)


def _effect(network: Network, producer: Producer) -> Floats:
    """How large what comes out of each channel is, and its shift (channels 2).

    Behind running statistics, which are folded by now, a longer filter gives more.
    """
    last = {n.rpartition(".")[2]: network.arrays[n] for n in affine(network, producer)}
    rows = flat(last["weight"]).astype(np.float64)
    scale = np.linalg.norm(rows, axis=1)
    if keeps_statistics(network, producer):
        scale = scale * _lengths(network, producer)
    shift = last.get("bias", np.zeros(len(scale)))
    return np.stack([scale, shift.astype(np.float64)], axis=1)


def _lengths(network: Network, producer: Producer) -> Floats:
    """Of a layer's filters (channels)."""
    rows = flat(weight_of(network, producer.layer)).astype(np.float64)
    return np.sqrt(np.einsum("oc,oc->o", rows, rows))


def _size(network: Network, producers: Sequence[Producer]) -> Floats:
    effects = [_effect(network, producer) for producer in producers]
    found: Floats = np.linalg.norm(np.concatenate(effects, axis=1), axis=1)
    return found


def _match_before_norm(suspect: Network, reference: Network, producer: Producer) -> None:
    """Bring rows to the reference's length, where folded statistics let the norm undo it."""
    if not keeps_statistics(suspect, producer):
        return
    longer = _ratio(_lengths(reference, producer), _lengths(suspect, producer))
    scale_rows(suspect, per_channel(suspect, producer.layer), longer)
    scale_rows(suspect, [f"{producer.norm}.weight"], 1 / longer)


def _ratio(one: Floats, other: Floats) -> Floats:
    """One / other, and 1 where that is no positive number."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = one / other
    return np.where(np.isfinite(ratio) & (ratio > 0), ratio, 1.0)


def _unit(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.maximum(lengths, rows.dtype.type(_SHORTEST))
    return found


def _own_cosines(unit: Floats) -> Floats:
    return unit @ unit.T
