"""What a part of a network that was taken from another does there.

Measured by running the network: with nothing but the part, and without it.

*Carries*: what the part alone explains of the variance of the network's outputs, on its own scale.
A part that says the right thing in a whisper carries little. *Changes*: the share of its answers
that are others once nobody hears the part any more. A part and its mirror image that cancel would
change much and carry nothing.

Both depend on what the network is run on. On images of its task it does what it is for. On noise a
network may do anything, whatever its part in the answers that matter is, because whoever puts one
in can make it speak on noise and be silent on images; no ruling rests on that.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.alignment.channels import Network, spread_over, weight_of
from nnpassport.claims.rules import Work
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.network.channels import with_arrays
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.config import ModelConfig
from nnpassport.verification.relation import Relation

IMAGES = 512
"""How many images a suspect is run on, at most."""

NOISE = 128
"""On how much noise, where there are no images."""

_BETTER_THAN_CHANCE = 2.0
"""Times the rate of chance that a suspect has to reach on images to be at home on them."""


def measured(
    found: Relation, owners: Path, images: ImageSet | None, configs: Sequence[ModelConfig]
) -> tuple[Work | None, tuple[str, ...]]:
    """What a part does on images, or without any on noise, in words.

    `owners` is the folder of the network that it was taken from, `configs` say how images may
    become numbers.
    """
    loaded = load_model(owners)
    if images is None:
        return None, _on_noise(found, loaded.model, loaded.config)
    return _on_images(found, loaded.model, images, configs)


@torch.no_grad()
def work_of(found: Relation, model: nn.Module, images: Float[Tensor, "images ..."]) -> Work | None:
    """What the part that was taken does in the network, on these inputs as it takes them.

    `model` is of the network's kind; only its form is used. None where the network says nothing
    finite, or the same of all of them.
    """
    networks = (found.whole, _heard(found, keep=True), _heard(found, keep=False))
    built = (with_arrays(model, each).eval() for each in networks)
    whole, only, without = (each(images).double() for each in built)
    if not all(each.isfinite().all() for each in (whole, only, without)):
        return None
    variance = (whole - whole.mean(0)).square().sum()
    if variance == 0:
        return None
    missed = ((whole - whole.mean(0)) - (only - only.mean(0))).square().sum()
    changed = whole.argmax(1) != without.argmax(1)
    carries = float((1 - missed / variance).clamp(0, 1))
    return Work(carries, float(changed.double().mean()), len(images))


def _heard(found: Relation, *, keep: bool) -> Network:
    """The network, in which nobody hears the other channels, or else those of the part."""
    network = found.whole.copy()
    for axis, part in found.parts:
        silent = np.flatnonzero(~part if keep else part)
        for name in axis.consumers:
            weight = weight_of(network, name).copy()
            weight[:, spread_over(silent, weight.shape[1] // len(part))] = 0
            network.arrays[f"{name}.weight"] = weight
    return network


def _on_images(
    found: Relation, model: nn.Module, images: ImageSet, configs: Sequence[ModelConfig]
) -> tuple[Work | None, tuple[str, ...]]:
    """What the part does, on images as the suspect answers them best."""
    count = min(IMAGES, len(images.images))
    some = images.subset(torch.linspace(0, len(images.images) - 1, count).long())
    ways = [Normalisation(*way) for way in dict.fromkeys((e.mean, e.std) for e in configs)]
    whole = with_arrays(model, found.whole).eval()
    reached = [accuracy(whole, some, each) for each in ways]
    best = max(range(len(ways)), key=reached.__getitem__)
    if reached[best] <= _BETTER_THAN_CHANCE / max(2, len(images.classes)):
        return None, (
            f"the suspect answers {100 * reached[best]:.0f} % of the images rightly, which is "
            "chance, so they do not show what any part of it does",
        )
    return work_of(found, model, ways[best](some.images)), ()


def _on_noise(found: Relation, model: nn.Module, config: ModelConfig) -> tuple[str, ...]:
    """What the part does on noise, for people: a part can be made to speak on noise alone."""
    noise = torch.randn(NOISE, *config.input_size, generator=torch.Generator().manual_seed(0))
    work = work_of(found, model, noise)
    if work is None:
        return ()
    return (
        f"on noise its part explains {100 * work.carries:.0f} % of what the suspect answers, and "
        f"{100 * work.changes:.0f} % of the answers are others without it; the ruling does not "
        "rest on this, because a part can be made to speak on noise alone",
    )
