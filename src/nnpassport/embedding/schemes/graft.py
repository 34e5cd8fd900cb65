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

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from nnpassport.embedding.network.equations import collapsed_affine, filters, geometry_of, own_order
from nnpassport.embedding.network.layers import (
    Branch,
    PassportNorm,
    on_branch,
    passport_norms,
    share_statistics,
)
from nnpassport.embedding.network.modes import hooked
from nnpassport.embedding.network.outputs import (
    Example,
    call,
    length_of,
    part_of,
    tensors_in,
)
from nnpassport.embedding.schemes import channels
from nnpassport.embedding.schemes.pan import own_affine, say
from nnpassport.embedding.schemes.patches import input_patches
from nnpassport.embedding.schemes.seen import solved, watch
from nnpassport.ground.progress import Listener
from nnpassport.keys.geometry import Geometry
from nnpassport.scheme import HarmfulGraftError, UnsuitableModelError

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
    model: nn.Module,
    inputs: Example,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    limit: channels.Limit = channels.LIMIT,
    show: Listener = lambda *_: None,
) -> Mapping[str, Grafted]:
    """Make the inserted passports of a trained network say what its norms say, in place.

    `inputs` are a few hundred of what the network was trained on, as it takes them. Which of the
    patches in them are looked at is drawn from `seed`. Returned is what was done, by the name of
    the passport layer. Branch and mode of the network stay what they are. Where each channel has a
    passport of its own this is `graft_channels`, whose figures tell of harm as well.

    Raises:
        HarmfulGraftError: with passports of channels, more changed than `limit` allows.
        UnsuitableModelError: there is no passport, a passport layer does not run on `inputs` or
            meets numbers there that are not finite, or its weight is sharded or another layer's
            too; the model is as it was.
    """
    norms = passport_norms(model)
    if any(norm.carries is not None for norm in norms.values()):
        return graft_channels(model, inputs, seed=seed, limit=limit, show=show).layers
    generator = torch.Generator().manual_seed(seed)
    with on_branch(model, Branch.PUBLIC):
        order = _in_order(model, norms, inputs)
        return {name: _graft(model, norms[name], inputs, ridge, generator) for name in order}


class Report(NamedTuple):
    """What grafting did: to each passport layer, and to the answers on held-out inputs."""

    layers: Mapping[str, Grafted]
    harm: channels.Harm


@torch.no_grad()
def graft_channels(
    model: nn.Module,
    inputs: Example,
    *,
    limit: channels.Limit = channels.LIMIT,
    seed: int = 0,
    show: Listener = lambda *_: None,
) -> Report:
    """Make the passports of channels say what the norms say, in place, and measure the harm.

    One pass over `inputs` sees what every layer receives; each layer then changes as little as it
    can (`channels.change_of`). Harm is measured on the last quarter of `inputs`,
    which is not looked at otherwise. `show` is told how much of it is done.

    Raises:
        HarmfulGraftError: more changed than `limit` allows; the model is as it was. It names the
            layers that cost most, and a choice of layers that would pass if there is one.
        UnsuitableModelError: as `graft`.
    """
    norms = passport_norms(model)
    with on_branch(model, Branch.PUBLIC):
        order = _in_order(model, norms, part_of(inputs, 0, 2))
    inputs, held_out = _parted(inputs)
    before_it, seen_then = length_of(held_out), length_of(held_out) + length_of(inputs)
    of = seen_then + 2 * length_of(held_out)
    show(0, of, "answers before the mark")
    before = channels.answers(model, held_out, Branch.PUBLIC)

    def watched(inputs_done: int, _of: int) -> None:
        show(before_it + inputs_done, of, "what the layers receive")

    with on_branch(model, Branch.PUBLIC):
        layers = {name: norms[name].layer for name in order}
        seen = watch(model, layers, inputs, seed=seed, show=watched)
    changes = {}
    for name in order:
        show(seen_then, of, f"the least change of {name}")
        changes[name] = channels.change_of(norms[name], seen.pop(name))
    with channels.undone(model) as put_back:

        def tried(names: Sequence[str]) -> channels.Harm:
            share_statistics(model)
            for name in names:
                channels.apply_change(norms[name], changes[name])
            both = (Branch.PUBLIC, Branch.PRIVATE)
            return channels.harm_of(before, *(channels.answers(model, held_out, b) for b in both))

        show(seen_then, of, "answers with the mark")
        harm = tried(order)
        show(of, of, f"{harm}")
        if not harm.within(limit):
            costs = {name: change.felt for name, change in changes.items()}
            raise _too_harmful(harm, limit, costs, tried, put_back)
    return Report({n: Grafted(0, 0, c.share, c.felt) for n, c in changes.items()}, harm)


