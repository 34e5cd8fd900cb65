"""Forged keys: what the published verification believes, and what derived keys leave of it."""

from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from constructed import marked
from torch import nn

from nnpassport.attacks.ambiguity import (
    flip_gamma,
    grind,
    insider_passport,
    random_passport,
    reverse_engineer,
    solve_passport,
)
from nnpassport.attacks.forging import forge_triggers, forge_uchida, forge_uchida_by_gradient
from nnpassport.attacks.hashbound import forge_hash_bound, hashed_signs
from nnpassport.attacks.passports import affine_of, passports_for, patch_matrix, solvable
from nnpassport.attacks.substitution import substitute_across, substitute_individual
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.measured import verify_model
from nnpassport.embedding.network.equations import Geometry, mean_patch, passport_affine
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.passport import V1, V2, Passport, draw_by_layer
from nnpassport.embedding.schemes.uchida import UCHIDA
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.context import LayerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import UnsuitableModelError

pytestmark = pytest.mark.slow

EXAMPLE = torch.zeros(2, 1, 16, 16)
LARGER = torch.zeros(2, 1, 32, 32)
QUICK = Recipe(epochs=1, batch=64, rate=0.05, schedule="constant", augment=False)


def network(norm):
    """Six convolutions, of which the last two carry passports."""
    torch.manual_seed(0)
    norms = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(4, channels)}
    layers, inputs = [], 1
    for outputs, stride in ((16, 2), (32, 1), (48, 2), (48, 1), (48, 1), (48, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norms[norm](outputs)]
        layers += [nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 4 * 4, 10))


class Victim(NamedTuple):
    """A released network and what its owner knows."""

    scheme: Passport
    model: nn.Module
    key: Key
    train: ImageSet
    test: ImageSet
    normalise: Normalisation

    def fidelity(self, outcome):
        """Accuracy with the forged key presented."""
        return self.scheme.fidelity(outcome.model, outcome.key, self.test, self.normalise)


@pytest.fixture(scope="module", params=["v2-group", "v2-batch", "v1-batch"])
def victim(request, digits):
    """A small network that carries a passport, for each kind that is attacked differently."""
    train, test, normalise = digits
    train, test = train.subset(torch.arange(640)), test.subset(torch.arange(128))
    name, norm = request.param.split("-")
    scheme = {"v1": V1, "v2": V2}[name]
    model = network(norm)
    key = draw_by_layer(scheme, model, EXAMPLE, seed=bytes(32))
    return Victim(scheme, marked(scheme, model, key, train, normalise), key, train, test, normalise)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def forgeries(victim):
    """Each attack as a function of nothing but its generator."""
    model, scheme, key, train, _, normalise = victim.model, victim.scheme, *victim[2:]
    small = train.subset(torch.arange(128))
    trained = {"normalise": normalise}
    half = replace(QUICK, precision="bfloat16")  # where a product in the wrong precision shows
    attacks = {
        "fake1": lambda g: random_passport(model, scheme, EXAMPLE, g),
        "grind": lambda g: grind(model, scheme, EXAMPLE, g, tries=3),
        "solve": lambda g: solve_passport(model, scheme, EXAMPLE, g),
        "flip": lambda g: flip_gamma(model, key, g, share=0.3),
        "fake2": lambda g: reverse_engineer(model, scheme, small, half, rng=g, **trained),
        "fake3": lambda g: insider_passport(
            model, scheme, key, small, half, rng=g, share=0.5, **trained
        ),
        "ierb": lambda g: substitute_individual(model, scheme, small, half, rng=g, **trained),
        "cerb": lambda g: substitute_across(model, scheme, small, half, rng=g, **trained),
        "uchida": lambda g: forge_uchida(model, UCHIDA, EXAMPLE, g),
        "uchida-gradient": lambda g: forge_uchida_by_gradient(model, UCHIDA, EXAMPLE, g, epochs=2),
        "triggers": lambda g: forge_triggers(model, ADI, EXAMPLE, g, epochs=2, **trained),
    }
    if isinstance(model[1], nn.BatchNorm2d):
        attacks["hash-bound"] = lambda g: forge_hash_bound(model, scheme, EXAMPLE, g)
    return attacks


