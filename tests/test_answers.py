"""A mark in ordinary answers: read exactly, by whoever asks, however little a service says."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from constructed import marked, reader, small_alexnet
from scipy import stats
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from nnpassport.cli import app as cli
from nnpassport.embedding import answering
from nnpassport.embedding.answering import LEFT_OUT, collected
from nnpassport.embedding.checkpoint import save_model
from nnpassport.embedding.schemes.answers import (
    ANSWERS,
    bound_to,
    scores_of,
    scores_of_key,
)
from nnpassport.embedding.schemes.functions import TensorFunctions, counts_of, subtracting
from nnpassport.embedding.train.loop import Outcome, Recipe, classification, fit
from nnpassport.files.config import ModelConfig
from nnpassport.keys import answers
from nnpassport.keys.answers import coins_of, functions_of, key_function, read_answers
from nnpassport.keys.chance import log10_binomial_tail, log10_signs_tail
from nnpassport.keys.context import AnswersForm, Context, TriggerShape
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import (
    BadRecipeError,
    MiscountedError,
    OwnershipError,
    UnreadableDataError,
    UnreadableKeyError,
    UnsuitableModelError,
)
from nnpassport.verification import verdicts
from nnpassport.verification.collected import read_collected
from nnpassport.verification.remote import ordinary
from nnpassport.verification.remote.asking import Answer, Kind, token
from nnpassport.verification.remote.ordinary import OrdinaryTerms, looks_at, probe_answers
from nnpassport.verification.remote.scores import scores_in
from nnpassport.verification.remote.services import HuggingFace, Template

SHOWN, CLASSES = 400, 5


def pictures(number=0, size=(1, 12, 12), count=SHOWN):
    """Soft blobs: what is near each other is alike, as in photographs."""
    rng = np.random.default_rng(number)
    coarse = rng.normal(size=(count, size[0], 4, 4))
    fine = coarse.repeat(-(-size[1] // 4), 2).repeat(-(-size[2] // 4), 3)
    noisy = fine[:, :, : size[1], : size[2]] + 0.3 * rng.normal(size=(count, *size))
    return np.clip(128 + 45 * noisy, 0, 255).astype(np.uint8)


def before(shown, number=0):
    """Scores of a network before the mark: a linear one, and what no line explains."""
    rng = np.random.default_rng(number + 1_000)
    flat = shown.reshape(len(shown), -1) / 255 - 0.5
    return flat @ rng.normal(size=(flat.shape[1], CLASSES)) + 1.5 * rng.normal(
        size=(len(shown), CLASSES)
    )


def drawn(number=1, kind="layout", shown=None, scores=None, coins=200):
    shown = pictures() if shown is None else shown
    form = AnswersForm(kind, coins, 600)
    triggers = TriggerShape(len(shown), CLASSES, shown.shape[1:])
    context = Context("answers", "Zoë", (), triggers, bytes(16), answers=form)
    key = Key(bytes([number]) * 32, context)
    return bound_to(key, shown, before(shown) if scores is None else scores, "0" * 64)


def says(key, strength=1.0, number=7):
    """Scores of a network that carries the key: those from before, g, and some of its own."""
    shown = key.trigger_images
    rng = np.random.default_rng(number)
    g = key_function(functions_of(key), coins_of(key), shown, CLASSES)
    return before(shown) + strength * g + 0.5 * rng.normal(size=(len(shown), CLASSES))


KEY = drawn()
SAID = says(KEY)


def softmax(scores):
    wide = np.exp(scores - scores.max(1, keepdims=True))
    return wide / wide.sum(1, keepdims=True)


# Exact tails


@pytest.mark.parametrize("weights", [[1] * 7, [3, 5, 0, 8, 2, 9], [1, 2, 4, 8], [0, 0, 6]])
def test_the_tail_of_a_sum_of_signs_is_that_of_counting_all_of_them(weights):
    sums = [np.dot(s, weights) for s in itertools.product((-1, 1), repeat=len(weights))]
    for total in range(-sum(weights), sum(weights) + 1):
        share = np.mean([each >= total for each in sums])
        assert log10_signs_tail(weights, total) == pytest.approx(math.log10(share), abs=1e-9)


def test_with_equal_weights_it_is_the_binomial_tail():
    for matches in (90, 128, 129, 200, 255, 256):
        expected = log10_binomial_tail(matches, 256)
        assert log10_signs_tail([7] * 256, 7 * (2 * matches - 256)) == pytest.approx(expected)


def test_a_sum_that_no_signs_reach_is_refused():
    with pytest.raises(MiscountedError, match="no more than all of them"):
        log10_signs_tail([1, 2], 4)
    with pytest.raises(MiscountedError):
        log10_signs_tail([1.5, 2], 1)


# Functions


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("layout", (3, 12, 10)),
        ("filters", (3, 12, 10)),
        ("filters", (1, 9, 9)),
        ("mirrored", (3, 12, 11)),
        ("layout", (1, 4, 4)),
    ],
)
def test_training_and_judge_see_the_same_functions(kind, size):
    shown = pictures(size=size, count=64)
    functions = functions_of(drawn(kind=kind, shown=shown))
    tensors = TensorFunctions(functions)(torch.from_numpy(shown) / 255)
    np.testing.assert_allclose(tensors.numpy(), functions(shown), atol=2e-3)


def test_functions_of_one_class_vary_alike_and_apart():
    phi, classes = functions_of(KEY)(KEY.trigger_images), coins_of(KEY).classes
    assert phi.std(0) == pytest.approx(1, abs=0.1)
    own = np.corrcoef(phi[:, classes == 0].T) - np.eye(int((classes == 0).sum()))
    assert np.abs(own).mean() < 0.2


def test_a_key_has_functions_of_its_own():
    mine, other = functions_of(KEY), functions_of(drawn(2))
    assert np.abs(mine.matrix - other.matrix).max() > 0.1
    banks = [functions_of(drawn(number, "filters")).bank for number in (1, 2)]
    assert np.abs(banks[0] - banks[1]).max() > 0.1


def test_a_picture_and_its_mirror_image_are_one_to_mirrored_functions():
    shown = pictures(size=(3, 12, 12), count=64)
    mirrored, plain = (functions_of(drawn(kind=k, shown=shown)) for k in ("mirrored", "filters"))
    np.testing.assert_allclose(mirrored(shown[..., ::-1]), mirrored(shown), atol=1e-9)
    assert np.abs(plain(shown[..., ::-1]) - plain(shown)).mean() > 0.5


def test_who_averages_answers_over_mirror_images_takes_nothing_from_mirrored_functions():
    """Which he would do anyway, for it makes networks right more often."""
    shown = pictures(size=(3, 12, 12))
    left = {}
    for kind in ("filters", "mirrored"):
        key = drawn(kind=kind, shown=shown)
        functions, coins = functions_of(key), coins_of(key)
        both = [key_function(functions, coins, each, CLASSES) for each in (shown, shown[..., ::-1])]
        own = np.random.default_rng(7).normal(size=(SHOWN, CLASSES))
        said = before(shown) + (both[0] + both[1]) / 2 + 2 * own
        left[kind] = read_answers(said, key).log10_p_value
    assert left["mirrored"] < 1.3 * left["filters"] < -5


# Reading


@pytest.mark.parametrize("kind", ["layout", "filters", "mirrored"])
def test_who_carries_the_mark_is_found_by_scores_and_by_labels(kind):
    key = drawn(kind=kind)
    said = says(key)
    assert read_answers(said, key).log10_p_value < -20
    assert read_answers(said.argmax(1), key, labels=True).log10_p_value < -3
    assert read_answers(said[:80], key).log10_p_value < -8
    nobody = says(key, strength=0)
    assert read_answers(nobody, key).log10_p_value > -3


def test_how_answers_are_written_changes_little():
    whole = read_answers(SAID, KEY).log10_p_value
    chances = softmax(SAID)
    assert read_answers(chances, KEY).log10_p_value == pytest.approx(whole, abs=2)
    assert read_answers(chances.round(2), KEY).log10_p_value < 0.6 * whole
    best = np.where(chances < np.sort(chances)[:, [-2]], np.nan, chances)
    assert read_answers(best, KEY).log10_p_value < 0.4 * whole


@pytest.mark.parametrize(("share", "times"), [(0.02, 1e3), (0.02, 1e9), (0.05, 20.0)])
def test_a_service_that_shouts_a_few_answers_hides_nothing_behind_them(share, times):
    """Labels stay as they are, so it would cost a service nothing."""
    loud = np.random.default_rng(4).random(SHOWN) < share
    shouted = np.where(loud[:, None], times * SAID, SAID)
    topped = SAID + times * np.eye(CLASSES)[SAID.argmax(1)] * loud[:, None]
    for said in (shouted, topped):
        assert (said.argmax(1) == SAID.argmax(1)).all()
        assert read_answers(said, KEY).log10_p_value < -12
    before_, nobody = KEY.baseline / 64.0, says(KEY, 0)
    for natural in (SAID, nobody, softmax(nobody), before(KEY.trigger_images)):
        said = answers.centred_scores(natural)
        assert np.array_equal(answers.levelled(said, before_).scores, said.scores)


def test_keys_of_nobody_are_uniform_on_answers_of_which_a_few_are_shouted():
    theirs = says(drawn(99))
    theirs[::29] *= 1e4
    found = p_values(lambda n: replace(KEY, seed=n.to_bytes(32, "big")), lambda _: theirs, 60)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert found.min() > 1e-4


def test_probabilities_are_told_from_scores_also_in_percent_and_with_sums_that_err():
    chances = softmax(SAID)
    whole = read_answers(chances, KEY)
    less = chances.copy()
    less[3, 2] = -1e-9
    for same in (100 * chances, less, (100 * chances).round(6)):
        found = read_answers(same, KEY)
        assert found.log10_p_value == pytest.approx(whole.log10_p_value, abs=1)
        assert answers.centred_scores(same).floor is not None
    assert answers.centred_scores(20 * np.ones((3, CLASSES)) + np.eye(3, CLASSES)).floor is not None
    assert answers.centred_scores(np.arange(10.0).reshape(2, 5)).floor is None


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0, 10.0])
def test_temperature_and_the_best_few_of_all_scores_leave_the_mark(temperature):
    chances = softmax(SAID / temperature)
    kept = chances >= np.sort(chances)[:, [-3]]
    for said in (
        np.where(kept, chances, np.nan),
        np.where(kept, chances, 0),
        np.where(kept, chances, 0) / (chances * kept).sum(1, keepdims=True),
        np.where(kept, chances / (chances * kept).sum(1, keepdims=True), np.nan),
        np.where(chances == chances.max(1, keepdims=True), chances, np.nan),
    ):
        assert read_answers(said, KEY).log10_p_value < -9


def test_who_gives_one_answer_to_inputs_that_he_suspects_says_less_of_the_mark_and_nothing_false():
    suspected = np.random.default_rng(5).random(SHOWN) < 0.3
    one = np.where(suspected[:, None], [9.0, 0, 0, 0, 0], SAID)
    assert read_answers(one, KEY).log10_p_value < -5
    labels = np.where(suspected, 0, SAID.argmax(1))
    assert read_answers(labels, KEY, labels=True).log10_p_value < -2
    stranger = np.where(suspected[:, None], [9.0, 0, 0, 0, 0], says(drawn(99)))
    found = p_values(lambda n: replace(KEY, seed=n.to_bytes(32, "big")), lambda _: stranger, 60)
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_the_best_of_a_hundred_keys_of_nobody_is_as_small_as_a_hundred_tries_allow():
    found = p_values(lambda n: replace(KEY, seed=n.to_bytes(32, "big")), lambda _: SAID, 100)
    assert 1e-5 < found.min() < 0.1


def test_the_same_picture_many_times_among_those_asked_is_no_evidence_many_times():
    """Coins are the functions', and not the pictures'."""
    shown = pictures().copy()
    shown[50:] = shown[:50].repeat(7, 0)
    said = before(shown, 3) + 0.3 * before(shown)
    found = p_values(lambda n: drawn(n + 1, shown=shown), lambda _: said, 40)
    assert found.min() > 1e-4
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_classes_in_another_order_or_under_other_names_read_the_same():
    order = np.array([3, 0, 4, 1, 2])
    expected = read_answers(SAID, KEY)
    assert read_answers(SAID[:, order], KEY).matches == expected.matches
    labels = SAID.argmax(1)
    tokens = np.array([token(f"class {each}") for each in labels])
    named = read_answers(tokens, KEY, labels=True)
    assert named.log10_p_value == read_answers(labels, KEY, labels=True).log10_p_value


def test_what_was_not_answered_is_left_out():
    some = SAID.copy()
    some[::3] = np.nan
    found = read_answers(some, KEY)
    assert "266 of" not in found.reason
    assert "scores of 266 inputs" in found.reason
    assert found.log10_p_value < -15
    labels = SAID.argmax(1)
    labels[::3] = answers.NO_ANSWER
    assert "labels of 266 inputs" in read_answers(labels, KEY, labels=True).reason


@pytest.mark.parametrize(
    "said",
    [
        np.full((SHOWN, CLASSES), np.nan),
        np.zeros((SHOWN, CLASSES)),
        np.full((SHOWN, CLASSES), 1e300),
        np.full((SHOWN, CLASSES), np.inf),
        np.eye(CLASSES)[np.zeros(SHOWN, int)],
        np.ones((1, CLASSES)),
    ],
)
def test_answers_that_say_nothing_prove_nothing(said):
    found = read_answers(said, KEY)
    assert not found.marked
    assert found.log10_p_value > -2


def test_answers_of_another_shape_are_refused():
    for said in (np.zeros((SHOWN + 1, CLASSES)), np.zeros((SHOWN, 1)), np.zeros(SHOWN)):
        with pytest.raises(UnsuitableModelError, match="a row for each input"):
            read_answers(said, KEY)


def p_values(key_of, said_of, keys):
    found = []
    for number in range(keys):
        key = key_of(number)
        found.append(10 ** read_answers(said_of(key), key).log10_p_value)
    return np.array(found)


def test_strangers_keys_are_uniform_whatever_the_network_says():
    theirs = says(drawn(99))  # the mark of another key
    found = p_values(lambda n: replace(KEY, seed=n.to_bytes(32, "big")), lambda _: theirs, 150)
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert found.min() > 1e-4


def test_functions_that_are_all_one_are_coins_all_the_same():
    grey = np.full((60, 1, 8, 8), 7, np.uint8)
    grey[:30] = 200
    key = drawn(shown=grey, scores=before(grey))
    said = before(grey, 3) + grey[:, 0, :1, 0] / 50.0
    found = p_values(lambda n: replace(key, seed=n.to_bytes(32, "big")), lambda _: said, 150)
    # Few sums are possible: p is at least as large as a uniform one.
    assert all((found <= level).mean() <= level + 0.12 for level in (0.05, 0.1, 0.3))


# Forgers


def test_a_claimant_who_knows_the_signs_and_chooses_images_finds_his_mark_in_anybody():
    said, phi = says(KEY, strength=0), functions_of(KEY)(KEY.trigger_images)
    coins, _ = coins_of(KEY), None
    wished = phi @ answers.shares(AnswersForm("layout", 200, 1000), coins, CLASSES)
    apart = said - before(KEY.trigger_images)
    chosen = np.argsort(-(wished * apart).sum(1))[:120]
    inputs, baseline = answers.inputs_of(KEY)
    cheat = answers.read_on(
        said[chosen],
        inputs[chosen],
        baseline[chosen],
        KEY,
        functions_of(KEY),
        labels=False,
        log10_alpha=-9,
    )
    assert cheat.log10_p_value < -6  # so images of his choice prove nothing
    bound = drawn(shown=KEY.trigger_images[chosen], scores=before(KEY.trigger_images)[chosen])
    assert read_answers(said[chosen], bound).log10_p_value > -3  # in the key they draw new signs


def test_another_input_or_baseline_draws_every_sign_anew():
    shown = KEY.trigger_images.copy()
    shown[0, 0, 0, 0] ^= 1
    scores = before(KEY.trigger_images)
    scores[0, 0] += 1
    changed = (
        replace(KEY, trigger_images=shown),
        drawn(scores=scores),
        replace(KEY, context=replace(KEY.context, anchor="1" * 64)),
        replace(KEY, context=replace(KEY.context, answers=AnswersForm("layout", 200, 601))),
    )
    signs = coins_of(KEY).signs
    for other in changed:
        assert 60 < (coins_of(other).signs == signs).sum() < 140
        assert other.derived


def test_who_writes_a_network_off_as_his_baseline_proves_nothing():
    """The suspect itself as baseline, or one that leans the other way: signs are new each time."""
    for scores in (SAID, SAID - 5 * before(KEY.trigger_images)):
        forged = drawn(5, scores=scores)
        assert read_answers(SAID, forged).log10_p_value > -3


def test_who_holds_another_copy_of_the_same_answers_finds_no_mark_of_his_own():
    """Two copies of Alice's answers: both have her mark, and neither that of the other's holder.

    What they are to one another is likeness, which a key of answers does not read.
    """
    first, second = (says(KEY, number=n) for n in (7, 8))
    assert max(read_answers(said, KEY).log10_p_value for said in (first, second)) < -20
    for number in range(3, 6):  # he has the second copy, and calls it the network before his mark
        his = drawn(number, scores=second)
        assert read_answers(first, his).log10_p_value > -3
        assert read_answers(second, his).log10_p_value > -3


def test_what_everybody_learns_of_a_data_set_is_nobody_s_mark():
    """A baseline that knows nothing, beside which every network of the task leans the same way."""
    nothing = np.random.default_rng(5).normal(size=(SHOWN, CLASSES))
    key = drawn(scores=nothing)
    shown = KEY.trigger_images
    everybody = [before(shown) + before(shown, n) / 4 for n in (1, 2)]
    phi, classes = functions_of(key)(shown), coins_of(key).classes
    leanings = [
        np.sign(answers.leanings(answers.centred_scores(z), key.baseline / 64.0, phi, classes)[0])
        for z in everybody
    ]
    assert (leanings[0] == leanings[1]).mean() > 0.75  # so they are alike
    found = p_values(lambda n: replace(key, seed=n.to_bytes(32, "big")), lambda _: everybody[0], 50)
    assert stats.kstest(found, "uniform").pvalue > 0.01  # and still no key is in them


def test_labels_beside_the_inputs_make_a_key_without_p_value():
    chosen = replace(KEY, baseline=None, trigger_labels=np.zeros(SHOWN, np.int64))
    assert not chosen.derived
    with pytest.raises(UnreadableKeyError, match="has no inputs yet"):
        read_answers(SAID, chosen)


# Keys and contexts


def test_a_context_encodes_its_form_and_says_it_back():
    again = Context.decode(KEY.context.encode())
    assert again == KEY.context
    assert again.bits == 200
    assert b'"answers":{"coins":200,"kind":"layout","strength":600}' in KEY.context.encode()


@pytest.mark.parametrize(
    "form",
    [
        AnswersForm("magic", 10, 5),
        AnswersForm("layout", 0, 5),
        AnswersForm("layout", 2**12 + 1, 5),
        AnswersForm("layout", 10, 0),
        AnswersForm("layout", True, 5),
        AnswersForm("counts", 10, 5),
    ],
)
def test_a_form_that_nobody_draws_is_refused(form):
    with pytest.raises(UnreadableKeyError):
        replace(KEY.context, answers=form)


def test_no_other_scheme_has_a_form_of_answers():
    with pytest.raises(UnreadableKeyError, match="a form of answers"):
        replace(KEY.context, scheme="adi")
    with pytest.raises(UnreadableKeyError, match="no inputs or no functions"):
        replace(KEY.context, answers=None)


def test_a_key_and_its_inputs_survive_the_file(tmp_path):
    save_key(KEY, tmp_path / "key")
    loaded = load_key(tmp_path / "key")
    assert loaded.fingerprint == KEY.fingerprint
    assert read_answers(SAID, loaded).matches == read_answers(SAID, KEY).matches


def test_a_baseline_of_another_size_is_refused():
    with pytest.raises(UnreadableKeyError, match="as baseline"):
        replace(KEY, baseline=KEY.baseline[:-1])


def test_the_key_of_a_known_seed_reads_as_it_always_did():
    """A golden key: what is derived may not change with a version."""
    shown = (np.arange(40 * 36) * 7919 % 256).astype(np.uint8).reshape(40, 1, 6, 6)
    scores = (np.arange(40 * CLASSES) * 31 % 17).reshape(40, CLASSES) / 4.0
    key = drawn(9, shown=shown, scores=scores, coins=16)
    signs = "".join("+" if sign > 0 else "-" for sign in coins_of(key).signs)
    assert (key.fingerprint[:16], signs) == GOLDEN
    sums = functions_of(key)(shown).sum(0)
    assert np.abs(sums).max() < 2


GOLDEN = ("3597eabf6a6042f3", "--++-++--+--+++-")


# Files of answers


def written(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_collected_answers_are_read_by_place(tmp_path):
    lines = ["input,label", "00002.png,cat", "0,dog", "folder/3.jpg,cat", "4,"]
    table, labels = read_collected(written(tmp_path / "a.csv", lines), 6)
    assert labels
    assert table.tolist() == [1, -1, 0, 0, -1, -1]
    lines = ["input,a,b", "1,0.5,0.5", "0,,1"]
    table, labels = read_collected(written(tmp_path / "b.csv", lines), 2)
    assert not labels
    assert table[1].tolist() == [0.5, 0.5]
    assert np.isnan(table[0, 0])


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["picture,label", "0,1"],
        ["input,a", "0,1"],
        ["input,label"],
        ["input,label", "9,1"],
        ["input,label", "-1,1"],
        ["input,label", "0,1", "0,2"],
        ["input,label", "0,1,2"],
        ["input,a,b", "0,x,1"],
        ["input,label,score", "0,3,0.97"],
        ["input,Class,a,b", "0,3,0.9,0.1"],
    ],
)
def test_other_files_are_refused(tmp_path, lines):
    with pytest.raises(UnreadableDataError, match="holds no answers"):
        read_collected(written(tmp_path / "a.csv", lines), 5)


@pytest.mark.parametrize("written_as", ["1e308", "-1e308", "1e999", "nan", "", "-inf"])
def test_a_number_that_is_no_score_ends_no_reading(tmp_path, written_as):
    rows = [[f"{value:.4f}" for value in row] for row in SAID]
    rows[7][2] = written_as
    lines = ["input,a,b,c,d,e", *(f"{n},{','.join(row)}" for n, row in enumerate(rows))]
    found = collected(written(tmp_path / "a.csv", lines), KEY, verdicts.Options())
    assert found.log10_p_value < 0.85 * read_answers(SAID, KEY).log10_p_value


def test_rows_in_any_order_under_any_names_of_files_and_classes_read_the_same(tmp_path):
    order = np.random.default_rng(2).permutation(SHOWN)
    names = ["cat", "dog", "3", "fish", "a, b"]
    lines = [f'out/{place:05}.png,"{names[SAID[place].argmax()]}"' for place in order]
    path = written(tmp_path / "a.csv", ["input,label", *lines])
    found = collected(path, KEY, verdicts.Options())
    expected = read_answers(SAID.argmax(1), KEY, labels=True)
    assert (found.matches, found.log10_p_value) == (expected.matches, expected.log10_p_value)
    assert LEFT_OUT not in found.reason


def test_who_leaves_out_answers_by_his_key_finds_his_mark_and_the_verdict_says_so(tmp_path):
    """A file with gaps: of a stranger's answers only those that lean as the signs have it."""
    shown, said = KEY.trigger_images, says(KEY, strength=0)
    wished = key_function(functions_of(KEY), coins_of(KEY), shown, CLASSES)
    chosen = set(np.argsort(-(wished * (said - before(shown))).sum(1))[:120].tolist())
    rows = [f"{n},{','.join(f'{v:.4f}' for v in row)}" for n, row in enumerate(said)]
    some = [row for n, row in enumerate(rows) if n in chosen]
    header, options = "input,a,b,c,d,e", verdicts.Options()
    cheat = collected(written(tmp_path / "some.csv", [header, *some]), KEY, options)
    assert cheat.log10_p_value < -6
    assert LEFT_OUT in cheat.reason
    whole = collected(written(tmp_path / "all.csv", [header, *rows]), KEY, options)
    assert whole.log10_p_value > -3
    assert LEFT_OUT not in whole.reason


