"""Informed thieves: what they take out of a mark of the paper's form, and of one of channels.

The networks have random filters and a last layer that is solved; marks are grafted. So nothing is
trained but where a test says so.
"""

from copy import deepcopy
from typing import NamedTuple

import constructed
import pytest
import torch
import zoo
from constructed import settle, solve_head
from torch import nn

from nnpassport.attacks import informed
from nnpassport.attacks.table import ATTACKS, KEEPS
from nnpassport.attacks.unlabelled import Asking, cosine, scout
from nnpassport.embedding.network.layers import Branch
from nnpassport.embedding.network.outputs import call
from nnpassport.embedding.schemes.graft import graft
from nnpassport.embedding.schemes.passport import V1, V2, Passport
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError

LAYER = "3"
OWNED, STOLEN = 500, 400
LOST = 0.05  # of the accuracy, at most; a thief who keeps 97 of his own 100 answers
KEPT = 0.95


class Subject(NamedTuple):
    """A released network, the key in it, and images that its owner and its thief did not see."""

    scheme: Passport
    model: nn.Module
    key: Key
    stolen: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor

    def log10_p(self, model):
        return self.scheme.verify(model.state_dict(), self.key).log10_p_value

    def left(self, model):
        found = self.scheme.verify(model.state_dict(), self.key)
        return found.matches / found.bits

    def accuracy(self, model):
        with torch.no_grad():
            return float((model(self.images).argmax(1) == self.labels).float().mean())


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def network(digits):
    """Digits' pixels and classes in another order, and a plain network that knows them."""
    train, test, normalise = digits
    images = normalise(torch.cat([train.images, test.images]))
    labels = torch.cat([train.labels, test.labels])
    torch.manual_seed(0)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    model = nn.Sequential(
        *(nn.Conv2d(1, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.Conv2d(48, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2048, 10)),
    )
    settle(model, images[:OWNED])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constructed, "RIDGE", 1e-2)  # less steep: noise is to be bearable
        solve_head(model, [(Branch.PUBLIC, images[:OWNED], labels[:OWNED])])
    return model.eval(), images, labels


def subject_of(network, scheme, **form):
    plain, images, labels = network
    owned = images[:OWNED]
    seen = {"seen": owned} if form == {"passports": "channel"} else {}
    key = scheme.draw_key(plain, owned[:2], layers=[LAYER], seed=bytes(32), **form, **seen)
    model = deepcopy(plain)
    scheme.insert(model, key, owned[:2])
    graft(model, owned)
    ends = (OWNED, OWNED + STOLEN)
    released = scheme.released(model).eval()
    return Subject(
        scheme, released, key, images[slice(*ends)], images[ends[1] :], labels[ends[1] :]
    )


@pytest.fixture(scope="module")
def whole(network):
    """One passport for the layer, as in the paper."""
    return subject_of(network, V2, passports="derived")


@pytest.fixture(scope="module")
def own(network):
    """A passport for each channel."""
    return subject_of(network, V2, passports="channel")


LOOKS = {
    "shave": informed.shave,
    "shave-outliers": informed.shave_outliers,
    "unscale": lambda thief: informed.unscale(thief, rng()),
}


def robbed(subject, attack, **given):
    return attack(scout(subject.model, subject.stolen, **{"kept": KEPT, **given})).model


@pytest.mark.parametrize("name", LOOKS)
def test_one_passport_for_a_layer_is_found_and_taken_out(whole, name):
    before = whole.accuracy(whole.model)
    assert whole.log10_p(whole.model) < -35
    # To take the mark out heals what it did, which changes up to a twentieth of the answers.
    model = robbed(whole, LOOKS[name], kept=0.9)
    assert whole.log10_p(model) > LOG10_ALPHA_COMMITTED
    assert whole.accuracy(model) > before - LOST


@pytest.mark.parametrize("name", LOOKS)
def test_a_passport_for_each_channel_is_not_found_that_way(own, name):
    assert own.log10_p(own.model) < -35
    model = robbed(own, LOOKS[name])
    assert own.left(model) > 0.9
    assert own.log10_p(model) < LOG10_ALPHA_COMMITTED


def test_released_scales_of_v1_give_one_passport_away_and_none_of_channels(network):
    whole = subject_of(network, V1, passports="derived")
    model = robbed(whole, LOOKS["unscale"], kept=0.9)
    assert whole.log10_p(model) > LOG10_ALPHA_COMMITTED
    own = subject_of(network, V1, passports="channel")
    assert own.left(robbed(own, LOOKS["unscale"], kept=0.9)) > 0.9


