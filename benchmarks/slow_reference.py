"""The paper's schemes run the way its published code runs them: what `nnpassport bench` compares.

Same losses and gradients as the passports of `nnpassport.embedding.schemes`, and three things
done the slow way:

- both passports of a layer are convolved with its weight in every forward that presents them;
- V2 and V3 run the whole network twice a step, public then private, before one backward;
- the trigger images of V3 are in the batch of both.

What is not slow is left alike, so that the difference is due to these alone: architecture, loss,
optimiser, data. One liberty: the published layer keeps public scale and shift beside a norm without
affine, and so does this one, but V1's unused pair is kept too, without a gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.equations import sign_loss
from nnpassport.embedding.network.survey import choose, survey
from nnpassport.embedding.schemes.passport import Passport
from nnpassport.embedding.train.loop import Objective, Outcome
from nnpassport.keys.key import Key
from nnpassport.scheme import Batch


class SlowPassportNorm(nn.Module):
    """norm(x), then γ·x + β: public parameters, or means over space of W∗P_γ and W∗P_β."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module, passport: Tensor, signs: Tensor) -> None:
        super().__init__()
        self.norm = _without_affine(norm).to(conv.weight)
        self.weight, self.bias = norm.weight, norm.bias
        self._conv = (conv,)  # in a tuple, so that it is not registered twice
        self.private = False
        self.gamma: Tensor | None = None
        self.register_buffer("passport", passport.to(conv.weight), persistent=False)
        self.register_buffer("signs", signs.to(conv.weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """One branch; the private one also leaves its γ for the sign loss."""
        gamma, beta = self.weight, self.bias
        if self.private:
            (conv,) = self._conv
            gamma, beta = (_averaged(conv(passport[None])) for passport in self.passport)
            self.gamma = gamma
        return gamma.view(1, -1, 1, 1) * self.norm(x) + beta.view(1, -1, 1, 1)


def objective(
    scheme: Passport, model: nn.Module, key: Key, example: Tensor, normalise: Normalisation
) -> Objective:
    """Put slow passport layers into `model`, in place; returns what its training step descends."""
    layers = _insert(model, key, example)
    triggers = _triggers(key, normalise) if scheme.triggers else None

    def step(model: nn.Module, batch: Batch) -> Outcome:
        if triggers is not None:
            count = scheme.shown_at_once
            turn = (batch.step * count + torch.arange(count)) % len(triggers.labels)
            batch = Batch(
                torch.cat([batch.images, triggers.images[turn].to(batch.images)]),
                torch.cat([batch.labels, triggers.labels[turn].to(batch.labels)]),
            )
        loss = batch.images.new_zeros(())
        for private in (False, True) if scheme.two_branches else (True,):
            for layer in layers:
                layer.private = private
            loss = loss + F.cross_entropy(model(batch.images), batch.labels)
        for layer in layers:
            loss = loss + scheme.sign_weight * sign_loss(
                layer.gamma, layer.signs, margin=scheme.margin
            )
        return Outcome(loss, {})

    return step


def _insert(model: nn.Module, key: Key, example: Tensor) -> list[SlowPassportNorm]:
    names = [layer.name for layer in key.context.layers]
    sites = {site.name: site for site in choose(model, survey(model, example), names)}
    layers = []
    for name, site in sites.items():
        layer = SlowPassportNorm(
            site.layer,
            model.get_submodule(site.norm),
            key.layer_passport(name),
            key.layer_signs(name),
        )
        parent, _, child = site.norm.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers.append(layer)
    return layers


def _triggers(key: Key, normalise: Normalisation) -> Batch:
    images, labels = key.trigger_set()
    return Batch(normalise(images), labels)


def _averaged(features: Tensor) -> Tensor:
    return features.mean(dim=(0, 2, 3))


_PLAIN_NORMS: dict[type, Callable[[nn.Module], nn.Module]] = {
    nn.BatchNorm2d: lambda norm: nn.BatchNorm2d(norm.num_features, affine=False),
    nn.GroupNorm: lambda norm: nn.GroupNorm(norm.num_groups, norm.num_channels, affine=False),
}


def _without_affine(norm: nn.Module) -> nn.Module:
    return _PLAIN_NORMS[type(norm)](norm)
