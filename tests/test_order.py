"""Scheme `order`: units where the key has them, exactly; and what a forger of such keys can do."""

import hashlib
import hmac
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from constructed import small_alexnet
from safetensors.numpy import save_file
from scipy import stats
from scipy.optimize import linear_sum_assignment
from test_compare import AXES, FIRST, SECOND, drawn, permuted, shaken
from torch import nn

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.alignment.order import log10_fixed_points
from nnpassport.alignment.reorder import reordered
from nnpassport.catalog import with_settings
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.schemes.channels import ANY
from nnpassport.embedding.schemes.graft import graft
from nnpassport.embedding.schemes.order import ORDER
from nnpassport.embedding.schemes.passport import V2
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.config import ModelConfig
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.keys.context import Context, OrderedAxis, OrderForm
from nnpassport.keys.counts import verdict_on
from nnpassport.keys.derive import length_prefixed
from nnpassport.keys.key import Key, sketch_digest
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.keys.order import own_orders, read_placed
from nnpassport.keys.ordered import chosen_axes, seen, sketch_of
from nnpassport.keys.reading import READERS
from nnpassport.scheme import (
    BadRecipeError,
    OtherAnchorError,
    UnreadableKeyError,
    UnsuitableModelError,
)
from nnpassport.verification.licensees import original_of, trace_arrays
from nnpassport.verification.verdicts import Alignment, Options, verify

NONCE = bytes(16)


def key_for(arrays, axes=AXES, seed=0, nonce=NONCE, **changed):
    """A key whose anchor is this network, as `ORDER.draw_key` makes it; parts of it changed."""
    anchor, chosen = arrays_digest(arrays), chosen_axes(axes, arrays)
    sketch = sketch_of(axes, chosen, arrays, anchor=anchor, nonce=nonce)
    sketch = changed.get("sketch", sketch)
    form = OrderForm(axes.digest, sketch_digest(sketch), changed.get("chosen", chosen))
    context = Context("order", "Alice", (), None, nonce, anchor=anchor, order=form)
    table = np.frombuffer(axes.to_bytes(), np.uint8)
    return Key(seed.to_bytes(32, "big"), context, table=table, sketch=sketch)


def put_in_order(arrays, key, axes=AXES):
    return reordered(axes, arrays, own_orders(key))


def fixed(arrays, key):
    """Units in place, of all."""
    return read_placed(arrays, key).fixed


@pytest.fixture(scope="module")
def anchor():
    return drawn(0)


@pytest.fixture(scope="module")
def key(anchor):
    return key_for(anchor)


@pytest.fixture(scope="module")
def released(anchor, key):
    return put_in_order(anchor, key)


# Deriving and reading


def test_an_order_is_derived_as_the_specification_says(key):
    """With nothing but the standard library."""
    digests = (bytes.fromhex(key.context.anchor), bytes.fromhex(key.context.order.table))
    bound = hashlib.sha256(length_prefixed(*digests, (1).to_bytes(8, "big"))).digest()
    info = length_prefixed(b"nnpassport/v1", b"order", b"", bound)
    salt = hashlib.sha256(key.context.encode()).digest()
    extracted = hmac.digest(salt, key.seed, "sha256")
    stream = hashlib.shake_256(hmac.digest(extracted, info + b"\x01", "sha256"))
    words = [stream.digest(16 * SECOND)[16 * n : 16 * n + 16] for n in range(SECOND)]
    assert own_orders(key)[1].tolist() == sorted(range(SECOND), key=words.__getitem__)


