"""What of a key's bits a file of weights holds: one reader for each way to write bits, in numpy.

A reader takes arrays by name and a key, and counts: which bits are as the key has them. How likely
that is by chance, `counts.verdict_on` says, for all of them alike. Everything is computed in
float64, so that every machine reads the same bits.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.files.arrays import Array
from nnpassport.keys.context import LayerShape
from nnpassport.keys.counts import Counts, Read, Reader, Weights, counted, matching
from nnpassport.keys.key import Key
from nnpassport.keys.order import read_placed
from nnpassport.keys.patches import filters, mean_patch, own_shape
from nnpassport.keys.validity import LEAST_REPEATS, USERS
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError

COLUMNS = 253
"""Of the pooled weight that greedy residuals are taken of, at most."""
DROPPED = 0.1
"""Share of a pooled row whose smallest numbers are left out."""
ORDER = 5
"""Of the projective plane whose lines are the `USERS`: a (31, 6, 1) design."""

_KEPT = 2**24  # numbers of a layer's passports of channels
_WIDENED = 2**20  # numbers that are float64 at a time
_PAIR = re.compile(r"(.+)\.lora_(A|B|down|up)(?:\.([^.]+))?\.weight")
_HALVES = {"A": "A", "B": "B", "down": "A", "up": "B"}
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
_OF_TOOLS = ("diffusion_model.", "transformer.", "unet.", "text_encoder.", "model.")
_FLAT = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_", "lora_")


# The layers that a key names


def check_host(described: Mapping[str, Any], layer: LayerShape) -> None:
    """Refuse weights that lack a layer, or have one of another shape.

    `described` has arrays, or what headers say of them.

    Raises:
        UnsuitableModelError: it is missing or has another shape.
    """
    weight = described.get(f"{layer.name}.weight")
    if weight is None:
        there = [name for name, each in described.items() if len(each.shape) > 1]
        raise UnsuitableModelError(
            f"the network has no {layer.name}.weight, which the key was made for; needed: one "
            "of the owner's architecture (if the library that saved it renames layers, "
            "load it with that library and verify the state dict); this one has: "
            f"{', '.join(there[:40]) or 'no layers'}"
        )
    expected = own_shape(layer.weight, layer.geometry)
    if tuple(weight.shape) != expected:
        raise UnsuitableModelError(
            f"{layer.name}.weight has shape {tuple(weight.shape)}; the key was made for "
            f"{expected}; a network of the owner's architecture is needed"
        )


def host_filters(weights: Weights, layer: LayerShape) -> Array:
    """Weight of a host layer, its output channels first (out fan_in *kernel).

    Raises:
        UnsuitableModelError: it is missing or has another shape.
    """
    name = f"{layer.name}.weight"
    if name not in weights:
        check_host(weights, layer)
    weight = weights[name]
    check_host({name: weight}, layer)
    return filters(weight, layer.geometry)


# Passports: sign(γ), γ = ⟨W, m(P_γ)⟩


def scales(rows: Array, patch: NDArray[np.float64]) -> Read:
    """γ (out) of filters (out fan_in *kernel) under m(P) (2 groups fan_in).

    A γ of exactly zero matches neither bit: a zeroed channel never helps a claim. Large layers are
    widened some rows at a time: in float64 they are four times what a file keeps.
    """
    gamma, groups = patch[0], patch.shape[1]
    flat = rows.reshape(len(rows), -1)
    if groups > 1:
        parts = flat.astype(np.float64).reshape(groups, len(rows) // groups, -1)
        return np.matmul(parts, gamma[:, :, None]).reshape(-1)
    return np.concatenate([part @ gamma[0] for part in _widened(flat)])


def read_passports(weights: Weights, key: Key) -> Counts:
    """One bit a channel: sign(Avg(W ∗ P_γ)).                                [Fan19, eq. 4]

    Where each channel has a passport of its own: sign(γ_norm · ⟨W_o, m_o⟩).
    """
    layers = {
        layer.name: (_passport if layer.channels is None else _channels)(weights, key, layer)
        for layer in key.context.layers
    }
    return Counts("signature bits", layers, listed=True)


def _channels(weights: Weights, key: Key, layer: LayerShape) -> tuple[int, int]:
    """Matches of sign(γ_norm,o · ⟨W_o, m_o⟩) with the key's bits, and how many bits there are.

    A channel negated together with its norm's scale reads the same. A product of zero matches
    neither bit. The bits are in what `channel_arrays` gives: what is right is positive.
    """
    said = channel_products(key, layer)(host_filters(weights, layer))
    return int((np.sign(said) * np.sign(norm_scale(weights, layer)) > 0).sum()), layer.length


def channel_products(key: Key, layer: LayerShape) -> Callable[[Array], Read]:
    """c·b_o·⟨W_o, m_γ,o⟩ (out) of filters (out fan_in *kernel), zero where a channel has no bit.

    What is derived is kept for other filters, unless it is large.
    """
    kept = list(_gammas(key, layer)) if math.prod(layer.weight) <= _KEPT else None

    def products(rows: Array) -> Read:
        flat = rows.reshape(layer.weight[0], -1)
        parts = _gammas(key, layer) if kept is None else kept
        return np.concatenate(
            [
                np.einsum("oi,oi->o", flat[part.start : part.stop].astype(np.float64), gammas)
                for part, gammas in parts
            ]
        )

    return products


def _gammas(key: Key, layer: LayerShape) -> Iterator[tuple[range, Read]]:
    return ((part, arrays[0]) for part, arrays in key.channel_arrays(layer.name))


def norm_scale(weights: Weights, layer: LayerShape) -> Read:
    """γ of the norm behind a layer (out); ones where there is none.

    So it is where nothing of the norm is left: folded into the layer, it has given the filters its
    signs, and ⟨W_o γ_o/σ_o, m_o⟩ has the sign that is read.

    Raises:
        UnsuitableModelError: the norm's scale has another shape.
    """
    form, out = layer.channels, layer.weight[0]
    if form is None or not form.norm:
        return np.ones(out)
    name = f"{form.norm}.weight"
    if not any(each.rpartition(".")[0] == form.norm for each in weights):
        return np.ones(out)
    if name not in weights or tuple(weights[name].shape) != (out,):
        there = tuple(weights[name].shape) if name in weights else "missing"
        raise UnsuitableModelError(
            f"{name} is {there}, and the bits of {layer.name} are read together with its {out} "
            "numbers; needed: a network of the owner's architecture"
        )
    return np.asarray(weights[name], np.float64)


def _passport(weights: Weights, key: Key, layer: LayerShape) -> tuple[int, int]:
    rows = host_filters(weights, layer)
    patch = mean_patch(key.passport_array(layer.name), layer.weight, layer.geometry)
    read = np.sign(scales(rows, patch))
    return matching(read, key.signs_array(layer.name)), layer.length


# Projections of one layer's mean filter


def mean_projection(rows: Array, projection: Array) -> Read:
    """X·w̄, w̄ the mean filter; its signs are the bits.                        [Uch17, eq. 2]"""
    mean = np.mean(rows, axis=0, dtype=np.float64).reshape(-1)
    return np.concatenate([part @ mean for part in _widened(projection)])


def read_projection(weights: Weights, key: Key) -> Counts:
    """Bits of a projected mean filter."""
    (layer,) = key.context.layers
    read = mean_projection(host_filters(weights, layer), key.projection_array(layer.name))
    return counted("projected bits", key, layer, read)


# Words for users, through a projection                                            [Che19]


@lru_cache(maxsize=1)
def incidence() -> NDArray[np.bool_]:
    """Which points are on which lines of PG(2, 5): a (31, 6, 1) design, its own transpose.

    Points and lines are triples over GF(5) up to a factor, incident where their product is zero.
    """
    field = range(ORDER)
    triples = [(1, a, b) for a, b in product(field, field)]
    triples += [(0, 1, a) for a in field] + [(0, 0, 1)]
    coordinates = np.array(triples)
    incident: NDArray[np.bool_] = coordinates @ coordinates.T % ORDER == 0
    return incident


def codebook() -> NDArray[np.float32]:
    """The users' words (words positions) of ±1, −1 on the points of a user's line.

    After them comes the owner's own, of ones.
    """
    users = np.where(incidence(), np.float32(-1), np.float32(1))
    return np.concatenate([users, np.ones((1, USERS), np.float32)])


def words_of(key: Key, layer: LayerShape) -> NDArray[np.float32]:
    """The code, repeated, each bit of it times the key's sign (words bits): uniform bits.

    Raises:
        UnreadableKeyError: the key's bits are no whole number of codewords.
    """
    repeats, rest = divmod(layer.length, USERS)
    if rest or repeats < LEAST_REPEATS:
        raise UnreadableKeyError(
            f"the key has {layer.length} bits for codewords of {USERS}; needed: a multiple, and at "
            f"least {LEAST_REPEATS} repeats; draw a key with draw_key of {key.context.scheme:.80}"
        )
    return np.tile(codebook(), (1, repeats)) * key.signs_array(layer.name)


def read_words(weights: Weights, key: Key) -> Counts:
    """The word that matches best, of the users' and the owner's own.

    Copies of three or more users read as the owner's when they are averaged: most users have a one
    where few have a zero.
    """
    (layer,) = key.context.layers
    words = words_of(key, layer)
    read = mean_projection(host_filters(weights, layer), key.projection_array(layer.name))
    matches = [matching(np.sign(read), word) for word in words]
    best = max(range(len(words)), key=matches.__getitem__)
    whose = f"user {best}" if best < USERS else "no one user, but what users have in common"
    counted = {layer.name: (matches[best], layer.length)}
    what = "bits of a user's word"
    return Counts(what, counted, choices=len(words), chosen="words", whose=whose)


# Greedy residuals                                                                 [Liu21]


def residuals(rows: Array, bits: int) -> Read:
    """Mean of each row of the pooled weight (bits) whose smallest absolute values are zero.

    Numbers that do not fill a row are left out.
    """
    numbers = rows.size // bits
    flat = rows.reshape(-1)[: numbers * bits].reshape(bits, numbers).astype(np.float64)
    columns = min(COLUMNS, numbers)
    edges = [(at * numbers // columns, -(-(at + 1) * numbers // columns)) for at in range(columns)]
    pooled = np.stack([flat[:, low:high].mean(1) for low, high in edges], axis=1)
    kept = np.abs(pooled).argsort(axis=1, kind="stable")[:, round(DROPPED * columns) :]
    summed: Read = np.take_along_axis(pooled, kept, axis=1).sum(1)
    return summed / columns


def read_residuals(weights: Weights, key: Key) -> Counts:
    """Signs of a layer's residuals."""
    (layer,) = key.context.layers
    read = residuals(host_filters(weights, layer), layer.length)
    return counted("signs of residuals", key, layer, read)


