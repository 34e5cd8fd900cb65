"""The benchmark: what is compared is comparable, and no number is made up."""

import itertools
import json
import runpy
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnpassport import bench
from nnpassport.bench import comparisons, networks, prepared, report, steps, timing
from nnpassport.bench.cells import CHEAPER
from nnpassport.data.images import CIFAR10
from nnpassport.models import build
from nnpassport.scheme import BadRecipeError, Batch
from nnpassport.schemes.passport import V1, V2, V3

EXAMPLE = torch.zeros(2, 3, 32, 32)
TABLE4 = [
    each
    for each in comparisons.COMPARISONS
    if each.task in {"train", "infer", "memory"}
    and each.above not in CHEAPER
    and each.below != "eager"
]
TINY = [replace(c, width=0.1) for c in bench.cells(["alexnet"], [2], ["float32"])]


@pytest.fixture
def hurried(monkeypatch):
    """One call a sample, and no process for each cell's memory."""
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(report, "peak_memory", lambda cell: 1000 + len(cell.network))


@pytest.mark.parametrize(
    ("architecture", "norm", "scheme"),
    [
        ("alexnet", "batch", V1),
        ("alexnet", "group", V2),
        ("alexnet", "group", V3),
        ("resnet18", "batch", V1),
        ("resnet18", "group", V2),
        ("resnet18", "batch", V2),
    ],
)
def test_the_slow_reference_has_our_loss_and_our_gradients(architecture, norm, scheme):
    slow_objective = runpy.run_path(str(networks.SLOW_REFERENCE))["objective"]
    ours = build(architecture, norm=norm, width=0.1).double()
    slow = build(architecture, norm=norm, width=0.1).double()
    slow.load_state_dict(ours.state_dict())
    key = scheme.draw_key(ours, EXAMPLE.double(), seed=bytes(range(32)))
    scheme.insert(ours, key, EXAMPLE.double())
    objectives = {
        ours: scheme.objective(key, steps=1, normalise=CIFAR10),
        slow: slow_objective(scheme, slow, key, EXAMPLE.double(), CIFAR10),
    }
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 32, 32, generator=rng, dtype=torch.float64)
    batch = Batch(images, torch.randint(10, (4,), generator=rng), step=7)
    losses = [objective(model.train(), batch).loss for model, objective in objectives.items()]
    torch.testing.assert_close(*losses)
    sum(losses).backward()
    expected = {name: p.grad for name, p in slow.named_parameters() if p.grad is not None}
    ours_by_plain_name = {
        name.replace(".norm.", "."): p.grad
        for name, p in ours.named_parameters()
        if p.grad is not None
    }
    assert expected.keys() == ours_by_plain_name.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours_by_plain_name[name], gradient, msg=name)


def test_the_lower_bounds_are_those_of_the_design():
    assert bench.lower_bound("alexnet") == pytest.approx(1.43, abs=0.005)
    assert bench.lower_bound("resnet18") == pytest.approx(1.204, abs=0.005)


@pytest.mark.parametrize(
    ("architecture", "after_fork"),
    [
        ("alexnet", ["features.11", "features.14", "classifier"]),
        ("resnet18", ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2", "fc"]),
        ("resnet50", ["layer4.0.conv2", "layer4.0.conv3", "layer4.1", "layer4.2", "fc"]),
    ],
)
def test_the_lower_bound_agrees_with_pytorchs_flop_counter(architecture, after_fork):
    model = build(architecture).eval()
    name = type(model).__name__
    with torch.no_grad(), FlopCounterMode(display=False, depth=9) as counter:
        model(EXAMPLE)
    counts = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    share = sum(counts[f"{name}.{module}"] for module in after_fork) / counter.get_total_flops()
    assert bench.lower_bound(architecture) == pytest.approx(1 + share)


def test_cells_are_timed_in_turns_and_warm_up_does_not_count(monkeypatch, hurried):
    order = []
    monkeypatch.setattr(timing, "prepare", lambda cell, device: lambda: order.append(cell))
    measured = bench.measure(TINY, repeats=2, warmup=1)
    turns = [order[i : i + len(TINY)] for i in range(0, len(order), len(TINY))]
    assert len(turns) == 3
    assert all(set(turn) == set(TINY) for turn in turns)
    assert turns[0] != turns[1]  # so that no cell always runs after the same other one
    assert [each.cell for each in measured] == TINY
    assert {len(each.seconds) for each in measured} == {2}
    assert {len(each.processor_seconds) for each in measured} == {2}


def test_a_short_sample_is_made_of_many_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "prepare", lambda cell, device: lambda: calls.append(1))
    # A clock of our own: on a busy machine even an empty call may take a millisecond.
    ticks = itertools.count()
    clock = SimpleNamespace(
        perf_counter=lambda: next(ticks) * 1e-3,
        process_time=time.process_time,
        monotonic=time.monotonic,
    )
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.1)
    (measured,) = bench.measure(TINY[:1], repeats=1, warmup=1)
    assert len(calls) == 1 + 100
    assert measured.seconds[0] == pytest.approx(1e-3 / 100)


