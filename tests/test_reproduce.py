"""Cells that are known by their inputs, run once, resumed, and sent to other processes."""

import base64
import json
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from constructed import embed
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nnpassport.attacks.ambiguity import insider_passport
from nnpassport.cli.app import app
from nnpassport.embedding.schemes.passport import Passport
from nnpassport.embedding.train import loop as training
from nnpassport.keys.keyfile import load_key
from nnpassport.lab import estimate, grid, plans, runs, speed, tasks
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.paper import contents
from nnpassport.lab.store import Store
from nnpassport.scheme import BadRecipeError, UnreadableDataError

pytestmark = pytest.mark.slow

TINY = replace(
    plans.TRIAL,
    name="tiny",
    embed=replace(plans.TRIAL.embed, epochs=1, batch=16),
    transfer=replace(plans.TRIAL.transfer, epochs=1, batch=16),
    architectures={"alexnet": {"width": 0.125}},
    train_images={"alexnet": 64},
    transfer_images=64,
    fakes=2,
    attack_images=64,
    attack_test_images=50,
    fake_images=50,
    settings={**plans.TRIAL.settings, "adi": {"triggers": 20, "triggers_per_step": 8}},
)
PLAIN = Network("alexnet", "digits", "", "group", 0)
V2 = PLAIN._replace(scheme="passport-v2")
UCHIDA = PLAIN._replace(scheme="uchida", norm="batch")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results", tmp_path / "networks", None)


@pytest.mark.parametrize(
    "other",
    [
        Cell(replace(TINY, embed=replace(TINY.embed, epochs=2)), V2),
        Cell(replace(TINY, passports="shuffle-train"), V2),
        Cell(replace(TINY, train_images={}), V2),
        Cell(replace(TINY, settings={"passport-v2": {"decay": 1e-5}}), V2),
        Cell(replace(TINY, architectures={"alexnet": {"width": 0.25}}), V2),
        Cell(TINY, V2._replace(seed=1)),
        Cell(TINY, PLAIN),
    ],
)
def test_other_inputs_are_another_cell(other):
    assert other.name != Cell(TINY, V2).name


@pytest.mark.parametrize(
    "same",
    [
        Cell(replace(TINY, name="renamed", summary="the same"), V2),
        Cell(TINY.with_seeds((0, 1, 2)), V2),
        Cell(replace(TINY, fakes=50, attackers=plans.Budget(9, 9)), V2),
        Cell(replace(TINY, triggers="published"), V2),
    ],
)
def test_what_a_cell_does_not_depend_on_does_not_change_it(same):
    assert same.name == Cell(TINY, V2).name


def test_an_attack_depends_on_what_it_uses_alone():
    richer = replace(TINY, attackers=plans.Budget(9, 9), attack_images=None)
    for work, same in (("prune", True), ("solve", True), ("fake2", False), ("fake3", False)):
        mine, theirs = (Cell(plan, V2, work, strengths=(0.5,)) for plan in (TINY, richer))
        assert (mine.name == theirs.name) is same, work


def test_cells_that_are_needed_come_first(store):
    paper = replace(TINY, passports="shuffle-test")
    cells = [Cell(paper, V2, "fake1", strengths=(0.0,)), Cell(paper, V2)]
    assert [[cell.slug for cell in wave] for wave in grid.waves(cells, store)] == [
        ["alexnet-digits-plain-group-0"],
        ["alexnet-digits-v2-group-0"],
        ["alexnet-digits-v2-group-0-fake1"],
    ]


def test_a_queue_finishes_one_network_before_the_next(store):
    paper = replace(TINY, passports="shuffle-test", tasks=("digits",))
    cells = contents.cells_of(paper.with_seeds((0, 1)), ("table1", "table2", "fig3"))
    found = grid.queue(cells, store)
    assert len(found) == len(cells)
    networks = [cell.network for cell in found]
    runs_of_one = [n for n, before in zip(networks, [None, *networks], strict=False) if n != before]
    assert len(runs_of_one) == len(set(networks))
    assert [n.seed for n in networks] == sorted(n.seed for n in networks)
    first = [n.scheme or n.norm for n in dict.fromkeys(networks) if n.seed == 0]
    assert first == [
        *("batch", "passport-v1", "group", "passport-v2", "passport-v3"),
        *("uchida", "adi"),
    ]
    assert all(
        cell.work == "train" for cell in map(found.__getitem__, map(networks.index, networks))
    )


def test_a_queue_trains_first_what_a_cell_needs(store):
    paper = replace(TINY, passports="shuffle-test")
    cells = [Cell(paper, V2, "fake1", strengths=(0.0,)), Cell(paper, V2)]
    assert [cell.slug for cell in grid.queue(cells, store)] == [
        "alexnet-digits-plain-group-0",
        "alexnet-digits-v2-group-0",
        "alexnet-digits-v2-group-0-fake1",
    ]


