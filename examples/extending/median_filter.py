"""A scheme in one file: bits of a projected median filter, so that no single filter decides one.

Uchida's scheme reads the mean over a layer's filters. The median is the same idea and hard to move
by changing a few of them; what it costs and withstands, the leaderboard says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.schemes.engine import Carriers, Mark, Secret
from nnpassport.embedding.schemes.uchida import mean_filter_of
from nnpassport.files.arrays import Array
from nnpassport.keys.counts import Counts, counted
from nnpassport.keys.key import Key
from nnpassport.keys.reading import host_filters


@final
@dataclass(frozen=True, slots=True)
class MedianFilter(Mark):
    """Bits b_j = [X_j · m > 0], m the median over one layer's filters.

    Attributes:
        bits: signature length.
        strength: factor on the cross-entropy of the bits.
        threshold: share of the bits that its own rule asks for.
    """

    name: str = "median-filter"
    bits: int = 128
    strength: float = 0.05
    threshold: float = 0.9

    parts = frozenset({"projection"})  # so that those who forge projections are let loose on it

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """One layer. Its bits and projection are derived: that is what makes the test exact."""
        return Carriers((mean_filter_of(self.name, model, example, layers, self.bits),))

    def signals(
        self, host: Float[Tensor, "out fan_in *kernel"], secret: Secret, /
    ) -> Float[Tensor, " bits"]:
        """X·m in a training step; of an even number of filters, the lower of the middle ones."""
        return secret.rows @ host.flatten(1).median(0).values

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """Strength · cross-entropy of the bits."""
        wanted = (signs + 1) / 2
        return self.strength * F.binary_cross_entropy_with_logits(signals, wanted, reduction="sum")

    def read(self, weights: Mapping[str, Array], key: Key) -> Counts:
        """V: derived bits match an independent network as Binomial(n, ½)."""
        (layer,) = key.context.layers
        rows = host_filters(weights, layer).reshape(layer.weight[0], -1).astype(np.float64)
        median = np.quantile(rows, 0.5, axis=0, method="lower")
        return counted(
            "bits of the median filter", key, layer, key.projection_array(layer.name) @ median
        )


MEDIAN_FILTER = MedianFilter()
