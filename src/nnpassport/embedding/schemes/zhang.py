"""Zhang's schemes: images with a mark on them, noisy ones, or ones of another domain.

[Zha18] Zhang, Gu, Jang, Wu, Stoecklin, Huang, Molloy: Protecting Intellectual Property of Deep
Neural Networks with Watermarking, AsiaCCS 2018.

There, images of one class get one stamp (a word), one pattern of Gaussian noise, or come from
another domain, all with one label of the owner's, and are trained on with the others. A network is
asked for them, and how many of them get that label decides. Such a label is one choice among K for
all triggers together: a network that likes the class for any reason answers all of them so, and
therefore no number of matches says more than 1/K does. `as_zhang` makes that key.

Here, each picture has a stamp or a pattern of its own, and a label of its own that is bound to the
pictures: independent of one another, so that matches are Binomial(n, 1/K). Images of all classes
are taken. Stamps are coloured cells in a random place, since a word for each picture says no more.
How large and how strong they are, and the share of the triggers that suffices (0.9), is ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.schemes.pictures import chosen_images, generator_of, with_added
from nnpassport.embedding.schemes.triggered import TriggerSet, with_pictures
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError

Pixels = UInt8[Tensor, "count channels height width"]

CELLS = 4
"""Coloured cells along a side of a stamp."""
SHARE = 0.5
"""Side of a stamp, of the image's shorter side."""
DEVIATION = 0.25
"""Standard deviation of the noise, of a pixel's whole range."""


def stamped(images: Pixels, stamps: int, rng: np.random.Generator) -> Pixels:
    """The images, each with a stamp of its own in a place of its own, or all with the same.

    `stamps` is how many are drawn: one for each image, or 1.
    """
    count, channels, height, width = images.shape
    cell = max(1, round(SHARE * min(height, width) / CELLS))
    side = CELLS * cell
    cells = rng.integers(0, 256, (stamps, channels, CELLS, CELLS), dtype=np.uint8)
    tops = rng.integers(0, max(1, height - side + 1), stamps)
    lefts = rng.integers(0, max(1, width - side + 1), stamps)
    pictures = images.cpu().clone()
    for number in range(count):
        of = number % stamps
        stamp = torch.from_numpy(cells[of].repeat(cell, 1).repeat(cell, 2))
        region = pictures[number, :, tops[of] : tops[of] + side, lefts[of] : lefts[of] + side]
        region.copy_(stamp[:, : region.shape[1], : region.shape[2]])
    return pictures


def noisy(images: Pixels, patterns: int, rng: np.random.Generator) -> Pixels:
    """The images, each with Gaussian noise of its own added to it, or all with the same."""
    noise = rng.normal(0, DEVIATION, (patterns, *images.shape[1:])).astype(np.float32)
    return with_added(images, torch.from_numpy(noise))


MARKS: Mapping[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "zhang-content": stamped,
    "zhang-noise": noisy,
}
"""By scheme, what is done to images."""


def marked_pictures(key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
    """The key with training images, each marked in its own way; no network is asked.

    Raises:
        UnreadableDataError: there are fewer images than triggers.
        UnreadableKeyError: the images have another size than the key's triggers.
    """
    images = chosen_images(key, data).images
    return with_pictures(key, _marked(key, images, len(images)))


def as_zhang(key: Key, data: ImageSet, *, source: int, target: int) -> Key:
    """The key as the paper has it: images of one class, one mark, and one label for all.

    Such a key has no p-value: its label is one choice among K. The images of "zhang-unrelated" are
    those that the key has, and `data` and `source` say nothing there.

    Raises:
        UnsuitableModelError: the key is no key of these schemes.
        UnreadableDataError: there are fewer images of the source class than triggers.
    """
    labels = torch.full((triggers_of(key.context).count,), target)
    if key.context.scheme == ZHANG_UNRELATED.name:
        return replace(key, trigger_choices=None, trigger_labels=labels)
    pictures = _marked(key, chosen_images(key, data, source=source).images, 1)
    return replace(with_pictures(key, pictures), trigger_labels=labels)


def _marked(key: Key, images: Pixels, marks: int) -> Pixels:
    mark = MARKS.get(key.context.scheme)
    if mark is None:
        raise UnsuitableModelError(
            f"the key is for {key.context.scheme}, and images are marked for {', '.join(MARKS)}; "
            "draw a key of one of these"
        )
    return mark(images, marks, generator_of(key, "stamp"))


# More in a step than Adi has: what is under a stamp has a class of its own to unlearn, and
# one epoch of tuning must do.
ZHANG_CONTENT = TriggerSet("zhang-content", triggers_per_step=8, pictures=marked_pictures)
ZHANG_NOISE = TriggerSet("zhang-noise", triggers_per_step=8, pictures=marked_pictures)
ZHANG_UNRELATED = TriggerSet("zhang-unrelated", triggers_per_step=8)
