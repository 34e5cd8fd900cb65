"""What costs a thief nothing and used to end the reading, or to turn it into a false no.

Networks are made by construction: filters of a random network are turned until they read as the
key's bits. Nothing here is trained.
"""

import math
import shutil
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from functools import cache, partial

import constructed
import numpy
import onnx
import pytest
import torch
from authority import Signer, certificate, new_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper
from rearranged import take
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder
from safetensors.torch import save_file
from scipy import stats

from nnpassport.alignment import shapes as byshape
from nnpassport.alignment.shapes import Search
from nnpassport.attacks.obfuscation import combine, flip_signs, insert_dummies, permute, rescale
from nnpassport.claims.claim import Declared, claim_of, sign_claim
from nnpassport.claims.claimfile import timestamped_bytes, write_signed
from nnpassport.claims.rules import Outcome
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.aligning import align
from nnpassport.embedding.checkpoint import load_suspect, save_model
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network.channels import channels_of, network_of
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.tensors import (
    ArraysOf,
    read_weights,
    tensors_digest,
)
from nnpassport.embedding.schemes.passport import V2
from nnpassport.files.config import ModelConfig
from nnpassport.files.weights import read_suspect
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, log10_binomial_tail
from nnpassport.keys.counts import Reading, verdict_on
from nnpassport.keys.reading import forms_of, read_passports
from nnpassport.scheme import UnreadableModelError, UnsuitableModelError
from nnpassport.verification.candidates import read_by_shape
from nnpassport.verification.hearing import Bench, disclose, hear
from nnpassport.verification.verdicts import Alignment, Options, Trial, verify

EXAMPLE = torch.zeros(2, 3, 32, 32)
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WIDTHS = {"alexnet": 0.25, "resnet18": 0.125}  # keys of 224 and 320 bits
FREE = (flip_signs, permute, rescale)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def config_of(architecture):
    return ModelConfig(
        architecture=architecture,
        arguments={"classes": 10, "norm": "batch", "width": WIDTHS[architecture]},
        classes=tuple("0123456789"),
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )


def kind_of(model):
    return {"AlexNet": "alexnet", "ResNet": "resnet18"}[type(model).__name__]


@torch.no_grad()
def network(architecture, seed, width=None):
    """One whose norms have seen some training, of both signs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = width or WIDTHS[architecture]
        model = build(architecture, norm="batch", width=width).eval()
    draw = rng(seed + 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean):
                values.normal_(0, 0.3, generator=draw)
            module.weight.add_(0.3 * module.weight.sign())
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    return model


@torch.no_grad()
def written(model, key):
    """The network with the key's bits written into its filters."""
    model = deepcopy(model)
    for name, form in V2.forms(key).items():
        weight = model.get_submodule(name).weight
        patch = form[0].to(weight)
        read = weight.flatten(1) @ patch
        step = torch.where(read.sign() == key.layer_signs(name), 0.0, 2.1 * read)
        weight -= (step[:, None] * patch / patch.square().sum()).view_as(weight)
    return model


@cache
def marked(architecture="alexnet"):
    plain = network(architecture, 0)
    key = V2.draw_key(plain, EXAMPLE, seed=bytes([7] * 32), passports="derived")
    return written(plain, key), key


@cache
def moved(architecture="alexnet"):
    """The marked network, its channels negated, permuted and rescaled."""
    return combine(marked(architecture)[0], rng(3), attacks=FREE).model


def search_in(state, model, key):
    return Search(dict(ArraysOf(state)), network_of(model), forms_of(key))


# The eight, each a function of a network's state dict


def unused(state, model):
    return {**state, "note": torch.zeros(1)}


def without_counters(state, model):
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


def zero_biases(state, model):
    layers = [p.layer for axis in channels_of(model) for p in axis.producers]
    return {**state, **{f"{n}.bias": torch.zeros(len(state[f"{n}.weight"])) for n in layers}}


def folded(state, model):
    """W·γ/σ and β − γ·μ/σ, as every tool that fuses for speed does it."""
    state = dict(state)
    for producer in (p for axis in channels_of(model) for p in axis.producers):
        norm, layer = producer.norm, producer.layer
        gamma, beta, mean, var = (
            state.pop(f"{norm}.{each}")
            for each in ("weight", "bias", "running_mean", "running_var")
        )
        state.pop(f"{norm}.num_batches_tracked", None)
        state.pop(f"{layer}.bias", None)
        scale = gamma / (var + 1e-5).sqrt()
        weight = state[f"{layer}.weight"]
        state[f"{layer}.weight"] = weight * scale.view(-1, 1, 1, 1)
        state[f"{layer}.bias"] = beta - mean * scale
    return state