def test_an_architecture_may_have_recipes_of_its_own():
    other = replace(TINY.embed, epochs=7)
    plan = replace(
        TINY,
        architectures={"alexnet": {}, "resnet18": {}},
        by_architecture={"resnet18": {"embed": other, "attack_epochs": {"fake2": 9}}},
    )
    own, usual = (contents.cell(plan, V2._replace(architecture=n)) for n in plan.architectures)
    assert own.inputs["recipe"] == Cell(TINY, V2).inputs["recipe"]
    assert usual.inputs["recipe"]["epochs"] == 7
    attacks = [
        contents.cell(plan, usual.network, work, strengths=(0.0,)) for work in ("fake2", "fake3")
    ]
    assert [cell.inputs["attackers"]["epochs"] for cell in attacks] == [9, 2]
    assert attacks[0].plan is usual.plan


def test_every_table_and_figure_has_cells_and_shares_them():
    everything = contents.cells_of(plans.SHORT, tuple(contents.CONTENTS))
    assert len({cell.name for cell in everything}) == len(everything)
    for part in contents.CONTENTS:
        own = contents.cells_of(plans.SHORT, (part,))
        assert own
        assert {cell.name for cell in own} <= {cell.name for cell in everything}
    shares = [c.strengths for c in contents.cells_of(plans.SHORT, ("fig5",))]
    assert {share for (share,) in shares} == {0.0, 0.1, 0.25, 0.5, 0.75, 1.0}
    with pytest.raises(BadRecipeError, match="table9"):
        contents.cells_of(plans.SHORT, ("table9",))


def lists(value):
    """Every list in plain JSON values, wherever it is."""
    if isinstance(value, dict):
        return [each for part in value.values() for each in lists(part)]
    if isinstance(value, list):
        return [value, *(each for part in value for each in lists(part))]
    return []


def test_the_paper_s_attackers_train_as_published():
    cell = Cell(plans.PAPER, Network("alexnet", "cifar10", "passport-v1", "batch", 0), "fake3")
    assert cell.inputs["attackers"] == {
        "epochs": 100,
        "batch": 64,
        "precision": "float32",
        "rate": 0.01,
    }
    assert "rate" not in replace(cell, plan=plans.SHORT).inputs["attackers"]
    assert "rate" not in replace(cell, work="fake2").inputs["attackers"]


def test_a_cell_is_run_once_goes_on_where_it_stopped_and_holds_no_secret(store, monkeypatch):
    cell, attack = Cell(TINY, V2), Cell(TINY, V2, "transfer", "digits-halves")

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.run(attack, store, stop)
    key_file = store.folder(cell) / "owner.key"
    before = key_file.read_bytes()
    assert not store.ready(cell)

    assert grid.run_grid([cell, attack], store) == []
    assert key_file.read_bytes() == before  # an interrupted run keeps its owner
    files = {path: path.stat().st_mtime_ns for path in store.results.rglob("*.json")}
    assert len(files) == 2

    monkeypatch.setattr(runs, "_train", None)
    monkeypatch.setattr(runs, "_transfer", None)
    assert grid.run_grid([cell, attack], store) == []
    assert {path: path.stat().st_mtime_ns for path in files} == files

    key, texts = load_key(key_file), "".join(path.read_text() for path in files)
    held = [len(each) for path in files for each in lists(json.loads(path.read_text()))]
    assert max(held, default=0) < 8  # no bits, labels or passports, however they are written
    result = store.read(cell)
    assert result["result"]["marks"]["bits"]["bits"] == sum(x.length for x in key.context.layers)
    assert result["provenance"]["torch"]
    for secret in (key.seed, key.context.nonce):
        assert secret.hex() not in texts
        assert base64.b64encode(secret).decode() not in texts


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """A plan, and a store with its V2 network, which carries its key."""
    plan = replace(
        TINY,
        train_images={"alexnet": 640},
        transfer_images=160,
        attack_images=160,
        attackers=plans.Budget(1, 16),
        insider_rate=0.25,
    )
    store = Store(*(tmp_path_factory.mktemp(name) for name in ("results", "networks")), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Passport, "embed", embed)
        assert grid.run_grid([Cell(plan, V2)], store) == []
    assert store.read(Cell(plan, V2))["result"]["marks"]["bits"]["accepted"]
    return plan, store


def test_a_plan_s_rate_is_the_one_that_fake3_is_trained_at(carried, monkeypatch):
    rates = []

    def note(*given, **settings):
        rates.append(given[4].rate)
        return insider_passport(*given, **settings)

    monkeypatch.setattr(runs, "insider_passport", note)
    plan, store = carried
    assert grid.run_grid([Cell(plan, V2, "fake3", strengths=(0.25,))], store) == []
    assert rates == [0.25]


