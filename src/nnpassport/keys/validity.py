"""Which contexts a scheme can have made, and what a key of one takes to derive and to read.

There is no `Context` that `check` has not passed, so that whoever reads a key or a claim, and
whoever runs V, has one that its scheme would have made. Why that matters: the p-value rests on one
coin for each trial. A layer that says how many bits it has, where its scheme reads one for each
channel, would have one coin decide over all of them.

Costs are those of the arrays that will be allocated, in bytes, and are refused before one is.
"""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from nnpassport.scheme import UnreadableKeyError

if TYPE_CHECKING:
    from nnpassport.keys.context import Context, LayerShape

GROUP = 16
"""Pictures in a group of DeepSigns."""
USERS = 31
"""Users whom DeepMarks' code tells apart, and positions of the code."""
LEAST_REPEATS = 2
"""Times that DeepMarks' code is there at least."""
LEAST_ROW = 16
"""Numbers of a weight that a bit of greedy residuals needs."""

FUNCTIONS = ("layout", "filters", "mirrored", "counts", "waves")
"""Kinds of functions that a mark in answers is made of; `keys/answers.py` says what they are."""
MAX_COINS = 2**12
"""Most coins of a mark in answers: the exact tail takes time in their square."""
MAX_STRENGTH = 100_000
"""Largest ε of a mark in answers, in thousandths."""
MAX_FEATURES = 512
"""Most numbers that functions are made of, for each input."""
MAX_DIRECTIONS = 2**25
"""Most numbers in the directions of a key's waves: pixels times coins."""

MOST_AXES = 64
"""Axes whose order is read, at most; the others are permuted all the same."""
FEWEST_UNITS = 12
"""An axis of fewer says too little: even if all stay in order, p is not below 1/11!."""
MOST_UNITS = 512
"""Units of an axis that are matched, at most; of a longer one as many are drawn."""
MOST_TENSORS = 8
"""Tensors that the units of an axis are told by, at most."""
SKETCHED = 128
"""Numbers that a key keeps of a unit, about: shared among its axis' tensors."""

MAX_NUMBERS = 2**28
"""Most numbers in all passports, all projections or all trigger images of one key."""
MAX_BITS = 2**25
"""Most signature bits of one key: an exact tail takes `_TAIL` bytes for each."""
MAX_BYTES = 3 * 2**30
"""Most bytes that the arrays of a key take at one time."""
MAX_PRODUCTS = 2**36
"""Most products while all passports slide; `_LAYER_PRODUCTS` is that of one layer."""

_LAYER_PRODUCTS = 2**27
MOST_WEIGHT = 2**40  # numbers of one layer's weight
_TAIL = 60  # bytes for each trial: `statistics.log_binomial_tail`
_DRAWN = 7  # bytes for each number drawn: of the stream, the mask, what it keeps, as float32
_WIDE = 12  # bytes for each number of a passport that slides: as float32 and as float64
_AT_ONCE = 24  # bytes for each number of a projection that is being read: float64, three times
_CHUNK = 2**22  # numbers at a time: where a projection is read, or pictures are made
_PICTURE = 80  # bytes for each number of a picture while it is made: 64-bit integers
_GRID, _SHAPES = 25, 4  # bytes of a channel's colours; shapes of 8 bytes and one for each channel


class Cost(NamedTuple):
    """What a layer, or the pictures, of a key take.

    Attributes:
        numbers: that are drawn.
        padded: numbers of a passport with its padding, or of what a transposed layer makes of it.
        products: while a passport slides.
        bytes: at most at one time.
    """

    numbers: int
    padded: int
    products: int
    bytes: int


def check(context: "Context") -> None:
    """Refuse a context that its scheme would not have made, or whose key would take too much.

    Fields have been checked one by one before. A scheme that is not of the catalog is held to the
    costs alone.

    Raises:
        UnreadableKeyError: naming what is wrong, and what the scheme needs.
    """
    for layer in context.layers:
        numbers = math.prod(layer.weight)
        given = f"a weight of {numbers:.1e} numbers"
        require(numbers <= MOST_WEIGHT, given, f"at most {MOST_WEIGHT}")
    rule = RULES.get(context.scheme)
    if rule is not None:
        rule(context)
    if rule is not _passports:
        _no_channels(context)
    if rule is not _coins:
        require(context.answers is None, "a form of answers", f"none for {context.scheme}")
    if rule is not _order:
        require(context.order is None, "a form of orders", f"none for {context.scheme}")
    _check_costs(context)


