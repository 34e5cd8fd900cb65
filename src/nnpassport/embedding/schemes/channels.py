"""A passport for each channel, where its layer's input varies, and grafted without harm.

    γ_o = c·b_o·⟨W_o, m_γ,o⟩,   β_o = c′·b_o·⟨W_o, m_β,o⟩,   m = Σ_k s_k·⟨u_k, z⟩·u_k

u_k are the directions in which what the layer's kernel meets varies most, and s_k rise with the
variance up to an end (`seen.metric_of`); z is drawn from the seed for each channel. One passport
for a whole layer makes the mark one singular vector of its weight, which anybody finds and
subtracts. Here each filter moves along a direction of its own.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from nnpassport.embedding.network.equations import collapsed_affine, filters, geometry_of, own_order
from nnpassport.embedding.network.layers import (
    Branch,
    PassportNorm,
    branched,
    on_branch,
    passport_norms,
)
from nnpassport.embedding.network.outputs import (
    Example,
    call,
    logits_of,
    parts,
    tensors_in,
)
from nnpassport.embedding.network.survey import Site
from nnpassport.embedding.schemes.seen import AT_ONCE, FLOOR, Seen, metric_of
from nnpassport.keys.context import ChannelForm, LayerShape
from nnpassport.keys.derive import UNIT_VARIANCE, spread
from nnpassport.keys.key import metric_digest
from nnpassport.scheme import UnsuitableModelError

BITS = 1_000
"""Bits that are enough: layers are chosen until there are so many."""
_GAIN = 2.0**24
_DEAD, _MUTE = 1e-3, 0.05  # of the median variance, of the median |γ°|
_CONFIDENT = 0.5
_ENOUGH = 10  # confident answers that say something of harm


def shape_of(
    model: nn.Module, site: Site, seen: Seen | None, most: int | None = None
) -> tuple[LayerShape, Any]:
    """A layer whose channels have a passport each, and its metric, or None where nothing was seen.

    Dead channels and those that the norm all but mutes carry no bit. Of the others at most `most`
    do: those that what follows hears loudest, which nobody changes without being heard.

    Raises:
        UnsuitableModelError: no channel of it can carry one.
    """
    rows = filters(site.layer.get_parameter("weight"), site.geometry).detach().cpu().double()
    shape, flat = tuple(rows.shape), rows.flatten(1)
    metric = None if seen is None else metric_of(seen)
    scale, shift = own_affine_of(model, site)
    carrying = scale.abs() > _MUTE * scale.abs().median()
    variance = flat.square().sum(1)
    if seen is not None:
        variance = seen.about(centred=True).power(flat)
        carrying &= variance > _DEAD * variance.median()
    if not bool(flat[carrying].any()):
        raise UnsuitableModelError(
            f"no channel of {site.name!r} can carry a bit: its filters, or its norm's scales, are "
            "all zero; needed: a layer that does something; name others"
        )
    carrying &= _loudest(site, scale, variance, carrying, most)
    typical = _typical(flat[carrying], metric)
    wide = max(_rms(shift[carrying]), 0.1 * _rms(scale[carrying]))
    gains = tuple(_rounded(each / typical) for each in (_rms(scale[carrying]), wide))
    form = ChannelForm(
        norm=site.norm if site.norm is not None and _has_scale(model, site.norm) else "",
        gains=(gains[0], gains[1]),
        carriers=None if bool(carrying.all()) else np.packbits(carrying.numpy()).tobytes().hex(),
        metric="" if metric is None else metric_digest(metric),
    )
    passport = (shape[1] * site.geometry.groups, *(shape[2:] or (1,)))
    return LayerShape(site.name, shape, passport, site.geometry, channels=form), metric


def _loudest(
    site: Site, scale: Tensor, variance: Tensor, carrying: Tensor, most: int | None
) -> Tensor:
    """Which channels are among the `most` loudest of those that carry a bit."""
    if most is None or int(carrying.sum()) <= most:
        return carrying
    loud = variance if site.norm is None else scale.square()  # a norm makes all equally loud
    order = torch.where(carrying, loud, -1.0).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(carrying)
    chosen[order[:most]] = True
    return chosen


def own_affine_of(model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """γ° and β° of what follows a layer, in double precision: 1 and 0 where nothing does."""
    out = filters(site.layer.get_parameter("weight"), site.geometry).shape[0]
    norm = None if site.norm is None else model.get_submodule(site.norm)
    given = [None if norm is None else getattr(norm, name, None) for name in ("weight", "bias")]
    plain = (torch.ones(out).double(), torch.zeros(out).double())
    scale, shift = (
        p if g is None else g.detach().cpu().double() for p, g in zip(plain, given, strict=True)
    )
    return scale, shift


def _has_scale(model: nn.Module, norm: str) -> bool:
    return getattr(model.get_submodule(norm), "weight", None) is not None


def _typical(rows: Float[Tensor, "out fan_in"], metric: NDArray[np.int16] | None) -> float:
    """Root mean square of ⟨W_o, m_o⟩ over all that the seed might give."""
    # m = R·z, and ⟨W, R·z⟩ = ⟨R·W, z⟩ as R is symmetric; in units so small that nothing is rounded.
    wide = rows.numpy()
    if metric is not None:
        unit = 2.0**-40 * (float(np.abs(wide).max()) or 1.0)
        wide = spread(wide / unit, metric) * unit
    return float(np.sqrt(UNIT_VARIANCE * np.square(wide).sum(1).mean()))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _rounded(gain: float) -> int:
    """A gain in units of 2⁻²⁴, to three figures: rounding elsewhere gives the same key."""
    if not 1e-300 < gain < 1e300:
        return 1
    return min(2**48, max(1, round(float(f"{gain * _GAIN:.2e}"))))


# The graft


class Limit(NamedTuple):
    """How much harm is accepted.

    Attributes:
        answers: share of confident answers (p > ½) that may change, in [0, 1].
        error: relative error of the outputs, where there are no confident answers.
    """

    answers: float = 0.02
    error: float = 0.1


LIMIT = Limit()
"""What is accepted if nothing else is said."""

ANY = Limit(answers=1.0, error=math.inf)
"""Any harm: of a network that is trained on afterwards, or to see how much it is."""


class Harm(NamedTuple):
    """What marking did to the answers on held-out inputs.

    Attributes:
        inputs: how many there were.
        confident: how many of the answers before had p > ½; 0 where they are no class scores.
        kept: share of all answers that stayed the same; 1 where they are no class scores.
        confident_kept: the same of the confident ones.
        error: relative error of the outputs, public branch.
        private_error: of the private branch against the public one.
    """

    inputs: int
    confident: int
    kept: float
    confident_kept: float
    error: float
    private_error: float

    def within(self, limit: Limit) -> bool:
        """Whether it is at most `limit`."""
        if self.confident >= _ENOUGH:
            return 1 - self.confident_kept <= limit.answers
        return self.error <= limit.error

    def __str__(self) -> str:
        """In words."""
        if self.confident >= _ENOUGH:
            return f"{100 * self.confident_kept:.1f} % of {self.confident} confident answers kept"
        return f"a relative error of {self.error:.3f}"


class Change(NamedTuple):
    """What a graft does to one layer, before it is done.

    Attributes:
        weight: ΔW (out fan_in).
        mean: by how much the mean of each output moves.
        growth: by which factor its variance grows.
        felt: share of the layer's output, in mean squares over the inputs, that changes.
        share: ‖ΔW‖ / ‖W‖.
    """

    weight: Float[Tensor, "out fan_in"]
    mean: Float[Tensor, " out"]
    growth: Float[Tensor, " out"]
    felt: float
    share: float


def change_of(norm: PassportNorm, seen: Seen) -> Change:
    """The least ΔW, in the metric of what the layer sees, so that the passports say what it does.

        min Σ_o ΔW_o (C + λ·mean) ΔW_oᵀ   such that   γ_o = γ°_o and β_o = β°_o

    where γ° and β° are the norm's own, or 1 and 0 where there is none. A channel that the norm all
    but mutes gets a γ that is just loud enough to carry a bit: in a long training channels die.
    """
    geometry = geometry_of(norm.layer)
    rows = filters(norm.layer.get_parameter("weight"), geometry).cpu().double().flatten(1)
    about = seen.about(centred=True)
    # Without a place for it, the mean's move would be felt.
    felt = about if _has_place(norm) else seen.about(centred=False)
    forms = norm.mean_patch.cpu().double()
    said = torch.stack(collapsed_affine(rows, forms), 1)
    scale, shift = (own.cpu().double() for own in norm.own())
    need = torch.stack([_heard(scale, norm.carries), shift], 1) - said
    whitened = felt.solved(forms.flatten(0, 1), FLOOR).view_as(forms)
    products = torch.einsum("doi,eoi->ode", forms, whitened)
    weights = torch.einsum("ode,oe->od", torch.linalg.pinv(products, hermitian=True), need)
    change = torch.einsum("od,doi->oi", weights, whitened)
    if norm.carries is not None:
        change[~norm.carries.cpu()] = 0
    before = about.power(rows)
    return Change(
        change,
        change @ seen.mean,
        torch.where(before > 0, about.power(rows + change) / before, 1.0),
        float(felt.power(change).mean() / felt.power(rows).mean().clamp(min=1e-30)),
        float(change.norm() / rows.norm().clamp(min=1e-30)),
    )


def _heard(scale: Float[Tensor, " out"], carries: Tensor | None) -> Float[Tensor, " out"]:
    """γ° with none so near to 0 that its sign says nothing."""
    carrying = scale if carries is None else scale[carries.cpu()]
    least = _MUTE * carrying.abs().median()
    return torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp(min=least)


def _has_place(norm: PassportNorm) -> bool:
    """Whether a move of the output's mean can be taken back: by a batch norm or a bias."""
    return bool(_batch_norms(norm)) or getattr(norm.layer, "bias", None) is not None


