"""What a mark costs a network that is trained with it from scratch, by form and schedule.

    python benchmarks/scratch.py run [digits|cifar10 …] [--seeds N] [--data FOLDER]
    python benchmarks/scratch.py render

The first trains what `results/scratch/*.json` lack, a file for each network; the second writes
`results/scratch.md`. Digits come with scikit-learn; FOLDER holds cifar10-train-*.parquet and
cifar10-test.parquet. Every network goes the whole way: drawn, bound, embedded, released, verified.
"""

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from common import RESULTS, command_line

from nnpassport.catalog import scheme_named, with_settings
from nnpassport.data.images import ImageSet, read_images
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.owner import bind_key, divide, draw_key, embed, release, train
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.lab.results import Results
from nnpassport.lab.tables import table

STORE = Results(RESULTS / "scratch")


class Way(NamedTuple):
    """A network's mark: its scheme, its passports, and from when on the private branch is trained.

    Without a scheme there is no mark.
    """

    title: str
    scheme: str = ""
    passports: str = "channel"
    late: float | None = None


WAYS = {
    "plain": Way("no mark"),
    "v1": Way("V1", "passport-v1"),
    "v2": Way("V2", "passport-v2"),
    "v2-trained": Way("V2, private branch trained from the start", "passport-v2", late=0.0),
    "v2-half": Way("V2, private branch trained in the second half", "passport-v2", late=0.5),
    "v2-layer": Way("V2, one passport a layer", "passport-v2", "derived"),
    "v3": Way("V3", "passport-v3"),
}


class Task(NamedTuple):
    """Images, and how networks are trained on them; `count` of them are taken to train."""

    title: str
    width: float
    recipe: Recipe
    count: int | None


_ONE_CYCLE = Recipe(batch=16, rate=0.03, schedule="one-cycle", augment=False)
TASKS = {
    "digits": Task("digits, 2 epochs of 1,366 images", 0.1875, replace(_ONE_CYCLE, epochs=2), None),
    "cifar10": Task(
        "CIFAR-10, 4 epochs of 9,500 images",
        0.25,
        replace(_ONE_CYCLE, epochs=4, batch=32, rate=0.05, augment=True),
        10_000,
    ),
}
NORMS = ("batch", "group")


def images_of(task: str, data: Path | None) -> tuple[ImageSet, ImageSet]:
    """What a task trains on, and what it is tested with."""
    if task == "digits":
        return tuple(read_images("digits", split=s, size=32) for s in ("train", "test"))
    if data is None:
        raise SystemExit("cifar10 needs --data FOLDER")
    whole = read_images(str(data / "cifar10-train-*.parquet"))
    return whole.subset(torch.arange(TASKS[task].count)), read_images(data / "cifar10-test.parquet")