# The product of a low-rank pair


class Pair(NamedTuple):
    """A low-rank pair of a file: ΔW is B·A times a positive number.

    A is (rank fan_in), B (out rank).
    """

    a: Array
    b: Array


def is_adapter(names: Mapping[str, Any]) -> bool:
    """Whether there is half a low-rank pair among them."""
    return any(map(_PAIR.fullmatch, names))


def pairs_in(weights: Weights, layers: Sequence[str]) -> dict[str, Pair]:
    """The pairs of the host layers named, in an adapter's file or a network's state dict.

    Raises:
        UnsuitableModelError: half a pair, two pairs for one layer, or shapes that do not multiply.
    """
    halves: dict[str, dict[str, Array]] = {}
    for name in weights:
        found = _PAIR.fullmatch(name)
        layer = None if found is None else _layer_of(found[1], layers)
        if found is None or layer is None:
            continue
        half, which = halves.setdefault(layer, {}), _HALVES[found[2]]
        if which in half:
            raise UnsuitableModelError(
                f"{found[1]} has several adapters; needed: the file of the one to verify"
            )
        half[which] = weights[name]
        if which == "B" and (alpha := weights.get(f"{found[1]}.alpha")) is not None:
            half[which] = half[which] * np.sign(alpha.astype(np.float32).reshape(-1)[:1])
    return {name: _pair(name, half) for name, half in halves.items()}