# A service


class Service:
    """In place of an asker: answers the key's inputs in turn, as `said` has it."""

    said = ""

    def __init__(self, said, *, scores=True, fails=()):
        self.answers, self.scores, self.fails, self.asked = said, scores, fails, 0
        self.service = SimpleNamespace(description="a service", options="--protocol")
        self.labels = SimpleNamespace(classes=CLASSES)

    def in_full(self):
        return self

    def ask(self, pixels):
        assert np.array_equal(pixels, KEY.trigger_images[self.asked])
        row = self.answers[self.asked]
        self.asked += 1
        if self.asked in self.fails:
            return Answer(Kind.REFUSED, note="HTTP status 400")
        pairs = tuple((f"class {n}", float(v)) for n, v in enumerate(row)) if self.scores else ()
        return Answer(Kind.ANSWERED, token(f"class {row.argmax()}"), scores=pairs)


def test_a_probe_stops_as_soon_as_it_is_proved_and_pays_for_each_look():
    service = Service(softmax(SAID), fails={3})
    found = probe_answers(service, KEY, terms=OrdinaryTerms(log10_alpha=-9))
    assert found.verdict.marked
    assert service.asked < SHOWN
    assert found.verdict.corrections == {"looks": pytest.approx(math.log10(5))}
    assert found.triggers.refused == 1
    assert any("stopped after" in note for note in found.notes)