def measured(
    task: str, norm: str, way: Way, seed: int, images: tuple[ImageSet, ImageSet]
) -> dict[str, Any]:
    """One network, from its first weights to the verdict on its release."""
    given, (data, test) = TASKS[task], images
    sets = divide(data, test, validation=0.05, seed=seed)
    config = ModelConfig(
        architecture="alexnet",
        arguments={"classes": len(data.classes), "norm": norm, "width": given.width},
        classes=data.classes,
        input_size=(3, 32, 32),
        mean=sets.normalise.mean,
        std=sets.normalise.std,
    )
    recipe = replace(given.recipe, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder, began = Path(temporary), time.process_time()
        if not way.scheme:
            train(folder / "owner", config, sets, recipe)
            plain = load_model(folder / "owner")
            seconds = time.process_time() - began
            found = accuracy(plain.model, test, plain.normalise)
            return {"accuracy": found, "cpu_seconds": round(seconds, 1)}
        scheme = with_settings(scheme_named(way.scheme), late=way.late)
        drawn = draw_key(config, way.scheme, owner="benchmark", passports=way.passports)
        key = bind_key(folder / "owner", config, drawn, sets, recipe)
        embed(folder / "owner", config, key, sets, recipe, scheme=scheme)
        seconds = time.process_time() - began
        verdict = release(folder / "owner", key, folder / "released")
        released = load_model(folder / "released")
        return {
            "accuracy": accuracy(released.model, test, released.normalise),
            "private_accuracy": scheme.fidelity(released.model, key, test, released.normalise),
            "cpu_seconds": round(seconds, 1),
            "matches": verdict.matches,
            "bits": verdict.bits,
        }


def run(tasks: Sequence[str], seeds: int, data: Path | None) -> None:
    """Train what is missing."""
    torch.set_num_threads(1)
    for task in tasks:
        images = images_of(task, data)
        for seed, norm, name in itertools.product(range(seeds), NORMS, WAYS):
            slug = f"{task}-{norm}-{name}-{seed}"
            if STORE.has(slug):
                continue
            found = measured(task, norm, WAYS[name], seed, images)
            command = f"python benchmarks/scratch.py run {task} --seeds {seed + 1}"
            what = {"task": task, "norm": norm, "way": name, "seed": seed}
            STORE.keep(slug, {**what, **found, "command": command})
            print(slug, found["accuracy"], found.get("private_accuracy"), flush=True)


def load() -> list[dict[str, Any]]:
    """What was trained."""
    return list(STORE.all().values())


def render(entries: list[dict[str, Any]]) -> str:
    """The page, as Markdown."""
    return "\n".join(
        [
            "# What a mark costs a training from scratch",
            "",
            "Rendered by `python benchmarks/scratch.py render` from `results/scratch/*.json`.",
            "AlexNet of 0.1875 (digits) and 0.25 (CIFAR-10) times its width, a fresh key for each "
            "network. V1, V2 and V3 have",
            "a passport for each channel unless it says otherwise, and with those they do not "
            "train the private branch but make it",
            "compute what the public one does at the end. Accuracy is the released network's on "
            "test images, and with the key",
            "presented to it; *to plain* is the mean difference to the network without a mark of "
            "the same seed, norm and images. *Cost* is",
            "the time that the processor took for all before the release, as a multiple of the "
            "plain network's: short trainings, so whatever is done once weighs much.",
            "",
            *table(HEAD, _rows(entries)),
            "",
        ]
    )


HEAD = (
    "images", "norm", "mark", "networks", "accuracy, %", "least", "to plain, points",
    "with the key, %", "furthest apart, points", "bits wrong", "cost",
)  # fmt: skip


def _rows(entries: list[dict[str, Any]]) -> Iterator[Sequence[str]]:
    for task, norm, name in itertools.product(TASKS, NORMS, WAYS):
        found = [e for e in entries if (e["task"], e["norm"], e["way"]) == (task, norm, name)]
        if found:
            yield (TASKS[task].title, norm, WAYS[name].title, *_row(found, entries))


def _row(found: list[dict[str, Any]], entries: list[dict[str, Any]]) -> Iterator[str]:
    def plain(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
        alike = (entry["task"], entry["norm"], "plain", entry["seed"])
        return next(
            (e for e in entries if (e["task"], e["norm"], e["way"], e["seed"]) == alike), None
        )

    beside = [(e, p) for e in found if (p := plain(e)) is not None]
    yield f"{len(found)}"
    yield f"{100 * fmean(e['accuracy'] for e in found):.1f}"
    yield f"{100 * min(e['accuracy'] for e in found):.1f}"
    if "bits" not in found[0]:
        yield from ("",) * 4
        yield "1"
        return
    yield f"{100 * fmean(e['accuracy'] - p['accuracy'] for e, p in beside):+.1f}"
    yield f"{100 * fmean(e['private_accuracy'] for e in found):.1f}"
    yield f"{100 * max(abs(e['accuracy'] - e['private_accuracy']) for e in found):.1f}"
    yield f"{sum(e['bits'] - e['matches'] for e in found):,} of {sum(e['bits'] for e in found):,}"
    yield f"{fmean(e['cpu_seconds'] / p['cpu_seconds'] for e, p in beside):.2f}"


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {RESULTS / "scratch.md": render(load())},
        run,
        {
            "tasks": {"nargs": "*", "choices": [*TASKS], "default": [*TASKS]},
            "--seeds": {"type": int, "default": 5},
            "--data": {"type": Path},
        },
    )