def test_what_a_sketch_has_is_drawn_as_the_specification_says(key):
    (axis,) = (each for each in key.context.order.axes if each.number == 0)
    look = seen(AXES, axis, anchor=key.context.anchor, nonce=NONCE)
    assert look.units.tolist() == list(range(FIRST))
    ((name, shape),) = axis.tensors
    assert (name, shape) == ("0.weight", (FIRST, 64))
    assert look.columns[name].tolist() == list(range(64))  # all of them: there are no more
    wide = drawn(0, (1000, FIRST, SECOND, 10))
    other = key_for(wide)
    (axis,) = (each for each in other.context.order.axes if each.number == 0)
    parts = (b"nnpassport/order-sketch", NONCE, bytes.fromhex(other.context.anchor))
    parts += (bytes.fromhex(AXES.digest), bytes(8), b"0.weight")
    words = np.frombuffer(hashlib.shake_256(length_prefixed(*parts)).digest(8 * 999), ">u8")
    expected = sorted(dict.fromkeys(int(word) % 1000 for word in words))
    found = seen(AXES, axis, anchor=other.context.anchor, nonce=NONCE).columns["0.weight"]
    assert len(found) == 128
    assert set(found) <= set(expected)
    assert found.tolist() == sorted([*dict.fromkeys(int(w) % 1000 for w in words)][:128])


def test_units_in_place_are_counted_as_a_brute_force_reading_does(anchor, key):
    """The whole copy is put back, but for the axis itself, and the sketch's numbers compared."""
    copy = shaken(put_in_order(anchor, key), 0.5, seed=3)
    orders, found = own_orders(key), read_placed(copy, key).axes
    for axis in key.context.order.axes:
        others = {n: np.argsort(order) for n, order in orders.items() if n != axis.number}
        back, likeness = reordered(AXES, copy, others), 0
        columns = seen(AXES, axis, anchor=key.context.anchor, nonce=NONCE).columns
        for name, some in columns.items():
            dimension = 0 if name == f"{2 * axis.number}.weight" else 1
            rows, theirs = (
                _unit(np.moveaxis(e[name], dimension, 0)[:, some]) for e in (back, anchor)
            )
            likeness = likeness + rows @ theirs.T
        matched = linear_sum_assignment(likeness, maximize=True)[1]
        count = int((matched == orders[axis.number]).sum())
        assert abs(found[f"axis {axis.number}"][0] - count) <= 2  # a sketch is of whole numbers


def test_the_owner_s_copy_is_found_whatever_is_done_to_its_numbers(released, key):
    total = FIRST + SECOND
    assert fixed(released, key) == total
    assert read_placed(released, key).log10_tail == log10_fixed_points(total, [FIRST, SECOND])
    assert fixed(shaken(released, 0.5), key) > 0.8 * total
    rounded = {n: np.rint(4 * each / each.std()) for n, each in released.items()}
    assert fixed({n: each.astype(np.float32) for n, each in rounded.items()}, key) == total
    pruned = {n: each * (abs(each) > 0.7 * each.std()) for n, each in released.items()}
    assert fixed(pruned, key) > 0.8 * total
    halved = {n: each.astype(np.float16) for n, each in released.items()}
    assert fixed(halved, key) == total


def test_what_a_thief_permutes_is_gone(released, key):
    assert fixed(permuted(released), key) < 12


def test_keys_that_are_not_its_own_read_one_unit_on_each_axis(released, key):
    """Exact, so that p is uniform once ties of whole numbers are broken by lot."""
    rng, counts, uniform = np.random.default_rng(0), [], []
    for seed in range(1, 151):
        other = replace(key, seed=seed.to_bytes(32, "big"))
        counts.append(count := fixed(released, other))
        at, above = (10 ** log10_fixed_points(n, [FIRST, SECOND]) for n in (count, count + 1))
        uniform.append(above + rng.random() * (at - above))
    assert np.mean(counts) == pytest.approx(2, abs=0.5)
    assert max(counts) <= 11
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_a_verdict_says_what_chance_gives(released, key):
    verdict = verdict_on(READERS["order"](released, key), key)
    assert verdict.accepted
    assert (verdict.bits, verdict.matches) == (FIRST + SECOND, FIRST + SECOND)
    assert "chance has 2 right" in verdict.reason
    assert verdict.layers == {"axis 0": (FIRST, FIRST), "axis 1": (SECOND, SECOND)}
    assert verdict.log10_p_value == log10_fixed_points(FIRST + SECOND, [FIRST, SECOND])