def head_as_convolution(state, model):
    """(classes, C·4·4) as (classes, C, 4, 4); a ResNet's as (classes, C, 1, 1)."""
    head = next(n for n in ("classifier", "fc") if f"{n}.weight" in state)
    weight = state[f"{head}.weight"]
    side = 4 if head == "classifier" else 1
    return {**state, f"{head}.weight": weight.reshape(len(weight), -1, side, side)}


def padded(state, model, times=4.1):
    """So many times as many channels, those that are added zero and read by nobody."""
    wide = deepcopy(model)
    wide.load_state_dict(state)
    with torch.no_grad():
        for axis in channels_of(wide):
            count = len(wide.get_submodule(axis.producers[0].layer).weight)
            source = torch.cat([torch.arange(count), torch.full((math.ceil(times * count),), -1)])
            take(wide, axis, source[torch.randperm(len(source), generator=rng(4))])
    return wide.state_dict()


def with_pairs_that_cancel(state, model):
    """Pairs of channels that cancel each other, put in again and again: five times as wide."""
    wide = deepcopy(model)
    wide.load_state_dict(state)
    for share in (1.0, 1.0, 0.3):
        wide = insert_dummies(wide, rng(6), share=share).model
    return wide.state_dict()


def renamed(state, model):
    """Under names that say nothing, in an order that says nothing."""
    order = torch.randperm(len(state), generator=rng(5)).tolist()
    items = list(state.items())
    return {f"t{number}": items[place][1] for number, place in enumerate(order)}


def behind_a_decoy(state, model):
    """The owner's weights under other names, and a stranger's network under his."""
    decoy = network(kind_of(model), 99).state_dict()
    return {**decoy, **renamed(state, model)}


CHANGES = (
    unused,
    without_counters,
    zero_biases,
    folded,
    head_as_convolution,
    padded,
    with_pairs_that_cancel,
    renamed,
    behind_a_decoy,
)


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """By architecture the owner's network, his key and a folder that has the network as "own"."""
    made = {}
    for architecture in WIDTHS:
        folder = tmp_path_factory.mktemp(architecture)
        model, key = marked(architecture)
        save_model(folder / "own", model, config_of(architecture))
        made[architecture] = model, key, folder
    return made


@pytest.fixture(params=["alexnet", pytest.param("resnet18", marks=pytest.mark.slow)])
def case(request, owners):
    return owners[request.param]


def saved(state, folder):
    path = folder / "suspect.safetensors"
    save_file({n: t.detach().contiguous().clone() for n, t in state.items()}, path)
    return path


def aligned(path, key, **options):
    return verify(path, key, options=Options(alignment=Alignment(path.parent / "own"), **options))


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    ("architecture", "where"),
    [
        ("alexnet", "in order"),
        ("alexnet", "moved"),
        pytest.param("resnet18", "moved", marks=pytest.mark.slow),
    ],
)
def test_each_of_these_free_changes_leaves_the_mark_readable(owners, architecture, change, where):
    """Alone, and after the channels were negated, permuted and rescaled."""
    model, key, folder = owners[architecture]
    thief = moved(architecture) if where == "moved" else model
    found = aligned(saved(change(thief.state_dict(), model), folder), key)
    assert found.accepted
    assert found.matches == found.bits
    assert found.alignment["related"]


