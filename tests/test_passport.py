"""V1, V2 and V3: what each promises to its owner, on networks that were really trained."""

import pickle
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnpassport.data.images import ImageSet
from nnpassport.embedding.checkpoint import ModelConfig, save_model
from nnpassport.embedding.network import layers, surgery
from nnpassport.embedding.network.equations import mean_patch, read_bits, sign_loss
from nnpassport.embedding.network.layers import (
    Branch,
    forked,
    on_branch,
    own_statistics,
    passport_norms,
    private_count,
    public_count,
)
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.passport import V1, V2, V3, Passport
from nnpassport.embedding.schemes.signature import as_published, read_signature, secrets_of
from nnpassport.embedding.train.fidelity import accuracy, recalibrate
from nnpassport.embedding.train.loop import Journal, Recipe, classification, fit
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED as ALPHA
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.keys.derive import log10_text_choices, read_text
from nnpassport.keys.key import Key
from nnpassport.scheme import (
    BadRecipeError,
    BadSignatureError,
    Batch,
    Part,
    UnreadableDataError,
    UnsuitableModelError,
)

SEED = bytes(range(32))
TEXT = "Ann"
LAYERS = ["3", "7"]
RECIPE = Recipe(epochs=4, batch=64, rate=0.05, augment=False, schedule="one-cycle")
NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(4, channels)}
SMALL_V3 = replace(V3, triggers=40, triggers_per_step=20)
SCHEMES = {"V1": (V1, "batch", TEXT), "V2": (V2, "batch", None), "V3": (SMALL_V3, "group", None)}


