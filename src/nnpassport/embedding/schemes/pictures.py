"""What schemes share that make their trigger pictures of the owner's images."""

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from nnpassport.data.images import ImageSet
from nnpassport.keys.derive import stream, triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableDataError

CHOICE = "trigger-choice"
"""Purpose of the stream that says which images become pictures."""


def generator_of(key: Key, purpose: str) -> np.random.Generator:
    """Randomness of one purpose out of the key's secret.

    NumPy's and not PyTorch's, which keeps 32 bits of a seed: whoever has the images could try them
    all. What is drawn is kept in the key, so a later NumPy that draws otherwise changes no key.
    """
    draw = stream(key.seed, key.context, purpose)
    return np.random.default_rng(int.from_bytes(draw(32)))


def chosen_images(key: Key, data: ImageSet, *, source: int | None = None) -> ImageSet:
    """As many of the images as the key has triggers, drawn by its secret: of one class or of all.

    Raises:
        UnreadableKeyError: the key has no trigger set.
        UnreadableDataError: there are fewer images.
    """
    count, order = triggers_of(key.context).count, shuffled(key, data)
    if source is not None:
        order = order[data.labels.cpu()[order] == source]
    if len(order) < count:
        kind = "" if source is None else f" of class {source}"
        raise UnreadableDataError(
            f"{data.name} has {len(order)} images{kind} and {count} pictures are to be made of "
            "them; needed: one for each; give more images, or set fewer triggers"
        )
    return data.subset(order[:count])


def shuffled(key: Key, data: ImageSet) -> Int64[Tensor, " images"]:
    """The places of all images, in an order that the key's secret decides."""
    return torch.from_numpy(generator_of(key, CHOICE).permutation(len(data)))


def with_added(
    images: UInt8[Tensor, "count channels height width"],
    change: Float[Tensor, "#count #channels height width"],
) -> UInt8[Tensor, "count channels height width"]:
    """The images with a change added, in units of a pixel's whole range; rounded and clipped."""
    return (images.cpu() + 255 * change).round().clamp(0, 255).to(torch.uint8)
