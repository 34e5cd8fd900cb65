"""DeepSigns: what is read off activations, what it is bound to, who forges it, what refuses it."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from nnpassport.attacks.forging import forge_activations, forge_triggers
from nnpassport.catalog import with_settings
from nnpassport.embedding import measured
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.deepsigns import DEEPSIGNS, GROUP, group_means, read_out
from nnpassport.embedding.schemes.deepsigns_blackbox import DEEPSIGNS_BLACKBOX, SEARCHED
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.schemes.uchida import UCHIDA
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.scheme import (
    BadRecipeError,
    Batch,
    Part,
    UnreadableDataError,
    UnreadableKeyError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification.remote.finding import require_triggers

EXAMPLE = torch.zeros(2, 1, 8, 8)
SMALL = with_settings(DEEPSIGNS, groups=4, bits=8)
RECIPE = Recipe(epochs=8, batch=64, rate=0.05, schedule="one-cycle", augment=False)


def network(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16 * 4 * 4, 10)),
    ).eval()


def key_for(digits, model, scheme=SMALL, seed=bytes(32), layers=None):
    drawn = scheme.draw_key(model, EXAMPLE, seed=seed, layers=layers)
    return scheme.prepared(drawn, model, digits[0].resized(8), digits[2])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def marked(digits):
    """A network with all of the default scheme's bits in a layer of 256, and their key."""
    model = network()
    key = key_for(digits, model, DEEPSIGNS)
    strong = with_settings(DEEPSIGNS, strength=0.1, groups_per_step=4)
    strong.embed(model, key, digits[0].resized(8), RECIPE, normalise=digits[2])
    return model.eval(), key


def test_reads_the_sign_of_each_row_times_the_mean_of_its_group(digits):
    model = network()
    key = key_for(digits, model)
    projection, read = key.layer_projection("8"), read_out(model, key, digits[2])
    with torch.no_grad():
        received = [model[:8](digits[2](each[None]))[0] for each in key.trigger_set()[0]]
    for bit in range(32):
        group = bit // 8
        mine = received[group * GROUP : (group + 1) * GROUP]
        mean = [sum(float(each[i]) for each in mine) / GROUP for i in range(256)]
        oracle = sum(float(x) * m for x, m in zip(projection[bit], mean, strict=True))
        assert float(read[bit]) == pytest.approx(oracle, abs=1e-4)
    matches = int((read.sign() == key.layer_signs("8")).sum())
    assert SMALL.verify_network(model, key, digits[2]).matches == matches


def test_a_convolution_is_read_by_all_it_receives_and_tokens_by_their_mean(digits):
    model = network()
    key = key_for(digits, model, layers=["3"])
    assert key.context.layers[0].passport == (8, 8, 8)
    with torch.no_grad():
        received = model[:3](digits[2](key.trigger_set()[0][:GROUP]))
    means = group_means(model, key, digits[2])
    torch.testing.assert_close(means[0].float(), received.flatten(1).mean(0))
    tokens = nn.Sequential(nn.Unflatten(3, (2, 4)), nn.Flatten(1, 3), nn.Linear(4, 6))
    tokens = nn.Sequential(tokens, nn.Flatten(), nn.Linear(96, 10)).eval()
    key = key_for(digits, tokens, layers=["0.2"])
    pixels = digits[2](key.trigger_set()[0][:GROUP]).view(GROUP, 16, 4)
    means = group_means(tokens, key, digits[2])
    torch.testing.assert_close(means[0].float(), pixels.mean((0, 1)))


def test_reading_runs_in_evaluation_mode_and_leaves_the_network_alone(digits):
    model = network()
    key = key_for(digits, model)
    before, read = deepcopy(model.state_dict()), read_out(model, key, digits[2])
    assert torch.equal(read_out(model.train(), key, digits[2]), read)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_each_group_is_of_one_class_and_no_picture_comes_twice(digits):
    data = digits[0].resized(8)
    pictures = key_for(digits, network()).trigger_set()[0]
    same = (pictures[:, None] == data.images[None]).flatten(2).all(2)
    assert (same.sum(1) >= 1).all()
    classes = data.labels[same.int().argmax(1)].view(4, GROUP)
    assert (classes == classes[:, :1]).all()
    assert len(classes[:, 0].unique()) == 4
    assert len(pictures.flatten(1).unique(dim=0)) == len(pictures)