def _parted(inputs: Example) -> tuple[Example, Example]:
    """The first three quarters, and the last, which has one input at least."""
    cut = max(1, length_of(inputs) * 3 // 4)
    held_out = part_of(inputs, min(cut, length_of(inputs) - 1), length_of(inputs))
    return part_of(inputs, 0, cut), held_out


def settle(model: nn.Module, inputs: Example) -> Report | None:
    """Let the private branch end as the public one, after a training with passports of channels.

    In place, by a graft of the little that training left between them.

    Returned is what it did. None: it would change more than `channels.LIMIT`, and the network is
    as it was; its private branch is what training made of it.

    Raises:
        UnsuitableModelError: as `graft`.
    """
    try:
        return graft_channels(model, inputs)
    except HarmfulGraftError:
        return None


def _too_harmful(
    harm: channels.Harm,
    limit: channels.Limit,
    costs: Mapping[str, float],
    tried: Callable[[Sequence[str]], channels.Harm],
    put_back: Callable[[], None],
) -> HarmfulGraftError:
    """The refusal: which layers cost most, and how many of the cheapest would pass."""
    cheapest = sorted(costs, key=lambda name: costs[name])
    passing: list[str] = []
    kept = len(cheapest) // 2
    while kept and not passing:
        put_back()
        if tried(cheapest[:kept]).within(limit):
            passing = cheapest[:kept]
        kept //= 2
    worst = ", ".join(f"{name} ({100 * costs[name]:.1f} %)" for name in cheapest[:-4:-1])
    would = f"these would pass: {', '.join(passing)}" if passing else "no smaller choice passes"
    return HarmfulGraftError(
        f"the graft would leave {harm}; needed: at most {100 * limit.answers:g} % of confident "
        f"answers, or a relative error of {limit.error:g}; the network is as it was. Of their "
        f"layer's output most is changed by {worst}; {would}"
    )


def _graft(
    model: nn.Module, norm: PassportNorm, inputs: Example, ridge: float, generator: torch.Generator
) -> Grafted:
    seen = _seen(model, norm, inputs)
    turn = _turn(model, norm, seen, inputs)
    gamma, beta = own_affine(norm)
    agree = gamma.sign() == norm.signs
    wanted_gamma = norm.signs * torch.where(agree, gamma.abs().clamp(min=QUIET), QUIET)
    # Where γ differs the mean is kept: γ°·E[z] + β° = γ·E[z] + β, z being normalised.
    wanted_beta = beta + (gamma - wanted_gamma) * turn * _mean_normalised(norm, seen.normed)
    geometry = geometry_of(norm.layer)
    weight = norm.layer.get_parameter("weight")
    rows = filters(weight, geometry).double()
    patches = _patches(seen.hosted, tuple(rows.shape[2:]), geometry, generator)
    mean_patch = norm.mean_patch.double()
    said = torch.stack(collapsed_affine(rows, mean_patch), 1)
    need = torch.stack([wanted_gamma, wanted_beta], 1).double() - said
    change = _correction(patches, mean_patch, need, ridge)
    before, added = (_outputs_of(each, patches).flatten(1) for each in (rows, change))
    weight.copy_(own_order(rows + change.view(rows.shape), geometry))
    _follow(norm, before, added)
    say(norm, *own_affine(norm))
    felt = added.square().mean() / before.square().mean().clamp(min=1e-12)
    share = change.norm() / rows.norm().clamp(min=1e-12)
    return Grafted(int((turn < 0).sum()), int((~agree).sum()), float(share), float(felt))


def _patches(
    runs: Sequence[Tensor],
    kernel: tuple[int, ...],
    geometry: Geometry,
    generator: torch.Generator,
) -> Float[Tensor, "samples groups fan_in"]:
    count = -(-_PATCHES // len(runs))
    drawn = [input_patches(x, kernel, geometry, count, generator) for x in runs]
    return torch.cat(drawn).double()


def _turn(
    model: nn.Module, norm: PassportNorm, seen: "_Seen", inputs: Example
) -> Float[Tensor, " out"]:
    """Negate channels whose bits disagree with γ°, where nothing else changes by it; −1 if so.

    Which channels have to turn together is found by trying: one by one, by groups, all of them. A
    filter whose output is also used past the norm cannot turn at all.
    """
    own, ones = norm.norm, torch.ones_like(norm.signs)
    if own is norm.layer or getattr(own, "weight", None) is None:
        return ones
    votes = own.get_parameter("weight").sign() * norm.signs
    for parts in dict.fromkeys([len(votes), getattr(own, "num_groups", 1), 1]):
        ayes = votes.view(parts, -1).sum(1, keepdim=True).expand(parts, len(votes) // parts)
        turn = torch.where(ayes.reshape(-1) < 0, -ones, ones)
        if (turn > 0).all():
            continue
        _negate(norm, turn)
        if _alike(seen.answers, _seen(model, norm, inputs).answers):
            return turn
        _negate(norm, turn)  # exactly what it was
    return ones


def _negate(norm: PassportNorm, turn: Float[Tensor, " out"]) -> None:
    weight, geometry = norm.layer.get_parameter("weight"), geometry_of(norm.layer)
    rows = filters(weight, geometry)
    turned = rows * turn.to(rows).view(-1, *[1] * (rows.dim() - 1))
    weight.copy_(own_order(turned, geometry))
    statistics = [getattr(each, "running_mean", None) for each in (norm.norm, norm.private_norm)]
    for vector in (norm.layer.bias, norm.norm.weight, *statistics):
        if isinstance(vector, Tensor):
            vector.mul_(turn.to(vector))


def _alike(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    pairs = [(one.float(), other.float()) for one, other in zip(before, after, strict=True)]
    return all(bool((one - other).norm() <= 1e-3 * one.norm()) for one, other in pairs)


def _mean_normalised(norm: PassportNorm, runs: Sequence[Tensor]) -> Float[Tensor, " out"]:
    """E[z]: the mean of each channel before γ° and β°, which a layer without norm does not have."""
    own, plain = norm.norm, {}
    if own is not norm.layer:
        neutral = {"weight": torch.ones_like, "bias": torch.zeros_like}
        parameters = dict(own.named_parameters())
        plain = {n: make(parameters[n]) for n, make in neutral.items() if n in parameters}
    normalised = [functional_call(own, plain, (y,)).movedim(norm.channel_axis, -1) for y in runs]
    return torch.cat([z.float().flatten(0, -2) for z in normalised]).mean(0)


def _follow(
    norm: PassportNorm,
    before: Float[Tensor, "samples out"],
    added: Float[Tensor, "samples out"],
) -> None:
    """Keep the running statistics of batch norm true of what the layer puts out now.

    A channel that was dead has no variance: what it gets would be amplified by 1 / √eps.
    """
    further, wider = added.mean(0), (before + added).var(0) - before.var(0)
    for each in (norm.norm, norm.private_norm):
        if not isinstance(each, nn.modules.batchnorm._BatchNorm):
            continue
        mean, variance = each.running_mean, each.running_var
        if mean is not None and variance is not None:
            mean.add_(further.to(mean))
            variance.add_(wider.to(variance)).clamp_(min=0)


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
        whitened = solved(x, forms, ridge)
        # Where a filter has but one number, γ and β cannot both be had: γ has the bits.
        met = min(2, x.shape[1])
        changes.append(
            wanted[:, :met] @ torch.linalg.pinv((forms @ whitened.T)[:met, :met]) @ whitened[:met]
        )
    return torch.cat(changes)


def _outputs_of(
    rows: Float[Tensor, "out ..."], patches: Float[Tensor, "samples groups fan_in"]
) -> Tensor:
    parts = rows.flatten(1).unflatten(0, (patches.shape[1], -1))
    return torch.einsum("goi,ngi->ngo", parts, patches)


class _Seen(NamedTuple):
    hosted: list[Tensor]  # what the host layer receives, each time it runs
    normed: list[Tensor]  # what the norm does, or a layer without norm
    answers: list[Tensor]  # what comes out of the norm and of the network


def _seen(model: nn.Module, norm: PassportNorm, inputs: Example) -> _Seen:
    seen = _Seen([], [], [])

    def note_norm(received: Tensor, output: Any) -> None:
        seen.normed.append(received)
        seen.answers.extend(tensors_in(output))

    notes = {norm.layer: lambda received, _: seen.hosted.append(received), norm: note_norm}
    with _noting(notes):
        answer = call(model, inputs)
    seen.answers.extend(tensors_in(answer))
    return seen


def _in_order(
    model: nn.Module, norms: Mapping[str, PassportNorm], inputs: Example
) -> Sequence[str]:
    """The passport layers in the order in which they run, after every check that there is."""
    finite: dict[str, bool] = {}

    def note(name: str) -> Callable[[Tensor, Any], None]:
        def noted(received: Tensor, _output: Any) -> None:
            finite[name] = finite.get(name, True) and bool(received.isfinite().all())

        return noted

    with _noting({norm.layer: note(name) for name, norm in norms.items()}):
        call(model, inputs)
    if not norms:
        raise UnsuitableModelError(
            f"{type(model).__name__} carries no passport, and only passports are grafted; insert a "
            "key of passport-v1, -v2 or -v3, or train the mark in"
        )
    for name, norm in norms.items():
        reason = _refusal(model, norm, finite.get(name))
        if reason is not None:
            raise UnsuitableModelError(f"no key can be grafted at {name!r}: {reason}")
    return list(finite)


def _refusal(model: nn.Module, norm: PassportNorm, finite: bool | None) -> str | None:
    weight = norm.layer.get_parameter("weight")
    users = [n for n, each in model.named_modules() if each._parameters.get("weight") is weight]
    reasons = {
        "its layer does not run on these inputs; give all that the network takes": finite is None,
        "its layer receives numbers that are not finite; give other inputs": finite is False,
        "its weight is sharded (fully_shard); graft before that": hasattr(weight, "full_tensor"),
        f"one weight is that of {', '.join(users)}; train the mark in": len(users) > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


@contextmanager
def _noting(notes: Mapping[nn.Module, Callable[[Tensor, Any], None]]) -> Iterator[None]:
    """Tell of every run of these modules: their first input, and their output."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        notes[module](args[0], output)

    with hooked(*(module.register_forward_hook(hook) for module in notes)):
        yield
