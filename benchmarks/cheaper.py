"""What cheaper training of the private branch costs in accuracy: AlexNet on CIFAR-10.

    python benchmarks/cheaper.py run --data FOLDER     all cells that results/ does not have yet
    python benchmarks/cheaper.py render                results/cheaper.md and its picture

FOLDER holds cifar10-train-*.parquet and cifar10-test.parquet. Every cell has the same first
weights, order and augmentation for its seed; test images are only reported on. The cost of a cell
is counted: FLOPs of its steps as a multiple of the plain network's, which its times can be held to.
"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, alexnet, command_line, sets_in, short, trained
from matplotlib.figure import Figure

from nnpassport.embedding import owner as ownership
from nnpassport.lab.bench import lower_bound
from nnpassport.lab.marks import facts_of
from nnpassport.lab.results import Results
from nnpassport.lab.tables import in_percent, table
from nnpassport.report.page import as_text, styled
from nnpassport.report.provenance import provenance

STORE = Results(RESULTS / "cheaper")


class Cell(NamedTuple):
    """A scheme, "" for a plain network, and how seldom its private branch is trained."""

    scheme: str = ""
    late: float = 0.0
    share: float = 1.0
    every: int = 1

    @property
    def settings(self) -> Mapping[str, float]:
        """As the scheme's fields."""
        return {"late": self.late, "private_share": self.share, "private_every": self.every}

    @property
    def work(self) -> float:
        """The private branch's share of its full work."""
        return (1 - self.late) * self.share / self.every

    @property
    def name(self) -> str:
        """For files."""
        return (
            f"{self.scheme or 'plain'}-late{self.late:g}-share{self.share:g}-every{self.every}"
            if self.scheme
            else "plain"
        )

    @property
    def title(self) -> str:
        """For people."""
        cheaper = [
            *([f"late {self.late:g}"] if self.late else []),
            *([f"share {self.share:g}"] if self.share < 1 else []),
            *([f"every {self.every} steps"] if self.every > 1 else []),
        ]
        name = {"": "plain", "passport-v2": "V2", "passport-v3": "V3"}[self.scheme]
        return f"{name}, {', '.join(cheaper)}" if cheaper else name


V2, V3 = "passport-v2", "passport-v3"
CELLS = (
    Cell(),
    Cell(V2),
    Cell(V2, share=0.25),
    Cell(V2, every=4),
    Cell(V2, late=0.75),
    Cell(V3, share=0.25),
    Cell(V2, late=0.5),
    Cell(V2, share=0.5),
    Cell(V3),
    Cell(V2, late=0.9),
    Cell(V3, late=0.5),
    Cell(V2, every=2),
    Cell(V2, late=0.75, share=0.5),
    Cell(V2, share=0.125),
    Cell(V2, every=8),
)


def run(data: Path, runs: Path, *, epochs: int, seeds: int, only: str | None) -> None:
    """Train every cell that is missing, seed by seed; a cell that was begun goes on."""
    for seed in range(seeds):
        for cell in CELLS:
            name = f"{cell.name}-{epochs}-{seed}"
            if STORE.has(name) or (only is not None and only not in cell.name):
                continue
            claim = runs / f"{name}.claimed"  # several of these may run beside one another
            runs.mkdir(parents=True, exist_ok=True)
            try:
                claim.touch(exist_ok=False)
            except FileExistsError:
                continue
            try:
                origin = provenance()
                STORE.keep(name, train(cell, data, runs / name, epochs=epochs, seed=seed), origin)
            finally:
                claim.unlink()


def train(cell: Cell, data: Path, folder: Path, *, epochs: int, seed: int) -> dict[str, Any]:
    """Train one cell; its numbers, and what they are of."""
    sets, recipe, begun = sets_in(data, seed=seed), short(epochs, seed), time.monotonic()
    config = alexnet(sets.train.classes, "group")
    how = {"scheme": cell.scheme, "settings": cell.settings}
    metrics, key = trained(folder, config, sets, recipe, **how)
    bits = {} if key is None else facts_of(ownership.release(folder, key, folder / "released"))
    return {
        "cell": cell._asdict(),
        "metrics": metrics,
        **bits,
        "step_cost": 1 + (lower_bound("alexnet") - 1) * cell.work if cell.scheme else 1.0,
        "recipe": asdict(recipe),
        "train_images": len(sets.train),
        "test_images": len(sets.test),
        "wall_seconds_of_this_call": round(time.monotonic() - begun, 1),
        "command": f"python benchmarks/cheaper.py run --epochs {epochs} --seeds {seed + 1}",
    }


def entries_in(folder: Path) -> list[dict[str, Any]]:
    """What was run, in the order of `CELLS`; cells that were not are not in it."""
    order = {cell: i for i, cell in enumerate(CELLS)}
    found = Results(folder).all().values()
    return sorted(found, key=lambda e: (order[Cell(**e["cell"])], e["recipe"]["seed"]))


