"""The fully connected substitution of Chen et al.: new γ and β with a tenth of the data or less.

[Che23] Chen, Tian, Chen, Zhou: Effective Ambiguity Attack Against Passport-based DNN Intellectual
Property Protection Schemes through Fully Connected Layer Substitution, CVPR 2023. Its code was not
published; what the text leaves open (initial weights, schedule) is chosen here.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nnpassport.attacks.ambiguity import norms_of, with_statistics
from nnpassport.attacks.outcome import Forged, stopwatch
from nnpassport.attacks.passports import draw_template, key_with
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.train.loop import Journal, Recipe, classification, fit

HIDDEN = 10
"""Hidden units for each channel in the individual form."""

Block = Callable[[int, torch.Generator], nn.Module]


def substitute_individual(
    model: nn.Module,
    scheme: Scheme,
    data: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    rng: torch.Generator,
    journal: Journal | None = None,
) -> Forged:
    """IERB: each channel's γ through a little network of its own, with a skip connection.

    γ'_i = γ_i + Σ_h u_ih·relu(v_ih·γ_i + a_ih) + c_i, ten hidden units; trained with β on the task
    alone, the weights frozen. More parameters for one number let its sign change, which gradient
    descent on γ itself hardly does.                                                  [Che23]

    Raises:
        UnsuitableModelError: a passport layer has no norm with a scale and a shift.
    """
    return _substituted(model, scheme, data, recipe, normalise, rng, journal, _Individual)


def substitute_across(
    model: nn.Module,
    scheme: Scheme,
    data: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    rng: torch.Generator,
    journal: Journal | None = None,
) -> Forged:
    """CERB: all γ of a layer through one network C → C/8 → C, with a skip connection.    [Che23]

    Raises:
        UnsuitableModelError: as `substitute_individual`.
    """
    return _substituted(model, scheme, data, recipe, normalise, rng, journal, _Across)


def _substituted(
    model: nn.Module,
    scheme: Scheme,
    data: ImageSet,
    recipe: Recipe,
    normalise: Normalisation,
    rng: torch.Generator,
    journal: Journal | None,
    block: Block,
) -> Forged:
    stop = stopwatch("W, D")
    example = normalise(data.images[:2])
    template = draw_template(scheme, model, example, rng)
    names = [layer.name for layer in template.context.layers]
    norms = norms_of(model, names, example)
    substituted = _Substituted(model, list(norms.values()), block, rng)
    fit(substituted, classification, data, recipe, normalise=normalise, journal=journal)
    affine = dict(zip(norms, substituted.affine(), strict=True))
    key = key_with(template, affine, model.state_dict(), rng)
    shown = with_statistics(model, substituted.model)
    return Forged(shown, key, stop(len(data), recipe.epochs))


@final
class _Substituted(nn.Module):
    """A frozen network whose named norms take γ from blocks and β from parameters."""

    def __init__(
        self, model: nn.Module, norms: list[str], block: Block, rng: torch.Generator
    ) -> None:
        super().__init__()
        self.model = deepcopy(model).requires_grad_(False)
        self._norms = norms
        sizes = [len(model.get_parameter(f"{name}.weight")) for name in norms]
        self.blocks = nn.ModuleList([block(size, rng) for size in sizes])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in sizes])
        self.shifts = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])

    def affine(self) -> list[tuple[Tensor, Tensor]]:
        """γ and β as they stand, layer by layer."""
        with torch.no_grad():
            return list(zip(self._gammas(), self.shifts, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """The network with the substituted scales and shifts."""
        replaced: dict[str, Tensor] = {}
        for name, gamma, beta in zip(self._norms, self._gammas(), self.shifts, strict=True):
            replaced |= {f"{name}.weight": gamma, f"{name}.bias": beta}
        return functional_call(self.model, replaced, (x,))

    def _gammas(self) -> list[Tensor]:
        # Full precision even under autocast, as for genuine passports.
        with torch.autocast(self.scales[0].device.type, enabled=False):
            return [block(s) for block, s in zip(self.blocks, self.scales, strict=True)]


@final
class _Individual(nn.Module):
    def __init__(self, channels: int, rng: torch.Generator) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(channels, HIDDEN, generator=rng))
        self.offset = nn.Parameter(torch.zeros(channels, HIDDEN))
        self.second = nn.Parameter(torch.randn(channels, HIDDEN, generator=rng) / HIDDEN**0.5)
        self.last = nn.Parameter(torch.zeros(channels))

    def forward(self, gamma: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        hidden = F.relu(self.first * gamma[:, None] + self.offset)
        return gamma + (self.second * hidden).sum(1) + self.last


@final
class _Across(nn.Module):
    def __init__(self, channels: int, rng: torch.Generator) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.first = nn.Parameter(torch.randn(hidden, channels, generator=rng) / channels**0.5)
        self.offset = nn.Parameter(torch.zeros(hidden))
        self.second = nn.Parameter(torch.randn(channels, hidden, generator=rng) / hidden**0.5)
        self.last = nn.Parameter(torch.zeros(channels))

    def forward(self, gamma: Float[Tensor, " channels"]) -> Float[Tensor, " channels"]:
        hidden = F.leaky_relu(self.first @ gamma + self.offset)
        return gamma + self.second @ hidden + self.last
