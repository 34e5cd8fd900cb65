"""Where passports of channels should lie: what embedding costs, and what it costs to end the mark.

    python benchmarks/floor.py run [NETWORK …] --data FOLDER    results/floor/NETWORK.json
    python benchmarks/floor.py render                           results/floor.md from them

FOLDER holds caltech101-64px-train.parquet and -test.parquet, cifar10-train-*.parquet and
cifar10-test.parquet. Everything is measured on weights and moments, a layer at a time: no network
is run with a mark in it (`benchmarks/real.py` does that).
"""

import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import RESULTS, command_line
from numpy.typing import NDArray
from torch import Tensor, nn

from nnpassport.attacks.unlabelled import rows_of, sights_of
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding.network.models.alexnet import AlexNet
from nnpassport.embedding.network.outputs import Example, part_of
from nnpassport.embedding.network.survey import choose, choose_enough, survey
from nnpassport.embedding.schemes import channels, seen
from nnpassport.embedding.train.loop import Recipe, classification, fit
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, log10_binomial_tail
from nnpassport.keys.derive import spread
from nnpassport.lab.results import Results
from nnpassport.lab.tables import table
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
STORE = Results(RESULTS / "floor")
sys.path.insert(0, str(ROOT / "tests"))

import zoo  # noqa: E402 - it is beside the tests

CHANNELS = 250  # of a layer, at most
TRIES = 7  # halvings of the thief's harm
LEAST, MOST = 1e-3, 2.0  # of what a layer puts out, in mean squares
EARLIER = 32  # directions in keys with a floor

Metric = Callable[[seen.Seen], NDArray[np.int16]]


class Layer(NamedTuple):
    """A layer that carries a mark, as its owner and as a thief knows it.

    Attributes:
        rows: its filters (out fan_in).
        own: γ° and β° of its norm (out 2).
        seen: what its owner saw it receive.
        values, axes: the thief's principal axes of what it receives, a column for each.
    """

    rows: Tensor
    own: Tensor
    seen: seen.Seen
    values: Tensor
    axes: Tensor


def layers_of(model: nn.Module, owner: Example, others: Example) -> list[Layer]:
    """The layers that the package chooses by itself, but for channels that are dead or mute."""
    found = survey(model, part_of(owner, 0, 2))
    sites = choose_enough(model, found, None, bits=channels.BITS)
    sites = choose(model, found, [site.name for site in sites])
    watched = seen.watch(model, {site.name: site.layer for site in sites}, owner)
    sights = sights_of(model, {site.name: site for site in sites}, others)
    layers = []
    for site in sites:
        shape, _ = channels.shape_of(model, site, watched[site.name])
        carrying = torch.from_numpy(shape.channels.carrying(shape.weight[0]))
        own = torch.stack(channels.own_affine_of(model, site), 1)[carrying][:CHANNELS]
        sight = sights[site.name]
        rows = rows_of(site)[carrying][:CHANNELS]
        layers.append(Layer(rows, own, watched[site.name], sight.values, sight.axes))
    return layers


# How m may be spread


def floored(watched: seen.Seen, floor: float) -> NDArray[np.int16]:
    """As in keys before 2026-11-28: 32 directions, and in all others C's mean there and a floor."""
    about, size = watched.about(centred=True), len(watched.mean)
    values, vectors, mean = about.directions(EARLIER)
    rest = (mean * size - values.sum()).clamp(min=0) / max(1, size - len(values))
    strengths = ((values + floor * mean) / (rest + floor * mean)).sqrt() - 1
    whole = torch.cat([strengths[:, None] * 2.0**8, vectors * 2.0**15], 1).round()
    return whole.clamp(-(2**15 - 1), 2**15 - 1).numpy().astype(np.int16)


def lying(watched: seen.Seen, directions: int, enough: float) -> NDArray[np.int16]:
    """As `seen.metric_of`, in so many directions, which weigh alike from this share of the mean."""
    whole = seen.metric_of(watched, enough)
    return np.concatenate([whole[:1], whole[1:][-directions:]])


FORMS: Mapping[str, Metric] = {
    **{f"floor, λ = {floor:g}": partial(floored, floor=floor) for floor in (1, 0.01)},
    **{
        f"{count} directions, alike from {enough:g}": partial(
            lying, directions=count, enough=enough
        )
        for count, enough in ((256, 0.03), (256, 0.1), (256, 0.25), (256, 0.5), (64, 0.25))
    },
}


