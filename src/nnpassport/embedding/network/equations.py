"""The paper's equations, each a pure function.

[Fan19] Fan, Ng, Chan: Rethinking Deep Neural Network Ownership Verification: Embedding Passports
to Defeat Ambiguity Attacks, NeurIPS 2019.

Notation, kept in the code: W weight of the host layer, P passport, γ scale, β shift, b ∈ {−1, +1}
signature bits, γ0 margin, m(P) mean patch.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.keys import patches
from nnpassport.keys.geometry import Geometry

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_WIDENED = 2**20  # numbers
HOSTS = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
"""Layers that have a passport function; `is_matrix` tells the one kind that torch does not have."""


def geometry_of(layer: nn.Module) -> Geometry:
    """The geometry of a convolution, transposed or not, or of a fully connected layer.

    Raises:
        TypeError: the layer is of another type.
    """
    if isinstance(layer, nn.Linear) or is_matrix(layer):
        return Geometry(transposed=is_matrix(layer))
    if not isinstance(layer, HOSTS):
        raise TypeError(
            f"{type(layer).__name__} has no passport function; needed: Conv1d/2d/3d, "
            "ConvTranspose1d/2d/3d or Linear"
        )
    conv = cast(nn.modules.conv._ConvNd, layer)
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return Geometry(
        stride=tuple(conv.stride),
        padding=_explicit_padding(conv),
        dilation=tuple(conv.dilation),
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        transposed=transposed,
        output_padding=tuple(conv.output_padding) if transposed else (),
    )


def is_matrix(layer: nn.Module) -> bool:
    """Whether this is Hugging Face's `Conv1D` (GPT-2): a Linear whose weight is (in, out)."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def filters(
    weight: Float[Tensor, "..."], geometry: Geometry
) -> Float[Tensor, "out fan_in *kernel"]:
    """The weight of a layer with its output channels first, whatever its own order.

    A transposed convolution keeps (in, out / groups, *kernel), GPT-2's matrices (in, out). With
    groups, that of a transposed convolution is a copy: write back with `own_order`.
    """
    if not geometry.transposed:
        return weight
    # (groups · in, out, …) → (groups, in, out, …) → (groups, out, in, …) → (groups · out, in, …)
    return weight.unflatten(0, (geometry.groups, -1)).transpose(1, 2).flatten(0, 1)


def own_order(
    rows: Float[Tensor, "out fan_in *kernel"], geometry: Geometry
) -> Float[Tensor, "..."]:
    """What `filters` does, undone: it is its own inverse."""
    return filters(rows, geometry)


def _explicit_padding(conv: nn.modules.conv._ConvNd) -> tuple[tuple[int, int], ...]:
    if conv.padding == "valid":
        return tuple((0, 0) for _ in conv.kernel_size)
    if conv.padding == "same":
        totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((int(p), int(p)) for p in conv.padding)


def convolve(
    passport: Float[Tensor, "batch in *space"],
    weight: Float[Tensor, "out fan_in *kernel"],
    geometry: Geometry,
) -> Float[Tensor, "batch out *positions"]:
    """W ∗ P as the layer itself would compute it, its bias left out; W has its filters first.

    For a Linear the passport is (batch in positions): the layer applied at every position.
    """
    if geometry.axes == 0:
        return torch.einsum("oi,bip->bop", weight, passport)
    if geometry.transposed:
        return _TRANSPOSED[geometry.axes](
            passport,
            own_order(weight, geometry),
            None,
            geometry.stride,
            tuple(before for before, _ in geometry.padding),
            geometry.output_padding,
            geometry.groups,
            geometry.dilation,
        )
    pads = [side for pair in reversed(geometry.padding) for side in pair]
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    padded = F.pad(passport, pads, mode=mode) if any(pads) else passport
    return _CONVOLUTIONS[geometry.axes](
        padded, weight, None, geometry.stride, 0, geometry.dilation, geometry.groups
    )