def _check_costs(context: "Context") -> None:
    costs = [cost_of(layer) for layer in context.layers]
    whole = Cost(*(sum(each) for each in zip(*costs, strict=True))) if costs else Cost(0, 0, 0, 0)
    # Words before the number say of what: a test, or a reader, looks for them.
    for given, most in (
        ("{} passport numbers", (whole.numbers, MAX_NUMBERS)),
        ("{} numbers with padding", (whole.padded, MAX_NUMBERS)),
        ("{} products", (whole.products, MAX_PRODUCTS)),
        ("a layer of {} products", (max((c.products for c in costs), default=0), _LAYER_PRODUCTS)),
        ("mean patches of {} bytes", (sum(map(_patch_bytes, context.layers)), MAX_BYTES)),
        ("a layer of {} bytes", (max((c.bytes for c in costs), default=0), MAX_BYTES)),
        ("{} signature bits", (context.bits, MAX_BITS)),
        ("pictures of {} bytes", (_pictures_bytes(context), MAX_BYTES)),
    ):
        number, limit = most
        require(number <= limit, given.format(number), f"at most {limit}")


def cost_of(layer: "LayerShape") -> Cost:
    """What deriving a layer's secrets and reading its bits takes."""
    signs = _TAIL * layer.length
    if layer.bits is not None:  # a projection: nothing slides
        numbers = layer.length * math.prod(layer.passport)
        read = 4 * numbers + _AT_ONCE * min(numbers, max(_CHUNK, math.prod(layer.passport)))
        return Cost(numbers, 0, 0, signs + max(_DRAWN * numbers, read) + _forms_bytes(layer))
    if layer.channels is not None:  # drawn and read some channels at a time
        numbers = 2 * math.prod(layer.weight)
        row = 2 * math.prod(layer.weight[1:])
        return Cost(numbers, 0, 0, signs + _AT_ONCE * min(numbers, max(_CHUNK, row)))
    numbers = 2 * math.prod(layer.passport)
    padded, products = sliding(layer)
    read = _WIDE * numbers + 2 * 8 * padded + 16 * products
    return Cost(numbers, padded, products, signs + max(_DRAWN * numbers, read))


def _patch_bytes(layer: "LayerShape") -> int:
    """What is kept of a passport, both parts in float64, while the whole key is presented."""
    _, weight, passport, _, bits, channels = layer
    if channels is not None:  # as large as the weight, and kept in its own precision
        return 2 * 4 * math.prod(weight)
    return 2 * 8 * passport[0] * math.prod(weight[2:]) if bits is None else 0


