"""Uchida's scheme: bits read off one layer's mean filter through a secret projection.

[Uch17] Uchida, Nagai, Sakazawa, Satoh: Embedding Watermarks into Deep Neural Networks, ICMR 2017.
[Che19] Chen, Rouhani, Fu, Zhao, Koushanfar: DeepMarks, ICMR 2019; its regulariser is the R of
equation 1 in [Fan19].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.equations import filters
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.survey import Site, choose, survey
from nnpassport.embedding.schemes.engine import Carriers, Mark, Secret
from nnpassport.keys.context import LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.scheme import UnsuitableModelError

_WIDENED = 2**22  # numbers of a projection


@final
@dataclass(frozen=True, slots=True)
class Uchida(Mark):
    """Bits b_j = [X_j · w̄ > 0], w̄ the mean over output channels of one layer's weight.   [Uch17]

    The rows of X are drawn uniform where the paper draws Gaussians, so that they are the same
    integers on every platform; reading depends on their directions alone. The published experiments
    set all bits to one; ours are drawn, or no exact test would be possible.

    Attributes:
        name: as in keys and on the command line.
        squared: pull X·w̄ to b by MSE(b − X·w̄) (DeepMarks) and not by the cross-entropy of bits.
        bits: signature length T.
        strength: λ_r, factor on the sum (cross-entropy) or mean (squares) over the bits.
        threshold: share of the bits that must match by the published rule.
    """

    name: str
    squared: bool
    bits: int = 256
    strength: float = 0.01
    threshold: float = 1.0

    parts = frozenset({"projection"})

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """One layer: by default the last convolution that can hold the bits, or else linear layer.

        Raises:
            UnsuitableModelError: not one layer, a grouped one, or one with fewer numbers than bits.
        """
        return Carriers((mean_filter_of(self.name, model, example, layers, self.bits),))

    def signals(
        self, host: Float[Tensor, "out fan_in *kernel"], secret: Secret, /
    ) -> Float[Tensor, " bits"]:
        """X·w̄."""
        return read_out(host, secret.rows)

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """λ_r·R, R = Σ_j BCE(σ(X_j·w̄), b_j) or MSE(b − X·w̄)."""
        if self.squared:
            return self.strength * F.mse_loss(signals, signs)
        return self.strength * cross_entropy(signals, signs)


def mean_filter_of(
    scheme: str, model: nn.Module, example: Example, layers: Sequence[str] | None, bits: int
) -> LayerShape:
    """The layer whose mean filter `bits` bits are read off: the named one, or the last that can.

    Raises:
        UnsuitableModelError: not one layer, a grouped one, or one with fewer numbers than bits.
    """
    site = _host(scheme, model, example, layers, bits)
    weight = tuple(filters(site.layer.get_parameter("weight"), site.geometry).shape)
    axes = site.geometry.axes
    kernel = weight[1:] if axes else (weight[1], 1)
    # The mean filter is read as it is, however its layer slides.
    turned = site.geometry.transposed
    geometry = Geometry(
        (1,) * axes,
        ((0, 0),) * axes,
        (1,) * axes,
        transposed=turned,
        output_padding=(0,) * axes if turned else (),
    )
    return LayerShape(site.name, weight, kernel, geometry, bits)


def _host(
    scheme: str, model: nn.Module, example: Example, layers: Sequence[str] | None, bits: int
) -> Site:
    found = survey(model, example)
    if layers is None:
        plain = [s for s in found.sites.values() if s.geometry.groups == 1]
        large = [s for s in plain if _fan_in(s) >= bits]
        convolutions = [s for s in large if s.geometry.axes]
        hosts = (convolutions or large)[-1:]
    else:
        hosts = choose(model, found, layers)
    if len(hosts) != 1:
        raise UnsuitableModelError(
            f"{scheme} reads {bits} bits off one layer, and {len(hosts)} were found; "
            f"needed: one ungrouped layer with at least {bits} numbers a filter; name "
            f"one of: {', '.join(found.sites) or 'none'}"
        )
    (host,) = hosts
    if host.geometry.groups != 1 or _fan_in(host) < bits:
        raise UnsuitableModelError(
            f"layer {host.name!r} has {_fan_in(host)} numbers a filter in "
            f"{host.geometry.groups} group(s); {scheme} needs at least {bits}, one for "
            "each bit, in one group; name another layer or take fewer bits"
        )
    return host


def read_out(
    weight: Float[Tensor, "out fan_in *kernel"], projection: Float[Tensor, "bits columns"]
) -> Float[Tensor, " bits"]:
    """X·w̄, w̄ the mean filter; its signs are the bits.                        [Uch17, eq. 2]

    Gradients flow to the weight and to the projection.
    """
    mean_filter = weight.mean(0).flatten()
    same = projection.dtype == mean_filter.dtype or mean_filter.requires_grad
    if same or projection.numel() <= _WIDENED:
        return projection.to(mean_filter) @ mean_filter
    # One buffer for all parts of a large one: what is allocated anew the C library scatters.
    rows = max(1, _WIDENED // len(mean_filter))
    wide = mean_filter.new_empty((rows, len(mean_filter)))
    parts = projection.split(rows)
    return torch.cat([wide[: len(part)].copy_(part) @ mean_filter for part in parts])


def cross_entropy(
    signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
) -> Float[Tensor, ""]:
    """Σ_j BCE(σ(signal_j), b_j), the bits given as signs."""
    return F.binary_cross_entropy_with_logits(signals, (signs + 1) / 2, reduction="sum")


def _fan_in(site: Site) -> int:
    return filters(site.layer.get_parameter("weight"), site.geometry)[0].numel()


UCHIDA = Uchida("uchida", squared=False)
UCHIDA_MSE = Uchida("uchida-mse", squared=True, strength=1.0)