def _batch_norms(norm: PassportNorm) -> list[nn.modules.batchnorm._BatchNorm]:
    both = (norm.norm, norm.private_norm)
    return [
        each
        for each in both
        if isinstance(each, nn.modules.batchnorm._BatchNorm) and each.running_mean is not None
    ]


def apply_change(norm: PassportNorm, change: Change) -> None:
    """Write ΔW, and keep what follows true of what the layer puts out now, in place."""
    geometry, weight = geometry_of(norm.layer), norm.layer.get_parameter("weight")
    rows = filters(weight, geometry)
    added = (rows.double().flatten(1) + change.weight.to(rows.device)).view(rows.shape)
    weight.copy_(own_order(added, geometry))
    norms = _batch_norms(norm)
    for each in norms:
        if each.running_mean is not None and each.running_var is not None:
            each.running_mean.add_(change.mean.to(each.running_mean))
            # A factor: statistics of a short training are far from what the layer puts out.
            each.running_var.mul_(change.growth.to(each.running_var))
    bias = getattr(norm.layer, "bias", None)
    if not norms and bias is not None:
        bias.sub_(change.mean.to(bias))


@torch.no_grad()
def begin(norms: Sequence[PassportNorm]) -> None:
    """Start an untrained network with every bit right, in place: ΔW is least in its own norm.

    Typical γ are as large as γ°. From there training would take many steps to turn half of them.
    """
    for norm in norms:
        if norm.carries is not None:
            fan_in = norm.mean_patch.shape[2]
            eye = torch.eye(fan_in).double()
            white = Seen(fan_in, torch.zeros(fan_in).double(), eye / fan_in)
            change = change_of(norm, white)
            mean, growth = torch.zeros_like(change.mean), torch.ones_like(change.growth)
            apply_change(norm, change._replace(mean=mean, growth=growth))