def render(entries: Sequence[Mapping[str, Any]]) -> str:
    """A table of what was run, as Markdown."""
    first = entries[0]
    recipe, seeds = first["recipe"], sorted({e["recipe"]["seed"] for e in entries})
    by_name = {Cell(**e["cell"]).title: e["metrics"]["accuracy"] for e in entries}
    done = {Cell(**e["cell"]) for e in entries}
    missing = [cell.title for cell in CELLS if cell not in done]
    rows = []
    for e in entries:
        cell, metrics = Cell(**e["cell"]), e["metrics"]
        rows.append(
            (
                cell.title,
                f"{e['step_cost']:.3f}",
                in_percent(metrics["accuracy"]),
                f"{100 * (metrics['accuracy'] - by_name['plain']):+.2f}" if cell.scheme else "",
                in_percent(metrics.get("private_accuracy")),
                f"{e['matches']} of {e['bits']}" if cell.scheme else "",
                f"{e['log10_p_value']:.0f}" if cell.scheme else "",
                str(e["recipe"]["seed"]),
            )
        )
    head = (
        "training", "cost of a step", "accuracy, %", "to plain, points", "private accuracy, %",
        "bits", "log₁₀ p", "seed",
    )  # fmt: skip
    commits = sorted({e["provenance"]["commit"][:12] for e in entries})
    source = first["provenance"]
    return "\n".join(
        [
            "# What cheaper training of the private branch costs",
            "",
            "Rendered by `python benchmarks/cheaper.py render` from `results/cheaper/*.json`, each",
            "written by `python benchmarks/cheaper.py run --data FOLDER`.",
            "",
            f"AlexNet with group norm, CIFAR-10, {recipe['epochs']} epochs of "
            f"{first['train_images']:,} images, batch {recipe['batch']}, {recipe['precision']}; "
            f"accuracies on {first['test_images']:,} test images;",
            f"n = 1 run a row, seed {', '.join(map(str, seeds))}. So short a training is far from "
            "converged (the paper's is 200 epochs), and one run",
            "does not resolve tenths of a point. *Cost* is counted: FLOPs of a training step, the "
            "mean over all steps, as a multiple of the plain network's; without V3's triggers.",
            "",
            "*Late*: the private branch joins after that share of the steps. *Share*: it sees that "
            "share of each batch. *Every*: it runs in every so many steps. The sign loss runs in "
            "all of them.",
            "",
            *table(head, rows),
            "",
            "![Cost and accuracy](../docs/figures/cheaper.svg)",
            "",
            *([f"Not run: {'; '.join(missing)}.", ""] if missing else []),
            f"{source['device']}, {source['threads']} thread, torch {source['torch']}, commits "
            f"{', '.join(commits)}.",
            "",
        ]
    )


def draw(entries: Sequence[Mapping[str, Any]]) -> bytes:
    """Cost against accuracy, of both branches, as SVG."""
    with styled("cheaper"):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.add_subplot()
        drawn: list[float] = []
        for e in sorted(entries, key=lambda e: -e["metrics"]["accuracy"]):
            cell, metrics = Cell(**e["cell"]), e["metrics"]
            beside = sum(abs(each - e["step_cost"]) < 0.02 for each in drawn)
            drawn.append(e["step_cost"])
            cost = e["step_cost"] + 0.008 * beside  # those of one cost stand side by side
            colour = {"": "#1b1f24", V2: "#0072b2", V3: "#d55e00"}[cell.scheme]
            public, private = 100 * metrics["accuracy"], metrics.get("private_accuracy")
            axes.plot(cost, public, "o", color=colour)
            if private is not None:
                axes.plot(cost, 100 * private, "o", color=colour, fillstyle="none")
                axes.plot([cost] * 2, [public, 100 * private], color=colour, lw=0.6)
            right = cost < 1.35
            axes.annotate(
                cell.title,
                (cost, public),
                xytext=(6 if right else -6, -10 if cell.scheme == V3 else 3),
                textcoords="offset points",
                ha="left" if right else "right",
                fontsize=8,
                color=colour,
            )
        axes.set_xlabel("cost of a training step, × the plain network's (counted FLOPs)")
        axes.set_ylabel("test accuracy, %")
        axes.set_title("filled: as released; hollow: with the passport", fontsize=9, loc="left")
        buffer = io.BytesIO()
        as_text(figure).savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def pages() -> dict[Path, str | bytes]:
    """The page and its picture."""
    entries = entries_in(STORE.folder)
    picture = RESULTS.parent / "docs" / "figures" / "cheaper.svg"
    return {RESULTS / "cheaper.md": render(entries), picture: draw(entries)}


if __name__ == "__main__":
    command_line(
        __doc__,
        pages,
        run,
        {
            "--data": {"type": Path, "required": True},
            "--runs": {"type": Path, "default": Path("runs")},
            "--epochs": {"type": int, "default": 2},
            "--seeds": {"type": int, "default": 1},
            "--only": {},
        },
    )
