import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

import nnpassport
from nnpassport.catalog import CATALOG, scheme_named, with_settings
from nnpassport.data.images import Normalisation
from nnpassport.embedding.measured import verify_model
from nnpassport.embedding.network.layers import passport_norms
from nnpassport.report.provenance import provenance
from nnpassport.scheme import UnmarkedWarning, UnsuitableModelError

EXAMPLE = torch.zeros(1, 1, 8, 8)
NORMALISE = Normalisation((0.5,), (0.5,))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


def images(count=4):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 1, 8, 8, generator=rng), torch.arange(count) % 3


PASSPORTS = [name for name in sorted(CATALOG) if name.startswith("passport-")]


@pytest.mark.trains
@pytest.mark.parametrize("name", PASSPORTS)
def test_a_few_steps_of_one_s_own_lower_the_loss_and_right_the_bits(model, name):
    key = scheme_named(name).draw_key(model, EXAMPLE, layers=["3"], seed=bytes(32))
    marked = nnpassport.mark(model, key, EXAMPLE, normalise=NORMALISE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        loss = marked.loss(*images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert marked.measures["sign_match"] == 1
    assert marked.step == 120
    plain = marked.released()
    assert not passport_norms(plain)
    assert passport_norms(model)
    verdict = scheme_named(name).verify(plain.state_dict(), key, log10_alpha=-2.0)
    assert verdict.accepted


@pytest.mark.trains
def test_baselines_run_in_a_loop_of_one_s_own_too(model):
    uchida = with_settings(scheme_named("uchida"), bits=32)
    adi = with_settings(scheme_named("adi"), triggers=12)
    for scheme, setting in ((uchida, {"layers": ["3"]}), (adi, {})):
        own = deepcopy(model)
        key = scheme.draw_key(own, EXAMPLE, seed=bytes(32), **setting)
        marked = nnpassport.mark(own, key, EXAMPLE, normalise=NORMALISE)
        optimizer = torch.optim.Adam(own.parameters(), lr=0.01)
        losses = []
        for _ in range(60):
            loss = marked.loss(*images())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2
        plain = marked.released().eval()
        assert verify_model(plain, NORMALISE, key).matches == (32 if scheme is uchida else 12)


def test_triggers_need_to_know_how_images_are_normalised(model):
    key = nnpassport.V3.draw_key(model, EXAMPLE, layers=["3"], seed=bytes(32))
    with pytest.raises(UnsuitableModelError, match="normalise="):
        nnpassport.mark(model, key, EXAMPLE)
    assert not passport_norms(model)


def test_the_trigger_set_takes_turns(model):
    key = nnpassport.V3.draw_key(model, EXAMPLE, layers=["3"], seed=bytes(32))
    trigger_images, _ = key.trigger_set()
    marked = nnpassport.mark(model, key, EXAMPLE, normalise=NORMALISE)
    seen = []
    model.register_forward_pre_hook(lambda _module, args: seen.append(args[0][-2:].clone()))
    for step in (0, 1, 49, 50):
        marked.step = step
        marked.loss(*images())
    expected = NORMALISE(trigger_images)
    for batch, first in zip(seen, (0, 2, 98, 0), strict=True):
        torch.testing.assert_close(batch, expected[first : first + 2])


def test_a_key_of_another_scheme_is_refused_and_the_network_untouched(model):
    key = nnpassport.V2.draw_key(model, EXAMPLE, layers=["3"], seed=bytes(32))
    with pytest.raises(UnsuitableModelError, match="passport-v2"):
        nnpassport.V1.insert(model, key, EXAMPLE)
    assert not passport_norms(model)


def test_an_unknown_scheme_is_answered_with_those_there_are():
    with pytest.raises(UnsuitableModelError, match="passport-v1, passport-v2, passport-v3"):
        scheme_named("passport-v9")


def test_a_number_s_provenance_names_the_commit_it_was_taken_on():
    facts = provenance()
    assert facts["torch"] == torch.__version__
    root = Path(__file__).parent.parent
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("not a git checkout with a commit in it")
    assert facts["commit"] == head.stdout.strip()


@pytest.mark.parametrize("name", ["passport-v2", "passport-v3"])
def test_evaluation_after_a_step_gives_one_output_an_image(model, name):
    scheme = scheme_named(name)
    key = scheme.draw_key(model, EXAMPLE, seed=bytes(32), layers=["3"])
    marked = nnpassport.mark(model, key, EXAMPLE, normalise=NORMALISE)
    batch, labels = images()
    marked.loss(batch, labels).backward()
    with torch.no_grad():
        answers = model.eval()(batch)
        assert len(answers) == len(batch)
        with pytest.warns(UnmarkedWarning, match="of 8 bits match"):
            plain = marked.released().eval()
        torch.testing.assert_close(answers, plain(batch))
    assert torch.isfinite(marked.loss(batch, labels))


def test_a_loss_waits_for_no_device_until_its_measures_are_asked_for(model, monkeypatch):
    key = nnpassport.V2.draw_key(model, EXAMPLE, owner="Alice", layers=["3"])
    marked = nnpassport.mark(model, key, EXAMPLE)
    read = []

    def note(value):
        read.append(value)
        return float(value.mean())

    monkeypatch.setattr("nnpassport.embedding.marked.read_measure", note)
    marked.loss(*images()).backward()
    assert not read
    assert set(marked.measures) == {"sign_match", "accuracy", "private_accuracy"}
    assert len(read) == 3
