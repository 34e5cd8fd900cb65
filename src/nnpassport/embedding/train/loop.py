"""The one training loop: `fit(model, objective, data, recipe)`.

Plain training, embedding, fine-tuning, overwriting, distilling and reverse-engineering differ in
their objective alone. What a step sees is a pure function of (seed, epoch, step), so a run that was
interrupted anywhere continues to exactly the weights of one that was not.
"""

import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import (
    Augment,
    Images,
    ImageSet,
    Normalisation,
    batches,
    steps_per_epoch,
)
from nnpassport.embedding.checkpoint import load_training, save_training
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.modes import hooked
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.train.labels import share_right
from nnpassport.embedding.train.team import (
    Team,
    dealt_like,
    losing_none,
    sharing,
    together,
    whole,
    wrapped,
)
from nnpassport.files.disk import write_atomically
from nnpassport.ground.progress import Listener, tell
from nnpassport.scheme import BadRecipeError, Batch


def steps_schedule(progress: float) -> float:
    """The paper's: a tenth of the rate after half of training, a hundredth after three quarters."""
    return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))


def one_cycle(progress: float) -> float:
    """Linear rise over the first quarter, then linear fall to zero."""
    return min(progress / 0.25, (1 - progress) / 0.75)


SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "steps": steps_schedule,
    "one-cycle": one_cycle,
    "constant": lambda _: 1.0,
}
PRECISIONS: Mapping[str, torch.dtype | None] = {
    "float32": None,
    "tf32": None,
    "bfloat16": torch.bfloat16,
}
"""By name, what autocast computes in."""


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train; the defaults are the paper's, for 200 epochs on CIFAR.

    Attributes:
        epochs: passes over the training images; 0 does what needs no training, and no more.
        batch: images a step, of all processes together.
        rate: learning rate of SGD at its highest.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 penalty on every parameter, as SGD's.
        nesterov: Nesterov's form of the momentum.
        schedule: a key of `SCHEDULES`: factor on the rate by the share of steps done.
        augment: random crop after padding by 4, and horizontal flip.
        precision: "float32"; "bfloat16" for autocast (weights stay float32); or "tf32", float32
            whose products an NVIDIA GPU rounds to 10 bits, and any other device does not.
        compile: run the network through `torch.compile`.
        keep_best: end with the weights that scored highest in `evaluate`, not with the last.
        seed: of order, augmentation and whatever the network itself draws.
        begins: share of the schedule, in [0, 1), that another training has done before this one.
        ends: share of the schedule, in (0, 1], that is done when this training ends.
    """

    epochs: int = 200
    batch: int = 64
    rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: str = "steps"
    augment: bool = True
    precision: str = "float32"
    compile: bool = False
    keep_best: bool = False
    seed: int = 0
    begins: float = 0.0
    ends: float = 1.0

    def __post_init__(self) -> None:
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in allowed:
                raise BadRecipeError(
                    f"{name} {getattr(self, name)!r} is unknown; it is one of: {', '.join(allowed)}"
                )
        if self.epochs < 0:
            raise BadRecipeError(f"epochs is {self.epochs}; it must be 0 or above")
        for name in ("batch", "rate"):
            if not getattr(self, name) > 0:
                raise BadRecipeError(f"{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.begins < self.ends <= 1:
            raise BadRecipeError(
                f"the schedule runs from {self.begins} to {self.ends}; needed: two shares in "
                "order, from 0 to 1"
            )

    def rate_at(self, progress: float) -> float:
        """The learning rate where a share of this training, in [0, 1], is done."""
        return self.rate * SCHEDULES[self.schedule](
            self.begins + (self.ends - self.begins) * progress
        )


RECIPES: Mapping[str, Recipe] = {
    "paper": Recipe(),
    "short": Recipe(epochs=15, batch=128, rate=0.05, schedule="one-cycle", nesterov=True),
    "tune": Recipe(epochs=1, batch=128, rate=0.01, schedule="one-cycle", nesterov=True),
}
"""Named recipes: `paper` is the one of 2019, `short` is sized for a machine without accelerator,
`tune` is for a network that is trained already."""


class Outcome(NamedTuple):
    """What an objective says of one batch: the loss to descend, and facts worth showing.

    The loss of a `Batch.part` is such that the mean over all parts is the loss of the whole step. A
    measure is one number, or a count and what it is of (`share_right`), which parts can add up.
    """

    loss: Tensor
    measures: Mapping[str, Tensor]


Objective = Callable[[nn.Module, Batch], Outcome]
Task = Callable[[Any, Any], Tensor]
"""A loss of the caller's own: output of one branch, labels → scalar."""
Evaluation = Callable[[nn.Module], Mapping[str, float]]
_AGREED_EVERY = 10  # steps: so often several processes ask one another whether to save or stop


