"""Put a passport into a trained network without training it, in closed form.

A passport layer runs on γ = ⟨W, m(P_γ)⟩ and β = ⟨W, m(P_β)⟩, a trained network on γ° and β° of its
norm. If the first two equal the last two, the private branch computes what the public one does. For
each layer, in the order in which they run:

1. *Turn.* A channel whose bit disagrees with the sign of γ° is negated, filter and γ° together.
   The function stays what it was where the norm treats a channel by itself (batch, instance, RMS).
   Group and layer norm subtract a mean over several channels: these turn together or not at all.
2. *Correct.* The filters get the change that the layer's own inputs x feel least and that makes the
   passport say what the norm says:

       ΔW = argmin E‖ΔW·x‖² + λ‖ΔW‖²   so that   (W + ΔW)·m = (γ°, β°)

   Its solution is ΔW = (t − W·M)(Mᵀ C⁻¹ M)⁻¹ Mᵀ C⁻¹ with C = E[x xᵀ] + λ, M = (m_γ, m_β).
3. *Mute.* Channels that could not turn get γ = b·g, g small, and the β that keeps their mean: in
   the private branch they say next to nothing, until training finds them a use.

No label is used, and a few hundred inputs suffice. Neither the paper nor its successors do this; it
is the linear system that forges a passport for given weights, solved for the weights instead.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.functional import Geometry, filters, geometry_of
from nnpassport.layers import Branch, PassportNorm, on_branch, passport_norms
from nnpassport.outputs import Example, call
from nnpassport.schemes.patches import input_patches

RIDGE = 1.0
"""λ over the mean square of what the layer sees. Less of it hides the correction in directions that
the inputs do not have, from where it can be projected out at no cost (`docs/log.md`)."""
QUIET = 0.2
"""g, and the least |γ| of any channel: twice the margin γ0 of the sign loss."""
_PATCHES = 4096


class Grafted(NamedTuple):
    """What grafting did to one layer.

    Attributes:
        turned: channels that were negated.
        muted: channels that the private branch hardly hears until it is trained.
        change: ‖ΔW‖ / ‖W‖.
        felt: share of the layer's output, in mean squares over the inputs, that changed.
    """

    turned: int
    muted: int
    change: float
    felt: float


@torch.no_grad()
def graft(
    model: nn.Module, inputs: Example, *, ridge: float = RIDGE, seed: int = 0
) -> Mapping[str, Grafted]:
    """Make the inserted passports of a trained network say what its norms say, in place.

    `inputs` are a few hundred of what the network was trained on, as it takes them. Which of the
    patches in them are looked at is drawn from `seed`. Returned is what was done, by the name of
    the passport layer.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = passport_norms(model)
    return {
        name: _graft(norms[name], *_seen(model, norms[name], inputs), ridge, generator)
        for name in _in_order(model, inputs)
    }


def _graft(
    norm: PassportNorm, x: Tensor, y: Tensor, ridge: float, generator: torch.Generator
) -> Grafted:
    """`x` is what the host layer receives, `y` what the norm receives (or a bare layer gives)."""
    layer = norm.layer
    geometry = geometry_of(layer)
    weight = layer.get_parameter("weight")
    turned = _turn(norm, geometry, y)
    gamma, beta = _own_affine(norm)
    agree = gamma.sign() == norm.signs
    quiet = norm.signs * QUIET
    mean = norm.norm(y).float().movedim(norm.channel_axis, -1).flatten(0, -2).mean(0)
    # Of what is muted the mean is kept: γ°·E[z] + β° = γ·E[z] + β, with E[γ°·z + β°] = `mean`.
    normal = torch.where(gamma == 0, 0.0, (mean - beta) / torch.where(gamma == 0, 1.0, gamma))
    wanted_gamma = torch.where(agree, norm.signs * gamma.abs().clamp(min=QUIET), quiet)
    wanted_beta = torch.where(agree, beta, beta + (gamma - quiet) * normal)
    rows = filters(weight, geometry)
    patches = input_patches(x, tuple(rows.shape[2:]), geometry, _PATCHES, generator).double()
    need = torch.stack([wanted_gamma, wanted_beta], 1).double() - _said(norm)
    change = _correction(patches, norm.mean_patch.double(), need, ridge)
    before = _outputs_of(rows.double(), patches)
    felt = _outputs_of(change, patches).square().mean() / before.square().mean().clamp(min=1e-12)
    share = change.norm() / rows.double().norm().clamp(min=1e-12)
    rows.add_(change.view(rows.shape).to(rows))  # a view of the weight: in place
    return Grafted(turned, int((~agree).sum()), float(share), float(felt))


