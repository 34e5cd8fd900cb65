"""The training loop: recipes, logs, checkpoints. `test_resuming.py` stops it in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.schemes.passport import V1, V2, V3
from nnpassport.embedding.train import loop as training
from nnpassport.embedding.train.loop import (
    RECIPES,
    SCHEDULES,
    Journal,
    Outcome,
    Recipe,
    classification,
    fit,
    products_in,
    read_measure,
    total_steps,
)
from nnpassport.scheme import (
    BadRecipeError,
    Batch,
    UnreadableDataError,
    UnreadableModelError,
)

NORMALISE = Normalisation((0.5,), (0.25,))
RECIPE = Recipe(epochs=2, batch=8, rate=0.1, augment=False, schedule="constant")


@pytest.fixture
def data():
    return images()


def images():
    """Two classes, one of them brighter."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    pixels = torch.randint(0, 100, (64, 1, 6, 6), generator=rng)
    return ImageSet((pixels + 120 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels, ("a", "b"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(),
        nn.Linear(64, 2),
    )  # fmt: skip


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.trains
def test_learns_what_can_be_learnt(model, data):
    for start in model[-1].parameters():  # it answers nothing yet, and no unit of it is lost
        nn.init.zeros_(start)
    before = classification(model.eval(), batch_of(data)).measures["accuracy"]
    fit(model, classification, data, RECIPE, normalise=NORMALISE)
    after = classification(model.eval(), batch_of(data)).measures["accuracy"]
    assert read_measure(before) == 0.5
    assert read_measure(after) == 1  # of 21 shifted seeds under two instruction sets, each


def batch_of(data):
    return Batch(NORMALISE(data.images), data.labels)


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(model, data):
    states = []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for seed in (0, 0, 1):
        model.load_state_dict(start)
        fit(model, classification, data, replace(RECIPE, seed=seed), normalise=NORMALISE)
        states.append(model[0].weight.detach().clone())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_the_paper_s_schedule_takes_its_two_steps_at_half_and_three_quarters():
    factors = [SCHEDULES["steps"](epoch / 200) for epoch in (0, 99, 100, 149, 150, 199)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle_rises_to_one_and_ends_near_zero():
    factors = [SCHEDULES["one-cycle"](share) for share in (0, 0.125, 0.25, 0.625, 1)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_follows_the_schedule(model, data, schedule):
    recipe = replace(RECIPE, schedule=schedule, momentum=0.0, weight_decay=0.0)
    steps, bias = total_steps(data, recipe), model[-1].bias
    values, rates = [bias.tolist()], []

    def pull(_model, batch):
        # A gradient of exactly one: the bias goes down by the rate of the step.
        assert batch.step == len(values) - 1
        return Outcome(bias.sum(), {})

    def note(optimizer, _args, _kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        values.append(bias.tolist())

    hook = register_optimizer_step_post_hook(note)
    try:
        fit(model, pull, data, recipe, normalise=NORMALISE)
    finally:
        hook.remove()
    assert rates == [0.1 * SCHEDULES[schedule]((step + 0.5) / steps) for step in range(steps)]
    moved = [before[0] - after[0] for before, after in pairwise(values)]
    assert moved == pytest.approx(rates, abs=1e-6)


def test_the_recipe_of_2019_is_the_paper_s():
    paper = RECIPES["paper"]
    assert (paper.epochs, paper.batch, paper.rate, paper.schedule) == (200, 64, 0.01, "steps")
    assert (paper.momentum, paper.weight_decay, paper.nesterov) == (0.9, 5e-4, False)


@pytest.mark.parametrize(
    "wrong",
    [{"schedule": "cosine"}, {"precision": "int8"}, {"epochs": -1}, {"batch": 0}, {"rate": -1.0}],
)
def test_a_recipe_that_cannot_be_is_refused_with_what_would_work(wrong):
    with pytest.raises(BadRecipeError, match=next(iter(wrong))):
        Recipe(**wrong)


def test_a_loss_that_diverges_is_an_error_and_not_a_network(model, data):
    def objective(model, batch):
        outcome = classification(model, batch)
        return Outcome(outcome.loss * float("inf"), outcome.measures)

    with pytest.raises(BadRecipeError, match="diverged"):
        fit(model, objective, data, replace(RECIPE, epochs=3), normalise=NORMALISE)


def test_one_class_cannot_be_learnt(model, data):
    lone = ImageSet(data.images, torch.zeros(64, dtype=torch.int64), ("a",))
    with pytest.raises(UnreadableDataError, match="class"):
        fit(model, classification, lone, RECIPE, normalise=NORMALISE)


def test_keeps_the_best_epoch_and_not_the_last(model, data):
    scores = iter([0.1, 0.9, 0.3])
    weights = []

    def evaluate(model):
        weights.append(model[0].weight.detach().clone())
        return {"score": next(scores)}

    recipe = replace(RECIPE, epochs=3, keep_best=True)
    history = fit(model, classification, data, recipe, normalise=NORMALISE, evaluate=evaluate)
    assert history.best == 0.9
    assert torch.equal(model[0].weight, weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_without_keeping_the_best_the_last_weights_stay(model, data):
    weights = []

    def evaluate(model):
        weights.append(model[0].weight.detach().clone())
        return {"score": -len(weights)}

    fit(model, classification, data, RECIPE, normalise=NORMALISE, evaluate=evaluate)
    assert torch.equal(model[0].weight, weights[-1])


def test_the_log_has_every_tenth_step_and_every_epoch(model, data, tmp_path):
    shown = []
    journal = Journal(tmp_path, show=shown.append)
    fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [8, 10, 16, 16]
    assert {"loss", "accuracy", "images_per_second"} <= set(lines[1])
    assert [(p.step, p.steps) for p in shown] == [(10, 16), (16, 16)]


def test_tensorboard_gets_the_numbers_on_request(model, data, tmp_path):
    journal = Journal(tmp_path, tensorboard=True)
    fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    assert events(tmp_path, "loss") == [10, 16]
    assert events(tmp_path, "accuracy") == [10, 16]


def test_a_finished_run_is_not_trained_again(model, data, tmp_path):
    journal = Journal(tmp_path, resume=True)
    fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    done = model[0].weight.detach().clone()
    torch.manual_seed(5)
    other = deepcopy(model)
    with torch.no_grad():
        other[0].weight.zero_()
    fit(other, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    assert torch.equal(other[0].weight, done)
    assert len(log(tmp_path)) == 4


@pytest.mark.parametrize("what", ["recipe", "data"])
def test_another_run_s_checkpoint_is_not_continued(model, data, tmp_path, what):
    journal = Journal(tmp_path, resume=True)
    fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    before = (tmp_path / "training.pt").read_bytes()
    recipe = replace(RECIPE, rate=0.2) if what == "recipe" else RECIPE
    images = data.subset(torch.arange(32)) if what == "data" else data
    with pytest.raises(BadRecipeError, match=what):
        fit(model, classification, images, recipe, normalise=NORMALISE, journal=journal)
    assert (tmp_path / "training.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(model, data, tmp_path):
    journal = Journal(tmp_path, resume=True)
    fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    path = tmp_path / "training.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UnreadableModelError, match=r"training\.pt"):
        fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    assert len(log(tmp_path)) == 4


def test_ctrl_c_is_as_it_was_after_training(model, data):
    before = signal.getsignal(signal.SIGINT)
    fit(model, classification, data, RECIPE, normalise=NORMALISE)
    assert signal.getsignal(signal.SIGINT) is before


def test_bfloat16_leaves_the_weights_in_float32(model, data):
    recipe = replace(RECIPE, precision="bfloat16")
    dtypes = set()

    def objective(model, batch):
        logits = model(batch.images)
        dtypes.add(logits.dtype)
        return classification(model, batch)

    fit(model, objective, data, recipe, normalise=NORMALISE)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# A process of its own, for this one's shapes are checked at run time and that breaks graphs; and in
# it a fork for each thing that could end it, so that torch is imported once for all of them.
PROGRAM = """
import os, signal, sys, traceback
from copy import deepcopy
from functools import partial
from pathlib import Path
import accelerate
import torch
from torch import nn
from nnpassport.embedding.schemes.passport import V1, V2, V3
from nnpassport.embedding.train.loop import Recipe, classification, fit
sys.path.insert(0, sys.argv[1])
import test_training as tests

def network(norm):
    torch.manual_seed(0)
    make = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 2)}[norm]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), make(8), nn.ReLU(), nn.Conv2d(8, 8, 3), make(8), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), make(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2),
    )

def compiled(scheme, norm):
    torch.compile = partial(torch.compile, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    plain, found, data = network(norm), [], tests.images().subset(torch.arange(16))
    for compiled in (False, True):
        model = deepcopy(plain)
        recipe = Recipe(epochs=2, batch=4, rate=0.01, compile=compiled)
        if scheme is None:
            fit(model, classification, data, recipe, normalise=tests.NORMALISE)
        else:
            key = scheme.draw_key(model, torch.zeros(2, 1, 6, 6), seed=bytes(32),
                                  layers=["3", "7"])
            scheme.embed(model, key, data, recipe, normalise=tests.NORMALISE, validation=data)
        found.append(model.state_dict())
    assert any(not torch.equal(*pair) for pair in zip(plain.state_dict().values(),
                                                      found[0].values()))
    assert not counters["graph_break"], counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)

def killed():
    tests.embed_v2(Path(sys.argv[2], "broken"), 21, lambda: os.kill(os.getpid(), signal.SIGKILL))

torch.set_num_threads(1)  # before anything is forked: a pool of threads does not survive it
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # imports much, and not in every fork
for name, function in {
    "norms": tests.train_norms_only, "killed": killed,
    "none, group": partial(compiled, None, "group"), "V1, batch": partial(compiled, V1, "batch"),
    "V2, batch": partial(compiled, V2, "batch"), "V3, group": partial(compiled, V3, "group"),
}.items():
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), name, flush=True)
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """How each fork of the program ended."""
    folder = tmp_path_factory.mktemp("processes")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    codes = [line.split(" ", 1) for line in run.stdout.splitlines()]
    return SimpleNamespace(
        folder=folder, errors=run.stderr, codes={name: int(code) for code, name in codes}
    )


class PowerCut(Exception):
    """Ends a run where it stands, like a kill: nothing is saved any more."""


def entries(folder):
    """The log without its timings."""
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in log(folder)]


def scores(model):
    """Something to log for each epoch that depends on the weights."""
    return {"score": model[0].weight.sum().item()}


def stopping(objective, step, how):
    """The same objective, but `how` is called in the middle of one step."""

    def stopped(model, batch):
        if batch.step == step:
            how()
        return objective(model, batch)

    return stopped


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def power_cut():
    raise PowerCut


# Eight steps an epoch: at the end of the first, just after it, and within the third.
@pytest.mark.parametrize("step", [7, 8, 22])
@pytest.mark.parametrize(("how", "error"), [(ctrl_c, KeyboardInterrupt), (power_cut, PowerCut)])
@pytest.mark.parametrize("every", [0.0, 1e9], ids=["each-step", "each-epoch"])
def test_a_stopped_run_goes_on_to_what_an_undisturbed_one_ends_with(
    model, data, tmp_path, step, how, error, every
):
    recipe = replace(RECIPE, epochs=4, augment=True, schedule="one-cycle", keep_best=True)
    whole, start = deepcopy(model), deepcopy(model)
    options = {"normalise": NORMALISE, "evaluate": scores}
    expected = fit(
        whole, classification, data, recipe, journal=Journal(tmp_path / "whole"), **options
    )
    journal = Journal(tmp_path / "broken", resume=True, checkpoint_every=every)
    before = signal.getsignal(signal.SIGINT)
    objective = stopping(classification, step, how)
    with pytest.raises(error):
        fit(model, objective, data, recipe, journal=journal, **options)
    assert signal.getsignal(signal.SIGINT) is before
    torch.manual_seed(99)  # whatever else the process draws must not matter
    history = fit(start, classification, data, recipe, journal=journal, **options)
    assert_equal_weights(start, whole)
    assert history.epochs == expected.epochs
    assert history.best == expected.best
    assert entries(tmp_path / "broken") == entries(tmp_path / "whole")


def assert_equal_weights(one, other):
    states = one.state_dict(), other.state_dict()
    assert list(states[0]) == list(states[1])
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


@pytest.mark.parametrize(
    "scheme",
    [V1, replace(V3, late=0.5, triggers=5)],
    ids=["V1", "V3-late"],
)
def test_embedding_too_goes_on_where_it_was_stopped(scheme, data, tmp_path):
    recipe = replace(RECIPE, epochs=3)
    whole, broken, resumed = (marked_network() for _ in range(3))
    key = scheme.draw_key(whole, torch.zeros(1, 1, 6, 6), layers=["4"], seed=bytes(32))
    options = {"normalise": NORMALISE, "validation": data}
    scheme.embed(whole, key, data, recipe, journal=Journal(tmp_path / "whole"), **options)
    journal = Journal(tmp_path / "broken", resume=True, checkpoint_every=1e9)
    steps = iter(range(25))
    handle = broken.register_forward_pre_hook(
        lambda module, _: power_cut() if module.training and next(steps) == 21 else None
    )
    with pytest.raises(PowerCut):
        scheme.embed(broken, key, data, recipe, journal=journal, **options)
    handle.remove()
    logged = entries(tmp_path / "broken")
    assert logged[-1]["step"] > 16
    scheme.embed(resumed, key, data, recipe, journal=journal, **options)
    assert_equal_weights(resumed, whole)
    assert entries(tmp_path / "broken") == entries(tmp_path / "whole")


def marked_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1),
        nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(288, 2),
    )  # fmt: skip


def test_a_line_of_the_log_that_was_cut_off_does_not_hinder_resuming(model, data, tmp_path):
    start, whole = deepcopy(model), deepcopy(model)
    fit(whole, classification, data, RECIPE, normalise=NORMALISE, journal=Journal(tmp_path / "a"))
    journal = Journal(tmp_path / "b", resume=True)
    options = {"normalise": NORMALISE, "journal": journal}
    with pytest.raises(PowerCut):
        fit(model, stopping(classification, 12, power_cut), data, RECIPE, **options)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    fit(start, classification, data, RECIPE, **options)
    assert entries(tmp_path / "b") == entries(tmp_path / "a")


def test_an_epoch_that_was_logged_but_not_saved_is_not_logged_twice(model, data, tmp_path):
    """Killed between the epoch's line and its checkpoint; the one before is of its last step."""
    start = deepcopy(model)
    journal = Journal(tmp_path, resume=True, checkpoint_every=0.0)

    def evaluate(model):
        nonlocal saved
        saved = (tmp_path / "training.pt").read_bytes()
        return {"score": 1.0}

    saved = b""
    recipe = replace(RECIPE, epochs=1)
    options = {"normalise": NORMALISE, "journal": journal, "evaluate": evaluate}
    fit(model, classification, data, recipe, **options)
    (tmp_path / "training.pt").write_bytes(saved)
    assert [line.get("epoch") for line in log(tmp_path)] == [None, 1.0]
    fit(start, classification, data, recipe, **options)
    assert [line.get("epoch") for line in log(tmp_path)] == [None, 1.0]
    assert_equal_weights(start, model)


def test_ctrl_c_during_the_last_evaluation_is_not_swallowed(model, data, tmp_path):
    def evaluate(model):
        ctrl_c()
        return {}

    options = {"normalise": NORMALISE, "journal": Journal(tmp_path, resume=True)}
    recipe = replace(RECIPE, epochs=1)
    with pytest.raises(KeyboardInterrupt):
        fit(model, classification, data, recipe, evaluate=evaluate, **options)
    done = deepcopy(model)
    fit(model, classification, data, recipe, **options)
    assert_equal_weights(model, done)
    assert [line["step"] for line in log(tmp_path)] == [8, 8]


def test_ctrl_c_is_as_it_was_after_an_error(model, data):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(PowerCut):
        fit(model, stopping(classification, 2, power_cut), data, RECIPE, normalise=NORMALISE)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_norms_behind_frozen_layers_can_be_trained(processes):
    """In channels-last memory torch's group norm would crash the process here."""
    assert processes.codes["norms"] == 0, processes.errors


def train_norms_only():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (32, 4, 8, 8), generator=rng).to(torch.uint8)
    data = ImageSet(pixels, torch.arange(32) % 2, ("a", "b"))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
    model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.GroupNorm(2, 32), head).requires_grad_(False)
    model[1].requires_grad_(True)
    before = model[1].weight.clone()
    normalise = Normalisation((0.5,) * 4, (0.2,) * 4)
    recipe = Recipe(epochs=1, batch=16, rate=0.1, augment=False)
    fit(model, classification, data, recipe, normalise=normalise)
    assert not torch.equal(model[1].weight, before)
    assert not model[1]._forward_pre_hooks


def test_another_networks_checkpoint_is_not_continued(model, data, tmp_path):
    journal = Journal(tmp_path, resume=True)
    fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)
    with pytest.raises(BadRecipeError, match="another network"):
        fit(marked_network(), classification, data, RECIPE, normalise=NORMALISE, journal=journal)


def test_a_file_that_is_no_training_state_is_refused(model, data, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "training.pt")
    journal = Journal(tmp_path, resume=True)
    with pytest.raises(BadRecipeError, match="another recipe"):
        fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=journal)


def test_without_resuming_a_folder_is_begun_anew(model, data, tmp_path):
    for _ in range(2):
        fit(model, classification, data, RECIPE, normalise=NORMALISE, journal=Journal(tmp_path))
    assert [line["step"] for line in log(tmp_path)] == [8, 10, 16, 16]


def test_tensorboard_too_has_every_step_once_after_an_interruption(model, data, tmp_path):
    start = deepcopy(model)
    recipe = replace(RECIPE, epochs=4)
    journal = Journal(tmp_path, resume=True, tensorboard=True, checkpoint_every=1e9)
    options = {"normalise": NORMALISE, "journal": journal, "evaluate": scores}
    with pytest.raises(PowerCut):
        fit(model, stopping(classification, 21, power_cut), data, recipe, **options)
    fit(start, classification, data, recipe, **options)
    assert events(tmp_path, "score") == [8, 16, 24, 32]
    assert events(tmp_path, "loss") == [10, 20, 30, 32]


def events(folder, name):
    """Steps of one of the curves that TensorBoard would show."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [event.step for event in found.Scalars(name)]


def embed_v2(folder, stop=-1, how=None):
    """Embed V2 with batch norm, and stop in the middle of a step if asked to."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    pixels = torch.randint(0, 256, (64, 1, 6, 6), generator=rng).to(torch.uint8)
    model = marked_network()
    key = V2.draw_key(
        model, torch.zeros(1, 1, 6, 6), layers=["4"], seed=bytes(32), passports="derived"
    )
    steps = iter(range(10**6))
    model.register_forward_pre_hook(
        lambda module, _: how() if module.training and next(steps) == stop else None
    )
    journal = Journal(Path(folder), resume=True, tensorboard=True, checkpoint_every=1e9)
    images = ImageSet(pixels, labels, ("a", "b"))
    recipe = replace(RECIPE, epochs=3)
    V2.embed(model, key, images, recipe, normalise=NORMALISE, validation=images, journal=journal)
    return model


@pytest.mark.slow
def test_a_killed_process_is_continued_by_another_one(processes, tmp_path):
    assert processes.codes["killed"] == -signal.SIGKILL, processes.errors
    shutil.copytree(processes.folder / "broken", tmp_path / "broken")
    # The checkpoint is of step 16, so the log is ahead of it.
    assert [line["step"] for line in log(tmp_path / "broken")] == [8, 10, 16, 20]
    assert events(tmp_path / "broken", "score") == [8, 16]
    assert_equal_weights(embed_v2(tmp_path / "broken"), embed_v2(tmp_path / "whole"))
    assert entries(tmp_path / "broken") == entries(tmp_path / "whole")
    assert events(tmp_path / "broken", "score") == [8, 16, 24]
    assert events(tmp_path / "broken", "loss") == [10, 20, 24]


@pytest.mark.parametrize("late", [False, True])
def test_numbers_are_all_there_whether_read_at_once_or_late(
    model, data, tmp_path, monkeypatch, late
):
    """On an accelerator a step's loss is read ten steps later, and before anything is saved."""
    monkeypatch.setattr(training, "_reads_late", lambda device: late)
    losses, shown = [], []

    def objective(model, batch):
        outcome = classification(model, batch)
        losses.append(outcome.loss.item())
        return outcome

    def show(at):
        shown.append((at.step, len(losses), at.loss == losses[at.step - 1]))

    recipe, journal = replace(RECIPE, epochs=4), Journal(tmp_path, show=show)
    fit(model, objective, data, recipe, normalise=NORMALISE, journal=journal)
    done = [16, 24, 32, 32] if late else [10, 20, 30, 32]
    assert shown == [(step, n, True) for step, n in zip([10, 20, 30, 32], done, strict=True)]
    assert [line["step"] for line in log(tmp_path)] == [8, 10, 16, 20, 24, 30, 32, 32]


def test_products_are_rounded_where_the_precision_says_so_and_only_there():
    def rounded():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = rounded()
    for precision, expected in (
        ("tf32", ("high", True)),
        ("float32", ("highest", False)),
        ("bfloat16", ("highest", False)),
    ):
        with products_in(precision, "cuda"):
            assert rounded() == expected
        assert rounded() == before
    with products_in("tf32", "cpu"):
        assert rounded() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none, group", "V1, batch", "V2, batch", "V3, group"])
def test_a_compiled_run_is_one_graph_for_all_its_steps_and_learns_the_same(processes, name):
    """By the compiler's front half, which is the one that could break a graph or make another."""
    assert processes.codes[name] == 0, processes.errors