def _told(now: "Progress") -> None:
    tell(now.step, now.steps, "training")


@final
@dataclass(frozen=True, slots=True)
class Journal:
    """Where a run writes, whether it continues one, and who watches.

    Attributes:
        folder: gets `metrics.jsonl` and `training.pt`; None writes nothing.
        resume: continue from the folder's checkpoint, if it has one.
        show: called every tenth step; the default tells whoever listens (`progress`).
        prepare: called while what comes before the first step is done, with how much of it is, of
            how much, and what is next.
        tensorboard: also write TensorBoard events (needs the `tensorboard` extra).
        checkpoint_every: seconds between checkpoints within an epoch.
        diary: what this training has come to is entered there, signed, now and then.
    """

    folder: Path | None = None
    resume: bool = False
    show: "Callable[[Progress], None]" = _told
    prepare: Listener = lambda *_: None
    tensorboard: bool = False
    checkpoint_every: float = 120.0
    diary: "Keeper | None" = None


class Moment(NamedTuple):
    """What a training has come to, for a diary.

    Attributes:
        step: optimiser steps so far.
        weights: of the plain network, without what a mark adds to it while it is trained.
        state: what the run goes on from, as `load_training` reads it.
        recipe: how it is trained, as plain values.
        data: digest of what it is trained on.
        metrics: the last numbers that were logged.
        last: whether the run ends here.
    """

    step: int
    weights: Mapping[str, Tensor]
    state: Mapping[str, Any]
    recipe: Mapping[str, Any]
    data: str
    metrics: Mapping[str, float]
    last: bool


class Keeper(Protocol):
    """Who keeps a diary of a training, as `embedding.train.keeping` does."""

    def due(self, step: int) -> bool:
        """Whether an entry is to be made after this step; the first and the last always are."""

    def enter(self, moment: Moment) -> None:
        """Make it."""


class Progress(NamedTuple):
    """Where a run stands; `measures` are the last logged step's."""

    step: int
    steps: int
    epoch: int
    loss: float
    images_per_second: float
    measures: Mapping[str, float]


@final
@dataclass(slots=True)
class History:
    """What a run has to tell: one entry for each epoch, with the evaluation's numbers in it."""

    epochs: list[dict[str, float]] = field(default_factory=list)
    best: float = -math.inf
    seconds: float = 0.0


def classification(model: nn.Module, batch: Batch) -> Outcome:
    """Plain training: cross-entropy, nothing else."""
    logits = logits_of(model(batch.images))
    right = share_right(logits, batch.labels)
    return Outcome(F.cross_entropy(logits, batch.labels), {"accuracy": right})


def read_measure(value: Tensor) -> float:
    """A measure as one number; a share of nothing is 0."""
    if value.dim() == 0:
        return value.item()
    part, of = value.tolist()
    return part / of if of else 0.0


def total_steps(data: Images, recipe: Recipe) -> int:
    """Optimiser steps in a whole run."""
    return recipe.epochs * steps_per_epoch(len(data), recipe.batch)


