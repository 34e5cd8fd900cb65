"""The audit: what it runs, what it measures, that it goes on where it stopped, and its page."""

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed import marked, reader
from typer.testing import CliRunner

from nnpassport.attacks import ambiguity, removal
from nnpassport.attacks.table import KINDS, Family, applies
from nnpassport.catalog import CATALOG
from nnpassport.cli.app import app
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.channels import ANY
from nnpassport.embedding.schemes.graft import graft_channels
from nnpassport.embedding.schemes.passport import V2, V3
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.config import ModelConfig
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.lab.audit import (
    ATTACKS,
    Budget,
    Subject,
    Transfer,
    attack_once,
    audit,
    html,
    plan,
    ruling,
    survival,
)
from nnpassport.scheme import (
    BadRecipeError,
    UnreadableDataError,
    UnreadableKeyError,
    UnreadableModelError,
    UnsuitableModelError,
    UnwritableOutputError,
)

pytestmark = pytest.mark.slow

CHEAP = ("prune", "quantise", "combine", "insert-dummies", "fake1", "solve", "flip", "grind")


@pytest.fixture(scope="module")
def subject(digits):
    """A small V2 network with batch norm, its owner's key, and digits for everybody."""
    train, test, normalise = digits
    train, test = train.resized(32), test.subset(torch.arange(128)).resized(32)
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="alexnet",
        arguments={"classes": 10, "norm": "batch", "width": 0.25, "channels": 1},
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=normalise.mean,
        std=normalise.std,
    )
    model = config.build()
    key = V2.draw_key(model, torch.zeros(2, 1, 32, 32), seed=bytes(range(32)), passports="derived")
    few = train.subset(torch.arange(128))
    odd = replace(few, labels=few.labels % 2, classes=("even", "odd"))
    return Subject(
        model=marked(V2, model, key, train.subset(torch.arange(640)), normalise),
        config=config,
        scheme=V2,
        normalise=normalise,
        key=key,
        test=test,
        train=few,
        transfer=Transfer(odd, odd),
        budget=Budget(epochs=1, batch=32),
    )


@pytest.fixture(scope="module")
def report(subject, tmp_path_factory):
    """A quick audit of attacks that need no training."""
    return audit(subject, tmp_path_factory.mktemp("audit") / "audit.json", only=CHEAP)


def entries(report, name):
    return [entry for entry in report["entries"] if entry["attack"] == name]


def test_before_the_attacks_the_mark_is_there(report):
    assert report["before"]["accuracy"] > 0.8
    assert report["before"]["owner"]["accepted"]


def test_a_key_that_is_bound_to_its_anchor_is_read_by_it(subject, tmp_path, call):
    """Without it, what thieves moved would be called removed; so such attacks are left out."""
    inputs = subject.normalise(subject.train.images)
    torch.manual_seed(0)
    anchor = reader(subject.config.build(), subject.train, subject.normalise)
    key = V2.draw_key(anchor, inputs[:2], seed=bytes(32), seen=inputs)
    model = deepcopy(anchor)
    V2.insert(model, key, inputs[:2])
    graft_channels(model, inputs, limit=ANY)
    owned = replace(subject, model=V2.released(model).eval(), key=key, transfer=None)
    chosen, left_out = plan(owned, full=False)
    moved = {name for name, attack in ATTACKS.items() if attack.family is Family.OBFUSCATION}
    assert not moved & {name for name, _ in chosen}
    assert "network before the mark" in left_out["combine"]
    known = replace(owned, anchor=anchor)
    report = audit(known, tmp_path / "audit.json", full=True, only=("combine", "free-moves"))
    for entry in report["entries"]:
        assert entry["owner_aligned"]["accepted"]
        assert not entry["owner"].get("accepted", False)
    save_model(tmp_path / "released", owned.model, subject.config)
    save_model(tmp_path / "anchor", anchor, subject.config)
    save_key(key, tmp_path / "my.key")
    words = ("audit", tmp_path / "released", "--key", tmp_path / "my.key", "--data", "digits")
    words = (*words, "--limit", "40", "--only", "combine", "--out", tmp_path / "out")
    assert call(*words)[0] == 2
    code, out, err = call(*words, "--anchor", tmp_path, "--json")
    assert code == 0, err
    (entry,) = json.loads(out)["entries"]
    assert entry["owner_aligned"]["accepted"]
    code, _, err = call(*words, "--anchor", tmp_path / "released")
    assert code == 2
    assert "anchor" in err


