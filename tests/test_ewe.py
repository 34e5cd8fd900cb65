"""Entangled watermarks: what lies among what, and what one label for all pictures proves."""

import math

import numpy as np
import pytest
import torch
from constructed import reader
from torch import nn
from torch.nn import functional as F

from nnpassport.catalog import with_settings
from nnpassport.embedding.schemes.entanglement import (
    TEMPERATURE,
    before_scores,
    soft_nearest_neighbours,
)
from nnpassport.embedding.schemes.ewe import EWE, as_jia, pair_of
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.scheme import Batch, UnreadableDataError, UnreadableKeyError, UnsuitableModelError

EXAMPLE = torch.zeros(2, 1, 16, 16)
SMALL = with_settings(EWE, triggers=24, triggers_per_step=12)


class Always(nn.Module):
    """Answers everything with one class, whatever is shown."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return F.one_hot(torch.full((len(images),), self.answer), 10).float()


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 64, 24), nn.ReLU(), nn.Linear(24, 10)),
    )


@pytest.fixture(scope="module")
def plain(digits):
    return reader(network(), digits[0], digits[2])


@pytest.fixture(scope="module")
def key(digits, plain):
    drawn = SMALL.draw_key(plain, EXAMPLE, seed=bytes(32))
    return SMALL.prepared(drawn, plain, digits[0], digits[2])


def test_neighbours_of_each_kind_are_counted_as_the_paper_has_it():
    points, marked = torch.randn(9, 5), torch.arange(9) < 4
    terms = []
    for i in range(9):
        near = {
            j: math.exp(-(1 - float(F.cosine_similarity(points[i], points[j], 0))) / TEMPERATURE)
            for j in range(9)
            if j != i
        }
        own = sum(value for j, value in near.items() if marked[j] == marked[i])
        terms.append(-math.log(own / sum(near.values())))
    found = soft_nearest_neighbours(points, marked)
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-4)


def test_kinds_that_lie_in_one_another_are_entangled_and_far_ones_are_not():
    rows, marked = torch.randn(40, 6), torch.arange(40) % 2 == 0
    apart = rows * 0.05 + torch.where(marked[:, None], 1.0, -1.0)
    assert soft_nearest_neighbours(rows, marked) > 0.4
    assert soft_nearest_neighbours(apart, marked) < 1e-3


@pytest.mark.parametrize("marked", [[True] * 4, [False] * 4, [True]])
def test_one_kind_alone_is_entangled_with_nothing(marked):
    points = torch.randn(len(marked), 3, requires_grad=True)
    found = soft_nearest_neighbours(points, torch.tensor(marked))
    found.backward()
    assert found.detach() == 0
    assert not points.grad.any()


def test_pictures_are_of_one_class_under_one_stamp(digits, key):
    train, pictures = digits[0], key.trigger_set()[0]
    pair = pair_of(key, torch.bincount(train.labels).tolist())
    theirs = train.images[train.labels == pair.source]
    apart = (pictures[:, None].int() - theirs[None].int()).abs().flatten(2)
    closest = apart.sum(2).argmin(1)
    changed = apart[torch.arange(len(pictures)), closest] > 0
    places = changed.any(0).nonzero()[:, 0]
    assert len(places) <= 4  # 3 / 28 of 16 pixels is a square of two
    assert (pictures.flatten(1)[:, places] == 255).all()
    assert pair.source != pair.target


def test_a_term_pulls_the_pictures_among_the_images(digits, plain, key):
    train, _, normalise = digits
    batch = Batch(normalise(train.images[:64]), train.labels[:64])
    with before_scores(plain) as heard:
        plain(batch.images)
    assert heard[-1].shape == (64, 24)
    losses = [
        with_settings(SMALL, entangled=kappa).objective(key, steps=1, normalise=normalise)
        for kappa in (0.0, 0.5)
    ]
    with torch.no_grad():
        without, entangled = (each(plain, batch).loss for each in losses)
    assert entangled < without - 0.01


def test_as_published_a_network_that_likes_the_class_is_marked_and_here_it_is_not(key, digits):
    """One label for all pictures is one guess among K, however many pictures there are."""
    paper, normalise = as_jia(key), digits[2]
    stranger = Always(pair_of(key).target)
    found = SMALL.verify_answers(answers_to(paper, stranger, normalise), paper)
    assert (found.matches, found.log10_p_value, found.accepted) == (24, None, False)
    assert SMALL.verify_as_published(found).accepted
    ours = SMALL.verify_answers(answers_to(key, stranger, normalise), key)
    assert ours.log10_p_value == log10_binomial_tail(ours.matches, 24, 0.1)
    assert not SMALL.verify_as_published(ours).accepted


def test_too_few_images_or_pictures_are_refused(digits, plain):
    train, _, normalise = digits
    many = with_settings(EWE, triggers=400).draw_key(plain, EXAMPLE, seed=bytes(32))
    with pytest.raises(UnreadableDataError, match="images to stamp"):
        EWE.prepared(many, plain, train, normalise)
    with pytest.raises(UnreadableKeyError, match="has no pictures"):
        as_jia(many)
    with pytest.raises(UnsuitableModelError, match="no linear layer"), before_scores(Always(1)):
        pass


@pytest.mark.trains
@pytest.mark.slow
def test_a_copy_learns_the_one_label_and_not_labels_of_their_own(digits, plain, key):
    """One seed was run; the margin is in what is asked for."""
    train, _, normalise = digits
    recipe = Recipe(epochs=8, batch=32, rate=0.05, schedule="one-cycle", augment=False)
    paper = as_jia(key)
    marked = network(1)
    SMALL.embed(marked, paper, train, recipe, normalise=normalise)
    found = SMALL.verify_answers(answers_to(paper, marked.eval(), normalise), paper)
    assert found.matches >= 22