def test_what_is_missing_counts_as_out_of_place(released, key):
    def without(name):
        return {n: each for n, each in released.items() if n != name}

    (told_by,) = {n for axis in key.context.order.axes for n, _ in axis.tensors} & {"0.weight"}
    spoiled = {**released, told_by: np.full_like(released[told_by], np.nan)}
    for there in (without(told_by), {**released, told_by: released[told_by].T}, spoiled):
        found = read_placed(there, key)
        assert found.axes["axis 1"] == (SECOND, SECOND)
        assert found.axes["axis 0"][0] <= 5
        assert found.log10_tail > log10_fixed_points(SECOND + 6, [FIRST, SECOND])
    with pytest.raises(UnsuitableModelError, match="no tensor that units are told by"):
        read_placed({"x": released["0.weight"]}, key)


# What a forger may try


def test_whoever_changes_anything_that_a_key_is_bound_to_draws_every_order_anew(anchor, key):
    orders = own_orders(key)
    sketch = {n: each.copy() for n, each in key.sketch.items()}
    sketch["0"][0, 0] ^= 1
    moved = {**anchor, "0.bias": anchor["0.bias"] + 1e-3}
    table = replace(AXES, unknown=("Mystery",))
    for other in (
        key_for(anchor, sketch=sketch),
        key_for(moved),
        key_for(anchor, axes=table),
        key_for(anchor, nonce=b"1" * 16),
        key_for(anchor, seed=1),
    ):
        for number, order in own_orders(other).items():
            assert (order == orders[number]).sum() < 9


def test_a_key_with_another_sketch_or_table_than_its_context_names_is_refused(key):
    sketch = {n: each.copy() for n, each in key.sketch.items()}
    sketch["0"][0, 0] ^= 1
    table = np.frombuffer(replace(AXES, unknown=("x",)).to_bytes(), np.uint8)
    for changed in ({"sketch": sketch}, {"table": table}, {"sketch": None}, {"table": None}):
        with pytest.raises(UnreadableKeyError):
            replace(key, **changed)
    with pytest.raises(UnreadableKeyError, match="a context with orders"):
        Key(key.seed, replace(key.context, scheme="another", order=None), table=key.table)


def test_a_sketch_that_is_fitted_to_the_suspect_does_not_help(released):
    """He takes the suspect as his anchor, in the order that his last try would have needed."""
    arrays, best = dict(released), 0
    for seed in range(60):
        forged = key_for(arrays, seed=seed)
        best = max(best, fixed(released, forged))
        back = {number: np.argsort(order) for number, order in own_orders(forged).items()}
        arrays = reordered(AXES, released, back)  # with these orders all would be in place
    assert best < 14


def test_units_that_are_all_alike_and_a_sorted_sketch_do_not_help(anchor):
    """Rows that are equal are matched by lot, never by where the key's order has them."""
    alike = {**anchor, "0.weight": np.ones_like(anchor["0.weight"])}
    sums = anchor["0.weight"].sum(1)
    sorted_rows = anchor["0.weight"][np.argsort(-sums)]
    counts = []
    for seed in range(40):
        forged = key_for({**anchor, "0.weight": sorted_rows}, seed=seed)
        counts.append(read_placed(alike, forged).axes["axis 0"][0])
    assert max(counts) <= 7
    assert np.mean(counts) == pytest.approx(1, abs=0.6)


def ordered_axes(*axes):
    return tuple(OrderedAxis(*each) for each in axes)


ZERO, TWO, FOUR = (("0.weight", (96, 64)),), (("2.weight", (48, 96)),), (("4.weight", (10, 48)),)