@pytest.mark.parametrize("work", ["fake2", "fake3", "substitute-cerb", "transfer"])
def test_what_trains_on_a_network_goes_on_where_it_stopped(carried, work, monkeypatch):
    plan, store = carried
    cell = Cell(plan, V2, work, *(("digits-halves",) if work == "transfer" else ("", (0.5,))))
    step, begun = training._Run.step, []

    def stop(run, *given):
        step(run, *given)
        begun.append(run.done)
        if len(begun) == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(training._Run, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.run(cell, store)
    assert begun == [1, 2, 3, 4, 5]
    assert grid.run_grid([cell], store) == []
    assert begun[5] == 6
    assert not store.checkpoints(cell).exists()

    fresh = Store(store.results / "again", store.networks, None)
    assert grid.run_grid([cell], fresh) == []
    once, twice = (untimed(each.read(cell)["result"]) for each in (fresh, store))
    assert once == twice
    assert "seconds" not in str(once)


def untimed(value):
    """A result without what depends on the clock."""
    if isinstance(value, dict):
        return {n: untimed(each) for n, each in value.items() if n not in {"seconds", "wall"}}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def test_results_of_others_are_refused(store):
    cell = Cell(TINY, V2)
    store.keep(cell, {"metrics": {}}, 0.0)
    path = store.path(cell)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"inputs": entry["inputs"] | {"seed": 5}}))
    with pytest.raises(UnreadableDataError, match="inputs"):
        store.read(cell)
    path.write_text("{")
    with pytest.raises(UnreadableDataError, match="no JSON"):
        store.read(cell)


def test_a_cell_that_cannot_be_run_does_not_stop_the_others(store):
    absent = Cell(TINY, PLAIN._replace(task="cifar10"))
    (failure,) = grid.run_grid([absent, Cell(TINY, UCHIDA)], store)
    assert failure.cell is absent
    assert "cifar10-train-*.parquet" in failure.reason
    assert store.done(Cell(TINY, UCHIDA))


@pytest.mark.trains
def test_forged_marks_of_a_baseline_are_read_before_and_after_a_transfer(store):
    cell = Cell(TINY, UCHIDA, "transfer", "digits-halves")
    assert grid.run_grid([cell], store) == []
    result = store.read(cell)["result"]
    assert set(result["marks"]) == {"bits", "forged", "forged in closed form"}
    closed = result["marks_before"]["forged in closed form"]
    assert closed["matches"] == closed["bits"]
    assert closed["log10_p_value"] is None
    assert result["marks"]["bits"]["log10_p_value"] < 0
    assert result["test_images"] == len(tasks.images_of(None, "digits-halves").test)


def test_a_grid_is_sent_through_a_cluster(store, monkeypatch):
    """To a worker over a socket, as to another machine; the worker is a thread of this process."""
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    cells = [Cell(TINY.with_seeds((0, 1)), PLAIN._replace(seed=seed)) for seed in (0, 1)]
    plain_run, workers = grid.run, []

    def run(*given):
        workers.append(distributed.get_worker().address)
        return plain_run(*given)

    monkeypatch.setattr(grid, "run", run)
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(processes=False, protocol="tcp://", **settings) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        assert grid.run_grid(cells, store, jobs=2, backend="dask") == []
        distributed.get_client().close()
    assert len(workers) == 2
    assert all(address.startswith("tcp://") for address in workers)
    assert all(store.done(cell) for cell in cells)


