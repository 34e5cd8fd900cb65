"""What a thief learns from inputs that nobody labelled: how layers use them, what a change costs.

He has the weights, some inputs, and the network's own answers to them. With those he changes what
he likes and keeps as much of it as his answers stand: no key, no labels, any architecture.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.equations import filters, own_order
from nnpassport.embedding.network.outputs import (
    Example,
    call,
    length_of,
    logits_of,
    part_of,
    parts,
    tensors_in,
)
from nnpassport.embedding.network.survey import Site, choose, survey
from nnpassport.embedding.schemes.patches import input_patches
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

KEPT = 0.97
"""How much of its own answers a thief keeps, unless he says otherwise: he loses three points."""
AT_ONCE = 32
"""Inputs that run together."""
_SAMPLES, _MOST = 8, 2**14  # patches of a layer: for each number of a filter, and in all
_SETTLED_ON = 128  # inputs that norms' statistics are measured on
_FEW = 16  # numbers: smaller filters use all that they see
_HELD_OUT = 4  # a quarter of the inputs says what a change costs

Rows = Mapping[str, Float[Tensor, "out fan_in"]]
"""Weights by the name of their layer, filters first, each a row."""


class Sight(NamedTuple):
    """What the kernel of a layer meets: its mean, and its centred second moment by principal axes.

    Attributes:
        values: mean squares along the axes, ascending.
        axes: a column for each.
    """

    mean: Float[Tensor, " fan_in"]
    values: Float[Tensor, " fan_in"]
    axes: Float[Tensor, "fan_in fan_in"]

    def felt(self, rows: Float[Tensor, "out fan_in"]) -> Float[Tensor, " out"]:
        """Variance of what these filters put out."""
        return (rows @ self.axes).square() @ self.values


class Asking(NamedTuple):
    """How a network is asked, and how alike two sets of answers are.

    Attributes:
        ask: the answers (inputs numbers) of a network to inputs; gradients flow through it.
        alike: of the answers before and after, in [0, 1]; 1 is the same.
    """

    ask: Callable[[nn.Module, Example], Tensor]
    alike: Callable[[Tensor, Tensor], float]


def asking_for(model: nn.Module, example: Example) -> Asking:
    """Class scores where the network gives them, and how many classes stay; all its numbers else.

    Two sets of other numbers are as alike as the mean cosine of their rows.
    """
    with suppress(UnsuitableModelError):
        if logits_of(call(model, example)).dim() == 2:
            return Asking(lambda m, x: logits_of(call(m, x)), same_classes)
    return Asking(lambda m, x: _numbers(call(m, x)), cosine)


def same_classes(before: Tensor, after: Tensor) -> float:
    """Share of the rows whose largest number stayed where it was."""
    return float((before.argmax(1) == after.argmax(1)).double().mean())


def cosine(before: Tensor, after: Tensor) -> float:
    """Mean cosine of the rows; what is below 0 is 0."""
    return max(0.0, float(F.cosine_similarity(before, after, dim=1).mean()))


def _numbers(output: Any) -> Tensor:
    tensors = [t for t in tensors_in(output) if t.is_floating_point() and t.dim()]
    return torch.cat([t.flatten(1) for t in tensors if len(t) == len(tensors[0])], 1)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Scouted:
    """A released network as a thief knows it.

    Attributes:
        sites: the layers that might be marked, by name.
        seen: what each of them meets.
        whole: all inputs that he has.
        inputs: those that he looks at and learns from.
        held_out: what he measures a change on.
        answers: the network's own to `held_out`.
        kept: the least likeness to them that he accepts, in [0, 1].
        statistics: of what batch norms receive, by name: mean and variance.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    seen: Mapping[str, Sight]
    whole: Example
    inputs: Example
    held_out: Example
    asking: Asking
    answers: Tensor
    kept: float
    statistics: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def rows(self) -> dict[str, Float[Tensor, "out fan_in"]]:
        """The weights as they are."""
        return {name: rows_of(site) for name, site in self.sites.items()}

    @property
    def count(self) -> int:
        """How many inputs he has."""
        return length_of(self.whole)

    def likeness(self, model: nn.Module) -> float:
        """How alike the answers of `model` on held-out inputs are to the network's own."""
        found = answers_of(model, self.held_out, self.asking)
        return self.asking.alike(self.answers, found) if bool(found.isfinite().all()) else 0.0

    @torch.no_grad()
    def changed(self, rows: Rows) -> nn.Module:
        """A copy with these weights; biases and batch norms follow what the layers put out now."""
        copy = deepcopy(self.model)
        for name, new in rows.items():
            site = self.sites[name]
            layer = copy.get_submodule(name)
            change = new - rows_of(site)
            weight = layer.get_parameter("weight")
            shape = filters(weight, site.geometry).shape
            weight.copy_(own_order(new.view(shape).to(weight), site.geometry))
            self._follow(copy, site, layer, change)
        if self.statistics:
            self._settle(copy)
        return copy

    def _follow(self, copy: nn.Module, site: Site, layer: nn.Module, change: Tensor) -> None:
        """To first order, so that what comes after it meets what it did."""
        moved, bias = change @ self.seen[site.name].mean, getattr(layer, "bias", None)
        norm = None if site.norm is None else copy.get_submodule(site.norm)
        if norm is not None and _keeps_statistics(norm):
            sight, old = self.seen[site.name], rows_of(site)
            norm.get_buffer("running_mean").add_(moved.float())
            before = sight.felt(old).clamp(min=1e-12)
            growth = (sight.felt(old + change) / before).clamp(min=1e-6)
            norm.get_buffer("running_var").mul_(growth.float())
        elif bias is not None:
            bias.sub_(moved.to(bias))

    def _settle(self, copy: nn.Module) -> None:
        """Move the statistics of batch norms by what their inputs moved, all together."""
        found = _statistics(copy, part_of(self.inputs, 0, _SETTLED_ON))
        for name, (mean, variance) in self.statistics.items():
            norm, own = copy.get_submodule(name), self.model.get_submodule(name)
            after, wide = found[name]
            eps = float(norm.eps)  # type: ignore[arg-type]
            norm.get_buffer("running_mean").copy_(own.get_buffer("running_mean") + after - mean)
            growth = (wide + 1e-3 * eps) / (variance + 1e-3 * eps)
            norm.get_buffer("running_var").copy_(own.get_buffer("running_var") * growth)

    def strongest(
        self,
        make: Callable[[float], Rows],
        least: float,
        most: float,
        *,
        tries: int = 6,
        kept: float | None = None,
    ) -> tuple[nn.Module, float]:
        """What `make` does at the greatest strength that keeps the answers, and that strength.

        Halved on a scale of logarithms from `least` to `most`, `tries` times. An unchanged copy and
        0 where nothing that was tried keeps them.
        """
        limit = self.kept if kept is None else kept
        best, strength = deepcopy(self.model), 0.0
        for _ in range(tries):
            trial = (least * most) ** 0.5
            model = self.changed(make(trial))
            if self.likeness(model) >= limit:
                best, strength, least = model, trial, trial
            else:
                most = trial
        return best, strength