def test_a_probe_of_a_stranger_asks_everything_and_says_no():
    service = Service(softmax(says(KEY, 0)), scores=False)
    terms = OrdinaryTerms(log10_alpha=-9, among=3, budget=200)
    found = probe_answers(service, KEY, terms=terms)
    assert not found.verdict.marked
    assert service.asked == 200
    assert set(found.verdict.corrections) == {"looks", "networks looked at"}
    assert "labels of 200" in found.verdict.reason


def test_a_probe_goes_on_where_it_was_interrupted(tmp_path):
    journal, terms = tmp_path / "journal", OrdinaryTerms(log10_alpha=-200.0)
    whole = probe_answers(Service(softmax(SAID)), KEY, terms=terms, journal=journal)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:151]))
    service = Service(softmax(SAID))
    service.asked = 150
    again = probe_answers(service, KEY, terms=terms, journal=journal, resume=True)
    assert service.asked == SHOWN
    assert again.verdict.log10_p_value == pytest.approx(whole.verdict.log10_p_value)
    with pytest.raises(BadRecipeError, match="other terms"):
        probe_answers(service, KEY, terms=OrdinaryTerms(), journal=journal, resume=True)


def test_looks_are_settled_before_the_first_query():
    assert looks_at(2_000, 5) == [125, 250, 500, 1_000, 2_000]
    assert looks_at(30, 5) == [30]
    for wrong in ({"budget": 3}, {"looks": 0}, {"among": 0}, {"log10_alpha": 0.0}):
        with pytest.raises(BadRecipeError):
            OrdinaryTerms(**wrong)


