"""An order of hidden units for each licensee: the answers stay, and the leak has a name."""

import hashlib
import hmac
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_compare import AXES, FIRST, SECOND, drawn, network, permuted, shaken
from torch import nn

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.reorder import orderable, reordered, restored_order
from nnpassport.embedding import licensing
from nnpassport.embedding.axes import axes_of_folder
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.network.equations import read_bits
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.trace import trace
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.files.config import ModelConfig
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.derive import length_prefixed
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.keys.order import derive_order
from nnpassport.scheme import UnreadableKeyError, UnsuitableModelError
from nnpassport.verification.compare import compare
from nnpassport.verification.licensees import original_of, trace_arrays
from nnpassport.verification.lineage import Outcome

DIGEST = "ab" * 32
NAMES = ("Acme", "Umbrella", "Initech", "Café Ω")


def key_of(seed=0):
    layer = LayerShape("2", (SECOND, FIRST), (FIRST, 8), Geometry((), (), ()))
    return Key(bytes([seed] * 32), Context("passport-v2", "Alice", (layer,), None, bytes(16)))


def order(key, licensee="Acme", **changed):
    facts = {"network": DIGEST, "axes": DIGEST, "number": 0, "size": 64, **changed}
    return derive_order(key, licensee, **facts)


@pytest.fixture(scope="module")
def original():
    return original_of(drawn(0), AXES)


def copy_for(original, key, name):
    return reordered(original.axes, original.arrays, original.orders(key, name))


# Deriving


def test_an_order_is_derived_as_the_specification_says():
    """With nothing but the standard library."""
    key, name = key_of(), "Café Ω"
    bound = hashlib.sha256(
        length_prefixed(bytes.fromhex(DIGEST), bytes.fromhex(DIGEST), (5).to_bytes(8, "big"))
    ).digest()
    info = length_prefixed(b"nnpassport/v1", b"order", name.encode(), bound)
    salt = hashlib.sha256(key.context.encode()).digest()
    extracted = hmac.digest(salt, key.seed, "sha256")
    drawn_bytes = hashlib.shake_256(hmac.digest(extracted, info + b"\x01", "sha256")).digest(16 * 9)
    words = [drawn_bytes[16 * n : 16 * n + 16] for n in range(9)]
    expected = sorted(range(9), key=words.__getitem__)
    assert order(key, name, number=5, size=9).tolist() == expected


def test_whatever_an_order_is_bound_to_changes_it():
    first = order(key_of())
    assert sorted(first) == list(range(64))
    for other in (
        order(key_of(1)),
        order(key_of(), "acme"),
        order(key_of(), network="cd" * 32),
        order(key_of(), axes="cd" * 32),
        order(key_of(), number=1),
    ):
        assert (other == first).sum() < 10


def test_orders_are_uniform():
    """Every unit comes first equally often, and fixed points have their law."""
    found = np.stack([order(key_of(), f"licensee {n}", size=12) for n in range(3000)])
    counts = np.bincount(found[:, 0], minlength=12)
    assert abs(counts - 250).max() < 5 * math.sqrt(250)
    fixed = (found == np.arange(12)).sum(1)
    assert fixed.mean() == pytest.approx(1, abs=0.1)
    assert fixed.var() == pytest.approx(1, abs=0.15)


def test_a_licensee_without_a_name_is_refused():
    for name in ("", "x" * 1001, "a\nb"):
        with pytest.raises(UnreadableKeyError, match="printable name"):
            order(key_of(), name)


# Putting into order


def test_a_copy_computes_what_the_original_does():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(2, 24), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24 * 16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 10)),
    ).double()
    model(torch.randn(8, 1, 4, 4).double())  # running statistics of their own
    model.eval()
    example = torch.randn(2, 1, 4, 4).double()
    axes = prove(model, example, trace(model, example))
    arrays = {name: each.numpy().copy() for name, each in model.state_dict().items()}
    before = model(example)
    rng = np.random.default_rng(0)
    orders = {n: rng.permutation(size) for n, size in orderable(axes).items()}
    assert len(orders) >= 2
    moved = reordered(axes, arrays, orders)
    assert any((moved[name] != arrays[name]).any() for name in arrays)
    model.load_state_dict({name: torch.from_numpy(each) for name, each in moved.items()})
    torch.testing.assert_close(model(example), before)
    back = restored_order(axes, moved, orders)
    assert all((back[name] == arrays[name]).all() for name in arrays)


# Tracing


@pytest.mark.parametrize("name", NAMES)
def test_whose_copy_leaked_is_named_also_when_it_was_changed(original, name):
    leaked = shaken(copy_for(original, key_of(), name), 0.5)
    found = trace_arrays(leaked, key_of(), original, NAMES)
    assert found.named == (name,)
    first, *others = found.found
    assert first.fixed > 0.8 * first.units
    assert max(each.fixed for each in others) < 10