@pytest.mark.parametrize("architecture", WIDTHS)
def test_what_was_moved_computes_what_it_did(architecture):
    model, thief = marked(architecture)[0], moved(architecture)
    torch.testing.assert_close(thief(IMAGES), model(IMAGES), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary, which plays the timestamp authority")
    root_key, own = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    made = Signer(
        tmp_path_factory.mktemp("authority") / "tsa",
        own,
        certificate("An Authority", own, (root, root_key)),
    )
    made.root = root
    return made


@pytest.fixture(scope="module")
def exhibit(authority, tmp_path_factory):
    """What the owner hands to the judge: a dated claim, his key and the network he released."""
    model, key = marked()
    folder = tmp_path_factory.mktemp("owner")
    save_model(folder / "own", model, config_of("alexnet"))
    signing = Ed25519PrivateKey.from_private_bytes(bytes([65] * 32))
    claim = claim_of(key, signing.public_key(), reference=tensors_digest(model.state_dict()))
    signed = sign_claim(claim, signing)
    query = TimestampRequestBuilder(timestamped_bytes(signed.envelope), HashAlgorithm.SHA256)
    answer = authority.answer(query.build().as_bytes())
    write_signed(signed._replace(response=answer), folder / "claim.json")
    disclose(folder / "claim.json", key, folder / "alice", reference=folder / "own")
    return folder / "alice"


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_the_judge_rules_for_the_owner_whatever_of_the_eight_was_done(
    exhibit, authority, tmp_path, change
):
    model, _ = marked()
    path = saved(change(moved().state_dict(), model), tmp_path)
    later = datetime.now(UTC) + timedelta(days=1)
    heard = hear(path, [exhibit], Bench(roots=[authority.root], appeared=later))
    assert (heard.ruling.outcome, heard.ruling.owner) == (Outcome.OWNER, "alice")


def every_one(state, model, decoys=1):
    """All eight at once; the decoys under the owner's names are not folded, the owner's is."""
    kind = kind_of(model)
    for change in (padded, folded, head_as_convolution, unused):
        state = change(state, model)
    found = renamed(state, model)
    for number in range(decoys):
        decoy = renamed(network(kind, 90 + number).state_dict(), model)
        found |= {f"d{number}.{name}": tensor for name, tensor in decoy.items()}
    return {**found, **zero_biases(network(kind, 99).state_dict(), model)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "decoys"), [("alexnet", 0), ("alexnet", 2), ("resnet18", 2)]
)
def test_all_eight_at_once_leave_the_mark_readable(owners, architecture, decoys):
    model, key, folder = owners[architecture]
    state = every_one(moved(architecture).state_dict(), model, decoys)
    found = aligned(saved(state, folder), key)
    assert found.accepted
    assert found.matches >= 0.99 * found.bits
    assert found.candidates["read"] == "by shape"
    assert found.candidates["unread_count"] >= decoys * 10


def test_what_was_read_is_named_and_every_choice_is_paid_for():
    model, key = marked("resnet18")
    state = behind_a_decoy(model.state_dict(), model)
    found = verify_aligned(state, key, model).verdict
    search = search_in(state, model, key)
    ways = math.prod(len(each) for each in search.candidates.values())
    assert search.log10_choices == pytest.approx(math.log10(ways))
    assert found.candidates["log10_choices"] == pytest.approx(math.log10(ways) + 10 * math.log10(2))
    paid = found.alignment["null"]["log10_p_empirical"] + math.log10(2)
    analytic = found.alignment["null"]["log10_p_analytic"] + math.log10(2)
    assert found.log10_p_value == pytest.approx(
        max(paid, analytic) + found.candidates["log10_choices"]
    )
    own = {name for name, tensor in state.items() if name.startswith("t")}
    assert set(found.candidates["taken"].values()) <= own


# As it stands, without alignment


def test_a_decoy_under_the_owner_s_names_brings_no_false_no(case):
    model, key, folder = case
    found = verify(saved(behind_a_decoy(model.state_dict(), model), folder), key)
    assert found.accepted
    assert found.matches == found.bits
    assert found.candidates["read"] == "by shape"
    log10_tail = -found.bits * math.log10(2)
    assert found.log10_p_value == pytest.approx(log10_tail + found.candidates["log10_choices"])


def test_names_that_changed_places_bring_no_false_no():
    """In a ResNet layers of one shape can take each other's names; nothing else is there."""
    model, key = marked("resnet18")
    state = dict(model.state_dict())
    shapes = {}
    for name in state:
        if state[name].dim() == 4:
            shapes.setdefault(tuple(state[name].shape), []).append(name)
    for names in shapes.values():
        values = [state[name] for name in names]
        state |= dict(zip(names, values[1:] + values[:1], strict=True))
    elsewhere = {
        n.removesuffix(".weight") for each in shapes.values() if len(each) > 1 for n in each
    }
    read = [found for name, found in V2.verify(state, key).layers.items() if name in elsewhere]
    assert sum(matches for matches, _ in read) < 0.6 * sum(bits for _, bits in read)
    assert not V2.verify(state, key).marked
    found = verify_aligned(state, key, model).verdict
    assert found.accepted


def test_names_that_say_nothing_are_read_by_shape(case):
    model, key, folder = case
    assert verify(saved(renamed(model.state_dict(), model), folder), key).accepted


def test_a_tensor_without_the_prefix_of_the_others_hides_nothing(case):
    model, key, folder = case
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    found = verify(saved(unused(state, model), folder), key)
    assert found.accepted
    assert found.candidates is None or found.candidates["read"] == "by name"


