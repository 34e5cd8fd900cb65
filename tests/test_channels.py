"""Passports of channels: fair signs, one form in files, a graft that tells what it costs."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from constructed import reader, small_alexnet
from torch import nn

from nnpassport.alignment.null import Unrelated
from nnpassport.attacks.ambiguity import flip_gamma
from nnpassport.attacks.obfuscation import combine, flip_signs, permute, rescale
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding import anchoring
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.layers import (
    FASTER,
    Branch,
    on_branch,
    own_statistics,
    passport_norms,
)
from nnpassport.embedding.schemes import channels
from nnpassport.embedding.schemes.channels import Harm
from nnpassport.embedding.schemes.graft import graft_channels, settle
from nnpassport.embedding.schemes.passport import PAN, V1, V2, V3, bound_to
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.context import ChannelForm, Context, LayerShape
from nnpassport.keys.derive import BASE, derive_channels, spread
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key, metric_digest
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.keys.reading import read_passports
from nnpassport.scheme import (
    BadRecipeError,
    HarmfulGraftError,
    UnreadableKeyError,
    UnsuitableModelError,
)

OUT, FAN_IN = 12, 24
LINEAR = Geometry()
NOBODY = Unrelated([small_alexnet("batch", seed=99).state_dict()], "one network of nobody's")
SEEDS = [number.to_bytes(32, "big") for number in range(600)]


def metric(directions=3, fan_in=FAN_IN):
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.normal(size=(fan_in, directions)))[0].T
    strengths = np.linspace(-256, 2560, directions)[:, None]
    return np.concatenate([strengths, rows * 2**15], 1).round().astype(np.int16)


def lying(weight=0):
    """The same, and beside its directions m has nothing, or each input with this weight."""
    base = np.full((1, 1 + FAN_IN), weight, np.int16)
    base[0, 0] = BASE
    return np.concatenate([base, metric()[1:]])


def context(scheme="passport-v2", carriers=None, kept=None, **form):
    digest = "" if kept is None else metric_digest(kept)
    fields = {"norm": "norm", "gains": (2**24, 2**23), "carriers": carriers, "metric": digest}
    shape = ChannelForm(**{**fields, **form})
    layer = LayerShape("host", (OUT, FAN_IN), (FAN_IN, 1), LINEAR, channels=shape)
    return Context(scheme=scheme, owner="me", layers=(layer,), triggers=None, nonce=bytes(16))


def key(seed=SEEDS[0], kept=None, **given):
    metrics = None if kept is None else {"host": kept}
    return Key(seed=seed, context=context(kept=kept, **given), metrics=metrics)


def hard_weights():
    """Filters that are equal, opposite, constant and zero but for one number; both signs of γ."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(OUT, FAN_IN)).astype(np.float32)
    rows[1], rows[2], rows[3] = rows[0], -rows[0], 1.0
    rows[4] = 0
    rows[4, 0] = 1e-3
    scale = np.where(np.arange(OUT) % 3, 1.0, -0.5).astype(np.float32)
    return {"host.weight": rows, "norm.weight": scale}


def readings(kept):
    """By seed, which channels match (seeds out): read one at a time, by what carries the bit."""
    weights, found = hard_weights(), []
    for seed in SEEDS:
        ((_, arrays),) = key(seed, kept).channel_arrays("host")
        said = (weights["host.weight"] * arrays[0]).sum(1) * weights["norm.weight"]
        found.append(said > 0)
        assert read_passports(weights, key(seed, kept)).layers["host"] == (found[-1].sum(), OUT)
    return np.array(found)