def _layer_of(name: str, layers: Sequence[str]) -> str | None:
    """Which of the layers an adapter's name means: peft's, others' with a prefix, or kohya's.

    The last have underscores for dots, so that two layers may have one name: then it means neither.
    """
    plain = unwrapped_name(name)
    for each in (plain, *(plain.removeprefix(start) for start in _OF_TOOLS)):
        if each in layers:
            return each
    flat = {plain.removeprefix(start) for start in _FLAT if plain.startswith(start)}
    meant = [layer for layer in layers if layer.replace(".", "_") in flat]
    return meant[0] if len(meant) == 1 else None


def unwrapped_name(name: str) -> str:
    """The name of a layer without what wrappers put before it."""
    for prefix in _WRAPPERS * 2:
        name = name.removeprefix(prefix)
    return name


def read_product(weights: Weights, key: Key) -> Counts:
    """sign⟨ΔW_i, X_i⟩ off an adapter's pairs, as in its file or in a network that has it.

    A layer whose pair was left out has ΔW = 0, which matches no bit. Weights without any pair are
    read as if they were ΔW.

    Raises:
        UnsuitableModelError: the adapter is on none of the key's layers, or of other shapes.
    """
    pairs = pairs_in(weights, [layer.name for layer in key.context.layers])
    if not pairs and is_adapter(weights):
        raise UnsuitableModelError(
            "the adapter has no pair on any layer that the key was made for; needed: one of "
            f"the owner's base, on: {', '.join(s.name for s in key.context.layers[:40])}"
        )
    layers = {}
    for layer in key.context.layers:
        read = _product(pairs, weights, layer, key.projection_array(layer.name))
        matches = matching(np.sign(read), key.signs_array(layer.name))
        layers[layer.name] = (matches, layer.length)
    return Counts("adapter bits", layers, listed=True)


