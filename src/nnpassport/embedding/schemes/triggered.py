"""Marks of answers: secret pictures that the network has learnt to answer as its owner decided.

Schemes of this kind differ in the pictures, and in who decides on the labels; the rest is one
dataclass. Adi's, Zhang's and others are rows of it, each in a file of its own.

What is ours in all of them: labels are derived from the owner's seed, and where pictures are the
owner's own also from the digest of these (`Key.bound`), so that the test is exact. The published
rules are bare match rates; `verify_as_published` has them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.outputs import Example, call, logits_of
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark, Step
from nnpassport.embedding.schemes.entanglement import before_scores, soft_nearest_neighbours
from nnpassport.embedding.schemes.triggers import trigger_shape, triggers_here
from nnpassport.embedding.train.labels import parted, share_right
from nnpassport.keys.chance import matches_needed
from nnpassport.keys.counts import as_published
from nnpassport.keys.key import Key
from nnpassport.scheme import Batch, Part, UnreadableKeyError, Verdict

Pictures = Callable[[Key, nn.Module, ImageSet, Normalisation], Key]
"""The key with the pictures of a scheme, made of images and, maybe, in a trained plain network."""


@final
@dataclass(frozen=True, slots=True)
class TriggerSet(Mark):
    """Pictures and labels, mixed into every training step.

    Attributes:
        name: as in keys and on the command line.
        triggers: size of the trigger set.
        triggers_per_step: trigger images that each training step mixes into its batch; see `Mark`.
        threshold: share of the triggers that must match by the published rule.
        pictures: makes the pictures of images; None leaves those that are derived from the seed.
        needed: of how many triggers how many must match by the published rule, in its place.
        level: log₁₀ of the p at which a published rule that is a binomial test, 1/C, accepts.
        entangled: κ, factor on how the last layer's view of triggers lies among that of images.
    """

    name: str
    triggers: int = 100
    triggers_per_step: int | None = None
    threshold: float = 0.9
    pictures: Pictures | None = None
    needed: Callable[[int], int] | None = None
    level: float | None = None
    entangled: float = 0.0

    reads_weights = False
    parts = frozenset({"triggers"})

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """Pictures, and no layers."""
        return Carriers(triggers=trigger_shape(self.triggers, model, example))

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key with its pictures, if it has none yet and they are not derived."""
        if self.pictures is None or key.trigger_images is not None:
            return key
        return self.pictures(key, model, data, normalise)

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Refuse a key of pictures for another network, or one that has none yet."""
        self._check_pictures(key)
        mark.check_triggers(key, model, example)

    def steps_of(
        self, key: Key, steps: int, normalise: Normalisation | None
    ) -> Callable[[nn.Module, Batch], Step]:
        """The network, on images and triggers together, less κ·SNNL where they are entangled."""
        self._check_pictures(key)

        def run(model: nn.Module, batch: Batch) -> Step:
            with before_scores(model) if self.entangled else nullcontext([]) as heard:
                output = call(model, batch.images)
            branches = ((output, batch.labels),)
            if not heard:
                return Step(branches)
            here = triggers_here(self.shown_at_once, batch.part)
            tangle = _entanglement(heard[-1], *parted(batch.labels, here))
            return Step(branches, more=-self.entangled * tangle)

        return run

    def rates(
        self, output: Any, labels: Any, part: Part, *, classes: bool
    ) -> Mapping[str, Float[Tensor, "2"]]:
        """Images and triggers apart."""
        here = triggers_here(self.shown_at_once, part)
        labels, images, marks = parted(labels, here)
        scores = logits_of(output)
        found = {"trigger_accuracy": share_right(scores[images:], marks)}
        return {"accuracy": share_right(scores[:images], labels), **found} if classes else found

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The papers' rule: so many of the triggers are answered as marked.

        A binomial test takes a coin's chance where the verdict does not say what the chance was.
        """
        if self.level is not None:
            chance = 0.5 if verdict.chance is None else verdict.chance
            needed = matches_needed(verdict.bits, self.level, chance)
            return as_published(verdict, threshold=needed / verdict.bits)
        if self.needed is None:
            return as_published(verdict, threshold=self.threshold)
        return as_published(verdict, threshold=self.needed(verdict.bits) / verdict.bits)

    def _check_pictures(self, key: Key) -> None:
        if self.pictures is not None:
            mark.check_has_pictures(key)


def _entanglement(
    received: Tensor, labels: Any, images: int, classes: Int64[Tensor, " triggers"]
) -> Float[Tensor, ""]:
    """SNNL of triggers among images: those of the triggers' classes, where classes are known."""
    points = received.flatten(1)
    marked = torch.arange(len(points), device=points.device) >= images
    kept = marked.clone()
    known = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    kept[:images] = torch.isin(labels, classes.to(labels)) if known else True
    return soft_nearest_neighbours(points[kept], marked[kept])


def with_published_triggers(key: Key, triggers: ImageSet) -> Key:
    """The key with pictures and labels that somebody published in place of derived ones.

    Such a key has no p-value: who may choose pictures *and* labels can choose ones the network
    answers right.

    Raises:
        UnreadableKeyError: the key has no trigger set, or its pictures have another size.
    """
    return replace(with_pictures(key, triggers.images), trigger_labels=triggers.labels)


def with_pictures(key: Key, images: Tensor, choices: Tensor | None = None) -> Key:
    """The key with pictures of the owner's own, to which its labels are bound: see `Key`.

    `images` are uint8 (count channel height width). `choices` are, for each, the classes that its
    label is drawn from: int64 (count choices), distinct; None is all classes.

    Raises:
        UnreadableKeyError: the key has no trigger set, or its pictures have another size.
    """
    shape = key.context.triggers
    if shape is None or tuple(images.shape[1:]) != shape.size:
        raise UnreadableKeyError(
            f"the triggers are pictures of {tuple(images.shape[1:])}, and the key of "
            f"{key.context.scheme} has {'none' if shape is None else shape.size}; needed: a key "
            "with triggers of that size"
        )
    context = replace(key.context, triggers=shape._replace(count=len(images)))
    return replace(key, context=context, trigger_images=images, trigger_choices=choices)
