"""DeepMarks: the design, words that are exact whoever's they are, and colluders who are named."""

import json
import math
from copy import deepcopy
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from constructed import reader, write_projected
from safetensors.torch import save_file
from typer.testing import CliRunner

from nnpassport.attacks.forging import forge_uchida, forge_uchida_by_gradient
from nnpassport.attacks.obfuscation import permute, rescale
from nnpassport.catalog import with_settings
from nnpassport.cli.app import app
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.deepmarks import (
    COLLUDERS,
    DEEPMARKS,
    USERS,
    incidence,
    trace,
    words_of,
)
from nnpassport.embedding.schemes.uchida import UCHIDA
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, log10_binomial_tail
from nnpassport.keys.keyfile import save_key
from nnpassport.keys.reading import codebook
from nnpassport.scheme import BadRecipeError, UnreadableKeyError, UnsuitableModelError

EXAMPLE = torch.zeros(2, 1, 32, 32)
SCHEME = replace(
    DEEPMARKS, repeats=8, strength=100.0
)  # as many steps as an epoch of CIFAR-10 has would do with the default
COPIES = (3, 0, 30, 17, 8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0):
    torch.manual_seed(seed)
    return build("alexnet", classes=10, norm="batch", width=0.25, channels=1)


@pytest.fixture(scope="module")
def key():
    return SCHEME.draw_key(network(), EXAMPLE, layers=["features.11"], seed=bytes(32))


@pytest.fixture(scope="module")
def images(digits):
    train, _, normalise = digits
    return train.resized(32).subset(torch.arange(256)), normalise


@pytest.fixture(scope="module")
def plain(images):
    data, normalise = images
    return reader(network(), data, normalise)


@pytest.fixture(scope="module")
def copies(images, plain, key):
    """Copies of a network for five users, each with his own word, uneven as tuning leaves it."""
    data, normalise = images
    (layer,) = key.context.layers
    found, draw = {}, rng()
    for user in COPIES:
        model, word = deepcopy(plain), words_of(key, layer)[user]
        word = word + 0.05 * torch.randn(len(word), generator=draw)
        write_projected(model, key, normalise(data.images), normalise, word)
        found[user] = SCHEME.released(model).eval().state_dict()
    return found


def combined(copies, users, how):
    return {name: how([copies[u][name].float() for u in users]) for name in copies[users[0]]}


def mean(tensors):
    return torch.stack(tensors).mean(0)


def test_the_design_is_a_projective_plane():
    lines = incidence().int()
    assert lines.shape == (31, 31)
    assert set(lines.sum(1).tolist()) == set(lines.sum(0).tolist()) == {6}
    off = ~torch.eye(31, dtype=torch.bool)
    assert set((lines @ lines.T)[off].tolist()) == {1}  # two lines meet in one point
    assert set((lines.T @ lines)[off].tolist()) == {1}  # and two points have one line


def test_the_and_of_up_to_five_words_says_whose_they_are():
    ones = torch.from_numpy(codebook()[:USERS]) > 0
    draw = rng()
    coalitions = [(u,) for u in range(USERS)] + list(combinations(range(USERS), 2))
    for count in range(3, COLLUDERS + 1):
        coalitions += [torch.randperm(USERS, generator=draw)[:count].tolist() for _ in range(300)]
    for coalition in coalitions:
        common = ones[list(coalition)].all(0)
        suspects = (~common | ones).all(1).nonzero()[:, 0].tolist()
        assert suspects == sorted(coalition)
    six = incidence()[:, incidence()[0]].any(1)  # who has a point with user 0: all of them
    assert six.sum() == 31


def test_words_are_uniform_bits_that_differ_in_ten_of_thirty_one(key):
    (layer,) = key.context.layers
    words = words_of(key, layer)
    assert words.shape == (32, 248)
    assert torch.equal(words[-1], key.layer_signs(layer.name))
    differ = (words[:31, None] != words[None, :31]).sum(2)
    assert set(differ[~torch.eye(31, dtype=torch.bool)].tolist()) == {8 * 10}
    assert set((words[:31] != words[31]).sum(1).tolist()) == {8 * 6}


