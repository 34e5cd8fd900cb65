"""What labels are, in the forms that tasks have them in: the loss without `task`, and its measure.

    scores (batch classes …)    class indices (batch …), −100 where there is none
                                or shares of the classes (batch classes …)

Everything else (several classes at once, one score, numbers, sentences) is for a `task` of the
caller's own, and no accuracy is shown of it.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import logits_of, part_of
from nnpassport.scheme import UnsuitableModelError

IGNORED = -100
"""The index of what has no label, as PyTorch's cross-entropy has it."""
_SUM = 1e-2  # how far shares may be from one together


class WithTriggers(NamedTuple):
    """Labels of a step's images, whatever the task makes of them, and classes of its triggers.

    Attributes:
        labels: of the `images` first rows.
        triggers: class indices of the rows behind them.
    """

    labels: Any
    images: int
    triggers: Int64[Tensor, " triggers"]


def with_triggers(labels: Any, images: int, triggers: Int64[Tensor, " triggers"]) -> Any:
    """Labels of images with those of triggers behind them; the triggers keep their class.

    Class indices stay class indices. Of mixed, smoothed or other labels both are kept apart.
    """
    if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point():
        return torch.cat([labels, triggers.to(labels)])
    return WithTriggers(labels, images, triggers)


def parted(labels: Any, triggers: int) -> tuple[Any, int, Int64[Tensor, " triggers"]]:
    """Labels of the images, how many there are, and classes of the `triggers` behind them."""
    if isinstance(labels, WithTriggers):
        return labels
    images = len(labels) - triggers
    return labels[:images], images, labels[images:]


def rows(labels: Any, start: int, stop: int) -> Any:
    """The labels of the rows `start` to `stop` of a batch."""
    if not isinstance(labels, WithTriggers):
        return part_of(labels, start, stop)
    images = labels.images
    return WithTriggers(
        part_of(labels.labels, start, min(stop, images)),
        max(0, min(stop, images) - start),
        labels.triggers[max(0, start - images) : max(0, stop - images)],
    )


def plain_loss(output: Any, labels: Any) -> Float[Tensor, ""]:
    """L_c: cross-entropy of the class scores.

    Raises:
        UnsuitableModelError: the labels are of a task that has another loss.
    """
    scores = logits_of(output)
    _check(scores, labels)
    wanted = labels if labels.is_floating_point() else labels.long()
    try:
        return F.cross_entropy(scores, wanted)
    except IndexError as error:
        raise _other_task(
            f"labels run from {int(wanted.min())} to {int(wanted.max())}, and the network has "
            f"scores for {scores.shape[1]} classes"
        ) from error


def mean_loss(loss: Tensor) -> Float[Tensor, ""]:
    """The mean of what a loss of the caller's own gives, if it does not reduce it itself.

    Raises:
        UnsuitableModelError: it gave no tensor.
    """
    if not isinstance(loss, Tensor):
        raise UnsuitableModelError(
            f"task= returned {type(loss).__name__}; needed: a tensor, the loss of one branch"
        )
    return loss if loss.dim() == 0 else loss.mean()


def share_right(scores: Tensor, labels: Tensor) -> Float[Tensor, "2"]:
    """Accuracy on a part of a batch, as a count: right answers, and answers.

    Of dense outputs every place with a label counts, of shares the largest.
    """
    answers = scores.detach().argmax(1)
    if labels.is_floating_point():
        labels = labels.argmax(1)
    there = labels != IGNORED
    right = ((answers == labels) & there).sum()
    return torch.stack([right, there.sum()]).float()


def share_right_with(output: Any, labels: Any, triggers: int) -> Float[Tensor, "2"]:
    """The same of images and the triggers behind them, each by its own labels."""
    if not isinstance(labels, WithTriggers):
        return share_right(logits_of(output), labels)
    images, count, classes = parted(labels, triggers)
    scores = logits_of(output)
    return share_right(scores[:count], images) + share_right(scores[count:], classes)


def _check(scores: Tensor, labels: Any) -> None:
    """Refuse labels whose cross-entropy would be of something else."""
    if not isinstance(labels, Tensor):
        raise _other_task(f"the labels are {type(labels).__name__}")
    given = f"the network answers {tuple(scores.shape)} to labels {tuple(labels.shape)}"
    if scores.dim() < 2 or scores.shape[1] < 2:
        raise _other_task(f"{given}, one score each, and the cross-entropy of one is always zero")
    places = (len(scores), *scores.shape[2:])
    if labels.is_floating_point() and labels.shape == scores.shape:
        # Not where it would make an accelerator wait.
        if labels.device.type == "cpu" and not _are_shares(labels):
            raise _other_task(f"{given} that are no shares: they do not sum to one in each image")
        return
    if labels.is_floating_point() or tuple(labels.shape) != places:
        kind = str(labels.dtype).removeprefix("torch.")
        raise _other_task(f"{given} of {kind}, which are neither class indices nor shares")


def _are_shares(labels: Tensor) -> bool:
    sums = labels.detach().float().sum(1)
    return bool(((sums - 1).abs() <= _SUM).all() and (labels.detach() >= 0).all())


def _other_task(given: str) -> UnsuitableModelError:
    return UnsuitableModelError(
        f"{given}; needed: class indices (batch …) or shares of the classes (batch classes …) for "
        "scores (batch classes …); for any other task pass task=, a loss of your own that takes "
        "the output of one branch and the labels (torch.nn.functional."
        "binary_cross_entropy_with_logits, say)"
    )
