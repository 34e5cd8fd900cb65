"""The scheme engine: all that a scheme does beside what makes it that scheme.

`Mark` has every member of `protocol.Scheme`. A scheme is a frozen dataclass of what differs:

    carriers        which layers and pictures a key is drawn for
    signals, term   what the network says of the bits, and what a training step adds for them
    read            what V counts in a file of weights, in numpy
    threshold       the share of the bits that the paper's own rule asks for

A mark that changes what a step runs has `steps_of` too, as passports have. One whose loss is no
such sum has an `objective` of its own; one that weights do not show has `observe` or triggers. The
dataclasses inherit because their fields are the settings, and one object has to be both. No other
class is inherited from, and none of them is inherited again.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network.equations import filters
from nnpassport.embedding.network.inserted import Inserted
from nnpassport.embedding.network.layers import whole_weight
from nnpassport.embedding.network.outputs import Example, call, tensors_in, unwrapped
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.signature import read_answers
from nnpassport.embedding.schemes.teaching import taught
from nnpassport.embedding.schemes.triggers import answers_to, branch_loss, mixing, trigger_batch
from nnpassport.embedding.train.fidelity import accuracy, plain_evaluation
from nnpassport.embedding.train.labels import share_right_with
from nnpassport.embedding.train.loop import (
    Evaluation,
    History,
    Journal,
    Objective,
    Outcome,
    Recipe,
    Task,
    fit,
    total_steps,
)
from nnpassport.files.arrays import Array
from nnpassport.ground.progress import Listener
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import LayerShape, TriggerShape
from nnpassport.keys.counts import Counts, as_published, verdict_on
from nnpassport.keys.key import Key
from nnpassport.keys.reading import check_host
from nnpassport.scheme import Batch, Part, UnsuitableModelError, Verdict


class Carriers(NamedTuple):
    """What a key is drawn for: the layers whose bits it has, and the shape of its pictures.

    `nonce` binds the key to something else; None lets the operating system draw it. `metrics` are
    the directions that passports of channels lie in, by layer, and `anchor` is the digest of the
    network that the key is drawn for. `network` is what a scheme's own `key_for` takes of it.
    """

    layers: tuple[LayerShape, ...] = ()
    triggers: TriggerShape | None = None
    nonce: bytes | None = None
    metrics: Mapping[str, Any] | None = None
    anchor: str | None = None
    network: Any = None


class Secret(NamedTuple):
    """What a training step needs of one layer's key: `forms`, if there are any, and the bits."""

    layer: LayerShape
    rows: Tensor
    signs: Float[Tensor, " bits"]

    def to(self, like: Tensor) -> "Secret":
        """Where `like` is, in its precision."""
        return self._replace(rows=self.rows.to(like), signs=self.signs.to(like))


class Step(NamedTuple):
    """What a training step ran.

    Attributes:
        branches: outputs and their labels, of each network that was run.
        signals: numbers whose signs are the bits of all layers, with gradients; None without bits.
        signs: what these should be; 0 where there is no bit.
        more: what the step adds to the loss beside its `term`.
    """

    branches: Sequence[tuple[Any, Any]]
    signals: Float[Tensor, " bits"] | None = None
    signs: Float[Tensor, " bits"] | None = None
    more: Float[Tensor, ""] | None = None


USUAL = 2
"""Trigger images in each step, as in the paper's code."""
TAUGHT = 25
"""How often a trigger has to be shown to be learnt: with half as often two of three are not."""
BRANCHES = ("", "private_")
"""What is put before the names of a branch's measures."""