def fit(
    model: nn.Module,
    objective: Objective,
    data: Images,
    recipe: Recipe,
    *,
    normalise: Normalisation,
    evaluate: Evaluation | None = None,
    journal: Journal | None = None,
) -> History:
    """Train `model` in place on whatever device Accelerate finds, in one process or in several.

    `evaluate` runs after each epoch; its "score" is what `keep_best` compares. Checkpoints are
    written atomically: every so often, after each epoch, and on Ctrl-C or SIGTERM (which then raise
    KeyboardInterrupt). They do not depend on how many processes there are.

    Several processes (`distributed`) each call this with the same arguments; all have the trained
    weights afterwards, and only the first writes and shows anything.

    Raises:
        BadRecipeError: the loss is no longer finite, `resume` finds another recipe's run, or the
            processes cannot share the batch or differ in what they train.
        LostProcessError: another process is gone.
    """
    data.require_classes(2)
    journal, team = journal or Journal(), together()
    if not team.leads:
        journal = replace(journal, show=lambda _: None, tensorboard=False)
    model.to(team.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with losing_none(team, lambda: _what_now(journal)), wrapped(model, team) as (network, running):
        run = _Run(network, _resident(data, team.device), recipe, journal, team)
        torch.manual_seed(recipe.seed + team.rank)
        run.restore()
        run.open_log()
        run.enter()
        compiled = torch.compile(running) if recipe.compile else running
        products = products_in(recipe.precision, team.device)
        with products, _frozen_before_group_norms(network), _interruptible() as interrupted:
            while run.epoch < recipe.epochs:
                network.train()
                for batch in run.batches(normalise):
                    run.step(compiled, objective, batch)  # type: ignore[arg-type]
                    run.enter_if_due()
                    if run.paused(interrupted()):
                        raise KeyboardInterrupt
                with sharing(team):
                    numbers = {} if evaluate is None else evaluate(network)
                run.close_epoch(numbers)
                run.save()
                if any(team.any_of(interrupted())):  # during the evaluation, of the last epoch even
                    raise KeyboardInterrupt
        if run.entered != run.done:
            run.enter(last=True)
        run.finish()
    return run.history


def _what_now(journal: Journal) -> str:
    if journal.folder is None:
        return "start the training again; it keeps no checkpoints"
    return (
        f"its last checkpoint is {journal.folder / 'training.pt'}: go on from there with --resume, "
        "with as many processes as you like"
    )


def _resident(data: Images, device: torch.device) -> Images:
    """The images on the device, once and for all, as bytes; where they would crowd it, as given.

    Batches are then cut, augmented and normalised there, and nothing waits for the CPU.
    """
    if device.type != "cuda" or not isinstance(data, ImageSet):
        return data
    if 4 * data.images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return data
    return data.to(device)


@contextmanager
def products_in(precision: str, device: torch.device | str) -> Iterator[None]:
    """Round products of float32 to TF32 where the precision says so, and nowhere else.

    Left to itself, PyTorch rounds those of convolutions on every GPU that can.
    """
    if torch.device(device).type != "cuda":
        yield
        return
    # The older of two ways to say it: torch 2.13 refuses to mix them, and its compiler reads these.
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _round_products("high" if precision == "tf32" else "highest", precision == "tf32")
    try:
        yield
    finally:
        _round_products(*before)


def _round_products(matmul: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _frozen_before_group_norms(model: nn.Module) -> Iterator[None]:
    # torch 2.13 crashes on the CPU (a segmentation fault, no error) in the backward pass of group
    # norm when its input is in channels-last memory and needs no gradient, as behind frozen layers.
    def contiguous(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = args[0]
        return None if x.requires_grad or x.is_cuda else (x.contiguous(), *args[1:])

    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    with hooked(*(norm.register_forward_pre_hook(contiguous) for norm in norms)):
        yield


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    # A KeyboardInterrupt in the middle of optimizer.step() would leave half of the weights updated,
    # so Ctrl-C only raises a flag here, which the loop reads between steps. SIGTERM is what
    # launchers and queues send before they kill.
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Step(NamedTuple):
    """A step that is to be logged; its loss and measures may still be on their way here."""

    step: int
    epoch: int
    loss: Tensor
    measures: Mapping[str, Tensor]
    images_per_second: float
    there: Callable[[], None]


def _reads_late(device: torch.device) -> bool:
    # Reading a loss waits for all that an accelerator was given to do, and leaves it with nothing
    # to do: there, a step's numbers are read when the next ones are due.
    return device.type == "cuda"


def _on_their_way(device: torch.device) -> Callable[[], None]:
    """Waits for what has been copied from the device so far; the CPU's own copies are there."""
    if device.type != "cuda":
        return lambda: None
    event = torch.cuda.Event()
    event.record()
    return event.synchronize


class _Run:
    """State of one training run: what a checkpoint holds, and how it moves by one step."""

    def __init__(
        self,
        model: nn.Module,
        data: Images,
        recipe: Recipe,
        journal: Journal,
        team: Team,
    ) -> None:
        self.model, self.data, self.recipe = model, data, recipe
        self.journal, self.folder, self.team = journal, journal.folder, team
        self.optimizer = torch.optim.SGD(
            (p for p in model.parameters() if p.requires_grad),
            lr=recipe.rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        # Hashing the images takes a second for large sets: once, and only where it is needed.
        self._identity: dict[str, Any] = (
            {}
            if journal.folder is None and journal.diary is None and team.size == 1
            else {"recipe": dataclasses.asdict(recipe), "data": data.digest()}
        )
        team.require_same("recipe or set of images", json.dumps(self._identity, sort_keys=True))
        self.done = 0
        self.per_epoch = steps_per_epoch(len(data), recipe.batch)
        self.history = History()
        self.best_weights: dict[str, Tensor] | None = None
        self._writer: Any = None
        self._saved = self._started = self._logged = time.monotonic()
        self._logged_step = 0
        self._unread: _Step | None = None
        self._measures: Mapping[str, float] = {}
        self.entered = -1

    @property
    def epoch(self) -> int:
        return len(self.history.epochs)

    def batches(self, normalise: Normalisation) -> Iterator[Batch]:
        return batches(
            self.data,
            normalise,
            size=self.recipe.batch,
            seed=self.recipe.seed,
            epoch=self.epoch,
            start=self.done - self.epoch * self.per_epoch,
            augment=Augment() if self.recipe.augment else None,
            device=self.team.device,
            part=self.team.part,
        )

    def step(self, model: nn.Module, objective: Objective, batch: Batch) -> None:
        recipe = self.recipe
        steps = recipe.epochs * self.per_epoch
        # The middle of the step: at its edges a linear schedule would waste the first or last one.
        rate = recipe.rate_at((self.done + 0.5) / steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        dtype = PRECISIONS[recipe.precision]
        with torch.autocast(self.team.device.type, dtype, enabled=dtype is not None):
            outcome = objective(model, batch)
        outcome.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        if self.done % 10 == 0 or self.done == steps:
            self._log(outcome)

    def _log(self, outcome: Outcome) -> None:
        self._read()
        now = time.monotonic()
        speed = (self.done - self._logged_step) * self.recipe.batch / max(now - self._logged, 1e-9)
        self._logged, self._logged_step = now, self.done
        loss, *values = (value.to("cpu", non_blocking=True) for value in self._of_all(outcome))
        self._unread = _Step(
            self.done,
            self.epoch,
            loss,
            dict(zip(outcome.measures, values, strict=True)),
            speed,
            _on_their_way(self.team.device),
        )
        if not _reads_late(self.team.device):
            self._read()

    def _of_all(self, outcome: Outcome) -> list[Tensor]:
        """The loss and the measures of the whole step: counts added up, numbers averaged."""
        values = [value.detach() for value in (outcome.loss, *outcome.measures.values())]
        if self.team.size == 1:
            return values
        flat = self.team.total(torch.cat([value.reshape(-1).double() for value in values]))
        parts = flat.split([value.numel() for value in values])
        return [
            part.view(value.shape) if value.dim() else part[0] / self.team.size
            for part, value in zip(parts, values, strict=True)
        ]

    def _read(self) -> None:
        """Write down the step that was logged last, if it is not yet."""
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        unread.there()
        step, speed, loss = unread.step, unread.images_per_second, unread.loss.item()
        steps = self.recipe.epochs * self.per_epoch
        if not math.isfinite(loss):
            raise BadRecipeError(
                f"the loss is {loss} at step {step} of {steps}; training has diverged at rate "
                f"{self.recipe.rate}; a third of that rate is worth a try"
            )
        measures = {name: read_measure(value) for name, value in unread.measures.items()}
        self._measures = {"loss": loss, **measures}
        self.journal.show(Progress(step, steps, unread.epoch, loss, speed, measures))
        self._record({"step": step, "loss": loss, "images_per_second": speed, **measures})

    def close_epoch(self, numbers: Mapping[str, float]) -> None:
        self._read()
        entry = {"epoch": float(self.epoch + 1), "step": float(self.done), **numbers}
        self.history.epochs.append(entry)
        self._record(entry)
        score = numbers.get("score", -math.inf)
        if self.recipe.keep_best and score > self.history.best:
            self.history.best = score
            self.best_weights = deepcopy(whole(dict(self.model.state_dict())))
        self._logged = time.monotonic()  # so that evaluation does not count as training time

    def finish(self) -> None:
        if self.best_weights is not None:
            self._load(self.best_weights)
        self.history.seconds += time.monotonic() - self._started
        if self._writer is not None:
            self._writer.close()

    def paused(self, asked: bool) -> bool:
        """Save if it is time to, or if it was `asked` to stop here, which is what is returned."""
        if self.team.size > 1 and self.done % _AGREED_EVERY:
            return False  # all of them have to save together
        due = time.monotonic() - self._saved > self.journal.checkpoint_every
        stops, saves = self.team.any_of(asked, due and self.team.leads)
        if stops or saves:
            self.save()
        return stops

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        mine = self.model.state_dict()
        self.model.load_state_dict(
            {name: dealt_like(value, mine[name]) for name, value in weights.items()}
        )

    def save(self) -> None:
        self._read()  # a resumed run will not log these steps again
        if self.folder is None:
            return
        now = time.monotonic()
        self.history.seconds += now - self._started
        self._saved = self._started = now
        state = self._state()
        if not self.team.leads:
            return
        save_training(self.folder / "training.pt", state)
        if self._writer is not None:
            self._writer.flush()  # a resumed run writes again only what came after

    def _state(self) -> dict[str, Any]:
        """What the run goes on from; all processes have to ask for it together."""
        weights, optimizer = (
            whole(dict(self.model.state_dict())),
            whole(self.optimizer.state_dict()),
        )
        return {
            **self._identity,
            "done": self.done,
            "model": weights,
            "optimizer": optimizer,
            "history": dataclasses.asdict(self.history),
            "best_weights": self.best_weights,
            "generator": torch.get_rng_state(),
        }

    def enter_if_due(self) -> None:
        """Make an entry in the diary, if there is one and it is time to."""
        if self.journal.diary is None:
            return
        if self.team.size > 1 and self.done % _AGREED_EVERY:
            return  # all of them have to do it together
        due = self.journal.diary.due(self.done)
        if self.team.size > 1:
            (due,) = self.team.any_of(due and self.team.leads)
        if due:
            self.enter()

    def enter(self, *, last: bool = False) -> None:
        """Make an entry in the diary, if there is one."""
        if self.journal.diary is None:
            return
        self._read()
        self.entered = self.done
        state = self._state()
        if not self.team.leads:
            return
        moment = Moment(
            self.done,
            surgery.plain_state(self.model, state["model"]),
            state,
            dataclasses.asdict(self.recipe),
            self._identity["data"],
            self._measures,
            last or self.done == self.recipe.epochs * self.per_epoch,
        )
        self.journal.diary.enter(moment)

    def restore(self) -> None:
        if not self.journal.resume or self.folder is None:
            return
        state = self.team.from_leader(partial(self._found, self.folder / "training.pt"))
        if state is None:
            return
        self._load(state["model"])
        self.optimizer.load_state_dict(self._dealt(state["optimizer"]))
        self.done = self._logged_step = state["done"]
        self.history = History(**state["history"])
        self.best_weights = state["best_weights"]
        if self.team.leads:
            torch.set_rng_state(state["generator"])
        else:
            torch.manual_seed(self.recipe.seed + self.team.rank + self.team.size * self.done)

    def _found(self, path: Path) -> dict[str, Any] | None:
        """The checkpoint at `path`, once it is known to be one of this run; None without one."""
        if not path.exists():
            return None
        state = load_training(path)
        # Earlier versions wrote no fields that have come since.
        state["recipe"] = {**dataclasses.asdict(Recipe()), **state.get("recipe", {})}
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise BadRecipeError(
                    f"{self.folder} holds a run with another {name}; resuming needs the same one: "
                    "repeat the options of the first call, or start in an empty folder"
                )
        if _shapes(self.model.state_dict()) != _shapes(state["model"]):
            raise BadRecipeError(
                f"{self.folder} holds a run with another network; resuming needs the same one: "
                "repeat the options of the first call, or start in an empty folder"
            )
        return state

    def _dealt(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """A whole optimiser's state, each parameter's part as that parameter is dealt out."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            index: {name: dealt_like(value, parameters[index]) for name, value in each.items()}
            for index, each in optimizer["state"].items()
        }
        return {**optimizer, "state": state}

    def open_log(self) -> None:
        if self.folder is None or not self.team.leads:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        # A killed run has logged steps that its checkpoint does not hold; they will be run again.
        known = path.read_text().splitlines() if self.done and path.exists() else []
        kept = [line for line in known if self._is_saved(line)]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        if self.journal.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 (optional extra)

            # Written again from the log: TensorBoard orders event files by the second they were
            # begun in, and would drop a continuation that begins in the second of its predecessor.
            for events in self.folder.glob("events.out.tfevents.*"):
                events.unlink()
            self._writer = SummaryWriter(str(self.folder))
            for line in kept:
                self._draw(json.loads(line))

    def _is_saved(self, line: str) -> bool:
        try:
            entry = json.loads(line)
        except ValueError:  # the run was killed in the middle of writing it
            return False
        return entry["step"] <= self.done and entry.get("epoch", 0) <= self.epoch

    def _record(self, entry: Mapping[str, float]) -> None:
        if self.folder is None or not self.team.leads:
            return
        with (self.folder / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(dict(entry)) + "\n")
        self._draw(entry)

    def _draw(self, entry: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in entry.items():
                self._writer.add_scalar(name, value, int(entry["step"]))


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}