def _turn(norm: PassportNorm, geometry: Geometry, y: Tensor) -> int:
    """Negate channels whose bits disagree with γ°, where the norm allows it; how many."""
    own = norm.norm
    if own is norm.layer or getattr(own, "weight", None) is None:
        return 0
    gamma = own.get_parameter("weight")
    votes = (gamma.sign() * norm.signs).view(_parts_that_turn(own, y, norm.channel_axis), -1)
    turn = torch.where(votes.sum(1, keepdim=True) < 0, -1.0, 1.0).expand_as(votes).reshape(-1)
    rows = filters(norm.layer.get_parameter("weight"), geometry)
    rows.mul_(turn.to(rows).view(-1, *[1] * (rows.dim() - 1)))
    statistics = [getattr(each, "running_mean", None) for each in (own, norm.private_norm)]
    for vector in (getattr(norm.layer, "bias", None), gamma, *statistics):
        if isinstance(vector, Tensor):
            vector.mul_(turn.to(vector))
    return int((turn < 0).sum())


def _parts_that_turn(norm: nn.Module, y: Tensor, axis: int) -> int:
    """Into how many parts the norm's channels fall of which each can be negated as a whole."""
    channels = len(norm.get_parameter("weight"))
    if isinstance(norm, nn.modules.batchnorm._NormBase):
        return channels
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    # RMS norms, whatever they are called: one channel negated must leave the others alone.
    loudest = int(norm.get_parameter("weight").abs().argmax())
    turned = y.movedim(axis, -1).clone()
    turned[..., loudest].neg_()
    before = norm(y).movedim(axis, -1)
    after = norm(turned.movedim(-1, axis)).movedim(axis, -1)
    others = torch.arange(channels) != loudest
    alone = torch.allclose(before[..., others], after[..., others], rtol=1e-3, atol=1e-5)
    return channels if alone else 1


def _own_affine(norm: PassportNorm) -> tuple[Tensor, Tensor]:
    """γ° and β° of the public branch: 1 and 0 where there is none."""
    own = norm.norm
    ones = torch.ones_like(norm.signs)
    if own is norm.layer:
        return ones, torch.zeros_like(ones)
    weight, bias = getattr(own, "weight", None), getattr(own, "bias", None)
    return (
        ones if weight is None else weight.detach().clone(),
        torch.zeros_like(ones) if bias is None else bias.detach().clone(),
    )


def _said(norm: PassportNorm) -> Float[Tensor, "out 2"]:
    gamma, beta = norm.affine()
    return torch.stack([gamma, beta], 1).double()


def _correction(
    patches: Float[Tensor, "samples groups fan_in"],
    mean_patch: Float[Tensor, "2 groups fan_in"],
    need: Float[Tensor, "out 2"],
    ridge: float,
) -> Float[Tensor, "out fan_in"]:
    """The ΔW of the module's equation, for every group of channels on its own."""
    groups = patches.shape[1]
    changes = []
    for group, wanted in enumerate(need.chunk(groups)):
        x, forms = patches[:, group], mean_patch[:, group]
        solved = _whitened(x, forms, ridge * float(x.square().mean()) + 1e-12)
        # Where a filter has but one number, γ and β cannot both be had: least squares.
        changes.append(wanted @ torch.linalg.pinv(forms @ solved.T) @ solved)
    return torch.cat(changes)


def _whitened(
    x: Float[Tensor, "samples fan_in"], forms: Float[Tensor, "2 fan_in"], ridge: float
) -> Float[Tensor, "2 fan_in"]:
    """(XᵀX / n + λ)⁻¹ m for both m, by whichever of the two systems is the smaller one."""
    samples, columns = x.shape
    if samples < columns:  # Woodbury
        kernel = x @ x.T
        kernel.diagonal().add_(samples * ridge)
        return (forms - torch.linalg.solve(kernel, x @ forms.T).T @ x) / ridge
    covariance = x.T @ x / samples
    covariance.diagonal().add_(ridge)
    return torch.linalg.solve(covariance, forms.T).T


def _outputs_of(
    rows: Float[Tensor, "out ..."], patches: Float[Tensor, "samples groups fan_in"]
) -> Tensor:
    parts = rows.flatten(1).unflatten(0, (patches.shape[1], -1))
    return torch.einsum("goi,ngi->ngo", parts, patches)


def _seen(model: nn.Module, norm: PassportNorm, inputs: Example) -> tuple[Tensor, Tensor]:
    """What the host layer receives and what the norm does, of the public branch."""
    received: dict[int, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        received.setdefault(id(module), args[0])

    handles = [part.register_forward_pre_hook(note) for part in (norm.layer, norm)]
    with on_branch(model, Branch.PUBLIC):
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return received[id(norm.layer)], received[id(norm)]


def _in_order(model: nn.Module, inputs: Example) -> list[str]:
    order: dict[str, None] = {}
    handles = [
        norm.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name))
        for name, norm in passport_norms(model).items()
    ]
    with on_branch(model, Branch.PUBLIC):
        call(model, inputs)
    for handle in handles:
        handle.remove()
    return list(order)