def test_names_that_got_no_copy_are_not_named(original):
    leaked = copy_for(original, key_of(), "Somebody else")
    assert trace_arrays(leaked, key_of(), original, NAMES).named == ()
    assert trace_arrays(original.arrays, key_of(), original, NAMES).named == ()
    assert trace_arrays(drawn(1), key_of(), original, NAMES).named == ()
    assert (
        trace_arrays(copy_for(original, key_of(1), "Acme"), key_of(), original, NAMES).named == ()
    )


def test_wrong_keys_find_one_unit_on_each_axis(original):
    """Keys by the hundred on one copy: the law of fixed points, whatever the network is."""
    leaked = copy_for(original, key_of(), "Acme")
    counts = []
    for seed in range(1, 121):
        key = Key(seed.to_bytes(32, "big"), key_of().context)
        (found,) = trace_arrays(leaked, key, original, ["Acme"]).found
        counts.append(found.fixed)
        assert found.axes == 2
    assert np.mean(counts) == pytest.approx(2, abs=0.55)
    assert max(counts) <= 10


def test_every_name_that_is_tried_is_paid_for(original):
    leaked = copy_for(original, key_of(), "Acme")
    (alone,) = trace_arrays(leaked, key_of(), original, ["Acme"]).found
    many = trace_arrays(leaked, key_of(), original, [f"n{n}" for n in range(99)] + ["Acme"] * 2)
    assert many.found[0].name == "Acme"
    assert many.found[0].log10_p == pytest.approx(alone.log10_p + 2)
    assert all(each.log10_p <= 0 for each in many.found)


def test_permuting_erases_an_order_as_the_threat_model_says(original):
    leaked = permuted(copy_for(original, key_of(), "Acme"))
    assert trace_arrays(leaked, key_of(), original, NAMES).named == ()


def test_a_mean_of_two_copies_answers_otherwise_and_names_both(original):
    """Units of different kinds are added up."""
    two = [copy_for(original, key_of(), name) for name in NAMES[:2]]
    mean = {name: (two[0][name] + two[1][name]) / 2 for name in two[0]}
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 64))

    def answers(tensors):
        hidden = inputs
        for n in (0, 2):
            hidden = np.maximum(hidden @ tensors[f"{n}.weight"].T + tensors[f"{n}.bias"], 0)
        return hidden @ tensors["4.weight"].T + tensors["4.bias"]

    right = answers(original.arrays)
    for each in two:
        assert np.abs(answers(each) - right).max() < 1e-3
    left = answers(mean)
    centred = [each - each.mean(0) for each in (right, left)]
    kept = (centred[0] * centred[1]).sum() / np.linalg.norm(centred[0]) / np.linalg.norm(centred[1])
    assert kept < 0.6
    assert set(trace_arrays(mean, key_of(), original, NAMES).named) == set(NAMES[:2])


def test_copies_of_two_licensees_are_no_kin_to_compare_but_by_their_numbers(original):
    a, b = (copy_for(original, key_of(), name) for name in NAMES[:2])
    found = compare(network(shaken(a, 0.2), "a"), network(b, "b"))
    assert found.outcome is Outcome.NONE
    assert compare(network(a, "a"), network(b, "b")).related


def test_a_network_without_axes_or_names_is_refused(original):
    with pytest.raises(UnsuitableModelError, match="axes"):
        original_of(drawn(0), None)
    with pytest.raises(UnsuitableModelError, match="licensees"):
        trace_arrays(drawn(0), key_of(), original, [])
    with pytest.raises(UnsuitableModelError, match="names and shapes"):
        trace_arrays({"x": np.ones((3, 3))}, key_of(), original, NAMES)


def test_nothing_of_the_seed_or_the_order_is_in_what_is_said(original):
    leaked = copy_for(original, key_of(7), "Acme")
    found = trace_arrays(leaked, key_of(7), original, NAMES)
    text = json.dumps(found.as_dict()) + repr(found)
    assert key_of(7).seed.hex() not in text
    assert str(original.orders(key_of(7), "Acme")[0][:6].tolist())[1:-1] not in text


# The commands


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A folder with a network that carries a key by construction, as `embed` leaves it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
    model = build("alexnet", **arguments).eval()
    key = V2.draw_key(
        model, torch.zeros(2, 1, 32, 32), owner="Alice", seed=bytes(32), passports="derived"
    )
    with torch.no_grad():
        for name, secret in secrets_of(key).items():
            weight = model.get_submodule(name).weight
            weight[read_bits(weight, secret.mean_patch) != secret.signs] *= -1
    config = ModelConfig("alexnet", arguments, tuple("0123456789"), (1, 32, 32), (0.5,), (0.5,))
    save_model(tmp_path / "net", model, config)
    save_key(key, tmp_path / "alice.key")
    return tmp_path


