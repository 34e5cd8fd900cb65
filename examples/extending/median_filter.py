"""A scheme in one file: bits of a projected median filter, so that no single filter decides one.

Uchida's scheme reads the mean over a layer's filters. The median is the same idea and hard to move
by changing a few of them; what it costs and withstands, the leaderboard says.
"""

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
from nnpassport.embedding.network.outputs import Example, call, logits_of, unwrapped
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.signature import (
    as_published,
    host_weight,
    judged,
    matching,
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
from nnpassport.scheme import Batch, Verdict


@final
@dataclass(frozen=True, slots=True)
class MedianFilter:
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

    triggers = 0  # V needs the weights, and nothing but the weights
    reads_weights = True
    parts = frozenset({"projection"})  # so that those who forge projections are let loose on it

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
        """Bits and projection, derived from one seed: that is what makes the test exact."""
        host = mean_filter_of(self.name, model, example, layers, self.bits)
        return mark.new_key(self.name, owner=owner, layers=(host,), text=text, seed=seed)

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key as it is: there are no pictures in it."""
        return key

    def insert(self, model: nn.Module, key: Key, example: Example) -> None:
        """Check the key; the network stays as it is."""
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
        """Task loss + strength · cross-entropy of the bits."""
        (layer,) = key.context.layers
        projection, signs = key.layer_projection(layer.name), key.layer_signs(layer.name)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            output = call(model, batch.images)
            weight = unwrapped(model).get_parameter(f"{layer.name}.weight")
            with torch.autocast(weight.device.type, enabled=False):
                read = read_out(filters(weight, layer.geometry), projection.to(weight))
                wanted = (signs.to(weight) + 1) / 2
                bits = F.binary_cross_entropy_with_logits(read, wanted, reduction="sum")
            loss = (task or plain_loss)(output, batch.labels) + self.strength * bits
            measures = {"sign_match": ((read > 0) == (wanted > 0)).float().mean()}
            if task is None:
                measures["accuracy"] = share_right(logits_of(output), batch.labels)
            return Outcome(loss, measures)

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
        """E: train `model` in place with the objective."""
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
        """What to measure while it is trained."""
        return plain_evaluation(data, normalise)

    def fidelity(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> float:
        """F: presenting the key changes nothing, so it is the network's own accuracy."""
        return accuracy(deepcopy(model).eval(), data, normalise)

    def verify(
        self,
        weights: Mapping[str, Tensor],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V: derived bits match an independent network as Binomial(n, ½)."""
        (layer,) = key.context.layers
        weight = host_weight(weights, layer).detach().cpu().double()
        read = read_out(weight, key.layer_projection(layer.name)).sign()
        return judged(
            key,
            "bits of the median filter",
            bits=layer.length,
            matches=matching(read, key.layer_signs(layer.name)),
            chance=0.5,
            log10_alpha=log10_alpha,
        )

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
        """What a filter is multiplied with: by these, turned channels are turned back."""
        return {layer.name: key.layer_projection(layer.name) for layer in key.context.layers}

    def verify_answers(
        self,
        answers: Int64[Tensor, " triggers"],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """Refused: there are no triggers."""
        return read_answers(answers, key, log10_alpha=log10_alpha)

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The rule a paper would state: a share of the bits."""
        return as_published(verdict, threshold=self.threshold)

    def released(self, model: nn.Module) -> nn.Module:
        """A copy: nothing was inserted."""
        return deepcopy(model)


def read_out(
    weight: Float[Tensor, "out fan_in *kernel"], projection: Float[Tensor, "bits columns"]
) -> Float[Tensor, " bits"]:
    """X·m, m the median over the filters."""
    median = weight.flatten(1).median(0).values
    return projection.to(median) @ median


MEDIAN_FILTER = MedianFilter()