def test_groups_share_classes_where_there_are_few(digits):
    few = digits[0].resized(8)
    few = few.subset((few.labels < 2).nonzero()[:, 0])
    key = SMALL.draw_key(network(), EXAMPLE, seed=bytes(32))
    assert len(SMALL.prepared(key, network(), few, digits[2]).trigger_images) == 4 * GROUP
    with pytest.raises(UnreadableDataError, match="images for 2 groups of 16 of one class"):
        SMALL.prepared(key, network(), few.subset(torch.arange(50)), digits[2])


def test_bits_and_projection_are_bound_to_the_pictures(digits):
    key = key_for(digits, network())
    assert key.derived
    assert key.trigger_labels is None
    changed = key.trigger_images.copy()
    changed[0, 0, 0, 0] ^= 1
    other = replace(key, trigger_images=changed)
    assert (other.layer_signs("8") != key.layer_signs("8")).any()
    assert (other.layer_projection("8") != key.layer_projection("8")).float().mean() > 0.9


def test_matches_of_an_independent_network_are_those_of_coins(digits):
    model, flips = network(1), 0
    for number in range(40):
        key = key_for(digits, network(0), seed=bytes([number] * 32))
        flips += SMALL.verify_network(model, key, digits[2]).matches
    # Both tails of Binomial(40·32, ½) at 10⁻⁴.
    assert log10_binomial_tail(flips, 1280) > -4
    assert log10_binomial_tail(1280 - flips, 1280) > -4


@pytest.mark.trains
def test_the_mark_is_found_at_the_strictest_threshold(digits, marked):
    model, key = marked
    found = DEEPSIGNS.verify_network(model, key, digits[2])
    assert found.accepted
    assert found.matches == found.bits == 256
    assert DEEPSIGNS.verify_as_published(found).accepted
    one_off = replace(found, matches=255)
    assert not DEEPSIGNS.verify_as_published(one_off).accepted
    assert not DEEPSIGNS.verify_network(network(1), key, digits[2]).accepted


@pytest.mark.trains
@torch.no_grad()
def test_flipped_filters_change_no_bit_and_moved_channels_do(digits, marked):
    model, key = marked
    pictures = digits[2](key.trigger_set()[0])
    flipped, moved = deepcopy(model), deepcopy(model)
    for tensor in (flipped[3].weight, flipped[3].bias, flipped[4].running_mean, flipped[4].weight):
        tensor[::2] *= -1
    torch.testing.assert_close(flipped(pictures), model(pictures), atol=1e-3, rtol=1e-3)
    assert DEEPSIGNS.verify_network(flipped, key, digits[2]).matches == 256
    order = torch.randperm(16, generator=rng())
    for tensor in (*moved[3].parameters(), *moved[4].state_dict().values()):
        if tensor.dim():
            tensor.copy_(tensor[order])
    moved[8].weight.copy_(moved[8].weight.view(10, 16, 16)[:, order].flatten(1))
    torch.testing.assert_close(moved(pictures), model(pictures), atol=1e-3, rtol=1e-3)
    found = DEEPSIGNS.verify_network(moved, key, digits[2])
    assert not found.accepted
    assert found.matches < 180


