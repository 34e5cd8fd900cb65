"""A mark in ordinary answers, that copies trained on them carry too.

A key has functions of an input, each with a class and a sign (`keys/answers.py`). What is trained
is z(x) − ε·g(x), so that the network that is released, z, answers with ε·g on top of what the task
asks for: a passport in function space. With the key presented, g is subtracted again, and F is the
accuracy of that. V shows ordinary inputs, nothing secret, and reads how the answers to them lean.

Whoever trains another network on these answers trains it on the leaning as well.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import Images, ImageSet, Normalisation
from nnpassport.embedding.network.outputs import Example, call, logits_of, tensors_in, with_tensors
from nnpassport.embedding.network.tensors import as_array, tensors_digest
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark
from nnpassport.embedding.schemes.pictures import shuffled
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
    CLIPPED,
    Functions,
    baseline_from,
    coins_of,
    filter_sides,
    form_of,
    functions_of,
    inputs_of,
    layout_waves,
    pairs_of,
    read_answers,
    shares,
)
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import AnswersForm, TriggerShape
from nnpassport.keys.counts import Counts
from nnpassport.keys.key import Key
from nnpassport.keys.validity import MAX_COINS
from nnpassport.scheme import BadRecipeError, Batch, UnsuitableModelError, Verdict

_SHOWN = 256  # inputs that a network is asked at a time
_A_CLASS = 64  # functions, unless their number is given


@final
@dataclass(frozen=True, slots=True)
class Answers(Mark):
    """z(x) + ε·g(x), g the sum of a key's functions with their signs.

    Attributes:
        name: as in keys and on the command line.
        coins: how many functions there are, over all classes; None is 64 for each, 4,096 at most.
        strength: ε, of a score whose function has unit variance.
        pictures: ordinary inputs that the key is bound to, at most: those that V shows.
        kind: which functions there are to draw from, of pictures; see `keys.answers.KINDS`.
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
        kind = "counts" if shape is not None and shape.size[:2] == (1, 1) else self.kind
        classes = 1 if shape is None else shape.classes
        coins = min(MAX_COINS, _A_CLASS * classes) if self.coins is None else self.coins
        form = AnswersForm(kind, coins, max(1, round(1000 * self.strength)))
        return mark.new_key(self.name, owner=owner, triggers=shape, seed=seed, answers=form)

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
        """The task's loss of z(x) − ε·g(x)."""
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
            objective = self._taught(key, deepcopy(model), normalise)
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
        teacher = teacher.eval().requires_grad_(False)

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

    def fidelity(
        self, model: nn.Module, key: Key, data: ImageSet, normalise: Normalisation
    ) -> float:
        """F: accuracy in [0, 1] of z(x) − ε·g(x): what the owner's key takes off was put on."""
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


def subtracting(key: Key, normalise: Normalisation | None) -> Any:
    """From a network's output and its input, the output less ε·g.

    An output of one column, a regression's, loses half the difference of the two classes' g.

    Raises:
        UnsuitableModelError: the key's functions are of pixels and `normalise` is None.
    """
    form, shape = form_of(key.context)
    if normalise is None and form.kind != "counts":
        raise UnsuitableModelError(
            f"{key.context.scheme} has functions of an image's pixels; pass normalise=, the "
            "normalisation that the network's images get"
        )
    functions = TensorFunctions(functions_of(key))
    table = torch.from_numpy(shares(form, coins_of(key), shape.classes)).float()

    def subtracted(output: Any, images: Any) -> Any:
        scores = logits_of(output)
        inputs = tensors_in(images)[0]
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            g = functions(_pixels(inputs, normalise)) @ table.to(inputs.device)
        if scores.shape[-1] == 1:
            g = (g[:, :1] - g[:, 1:2]) / 2
        return with_tensors(output, lambda each: each - g.to(each) if each is scores else each)

    return subtracted


def _pixels(inputs: Tensor, normalise: Normalisation | None) -> Tensor:
    """What an input was before it was normalised, 0 to 1; tokens and counts as they are."""
    if normalise is None or inputs.dim() != 4:
        return inputs
    mean, std = (
        torch.tensor(each, device=inputs.device)[:, None, None]
        for each in (normalise.mean, normalise.std)
    )
    return inputs.float() * std + mean


@final
class TensorFunctions:
    """`keys.answers.Functions` of tensors, for training: float32, on the device of the inputs."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions
        self._parts: dict[torch.device, tuple[Tensor, ...]] = {}

    def __call__(self, inputs: Tensor) -> Float[Tensor, "batch coins"]:
        """φ of pixels from 0 to 1 (batch channels height width), of counts or of token ids."""
        bank, mean, matrix = self._on(inputs.device)
        found = _features(self._functions, inputs, bank)
        return ((found - mean) @ matrix).clamp(-CLIPPED, CLIPPED)

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._parts:
            _, size, bank, mean, matrix = self._functions
            form = self._functions.form
            if form.kind == "layout":
                bank = layout_waves(size)
            arrays = (bank, mean, matrix)
            made = [torch.from_numpy(each).float().to(device) for each in arrays]
            self._parts[device] = tuple(made)
        return self._parts[device]


def _features(functions: Functions, inputs: Tensor, bank: Tensor) -> Tensor:
    kind, size = functions.form.kind, functions.size
    if kind == "layout":
        return inputs.float().flatten(1) @ bank
    if kind == "counts":
        roots = counts_of(inputs, size[2]).sqrt()
        first, second = pairs_of(size[2])
        return torch.cat([roots @ bank, roots[:, first] * roots[:, second]], dim=1)
    side, stride, places, scales = filter_sides()
    found = []
    for scale, filters in zip(scales, bank, strict=True):
        pixels = inputs.float()
        if scale > 1 and min(pixels.shape[2:]) >= scale:
            pixels = F.avg_pool2d(pixels, scale)
        rows = filters.view(-1, size[0], side, side)
        said = F.conv2d(pixels, rows, stride=stride, padding=side // 2).abs()
        high, wide = (-(-each // places) for each in said.shape[2:])
        for at in range(places):
            for to in range(places):
                part = said[:, :, at * high : (at + 1) * high, to * wide : (to + 1) * wide]
                if part.numel():
                    found.append(part.mean((2, 3)))
    return torch.cat(found, 1)


def counts_of(inputs: Tensor, buckets: int) -> Float[Tensor, "batch buckets"]:
    """How often each bucket is there: of token ids (batch length), or counts as they are, ≤ 255.

    Token t is in bucket t mod `buckets`.
    """
    if inputs.is_floating_point():
        return inputs.flatten(1).clamp(0, 255)
    ids = inputs.flatten(1).long() % buckets
    counts = torch.zeros(len(ids), buckets, device=inputs.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype)).clamp(max=255)


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
