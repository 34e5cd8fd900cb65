"""Passport-aware normalisation: its small network as published, and what choosing it is worth."""

from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from constructed import reader
from torch import nn
from torch.nn import functional as F

import nnpassport
from nnpassport.attacks.ambiguity import random_passport
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.marked import mark
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.layers import Branch, Encoder, on_branch, passport_norms
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.pan import encode_norms, own_affine, say
from nnpassport.embedding.schemes.passport import PAN, V1, V2, Passport
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED as ALPHA
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError, Batch

pytestmark = pytest.mark.slow

EXAMPLE = torch.zeros(2, 1, 32, 32)
RECIPE = Recipe(epochs=5, batch=32, rate=0.05, schedule="one-cycle", augment=False)


class Plain(NamedTuple):
    model: nn.Module
    data: ImageSet
    normalise: Normalisation


class Owned(NamedTuple):
    model: nn.Module
    released: nn.Module
    key: Key


def network(norm="batch"):
    torch.manual_seed(0)
    return build("alexnet", classes=10, norm=norm, width=0.25, channels=1)


@pytest.fixture(scope="module")
def plain(digits):
    """A network that works and that nobody marked."""
    train, _, normalise = digits
    data = train.resized(32).subset(torch.arange(400))
    return Plain(reader(network(), data, normalise), data, normalise)


@pytest.fixture(scope="module")
def owned(plain):
    """The same with a key grafted in, and tuned for an epoch of steps too small to spoil it."""
    model = deepcopy(plain.model)
    key = PAN.draw_key(model, EXAMPLE, seed=bytes(32))
    tune = replace(RECIPE, epochs=1, rate=1e-4)
    PAN.embed(model, key, plain.data, tune, normalise=plain.normalise, trained=True)
    return Owned(model, PAN.released(model).eval(), key)


def inserted(plain, key, scheme=PAN):
    model = deepcopy(plain.model)
    scheme.insert(model, key, EXAMPLE)
    return model


def key_of(plain, number):
    return PAN.draw_key(plain.model, EXAMPLE, seed=bytes([number]) * 32)


def test_the_small_network_is_the_published_one():
    encoder = Encoder(16)
    with torch.no_grad():
        encoder.second.normal_(generator=torch.Generator().manual_seed(1))
    published = nn.Sequential(
        nn.Linear(16, 4, bias=False), nn.LeakyReLU(), nn.Linear(4, 16, bias=False)
    )
    published[0].weight.data.copy_(encoder.first)
    published[2].weight.data.copy_(encoder.second)
    x = torch.linspace(-2, 2, 16)
    torch.testing.assert_close(encoder(x), published(x[None])[0])


def test_the_private_branch_hears_one_network_for_scale_and_shift_and_v_does_not(plain):
    model = inserted(plain, key_of(plain, 1))
    norm = next(iter(passport_norms(model).values()))
    gamma, beta = norm.affine()
    x = torch.randn(4, len(gamma), 8, 8, generator=torch.Generator().manual_seed(0))
    norm.eval().running.branch = Branch.PRIVATE
    with torch.no_grad():
        norm.encoder.second.add_(0.01)
        z = F.batch_norm(x, norm.private_norm.running_mean, norm.private_norm.running_var)
        scale, shift = norm.encoder(gamma), norm.encoder(beta)
        wanted = z * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(norm(x), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.affine()[0], gamma)


def test_presented_it_computes_what_the_network_does_in_both_branches(plain):
    images = plain.normalise(plain.data.images[:32])
    for norm in ("batch", "group"):
        model = network(norm).eval()
        with torch.no_grad():
            before = model(images)
            key = PAN.draw_key(model, EXAMPLE, seed=bytes(32))
            PAN.insert(model, key, EXAMPLE)
            encode_norms(model)
            for branch in Branch.PUBLIC, Branch.PRIVATE:
                with on_branch(model, branch):
                    torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-3)


def test_from_scratch_both_branches_learn(plain):
    # An E that says what the norms say is no start: the private branch ends at chance with it.
    model = network()
    key = PAN.draw_key(model, EXAMPLE, seed=bytes(32))
    PAN.embed(model, key, plain.data, RECIPE, normalise=plain.normalise)
    numbers = PAN.evaluation(plain.data, plain.normalise)(model)
    assert numbers["sign_match"] == 1
    assert min(numbers["accuracy"], numbers["private_accuracy"]) > 0.8


def test_a_grafted_network_has_every_bit_and_equal_branches_without_a_step(plain):
    model = network("group")
    key = PAN.draw_key(model, EXAMPLE, seed=bytes(32))
    recipe = replace(RECIPE, epochs=0)
    few = plain.data.subset(torch.arange(64))
    PAN.embed(model, key, few, recipe, normalise=plain.normalise, trained=True)
    found = PAN.verify(model.state_dict(), key, log10_alpha=ALPHA)
    assert found.matches == found.bits
    # V2 has to mute the channels that a group norm does not let it turn; here nothing is lost.
    images = plain.normalise(plain.data.images[:64])
    with torch.no_grad(), on_branch(model, Branch.PUBLIC):
        public = model(images)
    with torch.no_grad(), on_branch(model, Branch.PRIVATE):
        torch.testing.assert_close(model(images), public, rtol=1e-3, atol=1e-3)