def test_the_terms_of_a_step_are_those_of_loops(digits):
    model, normalise = network().train(), digits[2]
    key = key_for(digits, model)
    scheme = with_settings(SMALL, clustering=0.5, strength=0.25, groups_per_step=2)
    batch = Batch(torch.randn(6, 1, 8, 8, generator=rng()), torch.arange(6), step=1)
    outcome = scheme.objective(key, steps=2, normalise=normalise)(deepcopy(model), batch)
    pictures = normalise(key.trigger_set()[0][2 * GROUP :])  # the second step's turn
    with torch.no_grad():
        received = model[:8](torch.cat([batch.images, pictures]))
        task = nn.functional.cross_entropy(model[8](received[:6]), batch.labels)
    features = received[6:].view(2, GROUP, -1)
    means, rows = features.mean(1), key.layer_projection("8").view(4, 8, -1)[2:]
    signs, bits = key.layer_signs("8").view(4, 8)[2:], 0.0
    for group in range(2):
        for row, sign in zip(rows[group], signs[group], strict=True):
            cosine = row @ means[group] / row.norm() / means[group].norm()
            bits += float(torch.log1p(torch.exp(-sign * 4.0 * 16 * cosine)))
    within = float(((features - means[:, None]) ** 2).sum(2).mean())
    between = float((means - means.mean(0)).pow(2).sum(1).mean())
    expected = float(task) + 0.5 * within / between + 0.25 * bits
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_parts_of_a_step_share_its_pictures(digits):
    model, normalise = network().train(), digits[2]
    objective = SMALL.objective(key_for(digits, model), steps=1, normalise=normalise)
    sizes = []
    hook = model.register_forward_pre_hook(lambda _m, args: sizes.append(len(args[0])))
    for index in range(3):
        batch = Batch(torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), 0, Part(index, 3))
        assert objective(model, batch).loss.isfinite()
    hook.remove()
    assert sizes == [2 + 11, 2 + 11, 2 + 10]


def test_a_loop_of_ones_own_has_its_own_loss_and_its_own_labels(digits):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, pixels):
            return {"logits": self.inner(pixels)}

    seen = []

    def task(output, labels):
        seen.append((tuple(output["logits"].shape), labels))
        return output["logits"].sum() * 0

    model = Named().train()
    key = key_for(digits, model)
    objective = SMALL.objective(key, steps=1, normalise=digits[2], task=task)
    outcome = objective(model, Batch({"pixels": torch.zeros(3, 1, 8, 8)}, "labels"))
    outcome.loss.backward()
    assert seen == [((3, 10), "labels")]
    assert set(outcome.measures) == {"sign_match", "task_loss"}
    assert model.inner[0].weight.grad.abs().sum() > 0


@pytest.mark.trains
def test_a_forged_projection_passes_the_published_rule_and_has_no_p_value(digits, marked):
    model, _ = marked
    outcome = forge_activations(model, DEEPSIGNS, EXAMPLE, rng(), normalise=digits[2])
    found = measured.verify_model(outcome.model, digits[2], outcome.key)
    assert found.matches == found.bits
    assert (found.log10_p_value, found.accepted) == (None, False)
    assert DEEPSIGNS.verify_as_published(found).accepted
    assert not outcome.key.derived
    drawn = replace(outcome.key, projections=None, signs=None)
    honest, forged = (each.layer_projection("8") for each in (drawn, outcome.key))
    assert torch.equal(honest.abs(), forged.abs())  # mirrored, and nothing else
    assert not measured.verify_model(model, digits[2], drawn).accepted
    with pytest.raises(UnsuitableModelError, match="uchida reads no activations"):
        forge_activations(model, UCHIDA, EXAMPLE, rng(), normalise=digits[2])


@pytest.mark.trains
def test_nothing_takes_the_pictures_for_triggers(digits, marked, tmp_path):
    model, key = marked
    with pytest.raises(UnsuitableModelError, match="no triggers to ask"):
        require_triggers(key)
    with pytest.raises(UnsuitableModelError, match="no trigger set"):
        DEEPSIGNS.verify_answers(torch.zeros(128, dtype=torch.long), key)
    with pytest.raises(UnsuitableModelError, match="has no triggers"):
        measured.verify_answers(tmp_path, key)
    with pytest.raises(UnsuitableModelError, match="has no triggers, and a set"):
        ownership.with_trigger_file(key, tmp_path / "triggers.parquet")
    with pytest.raises(UnsuitableModelError, match="no trigger set to forge"):
        forge_triggers(model, DEEPSIGNS, EXAMPLE, rng(), normalise=digits[2])
    with pytest.raises(UnsuitableModelError, match="not in the weights"):
        measured.verify_aligned(model.state_dict(), key, model)
    with pytest.raises(UnsuitableModelError, match="activations and not its weights"):
        DEEPSIGNS.verify(model.state_dict(), key)


