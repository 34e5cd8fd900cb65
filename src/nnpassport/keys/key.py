"""The owner's secret: a seed and its context, or explicit tensors."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys.context import Context, TriggerShape
from nnpassport.keys.derive import (
    BASE,
    SEED_BYTES,
    array_of,
    check_text,
    derive_channels,
    derive_labels,
    derive_passport,
    derive_projection,
    derive_signs,
    length_prefixed,
    trigger_stream,
    triggers_of,
    whitened_signs,
)
from nnpassport.keys.ordered import check_form, check_sketch, table_in
from nnpassport.keys.pictures import abstract_images
from nnpassport.scheme import UnreadableKeyError

if TYPE_CHECKING:
    from torch import Tensor


MAX_DIRECTIONS = 256
"""Most directions in which a key says what a layer receives."""
_AT_ONCE = 2**21  # numbers of passports of channels that are there at a time


@final
@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Key:
    """The owner's secret. Never in a checkpoint, a log, a `repr` or an exception.

    Without explicit tensors everything is derived from the seed. Only such a key can be evidence
    against a rival who solves for tensors. Explicit tensors are the paper's image, shuffled and
    random passports, kept so that its tables can be reproduced.

    Pictures that the owner chose do not count as explicit, as long as their labels are not chosen
    too. All else is then derived from the seed *and* the digest of the pictures. Whoever changes
    one picture draws every label and every bit anew, so to choose pictures is to draw seeds.

    A key may be made of arrays or of tensors, and holds arrays. It returns what it derives as
    arrays (`signs_array`, `passport_array`, …), without torch, or as tensors with the same numbers
    (`layer_signs`, `layer_passport`, …).

    Attributes:
        seed: 32 secret bytes.
        context: what the seed is for; not secret.
        text: signature text, read back from the marked network; None for bits of the stream.
        passports: explicit passports by layer, each (2 in *space) float32.
        signs: explicit signature bits by layer, each (bits) float32 of ±1.
        projections: explicit projections by layer, each (bits fan_in) float32.
        trigger_images: explicit trigger images (count channel height width), uint8.
        trigger_labels: explicit labels (count), int64.
        trigger_choices: the classes from which the labels of explicit images are drawn, (count
            choices) int64, distinct in each row; None for all classes.
        baseline: what the network before a mark in answers says of the inputs above, (count
            classes) int16, centred log-probabilities in units of 1/64; all else is bound to it.
        table: the anchor's table of axes, its bytes as uint8, for a mark in the order of units.
        sketch: what of the anchor's units tells them apart, by axis' number, each (units numbers)
            int8. As with metrics, table and sketch are in the context by their digests.
        metrics: what layers were seen to receive, by layer, each (rows 1+fan_in) int16; see
            `derive.spread`. It cannot be chosen freely: its digest is in the context, so whoever
            changes it draws every passport and every bit anew.
    """

    seed: bytes
    context: Context
    text: str | None = None
    passports: Mapping[str, Any] | None = None
    signs: Mapping[str, Any] | None = None
    trigger_images: Any = None
    trigger_labels: Any = None
    projections: Mapping[str, Any] | None = None
    trigger_choices: Any = None
    metrics: Mapping[str, Any] | None = None
    baseline: Any = None
    table: Any = None
    sketch: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.seed, bytes) or len(self.seed) != SEED_BYTES:
            raise _bad_key("a seed of another size", f"{SEED_BYTES} bytes")
        if self.text is not None and self.signs is not None:
            raise _bad_key("both a text and explicit signs", "one of them or neither")
        if self.text is not None:
            check_text(self.text, self.context)
        # Copies, so that a key never changes when the tensors it was made from do.
        for field in ("passports", "signs", "projections", "metrics", "sketch"):
            mapping = getattr(self, field)
            if mapping is not None:
                owned = {n: _own(t, f"{field}/{n}") for n, t in mapping.items()}
                object.__setattr__(self, field, owned)
        for field in ("trigger_images", "trigger_labels", "trigger_choices", "baseline", "table"):
            tensor = getattr(self, field)
            if tensor is not None:
                object.__setattr__(self, field, _own(tensor, field))
        _check_explicit(self)

    def __repr__(self) -> str:
        context = self.context
        return (
            f"Key(scheme={context.scheme!r}, owner={context.owner!r}, "
            f"layers={len(context.layers)}, fingerprint={self.fingerprint!r})"
        )

    @property
    def derived(self) -> bool:
        """Whether everything comes from the seed, a text apart: nothing was chosen freely.

        Pictures may be chosen where all else is bound to them.
        """
        bound = {"trigger_images", "trigger_choices", "baseline"} if self.bound else set()
        bound |= {f"metrics/{name}" for name in self.metrics or {}}
        bound |= {"table", *(f"sketch/{name}" for name in self.sketch or {})}
        return set(self.explicit_tensors()) <= bound

    @property
    def bound(self) -> bytes:
        """Digest of the explicit pictures that all else is derived from, or nothing.

        SHA-256(LP("trigger_images", shape, bytes), and the same of the choices, or of a baseline,
        where there are any)
        """
        if self.trigger_images is None or self.trigger_labels is not None:
            return b""
        there = {"trigger_images": self.trigger_images, "trigger_choices": self.trigger_choices}
        there["baseline"] = self.baseline
        tensors = {name: tensor for name, tensor in there.items() if tensor is not None}
        return hashlib.sha256(_spelled(tensors)).digest()

    @property
    def label_choices(self) -> int:
        """How many classes each trigger's label was drawn from.

        Raises:
            UnreadableKeyError: the key has no trigger set.
        """
        choices = self.trigger_choices
        return triggers_of(self.context).classes if choices is None else choices.shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that the key consists of, in hexadecimal.

        A commitment that is safe to publish: the 256 bits of the seed hide the rest.
        """
        parts = [b"nnpassport/key/v1", self.seed, self.context.encode()]
        parts += [b"no text"] if self.text is None else [b"text", self.text.encode("ascii")]
        return hashlib.sha256(
            length_prefixed(*parts) + _spelled(self.explicit_tensors())
        ).hexdigest()

    def explicit_tensors(self) -> dict[str, NDArray[Any]]:
        """What was chosen and not derived, as arrays: "passports/LAYER", "signs/LAYER", …"""
        tensors = {f"passports/{name}": t for name, t in (self.passports or {}).items()}
        tensors |= {f"signs/{name}": t for name, t in (self.signs or {}).items()}
        tensors |= {f"projections/{n}": t for n, t in (self.projections or {}).items()}
        tensors |= {f"metrics/{n}": t for n, t in (self.metrics or {}).items()}
        tensors |= {f"sketch/{n}": t for n, t in (self.sketch or {}).items()}
        if self.trigger_images is not None:
            tensors["trigger_images"] = self.trigger_images
        if self.trigger_labels is not None:
            tensors["trigger_labels"] = self.trigger_labels
        if self.trigger_choices is not None:
            tensors["trigger_choices"] = self.trigger_choices
        if self.baseline is not None:
            tensors["baseline"] = self.baseline
        if self.table is not None:
            tensors["table"] = self.table
        return tensors

    def signs_array(self, name: str) -> NDArray[np.float32]:
        """Signature bits b ∈ {−1, +1} (out) of the layer called `name`.

        Raises:
            UnreadableKeyError: the key has no such layer.
        """
        layer = self.context.layer(name)
        if self.signs is not None:
            return array_of(self.signs[name])
        if self.text is not None:
            return whitened_signs(self.text, self.seed, self.context, layer, self.bound)
        return derive_signs(self.seed, self.context, layer, self.bound)

    def passport_array(self, name: str) -> NDArray[np.float32]:
        """Passport (2 in *space) of the layer called `name`: P_γ and P_β.

        Raises:
            UnreadableKeyError: the key has no such layer.
        """
        layer = self.context.layer(name)
        if layer.channels is not None:
            raise _bad_key(
                f"a passport for each channel of layer {name!r:.80}, where one for the whole layer "
                "was asked for",
                'passports of the kind "derived"',
            )
        if self.passports is not None:
            return array_of(self.passports[name])
        return derive_passport(self.seed, self.context, layer, self.bound)

    def channel_arrays(self, name: str) -> Iterator[tuple[range, NDArray[np.float64]]]:
        """c·b·m_γ and c′·b·m_β (2 channels fan_in) of some channels at a time, and which they are.

        They are for all channels, in order; those that carry no bit are zero.

        Raises:
            UnreadableKeyError: the key has no such layer, or one passport for the whole of it.
        """
        layer = self.context.layer(name)
        if layer.channels is None:
            raise _bad_key(f"one passport for all of layer {name!r:.80}", "one for each channel")
        carrying, signs = layer.channels.carrying(layer.weight[0]), np.zeros(layer.weight[0])
        signs[carrying] = self.signs_array(name)
        gains = np.array(layer.channels.gains, np.float64) * 2.0**-24
        metric = (self.metrics or {}).get(name)
        step = max(1, _AT_ONCE // (2 * math.prod(layer.weight[1:])))
        for start in range(0, layer.weight[0], step):
            part = range(start, min(start + step, layer.weight[0]))
            drawn = derive_channels(self.seed, self.context, layer, part, self.bound, metric)
            factors = gains[:, None] * signs[None, part.start : part.stop]
            yield part, drawn * factors[:, :, None]

    def projection_array(self, name: str) -> NDArray[np.float32]:
        """Projection X (bits fan_in) that reads the bits of the layer called `name`.

        Raises:
            UnreadableKeyError: the key has no such layer.
        """
        layer = self.context.layer(name)
        if self.projections is not None:
            return array_of(self.projections[name])
        return derive_projection(self.seed, self.context, layer, self.bound)

    def trigger_arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Trigger images (count channel height width), and the labels (count) that they have.

        Raises:
            UnreadableKeyError: the key has no trigger set.
        """
        shape, labels = triggers_of(self.context), self._labels()
        if self.trigger_images is not None:
            return array_of(self.trigger_images), labels
        draw = trigger_stream(self.seed, self.context)
        return abstract_images(draw, count=shape.count, size=shape.size), labels

    def _labels(self) -> NDArray[np.int64]:
        if self.trigger_labels is not None:
            return array_of(self.trigger_labels)
        if self.trigger_choices is None:
            return derive_labels(self.seed, self.context, self.bound)
        places = derive_labels(self.seed, self.context, self.bound, self.label_choices)
        drawn: NDArray[np.int64] = np.take_along_axis(self.trigger_choices, places[:, None], 1)
        return drawn[:, 0].copy()

    def layer_signs(self, name: str) -> "Tensor":
        """`signs_array` as a tensor, as are the three below of what they are named after."""
        return _tensor(self.signs_array(name))

    def layer_passport(self, name: str) -> "Tensor":
        """Passport of the layer called `name`: P_γ and P_β (2 in *space)."""
        return _tensor(self.passport_array(name))

    def layer_projection(self, name: str) -> "Tensor":
        """Projection X (bits fan_in) that reads the layer's bits off its mean filter."""
        return _tensor(self.projection_array(name))

    def trigger_set(self) -> "tuple[Tensor, Tensor]":
        """Trigger images (count channel height width) and the labels that the owner gave them."""
        images, labels = self.trigger_arrays()
        return _tensor(images), _tensor(labels)


def _tensor(array: NDArray[Any]) -> "Tensor":
    # The one place where a key meets torch, and only where tensors are asked for.
    import torch  # noqa: PLC0415

    return torch.from_numpy(array)


def _spelled(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """Name, dtype, shape and little-endian numbers of each, length-prefixed, sorted by name."""
    parts: list[bytes] = []
    for name, array in sorted(tensors.items()):
        little_endian = array.astype(array.dtype.newbyteorder("<"))
        shape = ",".join(str(size) for size in array.shape)
        parts += [name.encode(), array.dtype.name.encode(), shape.encode()]
        parts += [little_endian.tobytes()]
    return length_prefixed(*parts)


def _check_explicit(key: Key) -> None:
    shapes = {layer.name: layer for layer in key.context.layers}
    explicit = {"passports": key.passports, "signs": key.signs, "projections": key.projections}
    for what, mapping in explicit.items():
        if mapping is not None and set(mapping) != set(shapes):
            raise _bad_key(
                f"explicit {what} for {len(mapping)} layers", f"them for its {len(shapes)} layers"
            )
    for name, passport in (key.passports or {}).items():
        _check_tensor(passport, f"passports/{name}", np.float32, (2, *shapes[name].passport))
        if not np.isfinite(passport).all():
            raise _bad_key(f"NaN or Inf in the passport of layer {name!r:.80}", "finite numbers")
    for name, signs in (key.signs or {}).items():
        _check_tensor(signs, f"signs/{name}", np.float32, (shapes[name].length,))
        if not (np.abs(signs) == 1).all():
            raise _bad_key(f"signs of layer {name!r:.80} other than ±1", "−1 or +1 for a channel")
    for name, projection in (key.projections or {}).items():
        shape = (shapes[name].length, math.prod(shapes[name].passport))
        _check_tensor(projection, f"projections/{name}", np.float32, shape)
        if not np.isfinite(projection).all():
            raise _bad_key(f"NaN or Inf in the projection of {name!r:.80}", "finite numbers")
    _check_metrics(key)
    _check_order(key)
    _check_explicit_triggers(key)


def _check_metrics(key: Key) -> None:
    forms = {layer.name: layer for layer in key.context.layers if layer.channels is not None}
    if forms and key.passports is not None:
        raise _bad_key("explicit passports for layers", "none beside those of channels")
    measured = {n for n, layer in forms.items() if layer.channels and layer.channels.metric}
    if set(key.metrics or {}) != measured:
        raise _bad_key(
            f"what {len(key.metrics or {})} layers receive", f"that of {len(measured)} layers"
        )
    for name, metric in (key.metrics or {}).items():
        rows, fan_in = len(metric), math.prod(forms[name].weight[1:])
        _check_tensor(metric, f"metrics/{name}", np.int16, (rows, 1 + fan_in))
        form = forms[name].channels
        if form is None or not _is_metric(metric) or metric_digest(metric) != form.metric:
            raise _bad_key(f"another metric of layer {name!r:.80}", "the one in its context")


def _is_metric(metric: NDArray[np.int16]) -> bool:
    if not len(metric):
        return False
    based = int(metric[0, 0]) == BASE
    weights, directions = metric[:based, 1:], metric[based:]
    strong = bool((directions[:, 0] >= -(2**8)).all())
    weighs = bool(((weights >= 0) & (weights <= 2**8)).all())
    return strong and weighs and len(directions) <= MAX_DIRECTIONS


def metric_digest(metric: NDArray[np.int16]) -> str:
    """SHA-256, in hexadecimal, of a layer's metric: what a context says of it."""
    return hashlib.sha256(_spelled({"metric": metric})).hexdigest()


def _check_order(key: Key) -> None:
    form, table, sketch = key.context.order, key.table, key.sketch
    if form is None:
        if table is not None or sketch is not None:
            raise _bad_key("a table of axes or a sketch", "a context with orders for them")
        return
    if table is None or sketch is None:
        raise _bad_key("no table of axes or no sketch", "both, for a mark in the order of units")
    _check_tensor(table, "table", np.uint8, (table.size,))
    digests = (hashlib.sha256(table.tobytes()).hexdigest(), sketch_digest(sketch))
    if digests != (form.table, form.sketch):
        raise _bad_key("another table of axes, or another sketch", "those in its context")
    axes = table_in(table.tobytes())
    check_form(form, axes)
    check_sketch(sketch, form, axes, str(key.context.anchor), key.context.nonce)


def sketch_digest(sketch: Mapping[str, NDArray[np.int8]]) -> str:
    """SHA-256, in hexadecimal, of a sketch: what a context says of it."""
    return hashlib.sha256(_spelled({f"sketch/{n}": t for n, t in sketch.items()})).hexdigest()


def _check_explicit_triggers(key: Key) -> None:
    images, labels, shape = key.trigger_images, key.trigger_labels, key.context.triggers
    if shape is None:
        given = (images, labels, key.trigger_choices, key.baseline)
        if any(each is not None for each in given):
            raise _bad_key("trigger images or labels", "a context with a trigger set for them")
        return
    if images is not None:
        _check_tensor(images, "trigger_images", np.uint8, (shape.count, *shape.size))
    if labels is not None:
        _check_tensor(labels, "trigger_labels", np.int64, (shape.count,))
        if labels.min() < 0 or labels.max() >= shape.classes:
            raise _bad_key("trigger labels out of range", f"classes from 0 to {shape.classes - 1}")
    if key.baseline is not None:
        if images is None or labels is not None or key.context.answers is None:
            raise _bad_key("a baseline", "a form of answers, and inputs without labels")
        _check_tensor(key.baseline, "baseline", np.int16, (shape.count, shape.classes))
    if key.trigger_choices is not None:
        _check_choices(key.trigger_choices, shape, given=images is not None and labels is None)


def _check_choices(choices: NDArray[Any], shape: TriggerShape, *, given: bool) -> None:
    if not given:
        raise _bad_key("choices of labels", "images that they are for, and no labels")
    columns = choices.shape[1] if choices.ndim == 2 else 0
    _check_tensor(choices, "trigger_choices", np.int64, (shape.count, columns))
    ordered = np.sort(choices, axis=1)
    distinct = bool((ordered[:, 1:] > ordered[:, :-1]).all())
    in_range = columns > 1 and choices.min() >= 0 and choices.max() < shape.classes
    if not (distinct and in_range):
        raise _bad_key(
            "choices of labels that repeat or are out of range",
            f"two or more distinct classes from 0 to {shape.classes - 1} for each image",
        )


def _check_tensor(array: NDArray[Any], name: str, dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != tuple(shape):
        given = f"{array.dtype} of shape {array.shape} as {name:.90}"
        raise _bad_key(given, f"{np.dtype(dtype)} of shape {tuple(shape)}")


def _bad_key(given: str, needed: str) -> UnreadableKeyError:
    return UnreadableKeyError(
        f"the key has {given}, but needs {needed}; draw a key for this model, or give tensors that "
        "fit its layers"
    )


def _own(tensor: Any, name: str) -> NDArray[Any]:
    try:
        return array_of(tensor)
    except (AttributeError, TypeError, RuntimeError):  # bfloat16, sparse, or no tensor at all
        given = f"{getattr(tensor, 'dtype', type(tensor).__name__)} as {name:.90}"
    raise _bad_key(given, "numbers that NumPy has too, such as float32")
