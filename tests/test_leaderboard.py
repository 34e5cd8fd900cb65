"""The leaderboard: what counts as removed, forged, a stranger's; and one that was really run."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed import embed
from torch import nn
from typer.testing import CliRunner

from nnpassport import catalog
from nnpassport.attacks import table
from nnpassport.catalog import CATALOG, read_settings, with_settings
from nnpassport.cli.app import app
from nnpassport.data.images import Normalisation
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.answers import ANSWERS
from nnpassport.embedding.schemes.passport import V3
from nnpassport.embedding.schemes.triggered import TriggerSet
from nnpassport.embedding.schemes.uchida import Uchida
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.lab import plans, tasks
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.leaderboard import board, field
from nnpassport.lab.leaderboard.standings import (
    Outcome,
    Removal,
    ambiguity,
    removal,
    standings,
)
from nnpassport.lab.plans import FIELD_PLANS, LEADERBOARD, LEADERBOARD_TRIAL
from nnpassport.lab.store import Store
from nnpassport.scheme import BadRecipeError, UnreadableDataError, UnsuitableModelError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def entry(accuracy, log10_p, strength=0.1, **more):
    return {
        "accuracy": accuracy,
        "strength": strength,
        "owner": {"bits": 100, "matches": 90, "log10_p_value": log10_p},
        **more,
    }


def result(*entries, before=0.80):
    return {"before": {"accuracy": before}, "entries": list(entries)}


def test_a_mark_that_is_found_is_held():
    found = removal(result(entry(0.79, -60), entry(0.76, -12, 0.5)), "owner")
    assert (found.outcome, found.log10_p, found.strength) == (Outcome.HELD, -12, 0.5)


def test_a_mark_above_alpha_in_a_network_that_works_is_removed():
    found = removal(result(entry(0.79, -60), entry(0.76, -8.9, 0.5)), "owner")
    assert (found.outcome, found.log10_p, found.accuracy) == (Outcome.REMOVED, -8.9, 0.76)


def test_more_than_five_points_lost_is_no_removal():
    found = removal(result(entry(0.79, -60), entry(0.7499, -1, 0.5)), "owner")
    assert (found.outcome, found.log10_p) == (Outcome.SPOILT, -60)
    assert removal(result(entry(0.7499, -1)), "owner").outcome is Outcome.SPOILT
    assert removal(result(entry(0.7499, -10)), "owner").outcome is Outcome.HELD
    assert removal(result(entry(0.7501, -1)), "owner").outcome is Outcome.REMOVED


def test_what_turns_channels_is_read_aligned():
    aligned = {"bits": 100, "matches": 100, "log10_p_value": -29.0}
    found = removal(result(entry(0.80, -0.3, owner_aligned=aligned)), "owner")
    assert (found.outcome, found.log10_p, found.aligned) == (Outcome.HELD, -29.0, True)


def test_a_mark_that_cannot_be_read_is_no_evidence():
    unreadable = {**entry(0.80, -9), "owner": {"unreadable": "another shape"}}
    found = removal(result(unreadable), "owner")
    assert (found.outcome, found.log10_p) == (Outcome.REMOVED, 0.0)


def test_an_attack_that_is_impossible_removed_nothing():
    found = removal(result({"impossible": "no norm", "strength": 0.1}), "owner")
    assert found.outcome is Outcome.IMPOSSIBLE
    assert board.removal_box(found).text == "impossible"


def forged(log10_p, *, published):
    return {"forged": {"log10_p_value": log10_p, "published_accepted": published}}


def test_forged_keys_are_counted_by_both_rules():
    found = ambiguity([forged(None, published=True), forged(-3.0, published=True)])
    assert (found.tries, found.published, found.exact, found.best_log10_p) == (2, 2, 0, -3.0)
    assert ambiguity([forged(-9.0, published=False)]).exact == 1
    assert not ambiguity([{"impossible": "no passport"}]).possible


def test_informed_thieves_are_counted_apart():
    weak, strong = Removal(Outcome.HELD, -60), Removal(Outcome.REMOVED, -2)
    line = standings(LEADERBOARD, Store(ROOT / "results", ROOT / "none", None))[0]
    names = [name for name in line.removals if table.ATTACKS[name].informed]
    assert names
    assert board.thieves_box(line).text == f"not run (of {len(names)})"
    some = {**line.removals, "prune": weak, names[0]: strong, names[1]: weak}
    robbed = line._replace(removals=some)
    box = board.thieves_box(robbed)
    assert (box.text, box.tone, box.more) == ("1 of 2", "bad", names[0])
    assert robbed.tried == line.tried
    assert "1 of 2" in board.ranking(board.board_of([robbed]))[0]
    shown = board.markdown(LEADERBOARD, board.board_of([line]))
    assert all(f"| {name} | not run |" in shown for name in names)


def test_exponents_are_raised():
    assert board.said_p(-61.4) == "10⁻⁶¹"
    assert board.said_p(-0.2) == "1"


def test_every_scheme_of_the_catalog_and_every_attack_that_applies_has_a_cell():
    cells = field.cells_of(LEADERBOARD)
    assert {cell.network.scheme for cell in cells} == {"", *CATALOG}
    for name, attack in table.ATTACKS.items():
        wanted = {
            n
            for n, e in CATALOG.items()
            if name not in LEADERBOARD.skipped and table.aims_at(attack, e.scheme)
        }
        assert {cell.network.scheme for cell in cells if cell.work == name} == wanted
    assert all(cell.network.tuned for cell in cells)


def test_what_is_left_out_is_there_to_be_left_out():
    for plan in FIELD_PLANS.values():
        assert set(plan.skipped) <= set(table.ATTACKS)
        assert all(plan.skipped.values())


def test_unknown_schemes_and_attacks_are_refused():
    with pytest.raises(UnsuitableModelError, match="'rot13' is not in the catalog; there are: pas"):
        field.cells_of(LEADERBOARD, ["rot13"])
    with pytest.raises(BadRecipeError, match="'distil' is not run: a copy worth"):
        field.cells_of(LEADERBOARD, attacks=["distil"])
    with pytest.raises(BadRecipeError, match="recipe 'short' is unknown; there are: leaderboard"):
        plans.field_plan_named("short")


def test_a_network_that_is_trained_on_is_another_cell_and_its_plain_one_is_the_reproductions():
    network = Network("alexnet", "cifar10", "adi", "batch", 0, tuned=True)
    cell = Cell(LEADERBOARD, network)
    assert cell.inputs["plain"] == cell.plain.inputs
    assert cell.plain.inputs == Cell(plans.SHORT, network._replace(scheme="", tuned=False)).inputs
    assert cell.needs == (cell.plain,)
    untuned = Cell(LEADERBOARD, network._replace(tuned=False))
    assert "tuned" not in untuned.inputs
    assert cell.name != untuned.name


QUICK = replace(
    LEADERBOARD_TRIAL,
    embed=replace(LEADERBOARD_TRIAL.embed, epochs=1),
    tuning=replace(LEADERBOARD_TRIAL.tuning, epochs=1, batch=8),
    architectures={"alexnet": {"width": 0.125}},
    train_images={"alexnet": 256},
    tuning_images=128,
    attack_test_images=200,
    fresh_keys=1,
    settings={"adi": {"triggers": 40}},
)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The trial with trainings of a few steps, and marks that are constructed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FIELD_PLANS, QUICK.name, QUICK)
        patch.setattr(Uchida, "embed", embed)
        patch.setattr(TriggerSet, "embed", embed)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick):
    """The trial's leaderboard of two schemes and three attacks, as a user runs it."""
    folder = tmp_path_factory.mktemp("board")
    words = ["leaderboard", "--recipe", "leaderboard-trial", "--json"]
    words += ["--results", str(folder / "results"), "--networks", str(folder / "networks")]
    for scheme in ("adi", "uchida"):
        words += ["--scheme", scheme]
    for attack in ("prune", "forge-projection", "forge-triggers"):
        words += ["--attack", attack]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout), words