def test_an_orthonormal_basis_leaves_the_regulariser_as_it_is():
    draw = rng()
    basis = torch.linalg.qr(torch.randn(31, 31, generator=draw)).Q
    rows, mean_filter = torch.randn(31, 90, generator=draw), torch.randn(90, generator=draw)
    word = torch.from_numpy(codebook()[4])
    published = (basis @ word - rows @ mean_filter).square().mean()
    ours = (word - basis.T @ rows @ mean_filter).square().mean()
    torch.testing.assert_close(published, ours, rtol=1e-4, atol=0)


def test_the_p_value_is_the_binomial_of_the_best_of_thirty_two(key):
    model = network(1)
    (layer,) = key.context.layers
    rows = key.layer_projection(layer.name).double()
    host = model.get_parameter(f"{layer.name}.weight").detach()
    read = (rows @ host.double().mean(0).flatten()).sign()
    counts = (words_of(key, layer) == read).sum(1).tolist()
    found = DEEPMARKS.verify(model.state_dict(), key)
    expected = min(0.0, log10_binomial_tail(max(counts), 248) + math.log10(32))
    assert (found.bits, found.matches) == (248, max(counts))
    assert found.log10_p_value == pytest.approx(expected)
    assert not found.accepted


def test_independent_keys_match_as_often_as_their_p_values_say():
    model = network(2)
    found = [
        DEEPMARKS.verify(
            model.state_dict(),
            SCHEME.draw_key(model, EXAMPLE, seed=bytes([n]) * 32),
        )
        for n in range(60)
    ]
    for log10_p in (-0.5, -1.0):
        expected = 60 * 10**log10_p
        small = sum(each.log10_p_value <= log10_p for each in found)
        assert small <= expected + 3 * expected**0.5


def test_each_copy_is_its_users(copies, key):
    for user, weights in copies.items():
        found = DEEPMARKS.verify(weights, key)
        assert found.matches == found.bits == 248
        assert found.accepted
        assert found.reason.startswith(f"user {user}:")
        assert DEEPMARKS.verify_as_published(found).accepted
        traced = trace(weights, key)
        assert traced.users == traced.published == (user,)
        error = traced.shares[user] / traced.scores[user]
        assert error < 0.05
        assert abs(traced.shares[user] - 1) < 4 * error


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_colluders_who_average_are_named_and_nobody_else(copies, key, count):
    for coalition in combinations(COPIES, count):
        weights = combined(copies, coalition, mean)
        traced = trace(weights, key, log10_alpha=LOG10_ALPHA_COMMITTED)
        assert traced.verdict.accepted
        assert traced.users == tuple(sorted(coalition))
        assert traced.published == tuple(sorted(coalition))
        assert sum(traced.shares) == pytest.approx(1, abs=1e-4)


def test_an_average_of_few_or_many_copies_is_the_owners_without_a_date():
    torch.manual_seed(0)
    model = build("alexnet", classes=10)
    key = DEEPMARKS.draw_key(model, torch.zeros(2, 3, 32, 32), seed=bytes(32))
    (layer,) = key.context.layers
    name = f"{layer.name}.weight"
    rows, weight = key.layer_projection(layer.name), model.get_parameter(name).detach()
    words, inverse = words_of(key, layer), torch.linalg.pinv(rows)
    draw = rng()
    for count in (2, 2, 2, 2, 2, 2, 3, 4, 5, 8, 31):
        users = torch.randperm(USERS, generator=draw)[:count]
        wanted = words[users].mean(0) + 0.05 * torch.randn(words.shape[1], generator=draw)
        step = inverse @ (wanted - rows @ weight.mean(0).flatten())
        found = trace({name: weight + step.view_as(weight[0])}, key)
        assert found.verdict.accepted
        if count <= COLLUDERS:
            assert found.users == tuple(sorted(users.tolist()))
        assert set(found.users) <= set(users.tolist())


@pytest.mark.parametrize(
    "how",
    [
        lambda each: torch.stack(each).amin(0),
        lambda each: torch.stack(each).amax(0),
        lambda each: torch.stack(each).median(0).values,
        lambda each: (torch.stack(each).amin(0) + torch.stack(each).amax(0)) / 2,
    ],
    ids=["min", "max", "median", "minmax"],
)
def test_no_innocent_is_named_where_colluders_take_extremes(copies, key, how):
    for count in (2, 3):
        for coalition in combinations(COPIES, count):
            weights = combined(copies, coalition, how)
            traced = trace(weights, key, log10_alpha=LOG10_ALPHA_COMMITTED)
            assert traced.users
            assert set(traced.users) <= set(coalition)


