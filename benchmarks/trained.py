"""Keys put into networks that are trained already: what it takes, what it costs, what survives.

    python benchmarks/trained.py run CELL SOURCE --data FOLDER    one cell; done once, never again
    python benchmarks/trained.py render                           results/trained.md from the JSON

SOURCE is the folder of a plain network, as `benchmarks/cifar10.py run plain-bn` leaves it (its name
ends in -EPOCHS-SEED). FOLDER holds cifar10-train-*.parquet and cifar10-test.parquet; for sources
whose name begins with "cifar100", cifar100-train-*.parquet and cifar100-test.parquet.
"""

import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, command_line, sets_in

from nnpassport.attacks import perturbation, removal
from nnpassport.attacks.projection import project
from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.embedding.aligning import align
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import RECIPES, Recipe, fit, total_steps
from nnpassport.lab.marks import facts_of
from nnpassport.lab.results import Results, made_with
from nnpassport.lab.tables import in_percent, table
from nnpassport.report.provenance import provenance

STORE = Results(RESULTS / "trained")
BATCH = 128


class Cell(NamedTuple):
    """A way of putting a key into a trained network."""

    scheme: str
    steps: int  # of 128 images; 0: nothing is trained
    graft: bool = True
    teaching: float = 0.7
    rate: float = 0.01
    attacks: bool = False


CELLS = {
    "v1-graft": Cell("passport-v1", 0),
    "v2-graft": Cell("passport-v2", 0, attacks=True),
    "v3-graft": Cell("passport-v3", 0),
    "v1-88": Cell("passport-v1", 88),
    "v2-88": Cell("passport-v2", 88),
    "v3-88": Cell("passport-v3", 88),
    "v2-88-labels": Cell("passport-v2", 88, teaching=0.0),
    "v2-88-naive": Cell("passport-v2", 88, graft=False, teaching=0.0),
    "v2-88-naive-taught": Cell("passport-v2", 88, graft=False),
    "v2-88-fast": Cell("passport-v2", 88, rate=0.03),
    "v2-88-slow": Cell("passport-v2", 88, rate=0.003),
    "v2-264": Cell("passport-v2", 264),
    "v3-264": Cell("passport-v3", 264),
}


def run(name: str, source: Path, data: Path) -> None:
    """One cell on one network, unless its JSON is there."""
    if STORE.has(f"{source.name}-{name}"):
        return
    origin, cell, started = provenance(), CELLS[name], time.monotonic()
    loaded = load_model(source)
    task = "cifar100" if source.name.startswith("cifar100") else "cifar10"
    sets = sets_in(data, task)
    test = sets.test
    normalise = Normalisation(loaded.config.mean, loaded.config.std)
    order = torch.randperm(len(sets.train), generator=torch.Generator().manual_seed(1))
    shown = sets.train.subset(order[: max(cell.steps, 4) * BATCH])
    recipe = replace(
        RECIPES["tune"],
        epochs=min(cell.steps, 1),
        rate=cell.rate,
        precision="bfloat16",
    )
    scheme = replace(scheme_named(cell.scheme), teaching=cell.teaching)
    model = deepcopy(loaded.model)
    key = scheme.draw_key(model, normalise(test.images[:2]), owner="benchmark", seed=bytes(32))
    begun = time.monotonic()
    if cell.graft:
        scheme.embed(model, key, shown, recipe, normalise=normalise, trained=True)
    else:
        _naively(model, scheme, key, shown, recipe, normalise)
    seconds = time.monotonic() - begun
    released = scheme.released(model).eval()
    verdict = scheme.verify(released.state_dict(), key)
    epochs = int(source.name.split("-")[-2])
    entry = {
        "cell": name,
        **cell._asdict(),
        "source": source.name,
        "source_epochs": epochs,
        "norm": loaded.config.arguments["norm"],
        "share_of_budget": cell.steps / total_steps(sets.train, Recipe(epochs=epochs, batch=BATCH)),
        "plain_accuracy": accuracy(loaded.model, test, normalise),
        "released_accuracy": accuracy(released, test, normalise),
        "metrics": scheme.evaluation(test, normalise)(model),
        **facts_of(verdict),
        "after": _attacked(released, scheme, key, sets, normalise) if cell.attacks else {},
        "recipe": asdict(recipe),
        "test_images": len(test),
        "embedding_seconds": seconds,
        "wall_seconds": time.monotonic() - started,
        "command": f"python benchmarks/trained.py run {name} {source.name}",
    }
    STORE.keep(f"{source.name}-{name}", entry, origin)