def network(norm, *, seed=0):
    """Three convolutions for grey images of 16 pixels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        NORMS[norm](16),
        nn.ReLU(),
        nn.Conv2d(16, 64, 3, padding=1),
        NORMS[norm](64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        NORMS[norm](64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Owned(NamedTuple):
    """A network that was trained with a scheme, and what its owner released."""

    scheme: Passport
    norm: str
    key: Key
    model: nn.Module
    released: nn.Module
    folder: object


@pytest.fixture(scope="session")
def owned(digits, tmp_path_factory):
    """By name of the scheme, each trained at most once."""
    train, test, normalise = digits
    example, trained = normalise(train.images[:2]), {}

    def get(name):
        if name not in trained:
            scheme, norm, text = SCHEMES[name]
            model, folder = network(norm), tmp_path_factory.mktemp(name)
            key = scheme.draw_key(model, example, layers=LAYERS, text=text, seed=SEED)
            scheme.embed(
                model,
                key,
                train,
                RECIPE,
                normalise=normalise,
                validation=test,
                journal=Journal(folder),
            )
            released = scheme.released(model).eval()
            trained[name] = Owned(scheme, norm, key, model.eval(), released, folder)
        return trained[name]

    return get


@pytest.fixture(params=list(SCHEMES))
def marked(request, owned):
    """A network of every scheme."""
    return owned(request.param)


@pytest.fixture(scope="session")
def unrelated(digits):
    """Trained on the same images, with no key."""
    train, _, normalise = digits
    model = network("group", seed=9)
    recipe = replace(RECIPE, epochs=2)
    fit(model, classification, train, recipe, normalise=normalise)
    return model.eval()


def another_key(owned, digits, number):
    example = digits[2](digits[0].images[:2])
    seed = number.to_bytes(1, "big") * 32
    return owned.scheme.draw_key(network(owned.norm), example, layers=LAYERS, seed=seed)


@pytest.mark.trains
def test_every_bit_is_right_after_training(marked):
    verdict = marked.scheme.verify(marked.released.state_dict(), marked.key)
    assert (verdict.matches, verdict.bits) == (128, 128)
    assert verdict.layers == {"3": (64, 64), "7": (64, 64)}


@pytest.mark.trains
def test_the_owners_key_is_accepted(marked):
    for network_of_the_owner in (marked.released, marked.model):
        verdict = marked.scheme.verify(network_of_the_owner.state_dict(), marked.key)
        assert verdict.accepted
        assert verdict.scheme == marked.scheme.name


@pytest.mark.trains
def test_fresh_keys_are_refused(marked, digits):
    weights = marked.released.state_dict()
    verdicts = [
        marked.scheme.verify(weights, another_key(marked, digits, number), log10_alpha=ALPHA)
        for number in range(1, 21)
    ]
    assert not [each for each in verdicts if each.accepted]
    # 2560 fair coins: five standard deviations from a half are 0.05.
    assert abs(sum(each.matches for each in verdicts) / 2560 - 0.5) < 0.05


@pytest.mark.trains
def test_the_owners_key_is_refused_on_an_unrelated_network(marked, unrelated):
    verdict = marked.scheme.verify(unrelated.state_dict(), marked.key, log10_alpha=ALPHA)
    assert not verdict.accepted
    assert 0.25 < verdict.match_rate < 0.75
    assert verdict.log10_p_value > ALPHA


@pytest.mark.trains
def test_the_genuine_passport_runs_the_network_and_random_ones_do_not(marked, digits):
    _, test, normalise = digits
    genuine = marked.scheme.fidelity(marked.released, marked.key, test, normalise)
    # The median: a random passport that happens to point the genuine one's way gets through.
    keys = [another_key(marked, digits, number) for number in range(1, 8)]
    random = [marked.scheme.fidelity(marked.released, key, test, normalise) for key in keys]
    assert genuine > 0.85
    assert sorted(random)[3] < 0.35


@pytest.mark.trains
def test_presenting_a_key_leaves_the_released_network_as_it_was(marked, digits):
    _, test, normalise = digits
    before = deepcopy(marked.released)
    marked.scheme.fidelity(marked.released, marked.key, test, normalise)
    after = marked.released.state_dict()
    assert all(torch.equal(after[name], each) for name, each in before.state_dict().items())
    assert [type(m) for m in before.modules()] == [type(m) for m in marked.released.modules()]
    assert not marked.released.training


@pytest.mark.trains
def test_the_fidelity_of_the_released_network_is_that_of_the_private_branch(marked, digits):
    _, test, normalise = digits
    measured = marked.scheme.fidelity(marked.released, marked.key, test, normalise)
    numbers = marked.scheme.evaluation(test, normalise)(marked.model)
    private = numbers.get("private_accuracy", numbers["accuracy"])
    # Batch norm's private statistics are not released: they are measured on the test images.
    tolerance = 0.03 if own_statistics(marked.model) else 0.002
    assert measured == pytest.approx(private, abs=tolerance)


@pytest.mark.trains
def test_the_released_network_is_the_plain_architecture(marked):
    plain = network(marked.norm)
    assert list(marked.released.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in marked.released.modules()] == [type(m) for m in plain.modules()]
    assert len(passport_norms(marked.model)) == 2
    plain.load_state_dict(marked.released.state_dict())


@pytest.mark.trains
def test_the_released_network_computes_what_was_trained(marked, digits):
    images = digits[2](digits[1].images)
    branch = Branch.PUBLIC if marked.scheme.two_branches else Branch.PRIVATE
    with torch.no_grad(), on_branch(marked.model, branch):
        expected = marked.model(images)
    with torch.no_grad():
        released = marked.released(images)
    if marked.scheme.two_branches:
        assert torch.equal(released, expected)
    else:
        torch.testing.assert_close(released, expected, rtol=1e-5, atol=1e-5)


def traces(key):
    """Everything secret in a key, as the bytes that it might leave in a file."""
    yield "seed", key.seed
    yield "seed in hexadecimal", key.seed.hex().encode()
    if key.text:
        yield "text", key.text.encode()
    for name, (patch, signs, *_) in secrets_of(key).items():
        passport, bits = key.layer_passport(name).numpy(), signs.numpy()
        whole = np.round(passport * 127).astype(np.int8)
        for dtype in (np.float16, np.float32, np.float64):
            yield f"passport {name} {dtype}", passport.astype(dtype).tobytes()[:64]
            yield f"β of passport {name} {dtype}", passport[1].astype(dtype).tobytes()[:64]
            yield f"mean patch {name} {dtype}", patch.numpy().astype(dtype).tobytes()[:64]
            yield f"signs {name} {dtype}", bits.astype(dtype).tobytes()[:128]
            yield f"bits {name} {dtype}", (bits > 0).astype(dtype).tobytes()[:128]
        yield f"passport {name} int8", whole.tobytes()[:64]
        yield f"β of passport {name} int8", whole[1].tobytes()[:64]
        yield f"signs {name} int8", bits.astype(np.int8).tobytes()[:64]
        yield f"signs {name} int64", bits.astype(np.int64).tobytes()[:128]
        for order in ("big", "little"):
            yield f"packed {name} {order}", np.packbits(bits > 0, bitorder=order).tobytes()
        yield f"bits {name} bool", (bits > 0).tobytes()[:64]


def found(key, data):
    # Four bytes of text may stand in megabytes of floats by chance; longer traces do not.
    return [what for what, trace in traces(key) if len(trace) > 4 and trace in data]


@pytest.mark.trains
def test_no_file_that_leaves_the_house_holds_anything_secret(marked, tmp_path):
    config = ModelConfig(
        architecture="somebody.networks:small",
        arguments={},
        classes=tuple("0123456789"),
        input_size=(1, 16, 16),
        mean=(0.5,),
        std=(0.5,),
    )
    save_model(tmp_path, marked.released, config)
    torch.save(marked.released, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert {file.name: found(marked.key, file.read_bytes()) for file in files} == {
        file.name: [] for file in files
    }


@pytest.mark.trains
def test_nor_does_a_training_checkpoint_or_its_log(marked):
    files = {file.name: found(marked.key, file.read_bytes()) for file in marked.folder.iterdir()}
    assert files == {"training.pt": [], "metrics.jsonl": []}


@pytest.mark.trains
def test_the_search_for_secrets_does_find_them(marked):
    buffers = {name: each.numpy() for name, each in marked.model.named_buffers()}
    names = found(marked.key, pickle.dumps(buffers) + SEED)
    for name in LAYERS:
        assert f"mean patch {name} {np.float32}" in names
        assert f"signs {name} {np.float32}" in names
    assert "seed" in names


@pytest.mark.trains
def test_the_trigger_labels_alone_prove_v3(owned, unrelated, digits):
    marked = owned("V3")
    images, labels = marked.key.trigger_set()

    def answers(model):
        with torch.no_grad():
            return model(digits[2](images)).argmax(1)

    verdict = marked.scheme.verify_answers(answers(marked.released), marked.key)
    assert verdict.accepted
    assert (verdict.bits, verdict.matches) == (
        40,
        int((answers(marked.released) == labels).sum()),
    )
    tail = log10_binomial_tail(verdict.matches, 40, 0.1)
    assert verdict.log10_p_value == pytest.approx(tail)
    for model in (unrelated, owned("V2").released):
        assert not marked.scheme.verify_answers(
            answers(model), marked.key, log10_alpha=ALPHA
        ).accepted
    for number in range(1, 21):
        _, others = another_key(marked, digits, number).trigger_set()
        assert not marked.scheme.verify_answers(others, marked.key, log10_alpha=ALPHA).accepted


@pytest.mark.trains
def test_answers_must_be_one_for_each_trigger_of_a_key_that_has_some(owned):
    with pytest.raises(UnsuitableModelError, match=r"shape .39.*one class for each of the 40"):
        SMALL_V3.verify_answers(torch.zeros(39, dtype=torch.int64), owned("V3").key)
    with pytest.raises(UnsuitableModelError, match="has no trigger set"):
        V2.verify_answers(torch.zeros(40, dtype=torch.int64), owned("V2").key)


def signs_read(owned):
    weights = owned.released.state_dict()
    return torch.cat(
        [read_bits(weights[f"{n}.weight"], s.mean_patch) for n, s in secrets_of(owned.key).items()]
    )


@pytest.mark.trains
def test_the_signature_text_is_read_back_from_the_released_network(owned):
    marked = owned("V1")
    key = marked.key
    assert read_text(signs_read(marked).float(), key.seed, key.context, len(TEXT)) == TEXT
    wrong = read_text(signs_read(marked).float(), bytes(32), key.context, len(TEXT))
    assert wrong != TEXT


@pytest.mark.trains
def test_a_text_is_paid_for_with_all_texts_that_might_have_been_chosen(owned):
    verdict = V1.verify(owned("V1").released.state_dict(), owned("V1").key)
    tail = log10_binomial_tail(128, 128)
    assert log10_text_choices(TEXT) > 5
    assert verdict.log10_p_value == pytest.approx(tail + log10_text_choices(TEXT))
    plain = V2.verify(owned("V2").released.state_dict(), owned("V2").key)
    assert plain.log10_p_value == pytest.approx(tail)


@pytest.mark.trains
def test_a_longer_text_on_the_same_bits_is_no_longer_enough(owned, digits):
    example = digits[2](digits[0].images[:2])
    text = "all rights reserved"[:16]
    key = V1.draw_key(
        network("batch"), example, layers=LAYERS, text=text, seed=SEED, passports="derived"
    )
    weights = deepcopy(owned("V1").released.state_dict())
    for name, (patch, signs, *_) in secrets_of(key).items():
        # Rows along the passport: every bit is right.
        rows = signs[:, None] * patch[0, 0] / patch[0, 0].norm()
        weights[f"{name}.weight"] = rows.view_as(weights[f"{name}.weight"])
    verdict = V1.verify(weights, key)
    assert verdict.matches == 128
    assert not verdict.accepted


@pytest.mark.trains
def test_chosen_passports_or_bits_have_no_p_value_whatever_they_match(owned):
    marked = owned("V2")
    names = [layer.name for layer in marked.key.context.layers]
    passports = {name: marked.key.layer_passport(name) for name in names}
    signs = {name: marked.key.layer_signs(name) for name in names}
    weights = marked.released.state_dict()
    for chosen in (
        {"passports": passports, "signs": signs},
        {"passports": passports},
        {"signs": signs},
    ):
        key = replace(marked.key, **chosen)
        verdict = marked.scheme.verify(weights, key)
        assert (verdict.matches, verdict.log10_p_value, verdict.p_value) == (128, None, None)
        assert not verdict.accepted
        assert "anybody can solve" in verdict.reason
        published = as_published(read_signature(weights, key), threshold=1.0)
        assert published.accepted
        assert published.log10_p_value is None


@pytest.mark.trains
def test_the_published_rule_needs_every_bit(owned, unrelated):
    marked = owned("V2")
    weights = deepcopy(marked.released.state_dict())
    assert as_published(read_signature(weights, marked.key), threshold=1.0).accepted
    weights["7.weight"][5].neg_()
    verdict = as_published(read_signature(weights, marked.key), threshold=1.0)
    assert (verdict.matches, verdict.accepted) == (127, False)
    assert marked.scheme.verify(weights, marked.key).accepted
    assert not as_published(
        read_signature(unrelated.state_dict(), marked.key), threshold=1.0
    ).accepted


@pytest.mark.trains
def test_zeroed_and_undefined_channels_do_not_match(owned):
    marked = owned("V2")
    weights = deepcopy(marked.released.state_dict())
    weights["7.weight"][:10] = 0
    weights["7.weight"][10:30] = torch.nan
    assert marked.scheme.verify(weights, marked.key).layers == {"3": (64, 64), "7": (34, 64)}


@pytest.mark.trains
def test_another_architecture_cannot_be_checked(owned):
    key = owned("V2").key
    weights = owned("V2").released.state_dict()
    missing = {name: each for name, each in weights.items() if name != "7.weight"}
    with pytest.raises(UnsuitableModelError, match=r"no 7.weight.*this one has: 0.weight"):
        V2.verify(missing, key)
    with pytest.raises(UnsuitableModelError, match=r"7.weight has shape .64, 32, 3, 3"):
        V2.verify({**weights, "7.weight": weights["7.weight"][:, :32]}, key)


def test_a_key_is_drawn_afresh_or_repeated_from_its_seed(digits):
    example = digits[2](digits[0].images[:2])
    model = network("batch")
    before = {name: each.clone() for name, each in model.state_dict().items()}
    fresh = [V3.draw_key(model, example, owner="Ann", passports="derived") for _ in range(2)]
    same = [
        V3.draw_key(model, example, owner="Ann", seed=SEED, passports="derived") for _ in range(2)
    ]
    assert fresh[0].fingerprint != fresh[1].fingerprint
    assert fresh[0].context.nonce != fresh[1].context.nonce
    assert same[0].fingerprint == same[1].fingerprint
    context = same[0].context
    assert (context.scheme, context.owner) == ("passport-v3", "Ann")
    assert [layer.name for layer in context.layers] == ["7"]
    assert context.triggers == (100, 10, (1, 16, 16))
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_a_text_that_does_not_fit_is_refused(digits):
    example = digits[2](digits[0].images[:2])
    with pytest.raises(BadSignatureError, match="64 bits"):
        V2.draw_key(network("batch"), example, layers=["7"], text="nine chars", passports="derived")


@pytest.mark.trains
def test_another_schemes_key_is_refused_and_nothing_is_touched(owned, digits):
    model = network("batch")
    with pytest.raises(UnsuitableModelError, match="is for passport-v2, and this is passport-v1"):
        V1.insert(model, owned("V2").key, digits[2](digits[0].images[:2]))
    assert not passport_norms(model)


@pytest.mark.trains
def test_a_data_set_of_one_class_is_refused_and_nothing_is_touched(owned, digits):
    train, _, normalise = digits
    model = network("batch")
    one = train.subset((train.labels == 3).nonzero()[:, 0])
    with pytest.raises(UnreadableDataError, match="at least two classes"):
        V2.embed(model, owned("V2").key, one, RECIPE, normalise=normalise)
    assert not passport_norms(model)


@pytest.mark.parametrize(
    ("norm", "site"),
    [
        (lambda channels: nn.Identity(), "a layer without a norm"),
        (lambda channels: nn.BatchNorm2d(channels, affine=False), "BatchNorm2d"),
    ],
)
def test_v1_refuses_at_once_what_it_could_not_release(norm, site, digits, monkeypatch):
    """Folded into the layer itself, γ would be squared and every sign lost."""
    monkeypatch.setitem(NORMS, "other", norm)
    example = digits[2](digits[0].images[:2])
    model = network("other")
    types = [type(module) for module in model.modules()]
    key = V1.draw_key(model, example, layers=LAYERS, seed=SEED, passports="derived")
    with pytest.raises(UnsuitableModelError, match=f"{site}.*V2 or V3"):
        V1.insert(model, key, example)
    assert [type(module) for module in model.modules()] == types
    V2.insert(model, replace(key, context=replace(key.context, scheme=V2.name)), example)


@pytest.mark.trains
def test_v3_needs_the_normalisation_of_its_triggers(owned):
    with pytest.raises(UnsuitableModelError, match="pass normalise="):
        SMALL_V3.objective(owned("V3").key, steps=10)


def prepared(scheme, digits, seed=SEED):
    """A marked network that is not trained, in evaluation mode, and a batch of images for it."""
    train, _, normalise = digits
    model, example = network("group").double(), normalise(train.images[:2]).double()
    key = scheme.draw_key(model, example, layers=LAYERS, seed=seed)
    scheme.insert(model, key, example)
    images = normalise(train.images[:6]).double()
    return model.eval(), key, images, train.labels[:6]


def logits_of(model, images, branch):
    with on_branch(model, branch):
        return model(images)


def regularisation(model):
    """Equation 5 over all layers, and Σ γ²."""
    norms = passport_norms(model).values()
    hinge = sum(sign_loss(norm.affine()[0], norm.signs, margin=0.1) for norm in norms)
    return hinge, sum(norm.affine()[0].square().sum() for norm in norms)


def test_the_loss_of_v1_is_that_of_the_passports_branch_and_the_signs(digits):
    model, key, images, labels = prepared(V1, digits)
    outcome = V1.objective(key, steps=10)(model, Batch(images, labels))
    task = F.cross_entropy(logits_of(model, images, Branch.PRIVATE), labels)
    torch.testing.assert_close(outcome.loss, task + 0.1 * regularisation(model)[0])
    assert list(outcome.measures) == ["sign_match", "accuracy"]


def test_the_loss_of_v2_is_that_of_both_branches_and_the_signs_once(digits):
    scheme = replace(V2, sign_weight=0.5, margin=0.1, decay=1e-3)
    model, key, images, labels = prepared(scheme, digits)
    outcome = scheme.objective(key, steps=10)(model, Batch(images, labels))
    tasks = [
        F.cross_entropy(logits_of(model, images, branch), labels)
        for branch in (Branch.PUBLIC, Branch.PRIVATE)
    ]
    hinge, squares = regularisation(model)
    torch.testing.assert_close(outcome.loss, sum(tasks) + 0.5 * hinge + 1e-3 * squares)
    assert list(outcome.measures) == ["sign_match", "accuracy", "private_accuracy"]


def test_without_sign_loss_there_is_no_decay_either_as_in_the_reference_code(digits):
    scheme = replace(V1, sign_weight=0.0, decay=1e-3)
    model, key, images, labels = prepared(scheme, digits)
    outcome = scheme.objective(key, steps=10)(model, Batch(images, labels))
    task = F.cross_entropy(logits_of(model, images, Branch.PRIVATE), labels)
    torch.testing.assert_close(outcome.loss, task)


@pytest.mark.parametrize("weight", [None, 0.0, 2.0])
def test_the_loss_of_v3_mixes_its_triggers_into_both_branches_by_turns(weight, digits):
    scheme = replace(V3, triggers=5, triggers_per_step=2, trigger_weight=weight)
    model, key, images, labels = prepared(scheme, digits)
    pixels, answers = key.trigger_set()
    objective = scheme.objective(key, steps=10, normalise=digits[2])
    seen = []
    for step in range(5):
        turn = [2 * step % 5, (2 * step + 1) % 5]
        seen += turn
        mixed = torch.cat([images, digits[2](pixels[turn]).double()])
        losses = []
        for branch in (Branch.PUBLIC, Branch.PRIVATE):
            logits = logits_of(model, mixed, branch)
            if weight is None:
                losses.append(F.cross_entropy(logits, torch.cat([labels, answers[turn]])))
                continue
            trigger = F.cross_entropy(logits[6:], answers[turn])
            losses.append(F.cross_entropy(logits[:6], labels) + weight * trigger)
        outcome = objective(model, Batch(images, labels, step))
        torch.testing.assert_close(outcome.loss, sum(losses) + 0.1 * regularisation(model)[0])
    assert sorted(seen) == sorted([*range(5)] * 2)


def test_a_late_private_branch_joins_at_its_step_and_the_signs_are_there_before(digits):
    scheme = replace(V2, late=0.5)
    model, key, images, labels = prepared(scheme, digits)
    objective = scheme.objective(key, steps=10)
    public = F.cross_entropy(logits_of(model, images, Branch.PUBLIC), labels)
    private = F.cross_entropy(logits_of(model, images, Branch.PRIVATE), labels)
    signs = 0.1 * regularisation(model)[0]
    for step, expected in ((0, public + signs), (4, public + signs), (5, public + private + signs)):
        outcome = objective(model, Batch(images, labels, step))
        torch.testing.assert_close(outcome.loss, expected)
        assert ("private_accuracy" in outcome.measures) is (step >= 5)
    assert signs > 0


@pytest.mark.parametrize("scheme", [V1, V2])
def test_a_step_runs_through_each_passport_once(scheme, digits, monkeypatch):
    model, key, images, labels = prepared(scheme, digits)
    norms, runs = passport_norms(model), []
    once = layers.collapsed_affine

    def counted(weight, patch):
        runs.append(weight)
        return once(weight, patch)

    monkeypatch.setattr(layers, "collapsed_affine", counted)
    scheme.objective(key, steps=10)(model, Batch(images, labels)).loss.backward()
    assert len(runs) == len(norms) > 1
    assert all(norm.running.kept is None for norm in norms.values())


@pytest.mark.parametrize("share", [1.0, 0.5, 0.3, 0.01])
def test_the_private_branch_sees_the_last_images_alone(share, digits):
    scheme = replace(V2, private_share=share)
    model, key, images, labels = prepared(scheme, digits)
    count = {1.0: 6, 0.5: 3, 0.3: 2, 0.01: 1}[share]
    outcome = scheme.objective(key, steps=10)(model, Batch(images, labels))
    public = F.cross_entropy(logits_of(model, images, Branch.PUBLIC), labels)
    private = F.cross_entropy(logits_of(model, images, Branch.PRIVATE)[-count:], labels[-count:])
    signs = 0.1 * regularisation(model)[0]
    torch.testing.assert_close(outcome.loss, public + private + signs)
    assert outcome.measures["private_accuracy"][1] == count


def test_every_batch_is_parted_as_it_was_forked():
    for images in range(1, 200):
        for share in (1.0, 0.75, 0.5, 1 / 3, 0.25, 0.1, 1 / 64):
            rows = len(forked(torch.zeros(images), share))
            assert rows == images + private_count(images, share)
            assert public_count(rows, share) == images
    with pytest.raises(ValueError, match="no batch"):
        public_count(1, 1.0)


def test_a_private_branch_that_joins_in_some_steps_only_is_out_of_the_others(digits):
    scheme = replace(V2, private_every=3)
    model, key, images, labels = prepared(scheme, digits)
    objective = scheme.objective(key, steps=10)
    joined = [
        "private_accuracy" in objective(model, Batch(images, labels, step)).measures
        for step in range(7)
    ]
    assert joined == [True, False, False] * 2 + [True]


@pytest.mark.parametrize(
    "settings",
    [{"private_share": 0.0}, {"private_share": 1.5}, {"private_every": 0}, {"late": 1.1}],
)
def test_a_private_branch_that_is_never_trained_is_refused(settings):
    with pytest.raises(BadRecipeError, match=f"{next(iter(settings))} is .*needed"):
        replace(V2, **settings)


def test_a_private_branch_of_whole_layers_is_trained_at_some_time(digits):
    """That of channels need not be: see `settle`."""
    data, _, normalise = digits
    model = network("group")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    key = V2.draw_key(model, normalise(data.images[:2]), passports="derived")
    with pytest.raises(BadRecipeError, match=r"late is 1.*never be trained; needed: passports of"):
        replace(V2, late=1.0).embed(model, key, data, Recipe(epochs=1), normalise=normalise)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_a_private_branch_that_would_see_triggers_alone_is_refused(digits):
    scheme = replace(V3, triggers=5, private_share=0.2, trigger_weight=1.0)
    model, key, images, labels = prepared(scheme, digits)
    objective = scheme.objective(key, steps=10, normalise=digits[2])
    with pytest.raises(BadRecipeError, match="larger private_share"):
        objective(model, Batch(images, labels))


@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("scheme", [V1, V2, V3])
def test_the_mean_loss_of_the_parts_of_a_step_is_that_of_the_step(scheme, weight, digits):
    if scheme is V3:  # three triggers: one part of two has one more than the other
        scheme = replace(V3, triggers=5, triggers_per_step=3, trigger_weight=weight)
    model, key, images, labels = prepared(scheme, digits)
    objective = scheme.objective(key, steps=10, normalise=digits[2])
    whole = objective(model, Batch(images, labels, 1))
    for count in (2, 3, 6):
        size = 6 // count
        parts = [
            objective(
                model,
                Batch(
                    images[i * size : (i + 1) * size],
                    labels[i * size : (i + 1) * size],
                    1,
                    Part(i, count),
                ),
            )
            for i in range(count)
        ]
        mean = torch.stack([part.loss for part in parts]).mean()
        torch.testing.assert_close(mean, whole.loss)
        counted = sum(part.measures["accuracy"] for part in parts)
        assert torch.equal(counted, whole.measures["accuracy"])


@pytest.mark.trains
def test_the_evaluation_measures_the_network_as_it_will_be_used(marked, digits):
    _, test, normalise = digits
    numbers = marked.scheme.evaluation(test, normalise)(marked.model)
    assert numbers["sign_match"] == 1
    assert numbers["accuracy"] == pytest.approx(accuracy(marked.released, test, normalise))
    scored = [numbers[name] for name in ("accuracy", "private_accuracy") if name in numbers]
    assert len(scored) == (2 if marked.scheme.two_branches else 1)
    assert numbers["score"] == pytest.approx(sum(scored) / len(scored))


def test_accuracy_counts_images_and_not_batches(digits):
    _, test, normalise = digits
    right = test.labels.clone()
    right[-1] = (right[-1] + 1) % 10
    data = ImageSet(test.images, right, test.classes)
    answers = iter(F.one_hot(test.labels, 10).float().split(100))
    assert accuracy(lambda _: next(answers), data, normalise, batch=100) == 1 - 1 / len(test)


def test_recalibration_is_the_mean_over_all_batches_and_touches_nothing_else(digits):
    train, _, normalise = digits
    model = network("batch").train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: each.clone() for name, each in model.state_dict().items()}
    halves = [normalise(train.images[i : i + 50]) for i in (0, 50)]
    recalibrate(model, [model[1]], [Batch(half, train.labels[:50]) for half in halves])
    features = torch.cat([model[0](half) for half in halves])
    torch.testing.assert_close(model[1].running_mean, features.mean((0, 2, 3)))
    assert model[1].momentum == 0.1
    assert modes == [module.training for module in model.modules()]
    changed = {n for n, each in model.state_dict().items() if not torch.equal(each, before[n])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_fidelity_can_be_measured_when_one_image_is_left_for_the_last_batch(digits):
    """Batch norm over one value has no variance."""
    _, test, normalise = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    )
    key = V2.draw_key(
        model, normalise(test.images[:2]), layers=["1"], seed=SEED, passports="derived"
    )
    some = test.subset(torch.arange(257) % len(test))
    assert 0 <= V2.fidelity(model, key, some, normalise) <= 1


def test_a_marked_network_survives_the_whole_way_on_a_grouped_convolution(digits):
    """`fit` puts weights into channels-last memory, in which groups do not lie side by side."""
    train, _, normalise = digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, groups=2, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(288, 10),
    )
    scheme = replace(V2, sign_weight=1.0)
    key = scheme.draw_key(model, normalise(train.images[:2]), layers=["2"], seed=SEED)
    recipe = replace(RECIPE, epochs=2, batch=128)
    scheme.embed(model, key, train, recipe, normalise=normalise)
    assert not model[2].weight.is_contiguous()
    assert V2.verify(V2.released(model).state_dict(), key).matches == 32


@pytest.mark.trains
def test_a_drawn_passport_is_the_one_the_network_was_trained_with(marked):
    for name, norm in passport_norms(marked.model).items():
        host = next(each for each in LAYERS if int(each) + 1 == int(name))
        layer = marked.key.context.layer(host)
        patch = mean_patch(marked.key.layer_passport(host), layer.weight, layer.geometry)
        torch.testing.assert_close(norm.mean_patch, patch.float())
        assert torch.equal(norm.signs, marked.key.layer_signs(host))
        gamma, _ = norm.affine()
        assert (gamma * norm.signs).min() > 0


@pytest.mark.trains
def test_a_released_network_can_be_marked_again_and_a_marked_one_cannot(owned, digits):
    marked, example = owned("V2"), digits[2](digits[0].images[:2])
    again = deepcopy(marked.released)
    V2.insert(again, marked.key, example)
    surgery.remove(again)
    with pytest.raises(UnsuitableModelError, match="carries passports already"):
        V2.insert(marked.model, marked.key, example)
    assert len(passport_norms(marked.model)) == 2


@pytest.mark.parametrize(("steps", "shown"), [(10_000, 2), (1_250, 2), (500, 5), (100, 25)])
def test_in_a_short_training_each_trigger_is_shown_often_enough_to_be_learnt(steps, shown):
    key = V3.draw_key(network("batch"), torch.zeros(2, 1, 16, 16), seed=SEED)
    for scheme in (V3, ADI):
        taken = scheme.training_of(key, steps, 64)
        assert taken.shown_at_once == shown
        assert steps * taken.shown_at_once >= 25 * key.context.triggers.count
        assert replace(scheme, triggers_per_step=3).training_of(key, steps, 64).shown_at_once == 3
    assert V2.training_of(key, steps, 64).shown_at_once == 0
    assert V3.training_of(key, 10, 64).shown_at_once == 32  # half as many as images
    assert V3.shown_at_once == 2  # in a loop of one's own, whose length nobody knows
