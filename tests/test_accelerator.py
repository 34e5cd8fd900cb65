"""The kit for an accelerator: nothing is lost on the way, time is kept, and no step waits."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nnpassport.data.images import CIFAR10, ImageSet
from nnpassport.embedding.network.layers import passport_norms
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V1, V2, V3, draw_by_layer
from nnpassport.embedding.train import fidelity
from nnpassport.embedding.train.fidelity import accuracy, measuring_on
from nnpassport.embedding.train.loop import Recipe, classification, fit
from nnpassport.lab import plans, runs
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.paper import contents
from nnpassport.lab.paper.contents import cells_of
from nnpassport.lab.store import Store
from nnpassport.report.provenance import provenance

pytestmark = pytest.mark.slow

KIT = Path(__file__).parent.parent / "benchmarks" / "accelerator"
TINY = replace(
    plans.TRIAL,
    name="trial",
    embed=replace(plans.TRIAL.embed, epochs=1),
    architectures={"alexnet": {"width": 0.125}},
    transfer=replace(plans.TRIAL.transfer, epochs=1),
    train_images={"alexnet": 256},
    transfer_images=128,
    attack_test_images=50,
)
PLAIN = Network("alexnet", "digits", "", "group", 0)
V2_NETWORK = PLAIN._replace(scheme="passport-v2")


@pytest.fixture
def kit(monkeypatch):
    """A script of the kit by its name, imported as one script imports another."""
    monkeypatch.syspath_prepend(str(KIT))
    names = ("stage", "pool", "packed", "run", "checks", "steps", "ratios")
    before = {name: sys.modules.pop(name, None) for name in names}
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
        if before[name] is not None:
            sys.modules[name] = before[name]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results", tmp_path / "networks", None)


# What is brought


def some_files(kit, folder, sizes):
    folder.mkdir()
    for number, size in enumerate(sizes):
        (folder / f"{number}.bin").write_bytes(os.urandom(size))
    return [kit("stage").Piece(f"data/{path.name}", path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("sizes", [(10,), (1000, 0, 1), (3, 70_000, 5, 70_000)])
@pytest.mark.parametrize("most", [7, 64_000, 10**9])
def test_pieces_together_are_what_was_packed(kit, tmp_path, sizes, most):
    if sum(sizes) / most > 1000:
        pytest.skip("a thousand folders prove no more")
    stage, pieces = kit("stage"), some_files(kit, tmp_path / "here", sizes)
    folders = stage.pack(pieces, tmp_path / "pieces", most=most, commit="abc")
    assert all((folder / "bytes").stat().st_size <= most for folder in folders)
    manifest = stage.unpack(tmp_path / "pieces", tmp_path / "there")
    assert manifest["commit"] == "abc"
    for piece in pieces:
        assert (tmp_path / "there" / piece.name).read_bytes() == piece.path.read_bytes()


def test_a_piece_that_is_missing_or_of_another_packing_is_noticed(kit, tmp_path):
    stage, pieces = kit("stage"), some_files(kit, tmp_path / "here", (90, 90))
    _, second = stage.pack(pieces, tmp_path / "pieces", most=100, commit=None)
    content = (second / "bytes").read_bytes()
    (second / "bytes").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="not what was packed"):
        stage.unpack(tmp_path / "pieces", tmp_path / "there")
    (second / "bytes").unlink()
    with pytest.raises(FileNotFoundError, match="calls before"):
        stage.unpack(tmp_path / "pieces", tmp_path / "there")


def test_a_manifest_cannot_write_elsewhere(kit, tmp_path):
    stage, pieces = kit("stage"), some_files(kit, tmp_path / "here", (9,))
    stage.pack([pieces[0]._replace(name="../out")], tmp_path / "pieces", most=100, commit=None)
    with pytest.raises(ValueError, match="leads out"):
        stage.unpack(tmp_path / "pieces", tmp_path / "there")
    assert not (tmp_path / "out").exists()


def test_sets_that_do_not_fit_are_left_out_and_the_first_one_must_fit(kit, tmp_path):
    stage, pieces = kit("stage"), some_files(kit, tmp_path / "here", (40, 40, 40))
    sets = dict(zip(("cifar10", "cifar100", "caltech101"), ([p] for p in pieces), strict=True))
    taken, left_out = stage.chosen([], sets, 100)
    assert (taken, left_out) == (pieces[:2], ["caltech101"])
    with pytest.raises(stage.TooLargeError, match="cifar10 does not fit"):
        stage.chosen([pieces[0]._replace(name="wheel")], sets, 70)


def test_only_packages_that_are_missing_are_brought_and_added(kit, tmp_path):
    stage = kit("stage")
    assert stage.lacking(["rfc3161-client", "PyYAML"], "pyyaml 6.0\nnumpy==2.5") == [
        "rfc3161-client"
    ]
    for name in ("numpy", "nowhere_to_be_found"):
        wheel = tmp_path / f"{name}-1.0-py3-none-any.whl"
        with stage.zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
    assert stage.install_missing(tmp_path, tmp_path / "site") == ["nowhere_to_be_found"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["nowhere_to_be_found"]


# Who runs when


class Clock:
    """Seconds that pass when somebody waits."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self):
        self.now += 1.0


