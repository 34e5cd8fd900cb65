"""Does this device compute what the CPU computes? Losses, bits, resuming, and who waits for it.

Started by `run.py`; alone: python benchmarks/accelerator/checks.py OUT.json [--small]
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.attacks.passports import affine_of
from nnpassport.data.images import CIFAR10, ImageSet
from nnpassport.embedding.network.layers import passport_norms
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V1, V2, V3, Passport
from nnpassport.embedding.train.loop import Evaluation, Journal, Objective, Outcome, Recipe, fit
from nnpassport.embedding.train.team import together
from nnpassport.lab.results import write_json
from nnpassport.report.provenance import device_name
from nnpassport.scheme import Batch

SCHEMES: Mapping[str, tuple[Passport, str]] = {
    "V1": (V1, "batch"),
    "V2": (V2, "group"),
    "V3": (V3, "group"),
}
TOLERANCE = 1e-4
"""Of a loss in float32, relative where it is above 1."""
UNSURE = 1e-6
"""A γ nearer to zero than this has no sign that two ways to add it up must agree on."""
RECIPE = Recipe(epochs=1, batch=64, rate=0.01, schedule="constant")
STEPS = 8
WAITS = "called a synchronizing CUDA operation"


class Run(NamedTuple):
    """What came of a training: the loss of each step, weights, γ as computed where it ran."""

    losses: list[float]
    weights: dict[str, Tensor]
    gammas: Tensor


def images(count: int) -> ImageSet:
    """Noise: nothing is to be learnt here."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=rng, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(count) % 10, tuple("0123456789"))


def train(
    name: str,
    recipe: Recipe,
    *,
    width: float,
    steps: int = STEPS,
    journal: Journal | None = None,
    evaluate: Evaluation | None = None,
    watch: Callable[[Objective], Objective] = lambda objective: objective,
) -> Run:
    """Train an AlexNet with this scheme on noise, on whatever device there is."""
    scheme, norm = SCHEMES[name]
    torch.manual_seed(0)
    model = build("alexnet", classes=10, norm=norm, width=width)
    example = torch.zeros(2, 3, 32, 32)
    key = scheme.draw_key(model, example, seed=bytes(32))
    scheme.insert(model, key, example)
    inner = scheme.objective(key, steps=recipe.epochs * steps, normalise=CIFAR10)
    losses: list[Tensor] = []

    def objective(network: nn.Module, batch: Batch) -> Outcome:
        outcome = inner(network, batch)
        losses.append(outcome.loss.detach())  # read at the end: this must not wait either
        return outcome

    data = images(steps * recipe.batch)
    fit(
        model,
        watch(objective),
        data,
        recipe,
        normalise=CIFAR10,
        journal=journal,
        evaluate=evaluate,
    )
    with torch.no_grad():
        gammas = torch.cat([norm.affine()[0] for norm in passport_norms(model).values()]).cpu()
    weights = {key: value.cpu() for key, value in model.state_dict().items()}
    read = torch.cat([gamma for gamma, _ in affine_of(key, weights).values()])
    _same_bits(gammas, read, f"{name}: γ read on the device and on the CPU")
    return Run([float(loss) for loss in losses], weights, gammas)


class WrongError(Exception):
    """The device does not do what it must."""


def _same_bits(one: Tensor, other: Tensor, what: str, unsure: float = UNSURE) -> None:
    sure = (one.abs() > unsure) & (other.abs() > unsure)
    differ = int(((one.sign() != other.sign()) & sure).sum())
    if differ:
        raise WrongError(f"{what}: {differ} of {len(one)} bits differ")


def compare(here: Mapping[str, Run], there: Mapping[str, Run]) -> dict[str, Any]:
    """Losses to `TOLERANCE`, and bits, of two devices.

    Raises:
        WrongError: they differ by more.
    """
    found = {}
    for name, mine in here.items():
        theirs = there[name]
        pairs = list(zip(mine.losses, theirs.losses, strict=True))
        apart = torch.tensor([abs(a - b) / max(1.0, abs(b)) for a, b in pairs])
        worst = float(apart.max())  # which is not a number if any is; Python's max is not
        found[name] = {"losses": mine.losses, "on_cpu": theirs.losses, "largest_difference": worst}
        if not worst <= TOLERANCE:
            raise WrongError(
                f"{name}: losses differ by {worst:.1e}; at most {TOLERANCE:g} is right"
            )
        # Weights that were trained apart differ by rounding, and so do γ next to zero.
        _same_bits(mine.gammas, theirs.gammas, f"{name}: bits of both trainings", TOLERANCE)
        found[name]["bits"] = len(mine.gammas)
    return found


