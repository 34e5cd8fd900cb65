"""Train a network that was trained already without letting it forget: by what it answered before.

[Hin15] Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.equations import divergence
from nnpassport.embedding.network.outputs import call, logits_of, tensors_in
from nnpassport.embedding.train.loop import Objective, Outcome, Task
from nnpassport.scheme import Batch

_TEMPERATURE = 2.0


def taught(make: Callable[[Task], Objective], teacher: nn.Module, share: float) -> Objective:
    """The objective that `make` makes, every branch's loss partly that of imitating `teacher`.

        (1 − s)·L_c + s·T²·KL(softmax(teacher / T) ‖ softmax(branch / T)),  s the `share` in [0, 1]

    `teacher` is asked, in evaluation mode, about the step's own images, augmentation and all; it
    moves to where they are.
    """
    answers: list[Tensor] = []
    teacher = teacher.eval().requires_grad_(False)

    def task(output: Any, labels: Tensor) -> Tensor:
        logits = logits_of(output)
        # The private branch may have seen the last images only.
        imitation = divergence(logits, answers[0][-len(logits) :], temperature=_TEMPERATURE)
        return (1 - share) * F.cross_entropy(logits, labels) + share * imitation

    inner = make(task)

    def objective(model: nn.Module, batch: Batch) -> Outcome:
        teacher.to(tensors_in(batch.images)[0].device)
        with torch.no_grad():
            answers[:] = [logits_of(call(teacher, batch.images))]
        return inner(model, batch)

    return objective