@pytest.fixture(scope="module")
def blocks(digits):
    """A narrow ResNet with passports of channels, which its owner keeps the anchor of."""
    train, test, normalise = digits
    train, test = train.resized(32).subset(torch.arange(320)), test.resized(32)
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="resnet18",
        arguments={"classes": 10, "norm": "batch", "width": 0.125, "channels": 1},
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=normalise.mean,
        std=normalise.std,
    )
    anchor, inputs = reader(config.build(), train, normalise), normalise(train.images)
    key = V2.draw_key(anchor, inputs[:2], seed=bytes(32), seen=inputs)
    model = deepcopy(anchor)
    V2.insert(model, key, inputs[:2])
    graft_channels(model, inputs, limit=ANY)
    owned = Subject(V2.released(model).eval(), config, V2, normalise, key, test)
    return replace(owned, anchor=anchor, base=anchor)


def test_an_audit_of_any_network_says_what_its_mark_survives(blocks, tmp_path):
    names = ("insert-block", "rename", "merge-base", "drop-block", "free-move", "untie")
    report = audit(blocks, tmp_path / "audit.json", full=True, only=names)
    bits = blocks.key.context.bits
    (renamed,) = entries(report, "rename")
    assert "t1" in renamed["owner"]["unreadable"]
    assert renamed["accuracy"] == report["before"]["accuracy"]
    aligned = [e for e in report["entries"] if "owner_aligned" in e]
    assert {e["attack"] for e in aligned} == {"insert-block", "rename", "drop-block", "free-move"}
    assert all(e["owner_aligned"]["matches"] == bits for e in aligned)
    (impossible,) = entries(report, "untie")
    assert "shared" in impossible["impossible"]
    survives, *others = (said.replace("\xa0", " ") for said in survival(report))
    assert all(name in survives for name in ("insert-block", "rename", "drop-block (block 0"))
    assert "merge-base (25 % of the other network; 50 % of the other network)" in survives
    assert "free-move (negate; scale; stretch; reorder; mirror; split; dummies)" in survives
    assert others == [
        "It is hidden, and the network useful, after merge-base (75 % of the other network)."
    ]
    assert all(sentence in html(report) for sentence in survival(report))
    _, left_out = plan(replace(blocks, anchor=None), full=True)
    for name in ("rename", "drop-block"):
        assert "network before the mark" in left_out[name], (name, left_out[name])


def test_removals_are_measured_by_accuracy_and_mark(report):
    light, heavy = entries(report, "prune")[0], entries(report, "prune")[-1]
    assert light["owner"]["accepted"]
    assert light["accuracy"] > report["before"]["accuracy"] - 0.05
    assert heavy["accuracy"] < 0.5
    assert [entry["strength"] for entry in entries(report, "quantise")] == [*range(len(KINDS))]
    assert all(entry["cost"]["seconds"] > 0 for entry in report["entries"])


def test_an_equal_network_hides_the_mark_at_no_cost(report):
    (combined,) = entries(report, "combine")
    assert combined["accuracy"] == pytest.approx(report["before"]["accuracy"], abs=0.01)
    assert not combined["owner"]["accepted"]
    assert combined["owner"]["matches"] / combined["owner"]["bits"] < 0.65
    (inserted,) = entries(report, "insert-dummies")
    assert "has shape" in inserted["owner"]["unreadable"]


def test_the_contrast_of_published_and_exact_verification(report):
    (solved,) = entries(report, "solve")
    assert solved["forged"]["published_accepted"]
    assert not solved["forged"]["accepted"]
    assert solved["forged"]["log10_p_value"] is None
    assert 0.3 < solved["forged"]["differs_from_owner"] < 0.7
    for drawn in entries(report, "fake1"):
        assert drawn["forged"]["published_signature"]
        assert not drawn["forged"]["published_fidelity"]
    ground = entries(report, "grind")[-1]["forged"]
    assert ground["derived"]
    assert -6 < ground["log10_p_value"] < 0
    assert not ground["accepted"]


def test_flipped_bits_are_counted(report):
    shares = [entry["forged"]["differs_from_owner"] for entry in entries(report, "flip")]
    assert shares == pytest.approx([0, 0.1, 0.25, 0.5, 0.75, 1], abs=0.01)