def _forms_bytes(layer: "LayerShape") -> int:
    """What greedy residuals' forms take: for each number of a filter, which stretch it is in."""
    fan_in = math.prod(layer.weight[1:])
    row = math.prod(layer.weight) // layer.length
    return 0 if row == 0 else 12 * fan_in * (fan_in // row + 1)


def _pictures_bytes(context: "Context") -> int:
    if context.triggers is None:
        return 0
    count, _, size = context.triggers
    each = _GRID * size[0] + _SHAPES * (8 + size[0])
    one = max(math.prod(size), each)
    made = _PICTURE * min(count * one, max(_CHUNK, one))
    return 2 * count * each + 2 * count * math.prod(size) + 40 * count + made


def positions(layer: "LayerShape") -> tuple[int, ...] | None:
    """Sides of what the layer makes of its passport; None if it cannot be applied to it."""
    _, weight, passport, geometry, *_ = layer
    if geometry.axes == 0:
        return passport[1:]
    margins = {"reflect": 1, "circular": 0}
    extras = geometry.output_padding or (0,) * geometry.axes
    sides = []
    for kernel, size, pads, dilation, stride, extra in zip(
        *(weight[2:], passport[1:], geometry.padding, geometry.dilation, geometry.stride, extras),
        strict=True,
    ):
        reach = dilation * (kernel - 1)
        if geometry.transposed:
            side = (size - 1) * stride + reach + 1 + extra - sum(pads)
            fits = pads[0] == pads[1]
        else:
            side = (size + sum(pads) - reach - 1) // stride + 1
            widest = size - margins.get(geometry.padding_mode, size - max(pads))
            fits = reach < size + sum(pads) and max(pads) <= widest
        if side < 1 or not fits:
            return None
        sides.append(side)
    return tuple(sides)


def sliding(layer: "LayerShape") -> tuple[int, int]:
    """What reading bits through the layer takes: numbers of its padded passport, and products."""
    _, weight, passport, geometry, bits, channels = layer
    if bits is not None or channels is not None:  # no passport slides
        return 0, 0
    inputs, *space = passport
    # A Linear has no padding and meets each position once; a transposed layer meets each position
    # of its input with the whole kernel, and pads its output.
    padding = geometry.padding or ((0, 0),)
    reached = positions(layer) or ()
    if geometry.transposed:
        sides, met = [*map(max, zip(space, reached, strict=True))], math.prod(space)
    else:
        sides = [size + sum(pair) for size, pair in zip(space, padding, strict=True)]
        met = math.prod(reached)
    return inputs * math.prod(sides), inputs * math.prod(weight[2:]) * met


def _passports(context: "Context") -> None:
    """Any layers, a bit for each channel that carries one; triggers if the owner wanted some.

    Either every channel has a passport of its own, or every layer has one, as in the paper.
    """
    forms = {layer.channels is not None for layer in context.layers}
    require(
        len(forms) < 2, "passports of channels and of layers", "those of channels, or of layers"
    )
    _one_each(context)


def _layer_passports(context: "Context") -> None:
    """The same, with one passport for each layer: PAN's small network mixes the channels."""
    _one_each(context)


def _one_each(context: "Context") -> None:
    require(bool(context.layers), "no layer", "one or more that carry a passport")
    for layer in context.layers:
        require(
            layer.bits is None,
            f"{layer.bits} bits for layer {layer.name!r:.80}",
            f"no number of them: {context.scheme} reads one for each of its channels",
        )


def _projection(context: "Context") -> None:
    """One layer whose mean filter is read through a projection, with a number for each bit."""
    layer = _read_as_it_is(context)
    fan_in = math.prod(layer.passport)
    require(
        layer.length <= fan_in,
        f"{layer.length} bits for filters of {fan_in} numbers",
        "no more bits than a filter has numbers",
    )


def _words(context: "Context") -> None:
    """The same, and the bits are whole codewords."""
    _projection(context)
    repeats, rest = divmod(context.bits, USERS)
    require(
        rest == 0 and repeats >= LEAST_REPEATS,
        f"{context.bits} bits for codewords of {USERS}",
        f"a multiple, and at least {LEAST_REPEATS} of them",
    )


def _rows(context: "Context") -> None:
    """One layer whose weight is cut into a row for each bit."""
    layer = _read_as_it_is(context)
    numbers = math.prod(layer.weight)
    require(
        numbers >= LEAST_ROW * layer.length,
        f"{layer.length} bits for a weight of {numbers} numbers",
        f"{LEAST_ROW} numbers for each bit",
    )


def _activations(context: "Context") -> None:
    """One layer whose input is read through a projection, for groups of pictures."""
    layer, triggers = _one_layer(context), context.triggers
    groups, rest = (0, 0) if triggers is None else divmod(triggers.count, GROUP)
    bits = layer.bits or 0
    require(
        groups > 0 and rest == 0 and bits > 0 and bits % groups == 0,
        f"{bits} bits for {'no' if triggers is None else triggers.count} pictures",
        f"groups of {GROUP} pictures, and as many bits for each",
    )
    fits = layer.geometry.axes > 0 or layer.passport == (layer.weight[1], 1)
    require(fits, f"what layer {layer.name!r:.80} receives as {layer.passport!r:.80}", "(in, 1)")


def _answers(context: "Context") -> None:
    """Pictures and no layer."""
    require(not context.layers, f"{len(context.layers)} layers", f"none for {context.scheme}")
    require(context.triggers is not None, "no triggers", f"pictures for {context.scheme}")


def _coins(context: "Context") -> None:
    """Ordinary inputs, and a sign for each function; no layer."""
    require(not context.layers, f"{len(context.layers)} layers", f"none for {context.scheme}")
    triggers, form = context.triggers, context.answers
    if triggers is None or form is None:
        require(False, "no inputs or no functions", f"both for {context.scheme}")
        return
    flat = triggers.size[:2] == (1, 1)
    waves = context.scheme == "cosine"
    require(
        (form.kind == "waves") == waves,
        f"functions of kind {form.kind!r}",
        f"{'waves' if waves else 'another kind'} for {context.scheme}",
    )
    require(
        not waves or form.coins <= min(MAX_FEATURES, MAX_DIRECTIONS // math.prod(triggers.size)),
        f"{form.coins} waves of pictures of {triggers.size!r:.80}",
        f"at most {MAX_FEATURES}, and {MAX_DIRECTIONS} numbers in their directions",
    )
    require(
        (form.kind == "counts") == flat,
        f"functions of kind {form.kind!r} of inputs of {triggers.size!r:.80}",
        "counts of (1, 1, how many), or another kind of pictures",
    )
    numbers = triggers.count * (triggers.classes + MAX_FEATURES + form.coins)
    require(
        numbers <= MAX_NUMBERS,
        f"{triggers.count} inputs in {triggers.classes} classes for {form.coins} coins",
        f"at most {MAX_NUMBERS} numbers that are made of them",
    )


def _order(context: "Context") -> None:
    """Units of a network that is there already, and nothing else."""
    require(not context.layers, f"{len(context.layers)} layers", f"none for {context.scheme}")
    _no_triggers(context)
    require(
        context.order is not None and context.anchor is not None,
        "no form of orders or no anchor",
        f"both for {context.scheme}",
    )


def _adapters(context: "Context") -> None:
    """Any layers, a bit and a row of the projection for each channel."""
    require(bool(context.layers), "no layer", "one or more that an adapter changes")
    _no_triggers(context)
    for layer in context.layers:
        require(
            layer.bits == layer.weight[0],
            f"{layer.bits} bits for the {layer.weight[0]} channels of layer {layer.name!r:.80}",
            "one for each",
        )
        _check_not_sliding(layer)


RULES: Mapping[str, Callable[["Context"], None]] = {
    "passport-v1": _passports,
    "passport-v2": _passports,
    "passport-v3": _passports,
    "pan": _layer_passports,
    "uchida": _projection,
    "uchida-mse": _projection,
    "deepmarks": _words,
    "greedy-residuals": _rows,
    "deepsigns": _activations,
    "adi": _answers,
    "zhang-content": _answers,
    "zhang-noise": _answers,
    "zhang-unrelated": _answers,
    "guo": _answers,
    "deepsigns-blackbox": _answers,
    "frontier-stitching": _answers,
    "ewe": _answers,
    "answers": _coins,
    "cosine": _coins,
    "order": _order,
    "lora": _adapters,
}
"""By scheme, what its contexts are."""


def _one_layer(context: "Context") -> "LayerShape":
    count = len(context.layers)
    require(count == 1, f"{count} layers", f"the one that {context.scheme} reads")
    return context.layers[0]


def _no_channels(context: "Context") -> None:
    for layer in context.layers:
        require(
            layer.channels is None,
            f"a passport for each channel of layer {layer.name!r:.80}",
            f"none: {context.scheme} has no such passports",
        )


def _no_triggers(context: "Context") -> None:
    require(context.triggers is None, "triggers", f"none for {context.scheme}")


def _read_as_it_is(context: "Context") -> "LayerShape":
    """The one layer, whose filters are read without sliding, so many bits of it."""
    layer = _one_layer(context)
    _no_triggers(context)
    require(layer.bits is not None, "no number of bits", f"that of {context.scheme}")
    _check_not_sliding(layer)
    return layer


def _check_not_sliding(layer: "LayerShape") -> None:
    """A filter is read as it is, however its layer slides: the geometry says nothing of it."""
    axes = layer.geometry.axes
    plain = layer.geometry._replace(
        stride=(1,) * axes,
        padding=((0, 0),) * axes,
        dilation=(1,) * axes,
        groups=1,
        padding_mode="zeros",
        output_padding=(0,) * axes if layer.geometry.transposed else (),
    )
    read = layer.weight[1:] if axes else (layer.weight[1], 1)
    require(
        layer.geometry == plain and layer.passport == read,
        f"layer {layer.name!r:.80} with filters of {layer.weight[1:]!r:.80} read as "
        f"{layer.passport!r:.80}, sliding",
        "them as they are: one group, and no stride, padding or dilation",
    )


def require(holds: bool, given: str, needed: str) -> None:
    """Refuse a context.

    Raises:
        UnreadableKeyError: what is needed does not hold.
    """
    if not holds:
        raise UnreadableKeyError(
            f"the key's context has {given}, but needs {needed}; draw a new key for this model"
        )
