"""Frontier stitching: adversarial examples, and on which side of the frontier they belong.

[LeM20] Le Merrer, Pérez, Trédan: Adversarial Frontier Stitching for Remote Neural Network
Watermarking, Neural Computing and Applications 2020 (arXiv 1711.01894).

There, images that a trained network answers rightly are moved by one step of the gradient's sign:
half of the key are true adversaries, which fool the network, and half false ones, which do not. The
network is tuned until it gives all of them their true classes. A suspect is marked if it misses at
most θ of them, θ from Binomial(n, ½) at p = 0.05: `with_true_classes` makes that key and
`matches_at_five_percent` is that rule. The ½ is a model of the unmarked network, and not a fact:
one that was trained independently, and well, answers most of the pictures rightly, since what fools
one network need not fool another, and false adversaries fool hardly any. All four networks of
`tests/test_frontier.py` that nobody marked pass that rule.

Here, each picture's label is drawn, bound to the pictures, from two classes: its true one, and the
one it was pushed towards (what fools the network, or its second best answer). No independent
network can match a fair coin more often than half the time: Binomial(n, ½) is exact, or too kind to
the suspect where it answers a third class. It costs what the paper avoids: about half of the
pictures are learnt with a wrong class.

Made for a network that is trained already. Training another one from scratch works too, and then
the pictures are close to no frontier of its own. Step sizes, and to take the smallest one with
which there are both kinds, are ours; the paper chooses one for its data.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.schemes.pictures import shuffled
from nnpassport.embedding.schemes.triggered import TriggerSet, with_pictures
from nnpassport.keys.chance import matches_needed
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError

STEPS = (1, 2, 4, 8, 16, 32, 64, 96)
"""Sizes of the gradient's step to try, of 255."""
SEARCHED = 8
"""Images looked at for each picture of the key, at most."""
LEVEL = -1.3010299956639813  # log₁₀ of the paper's p = 0.05
_BATCH = 256


class Adversaries(NamedTuple):
    """Images after a step: pictures, true classes, and the class each was pushed towards."""

    pictures: UInt8[Tensor, "images channels height width"]
    true: Int64[Tensor, " images"]
    towards: Int64[Tensor, " images"]
    fooled: Bool[Tensor, " images"]


def frontier_pictures(key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
    """The key with adversarial examples of a trained plain network: half true, half false ones.

    Raises:
        UnsuitableModelError: no step size gives enough of both kinds.
        UnreadableKeyError: the images have another size than the key's triggers.
    """
    count = triggers_of(key.context).count
    true, false = count // 2, count - count // 2
    data = data.subset(shuffled(key, data)[: SEARCHED * count])
    judge = deepcopy(model).eval().requires_grad_(False)
    parts = [part for part in _right_ones(judge, data, normalise) if len(part.classes)]
    for step in STEPS if parts else ():
        moved = [_moved(judge, part, normalise, step) for part in parts]
        found = Adversaries(*(torch.cat(column) for column in zip(*moved, strict=True)))
        places = torch.cat([found.fooled.nonzero()[:true, 0], (~found.fooled).nonzero()[:false, 0]])
        if len(places) == count:
            choices = torch.stack([found.true, found.towards], dim=1)[places]
            return with_pictures(key, found.pictures[places], choices)
    raise UnsuitableModelError(
        f"of {len(data)} images, no step of up to {STEPS[-1]} of 255 gives {true} that fool the "
        f"network and {false} that do not; needed: a trained network, and images that it answers "
        "rightly; give more images, or set fewer triggers"
    )


def with_true_classes(key: Key) -> Key:
    """The key as the paper has it: the same pictures, all with their true classes.

    Such a key has no p-value: an accurate network answers rightly without having been marked.

    Raises:
        UnreadableKeyError: the key has no pictures with two classes each.
    """
    if key.trigger_choices is None:
        raise UnreadableKeyError(
            f"the key of {key.context.scheme} has no pictures with their true classes; needed: "
            "one that `prepared` of frontier-stitching has completed"
        )
    return replace(key, trigger_choices=None, trigger_labels=key.trigger_choices[:, 0])


def matches_at_five_percent(count: int) -> int:
    """How many of `count` pictures must match by the paper's rule: all but θ.

    The largest θ with P[Binomial(n, ½) ≤ θ] ≤ 0.05.
    """
    return matches_needed(count, LEVEL)


class _Right(NamedTuple):
    """Images of one batch that the network answers rightly, and which way its loss rises."""

    images: Tensor
    classes: Tensor
    uphill: Tensor


def _right_ones(model: nn.Module, data: ImageSet, normalise: Normalisation) -> Iterator[_Right]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for images, labels in zip(data.images.split(_BATCH), data.labels.split(_BATCH), strict=True):
        pixels, classes = images.to(device), labels.to(device)
        inputs = normalise(pixels).requires_grad_()
        with torch.enable_grad():
            scores = logits_of(model(inputs))
            loss = F.cross_entropy(scores, classes, reduction="sum")
            (uphill,) = torch.autograd.grad(loss, [inputs])
        right = scores.detach().argmax(1) == classes
        yield _Right(pixels[right], classes[right], uphill.sign()[right])


@torch.no_grad()
def _moved(model: nn.Module, part: _Right, normalise: Normalisation, step: int) -> Adversaries:
    moved = (part.images + step * part.uphill).clamp(0, 255).to(torch.uint8)
    scores = logits_of(model(normalise(moved)))
    fooled = scores.argmax(1) != part.classes
    # The strongest class apart from the true one: what fools the network, if it is fooled.
    rivals = scores.scatter(1, part.classes[:, None], -torch.inf).argmax(1)
    return Adversaries(moved.cpu(), part.classes.cpu(), rivals.cpu(), fooled.cpu())


FRONTIER = TriggerSet(
    "frontier-stitching",
    triggers=192,
    triggers_per_step=8,
    pictures=frontier_pictures,
    needed=matches_at_five_percent,
)
"""192 pictures: at a chance of ½, 2⁻¹⁰⁰ is reached with up to 20 of them lost."""