@pytest.mark.parametrize(
    ("axes", "why"),
    [
        (ordered_axes((0, FIRST, TWO), (1, SECOND, FOUR)), "read later"),
        (ordered_axes((0, FIRST - 1, ZERO)), "another size"),
        (ordered_axes((7, FIRST, ZERO)), "not in the table"),
        (ordered_axes((0, FIRST, FOUR)), "0 dimensions"),
        (ordered_axes((0, FIRST, ZERO), (0, FIRST, TWO)), "read twice"),
        (ordered_axes((0, FIRST, ZERO), (1, SECOND, ZERO)), "read twice"),
        (ordered_axes((0, FIRST, (("0.weight", (90, 64)),))), "other tensors"),
        (ordered_axes((0, FIRST, ())), "1 to 8 names"),
        (ordered_axes((0, 5, ZERO)), "of 12 to 512"),
        ((), "no axes"),
    ],
)
def test_axes_whose_orders_would_depend_on_each_other_are_refused(anchor, axes, why):
    """Or that are not those of the table. One coin must not decide over two counts."""
    with pytest.raises(UnreadableKeyError, match=why):
        key_for(anchor, chosen=axes)


def test_axes_in_the_other_sequence_are_read_with_the_tensor_between_them(anchor):
    """Each tensor may tell the last of its axes: given the orders before, that one is uniform."""
    axes = ordered_axes((1, SECOND, FOUR), (0, FIRST, (*TWO, *ZERO)))
    key = key_for(anchor)
    both = key_for(anchor, chosen=axes, sketch=_sketch_for(anchor, axes))
    assert fixed(put_in_order(anchor, both), both) == FIRST + SECOND
    assert fixed(put_in_order(anchor, key), both) < 12


def _sketch_for(arrays, axes):
    return sketch_of(AXES, axes, arrays, anchor=arrays_digest(arrays), nonce=NONCE)


def test_an_axis_that_is_twice_in_a_tensor_does_not_tell_itself():
    square = {"a.weight": np.zeros((24, 24)), "b.weight": np.ones((24, 9))}
    rng = np.random.default_rng(0)
    square = {n: rng.standard_normal(each.shape) for n, each in square.items()}
    places = (Place("a.weight", 0), Place("a.weight", 1), Place("b.weight", 0))
    axes = Axes((Axis(24, "permute", (), places),), {}, {}, {}, {})
    (chosen,) = chosen_axes(axes, square)
    assert [name for name, _ in chosen.tensors] == ["b.weight"]
    with pytest.raises(UnreadableKeyError, match="2 dimensions"):
        key_in(axes, ordered_axes((0, 24, (("a.weight", (24, 24)),))), (24, 24))


def key_in(axes, chosen, shape):
    """A key of somebody who wrote the table and the form himself."""
    sketch = {"0": np.zeros(shape, np.int8)}
    form = OrderForm(axes.digest, sketch_digest(sketch), chosen)
    context = Context("order", "Eve", (), None, NONCE, anchor="ab" * 32, order=form)
    return Key(bytes(32), context, table=np.frombuffer(axes.to_bytes(), np.uint8), sketch=sketch)


def test_a_table_of_any_size_is_not_written_down(anchor):
    """Places are checked against the tensors' shapes before an index of them is made."""
    for place in (Place("0.weight", 0, 0, 2**30), Place("0.weight", 0, 0, 1, ((2**30, 1),) * 4)):
        axes = Axes((Axis(FIRST, "permute", (), (place,)),), {}, {}, {}, {})
        with pytest.raises(UnreadableKeyError, match="leaves it"):
            key_in(axes, ordered_axes((0, FIRST, ZERO)), (FIRST, 64))


