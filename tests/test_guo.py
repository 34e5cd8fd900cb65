"""Guo's signed images: a remapping of classes is few choices, labels bound to pictures are many."""

from dataclasses import replace

import pytest
import torch
from constructed import reader
from torch import nn

from nnpassport.attacks.forging import forge_triggers
from nnpassport.catalog import with_settings
from nnpassport.data.images import Normalisation
from nnpassport.embedding.schemes.guo import GUO, STRENGTH, as_guo, message_mark, signed
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.loop import Recipe
from nnpassport.scheme import UnreadableDataError

EXAMPLE = torch.zeros(2, 1, 16, 16)
RECIPE = Recipe(epochs=6, batch=32, rate=0.05, schedule="one-cycle", augment=False)


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


def drawn(count, seed=bytes(32)):
    scheme = with_settings(GUO, triggers=count, triggers_per_step=32)
    return scheme, scheme.draw_key(network(), EXAMPLE, seed=seed)


def test_the_mark_is_the_key_s_and_the_same_in_every_image():
    _, key = drawn(40)
    mark = message_mark(key)
    assert mark.shape == (1, 1, 16, 16)
    assert set(mark.unique().tolist()) == {-1, 0, 1}
    assert mark.abs().sum() == 64  # a quarter of the pixels, where 128 would be more
    assert message_mark(key, bits=10).abs().sum() == 10
    grey = torch.full((3, 1, 16, 16), 128, dtype=torch.uint8)
    change = signed(key, grey).float() - 128
    torch.testing.assert_close(change, (255 * STRENGTH * mark).expand_as(change), atol=0.5, rtol=0)
    assert not torch.equal(message_mark(drawn(40, bytes([1] * 32))[1]), mark)


def test_labels_are_bound_to_the_pictures(digits):
    train, _, normalise = digits
    scheme, key = drawn(40)
    key = scheme.prepared(key, network(), train, normalise)
    assert key.derived
    pictures, labels = key.trigger_set()
    pictures[0, 0, 0, 0] ^= 1
    assert not torch.equal(replace(key, trigger_images=pictures).trigger_set()[1], labels)


def test_every_class_has_another(digits):
    _, key = drawn(400)
    images = as_guo(key, digits[0])
    pictures, labels = images.trigger_set()
    # An image is told by the pixels that the mark leaves alone.
    kept = (message_mark(key) == 0)[0, 0]
    seen = {
        tuple(p[0][kept].tolist()): int(label) for p, label in zip(pictures, labels, strict=True)
    }
    true = {
        tuple(p[0][kept].tolist()): int(label)
        for p, label in zip(digits[0].images, digits[0].labels, strict=True)
    }
    function = {(true[place], label) for place, label in seen.items()}
    assert len(function) == 10
    assert {before for before, _ in function} == {after for _, after in function} == set(range(10))
    assert all(before != after for before, after in function)


@pytest.mark.slow
@pytest.mark.trains
def test_the_published_mark_works_on_other_images_and_has_no_p_value(digits, plain):
    train, test, normalise = digits
    scheme, key = drawn(250)
    model = network()
    scheme.embed(model, as_guo(key, train), train, RECIPE, normalise=normalise)
    elsewhere = as_guo(key, test)  # images that the network has never seen, signed
    found = scheme.verify_network(model.eval(), elsewhere, normalise)
    assert found.matches > 225
    assert scheme.verify_as_published(found).accepted
    assert (found.log10_p_value, found.accepted) == (None, False)
    unmarked = scheme.verify_network(plain, elsewhere, normalise)
    assert not scheme.verify_as_published(unmarked).accepted
    assert scheme.fidelity(model, key, test, normalise) > 0.9


def test_answers_to_a_remapping_are_not_independent(digits):
    """Binomial(n, 1/K) would find proof in a network that errs in one way by chance.

    Of all ways to err as a function of the class, one in K matches a whole class of pictures.
    """
    scheme, key = drawn(250)
    published = as_guo(key, digits[0])
    labels = published.trigger_set()[1]
    rng, shares = torch.Generator().manual_seed(0), []
    for _ in range(400):
        wrong = torch.randint(10, (10,), generator=rng)[labels]
        shares.append(scheme.verify_answers(wrong, published).matches)
    matches = torch.tensor(shares, dtype=torch.float)
    assert abs(matches.mean() - 25) < 4
    assert matches.var() > 10 * 250 * 0.1 * 0.9  # tenfold what independence would have
    bound = scheme.prepared(key, network(), digits[0], Normalisation((0.5,), (0.5,)))
    fair = []
    for _ in range(400):
        wrong = torch.randint(10, (10,), generator=rng)[labels]
        fair.append(scheme.verify_answers(wrong, bound).matches)
    assert torch.tensor(fair, dtype=torch.float).var() < 3 * 250 * 0.1 * 0.9


@pytest.mark.trains
def test_a_forged_key_is_accepted_as_published_and_has_no_p_value(digits, plain):
    scheme, _ = drawn(40)
    rng = torch.Generator().manual_seed(0)
    forged = forge_triggers(plain, scheme, EXAMPLE, rng, normalise=digits[2])
    answers = answers_to(forged.key, forged.model, digits[2])
    found = scheme.verify_answers(answers, forged.key)
    assert scheme.verify_as_published(found).accepted
    assert found.log10_p_value is None


def test_too_few_images_are_refused(digits):
    scheme, key = drawn(40)
    with pytest.raises(UnreadableDataError, match="39 images and 40 pictures"):
        scheme.prepared(key, network(), digits[0].subset(torch.arange(39)), digits[2])