def resumed(width: float) -> dict[str, Any]:
    """A run that is interrupted and goes on ends with the weights of one that was not.

    Raises:
        WrongError: it does not.
    """
    recipe = Recipe(epochs=2, batch=64, rate=0.01, schedule="one-cycle")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        straight, again = (train("V2", recipe, width=width, steps=4) for _ in range(2))
        noise = _difference(straight, again)
        with tempfile.TemporaryDirectory() as folder:
            journal = Journal(Path(folder), resume=True)
            try:
                train("V2", recipe, width=width, steps=4, journal=journal, evaluate=_interrupting)
            except KeyboardInterrupt:
                pass
            else:
                raise WrongError("a run that was asked to stop went on")
            continued = train("V2", recipe, width=width, steps=4, journal=journal)
    finally:
        torch.use_deterministic_algorithms(False)
    found = {"difference": _difference(straight, continued), "of_two_straight_runs": noise}
    if not found["difference"] <= noise:
        raise WrongError(f"resumed weights are others: {found}")
    return found


def _interrupting(_model: nn.Module) -> dict[str, float]:
    signal.raise_signal(signal.SIGTERM)
    return {}


def _difference(one: Run, other: Run) -> float:
    pairs = ((value, other.weights[name]) for name, value in one.weights.items())
    return float(torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs]).max())


def waits(width: float) -> dict[str, list[str]]:
    """Where a step of each scheme makes the CPU wait for the device: nowhere, if all is well.

    Watched from the first step of an epoch to its last, batches and logging included; the first
    epoch, in which things are brought to the device, is not.
    """
    recipe = Recipe(epochs=2, batch=64, rate=0.01, precision="bfloat16")
    found = {}
    for name in SCHEMES:
        seen: list[str] = []

        def watching(objective: Objective) -> Objective:
            def watched(model: nn.Module, batch: Batch) -> Outcome:
                if batch.step > 25:  # the second epoch has begun
                    torch.cuda.set_sync_debug_mode("warn")
                return objective(model, batch)

            return watched

        def unwatch(_model: nn.Module) -> dict[str, float]:
            torch.cuda.set_sync_debug_mode("default")
            return {}

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(name, recipe, width=width, steps=25, watch=watching, evaluate=unwatch)
        seen += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if WAITS in str(w.message)]
        found[name] = sorted(set(seen))
    return found


def check(out: Path, *, small: bool) -> dict[str, Any]:
    """All checks, written to `out`; what is wrong is in "wrong", and nothing is if all is well."""
    width = 0.125 if small else 1.0
    torch.backends.cudnn.allow_tf32 = False  # of matrices it is so already
    facts: dict[str, Any] = {"device": device_name(), "torch": torch.__version__, "wrong": []}
    with tempfile.TemporaryDirectory() as folder:
        child = _on_the_cpu(Path(folder) / "cpu.pt", width)
        parts: dict[str, Callable[[], Any]] = {
            "losses": lambda: compare(
                {name: train(name, RECIPE, width=width) for name in SCHEMES},
                _of_child(child, Path(folder) / "cpu.pt"),
            ),
            "resumed": lambda: resumed(width),
        }
        if together().device.type == "cuda":
            parts["waits"] = lambda: waits(width)
        for name, part in parts.items():
            try:
                facts[name] = part()
            except Exception as error:  # the other checks say something all the same
                facts["wrong"].append(f"{name}: {type(error).__name__}: {error}")
        child.kill()
        child.wait()
    if any(facts.get("waits", {}).values()):
        facts["wrong"].append(f"steps wait for the device: {facts['waits']}")
    write_json(out, facts)
    return facts


def _on_the_cpu(out: Path, width: float) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, __file__, str(out), "--child", str(width)]
    return subprocess.Popen(command, env=environment)


def _of_child(child: "subprocess.Popen[bytes]", out: Path) -> dict[str, Run]:
    if child.wait():
        raise WrongError(f"the CPU's part ended with exit code {child.returncode}")
    loaded: dict[str, list[Any]] = torch.load(out, weights_only=True)
    return {name: Run(*run) for name, run in loaded.items()}


def main() -> int:
    """As a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        runs = {name: list(train(name, RECIPE, width=options.child)) for name in SCHEMES}
        torch.save(runs, options.out)
        return 0
    facts = check(options.out, small=options.small)
    print("\n".join(facts["wrong"]) or "this device computes what the CPU computes")
    return 1 if facts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