class Scripted:
    """A worker that takes so many seconds for a cell, and then says so."""

    def __init__(self, clock, store, takes, fails=()):
        self.clock, self.store, self.takes, self.fails = clock, store, takes, fails
        self.cell = self.until = None
        self.begun, self.stopped = [], False

    def start(self, cell):
        self.cell, self.until = cell, self.clock() + self.takes(cell)
        self.begun.append((self.clock(), cell))

    def outcome(self):
        if self.clock() < self.until:
            return None
        if self.cell.name in self.fails:
            return "it does not work"
        if self.cell.work == "train":
            last = self.store.folder(self.cell) / ("released" if self.cell.network.scheme else "")
            last.mkdir(parents=True, exist_ok=True)
            (last / "config.json").write_text("{}")
        self.store.keep(self.cell, {}, time.monotonic())
        return ""

    def stop(self):
        self.stopped = True


def play(kit, cells, store, takes, *, deadline, workers=1, fails=()):
    clock, ended = Clock(), []
    team = [Scripted(clock, store, takes, fails) for _ in range(workers)]
    left = kit("pool").run_until(
        cells, store, team, deadline=deadline, clock=clock, wait=clock.wait, ended=ended.append
    )
    assert all(worker.stopped for worker in team)
    begun = sorted((at, cell.name) for worker in team for at, cell in worker.begun)
    return begun, ended, left, clock


def prunings(count, network=V2_NETWORK):
    return [Cell(TINY, network, "prune", strengths=(0.01 * i,)) for i in range(count)]


def test_the_deadline_is_kept_whatever_runs(kit, store):
    cells = prunings(9)
    begun, ended, left, clock = play(kit, cells, store, lambda _: 4.0, deadline=18.0)
    # The training that they need, then as many as end in time; one is not begun in vain.
    assert [each.seconds for each in ended] == [4.0] * 4
    assert clock() <= 18.0
    assert len(begun) == len(ended) == 4
    assert len(left) == 1 + 9 - 4


def test_a_cell_that_would_not_end_gives_way_to_a_shorter_one(kit, store):
    def takes(cell):
        return 50.0 if cell.work == "fake2" else 1.0

    slow = [Cell(TINY, V2_NETWORK._replace(seed=s), "fake2", strengths=(0.0,)) for s in (0, 1)]
    cells = [slow[0], slow[1], *prunings(2)]
    begun, ended, left, _ = play(kit, cells, store, takes, deadline=60.0)
    assert slow[1] in left
    assert {cell.cell.name for cell in ended} >= {cell.name for cell in prunings(2)}
    assert [name for _, name in begun].index(slow[0].name) == 1


