"""Channels put back where the owner's network has them, and what that does to other networks."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import constructed
import pytest
import torch
from constructed import reader, small_alexnet
from hypothesis import given, settings
from hypothesis import strategies as st
from rearranged import negate, take
from safetensors.torch import save_file

from nnpassport.alignment.byaxes import reference_of
from nnpassport.alignment.folders import network_in
from nnpassport.alignment.layered import table_of
from nnpassport.alignment.names import MOST_TIMES_WIDER
from nnpassport.alignment.null import Draws, Unrelated, mixtures, normals
from nnpassport.alignment.rate import MIXTURES, READINGS, with_null
from nnpassport.attacks.obfuscation import (
    combine,
    flip_signs,
    insert_dummies,
    permute,
    rescale,
    split_channels,
)
from nnpassport.attacks.perturbation import prune, quantise
from nnpassport.attacks.removal import fine_tune
from nnpassport.embedding.aligning import align
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.checkpoint import save_model
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network.channels import channels_of, network_of
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.tensors import ArraysOf, as_tensor
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.uchida import UCHIDA
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.config import ModelConfig, config_bytes
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, TENSORS, log10_binomial_tail
from nnpassport.keys.counts import Counts, verdict_on
from nnpassport.keys.reading import read_passports
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError

SAME_SHAPE = (flip_signs, permute, rescale)
EVERYTHING = (insert_dummies, split_channels, *SAME_SHAPE)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


WIDTHS = {"alexnet": 0.25, "resnet18": 0.125}


def marked(architecture="alexnet", norm="batch", *, seed=0):
    """A random network whose filters are turned to read a fresh key, and the key."""
    model, key = made(architecture, norm, seed)
    return deepcopy(model), key


@cache
def made(architecture, norm, seed):
    torch.manual_seed(seed)
    model = build(architecture, norm=norm, width=WIDTHS[architecture]).eval()
    draw = rng(seed + 1)
    for module in model.modules():  # no scale is 1, no shift 0, no statistic the initial one
        for name, values in (*module._parameters.items(), *module._buffers.items()):
            if values is not None and values.dim() == 1:
                values.data.normal_(0, 0.3, generator=draw)
                if name in {"running_var", "weight"}:
                    values.data.abs_().add_(0.1)
    key = V2.draw_key(
        model, torch.zeros(2, 3, 32, 32), seed=bytes([seed + 7] * 32), passports="derived"
    )
    for name, form in V2.forms(key).items():
        weight = model.get_submodule(name).weight.data
        read = weight.flatten(1) @ form[0].to(weight)
        wrong = read.sign() != key.layer_signs(name)
        step = 2.1 * read / form[0].square().sum()
        turned = weight.flatten(1) - torch.where(wrong, step, 0.0)[:, None] * form[0].to(weight)
        weight.copy_(turned.view_as(weight))
    assert V2.verify(model.state_dict(), key).match_rate == 1
    return model, key


def tensors(networks):
    return [{n: as_tensor(a) for n, a in each.items()} for each in networks]


def matches(aligned, key, scheme=V2):
    return scheme.verify(aligned.model.state_dict(), key).matches


@pytest.mark.parametrize("architecture", ["alexnet", "resnet18"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer", "instance", "none"])
def test_undoes_everything_that_keeps_the_shapes(architecture, norm):
    model, key = marked(architecture, norm)
    attacks = SAME_SHAPE if norm != "none" else (permute, rescale)
    suspect = combine(model, rng(3), attacks=attacks).model
    assert V2.verify(suspect.state_dict(), key).match_rate < 0.7
    aligned = align(suspect.state_dict(), model, V2.forms(key))
    assert matches(aligned, key) == key.context.bits
    assert aligned.dropped == aligned.missing == 0
    images = torch.randn(3, 3, 32, 32, generator=rng())
    torch.testing.assert_close(aligned.model(images), model(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
@pytest.mark.parametrize("architecture", ["alexnet", "resnet18"])
def test_undoes_added_channels_and_all_the_rest_on_top(architecture, norm):
    model, key = marked(architecture, norm)
    attacks = EVERYTHING if norm != "none" else (insert_dummies, split_channels, permute, rescale)
    suspect = combine(model, rng(3), attacks=attacks).model
    aligned = align(suspect.state_dict(), model, V2.forms(key))
    assert matches(aligned, key) == key.context.bits
    assert aligned.dropped > 0
    images = torch.randn(3, 3, 32, 32, generator=rng())
    torch.testing.assert_close(aligned.model(images), model(images), rtol=1e-3, atol=1e-3)


def test_a_network_that_is_in_order_stays_as_it_is():
    model, key = marked()
    before = deepcopy(model.state_dict())
    aligned = align(model.state_dict(), model, V2.forms(key))
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])
        if values.dim() > 1:  # statistics are folded into the norms
            torch.testing.assert_close(aligned.model.state_dict()[name], values)
    images = torch.randn(3, 3, 32, 32, generator=rng())
    torch.testing.assert_close(aligned.model(images), model(images), rtol=1e-4, atol=1e-4)
    assert all(value > 0.9999 for value in aligned.cosines.values())


def batch_norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def scale_against_the_variance(model):
    """γ·k with (σ² + eps)·k²."""
    for norm in batch_norms(model):
        factor = (torch.rand(norm.num_features, generator=rng(1)) * 2 - 1).mul(3.4).exp()
        norm.weight *= factor
        norm.running_var.copy_(factor**2 * (norm.running_var + norm.eps) - norm.eps)


def shift_with_the_mean(model):
    """β + d with a mean that takes d back."""
    for norm in batch_norms(model):
        shift = torch.randn(norm.num_features, generator=rng(1)) * 10
        norm.bias += shift
        norm.running_mean += shift * (norm.running_var + norm.eps).sqrt() / norm.weight


def append_a_chain_of_near_twins(model):
    """Each is nearly the next one's copy, the first not the last one's; only the last is read."""
    for axis in channels_of(model):
        count, producer = (
            len(model.get_submodule(axis.producers[0].layer).weight),
            axis.producers[0],
        )
        filters = model.get_submodule(producer.layer).weight.flatten(1).clone()
        take(model, axis, torch.arange(count).repeat(3))
        noise = torch.randn(filters.shape, generator=rng(5))
        unit = torch.nn.functional.normalize(filters, dim=1)
        noise = torch.nn.functional.normalize(noise - (noise * unit).sum(1, keepdim=True) * unit)
        noise *= filters.norm(dim=1, keepdim=True)
        weight = model.get_submodule(producer.layer).weight
        weight[:count] = (filters + 0.018 * noise).view_as(weight[:count])
        weight[count : 2 * count] = (filters + 0.009 * noise).view_as(weight[:count])
        for name in axis.consumers:
            columns = model.get_submodule(name).weight
            columns[:, : 2 * columns.shape[1] // 3] = 0


def hide_twins_behind_their_statistics(model):
    """Twins whose scale and variance differ, read by c + r and −r."""
    for axis in channels_of(model):
        producer = axis.producers[0]
        count = len(model.get_submodule(producer.layer).weight)
        take(model, axis, torch.arange(count).repeat(2))
        norm = model.get_submodule(producer.norm)
        norm.weight[count:] *= 1.5
        norm.running_var[count:] = 2.25 * (norm.running_var[count:] + norm.eps) - norm.eps
        for name in axis.consumers:
            columns = model.get_submodule(name).weight
            half = columns.shape[1] // 2
            noise = torch.randn(columns[:, :half].shape, generator=rng(7)) * columns.std() * 3
            columns[:, :half] += noise
            columns[:, half:] = -noise


def drown_the_columns(model):
    """What is loud is read by tiny columns, and mute dummies by ordinary ones."""
    for axis in channels_of(model):
        producer = axis.producers[0]
        count = len(model.get_submodule(producer.layer).weight)
        take(model, axis, torch.arange(count).repeat(2))
        weight = model.get_submodule(producer.layer).weight
        weight[count:] = torch.randn(weight[count:].shape, generator=rng(6)) * weight.std()
        norm = model.get_submodule(producer.norm)
        for values in (norm.weight, norm.bias):
            values[:count] *= 2**20
            values[count:] *= 2**-40
        for name in axis.consumers:
            columns = model.get_submodule(name).weight
            columns[:, : columns.shape[1] // 2] *= 2**-20


@pytest.mark.parametrize(
    "change",
    [
        scale_against_the_variance,
        shift_with_the_mean,
        append_a_chain_of_near_twins,
        hide_twins_behind_their_statistics,
        drown_the_columns,
    ],
)
def test_undoes_what_an_attacker_would_think_of_next(change):
    """Free changes that are no part of the attacks above, each on top of them."""
    model, key = marked()
    suspect = combine(model, rng(3), attacks=SAME_SHAPE).model
    with torch.no_grad():
        change(suspect)
    images = torch.randn(3, 3, 32, 32, generator=rng())
    scale = model(images).abs().max()
    torch.testing.assert_close(suspect(images) / scale, model(images) / scale, rtol=0, atol=1e-4)
    assert matches(align(suspect.state_dict(), model, V2.forms(key)), key) == key.context.bits


def test_numbers_that_the_reference_cannot_hold_are_refused():
    model, key = marked()
    weights = dict(model.state_dict())
    huge = weights["features.4.weight"].double()
    weights["features.4.weight"] = huge * (1e300 / huge.abs().max())
    with pytest.raises(UnsuitableModelError, match="too large"):
        align(weights, model, V2.forms(key))


def test_reads_through_a_head_of_another_task():
    model, key = marked()
    suspect = combine(model, rng(3), attacks=SAME_SHAPE).model
    suspect.classifier = torch.nn.Linear(suspect.classifier.in_features, 101)
    aligned = align(suspect.state_dict(), model, V2.forms(key))
    assert matches(aligned, key) == key.context.bits
    assert len(aligned.model.classifier.weight) == 101


def test_channels_that_were_cut_off_are_missing_and_help_nobody():
    model, key = marked()
    suspect, axis = deepcopy(model), channels_of(model)[2]
    with torch.no_grad():
        take(suspect, axis, torch.arange(20, 96))
    aligned = align(suspect.state_dict(), model, V2.forms(key))
    assert aligned.missing == 20
    found = V2.verify(aligned.model.state_dict(), key)
    assert found.layers["features.8"] == (76, 96)
    assert found.matches >= key.context.bits - 20 - 20  # the next layer reads 76 of 96 channels


def test_uchidas_mark_is_recovered_too():
    torch.manual_seed(0)
    model = build("alexnet", norm="batch", width=0.25).eval()
    key = UCHIDA.draw_key(model, torch.zeros(2, 3, 32, 32), seed=bytes(32))
    before = UCHIDA.verify(model.state_dict(), key).matches
    suspect = combine(model, rng(3), attacks=SAME_SHAPE).model
    assert UCHIDA.verify(suspect.state_dict(), key).matches != before
    aligned = align(suspect.state_dict(), model, UCHIDA.forms(key))
    assert matches(aligned, key, UCHIDA) == before


def test_a_mark_of_answers_needs_no_alignment():
    model, _ = marked()
    key = ADI.draw_key(model, torch.zeros(2, 3, 32, 32), seed=bytes(32))
    with pytest.raises(UnsuitableModelError, match="answers"):
        verify_aligned(model.state_dict(), key, model)


def test_another_network_cannot_be_aligned():
    model, key = marked()
    other, _ = marked("resnet18")
    with pytest.raises(UnsuitableModelError, match="features"):
        align(other.state_dict(), model, V2.forms(key))
    less = {name: t for name, t in model.state_dict().items() if name != "features.8.weight"}
    with pytest.raises(UnsuitableModelError, match=r"features\.8"):
        align(less, model, V2.forms(key))
    narrow = build("alexnet", norm="batch", width=0.25, channels=1)
    with pytest.raises(UnsuitableModelError, match="shape"):
        align(narrow.state_dict(), model, V2.forms(key))


def test_a_suspect_of_absurd_width_is_not_looked_at():
    model, key = marked()
    weights = dict(model.state_dict())
    count = MOST_TIMES_WIDER * len(weights["features.0.weight"]) + 1
    weights["features.0.weight"] = torch.zeros(count, 3, 5, 5)
    with pytest.raises(UnsuitableModelError, match=f"{count} channels"):
        align(weights, model, V2.forms(key))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_any_order_and_any_signs_are_found_again(seed):
    model, key = marked()
    suspect = combine(model, rng(seed), attacks=(permute, partial(flip_signs, share=0.3))).model
    assert matches(align(suspect.state_dict(), model, V2.forms(key)), key) == key.context.bits


# Networks as they are known without being built


@pytest.mark.parametrize("architecture", ["alexnet", "resnet18", "resnet50"])
def test_a_folder_says_which_layers_share_channels(architecture, tmp_path):
    for norm in ("batch", "group", "layer", "instance", "none"):
        for stem in ("cifar", "imagenet"):
            made = {"norm": norm, "stem": stem, "width": 0.125}
            config = ModelConfig(architecture, made, tuple("ab"), (3, 32, 32), (0.5,) * 3, (1,) * 3)
            model = build(architecture, classes=2, **made)
            save_model(tmp_path / "net", model, config)
            mine, theirs = network_of(model), network_in(tmp_path / "net").network
            assert (mine.axes, mine.norms) == (theirs.axes, theirs.norms)
            assert arrays_digest(mine.arrays) == arrays_digest(theirs.arrays)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("features.9.weight", None),
        ("features.11.weight", lambda t: t[:, :-1]),
        ("features.14.bias", lambda t: torch.zeros(64)),
        ("features.1.bias", lambda t: t.long()),
        ("features.0.weight", lambda t: t.flatten(1)),
        ("classifier.bias", lambda t: t[None]),
        ("features.0.weight", lambda t: t[:0]),
    ],
)
def test_a_folder_of_another_network_is_refused(tmp_path, name, change):
    model, _ = marked()
    state = {n: t.contiguous() for n, t in model.state_dict().items()}
    tensor = state.pop(name, None)
    if change is not None:
        state[name] = change(tensor).contiguous()
    made = {"norm": "batch", "width": 0.25}
    config = ModelConfig("alexnet", made, tuple("0123456789"), (3, 32, 32), (0.5,) * 3, (1,) * 3)
    (tmp_path / "config.json").write_bytes(config_bytes(config))
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UnreadableModelError, match="does not fit 'alexnet'"):
        network_in(tmp_path)


@pytest.mark.parametrize("norm", ["batch", "group", "layer", "none"])
def test_layers_show_the_axes_that_tracing_finds_and_proves(norm):
    for architecture in ("alexnet", "resnet18"):
        model = build(architecture, norm=norm, width=0.25 if architecture == "alexnet" else 0.125)
        traced = axes_of(model.eval(), torch.zeros(2, 3, 32, 32))
        assert told(table_of(network_of(model))) == told(traced)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_over_axes_scales_behind_norms_of_groups_are_put_back(norm):
    model, key = marked(norm=norm)
    mine = network_of(model)
    suspect = network_of(combine(model, rng(3), attacks=SAME_SHAPE).model)
    reference = reference_of(table_of(mine), mine.arrays, key)
    placed = reference.place(suspect.arrays).arrays
    read = verdict_on(read_passports({**mine.arrays, **placed}, key), key)
    assert read.match_rate > 0.97


def told(table):
    """What a table says, positions one by one."""
    axes = {
        (
            axis.size,
            axis.kind,
            axis.traits,
            frozenset((*p[:2], *p.positions(axis.size).flat) for p in axis.places),
        )
        for axis in table.axes
    }
    rest = (table.reads, table.norms, table.batch_norms, table.gains, table.unknown, table.pairs)
    return axes, rest


# The null, on networks that work


@pytest.fixture(scope="module")
def owned(digits):
    train, _, normalise = digits
    data = train.resized(32).subset(torch.arange(320))
    model = small_alexnet()
    key = V2.draw_key(model, torch.zeros(2, 1, 32, 32), seed=bytes(32), passports="derived")
    return constructed.marked(V2, model, key, data, normalise), key, data, normalise


@pytest.fixture(scope="module")
def strangers(owned):
    """Networks that know the same images, from other starts and without a mark."""
    _, _, data, normalise = owned
    return [reader(small_alexnet(seed=seed), data, normalise) for seed in range(1, 5)]


def test_whole_filters_would_match_what_is_unrelated_and_blind_ones_do_not(owned, strangers):
    """The bias that the projection removes: real, large, and gone."""
    model, key, _, _ = owned
    rates = {"whole": [], "blind": []}
    for other in strangers:
        for how, forms in (("whole", {}), ("blind", V2.forms(key))):
            found = matches(align(other.state_dict(), model, forms), key)
            rates[how].append(found / key.context.bits)
    average = {how: sum(each) / len(each) for how, each in rates.items()}
    # 4 × 224 bits: the standard deviation of a mean is 0.017.
    assert average["whole"] > 0.56
    assert abs(average["blind"] - 0.5) < 4 * 0.017


def test_mixtures_keep_second_moments_and_no_filter():
    model, _ = marked()
    weights = model.state_dict()
    (mixed,) = tensors(mixtures(ArraysOf(weights), ["features.8"], Draws(0), 1))
    old, new = weights["features.8.weight"].flatten(1), mixed["features.8.weight"].flatten(1)
    torch.testing.assert_close(new.T @ new, old.T @ old, rtol=1e-3, atol=1e-3)
    cosines = (
        torch.nn.functional.normalize(old, dim=1) @ torch.nn.functional.normalize(new, dim=1).T
    )
    assert cosines.abs().max() < 0.6
    assert torch.equal(mixed["features.4.weight"], weights["features.4.weight"])


def test_mixtures_look_like_unrelated_networks_to_the_aligner(owned, strangers):
    model, key, _, _ = owned
    layers = [p.layer for axis in channels_of(model) for p in axis.producers]
    forms = {}  # whole filters, where the bias is large: the surrogate must show it
    mixed = [
        matches(align(each, model, forms), key)
        for each in tensors(mixtures(ArraysOf(strangers[0].state_dict()), layers, Draws(0), 4))
    ]
    others = [matches(align(each.state_dict(), model, forms), key) for each in strangers]
    assert min(sum(mixed), sum(others)) / 4 / key.context.bits > 0.54


def test_the_null_is_drawn_as_pytorch_draws_it():
    """So verdicts of the time when it did are repeated."""
    draws, theirs = Draws(5), rng(5)
    for count in (16, 17, 48**2, 100):
        wanted = torch.randn(count, generator=theirs, dtype=torch.float64)
        torch.testing.assert_close(torch.from_numpy(normals(draws, count)), wanted)


def test_the_more_cautious_p_value_counts_and_both_readings():
    counts, paid = Counts("bits", {"a": (90, 100)}), math.log10(READINGS)
    low = with_null(counts, [40, 48])
    assert low.tail == pytest.approx(log10_binomial_tail(90, 100))
    assert low.corrections == {"readings": paid}
    assert with_null(counts, [40, 60]).tail == pytest.approx(log10_binomial_tail(90, 100, 0.6))
    assert with_null(counts, [89]).tail + paid > LOG10_ALPHA_COMMITTED
    assert with_null(counts, [100]).tail == 0
    assert "unrelated networks reach 0.600" in with_null(counts, [40, 60]).found


def test_a_key_that_was_chosen_has_no_p_value_once_aligned_either():
    model, key = marked()
    layers = key.context.layers
    chosen = replace(key, passports={each.name: key.passport_array(each.name) for each in layers})
    found = verify_aligned(model.state_dict(), chosen, model).verdict
    assert found.log10_p_value is None
    assert found.corrections.keys() == {TENSORS}


def test_the_same_suspect_gives_the_same_null():
    model, key = marked()
    first = verify_aligned(model.state_dict(), key, model).verdict
    second = verify_aligned(model.state_dict(), key, model).verdict
    assert first.alignment["null"] == second.alignment["null"]
    assert len(first.alignment["null"]["matches"]) == MIXTURES
    assert first.accepted


def test_a_relative_among_the_unrelated_spoils_the_verdict():
    """Better refused than accepted by a null that is none."""
    model, key = marked()
    given_networks = Unrelated([model.state_dict()], "one that is a copy")
    found = verify_aligned(model.state_dict(), key, model, unrelated=given_networks).verdict
    assert not found.accepted
    assert found.log10_p_value == 0


# On a network that works


CHANGES = {
    "nothing": lambda model, data, normalise: model,
    "60 % pruned": lambda model, data, normalise: prune(model, share=0.6).model,
    "int8": lambda model, data, normalise: quantise(model, "int8-tensor").model,
}


def to_parity(model, data, normalise):
    """Another task on other pixels: is the digit odd, black on white?"""
    task = type(data)(255 - data.images, data.labels % 2, ("even", "odd"), "parity")
    recipe = Recipe(epochs=2, batch=16, rate=0.01, schedule="constant")
    return fine_tune(model, task, recipe, normalise=normalise, form="rtal").model


CHANGES["fine-tuned to other labels"] = to_parity


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("attacks", [SAME_SHAPE, EVERYTHING], ids=["same shapes", "more channels"])
def test_recovers_the_mark_of_a_network_that_works(owned, change, attacks):
    model, key, data, normalise = owned
    suspect = CHANGES[change](combine(model, rng(5), attacks=attacks).model, data, normalise)
    found = verify_aligned(
        suspect.state_dict(), key, model, log10_alpha=LOG10_ALPHA_COMMITTED
    ).verdict
    assert found.log10_p_value < -9
    assert found.accepted
    if change == "nothing":
        assert found.matches == found.bits


def test_unrelated_networks_that_work_are_refused(owned, strangers):
    model, key, _, _ = owned
    for other in strangers[:2]:
        found = verify_aligned(other.state_dict(), key, model).verdict
        assert not found.accepted
        assert found.log10_p_value > -3


def test_flipping_is_only_undone_with_the_norm():
    """A producer without a norm keeps its signs: a ReLU does not let one pass."""
    model, key = marked(norm="none")
    producer = channels_of(model)[2].producers[0]
    with pytest.raises(UnsuitableModelError, match=r"no norm follows features\.8"):
        negate(model, producer, -torch.ones(96))
    assert matches(align(model.state_dict(), model, V2.forms(key)), key) == key.context.bits