def accuracy_of(folder):
    loaded = load_model(folder)
    normalise = Normalisation(loaded.config.mean, loaded.config.std)
    return accuracy(loaded.model.eval(), tasks.images_of(None, "digits").test, normalise)


@pytest.mark.trains
def test_a_leaderboard_is_run_and_rendered(run):
    """Forged triggers are a hundred steps of an optimiser; the networks were trained for a few."""
    folder, summary, _ = run
    assert summary["done"] == summary["cells"] == 11
    page, html, figure = (Path(path) for path in summary["pages"])
    text = page.read_text()
    assert f"2 of the catalog's {len(CATALOG)} schemes (not: passport-v1, " in text
    store = Store(folder / "results", folder / "networks", None)
    lines = {line.label: line for line in standings(QUICK, store)}
    assert set(lines) == {"adi, answers", "uchida, bits"}
    for line in lines.values():
        assert line.mark.found == line.mark.of
        assert line.mark.log10_p < -30
        assert f"| {line.label} |" in text
        assert line.removals["prune"] is not None
        assert line.strangers.exact == 0
        assert line.cost[0] <= line.cost[1] <= line.cost[2]
        reached = accuracy_of(store.folder(Cell(QUICK, line.network)) / "released")
        control = accuracy_of(store.folder(Cell(QUICK, line.network._replace(scheme=""))))
        assert reached > 0.7
        assert (line.accuracy, line.lost) == pytest.approx((reached, control - reached), abs=1e-6)
    uchida = lines["uchida, bits"].ambiguities["forge-projection"]
    assert (uchida.published, uchida.exact) == (1, 0)
    adi = lines["adi, answers"].ambiguities["forge-triggers"]
    assert (adi.published, adi.exact) == (1, 0)
    assert "forge-projection" not in lines["adi, answers"].ambiguities
    assert figure.read_text().startswith("<?xml")
    assert "<script" not in html.read_text()


