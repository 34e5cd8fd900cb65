"""Contexts that a forger would like, and twenty networks that know nothing of his seeds.

`spoiled` makes context n of a scheme out of genuine ones: other numbers of bits, other shapes,
layers twice, geometries that make every patch the same. `least` derives a key of it and reads the
networks: whatever a context says, no p may be below what the number of tries allows.
"""

import functools
import hashlib
import json
import math
from dataclasses import replace
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.catalog import ADAPTERS, CATALOG, scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.equations import Geometry, filters, geometry_of
from nnpassport.keys.answers import KINDS
from nnpassport.keys.context import (
    AnswersForm,
    Context,
    LayerShape,
    OrderForm,
    TriggerShape,
    canonical_json,
)
from nnpassport.keys.key import Key, sketch_digest
from nnpassport.keys.ordered import chosen_axes, sketch_of
from nnpassport.scheme import OwnershipError

SCHEMES = (*CATALOG, *ADAPTERS)
EACH = 2
"""How many of the networks, in turn, are read with one key."""
ALLOWED = -12.0
"""log₁₀ p that 10⁵ contexts and their readings reach once in a million runs: one key is enough."""
CORRECTED = -3.0
"""log₁₀ of the least p of a scheme, multiplied by how many there were (Bonferroni), at least."""

ANCHOR = "ab" * 32
SOUND = 2
"""So many tables of axes are such as a trace may find."""
SIZE = (1, 5, 5)
CLASSES = 10
PICTURES = {"zhang-content", "zhang-noise", "guo", "deepsigns", "deepsigns-blackbox", "ewe"}
_MOST = 2**14  # numbers of pictures that are worth their time
_PASSPORT = (5, 4)


class Grouped(nn.Conv2d):
    """A convolution in groups, computed without them: in groups it takes five times as long."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self._dense, self.bias, padding=self.padding)

    @functools.cached_property
    def _dense(self) -> torch.Tensor:
        out, fan_in = self.weight.shape[:2]
        dense = self.weight.new_zeros(out, self.in_channels, *self.kernel_size)
        for channel, row in enumerate(self.weight):
            first = channel * self.groups // out * fan_in
            dense[channel, first : first + fan_in] = row
        return dense


class Network(nn.Module):
    """A layer of every kind; those that an image goes through, and some beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, padding=1)
        self.b = Grouped(16, 12, 3, padding=1, groups=4)
        self.c = nn.Conv2d(12, 16, 3, padding=1)
        self.d = nn.ConvTranspose2d(16, 12, 3, groups=2)
        self.e = nn.Conv1d(16, 16, 5)
        self.one = nn.Linear(1, 40)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


@functools.cache
def networks() -> list[nn.Module]:
    """Twenty of them: as initialised, and such as would suit who looks for a statistic."""
    found = []
    for number in range(20):
        rng = torch.Generator().manual_seed(number)
        model = Network().eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            noise = torch.randn(parameter.shape, generator=rng)
            row = noise[:1].expand_as(noise) if noise.dim() > 1 else noise
            parameter.copy_(
                {
                    8: torch.ones_like(noise),  # all signs alike
                    9: -torch.ones_like(noise),
                    10: row,  # one filter for all channels
                    11: row * noise.flatten(1).mean(1).sign().view(-1, *[1] * (noise.dim() - 1))
                    if noise.dim() > 1
                    else noise,
                    12: torch.zeros_like(noise),
                    13: noise * math.nan,
                    14: noise * 1e30,
                    15: noise.abs(),
                    16: noise.sort().values,
                    17: noise * (noise.abs() > 1.5),
                    18: noise.sign(),
                }.get(number, noise)
            )
        found.append(model)
    return found


@functools.cache
def _state(number: int) -> dict[str, torch.Tensor]:
    """Weights of a network; every other one has an adapter too."""
    state = dict(networks()[number].state_dict())
    if number % 2:
        rng = torch.Generator().manual_seed(100 + number)
        for name in ("a", "c", "fc"):
            out, fan_in = state[f"{name}.weight"].flatten(1).shape
            state[f"{name}.lora_A.weight"] = torch.randn(2, fan_in, generator=rng)
            state[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=rng)
    return state