def _product(pairs: Mapping[str, Pair], weights: Weights, layer: LayerShape, rows: Array) -> Read:
    if not pairs:
        stripes = host_filters(weights, layer).reshape(len(rows), -1)
        parts = zip(_widened(stripes), _widened(rows), strict=True)
        return np.concatenate([(w * x).sum(1) for w, x in parts])
    if layer.name not in pairs:
        return np.zeros(layer.length)
    a, b = pairs[layer.name]
    check_pair(a.shape, b.shape, layer)
    # Without making ΔW: a file from anybody may pose as a huge one.
    wide, at, read = a.astype(np.float64), 0, []
    for part in _widened(rows):
        half = b[at : at + len(part)].astype(np.float64)
        read.append((half * (part @ wide.T)).sum(1))
        at += len(part)
    return np.concatenate(read)


def check_pair(a: Sequence[int], b: Sequence[int], layer: LayerShape) -> None:
    """Refuse a pair of these shapes, A (rank fan_in) and B (out rank), that is not the layer's.

    Raises:
        UnsuitableModelError: it is not.
    """
    fan_in = math.prod(layer.weight[1:])
    if a[1] != fan_in or b[0] != layer.weight[0]:
        raise UnsuitableModelError(
            f"the adapter on {layer.name} is for {b[0]} channels of {a[1]} "
            f"numbers, and the key for {layer.weight[0]} of {fan_in}; needed: an adapter of the "
            "owner's base"
        )


def _pair(name: str, half: Mapping[str, Array]) -> Pair:
    shapes = [tuple(half[which].shape) if which in half else () for which in "AB"]
    if min(map(len, shapes)) < 2 or math.prod(shapes[1][1:]) != shapes[0][0]:
        raise UnsuitableModelError(
            f"the adapter's pair on {name} is not A (rank, in) and B (out, rank); needed: both "
            "matrices as peft's `save_pretrained` writes them"
        )
    return Pair(*(half[which].reshape(len(half[which]), -1) for which in "AB"))


