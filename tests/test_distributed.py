"""Several processes train what one process trains, and stop, resume and fail as one."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from nnpassport.cli.app import app
from nnpassport.embedding.train import team as distributed
from nnpassport.embedding.train.team import Team
from nnpassport.scheme import BadRecipeError, LostProcessError

pytestmark = pytest.mark.slow

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("TORCH")},
    "OMP_NUM_THREADS": "1",
}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PROGRAM = '''
"""python program.py FOLDER JOBS: of each job, how many processes train each of its cases.

Processes are forks that find one another by what torchrun would tell them: torch is imported once.
"""
import json
import os
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import accelerate
import pyarrow.compute
import torch
from torch import nn

from nnpassport.catalog import scheme_named
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.data.stream import open_stream
from nnpassport.embedding.train.team import together
from nnpassport.embedding.train.loop import Journal, Recipe, fit

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports much, and not in every fork
RNG = torch.Generator().manual_seed(7)
IMAGES = torch.randint(256, (56, 1, 8, 8), dtype=torch.uint8, generator=RNG)
LABELS = torch.randint(3, (56,), generator=RNG)
DATA = ImageSet(IMAGES, LABELS, ("a", "b", "c"))
HELD_OUT = DATA.subset(torch.arange(37))  # 37: no number of processes shares that evenly
RECIPE = Recipe(epochs=2, batch=8, rate=0.05, schedule="one-cycle", keep_best=True, seed=3)


def normalise(pixels):
    return Normalisation((0.5,), (0.3,))(pixels).double()


def network(norm):
    torch.manual_seed(0)
    make = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(2, c)}[norm]
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), make(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, bias=False), make(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), make(4), nn.ReLU()),
        nn.Flatten(), nn.Linear(64, 3),
    ).double()


def train(out, name, norm, stops=None, resume=False, stream=None, own_key=False):
    data = DATA if stream is None else open_stream(stream, channels=1)
    model, scheme = network(norm), scheme_named(name)
    if scheme.triggers:
        scheme = replace(scheme, triggers=7, triggers_per_step=3)
    example = normalise(IMAGES[:2])
    if name == "uchida":
        scheme = replace(scheme, bits=32)
    if name == "pan":
        scheme = replace(scheme, private_every=2)
    hosts = {"adi": None, "uchida": ["1.0"]}.get(name, ["0.0", "1.0"])
    seed = bytes([together().rank if own_key else 0]) * 32
    key = scheme.draw_key(model, example, seed=seed, layers=hosts)
    scheme.insert(model, key, example)
    inner, team = scheme.objective(key, steps=14, normalise=normalise), together()

    def objective(running, batch):
        if stops == batch.step and team.rank == team.size - 1:
            os.kill(os.getpid(), 2)
        return inner(running, batch)

    journal = Journal(Path(out), resume=resume, checkpoint_every=1e9 if stops is None else 0)
    try:
        history = fit(model, objective, data, RECIPE, normalise=normalise, journal=journal,
                      evaluate=scheme.evaluation(HELD_OUT, normalise))
    except KeyboardInterrupt:
        return
    assert stops is None
    if team.leads:
        weights = {n: t.tolist() for n, t in model.state_dict().items()}
        epochs = [{k: v for k, v in e.items()} for e in history.epochs]
        Path(out, "found.json").write_text(json.dumps({"weights": weights, "epochs": epochs}))


def rank(folder, cases, errors):
    """What one process of a job does; it does not return."""
    code = 1
    try:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
        for case in cases:
            os.environ["NNPASSPORT_SHARDED"] = str(case.pop("sharded", 0))
            train(folder / case.pop("out"), **case)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(folder, number, size, cases):
    """Exit code and errors of each process of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    team = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if size > 1 else {}
    children, files = [], [folder / f"errors {number} {each}" for each in range(size)]
    for each, file in enumerate(files):
        child = os.fork()
        if child == 0:
            if size > 1:
                os.environ.update({k: str(v) for k, v in team.items()})
                os.environ.update(RANK=str(each), LOCAL_RANK=str(each))
            rank(folder, cases, file)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [[code, file.read_text()] for code, file in zip(codes, files)]


if __name__ == "__main__":
    jobs = [run(Path(sys.argv[1]), n, *job) for n, job in enumerate(json.loads(sys.argv[2]))]
    print(json.dumps(jobs))