def test_one_that_hangs_is_stopped_at_the_deadline(kit, store):
    _, ended, left, clock = play(kit, prunings(2), store, lambda _: 1e9, deadline=30.0)
    assert not ended
    assert len(left) == 3
    assert clock() == 30.0


def test_one_that_fails_stops_those_alone_that_need_it(kit, store):
    lost, sound = Cell(TINY, V2_NETWORK), Cell(TINY, V2_NETWORK._replace(seed=1))
    cells = [*prunings(2), *prunings(2, sound.network)]
    _, ended, left, _ = play(
        kit, cells, store, lambda _: 1.0, deadline=99.0, workers=2, fails={lost.name}
    )
    failures = {each.cell.name: each.failure for each in ended if each.failure}
    assert not left
    assert failures.pop(lost.name) == "it does not work"
    assert set(failures) == {cell.name for cell in prunings(2)}
    assert all(lost.slug in why for why in failures.values())
    assert all(store.done(cell) for cell in prunings(2, sound.network))


def test_nothing_is_begun_before_the_network_that_it_needs_is_there(kit, store):
    cells = list(cells_of(TINY, ("table2", "fig3")))
    begun, ended, left, _ = play(kit, cells, store, lambda _: 3.0, deadline=999.0, workers=3)
    assert not left
    assert len(ended) == len(cells)
    at = {name: when for when, name in begun}
    for cell in cells:
        assert all(at[need.name] + 3.0 <= at[cell.name] for need in cell.needs)


def run_or_die(cell, store):
    """For workers in processes: what a cell does depends on its seed."""
    if cell.network.seed == 1:
        raise RuntimeError("a bug of its own")
    if cell.network.seed == 2:
        os._exit(9)
    if cell.network.seed == 3:
        time.sleep(600)
    store.keep(cell, {"seed": cell.network.seed}, time.monotonic())


def nothing():
    """No settings."""


def test_a_process_that_raises_or_dies_does_not_stop_the_others(kit, store, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(KIT), *sys.path]))
    pool = kit("pool")
    cells = [Cell(TINY, PLAIN._replace(seed=seed)) for seed in (1, 2, 0, 4, 3)]
    ended = []
    workers = [pool.Process(cells, store, run_or_die, nothing)]
    deadline = time.monotonic() + 500
    left = pool.run_until(
        cells,
        store,
        workers,
        deadline=deadline,
        clock=lambda: time.monotonic() + (1000 if len(ended) == 4 else 0),
        ended=ended.append,
    )
    failures = {each.cell.network.seed: each.failure for each in ended}
    assert failures == {
        1: "RuntimeError: a bug of its own",
        2: "its process ended with exit code 9",
        0: "",
        4: "",
    }
    assert [cell.network.seed for cell in left] == [3]


# What comes back