def test_refuses_a_key_without_pictures_or_of_another_network(digits):
    model = network()
    bare, key = SMALL.draw_key(model, EXAMPLE), key_for(digits, model)
    for refused in (
        lambda: SMALL.insert(model, bare, EXAMPLE),
        lambda: SMALL.objective(bare, steps=1, normalise=digits[2]),
        lambda: SMALL.verify_network(model, bare, digits[2]),
    ):
        with pytest.raises(UnreadableKeyError, match="no pictures yet"):
            refused()
    SMALL.insert(model, key, EXAMPLE)
    wide = key_for(digits, model, layers=["3"])
    with pytest.raises(UnsuitableModelError, match=r"'3' receives .*16, 8, 8.* made for 8"):
        SMALL.verify_network(network(width=16), wide, digits[2])
    with pytest.raises(UnsuitableModelError, match="receives nothing"):
        SMALL.verify_network(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), key, digits[2])


def test_one_layer_is_named(digits):
    with pytest.raises(UnsuitableModelError, match="2 were found; needed: the name of one: 0, 3"):
        SMALL.draw_key(network(), EXAMPLE, layers=["0", "3"])
    with pytest.raises(UnsuitableModelError, match="0 were found"):
        SMALL.draw_key(network(), EXAMPLE, layers=["1"])
    with pytest.raises(BadRecipeError, match="no more groups a step"):
        with_settings(SMALL, groups_per_step=5)


def test_refuses_a_key_with_half_a_group(digits):
    key = key_for(digits, network())
    with pytest.raises(UnreadableKeyError, match="32 bits for 40 pictures"):
        replace(key.context, triggers=key.context.triggers._replace(count=40))


@pytest.mark.trains
def test_noise_is_chosen_before_it_has_labels(digits, marked):
    model, _ = marked
    scheme = with_settings(DEEPSIGNS_BLACKBOX, triggers=40)
    key = key_for(digits, model, scheme)
    assert key.derived
    with torch.no_grad():
        pictures = torch.randint(256, (200, 1, 8, 8), generator=rng(), dtype=torch.uint8)
        of_any, of_key = (
            model(digits[2](p)).softmax(1).amax(1) for p in (pictures, key.trigger_set()[0])
        )
    # The least sure of so many: all of the key's are in the lowest part of noise's own sureness.
    assert of_key.max() < of_any.quantile(2.5 / SEARCHED)
    classes = torch.cat(
        [key_for(digits, model, scheme, bytes([n] * 32)).trigger_set()[1] for n in range(10)]
    )
    guessed = (classes.view(10, -1) == answers_to(key, model, digits[2])).sum()
    assert log10_binomial_tail(int(guessed), 400, 0.1) > -4  # no label was kept for being missed
    assert log10_binomial_tail(int(400 - guessed), 400, 0.9) > -4


def test_the_published_black_box_rule_is_a_binomial_test_at_its_own_level(digits):
    key = key_for(digits, network(), with_settings(DEEPSIGNS_BLACKBOX, triggers=100))
    _, labels = key.trigger_set()
    for right, accepted in ((23, False), (24, True)):
        answers = torch.where(torch.arange(100) < right, labels, (labels + 1) % 10)
        verdict = DEEPSIGNS_BLACKBOX.verify_answers(answers, key)
        assert verdict.chance == 0.1
        assert not verdict.accepted
        assert (log10_binomial_tail(right, 100, 0.1) <= -4) == accepted
        assert DEEPSIGNS_BLACKBOX.verify_as_published(verdict).accepted == accepted
    adi = ADI.verify_answers(labels, key)
    assert ADI.verify_as_published(adi).accepted
    unsaid = Verdict("s", 100, 60, None, -30.0)
    assert not DEEPSIGNS_BLACKBOX.verify_as_published(unsaid).accepted
