"""What a training step descends: the losses of its branches, of its triggers, and of the bits.

    L = Σ L_c + λ_t·Σ L_t + term, the sums over branches                    [Fan19, eq. 1]

L_c is a branch's loss of the task and L_t that of its triggers.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.embedding.schemes.step import Run, sign_match
from nnpassport.embedding.schemes.triggers import branch_loss
from nnpassport.embedding.train.loop import Objective, Outcome, Task
from nnpassport.scheme import Batch, Part

BRANCHES = ("", "private_")
"""What is put before the names of a branch's measures."""


class Triggers(NamedTuple):
    """The trigger images of each step.

    Attributes:
        shown: how many there are; 0 for a scheme without.
        weight: λ_t. None weighs a trigger like any other image of the step.
        mix: puts them behind the images of a batch.
    """

    shown: int
    weight: float | None
    mix: Callable[[Batch], Batch] | None


def objective_of(
    run: Run,
    *,
    term: Callable[[Tensor, Tensor], Tensor],
    rates: Callable[[Any, Any, Part], Mapping[str, Float[Tensor, "2"]]],
    triggers: Triggers,
    task: Task | None,
) -> Objective:
    """L, of what `run` ran. `term` is of the signals of its bits and the signs they should have.

    `rates` are counts of how often a branch was right, which are shown beside the loss. `task` is
    a loss of the caller's own, instead of cross-entropy on the class scores.
    """
    count, weight, mix = triggers

    def objective(model: nn.Module, batch: Batch) -> Outcome:
        batch = batch if mix is None else mix(batch)
        step = run(model, batch)
        losses, of_triggers = zip(
            *(
                branch_loss(output, labels, count, weight, task, batch.part)
                for output, labels in step.branches
            ),
            strict=True,
        )
        loss, measures = torch.stack(losses).sum(), {}
        loss = loss if step.more is None else loss + step.more
        if step.signals is not None and step.signs is not None:
            # Full precision even under autocast: bfloat16 would flip signs of small signals.
            with torch.autocast(step.signs.device.type, enabled=False):
                loss = loss + term(step.signals, step.signs)
            measures = {"sign_match": sign_match(step.signals, step.signs)}
        if count and weight is not None:
            loss = loss + weight * torch.stack(of_triggers).sum()
        for name, (output, labels), each in zip(BRANCHES, step.branches, losses, strict=False):
            if task is not None:
                measures[f"{name}task_loss"] = each.detach()
            found = rates(output, labels, batch.part)
            measures |= {f"{name}{what}": rate for what, rate in found.items()}
        return Outcome(loss, measures)

    return objective