@functools.cache
def genuine(scheme: str) -> tuple[bytes, ...]:
    """Contexts that the scheme would make for such networks."""
    if scheme in {"answers", "cosine"}:
        shape = TriggerShape(200, CLASSES, SIZE)
        kinds = ("waves",) if scheme == "cosine" else ("layout", "filters", "mirrored")
        forms = [AnswersForm(kind, 64, 400) for kind in kinds]
        made = [Context(scheme, "Eve", (), shape, bytes(16), answers=form) for form in forms]
        return tuple(context.encode() for context in made)
    if scheme == "order":
        chosen = [chosen_axes(table, _arrays()) for table in tables()[:SOUND]]
        forms = [OrderForm(f"{n:064x}", "0" * 64, axes) for n, axes in enumerate(chosen)]
        made = [Context(scheme, "Eve", (), None, bytes(16), None, ANCHOR, order=f) for f in forms]
        return tuple(context.encode() for context in made)
    if scheme in CATALOG and not scheme_named(scheme).parts - {"triggers"} and _answers(scheme):
        layered: list[tuple[LayerShape, ...]] = [()]
    elif scheme == "lora":
        layered = [tuple(_as_read(name, None) for name in ("a", "c", "fc")), (_as_read("c", None),)]
    elif scheme.startswith("passport") or scheme == "pan":
        pairs = (("a", "b"), ("c",), ("one", "d"), ("e", "fc"), ("a", "one", "fc"))
        layered = [tuple(map(_sliding, names)) for names in pairs]
    elif scheme == "deepsigns":
        layered = [(LayerShape("fc", (CLASSES, 16), (16, 1), Geometry(), 32),)]
        shape = _sliding("b")
        layered += [(shape._replace(passport=(16, *SIZE[1:]), bits=16),)]
    else:
        bits = 62 if scheme == "deepmarks" else 48
        layered = [(_as_read("c", bits),)]
    count = 32 if scheme == "deepsigns" else 24
    triggered = scheme == "passport-v3" or _answers(scheme) or scheme == "deepsigns"
    triggers = TriggerShape(count, CLASSES, SIZE) if triggered else None
    return tuple(Context(scheme, "Eve", each, triggers, bytes(16)).encode() for each in layered)


@functools.cache
def tables() -> tuple[Axes, ...]:
    """Tables of axes of such networks: sound ones, and such as a forger would write."""
    stream = (Place("c.weight", 0), Place("c.bias", 0), Place("fc.weight", 1))
    first = (Place("a.weight", 0), Place("e.weight", 1))
    across = (Place("b.weight", 0), Place("c.weight", 1))
    wide = (Place("one.weight", 0), Place("one.bias", 0))
    twice = (Place("e.weight", 0), Place("e.weight", 1), Place("a.weight", 0))
    again = (Place("a.weight", 0), Place("c.weight", 0))
    backwards = (Place("fc.weight", 1), Place("e.weight", 0))
    of_places = (
        ((16, stream), (16, first), (12, across), (40, wide)),
        ((40, wide), (12, across), (16, stream)),
        ((40, wide), (16, twice), (16, stream)),
        ((16, again), (16, stream), (12, across), (16, backwards)),
        ((16, first), (16, first), (16, again)),
    )
    return tuple(
        Axes(tuple(Axis(size, "permute", (), p) for size, p in axes), {}, {}, {}, {})
        for axes in of_places
    )


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    return {name: each.numpy() for name, each in networks()[0].state_dict().items()}


def _answers(scheme: str) -> bool:
    return scheme in CATALOG and scheme_named(scheme).triggers > 0 and scheme != "passport-v3"


def _sliding(name: str) -> LayerShape:
    layer = networks()[0].get_submodule(name)
    geometry = geometry_of(layer)
    weight = tuple(filters(layer.weight, geometry).shape)
    space = (4,) if geometry.axes == 0 else _PASSPORT[: geometry.axes]
    return LayerShape(name, weight, (weight[1] * geometry.groups, *space), geometry)


def _as_read(name: str, bits: int | None) -> LayerShape:
    layer = networks()[0].get_submodule(name)
    weight = tuple(layer.weight.shape)
    axes = len(weight) - 2
    geometry = Geometry((1,) * axes, ((0, 0),) * axes, (1,) * axes)
    read = weight[1:] if axes else (weight[1], 1)
    return LayerShape(name, weight, read, geometry, weight[0] if bits is None else bits)


def spoiled(rng: Random, seeds: tuple[bytes, ...]) -> bytes:
    """A context that differs in nothing, or in up to four things, from one that is genuine."""
    document = json.loads(rng.choice(seeds))
    document["nonce"] = rng.randbytes(16).hex()
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 4])):
        _spoil(rng, document)
    return canonical_json(document)


