"""Every page of numbers is what its results give, and every result is on a page."""

import importlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import pytest

from nnpassport.lab import bench
from nnpassport.lab.leaderboard import board
from nnpassport.lab.leaderboard.standings import standings
from nnpassport.lab.paper import document
from nnpassport.lab.plans import LEADERBOARD, PLANS
from nnpassport.lab.store import Store

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"

_opened: list[set] = []


def _note(event, arguments):
    if _opened and event == "open" and str(arguments[0]).endswith(".json"):
        _opened[-1].add(os.path.realpath(str(arguments[0])))


sys.addaudithook(_note)


def script(name):
    """A script of `benchmarks`, which may import its neighbours."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def written(name, render):
    """What a script writes as a page when it renders."""
    kept = {}
    module = script(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_atomically", lambda path, page: kept.update({path: page}))
        render(module)
    (page,) = (page for path, page in kept.items() if path.suffix == ".md")
    return page.decode()


def loaded(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def reproduction():
    notes = document._notes((ROOT / "docs" / "reproduction-notes.md").read_text())
    return document.document(RESULTS / "reproduction", PLANS.values(), notes).text


def leaderboard():
    lines = standings(LEADERBOARD, Store(RESULTS, ROOT / "none", None))
    picture = "figures/leaderboard.svg"
    return board.markdown(LEADERBOARD, board.board_of(lines), picture=picture)


def performance():
    page = ROOT / "docs" / "performance.md"
    return written("performance", lambda module: module.render(module.RESULTS, page))


PAGES = {
    "docs/reproduction.md": reproduction,
    "docs/leaderboard.md": leaderboard,
    "docs/performance.md": performance,
    "results/scratch.md": lambda: script("scratch").render(script("scratch").load()),
    "docs/scaling.md": lambda: script("scaling").render(script("scaling").load()),
    "results/alignment.md": lambda: script("alignment_tables").render(),
    "results/answers.md": lambda: script("answers").rendered(loaded("answers")),
    "results/attacks-alexnet.md": lambda: script("attacks").render(),
    "results/bench-quick.md": lambda: bench.render(loaded("bench-quick")),
    "results/cheaper.md": lambda: script("cheaper").render(
        script("cheaper").entries_in(RESULTS / "cheaper")
    ),
    "results/cifar10-alexnet.md": lambda: script("cifar10").render(),
    "results/coins.md": lambda: script("coins").page(loaded("coins")),
    "results/compare.md": lambda: script("compare").render(),
    "results/floor.md": lambda: script("floor").render(),
    "results/fuzz.md": lambda: script("fuzz").render(loaded("fuzz")),
    "results/large_alignment.md": lambda: script("large_alignment").page(loaded("large_alignment")),
    "results/licensees.md": lambda: script("licensees").render(),
    "results/moves.md": lambda: script("moves").page(
        *map(loaded, ("moves", "moves-published", "moves-fresh"))
    ),
    "results/real.md": lambda: script("real").render(),
    "results/streaming.md": lambda: script("streaming").render(loaded("streaming")),
    "results/thieves.md": lambda: script("thieves").render(),
    "results/trained.md": lambda: script("trained").render(),
    "results/transfers-alexnet.md": lambda: script("transfers").render(),
}


@cache
def rendered(name):
    """A page, and the results that were opened for it."""
    _opened.append(set())
    try:
        return PAGES[name](), frozenset(_opened[-1])
    finally:
        _opened.pop()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_results_give(name):
    page, opened = rendered(name)
    assert opened
    assert page.strip() == (ROOT / name).read_text().strip()


def test_every_page_of_results_is_rendered():
    pages = {f"results/{path.name}" for path in RESULTS.glob("*.md")}
    assert pages <= PAGES.keys()


def test_no_result_is_orphaned():
    opened = {path for name in PAGES for path in rendered(name)[1]}
    known = {str(path.resolve()) for path in RESULTS.rglob("*.json")}
    assert not known - opened


def test_answers_that_nobody_marked_are_coins_and_the_page_says_what_was_reached():
    facts = loaded("answers")
    rows, most = facts["rows"], facts["plan"]["pictures"]
    numbers = ("scores 300", f"scores {most}", "labels 1000", f"labels {most}")
    honest = [*script("answers_page").BEFORE, "a stranger's, trained on true labels"]
    unmarked = [row[n] for row in rows if row["name"] in honest for n in numbers]
    assert len(unmarked) >= 12
    assert min(unmarked) > -3
    marked = script("answers_page").row_of(facts, "marked", 0.8)
    aims = {
        aim: (came, word) for strength, aim, came, word in script("answers_page").aims(facts)[:6]
    }
    came, word = aims["marked, scores of 1,000 images: at most 10^-30"]
    assert (came, word) == (f"{marked['scores 1000']:.1f}", "reached")
    for came, word in aims.values():
        assert word in {"reached", "**not reached**"}
        assert f"| {came} | {word} |" in rendered("results/answers.md")[0]