def test_a_key_of_any_age_can_be_put_on_anybody_s_network(key):
    """As passports can: its date says nothing of a network's, and so the judge asks for one."""
    victim, orders, moved = drawn(77), own_orders(key), {}
    for axis in key.context.order.axes:  # the sequence in which they are read
        look = seen(AXES, axis, anchor=key.context.anchor, nonce=NONCE)
        (name, columns), *_ = look.columns.items()
        back = {n: np.argsort(orders[n])[order] for n, order in moved.items()}
        there = reordered(AXES, reordered(AXES, victim, moved), back) if moved else victim
        rows = np.moveaxis(there[name], 0, 0)[:, columns]
        theirs = key.sketch[str(axis.number)][:, : len(columns)].astype(np.float64)
        like = linear_sum_assignment(_unit(theirs) @ _unit(rows).T, maximize=True)[1]
        moved[axis.number] = like[orders[axis.number]]
    assert read_placed(reordered(AXES, victim, moved), key).log10_tail < -80
    assert fixed(victim, key) < 12


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Networks that run


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(256, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10)),
    ).eval()


def test_a_network_in_order_computes_what_it_did_and_has_the_mark():
    model, example = convolutional(), torch.randn(4, 1, 4, 4)
    with torch.no_grad():
        before = model(example)
        key = ORDER.draw_key(model, example, owner="Alice", seed=bytes(32))
        ORDER.insert(model, key, example)
        torch.testing.assert_close(model(example), before, rtol=1e-4, atol=1e-5)
    verdict = ORDER.verify(model.state_dict(), key)
    assert verdict.matches == verdict.bits == sum(key.context.order.units)
    state = {name: each.clone() for name, each in model.state_dict().items()}
    ORDER.insert(model, key, example)  # it is in order: left as it is
    assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
    torch.manual_seed(1)
    other = convolutional()
    other.load_state_dict(
        {n: torch.randn(e.shape) for n, e in state.items() if e.dim()}, strict=False
    )
    with pytest.raises(OtherAnchorError, match="neither"):
        ORDER.insert(other, key, example)
    assert key.seed.hex() not in repr(key) + repr(verdict) + json.dumps(verdict.as_dict())


def test_a_network_with_too_few_units_is_refused():
    small = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    with pytest.raises(UnsuitableModelError, match=r"16 units, which reach 10\^-13"):
        ORDER.draw_key(small, torch.randn(2, 8))
    with pytest.raises(UnsuitableModelError, match="no axis"):
        ORDER.draw_key(nn.Linear(8, 4), torch.randn(2, 8))
    with pytest.raises(UnsuitableModelError, match="neither layers nor a text"):
        ORDER.draw_key(convolutional(), torch.randn(4, 1, 4, 4), text="mine")


def test_an_order_and_then_a_passport_are_both_read_as_they_stand():
    """In this sequence: who orders what has a passport moves its channels and has to align it."""
    model, images = small_alexnet().eval(), torch.randn(64, 1, 32, 32)
    ordering = ORDER.draw_key(model, images[:2], seed=bytes(32))
    ORDER.insert(model, ordering, images[:2])
    layers = ["features.8", "features.11"]
    passport = V2.draw_key(model, images[:2], seed=bytes(32), layers=layers, seen=images)
    V2.insert(model, passport, images[:2])
    graft(model, images, limit=ANY)
    released = V2.released(model).eval()
    assert V2.verify(released.state_dict(), passport).match_rate == 1
    assert ORDER.verify(released.state_dict(), ordering).match_rate > 0.95
    later = ORDER.draw_key(released, images[:2], seed=b"1" * 32)
    ORDER.insert(released, later, images[:2])
    assert V2.verify(released.state_dict(), passport).match_rate < 0.8
    assert not ORDER.verify(released.state_dict(), ordering).marked


def test_nothing_is_aligned_for_a_key_of_an_order(tmp_path, key):
    options = Options(alignment=Alignment(tmp_path))
    save_file(put_in_order(drawn(0), key), tmp_path / "suspect.safetensors")
    assert verify(tmp_path / "suspect.safetensors", key).accepted
    with pytest.raises(UnsuitableModelError, match="alignment puts them into another"):
        verify(tmp_path / "suspect.safetensors", key, options=options)


