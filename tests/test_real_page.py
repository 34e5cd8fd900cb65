"""The page of networks that the world trained shows what its results hold, and what was not run."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def benchmark(name):
    sys.path.insert(0, str(ROOT / "benchmarks"))  # it imports its neighbours
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def real():
    return benchmark("real")


@pytest.mark.parametrize("name", ["floor", "thieves"])
def test_pages_beside_it_are_what_their_results_render_to(name):
    page = (ROOT / "results" / f"{name}.md").read_text(encoding="utf-8")
    assert benchmark(name).render() == page


@pytest.fixture(scope="module")
def entries():
    return [json.loads(path.read_text()) for path in (ROOT / "results" / "real").glob("*.json")]


def test_the_page_is_what_its_results_render_to(real):
    assert real.render() == (ROOT / "results" / "real.md").read_text(encoding="utf-8")


def test_every_thief_has_a_row_and_what_was_not_run_says_so(real, entries):
    page = real.render().splitlines()
    run = {(e["network"], e["attack"], e["all_layers"]) for e in entries if "attack" in e}
    for network in {e["network"] for e in entries}:
        for thief in real.ATTACKS:
            rows = [line for line in page if line.startswith(f"| {network} | {thief} |")]
            assert len(rows) == 2
            there = sum((network, thief, where) in run for where in (False, True))
            assert sum("not run" in row for row in rows) == 2 - there


def test_a_mark_is_whole_before_anybody_takes_of_it(entries):
    grafts = [each for each in entries if "bits" in each and "attack" not in each]
    assert grafts
    for each in grafts:
        assert each["matches"] == each["bits"] >= 1000
        assert each["private_error"] < 1e-4
    for each in entries:
        assert len(each["provenance"]["commit"]) == 40