def _naively(model, scheme, key, shown, recipe, normalise):
    """Passports are inserted and trained, as if the network were new; its teacher is itself."""
    from nnpassport.embedding.schemes.teaching import taught  # noqa: PLC0415

    teacher = deepcopy(model)
    scheme.insert(model, key, normalise(shown.images[:2]))
    steps = total_steps(shown, recipe)

    def make(task=None):
        return scheme.objective(key, steps=steps, normalise=normalise, task=task)

    objective = taught(make, teacher, scheme.teaching) if scheme.teaching else make()
    fit(model, objective, shown, recipe, normalise=normalise)


def _attacked(released, scheme, key, sets, normalise):
    """Accuracy and bits of the released network after attacks; attackers hold 45,056 images."""
    rng = torch.Generator().manual_seed(0)
    seen = normalise(sets.train.images[:512])
    tune = replace(RECIPES["tune"], precision="bfloat16")
    theirs = scheme.draw_key(released, seen[:2], owner="attacker", seed=bytes(31) + b"\1")
    some = sets.train.subset(torch.arange(512))
    networks = {
        "prune 60 %": lambda: perturbation.prune(released, share=0.6).model,
        "project 99 %": lambda: project(released, seen, rng, share=0.99).model,
        "project 95 %": lambda: project(released, seen, rng, share=0.95).model,
        "a second key grafted": lambda: (
            removal.overwrite(
                *(released, scheme, theirs, some, replace(tune, epochs=0)),
                normalise=normalise,
                trained=True,
            ).model
        ),
        "fine-tuned, 1 epoch": lambda: (
            removal.fine_tune(released, sets.train, tune, normalise=normalise, form="ftal").model
        ),
    }
    found = {}
    for name, attack in networks.items():
        model = attack().eval()
        verdict = scheme.verify(model.state_dict(), key)
        found[name] = {
            "accuracy": accuracy(model, sets.test, normalise),
            "matches": verdict.matches,
            "aligned_matches": _aligned_matches(model, released, scheme, key),
        }
    return found


def _aligned_matches(model, released, scheme, key):
    aligned = align(model.state_dict(), released, scheme.forms(key)).model
    return scheme.verify(aligned.state_dict(), key).matches


def render() -> str:
    """All cells that were run, as Markdown; cells not run are not in it."""
    order = {name: i for i, name in enumerate(CELLS)}
    entries = sorted(STORE.all().values(), key=lambda e: (e["source"], order[e["cell"]]))
    head = (
        *("network", "cell", "start", "teaching", "rate", "steps", "budget", "plain", "released"),
        *("private", "bits right", "seconds"),
    )
    left = [
        (
            *(e["source"], e["cell"], attack, in_percent(after["accuracy"])),
            *(f"{after['matches']} of {e['bits']}", after.get("aligned_matches", "not read")),
        )
        for e in entries
        for attack, after in e["after"].items()
    ]
    machines = "; ".join(sorted(set(map(made_with, entries))))
    return "\n".join(
        [
            "# Keys put into trained networks",
            "",
            "Rendered by `python benchmarks/trained.py render` from `results/trained/*.json`. "
            "AlexNet, accuracies in % on all test images. `steps` are of 128 images; `budget` is "
            "their share of the steps that the plain network was trained for. n = 1 run a cell.",
            "",
            *table(head, map(_row, entries)),
            "",
            "## What is left after attacks",
            "",
            "Read as the network stands, and aligned with the released one.",
            "",
            *table(("network", "cell", "attack", "accuracy", "bits right", "aligned"), left),
            "",
            f"{machines}; training in bfloat16, other work beside it.",
            "",
        ]
    )


def _row(e):
    trained = (e["teaching"], e["rate"]) if e["steps"] else ("", "")
    return (
        *(e["source"], e["cell"], "grafted" if e["graft"] else "as it is", *trained, e["steps"]),
        f"{100 * e['share_of_budget']:.1f} %",
        *(in_percent(e[name]) for name in ("plain_accuracy", "released_accuracy")),
        in_percent(e["metrics"].get("private_accuracy")),
        f"{e['matches']} of {e['bits']}",
        f"{e['embedding_seconds']:.0f}",
    )


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {RESULTS / "trained.md": render()},
        run,
        {
            "name": {"choices": CELLS, "metavar": "CELL"},
            "source": {"type": Path, "metavar": "SOURCE"},
            "--data": {"type": Path, "required": True},
        },
    )
