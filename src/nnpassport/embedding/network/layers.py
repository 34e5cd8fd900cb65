"""The passport layer: a norm (or a bare layer) whose scale and shift come from a passport."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum, unique
from typing import Any, cast, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nnpassport.embedding.network.equations import (
    apply_affine,
    collapsed_affine,
    filters,
    geometry_of,
)
from nnpassport.embedding.network.modes import evaluated
from nnpassport.embedding.network.outputs import with_tensors


@unique
class Branch(Enum):
    """Which of the two networks that share their weights is computed."""

    PUBLIC = "public"  # the passport is withheld: the network as it is released
    PRIVATE = "private"  # the passport is presented
    BOTH = "both"  # the batch is forked: its first part runs public, its second one private


FASTER = 10.0
"""How many times as fast as a norm's own scale a channel's γ may learn, at most."""


@final
@dataclass(eq=False)
class Running:
    """What a marked network computes now: one object for all of its passport layers and norms.

    Attributes:
        branch: which of the two networks.
        private_share: of the images, the last ones, that a fork also sends through the private
            branch; in (0, 1].
        kept: γ that a forward leaves for the step's loss, by what computed it; None where it
            leaves none.
        removed: the passports were taken out again.
    """

    branch: Branch = Branch.PUBLIC
    private_share: float = 1.0
    kept: "dict[PassportNorm, Tensor] | None" = None
    removed: bool = False


@final
class PassportNorm(nn.Module):
    """A norm layer whose scale and shift come from a passport while it is presented.

    Wraps the affine norm that is already there (batch, group, layer, instance) and leaves it as it
    was. Where a layer has no norm, it wraps the layer itself: the same affine, no normalisation.

    Only m(P), the passport's mean patch, is kept: the rest of the passport never matters to the
    network. It is secret, and a non-persistent buffer, so that no checkpoint holds it.

    Attributes:
        norm: what was here before surgery.
        private_norm: a copy of it with running statistics of its own for the private branch, or
            None where the norm keeps none (group, layer) or there is no second branch (V1).
        signs: the layer's signature, ±1 for each channel; 1 where each has a passport of its own,
            whose bit is in its mean patch.
        carries: which channels have a passport of their own; None: there is one for all of them.
            The others keep the scale and shift that they have.
        ease: factors on the gradients of each channel's γ and β, in (0, 1]. A step along a
            gradient g changes γ = ⟨W, m⟩ by g·‖m‖², 50 to 300 times as much as a scale of its own,
            which short trainings do not survive (`docs/log.md`).
        channel_axis: where the output's channels are.
        running: what `forward` computes, said once for the whole network.
        encoder: what the private branch hears γ and β through, if anything; see `schemes.pan`.
        forks: whether the batch is forked here (see `surgery`), the first passport layers of V2/V3.
    """

    mean_patch: Float[Tensor, "2 groups columns"]
    signs: Float[Tensor, " out"]
    carries: Bool[Tensor, " out"] | None
    ease: Float[Tensor, "2 out"] | None

    def __init__(
        self,
        layer: nn.Module,
        norm: nn.Module,
        mean_patch: Float[Tensor, "2 groups columns"],
        signs: Float[Tensor, " out"],
        *,
        carries: Bool[Tensor, " out"] | None = None,
        channel_axis: int = 1,
        own_statistics: bool = False,
        running: Running | None = None,
    ) -> None:
        super().__init__()
        weight = cast(Tensor, layer.weight)
        self.norm = norm
        self._geometry = geometry_of(layer)
        self.private_norm = _statistics_of_its_own(norm) if own_statistics else None
        self._layer = (layer,)  # in a tuple, so that the layer is not registered here as well
        self.channel_axis = channel_axis
        self.running = running or Running()
        self.forks = False
        self.encoder: Encoder | None = None
        # PyTorch's transformer layers run past their own parts in evaluation unless one has a hook.
        self.register_forward_pre_hook(_in_the_open)
        self.register_buffer("mean_patch", mean_patch.to(weight), persistent=False)
        self.register_buffer("signs", signs.to(weight), persistent=False)
        carries = None if carries is None else carries.to(weight.device)
        self.register_buffer("carries", carries, persistent=False)
        ease = None if carries is None else _ease(self.mean_patch)
        self.register_buffer("ease", ease, persistent=False)

    def __getattr__(self, name: str) -> Any:
        """What else the network asks of the layer or norm that was here: strides, sizes, an ε.

        Not its tensors: who computes with those goes past the passport.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            asked = getattr(self._modules.get("norm"), name, None)
            if name.startswith("_") or asked is None or isinstance(asked, Tensor | nn.Module):
                raise
            return asked

    @property
    def layer(self) -> nn.Module:
        """The convolution or linear layer whose weight the passport runs through."""
        return self._layer[0]

    @property
    def gamma(self) -> Float[Tensor, " out"]:
        """γ with its gradient: the one that this step's forward left, or else computed."""
        kept = self.running.kept
        return self.affine()[0] if kept is None or self not in kept else kept[self]

    def train(self, mode: bool = True) -> "PassportNorm":
        """As ever; and evaluation ends a training step's BOTH: one output an image again."""
        _end_step(self.running, mode)
        super().train(mode)
        return self

    def affine(self) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        """γ and β of the passport at the layer's present weight; gradients flow to the weight."""
        weight, patch = filters(whole_weight(self.layer.weight), self._geometry), self.mean_patch
        if not weight.is_contiguous():
            # Channels-last: sum in the order that W has in memory; its own order would copy W twice
            # a step, which costs more than the product.
            patch = patch.unflatten(2, weight.shape[1:]).movedim(2, -1).flatten(2)
            weight = weight.movedim(1, -1)
        # Full precision even under autocast: bfloat16 would flip the signs of small γ.
        with torch.autocast(weight.device.type, enabled=False):
            gamma, beta = collapsed_affine(weight, patch)
        if self.carries is None or self.ease is None:
            return gamma, beta
        gamma, beta = _slowed(gamma, self.ease[0]), _slowed(beta, self.ease[1])
        scale, shift = self.own()
        return torch.where(self.carries, gamma, scale), torch.where(self.carries, beta, shift)

    def own(self) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        """γ° and β° of the public branch: 1 and 0 where there is none."""
        ones = torch.ones_like(self.signs)
        if self.norm is self.layer:
            return ones, torch.zeros_like(ones)
        weight, bias = getattr(self.norm, "weight", None), getattr(self.norm, "bias", None)
        return (
            ones if weight is None else whole_weight(weight),
            torch.zeros_like(ones) if bias is None else whole_weight(bias),
        )

    def wanted(self) -> Float[Tensor, " out"]:
        """The sign that γ should have: the signature's, or that of the norm's own scale.

        Where each channel has its own passport its bit is read as sign(γ° · γ), and a channel that
        carries none has a zero here.
        """
        if self.carries is None:
            return self.signs
        scale = self.own()[0].detach()
        return torch.where(scale < 0, -self.signs, self.signs) * self.carries

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The wrapped norm, its affine replaced by the passport's in the private branch."""
        branch, share = self.running.branch, self.running.private_share
        if branch is Branch.PUBLIC:
            return self.norm(x)
        if branch is Branch.PRIVATE:
            return self._private(x)
        if self.forks and self.norm is self.layer:
            y = self.norm(x)
            private = _also_private(y, share)
            return torch.cat([y, _scaled(private, *self._affine(), self.channel_axis)])
        public, private = (x, _also_private(x, share)) if self.forks else _parted(x, share)
        return torch.cat([self.norm(public), self._private(private)])

    def fork_input(
        self,
        named: frozenset[int | str],
        _module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-forward hook that forks a module's batch while both branches run.

        For networks where the branches have to part earlier than at the passport itself. `named`
        are the arguments that hold the batch: positions, which are the same for every image, do
        not.
        """
        if self.running.branch is not Branch.BOTH:
            return None
        share = self.running.private_share
        return (
            tuple(forked(v, share) if index in named else v for index, v in enumerate(args)),
            {name: forked(v, share) if name in named else v for name, v in kwargs.items()},
        )

    def fork_beside(
        self,
        named: frozenset[int | str],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """`fork_input` after the fork, for what did not pass it, such as a mask."""
        return self.fork_input(named, module, args, kwargs)

    def _affine(self) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
        gamma, beta = self.affine()
        # Not where it has no graph, as in a forward that a checkpoint will repeat.
        alone = torch.compiler.is_compiling() or not gamma.requires_grad
        if not alone and self.running.kept is not None:
            self.running.kept[self] = gamma
        if self.encoder is None:
            return gamma, beta
        return self.encoder(gamma), self.encoder(beta)

    def _private(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        norm = self.norm if self.private_norm is None else self.private_norm
        gamma, beta = self._affine()
        if norm is self.layer:
            return _scaled(norm(x), gamma, beta, self.channel_axis)
        # What the norm has of its own is replaced; what it lacks (RMSNorm's bias, affine=False) is
        # applied afterwards.
        replaced = {
            name: value
            for name, value in (("weight", gamma), ("bias", beta))
            if getattr(norm, name, None) is not None
        }
        y = functional_call(norm, replaced, (x,))
        if len(replaced) == 2:
            return y
        scale = torch.ones_like(gamma) if "weight" in replaced else gamma
        return _scaled(y, scale, beta, self.channel_axis)


@final
class Encoder(nn.Module):
    """A small network between a passport's γ and β and those that the private branch runs on.

        E(x) = B·LeakyReLU(A·x),  A (hidden out), B (out hidden), hidden = out / 4     [Zha20]

    At least two hidden units, so that γ and β can differ. A and B are drawn as those of a Linear
    are, from a fixed seed.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden, rng = max(2, channels // 4), torch.Generator().manual_seed(0)
        first = 2 * torch.rand(hidden, channels, generator=rng) - 1
        second = 2 * torch.rand(channels, hidden, generator=rng) - 1
        self.first = nn.Parameter(first / channels**0.5)
        self.second = nn.Parameter(second / hidden**0.5)

    def forward(self, x: Float[Tensor, " out"]) -> Float[Tensor, " out"]:
        """One vector in, one out, in full precision even under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            return self.second @ functional.leaky_relu(self.first @ x)


def _ease(forms: Float[Tensor, "2 out columns"]) -> Float[Tensor, "2 out"]:
    squares = forms.double().square().sum(2)
    return (FASTER / squares.clamp(min=FASTER)).to(forms)


def _slowed(x: Tensor, factor: Tensor) -> Tensor:
    """The very values of `x`, of whose gradients `factor` flows back."""
    held = x.detach()
    return held + factor * (x - held)


def _in_the_open(_module: nn.Module, _args: tuple[Any, ...]) -> None:
    """A hook that does nothing but be there."""


def whole_weight(weight: Any) -> Tensor:
    """A weight of which a process may have its part only (FSDP), whole; gradients flow back."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import Partial  # noqa: PLC0415 - a second, for FSDP only

    # Under FSDP a weight may be this process's part of it. The gradient that flows back is that of
    # this process's images alone, and has to be averaged as FSDP averages all others.
    average = [Partial("avg")] * weight.device_mesh.ndim
    return weight.full_tensor(grad_placements=average)


def _scaled(
    x: Float[Tensor, "..."], gamma: Float[Tensor, " out"], beta: Float[Tensor, " out"], axis: int
) -> Float[Tensor, "..."]:
    return apply_affine(x, gamma.to(x.dtype), beta.to(x.dtype), channel_axis=axis)


def private_count(images: int, share: float) -> int:
    """How many of a step's images also run through the private branch: at least one."""
    return max(1, round(share * images))


def public_count(rows: int, share: float) -> int:
    """How many images a forked batch of `rows` was made of: n + `private_count`(n, share) = rows.

    Raises:
        ValueError: no batch of images is forked into that many.
    """
    near = round(rows / (1 + share))
    for images in range(max(1, near - 2), near + 3):
        if images + private_count(images, share) == rows:
            return images
    raise ValueError(f"no batch with a private share of {share} is forked into {rows} rows")


def forked(value: Any, share: float = 1.0) -> Any:
    """Every tensor in a value followed by its private share; anything else as it is."""
    return with_tensors(value, lambda t: torch.cat([t, _also_private(t, share)]) if t.dim() else t)


def _also_private(x: Tensor, share: float) -> Tensor:
    # The last ones: triggers are at the end of a batch, and both branches are to learn them.
    return x if share == 1 else x[len(x) - private_count(len(x), share) :]


def _parted(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The public and the private part of a batch that was forked before."""
    images = len(x) // 2 if share == 1 else public_count(len(x), share)
    return x[:images], x[images:]


def _statistics_of_its_own(norm: nn.Module) -> nn.Module | None:
    if getattr(norm, "running_mean", None) is None:
        return None
    return deepcopy(norm).requires_grad_(False)


def passport_norms(model: nn.Module) -> dict[str, PassportNorm]:
    """The passport layers inside a model, by the dotted name of the norm they wrap."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, PassportNorm)
    }


@final
class BranchNorm(nn.Module):
    """A norm without passport, after the fork, that keeps running statistics for each branch.

    Both branches share its weight and bias. Without it, batch norm would average over public and
    private activations together, and neither branch would meet in use what it met in training.
    """

    def __init__(self, norm: nn.Module, running: Running | None = None) -> None:
        super().__init__()
        self.norm = norm
        self.private_norm = _statistics_of_its_own(norm)
        self.running = running or Running()

    def train(self, mode: bool = True) -> "BranchNorm":
        """As ever; and evaluation ends a training step's BOTH: one output an image again."""
        _end_step(self.running, mode)
        super().train(mode)
        return self

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The wrapped norm, each half of a forked batch with its own statistics.

        Its argument is called what torch's norms call theirs, for networks that name it.
        """
        if self.running.branch is Branch.PUBLIC:
            return self.norm(input)
        if self.running.branch is Branch.PRIVATE:
            return self._private(input)
        public, private = _parted(input, self.running.private_share)
        return torch.cat([self.norm(public), self._private(private)])

    def _private(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        shared: dict[str, Tensor] = dict(self.norm.named_parameters())
        return functional_call(cast(nn.Module, self.private_norm), shared, (x,))


def _end_step(running: Running, mode: bool) -> None:
    if not mode and running.branch is Branch.BOTH:
        running.branch = Branch.PUBLIC


def own_statistics(model: nn.Module) -> list[nn.Module]:
    """The norms that keep running statistics for the private branch alone."""
    return [
        module.private_norm
        for module in model.modules()
        if isinstance(module, PassportNorm | BranchNorm) and module.private_norm is not None
    ]


@torch.no_grad()
def share_statistics(model: nn.Module) -> None:
    """Give the private branch the public one's running statistics, in place.

    They are its own where both branches compute the same.
    """
    for module in branched(model):
        if module.private_norm is not None:
            for name, mine in module.private_norm.named_buffers():
                mine.copy_(module.norm.get_buffer(name))


def branched(model: nn.Module) -> list[PassportNorm | BranchNorm]:
    """All modules inside a model that compute one thing or another by branch."""
    return [m for m in model.modules() if isinstance(m, PassportNorm | BranchNorm)]


def running_in(model: nn.Module) -> list[Running]:
    """What says which branch is computed inside a model: one object, unless it is of several."""
    return list({id(module.running): module.running for module in branched(model)}.values())


def set_branch(model: nn.Module, branch: Branch, private_share: float = 1.0) -> None:
    """What the model computes from now on; of BOTH, the share of images that is also private."""
    for running in running_in(model):
        running.branch, running.private_share = branch, private_share


@contextmanager
def on_branch(model: nn.Module, branch: Branch) -> Iterator[None]:
    """Run one branch for a while, in evaluation mode; afterwards all is as before."""
    before = [(each, each.branch, each.private_share) for each in running_in(model)]
    with evaluated(model):  # first: it would end BOTH
        set_branch(model, branch)
        try:
            yield
        finally:
            for each, earlier, share in before:
                each.branch, each.private_share = earlier, share


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the dotted `name` points to, in place, and wherever else that is used."""
    before = model.get_submodule(name)
    # Not that one attribute only: the same norm may also stand in a Sequential, and run from there.
    for parent in list(model.modules()):
        for child, each in parent._modules.items():
            if each is before:
                setattr(parent, child, module)
