"""AlexNet on CIFAR-10 under one short budget: plain, V1 and V2, with the numbers in results/.

    python benchmarks/cifar10.py run CELL --data FOLDER    one cell; goes on where it stopped
    python benchmarks/cifar10.py render                    results/cifar10-alexnet.md from the JSON

FOLDER holds cifar10-train-*.parquet and cifar10-test.parquet. A cell is trained on 95 % of the
training images (the rest is the validation split); test images are only reported on.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, alexnet, command_line, sets_in, short, trained

from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.checkpoint import load_model
from nnpassport.files.config import ModelConfig
from nnpassport.keys.key import Key
from nnpassport.lab.marks import facts_of
from nnpassport.lab.results import Results
from nnpassport.lab.tables import in_percent, table
from nnpassport.report.provenance import provenance

STORE = Results(RESULTS / "cifar10-alexnet")


class Cell(NamedTuple):
    """One run: the norm of the network and the scheme, "" for a plain network."""

    norm: str
    scheme: str
    late: float = 0.0


CELLS = {
    "plain-gn": Cell("group", ""),
    "v2-gn": Cell("group", "passport-v2"),
    "plain-bn": Cell("batch", ""),
    "v1-bn": Cell("batch", "passport-v1"),
}
FORGED = 50  # random passports, as in the paper
FORGED_IMAGES = 1000  # test images that each of them is tried on


def run(
    name: str, data: Path, runs: Path, *, epochs: int, seed: int, precision: str = "float32"
) -> None:
    """Train one cell, or go on with it, and write its JSON."""
    cell, origin, started = CELLS[name], provenance(), time.monotonic()
    sets, recipe = sets_in(data, seed=seed), short(epochs, seed, precision)
    config = alexnet(sets.train.classes, cell.norm)
    folder = runs / f"{name}-{epochs}-{seed}"
    how = {"scheme": cell.scheme, "settings": {"late": cell.late} if cell.late else {}}
    metrics, key = trained(folder, config, sets, recipe, **how)
    forged = sets.test.subset(torch.arange(FORGED_IMAGES))
    marks = {} if key is None else _marks(folder, key, forged, config)
    entry = {
        "cell": name,
        **cell._asdict(),
        "metrics": metrics,
        **marks,
        "recipe": asdict(recipe),
        "train_images": len(sets.train),
        "test_images": len(sets.test),
        "wall_seconds_of_this_call": time.monotonic() - started,
        "command": f"python benchmarks/cifar10.py run {name} --epochs {epochs} --seed {seed}"
        f" --precision {precision}",
    }
    STORE.keep(folder.name, entry, origin)


def _marks(folder: Path, key: Key, images, config: ModelConfig) -> dict:
    """The owner's key and fifty random ones on the released network."""
    released = folder / "released"
    verdict = ownership.release(folder, key, released)
    loaded = load_model(released)
    normalise = Normalisation(loaded.config.mean, loaded.config.std)
    scheme = scheme_named(key.context.scheme)
    others = [ownership.draw_key(config, scheme.name) for _ in range(FORGED)]
    verdicts = [scheme.verify(loaded.model.state_dict(), other) for other in others]
    forged = [scheme.fidelity(loaded.model, other, images, normalise) for other in others]
    return {
        **facts_of(verdict),
        "genuine_accuracy_on_forged_images": scheme.fidelity(loaded.model, key, images, normalise),
        "random_passports": {
            "count": FORGED,
            "images": FORGED_IMAGES,
            "accuracies": forged,
            "match_rates": [other.match_rate for other in verdicts],
            "accepted": sum(other.accepted for other in verdicts),
        },
    }


def render() -> str:
    """A table of all cells that were run, as Markdown; cells not run are not in it."""
    entries = [*STORE.all().values()]
    order = {name: i for i, name in enumerate(CELLS)}
    entries.sort(key=lambda e: (e["recipe"]["epochs"], order[e["cell"]], e["recipe"]["seed"]))
    head = (
        *("cell", "norm", "epochs", "seed", "accuracy", "private accuracy", "bits right"),
        *("log₁₀ p", f"{FORGED} random passports: mean (max) accuracy", "accepted"),
        *("random bits matched", "device, precision"),
    )
    versions = sorted({e["provenance"]["torch"] for e in entries})
    return "\n".join(
        [
            "# AlexNet on CIFAR-10, short budget",
            "",
            "Rendered by `python benchmarks/cifar10.py render` from "
            "`results/cifar10-alexnet/*.json`.",
            "Accuracies in %, on all 10,000 test images; random passports on the first "
            f"{FORGED_IMAGES}.",
            "",
            *table(head, map(_row, entries)),
            "",
            f"torch {', '.join(versions)}; n = 1 run a cell.",
            "",
        ]
    )


def _row(e: Mapping[str, Any]) -> tuple[object, ...]:
    metrics, forged = e["metrics"], e.get("random_passports")
    marks = [""] * 5
    if forged:
        reached = forged["accuracies"]
        marks = [
            f"{e['matches']} of {e['bits']}",
            f"{e['log10_p_value']:.1f}",
            f"{in_percent(statistics.mean(reached))} ({in_percent(max(reached))})",
            forged["accepted"],
            f"{100 * statistics.mean(forged['match_rates']):.1f} %",
        ]
    return (
        *(e["cell"], e["norm"], e["recipe"]["epochs"], e["recipe"]["seed"]),
        *(in_percent(metrics["accuracy"]), in_percent(metrics.get("private_accuracy"))),
        *(*marks, f"{e['provenance']['device']}, {e['recipe']['precision']}"),
    )


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {RESULTS / "cifar10-alexnet.md": render()},
        run,
        {
            "name": {"choices": CELLS, "metavar": "CELL"},
            "--data": {"type": Path, "required": True},
            "--runs": {"type": Path, "default": Path("runs")},
            "--epochs": {"type": int, "default": 15},
            "--seed": {"type": int, "default": 0},
            "--precision": {"default": "float32"},
        },
    )
