"""What a seed is for, in public: the context of a key, and the one encoding of it.

`docs/derivation.md` is the same specification for those who do not read Python.
"""

import base64
import json
import math
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys import validity
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.validity import MAX_NUMBERS, positions, require
from nnpassport.scheme import UnreadableKeyError

NONCE_BYTES = 16
MAX_LAYERS = 10_000

_FORMAT = "nnpassport-context"
_VERSION = 1
_MAX_AXIS = 2**24
_MAX_NAME = 1_000
_MAX_JSON = 2**24
_MAX_COMMAS = 2**20
_MAX_GAIN = 2**48
_MOST_NUMBERED = 10_000  # axes of a table
_MOST_DIMENSIONS = 8
_DIGEST = re.compile("[0-9a-f]{64}")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class ChannelForm(NamedTuple):
    """A layer whose channels have a passport each: γ_o = c·b_o·⟨W_o, m_γ,o⟩, β likewise with c′.

    Attributes:
        norm: dotted name of the norm whose scale is read with the bits, "" where there is none.
        gains: c and c′, in units of 2⁻²⁴, each from 1.
        carriers: the channels that carry a bit, as a bitmap in hexadecimal, the first channel in
            the highest bit; None is all of them.
        metric: SHA-256, in hexadecimal, of what the layer was seen to receive; "" where nothing
            was measured, and m is white.
    """

    norm: str
    gains: tuple[int, int]
    carriers: str | None = None
    metric: str = ""

    def carrying(self, channels: int) -> NDArray[np.bool_]:
        """Which of so many channels carry a bit."""
        if self.carriers is None:
            return np.ones(channels, bool)
        bits = np.frombuffer(bytes.fromhex(self.carriers), np.uint8)
        return np.unpackbits(bits)[:channels].astype(bool)


class LayerShape(NamedTuple):
    """A host layer.

    Attributes:
        name: its dotted name.
        weight: shape of its weight, output channels first (`functional.filters`).
        passport: shape of one passport (in, *space); of a projection, of the kernel it reads.
        bits: signature length where a projection reads it; None is a bit for each output channel.
        channels: the form in which each channel has a passport of its own; None is the paper's, one
            for the whole layer.
    """

    name: str
    weight: tuple[int, ...]
    passport: tuple[int, ...]
    geometry: Geometry
    bits: int | None = None
    channels: ChannelForm | None = None

    @property
    def length(self) -> int:
        """How many signature bits the layer carries."""
        if self.channels is not None and self.channels.carriers is not None:
            return int(self.channels.carriers, 16).bit_count()
        return self.weight[0] if self.bits is None else self.bits


class TriggerShape(NamedTuple):
    """A trigger set: `count` images of `size` (channel height width) in `classes` classes."""

    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    classes: int
    size: tuple[int, int, int]


class AnswersForm(NamedTuple):
    """A mark in ordinary answers: z(x) + ε·g(x), g the key's own function of the input.

    Attributes:
        kind: which functions of an input there are to draw from (`keys.answers.KINDS`).
        coins: how many functions, each with a class and a sign of its own.
        strength: ε in thousandths, of a score whose function has unit variance; of a probability
            where functions are waves.
    """

    kind: str
    coins: int
    strength: int


class OrderedAxis(NamedTuple):
    """An axis whose order is read.

    Attributes:
        number: which axis of the table.
        units: how many of its units are looked at.
        tensors: those that its units are told by, with their shapes.
    """

    number: int
    units: int
    tensors: tuple[tuple[str, tuple[int, ...]], ...]


class OrderForm(NamedTuple):
    """A mark in the order of hidden units: that of the anchor's, permuted (`keys.ordered`).

    Attributes:
        table: SHA-256 of the anchor's table of axes, all of which are permuted.
        sketch: SHA-256 of what the key keeps of the anchor's units.
        axes: those whose order is read, each given the orders of those before.
    """

    table: str
    sketch: str
    axes: tuple[OrderedAxis, ...]

    @property
    def units(self) -> list[int]:
        """How many units of each axis are looked at."""
        return [axis.units for axis in self.axes]


