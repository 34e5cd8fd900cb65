"""The page that strangers are coins shows what its figures hold, and they say so."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def script():
    spec = importlib.util.spec_from_file_location("coins", ROOT / "benchmarks" / "coins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_figures_render_to_and_they_are_coins():
    rows = json.loads((ROOT / "results" / "coins.json").read_text(encoding="utf-8"))
    assert script().page(rows) == (ROOT / "results" / "coins.md").read_text(encoding="utf-8")
    assert {row["read in"] for row in rows} == {"the anchor", "another", "another, aligned"}
    assert sum(row["keys"] for row in rows) > 20_000
    for row in rows:
        assert abs(row["mean"] - 0.5) < 4 * (0.25 / row["bits"] / row["keys"]) ** 0.5, row
        assert abs(row["spread"] - 1) < 4 / (2 * row["keys"]) ** 0.5, row
        assert row["ks"] > 0.01, row