def test_the_owner_is_accepted_and_both_branches_work(plain, owned):
    found = PAN.verify(owned.released.state_dict(), owned.key, log10_alpha=ALPHA)
    assert found.accepted
    assert found.matches == found.bits
    assert PAN.verify_as_published(found).accepted
    numbers = PAN.evaluation(plain.data, plain.normalise)(owned.model)
    before = accuracy(plain.model, plain.data, plain.normalise)
    assert numbers["accuracy"] > before - 0.03
    assert numbers["private_accuracy"] > before - 0.03


def test_training_moves_the_small_networks_and_the_release_has_none(owned):
    fresh = deepcopy(owned.released)
    PAN.insert(fresh, owned.key, EXAMPLE)
    pairs = zip(passport_norms(owned.model).values(), passport_norms(fresh).values(), strict=True)
    assert all(not torch.equal(a.encoder.first, b.encoder.first) for a, b in pairs)
    assert list(owned.released.state_dict()) == list(network().state_dict())


def test_gradients_reach_the_small_networks_in_a_loop_of_ones_own(plain):
    model = deepcopy(plain.model).train()
    marked = mark(model, key_of(plain, 1), EXAMPLE)
    images = plain.normalise(plain.data.images[:8])
    marked.graft(images)
    assert marked.loss(images, plain.data.labels[:8]).isfinite()
    marked.loss(images, plain.data.labels[:8]).backward()
    for norm in passport_norms(model).values():
        assert norm.encoder.first.grad.abs().sum() > 0
        assert norm.encoder.second.grad.abs().sum() > 0


def test_the_sign_loss_reads_in_front_of_the_small_network(plain):
    model = inserted(plain, key_of(plain, 1)).train()
    objective = PAN.objective(key_of(plain, 1), steps=1)
    images = plain.normalise(plain.data.images[:8])
    outcome = objective(model, Batch(images, plain.data.labels[:8], 0))
    norms = passport_norms(model).values()
    right = torch.cat([norm.affine()[0].sign() == norm.signs for norm in norms])
    assert float(outcome.measures["sign_match"]) == pytest.approx(float(right.float().mean()))
    assert 0.3 < right.float().mean() < 0.7  # E says the norms' own scales, whose signs are +1


def test_behind_the_small_network_every_signature_can_be_read_off_everything(plain):
    # A key drawn after the fact, a network that nobody marked, and no data.
    key = key_of(plain, 2)
    model = inserted(plain, key)
    for norm in passport_norms(model).values():
        gamma, beta = own_affine(norm)
        say(norm, norm.signs * gamma.abs().clamp(min=0.1), beta)
        assert torch.equal(norm.encoder(norm.affine()[0]).sign(), norm.signs)
    found = PAN.verify(plain.model.state_dict(), key)
    assert not found.accepted
    assert found.log10_p_value > -5


def test_fidelity_passes_for_everybody_and_that_of_v2_does_not(plain, owned):
    public = accuracy(owned.released, plain.data, plain.normalise)
    reached_as_v2 = []
    for number in range(2, 6):
        stranger = key_of(plain, number)
        reached = PAN.fidelity(owned.released, stranger, plain.data, plain.normalise)
        assert reached == pytest.approx(public, abs=0.02)
        assert not PAN.verify(owned.released.state_dict(), stranger).accepted
        as_v2 = replace_scheme(stranger, V2)
        reached_as_v2.append(V2.fidelity(owned.released, as_v2, plain.data, plain.normalise))
    # Digits are easy: now and then half of a random passport's channels do for most of them.
    assert sum(reached_as_v2) / len(reached_as_v2) < public - 0.3


def test_a_random_passport_is_a_forgery_by_the_published_rule(plain):
    # Its signature is what it reads off: the network was never marked, by him or anybody.
    rng = torch.Generator().manual_seed(3)
    forgery = random_passport(plain.model, PAN, EXAMPLE, rng)
    found = PAN.verify(forgery.model.state_dict(), forgery.key)
    assert PAN.verify_as_published(found).accepted
    assert found.log10_p_value is None
    assert not found.accepted
    reached = PAN.fidelity(forgery.model, forgery.key, plain.data, plain.normalise)
    assert reached == pytest.approx(accuracy(plain.model, plain.data, plain.normalise), abs=0.02)


def test_a_passport_without_a_small_network_is_left_alone(plain):
    model = inserted(plain, replace_scheme(key_of(plain, 1), V2), V2)
    norm = next(iter(passport_norms(model).values()))
    before = deepcopy(norm.state_dict())
    say(norm, *own_affine(norm))
    assert norm.encoder is None
    assert all(torch.equal(v, before[n]) for n, v in norm.state_dict().items())


def replace_scheme(key, scheme):
    return replace(key, context=replace(key.context, scheme=scheme.name))


def test_a_layer_without_norm_and_one_of_two_channels_are_heard_right():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 12, 3), nn.ReLU()).eval()
    example = torch.randn(2, 1, 8, 8)
    key = V2.draw_key(model, example, layers=["0"], seed=bytes(32), passports="derived")
    surgery.insert(model, secrets_of(key), example, two_branches=True)
    encode_norms(model)
    with torch.no_grad():
        surgery.withhold(model)
        public = model(example)
        surgery.present(model)
        torch.testing.assert_close(model(example), public, rtol=1e-3, atol=1e-4)


def test_needs_two_branches():
    with pytest.raises(BadRecipeError, match="encoded is True"):
        replace(V1, encoded=True)
    assert isinstance(PAN, Passport)
    assert nnpassport.catalog.CATALOG["pan"].scheme is PAN
