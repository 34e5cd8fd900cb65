"""The examples of the guides, and the guides' commands, run as they stand."""

import os
import random
import re
import runpy
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SHIFT

import nnpassport

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "guides.md").read_text()
BRANCHES = {"public", "private"}
EXAMPLES = {
    "own_training_loop": "nnpassport",
    "protect_a_trained_network": "nnpassport",
    "protect_with_lightning": "lightning",
    "protect_with_trainer": "transformers",
}


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore")  # what the packages of others warn of is theirs
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_owner_is_accepted_and_a_fresh_key_is_not(name, tmp_path, monkeypatch, capfd):
    """In this process: what the examples import takes longer than what they do."""
    pytest.importorskip(EXAMPLES[name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Keys are the system's randomness, and what a graft costs before any training scatters with
    # them (0 to 2.8 points on 360 images, in eight runs): here every run draws the same ones.
    monkeypatch.setattr(os, "urandom", random.Random(SHIFT).randbytes)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    said = capfd.readouterr().out
    assert 30 < int(re.search(r"bits right before (\d+) of 128", said)[1]) < 98
    assert "owner accepted: True; 128 of 128" in said
    assert re.search(r"fresh key accepted: False; [3-9]\d of 128", said)
    assert "released answers as withheld: True" in said
    accuracies = {
        what: float(share)
        for share, what in re.findall(r"^accuracy (\d\.\d+) (.+)$", said, flags=re.M)
    }
    if name == "protect_a_trained_network":
        before = accuracies.pop("before")
        assert before > 0.9
        times = ("no step", "after an epoch")
        assert accuracies.keys() == {f"{branch}, {time}" for branch in BRANCHES for time in times}
        for what, reached in accuracies.items():
            assert reached > before - (0.02 if what.endswith("epoch") else 0.05), what
    else:
        assert accuracies.keys() == BRANCHES
        assert min(accuracies.values()) > 0.85


@pytest.mark.trains
def test_the_guide_s_commands_do_what_they_say(tmp_path, call, monkeypatch):
    """Two trainings of a few epochs: ten seconds."""
    monkeypatch.chdir(tmp_path)
    ordered, block = (
        [shlex.split(line, comments=True) for line in each.replace("\\\n", " ").splitlines()]
        for each in re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.S)
    )
    assert [words[1] for words in block] == ["train", "key", "embed", "verify"]
    done = [call(*words[1:]) for words in block]
    assert [code for code, _, _ in done] == [0] * 4, done
    plain, _, marked, verdict = (printed for _, printed, _ in done)
    assert re.search(r"sign_match\s+100.00", marked)
    before = float(re.search(r"^accuracy\s+(\S+)", plain, flags=re.M)[1])
    after = [float(each) for each in re.findall(r"^(?:private_)?accuracy\s+(\S+)", marked, re.M)]
    assert len(after) == 2
    assert min(after) > before - 5 > 20  # percent; by chance 10
    assert verdict.startswith("ACCEPTED")
    assert "320 of 320" in verdict
    key = nnpassport.load_key(tmp_path / "alice.key")
    stranger = nnpassport.verify(tmp_path / "marked", replace(key, seed=bytes(range(32))))
    assert not stranger.accepted
    *made, told = (call(*words[1:]) for words in ordered)
    assert [code for code, _, _ in (*made, told)] == [0] * 3
    assert told[1].startswith("ACCEPTED")


def test_the_guide_names_every_example():
    scripts = {path.name for path in ROOT.glob("examples/*.py")} - {
        "check_claim_independently.py",
        "derive_independently.py",
    }
    assert {name for name in scripts if name in GUIDE} == scripts


def test_the_guide_s_sections_are_there():
    titles = re.findall(r"^## (.+)$", GUIDE, flags=re.M)
    anchors = {re.sub(r"[^a-z0-9 -]", "", t.lower()).replace(" ", "-") for t in titles}
    targets = set(re.findall(r"\]\(#([^)]+)\)", GUIDE))
    assert targets
    assert targets <= anchors