@final
@dataclass(frozen=True, slots=True)
class Context:
    """What a seed is for. Nothing in it is secret; every derived stream depends on all of it.

    Attributes:
        scheme: name of the scheme, as in the catalog.
        owner: who owns the key: a public key or a name.
        layers: the host layers, in the order in which signatures are laid over them.
        triggers: shape of the trigger set, or None.
        nonce: 16 random bytes that tell apart two keys of one owner for one model.
        classes: names of the classes that triggers are labelled with, in their order; None where
            they were not known. Every label depends on them, so that choosing names for a
            network that is there already is drawing seeds.
        anchor: SHA-256 (hex, as `arrays_digest`) of the network before the mark, which suspects are
            aligned to; None where there is none. As with names, choosing another is drawing seeds.
        answers: form of a mark in answers to ordinary inputs; None where there is none.
        order: form of a mark in the order of hidden units; None where there is none.
    """

    scheme: str
    owner: str
    layers: tuple[LayerShape, ...]
    triggers: TriggerShape | None
    nonce: bytes
    classes: tuple[str, ...] | None = None
    anchor: str | None = None
    answers: AnswersForm | None = None
    order: OrderForm | None = None

    def __post_init__(self) -> None:
        _check_name(self.scheme, "scheme")
        _check_name(self.owner, "owner")
        nonce = isinstance(self.nonce, bytes) and len(self.nonce) == NONCE_BYTES
        require(nonce, "a nonce of another size", f"{NONCE_BYTES} bytes")
        count = len(self.layers)
        require(count <= MAX_LAYERS, f"{count} layers", f"at most {MAX_LAYERS}")
        for layer in self.layers:
            _check_layer(layer)
        distinct = len({layer.name for layer in self.layers})
        require(distinct == count, f"{count - distinct} repeated layer names", "distinct ones")
        if self.triggers is not None:
            _check_triggers(self.triggers)
        if self.classes is not None:
            _check_classes(self.classes, self.triggers)
        if self.anchor is not None:
            digest = isinstance(self.anchor, str) and _DIGEST.fullmatch(self.anchor)
            require(bool(digest), "an anchor that is no digest", "64 lower-case hex digits")
        if self.answers is not None:
            _check_answers(self.answers)
        if self.order is not None:
            _check_order(self.order)
        validity.check(self)

    @property
    def bits(self) -> int:
        """Signature bits of all layers, the coins of a mark in answers, the units of an order."""
        coins = 0 if self.answers is None else self.answers.coins
        coins += 0 if self.order is None else sum(self.order.units)
        return coins + sum(layer.length for layer in self.layers)

    def layer(self, name: str) -> LayerShape:
        """The layer called `name`.

        Raises:
            UnreadableKeyError: the context has no such layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = ", ".join(layer.name for layer in self.layers[:20]) or "none"
        raise UnreadableKeyError(f"the key has no layer {name!r:.80}; its layers are: {names}")

    def by_layer(self) -> Self:
        """The same layers with one passport for each, as in the paper, and no anchor.

        What a forger makes of it: he solves for passports of whole layers. One has the shape of a
        filter then, which a layer can be applied to.
        """
        layers = tuple(layer._replace(channels=None) for layer in self.layers)
        return replace(self, layers=layers, anchor=None)

    def encode(self) -> bytes:
        """The one encoding of this context: sorted keys, ASCII, no whitespace, no floats."""
        layers = [_fields_of(layer) for layer in self.layers]
        # Absent, not null: contexts without names or an anchor encode as ever.
        answers = None if self.answers is None else self.answers._asdict()
        order = None if self.order is None else _order_fields(self.order)
        given = {"classes": self.classes, "anchor": self.anchor, "answers": answers, "order": order}
        return canonical_json(
            {
                **{name: value for name, value in given.items() if value is not None},
                "format": _FORMAT,
                "version": _VERSION,
                "scheme": self.scheme,
                "owner": self.owner,
                "layers": layers,
                "triggers": None if self.triggers is None else self.triggers._asdict(),
                "nonce": self.nonce.hex(),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The context that `data` encodes.

        Raises:
            UnreadableKeyError: anything but the canonical encoding of a sane context.
        """
        document = parse_canonical(data, "context", limit=_MAX_JSON)
        try:
            context = cls(
                scheme=document["scheme"],
                owner=document["owner"],
                layers=tuple(_layer_from(layer) for layer in document["layers"]),
                triggers=_triggers_from(document["triggers"]),
                nonce=bytes.fromhex(document["nonce"]),
                classes=_tuples(document.get("classes")),
                anchor=document.get("anchor"),
                answers=_answers_from(document.get("answers")),
                order=_order_from(document.get("order")),
            )
            canonical = context.encode() == data
        except UnreadableKeyError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            canonical = False
        # Encoding again also catches unknown keys, another version, and "true" for 1.
        if not canonical:
            raise UnreadableKeyError(
                f"the bytes given are not the encoding of a {_FORMAT} version {_VERSION}; needed: "
                "exactly the bytes that Context.encode wrote; use the original file"
            )
        return context