def test_released_scales_of_v1_show_the_bits_of_one_passport_and_none_of_channels(network):
    """So there is nothing to fold away: a channel's scale has the sign of its own ⟨W, m⟩·b."""
    for form, shown in (("derived", 128), ("channel", 64)):
        subject = subject_of(network, V1, passports=form)
        scales = subject.model.get_parameter("4.weight").detach()
        said = int((scales.sign() == subject.key.layer_signs(LAYER)).sum())
        assert abs(said - shown) < (1 if form == "derived" else 26)  # 4.5 deviations


# What they do to filters of channels' own


@pytest.mark.parametrize(
    "attack",
    [
        lambda thief: informed.drown(thief, rng()),
        informed.narrow,
        lambda thief: informed.replace(thief, rng()),
        informed.lower_rank,
    ],
    ids=["drown", "narrow", "replace", "low-rank"],
)
def test_a_layer_whose_filters_hardly_matter_keeps_no_mark(network, attack):
    """Answers of this network need a few directions of the layer: in the others nothing is safe."""
    subject = subject_of(network, V2, passports="channel")
    before = subject.accuracy(subject.model)
    model = robbed(subject, attack, layers=[LAYER])
    assert subject.log10_p(model) > LOG10_ALPHA_COMMITTED
    assert subject.accuracy(model) > before - 0.1


def test_imitation_wins_back_what_noise_took(own):
    thief = scout(own.model, own.stolen, kept=KEPT)
    noisy = informed._drowned(thief, rng(), 0.8, informed.TAILS)
    learnt = deepcopy(noisy)
    wanted = thief.asking.ask(thief.model, thief.inputs).detach()
    budget = informed.Imitation(rounds=1, epochs=4, rate=1e-3)
    informed._imitate(learnt, thief, wanted, budget, rng())
    assert thief.likeness(learnt) > thief.likeness(noisy)
    assert not any(p.grad is not None for p in learnt.parameters())


def test_rounds_end_where_the_answers_do_not_come_back(own):
    thief = scout(own.model, own.stolen, kept=1.0)
    budget = informed.Imitation(rounds=3, epochs=1, rate=1e-6, dared=0.5)
    done = informed.drown_and_imitate(thief, rng(), budget=budget)
    assert done.cost.epochs == 1
    assert own.left(done.model) == 1
    assert not done.model.training


# What a thief does and leaves alone


ATTACKS_OF_THIEVES = {
    **LOOKS,
    "drown": lambda thief: informed.drown(thief, rng()),
    "narrow": informed.narrow,
    "replace": lambda thief: informed.replace(thief, rng()),
    "low-rank": informed.lower_rank,
}


@pytest.mark.parametrize("name", ATTACKS_OF_THIEVES)
def test_a_thief_changes_a_copy_and_keeps_as_many_answers_as_he_said(own, name):
    before = {n: t.clone() for n, t in own.model.state_dict().items()}
    thief = scout(own.model, own.stolen, kept=0.9)
    done = ATTACKS_OF_THIEVES[name](thief)
    assert all(torch.equal(t, before[n]) for n, t in own.model.state_dict().items())
    assert thief.likeness(done.model) >= 0.9
    assert (done.cost.had, done.cost.samples) == ("W, D", STOLEN)


def test_who_keeps_every_answer_may_find_nothing_to_do(own):
    thief = scout(own.model, own.stolen, kept=1.0)
    done = informed.lower_rank(thief)
    assert thief.likeness(done.model) == 1


def test_the_table_names_them_and_what_they_keep():
    named = {name for name, attack in ATTACKS.items() if attack.informed}
    assert named == {*ATTACKS_OF_THIEVES, "drown-and-imitate"}
    assert all(ATTACKS[name].full == KEEPS for name in named)
    assert all("train" in ATTACKS[name].needs for name in named)


@pytest.mark.parametrize("given", [{"kept": 1.5}, {"kept": float("nan")}, {"kept": -0.1}])
def test_an_impossible_share_is_refused(own, given):
    with pytest.raises(BadRecipeError, match="a fraction from 0 to 1"):
        scout(own.model, own.stolen, **given)


def test_three_inputs_are_too_few(own):
    with pytest.raises(BadRecipeError, match="needed: 4"):
        scout(own.model, own.stolen[:3])


# The parts


def test_noise_lies_where_inputs_do_not_go(own):
    thief = scout(own.model, own.stolen, layers=[LAYER])
    rows, sight = thief.rows[LAYER], thief.seen[LAYER]
    noise = informed.unused_noise(rows, sight, rng(), tail=1e-2)
    assert float(sight.felt(noise).mean()) == pytest.approx(float(sight.felt(rows).mean()))
    along = (noise @ sight.axes).square().sum(0)
    held = sight.values.cumsum(0) / sight.values.sum()
    assert float(along[held > 1e-2].sum()) < 1e-9 * float(along.sum())
    assert float(noise.norm()) > 2 * float(rows.norm())


