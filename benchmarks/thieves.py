"""Informed thieves on marks of weights, side by side: who keeps his bits, at what accuracy.

    python benchmarks/thieves.py run [NETWORK …] --data FOLDER    results/thieves/NETWORK.json
    python benchmarks/thieves.py render                           results/thieves.md from them

FOLDER holds cifar10-train-*.parquet and cifar10-test.parquet. One small network is trained, each
mark goes into it, and each thief works on each: he knows which layers carry it, has 1,000
unlabelled images, and keeps 97 % of the network's own answers, or 90 %.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, command_line
from torch import nn

from nnpassport.attacks import informed
from nnpassport.attacks.outcome import Attacked
from nnpassport.attacks.unlabelled import KEPT, Scouted, scout
from nnpassport.catalog import scheme_named
from nnpassport.data.images import ImageSet, Normalisation, read_images
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import Passport
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import Recipe, classification, fit
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.keys.key import Key
from nnpassport.lab.leaderboard.board import said_p
from nnpassport.lab.marks import facts_of
from nnpassport.lab.results import Results, read_json
from nnpassport.lab.tables import table
from nnpassport.report.provenance import provenance

STOLEN, TESTED, TUNED_ON, WIDTH = 1_000, 5_000, 5_000, 0.25
NETWORKS = {"alexnet": 49_000, "resnet18": 20_000}
"""Architectures, and how many images each is trained on."""
KEEPING = (KEPT, 0.9)
"""Shares of the network's own answers that a thief keeps."""
TITLES = {"alexnet": "AlexNet", "resnet18": "ResNet-18"}
PLAIN = Recipe(epochs=15, batch=128, rate=0.05, schedule="one-cycle", nesterov=True)
STORE = Results(RESULTS / "thieves")
TUNE = Recipe(epochs=2, batch=32, rate=0.01, schedule="one-cycle", nesterov=True)
GRAFT = Recipe(epochs=0)


class Mark(NamedTuple):
    """A mark that goes into the trained network: a scheme of the catalog, and how."""

    scheme: str
    recipe: Recipe
    passports: str | None = None


MARKS: Mapping[str, Mark] = {
    "V2, a passport for each channel": Mark("passport-v2", GRAFT, "channel"),
    "V2, one passport for a layer": Mark("passport-v2", GRAFT, "derived"),
    "Uchida": Mark("uchida", TUNE),
    "DeepMarks": Mark("deepmarks", TUNE),
    "greedy residuals": Mark("greedy-residuals", TUNE),
}


def _drawn(
    attack: Callable[[Scouted, torch.Generator], Attacked],
) -> Callable[[Scouted], Attacked]:
    return lambda thief: attack(thief, torch.Generator().manual_seed(0))


THIEVES: Mapping[str, Callable[[Scouted], Attacked]] = {
    "shave-outliers": informed.shave_outliers,
    "unscale": _drawn(informed.unscale),
    "drown": _drawn(informed.drown),
    "narrow": informed.narrow,
    "replace": _drawn(informed.replace),
    "low-rank": informed.lower_rank,
    "drown-and-imitate": _drawn(
        partial(informed.drown_and_imitate, budget=informed.Imitation(rounds=1, epochs=2))
    ),
}


class Images(NamedTuple):
    """What owner, thief and judge have."""

    train: ImageSet
    thief: torch.Tensor
    test: ImageSet
    normalise: Normalisation


def images(data: Path, count: int) -> Images:
    """The three sets, `count` to train on, none with an image of another."""
    whole = read_images(str(data / "cifar10-train-*.parquet")).sample(count + STOLEN, seed=0)
    train = whole.subset(torch.arange(count))
    normalise = Normalisation.measured(train)
    thief = normalise(whole.subset(torch.arange(count, count + STOLEN)).images)
    test = read_images(data / "cifar10-test.parquet").sample(TESTED, seed=0)
    return Images(train, thief, test, normalise)


def marked(plain: nn.Module, mark: Mark, given: Images) -> tuple[Scheme, Key, nn.Module]:
    """The scheme, a key, and the network that is released with it."""
    scheme = scheme_named(mark.scheme)
    shown = given.normalise(given.train.sample(512, seed=3).images)
    named = {} if mark.passports is None else {"passports": mark.passports}
    model, example = deepcopy(plain), shown[:2]
    if isinstance(scheme, Passport):
        seen = shown if mark.passports == "channel" else None
        key = scheme.draw_key(model, example, owner="benchmark", seed=bytes(32), seen=seen, **named)
        scheme.embed(model, key, given.train, mark.recipe, normalise=given.normalise, trained=True)
    else:
        key = scheme.draw_key(model, example, owner="benchmark", seed=bytes(32))
        tuned_on = given.train.sample(TUNED_ON, seed=4)
        scheme.embed(model, key, tuned_on, mark.recipe, normalise=given.normalise)
    return scheme, key, scheme.released(model).eval()


