"""What a training step costs with a mark, beside the same step without."""

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from nnpassport.data.images import Normalisation
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.loop import PRECISIONS, Objective, classification
from nnpassport.keys.keyfile import load_key
from nnpassport.lab.cells import Cell, embed_recipe
from nnpassport.lab.store import Store
from nnpassport.report.provenance import device_name
from nnpassport.scheme import Batch

TURNS = 9
_WARM = 3


def step_cost(cell: Cell, store: Store, scheme: Scheme) -> dict[str, Any]:
    """Seconds of a step with the mark over seconds of a plain one, the two taken in turns."""
    plain = load_model(store.folder(cell.plain))
    key = load_key(store.folder(cell) / "owner.key")
    normalise = Normalisation(plain.config.mean, plain.config.std)
    marked = deepcopy(plain.model)
    scheme.insert(marked, key, torch.zeros(2, *plain.config.input_size))
    recipe = embed_recipe(cell.plan, cell.network)
    objective = scheme.objective(key, steps=TURNS + _WARM, normalise=normalise)
    size, dtype = plain.config.input_size, PRECISIONS[recipe.precision]
    steps = {
        "plain": _step(plain.model, classification, recipe.batch, size, dtype),
        "marked": _step(marked, objective, recipe.batch, size, dtype),
    }
    ratios = []
    for turn in range(TURNS + _WARM):
        taken = {}
        for name in ("plain", "marked")[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            steps[name]()
            taken[name] = time.perf_counter() - begun
        if turn >= _WARM:
            ratios.append(taken["marked"] / taken["plain"])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "n": len(ratios),
        "batch": recipe.batch,
        "precision": recipe.precision,
        "device": device_name(),
    }


def _step(
    model: nn.Module,
    objective: Objective,
    batch: int,
    size: tuple[int, int, int],
    dtype: torch.dtype | None,
) -> Callable[[], None]:
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.001)
    images = torch.randn(batch, *size).contiguous(memory_format=torch.channels_last)
    labels, done = torch.randint(10, (batch,)), 0

    def step() -> None:
        nonlocal done
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = objective(model, Batch(images, labels, done)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        done += 1

    return step