@contextmanager
def undone(model: nn.Module) -> Iterator[Callable[[], None]]:
    """A function that puts back what a graft changes in the model: marked layers, norms."""
    layers = [norm.layer for norm in passport_norms(model).values()]
    norms = [norm for each in branched(model) for norm in (each.norm, each.private_norm)]
    tensors = [
        tensor
        for module in (*layers, *norms)
        if module is not None
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    kept = [tensor.detach().clone() for tensor in tensors]

    def put_back() -> None:
        for tensor, earlier in zip(tensors, kept, strict=True):
            tensor.detach().copy_(earlier)

    try:
        yield put_back
    except BaseException:
        put_back()
        raise


class Answers(NamedTuple):
    """What a network puts out, and whether its rows are scores of classes."""

    numbers: Float[Tensor, "rows numbers"]
    scores: bool


def answers(model: nn.Module, inputs: Example, branch: Branch) -> Answers:
    """What `model` puts out in a branch: class scores, or all of its numbers side by side."""
    with on_branch(model, branch):
        told = [_told(call(model, part)) for part in parts(inputs, AT_ONCE)]
    return Answers(torch.cat([each.numbers for each in told]), all(each.scores for each in told))


def _told(output: Any) -> Answers:
    scores = None
    with suppress(UnsuitableModelError):
        scores = logits_of(output)
    if scores is not None and scores.dim() == 2:
        return Answers(scores.float(), True)
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.dim()]
    alike = [t.flatten(1).float() for t in tensors if len(t) == len(tensors[0])]
    return Answers(torch.cat(alike, 1), False)


def harm_of(before: Answers, public: Answers, private: Answers) -> Harm:
    """What became of the answers from before the mark, in both branches."""
    error = _error(public.numbers, before.numbers)
    apart = _error(private.numbers, public.numbers)
    if not before.scores:
        return Harm(len(before.numbers), 0, 1.0, 1.0, error, apart)
    same = before.numbers.argmax(1) == public.numbers.argmax(1)
    sure = before.numbers.softmax(1).amax(1) > _CONFIDENT
    kept = float(same[sure].float().mean()) if bool(sure.any()) else 1.0
    return Harm(len(same), int(sure.sum()), float(same.float().mean()), kept, error, apart)


def _error(given: Tensor, right: Tensor) -> float:
    return float((given - right).norm() / right.norm().clamp(min=1e-30))
