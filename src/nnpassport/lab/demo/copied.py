"""A chapter of the demo: somebody trains a network on answers alone, and is asked digits."""

from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import ImageSet, Normalisation, read_images
from nnpassport.embedding.schemes.answers import ANSWERS, scores_of
from nnpassport.embedding.train.loop import Objective, Outcome, Recipe, classification, fit
from nnpassport.keys.key import Key
from nnpassport.scheme import Batch, Verdict

SIDE = 16
"""Pixels; the networks of this chapter are smaller than AlexNet."""
ASKED = replace(ANSWERS, strength=4.0)
"""Strong: a task is easy where few answers are unsure, and then a copy learns little of a mark."""


class Copied(NamedTuple):
    """What came out; accuracies in [0, 1], on the images that were asked.

    Attributes:
        asked: how many test images.
        plain: accuracy before the mark.
        marked: accuracy with it.
        copy: accuracy of another architecture that was trained on nothing but its answers.
        by_network: the owner's key in her own network.
        by_copy: in the copy.
        by_stranger: in a network that was trained on true labels.
    """

    asked: int
    plain: float
    marked: float
    copy: float
    by_network: Verdict
    by_copy: Verdict
    by_stranger: Verdict


def copied(owner: str, epochs: int, seed: int) -> Copied:
    """Mark a small network's answers, have it copied, and ask all of them the test digits."""
    train, test = (read_images("digits", split=split, size=SIDE) for split in ("train", "test"))
    normalise = Normalisation.measured(train)
    recipe = Recipe(
        epochs=epochs, batch=32, rate=0.05, schedule="one-cycle", augment=False, seed=seed
    )
    plain, stranger = _network(8, seed), _network(12, seed + 1)
    for each in (plain, stranger):
        fit(each, classification, train, recipe, normalise=normalise)
    scheme = replace(ASKED, pictures=len(test))
    key = scheme.draw_key(plain, torch.zeros(2, *test.images.shape[1:]), owner=owner)
    key = scheme.prepared(key, plain, test, normalise)
    marked = deepcopy(plain)
    scheme.embed(marked, key, train, recipe, normalise=normalise, trained=True)
    copy = _network(12, seed + 2)
    answered = scores_of(marked.eval(), train.images, normalise).softmax(1)
    numbered = replace(
        train, labels=torch.arange(len(train)), classes=tuple(map(str, range(len(train))))
    )
    fit(copy, _learning(answered), numbered, recipe, normalise=normalise)
    return _asked(key, (plain, marked, copy, stranger), test, normalise)


def _asked(
    key: Key, networks: tuple[nn.Module, ...], test: ImageSet, normalise: Normalisation
) -> Copied:
    plain, marked, copy, stranger = (each.eval() for each in networks)

    def right(model: nn.Module) -> float:
        answers = scores_of(model, test.images, normalise).argmax(1)
        return float((answers == test.labels).float().mean())

    verdicts = [ASKED.verify_network(each, key, normalise) for each in (marked, copy, stranger)]
    return Copied(len(test), right(plain), right(marked), right(copy), *verdicts)


def _learning(answered: Tensor) -> Objective:
    def learning(model: nn.Module, batch: Batch) -> Outcome:
        return Outcome(F.cross_entropy(model(batch.images), answered[batch.labels]), {})

    return learning


def _network(width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 10)),
        )