def test_what_a_layer_sees_is_the_moment_of_its_patches(own):
    thief = scout(own.model, own.stolen, layers=[LAYER])
    with torch.no_grad():
        features = own.model[:3](thief.inputs)
    patches = nn.functional.unfold(features, 3, padding=1).movedim(1, -1).flatten(0, 1).double()
    sight = thief.seen[LAYER]
    built = sight.axes @ torch.diag(sight.values) @ sight.axes.T
    wanted = patches.T.cov(correction=0)
    assert float((built - wanted).norm()) < 0.1 * float(wanted.norm())
    assert float((sight.mean - patches.mean(0)).norm()) < 0.05 * float(patches.mean(0).norm())


def test_the_lowest_rank_is_the_best_there_is_in_the_metric_of_the_inputs(own):
    """Held to the truncated singular value decomposition of the whitened weight."""
    thief = scout(own.model, own.stolen, layers=[LAYER])
    rows, sight = thief.rows[LAYER], thief.seen[LAYER]
    _, axes = informed._output_axes(rows, sight)
    low = axes[:, -7:] @ axes[:, -7:].T @ rows
    whitened = rows @ sight.axes * sight.values.sqrt()
    left, values, right = torch.linalg.svd(whitened, full_matrices=False)
    best = (left[:, :7] * values[:7]) @ right[:7]
    torch.testing.assert_close(low @ sight.axes * sight.values.sqrt(), best)
    assert int(torch.linalg.matrix_rank(low)) == 7


def test_components_are_those_of_the_largest_singular_values():
    rows = torch.randn(6, 9, generator=rng(), dtype=torch.double)
    parts = informed.components(rows, 6)
    torch.testing.assert_close(sum(parts), rows)
    sizes = [float(part.norm()) for part in parts]
    assert sizes == sorted(sizes, reverse=True)


def test_scales_that_are_an_image_of_one_passport_are_unsaid_with_whatever_passport():
    """The direction meets m in 1 though nobody knows m: W·m is all that is known of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(20, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    passport = torch.randn(20)
    with torch.no_grad():
        model[1].weight.copy_(model[0].weight.flatten(1) @ passport)
    model.append(nn.Flatten()).append(nn.Linear(12, 4))
    thief = scout(model.eval(), torch.randn(64, 20, 1, 1), layers=["0"])
    said = informed._said(thief, "0", rng()) @ passport.double()
    factors = said / model[1].weight.detach().double()
    assert float((factors - 1).abs().max()) < 2
    assert float(factors.std()) == pytest.approx(0.5, abs=0.25)


def test_statistics_and_biases_follow_what_the_layers_put_out_now(own):
    thief = scout(own.model, own.stolen)
    rows = {name: 2 * each for name, each in thief.rows.items()}
    doubled = thief.changed(rows)
    assert thief.likeness(doubled) > 0.99
    with torch.no_grad():
        got, wanted = (m(thief.held_out) for m in (doubled, thief.model))
    assert float((got - wanted).norm()) < 0.02 * float(wanted.norm())


def test_a_layer_without_a_norm_keeps_its_mean_by_its_bias():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5)).eval()
    inputs = torch.randn(200, 20) + 3
    thief = scout(model, inputs)
    change = torch.randn(30, 20, generator=rng(), dtype=torch.double)
    moved = thief.changed({"0": thief.rows["0"] + change})
    with torch.no_grad():
        shift = moved[0](inputs).mean(0) - model[0](inputs).mean(0)
    assert float(shift.abs().max()) < 1  # the change alone moves it by about 13


@pytest.mark.parametrize("name", ["BERT", "GPT-2"])
def test_networks_with_named_inputs_and_layer_norms_are_robbed_as_well(name):
    torch.manual_seed(0)
    model = zoo.ZOO[name].build().eval()
    inputs, _ = zoo.ZOO[name].batch(48, 0)
    asking = Asking(lambda m, x: call(m, x).logits.flatten(1), cosine)
    for found in (scout(model, inputs, kept=0.99, asking=asking), scout(model, inputs, kept=0.99)):
        done = informed.drown(found, rng(), tails=(1e-2,))
        changed = [
            n
            for n, t in done.model.state_dict().items()
            if not torch.equal(t, model.state_dict()[n])
        ]
        assert changed
        assert found.likeness(done.model) >= 0.99