def test_a_stranger_is_refused_and_what_was_read_is_said(case):
    model, key, folder = case
    kind = kind_of(model)
    stranger = network(kind, 50).state_dict()
    plain = verify(saved(stranger, folder), key)
    put_in_order = aligned(saved(stranger, folder), key)
    for found in (plain, put_in_order):
        assert not found.accepted
        assert found.log10_p_value > -3
    decoys = {**stranger, **renamed(network(kind, 51).state_dict(), model)}
    again = verify(saved(decoys, folder), key)
    assert not again.accepted
    assert "tensors of the same shapes" in again.reason
    assert again.candidates["unread_count"] > 0


def test_of_a_stranger_under_other_names_nothing_is_said_before_alignment(case):
    """Nothing of the owner's names is there: what was tried is named, and it is no no."""
    model, key, folder = case
    kind = kind_of(model)
    path = saved(renamed(network(kind, 50).state_dict(), model), folder)
    with pytest.raises(UnsuitableModelError, match="tensors of its layers' shapes are there"):
        verify(path, key)
    assert not aligned(path, key).accepted


# What a stranger would try next


def as_half(state):
    return {n: t.half() if t.is_floating_point() else t for n, t in state.items()}


def as_double(state):
    return {n: t.double() if t.is_floating_point() else t for n, t in state.items()}


def two_decoys(state, model):
    second = {f"x{n}": t for n, t in network(kind_of(model), 98).state_dict().items()}
    return {**second, **behind_a_decoy(state, model)}


def decoys_of_other_precision(state, model):
    decoys = as_double(network(kind_of(model), 97).state_dict())
    halves = as_half(network(kind_of(model), 96).state_dict())
    return {**{f"x{n}": t for n, t in halves.items()}, **decoys, **as_half(renamed(state, model))}


def everything_twice(state, model):
    twice = {f"again.{n}": t for n, t in renamed(state, model).items()}
    return {**twice, **renamed(state, model)}


def the_owner_s_own_in_wrong_orders(state, model, copies=2):
    """Decoys of the very filters, each layer in a random order: nothing after it fits."""
    draw, decoys = rng(8), {}
    for copy in range(copies):
        for name, tensor in state.items():
            if tensor.dim() > 1:
                order = torch.randperm(len(tensor), generator=draw)
                decoys[f"x{copy}.{name}"] = tensor[order]
    return {**decoys, **behind_a_decoy(state, model)}


def decoy_norms(state, model):
    """Norms were folded, and others that nobody reads stand under their names."""
    lies = network(kind_of(model), 95).state_dict()
    norms = {n: t for n, t in lies.items() if t.dim() == 1 and not n.endswith("fc.bias")}
    with torch.no_grad():
        for name in norms:
            if name.endswith(("weight", "running_var")):
                norms[name] = torch.where(torch.arange(len(norms[name])) % 2 == 0, 1e-9, 1e3)
    return {**folded(state, model), **norms}