def test_every_cell_and_every_ratio_comes_out(hurried):
    results = bench.collect(TINY, repeats=2, warmup=1)
    timed = [(e["task"], e["network"], e["norm"]) for e in results["numbers"]]
    assert [e for e in timed if e[0] != "memory"] == [(c.task, c.network, c.norm) for c in TINY]
    assert [e["ratio"] for e in results["ratios"] if e["task"] == "train"] == [
        "V1 / plain",
        "slow V1 / plain",
        "V2 / plain",
        "V2 / plain × lower bound",
        "forked / plain",
        "V2 / forked",
        "slow V2 / plain",
        "V3 / plain",
        "V3 / V2",
        "slow V3 / plain",
    ]
    assert len(results["ratios"]) == len(TABLE4)
    assert all(e["n"] == (1 if e["task"] == "memory" else 2) for e in results["numbers"])
    assert results["not_run"] == []
    assert {"commit", "torch", "device", "threads", "wall_seconds"} <= results["provenance"].keys()


def test_the_tables_are_rendered_from_the_file_alone(tmp_path, monkeypatch, hurried):
    monkeypatch.setattr(report, "QUICK", TINY[:5])
    shown = []
    page = bench.run(tmp_path / "bench.json", minutes=5, show=lambda *what: shown.append(what))
    assert page == bench.render(json.loads((tmp_path / "bench.json").read_text()))
    assert "| V1 presented / plain |" in page
    assert "Not run" not in page
    assert shown[-1][0] == pytest.approx(shown[-1][1])


def test_what_there_was_no_time_for_is_named_and_has_no_number(hurried):
    results = bench.collect(TINY, minutes=0)
    assert results["numbers"] == results["ratios"] == []
    left_out = [(e["task"], e["network"]) for e in results["not_run"] if e["task"] != "memory"]
    assert left_out == [(cell.task, cell.network) for cell in TINY]
    assert "- alexnet, batch 2, float32, train, slow V3 (group norm): no time left" in bench.render(
        results
    )


def test_three_turns_are_taken_before_time_is_shared(monkeypatch, hurried):
    monkeypatch.setattr(timing, "prepare", lambda cell, device: lambda: None)
    (measured,) = bench.measure(TINY[:1], repeats=7, warmup=1, until=0.0)
    assert len(measured.seconds) == timing.ENOUGH
    (measured,) = bench.measure(TINY[:1], repeats=7, warmup=1, until=0.0, deadline=0.0)
    assert measured.seconds == ()


def test_an_installed_package_says_that_it_lacks_the_slow_reference(monkeypatch, tmp_path, hurried):
    monkeypatch.setattr(report, "SLOW_REFERENCE", tmp_path / "missing.py")
    results = bench.collect([TINY[5], TINY[6], TINY[7]], repeats=1, warmup=1)
    assert [(e["network"], e["reason"]) for e in results["not_run"]] == [
        ("slow V1", "needs a checkout")
    ]
    assert [e["ratio"] for e in results["ratios"] if e["task"] == "train"] == ["V1 / plain"]


@pytest.mark.parametrize(
    ("values", "met"),
    [
        ([1.01, 1.02, 1.024], "yes"),
        ([1.0, 1.05, 1.06], "within noise"),
        ([1.1, 1.1, 1.2], "no"),
        ([1.0, 1.0], "too few turns"),
    ],
)
def test_a_ratio_is_judged_turn_by_turn(values, met):
    plain = [1.0, 2.0, 4.0][: len(values)]  # the machine slows down while it measures
    numbers = [
        report._entry(TINY[5], plain, plain),
        report._entry(TINY[6], [a * b for a, b in zip(values, plain, strict=True)], plain),
    ]
    (row,) = comparisons.ratios(numbers, {"alexnet": 1.43})
    assert row["ratio"] == "V1 / plain"
    assert row["median"] == pytest.approx(values[1])
    assert min(values) <= row["lower_quartile"] <= row["upper_quartile"] <= max(values)
    assert row["met"] == met
    assert row["by_processor_time"] == 1.0


def test_a_target_may_depend_on_the_batch_and_on_the_bound():
    by_name = {c.name: c for c in comparisons.COMPARISONS if c.task == "train"}
    facts = comparisons.Facts("alexnet", 64, 1.43)
    assert by_name["V2 / plain"].target(facts) == pytest.approx(1.05 * 1.43)
    assert by_name["V3 / V2"].bound(facts) == pytest.approx(66 / 64)
    assert by_name["V2 / plain × lower bound"].unit(facts) == pytest.approx(1.43)


@pytest.mark.parametrize("architecture", ["alexnet", "resnet18"])
def test_the_forked_network_has_the_flops_of_v2s_lower_bound(architecture):
    model = build(architecture, norm="group")
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        model(EXAMPLE)
    objective = steps.forked(model)
    with torch.no_grad(), FlopCounterMode(display=False) as forked:
        loss = objective(model, Batch(EXAMPLE, torch.zeros(2, dtype=torch.long))).loss
    assert torch.isfinite(loss)
    bound = forked.get_total_flops() / plain.get_total_flops()
    assert bound == pytest.approx(bench.lower_bound(architecture))


def test_bfloat16_cells_run(hurried):
    chosen = [replace(c, precision="bfloat16") for c in TINY if c.network in {"V1", "V1 presented"}]
    for cell in chosen:
        prepared.prepare(cell, "cpu")()


def test_memory_is_measured_in_a_fresh_process():
    ballast = torch.ones(2**26)  # 256 MiB that are ours and not the network's
    assert 0 < bench.peak_memory(replace(TINY[5], batch=16), "cpu") < ballast.nbytes


def test_refuses_a_network_that_the_task_does_not_have():
    with pytest.raises(BadRecipeError, match="V1 presented"):
        prepared.prepare(replace(TINY[0], network="V3"), "cpu")
