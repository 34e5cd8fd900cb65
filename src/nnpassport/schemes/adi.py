"""Adi's scheme: a secret trigger set with random labels that the network has learnt by heart.

[Adi18] Adi, Baum, Cisse, Pinkas, Keshet: Turning Your Weakness Into a Strength: Watermarking Deep
Neural Networks by Backdooring, USENIX Security 2018.
"""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import final

from jaxtyping import Int64
from torch import Tensor, nn

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.evidence.context import Context
from nnpassport.evidence.key import Key
from nnpassport.fidelity import accuracy, plain_evaluation
from nnpassport.outputs import Example, call, logits_of
from nnpassport.scheme import Batch, UnreadableKeyError, UnsuitableModelError, Verdict
from nnpassport.schemes.signature import as_published, read_answers
from nnpassport.schemes.triggers import (
    branch_loss,
    mixing,
    trigger_batch,
    trigger_shape,
    triggers_here,
)
from nnpassport.statistics import LOG10_ALPHA_UNCOMMITTED
from nnpassport.training import (
    Evaluation,
    History,
    Journal,
    Objective,
    Outcome,
    Recipe,
    Task,
    fit,
    share_right,
)


@final
@dataclass(frozen=True, slots=True)
class Adi:
    """A trigger set, mixed into every training step with labels drawn at random.       [Adi18]

    Attributes:
        name: as in keys and on the command line.
        triggers: size of the trigger set.
        triggers_per_step: trigger images that each training step mixes into its batch.
        threshold: share of the triggers that must match by the published rule, which accepts "all
            but ε·|T|" of them and leaves ε open; here it is 0.1.
    """

    name: str
    triggers: int = 100
    triggers_per_step: int = 2
    threshold: float = 0.9

    @property
    def reads_weights(self) -> bool:
        """Not: a mark of answers is read from answers."""
        return False

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
        """A key for a network of this shape, trigger images and labels derived from one seed.

        Raises:
            UnsuitableModelError: layers or a text were given; there are neither.
        """
        if layers or text:
            raise UnsuitableModelError(
                f"{self.name} has neither layers nor a text signature, and "
                f"{'layers' if layers else 'a text'} were given; leave them out"
            )
        context = Context(
            scheme=self.name,
            owner=owner,
            layers=(),
            triggers=trigger_shape(self.triggers, model, example),
            nonce=os.urandom(16) if seed is None else bytes(16),
        )
        return Key(seed=os.urandom(32) if seed is None else seed, context=context)

    def insert(self, model: nn.Module, key: Key, example: Example) -> None:
        """Check that `key` fits `model`; nothing is inserted.

        Raises:
            UnsuitableModelError: the key is another scheme's, or was made for another network.
        """
        shape = key.context.triggers
        if key.context.scheme != self.name or shape is None:
            raise UnsuitableModelError(
                f"the key is for {key.context.scheme}, and this is {self.name}; "
                "draw a key with this scheme's draw_key, or use the key's own scheme"
            )
        found = trigger_shape(shape.count, model, example)
        if found != shape:
            raise UnsuitableModelError(
                f"the network maps {found.size} to {found.classes} classes and the key was made "
                f"for {shape.size} and {shape.classes}; draw a key for this network"
            )

    def objective(
        self,
        key: Key,
        *,
        steps: int,
        normalise: Normalisation | None = None,
        task: Task | None = None,
    ) -> Objective:
        """Cross-entropy of images and triggers together."""
        mix = mixing(trigger_batch(key, normalise), self.triggers_per_step)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            batch = mix(batch)
            output = call(model, batch.images)
            count = self.triggers_per_step
            loss, _ = branch_loss(output, batch.labels, count, None, task, batch.part)
            images = len(batch.labels) - triggers_here(count, batch.part)
            triggers_right = share_right(logits_of(output)[images:], batch.labels[images:])
            measures = {"trigger_accuracy": triggers_right}
            if task is None:
                right = share_right(logits_of(output)[:images], batch.labels[:images])
                measures = {"accuracy": right, **measures}
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
        """E: train `model` in place with the trigger set mixed in."""
        data.require_classes(2)
        example = normalise(data.sample(2, seed=0).images).to(next(model.parameters()))
        self.insert(model, key, example)
        return fit(
            model,
            self.objective(key, steps=1, normalise=normalise),
            data,
            recipe,
            normalise=normalise,
            evaluate=None if validation is None else self.evaluation(validation, normalise),
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
        """Answers cannot be read off a file of weights, so this always raises.

        Raises:
            UnsuitableModelError: always; `verify_answers` is what works.
        """
        raise UnsuitableModelError(
            f"{self.name} marks a network's answers and not its weights; "
            "ask the network for its answers to the triggers and use verify_answers"
        )

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """None: V reads no weights."""
        return {}

    def verify_answers(
        self,
        answers: Int64[Tensor, " triggers"],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V: derived labels are uniform over K classes, so chance matches exactly 1/K of them."""
        return read_answers(answers, key, log10_alpha=log10_alpha)

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The paper's rule: all but a share of the triggers are answered as marked."""
        return as_published(verdict, threshold=self.threshold)

    def released(self, model: nn.Module) -> nn.Module:
        """A copy: the mark is in the weights, and nothing else is there."""
        return deepcopy(model)


def with_published_triggers(key: Key, triggers: ImageSet) -> Key:
    """The key with pictures and labels that somebody published in place of derived ones.

    Such a key has no p-value: who may choose pictures can choose ones the network answers right.

    Raises:
        UnreadableKeyError: the key has no trigger set, or its pictures have another size.
    """
    shape = key.context.triggers
    if shape is None or tuple(triggers.images.shape[1:]) != shape.size:
        raise UnreadableKeyError(
            f"the triggers are pictures of {tuple(triggers.images.shape[1:])}, and the key of "
            f"{key.context.scheme} has {'none' if shape is None else shape.size}; needed: a key "
            "with triggers of that size"
        )
    context = replace(key.context, triggers=shape._replace(count=len(triggers)))
    return replace(
        key,
        context=context,
        trigger_images=triggers.images,
        trigger_labels=triggers.labels,
    )


ADI = Adi("adi")
