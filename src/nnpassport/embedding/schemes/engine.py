"""The scheme engine: all that a scheme does beside what makes it that scheme.

`Mark` has every member of `protocol.Scheme`. A scheme is a frozen dataclass of what differs:

    carriers        which layers and pictures a key is drawn for
    signals, term   what the network says of the bits, and what a training step adds for them
    read            what V counts in a file of weights, in numpy
    threshold       the share of the bits that the paper's own rule asks for

A mark that changes what a step runs has `steps_of` too, as passports have. One whose loss is no
such sum has an `objective` of its own; one that weights do not show has `observe` or triggers. All
that may differ stands in `hooks`, what a step runs in `step`, and what it descends in `objective`.
The dataclasses inherit because their fields are the settings, and one object has to be both. No
other class is inherited from, and none of them is inherited again.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Protocol

from jaxtyping import Int64
from torch import Tensor, nn

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network.inserted import Inserted
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.hooks import Carriers, Hooks
from nnpassport.embedding.schemes.objective import Triggers, objective_of
from nnpassport.embedding.schemes.signature import read_answers
from nnpassport.embedding.schemes.step import Secret, Step, sign_match
from nnpassport.embedding.schemes.teaching import taught
from nnpassport.embedding.schemes.triggers import answers_to, mixing, often_enough, trigger_batch
from nnpassport.embedding.train.fidelity import accuracy, plain_evaluation
from nnpassport.embedding.train.loop import (
    Evaluation,
    History,
    Journal,
    Objective,
    Recipe,
    Task,
    fit,
    total_steps,
)
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.counts import verdict_on
from nnpassport.keys.key import Key
from nnpassport.scheme import Verdict

__all__ = ["Carriers", "Mark", "Secret", "Step", "sign_match"]


class Mark(Hooks, Protocol):
    """All of a scheme but what makes it that one, which `Hooks` asks it for."""

    __slots__ = ()

    def draw_key(
        self,
        model: nn.Module,
        example: Example = (),
        *,
        owner: str = "unnamed",
        layers: Sequence[str] | None = None,
        text: str | None = None,
        seed: bytes | None = None,
    ) -> Key:
        """A key for a network of this shape, every secret in it derived from one seed.

        Schemes that do not run the network need no `example`.

        Raises:
            UnsuitableModelError: the network cannot carry the mark, or `layers` or a text were
                given to a scheme that has neither.
        """
        found = self.carriers(model, example, layers)
        if not found.layers:
            mark.check_nothing_chosen(self.name, layers, text)
        return self.key_for(found, owner=owner, text=text, seed=seed)

    def key_for(self, found: Carriers, *, owner: str, text: str | None, seed: bytes | None) -> Key:
        """A new key for what `carriers` found; a mark of another kind makes it here.

        Raises:
            BadSignatureError: `text` does not fit the layers.
        """
        facts = {name: fact for name, fact in found._asdict().items() if name != "network"}
        return mark.new_key(self.name, owner=owner, text=text, seed=seed, **facts)

    def insert(self, model: nn.Module, key: Key, example: Example) -> Inserted:
        """Check that `key` fits `model`, and put in place what a step runs on, if it is more.

        Raises:
            UnsuitableModelError: the key is another scheme's, or was made for another network.
            UnreadableKeyError: it lacks the pictures that its scheme makes or chooses.
        """
        mark.check_scheme(self.name, key)
        self.check(model, key, example)
        return self.put_in(model, key, example)

    def objective(
        self,
        key: Key,
        *,
        steps: int,
        normalise: Normalisation | None = None,
        task: Task | None = None,
    ) -> Objective:
        """L = Σ L_c + λ_t·Σ L_t + term, the sums over branches.              [Fan19, eq. 1]

        L_c is a branch's loss of the task, L_t that of its triggers, `term` is of the signals.
        `steps` is the length of the whole run. `normalise` is needed by triggers, which are kept as
        pixels. `task` is a loss of the caller's own, instead of cross-entropy on the class scores.
        """
        count = self.shown_at_once
        mix = mixing(trigger_batch(key, normalise), count) if count else None
        return objective_of(
            self.steps_of(key, steps, normalise),
            term=self.term,
            rates=partial(self.rates, classes=task is None),
            triggers=Triggers(count, self.trigger_weight, mix),
            task=task,
        )

    def training_of(self, key: Key, steps: int, batch: int) -> "Mark":
        """The scheme as a network with this key is trained, in so many steps of so many images.

        Raises:
            BadRecipeError: its settings do not go with the key.
        """
        shape = key.context.triggers
        if not self.triggers or self.triggers_per_step is not None or shape is None or not steps:
            return self
        often = often_enough(shape.count, steps, batch)
        return replace(self, triggers_per_step=often)  # type: ignore[type-var]  # all are dataclasses

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
        """E: train `model` in place with the objective, whether it is `trained` already or not.

        A network that is, and a scheme with `teaching`: its own answers before are part of the
        loss.

        Raises:
            UnsuitableModelError: the scheme refuses key or network; the network is as it was.
        """
        data.require_classes(2)  # before anything is touched
        steps = total_steps(data, recipe)
        scheme = self.training_of(key, steps, recipe.batch)
        example = normalise(data.sample(2, seed=0).images).to(next(model.parameters()))
        teacher = deepcopy(model) if trained and self.teaching else None
        self.insert(model, key, example)
        objective = scheme.objective(key, steps=steps, normalise=normalise)

        def shown(count: int) -> Tensor:
            return normalise(data.sample(count, seed=recipe.seed).images).to(example)

        self.begin(model, shown, trained=trained, show=(journal or Journal()).prepare)
        if teacher is not None:
            make = partial(scheme.objective, key, steps=steps, normalise=normalise)
            objective = taught(lambda task: make(task=task), teacher, self.teaching)
        history = fit(
            model,
            objective,
            data,
            recipe,
            normalise=normalise,
            evaluate=None if validation is None else scheme.evaluation(validation, normalise),
            journal=journal,
        )
        if recipe.epochs:
            scheme.end(model, shown)
        self.rest(model)
        return history

    def evaluation(self, data: Images, normalise: Normalisation) -> Evaluation:
        """Accuracy, which is the score too."""
        return plain_evaluation(data, normalise)

    def fidelity(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> float:
        """F: accuracy in [0, 1] of a plain network when `key` is presented to it.

        Where presenting it changes nothing, no key can fail it: that is what makes such a mark
        forgeable.                                                            [Fan19, prop. 1]
        """
        return accuracy(self.presented(model, key, data, normalise), data, normalise)

    def verify(
        self,
        weights: Mapping[str, Tensor],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V in white box: exact, since bits are derived and chance matches each of them alike.

        Raises:
            UnsuitableModelError: a layer is missing or has another shape, the key is another
                scheme's, or the mark is not in the weights.
        """
        mark.check_scheme(self.name, key)
        return verdict_on(self.read(ArraysOf(weights), key), key, log10_alpha=log10_alpha)

    def verify_network(
        self,
        model: nn.Module,
        key: Key,
        normalise: Normalisation,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V of a network that can be run: by its weights, its answers or what `observe` counts.

        Raises:
            UnsuitableModelError: the network is not one that the key was made for.
            UnreadableKeyError: the key has no pictures yet.
        """
        if self.triggers and not self.reads_weights:
            answers = answers_to(key, model, normalise)
            return self.verify_answers(answers, key, log10_alpha=log10_alpha)
        mark.check_scheme(self.name, key)
        return verdict_on(self.observe(model, key, normalise), key, log10_alpha=log10_alpha)

    def verify_answers(
        self,
        answers: Int64[Tensor, " triggers"],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V in black box: derived labels are uniform over K classes, so chance matches 1/K of them.

        Raises:
            UnsuitableModelError: the scheme has no triggers, or the answers are not one for each.
        """
        if not self.triggers:
            mark.check_scheme(self.name, key)
            mark.check_no_pictures(key)
        return read_answers(answers, key, log10_alpha=log10_alpha)

    def released(self, model: nn.Module) -> nn.Module:
        """A copy: the mark is in the weights, and nothing else is there."""
        return deepcopy(model)
