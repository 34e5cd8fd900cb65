"""The benchmark: what is compared is comparable, and no number is made up."""

import itertools
import json
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nnpassport.data.images import CIFAR10
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V1, V2, V3, draw_by_layer
from nnpassport.embedding.train.loop import classification
from nnpassport.lab import bench
from nnpassport.lab import timing as turns
from nnpassport.lab.bench import (
    acts,
    comparisons,
    loop,
    networks,
    page,
    prepared,
    report,
    steps,
    timing,
)
from nnpassport.lab.bench.cases import CHEAPER, EVERYWHERE, LOOP_STEPS, TRANSFORMER, Case, plan
from nnpassport.scheme import BadRecipeError, Batch, UnsuitableModelError

pytestmark = pytest.mark.slow

EXAMPLE = torch.zeros(2, 3, 32, 32)
TABLE4 = [
    each
    for each in comparisons.COMPARISONS
    if each.task in {"train", "infer", "memory"}
    and each.above not in CHEAPER
    and each.below != "eager"
]
TINY = [replace(c, width=0.1) for c in bench.cases(["alexnet"], [2], ["float32"])]


@pytest.fixture
def hurried(monkeypatch):
    """One call a sample, and no process for each case's memory."""
    monkeypatch.setattr(turns, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(report, "peak_memory", lambda case: 1000 + len(case.network))


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
    key = draw_by_layer(scheme, ours, EXAMPLE.double(), seed=bytes(range(32)))
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
    monkeypatch.setattr(timing, "prepare", lambda case, device: lambda: order.append(case))
    measured = bench.measure(TINY, repeats=2, warmup=1)
    turns = [order[i : i + len(TINY)] for i in range(0, len(order), len(TINY))]
    assert len(turns) == 3
    assert all(set(turn) == set(TINY) for turn in turns)
    assert turns[0] != turns[1]  # so that no case always runs after the same other one
    assert [each.case for each in measured] == TINY
    assert {len(each.timed.seconds) for each in measured} == {2}
    assert {len(each.timed.processor_seconds) for each in measured} == {2}


def test_a_short_sample_is_made_of_many_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "prepare", lambda case, device: lambda: calls.append(1))
    # A clock of our own: on a busy machine even an empty call may take a millisecond.
    ticks = itertools.count()
    clock = SimpleNamespace(
        perf_counter=lambda: next(ticks) * 1e-3,
        process_time=time.process_time,
        monotonic=time.monotonic,
    )
    monkeypatch.setattr(turns, "time", clock)
    monkeypatch.setattr(turns, "_SAMPLE_SECONDS", 0.1)
    (measured,) = bench.measure(TINY[:1], repeats=1, warmup=1)
    assert len(calls) == 1 + 100
    assert measured.timed.seconds[0] == pytest.approx(1e-3 / 100)


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
    assert left_out == [(case.task, case.network) for case in TINY]
    assert "- alexnet, batch 2, float32, train, slow V3 (group norm): no time left" in bench.render(
        results
    )


def test_three_turns_are_taken_before_time_is_shared(monkeypatch, hurried):
    monkeypatch.setattr(timing, "prepare", lambda case, device: lambda: None)
    (measured,) = bench.measure(TINY[:1], repeats=7, warmup=1, until=0.0)
    assert len(measured.timed.seconds) == turns.ENOUGH
    (measured,) = bench.measure(TINY[:1], repeats=7, warmup=1, until=0.0, deadline=0.0)
    assert measured.timed.seconds == ()


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
    for case in chosen:
        prepared.prepare(case, "cpu")()


def test_memory_is_measured_in_a_fresh_process():
    ballast = torch.ones(2**26)  # 256 MiB that are ours and not the network's
    assert 0 < bench.peak_memory(replace(TINY[5], batch=16), "cpu") < ballast.nbytes


def test_refuses_a_network_that_the_task_does_not_have():
    with pytest.raises(BadRecipeError, match="V1 presented"):
        prepared.prepare(replace(TINY[0], network="V3"), "cpu")