def test_release_and_trace_name_who_leaked(house, call):
    release = ("release", "net", "--key", "alice.key", "-o")
    assert call(*release, "original")[0] == 0
    assert call("claim", "axes", "original")[0] == 0
    for name in ("Acme", "Umbrella"):
        code, _, errors = call(*release, name.lower(), "--licensee", name)
        assert code == 0
        assert f"The copy for {name}" in errors
    images = torch.randn(4, 1, 32, 32)
    answers = [load_model(house / each).model.eval()(images) for each in ("original", "acme")]
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    assert call("verify", "acme", "--key", "alice.key")[0] == 1  # channels are elsewhere
    words = ("trace", "umbrella", "--key", "alice.key", "--original", "original")
    both = ("--licensee", "Acme", "--licensee", "Umbrella")
    code, out, _ = call(*words, *both, "--json")
    facts = json.loads(out)
    assert (code, facts["named"]) == (0, ["Umbrella"])
    assert facts["verdict"]["accepted"]  # the passport is read, once the order is undone
    code, out, _ = call(*words, *both)
    assert "Umbrella" in out
    assert "named" in out
    assert call(*words, "--licensee", "Initech")[0] == 1
    assert call(*words)[0] == 2
    assert call(*words, *both, "--alpha", "0")[0] == 2
    assert call("trace", "umbrella", "--key", "alice.key", "--licensee", "Acme")[0] == 2


RELEASE = ("release", "net", "--key", "alice.key")


@pytest.fixture
def kept(house, call):
    """The same, with the release that the owner keeps, and its table of axes."""
    assert call(*RELEASE, "-o", "original")[0] == 0
    assert call("claim", "axes", "original")[0] == 0
    return house


def trace_as_a_later_version(monkeypatch):
    """A tracer that leaves the last axis out: what it finds has another digest."""

    def later(folder, factory):
        found = axes_of_folder(folder, factory)
        return replace(found, axes=found.axes[:-1])

    monkeypatch.setattr(licensing, "axes_of_folder", later)


def test_copies_that_are_made_in_different_runs_are_of_one_table(kept, call, monkeypatch):
    given = ("--original", "original")
    first = call(*RELEASE, *given, "--licensee", "Acme", "-o", "acme")
    trace_as_a_later_version(monkeypatch)
    second = call(*RELEASE, *given, "--licensee", "Umbrella", "-o", "umbrella")
    anew = call(*RELEASE, "--licensee", "Initech", "-o", "initech")
    digest = Axes.from_bytes((kept / "original" / "axes.json").read_bytes()).digest
    told = [digest[:16] in errors for code, _, errors in (first, second, anew) if code == 0]
    assert told == [True, True, False]
    names = [word for name in NAMES[:3] for word in ("--licensee", name)]
    found = [
        call("trace", copy, "--key", "alice.key", *given, *names, "--json")
        for copy in ("acme", "umbrella", "initech")
    ]
    named = [json.loads(out)["named"] for _, out, _ in found]
    assert named == [["Acme"], ["Umbrella"], []]  # the third is in orders of another table


def test_a_table_or_a_release_of_another_network_is_refused_and_nothing_is_written(kept, call):
    copy = (*RELEASE, "--original", "original", "--licensee", "Acme", "-o", "acme")
    table = kept / "original" / "axes.json"
    written = table.read_bytes()
    table.write_bytes(AXES.to_bytes())
    code, _, errors = call(*copy)
    assert (code, "table of axes is not of this network" in errors) == (2, True)
    table.unlink()
    code, _, errors = call(*copy)
    assert (code, "axes.json" in errors) == (2, True)
    table.write_bytes(written)
    other = load_model(kept / "original")
    with torch.no_grad():
        other.model.classifier.bias += 1
    save_model(kept / "original", other.model, other.config)
    code, _, errors = call(*copy)
    assert (code, "not the release of this network" in errors) == (2, True)
    assert not (kept / "acme").exists()


def test_a_network_without_the_key_leaves_no_copy(kept):
    key = load_key(kept / "alice.key")
    stranger = replace(key, seed=bytes(31) + b"x")
    with pytest.raises(UnsuitableModelError, match="does not carry this key"):
        licensing.release_to("Acme", kept / "net", stranger, kept / "acme")
    assert not (kept / "acme").exists()


def test_an_original_goes_with_a_licensee(kept, call):
    assert call(*RELEASE, "--original", "original", "-o", "copy")[0] == 2
    assert not (kept / "copy").exists()