def test_nobody_is_named_in_an_unmarked_network(plain, key):
    traced = trace(plain.state_dict(), key)
    assert (traced.users, traced.published, traced.verdict.marked) == ((), (), False)


def test_another_owner_names_nobody(copies):
    other = DEEPMARKS.draw_key(network(), EXAMPLE, seed=bytes([9]) * 32)
    assert trace(copies[3], other).users == ()


def test_the_copy_is_found_after_its_channels_moved(copies, key):
    reference, suspect = network().eval(), network().eval()
    reference.load_state_dict(copies[3])
    suspect.load_state_dict(copies[17])
    suspect = rescale(permute(suspect, rng()).model, rng(1)).model
    assert not DEEPMARKS.verify(suspect.state_dict(), key).accepted
    found = verify_aligned(suspect.state_dict(), key, reference)
    assert found.verdict.accepted
    assert trace(found.aligned.model.state_dict(), key).users == (17,)


@pytest.mark.trains
def test_the_mark_is_forged_without_touching_the_network(plain):
    for attack in (forge_uchida, forge_uchida_by_gradient):
        outcome = attack(plain, DEEPMARKS, EXAMPLE, rng())
        found = DEEPMARKS.verify(outcome.model.state_dict(), outcome.key)
        assert found.matches == found.bits
        assert (found.log10_p_value, found.accepted) == (None, False)
        assert DEEPMARKS.verify_as_published(found).accepted
        assert trace(outcome.model.state_dict(), outcome.key).users == ()
    with pytest.raises(UnsuitableModelError, match="needed: a scheme that has"):
        forge_uchida(plain, ADI, EXAMPLE, rng())


def test_refuses_users_and_codes_that_are_not_there(key):
    with pytest.raises(BadRecipeError, match="from 0 to 30"):
        with_settings(DEEPMARKS, user=31)
    with pytest.raises(BadRecipeError, match="at least 2"):
        with_settings(DEEPMARKS, repeats=1)
    odd = replace(UCHIDA, bits=64).draw_key(network(), EXAMPLE)
    with pytest.raises(UnreadableKeyError, match="64 bits for codewords of 31"):
        replace(odd.context, scheme=DEEPMARKS.name)
    with pytest.raises(UnsuitableModelError, match="key is for uchida"):
        DEEPMARKS.verify(network().state_dict(), odd)
    with pytest.raises(UnsuitableModelError, match="key is for uchida"):
        trace(network().state_dict(), odd)


def test_the_command_names_them(copies, key, tmp_path):
    save_key(key, tmp_path / "owner.key")
    averaged = {n: t.contiguous() for n, t in combined(copies, (3, 17), mean).items()}
    save_file(averaged, tmp_path / "leaked.safetensors")
    words = ["trace", str(tmp_path / "leaked.safetensors"), "--key", str(tmp_path / "owner.key")]
    done = CliRunner().invoke(app, [*words, "--json"])
    facts = json.loads(done.stdout)
    assert (done.exit_code, facts["users"], facts["published"]) == (1, [], [])
    assert facts["verdict"]["accepted"] is False  # eight repeats are for dated claims only
    one = {n: t.contiguous() for n, t in copies[17].items()}
    save_file(one, tmp_path / "leaked.safetensors")
    done = CliRunner().invoke(app, [*words, "--json"])
    assert (done.exit_code, json.loads(done.stdout)["users"]) == (0, [17])
    shown = CliRunner().invoke(app, words)
    assert "17 (" in shown.stdout
    save_file(dict(network(5).state_dict()), tmp_path / "other.safetensors")
    words[1] = str(tmp_path / "other.safetensors")
    shown = CliRunner().invoke(app, words)
    assert (shown.exit_code, "nobody" in shown.stdout) == (1, True)


def test_the_command_needs_a_key_of_deepmarks(tmp_path):
    save_key(UCHIDA.draw_key(network(), EXAMPLE), tmp_path / "other.key")
    save_file(dict(network().state_dict()), tmp_path / "w.safetensors")
    words = ["trace", str(tmp_path / "w.safetensors"), "--key", str(tmp_path / "other.key")]
    with pytest.raises(UnsuitableModelError, match="key is for uchida"):
        CliRunner().invoke(app, words, catch_exceptions=False)