class Marked(NamedTuple):
    """A layer with the mark, by the thief's axes: filters and passports (out fan_in), and γ°."""

    rows: Tensor
    passports: Tensor
    scale: Tensor
    values: Tensor
    felt: float


def marked(layer: Layer, form: Metric, rng: np.random.Generator) -> Marked:
    """The least change that writes γ° and β°, as `channels.change_of` finds it."""
    out, size = layer.rows.shape
    drawn = rng.integers(-127, 128, (2 * out, size)).astype(np.float64)
    forms = torch.from_numpy(spread(drawn, form(layer.seen)) / 128).view(2, out, size)
    forms[0] *= torch.from_numpy(rng.choice([-1.0, 1.0], (out, 1)))
    said = torch.einsum("doi,oi->do", forms, layer.rows)
    wanted = layer.own.T.square().mean(1).sqrt()
    wanted[1] = max(wanted[1], 0.1 * wanted[0])
    forms *= (wanted / said.square().mean(1).sqrt())[:, None, None]
    about = layer.seen.about(centred=True)
    whitened = about.solved(forms.flatten(0, 1), seen.FLOOR).view_as(forms)
    products = torch.einsum("doi,eoi->ode", forms, whitened)
    need = layer.own - torch.einsum("doi,oi->od", forms, layer.rows)
    weights = torch.einsum("ode,oe->od", torch.linalg.pinv(products, hermitian=True), need)
    change = torch.einsum("od,doi->oi", weights, whitened) @ layer.axes
    rows = layer.rows @ layer.axes
    felt = float((change.square() @ layer.values).sum() / (rows.square() @ layer.values).sum())
    return Marked(rows + change, forms[0] @ layer.axes, layer.own[:, 0], layer.values, felt)


# Thieves, as `nnpassport.attacks.informed` has them


def drowned(layer: Marked, harm: float, rng: torch.Generator, *, tail: float) -> Tensor:
    """Noise in the axes that hold this share of the inputs' variance."""
    values = layer.values.clamp(min=1e-7 * float(layer.values[-1]))
    count = max(1, int((values.cumsum(0) <= tail * values.sum()).sum()))
    noise = torch.zeros_like(layer.rows)
    noise[:, :count] = torch.randn(len(noise), count, generator=rng, dtype=torch.double)
    typical = (layer.rows.square() @ values).mean()
    return layer.rows + noise * (harm * typical / (noise.square() @ values)).sqrt()[:, None]


def narrowed(layer: Marked, harm: float, _rng: torch.Generator) -> Tensor:
    """Without the axes that outputs need least."""
    held = (layer.rows.square() * layer.values).sum(0)
    left = layer.rows.clone()
    left[:, : int((held.cumsum(0) <= harm * held.sum()).sum())] = 0
    return left


def replaced(layer: Marked, harm: float, rng: torch.Generator) -> Tensor:
    """Half of it without those axes, half of it noise in the last of them."""
    left = layer._replace(rows=narrowed(layer, harm / 2, rng))
    return drowned(left, harm / 2, rng, tail=1e-3)


def lowered(layer: Marked, harm: float, _rng: torch.Generator) -> Tensor:
    """Of a lower rank, in the metric of the inputs."""
    heard = layer.rows * layer.values.sqrt()
    values, vectors = torch.linalg.eigh(heard @ heard.T)
    count = int((values.clamp(min=0).cumsum(0) <= harm * values.sum()).sum())
    kept = vectors[:, count:]
    return kept @ (kept.T @ layer.rows)


THIEVES: Mapping[str, Callable[[Marked, float, torch.Generator], Tensor]] = {
    **{f"drown {tail:g}": partial(drowned, tail=tail) for tail in (1e-3, 1e-2, 1e-1, 1.0)},
    "narrow": narrowed,
    "replace": replaced,
    "low-rank": lowered,
}


def least_harm(layers: list[Marked], thief: Callable[..., Tensor]) -> float:
    """The least share of what the layers put out that he has to change until p > 10⁻⁹."""
    bits = sum(len(layer.rows) for layer in layers)

    def ended(harm: float) -> bool:
        rng = torch.Generator().manual_seed(0)
        matches = 0
        for layer in layers:
            said = (thief(layer, harm, rng) * layer.passports).sum(1) * layer.scale
            matches += int((said > 0).sum())
        return log10_binomial_tail(matches, bits, 0.5) > LOG10_ALPHA_COMMITTED

    least, most = LEAST, MOST
    if not ended(most):
        return math.inf
    for _ in range(TRIES):
        middle = math.sqrt(least * most)
        least, most = (least, middle) if ended(middle) else (middle, most)
    return most


