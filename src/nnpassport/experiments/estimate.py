"""How long the cells that are still to be run will take here, from steps that are measured now."""

import time
from collections.abc import Callable, Iterable
from functools import cache
from statistics import median
from typing import Any

import torch

from nnpassport.audit.table import ATTACKS
from nnpassport.catalog import scheme_named
from nnpassport.data.images import CIFAR10
from nnpassport.experiments.cells import Cell, embed_recipe, transfer_recipe
from nnpassport.experiments.store import Store
from nnpassport.experiments.tasks import images_of, missing
from nnpassport.models import build
from nnpassport.scheme import Batch
from nnpassport.training import PRECISIONS, Objective, Recipe, classification

Arguments = tuple[tuple[str, Any], ...]
_REPEATS = 3
_SIDE = 32


def seconds(cells: Iterable[Cell], store: Store) -> dict[str, float | None]:
    """By the cell's name, about how long it takes; None where its images are not there to count."""
    return {cell.name: _seconds(cell, store) for cell in cells}


def _seconds(cell: Cell, store: Store) -> float | None:
    tasks = [task for task in (cell.network.task, cell.target) if task]
    if any(missing(store.data, task) for task in tasks):
        return None
    trained, tested = _images(cell, store)
    network, plan = cell.network, cell.plan
    arguments = tuple(sorted(plan.architectures[network.architecture].items()))
    shape = (network.architecture, arguments)
    scheme = network.scheme if cell.work == "train" else ""
    recipe = _recipe(cell)
    step = training_seconds(*shape, network.norm, scheme, recipe.batch, recipe.precision)
    return trained * step + tested * forward_seconds(*shape, network.norm)


def _recipe(cell: Cell) -> Recipe:
    if cell.work == "train":
        return embed_recipe(cell.plan, cell.network)
    if cell.work == "transfer":
        return transfer_recipe(cell)
    epochs, batch, precision = cell.plan.attackers
    return Recipe(epochs=epochs, batch=batch, precision=precision)


def _images(cell: Cell, store: Store) -> tuple[float, float]:
    """How many images it trains on and how many it only answers, epochs and attempts counted."""
    own, plan = images_of(store.data, cell.network.task), cell.plan
    available = _least(len(own.train), plan.train_images.get(cell.network.architecture))
    held_out = 0 if plan.selection == "best-on-test" else plan.validation * available
    epochs = _recipe(cell).epochs
    branches = 2 if cell.network.scheme in {"passport-v2", "passport-v3"} else 1
    if cell.work == "train":
        evaluated = len(own.test) if plan.selection == "best-on-test" else held_out
        tested = branches * ((epochs + 1) * evaluated + len(own.test))
        return epochs * (available - held_out), tested
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
def training_seconds(
    architecture: str, arguments: Arguments, norm: str, scheme: str, batch: int, precision: str
) -> float:
    """Measured: seconds of a training step, by image."""
    model = _network(architecture, arguments, norm)
    objective: Objective = classification
    if scheme:
        example, chosen = torch.zeros(2, 3, _SIDE, _SIDE), scheme_named(scheme)
        key = chosen.draw_key(model, example, seed=bytes(32))
        chosen.insert(model, key, example)
        objective = chosen.objective(key, steps=1, normalise=CIFAR10)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.001)
    images = torch.randn(batch, 3, _SIDE, _SIDE, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), device=device)
    dtype = PRECISIONS[precision]

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = objective(model, Batch(images, labels, 0)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return _timed(step) / batch


@cache
def forward_seconds(architecture: str, arguments: Arguments, norm: str, batch: int = 256) -> float:
    """Measured: seconds of an answer in full precision, by image."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _network(architecture, arguments, norm).to(device).eval()
    images = torch.randn(batch, 3, _SIDE, _SIDE, device=device)

    @torch.no_grad()
    def forward() -> None:
        model(images)

    return _timed(forward) / batch


def _network(architecture: str, arguments: Arguments, norm: str) -> torch.nn.Module:
    # Ten classes whatever the task: the head hardly matters beside the rest.
    return build(architecture, **{"classes": 10, "norm": norm, **dict(arguments)})


def _timed(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return median(times)