def test_merged_results_are_found_by_the_store_and_what_was_there_stays(kit, tmp_path):
    packed = kit("packed")
    theirs = Store(tmp_path / "theirs", tmp_path, None)
    mine = Store(tmp_path / "mine", tmp_path, None)
    new, known = Cell(TINY, PLAIN), Cell(TINY, V2_NETWORK)
    for cell in (new, known):
        theirs.keep(cell, {"of": "theirs"}, time.monotonic())
    mine.keep(known, {"of": "mine"}, time.monotonic())
    facts = tmp_path / "facts"
    facts.mkdir()
    (facts / "check.json").write_text("{}")
    (facts / "check.log").write_bytes(b"x" * 300_000)
    packed.pack(theirs.results, facts, tmp_path / "out.tar.gz")
    done = packed.merge(tmp_path / "out.tar.gz", mine.results, tmp_path / "home")
    assert mine.read(new)["result"] == {"of": "theirs"}
    assert mine.read(known)["result"] == {"of": "mine"}
    assert (tmp_path / "home" / "out" / "check.json").exists()
    assert len((tmp_path / "home" / "out" / "check.log").read_bytes()) == 200_000
    assert not done.refused


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cells/trial/{}.json", {"inputs": {"other": 1}}),
        ("cells/trial/{}.json", {"format": "other"}),
        ("cells/other/{}.json", {}),
        ("cells/trial/made-up-00000000.json", {}),
        ("cells/../{}.json", {}),
        ("cells/trial/../../{}.json", {}),
        ("facts/../{}.json", {}),
        ("elsewhere/{}.json", {}),
    ],
)
def test_what_is_no_result_is_not_merged(kit, tmp_path, store, name, change):
    cell = Cell(TINY, PLAIN)
    entry = store.keep(cell, {}, time.monotonic()) | change
    (tmp_path / "entry").write_text(json.dumps(entry))
    with tarfile.open(tmp_path / "out.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "entry", name.format(cell.name))
    done = kit("packed").merge(tmp_path / "out.tar.gz", tmp_path / "home", tmp_path / "facts")
    assert not done.new
    assert len(done.refused) == 1
    assert not (tmp_path / "home").exists()


def test_what_is_known_is_not_run_again_unless_its_network_is_needed(kit, tmp_path):
    run = kit("run")
    known = Store(tmp_path / "known", tmp_path, None)
    here = Store(tmp_path / "here", tmp_path / "networks", None)
    whole, half = V2_NETWORK, V2_NETWORK._replace(seed=1)
    cells = [Cell(TINY, whole), *prunings(1, whole), Cell(TINY, half), *prunings(1, half)]
    for cell in cells[:3]:
        known.keep(cell, {}, time.monotonic())
    assert run.take_known(cells, here, known.results) == 2
    assert [here.done(cell) for cell in cells] == [True, True, False, False]


def test_a_run_that_hangs_packs_what_there_is_and_ends(tmp_path):
    script = (
        "import sys, time, pathlib; sys.path.insert(0, sys.argv[1]); import run\n"
        "root = pathlib.Path(sys.argv[2])\n"
        "places = run.Places(root, root / 'out', root / 'known')\n"
        "places.facts.mkdir(parents=True); places.out.mkdir()\n"
        "(places.facts / 'check.json').write_text('{}')\n"
        "run.in_time(places, time.monotonic() + 0.5, lambda: time.sleep(600))\n"
    )
    command = [sys.executable, "-c", script, str(KIT), str(tmp_path)]
    done = subprocess.run(command, timeout=300, check=False)
    assert done.returncode == 3
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert archive.getnames() == ["facts/check.json"]


def test_a_stage_that_fails_or_hangs_ends_and_says_so(kit, tmp_path, monkeypatch):
    run = kit("run")
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "checks.py").write_text("import sys; print('so it goes'); sys.exit(5)")
    (tmp_path / "steps.py").write_text("import time; time.sleep(600)")
    places = run.Places(tmp_path, tmp_path, tmp_path)
    places.facts.mkdir()
    assert run.run_stage("check", places, 60, []) == "exit code 5"
    assert (places.facts / "check.log").read_text() == "so it goes\n"
    assert run.run_stage("steps", places, 0.5, []) == "ended after 0 seconds"


