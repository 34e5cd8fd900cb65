"""A training step by itself, on images that are there: what all timings of training repeat."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nnpassport.embedding.train.loop import PRECISIONS, Objective, products_in
from nnpassport.scheme import Batch


def descent(
    model: nn.Module,
    objective: Objective,
    batch: tuple[Tensor, Tensor],
    steps: Iterator[int],
    *,
    running: Any = None,
    precision: str = "float32",
    rate: float = 0.001,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Callable[[], None]:
    """A function that descends `objective` once: forward, backward, SGD with these settings.

    `batch` is of images and labels; `steps` gives each step its number. `running` is what is called
    in the model's place, such as the model compiled.
    """
    images, labels = batch
    kind, dtype = images.device.type, PRECISIONS[precision]
    trained = (p for p in model.parameters() if p.requires_grad)
    optimiser = torch.optim.SGD(trained, lr=rate, momentum=momentum, weight_decay=weight_decay)

    called = model if running is None else running

    def step() -> None:
        with products_in(precision, kind):
            with torch.autocast(kind, dtype, enabled=dtype is not None):
                loss = objective(called, Batch(images, labels, next(steps))).loss
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def random_batch(size: tuple[int, ...], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Normal images of this size (batch channels height width), and labels of ten classes."""
    images = torch.randn(*size, device=device).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, size[:1], device=device)