def test_every_attack_keeps_to_the_contract(victim):
    before = deepcopy(victim.model.state_dict())
    for name, attack in forgeries(victim).items():
        first, again = attack(rng()), attack(rng())
        assert first.key.fingerprint == again.key.fingerprint, name  # reproducible
        assert first.model is not victim.model
        state = victim.model.state_dict()
        assert all(torch.equal(value, before[n]) for n, value in state.items()), name
        assert not victim.model.training
        assert all(p.requires_grad for p in victim.model.parameters())
        assert first.cost.had.startswith("W")
        assert first.cost.seconds > 0
        assert (first.cost.samples > 0) == ("D" in first.cost.had), name
        assert first.key.fingerprint != victim.key.fingerprint
        # And whatever it is, the exact verification refuses it.
        assert not verify_model(first.model, victim.normalise, first.key).accepted, name


def test_a_random_passport_reads_any_signature_but_ruins_the_network(victim):
    outcome = random_passport(victim.model, victim.scheme, EXAMPLE, rng())
    verdict = victim.scheme.verify(outcome.model.state_dict(), outcome.key)
    assert victim.scheme.verify_as_published(verdict).accepted
    assert victim.fidelity(outcome) < 0.4


def test_a_solved_passport_passes_the_published_verification(victim):
    outcome = solve_passport(victim.model, victim.scheme, EXAMPLE, rng())
    verdict = victim.scheme.verify(outcome.model.state_dict(), outcome.key)
    assert victim.scheme.verify_as_published(verdict).accepted
    public = accuracy(victim.model, victim.test, victim.normalise)
    assert victim.fidelity(outcome) > public - 0.02
    genuine, forged = (
        torch.cat([key.layer_passport(s.name).flatten() for s in key.context.layers])
        for key in (victim.key, outcome.key)
    )
    assert abs(torch.cosine_similarity(genuine, forged, dim=0)) < 0.05
    assert verdict.log10_p_value is None  # a key that was solved for is not derived from a seed


def test_a_solved_passport_of_v2_has_other_bits_and_one_of_v1_the_same(victim):
    outcome = solve_passport(victim.model, victim.scheme, EXAMPLE, rng())
    names = [layer.name for layer in victim.key.context.layers]
    mine = torch.cat([victim.key.layer_signs(name) for name in names])
    theirs = torch.cat([outcome.key.layer_signs(name) for name in names])
    same = (mine == theirs).float().mean()
    if victim.scheme is V1:
        assert same == 1  # V1 releases γ and β of its passport: the null space is all there is
    else:
        assert 0.35 < same < 0.65


def test_grinding_keys_gets_as_far_as_chance(victim):
    best = grind(victim.model, victim.scheme, EXAMPLE, rng(), tries=60)
    verdict = victim.scheme.verify(best.model.state_dict(), best.key)
    assert best.key.derived
    assert -4.5 < verdict.log10_p_value < -0.5
    with pytest.raises(ValueError, match="at least 1"):
        grind(victim.model, victim.scheme, EXAMPLE, rng(), tries=0)


def test_flipping_nothing_is_the_genuine_passport_and_flipping_all_ruins_it(victim):
    results = {}
    for share in (0.0, 0.5, 1.0):
        outcome = flip_gamma(victim.model, victim.key, rng(), share=share)
        results[share] = victim.fidelity(outcome)
        differs = torch.cat(
            [
                (outcome.key.layer_signs(s.name) != victim.key.layer_signs(s.name)).float()
                for s in victim.key.context.layers
            ]
        ).mean()
        assert abs(differs - share) < 0.01
    assert results[0.0] > 0.85
    # Half of the channels turned is as bad as all of them: three layers of such make chance.
    assert max(results[1.0], results[0.5]) < 0.6
    with pytest.raises(ValueError, match="share"):
        flip_gamma(victim.model, victim.key, rng(), share=1.5)


@pytest.mark.trains
def test_trained_scales_and_shifts_beat_random_ones(victim):
    """Descent hardly moves a scale to its right side: fake2's start on a random one, and half of
    V1's have to change. These are compared with chance; where the start is right, with 0.7.
    """
    recipe = replace(QUICK, rate=0.05, epochs=10, batch=32, schedule="one-cycle")
    chance = victim.fidelity(random_passport(victim.model, victim.scheme, EXAMPLE, rng()))
    for attack in (reverse_engineer, substitute_individual, substitute_across):
        outcome = attack(
            victim.model, victim.scheme, victim.train, recipe, normalise=victim.normalise, rng=rng()
        )
        right = victim.scheme is V2 and attack is not reverse_engineer
        # In 6 runs (shifts of the seeds) at least 0.90 where it is right, and 0.44 above chance.
        assert victim.fidelity(outcome) > (0.7 if right else chance + 0.25), attack.__name__