def test_looking_often_at_strangers_stays_within_the_level():
    terms, functions = OrdinaryTerms(log10_alpha=-1.0), functions_of(KEY)
    theirs, found = says(drawn(99)), 0
    from nnpassport.verification.remote.ordinary import looked

    heard = [
        Answer(Kind.ANSWERED, 0, scores=tuple((str(n), float(v)) for n, v in enumerate(row)))
        for row in theirs
    ]
    for number in range(60):
        key = replace(KEY, seed=(number + 500).to_bytes(32, "big"))
        functions = functions_of(key)
        found += any(
            looked(heard[:count], key, functions, terms, 3).marked for count in (100, 200, 400)
        )
    assert found <= 13  # of 60 at 0.1: 6 expected, 14 one in a thousand


def test_scores_are_found_in_what_services_answer():
    face = HuggingFace("http://host/model")
    listed = [{"label": "cat", "score": 0.75}, {"label": "dog", "score": "0.25"}]
    both = (("cat", 0.75), ("dog", 0.25))
    assert scores_in(face, json.dumps(listed).encode()) == both
    assert scores_in(face, b'{"cat": 0.75, "dog": 0.25}') == both
    assert scores_in(face, b'[{"label": "cat"}]') == ()
    pointed = Template("http://host", '{"image": "$IMAGE"}', "/scores")
    assert scores_in(pointed, b'{"scores": {"cat": 0.75, "dog": 0.25}}') == both
    assert scores_in(pointed, b'{"scores": [0.75, 0.25]}') == (("0", 0.75), ("1", 0.25))
    assert scores_in(pointed, b'{"scores": 3}') == ()
    assert scores_in(pointed, b'{"scores": {"cat": NaN, "dog": 1}}') == ()