def _spoil(rng: Random, document: dict) -> None:
    layers = document["layers"]
    if document.get("answers") and rng.random() < 0.5:
        _spoil_answers(rng, document)
        return
    if document.get("order") and rng.random() < 0.9:
        _spoil_order(rng, document)
        return
    what = rng.random()
    if what < 0.1:
        document["scheme"] = rng.choice(SCHEMES)
    elif what < 0.35 or not layers:
        _spoil_triggers(rng, document)
    elif what < 0.45 and len(layers) < 12:
        again = json.loads(json.dumps(rng.choice(layers)))  # the same tensor, under another name?
        again["name"] = rng.choice([again["name"], again["name"] + ".", "a", "fc", "one"])
        layers.insert(rng.randrange(len(layers) + 1), again)
    elif what < 0.5:
        layers.remove(rng.choice(layers))
    else:
        _spoil_layer(rng, rng.choice(layers))


def _spoil_layer(rng: Random, layer: dict) -> None:
    weight, passport, geometry = layer["weight"], layer["passport"], layer["geometry"]
    few = rng.choice([1, 1, 2, 3, 4, 8, 16, 31, 62, 93, 144, weight[0], math.prod(weight[1:])])
    axes = len(geometry["stride"])
    match rng.randrange(10):
        case 0 | 1 | 2:
            layer["bits"] = few
        case 3:
            layer.pop("bits", None)
        case 4:
            weight[rng.randrange(len(weight))] = few
        case 5:
            passport[rng.randrange(len(passport))] = few
        case 6:  # every patch the same: a passport of one number, or nearly all of it padding
            for axis in range(1, len(passport)):
                passport[axis] = 1
            geometry["padding"] = [[rng.choice([1, 2, 9, 60])] * 2 for _ in range(axes)]
        case 7:
            fields = ["stride", "padding", "dilation", "output_padding"]
            field = rng.choice(fields)
            values = [few, few] if field == "padding" else few
            geometry[field] = [values for _ in range(axes)]
        case 8:
            geometry["groups"] = few
            if rng.random() < 0.5:
                passport[0] = weight[1] * few
        case _:
            geometry["padding_mode"] = rng.choice(["zeros", "reflect", "replicate", "circular"])
            geometry["transposed"] = (
                True if rng.random() < 0.3 else geometry.get("transposed", True)
            )


def _spoil_triggers(rng: Random, document: dict) -> None:
    triggers = document["triggers"]
    if triggers is None or rng.random() < 0.1:
        made = {"count": rng.choice([1, 16, 48]), "classes": rng.choice([2, 10]), "size": [*SIZE]}
        document["triggers"] = made if triggers is None else None
        return
    match rng.randrange(3):
        case 0:
            triggers["count"] = rng.choice([1, 2, 16, 31, 64, 96, 300])
        case 1:
            triggers["classes"] = rng.choice([1, 2, 3, 9, 11, 1000, 2**20, 2**24])
        case _:
            triggers["size"][rng.randrange(3)] = rng.choice([1, 2, 5, 7, 30])


def _spoil_answers(rng: Random, document: dict) -> None:
    match rng.randrange(4):
        case 0:
            document["answers"]["kind"] = rng.choice([*KINDS, "none", 1])
        case 1:
            document["answers"]["coins"] = rng.choice([-1, 0, 1, 2, 3, 48, 100, 1000, 2**31])
        case 2:
            document["answers"]["strength"] = rng.choice([-1, 0, 1, 10, 5000, 2**31, 0.5])
        case _:
            document["answers"] = rng.choice([None, {}, []])


def _spoil_order(rng: Random, document: dict) -> None:
    axes = document["order"]["axes"]
    axis = rng.choice(axes) if axes else None
    match rng.randrange(9):
        case 8:
            document["order"]["table"] = f"{rng.randrange(len(tables())):064x}"
        case 0:
            rng.shuffle(axes)
        case 1 if axes:
            axes.remove(axis)
        case 2 if axes:
            axes.insert(rng.randrange(len(axes) + 1), json.loads(json.dumps(axis)))
        case 3 if axes:
            axis["number"] = rng.choice([-1, 0, 1, 2, 3, 4, 9_999, 2**31])
        case 4 if axes:
            axis["units"] = rng.choice([0, 1, 11, 12, 15, 16, 40, 512, 513, 2**31])
        case 5 if axes:
            name = rng.choice([*_arrays()])
            shape = [*_arrays()[name].shape]
            axis["tensors"].insert(rng.randrange(len(axis["tensors"]) + 1), [name, shape])
        case 6 if axes and axis["tensors"]:
            shape = rng.choice(axis["tensors"])[1]
            if shape:
                shape[rng.randrange(len(shape))] = rng.choice([0, 1, 12, 16, 2**24, 2**40])
        case _:
            document["anchor"] = rng.choice([None, ANCHOR, "0" * 63, rng.randbytes(32).hex()])