def canonical_json(value: Any) -> bytes:
    """The only encoding in use: ASCII JSON, sorted keys, no whitespace."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


def parse_canonical(data: bytes, what: str, *, limit: int) -> dict[str, Any]:
    """The JSON object that `data` is the canonical encoding of.

    Raises:
        UnreadableKeyError: more than `limit` bytes, no JSON object, or not in canonical form.
    """
    if len(data) > limit:
        raise UnreadableKeyError(
            f"the {what} has {len(data)} bytes, but at most {limit} are read; use the original file"
        )
    # A value takes two bytes of JSON and a hundred of memory. Each but the first of a list or an
    # object needs a comma, and how deep they nest is limited by the parser.
    if data.count(b",") > _MAX_COMMAS:
        raise UnreadableKeyError(
            f"the {what} has more than {_MAX_COMMAS} commas, too many for one of ours; use the "
            "original file"
        )
    try:
        document = json.loads(data.decode("ascii"))
        canonical = isinstance(document, dict) and canonical_json(document) == data
    except (ValueError, RecursionError):
        canonical = False
    # Raised out here because the JSON error would carry the whole document, secrets included.
    if not canonical:
        raise UnreadableKeyError(
            f"the {what} is not a canonical JSON object (sorted keys, ASCII, no whitespace); it is "
            "corrupt or was edited: use the original file or a backup"
        )
    return document


def base64_text(data: bytes) -> str:
    """The bytes in base64, padded, without line breaks."""
    return base64.b64encode(data).decode("ascii")


def base64_bytes(text: str) -> bytes:
    """The bytes that `text` is the only base64 of.

    Raises:
        ValueError: `text` is not what `base64_text` writes.
    """
    data = base64.b64decode(text.encode("ascii"), validate=True)
    # The last characters of base64 have spare bits: several texts would give the same bytes.
    if base64_text(data) != text:
        raise ValueError("not canonical base64")
    return data


def check_member(context: Context, layer: LayerShape) -> None:
    """Refuse a layer that `context` does not have, or has in another shape.

    Raises:
        UnreadableKeyError: naming the layer.
    """
    given = f"no layer {layer.name!r:.80} of this shape"
    require(layer in context.layers, given, "the layer that bits or passports are derived for")


def _fields_of(layer: LayerShape) -> dict[str, Any]:
    geometry = layer.geometry._asdict()
    fields = {**layer._asdict(), "geometry": geometry}
    # Absent, not null: contexts without projections or transposed layers encode as ever.
    if layer.bits is None:
        del fields["bits"]
    if layer.channels is None:
        del fields["channels"]
    else:
        fields["channels"] = layer.channels._asdict()
    for name, usual in Geometry._field_defaults.items():
        if name in {"transposed", "output_padding"} and geometry[name] == usual:
            del geometry[name]
    return fields


def _layer_from(fields: Any) -> LayerShape:
    geometry = {key: _tuples(value) for key, value in fields["geometry"].items()}
    shape = {key: _tuples(value) for key, value in fields.items()}
    if "channels" in fields:
        form = {key: _tuples(value) for key, value in fields["channels"].items()}
        shape["channels"] = ChannelForm(**form)
    return LayerShape(**{**shape, "geometry": Geometry(**geometry)})


def _triggers_from(fields: Any) -> TriggerShape | None:
    if fields is None:
        return None
    return TriggerShape(**{key: _tuples(value) for key, value in fields.items()})


def _answers_from(fields: Any) -> AnswersForm | None:
    return None if fields is None else AnswersForm(**fields)


def _order_fields(form: OrderForm) -> dict[str, Any]:
    return {**form._asdict(), "axes": [axis._asdict() for axis in form.axes]}


def _order_from(fields: Any) -> OrderForm | None:
    if fields is None:
        return None
    axes = tuple(OrderedAxis(**{k: _tuples(v) for k, v in each.items()}) for each in fields["axes"])
    return OrderForm(**{**fields, "axes": axes})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check_name(value: Any, what: str) -> None:
    text = isinstance(value, str) and 1 <= len(value) <= _MAX_NAME
    whole = text and not any("\ud800" <= letter <= "\udfff" for letter in value)
    require(whole, f"an unusable {what}", f"1 to {_MAX_NAME} characters of Unicode text")


def _check_layer(layer: LayerShape) -> None:
    name, weight, passport, geometry, bits, channels = layer
    _check_name(name, "layer name")
    where = f"layer {name!r:.80} with"
    lengths = () if bits is None else (bits,)
    for sizes in (
        *(weight, passport, geometry.stride, geometry.dilation, (geometry.groups,)),
        lengths,
    ):
        valid = isinstance(sizes, tuple) and all(_is_count(size, 1) for size in sizes)
        require(valid, f"{where} shape {sizes!r:.80}", f"integers from 1 to {_MAX_AXIS}")
    require(
        _is_padding(geometry.padding) and geometry.padding_mode in _PADDING_MODES,
        f"{where} padding {geometry.padding!r:.80} ({geometry.padding_mode!r:.20})",
        f"pairs of integers from 0 and a mode of {', '.join(_PADDING_MODES)}",
    )
    require(
        type(geometry.transposed) is bool and _is_output_padding(geometry),
        f"{where} output padding {geometry.output_padding!r:.80}",
        "a number from 0 below the stride or the dilation for each axis of a transposed layer",
    )
    if channels is not None:
        _check_channels(layer)
    require(
        _ranks_agree(layer) and (channels is not None or positions(layer) is not None),
        f"{where} weight {weight!r:.80} and passport {passport!r:.80}",
        "a passport (in, *space) that the layer can be applied to",
    )


def _check_channels(layer: LayerShape) -> None:
    """A layer whose channels have a passport each, of a filter's own shape."""
    name, weight, passport, geometry, _, form = layer
    where = f"layer {name!r:.80} with"
    norm, gains, carriers, metric = form or ChannelForm("", (0, 0))
    if norm != "":
        _check_name(norm, "name of a norm")
    filters = (weight[1] * geometry.groups, *(weight[2:] or (1,)))
    require(
        passport == filters, f"{where} a passport {passport!r:.80} a channel", f"{filters!r:.80}"
    )
    require(
        isinstance(gains, tuple)
        and len(gains) == 2
        and all(type(gain) is int and 1 <= gain <= _MAX_GAIN for gain in gains),
        f"{where} gains {gains!r:.80}",
        f"two integers from 1 to {_MAX_GAIN}",
    )
    require(
        isinstance(metric, str) and re.fullmatch("([0-9a-f]{64})?", metric) is not None,
        f"{where} the digest {metric!r:.80}",
        "SHA-256 in hexadecimal, or nothing",
    )
    require(
        carriers is None or _is_bitmap(carriers, weight[0]),
        f"{where} {carriers!r:.40} for its {weight[0]} channels",
        "a bit for each, one of them set and one not, in hexadecimal",
    )