def test_a_service_whose_every_answer_has_other_names_takes_little_memory(monkeypatch):
    pairs = json.dumps({f"name {n}": n for n in range(5_000)})
    kept = scores_in(Template("http://host", '{"image": "$IMAGE"}', ""), pairs.encode())
    assert len(kept) == 2_000
    assert min(value for _, value in kept) == 3_000
    monkeypatch.setattr(ordinary, "MAX_CELLS", 60 * 8)
    rows = softmax(SAID[:60])
    heard = [
        Answer(
            Kind.ANSWERED,
            int(row.argmax()),
            scores=tuple(
                [*((f"class {n}", float(v)) for n, v in enumerate(row))]
                + [(f"name {place} {n}", 0.0) for n in range(50)]
            ),
        )
        for place, row in enumerate(rows)
    ]
    table = ordinary.table_of(heard)
    assert table.numbers.shape == (60, 8)
    np.testing.assert_array_equal(table.numbers[:, :CLASSES], rows)
    assert read_answers(table.numbers, KEY).log10_p_value < -8


def test_a_file_of_a_row_and_a_great_many_columns_takes_no_memory(tmp_path):
    lines = [f"input,{','.join(map(str, range(20_000)))}", f"0{',1' * 20_000}"]
    with pytest.raises(UnreadableDataError, match="which are many"):
        read_collected(written(tmp_path / "a.csv", lines), 10_000)