def test_attacks_that_train_report_what_they_had(subject, tmp_path):
    names = ("ftal", "transfer-rtal", "overwrite", "distil-unrelated", "fake2", "substitute-cerb")
    report = audit(subject, tmp_path / "audit.json", full=True, only=names)
    assert {entry["attack"] for entry in report["entries"]} == set(names)
    assert not any("impossible" in entry for entry in report["entries"])
    (tuned,) = entries(report, "ftal")
    assert tuned["cost"]["had"] == "W, D"
    assert (tuned["cost"]["samples"], tuned["cost"]["epochs"]) == (128, 1)
    (moved,) = entries(report, "transfer-rtal")
    assert moved["task"] == "other"
    assert tuned["task"] == "same"
    assert moved["owner"]["accepted"]  # passports sit in the weights, and a new head leaves them
    assert entries(report, "distil-unrelated")[0]["cost"]["had"] == "Q"
    assert not entries(report, "distil-unrelated")[0]["owner"]["accepted"]


def test_a_grafted_key_hides_the_mark_from_the_eye_and_not_from_alignment(subject, tmp_path):
    report = audit(subject, tmp_path / "audit.json", full=True, only=("graft", "project"))
    (grafted,) = entries(report, "graft")
    assert (grafted["cost"]["had"], grafted["cost"]["epochs"]) == ("W, D", 0)
    assert grafted["accuracy"] > report["before"]["accuracy"] - 0.05
    assert grafted["owner"]["matches"] / grafted["owner"]["bits"] < 0.65
    assert not grafted["owner"]["accepted"]
    assert grafted["owner_aligned"]["matches"] / grafted["owner_aligned"]["bits"] > 0.95
    assert grafted["owner_aligned"]["accepted"]
    assert "found once aligned" in html(report)
    projected = entries(report, "project")
    assert [entry["strength"] for entry in projected] == [0.9, 0.95, 0.99, 0.999]
    assert projected[-1]["accuracy"] > report["before"]["accuracy"] - 0.05
    assert projected[-1]["owner"]["accepted"]


def test_an_audit_goes_on_where_it_stopped(subject, tmp_path, monkeypatch):
    path = tmp_path / "audit.json"
    names = ("prune", "solve")

    def stop_at_the_fourth(done, total, text):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(subject, path, only=names, show=stop_at_the_fourth)
    begun = json.loads(path.read_text())
    assert len(begun["entries"]) == 3
    whole = audit(subject, path, only=names, resume=True)
    assert whole["entries"][:3] == begun["entries"]
    assert len(whole["entries"]) == 10
    again = audit(subject, path, only=names, resume=True)
    assert again == whole  # nothing was run twice: the seconds would differ
    other = replace(subject, seed=1)
    with pytest.raises(UnreadableModelError, match="another network, key"):
        audit(other, path, only=names, resume=True)
    assert json.loads(path.read_text()) == whole


def test_an_audit_without_test_images_is_refused(subject, tmp_path):
    with pytest.raises(UnreadableDataError, match="--data"):
        audit(replace(subject, test=None), tmp_path / "audit.json")
    assert not (tmp_path / "audit.json").exists()


def test_what_is_not_run_is_named_with_its_reason(subject):
    bare = replace(subject, train=None, transfer=None, key=None)
    _, left_out = plan(bare, full=True)
    assert left_out["ftal"] == "needs --train"
    assert left_out["transfer-rtal"] == "needs --transfer"
    assert left_out["fake3"] == "needs --key, --train"
    assert left_out["forge-projection"] == "does not apply to passport-v2"
    chosen, quick = plan(subject, full=False)
    assert quick["distil"] == "only in a full audit"
    assert {name for name, _ in chosen} | set(quick) == set(ATTACKS)
    with pytest.raises(BadRecipeError, match=r"'prun' is unknown; there are: prune"):
        plan(subject, full=True, only=["prun"])


def test_every_attack_applies_to_a_scheme_of_the_catalog(subject):
    for name, attack in ATTACKS.items():
        schemes = [replace(subject, scheme=entry.scheme) for entry in CATALOG.values()]
        assert any(applies(attack, each) for each in schemes), name
        assert attack.full, name
        assert (attack.family is Family.AMBIGUITY) or not attack.marks


def test_an_insider_needs_the_key(subject):
    with pytest.raises(UnreadableKeyError, match="--key"):
        ATTACKS["flip"].run(replace(subject, key=None), 0.5)
    with pytest.raises(UnreadableDataError, match="--train"):
        ATTACKS["ftal"].run(replace(subject, train=None), 0.0)