def passport_affine(
    weight: Float[Tensor, "out fan_in *kernel"],
    passport: Float[Tensor, "2 in *space"],
    geometry: Geometry,
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """Scale and shift that a passport induces through a layer, by direct convolution.

        γ = Avg(W ∗ P_γ),    β = Avg(W ∗ P_β)                              [Fan19, eq. 3]

    The averages run over space: each output channel gets one number. passport[0] is P_γ and
    passport[1] is P_β. W is the layer's own weight, so tampering with W also moves γ and β;
    gradients flow to W and to the passport.
    """
    gamma, beta = convolve(passport, weight, geometry).flatten(2).mean(2)
    return gamma, beta


def mean_patch(
    passport: Float[Tensor, "2 in *space"],
    weight_shape: tuple[int, ...],
    geometry: Geometry,
) -> Float[Tensor, "2 groups fan_in"]:
    """m(P), the mean of the input patches that the kernel meets on P, as `keys.patches` has it.

    Computed once, in float64; after that γ and β cost one matrix–vector product
    (`collapsed_affine`) and no convolution.
    """
    numbers = patches.mean_patch(
        passport.detach().cpu().double().numpy(), tuple(weight_shape), geometry
    )
    return torch.from_numpy(numbers).to(passport.device)


def collapsed_affine(
    weight: Float[Tensor, "out fan_in *kernel"],
    patch: Float[Tensor, "2 groups columns"],
) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """γ_o = ⟨W_o, m(P_γ)⟩ and β_o = ⟨W_o, m(P_β)⟩: equation 3 with the convolution done beforehand.

    Equal to `passport_affine` up to rounding, gradients to W included. With as many patches as
    there are channels, each has its own.
    """
    groups = patch.shape[1]
    if groups == len(weight) > 1:  # a patch for each channel
        rows = weight.flatten(1)
        # One after the other: both at once write what they read, three times over.
        gamma, beta = (patch[0] * rows).sum(1), (patch[1] * rows).sum(1)
    elif groups == 1:
        # In this order γ and β come out contiguous, which batch norm's fast path asks for.
        gamma, beta = patch[:, 0] @ weight.flatten(1).T
    else:
        rows = weight.reshape(groups, weight.shape[0] // groups, -1)
        gamma, beta = torch.einsum("goi,pgi->pgo", rows, patch).flatten(1)
    return gamma, beta


def apply_affine(
    features: Float[Tensor, "..."],
    gamma: Float[Tensor, " out"],
    beta: Float[Tensor, " out"],
    *,
    channel_axis: int = 1,
) -> Float[Tensor, "..."]:
    """O(X) = γ·X + β, one scale and one shift for each channel.              [Fan19, eq. 2]"""
    shape = [1] * features.dim()
    shape[channel_axis] = -1
    return torch.addcmul(beta.view(shape), features, gamma.view(shape))


def sign_loss(
    gamma: Float[Tensor, " out"], signs: Float[Tensor, " out"], *, margin: float = 0.1
) -> Float[Tensor, ""]:
    """Hinge that pulls each γ_i to the side of zero named by its signature bit.

        R(γ, b) = Σ_i max(γ0 − γ_i·b_i, 0),    b_i ∈ {−1, +1}                 [Fan19, eq. 5]

    Zero exactly when every γ_i is on its side by at least `margin` (γ0, in units of γ).
    """
    return F.relu(margin - gamma * signs).sum()


def divergence(
    logits: Float[Tensor, "batch classes"],
    answers: Float[Tensor, "batch classes"],
    *,
    temperature: float,
) -> Float[Tensor, ""]:
    """T² · KL(softmax(answers / T) ‖ softmax(logits / T)): imitate answers, not only the best one.

    Probabilities p do for `answers`: softmax(log p / T) is softmax(logits / T).

    Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
    """
    learnt, asked = (F.log_softmax(each / temperature, dim=1) for each in (logits, answers))
    return temperature**2 * F.kl_div(learnt, asked, reduction="batchmean", log_target=True)


def read_bits(
    weight: Float[Tensor, "out fan_in *kernel"], patch: Float[Tensor, "2 groups columns"]
) -> Float[Tensor, " out"]:
    """sign(γ) in {−1, 0, +1}, computed in float64 so that every machine reads the same bits.

    A γ of exactly zero gives 0, which matches neither bit: a zeroed channel never helps a claim.
    A large layer is widened some rows at a time: in float64 it is four times what a file keeps.
    """
    whole = patch.shape[1] > 1 or weight.numel() <= _WIDENED
    rows = len(weight) if whole else min(len(weight), max(1, _WIDENED // patch.shape[2]))
    # One buffer for all parts: what is allocated anew for each, aligned, the C library scatters.
    wide = weight.new_empty((rows, *weight.shape[1:]), dtype=torch.float64)
    parts = [
        collapsed_affine(wide[: len(part)].copy_(part.detach()), patch.double())[0]
        for part in weight.split(rows)
    ]
    return torch.cat(parts).sign()


def passport_space(
    space: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[int, ...]:
    """Spatial shape of a derived passport for a layer whose input map is `space`.

    Each axis is the input's, but at most 8 (or what the kernel needs): the mean of many independent
    values tends to zero, and with it γ, so a passport as large as a 224-pixel map would be mute.
    A Linear gets 64 positions for the same reason at the other end.
    """
    if geometry.axes == 0:
        return (64,)
    if geometry.transposed:  # its kernel spreads out over the output: one position is enough
        return tuple(min(s, 8) for s in space)
    reach = [d * (k - 1) + 1 for d, k in zip(geometry.dilation, kernel, strict=True)]
    return tuple(min(s, max(8, r)) for s, r in zip(space, reach, strict=True))