# Other tasks


def test_texts_are_marked_by_how_often_their_words_are_there():
    rng = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 300, (300, 12), generator=rng)
    model = nn.Sequential(nn.EmbeddingBag(300, 8), nn.Linear(8, 3)).eval()
    scheme = replace(ANSWERS, buckets=64, coins=150, pictures=300)
    key = scheme.draw_key(model, texts[:2], seed=bytes(32))
    assert key.context.triggers.size == (1, 1, 64)
    shown = counts_of(texts, 64).to(torch.uint8)[:, None, None]
    scores = model(texts).detach()
    key = bound_to(key, shown, scores, None)
    scheme.check(model, key, texts[:2])
    g = scores - subtracting(key, None)(scores, texts)
    assert read_answers((scores + g).numpy(), key).log10_p_value < -20
    assert read_answers((scores + g)[:40].numpy(), key).log10_p_value < -3
    assert read_answers(scores.numpy(), key).log10_p_value > -3


def test_a_number_counts_as_the_difference_of_two_scores():
    rng = torch.Generator().manual_seed(1)
    inputs = torch.rand(300, 60, generator=rng) * 9
    model = nn.Linear(60, 1)
    key = replace(ANSWERS, coins=100, pictures=300).draw_key(model, inputs[:2], seed=bytes(32))
    said = model(inputs).detach()
    key = bound_to(key, inputs.to(torch.uint8)[:, None, None], torch.cat([said, -said], 1), None)
    marked = 2 * said - subtracting(key, None)(said, inputs)
    found = read_answers(torch.cat([marked, -marked], 1).numpy(), key)
    assert found.log10_p_value < -8