@pytest.mark.slow
def test_a_grid_on_a_cluster_of_processes(store, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    cells = [Cell(TINY.with_seeds((0, 1)), PLAIN._replace(seed=seed)) for seed in (0, 1)]
    settings = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    monkeypatch.setattr(grid, "run", None)  # so that nothing can be run in this process
    with distributed.LocalCluster(processes=True, **settings) as cluster:
        monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", cluster.scheduler_address)
        assert grid.run_grid(cells, store, jobs=2, backend="dask") == []
        distributed.get_client().close()
    assert all(store.done(cell) for cell in cells)


def test_a_grid_on_ray(store, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    program = (
        "import pickle, sys; from nnpassport.lab import grid; grid.run = None; "
        "print(grid.run_grid(*pickle.loads(sys.stdin.buffer.read()), jobs=2, backend='ray'))"
    )
    cells = [Cell(TINY, PLAIN._replace(seed=seed)) for seed in (0, 1)]
    # In a process of its own: Ray and joblib leave warnings, threads and sockets behind.
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((cells, store)),
        capture_output=True,
        check=False,
    )
    assert done.stdout.split()[-1:] == [b"[]"], done.stderr[-2000:]
    assert all(store.done(cell) for cell in cells)


def test_backends_that_are_not_there_are_named(store, monkeypatch):
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    with pytest.raises(BadRecipeError, match="DASK_SCHEDULER_ADDRESS"):
        grid.run_grid([Cell(TINY, PLAIN)], store, jobs=2, backend="dask")
    with pytest.raises(BadRecipeError, match="loky, dask, ray"):
        grid.run_grid([Cell(TINY, PLAIN)], store, jobs=2, backend="slurm")


@pytest.mark.trains
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(plans.PLANS, "tiny", TINY)
    given = ["reproduce", "table1", "--recipe", "tiny", "--results", str(tmp_path / "results")]
    given += ["--networks", str(tmp_path / "networks"), "--json"]
    run = CliRunner()

    said = run.invoke(app, [*given, "--dry-run"])
    assert said.exit_code == 0, said.output
    planned = json.loads(said.stdout)
    assert {row["state"] for row in planned["cells"]} == {"to run"}
    assert len(planned["cells"]) == 4
    assert all(row["seconds"] > 0 for row in planned["cells"])
    assert not (tmp_path / "results").exists()

    said = run.invoke(app, given)
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["done"] == 4
    page = (tmp_path / "results" / "reproduction.md").read_text()
    assert "Uchida" in page
    assert "not run" in page  # Table 2

    again = json.loads(run.invoke(app, [*given, "--dry-run"]).stdout)
    assert {row["state"] for row in again["cells"]} == {"done"}

    wrong = run.invoke(app, ["reproduce", "table1", "--recipe", "nonsense"])
    assert isinstance(wrong.exception, BadRecipeError)
    absent = run.invoke(app, [*given[:2], "--results", str(tmp_path / "r"), "--json"])
    assert absent.exit_code == 2
    assert "cifar10-train" in absent.output


def test_an_estimate_follows_the_images(store):
    some, more = (
        Cell(replace(TINY, train_images={"alexnet": count}), PLAIN) for count in (200, 1200)
    )
    found = estimate.seconds([some, more], store)
    assert found[more.name] > found[some.name] > 0
    absent = Cell(TINY, PLAIN._replace(task="cifar10"))
    assert estimate.seconds([absent], store) == {absent.name: None}


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("AMD EPYC", None),
    ],
)
def test_a_peak_is_that_of_the_very_device(device, peak):
    assert speed.peak(device, "bfloat16") == peak
    if peak is not None:
        assert speed.peak(device, "float32") < speed.peak(device, "tf32") < peak


@pytest.mark.parametrize("device", ["NVIDIA H100 80GB HBM3", "A processor"])
def test_speed_is_said_as_a_share_of_a_known_peak(tmp_path, device):
    cell = Cell(plans.GPU_SHORT, Network("alexnet", "cifar10", "", "batch", 0))
    (tmp_path / "training").mkdir()
    lines = [{"step": 10 * i, "images_per_second": speed} for i, speed in enumerate((1, 1e5, 9e9))]
    (tmp_path / "training" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = speed.training_speed(cell, tmp_path, device)
    assert found["images_per_second"] == 1e5
    first = 32**2 * 64 * 75  # its input needs no gradient
    others = 16**2 * 192 * 1600 + 8**2 * 384 * 1728 + 8**2 * 256 * (3456 + 2304) + 4096 * 10
    flops = 2 * (2 * first + 3 * others)
    assert found["flops_per_second"] == pytest.approx(flops * 1e5)
    if device.startswith("NVIDIA"):
        assert found["share_of_peak"] == pytest.approx(flops * 1e5 / 989.4e12)
    else:
        assert found["share_of_peak"] is None
    assert speed.training_speed(cell, tmp_path / "nothing", device) == {}


@pytest.mark.parametrize(("scheme", "norm"), [("passport-v1", "batch"), ("passport-v3", "group")])
def test_the_flops_of_a_step_of_any_batch_are_those_of_that_step(scheme, norm):
    settings = (("triggers_per_step", 4),) if scheme == "passport-v3" else ()
    trained = speed.Trained("alexnet", (("width", 0.25),), norm, scheme, settings)
    state = torch.get_rng_state()
    expected = speed.step_flops(trained, 7)
    assert torch.equal(torch.get_rng_state(), state)
    step = speed.training_step(trained, 7, device="cpu")
    with FlopCounterMode(display=False) as counter:
        step()
    assert expected == counter.get_total_flops()


def test_images_stay_where_they_are_without_an_accelerator_or_room_on_it(monkeypatch):
    data = tasks.images_of(None, "digits").train
    assert training._resident(data, torch.device("cpu")) is data
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * data.images.nbytes, 0))
    assert training._resident(data, torch.device("cuda")) is data