def test_a_tiny_run_comes_home_and_one_bad_cell_with_it(kit, tmp_path, monkeypatch):
    """Trained and pruned in a process of its own, as on the device, packed, merged and found."""
    run, packed = kit("run"), kit("packed")
    for name in ("PYTHONPATH", "NNPASSPORT_CACHE", "NNPASSPORT_COMMIT"):
        monkeypatch.setenv(name, "")  # and so put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("KIT_THREADS", "1")
    monkeypatch.setattr(run, "ORDER", ("table2",))
    columns = {name: contents.COLUMNS[name] for name in ("V1 (BN)", "V2 (GN)")}
    monkeypatch.setattr(contents, "COLUMNS", columns)
    bad = replace(TINY, name="tiny", settings={"passport-v1": {"private_every": 0.0}})
    monkeypatch.setitem(plans.PLANS, "tiny", bad)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "manifest.json").write_text('{"commit": "f00"}')
    places = ("--root", tmp_path / "root", "--out", tmp_path / "out", "--known", tmp_path / "none")
    options = ("--plan", "tiny", "--minutes", "8", "--stages", "cells", "--jobs", "1")
    assert run.main([*map(str, (*places, *options))]) == 0
    done = packed.merge(tmp_path / "out" / "results.tar.gz", tmp_path / "home", tmp_path / "facts")
    assert not done.refused
    home = Store(tmp_path / "home", tmp_path, None)
    found = {(c.network.scheme, c.work): home.read(c) for c in run.cells_in_order(bad, home)}
    assert len(found) == 4
    for (scheme, _), entry in found.items():
        assert (entry is None) is (scheme == "passport-v1")
        assert entry is None or entry["provenance"]["commit"] == "f00"
    notes = json.loads((tmp_path / "facts" / "results" / "run.json").read_text())
    assert sorted(notes["failures"]) == [
        "alexnet-digits-v1-batch-0",
        "alexnet-digits-v1-batch-0-transfer-digits-halves",
    ]
    assert "private_every is 0" in notes["failures"]["alexnet-digits-v1-batch-0"]


def test_the_checks_find_nothing_wrong_with_this_processor(kit, tmp_path):
    facts = kit("checks").check(tmp_path / "check.json", small=True)
    assert facts["wrong"] == []
    assert facts["losses"].keys() == {"V1", "V2", "V3"}
    assert facts["resumed"] == {"difference": 0.0, "of_two_straight_runs": 0.0}
    assert json.loads((tmp_path / "check.json").read_text()) == facts


def test_table_2_comes_before_the_attacks_for_each_architecture_and_task(kit, tmp_path):
    run = kit("run")
    for name in ("cifar10-train-0", "cifar10-test", "cifar100-train-0", "cifar100-test"):
        (tmp_path / f"{name}.parquet").write_bytes(b"")
    store = Store(tmp_path, tmp_path, tmp_path)
    cells = run.cells_in_order(plans.GPU, store)
    groups = [(c.network.task, c.network.architecture) for c in cells]
    assert list(dict.fromkeys(groups)) == [
        *(("cifar10", "alexnet"), ("cifar10", "resnet18")),
        *(("cifar100", "alexnet"), ("cifar100", "resnet18")),
    ]
    first = [c.work for c in cells if c.network.task == "cifar10"]
    assert first[:10] == ["train"] * 5 + ["transfer"] * 5
    assert first.index("fake1") < first.index("fake3") < len(first)
    assert not [c for c in cells if c.target == "caltech101"]  # its images are not there


# What the device does not see here


def test_a_wrong_device_is_found(kit):
    checks = kit("checks")
    right = {name: checks.Run([1.0, 2.0], {}, torch.tensor([0.5, -0.5])) for name in checks.SCHEMES}
    assert checks.compare(right, right)["V2"]["bits"] == 2
    off = right | {"V2": right["V2"]._replace(losses=[1.0, 2.001])}
    with pytest.raises(checks.WrongError, match="V2: losses differ by 5"):
        checks.compare(off, right)
    off = right | {"V3": right["V3"]._replace(gammas=torch.tensor([0.5, 0.5]))}
    with pytest.raises(checks.WrongError, match="1 of 2 bits differ"):
        checks.compare(off, right)
    with pytest.raises(checks.WrongError, match="losses differ by nan"):
        checks.compare(right | {"V1": right["V1"]._replace(losses=[1.0, float("nan")])}, right)