@pytest.mark.trains
def test_an_insider_moves_bits_if_he_may_train_for_long_enough(victim):
    images = victim.train.subset(torch.arange(256))

    def changed(epochs):
        recipe = Recipe(epochs=epochs, batch=64, rate=1.0, schedule="constant", augment=False)
        outcome = insider_passport(
            victim.model,
            victim.scheme,
            victim.key,
            images,
            recipe,
            normalise=victim.normalise,
            rng=rng(),
            share=0.5,
        )
        names = [layer.name for layer in victim.key.context.layers]
        pairs = ((outcome.key.layer_signs(n), victim.key.layer_signs(n)) for n in names)
        return float(torch.cat([(a != b).float() for a, b in pairs]).mean())

    assert changed(1) < 0.05  # one epoch only frees the copy from the original: 0 in 4 runs
    assert changed(50) > 0.15  # at least 0.198 in 4 runs


def test_bits_bound_to_a_hash_are_forged_with_equal_outputs(victim):
    if not isinstance(victim.model[1], nn.BatchNorm2d):
        with pytest.raises(UnsuitableModelError, match="batch norm"):
            forge_hash_bound(victim.model, victim.scheme, EXAMPLE, rng())
        return
    outcome = forge_hash_bound(victim.model, victim.scheme, EXAMPLE, rng())
    inputs = victim.normalise(victim.test.images[:64])
    with torch.no_grad():
        torch.testing.assert_close(
            outcome.model(inputs), victim.model(inputs), rtol=1e-3, atol=1e-3
        )
    for layer in outcome.key.context.layers:
        passport = outcome.key.layer_passport(layer.name)
        hashed = hashed_signs(passport, layer.length)
        assert torch.equal(outcome.key.layer_signs(layer.name), hashed)
    verdict = victim.scheme.verify(outcome.model.state_dict(), outcome.key)
    assert verdict.match_rate > 0.99
    owner = victim.scheme.verify(outcome.model.state_dict(), victim.key)
    assert owner.match_rate < 0.65  # on that copy the owner's own bits are gone


def test_the_hash_depends_on_every_number():
    passport = torch.zeros(2, 3, 4, 4)
    other = passport.clone()
    other[1, 2, 3, 3] = 1e-6
    assert not torch.equal(hashed_signs(passport, 64), hashed_signs(other, 64))
    assert set(hashed_signs(passport, 200).tolist()) == {-1.0, 1.0}


@pytest.mark.trains
def test_uchidas_mark_is_forged_without_touching_the_network(victim):
    for attack in (forge_uchida, forge_uchida_by_gradient):
        outcome = attack(victim.model, UCHIDA, EXAMPLE, rng())
        verdict = UCHIDA.verify(outcome.model.state_dict(), outcome.key)
        assert verdict.matches == verdict.bits
        assert UCHIDA.verify_as_published(verdict).accepted
    with pytest.raises(UnsuitableModelError, match="needed: a scheme that has"):
        forge_uchida(victim.model, victim.scheme, EXAMPLE, rng())


def test_a_forged_projection_is_distributed_like_a_genuine_one(victim):
    outcome = forge_uchida(victim.model, UCHIDA, EXAMPLE, rng())
    (layer,) = outcome.key.context.layers
    forged = outcome.key.layer_projection(layer.name)
    honest = replace(outcome.key, projections=None, signs=None).layer_projection(layer.name)
    assert torch.equal(forged.abs(), honest.abs())  # mirrored rows, nothing else
    assert abs(float(forged.mean())) < 0.01


def test_triggers_are_forged_from_noise(victim):
    few = replace(ADI, triggers=10)
    outcome = forge_triggers(
        victim.model, few, EXAMPLE, rng(), normalise=victim.normalise, epochs=60, rate=0.03
    )
    verdict = verify_model(outcome.model, victim.normalise, outcome.key)
    assert verdict.matches >= 9
    assert few.verify_as_published(verdict).accepted
    with pytest.raises(UnsuitableModelError, match="no trigger set"):
        forge_triggers(victim.model, V2, EXAMPLE, rng(), normalise=victim.normalise)


