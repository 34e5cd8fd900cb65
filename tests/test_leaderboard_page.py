"""`docs/leaderboard.md` says what the results say, and nothing else."""

import json
import re
from pathlib import Path

import pytest

from nnpassport.catalog import CATALOG
from nnpassport.lab.leaderboard import board
from nnpassport.lab.leaderboard.standings import Outcome, standings
from nnpassport.lab.plans import LEADERBOARD
from nnpassport.lab.store import Store

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "leaderboard.md"


@pytest.fixture(scope="module")
def lines():
    return standings(LEADERBOARD, Store(ROOT / "results", ROOT / "none", None))


def test_the_pages_are_rendered_from_the_results(lines):
    drawn = board.board_of(lines)
    again = "figures/leaderboard.svg"
    assert PAGE.read_text() == board.markdown(LEADERBOARD, drawn, picture=again)
    assert PAGE.with_suffix(".html").read_text() == board.html(LEADERBOARD, drawn)
    assert (PAGE.parent / again).read_text().startswith("<?xml")


def test_every_result_is_shown_and_says_where_it_is_from(lines):
    known = {path.stem for path in (ROOT / "results" / "leaderboard").glob("*.json")}
    assert known
    for path in (ROOT / "results" / "leaderboard").glob("*.json"):
        entry = json.loads(path.read_text())
        assert re.fullmatch(r"[0-9a-f]{40}", entry["provenance"]["commit"])
        assert entry["provenance"]["device"]
        assert entry["seconds"] > 0
    shown = {line.scheme for line in lines}
    assert shown <= set(CATALOG)


def test_every_mark_was_there_before_it_was_attacked(lines):
    for line in lines:
        assert line.mark.log10_p < -9, line.label
        for found in line.removals.values():
            if found is not None and found.log10_p is not None:
                # What is left may be read aligned, but never is more than there was.
                assert found.log10_p >= line.mark.log10_p - 1


def test_strangers_are_never_accepted_by_the_exact_verdict(lines):
    for line in lines:
        if line.strangers is not None:
            assert line.strangers.exact == 0
            assert line.strangers.least_log10_p > -5


def test_no_forger_is_accepted_by_the_exact_verdict_and_some_are_by_the_published(lines):
    ways = [each for line in lines for each in line.ambiguities.values() if each is not None]
    assert not any(each.exact for each in ways)
    assert any(each.published for each in ways)


def test_the_words_of_a_box_are_the_outcome(lines):
    for line in lines:
        for found in line.removals.values():
            box = board.removal_box(found)
            lost = found is not None and found.outcome is Outcome.REMOVED
            assert (box.tone == "bad") == lost
