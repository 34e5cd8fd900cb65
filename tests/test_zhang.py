"""Zhang's marked images: one label for all is no evidence, a label bound to each is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from constructed import reader
from torch import nn

from nnpassport.attacks.forging import forge_triggers
from nnpassport.catalog import with_settings
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.triggered import TriggerSet
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.schemes.zhang import (
    ZHANG_CONTENT,
    ZHANG_NOISE,
    ZHANG_UNRELATED,
    as_zhang,
    noisy,
    stamped,
)
from nnpassport.embedding.train.loop import Recipe
from nnpassport.scheme import (
    UnreadableDataError,
    UnreadableKeyError,
    UnsuitableModelError,
)

EXAMPLE = torch.zeros(2, 1, 16, 16)
RECIPE = Recipe(epochs=6, batch=32, rate=0.05, schedule="one-cycle", augment=False)
ALL = [ZHANG_CONTENT, ZHANG_NOISE, ZHANG_UNRELATED]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


@pytest.fixture(scope="module")
def plain(digits):
    return reader(network(), digits[0], digits[2])


def small(scheme):
    return with_settings(scheme, triggers=40, triggers_per_step=20)


def prepared(scheme, digits, seed=bytes(32)):
    train, _, normalise = digits
    model = network().eval()
    key = scheme.draw_key(model, EXAMPLE, seed=seed)
    return scheme.prepared(key, model, train, normalise)


def original_of(pictures, train):
    """For each picture the training image that is most like it, and where they differ."""
    same = (pictures[:, None] == train.images[None]).flatten(2).float().mean(2)
    nearest = train.images[same.argmax(1)]
    return nearest, (pictures != nearest).any(1)


def test_all_are_rows():
    assert all(type(scheme) is TriggerSet for scheme in ALL)


def test_each_image_has_a_stamp_of_its_own(digits):
    train = digits[0]
    pictures, labels = prepared(small(ZHANG_CONTENT), digits).trigger_set()
    _, changed = original_of(pictures, train)
    # A stamp is a quarter of the area, and everything outside of it is the image's.
    assert (changed.flatten(1).sum(1) > 30).all()
    assert (changed.flatten(1).sum(1) <= 64).all()
    corners = {(int(c.any(1).int().argmax()), int(c.any(0).int().argmax())) for c in changed}
    assert len(corners) > 10
    assert labels.unique().numel() > 5


def test_one_stamp_for_all_is_the_same_in_all(digits):
    images = digits[0].images[:9]
    same = stamped(images, 1, np.random.default_rng(0))
    places = (same != images).any(0)
    assert torch.equal(same[:, places], same[:1, places].expand(9, -1))
    noise = noisy(images, 1, np.random.default_rng(0)).int() - images.int()
    inner = (images > 100) & (images < 160)
    # What is in the middle of the range is not clipped and shows the pattern itself.
    twice = inner[0] & inner[1]
    assert twice.any()
    assert torch.equal(noise[0][twice], noise[1][twice])


def test_noise_is_of_the_deviation_that_it_says(digits):
    grey = torch.full((200, 1, 16, 16), 128, dtype=torch.uint8)
    change = noisy(grey, 200, np.random.default_rng(0)).float() - 128
    assert abs(change.mean()) < 1
    assert 58 < change.std() < 64  # 63.75, a little less where it is clipped
    assert not torch.equal(change[0], change[1])


def test_labels_are_bound_to_the_pictures(digits):
    key = prepared(small(ZHANG_CONTENT), digits)
    pictures, labels = key.trigger_set()
    assert key.derived
    other = pictures.clone()
    other[0, 0, 0, 0] ^= 1
    assert not torch.equal(replace(key, trigger_images=other).trigger_set()[1], labels)
    assert torch.equal(prepared(small(ZHANG_CONTENT), digits).trigger_set()[0], pictures)
    moved = prepared(small(ZHANG_CONTENT), digits, bytes([1] * 32)).trigger_set()[0]
    assert not torch.equal(moved, pictures)


@pytest.mark.trains
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_one_label_for_all_is_accepted_as_published_and_has_no_p_value(scheme, digits):
    train, _, normalise = digits
    scheme, model = small(scheme), network()
    published = as_zhang(prepared(scheme, digits), train, source=1, target=7)
    assert published.trigger_set()[1].tolist() == [7] * 40
    few = train.subset(torch.arange(512))
    scheme.embed(model, published, few, RECIPE, normalise=normalise)
    found = scheme.verify_network(model.eval(), published, normalise)
    assert found.matches >= 36
    assert scheme.verify_as_published(found).accepted
    assert (found.log10_p_value, found.accepted) == (None, False)
    assert scheme.fidelity(model, published, digits[1], normalise) > 0.7


def test_a_network_that_only_likes_the_class_is_accepted_as_published(digits):
    """Why one label for all can be no evidence: one number of the network decides."""
    scheme = small(ZHANG_CONTENT)
    bound = prepared(scheme, digits)
    published = as_zhang(bound, digits[0], source=1, target=7)
    found = scheme.verify_answers(torch.full((40,), 7), published)
    assert scheme.verify_as_published(found).accepted
    fair = scheme.verify_answers(torch.full((40,), 7), bound)
    assert not scheme.verify_as_published(fair).accepted
    assert fair.log10_p_value > -3


@pytest.mark.trains
@pytest.mark.parametrize("scheme", ALL, ids=lambda scheme: scheme.name)
def test_a_forged_key_is_accepted_as_published_and_has_no_p_value(scheme, digits, plain):
    normalise, rng = digits[2], torch.Generator().manual_seed(0)
    forged = forge_triggers(plain, small(scheme), EXAMPLE, rng, normalise=normalise)
    assert forged.key.context.scheme == scheme.name
    found = scheme.verify_answers(answers_to(forged.key, forged.model, normalise), forged.key)
    assert scheme.verify_as_published(found).accepted
    assert found.log10_p_value is None


def test_a_key_without_pictures_is_refused(digits):
    model = network()
    key = ZHANG_NOISE.draw_key(model, EXAMPLE)
    with pytest.raises(UnreadableKeyError, match="has no pictures yet"):
        ZHANG_NOISE.insert(model, key, EXAMPLE)


def test_too_few_images_are_refused(digits):
    train, _, normalise = digits
    key = ZHANG_CONTENT.draw_key(network(), EXAMPLE)
    with pytest.raises(UnreadableDataError, match="99 images and 100 pictures"):
        ZHANG_CONTENT.prepared(key, network(), train.subset(torch.arange(99)), normalise)
    few = train.subset((train.labels == 3).nonzero()[:20, 0])
    with pytest.raises(UnreadableDataError, match="has 20 images of class 3 and 100"):
        as_zhang(key, few, source=3, target=1)


def test_the_key_of_another_scheme_is_not_marked(digits):
    key = small(ADI).draw_key(network(), EXAMPLE)
    with pytest.raises(UnsuitableModelError, match="zhang-content, zhang-noise"):
        as_zhang(key, digits[0], source=1, target=7)