@torch.no_grad()
def scout(
    model: nn.Module,
    inputs: Example,
    *,
    kept: float = KEPT,
    layers: Sequence[str] | None = None,
    asking: Asking | None = None,
    seed: int = 0,
) -> Scouted:
    """Look at a network with some hundred unlabelled `inputs`; the last quarter is held out.

    `layers` are patterns as in `survey.choose`; by default all that could be marked, but for those
    whose filters have fewer than 16 numbers.

    Raises:
        BadRecipeError: `kept` is not in [0, 1], or there are fewer than 4 inputs.
        UnsuitableModelError: no layer could be marked.
    """
    if not 0 <= kept <= 1:
        raise BadRecipeError(f"kept is {kept}; needed: a fraction from 0 to 1")
    if length_of(inputs) < _HELD_OUT:
        raise BadRecipeError(f"{length_of(inputs)} inputs were given; needed: 4, better hundreds")
    own = deepcopy(model).eval()
    cut = length_of(inputs) * (_HELD_OUT - 1) // _HELD_OUT
    looked, held_out = part_of(inputs, 0, cut), part_of(inputs, cut, length_of(inputs))
    found = survey(own, part_of(inputs, 0, 2))
    chosen = choose(own, found, ["*"] if layers is None else layers)
    wide = {site.name: site for site in chosen if rows_of(site).shape[1] >= _FEW}
    sites = wide or {site.name: site for site in chosen}
    asking = asking_for(own, part_of(inputs, 0, 2)) if asking is None else asking
    return Scouted(
        model=own,
        sites=sites,
        seen=sights_of(own, sites, looked, seed=seed),
        whole=inputs,
        inputs=looked,
        held_out=held_out,
        asking=asking,
        answers=answers_of(own, held_out, asking),
        kept=kept,
        statistics=_statistics(own, part_of(looked, 0, _SETTLED_ON)),
    )


