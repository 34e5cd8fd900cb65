"""What layers receive, as moments: enough for a key's metric and for the least change of filters.

A layer's kernel meets thousands of patches, and none of them is kept where there are more of them
than a patch has numbers: their mean and second moments say all that is asked here.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor, nn

from nnpassport.embedding.network.equations import filters, geometry_of
from nnpassport.embedding.network.modes import hooked
from nnpassport.embedding.network.outputs import Example, call, length_of, parts
from nnpassport.embedding.schemes.patches import input_patches
from nnpassport.keys.derive import BASE
from nnpassport.scheme import UnsuitableModelError

FLOOR = 1.0
"""λ of the metric in which the graft's change is least, over the mean eigenvalue. Far less of it
puts the change where inputs do not go, and from there it is taken away at no cost."""
DIRECTIONS = 256
"""Directions in which a key's passports lie: those in which a layer's inputs vary most."""
ENOUGH = 0.1
"""Share of the mean variance from which on all directions weigh alike in them."""
FEW = 4.0
"""Where inputs vary in fewer directions than these, in effect, passports lie in all directions: in
those few the mark would be a handful of vectors for the whole layer."""
AT_ONCE = 16
"""Inputs that run together."""
_PATCHES = 4096
_NUMBERS = 2**23  # of a layer's patches that are looked at
_TINY = 1e-30


class Seen(NamedTuple):
    """What a layer was seen to receive: of patches, the mean and the second moments about zero.

    Where there were fewer patches than they have numbers, the patches themselves and no moments.
    """

    samples: int
    mean: Float[Tensor, " fan_in"]
    moment: Float[Tensor, "fan_in fan_in"] | None
    patches: Float[Tensor, "samples fan_in"] | None = None

    def about(self, *, centred: bool) -> "Spread":
        """The patches' spread about their mean, or about zero."""
        if self.moment is not None:
            off = torch.outer(self.mean, self.mean) if centred else 0.0
            return Spread(self.moment - off, None)
        if self.patches is None:
            raise ValueError("neither moments nor patches were kept")
        wide = self.patches.double()
        return Spread(None, wide - self.mean if centred else wide)


