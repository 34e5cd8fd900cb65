"""Guo's scheme: an owner's message, spelled in pixels, changes what the network answers.

[Guo18] Guo, Potkonjak: Watermarking Deep Neural Networks for Embedded Systems, ICCAD 2018.

There, an n-bit signature of the owner's gives a message mark: so many pixels, changed a little, the
same ones in every image. Copies of training images carry it and have other labels, by a secret
function of the class; the network learns both, and shows the owner by remapping the class of any
image that is signed. `as_guo` makes that key. Its remapping is one choice among (K − 1) for each
class, whatever the number of pictures: a network that errs as the function says, be it on dark
images only, does so on all of them together, and a tail over pictures would call that proof.

Here, the mark is the same, drawn from the key's secret, and each signed picture has a label of its
own that is bound to the pictures: matches are Binomial(n, 1/K). What is lost is that the mark works
on any image: the network knows the key's own pictures, and no others.

The pixels' number and strength are ours; the paper varies both. So is the share that suffices.
"""

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.schemes.pictures import chosen_images, generator_of, with_added
from nnpassport.embedding.schemes.triggered import TriggerSet, with_pictures
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key

BITS = 128
"""Pixels that the mark changes at most; it leaves three in four of an image as they are."""
STRENGTH = 0.3
"""By how much, of a pixel's whole range: upwards for a one, downwards for a zero."""


def message_mark(key: Key, *, bits: int = BITS) -> Float[Tensor, "1 1 height width"]:
    """±1 where the owner's signature changes a pixel and 0 elsewhere: derived from the secret."""
    _, height, width = triggers_of(key.context).size
    rng = generator_of(key, "message")
    places = rng.permutation(height * width)[: min(bits, height * width // 4)]
    mark = np.zeros(height * width, np.float32)
    mark[places] = rng.choice(np.array([-1, 1], np.float32), len(places))
    return torch.from_numpy(mark).reshape(1, 1, height, width)


def signed(
    key: Key, images: UInt8[Tensor, "count channels height width"]
) -> UInt8[Tensor, "count channels height width"]:
    """The images with the key's mark on them, in all channels alike."""
    return with_added(images, STRENGTH * message_mark(key))


def signed_pictures(key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
    """The key with signed copies of training images; no network is asked.

    Raises:
        UnreadableDataError: there are fewer images than triggers.
        UnreadableKeyError: the images have another size than the key's triggers.
    """
    return with_pictures(key, signed(key, chosen_images(key, data).images))


def as_guo(key: Key, data: ImageSet) -> Key:
    """The key as the paper has it: every class has another for all of its signed images.

    Made of training images it is to be embedded, and of other images it is to be verified: the mark
    and the remapping are the same. Such a key has no p-value.

    Raises:
        UnreadableDataError: there are fewer images than triggers.
        UnreadableKeyError: the images have another size than the key's triggers.
    """
    images, classes = chosen_images(key, data), triggers_of(key.context).classes
    order = torch.from_numpy(generator_of(key, "remapping").permutation(classes))
    # Each class goes to the next one in a random circle, so that none stays what it is.
    remapped = torch.empty_like(order).scatter_(0, order, order.roll(-1))
    pictures = with_pictures(key, signed(key, images.images))
    return replace(pictures, trigger_labels=remapped[images.labels.cpu()])


GUO = TriggerSet("guo", triggers_per_step=8, pictures=signed_pictures)
