"""The networks that are compared, each made ready to run once as often as one likes."""

import itertools
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from nnpassport import surgery
from nnpassport.data.images import CIFAR10
from nnpassport.fork import forked_at
from nnpassport.layers import Branch, on_branch
from nnpassport.models import build
from nnpassport.scheme import BadRecipeError, Batch
from nnpassport.schemes.passport import V1, V2, V3, Passport
from nnpassport.training import PRECISIONS, Objective, Recipe, classification

SCHEMES: Mapping[str, Passport] = {"V1": V1, "V2": V2, "V3": V3}
SLOW_REFERENCE = Path(__file__).parents[3] / "benchmarks" / "slow_reference.py"
"""A step as the published code runs it; in a checkout, and not in an installed package."""


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to time.

    Attributes:
        task: "train", a step of `fit` (forward, backward, SGD), or "infer", a forward.
        network: "plain"; to train also "V1", "V2", "V3", as the published code runs them "slow V1",
            "slow V2", "slow V3", and "forked": plain, but for a batch that is doubled where V2's
            is; to infer "V1 presented", "V1 folded", "V2 released".
        norm: as in `build`; the paper's V1 has batch norm, V2 and V3 have group norm.
        width: as in `build`; other than 1 only in tests.
    """

    architecture: str
    batch: int
    precision: str
    task: str
    network: str
    norm: str
    width: float = 1.0

    @property
    def group(self) -> tuple[str, int, str, str]:
        """What cells that can be compared have in common."""
        return self.architecture, self.batch, self.precision, self.task


_NETWORKS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "infer": (
        ("plain", "batch"),
        ("V1 presented", "batch"),
        ("V1 folded", "batch"),
        ("plain", "group"),
        ("V2 released", "group"),
    ),
    "train": (
        ("plain", "batch"),
        ("V1", "batch"),
        ("slow V1", "batch"),
        ("plain", "group"),
        ("forked", "group"),
        ("V2", "group"),
        ("V3", "group"),
        ("slow V2", "group"),
        ("slow V3", "group"),
    ),
}


def cells(
    architectures: Sequence[str], batches: Sequence[int], precisions: Sequence[str]
) -> tuple[Cell, ...]:
    """Every network of the paper's Table 4 and what it is to be compared with; cheap ones first."""
    return tuple(
        Cell(architecture, batch, precision, task, network, norm)
        for precision, batch, architecture in itertools.product(precisions, batches, architectures)
        for task, networks in _NETWORKS.items()
        for network, norm in networks
    )


QUICK = cells(("alexnet", "resnet18"), (64,), ("float32",))
FULL = cells(("alexnet", "resnet18"), (64, 256), ("float32", "bfloat16"))


def default_device() -> str:
    """CUDA if there is any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(cell: Cell, device: str) -> Callable[[], object]:
    """A function that runs the cell once: one training step, or one forward."""
    if cell.network not in dict(_NETWORKS[cell.task]):
        raise BadRecipeError(
            f"{cell.network!r} is no network to {cell.task}; there are: "
            f"{', '.join(dict(_NETWORKS[cell.task]))}"
        )
    return {"train": _training_step, "infer": _inference}[cell.task](cell, device)


def _training_step(cell: Cell, device: str) -> Callable[[], None]:
    model = _network(cell)
    objective = _objective(cell, model)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    recipe = Recipe()
    optimizer = torch.optim.SGD(
        (p for p in model.parameters() if p.requires_grad),
        lr=recipe.rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )
    images, labels = _images(cell, device)
    steps = itertools.count()

    def step() -> None:
        with _precision(cell, device):
            outcome = objective(model, Batch(images, labels, next(steps)))
        outcome.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _objective(cell: Cell, model: nn.Module) -> Objective:
    if cell.network == "plain":
        return classification
    example = torch.zeros(2, 3, 32, 32)
    if cell.network == "forked":
        return _forked(model, example)
    scheme = SCHEMES[cell.network.removeprefix("slow ")]
    key = scheme.draw_key(model, example, seed=bytes(32))
    if cell.network.startswith("slow "):
        slow = runpy.run_path(str(SLOW_REFERENCE))["objective"]
        return slow(scheme, model, key, example, CIFAR10)
    scheme.insert(model, key, example)
    return scheme.objective(key, steps=1, normalise=CIFAR10)


def _forked(model: nn.Module, example: Tensor) -> Objective:
    """What two branches cost on this device at least: V2's shapes, and nothing else of it."""
    V2.insert(model, V2.draw_key(model, example, seed=bytes(32)), example)
    norms = forked_at(model)
    surgery.remove(model)
    for name in norms:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output: torch.cat([output, output])
        )
    return lambda model, batch: classification(
        model, Batch(batch.images, torch.cat([batch.labels, batch.labels]))
    )


def _inference(cell: Cell, device: str) -> Callable[[], Tensor]:
    model = _network(cell)
    if cell.network != "plain":
        name, state = cell.network.split()
        scheme, example = SCHEMES[name], torch.zeros(2, 3, 32, 32)
        scheme.insert(model, scheme.draw_key(model, example, seed=bytes(32)), example)
        model = model if state == "presented" else scheme.released(model)
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    images, _ = _images(cell, device)

    def infer() -> Tensor:
        with torch.no_grad(), _precision(cell, device):
            return model(images)

    return infer


def _network(cell: Cell) -> nn.Module:
    return build(cell.architecture, norm=cell.norm, width=cell.width)


def _images(cell: Cell, device: str) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(cell.batch, 3, 32, 32, generator=rng)
    labels = torch.randint(10, (cell.batch,), generator=rng)
    return images.to(device, memory_format=torch.channels_last), labels.to(device)


def _precision(cell: Cell, device: str) -> torch.autocast:
    dtype = PRECISIONS[cell.precision]
    return torch.autocast(device, dtype, enabled=dtype is not None)


def lower_bound(architecture: str) -> float:
    """1 + (FLOPs after the fork) / (all FLOPs): what a step of two branches must cost at least.

    The fork is at the norm of the first passport layer: that layer itself is in the trunk, and so
    is every other passport layer on the same input.
    """
    flops = _flops(architecture)
    return 1 + flops.after_fork / (flops.trunk + flops.after_fork)


def work(cell: Cell) -> float:
    """About the FLOPs of one run of the cell, to share out time by."""
    flops = _flops(cell.architecture)
    private = flops.after_fork if cell.network in {"forked", "V2", "V3"} else 0
    again = flops.trunk + flops.after_fork if cell.network in {"slow V2", "slow V3"} else 0
    forward = flops.trunk + flops.after_fork + private + again
    return cell.batch * forward * (3 if cell.task == "train" else 1)


class _Flops(NamedTuple):
    trunk: int
    after_fork: int


@cache
def _flops(architecture: str) -> _Flops:
    """FLOPs of convolutions and linear layers in one image's forward.

    A backward has twice as many in each layer, so shares are the same for a whole step.
    """
    model, example = build(architecture, norm="group"), torch.zeros(2, 3, 32, 32)
    V2.insert(model, V2.draw_key(model, example, seed=bytes(32)), example)
    trunk: list[int] = []
    after_fork: list[int] = []

    def count(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        counted = after_fork if len(args[0]) > len(example) else trunk
        counted.append(2 * output[0].numel() * layer.get_parameter("weight")[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad(), on_branch(model, Branch.BOTH):
        model(example)
    return _Flops(sum(trunk), sum(after_fork))