class Spread(NamedTuple):
    """Second moments C (fan_in fan_in) of patches, or the patches (samples fan_in), in float64."""

    moment: Tensor | None
    patches: Tensor | None

    def power(self, rows: Float[Tensor, "out fan_in"]) -> Float[Tensor, " out"]:
        """Mean square of what these filters put out."""
        if self.moment is not None:
            return ((rows @ self.moment) * rows).sum(1).clamp(min=0)
        assert self.patches is not None  # noqa: S101 - one of the two is there
        return (self.patches @ rows.T).square().mean(0)

    def solved(
        self, forms: Float[Tensor, "forms fan_in"], floor: float
    ) -> Float[Tensor, "forms fan_in"]:
        """(C + λ)⁻¹ m for all m, λ being `floor` times the mean of C's eigenvalues."""
        if self.patches is not None:
            return solved(self.patches, forms, floor)
        assert self.moment is not None  # noqa: S101 - one of the two is there
        ridged = self.moment.clone()
        ridged.diagonal().add_(floor * float(ridged.diagonal().mean()) + 1e-12)
        return torch.linalg.solve(ridged, forms.T).T

    def directions(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """C's largest eigenvalues, rising, their vectors (count fan_in), and the mean of all."""
        if self.moment is not None:
            size = len(self.moment)
            values, vectors = _top(self.moment, min(count, size))
            return values, vectors.T, self.moment.diagonal().mean()
        assert self.patches is not None  # noqa: S101 - one of the two is there
        # XᵀX and XXᵀ have the same eigenvalues; the latter is the smaller one here.
        gram = self.patches @ self.patches.T / len(self.patches)
        values, vectors = _top(gram, min(count, len(gram)))
        found = nn.functional.normalize(vectors.T @ self.patches, dim=1)
        return values, found, gram.diagonal().sum() / self.patches.shape[1]


def _top(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    size = len(symmetric)
    values, vectors = eigh(symmetric.numpy(), subset_by_index=(size - count, size - 1))
    return torch.from_numpy(values).clamp(min=0), torch.from_numpy(vectors)


def solved(
    x: Float[Tensor, "samples fan_in"], forms: Float[Tensor, "forms fan_in"], floor: float
) -> Float[Tensor, "forms fan_in"]:
    """(XᵀX / n + λ)⁻¹ m for all m, by whichever of the two systems is the smaller one."""
    ridge = floor * float(x.square().mean()) + 1e-12
    samples, columns = x.shape
    if samples < columns:  # Woodbury
        kernel = x @ x.T
        kernel.diagonal().add_(samples * ridge)
        return (forms - torch.linalg.solve(kernel, x @ forms.T).T @ x) / ridge
    covariance = x.T @ x / samples
    covariance.diagonal().add_(ridge)
    return torch.linalg.solve(covariance, forms.T).T


@torch.no_grad()
def watch(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    inputs: Example,
    *,
    seed: int = 0,
    show: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Seen]:
    """What the kernels of these layers meet while `model` runs once over `inputs`, in parts.

    The patches of a grouped layer's groups are taken together. Of a layer at most 2²³ numbers are
    looked at. `show` is told how many inputs have run, and of how many.

    Raises:
        UnsuitableModelError: a layer does not run, or meets numbers that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    runs = -(-length_of(inputs) // AT_ONCE)
    tallies = {name: _Tally(layer, runs, generator) for name, layer in layers.items()}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(tallies[name].note).remove)
        for number, part in enumerate(parts(inputs, AT_ONCE)):
            call(model, part)
            show(min((number + 1) * AT_ONCE, length_of(inputs)), length_of(inputs))
    found = {}
    for name, tally in tallies.items():
        finite = tally.count > 0 and bool(tally.total.isfinite().all())
        if not finite:
            met = "receives numbers that are not finite" if tally.count else "does not run"
            raise UnsuitableModelError(
                f"no key can be grafted at {name!r}: its layer {met} on these inputs; give all "
                "that the network takes, a few hundred of what it was trained on"
            )
        found[name] = tally.seen()
    return found


@final
class _Tally:
    """Moments of what one layer receives, added up while it runs."""

    def __init__(self, layer: nn.Module, runs: int, generator: torch.Generator) -> None:
        self._geometry, self._generator = geometry_of(layer), generator
        shape = filters(layer.get_parameter("weight"), self._geometry).shape
        self._kernel, fan_in = tuple(shape[2:]), shape[1:].numel()
        groups = self._geometry.groups
        self._each = max(1, min(_PATCHES, _NUMBERS // fan_in) // (runs * groups))
        self._kept: list[Tensor] | None = [] if self._each * runs * groups < fan_in else None
        self.count, self.total = 0, torch.zeros(fan_in).double()
        size = fan_in if self._kept is None else 0
        self._moment = torch.zeros(size, size).double()

    def note(self, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        """A forward hook."""
        x = args[0].detach()
        drawn = input_patches(x, self._kernel, self._geometry, self._each, self._generator)
        patches = drawn.flatten(0, 1).float().cpu()
        wide = patches.double()
        self.count += len(wide)
        self.total += wide.sum(0)
        if self._kept is None:
            self._moment.addmm_(wide.T, wide)
        else:
            self._kept.append(patches)

    def seen(self) -> Seen:
        """What there was."""
        mean = self.total / self.count
        if self._kept is None:
            return Seen(self.count, mean, self._moment / self.count)
        return Seen(self.count, mean, None, torch.cat(self._kept))


def metric_of(seen: Seen, enough: float = ENOUGH) -> NDArray[np.int16] | None:
    """What a key keeps of it (1+directions 1+fan_in), if anything: see `keys.derive.spread`.

    m lies in the directions in which inputs vary most, with weights that rise with the variance up
    to `enough` of its mean over all directions. In all others m has nothing, so that whatever is
    done to the filters there, at no cost, changes nothing of what is read (`results/floor.md`).
    None is of inputs that vary in a few directions only, or in none.
    """
    values, vectors, mean = seen.about(centred=True).directions(DIRECTIONS)
    strengths = (values / (enough * mean).clamp(min=_TINY)).clamp(max=1.0)
    weights = (strengths * 2.0**8).round()
    if weights.sum().square() <= FEW * weights.square().sum():
        return None
    chosen = torch.cat([weights[:, None], vectors * 2.0**15], 1).round()
    base = torch.zeros(1, 1 + len(seen.mean))
    base[0, 0] = BASE
    whole = torch.cat([base.to(chosen), chosen])
    return whole.clamp(-(2**15), 2**15 - 1).numpy().astype(np.int16)


@contextmanager
def listening(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What the layer receives meanwhile, with its gradients."""
    heard: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        heard.append(next(iter((*args, *kwargs.values()))))

    with hooked(layer.register_forward_pre_hook(hook, with_kwargs=True)):
        yield heard
