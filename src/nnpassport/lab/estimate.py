"""How long the cells that are still to be run will take here, from steps that are measured now."""

from collections.abc import Callable, Iterable
from functools import cache
from statistics import median

import torch

from nnpassport.attacks.table import ATTACKS
from nnpassport.embedding.train.loop import Recipe
from nnpassport.lab.cells import Cell, attackers_of, embed_recipe, transfer_recipe
from nnpassport.lab.speed import SIDE, Trained, training_step
from nnpassport.lab.store import Store
from nnpassport.lab.tasks import images_of, missing
from nnpassport.lab.timing import in_turns

_REPEATS = 3


def seconds(cells: Iterable[Cell], store: Store) -> dict[str, float | None]:
    """By the cell's name, about how long it takes; None where its images are not there to count."""
    return {cell.name: _seconds(cell, store) for cell in cells}


def _seconds(cell: Cell, store: Store) -> float | None:
    tasks = [task for task in (cell.network.task, cell.target) if task]
    if any(missing(store.data, task) for task in tasks):
        return None
    trained, tested = _images(cell, store)
    made, recipe = Trained.of(cell), _recipe(cell)
    shown = made if cell.work == "train" and not cell.network.tuned else made.plain
    step = training_seconds(shown, recipe.batch, recipe.precision) if trained else 0.0
    return trained * step + tested * forward_seconds(made.plain)


def _recipe(cell: Cell) -> Recipe:
    if cell.work == "train":
        return embed_recipe(cell.plan, cell.network)
    if cell.work == "transfer":
        return transfer_recipe(cell)
    epochs, batch, precision, _ = attackers_of(cell)
    return Recipe(epochs=epochs, batch=batch, precision=precision)


def _images(cell: Cell, store: Store) -> tuple[float, float]:
    """How many images it trains on and how many it only answers, epochs and attempts counted."""
    own, plan = images_of(store.data, cell.network.task), cell.plan
    available = _least(len(own.train), plan.train_images.get(cell.network.architecture))
    held_out = 0 if plan.selection == "best-on-test" else plan.validation * available
    epochs = _recipe(cell).epochs
    if cell.network.tuned:
        available = _least(int(available), plan.tuning_images)
    branches = 2 if cell.network.scheme in {"passport-v2", "passport-v3", "pan"} else 1
    if cell.work == "train":
        evaluated = len(own.test) if plan.selection == "best-on-test" else held_out
        tested = branches * ((epochs + 1) * evaluated + len(own.test))
        return epochs * (available - held_out), tested
    if cell.work in {"cost", "strangers"}:
        return 0, 0
    if cell.work == "transfer":
        other = images_of(store.data, cell.target)
        return epochs * _least(len(other.train), plan.transfer_images), len(other.test)
    tested = _least(len(own.test), cell.tested)
    attack, attempts = ATTACKS[cell.work], len(cell.strengths)
    trained = _least(available, plan.attack_images) * epochs if "train" in attack.needs else 0
    # Each forgery is measured as shown and as presented; before them, the network and its owner's.
    return trained * attempts, tested * (2 + 2 * attempts)


def _least(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


@cache
def training_seconds(trained: Trained, batch: int, precision: str) -> float:
    """Measured: seconds of a training step, by image."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = training_step(trained, batch, precision=precision, device=device)
    return _timed(step, device) / batch


@cache
def forward_seconds(trained: Trained, batch: int = 256) -> float:
    """Measured: seconds of an answer in full precision, by image."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = trained.network().to(device).eval()
    images = torch.randn(batch, 3, SIDE, SIDE, device=device)

    @torch.no_grad()
    def forward() -> None:
        model(images)

    return _timed(forward, device) / batch


def _timed(run: Callable[[], None], device: str) -> float:
    return median(in_turns({"": run}, repeats=_REPEATS, warmup=1, device=device)[""].seconds)
