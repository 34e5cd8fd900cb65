"""Table 4: ratios of steps in turns and seconds of V; what was not measured stays empty."""

import json

import pytest

from nnpassport.lab import timing as lab_timing
from nnpassport.lab.bench import networks, timing
from nnpassport.lab.bench import report as bench_report
from nnpassport.lab.paper import costs, tables
from nnpassport.report.provenance import provenance

TRAINING, SLOW, PAPER, RELEASED, PRESENTED, REPORTED, VERIFIED = range(2, 9)
SECONDS = {
    ("train", "plain", "batch"): 2.0,
    ("train", "V1", "batch"): 2.1,
    ("train", "slow V1", "batch"): 2.5,
    ("train", "plain", "group"): 4.0,
    ("train", "forked", "group"): 5.0,
    ("train", "V2", "group"): 6.0,
    ("train", "V3", "group"): 7.0,
    ("train", "slow V2", "group"): 10.0,
    ("train", "slow V3", "group"): 12.0,
    ("infer", "plain", "batch"): 1.0,
    ("infer", "V1 presented", "batch"): 1.1,
    ("infer", "V1 folded", "batch"): 0.9,
    ("infer", "plain", "group"): 1.0,
    ("infer", "V2 released", "group"): 1.0,
}
VERIFIED_IN = {
    "V1": [0.5, 0.1, 0.2],
    "V2": [0.2, 0.2, 0.2],
    "V3": [0.3, 0.3, 0.3],
    "V3 by triggers": [4.0, 4.0, 4.0],
}


@pytest.fixture
def known(monkeypatch):
    """Steps of known length, on a machine that slows down from turn to turn."""

    def measure(cells, *, repeats, **_):
        return [
            timing.Measurement(
                cell,
                lab_timing.Timed(
                    tuple(
                        SECONDS[cell.task, cell.network, cell.norm] * (1 + t)
                        for t in range(repeats)
                    ),
                    (1.0,) * repeats,
                ),
            )
            for cell in cells
        ]

    monkeypatch.setattr(bench_report, "measure", measure)
    # Seconds for each of the three networks, and no part of the table.
    monkeypatch.setattr(networks, "_flops", lambda architecture: networks._Flops(1, 1))
    verified = {
        "V1": [0.5, 0.1, 0.2],
        "V2": [0.2] * 3,
        "V3": [0.3] * 3,
        "V3 by triggers": [4.0] * 3,
    }
    monkeypatch.setattr(costs, "verifications", lambda *_, **__: verified)


def test_the_table_has_what_was_measured_as_percent_of_the_plain_network(known, tmp_path):
    report = costs.measure_costs(tmp_path)
    rows = {row[:2]: row for row in tables.table4(report).rows}
    assert len(rows) == 9
    assert {name for name, _ in rows} == {"AlexNet", "ResNet-18", "ResNet-50"}
    for name in ("AlexNet", "ResNet-18", "ResNet-50"):
        v1, v2, v3 = (rows[name, scheme] for scheme in ("V1", "V2", "V3"))
        assert [row[TRAINING].split()[0] for row in (v1, v2, v3)] == ["+5", "+50", "+75"]
        assert [row[SLOW].split()[0] for row in (v1, v2, v3)] == ["+25", "+150", "+200"]
        assert [row[RELEASED].split()[0] for row in (v1, v2, v3)] == ["−10", "+0", "+0"]
        assert v1[PRESENTED].split()[0] == "+10"
        assert [row[VERIFIED] for row in (v1, v2)] == ["0.20 s", "0.20 s"]
        assert v3[VERIFIED] == "0.30 s, by triggers 4.00 s"
    assert [rows["ResNet-50", s][PAPER] for s in ("V1", "V2", "V3")] == [
        "+10 %",
        "+182 %",
        "+191 %",
    ]
    assert "n=7" in rows["AlexNet", "V1"][TRAINING]


def test_the_file_says_what_was_measured_how_often_and_on_what(known, tmp_path):
    costs.measure_costs(tmp_path)
    kept = json.loads((tmp_path / costs.NAME).read_text())
    assert provenance().keys() | {"wall_seconds", "repeats"} <= kept["provenance"].keys()
    assert {(e["architecture"], e["batch"]) for e in kept["numbers"]} == set(costs.BATCHES.items())
    for entry in kept["numbers"]:
        assert entry["n"] == len(entry["values"]) == 7
        assert entry["min"] < entry["median"] < entry["max"]
    for architecture in costs.BATCHES:
        assert kept["verification"][architecture]["V1"] == 0.2
        assert kept["verification_turns"][architecture]["V1"] == [0.5, 0.1, 0.2]
    assert kept["not_run"] == []


def test_without_a_checkout_the_published_code_s_cost_stays_empty(known, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_report, "SLOW_REFERENCE", tmp_path / "missing.py")
    rows = tables.table4(costs.measure_costs(tmp_path)).rows
    assert {row[SLOW] for row in rows} == {tables.NOT_RUN}
    assert not {row[TRAINING] for row in rows} & {tables.NOT_RUN}


def test_a_table_of_nothing_holds_the_papers_numbers_and_no_other():
    for row in tables.table4(None).rows:
        assert {row[TRAINING], row[SLOW], row[RELEASED], row[VERIFIED]} == {tables.NOT_RUN}
        assert "%" in row[PAPER]


@pytest.mark.slow
def test_quick_costs_are_measured_and_not_taken_for_the_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_timing, "_SAMPLE_SECONDS", 0.0)
    report = costs.measure_costs(tmp_path, quick=True)
    found = {(e["task"], e["network"], e["norm"]) for e in report["numbers"]}
    assert found == set(SECONDS)
    assert report["quick"]
    assert not (tmp_path / costs.NAME).exists()
    turns = report["verification_turns"]["alexnet"]
    assert turns.keys() == {"V1", "V2", "V3", "V3 by triggers"}
    for title, seconds in turns.items():
        assert len(seconds) == costs.VERIFICATIONS
        assert min(seconds) <= report["verification"]["alexnet"][title] <= max(seconds)
    assert costs.measure_costs(tmp_path, quick=True) == report
