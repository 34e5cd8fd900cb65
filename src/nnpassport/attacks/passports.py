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

from nnpassport.embedding.network.equations import collapsed_affine, convolve, mean_patch
from nnpassport.embedding.schemes.passport import draw_by_layer
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.signature import host_weight, secrets_of
from nnpassport.keys.context import LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError

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
    return draw_by_layer(scheme, model, example, owner="forger", layers=layers, seed=draw_seed(rng))


def draw_seed(rng: torch.Generator) -> bytes:
    """32 bytes for a forger's or attacker's key: repeatable, and so no secret to rely on."""
    return torch.randint(256, (32,), generator=rng, dtype=torch.uint8).numpy().tobytes()


def affine_of(key: Key, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """γ and β that the key's passports induce through these weights, in float64.

    Raises:
        UnsuitableModelError: a layer that the key names is missing or has another shape.
    """
    hosts = {layer.name: host_weight(weights, layer) for layer in key.context.layers}
    return {
        name: collapsed_affine(hosts[name].detach().cpu().double(), secret.mean_patch.double())
        for name, secret in secrets_of(key).items()
    }


def solvable(layer: LayerShape) -> bool:
    """Whether every γ has a passport: no more filters than there are numbers that a passport sets.

    Those are the input channels times the ways in which a channel's mean patch can vary: all of the
    kernel's offsets where edges are padded with zeros, one alone where the map wraps around.
    """
    inputs, groups = layer.weight[1], layer.geometry.groups
    return layer.weight[0] // groups <= inputs * len(_directions(layer)[0])


def passports_for(
    weight: Float[Tensor, "out fan_in *kernel"],
    gamma: Float[Tensor, " out"],
    beta: Float[Tensor, " out"],
    layer: LayerShape,
    rng: torch.Generator,
) -> Float[Tensor, "2 in *space"]:
    """Passports with Avg(W ∗ P_γ) = γ and Avg(W ∗ P_β) = β, close to ones drawn at random.

    The start is uniform on (−1, 1), as an owner's random passport is; to it comes the change of
    least norm that does it. Least squares where no passport does (see `solvable`).
    """
    start = (torch.rand((2, *layer.passport), generator=rng) * 2 - 1).double()
    groups, inputs = layer.geometry.groups, layer.weight[1]
    system, positions = system_of(weight, layer)
    rows = weight.detach().cpu().double().reshape(groups, layer.weight[0] // groups, inputs, -1)
    patch = mean_patch(start, layer.weight, layer.geometry)
    induced = torch.einsum("goi,pgi->pgo", rows.flatten(2), patch)
    missing = torch.stack([gamma, beta]).detach().cpu().double().view(2, groups, -1) - induced
    # gelsd: trained filters are nearly dependent, and it gives the smallest solution all the same.
    found = torch.linalg.lstsq(system, missing.permute(1, 2, 0), driver="gelsd").solution
    moves = found.permute(2, 0, 1).reshape(2, groups * inputs, -1) @ positions
    return (start + moves.view(start.shape)).float()


def system_of(
    weight: Float[Tensor, "out fan_in *kernel"], layer: LayerShape
) -> tuple[Float[Tensor, "groups out directions"], Float[Tensor, "rank positions"]]:
    """What each filter makes of a unit of each direction in which passports can move, float64.

    Directions run over the input channels and, for each, over the rank of `patch_matrix`; the
    second part says which passport of one channel a direction is.
    """
    groups, inputs = layer.geometry.groups, layer.weight[1]
    strengths, offsets, positions = _directions(layer)
    rows = weight.detach().cpu().double().reshape(groups, layer.weight[0] // groups, inputs, -1)
    return (rows @ (offsets * strengths)).flatten(2), positions


def forged(template: Key, passports: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Key:
    """The template's key on these passports, its signature whatever they read off the weights.

    So V of the paper finds every bit, and only F can tell that the passports are forged.
    """
    whole = template.context.by_layer()
    layers = tuple(layer for layer in whole.layers if layer.name in passports)
    context = replace(whole, layers=layers)
    blank = {layer.name: torch.ones(layer.length) for layer in layers}
    tensors = {name: passport.detach().float() for name, passport in passports.items()}
    key = replace(
        template, context=context, text=None, passports=tensors, signs=blank, metrics=None
    )
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


def _directions(layer: LayerShape) -> tuple[Tensor, Tensor, Tensor]:
    """K = U·diag(s)·V, cut to its rank: s (r), U (offsets r), V (r positions)."""
    left, strengths, right = torch.linalg.svd(patch_matrix(layer), full_matrices=False)
    rank = int((strengths > 1e-9 * strengths[0]).sum())
    return strengths[:rank], left[:, :rank], right[:rank]