def test_wrappers_prefixes_do_not_hide_an_order(tmp_path, released, key):
    wrapped = {f"_orig_mod.module.{name}": each for name, each in released.items()}
    save_file(wrapped, tmp_path / "suspect.safetensors")
    assert verify(tmp_path / "suspect.safetensors", key).match_rate == 1


def test_a_licensee_s_copy_has_an_order_upon_the_order(released, key):
    """Undone, the key's own mark is read; as it stands it is not."""
    original = original_of(released, AXES)
    leaked = reordered(AXES, released, original.orders(key, "Acme"))
    assert fixed(leaked, key) < 12
    found = trace_arrays(leaked, key, original, ["Acme", "Umbrella"])
    assert found.named == ("Acme",)
    assert found.verdict.match_rate == 1


@pytest.fixture
def house(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
    config = ModelConfig("alexnet", arguments, tuple("0123456789"), (1, 32, 32), (0.5,), (0.5,))
    save_model(tmp_path / "plain", small_alexnet().eval(), config)
    return tmp_path


def test_the_commands_draw_embed_release_and_verify(house, call):
    new = ("key", "new", "-o", "my.key", "--scheme", "order", "--model")
    code, _, errors = call(*new, "alexnet")
    assert code == 2
    assert "--model FOLDER" in errors
    code, _, errors = call(*new, "plain")
    assert code == 0
    assert "5 axes, 288 units whose order is read" in errors
    code, out, _ = call("key", "show", "my.key", "--json")
    assert json.loads(out)["axes"][0] == "axis 2: 64 units"
    made = ("embed", "--init", "plain", "--epochs", "0", "--data", "digits")
    assert call(*made, "--key", "my.key", "-o", "net")[0] == 0
    images = torch.randn(4, 1, 32, 32)
    answers = [load_model(house / each).model.eval()(images) for each in ("plain", "net")]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    assert call("release", "net", "--key", "my.key", "-o", "released")[0] == 0
    code, out, _ = call("verify", "released", "--key", "my.key", "--json")
    facts = json.loads(out)
    assert (code, facts["matches"], facts["bits"]) == (0, 288, 288)
    assert facts["log10_p_value"] == pytest.approx(-402.6, abs=0.1)
    assert call("verify", "plain", "--key", "my.key")[0] == 1
    code, _, errors = call("verify", "released", "--key", "my.key", "--align", "net")
    assert code == 2
    assert "the order is gone" in errors


def test_a_key_for_one_network_is_not_embedded_into_another(house, call):
    assert call("key", "new", "-o", "my.key", "--scheme", "order", "--model", "plain")[0] == 0
    save_model(house / "other", small_alexnet(seed=5).eval(), load_model(house / "plain").config)
    words = ("embed", "--epochs", "0", "--data", "digits", "--key", "my.key", "-o", "net")
    assert call(*words, "--init", "other")[0] == 2
    assert call(*words, "--model", "alexnet")[0] == 2
    assert not (house / "net" / "model.safetensors").exists()


def test_a_key_survives_its_file_and_an_altered_one_is_refused(tmp_path, key):
    save_key(key, tmp_path / "key")
    loaded = load_key(tmp_path / "key")
    assert loaded.fingerprint == key.fingerprint
    assert loaded.derived
    document = json.loads((tmp_path / "key").read_text())
    context = document["secret"]["context"].replace('"number":0', '"number":1')
    document["secret"]["context"] = context
    (tmp_path / "bad").write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))
    with pytest.raises(UnreadableKeyError):
        load_key(tmp_path / "bad")


def test_the_best_that_a_key_can_show_is_enough(key):
    assert log10_fixed_points(16, [16]) == pytest.approx(-math.log10(math.factorial(16)))
    assert read_placed(put_in_order(drawn(0), key), key).log10_tail < LOG10_ALPHA_COMMITTED
    with pytest.raises(BadRecipeError):
        with_settings(ORDER, strength=1)
