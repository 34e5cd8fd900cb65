"""Forging the baselines' marks: keys that verify on a network that nobody marked for them.

No training data and at most 100 epochs, as in the paper's Table 1. It publishes no code for this;
the protocol here is ours: it follows its one sentence (minimise the distance between the extracted
and the claimed mark over the key, the weights frozen).                   [Fan19, sect. 2]
"""

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.attacks.outcome import Forged, stopwatch
from nnpassport.attacks.passports import draw_template
from nnpassport.data.images import Normalisation
from nnpassport.embedding.schemes.deepsigns import read_out as read_activations
from nnpassport.embedding.schemes.drawn import random_signs
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.signature import host_weight
from nnpassport.embedding.schemes.uchida import read_out
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError

EPOCHS = 100
"""Most passes that a forger may take."""


def forge_uchida(model: nn.Module, scheme: Scheme, example: Tensor, rng: torch.Generator) -> Forged:
    """Bits of the forger's choice, read off a network that he did not mark: closed form.

    Draws the projection as an owner would and mirrors each row that reads the wrong bit. The
    distribution of a row is symmetric, so the forgery is distributed exactly like a genuine key:
    no test on the key alone can tell the two apart, and the network is never touched.

    Raises:
        UnsuitableModelError: the scheme has no projection.
    """
    stop = stopwatch("W")
    template, mean_filter, projection, signs = _start(model, scheme, example, rng)
    wrong = (projection @ mean_filter).sign() != signs
    projection = torch.where(wrong[:, None], -projection, projection)
    return Forged(deepcopy(model), _uchida_key(template, projection, signs), stop())


def forge_uchida_by_gradient(
    model: nn.Module,
    scheme: Scheme,
    example: Tensor,
    rng: torch.Generator,
    *,
    epochs: int = EPOCHS,
    rate: float = 0.01,
) -> Forged:
    """The same by descending BCE(σ(X·w̄), b) over the projection X with Adam, as in the paper.

    Raises:
        UnsuitableModelError: the scheme has no projection.
    """
    stop = stopwatch("W")
    template, mean_filter, projection, signs = _start(model, scheme, example, rng)
    forgery = projection.clone().requires_grad_()
    optimiser = torch.optim.Adam([forgery], lr=rate)
    for _ in range(epochs):
        # The mean filter's own scale would decide the rate otherwise.
        read = forgery @ (mean_filter / mean_filter.norm())
        loss = F.binary_cross_entropy_with_logits(read, (signs + 1) / 2, reduction="sum")
        (forgery.grad,) = torch.autograd.grad(loss, [forgery])
        optimiser.step()
    key = _uchida_key(template, forgery.detach(), signs)
    return Forged(deepcopy(model), key, stop(0, epochs))


def forge_triggers(
    model: nn.Module,
    scheme: Scheme,
    example: Tensor,
    rng: torch.Generator,
    *,
    normalise: Normalisation,
    epochs: int = EPOCHS,
    rate: float = 0.01,
) -> Forged:
    """Pictures of noise, optimised until the network gives each the label that was drawn for it.

    Adam on the pixels, which are rounded to whole values in the end.

    Raises:
        UnsuitableModelError: the scheme has no trigger set.
    """
    stop = stopwatch("W")
    template = draw_template(scheme, model, example, rng)
    shape = template.context.triggers
    if shape is None or "triggers" not in scheme.parts:
        raise UnsuitableModelError(
            f"{scheme.name} has no trigger set to forge; needed: a scheme with triggers"
        )
    victim = deepcopy(model).eval().requires_grad_(False)
    labels = torch.randint(shape.classes, (shape.count,), generator=rng)
    pixels = torch.rand((shape.count, *shape.size), generator=rng).requires_grad_()
    mean, std = (torch.tensor(n)[:, None, None] for n in (normalise.mean, normalise.std))
    optimiser = torch.optim.Adam([pixels], lr=rate)
    for _ in range(epochs):
        loss = F.cross_entropy(victim((pixels - mean) / std), labels)
        (pixels.grad,) = torch.autograd.grad(loss, [pixels])
        optimiser.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    images = (pixels.detach() * 255).round().to(torch.uint8)
    key = replace(template, trigger_images=images, trigger_labels=labels)
    return Forged(deepcopy(model), key, stop(0, epochs))


def forge_activations(
    model: nn.Module,
    scheme: Scheme,
    example: Tensor,
    rng: torch.Generator,
    *,
    normalise: Normalisation,
) -> Forged:
    """Bits of the forger's choice, read off what a network makes of noise: closed form.

    As `forge_uchida`, on the mean activations of pictures that he draws: each row that reads the
    wrong bit is mirrored, which leaves it distributed as a genuine key's.

    Raises:
        UnsuitableModelError: the scheme reads no activations.
    """
    stop = stopwatch("W")
    if "activations" not in scheme.parts:
        raise UnsuitableModelError(
            f"{scheme.name} reads no activations; needed: a scheme that does, as deepsigns"
        )
    template = draw_template(scheme, model, example, rng)
    shape, (layer,) = triggers_of(template.context), template.context.layers
    noise = torch.randint(256, (shape.count, *shape.size), generator=rng, dtype=torch.uint8)
    template = replace(template, trigger_images=noise)
    projection, signs = template.layer_projection(layer.name), random_signs(layer.length, rng)
    wrong = read_activations(model, template, normalise).sign() != signs
    projection = torch.where(wrong[:, None], -projection, projection)
    return Forged(deepcopy(model), _uchida_key(template, projection, signs), stop())


def _start(
    model: nn.Module, scheme: Scheme, example: Tensor, rng: torch.Generator
) -> tuple[Key, Tensor, Tensor, Tensor]:
    """The forger's own key, the mean filter in float64, his projection, and bits he fancies."""
    if "projection" not in scheme.parts:
        raise UnsuitableModelError(
            f"{scheme.name} reads no bits through a projection; needed: a scheme that has one, as "
            "uchida does"
        )
    template = draw_template(scheme, model, example, rng)
    (layer,) = template.context.layers
    weight = host_weight(model.state_dict(), layer).cpu().double()
    projection = template.layer_projection(layer.name).double()
    mean_filter = read_out(weight, torch.eye(projection.shape[1], dtype=torch.float64))
    return template, mean_filter, projection, random_signs(layer.length, rng)


def _uchida_key(template: Key, projection: Tensor, signs: Tensor) -> Key:
    (layer,) = template.context.layers
    return replace(
        template,
        text=None,
        projections={layer.name: projection.float()},
        signs={layer.name: signs.float()},
    )