class Mark(Protocol):
    """All of a scheme but what makes it that one; `protocol.Scheme` says what members mean.

    Attributes:
        name: as in keys and on the command line.
        threshold: share of the bits that must match by the published rule.
        triggers: size of the trigger set; 0 is none.
        triggers_per_step: trigger images that each training step mixes into its batch. None is
            `USUAL`, or in a short training as many as show each trigger `TAUGHT` times, but no more
            than half as many as there are images.
        trigger_weight: λ_t of equation 1. None weighs a trigger like any other image of the step.
        teaching: for a trained network, the share in [0, 1] of the task's loss that imitates what
            the network answered before.
        reads_weights: whether V needs nothing but the weights.
    """

    __slots__ = ()

    name: str
    threshold: float = 1.0
    triggers: int = 0
    triggers_per_step: int | None = None
    trigger_weight: float | None = None
    teaching: float = 0.0
    reads_weights: bool = True

    # What differs

    @property
    def parts(self) -> frozenset[str]:
        """What of the mark forgers can aim at; here: nothing."""
        return frozenset()

    @abstractmethod
    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """What a key for this network is drawn for; `layers` are the caller's choice.

        Raises:
            UnsuitableModelError: the network, or a layer chosen, cannot carry the mark.
        """

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key as it is: it takes nothing of a network or of images."""
        return key

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Refuse a key of this scheme that was made for another network: by its layers' shapes.

        Raises:
            UnsuitableModelError: it was.
        """
        weights = dict(model.named_parameters())
        for layer in key.context.layers:
            check_host(weights, layer)

    def hosts(self, model: nn.Module, layers: Sequence[LayerShape]) -> list[Any]:
        """What `signals` is given of each layer, with gradients: its filters (out fan_in *kernel).

        A tensor, or a tuple with one.
        """
        weights = [whole_weight(model.get_parameter(f"{each.name}.weight")) for each in layers]
        return [filters(w, each.geometry) for w, each in zip(weights, layers, strict=True)]

    def signals(self, host: Any, secret: Secret, /) -> Float[Tensor, " bits"]:
        """Numbers whose signs are the bits of one layer; gradients flow to `host`."""
        raise TypeError(f"{self.name} has no signals; needed: them, or an objective of its own")

    def put_in(self, model: nn.Module, key: Key, example: Example) -> Inserted:
        """Change `model`, in place, into what training runs, or leave it as it was; here: nothing.

        Raises:
            UnsuitableModelError: it cannot be; it is as it was.
        """
        return Inserted(model)

    def begin(
        self, model: nn.Module, shown: Callable[[int], Tensor], *, trained: bool, show: Listener
    ) -> None:
        """What is done once, in place, between `insert` and the first step; here: nothing.

        `shown` gives some of the images that it is trained on, as the network sees them.
        """
        return

    def training_of(self, key: Key, steps: int, batch: int) -> "Mark":
        """The scheme as a network with this key is trained, in so many steps of so many images.

        Raises:
            BadRecipeError: its settings do not go with the key.
        """
        shape = key.context.triggers
        if not self.triggers or self.triggers_per_step is not None or shape is None or not steps:
            return self
        often = max(USUAL, min(-(-TAUGHT * shape.count // steps), batch // 2))
        return replace(self, triggers_per_step=often)  # type: ignore[type-var]  # all are dataclasses

    @property
    def shown_at_once(self) -> int:
        """Trigger images in each step."""
        if not self.triggers:
            return 0
        return USUAL if self.triggers_per_step is None else self.triggers_per_step

    def end(self, model: nn.Module, shown: Callable[[int], Tensor]) -> None:
        """What is done once, in place, after the last step of a training; here: nothing.

        `shown` is as in `begin`.
        """
        return

    def rest(self, model: nn.Module) -> None:
        """Leave a network that was trained computing what it is used for; here: it does."""
        return

    def presented(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> nn.Module:
        """A copy of a plain network, in evaluation mode, with `key` presented to it."""
        return deepcopy(model).eval()

    def steps_of(
        self, key: Key, steps: int, normalise: Normalisation | None
    ) -> Callable[[nn.Module, Batch], Step]:
        """What each of a run's `steps` runs, and what it says of the bits; here: the network."""
        layers, rows = key.context.layers, self.forms(key)
        secrets = [Secret(each, rows[each.name], self.wanted(key, each)) for each in layers]

        def run(model: nn.Module, batch: Batch) -> Step:
            output = call(model, batch.images)
            hosts = self.hosts(unwrapped(model), layers)
            pairs = list(zip(hosts, secrets, strict=True))
            # Brought to where the weights are in the first step.
            secrets[:] = [secret.to(tensors_in(host)[0]) for host, secret in pairs]
            signs = torch.cat([secret.signs for secret in secrets])
            with torch.autocast(signs.device.type, enabled=False):
                each = [self.signals(h, secret) for h, secret in zip(hosts, secrets, strict=True)]
            return Step(((output, batch.labels),), torch.cat(each), signs)

        return run

    def rates(
        self, output: Any, labels: Any, part: Part, *, classes: bool
    ) -> Mapping[str, Float[Tensor, "2"]]:
        """How often a branch is right: here of images and triggers, if the task is `classes`."""
        count = self.shown_at_once
        return {"accuracy": share_right_with(output, labels, count)} if classes else {}

    def wanted(self, key: Key, layer: LayerShape) -> Float[Tensor, " bits"]:
        """Signs that a training step pulls the signals to: the key's own."""
        return key.layer_signs(layer.name)

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """What a training step adds to the task's loss, on the bits of all layers."""
        raise TypeError(f"{self.name} has no term; needed: one, or an objective of its own")

    def read(self, weights: Mapping[str, Array], key: Key) -> Counts:
        """What V counts in weights. Other marks are not read from them.

        Raises:
            UnsuitableModelError: it is another mark, or a layer is missing or of another shape.
        """
        what, instead = "activations", "verify_network"
        if self.triggers:
            what, instead = "answers", "verify_answers"
        raise UnsuitableModelError(
            f"{self.name} marks a network's {what} and not its weights; "
            f"give the network itself and its images, and use {instead}"
        )

    def observe(self, model: nn.Module, key: Key, normalise: Normalisation) -> Counts:
        """What V counts of a network that can be run, unless by its answers: its weights' bits."""
        return self.read(ArraysOf(model.state_dict()), key)

    def forms(self, key: Key) -> Mapping[str, Tensor]:
        """By layer, what V multiplies a flattened filter with: a projection's rows."""
        if not self.reads_weights:
            return {}
        return {layer.name: key.layer_projection(layer.name) for layer in key.context.layers}

    def verify_as_published(self, verdict: Verdict) -> Verdict:
        """The paper's rule: `threshold` of the bits are read back."""
        return as_published(verdict, threshold=self.threshold)

    # What is the same for all of them

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
        run = self.steps_of(key, steps, normalise)
        count = self.shown_at_once
        mix = mixing(trigger_batch(key, normalise), count) if count else None

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            batch = batch if mix is None else mix(batch)
            step = run(model, batch)
            losses, of_triggers = zip(
                *(
                    branch_loss(output, labels, count, self.trigger_weight, task, batch.part)
                    for output, labels in step.branches
                ),
                strict=True,
            )
            loss, measures = torch.stack(losses).sum(), {}
            loss = loss if step.more is None else loss + step.more
            if step.signals is not None and step.signs is not None:
                # Full precision even under autocast: bfloat16 would flip signs of small signals.
                with torch.autocast(step.signs.device.type, enabled=False):
                    loss = loss + self.term(step.signals, step.signs)
                measures = {"sign_match": sign_match(step.signals, step.signs)}
            if count and self.trigger_weight is not None:
                loss = loss + self.trigger_weight * torch.stack(of_triggers).sum()
            for name, (output, labels), each in zip(BRANCHES, step.branches, losses, strict=False):
                if task is not None:
                    measures[f"{name}task_loss"] = each.detach()
                found = self.rates(output, labels, batch.part, classes=task is None)
                measures |= {f"{name}{what}": rate for what, rate in found.items()}
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
            self._refuse_answers(key)
        return read_answers(answers, key, log10_alpha=log10_alpha)

    def released(self, model: nn.Module) -> nn.Module:
        """A copy: the mark is in the weights, and nothing else is there."""
        return deepcopy(model)

    def _refuse_answers(self, key: Key) -> None:
        mark.check_scheme(self.name, key)
        if key.context.triggers is not None:
            raise UnsuitableModelError(
                f"a key of {self.name} has pictures and no labels for them, so it has no trigger "
                "set; give the network itself, whose activations carry the mark, and use "
                "verify_network"
            )


def sign_match(signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]) -> Float[Tensor, ""]:
    """The share of a step's bits that match; nothing waits for the device."""
    carrying = signs != 0
    right = (signals.detach().sign() == signs) & carrying
    return right.float().sum() / carrying.float().sum()