@pytest.mark.parametrize("kept", [None, metric(), lying()], ids=["white", "floor", "directions"])
def test_signs_are_fair_and_independent_for_any_fixed_weights(kept):
    found = readings(kept)
    n = len(found)
    # 4.5 deviations: one run in some thousand would fail by chance, and the seeds are fixed.
    assert np.abs(found.mean(0) - 0.5).max() < 4.5 * 0.5 / n**0.5
    pairs = np.corrcoef(found.T) - np.eye(OUT)
    assert np.abs(pairs).max() < 4.5 / n**0.5
    spread_of_counts = found.sum(1).var() / (OUT / 4)
    assert abs(spread_of_counts - 1) < 4.5 * (2 / n) ** 0.5


def test_a_passport_and_its_opposite_are_equally_likely():
    drawn = np.random.default_rng(2).integers(-127, 128, (2, 50, FAN_IN)).astype(np.float64)
    for kept in (metric(), lying(), lying(77)):
        assert np.array_equal(spread(-drawn, kept), -spread(drawn, kept))
        assert not np.array_equal(spread(drawn, kept), drawn)


def test_passports_are_those_of_the_documented_formula():
    layer = context(kept=metric()).layers[0]
    arrays = derive_channels(SEEDS[1], context(kept=metric()), layer, range(OUT), b"", metric())
    white = derive_channels(SEEDS[1], context(kept=metric()), layer, range(OUT))
    u, s = metric()[:, 1:].astype(float) / 2**15, metric()[:, 0].astype(float) / 256
    slow = white + sum(s[k] * (white @ u[k])[..., None] * u[k] for k in range(len(s)))
    # In the formula ⟨u, z⟩ is rounded to 2⁻⁸ of a unit.
    assert np.abs(arrays - slow).max() < 3 * 2**-8 / 128
    assert np.array_equal(
        arrays[:, 3:5],
        derive_channels(SEEDS[1], context(kept=metric()), layer, range(3, 5), b"", metric()),
    )


def test_the_metric_shapes_the_passports_and_an_empty_direction_gets_nothing():
    kept = metric()
    many = [
        derive_channels(s, context(kept=kept), context(kept=kept).layers[0], range(OUT), b"", kept)
        for s in SEEDS[:40]
    ]
    along = np.concatenate(many, 1).reshape(-1, FAN_IN) @ (kept[:, 1:].astype(float) / 2**15).T
    sizes = along.std(0) / along.std(0)[1]
    assert sizes[0] < 0.01  # strength −1
    assert sizes[2] == pytest.approx(11 / (1 + kept[1, 0] / 256), rel=0.15)


def test_where_the_inputs_weigh_nothing_passports_lie_in_the_directions_alone():
    drawn = np.random.default_rng(2).integers(-127, 128, (50, FAN_IN)).astype(np.float64)
    directions = lying()[1:, 1:].astype(float) / 2**15
    inside = spread(drawn, lying())
    assert np.linalg.matrix_rank(inside, tol=1e-3) == len(directions) == 2
    slow = (drawn @ directions.T * (lying()[1:, 0] / 256)) @ directions
    assert np.abs(inside - slow).max() < 2 * 2**-8
    assert np.array_equal(spread(drawn, lying(64)) - inside, drawn / 4)
    for bad in (lying(257), lying(-1), np.concatenate([lying(), lying()]), lying()[:0]):
        with pytest.raises(UnreadableKeyError, match="another metric"):
            key(kept=bad)
    assert key(kept=lying()[:1]).metrics is not None  # all zero: it matches nothing


def written(weights, owned):
    """The same weights with every bit of the key as it should be, in closed form."""
    rows = weights["host.weight"].astype(np.float64)
    for part, arrays in owned.channel_arrays("host"):
        norms = np.square(arrays[0]).sum(1, keepdims=True).clip(1e-30)
        said = (rows[part.start : part.stop] * arrays[0]).sum(1, keepdims=True)
        rows[part.start : part.stop] += (
            arrays[0] * (weights["norm.weight"][part.start : part.stop, None] - said) / norms
        )
    return {**weights, "host.weight": rows.astype(np.float32)}