def run(networks: Sequence[str], data: Path) -> None:
    """Every thief on every mark in these networks, but for those that have their JSON."""
    for network in networks:
        if not STORE.has(network):
            _run(network, data)


def _run(network: str, data: Path) -> None:
    origin, given = provenance(), images(data, NETWORKS[network])
    torch.manual_seed(0)
    plain = build(network, classes=10, norm="batch", width=WIDTH)
    fit(plain, classification, given.train, PLAIN, normalise=given.normalise)
    settings = {
        "epochs": PLAIN.epochs,
        "trained": NETWORKS[network],
        "tuned_on": TUNED_ON,
        "stolen": STOLEN,
        "tested": TESTED,
    }
    before = accuracy(plain.eval(), given.test, given.normalise)
    entries: list[dict[str, Any]] = []
    for name, mark in MARKS.items():
        scheme, key, released = marked(plain, mark, given)
        entries.append({"mark": name, "thief": None, **_facts(scheme, key, released, given)})
        names = [layer.name for layer in key.context.layers]
        for kept, (thief, attack) in itertools.product(KEEPING, THIEVES.items()):
            begun = time.monotonic()
            model = attack(scout(released, given.thief, kept=kept, layers=names)).model
            facts = _facts(scheme, key, model, given)
            seconds = time.monotonic() - begun
            entries.append(
                {"mark": name, "thief": thief, "kept": kept, **facts, "seconds": seconds}
            )
            print(json.dumps(entries[-1]), flush=True)
        found = {"settings": settings, "plain_accuracy": before, "entries": entries}
        STORE.keep(network, found, origin)


def _facts(scheme: Scheme, key: Key, model: nn.Module, given: Images) -> dict[str, Any]:
    verdict = scheme.verify(model.state_dict(), key)
    return {**facts_of(verdict), "accuracy": accuracy(model, given.test, given.normalise)}


def render() -> str:
    """A table for each network: a row for each mark, a column for each thief."""
    lines = [
        "# Informed thieves, side by side",
        "",
        "Rendered by `python benchmarks/thieves.py render` from `results/thieves/*.json`. Each "
        "mark goes into a network that is trained, passports by a graft, the others by two epochs "
        "more. Each thief knows which layers carry the mark, has unlabelled images and does the "
        "most that *keeps* such a share of the network's own answers. In a cell: bits left, p, "
        "and the points of accuracy that the theft cost. **Bold**: the mark is gone, p > 10⁻⁹. One "
        "run each.",
        "",
    ]
    for network in NETWORKS:
        lines += [f"## {TITLES[network]}", "", *_table(network), ""]
    return "\n".join(lines)


def _table(network: str) -> list[str]:
    if not STORE.has(network):
        return ["Not run."]
    whole = read_json(STORE.path(network))
    made, plain = whole["settings"], 100 * whole["plain_accuracy"]
    rows = [
        row
        for mark, kept in itertools.product(MARKS, KEEPING)
        if (row := _row(mark, kept, [e for e in whole["entries"] if e["mark"] == mark]))
    ]
    return [
        f"A quarter of its width, {made['epochs']} epochs of {made['trained']:,} images of "
        f"CIFAR-10 ({plain:.1f} % of {made['tested']:,} test images; a standard error of a "
        f"difference is about {50 / made['tested'] ** 0.5:.1f} points); other marks learnt from "
        f"{made['tuned_on']:,} of the images; thieves have {made['stolen']:,}.",
        "",
        *table(("mark", "keeps, %", "bits", "accuracy, %", *THIEVES), rows),
    ]


def _row(mark: str, kept: float, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {e["thief"]: e for e in entries if e.get("kept") in {None, kept}}
    if len(found) < 2:
        return []
    own, share = found[None], f"{100 * kept:g}"
    cells = [mark, share, f"{own['matches']} of {own['bits']}", f"{100 * own['accuracy']:.1f}"]
    for thief in THIEVES:
        entry = found.get(thief)
        if entry is None:
            cells.append("not run")
            continue
        lost = 100 * (own["accuracy"] - entry["accuracy"])
        said = f"{entry['matches']}, {said_p(entry['log10_p_value'])}, {lost:+.1f}"
        gone = entry["log10_p_value"] > LOG10_ALPHA_COMMITTED
        cells.append(f"**{said}**" if gone else said)
    return cells


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {RESULTS / "thieves.md": render()},
        run,
        {
            "networks": {"nargs": "*", "choices": [*NETWORKS], "default": [*NETWORKS]},
            "--data": {"type": Path, "required": True},
        },
    )
