"""Contexts that a forger would like, and twenty networks that know nothing of his seeds.

`spoiled` makes context n of a scheme out of genuine ones: other numbers of bits, other shapes,
layers twice, geometries that make every patch the same. `least` derives a key of it and reads the
networks: whatever a context says, no p may be below what the number of tries allows.
"""

import functools
import hashlib
import json
import math
from random import Random
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from nnpassport.catalog import ADAPTERS, CATALOG, scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.equations import Geometry, filters, geometry_of
from nnpassport.keys.answers import KINDS
from nnpassport.keys.context import (
    AnswersForm,
    Context,
    LayerShape,
    TriggerShape,
    canonical_json,
)
from nnpassport.keys.key import Key
from nnpassport.scheme import OwnershipError

SCHEMES = (*CATALOG, *ADAPTERS)
EACH = 2
"""How many of the networks, in turn, are read with one key."""
ALLOWED = -12.0
"""log₁₀ p that 10⁵ contexts and their readings reach once in a million runs: one key is enough."""
CORRECTED = -3.0
"""log₁₀ of the least p of a scheme, multiplied by how many there were (Bonferroni), at least."""

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
    if scheme == "answers":
        shape = TriggerShape(200, CLASSES, SIZE)
        forms = [AnswersForm(kind, 64, 400) for kind in KINDS if kind != "counts"]  # of texts
        made = [Context(scheme, "Eve", (), shape, bytes(16), answers=form) for form in forms]
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
