"""Cosine watermarks: waves as the paper adds them, its ratio, and phases that are coins."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from test_answers import CLASSES, before, pictures, softmax
from torch import nn

from nnpassport.embedding.schemes.answers import ANSWERS, bound_to
from nnpassport.embedding.schemes.cosine import COSINE, RATIO, power, signal_to_noise
from nnpassport.embedding.schemes.functions import TensorFunctions, subtracting
from nnpassport.embedding.schemes.served import served, taken_off
from nnpassport.keys.answers import coins_of, functions_of, key_function, read_answers
from nnpassport.keys.context import AnswersForm, Context, TriggerShape
from nnpassport.keys.key import Key
from nnpassport.scheme import Batch, UnreadableKeyError, UnsuitableModelError

SIZE, SHOWN = (3, 12, 12), 600
STRENGTH = 0.05
PICTURES = pictures(size=SIZE, count=SHOWN)
SAID = before(PICTURES)
SURE = 3 * SAID


def drawn(number=1, coins=100, shown=PICTURES):
    form = AnswersForm("waves", coins, round(1000 * STRENGTH))
    triggers = TriggerShape(SHOWN, CLASSES, SIZE)
    context = Context("cosine", "Zoë", (), triggers, bytes(16), answers=form)
    return bound_to(Key(number.to_bytes(32, "big"), context), shown, SAID, "0" * 64)


def g_of(key):
    return torch.from_numpy(key_function(functions_of(key), coins_of(key), PICTURES, CLASSES))


def serves(key, scores=SURE):
    """What a service with this key answers, as probabilities."""
    return served(torch.from_numpy(softmax(scores)), g_of(key), STRENGTH).numpy()


KEY = drawn()


def test_what_is_served_is_the_paper_s_equation():
    chances, g = softmax(SURE[:6]), g_of(KEY)[:6]
    found = served(torch.from_numpy(chances), g, STRENGTH).numpy()
    for row, waves, answered in zip(chances, g.numpy(), found, strict=True):
        a = [min(1.0, max(-1.0, each / STRENGTH / 1.5)) for each in waves]
        others = [sum(a[:c] + a[c + 1 :]) / (CLASSES - 1) for c in range(CLASSES)]
        added = [1 + (mine - theirs) / 2 for mine, theirs in zip(a, others, strict=True)]
        raised = [q + STRENGTH * each for q, each in zip(row, added, strict=True)]
        whole = 1 + STRENGTH * CLASSES
        assert answered == pytest.approx([each / whole for each in raised])
    assert found.sum(1) == pytest.approx(1)


def test_presented_the_key_takes_off_the_waves_and_nothing_else():
    chances = torch.from_numpy(softmax(SAID))
    off = taken_off(served(chances, g_of(KEY), STRENGTH).log(), g_of(KEY), STRENGTH).exp()
    assert (off - chances.clamp(min=1e-6)).abs().max() < 1e-9


def test_a_function_is_a_cosine_of_a_projection():
    functions = functions_of(KEY)
    one = drawn(coins=CLASSES)  # one wave for each class
    waves = functions_of(one)
    for number in range(CLASSES):
        vector = waves.bank[:, number]
        assert 2 < np.linalg.norm(vector) < 8
        cosines = [float(np.cos((vector * p.flatten() / 255).sum())) for p in PICTURES]
        straight = np.corrcoef(cosines, waves(PICTURES)[:, number])[0, 1]
        assert straight > 0.99  # beyond three standard deviations it is cut off
    tensors = TensorFunctions(functions)(torch.from_numpy(PICTURES) / 255)
    np.testing.assert_allclose(tensors.numpy(), functions(PICTURES), atol=2e-3)


def test_the_waves_of_a_known_seed_are_as_they_always_were():
    frequencies = np.linalg.norm(functions_of(drawn(9, coins=8)).bank, axis=0)
    assert frequencies.round(3).tolist() == GOLDEN


GOLDEN = [3.02, 2.316, 7.566, 7.52, 6.605, 7.379, 4.098, 2.973]


def test_who_serves_them_is_found_and_labels_of_sure_answers_say_nothing():
    assert read_answers(serves(KEY), KEY).log10_p_value < -20
    assert read_answers(softmax(SURE), KEY).log10_p_value > -3
    labels = serves(KEY).argmax(1)
    assert (labels == SURE.argmax(1)).mean() > 0.99
    assert read_answers(labels, KEY, labels=True).log10_p_value > -3


def test_strangers_keys_are_uniform_on_what_another_key_serves():
    theirs = serves(drawn(99))
    found = [10 ** read_answers(theirs, drawn(n)).log10_p_value for n in range(200, 320)]
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert min(found) > 1e-4


def test_one_wave_is_one_coin():
    key = drawn(coins=1)
    found = read_answers(serves(key), key)
    assert (found.bits, found.matches) == (1, 1)
    assert found.log10_p_value == pytest.approx(np.log10(0.5))


# The published ratio


def test_power_is_what_a_wave_of_each_frequency_explains():
    rng = np.random.default_rng(0)
    places, values = rng.normal(size=50), rng.normal(size=50)
    for frequency, found in zip(
        (0.7, 5.0), power(places, values, np.array([0.7, 5.0])), strict=True
    ):
        columns = np.stack([np.ones(50), np.cos(frequency * places), np.sin(frequency * places)], 1)
        left = values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]
        explained = np.square(values - values.mean()).sum() - np.square(left).sum()
        assert found == pytest.approx(explained / 2)


def test_the_ratio_is_high_where_its_wave_is_served():
    """As published: one wave, of one class, on answers that are sure."""
    steady = 40.0 * np.eye(CLASSES)[SAID.argmax(1)]
    keys = [drawn(number, coins=1) for number in range(1, 9)]
    marked = [signal_to_noise(serves(key, steady), key) for key in keys]
    plain = [signal_to_noise(softmax(SURE), key) for key in keys]
    assert np.median(marked) > 6
    assert max(plain) < 2


def test_an_honest_network_passes_the_published_rule_and_no_coin_moves():
    """Answers that follow how light a picture is have their power where waves are slow."""
    light = np.random.default_rng(3).uniform(size=SHOWN)
    shades = np.broadcast_to((255 * light[:, None, None, None]).astype(np.uint8), PICTURES.shape)
    honest = np.full((SHOWN, CLASSES), 0.1)
    honest[np.arange(SHOWN), SAID.argmax(1)] = 0.5 + 0.4 * light
    keys = [drawn(number, shown=shades.copy()) for number in range(40, 70)]
    ratios = [signal_to_noise(honest, key) for key in keys]
    assert np.mean(np.array(ratios) > RATIO) > 0.1
    found = [10 ** read_answers(honest, key).log10_p_value for key in keys]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_a_ratio_needs_waves_and_inputs_of_the_class():
    form = AnswersForm("layout", 8, 50)
    context = replace(KEY.context, scheme="answers", answers=form)
    other = bound_to(Key(bytes(32), context), PICTURES, SAID, "0" * 64)
    with pytest.raises(UnreadableKeyError, match="needed: waves"):
        signal_to_noise(softmax(SAID), other)
    lonely = SAID.copy()
    lonely[:, 0] -= 100
    alone = bound_to(Key(bytes(32), KEY.context), PICTURES, lonely, "0" * 64)
    with pytest.raises(UnreadableKeyError, match="gives to class 0"):
        signal_to_noise(softmax(SAID), alone, 0)


# What is refused


@pytest.mark.parametrize(
    ("scheme", "kind", "coins", "size"),
    [
        ("cosine", "filters", 8, SIZE),
        ("answers", "waves", 8, SIZE),
        ("cosine", "waves", 513, SIZE),
        ("cosine", "waves", 300, (3, 400, 400)),
        ("cosine", "waves", 8, (1, 1, 64)),
    ],
)
def test_waves_are_of_cosine_alone_and_no_more_than_can_be_kept(scheme, kind, coins, size):
    with pytest.raises(UnreadableKeyError):
        Context(
            scheme,
            "Zoë",
            (),
            TriggerShape(10, CLASSES, size),
            bytes(16),
            answers=AnswersForm(kind, coins, 50),
        )


def test_texts_and_other_losses_are_refused():
    model = nn.Linear(64, CLASSES)
    with pytest.raises(UnsuitableModelError, match="waves of pictures"):
        COSINE.draw_key(model, torch.zeros(2, 64))
    with pytest.raises(UnsuitableModelError, match="another"):
        COSINE.objective(KEY, steps=1, task=nn.functional.cross_entropy)


def test_a_key_has_as_many_waves_as_their_directions_allow():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 40))
    few = replace(COSINE, pictures=100).draw_key(model, torch.zeros(2, 3, 224, 224))
    assert few.context.answers.coins == 2**25 // (3 * 224 * 224)
    many = COSINE.draw_key(model, torch.zeros(2, 3, 32, 32))
    assert many.context.answers.coins == 512
    assert ANSWERS.draw_key(model, torch.zeros(2, 3, 32, 32)).context.answers.kind == "filters"


def test_a_step_asks_for_what_would_be_served(digits):
    """Of a network that serves nothing else, the loss is the entropy of it, and no less."""
    images = torch.from_numpy(PICTURES[:32])
    normalise = digits[2].__class__((0.5,) * 3, (0.25,) * 3)
    labels = torch.arange(32) % CLASSES
    g = g_of(KEY)[:32].float()
    wanted = served(nn.functional.one_hot(labels, CLASSES).float(), g, STRENGTH) + 1e-9
    objective = COSINE.objective(KEY, steps=1, normalise=normalise)

    class Serves(nn.Module):
        def forward(self, _):
            return wanted.log()

    outcome = objective(Serves(), Batch(normalise(images), labels))
    entropy = -(wanted * wanted.log()).sum(1).mean()
    assert float(outcome.loss) == pytest.approx(float(entropy), abs=1e-4)
    off = subtracting(KEY, normalise)(wanted.log(), normalise(images))
    assert torch.equal(off.argmax(1), labels)
