"""The page of cheaper training shows what its results hold, and nothing else."""

import importlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # it imports its neighbours
    try:
        return importlib.import_module("cheaper")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_the_page_is_what_its_results_render_to():
    cheaper = script()
    entries = cheaper.entries_in(ROOT / "results" / "cheaper")
    assert cheaper.render(entries) == (ROOT / "results" / "cheaper.md").read_text(encoding="utf-8")
    assert {entry["matches"] for entry in entries if "matches" in entry} == {896}


def test_a_cell_that_was_not_run_is_named_and_has_no_row():
    cheaper = script()
    entries = cheaper.entries_in(ROOT / "results" / "cheaper")
    kept = [entry for entry in entries if cheaper.Cell(**entry["cell"]).title != "V2, late 0.5"]
    page = cheaper.render(kept)
    assert "| V2, late 0.5 |" not in page
    assert "V2, late 0.5;" in page.split("Not run: ")[1]


def test_a_cost_is_that_of_the_steps_that_have_two_branches():
    cheaper = script()
    assert cheaper.Cell("passport-v2", late=0.5, share=0.5, every=2).work == 0.125
    for path in (ROOT / "results" / "cheaper").glob("*.json"):
        entry = json.loads(path.read_text(encoding="utf-8"))
        cell = cheaper.Cell(**entry["cell"])
        expected = 1 + 0.428 * cell.work if cell.scheme else 1
        assert abs(entry["step_cost"] - expected) < 1e-3