def small(case):
    """The same on a network that is narrow, and on few images."""
    return replace(case, width=0.1, batch=4)


def test_a_transformer_has_all_of_its_flops_counted():
    depth, tokens, dim = 12, 64, 192
    a_token = depth * (4 * dim**2 + 8 * dim**2) + 48 * dim  # products: blocks, and the patches
    attention = depth * 2 * tokens**2 * dim
    flops = networks._flops(TRANSFORMER)
    assert sum(flops) == 2 * (tokens * a_token + attention + 10 * dim)
    # Forked at the ninth of twelve blocks.
    after = (tokens * 12 * dim**2 + 2 * tokens**2 * dim) * 4 + 10 * dim
    assert bench.lower_bound(TRANSFORMER) == pytest.approx(1 + 2 * after / sum(flops))


def test_v1_has_no_row_for_a_transformer_because_it_refuses_it():
    model = networks.network(Case(TRANSFORMER, 2, "float32", "infer", "plain", "layer", width=0.1))
    with pytest.raises(UnsuitableModelError, match="layer without a norm"):
        V1.insert(model, V1.draw_key(model, EXAMPLE, passports="derived"), EXAMPLE)
    rows = plan([TRANSFORMER], [4], ["float32"], compiled=[False])
    assert {"V2", "V3", "forked"} <= {case.network for case in rows}
    assert not any("V1" in case.network or "slow" in case.network for case in rows)


@pytest.mark.parametrize("task", ["infer", "train", "act", "long act"])
def test_whatever_is_planned_can_be_run(task):
    found = plan(["alexnet"], [4], ["float32"], compiled=[False], tasks=[task])
    for case in found:
        prepared.prepare(small(case), "cpu")()
    assert found


@pytest.mark.parametrize("network", ["forked", "V3 share 1/4", "V2 late 3/4", "V2 released"])
def test_a_transformer_can_be_run(network):
    task = "infer" if network == "V2 released" else "train"
    case = Case(TRANSFORMER, 4, "bfloat16", task, network, "layer")
    assert case in plan([TRANSFORMER], [4], compiled=[False])
    prepared.prepare(small(case), "cpu")()
    assert not plan([TRANSFORMER], tasks=["act", "long act"])


@pytest.mark.parametrize(
    ("network", "rows"),
    [
        ("V2", [8]),
        ("V2 share 1/4", [5]),
        ("V2 every 2", [8, 4]),
        ("V2 late 3/4", [4, 4, 4, 8]),
    ],
)
def test_cheaper_training_is_run_in_whole_cycles(network, rows):
    case = Case("alexnet", 4, "float32", "train", network, "group", width=0.1)
    model = networks.network(case)
    descend, forwards = steps.objective(case, model), []
    model.register_forward_hook(lambda _module, _args, output: forwards.append(len(output)))
    run = steps.bare_steps(case, model, descend, "cpu")
    run()
    run()
    assert forwards == rows * 2
    assert case.steps == len(rows)


def test_a_step_of_a_cycle_takes_its_share_of_it(monkeypatch, hurried):
    monkeypatch.setattr(timing, "prepare", lambda case, device: lambda: time.sleep(0.04))
    late = Case("alexnet", 4, "float32", "train", "V2 late 3/4", "group")
    (measured,) = bench.measure([late], repeats=1, warmup=0)
    assert 0.01 <= measured.timed.seconds[0] < 0.03


def test_cheaper_training_has_a_bound_of_its_own():
    bounds = {name: networks.step_bound(name, 64, 1.4) for name in ("V2", "V3", *CHEAPER)}
    assert bounds == pytest.approx(
        {
            "V2": 1.4,
            "V3": 66 / 64 * 1.4,
            "V2 share 1/2": 1.2,
            "V2 share 1/4": 1.1,
            "V3 share 1/4": 66 / 64 * (1 + 0.4 * 16 / 66),
            "V2 every 2": 1.2,
            "V2 late 3/4": 1.1,
        }
    )
    assert set(CHEAPER) <= {c.above for c in comparisons.COMPARISONS}