# The three networks


def _minilm(_data: Path) -> tuple[nn.Module, Example, Example]:
    texts = zoo.plain_sentences()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = zoo.sentences([texts[i] for i in order[:428]])
    return zoo.minilm(), part_of(tokens, 0, 128), part_of(tokens, 128, 428)


def _lite0(data: Path) -> tuple[nn.Module, Example, Example]:
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    read = (read_images(data / f"caltech101-64px-{part}.parquet") for part in ("train", "test"))
    owner, others = (normalise(i.sample(96, seed=0).resized(224).images) for i in read)
    return zoo.lite0(), owner, others


def _alexnet(data: Path) -> tuple[nn.Module, Example, Example]:
    train = read_images(str(data / "cifar10-train-*.parquet")).sample(8_000, seed=0)
    test = read_images(data / "cifar10-test.parquet")
    normalise = Normalisation.measured(train)
    torch.manual_seed(0)
    model = AlexNet(10, norm="batch", width=0.25)
    recipe = Recipe(epochs=3, batch=128, rate=0.05, schedule="one-cycle", nesterov=True)
    fit(model, classification, train, recipe, normalise=normalise)
    owner, others = train.sample(256, seed=3), test.sample(500, seed=1)
    return model.eval(), normalise(owner.images), normalise(others.images)


NETWORKS: Mapping[str, Callable[[Path], tuple[nn.Module, Example, Example]]] = {
    "AlexNet": _alexnet,
    "EfficientNet-Lite0": _lite0,
    "MiniLM": _minilm,
}
"""By name, how to get one, inputs of its owner's, and others."""


def run(name: str, data: Path) -> None:
    """All forms on one network."""
    origin, entries = provenance(), []
    model, owner, others = NETWORKS[name](data)
    with torch.no_grad():
        layers = layers_of(model, owner, others)
        for form, metric in FORMS.items():
            rng = np.random.default_rng(0)
            made = [marked(layer, metric, rng) for layer in layers]
            harms = {thief: least_harm(made, act) for thief, act in THIEVES.items()}
            entry = {
                "form": form,
                "bits": sum(len(layer.rows) for layer in made),
                "felt": float(np.mean([layer.felt for layer in made])),
                "thieves": {n: h if math.isfinite(h) else None for n, h in harms.items()},
            }
            entries.append(entry)
            print(name, json.dumps(entry), flush=True)
    whole = {"network": name, "layers": len(layers), "entries": entries}
    STORE.keep(name.lower(), whole, origin)


def render() -> str:
    """The two curves, as Markdown."""
    head = ("network", "m", "bits", "harm, %", "least, %", *(f"{t}, %" for t in THIEVES))
    whole = STORE.all().values()
    rows = [_row(each["network"], entry) for each in whole for entry in each["entries"]]
    lines = [
        "# Where passports of channels lie",
        "",
        "Rendered by `python benchmarks/floor.py render` from `results/floor/*.json`. "
        "EfficientNet-Lite0 and MiniLM have their authors' weights, AlexNet a quarter of its width "
        "and three epochs of 8,000 images of CIFAR-10. Each row is a way to draw m for the layers "
        "that the package chooses by itself: with a floor under what a layer sees, as in earlier "
        "keys (λ = 1), or in the directions of the largest variance alone, with weights that rise "
        "with it up to a share of its mean (256 and 0.1 today). *Harm* is the share of what a "
        "marked layer puts out, in mean squares on inputs that its owner did not measure with, "
        "which the mark changes. Then, for each thief, the least such share that he changes in "
        "every marked layer until p > 10⁻⁹: the more, the better the mark holds; more than "
        f"{100 * MOST:g} is not looked at (–). *Least* is the smallest of them. `drown` is noise "
        "in axes that hold 0.1, 1, 10 and 100 % of the inputs' variance.",
        "",
    ]
    return "\n".join([*lines, *table(head, rows), ""])


def _row(network: str, entry: Any) -> list[str]:
    harms = [math.inf if h is None else h for h in entry["thieves"].values()]
    shown = [f"{100 * h:.1f}" if math.isfinite(h) else "–" for h in (min(harms), *harms)]
    felt = f"{100 * entry['felt']:.2f}"
    return [network, entry["form"], f"{entry['bits']:,}", felt, *shown]


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {RESULTS / "floor.md": render()},
        lambda networks, data: [run(name, data) for name in networks],
        {
            "networks": {"nargs": "*", "default": [*NETWORKS], "metavar": "NETWORK"},
            "--data": {"type": Path, "required": True},
        },
    )
