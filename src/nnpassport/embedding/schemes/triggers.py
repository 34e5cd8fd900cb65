"""What the schemes with a trigger set share: its shape, its turn in each step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.layers import Branch, on_branch
from nnpassport.embedding.network.outputs import Example, call, logits_of, part_of, tensors_in
from nnpassport.embedding.train.labels import (
    WithTriggers,
    mean_loss,
    parted,
    plain_loss,
    with_triggers,
)
from nnpassport.embedding.train.loop import Task
from nnpassport.keys.context import TriggerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    WHOLE,
    BadRecipeError,
    Batch,
    OwnershipError,
    Part,
    UnsuitableModelError,
)

USUAL = 2
"""Trigger images in each step, as in the paper's code."""
TAUGHT = 25
"""How often a trigger has to be shown to be learnt: with half as often two of three are not."""


def often_enough(triggers: int, steps: int, batch: int) -> int:
    """Trigger images in each of so many steps, of so many images each, that teach all triggers."""
    return max(USUAL, min(-(-TAUGHT * triggers // steps), batch // 2))


def trigger_shape(count: int, model: nn.Module, example: Example) -> TriggerShape:
    """Shape of a set of `count` triggers for a network that takes inputs like `example`.

    Raises:
        UnsuitableModelError: these are not images.
    """
    with torch.no_grad(), on_branch(model, Branch.PUBLIC):
        classes = logits_of(call(model, example)).shape[1]
    tensors = tensors_in(example)
    if len(tensors) != 1 or tensors[0].dim() != 4:
        raise UnsuitableModelError(
            f"triggers are images, and the network takes {[tuple(t.shape) for t in tensors]}; "
            "needed: one input of shape (batch, channel, height, width); scheme V2 has no triggers"
        )
    channels, height, width = tensors[0].shape[1:]
    return TriggerShape(count, classes, (channels, height, width))


def trigger_batch(key: Key, normalise: Normalisation | None) -> Batch:
    """The key's whole trigger set, as the network sees it.

    Raises:
        UnsuitableModelError: `normalise` is None, and the images are kept as pixels.
    """
    if normalise is None:
        raise UnsuitableModelError(
            f"{key.context.scheme} mixes trigger images into training, and they are kept as "
            "pixels; pass normalise=, the normalisation that the network's other images get"
        )
    images, labels = key.trigger_set()
    return Batch(normalise(images), labels)


_SHOWN = 256  # pictures at a time: what the network makes of them may be large
_PIXELS = 2**24  # numbers of them at a time


def answers_to(key: Key, model: nn.Module, normalise: Normalisation) -> Int64[Tensor, " triggers"]:
    """Classes that `model`, as it stands, predicts for the key's trigger images.

    Raises:
        UnsuitableModelError: the network does not take images of that size.
    """
    images, _ = key.trigger_set()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shown = max(1, min(_SHOWN, _PIXELS // images[0].numel()))
    answers = []
    with torch.no_grad(), taking(key):
        for part in images.split(shown):
            answers.append(logits_of(model(normalise(part.to(device)))).argmax(1).cpu())
    return torch.cat(answers)


@contextmanager
def taking(key: Key) -> Iterator[None]:
    """Turns what a network that does not take the key's pictures says into an error of ours.

    Raises:
        UnsuitableModelError: it said so.
    """
    try:
        yield
    except OwnershipError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:  # shapes that do not meet
        shape = key.context.triggers
        size = None if shape is None else shape.size
        raise UnsuitableModelError(
            f"the network does not run on the key's pictures of {size} ({error!s:.200}); needed: "
            "one that takes images of that size"
        ) from error


def mixing(triggers: Batch, count: int) -> Callable[[Batch], Batch]:
    """`mixed`, the triggers brought to where the images are at the first step."""

    def mix(batch: Batch) -> Batch:
        nonlocal triggers
        for images in tensors_in(batch.images)[:1]:
            device = images.device
            triggers = Batch(triggers.images.to(device), triggers.labels.to(device))
        return mixed(batch, triggers, count)

    return mix


def triggers_here(count: int, part: Part) -> int:
    """How many of a step's `count` triggers a part of its batch has."""
    return len(range(part.index, count, part.of))


def mixed(batch: Batch, triggers: Batch, count: int) -> Batch:
    """The batch with the step's turn of the trigger set at its end; the set cycles.

    The parts of a batch share the turn: the first trigger is the first part's, and so on.

    Raises:
        UnsuitableModelError: the network takes something else than one tensor of images.
    """
    device = triggers.labels.device
    places = torch.arange(count, device=device)[batch.part.index :: batch.part.of]
    turn = (batch.step * count + places) % len(triggers.labels)
    shown = triggers.images[turn]

    def joined(images: Tensor) -> Tensor:
        return torch.cat([images, shown.to(images)])

    match batch.images:
        case Tensor() as images if images.shape[1:] == shown.shape[1:]:
            inputs: Any = joined(images)
        case {**named} if _are_images([*named.values()], shown):
            inputs = {name: joined(cast(Tensor, images)) for name, images in named.items()}
        case (Tensor() as images,) if _are_images([images], shown):
            inputs = (joined(images),)
        case other:
            raise UnsuitableModelError(
                f"triggers are images of shape {tuple(shown.shape[1:])}, and the network takes "
                f"{[tuple(tensor.shape) for tensor in tensors_in(other)]}; needed: one tensor of "
                "images of that shape; scheme V2 has no triggers"
            )
    count = len(tensors_in(batch.images)[0])
    labels = with_triggers(batch.labels, count, triggers.labels[turn])
    return batch._replace(images=inputs, labels=labels)


def _are_images(values: list[Any], shown: Tensor) -> bool:
    return len(values) == 1 and all(
        isinstance(value, Tensor) and value.shape[1:] == shown.shape[1:] for value in values
    )


def branch_loss(
    output: Any,
    labels: Any,
    count: int,
    weight: float | None,
    task: Task | None,
    part: Part = WHOLE,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """L_c of one branch's images, and of its triggers: the last of the batch, `count` in a step.

    Where `weight` (λ_t) is None, a trigger weighs like any other image: the first number is the
    mean over all of them and the second for information. Of a `part` of a batch, the mean of these
    numbers over all parts is what the whole batch has.

    Raises:
        BadRecipeError: the branch sees triggers and no images.
    """
    loss, here = task or plain_loss, triggers_here(count, part)
    alone = part.of == 1 and weight is None and task is None
    if count == 0 or (alone and not isinstance(labels, WithTriggers)):
        whole = mean_loss(loss(output, labels))
        return whole, torch.zeros_like(whole)
    of_task, images, classes = parted(labels, here)
    if images < 1:
        raise BadRecipeError(
            f"a branch sees {images + here} images of a step, and all may be triggers ({here} of "
            "them); needed: a larger private_share or batch, or fewer triggers a step"
        )
    of_images = mean_loss(loss(part_of(output, 0, images), of_task))
    of_triggers = torch.zeros_like(of_images)
    if here:
        of_triggers = plain_loss(part_of(output, images, images + here), classes)
        of_triggers = of_triggers * (here * part.of / count)
    if weight is not None:
        return of_images, of_triggers
    share = count / (images * part.of + count)
    return (1 - share) * of_images + share * of_triggers, of_triggers