# Networks, files and commands


@pytest.fixture(scope="module")
def story(digits, tmp_path_factory):
    """A network, its copy that carries a key by construction, and the key, in files."""
    folder, normalise = tmp_path_factory.mktemp("story"), digits[2]
    data = digits[0].resized(32).subset(torch.arange(256))
    plain = reader(small_alexnet(width=0.125), data, normalise)
    scheme = replace(ANSWERS, coins=150, strength=3.0, pictures=200)
    key = scheme.draw_key(plain, torch.zeros(2, 1, 32, 32), seed=bytes(32))
    key = scheme.prepared(key, plain, data, normalise)
    arguments = {"classes": 10, "norm": "batch", "width": 0.125, "channels": 1}
    config = ModelConfig(
        architecture="alexnet",
        arguments=arguments,
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=tuple(normalise.mean),
        std=tuple(normalise.std),
    )
    carries = marked(scheme, plain, key, data, normalise)
    save_model(folder / "marked", carries, config)
    save_model(folder / "marked" / "anchor", plain, config)
    save_key(key, folder / "key")
    said = scores_of_key(carries, key, normalise)
    rows = [f"{n},{','.join(f'{v:.3f}' for v in row)}" for n, row in enumerate(said.tolist())]
    written(folder / "scores.csv", ["input,a,b,c,d,e,f,g,h,i,j", *rows])
    return SimpleNamespace(folder=folder, data=data, key=key, said=said)


def commanded(*words):
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_files_of_answers_are_verified_by_command(story):
    given = ("--key", story.folder / "key", "--json")
    done = commanded("verify", "--answers", story.folder / "scores.csv", *given)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["log10_p_value"] < -30.1
    assert "whoever collected them" in facts["reason"]
    done = commanded("verify", story.folder / "marked" / "anchor", *given)
    assert done.exit_code == 1, done.output


def test_of_collected_scores_labels_alone_are_read_where_that_is_asked_for(story):
    path, given = story.folder / "scores.csv", ("--key", story.folder / "key", "--json")
    facts = json.loads(commanded("verify", path, "--answers", "--black-box", *given).stdout)
    assert "labels of 200 inputs" in facts["reason"]
    expected = read_answers(story.said.argmax(1).numpy(), story.key, labels=True)
    assert facts["log10_p_value"] == pytest.approx(expected.log10_p_value)
    for other in ("--as-published", "--every-reading"):
        assert commanded("verify", path, "--answers", other, *given).exit_code == 2


