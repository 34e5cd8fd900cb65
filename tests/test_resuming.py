"""A run that is stopped anywhere continues to exactly the result of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nnpassport.embedding.checkpoint import load_training

pytestmark = pytest.mark.slow

# Trains where it is told to, in a fork each time: torch is imported once for all runs.
PROGRAM = """
import json, os, sys, time, traceback
import accelerate
import torch
from dataclasses import replace
from pathlib import Path
from torch import nn
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding.schemes.passport import V3
from nnpassport.embedding.train.loop import Journal, Recipe

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports much, and not in every fork
data = read_images("digits", split="train", size=8, channels=1).subset(torch.arange(256))
normalise = Normalisation.measured(data)
# Everything that could differ: batch norm of each branch, dropout, triggers, a late second branch.
scheme = replace(V3, late=0.5, triggers=10)

def train(folder, slow):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(1024, 10),
    )
    key = scheme.draw_key(model, torch.zeros(1, 1, 8, 8), layers=["4"], seed=bytes(32))
    journal = Journal(folder, resume=True, show=lambda _: time.sleep(0.3 * slow),
                      checkpoint_every=0.0)
    recipe = Recipe(epochs=4, batch=16, rate=0.05, schedule="one-cycle", keep_best=True)
    scheme.embed(model, key, data, recipe, normalise=normalise, validation=data, journal=journal)
    torch.save(model.state_dict(), folder / "weights.pt")

for line in sys.stdin:
    folder, slow = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(Path(folder), slow)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
STEPS = 64


@pytest.fixture
def trainer():
    """The program, in a process that waits to be told what to train."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], env=environment, stdin=pipe, stdout=pipe, text=True
    )
    yield program
    program.communicate(timeout=60)


def start(trainer, folder, *, slow):
    """The id of the process that trains."""
    trainer.stdin.write(json.dumps([str(folder), slow]) + "\n")
    trainer.stdin.flush()
    return int(trainer.stdout.readline())


def finish(trainer, folder):
    start(trainer, folder, slow=False)
    assert int(trainer.stdout.readline()) == 0
    return torch.load(folder / "weights.pt", weights_only=True)


def stop(trainer, folder, step, how):
    """Stop a slow run once its checkpoint has passed `step`, in the middle of an epoch."""
    run, deadline = start(trainer, folder, slow=True), time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = folder / "metrics.jsonl"
        logged = metrics.read_text().splitlines() if metrics.exists() else []
        if logged and json.loads(logged[-1])["step"] >= step:
            break
        time.sleep(0.05)
    os.kill(run, how)
    assert int(trainer.stdout.readline()) == (1 if how == signal.SIGINT else -how)
    assert not (folder / "weights.pt").exists()
    return load_training(folder / "training.pt")["done"]


def records(folder):
    """The log without its timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def test_a_run_stopped_by_ctrl_c_and_by_a_kill_ends_bit_for_bit_like_one_that_was_not(
    trainer, tmp_path
):
    whole = finish(trainer, tmp_path / "whole")
    broken = tmp_path / "broken"
    at_interrupt = stop(trainer, broken, 20, signal.SIGINT)
    at_kill = stop(trainer, broken, 40, signal.SIGKILL)
    assert 16 < at_interrupt < at_kill < STEPS
    resumed = finish(trainer, broken)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert records(broken) == records(tmp_path / "whole")
    steps = [line["step"] for line in records(broken) if "loss" in line]
    assert steps == [10, 20, 30, 40, 50, 60, 64]
