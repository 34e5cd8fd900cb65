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
from copy import deepcopy
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network.equations import filters
from nnpassport.embedding.network.layers import whole_weight
from nnpassport.embedding.network.outputs import Example, call, logits_of, unwrapped
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.signature import (
    as_published,
    host_weight,
    read_answers,
)
from nnpassport.embedding.schemes.triggers import plain_loss
from nnpassport.embedding.schemes.uchida import mean_filter_of
from nnpassport.embedding.train.fidelity import accuracy, plain_evaluation
from nnpassport.embedding.train.loop import (
    Evaluation,
    History,
    Journal,
    Objective,
    Outcome,
    Recipe,
    Task,
    share_right,
)
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.key import Key
from nnpassport.keys.reading import COLUMNS, DROPPED, read_residuals, verdict_on
from nnpassport.keys.validity import LEAST_ROW
from nnpassport.scheme import Batch, UnsuitableModelError, Verdict


@final
@dataclass(frozen=True, slots=True)
class GreedyResiduals:
    """Bits b_j = [mean of row j without its smallest numbers > 0] of one layer's weight.  [Liu21]

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

    @property
    def triggers(self) -> int:
        """None: there is no black-box verification."""
        return 0

    @property
    def reads_weights(self) -> bool:
        """Whether V needs nothing but the weights."""
        return True

    @property
    def parts(self) -> frozenset[str]:
        """None that could be forged: whoever chooses the bits needs nothing else."""
        return frozenset()

    def draw_key(
        self,
        model: nn.Module,
        example: Example,
        *,
        owner: str = "unnamed",
        layers: Sequence[str] | None = None,
        text: str | None = None,
        seed: bytes | None = None,
    ) -> Key:
        """A key for a network of this shape; `layers` names one, by default the last convolution.

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
        return mark.new_key(self.name, owner=owner, layers=(shape,), text=text, seed=seed)

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key as it is: it takes nothing of a network or of images."""
        return key

    def insert(self, model: nn.Module, key: Key, example: Example) -> None:
        """Check that `key` fits `model`; nothing is inserted.

        Raises:
            UnsuitableModelError: the key is another scheme's, or was made for another network.
        """
        mark.check_scheme(self.name, key)
        for layer in key.context.layers:
            host_weight(dict(model.named_parameters()), layer)

    def objective(
        self,
        key: Key,
        *,
        steps: int,
        normalise: Normalisation | None = None,
        task: Task | None = None,
    ) -> Objective:
        """Task loss + λ·Σ_j max(margin − b_j·r_j, 0), r_j row j's mean over the weight's size."""
        (layer,) = key.context.layers
        signs = key.layer_signs(layer.name)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            nonlocal signs
            output = call(model, batch.images)
            task_loss = (task or plain_loss)(output, batch.labels)
            host = unwrapped(model).get_parameter(f"{layer.name}.weight")
            weight = filters(whole_weight(host), layer.geometry)
            # Full precision even under autocast, as for passports.
            with torch.autocast(weight.device.type, enabled=False):
                signs = signs.to(weight)
                size = weight.detach().square().mean().sqrt()
                read = residuals(weight, layer.length) / size
                hinges = F.relu(self.margin - signs * read).sum()
            measures = {"sign_match": (read.detach().sign() == signs).float().mean()}
            if task is None:
                measures["accuracy"] = share_right(logits_of(output), batch.labels)
            else:
                measures["task_loss"] = task_loss.detach()
            return Outcome(task_loss + self.strength * hinges, measures)

        return objective

    def embed(
        self,
        model: nn.Module,
        key: Key,
        data: Images,
        recipe: Recipe,
        *,
        normalise: Normalisation,
        validation: Images | None = None,
        journal: Journal | None = None,
        trained: bool = False,
    ) -> History:
        """E: train `model` in place with the hinges."""
        return mark.train_in(
            self,
            model,
            key,
            data,
            recipe,
            normalise=normalise,
            validation=validation,
            journal=journal,
        )

    def evaluation(self, data: Images, normalise: Normalisation) -> Evaluation:
        """Accuracy, which is the score too."""
        return plain_evaluation(data, normalise)

    def fidelity(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> float:
        """F: accuracy in [0, 1]. No mark of this kind can fail it: presenting it changes nothing.

        That is what makes it forgeable.                                   [Fan19, prop. 1]
        """
        return accuracy(deepcopy(model).eval(), data, normalise)

    def verify(
        self,
        weights: Mapping[str, Tensor],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V in white box. Derived bits match an independent network as Binomial(n, ½): exact.

        Raises:
            UnsuitableModelError: the host layer is missing or has another shape.
        """
        mark.check_scheme(self.name, key)
        counts = read_residuals(ArraysOf(weights), key)
        return verdict_on(counts, key, log10_alpha=log10_alpha)

    def verify_network(
        self,
        model: nn.Module,
        key: Key,
        normalise: Normalisation,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V of a network that can be run: by its weights all the same."""
        return mark.read_weights(self, model, key, log10_alpha)

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

    def verify_answers(
        self,
        answers: Int64[Tensor, " triggers"],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """There are no triggers, so this always raises.

        Raises:
            UnsuitableModelError: always.
        """
        return read_answers(answers, key, log10_alpha=log10_alpha)

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The paper's rule: the bits are read back, by default all of them."""
        return as_published(verdict, threshold=self.threshold)

    def released(self, model: nn.Module) -> nn.Module:
        """A copy: the mark is in the weights, and nothing else is there."""
        return deepcopy(model)


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
