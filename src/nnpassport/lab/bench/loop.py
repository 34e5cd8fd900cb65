"""What the training loop adds to its steps: `fit` on images in memory, beside the bare steps."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from nnpassport.data.images import CIFAR10
from nnpassport.data.imageset import ImageSet
from nnpassport.embedding.train.loop import Journal, Recipe, fit
from nnpassport.lab.bench.cases import LOOP_STEPS, Case
from nnpassport.lab.bench.networks import network
from nnpassport.lab.bench.steps import bare_steps, objective


def loop(case: Case, device: str) -> Callable[[], object]:
    """A function that does `LOOP_STEPS` steps: bare ones, or one epoch of `fit`.

    The epoch draws, augments and normalises its images, logs every tenth step and writes a
    checkpoint at its end; it evaluates nothing.
    """
    scheme, _, what = case.network.partition(" ")
    model = network(case)
    descend = objective(replace(case, network=scheme), model)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if what == "step":
        return bare_steps(case, model, descend, device)
    rng = torch.Generator().manual_seed(0)
    count = LOOP_STEPS * case.batch
    data = ImageSet(
        torch.randint(256, (count, 3, 32, 32), generator=rng, dtype=torch.uint8),
        torch.randint(10, (count,), generator=rng),
        tuple("0123456789"),
    )
    recipe = Recipe(epochs=1, batch=case.batch, precision=case.precision)

    def run() -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            fit(model, descend, data, recipe, normalise=CIFAR10, journal=Journal(folder))
        finally:
            shutil.rmtree(folder)

    return run
