"""Greedy residuals: bits are signs of what a layer's weight is without its small numbers.

[Liu21] Liu, Weng, Zhu: Watermarking Deep Neural Networks with Greedy Residuals, ICML 2021, and the
code that its authors published.

From there: one layer's weight, flattened, average-pooled and cut into a row for each bit; in each
row the smallest absolute values are set to zero, greedily, and the sign of the mean of what is left
is the bit; a hinge pulls these means to their sides. Nothing secret is needed to read: there is no
projection, and anybody can see (and overwrite) the bits.

The paper's bits are the hash of an RSA signature of the owner's identity, so that nobody can choose
them; ours are derived from the seed, which binds them too, and match any independent network as
Binomial(n, ½): exactly, whatever way of reading is fixed. Its code pools the whole vector before it
is cut, and stretches layers that are too small; we cut first, and pool no further than there are
numbers. Its margin is 0.1 in units of the weights; ours is in units of their root mean square, so
that networks of other widths need no other margin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.schemes.engine import Carriers, Mark, Secret
from nnpassport.embedding.schemes.uchida import mean_filter_of
from nnpassport.keys.key import Key
from nnpassport.keys.reading import COLUMNS, DROPPED
from nnpassport.keys.validity import LEAST_ROW
from nnpassport.scheme import UnsuitableModelError


@final
@dataclass(frozen=True, slots=True)
class GreedyResiduals(Mark):
    """Bits b_j = [mean of row j without its smallest numbers > 0] of one layer's weight.  [Liu21]

    There are no `parts` to be forged: whoever chooses the bits needs nothing else.

    Attributes:
        name: as in keys and on the command line.
        bits: signature length.
        strength: factor on the sum of hinges over the bits.
        margin: how far from zero each mean is pulled, in units of the weight's root mean square.
        threshold: share of the bits that must match by the published rule.
    """

    name: str
    bits: int = 256
    strength: float = 1.0
    margin: float = 0.1
    threshold: float = 1.0

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """One layer, by default the last convolution.

        Raises:
            UnsuitableModelError: not one layer, a grouped one, or one that is too small.
        """
        shape = mean_filter_of(self.name, model, example, layers, 1)._replace(bits=self.bits)
        numbers = math.prod(shape.weight)
        if numbers < self.bits * LEAST_ROW:
            raise UnsuitableModelError(
                f"layer {shape.name!r} has {numbers} numbers; {self.name} needs {LEAST_ROW} for "
                f"each of {self.bits} bits; name another layer or take fewer bits"
            )
        return Carriers((shape,))

    def signals(
        self, host: Float[Tensor, "out fan_in *kernel"], secret: Secret, /
    ) -> Float[Tensor, " bits"]:
        """r: each row's mean over the weight's size."""
        return residuals(host, secret.layer.length) / host.detach().square().mean().sqrt()

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """λ·Σ_j max(margin − b_j·r_j, 0)."""
        return self.strength * F.relu(self.margin - signs * signals).sum()

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """By layer, the sums over the stretches that a row takes of a filter.

        Which numbers of a row are dropped depends on the filter, so what V reads is not linear in
        it; without dropping it would be these sums. Alignment compares filters without them. What
        is left for it to lean on, and rows that begin elsewhere in each filter, is what its null
        of unrelated networks is measured for.
        """
        (layer,) = key.context.layers
        numbers = math.prod(layer.weight)
        columns = numbers // layer.weight[0]
        stretch = torch.arange(columns) // (numbers // layer.length)
        return {layer.name: F.one_hot(stretch).T.float()}


def residuals(weight: Float[Tensor, "out fan_in *kernel"], bits: int) -> Float[Tensor, " bits"]:
    """Mean of each row of the pooled weight whose smallest absolute values are zero.

    Numbers that do not fill a row are left out. Gradients flow to those that are kept.
    """
    numbers = weight.numel() // bits
    rows = weight.flatten()[: numbers * bits].reshape(1, bits, numbers)
    (pooled,) = F.adaptive_avg_pool1d(rows, min(COLUMNS, numbers))
    columns = pooled.shape[1]
    kept = pooled.detach().abs().argsort(dim=1)[:, round(DROPPED * columns) :]
    return pooled.gather(1, kept).sum(1) / columns


GREEDY_RESIDUALS = GreedyResiduals("greedy-residuals")
