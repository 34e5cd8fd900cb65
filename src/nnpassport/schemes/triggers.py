"""What the schemes with a trigger set share: its shape, its turn in each step."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.data.images import Normalisation
from nnpassport.evidence.context import TriggerShape
from nnpassport.evidence.key import Key
from nnpassport.layers import Branch, on_branch
from nnpassport.scheme import Batch, UnsuitableModelError


def trigger_shape(count: int, model: nn.Module, example: Tensor) -> TriggerShape:
    """Shape of a set of `count` triggers for a network that takes inputs like `example`."""
    with torch.no_grad(), on_branch(model, Branch.PUBLIC):
        classes = model(example).shape[1]
    channels, height, width = example.shape[1:]
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


def answers_to(key: Key, model: nn.Module, normalise: Normalisation) -> Int64[Tensor, " triggers"]:
    """Classes that `model`, as it stands, predicts for the key's trigger images."""
    images, _ = key.trigger_set()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        return model(normalise(images.to(device))).argmax(1).cpu()


def mixed(batch: Batch, triggers: Batch, count: int) -> Batch:
    """The batch with the step's turn of the trigger set at its end; the set cycles."""
    turn = (batch.step * count + torch.arange(count)) % len(triggers.labels)
    return Batch(
        torch.cat([batch.images, triggers.images[turn].to(batch.images)]),
        torch.cat([batch.labels, triggers.labels[turn].to(batch.labels)]),
        batch.step,
    )


def share_right(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Accuracy on one batch, in [0, 1]."""
    return (logits.detach().argmax(1) == labels).float().mean()