def test_a_channel_negated_with_its_norm_reads_the_same_and_one_alone_does_not():
    owned = key()
    weights = written(hard_weights(), owned)
    assert read_passports(weights, owned).layers["host"] == (OUT, OUT)
    turn = np.where(np.arange(OUT) % 2, -1, 1).astype(np.float32)
    both = {
        "host.weight": weights["host.weight"] * turn[:, None],
        "norm.weight": weights["norm.weight"] * turn,
    }
    assert read_passports(both, owned).layers["host"] == (OUT, OUT)
    alone = {**weights, "norm.weight": weights["norm.weight"] * turn}
    assert read_passports(alone, owned).layers["host"] == (OUT // 2, OUT)
    silent = {**weights, "host.weight": weights["host.weight"] * 0}
    assert read_passports(silent, owned).layers["host"] == (0, OUT)
    folded = {"host.weight": weights["host.weight"] * both["norm.weight"][:, None]}
    assert read_passports(folded, owned).layers["host"] == (OUT // 2, OUT)  # turned twice
    folded = {"host.weight": both["host.weight"] * both["norm.weight"][:, None] / 3}
    assert read_passports(folded, owned).layers["host"] == (OUT, OUT)
    with pytest.raises(UnsuitableModelError, match=r"norm\.weight is missing"):
        read_passports({**folded, "norm.bias": folded["host.weight"][:, 0]}, owned)


def test_channels_that_carry_nothing_are_not_counted():
    some = key(carriers="a5f0")
    assert some.context.bits == 8
    assert read_passports(written(hard_weights(), some), some).layers["host"] == (8, 8)
    for bad in ("a5ff", "0000", "fff0", "A5F0", "a5", 3, "a5f0\n"):
        with pytest.raises(UnreadableKeyError):
            context(carriers=bad)


def test_contexts_of_channels_are_encoded_in_one_way():
    owned = context(carriers="a5f0", kept=metric())
    assert Context.decode(owned.encode()) == owned
    with pytest.raises(UnreadableKeyError):
        Context.decode(owned.encode().replace(b'"carriers":"a5f0",', b""))
    for form in ({"gains": (0, 1)}, {"gains": (1.5, 1)}, {"metric": "ab"}, {"norm": "\ud800"}):
        with pytest.raises(UnreadableKeyError):
            context(**form)
    for scheme in ("pan", "uchida", "lora"):
        with pytest.raises(UnreadableKeyError):
            context(scheme)
    mixed = LayerShape("other", (OUT, FAN_IN), (FAN_IN, 64), LINEAR)
    with pytest.raises(UnreadableKeyError, match="passports of channels and of layers"):
        replace(owned, layers=(*owned.layers, mixed))


def test_every_part_of_the_form_draws_other_passports():
    layer = context().layers[0]
    first = derive_channels(SEEDS[0], context(), layer, range(2))
    for form in ({"norm": ""}, {"gains": (2**24, 1)}, {"carriers": "a5f0"}, {"metric": "0" * 64}):
        other = context(**form)
        assert not np.array_equal(
            first, derive_channels(SEEDS[0], other, other.layers[0], range(2))
        )


def test_a_key_file_keeps_the_metric_and_refuses_another(tmp_path):
    owned = key(kept=metric())
    save_key(owned, tmp_path / "k.key")
    again = load_key(tmp_path / "k.key")
    assert again.fingerprint == owned.fingerprint
    assert again.derived
    assert np.array_equal(again.metrics["host"], metric())
    changed = metric()
    changed[0, 1] += 1
    for metrics in ({"host": changed}, None, {"other": metric()}):
        with pytest.raises(UnreadableKeyError):
            Key(seed=SEEDS[0], context=owned.context, metrics=metrics)
    with pytest.raises(UnreadableKeyError):
        Key(seed=SEEDS[0], context=context(), metrics={"host": metric()})


# In networks


def small(norm=nn.BatchNorm2d):
    """Convolutions, a norm with scales of both signs, one channel that is dead; and its images."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        norm(24) if norm is nn.BatchNorm2d else nn.GroupNorm(4, 24),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    with torch.no_grad():
        model[4].weight.copy_(torch.linspace(-1.5, 1.5, 24) + 0.01)
        model[4].bias.normal_()
        model[3].weight[5] = 0
        model[8].weight.mul_(8)
    images = torch.randn(160, 3, 12, 12)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval(), images


def group(channels):
    return nn.GroupNorm(4, channels)


@pytest.mark.parametrize("scheme", [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group], ids=["batch", "group"])
def test_a_graft_writes_every_bit_and_both_branches_compute_what_the_network_did(scheme, norm):
    plain, images = small(norm)
    owned = scheme.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    assert owned.context.bits == 23  # the dead one carries none
    model = deepcopy(plain)
    scheme.insert(model, owned, images[:2])
    report = graft_channels(model, images)
    released = scheme.released(model).eval()
    verdict = scheme.verify(released.state_dict(), owned)
    assert (verdict.matches, verdict.bits) == (23, 23)
    assert scheme.verify(plain.state_dict(), owned).matches < 20
    assert 0 < report.harm.error < 0.1
    assert report.harm.private_error < 1e-4
    (grafted,) = report.layers.values()
    assert grafted.turned == grafted.muted == 0
    assert 0 < grafted.felt < 0.1
    with torch.no_grad(), on_branch(model, Branch.PRIVATE):
        private = model(images)
    with torch.no_grad():
        assert torch.allclose(released(images), private, rtol=1e-3, atol=1e-3)


def test_noise_in_inputs_that_are_dead_changes_nothing_of_what_is_read():
    """Ten of sixteen channels never light up: ninety numbers of each filter, more than any few."""
    plain, images = small()
    dead = torch.arange(2, 12)
    with torch.no_grad():
        plain[1].weight[dead], plain[1].bias[dead] = 0.0, -1.0
        owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
        model = deepcopy(plain)
        V2.insert(model, owned, images[:2])
        graft_channels(model, images)
        released = V2.released(model).eval()
        before = released(images)
        layer = released[3].weight
        layer[:, dead] += 300 * layer.std() * torch.randn(24, len(dead), 3, 3)
        assert torch.equal(released(images), before)
    verdict = V2.verify(released.state_dict(), owned)
    assert verdict.matches == verdict.bits == 23


def blocks(wide, count):
    """Blocks of two layers, the first of them wide, and inputs."""
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(256, wide), nn.GELU(), nn.Linear(wide, 256))]
    made += [deepcopy(made[0]) for _ in range(count - 1)]
    return nn.Sequential(*made).eval(), torch.randn(40, 256)


@pytest.mark.parametrize(("count", "taken"), [(6, 3), (2, 2), (1, 1)])
def test_by_default_the_bits_are_spread_so_that_no_block_holds_the_mark(count, taken):
    model, inputs = blocks(1200, count)
    for given in ({"seen": inputs}, {"passports": "channel"}):
        owned = V2.draw_key(model, inputs[:2], seed=bytes(32), **given)
        held = [layer.length for layer in owned.context.layers]
        assert len(held) == taken
        assert 1000 <= sum(held) <= 1500
        assert max(held) <= max(400, 1.4 * sum(held) / count)
        named = V2.draw_key(model, inputs[:2], layers=["0.0"], **given)
        assert named.context.bits == 1200  # who names a layer has all of it
    bound = bound_to(owned, model, inputs)
    assert [layer.length for layer in bound.context.layers] == held


def test_a_key_is_drawn_where_what_a_layer_receives_is_next_to_nothing():
    """As in a deep network that is not trained: 10⁻¹⁹ of its inputs are left there."""
    plain, images = small()
    with torch.no_grad():
        plain[1].weight.mul_(1e-19)
        plain[1].bias.mul_(1e-19)
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    assert not owned.metrics
    assert owned.context.bits >= 20


@pytest.mark.parametrize("seen", [True, False])
def test_a_layer_that_is_all_zero_is_refused_in_words(seen):
    plain, images = small()
    with torch.no_grad():
        plain[3].weight.zero_()
    given = {"seen": images} if seen else {"passports": "channel"}
    with pytest.raises(UnsuitableModelError, match="no channel of '3' can carry a bit"):
        V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), **given)


def test_where_a_layer_carries_a_part_the_loudest_channels_do():
    model, inputs = blocks(1200, 3)
    with torch.no_grad():
        model[0][0].weight[:100] *= 3
        model[0][0].weight[100:110] = 0
    first, *_ = V2.draw_key(model, inputs[:2], seen=inputs).context.layers
    carrying = first.channels.carrying(1200)
    assert carrying[:100].all()
    assert not carrying[100:110].any()


def test_where_no_norm_follows_the_private_branch_is_the_public_one():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, 6)).eval()
    inputs = torch.randn(400, 32)
    owned = V2.draw_key(plain, inputs[:2], layers=["0"], seed=bytes(32), seen=inputs)
    model = deepcopy(plain)
    V2.insert(model, owned, inputs[:2])
    report = graft_channels(model, inputs, limit=channels.Limit(answers=1, error=1))
    assert report.harm.private_error < 1e-5
    assert V2.verify(V2.released(model).state_dict(), owned).matches == 40
    assert V2.verify(plain.state_dict(), owned).matches < 33


def test_statistics_that_a_short_training_left_behind_are_kept_in_proportion():
    """A norm that divides by far less than its layer varies: a sum could leave nothing of that."""
    plain, images = small()
    with torch.no_grad():
        plain[4].running_var.mul_(0.03)
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    model = deepcopy(plain)
    V2.insert(model, owned, images[:2])
    report = graft_channels(model, images, limit=channels.Limit(answers=0.2))
    assert report.harm.confident_kept > 0.9  # with a sum in place of a factor: 0
    assert V2.verify(V2.released(model).state_dict(), owned).matches == owned.context.bits


def test_an_untrained_network_starts_with_every_bit_right():
    plain, images = small()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), passports="channel")
    V2.insert(plain, owned, images[:2])
    (norm,) = passport_norms(plain).values()
    assert int((norm.affine()[0].sign() == norm.wanted()).sum()) < 20
    before = norm.layer.weight.detach().clone()
    channels.begin([norm])
    assert V2.verify(V2.released(plain).state_dict(), owned).matches == 24
    assert torch.allclose(norm.affine()[0], norm.own()[0], atol=1e-4)
    assert float((norm.layer.weight.detach() - before).norm() / before.norm()) < 0.2


def test_a_step_moves_a_channels_scale_hardly_faster_than_it_moves_a_norms_own():
    """Along the gradient itself a step would move it by ‖m‖² times as much: here 36 and more."""
    plain, images = small()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    V2.insert(plain, owned, images[:2])
    (norm,) = passport_norms(plain).values()
    before = norm.affine()[0]
    before.sum().backward()
    rate = 1e-3
    with torch.no_grad():
        norm.layer.weight -= rate * norm.layer.weight.grad
        moved = (before - norm.affine()[0])[norm.carries] / rate
    assert float(norm.mean_patch[0, norm.carries].square().sum(1).min()) > 3 * FASTER
    assert moved.tolist() == pytest.approx([FASTER] * len(moved), rel=0.02)


def test_gradients_alone_are_slowed_and_values_stay_what_the_formula_says():
    plain, images = small()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    V2.insert(plain, owned, images[:2])
    (norm,) = passport_norms(plain).values()
    slowed = norm.affine()
    norm.ease = torch.ones_like(norm.ease)
    assert all(torch.equal(a, b) for a, b in zip(slowed, norm.affine(), strict=True))


def test_bits_of_channels_that_died_are_as_loud_as_those_of_others():
    """γ° of carriers falls to next to nothing in a long training, and the bit is not to go so."""
    plain, images = small()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    V2.insert(plain, owned, images[:2])
    (norm,) = passport_norms(plain).values()
    died = torch.tensor([7, 8, 20])
    with torch.no_grad():
        plain[4].norm.weight[died] = torch.tensor([1e-9, -1e-9, 1e-9])
    report = graft_channels(plain, images)
    said = norm.affine()[0].detach()
    median = norm.own()[0].abs()[norm.carries].median().detach()
    assert said[died].abs().tolist() == pytest.approx([0.05 * float(median)] * 3, rel=1e-3)
    assert said[died].sign().tolist() == [1, -1, 1]
    assert report.harm.private_error < 0.05
    assert V2.verify(V2.released(plain).state_dict(), owned).matches == owned.context.bits


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, group], ids=["batch", "group"])
def test_a_training_ends_with_one_network_in_both_branches(norm):
    """Where it had drawn them apart, statistics of norms behind the passport included."""
    plain, images = small(norm)
    plain[8] = nn.Sequential(nn.Linear(96, 32), nn.BatchNorm1d(32), nn.Linear(32, 5)).eval()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    V2.insert(plain, owned, images[:2])
    graft_channels(plain, images, limit=channels.ANY)
    (inner,) = passport_norms(plain).values()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inner.layer.weight += 0.02 * torch.randn(inner.layer.weight.shape, generator=rng)
        for each in own_statistics(plain):
            each.running_mean += 0.1
    apart = channels.answers(plain, images, Branch.PRIVATE).numbers
    public = channels.answers(plain, images, Branch.PUBLIC).numbers
    assert (apart - public).norm() > 0.05 * public.norm()
    found = settle(plain, images)
    assert found is not None
    assert found.harm.private_error < 1e-4
    private = channels.answers(plain, images, Branch.PRIVATE).numbers
    assert (private - channels.answers(plain, images, Branch.PUBLIC).numbers).norm() < 1e-3
    assert V2.verify(V2.released(plain).state_dict(), owned).matches == owned.context.bits


def test_what_would_harm_is_not_settled(monkeypatch):
    plain, images = small()
    plain[8] = nn.Sequential(nn.Linear(96, 32), nn.BatchNorm1d(32), nn.Linear(32, 5)).eval()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    V2.insert(plain, owned, images[:2])
    for each in own_statistics(plain):
        each.running_mean += 0.1
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    monkeypatch.setattr(Harm, "within", lambda *_: False)
    assert settle(plain, images) is None
    after = plain.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("schedule", ["one-cycle", "steps"])
@pytest.mark.parametrize("epochs", [2, 8, 20])
def test_both_parts_of_a_training_from_scratch_are_one_schedule(schedule, epochs):
    whole = Recipe(epochs=epochs, rate=0.05, schedule=schedule)
    first, second = anchoring.before(whole), anchoring.after(whole)
    assert first.epochs + second.epochs == epochs
    steps = 10
    rates = [
        part.rate_at((step + 0.5) / (part.epochs * steps))
        for part in (first, second)
        for step in range(part.epochs * steps)
    ]
    told = [whole.rate_at((step + 0.5) / (epochs * steps)) for step in range(epochs * steps)]
    assert rates == pytest.approx(told)


@pytest.mark.parametrize("part", [(0.5, 0.5), (-0.1, 1), (0, 1.1), (0.6, 0.2)])
def test_parts_of_a_schedule_that_are_none_are_refused(part):
    with pytest.raises(BadRecipeError, match="needed: two shares in order"):
        Recipe(begins=part[0], ends=part[1])


def test_a_graft_that_harms_is_undone_and_says_what_would_pass():
    plain, images = small()
    owned = V2.draw_key(plain, images[:2], layers=["0", "3"], seed=bytes(32), seen=images)
    model = deepcopy(plain)
    V2.insert(model, owned, images[:2])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(HarmfulGraftError, match=r"of confident answers.* %\); ") as refused:
        graft_channels(model, images, limit=channels.Limit(answers=-1, error=-1))
    assert "no smaller choice passes" in str(refused.value)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    surgery.remove(model)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_the_mark_is_no_singular_vector():
    plain, images = small()
    owned = V2.draw_key(plain, images[:2], layers=["3"], seed=bytes(32), seen=images)
    model = deepcopy(plain)
    V2.insert(model, owned, images[:2])
    graft_channels(model, images)
    state = V2.released(model).state_dict()
    change = (state["3.weight"] - plain.state_dict()["3.weight"]).flatten(1)
    sizes = torch.linalg.svdvals(change)
    # One passport for the whole layer would leave two singular values, of γ and of β.
    assert float(sizes[0] ** 2 / sizes.square().sum()) < 0.5
    left, values, right = torch.linalg.svd(state["3.weight"].flatten(1), full_matrices=False)
    shaved = state["3.weight"].flatten(1) - (left[:, :2] * values[:2]) @ right[:2]
    state["3.weight"] = shaved.view_as(state["3.weight"])
    assert V2.verify(state, owned).matches >= 19


def drawn_with(scheme, plain, images):
    return scheme.draw_key(plain, images[:2], seed=bytes(32), seen=images)


@pytest.mark.parametrize("scheme", [V1, V2, V3], ids=["v1", "v2", "v3"])
def test_keys_for_a_network_that_was_seen_have_passports_of_channels_and_others_by_name(scheme):
    plain, images = small()
    for given in ({"seen": images}, {"passports": "channel"}):
        drawn = scheme.draw_key(plain, images[:2], seed=bytes(32), **given)
        assert all(layer.channels is not None for layer in drawn.context.layers)
        assert (drawn.context.anchor is not None) == ("seen" in given)
    for given in ({}, {"passports": "derived"}, {"passports": "derived", "seen": images}):
        derived = scheme.draw_key(plain, images[:2], seed=bytes(32), layers=["0"], **given)
        assert all(layer.channels is None for layer in derived.context.layers)
        assert derived.context.anchor is None
    with pytest.raises(UnsuitableModelError, match="channel, derived"):
        scheme.draw_key(plain, images[:2], passports="best")
    shown = scheme.draw_key(plain, images, seed=bytes(32))  # an example of 160 inputs
    assert shown.fingerprint == drawn_with(scheme, plain, images).fingerprint
    for given in ({"passports": "derived"}, {"layers": ["0"]}):
        other = torch.zeros_like(images) if "layers" in given else images
        derived = scheme.draw_key(plain, other, **{"layers": ["0"], **given})
        assert all(layer.channels is None for layer in derived.context.layers)
    pan = PAN.draw_key(plain, images[:2], layers=["0"], seen=images)
    assert all(layer.channels is None for layer in pan.context.layers)


# The anchor: the network before the mark


@pytest.fixture(scope="module", params=["batch", "group"])
def grafted(request):
    """The network before, the key, and the network after."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (128, 1, 32, 32), generator=rng).to(torch.uint8)
    data = ImageSet(pixels, torch.arange(128) % 10, tuple("0123456789"), "noise")
    normalise = Normalisation((0.5,), (0.5,))
    anchor, inputs = reader(small_alexnet(request.param), data, normalise), normalise(pixels)
    owned = V2.draw_key(anchor, inputs[:2], seed=bytes(32), seen=inputs)
    model = deepcopy(anchor)
    V2.insert(model, owned, inputs[:2])
    graft_channels(model, inputs)
    return anchor, owned, V2.released(model).eval()


def test_channels_that_were_moved_are_put_back_by_the_network_before_the_mark(grafted):
    anchor, owned, released = grafted
    draw = torch.Generator().manual_seed(3)
    thief = combine(released, draw, attacks=(flip_signs, permute, rescale)).model
    weights = thief.state_dict()
    assert not V2.verify(weights, owned).accepted
    found = verify_aligned(weights, owned, anchor).verdict
    assert found.accepted
    assert found.matches == found.bits > 200
    assert verify_aligned(released.state_dict(), owned, anchor).verdict.matches == found.bits


def test_strangers_are_coins_however_they_are_aligned_to_the_network_before_the_mark(grafted):
    """The key knows nothing of them, nor does the network that they are aligned to."""
    anchor, owned, _ = grafted
    matches = []
    for number in range(3):
        stranger = small_alexnet("batch", seed=40 + number).state_dict()
        found = verify_aligned(stranger, owned, anchor, unrelated=NOBODY)
        assert not found.verdict.accepted
        aligned = found.aligned.model.state_dict()
        matches += [V2.verify(aligned, replace(owned, seed=seed)).matches for seed in SEEDS[:60]]
    bits, count = owned.context.bits, len(matches)
    assert abs(np.mean(matches) - bits / 2) < 4 * (bits / 4 / count) ** 0.5
    assert 0.6 < np.var(matches) / (bits / 4) < 1.5  # 0.21 is two standard errors


def test_no_other_network_is_taken_for_the_anchor(grafted):
    anchor, owned, released = grafted
    almost = deepcopy(anchor)
    with torch.no_grad():
        almost.features[0].weight[0, 0, 0, 0] += 1e-3
    for other in (released, almost):
        with pytest.raises(UnsuitableModelError, match="not the key's anchor"):
            verify_aligned(released.state_dict(), owned, other)
    alone = V2.draw_key(anchor, torch.zeros(2, 1, 32, 32), passports="channel")
    with pytest.raises(UnsuitableModelError, match="and no anchor"):
        verify_aligned(released.state_dict(), alone, anchor)


def test_another_anchor_draws_every_bit_anew(grafted):
    """So choosing one is drawing seeds: turning a copy of a suspect until it fits gains nothing."""
    _, owned, released = grafted
    weights = released.state_dict()
    for digest in ("0" * 64, "f" * 64):
        other = replace(owned, context=replace(owned.context, anchor=digest))
        found = V2.verify(weights, other)
        assert abs(found.matches - found.bits / 2) < 4 * (found.bits / 4) ** 0.5
    with pytest.raises(UnreadableKeyError, match="64 lower-case hex digits"):
        replace(owned.context, anchor="F" * 64)
    assert Context.decode(owned.context.encode()) == owned.context


def test_an_insider_makes_passports_of_whole_layers_of_it_that_have_no_p_value(grafted):
    _, owned, released = grafted
    forged = flip_gamma(released, owned, torch.Generator().manual_seed(1), share=0.1)
    found = V2.verify(forged.model.state_dict(), forged.key)
    assert found.matches == found.bits == sum(each.weight[0] for each in owned.context.layers)
    assert found.log10_p_value is None
    assert forged.key.metrics is None
    assert forged.key.context.anchor is None
    assert forged.key.seed != owned.seed


def test_where_inputs_vary_in_few_directions_the_mark_is_no_handful_of_vectors():
    """Passports lie in all directions then, and signs of singular vectors say nothing of bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 4))
    few, many = torch.randn(256, 3) @ torch.randn(3, 96), torch.randn(256, 96)
    for inputs, metric in ((few, False), (many, True)):
        key = V2.draw_key(model, inputs[:2], seed=bytes(32), layers=["0"], seen=inputs)
        (layer,) = key.context.layers
        assert bool(layer.channels.metric) == metric
        passports = np.concatenate([part for _, part in key.channel_arrays("0")], axis=1)[0]
        spread = np.linalg.svd(passports, compute_uv=False) ** 2
        assert spread.sum() ** 2 / np.square(spread).sum() > 20  # so many vectors, in effect