@pytest.mark.trains
def test_what_was_run_is_not_run_again(run):
    folder, summary, words = run
    before = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*-*.json")}
    again = CliRunner().invoke(app, [*words, "--render-only"])
    assert again.exit_code == 0
    assert json.loads(again.stdout)["done"] == summary["done"]
    after = {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*-*.json")}
    assert after == before


@pytest.mark.trains
def test_no_secret_is_in_the_results(run):
    folder, _, _ = run
    from nnpassport.keys.keyfile import load_key

    keys = [load_key(path) for path in (folder / "networks").rglob("owner.key")]
    written = "".join(path.read_text() for path in (folder / "results").rglob("*.*"))
    assert keys
    for key in keys:
        assert key.seed.hex() not in written
        assert key.fingerprint not in written


def test_nothing_run_is_said(tmp_path):
    store = Store(tmp_path, tmp_path, None)
    with pytest.raises(UnreadableDataError, match="has no network of recipe leaderboard"):
        board.render(LEADERBOARD, store, tmp_path / "page.md")


def test_settings_are_read_and_checked():
    assert read_settings(["user=3", "strength=0.05", "late=1e-1"]) == {
        "user": 3,
        "strength": 0.05,
        "late": 0.1,
    }
    assert read_settings(["kind=mirrored"]) == {"kind": "mirrored"}
    for word in ("user", "user=", "=3"):
        with pytest.raises(BadRecipeError, match=f"'{word}' is not NAME=VALUE"):
            read_settings([word])
    with pytest.raises(BadRecipeError, match="triggers of adi is 'many'; needed: a number"):
        with_settings(ADI, triggers="many")
    with pytest.raises(BadRecipeError, match="triggers of adi is inf; needed: a whole number"):
        with_settings(ADI, triggers=math.inf)
    with pytest.raises(BadRecipeError, match="kind of answers is 3; needed: a word"):
        with_settings(ANSWERS, kind=3)
    with pytest.raises(BadRecipeError, match=r"triggers of adi is \[3\]; needed: a number"):
        with_settings(ADI, triggers=[3])
    assert type(with_settings(ADI, triggers=40.0).triggers) is int
    with pytest.raises(BadRecipeError, match="adi has no setting 'name'"):
        with_settings(ADI, name="uchida")
    with pytest.raises(BadRecipeError, match=r"triggers of adi is 2.5; needed: a whole number"):
        with_settings(ADI, triggers=2.5)
    with pytest.raises(BadRecipeError, match="adi has no setting 'pictures'"):
        with_settings(ADI, pictures=1)
    assert math.isclose(with_settings(V3, trigger_weight=0.5).trigger_weight, 0.5)


def test_what_a_key_has_fixed_is_not_set_otherwise():
    key = ADI.draw_key(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), torch.zeros(2, 1, 8, 8))
    catalog.require_settings(key, {"triggers": key.context.triggers.count, "strength": 0.3})
    with pytest.raises(BadRecipeError, match="triggers=3 was given, and the key was drawn with"):
        catalog.require_settings(key, {"triggers": 3})


def test_schemes_are_listed():
    done = CliRunner().invoke(app, ["schemes", "--json"])
    assert set(json.loads(done.stdout)) == set(catalog.CATALOG)