@pytest.mark.trains
def test_an_epoch_of_the_loop_does_as_many_steps_as_the_bare_ones(monkeypatch):
    counts = {}
    for network in ("plain step", "plain fit", "V2 step", "V2 fit"):
        case = Case("alexnet", 2, "float32", "loop", network, "group", width=0.1)
        images = []
        monkeypatch.setattr(loop, "objective", lambda _cell, _model, seen=images: watched(seen))
        prepared.prepare(case, "cpu")()
        counts[network] = images
    assert set(map(tuple, counts.values())) == {(2,) * LOOP_STEPS}


def watched(seen):
    def descend(model, batch):
        seen.append(len(batch.images))
        return classification(model, batch)

    return descend


def test_the_loop_is_held_to_its_bare_steps():
    case = Case("alexnet", 64, "float32", "loop", "V2 step", "group")
    numbers = [
        report._entry(replace(case, network="V2 fit"), [1.0, 2.0, 4.2], [1.0] * 3),
        report._entry(case, [1.0, 2.0, 4.0], [1.0] * 3),
    ]
    (row,) = comparisons.ratios(numbers, {"alexnet": 1.4})
    assert (row["ratio"], row["target"], row["met"]) == ("V2 fit / V2 step", 1.05, "yes")


def test_acts_are_compared_among_networks_with_the_same_passport_layers():
    case = Case("resnet50", 64, "float32", "act", "plain", "group")
    verify = replace(case, network="verify")
    numbers = [
        report._entry(each, [seconds] * 3, [seconds] * 3)
        for each, seconds in (
            (case, 1.0),
            (verify, 0.5),
            (replace(case, layers=EVERYWHERE), 2.0),
            (replace(verify, layers=EVERYWHERE), 1.5),
        )
    ]
    found = comparisons.ratios(numbers, {"resnet50": 1.15})
    assert [(r["layers"], r["ratio"], r["median"]) for r in found] == [
        (None, "verify / plain", 0.5),
        (EVERYWHERE, "verify / plain", 0.75),
    ]
    (limit,) = comparisons.limits(numbers)
    assert (limit["median"], limit["target"], limit["met"]) == (1.5, 1.0, "no")
    page_text = page.render(
        {
            "provenance": {},
            "lower_bounds": {},
            "not_run": [],
            "ratios": found,
            "limits": [limit],
            "numbers": numbers,
        }
    )
    assert "resnet50, passports everywhere: verify takes 1.50 s" in page_text


def test_an_act_derives_another_key_every_time(monkeypatch):
    seen = []
    monkeypatch.setattr(acts, "read_signature", lambda _weights, key: seen.append(key))
    run = prepared.prepare(Case("alexnet", 4, "float32", "act", "verify", "group", 0.1), "cpu")
    run()
    run()
    first, second = (key.layer_passport("features.8") for key in seen)
    assert not torch.equal(first, second)


def compiled_cells(*networks_):
    return [
        Case("alexnet", 4, "float32", "train", name, "group", width=0.1, compiled=True)
        for name in networks_
    ]


# By itself: checking shapes at run time breaks the compiler's graphs.
COMPILED = """
from functools import partial

import torch

from nnpassport.lab import bench
from nnpassport.lab.bench import page

torch.compile = partial(torch.compile, backend="eager")
cases = [
    bench.Case("alexnet", 4, "float32", "train", name, "group", width=0.1, compiled=True)
    for name in ("eager", "plain", "V2")
]
results = bench.collect(cases, repeats=1, warmup=0)
assert [e["compiled"] for e in results["numbers"]] == [True] * 3, results["not_run"]
shown = {page.title(r) for r in results["ratios"]}
assert shown == {"plain / eager (group norm)", "V2 / plain", "V2 / plain × lower bound"}
assert "| alexnet | 4 | float32, compiled | train | V2 / plain |" in bench.render(results)
"""