class Found(NamedTuple):
    """The least log₁₀ p of a key, and of how many readings."""

    log10_p: float
    readings: int


def least(data: bytes) -> Found | None:
    """The least log₁₀ p of a key of this context on networks; None where nothing could be read.

    Raises:
        OwnershipError: it is no context.
        AssertionError: a p-value that no number of tries explains, or counts that cannot be.
    """
    context = Context.decode(data)
    digest = hashlib.sha256(data).digest()
    scheme, key = scheme_named(context.scheme), _key(context, digest)
    found = []
    for turn in range(EACH):
        number = (digest[0] + turn) % len(networks())
        ways = [lambda n=number: scheme.verify_network(networks()[n], key, PLAIN)]
        if scheme.reads_weights:
            ways = [lambda n=number: scheme.verify(_state(n), key)]
        if scheme.reads_weights and context.triggers is not None:
            ways += [lambda n=number: _answered(scheme, key, n)]
        for way in ways:
            try:
                verdict = way()
            except OwnershipError:
                continue
            counts = {context.bits, 0 if context.triggers is None else context.triggers.count}
            assert verdict.bits in counts, f"{verdict.bits} bits"
            assert 0 <= verdict.matches <= verdict.bits, f"{verdict.matches} matches"
            assert verdict.log10_p_value > ALLOWED, f"p = 10^{verdict.log10_p_value:.1f}"
            found.append(verdict.log10_p_value)
    return Found(min(found), len(found)) if found else None


def explained(log10_p: float, readings: int) -> bool:
    """Whether the least p of so many readings is what their number allows."""
    return log10_p + math.log10(max(1, readings)) >= CORRECTED


PLAIN = Normalisation((0.5,), (0.5,))


def _answered(scheme, key, number):
    from nnpassport.embedding.schemes.triggers import answers_to

    return scheme.verify_answers(answers_to(key, networks()[number], PLAIN), key)


def _key(context: Context, digest: bytes) -> Key:
    """A key of the context, its pictures such as a forger would take: all alike, or noise."""
    if context.order is not None:
        return _ordered(context, digest)
    shape = context.triggers
    if shape is None or shape.count * math.prod(shape.size) > _MOST:
        return Key(digest, context)
    rng = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    derived = context.scheme not in PICTURES and context.scheme != "frontier-stitching"
    if derived and digest[2] % 8 == 0:  # they take the most time
        return Key(digest, context)
    images = torch.randint(256, (shape.count, *shape.size), generator=rng, dtype=torch.uint8)
    if digest[1] % 2:
        images = images[:1].expand(images.shape)
    if context.answers is not None:
        said = torch.randint(-400, 400, (shape.count, shape.classes), generator=rng).short()
        return Key(digest, context, trigger_images=images, baseline=said)
    choices = None
    if context.scheme == "frontier-stitching" and digest[1] % 4 < 3:
        first = torch.randint(shape.classes, (shape.count, 1), generator=rng)
        choices = torch.cat([first, (first + 1) % shape.classes], dim=1)
    return Key(digest, context, trigger_images=images, trigger_choices=choices)


def _ordered(context: Context, digest: bytes) -> Key:
    """A key with a forger's table and sketch: of the suspect itself, sorted, alike, or noise."""
    table = tables()[int(context.order.table, 16) % len(tables())]
    content = np.frombuffer(table.to_bytes(), np.uint8)
    rng = np.random.default_rng(list(digest[:8]))
    suspect = {n: e.float().numpy() for n, e in _state(digest[0] % len(networks())).items()}
    made = {}
    for axis in context.order.axes:
        try:
            (sketch,) = sketch_of(
                table, (axis,), suspect, anchor=context.anchor, nonce=context.nonce
            ).values()
        except Exception:  # his table has no such axis: V refuses the key
            sketch = np.zeros((axis.units, 1), np.int8)
        match digest[2] % 4:
            case 0:
                sketch = sketch[np.argsort(-sketch.astype(int).sum(1))]
            case 1:
                sketch = np.broadcast_to(sketch[:1], sketch.shape).copy()
            case 2:
                sketch = rng.integers(-127, 128, sketch.shape).astype(np.int8)
        made[str(axis.number)] = sketch
    form = context.order._replace(
        table=hashlib.sha256(content.tobytes()).hexdigest(), sketch=sketch_digest(made)
    )
    return Key(digest, replace(context, order=form), table=content, sketch=made)
