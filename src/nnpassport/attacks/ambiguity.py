"""Ambiguity attacks: network → key. Whoever has a key that verifies owns the network as well.

Passports that somebody forged are given the signature that they read off the network: so the
paper's V finds every bit, and what decides is F, the accuracy with the passports presented.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.attacks.outcome import Forged, stopwatch
from nnpassport.attacks.passports import (
    affine_of,
    draw_seed,
    draw_template,
    forged,
    key_with,
    patch_matrix,
    solvable,
)
from nnpassport.attacks.stretching import stretch
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import sign_loss
from nnpassport.embedding.network.layers import passport_norms
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.network.survey import Site, survey
from nnpassport.embedding.schemes.drawn import random_passports
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.embedding.train.loop import Journal, Outcome, Recipe, classification, fit
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError, Batch, UnsuitableModelError

REVERSE = Recipe(epochs=100, schedule="constant")
"""Of fake2 and fake3: SGD at 0.01, momentum 0.9, weight decay 5e-4, batch 64, 100 epochs."""


def random_passport(
    model: nn.Module, scheme: Scheme, example: Tensor, rng: torch.Generator
) -> Forged:
    """fake1: passports drawn as an owner would draw them.                [Fan19, sect. 4.2]"""
    stop = stopwatch("W")
    template = draw_template(scheme, model, example, rng)
    key = forged(template, random_passports(template, rng), model.state_dict())
    return Forged(deepcopy(model), key, stop())


def grind(
    model: nn.Module, scheme: Scheme, example: Tensor, rng: torch.Generator, *, tries: int
) -> Forged:
    """The best of so many honest keys: all that is left to a forger when keys are derived.

    N tries reach p ≈ 1/N, whatever the network. Nothing in such a key can be called chosen, which
    is why a claim that nobody has dated needs p ≤ 2⁻¹⁰⁰.

    Raises:
        BadRecipeError: `tries` is below 1.
    """
    if tries < 1:
        raise BadRecipeError(f"tries is {tries}; needed: at least 1")
    stop = stopwatch("W")
    weights = model.state_dict()
    template = draw_template(scheme, model, example, rng)
    keys = (replace(template, seed=draw_seed(rng)) for _ in range(tries))
    best = max(keys, key=lambda key: scheme.verify(weights, key).matches)
    return Forged(deepcopy(model), best, stop())


def solve_passport(
    model: nn.Module, scheme: Scheme, example: Tensor, rng: torch.Generator
) -> Forged:
    """Passports that induce exactly the scale and shift that the released network has already.

    Solves Avg(W ∗ P) = (γ, β) of the public branch, layer by layer, by least norm: with the forged
    passports presented the network computes what it computes without them, so F passes. No data,
    no training, seconds. On a V1 network, whose norms hold the passport's own γ and β, it gives
    another passport with equal outputs and equal bits.

    A layer with more filters than numbers in a filter (a 1×1 shortcut) has no such passport. With
    batch norm behind it its filters are rescaled first, which changes no output (`stretch`); where
    that is not enough it is left out: which layers carry his passports is the forger's to say.

    Raises:
        UnsuitableModelError: no layer is left.
    """
    stop = stopwatch("W")
    template = draw_template(scheme, model, example, rng)
    shown = deepcopy(model)
    sites = survey(shown, example).sites
    affine = {
        layer.name: _public_affine(shown, sites[layer.name])
        for layer in template.context.layers
        if solvable(layer) or stretch(shown, layer, sites[layer.name].norm, rng)
    }
    key = key_with(template, affine, shown.state_dict(), rng)
    return Forged(shown, key, stop())


def flip_gamma(model: nn.Module, key: Key, rng: torch.Generator, *, share: float) -> Forged:
    """An insider's passports with the signs of a random share of all γ negated, nothing trained.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
    """
    stop = stopwatch("W, P")
    weights = model.state_dict()
    genuine = affine_of(key, weights)
    signs = _flipped(torch.cat([gamma.sign() for gamma, _ in genuine.values()]), share, rng)
    parts = signs.split([len(gamma) for gamma, _ in genuine.values()])
    affine = {
        name: (gamma.abs() * sign, beta)
        for (name, (gamma, beta)), sign in zip(genuine.items(), parts, strict=True)
    }
    return Forged(deepcopy(model), key_with(_as_forger(key, rng), affine, weights, rng), stop())


def reverse_engineer(
    model: nn.Module,
    scheme: Scheme,
    data: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    rng: torch.Generator,
    journal: Journal | None = None,
) -> Forged:
    """fake2: find γ and β anew by training them alone on the task, the weights frozen.

    Starts, as the code of 2019 did, from γ = ±0.5 at random and β = 0; then solves for passports
    that induce what was found.                                            [Fan19, sect. 4.2]

    Raises:
        UnsuitableModelError: a passport layer has no norm with a scale and a shift to train.
    """
    stop = stopwatch("W, D")
    example = normalise(data.images[:2])
    template = draw_template(scheme, model, example, rng)
    trained = deepcopy(model).requires_grad_(False)
    names = [layer.name for layer in template.context.layers]
    norms = {n: trained.get_submodule(m) for n, m in norms_of(trained, names, example).items()}
    for norm in norms.values():
        scale, shift = norm.get_parameter("weight"), norm.get_parameter("bias")
        with torch.no_grad():
            scale.copy_(torch.randint(2, scale.shape, generator=rng) - 0.5)
            shift.zero_()
        norm.requires_grad_(True)
    fit(trained, classification, data, recipe, normalise=normalise, journal=journal)
    affine = {
        name: (norm.get_parameter("weight").detach(), norm.get_parameter("bias").detach())
        for name, norm in norms.items()
    }
    key = key_with(template, affine, model.state_dict(), rng)
    return Forged(with_statistics(model, trained), key, stop(len(data), recipe.epochs))


def insider_passport(
    model: nn.Module,
    scheme: Scheme,
    key: Key,
    data: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    rng: torch.Generator,
    share: float,
    journal: Journal | None = None,
) -> Forged:
    """fake3: optimise the genuine passports towards another signature, the weights frozen.

    A random `share` of all bits is flipped; the loss is the task's, the sign loss with the flipped
    bits, and Σ 1/MSE(genuine, forged), which drives the forgery away from the original. Gradients
    of all passports together are clipped to norm 2.                       [Fan19, sect. 4.2]

    Raises:
        BadRecipeError: `share` is not in [0, 1].
    """
    stop = stopwatch("W, D, P, S")
    wanted = _flipped(
        torch.cat([secrets.signs for secrets in secrets_of(key).values()]), share, rng
    )
    presented = deepcopy(model).requires_grad_(False)
    example = normalise(data.images[:2])
    two_branches = bool(getattr(scheme, "two_branches", False))
    surgery.wrap(presented, secrets_of(key), example, two_branches=two_branches)
    surgery.present(presented)
    forger = _Forger(presented, key, rng)

    def objective(module: nn.Module, batch: Batch) -> Outcome:
        nonlocal wanted
        logits = logits_of(module(batch.images))
        gamma = torch.cat([norm.affine()[0] for norm in passport_norms(presented).values()])
        wanted = wanted.to(gamma)
        loss = F.cross_entropy(logits, batch.labels) + 0.1 * sign_loss(gamma, wanted)
        match = (gamma.detach().sign() == wanted).float().mean()
        return Outcome(loss + forger.closeness(), {"sign_match": match})

    fit(forger, objective, data, recipe, normalise=normalise, journal=journal)
    found = forged(_as_forger(key, rng), forger.passports(), model.state_dict())
    surgery.remove(presented)
    return Forged(with_statistics(model, presented), found, stop(len(data), recipe.epochs))


@final
class _Forger(nn.Module):
    """A network on passports that are parameters: one long vector, so that it is clipped as one."""

    _genuine: Tensor

    def __init__(self, model: nn.Module, key: Key, rng: torch.Generator) -> None:
        super().__init__()
        self.model = model
        self._layers = key.context.layers
        genuine = torch.cat([key.layer_passport(layer.name).flatten() for layer in self._layers])
        self.register_buffer("_genuine", genuine, persistent=False)
        noise = 0.001 * torch.randn(genuine.shape, generator=rng)
        self.forgery = nn.Parameter(genuine + noise)
        self.forgery.register_hook(_clipped)
        self._matrices = {layer.name: patch_matrix(layer).float() for layer in self._layers}
        names = [layer.name for layer in self._layers]
        hosts = {id(model.get_submodule(name)): name for name in names}
        self._norms = {hosts[id(norm.layer)]: norm for norm in passport_norms(model).values()}

    def passports(self) -> dict[str, Tensor]:
        """The forged passports (2 in *space), by layer."""
        return self._parts(self.forgery)

    def closeness(self) -> Float[Tensor, ""]:
        """Σ 1/MSE(genuine, forged) over all passport tensors."""
        pairs = zip(self.passports().values(), self._parts(self._genuine).values(), strict=True)
        distances = [(mine - theirs).square().flatten(1).mean(1) for mine, theirs in pairs]
        return (1 / torch.cat(distances)).sum()

    def forward(self, x: Tensor) -> Tensor:
        """The network with the forged passports presented."""
        passports = self.passports()
        # Full precision even under autocast, as for genuine passports.
        with torch.autocast(self.forgery.device.type, enabled=False):
            for layer in self._layers:
                passport = passports[layer.name].flatten(2)
                matrix = self._matrices[layer.name] = self._matrices[layer.name].to(passport)
                patch = passport @ matrix.T
                norm = self._norms[layer.name]
                norm.mean_patch = patch.reshape(norm.mean_patch.shape)
        return self.model(x)

    def _parts(self, vector: Tensor) -> dict[str, Tensor]:
        shapes = {layer.name: (2, *layer.passport) for layer in self._layers}
        parts = vector.split([torch.Size(shape).numel() for shape in shapes.values()])
        return {n: part.view(shapes[n]) for n, part in zip(shapes, parts, strict=True)}


def _as_forger(key: Key, rng: torch.Generator) -> Key:
    """What an insider makes of the owner's key: its layers, and nothing that is derived of it.

    The seed above all must not come along: a forged key is written to files and shown around.
    """
    context = replace(key.context.by_layer(), owner="forger", nonce=draw_seed(rng)[:16])
    return Key(seed=draw_seed(rng), context=context)


def _clipped(gradient: Tensor) -> Tensor:
    return gradient * (2 / gradient.norm().clamp(min=2))


def _flipped(signs: Tensor, share: float, rng: torch.Generator) -> Tensor:
    if not 0 <= share <= 1:
        raise BadRecipeError(f"share must be in [0, 1], got {share}")
    flipped = signs.clone()
    flipped[torch.randperm(len(signs), generator=rng)[: round(share * len(signs))]] *= -1
    return flipped


def _public_affine(model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """γ and β that the layer's channels get in the released network."""
    channels = len(site.layer.get_parameter("weight"))
    norm = None if site.norm is None else model.get_submodule(site.norm)
    scale, shift = (None if norm is None else getattr(norm, n, None) for n in ("weight", "bias"))
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return (
        ones if scale is None else scale.detach().cpu(),
        zeros if shift is None else shift.detach().cpu(),
    )


def with_statistics(model: nn.Module, trained: nn.Module) -> nn.Module:
    """A copy of `model` with the running statistics that `trained` has found.

    Training in batches adapts them to the forged scales, as in the published code, and it is this
    network that the forger shows. Without batch norm there are none.
    """
    shown = deepcopy(model)
    found = dict(trained.named_buffers())
    with torch.no_grad():
        for name, buffer in shown.named_buffers():
            buffer.copy_(found[name])
    return shown


def norms_of(model: nn.Module, layers: Sequence[str], example: Tensor) -> dict[str, str]:
    """Dotted names of the norms behind the named layers, each with a scale and a shift.

    Raises:
        UnsuitableModelError: a layer has none, or a norm without parameters.
    """
    sites = survey(model, example).sites
    norms = {name: sites[name].norm for name in layers}
    for name, norm in norms.items():
        module = None if norm is None else model.get_submodule(norm)
        if module is None or any(getattr(module, n, None) is None for n in ("weight", "bias")):
            raise UnsuitableModelError(
                f"layer {name!r} has no norm with a scale and a shift to train; needed: a network "
                "with batch, group or layer norm behind its passport layers"
            )
    return {name: norm for name, norm in norms.items() if norm is not None}