def test_compiled_cells_are_compared_among_themselves():
    run = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_what_cannot_be_compiled_is_not_run_and_the_rest_is(monkeypatch, hurried):
    def broken(model):
        def fail(_images):
            raise RuntimeError("no C++ compiler\nand a long log")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    results = bench.collect(compiled_cells("eager", "plain"), repeats=1, warmup=0)
    assert [e["network"] for e in results["numbers"]] == ["eager"]
    (left_out,) = results["not_run"]
    assert "RuntimeError: no C++ compiler; needed" in left_out["reason"]


def test_a_graph_too_many_is_an_error_and_does_not_run_uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(prepared, "_GRAPHS", 1)
    torch.compiler.reset()
    plain, marked = compiled_cells("plain", "V2")
    prepared.prepare(plain, "cpu")
    with pytest.raises(prepared.NotCompiledError, match="recompile_limit"):
        prepared.prepare(marked, "cpu")
    torch.compiler.reset()


def test_nothing_is_prepared_that_would_likely_end_after_the_deadline(monkeypatch, hurried):
    monkeypatch.setattr(timing, "prepare", lambda case, device: time.sleep(0.2) or (lambda: None))
    begun = time.monotonic()
    measured = bench.measure(TINY, repeats=1, warmup=0, deadline=begun + 0.5)
    assert all(each.timed.seconds == () for each in measured[3:])
    assert time.monotonic() - begun < 1


def test_a_turn_ends_with_the_time_and_does_not_count(monkeypatch, hurried):
    monkeypatch.setattr(timing, "prepare", lambda case, device: lambda: time.sleep(0.1))
    begun = time.monotonic()
    measured = bench.measure(TINY, repeats=3, warmup=0, deadline=begun + 0.3)
    assert {each.timed.seconds for each in measured} == {()}
    assert time.monotonic() - begun < 0.1 * len(TINY)


def test_a_long_turn_warms_up_by_itself(monkeypatch, hurried):
    runs = []
    monkeypatch.setattr(timing, "prepare", lambda case, device: lambda: runs.append(case))
    monkeypatch.setattr(turns, "_LONG_TURN", 0.0)
    (measured,) = bench.measure(TINY[:1], repeats=3, warmup=2)
    assert len(runs) == 1 + 3
    assert len(measured.timed.seconds) == 3


def test_the_parts_of_a_run_can_be_named_one_by_one():
    assert bench.choose() is None
    acts_only = bench.choose(only=["acts"], architectures=["resnet50"])
    assert {case.task for case in acts_only} == {"act", "long act"}
    assert {case.layers for case in acts_only} == {None, EVERYWHERE}
    quick = {(c.architecture, c.batch, c.precision) for c in bench.choose(compiled=True)}
    assert quick == {("alexnet", 64, "float32"), ("resnet18", 64, "float32")}
    assert bench.choose(full=True) == bench.FULL
    one = bench.choose(only=["train"], architectures=["vit-tiny"], batches=[8], compiled=False)
    assert {(c.architecture, c.batch, c.task, c.compiled) for c in one} == {
        ("vit-tiny", 8, "train", False)
    }
    for wrong in ({"only": ["act"]}, {"architectures": ["vgg"]}, {"precisions": ["int8"]}):
        with pytest.raises(BadRecipeError, match="there are: "):
            bench.choose(**wrong)


def test_groups_are_whole_so_that_all_of_one_are_timed_together():
    groups = [group for group, _ in itertools.groupby(bench.FULL, key=lambda case: case.group)]
    assert len(groups) == len(set(groups))


def test_results_of_before_are_still_read():
    kept = networks.SLOW_REFERENCE.parent.parent / "results" / "bench-quick.json"
    results = json.loads(kept.read_text())
    assert "compiled" not in results["numbers"][0]
    again = comparisons.ratios(results["numbers"], results["lower_bounds"])
    old = {(r["architecture"], r["task"], r["ratio"]): r["median"] for r in results["ratios"]}
    assert {(r["architecture"], r["task"], r["ratio"]): r["median"] for r in again} == old
    assert "| resnet18 | 64 | float32 | train | V2 / plain |" in bench.render(results)