@torch.no_grad()
def answers_of(model: nn.Module, inputs: Example, asking: Asking) -> Tensor:
    """The answers (inputs numbers) of a network."""
    return torch.cat([asking.ask(model, part).float() for part in parts(inputs, AT_ONCE)])


def rows_of(site: Site) -> Float[Tensor, "out fan_in"]:
    """The weight of a layer in double precision, each filter a row."""
    weight = site.layer.get_parameter("weight").detach()
    return filters(weight, site.geometry).flatten(1).double()


def sights_of(
    model: nn.Module, sites: Mapping[str, Site], inputs: Example, *, seed: int = 0
) -> dict[str, Sight]:
    """What the kernels of these layers meet, in one run over `inputs`; groups are taken together.

    Of each layer at most 2¹⁴ patches are looked at, and nothing but their moments is kept.
    """
    runs = -(-length_of(inputs) // AT_ONCE)
    generator = torch.Generator().manual_seed(seed)
    tallies = {name: _Tally(site, runs, generator) for name, site in sites.items()}
    with ExitStack() as stack:
        for name, tally in tallies.items():
            stack.callback(sites[name].layer.register_forward_hook(tally.note).remove)
        for part in parts(inputs, AT_ONCE):
            call(model, part)
    return {name: tally.sight() for name, tally in tallies.items()}


@final
class _Tally:
    """Sums over the patches that a layer meets."""

    def __init__(self, site: Site, runs: int, generator: torch.Generator) -> None:
        weight = site.layer.get_parameter("weight")
        shape = filters(weight, site.geometry).shape
        self.kernel, fan_in = tuple(shape[2:]), shape[1:].numel()
        wanted = max(1024, min(_MOST, _SAMPLES * fan_in))
        self.count = max(1, -(-wanted // (runs * site.geometry.groups)))
        self.geometry, self.generator = site.geometry, generator
        self.total, self.number = torch.zeros(fan_in).double(), 0
        self.squares = torch.zeros(fan_in, fan_in).double()

    def note(self, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        x = args[0].detach()
        drawn = input_patches(x, self.kernel, self.geometry, self.count, self.generator)
        patches = drawn.flatten(0, 1).float()
        self.total += patches.sum(0)
        self.squares += patches.T @ patches
        self.number += len(patches)

    def sight(self) -> Sight:
        mean = self.total / self.number
        values, axes = torch.linalg.eigh(self.squares / self.number - torch.outer(mean, mean))
        return Sight(mean, values.clamp(min=0), axes)


def _keeps_statistics(norm: nn.Module) -> bool:
    batch = isinstance(norm, nn.modules.batchnorm._BatchNorm)
    return batch and norm.running_mean is not None and norm.running_var is not None


@torch.no_grad()
def _statistics(model: nn.Module, inputs: Example) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of each channel that a batch norm receives, by the norm's name."""
    norms = {name: each for name, each in model.named_modules() if _keeps_statistics(each)}
    if not norms:
        return {}
    sums: dict[str, list[Tensor]] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            x = args[0].detach().movedim(1, -1).flatten(0, -2)
            found = torch.stack([x.new_full(x.shape[1:], len(x)), x.sum(0), x.square().sum(0)])
            sums.setdefault(name, []).append(found.double())

        return note

    with ExitStack() as stack:
        for name, norm in norms.items():
            stack.callback(norm.register_forward_hook(noting(name)).remove)
        for part in parts(inputs, AT_ONCE):
            call(model, part)
    found = {}
    for name, each in sums.items():
        number, total, squares = torch.stack(each).sum(0)
        mean = total / number
        variance = (squares / number - mean.square()).clamp(min=0)
        found[name] = (mean.float(), variance.float())
    return found