def _is_bitmap(text: Any, channels: int) -> bool:
    size = (channels + 7) // 8
    if not isinstance(text, str) or re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text) is None:
        return False
    spare = int(text, 16) & ((1 << (8 * size - channels)) - 1)
    return spare == 0 and 0 < int(text, 16).bit_count() < channels


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _MAX_AXIS


def _is_padding(padding: Any) -> bool:
    return isinstance(padding, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and all(_is_count(side, 0) for side in pair)
        for pair in padding
    )


def _ranks_agree(layer: LayerShape) -> bool:
    _, weight, passport, geometry, *_ = layer
    axes = geometry.axes
    return (
        axes <= 3
        and (axes > 0 or geometry.groups == 1)
        and len(weight) == axes + 2
        and len(passport) == max(axes, 1) + 1
        and len(geometry.padding) == len(geometry.dilation) == axes
        and weight[1] * geometry.groups == passport[0]
        and weight[0] % geometry.groups == 0
    )


def _is_output_padding(geometry: Geometry) -> bool:
    extra = geometry.output_padding
    if not geometry.transposed or geometry.axes == 0:
        return extra == ()
    return (
        isinstance(extra, tuple)
        and len(extra) == len(geometry.stride) == len(geometry.dilation)
        and all(_is_count(each, 0) for each in extra)
        and all(
            each < max(stride, dilation)
            for each, stride, dilation in zip(
                extra, geometry.stride, geometry.dilation, strict=True
            )
        )
        and geometry.padding_mode == "zeros"
    )