def test_the_page_fetches_nothing_and_runs_nothing(report):
    text = html(report)
    assert "<script" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)
    for name in ("Pruning", "Accuracy by passport", "Other bits, other accuracy"):
        assert f">{name}<" in text
    assert "found once aligned" in text
    assert ruling(report) in text.replace("&#39;", "'")
    assert "ftal: not asked for" in text


def test_the_ruling_counts_what_the_entries_say(report):
    forged = [entry for entry in report["entries"] if "forged" in entry]
    forged = [e for e in forged if (e["attack"], e["strength"]) != ("flip", 0)]  # the genuine one
    passed = sum(entry["forged"]["published_accepted"] for entry in forged)
    assert f"{passed} of {len(forged)} forged keys pass the published verification" in ruling(
        report
    )
    assert "0 the exact one" in ruling(report)
    assert ruling({**report, "entries": []}) == "Nothing was attacked."


def test_a_mark_is_hidden_only_if_no_verification_finds_it(report):
    (aligned,) = entries(report, "combine")
    assert not aligned["owner"]["accepted"]
    assert aligned["owner_aligned"]["matches"] == aligned["owner_aligned"]["bits"]
    assert ruling({**report, "entries": [aligned]}).startswith("0 of 1 attempts")
    gone = {name: fact for name, fact in aligned.items() if name != "owner_aligned"}
    found = {**gone["owner"], "accepted": True}
    by_triggers = {**gone, "owner_triggers": found}
    assert ruling({**report, "entries": [gone]}).startswith("1 of 1 attempts")
    assert ruling({**report, "entries": [by_triggers]}).startswith("0 of 1 attempts")
    unread = {**gone, "owner": {"unreadable": "other shapes"}}
    assert "After 1 more it could not be read" in ruling({**report, "entries": [unread]})


def test_a_key_that_the_network_does_not_carry_is_no_subject(subject, tmp_path):
    other = V2.draw_key(subject.model, subject.example, passports="derived")
    with pytest.raises(UnsuitableModelError, match="does not carry this key"):
        audit(replace(subject, key=other), tmp_path / "audit.json")
    few = subject.test.subset(torch.arange(8))
    few = replace(few, labels=few.labels % 2, classes=("even", "odd"))
    with pytest.raises(UnreadableDataError, match="2 classes"):
        audit(replace(subject, test=few), tmp_path / "audit.json")


def test_mistakes_are_errors_and_not_attacks_that_are_impossible(subject, tmp_path):
    path = tmp_path / "audit.json"
    with pytest.raises(BadRecipeError, match="float33"):
        audit(replace(subject, budget=Budget(precision="float33")), path)
    with pytest.raises(BadRecipeError, match="nothing is left to run: ftal only in a full audit"):
        audit(subject, path, only=["ftal"])
    for name, strength in (("quantise", 9.0), ("grind", 0.0), ("flip", 3.0), ("prune", 2.0)):
        with pytest.raises(BadRecipeError):
            attack_once(subject, name, strength, None)
    with pytest.raises(BadRecipeError, match="does not apply to adi"):
        attack_once(replace(subject, scheme=ADI, key=None), "fake1", 0.0, None)
    path.write_text("{")
    with pytest.raises(UnreadableModelError, match="no report of an audit"):
        audit(subject, path, only=["solve"], resume=True)


def test_an_insider_s_forgery_does_not_give_the_owner_s_seed_away(subject):
    for name in ("flip", "fake3"):
        forged = ATTACKS[name].run(subject, 0.5).key
        assert forged.seed != subject.key.seed
        assert forged.context.owner == "forger"
        assert forged.context.nonce != subject.key.context.nonce


@pytest.mark.trains
def test_forged_triggers_are_judged_by_answers(subject):
    shown = replace(subject, scheme=replace(V3, triggers=8), key=None)
    entry = attack_once(shown, "forge-triggers", 0.0, None)
    assert entry["forged"]["bits"] == 8
    assert entry["forged"]["accuracy"] == entry["accuracy"]


def test_a_transfer_is_measured_on_its_own_task_even_with_as_many_classes(subject, tmp_path):
    moved = replace(subject.train, labels=(subject.train.labels + 1) % 10)
    shifted = replace(subject, transfer=Transfer(moved, moved), budget=Budget(4, 16))
    entry = attack_once(shifted, "transfer-rtal", 0.0, tmp_path / "moved")
    assert entry["task"] == "other"
    saved = load_model(tmp_path / "moved")
    on_its_own = accuracy(saved.model.eval(), moved, subject.normalise)
    assert entry["accuracy"] == on_its_own != accuracy(saved.model, subject.test, subject.normalise)
    assert saved.config.metrics == {}
    with pytest.raises(UnwritableOutputError, match="exists already"):
        attack_once(shifted, "transfer-rtal", 0.0, tmp_path / "moved")