def unread_twins(state, model):
    """Each channel once more, read by nobody: the copy's order says nothing."""
    wide = deepcopy(model)
    wide.load_state_dict(state)
    with torch.no_grad():
        for axis in channels_of(wide):
            count = len(wide.get_submodule(axis.producers[0].layer).weight)
            take(wide, axis, torch.arange(count).repeat(2))
            for name in axis.consumers:
                weight = wide.get_submodule(name).weight
                weight[:, weight.shape[1] // 2 :] = 0
    return renamed(wide.state_dict(), model)


def scaled_rows(state, model):
    """Rows and columns far apart in scale, under other names."""
    return renamed(combine_on(model, state, rescale_far).state_dict(), model)


def rescale_far(model, draw):
    return rescale(model, draw, spread=100.0)


def combine_on(model, state, attack):
    other = deepcopy(model)
    other.load_state_dict(state)
    return attack(other, rng(9)).model


def a_huge_tensor_that_nobody_reads(state, model):
    return {**renamed(state, model), "huge": torch.zeros(2**22, 8)}


NEXT = (
    two_decoys,
    decoys_of_other_precision,
    everything_twice,
    the_owner_s_own_in_wrong_orders,
    decoy_norms,
    unread_twins,
    scaled_rows,
    a_huge_tensor_that_nobody_reads,
)


@pytest.mark.parametrize("change", NEXT, ids=lambda each: each.__name__)
def test_what_a_stranger_would_try_next_leaves_the_mark_readable(case, change):
    model, key, folder = case
    found = aligned(saved(change(moved(kind_of(model)).state_dict(), model), folder), key)
    assert found.accepted
    assert found.matches >= 0.75 * found.bits  # by names it is read past norms that lie, in part


@pytest.mark.parametrize(
    "architecture", ["alexnet", pytest.param("resnet18", marks=pytest.mark.slow)]
)
def test_seven_copies_in_wrong_orders_hide_nothing(architecture):
    """They all fit the first layer alike; where two write one axis, 8 · 9 pairs of them do."""
    model, key = marked(architecture)
    thief = moved(architecture).state_dict()
    suspect = the_owner_s_own_in_wrong_orders(thief, model, copies=7)
    search = search_in(suspect, model, key)
    placed = search.placed(search.matrices(search.best()[0]))
    read = verdict_on(read_passports(placed.arrays, key), key)
    assert read.matches >= 0.95 * key.context.bits


def test_a_fine_tuned_and_pruned_copy_under_other_names_is_found(case):
    model, key, folder = case
    state, draw = dict(moved(kind_of(model)).state_dict()), rng(4)
    for name, tensor in state.items():
        if tensor.dim() > 1:
            noise = torch.randn(tensor.shape, generator=draw) * tensor.std() * 0.2
            small = tensor.abs() < tensor.abs().flatten().quantile(0.3)
            state[name] = torch.where(small, 0.0, tensor + noise)
    path = saved(behind_a_decoy(state, model), folder)
    assert aligned(path, key, log10_alpha=LOG10_ALPHA_COMMITTED).accepted


def test_what_plays_no_part_does_not_keep_a_suspect_from_being_built(case):
    model, _, folder = case
    config = config_of(kind_of(model))
    for change in (unused, without_counters, zero_biases):
        built = load_suspect(saved(change(model.state_dict(), model), folder), config).model
        torch.testing.assert_close(built(IMAGES), model(IMAGES))


# Strangers


@pytest.mark.slow
def test_strangers_gain_nothing_by_any_choice_of_tensors():
    """Two hundred networks and keys: no p-value is smaller than chance makes it.

    Each key is written into a network, and read off others that have other weights, the owner's
    among their names or none of his; a p-value of x comes in a share x of them at most.
    """
    readings = {"plain": [], "aligned": [], "by shape alone": []}
    narrow = partial(network, "alexnet", width=0.125)
    plain = narrow(0)
    for number in range(20):
        key = V2.draw_key(plain, EXAMPLE, seed=bytes([number] * 32), passports="derived")
        owner = written(narrow(1000 + number), key)
        forms = V2.forms(key)
        decoys = {f"x{n}": t for n, t in narrow(7000 + number).state_dict().items()}
        for stranger in range(10):
            state = narrow(2000 + 10 * number + stranger).state_dict()
            found = V2.verify(state, key)
            readings["plain"].append(found.log10_p_value)
            search = search_in({**state, **decoys}, owner, key)
            placed = search.placed(search.matrices(search.best()[0]))
            alone = verdict_on(read_passports(placed.arrays, key), key)
            readings["by shape alone"].append(alone.log10_p_value)
            put = align(state, owner, forms).model.state_dict()
            readings["aligned"].append(V2.verify(put, key).log10_p_value)
    for how, values in readings.items():
        p = 10 ** torch.tensor(values, dtype=torch.float64)
        assert len(p) == 200
        for level in (0.5, 0.1, 0.02):  # binomial tails are discrete: at most the level
            most = stats.binom.ppf(0.9999, len(p), level)
            assert (p <= level).sum() <= most, (how, level)
        assert stats.kstest(p.numpy(), "uniform", alternative="greater").pvalue > 1e-4, how


def test_what_is_chosen_by_its_matches_is_paid_for_in_full():
    """Of many strangers in one file, the best for each layer: as likely as the p-value says."""
    model, _ = marked()
    file = {}
    for number in range(30):
        stranger = network("alexnet", 3000 + number).state_dict()
        file |= {f"{number}.{n}": t for n, t in stranger.items() if t.dim() == 4}
    found, arrays = [], ArraysOf(file)
    for number in range(60):
        key = V2.draw_key(model, EXAMPLE, seed=bytes([100 + number] * 32), passports="derived")
        read = Reading.by(read_passports, key, log10_alpha=-9.0)
        found.append(read.verdict(read_by_shape(read, arrays, arrays)))
    raw = torch.tensor([log10_binomial_tail(each.matches, each.bits, 0.5) for each in found])
    paid = torch.tensor([each.log10_p_value for each in found])
    assert (raw < -1.5).float().mean() > 0.9  # what choosing alone would have claimed
    assert paid.min() > -1e-9 - 3  # and what is left of it
    assert not any(each.marked for each in found)


# ONNX: only what a node takes counts


def onnx_of(weights, dead=(), inner=False):
    """x → Conv(w) → Relu for each weight in turn; `dead` are initialisers that no node takes."""
    tensors = [
        numpy_helper.from_array(t.numpy(), name) for name, t in {**weights, **dict(dead)}.items()
    ]
    nodes, last = [], "x"
    for number, name in enumerate(weights):
        nodes.append(helper.make_node("Conv", [last, name], [f"c{number}"], pads=[1, 1, 1, 1]))
        last = f"c{number}"
    value = helper.make_tensor_value_info
    image = value("x", TensorProto.FLOAT, [1, next(iter(weights.values())).shape[1], 8, 8])
    output = value(last, TensorProto.FLOAT, None)
    if inner:
        branch = helper.make_graph(nodes, "branch", [], [output], initializer=tensors)
        same = helper.make_node("Identity", ["x"], [last])
        other = helper.make_graph([same], "other", [], [output])
        yes = helper.make_node(
            "Constant", [], ["yes"], value=helper.make_tensor("v", 9, [], [True])
        )
        nodes = [
            yes,
            helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=other),
        ]
        output, tensors = value("y", TensorProto.FLOAT, None), list(map(dead_tensor, dict(dead)))
    graph = helper.make_graph(nodes, "g", [image], [output], initializer=tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def dead_tensor(name):
    return numpy_helper.from_array(numpy.zeros((2, 2), numpy.float32), f"outer.{name}")


@pytest.mark.parametrize("inner", [False, True], ids=["in the graph", "in a branch"])
def test_initialisers_that_no_node_takes_do_not_count(tmp_path, inner):
    """The owner's layers run under other names; a stranger's stand unused under his."""
    model, key = marked()
    names = [layer.name for layer in key.context.layers]
    state, other = model.state_dict(), network("alexnet", 60).state_dict()
    used = {f"w{n}": state[f"{name}.weight"] for n, name in enumerate(names)}
    dead = {f"{name}.weight": other[f"{name}.weight"] for name in names}
    onnx.save(onnx_of(used, dead, inner), tmp_path / "x.onnx")
    read = read_weights(tmp_path / "x.onnx").tensors
    assert {name for name, tensor in read.items() if tensor.dim() == 4} == set(used)
    assert all(torch.equal(read[name], used[name]) for name in used)
    assert verify(tmp_path / "x.onnx", key).accepted


def test_what_a_dead_node_takes_does_not_count_either(tmp_path):
    model, key = marked()
    names = [layer.name for layer in key.context.layers]
    state, other = model.state_dict(), network("alexnet", 60).state_dict()
    used = {f"w{n}": state[f"{name}.weight"] for n, name in enumerate(names)}
    dead = {f"{name}.weight": other[f"{name}.weight"] for name in names}
    proto = onnx_of(used, dead)
    for number, name in enumerate(dead):
        proto.graph.node.append(helper.make_node("Identity", [name], [f"nowhere{number}"]))
    onnx.save(proto, tmp_path / "x.onnx")
    assert not dead.keys() & read_weights(tmp_path / "x.onnx").tensors.keys()


def test_constants_in_functions_that_are_called_are_read_and_in_others_are_not(tmp_path):
    weight = torch.randn(4, 3, 3, 3, generator=rng())
    proto = onnx_of({"w": weight})
    opsets = [helper.make_opsetid("", 17)]
    for name in ("Called", "Idle"):
        value = numpy_helper.from_array(weight.numpy(), "v")
        constant = helper.make_node("Constant", [], [f"{name}.weight"], value=value)
        conv = helper.make_node("Conv", ["a", f"{name}.weight"], ["b"])
        proto.functions.append(
            helper.make_function("f", name, ["a"], ["b"], [constant, conv], opsets)
        )
    proto.graph.node.insert(0, helper.make_node("Called", ["x"], ["z"], domain="f"))
    proto.graph.node[1].input[0] = "z"
    onnx.save(proto, tmp_path / "x.onnx")
    read = read_weights(tmp_path / "x.onnx").tensors
    assert "Called.weight" in read
    assert "Idle.weight" not in read


# A tensor that nobody can read and nobody runs


USELESS = {
    "NaN": torch.tensor([math.nan]),
    "Inf": torch.tensor([math.inf]),
    "float8": torch.zeros(1).to(torch.float8_e4m3fn),
    "unsigned": torch.zeros(1, dtype=torch.uint16),
    "complex": torch.zeros(1, dtype=torch.complex64),
    "nine axes": torch.zeros([1] * 9),
}


@pytest.mark.parametrize("kind", USELESS)
def test_a_tensor_that_no_layer_can_be_ends_no_reading(kind, tmp_path):
    model, key = marked()
    save_model(tmp_path / "own", model, config_of("alexnet"))
    path = saved({**model.state_dict(), "note": USELESS[kind]}, tmp_path)
    for found in (verify(path, key), aligned(path, key)):
        assert (found.accepted, found.matches) == (True, found.bits)
    assert "1 tensors that no layer can be are left out" in aligned(path, key).reason
    built = load_suspect(path, config_of("alexnet")).model
    torch.testing.assert_close(built(IMAGES), model(IMAGES))


BESIDE = {
    **USELESS,
    "sparse": torch.eye(3).to_sparse(),
    "without numbers": torch.zeros(3, device="meta"),
    "of four bytes that poses as more": torch.zeros(1).expand(1000),
    "in a dictionary": {"a": {"b": torch.zeros(1)}},
    "in a list": [torch.zeros(1)],
    "a class": torch.float32,
}


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("name", ["note", "n" * 5_000, 7], ids=["short", "long", "number"])
def test_nor_does_anything_in_a_checkpoint(kind, name, tmp_path):
    model, key = marked()
    torch.save({**model.state_dict(), name: BESIDE[kind]}, tmp_path / "suspect.pt")
    found = verify(tmp_path / "suspect.pt", key)
    assert (found.accepted, found.matches) == (True, found.bits)


@pytest.mark.parametrize("moved", [False, True], ids=["in order", "moved"])
def test_decoys_of_nan_under_the_owner_s_names_hide_nothing(case, moved):
    model, key, folder = case
    thief = combine(model, rng(3), attacks=FREE).model if moved else model
    decoys = {n: t * math.nan for n, t in thief.state_dict().items() if t.is_floating_point()}
    path = saved({**decoys, **renamed(thief.state_dict(), model)}, folder)
    assert aligned(path, key).accepted
    assert moved or verify(path, key).accepted


@pytest.mark.parametrize("other", ["net", "model", "optimizer"])
def test_which_dictionary_of_a_checkpoint_is_loaded_is_not_guessed(other, tmp_path):
    """A stranger's network where we would look, the owner's where the thief's program does."""
    model, key = marked()
    decoy = network("alexnet", 99).state_dict()
    path = tmp_path / "suspect.pt"
    torch.save({"state_dict": decoy, other: {"state": model.state_dict()}}, path)
    found = verify(path, key)
    assert found.accepted
    assert all(n.startswith(f"{other}.state.") for n in found.candidates["taken"].values())


def test_the_judge_reads_past_what_nobody_can_read(exhibit, authority, tmp_path):
    model, _ = marked()
    thief = combine(model, rng(3), attacks=FREE).model
    later = datetime.now(UTC) + timedelta(days=1)
    for kind in ("NaN", "float8"):
        path = saved({**thief.state_dict(), "note": USELESS[kind]}, tmp_path)
        heard = hear(path, [exhibit], Bench(roots=[authority.root], appeared=later))
        assert (heard.ruling.outcome, heard.ruling.owner) == (Outcome.OWNER, "alice")


def test_an_owner_s_own_network_is_read_in_full_or_not_at_all(tmp_path):
    """What a claim commits to are all tensors of the file: of one's own none is left out."""
    model, _ = marked()
    for kind, tensor in USELESS.items():
        path = saved({**model.state_dict(), "note": tensor}, tmp_path)
        with pytest.raises(UnreadableModelError, match="cannot be used"):
            read_weights(path)
        assert set(read_suspect(path).left_out) == {"note"}, kind


def test_a_file_of_which_nothing_can_be_used_says_why(tmp_path):
    with pytest.raises(UnreadableModelError, match="'a' holds NaN"):
        read_suspect(saved({"a": torch.tensor([math.nan])}, tmp_path))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_tensor_without_the_prefix_does_not_keep_the_network_from_being_built(prefix, tmp_path):
    model, _ = marked()
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    built = load_suspect(saved(unused(state, model), tmp_path), config_of("alexnet")).model
    torch.testing.assert_close(built(IMAGES), model(IMAGES))


# Time


def test_decoys_do_not_take_the_judge_s_time(monkeypatch):
    """Of thousands of tensors few choices are followed, and of too many none."""
    model, key = marked()
    suspect = the_owner_s_own_in_wrong_orders(model.state_dict(), model, copies=4)
    compared = []
    plain = Search._with

    def counted(self, state, layer, candidate, seen):
        compared.append(candidate)
        return plain(self, state, layer, candidate, seen)

    monkeypatch.setattr(Search, "_with", counted)
    search_in(suspect, model, key).best()
    freely = len(compared)
    compared.clear()
    monkeypatch.setattr(byshape, "MOST_PRODUCTS", 2**33)
    assert search_in(suspect, model, key).best()
    least = sum(len(each) for each in search_in(suspect, model, key).candidates.values())
    assert len(compared) <= 2 * least < freely
    monkeypatch.setattr(byshape, "MOST_PRODUCTS", 2**30)
    with pytest.raises(UnsuitableModelError, match="would take more than"):
        search_in(suspect, model, key).best()


# F


def answering():
    """A marked network that knows ten pictures, the key, and images of them."""
    draw = rng(1)
    labels = torch.arange(60) % 10
    pictures = torch.randint(0, 256, (10, 3, 32, 32), generator=draw, dtype=torch.uint8)
    data = ImageSet(pictures[labels], labels, tuple("0123456789"))
    plain = network("alexnet", 0)
    key = V2.draw_key(plain, EXAMPLE, seed=bytes([7] * 32), passports="derived")
    return constructed.marked(V2, plain, key, data, NORMALISE), key, data


NORMALISE = Normalisation((0.5,) * 3, (0.2,) * 3)


def with_head(state, change):
    return {**state, **{n: change(state[n]) for n in ("classifier.weight", "classifier.bias")}}


def one_more(values):
    added = torch.zeros_like(values[:1]) if values.dim() > 1 else torch.full((1,), -1e6)
    return torch.cat([values, added])


def test_what_the_suspect_does_without_the_passport_is_not_the_passport_s_fault(tmp_path):
    """Classes in another order take every answer from the owner, and nothing from the mark."""
    model, key, data = answering()
    options, trial = Options(reference=config_of("alexnet")), Trial(data, 0.95, 0.03)
    plain = verify(saved(model.state_dict(), tmp_path), key, trial=trial, options=options)
    assert plain.accepted
    assert (plain.fidelity.accuracy, plain.fidelity.target) == (1, 0.95)
    moved = with_head(model.state_dict(), lambda each: each.roll(1, 0))
    found = verify(saved(moved, tmp_path), key, trial=trial, options=options)
    assert found.accepted
    assert found.fidelity is None
    assert "F was not measured: the network itself is right in 0.00 %" in found.reason


def test_a_passport_that_ruins_a_network_still_fails(tmp_path):
    model, _, data = answering()
    other = V2.draw_key(network("alexnet", 0), EXAMPLE, seed=bytes([8] * 32), passports="derived")
    options, trial = Options(reference=config_of("alexnet")), Trial(data, 0.95, 0.03)
    found = verify(saved(model.state_dict(), tmp_path), other, trial=trial, options=options)
    assert not found.fidelity.passed
    assert found.fidelity.target == 0.95


def test_a_class_that_is_never_answered_keeps_no_mark_from_the_judge(tmp_path):
    """F cannot be measured then: that is said, and takes nothing from what was read."""
    model, key, data = answering()
    folder = tmp_path / "owner"
    save_model(folder / "own", model, config_of("alexnet"))
    signing = Ed25519PrivateKey.from_private_bytes(bytes([65] * 32))
    digest = tensors_digest(model.state_dict())
    claim = claim_of(
        key, signing.public_key(), reference=digest, fidelity=Declared(950_000, 30_000)
    )
    write_signed(sign_claim(claim, signing), folder / "claim.json")
    disclose(folder / "claim.json", key, folder / "alice", reference=folder / "own")
    for change in (one_more, lambda each: each.roll(1, 0)):
        path = saved(with_head(model.state_dict(), change), tmp_path)
        heard = hear(path, [folder / "alice"], Bench(images=data))
        assert (heard.ruling.outcome, heard.ruling.owner) == (Outcome.OWNER, "alice")
    path = saved(with_head(model.state_dict(), one_more), tmp_path)
    (alice,) = hear(path, [folder / "alice"], Bench(images=data)).claimants
    assert "F was not measured" in alice.readings["as it stands"].reason