def _check_triggers(triggers: TriggerShape) -> None:
    count, classes, size = triggers
    valid = isinstance(size, tuple) and len(size) == 3
    require(
        valid
        and all(_is_count(number, 1) for number in (count, *size))
        and _is_count(classes, 2)
        and count * math.prod(size) <= MAX_NUMBERS,
        f"a trigger set of {count!r:.20} images of {size!r:.80} in {classes!r:.20} classes",
        f"at least one image (channel, height, width), 2 classes and at most {MAX_NUMBERS} numbers",
    )


def _check_answers(form: AnswersForm) -> None:
    kind, coins, strength = form
    known = validity.FUNCTIONS
    require(
        isinstance(kind, str) and kind in known,
        f"functions of kind {kind!r:.40}",
        f"one of: {', '.join(known)}",
    )
    require(
        type(coins) is int and 1 <= coins <= validity.MAX_COINS,
        f"{coins!r:.40} coins",
        f"1 to {validity.MAX_COINS} of them",
    )
    require(
        type(strength) is int and 1 <= strength <= validity.MAX_STRENGTH,
        f"a strength of {strength!r:.40} thousandths",
        f"1 to {validity.MAX_STRENGTH}",
    )


def _check_order(form: OrderForm) -> None:
    for what, digest in (("a table", form.table), ("a sketch", form.sketch)):
        require(
            isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None,
            f"{what} that is no digest",
            "64 lower-case hex digits",
        )
    require(
        isinstance(form.axes, tuple) and 1 <= len(form.axes) <= validity.MOST_AXES,
        "no axes whose order is read, or too many",
        f"1 to {validity.MOST_AXES}",
    )
    for axis in form.axes:
        _check_ordered(axis)
    numbers, names = {axis.number for axis in form.axes}, _names(form)
    require(
        len(numbers) == len(form.axes) and len(set(names)) == len(names),
        "an axis, or a tensor, whose order is read twice",
        "each of them once",
    )


def _names(form: OrderForm) -> list[str]:
    return [name for axis in form.axes for name, _ in axis.tensors]


def _check_ordered(axis: OrderedAxis) -> None:
    number, units, tensors = axis
    require(
        type(number) is int
        and 0 <= number < _MOST_NUMBERED
        and type(units) is int
        and validity.FEWEST_UNITS <= units <= validity.MOST_UNITS,
        f"axis {number!r:.20} of {units!r:.20} units",
        f"one of the first {_MOST_NUMBERED}, of {validity.FEWEST_UNITS} to {validity.MOST_UNITS}",
    )
    valid = isinstance(tensors, tuple) and 1 <= len(tensors) <= validity.MOST_TENSORS
    for each in tensors if valid else ():
        valid = valid and isinstance(each, tuple) and len(each) == 2
        if valid:
            _check_name(each[0], "name of a tensor")
            valid = isinstance(each[1], tuple) and 2 <= len(each[1]) <= _MOST_DIMENSIONS
            valid = valid and all(_is_count(side, 1) for side in each[1])
            valid = valid and math.prod(each[1]) <= validity.MOST_WEIGHT
    require(
        valid,
        f"axis {number} in {tensors!r:.80}",
        f"1 to {validity.MOST_TENSORS} names of tensors with their shapes",
    )


def _check_classes(classes: Any, triggers: TriggerShape | None) -> None:
    count = 0 if triggers is None else triggers.classes
    require(
        isinstance(classes, tuple) and len(classes) == count,
        f"names of {len(classes) if isinstance(classes, tuple) else 'no'} classes",
        f"one for each of the {count} that its triggers have",
    )
    for name in classes:
        _check_name(name, "class name")
    require(len(set(classes)) == count, "class names that repeat", "distinct ones")