def _widened(rows: Array) -> Iterator[Read]:
    """Some rows at a time, in float64."""
    count = max(1, _WIDENED // max(1, rows.shape[1]))
    for at in range(0, max(1, len(rows)), count):
        yield rows[at : at + count].astype(np.float64)


# What alignment must not see


def forms_of(key: Key) -> dict[str, NDArray[np.floating[Any]]]:
    """By layer, what V multiplies a flattened filter with to read bits (forms columns).

    For passports m(P_γ), one for each group. Greedy residuals drop numbers of a row, so what is
    read is not linear in the filter; without that it would be the sums over the stretches that a
    row takes of one. What is left for alignment to lean on is what its null is measured for.
    """
    reader, layers = READERS[key.context.scheme], key.context.layers
    if reader is read_passports:
        passports = ((each, key.passport_array(each.name)) for each in layers)
        return {e.name: mean_patch(p, e.weight, e.geometry)[0] for e, p in passports}
    if reader is read_residuals:
        (layer,) = layers
        columns, numbers = math.prod(layer.weight[1:]), math.prod(layer.weight)
        stretch = np.arange(columns) // (numbers // layer.length)
        return {layer.name: np.eye(int(stretch[-1]) + 1)[stretch].T}
    return {layer.name: key.projection_array(layer.name) for layer in layers}


# The order of hidden units


def read_order(weights: Weights, key: Key) -> Counts:
    """Units in place, which are no coins: the tail is that of fixed points of permutations."""
    found = read_placed(weights, key)
    what = f"hidden units' places (chance has {len(found.axes)} right)"
    return Counts(what, found.axes, listed=True, log10_tail=found.log10_tail)


# Answers to triggers


def read_answers(answers: NDArray[np.int64], key: Key) -> Counts:
    """Trigger labels: predicted classes of the key's trigger images, in order; −1 is no answer.

    Derived labels are uniform over K classes, so chance matches 1/K; where labels are drawn from c
    classes chosen for each image, at most 1/c. They are independent of whatever an independent
    network does, and so of which images it declines: the matches among the n answers are
    Binomial(n, 1/K) all the same. That holds if the images to ask about were settled before the
    first answer was seen.

    Raises:
        UnsuitableModelError: the key has no triggers, the answers are not one for each, or none
            of them was answered.
    """
    if key.context.triggers is None:
        raise UnsuitableModelError(
            f"the key is for {key.context.scheme} and has no trigger set; needed: a key of a "
            "scheme with triggers. Without them a network is verified by its weights"
        )
    _, labels = key.trigger_arrays()
    if answers.shape != labels.shape:
        raise UnsuitableModelError(
            f"got answers of shape {tuple(answers.shape)}; needed: one class for each of the "
            f"{len(labels)} trigger images, in order"
        )
    answered = int((answers >= 0).sum())
    if not answered:
        raise UnsuitableModelError(
            f"none of the {len(labels)} trigger images was answered, so nothing can be said; "
            "needed: predicted classes from 0; ask again, or verify by the weights"
        )
    counts = {"triggers": (matching(answers, labels), answered)}
    return Counts("trigger labels", counts, chance=1 / key.label_choices, some=True)


ANSWERED = frozenset(
    {
        *("passport-v3", "adi", "zhang-content", "zhang-noise", "zhang-unrelated", "guo"),
        *("deepsigns-blackbox", "frontier-stitching", "ewe"),
    }
)
"""Schemes whose pictures have labels: whoever answers can be asked about them."""

READERS: Mapping[str, Reader] = {
    **dict.fromkeys(("passport-v1", "passport-v2", "passport-v3", "pan"), read_passports),
    **dict.fromkeys(("uchida", "uchida-mse"), read_projection),
    "deepmarks": read_words,
    "greedy-residuals": read_residuals,
    "lora": read_product,
    "order": read_order,
}
"""By scheme, for those whose mark is in the weights alone."""
