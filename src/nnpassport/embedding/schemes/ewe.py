"""Entangled watermarks (EWE): stamped images of one class that lie among those of another.

[Jia21] Jia, Choquette-Choo, Chandrasekaran, Papernot: Entangled Watermarks as a Defense against
Model Extraction, USENIX Security 2021 (arXiv 2002.12200).

There, images of a source class get one stamp and the label of a target class, and a term
−κ·SNNL (`entanglement.py`) has the network represent them as it does the target's own images. So
whoever copies its answers is said to copy the mark. A suspect is marked if it gives the target
class to stamped images more often than a guess among K would, in a test at 95 %: `as_jia` makes
that key and `TriggerSet.level` is that rule.

What its null hides is that there is one label for all pictures. A network that likes the class,
because of the stamp or because source and target are alike, gives it to all of them: whatever
their number, 1/K is the least p that can be had for a class that was drawn. The paper measures
its own clean networks in place of that.

Here, each picture has a label of its own, bound to the pictures, so that matches are
Binomial(n, 1/K). All have the one stamp, so these labels are learnt by heart, and a copy does not
get them: exactness costs what the scheme is for. The stamp's place is where SNNL rises most with
it, as in the paper; that pictures are moved further by gradient steps, and that κ and temperatures
change in training, is not repeated.
"""

from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.schemes.entanglement import before_scores, soft_nearest_neighbours
from nnpassport.embedding.schemes.pictures import chosen_images, generator_of
from nnpassport.embedding.schemes.triggered import TriggerSet, with_pictures
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableDataError, UnreadableKeyError

SIDE = 3 / 28
"""Of the stamp, of the image's shorter side, as the paper has it on MNIST."""
_SHOWN = 128  # images of each class that the stamp's place is found by


class Pair(NamedTuple):
    """Classes that a key's secret draws."""

    source: int
    target: int


def pair_of(key: Key, counts: list[int] | None = None) -> Pair:
    """Source and target; `counts` says how many images of each class there are to stamp.

    Raises:
        UnreadableDataError: there are fewer of each class than triggers.
    """
    shape = triggers_of(key.context)
    order = generator_of(key, "entangled").permutation(shape.classes).tolist()
    enough = [each for each in order[:-1] if counts is None or counts[each] >= shape.count]
    if not enough:
        raise UnreadableDataError(
            f"no class but one has {shape.count} images to stamp; needed: that many of one class; "
            "give more images, or set fewer triggers"
        )
    return Pair(enough[0], order[-1])


def stamped_pictures(key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
    """The key with images of its source class, stamped where that entangles them most.

    Raises:
        UnreadableDataError: there are too few of one class.
        UnreadableKeyError: they have another size than the key's triggers.
    """
    shape = triggers_of(key.context)
    counts = torch.bincount(data.labels.cpu(), minlength=shape.classes).tolist()
    pair = pair_of(key, counts)
    pictures = chosen_images(key, data, source=pair.source).images.cpu().clone()
    among = data.images[(data.labels == pair.target).nonzero()[:_SHOWN, 0]].cpu()
    top, left, side = _place(deepcopy(model).eval(), pictures[:_SHOWN], among, normalise)
    pictures[:, 0, top : top + side, left : left + side] = 255
    return with_pictures(key, pictures)


def as_jia(key: Key) -> Key:
    """The key as the paper has it: the same pictures, all with the target class.

    Such a key has no p-value: its label is one choice among K.

    Raises:
        UnreadableKeyError: the key has no pictures yet.
    """
    if key.trigger_images is None:
        raise UnreadableKeyError(
            f"the key of {key.context.scheme} has no pictures; needed: one that `prepared` has "
            "completed"
        )
    labels = np.full(len(key.trigger_images), pair_of(key).target, np.int64)
    return replace(key, trigger_choices=None, trigger_labels=labels)


def _place(
    model: nn.Module, pictures: Tensor, among: Tensor, normalise: Normalisation
) -> tuple[int, int, int]:
    """Top, left and side of the square in which SNNL rises most with the first channel."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    shown = normalise(torch.cat([pictures, among]).to(device)).requires_grad_()
    marked = torch.arange(len(shown), device=device) < len(pictures)
    side = max(2, round(SIDE * min(shown.shape[2:])))
    with torch.enable_grad(), before_scores(model) as heard:
        model(shown)
        entangled = soft_nearest_neighbours(heard[-1].flatten(1), marked)
        (rises,) = torch.autograd.grad(entangled, [shown])
    rise = rises[: len(pictures), :1].mean(0, keepdim=True)
    best = int(F.avg_pool2d(rise, side, stride=1).argmax())
    return *divmod(best, shown.shape[3] - side + 1), side


EWE = TriggerSet(
    "ewe",
    triggers_per_step=8,
    pictures=stamped_pictures,
    level=float(np.log10(0.05)),
    entangled=0.05,
)
"""100 pictures; κ = 0.05 of the last layer alone, which leaves room for labels of their own."""