def test_a_page_says_what_was_impossible(report):
    entry = {
        "attack": "hash-bound",
        "family": "ambiguity",
        "summary": "forge",
        "strength": None,
        "strength_is": "",
        "impossible": "no <batch> norm",
    }
    text = html({**report, "entries": [*report["entries"], entry]})
    assert "not possible here: no &lt;batch&gt; norm" in text


def test_no_secret_is_in_a_report(subject, report):
    text = json.dumps(report)
    assert subject.key.seed.hex() not in text
    assert subject.key.fingerprint not in text


@pytest.fixture
def files(subject, tmp_path):
    """The subject as its owner and the world have it: a released folder and a key file."""
    save_model(tmp_path / "released", subject.model, subject.config)
    save_key(subject.key, tmp_path / "owner.key")
    return tmp_path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_forges_a_key_that_the_published_rule_accepts(files):
    forged = files / "forged.key"
    done = invoke(
        *("attack", "solve", files / "released", "--data", "digits", "--split", "test"),
        *("--limit", 64, "--key", files / "owner.key", "--out", forged, "--json"),
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["forged"]["published_accepted"]
    assert not load_key(forged).derived
    assert forged.stat().st_mode & 0o077 == 0
    assert invoke("verify", files / "released", "--key", forged, "--as-published").exit_code == 0
    assert invoke("verify", files / "released", "--key", forged).exit_code == 1


def test_the_command_writes_the_attacked_network(files):
    done = invoke(
        *("attack", "flip-signs", files / "released", "--data", "digits", "--split", "test"),
        *("--limit", 64, "--key", files / "owner.key", "--out", files / "flipped"),
    )
    assert done.exit_code == 0, done.output
    assert "found once aligned" in done.stdout
    key = ("--key", files / "owner.key")
    assert invoke("verify", files / "released", *key).exit_code == 0
    assert invoke("verify", files / "flipped", *key).exit_code == 1
    assert invoke("verify", files / "flipped", *key, "--align", files / "released").exit_code == 0


def test_a_forger_who_changes_the_network_gets_both(files):
    forged = files / "bound.key"
    done = invoke(
        *("attack", "hash-bound", files / "released", "--data", "digits", "--split", "test"),
        *("--limit", 64, "--out", forged),
    )
    assert done.exit_code == 0, done.output
    model = files / "bound.key.model"
    assert invoke("verify", model, "--key", forged, "--as-published").exit_code == 0
    assert invoke("verify", model, "--key", files / "owner.key").exit_code == 1


def test_the_audit_command_writes_report_and_page(files):
    done = invoke(
        *("audit", files / "released", "--data", "digits", "--split", "test", "--limit", 64),
        *("--key", files / "owner.key", "--only", "solve", "--only", "permute"),
        *("--out", files / "audit"),
    )
    assert done.exit_code == 0, done.output
    assert "1 of 1 forged keys pass the published verification, 0 the exact one" in done.stdout
    report = json.loads((files / "audit" / "audit.json").read_text())
    assert report["format"] == "nnpassport-audit"
    assert (files / "audit" / "audit.html").read_text().startswith("<!doctype html>")


def test_the_list_names_every_attack():
    listed = json.loads(invoke("attacks", "--json").stdout)
    assert [row["name"] for row in listed] == list(ATTACKS)
    assert "substitute-cerb" in invoke("attacks").stdout


def test_an_unknown_attack_is_no_refusal(files):
    done = invoke("attack", "wish", files / "released", "--data", "digits")
    assert isinstance(done.exception, BadRecipeError)


def test_the_recipes_of_attackers_stay_within_the_budget(subject):
    assert subject.recipe(0.1).epochs == 1
    assert subject.recipe(0.1, epochs=7).epochs == 7
    assert removal.TRANSFER.rate == ambiguity.REVERSE.rate == 0.01


def test_the_documents_name_every_attack():
    text = (Path(__file__).parent.parent / "docs" / "attacks.md").read_text()
    assert [name for name in ATTACKS if f"`{name}`" not in text] == []