def test_the_device_s_time_is_counted_once_and_its_gaps_are_found(kit):
    kernels = [(0.0, 10.0, "a"), (5.0, 15.0, "b"), (35.0, 40.0, "a")]
    found = kit("steps").of_device(kernels, 1)
    assert found["busy"] == pytest.approx(20 / 40)
    assert found["longest_gaps"][0] == {"us": 20.0, "before": "a"}
    assert found["kernels_a_step"] == 3
    assert kit("steps").of_device([], 1)["busy"] is None


class Waiting(TorchFunctionMode):
    """Notes what would make the CPU wait for an accelerator: numbers that are read or sent."""

    NAMES = frozenset(
        {
            *("item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique"),
            *("__bool__", "__float__", "__int__", "__index__", "new_tensor", "tensor"),
            *("as_tensor", "from_numpy", "synchronize", "equal", "allclose"),
        }
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES or (name == "__getitem__" and self._is_mask(args[1])):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))

    def _is_mask(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        return any(isinstance(p, torch.Tensor) and p.dtype == torch.bool for p in parts)


@pytest.mark.parametrize("scheme", [None, V1, V2, V3, replace(V2, private_share=0.5)])
def test_no_step_reads_or_sends_a_number(scheme):
    """From one step's objective to another's: backward, optimiser, images and augmentation too."""
    torch.manual_seed(0)
    norm = "batch" if scheme in (None, V1) else "group"
    model, objective = build("alexnet", classes=10, norm=norm, width=0.125), classification
    if scheme is not None:
        secret = draw_by_layer(scheme, model, torch.zeros(2, 3, 32, 32), seed=bytes(32))
        scheme.insert(model, secret, torch.zeros(2, 3, 32, 32))
        objective = scheme.objective(secret, steps=9, normalise=CIFAR10)
    mode, watched = Waiting(), []

    def watching(module, batch):
        if batch.step == 2:
            mode.__enter__()
        if batch.step == 8:  # the last step is logged
            mode.__exit__(None, None, None)
        watched.append(batch.step)
        return objective(module, batch)

    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (36, 3, 32, 32), generator=rng, dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(36) % 10, tuple("0123456789"))
    fit(model, watching, data, Recipe(epochs=1, batch=4), normalise=CIFAR10)
    assert watched == list(range(9))
    assert mode.seen == []


def test_networks_are_measured_where_it_is_fast_and_stay_where_they_are(monkeypatch):
    model = build("alexnet", classes=10, norm="group", width=0.125).eval()
    V2.insert(
        model,
        V2.draw_key(model, torch.zeros(2, 3, 32, 32), passports="derived"),
        torch.zeros(2, 3, 32, 32),
    )
    pixels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(20) % 10, tuple("0123456789"))
    moved = []
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, device, **_: moved.append((self, device)) or self
    )
    device = torch.device("cuda")
    expected = accuracy(model, data, CIFAR10)
    assert not moved
    with measuring_on(torch.device("cpu")):
        assert accuracy(model, data, CIFAR10) == expected
    assert not moved
    with measuring_on(device):
        assert accuracy(model, data, CIFAR10) == expected
    [(copy, to)] = moved
    assert to == device
    assert copy is not model
    assert len(passport_norms(copy)) == len(passport_norms(model)) == 3
    assert fidelity._ELSEWHERE.get() is None


def test_cells_are_measured_where_they_are_trained(monkeypatch, store):
    seen = []

    def attack(cell, store, show):
        seen.append(fidelity._ELSEWHERE.get())
        return {}

    monkeypatch.setattr(runs, "_attack", attack)
    cell = prunings(1)[0]
    released = store.folder(cell) / "released"
    released.mkdir(parents=True)
    (released / "config.json").write_text("{}")
    runs.run(cell, store)
    assert seen == [runs.together().device]


def test_a_copy_without_history_says_which_commit_it_is_of(monkeypatch):
    monkeypatch.setenv("NNPASSPORT_COMMIT", "f00")
    assert provenance()["commit"] == "f00"