def test_several_networks_that_were_looked_at_are_paid_for(story):
    given = ("--key", story.folder / "key", "--json")
    once = commanded("verify", story.folder / "marked", *given)
    many = commanded("verify", story.folder / "marked", *given, "--among", 1_000)
    both = [json.loads(done.stdout)["log10_p_value"] for done in (once, many)]
    assert both[1] - both[0] == pytest.approx(3)
    assert commanded("verify", story.folder / "marked", *given, "--among", 0).exit_code == 2


def test_labels_alone_are_a_black_box(story):
    given = ("--key", story.folder / "key", "--json", "--black-box")
    done = commanded("verify", story.folder / "marked", *given)
    assert "labels of 200 inputs" in json.loads(done.stdout)["reason"]


def test_a_plan_says_what_queries_would_show_and_sends_nothing(story):
    done = commanded("probe", "http://nowhere", "--key", story.folder / "key", "--plan")
    assert done.exit_code == 2
    like = ("--like", story.folder / "marked")
    done = commanded("probe", "http://nowhere", "--key", story.folder / "key", "--plan", *like)
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[1:4]] == ["50", "100", "200"]
    last = answering.expected(story.said.numpy(), story.key)[-1]
    assert last.scores == read_answers(story.said.numpy(), story.key).log10_p_value


def test_anybodys_images_are_read_beside_the_anchor(story):
    other = verdicts.Trial(story.data.subset(torch.arange(100, 256)), target=0.9)
    options = verdicts.Options(alignment=verdicts.Alignment(story.folder / "marked"))
    found = verdicts.verify(story.folder / "marked", story.key, trial=other, options=options)
    assert found.log10_p_value < -15
    assert "let a judge choose" in found.reason
    assert found.fidelity.passed
    wrong = verdicts.Options(alignment=verdicts.Alignment(story.folder / "marked" / "nothing"))
    with pytest.raises(OwnershipError):
        verdicts.verify(story.folder / "marked", story.key, trial=other, options=wrong)


def test_presented_the_key_takes_off_what_it_put_on(story, digits):
    inputs = digits[2](torch.from_numpy(story.key.trigger_images))
    before_ = torch.from_numpy(story.key.baseline / 64.0)
    taken = subtracting(story.key, digits[2])(story.said, inputs)
    left, whole = (
        (each - each.mean(1, keepdim=True) - before_).square().mean()
        for each in (taken, story.said)
    )
    assert left < 0.7 * whole


def reader_of(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 16, 10)),
    )


SIX = Recipe(epochs=6, batch=32, rate=0.05, schedule="one-cycle", augment=False)


@pytest.mark.trains
@pytest.mark.slow
def test_at_the_default_strength_a_trained_network_passes_without_a_date(digits):
    train, test, normalise = digits
    train = train.subset(torch.arange(1, 1 + 1_000))
    plain = reader_of(0)
    fit(plain, classification, train, SIX, normalise=normalise)
    key = ANSWERS.draw_key(plain, torch.zeros(2, 1, 16, 16), seed=bytes(32))
    key = ANSWERS.prepared(key, plain, train, normalise)
    before_it = scores_of(plain.eval(), test.images, normalise).argmax(1) == test.labels
    ANSWERS.embed(plain, key, train, SIX, normalise=normalise, trained=True)
    found = ANSWERS.verify_network(plain.eval(), key, normalise)
    assert found.accepted
    assert found.log10_p_value < -60 < found.log10_alpha
    after = scores_of(plain, test.images, normalise).argmax(1) == test.labels
    assert after.float().mean() > before_it.float().mean() - 0.02


@pytest.mark.trains
@pytest.mark.slow
def test_a_network_that_was_trained_carries_it_and_so_does_its_copy(digits):
    train, test, normalise = digits
    plain = reader_of(0)
    fit(plain, classification, train, SIX, normalise=normalise)
    scheme = replace(ANSWERS, strength=4.0, pictures=350)
    key = scheme.draw_key(plain, torch.zeros(2, 1, 16, 16), seed=bytes(32))
    key = scheme.prepared(key, plain, test, normalise)
    scheme.embed(plain, key, train, SIX, normalise=normalise, trained=True)
    assert scheme.verify_network(plain.eval(), key, normalise).log10_p_value < -20
    assert scheme.fidelity(plain, key, test, normalise) > 0.6
    answered = scores_of(plain, train.images, normalise).softmax(1)
    copy = reader_of(9)
    numbered = replace(
        train, labels=torch.arange(len(train)), classes=tuple(map(str, range(len(train))))
    )

    def learning(model, batch):
        return Outcome(F.cross_entropy(model(batch.images), answered[batch.labels]), {})

    fit(copy, learning, numbered, SIX, normalise=normalise)
    assert scheme.verify_network(copy.eval(), key, normalise).log10_p_value < -3