GEOMETRIES = {
    "plain": LayerShape("l", (6, 4, 3, 3), (4, 5, 6), Geometry((1, 1), ((1, 1),) * 2, (1, 1))),
    "strided": LayerShape("l", (6, 4, 3, 3), (4, 7, 6), Geometry((2, 2), ((1, 0),) * 2, (1, 1))),
    "grouped": LayerShape("l", (6, 2, 3, 3), (4, 5, 5), Geometry((1, 1), ((1, 1),) * 2, (1, 1), 2)),
    "dilated": LayerShape("l", (5, 3, 3), (3, 9), Geometry((1,), ((2, 2),), (2,))),
    "circular": LayerShape(
        "l", (4, 4, 3, 3), (4, 5, 6), Geometry((1, 1), ((1, 1),) * 2, (1, 1), 1, "circular")
    ),
    "linear": LayerShape("l", (7, 9), (9, 4), Geometry()),
}


@pytest.mark.parametrize("layer", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_solved_passport_induces_what_was_asked_for(layer):
    assert solvable(layer)
    weight = torch.randn(layer.weight, generator=rng(1))
    gamma, beta = torch.randn(2, layer.weight[0], generator=rng(2))
    passport = passports_for(weight, gamma, beta, layer, rng(3))
    got = passport_affine(weight.double(), passport.double(), layer.geometry)
    torch.testing.assert_close(
        torch.stack(got).float(), torch.stack([gamma, beta]), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("layer", GEOMETRIES.values(), ids=GEOMETRIES)
def test_the_patch_matrix_is_the_mean_patch(layer):
    passport = torch.randn((2, *layer.passport), generator=rng(4), dtype=torch.float64)
    product = passport.flatten(2) @ patch_matrix(layer).T
    patch = mean_patch(passport, layer.weight, layer.geometry)
    torch.testing.assert_close(product.reshape(patch.shape), patch)


def test_a_wide_layer_has_no_passport_for_every_scale():
    shortcut = LayerShape("l", (8, 4, 1, 1), (4, 3, 3), Geometry((1, 1), ((0, 0),) * 2, (1, 1)))
    assert not solvable(shortcut)


def test_a_shortcut_is_stretched_until_it_can_be_solved():
    torch.manual_seed(0)  # with other seeds, no direction may have all the signs: see below
    model = build("resnet18", classes=10, width=0.125, channels=1).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 1.5, generator=rng(5))
            nn.init.normal_(module.bias, 0, 0.3, generator=rng(6))
            module.running_mean.normal_(0, 0.5, generator=rng(7))
            module.running_var.uniform_(0.1, 2, generator=rng(8))
    shortcut = model.layer4[0].downsample[0]
    wide = shortcut.weight.clone()
    outcome = solve_passport(model, V2, LARGER.double(), rng())
    names = [layer.name for layer in outcome.key.context.layers]
    assert "layer4.0.downsample.0" in names
    assert torch.equal(shortcut.weight, wide)  # the network that was given is untouched
    inputs = torch.randn(4, 1, 32, 32, generator=rng(9)).double()
    torch.testing.assert_close(outcome.model(inputs), model(inputs), rtol=1e-6, atol=1e-8)
    state = outcome.model.state_dict()
    for name, (gamma, beta) in affine_of(outcome.key, state).items():
        norm = name.replace("downsample.0", "downsample.1").replace(".conv", ".bn")
        torch.testing.assert_close(gamma, state[f"{norm}.weight"], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(beta, state[f"{norm}.bias"], atol=1e-3, rtol=1e-3)


def test_a_shortcut_that_cannot_be_stretched_is_left_out_of_the_claim():
    for norm, seed in (("group", 0), ("batch", 1)):
        torch.manual_seed(seed)
        model = build("resnet18", classes=10, width=0.125, channels=1, norm=norm).eval()
        key = solve_passport(model, V2, LARGER, rng()).key
        names = [layer.name for layer in key.context.layers]
        assert "layer4.0.conv1" in names
        assert not any("downsample" in name for name in names)
    for gamma, beta in affine_of(key, model.state_dict()).values():
        torch.testing.assert_close(gamma, torch.ones_like(gamma), atol=1e-4, rtol=0)
        torch.testing.assert_close(beta, torch.zeros_like(beta), atol=1e-4, rtol=0)
