"""Uchida's scheme: bits read off one layer's mean filter through a secret projection.

[Uch17] Uchida, Nagai, Sakazawa, Satoh: Embedding Watermarks into Deep Neural Networks, ICMR 2017.
[Che19] Chen, Rouhani, Fu, Zhao, Koushanfar: DeepMarks, ICMR 2019; its regulariser is the R of
equation 1 in [Fan19].
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
from nnpassport.embedding.network.layers import whole_weight
from nnpassport.embedding.network.outputs import Example, call, logits_of, unwrapped
from nnpassport.embedding.network.survey import Site, choose, survey
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.signature import (
    as_published,
    host_weight,
    read_answers,
)
from nnpassport.embedding.schemes.triggers import plain_loss
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
from nnpassport.keys.context import LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.reading import read_projection, verdict_on
from nnpassport.scheme import Batch, UnsuitableModelError, Verdict

_WIDENED = 2**22  # numbers of a projection


@final
@dataclass(frozen=True, slots=True)
class Uchida:
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
        """A projection is there to be forged."""
        return frozenset({"projection"})

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
        """A key for a network of this shape, projection and bits derived from one seed.

        `layers` names one layer; by default it is the last convolution (or the last linear layer
        of a network without convolutions) that can hold the bits.

        Raises:
            UnsuitableModelError: not one layer, a grouped one, or one with fewer numbers than bits.
        """
        shape = mean_filter_of(self.name, model, example, layers, self.bits)
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
        """Task loss + λ_r·R, R = Σ_j BCE(σ(X_j·w̄), b_j) or MSE(b − X·w̄)."""
        (layer,) = key.context.layers
        projection = key.layer_projection(layer.name)
        signs = key.layer_signs(layer.name)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            nonlocal projection, signs
            output = call(model, batch.images)
            task_loss = (task or plain_loss)(output, batch.labels)
            host = unwrapped(model).get_parameter(f"{layer.name}.weight")
            weight = filters(whole_weight(host), layer.geometry)
            # Full precision even under autocast, as for passports.
            with torch.autocast(weight.device.type, enabled=False):
                projection, signs = projection.to(weight), signs.to(weight)
                read = read_out(weight, projection)
                regularisation = self._regularisation(read, signs)
            measures = {"sign_match": (read.detach().sign() == signs).float().mean()}
            if task is None:
                measures["accuracy"] = share_right(logits_of(output), batch.labels)
            else:
                measures["task_loss"] = task_loss.detach()
            return Outcome(task_loss + self.strength * regularisation, measures)

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
        """E: train `model` in place with the regulariser."""
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
        """V in white box. Derived bits match an independent network as Binomial(T, ½): exact.

        Raises:
            UnsuitableModelError: the host layer is missing or has another shape.
        """
        mark.check_scheme(self.name, key)
        counts = read_projection(ArraysOf(weights), key)
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
        """By layer, what V multiplies a flattened filter with: the rows of X."""
        return {layer.name: key.layer_projection(layer.name) for layer in key.context.layers}

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
        """The paper's rule: `threshold` of the bits (by default all) are read back."""
        return as_published(verdict, threshold=self.threshold)

    def released(self, model: nn.Module) -> nn.Module:
        """A copy: the mark is in the weights, and nothing else is there."""
        return deepcopy(model)

    def _regularisation(self, read: Tensor, signs: Tensor) -> Tensor:
        if self.squared:
            return F.mse_loss(read, signs)
        return F.binary_cross_entropy_with_logits(read, (signs + 1) / 2, reduction="sum")


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


def _fan_in(site: Site) -> int:
    return filters(site.layer.get_parameter("weight"), site.geometry)[0].numel()


UCHIDA = Uchida("uchida", squared=False)
UCHIDA_MSE = Uchida("uchida-mse", squared=True, strength=1.0)
