"""Frontier stitching: what the published null claims, and what independent networks do."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from constructed import reader
from torch import nn

from nnpassport.attacks.forging import forge_triggers
from nnpassport.catalog import with_settings
from nnpassport.embedding.schemes.frontier import (
    FRONTIER,
    matches_at_five_percent,
    with_true_classes,
)
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.chance import (
    LOG10_ALPHA_UNCOMMITTED,
    log10_binomial_tail,
    matches_needed,
)
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError

EXAMPLE = torch.zeros(2, 1, 16, 16)
TUNE = Recipe(epochs=8, batch=32, rate=0.05, schedule="one-cycle", augment=False)
SMALL = with_settings(FRONTIER, triggers=128, triggers_per_step=64)


def network(seed, width=16):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 4 * 4, 10)),
    )


def trained(digits, seed, width=16):
    return reader(network(seed, width), digits[0], digits[2])


@pytest.fixture(scope="module")
def plain(digits):
    return trained(digits, 0)


@pytest.fixture(scope="module")
def key(digits, plain):
    drawn = SMALL.draw_key(plain, EXAMPLE, seed=bytes(32))
    return SMALL.prepared(drawn, plain, digits[0], digits[2])


@pytest.fixture(scope="module")
def strangers(digits):
    """Networks that were trained independently, one of another width."""
    return [trained(digits, seed, width) for seed, width in ((1, 16), (2, 16), (3, 24), (4, 16))]


def test_half_of_the_pictures_fool_the_network_and_half_do_not(digits, plain, key):
    answers = answers_to(key, plain, digits[2])
    true, towards = torch.from_numpy(key.trigger_choices).unbind(1)
    assert (answers == true).sum() == 64
    assert torch.equal(answers[:64], towards[:64])
    assert (true != towards).all()
    with torch.no_grad():
        scores = plain(digits[2](key.trigger_set()[0]))[64:]
    second = scores.topk(2).indices[:, 1]
    assert torch.equal(second, towards[64:])


def test_pictures_are_one_step_from_images_that_were_answered_rightly(digits, plain, key):
    train, _, normalise = digits
    true = torch.from_numpy(key.trigger_choices)[:, 0]
    apart = (
        (key.trigger_set()[0][:, None].int() - train.images[None].int()).abs().flatten(2).amax(2)
    )
    nearest = apart.argmin(1)
    assert apart.amin(1).unique().numel() == 1  # one step size for all of them
    assert torch.equal(train.labels[nearest], true)
    with torch.no_grad():
        assert torch.equal(plain(normalise(train.images[nearest])).argmax(1), true)


def test_labels_are_drawn_from_the_two_classes_and_bound_to_the_pictures(key):
    assert key.derived
    assert key.label_choices == 2
    labels = key.trigger_set()[1]
    choices = torch.from_numpy(key.trigger_choices)
    assert (labels[:, None] == choices).any(1).all()
    assert 40 < (labels == choices[:, 0]).sum() < 88
    swapped = replace(key, trigger_choices=key.trigger_choices[:, ::-1])
    assert not torch.equal(swapped.trigger_set()[1], labels)


def test_the_published_rule_is_the_paper_s():
    """θ mismatches of 100 are at most 0.05 likely by the paper's null, and one more is not."""
    for count in (40, 100, 192):
        needed = matches_at_five_percent(count)
        assert log10_binomial_tail(needed, count) <= -1.30103 + 1e-6
        assert log10_binomial_tail(needed - 1, count) > -1.30103
    assert 100 - matches_at_five_percent(100) == 41


def test_the_default_key_can_lose_pictures_and_still_prove():
    assert FRONTIER.triggers - matches_needed(FRONTIER.triggers, LOG10_ALPHA_UNCOMMITTED) == 20


def test_networks_that_nobody_marked_pass_the_published_rule(digits, key, strangers):
    """The paper's null is ½ a picture. Accurate networks match far more, and ours holds on them."""
    published = with_true_classes(key)
    null = log10_binomial_tail
    for model in strangers:
        answers = answers_to(key, model, digits[2])
        found = SMALL.verify_answers(answers, published)
        assert found.log10_p_value is None
        assert SMALL.verify_as_published(found).accepted  # a false positive
        assert null(found.matches, found.bits) < -6  # what its null would call impossible
        bound = SMALL.verify_answers(answers, key)
        assert bound.log10_p_value > -3
        assert not bound.accepted


def test_matches_of_bound_labels_are_a_fair_coin_s_on_any_network(digits, plain, key, strangers):
    """Over many keys of the same pictures, each a choice of labels: mean n/2 at most."""
    for model in [plain, *strangers]:
        answers = answers_to(key, model, digits[2])
        seeds = [bytes([number // 256, number % 256] * 16) for number in range(300)]
        keys = [replace(key, seed=seed) for seed in seeds]
        matches = torch.tensor([SMALL.verify_answers(answers, k).matches for k in keys]).float()
        either = (answers[:, None] == torch.from_numpy(key.trigger_choices)).any(1).sum()
        assert abs(matches.mean() - either / 2) < 2
        assert abs(matches.var() - either / 4) < 12
        assert matches.mean() < 66


@pytest.mark.slow
@pytest.mark.trains
@pytest.mark.parametrize("as_published", [True, False])
def test_a_trained_network_is_stitched(digits, plain, key, as_published):
    train, test, normalise = digits
    held, model = with_true_classes(key) if as_published else key, deepcopy(plain)
    some = train.subset(torch.arange(1024))
    SMALL.embed(model, held, some, TUNE, normalise=normalise, trained=True)
    found = SMALL.verify_network(model.eval(), held, normalise)
    assert SMALL.verify_as_published(found).accepted
    assert found.accepted is not as_published
    assert SMALL.fidelity(model, held, test, normalise) > 0.9


@pytest.mark.trains
def test_a_forged_key_is_accepted_as_published_and_has_no_p_value(digits, plain):
    rng = torch.Generator().manual_seed(0)
    forged = forge_triggers(plain, SMALL, EXAMPLE, rng, normalise=digits[2])
    found = SMALL.verify_answers(answers_to(forged.key, forged.model, digits[2]), forged.key)
    assert SMALL.verify_as_published(found).accepted
    assert found.log10_p_value is None


def test_a_network_that_knows_nothing_has_no_frontier(digits):
    untrained = network(0).eval()
    drawn = FRONTIER.draw_key(untrained, EXAMPLE)
    with pytest.raises(UnsuitableModelError, match="gives 96 that fool the network and 96"):
        FRONTIER.prepared(drawn, untrained, digits[0], digits[2])


def test_a_key_without_pictures_has_no_true_classes(plain):
    with pytest.raises(UnreadableKeyError, match="true classes"):
        with_true_classes(FRONTIER.draw_key(plain, EXAMPLE))


def test_preparing_leaves_the_network_alone(digits, plain, key):
    model = deepcopy(plain).train()
    before = deepcopy(model.state_dict())
    again = SMALL.prepared(SMALL.draw_key(plain, EXAMPLE, seed=bytes(32)), model, *digits[::2])
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert again.fingerprint == key.fingerprint
    assert SMALL.prepared(key, model, *digits[::2]) is key
