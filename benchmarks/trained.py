"""Keys put into networks that are trained already: what it takes, what it costs, what survives.

    python benchmarks/trained.py run CELL SOURCE --data FOLDER    one cell; done once, never again
    python benchmarks/trained.py render                           results/trained.md from the JSON

SOURCE is the folder of a plain network, as `benchmarks/cifar10.py run plain-bn` leaves it (its name
ends in -EPOCHS-SEED). FOLDER holds cifar10-train-*.parquet and cifar10-test.parquet; for sources
whose name begins with "cifar100", cifar100-train-*.parquet and cifar100-test.parquet.
"""

import argparse
import json
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from nnpassport.attacks import perturbation, removal
from nnpassport.attacks.projection import project
from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.aligning import align
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import RECIPES, Recipe, fit, total_steps
from nnpassport.files.disk import write_atomically
from nnpassport.report.provenance import provenance

RESULTS = Path(__file__).parent.parent / "results"
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
    path = RESULTS / "trained" / f"{source.name}-{name}.json"
    if path.exists():
        return
    origin, cell, started = provenance(), CELLS[name], time.monotonic()
    loaded = load_model(source)
    task = "cifar100" if source.name.startswith("cifar100") else "cifar10"
    train = read_images(str(data / f"{task}-train-*.parquet"))
    test = read_images(data / f"{task}-test.parquet")
    sets = ownership.divide(train, test, validation=0.05, seed=0)
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
        "bits": verdict.bits,
        "matches": verdict.matches,
        "log10_p_value": verdict.log10_p_value,
        "after": _attacked(released, scheme, key, sets, normalise) if cell.attacks else {},
        "recipe": asdict(recipe),
        "test_images": len(test),
        "embedding_seconds": seconds,
        "wall_seconds": time.monotonic() - started,
        "command": f"python benchmarks/trained.py run {name} {source.name}",
        "provenance": origin,
    }
    write_atomically(path, (json.dumps(entry, indent=2) + "\n").encode())


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
    entries = [json.loads(p.read_text()) for p in sorted((RESULTS / "trained").glob("*.json"))]
    order = {name: i for i, name in enumerate(CELLS)}
    entries.sort(key=lambda e: (e["source"], order[e["cell"]]))
    lines = [
        "# Keys put into trained networks",
        "",
        "Rendered by `python benchmarks/trained.py render` from `results/trained/*.json`. AlexNet, "
        "accuracies in % on all test images. `steps` are of 128 images; `budget` is their share of "
        "the steps that the plain network was trained for. n = 1 run a cell.",
        "",
        "| network | cell | start | teaching | rate | steps | budget | plain | released | private "
        "| bits right | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for e in entries:
        private = e["metrics"].get("private_accuracy")
        lines.append(
            f"| {e['source']} | {e['cell']} | {'grafted' if e['graft'] else 'as it is'} "
            f"| {e['teaching'] if e['steps'] else ''} | {e['rate'] if e['steps'] else ''} "
            f"| {e['steps']} | {100 * e['share_of_budget']:.1f} % "
            f"| {100 * e['plain_accuracy']:.2f} | {100 * e['released_accuracy']:.2f} "
            f"| {'' if private is None else f'{100 * private:.2f}'} "
            f"| {e['matches']} of {e['bits']} | {e['embedding_seconds']:.0f} |"
        )
    lines += [
        "",
        "## What is left after attacks",
        "",
        "Read as the network stands, and aligned with the released one.",
        "",
        "| network | cell | attack | accuracy | bits right | aligned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {e['source']} | {e['cell']} | {attack} | {100 * after['accuracy']:.2f} "
        f"| {after['matches']} of {e['bits']} | {after.get('aligned_matches', 'not read')} |"
        for e in entries
        for attack, after in e["after"].items()
    ]
    machines = {f"{e['provenance']['device']}, torch {e['provenance']['torch']}" for e in entries}
    lines += ["", f"{'; '.join(sorted(machines))}; training in bfloat16, other work beside it."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("cell", choices=CELLS)
    one.add_argument("source", type=Path)
    one.add_argument("--data", type=Path, required=True)
    commands.add_parser("render")
    given = parser.parse_args()
    if given.command == "run":
        run(given.cell, given.source, given.data)
    else:
        write_atomically(RESULTS / "trained.md", render().encode())


if __name__ == "__main__":
    main()
