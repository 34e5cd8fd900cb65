"""Removal by copying: a fresh network learns what the victim answers, and its weights are its own.

No mark that is read from weights can survive this. What can is in the answers: a trigger set, if
the copy learns those answers too. The victim is only ever asked; it may as well be a service.

[Hin15] Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, arXiv 1503.02531.
[Tra16] Tramèr, Zhang, Juels, Reiter, Ristenpart: Stealing Machine Learning Models via Prediction
        APIs, USENIX Security 2016.
[Ore19] Orekondy, Schiele, Fritz: Knockoff Nets, CVPR 2019; queries need not be of the same task.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.attacks.removal import train
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.equations import divergence
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.train.loop import Outcome, Recipe
from nnpassport.scheme import BadRecipeError, Batch, UnsuitableModelError

Imitation = Callable[[Tensor, Tensor], Tensor]


def distil_soft(
    teacher: nn.Module,
    student: nn.Module,
    queries: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    temperature: float = 4.0,
) -> Attacked:
    """A trained copy of `student` that imitates the teacher's probabilities.              [Hin15]

        L = T² · KL(softmax(teacher / T) ‖ softmax(student / T)),    T the `temperature`

    Probabilities p are enough for that: softmax(log p / T) is softmax(logits / T). The labels of
    `queries` are not read, and its images may be of anything.

    Raises:
        BadRecipeError: `temperature` is not above 0.
        UnsuitableModelError: teacher and student give outputs of different shapes.
    """
    if not temperature > 0:
        raise BadRecipeError(f"temperature is {temperature}; needed: above 0")

    imitation = partial(divergence, temperature=temperature)
    return _imitate(teacher, student, imitation, queries, recipe, normalise)


def extract_hard(
    teacher: nn.Module,
    student: nn.Module,
    queries: ImageSet,
    recipe: Recipe,
    *,
    normalise: Normalisation,
) -> Attacked:
    """A trained copy of `student` that imitates the teacher's decisions.           [Tra16, Ore19]

    Cross-entropy with the class the teacher answers: all that a service without scores gives away.
    The labels of `queries` are not read, and its images may be of anything.

    Raises:
        UnsuitableModelError: teacher and student give outputs of different shapes.
    """

    def disagreement(logits: Tensor, answers: Tensor) -> Tensor:
        return F.cross_entropy(logits, answers.argmax(1))

    return _imitate(teacher, student, disagreement, queries, recipe, normalise)


def _imitate(
    teacher: nn.Module,
    student: nn.Module,
    loss: Imitation,
    queries: ImageSet,
    recipe: Recipe,
    normalise: Normalisation,
) -> Attacked:
    stop = stopwatch("Q")
    victim, copy = deepcopy(teacher).eval(), deepcopy(student).eval()
    _check_same_answers(victim, copy, normalise(queries.images[:1]))

    def objective(model: nn.Module, batch: Batch) -> Outcome:
        # The same pixels as the student, augmented: each epoch asks about other images.
        with torch.no_grad():
            answers = logits_of(victim.to(batch.images.device)(batch.images))
        logits = logits_of(model(batch.images))
        agreement = (logits.detach().argmax(1) == answers.argmax(1)).float().mean()
        return Outcome(loss(logits, answers), {"agreement": agreement})

    train(copy, copy.parameters(), objective, queries, recipe, normalise=normalise)
    return Attacked(copy, stop(len(queries), recipe.epochs))


@torch.no_grad()
def _check_same_answers(teacher: nn.Module, student: nn.Module, image: Tensor) -> None:
    answers, logits = (
        logits_of(each(image.to(next(each.parameters())))) for each in (teacher, student)
    )
    if answers.shape != logits.shape:
        raise UnsuitableModelError(
            f"the teacher answers one image with {tuple(answers.shape)} and the student with "
            f"{tuple(logits.shape)}; needed: the same number of classes"
        )