'''


def launch(folder, *jobs):
    """Exit code and errors of each process of each job: (how many processes, cases)."""
    program = folder / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, program, folder, json.dumps(jobs)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def found(folder, out):
    return json.loads((folder / out / "found.json").read_text(encoding="utf-8"))


def logged(folder, out):
    lines = (folder / out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name != "images_per_second"}
        for line in lines
    ]


def assert_same(folder, one, other):
    for name, value in found(folder, one)["weights"].items():
        expected = torch.tensor(value, dtype=torch.float64)
        mine = torch.tensor(found(folder, other)["weights"][name], dtype=torch.float64)
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-10, msg=name)
    for mine, expected in zip(logged(folder, other), logged(folder, one), strict=True):
        assert mine == pytest.approx(expected, rel=1e-9, abs=1e-10)


KINDS = (
    ("passport-v1", "batch"),
    ("passport-v2", "batch"),
    ("passport-v3", "batch"),
    ("passport-v3", "group"),
    ("pan", "batch"),
    ("adi", "group"),
    ("uchida", "batch"),
)
SHARDED = KINDS[:5]


def written(folder):
    """A Parquet file of 56 pictures in row groups of ten."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(56):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(8, 8), dtype=np.uint8)).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % 3})
    parquet.write_table(pa.Table.from_pylist(rows), folder / "set.parquet", row_group_size=10)
    return folder / "set.parquet"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every kind trained by one process, by two, by two that share the weights, interrupted."""
    folder = tmp_path_factory.mktemp("distributed")
    alone = [{"out": f"one {name} {norm}", "name": name, "norm": norm} for name, norm in KINDS]
    copied = [{**case, "out": case["out"].replace("one", "copied")} for case in alone]
    dealt = [
        {**case, "out": case["out"].replace("one", "sharded"), "sharded": 1}
        for case in alone[: len(SHARDED)]
    ]
    kind = {"name": "passport-v3", "norm": "batch"}
    streamed = {"name": "passport-v2", "norm": "batch", "stream": str(written(folder))}
    stopped = [
        {"out": "two, one", **kind, "stops": 9},
        {"out": "two sharded, one", **kind, "stops": 9, "sharded": 1},
    ]
    alone += [
        {"out": "one stream", **streamed},
        {"out": "one, two stream", **streamed, "stops": 9},
        {"out": "one, two sharded", **kind, "stops": 9},
    ]
    resumed = {"out": "one, two sharded", **kind, "resume": True, "sharded": 1}
    streams = [
        {"out": "copied stream", **streamed},
        {"out": "one, two stream", **streamed, "resume": True},
    ]
    own = {"out": "own keys", "name": "passport-v2", "norm": "group", "own_key": True}
    *trained, refused = launch(
        folder,
        (1, alone),
        (2, [*copied, *dealt, resumed, *streams]),
        (2, stopped),
        (1, [{**case, "stops": None, "resume": True} for case in stopped]),
        (2, [own]),
    )
    for job in trained:
        assert [code for code, _ in job] == [0] * len(job), job
    return SimpleNamespace(folder=folder, refused=refused)


@pytest.mark.parametrize(("name", "norm"), KINDS)
def test_two_processes_train_what_one_does(name, norm, runs):
    assert_same(runs.folder, f"one {name} {norm}", f"copied {name} {norm}")


@pytest.mark.parametrize(("name", "norm"), SHARDED)
def test_two_processes_that_deal_out_the_weights_do_too(name, norm, runs):
    assert_same(runs.folder, f"one {name} {norm}", f"sharded {name} {norm}")


def test_images_that_are_streamed_are_shared_and_resumed_too(runs):
    assert_same(runs.folder, "one stream", "copied stream")
    assert_same(runs.folder, "one stream", "one, two stream")


@pytest.mark.parametrize("out", ["two, one", "two sharded, one", "one, two sharded"])
def test_a_run_goes_on_with_another_number_of_processes(out, runs):
    assert_same(runs.folder, "one passport-v3 batch", out)


def test_an_accuracy_is_counted_over_all_images_of_a_step_and_an_evaluation(runs):
    for entry in logged(runs.folder, "copied passport-v3 group"):
        if "epoch" in entry:
            assert (37 * entry["accuracy"]) == pytest.approx(round(37 * entry["accuracy"]))
        else:  # eight images and three triggers, which two processes cannot share evenly
            assert (11 * entry["accuracy"]) == pytest.approx(round(11 * entry["accuracy"]))


def test_processes_with_keys_of_their_own_are_refused(runs):
    for code, errors in runs.refused:
        assert code == 1
        assert "process 1 of 2 has another network or key than process 0" in errors
    assert not (runs.folder / "own keys").exists()


def embedding(folder, key, *more):
    return [
        *("-m", "nnpassport", "embed", "--data", "digits", "--split", "train"),
        *("--channels", "1", "--key", key, "--out", folder / "net", "--set", "width=0.1"),
        *("--batch", "32", *more),
    ]


@pytest.fixture
def owner(tmp_path):
    key = tmp_path / "owner.key"
    command = ["key", "new", "--channels", "1", "--set", "width=0.1", "--out", str(key)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return key


def processes_of(launcher):
    """Ids of a launcher's processes, by rank."""
    ids = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
            variables = (status.parent / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        ranks = [v.removeprefix(b"RANK=") for v in variables if v.startswith(b"RANK=")]
        if parent == launcher.pid and ranks:
            ids[int(ranks[0])] = int(status.parent.name)
    return ids


def started(command, **more):
    pipe = subprocess.PIPE
    environment = {**ENVIRONMENT, **more}
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_a_checkpoint(training, job):
    deadline = time.monotonic() + 300  # on a machine that does much else
    while not (training / "training.pt").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.1)


def assert_lost(job, training):
    """The job ended with one error, and names a checkpoint that is of the middle."""
    output, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    assert output == ""
    assert errors.count("(LostProcessError)") == 1, errors
    assert "nnpassport/training.py" not in errors  # no traceback but the launcher's own
    assert f"{training / 'training.pt'}: go on from there with --resume" in errors.replace("\n", "")
    state = torch.load(training / "training.pt", weights_only=True)
    assert 0 < state["done"] < 400 * 42
    return state["done"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_killed_leader_ends_the_job_of_a_launcher_with_one_error_and_a_checkpoint(
    owner, tmp_path
):
    """Takes long: torchrun and its two processes import torch."""
    training = tmp_path / "net" / "training"
    job = started([*LAUNCH, "--nproc-per-node=2", *embedding(tmp_path, owner, "--epochs", "400")])
    try:
        wait_for_a_checkpoint(training, job)
        os.kill(processes_of(job)[0], signal.SIGKILL)
        assert_lost(job, training)
    finally:
        job.kill()
        job.communicate()


def test_a_killed_follower_ends_the_leader_with_a_checkpoint_from_which_one_process_goes_on(
    owner, tmp_path
):
    """Takes long: three processes import torch."""
    training = tmp_path / "net" / "training"
    command = [sys.executable, *embedding(tmp_path, owner, "--epochs", "400")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        team = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    team["WORLD_SIZE"] = "2"
    leader, follower = (started(command, RANK=n, LOCAL_RANK=n, **team) for n in "01")
    try:
        wait_for_a_checkpoint(training, leader)
        follower.kill()
        done = assert_lost(leader, training)
    finally:
        for each in (leader, follower):
            each.kill()
            each.communicate()
    # Whoever goes on, with one process, goes on from there: nothing is run twice.
    again = started([*command, "--resume"])
    try:
        while len((training / "metrics.jsonl").read_text().splitlines()) < done // 10 + 9:
            assert again.poll() is None, again.communicate()[1]
            time.sleep(0.1)
        again.send_signal(signal.SIGTERM)  # as a queue does before it kills
        assert again.wait(60) == 130, again.communicate()[1]
    finally:
        again.kill()
        again.communicate()
    log = (training / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log if "loss" in line]
    assert steps == [*range(10, steps[-1] + 1, 10)]
    assert torch.load(training / "training.pt", weights_only=True)["done"] > done


def test_one_process_is_a_team_of_its_own():
    team = distributed.together()
    assert (team.rank, team.size, team.leads, team.sharded) == (0, 1, True, False)
    value = torch.tensor([1.5])
    assert team.total(value) is value
    assert team.any_of(True, False) == (True, False)
    assert team.from_leader(lambda: 3) == 3
    team.require_same("recipe", "a")


def test_a_batch_that_cannot_be_shared_is_refused():
    from nnpassport.data.batching import slice_of

    assert slice_of(12, Team(1, 3).part) == slice(4, 8)
    with pytest.raises(BadRecipeError, match=r"128 images cannot be shared by 3 .* such as 129"):
        slice_of(128, Team(1, 3).part)


def test_only_what_comes_of_a_lost_process_is_called_one():
    def fails(error, team):
        with distributed.losing_none(team, lambda: "go on"):
            raise error

    lost = RuntimeError("[/pytorch/gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    with pytest.raises(LostProcessError, match=r"another of the 2 processes .* go on"):
        fails(lost, Team(1, 2))
    for error, team in ((lost, Team()), (RuntimeError("shapes cannot be multiplied"), Team(1, 2))):
        with pytest.raises(RuntimeError, match=str(error)[:9].replace("[", r"\[")):
            fails(error, team)


def test_the_first_version_of_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadRecipeError, match="--fsdp_version 2"):
        distributed._is_asked_to_shard()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert distributed._is_asked_to_shard()
