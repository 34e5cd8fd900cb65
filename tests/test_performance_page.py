"""The page of costs: every number is one of its files', and the kept page is what they give."""

import importlib.util
import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from nnpassport.lab.bench import Case, comparisons, plan, report

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("performance", ROOT / "benchmarks" / "performance.py")
performance = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(performance)

SECONDS = {
    "plain": 2.0,
    "V1": 2.2,
    "slow V1": 2.5,
    "V2": 3.0,
    "V3": 3.2,
    "slow V2": 5.0,
    "V2 share 1/4": 2.4,
    "V1 folded": 2.0,
    "V1 presented": 2.1,
    "V2 released": 2.02,
    "plain step": 2.0,
    "plain fit": 2.2,
    "verify": 0.5,
    "align": 6.0,
}


def results(cases, *, left_out=()):
    """A file as the benchmark writes it, each turn slower than the one before."""
    numbers = [
        report._entry(case, [SECONDS[case.network] * t for t in (1, 1.1, 1.2)], [1.0] * 3)
        for case in cases
        if case.network in SECONDS
    ]
    bounds = {case.architecture: 1.4 for case in cases}
    source = {"device": "Made up", "threads": 1, "cores": 2, "torch": "2.9", "commit": "abcdef"}
    return {
        "provenance": {**source, "date": "2026-01-02", "wall_seconds": 90.0},
        "lower_bounds": bounds,
        "ratios": comparisons.ratios(numbers, bounds),
        "limits": comparisons.limits(numbers),
        "numbers": numbers,
        "not_run": [report._left_out(case, "no time left") for case in left_out],
    }


@pytest.fixture
def page(tmp_path):
    """Renders files of made-up results."""

    def rendered(**files):
        folder = tmp_path / "results"
        folder.mkdir()
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return performance.render(folder, tmp_path / "docs" / "performance.md")

    return rendered


def rows(text, heading):
    section = text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def cases(*tasks, **more):
    chosen = {"batches": [64], "precisions": ["float32"], "compiled": [False], **more}
    return plan(**{"architectures": ["alexnet"], **chosen}, tasks=tasks)


def test_costs_stand_beside_those_of_the_paper(page):
    of_resnet50 = cases("train", architectures=["resnet50"], batches=[16])
    text = page(a=results(cases("train", "infer")), b=results(of_resnet50))
    found = {tuple(row[:2]): row[2:] for row in rows(text, "Beside the paper's Table 4")}
    assert found["alexnet, float32, batch 64", "V1"] == [
        *("+10 % (+10 … +10, n=3)", "+25 % (+25 … +25, n=3)", "+15–30 %"),
        *("+0 % (+0 … +0, n=3)", "+5 % (+5 … +5, n=3)", "+10 %"),
    ]
    assert found["alexnet, float32, batch 64", "V2"][0] == "+50 % (+50 … +50, n=3)"
    assert found["alexnet, float32, batch 64", "V2"][3] == "+1 % (+1 … +1, n=3)"
    papers = [found["resnet50, float32, batch 16", scheme][2] for scheme in ("V1", "V2", "V3")]
    assert papers == ["+10 %", "+182 %", "+191 %"]


def test_cheaper_training_stands_beside_its_own_bound(page):
    text = page(a=results(cases("train")))
    found = {row[1]: row[2:] for row in rows(text, "Below the bound")}
    assert found["V2 share 1/4"] == ["1.20 (1.20–1.20, n=3)", "1.10", "1.09 (1.09–1.09, n=3)"]
    assert "late 3/4" not in found  # not measured here


def test_acts_memory_and_the_loop_have_their_own_units(page):
    everything = results(cases("act", "long act", "loop", "memory", architectures=["resnet50"]))
    text = page(a=everything)
    acts = {tuple(row[:2]): row[2:] for row in rows(text, "Acts on keys")}
    assert acts["resnet50, passports everywhere", "verify"] == [
        *("550.0", "500.0", "600.0", "3", "0.250")
    ]
    assert acts["resnet50", "align"][-1] == "3.000"
    assert rows(text, "The loop") == [
        ["resnet50, float32, batch 64", "plain", "26", "29", "1.10 (1.10–1.10, n=3)"]
    ]
    targets = {tuple(row[1:3]): row[3:] for row in rows(text, "What is aimed at")}
    assert targets["loop", "plain fit / plain step"] == ["1.10 (1.10–1.10, n=3)", "1.05", "no"]
    assert targets["act", "verify"] == ["0.55 s (0.53–0.57, n=3)", "1.00 s", "yes"]


def test_what_was_not_run_is_named_unless_another_file_has_it(page):
    there, missing = cases("infer"), cases("infer", architectures=["resnet18"])
    text = page(a=results(there), b=results([], left_out=[*there, *missing[:1]]))
    left_out = text.split("## Not run")[1]
    assert "- resnet18, float32, batch 64, infer: plain (batch): no time left" in left_out
    assert "- alexnet, float32, batch 64, infer" not in left_out
    assert (
        "- vit-tiny, bfloat16, compiled, batch 256, training and inference: not asked" in left_out
    )


def test_the_same_measured_twice_is_not_chosen_from(page):
    with pytest.raises(SystemExit, match=r"a\.json and in b\.json: keep one"):
        page(a=results(cases("infer")), b=results(cases("infer")))


def test_the_picture_has_every_network_and_can_be_read(page, tmp_path):
    page(a=results(cases("train")), b=results(cases("train", batches=[256])))
    picture = ET.parse(tmp_path / "docs" / performance.PICTURE)
    words = {"".join(e.itertext()).strip() for e in picture.iter() if "text" in e.tag}
    assert {"V1", "V2 share 1/4", "slow V2", "paper", "bound of the FLOPs"} <= words
    assert {"alexnet, float32, batch 64", "alexnet, float32, batch 256"} <= words


def test_parts_are_cells_that_exist_and_fit_into_half_an_hour():
    assert sum(part.minutes for part in performance.PARTS) <= 30
    seen: set[Case] = set()
    for part in performance.PARTS:
        words = part.options.split()
        named = {
            option: [b for a, b in itertools.pairwise(words) if a == option]
            for option in ("--architecture", "--precision", "--only", "--batch")
        }
        found = report.choose(
            architectures=named["--architecture"],
            batches=[int(batch) for batch in named["--batch"]],
            precisions=named["--precision"],
            only=named["--only"],
            compiled="--compile" in words or None,
        )
        assert found
        assert not seen & set(found)
        seen |= set(found)


def test_the_page_of_this_repository_is_what_its_results_give(tmp_path):
    kept = ROOT / "docs" / "performance.md"
    assert performance.RESULTS.exists() == kept.exists()
    if not performance.RESULTS.exists():
        pytest.skip("there are no results yet")
    text = performance.render(performance.RESULTS, tmp_path / "performance.md")
    assert text == kept.read_text(), "render it again: results or rendering changed"
    assert (kept.parent / performance.PICTURE).exists()
