"""A mark in ordinary answers, that copies trained on them carry too.

A key has functions of an input, each with a class and a sign (`keys/answers.py`). What is trained
is z(x) − ε·g(x), so that the network that is released, z, answers with ε·g on top of what the task
asks for: a passport in function space. With the key presented, g is subtracted again, and F is the
accuracy of that. V shows ordinary inputs, nothing secret, and reads how the answers to them lean.

Whoever trains another network on these answers trains it on the leaning as well.
"""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network.outputs import Example, call, logits_of, tensors_in
from nnpassport.embedding.network.tensors import as_array, tensors_digest
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark
from nnpassport.embedding.schemes.functions import leaning_of, subtracting
from nnpassport.embedding.schemes.pictures import shuffled
from nnpassport.embedding.schemes.served import serving
from nnpassport.embedding.schemes.triggered import with_pictures
from nnpassport.embedding.schemes.triggers import taking, trigger_shape
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.labels import mean_loss, plain_loss, share_right
from nnpassport.embedding.train.loop import (
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
from nnpassport.keys.answers import (
    KINDS,
    baseline_from,
    form_of,
    inputs_of,
    read_answers,
)
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import AnswersForm, TriggerShape
from nnpassport.keys.counts import Counts
from nnpassport.keys.key import Key
from nnpassport.keys.validity import MAX_COINS, MAX_DIRECTIONS, MAX_FEATURES
from nnpassport.scheme import BadRecipeError, Batch, UnsuitableModelError, Verdict

_SHOWN = 256  # inputs that a network is asked at a time
_A_CLASS = 64  # functions, unless their number is given
_WAVES_A_CLASS = 16  # the same of waves


@final
@dataclass(frozen=True, slots=True)
class Answers(Mark):
    """z(x) + ε·g(x), g the sum of a key's functions with their signs.

    Attributes:
        name: as in keys and on the command line.
        coins: how many functions there are, over all classes; None is 64 for each, 4,096 at most,
            and 16 waves for each, 512 at most.
        strength: ε, of a score whose function has unit variance; of waves, of a probability.
        pictures: ordinary inputs that the key is bound to, at most: those that V shows.
        kind: which functions there are to draw from, of pictures; see `keys.answers.KINDS`. Waves
            are the scheme `cosine` and are put on probabilities.
        buckets: how many counts a text or another flat input is described by.
        teaching: share of the loss, in [0, 1], that asks a network which was trained already for
            the scores that it had, where the key is presented; the rest is the task's, of the
            network as it is released.
        threshold: share of the functions that must lean as signed for `verify_as_published`, which
            no paper has.
    """

    name: str
    coins: int | None = None
    strength: float = 0.5
    pictures: int = 2_000
    kind: str = "filters"
    buckets: int = 256
    teaching: float = 0.5
    threshold: float = 0.75

    # Nobody is asked for a class that the key has fixed, so they are no trigger set.
    reads_weights = False
    parts = frozenset({"answers"})

    def __post_init__(self) -> None:
        coins = _A_CLASS if self.coins is None else self.coins
        if not (coins >= 1 and self.pictures >= 8 and 0 < self.strength <= 100):
            raise BadRecipeError(
                f"{coins} coins, {self.pictures} pictures and a strength of {self.strength}; "
                "needed: at least 1 and 8 of them, and a strength above 0 and up to 100"
            )
        allowed = {"waves"} if self.name == "cosine" else {*KINDS} - {"waves"}
        if self.kind not in allowed:
            raise BadRecipeError(
                f"functions of kind {self.kind!r:.40}; {self.name} has: "
                f"{', '.join(sorted(allowed))}"
            )

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
        """A key for a network of this shape; `prepared` binds it to inputs and to a baseline.

        Raises:
            UnsuitableModelError: the network gives no scores, or `layers` or a text were given.
        """
        mark.check_nothing_chosen(self.name, layers, text)
        shape = self.carriers(model, example, layers).triggers
        flat = shape is not None and shape.size[:2] == (1, 1)
        if flat and self.kind == "waves":
            raise UnsuitableModelError(
                f"{self.name} has waves of pictures, and the network takes another input; needed: "
                "a network of pictures, or the scheme answers"
            )
        kind = "counts" if flat else self.kind
        coins = self._most_coins(shape) if self.coins is None else self.coins
        form = AnswersForm(kind, coins, max(1, round(1000 * self.strength)))
        return mark.new_key(self.name, owner=owner, triggers=shape, seed=seed, answers=form)

    def _most_coins(self, shape: TriggerShape | None) -> int:
        if shape is None:
            return _A_CLASS
        if self.kind == "waves":
            most = min(MAX_FEATURES, MAX_DIRECTIONS // math.prod(shape.size))
            return min(most, _WAVES_A_CLASS * shape.classes)
        return min(MAX_COINS, _A_CLASS * shape.classes)

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """Inputs, and no layers."""
        inputs = tensors_in(example)
        if len(inputs) == 1 and inputs[0].dim() == 4:
            return Carriers(triggers=trigger_shape(self.pictures, model, example))
        with torch.no_grad():
            outputs = logits_of(call(model, example)).shape[-1]
        flat = inputs[0] if inputs else torch.zeros(0)
        buckets = flat.shape[-1] if flat.is_floating_point() else self.buckets
        return Carriers(triggers=TriggerShape(self.pictures, max(2, outputs), (1, 1, buckets)))

    def prepared(self, key: Key, model: nn.Module, data: ImageSet, normalise: Normalisation) -> Key:
        """The key bound to some of the images, by its secret, and to what `model` says of them.

        `model` is the network before the mark: its digest becomes the key's anchor.

        Raises:
            UnreadableKeyError: they have another size than the key's pictures.
        """
        if key.trigger_images is not None:
            return key
        _, shape = form_of(key.context)
        pictures = data.images.cpu()[shuffled(key, data)[: shape.count]]
        network = deepcopy(model).eval()
        scores = scores_of(network, pictures, normalise)
        return bound_to(key, pictures, scores, tensors_digest(model.state_dict()))

    def check(self, model: nn.Module, key: Key, example: Example) -> None:
        """Refuse a key for another network, or one that is bound to no inputs yet."""
        inputs_of(key)
        _, shape = form_of(key.context)
        found = self.carriers(model, example, None).triggers
        if found is None or (found.classes, found.size) != (shape.classes, shape.size):
            raise UnsuitableModelError(
                f"the key of {self.name} was made for {shape.size} and {shape.classes} classes, "
                f"and the network maps {None if found is None else found[1:]}; draw a key for it"
            )

    def objective(
        self,
        key: Key,
        *,
        steps: int,
        normalise: Normalisation | None = None,
        task: Task | None = None,
    ) -> Objective:
        """The task's loss of z(x) − ε·g(x); of waves, cross-entropy with what would be served.

        Raises:
            UnsuitableModelError: waves are asked for with another task's loss.
        """
        if self.kind == "waves":
            return self._serving(key, normalise, task)
        subtracted = subtracting(key, normalise)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            output = call(model, batch.images)
            presented = subtracted(output, batch.images)
            loss = mean_loss((task or plain_loss)(presented, batch.labels))
            if task is not None:
                return Outcome(loss, {"task_loss": loss.detach()})
            shown = {"accuracy": output, "with_key": presented}
            rates = {n: share_right(logits_of(each), batch.labels) for n, each in shown.items()}
            return Outcome(loss, rates)

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
        """E: train `model` in place; one that is `trained` also keeps to the scores that it had."""
        data.require_classes(2)
        example = normalise(data.sample(2, seed=0).images).to(next(model.parameters()))
        self.insert(model, key, example)
        objective = self.objective(key, steps=total_steps(data, recipe), normalise=normalise)
        if trained and self.teaching > 0:
            teacher = deepcopy(model).eval().requires_grad_(False)
            taught = self._waves_taught if self.kind == "waves" else self._taught
            objective = taught(key, teacher, normalise)
        return fit(
            model,
            objective,
            data,
            recipe,
            normalise=normalise,
            evaluate=None if validation is None else self.evaluation(validation, normalise),
            journal=journal,
        )

    def _taught(self, key: Key, teacher: nn.Module, normalise: Normalisation) -> Objective:
        """(1 − t)·L_c(z) + t·mean (z − ε·g − z₀)², scores less their mean; z₀ is the teacher's.

        The task's loss is of z, which is what is released: so the network finds a way of leaning
        that costs its own answers least.
        """
        subtracted = subtracting(key, normalise)

        def objective(model: nn.Module, batch: Batch) -> Outcome:
            teacher.to(tensors_in(batch.images)[0].device)
            with torch.no_grad():
                before = logits_of(call(teacher, batch.images))
            output = call(model, batch.images)
            presented = logits_of(subtracted(output, batch.images))
            moved = presented.float() - before.float()
            kept = (moved - moved.mean(1, keepdim=True)).square().mean()
            loss = (1 - self.teaching) * mean_loss(plain_loss(output, batch.labels))
            shown = {"accuracy": logits_of(output), "with_key": presented}
            rates = {name: share_right(each, batch.labels) for name, each in shown.items()}
            return Outcome(loss + self.teaching * kept, rates)

        return objective

    def _serving(self, key: Key, normalise: Normalisation | None, task: Task | None) -> Objective:
        if task is not None:
            raise UnsuitableModelError(
                f"{self.name} puts waves on the probabilities of classes, and task= gives another "
                "loss; leave it out, or use the scheme answers"
            )
        form, _ = form_of(key.context)
        waves = leaning_of(key, normalise), subtracting(key, normalise)
        return serving(*waves, form.strength / 1000)

    def _waves_taught(self, key: Key, teacher: nn.Module, normalise: Normalisation) -> Objective:
        """The same, where q is (1 − t)·label + t·softmax(z₀)."""
        form, _ = form_of(key.context)
        waves = leaning_of(key, normalise), subtracting(key, normalise)
        return serving(*waves, form.strength / 1000, (self.teaching, teacher))

    def fidelity(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> float:
        """F: accuracy in [0, 1] with the key's functions taken off, which it had put on."""
        return accuracy(_Presented(deepcopy(model).eval(), key, normalise), data, normalise)

    def verify_network(
        self,
        model: nn.Module,
        key: Key,
        normalise: Normalisation,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """V by the network's scores of the inputs that the key is bound to.

        Raises:
            UnsuitableModelError: the network does not take them, or has other classes.
            UnreadableKeyError: the key has no inputs yet, or is another scheme's.
        """
        mark.check_scheme(self.name, key)
        scores = scores_of_key(model, key, normalise)
        return read_answers(scores, key, log10_alpha=log10_alpha)

    def verify_answers(
        self,
        answers: Int64[Tensor, " triggers"],
        key: Key,
        *,
        log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
    ) -> Verdict:
        """Refused: this takes answers to triggers. `keys.answers.read_answers` takes these."""
        mark.check_scheme(self.name, key)
        raise UnsuitableModelError(
            f"a key of {self.name} has ordinary inputs and no trigger set; give the network itself "
            "and use verify_network, or its answers and use nnpassport.keys.answers.read_answers"
        )

    def read(self, weights: Any, key: Key) -> Counts:
        """Refused: the mark is in no weight alone."""
        raise UnsuitableModelError(
            f"{self.name} marks a network's answers and not its weights; give the network itself "
            "and use verify_network"
        )


def bound_to(key: Key, inputs: Tensor | Array, scores: Tensor | Array, anchor: str | None) -> Key:
    """The key bound to inputs (count *size) uint8 and to what its baseline says of them.

    `scores` are (count classes), logits or probabilities; `anchor` is the baseline's digest.

    Raises:
        UnreadableKeyError: they have another shape than the key's inputs.
    """
    pictures = torch.as_tensor(inputs)
    context = replace(key.context, anchor=anchor)
    bound = with_pictures(replace(key, context=context), pictures)
    return replace(bound, baseline=baseline_from(as_array(torch.as_tensor(scores))))


def scores_of(
    model: nn.Module, pictures: Tensor, normalise: Normalisation
) -> Float[Tensor, "pictures classes"]:
    """What a network, as it stands, says of pictures (count channels height width) uint8."""
    like = next(iter(model.parameters()), torch.zeros(0))
    said = []
    with torch.no_grad():
        for part in pictures.split(_SHOWN):
            shown = normalise(part.to(like.device)).to(like.dtype)
            said.append(logits_of(model(shown)).float().cpu())
    return torch.cat(said)


def scores_of_key(
    model: nn.Module, key: Key, normalise: Normalisation
) -> Float[Tensor, "pictures classes"]:
    """What a network says of the inputs that the key is bound to.

    Raises:
        UnsuitableModelError: it does not take them, or has another number of classes.
    """
    _, shape = form_of(key.context)
    pictures, _ = inputs_of(key)
    with taking(key):
        said = scores_of(model, torch.from_numpy(pictures), normalise)
    if said.shape[1:] != (shape.classes,):
        raise UnsuitableModelError(
            f"the network answers with {tuple(said.shape[1:])} and the key was made for "
            f"{shape.classes} classes; needed: a network of the same task"
        )
    return said


class _Presented(nn.Module):
    """A network with the key's function subtracted from its scores."""

    def __init__(self, model: nn.Module, key: Key, normalise: Normalisation) -> None:
        super().__init__()
        self.model = model
        self._subtracted = subtracting(key, normalise)

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self._subtracted(self.model(images), images))


ANSWERS = Answers("answers")
"""64 functions of each class; those that are met decide, each by how far."""
