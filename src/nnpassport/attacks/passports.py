"""The linear algebra that forges passports: any scale and shift, from weights alone.

γ = Avg(W ∗ P) is linear in P. A layer whose filters have at least as many numbers as there are
filters has a passport for every γ and β that one may wish for, and a whole space of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.evidence.context import LayerShape
from nnpassport.evidence.key import Key
from nnpassport.functional import Geometry, collapsed_affine, convolve, mean_patch
from nnpassport.scheme import UnsuitableModelError
from nnpassport.schemes.protocol import Scheme
from nnpassport.schemes.signature import secrets_of

Affine = Mapping[str, tuple[Tensor, Tensor]]
"""γ and β (out) of each passport layer, by the layer's name."""


def draw_template(
    scheme: Scheme,
    model: nn.Module,
    example: Tensor,
    rng: torch.Generator,
    *,
    layers: Sequence[str] | None = None,
) -> Key:
    """A key as anybody can draw it for this network: what a forger starts from."""
    seed = torch.randint(256, (32,), generator=rng, dtype=torch.uint8).numpy().tobytes()
    return scheme.draw_key(model, example, owner="forger", layers=layers, seed=seed)


def affine_of(key: Key, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """γ and β that the key's passports induce through these weights, in float64."""
    return {
        name: collapsed_affine(weights[f"{name}.weight"].double(), secret.mean_patch.double())
        for name, secret in secrets_of(key).items()
    }


def solvable(layer: LayerShape) -> bool:
    """Whether every γ has a passport: a group's filters have no fewer numbers than there are."""
    return layer.weight[0] // layer.geometry.groups <= math.prod(layer.weight[1:])


def passports_for(
    weight: Float[Tensor, "out fan_in *kernel"],
    gamma: Float[Tensor, " out"],
    beta: Float[Tensor, " out"],
    layer: LayerShape,
    rng: torch.Generator,
) -> Float[Tensor, "2 in *space"]:
    """Passports with Avg(W ∗ P_γ) = γ and Avg(W ∗ P_β) = β, close to ones drawn at random.

    The start is uniform on (−1, 1), as an owner's random passport is; to it comes the smallest
    change that does it. Least squares where no passport does (see `solvable`).
    """
    start = (torch.rand((2, *layer.passport), generator=rng) * 2 - 1).double()
    patch = mean_patch(start, layer.weight, layer.geometry)
    wanted = torch.stack([gamma, beta]).double()
    return (start + _spread(_correction(weight, patch, wanted), layer)).float()


def forged(template: Key, passports: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Key:
    """The template's key on these passports, its signature whatever they read off the weights.

    So V of the paper finds every bit, and only F can tell that the passports are forged.
    """
    layers = tuple(layer for layer in template.context.layers if layer.name in passports)
    context = replace(template.context, layers=layers)
    blank = {layer.name: torch.ones(layer.length) for layer in layers}
    tensors = {name: passport.detach().float() for name, passport in passports.items()}
    key = replace(template, context=context, text=None, passports=tensors, signs=blank)
    read = {name: gamma.sign() for name, (gamma, _) in affine_of(key, weights).items()}
    # A γ of exactly zero reads as no bit at all; a forger would call it a one.
    return replace(key, signs={n: torch.where(s == 0, 1.0, s).float() for n, s in read.items()})


def key_with(
    template: Key, affine: Affine, weights: Mapping[str, Tensor], rng: torch.Generator
) -> Key:
    """A key whose passports induce `affine` through these weights, as well as any can.

    Raises:
        UnsuitableModelError: no layer of the template is in `affine`.
    """
    passports = {
        layer.name: passports_for(weights[f"{layer.name}.weight"], *affine[layer.name], layer, rng)
        for layer in template.context.layers
        if layer.name in affine
    }
    if not passports:
        raise UnsuitableModelError(
            "none of the layers has a passport for every scale and shift; needed: a layer whose "
            "filters have at least as many numbers as there are filters; name other layers"
        )
    return forged(template, passports, weights)


def patch_matrix(layer: LayerShape) -> Float[Tensor, "offsets positions"]:
    """K with m(P)[c] = K·P[c] for each input channel c: the mean patch as a matrix, float64.

    It is the same for all channels; `offsets` runs over the kernel, `positions` over the passport.
    """
    space, kernel = layer.passport[1:], layer.weight[2:]
    if layer.geometry.axes == 0:  # a Linear is applied at each position, and averaged
        return torch.full((1, space[0]), 1 / space[0], dtype=torch.float64)
    offsets = math.prod(kernel)
    probes = torch.eye(offsets, dtype=torch.float64).view(offsets, 1, *kernel)
    geometry: Geometry = layer.geometry._replace(groups=1)
    passport = torch.zeros(1, 1, *space, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        means = convolve(passport, probes, geometry).flatten(2).mean(2)[0]
        rows = [torch.autograd.grad(m, passport, retain_graph=True)[0].flatten() for m in means]
    return torch.stack(rows)


def _correction(
    weight: Tensor, patch: Float[Tensor, "2 groups columns"], wanted: Float[Tensor, "2 out"]
) -> Float[Tensor, "2 groups columns"]:
    """Smallest change of the mean patches that makes them induce what is wanted."""
    groups = patch.shape[1]
    rows = weight.detach().cpu().double().reshape(groups, weight.shape[0] // groups, -1)
    missing = wanted.cpu().view(2, groups, -1) - torch.einsum("goi,pgi->pgo", rows, patch)
    # gelsd: trained filters are nearly dependent, and it gives the smallest solution all the same.
    found = torch.linalg.lstsq(rows, missing.permute(1, 2, 0), driver="gelsd").solution
    return found.permute(2, 0, 1)


def _spread(
    patch: Float[Tensor, "2 groups columns"], layer: LayerShape
) -> Float[Tensor, "2 in *space"]:
    """The smallest passports that have these mean patches."""
    matrix = patch_matrix(layer)
    channels = patch.reshape(2, layer.passport[0], -1)
    return (channels @ torch.linalg.pinv(matrix).T).view(2, *layer.passport)
