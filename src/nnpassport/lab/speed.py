"""Training steps by themselves, and how fast a training ran: its share of the device's peak."""

import json
import re
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nnpassport.catalog import scheme_named, with_settings
from nnpassport.data.images import CIFAR10
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import draw_by_layer
from nnpassport.embedding.train.loop import Objective, classification
from nnpassport.lab.cells import Cell, embed_recipe, settings_of
from nnpassport.lab.descent import descent, random_batch

Arguments = tuple[tuple[str, Any], ...]
SIDE = 32

PEAKS: Mapping[str, Mapping[str, float]] = {
    "H100": {"bfloat16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "H200": {"bfloat16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12},
    "A100": {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
}
"""FLOPs a second at most, dense: data sheets of NVIDIA's H100 SXM, H200 SXM and A100."""
_SLOWER = {"PCIE": ("H100", "H200"), "NVL": ("H100", "H200"), "MIG": tuple(PEAKS)}


class Trained(NamedTuple):
    """What a training step depends on, but for its batch and precision.

    Attributes:
        arguments: of the architecture, beside classes and norm.
        scheme: as in the catalog; "" is a plain network.
        settings: of the scheme, beside the catalog's.
    """

    architecture: str
    arguments: Arguments
    norm: str
    scheme: str = ""
    settings: Arguments = ()

    @classmethod
    def of(cls, cell: Cell) -> "Trained":
        """What the cell's network is trained as."""
        network, plan = cell.network, cell.plan
        arguments = tuple(sorted(plan.architectures[network.architecture].items()))
        settings = tuple(sorted(settings_of(plan, network.scheme).items()))
        return cls(network.architecture, arguments, network.norm, network.scheme, settings)

    @property
    def plain(self) -> "Trained":
        """The same without a mark: what is fine-tuned or attacked."""
        return self._replace(scheme="", settings=())

    def network(self) -> nn.Module:
        """An untrained one. Ten classes whatever the task: the head hardly matters."""
        return build(
            self.architecture, **{"classes": 10, "norm": self.norm, **dict(self.arguments)}
        )


def peak(device: str, precision: str) -> float | None:
    """FLOPs a second of a device by its name, at most; None where they are not known.

    Cards of the same name that are slower (PCIe, NVL), and slices of one (MIG), are not known.
    """
    words = re.split(r"[^A-Z0-9]+", device.upper())
    for name, peaks in PEAKS.items():
        if name in words and not any(w in words and name in slow for w, slow in _SLOWER.items()):
            return peaks.get(precision)
    return None


def training_speed(cell: Cell, folder: Path, device: str) -> dict[str, float | None]:
    """Images and FLOPs a second, of the journal's median, and the share of peak; {} without one.

    FLOPs are those of a whole step: triggers and passports too, and no gradient that nobody needs.
    Where the device's peak is not known, as of processors, its share is None.
    """
    path = folder / "training" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    speeds = [e["images_per_second"] for e in map(json.loads, lines) if "images_per_second" in e]
    if not speeds:
        return {}
    speed, recipe = statistics.median(speeds), embed_recipe(cell.plan, cell.network)
    if cell.network.tuned:  # its key may take pictures, made in a trained network: nothing to count
        return {"images_per_second": round(speed, 1)}
    flops = speed * step_flops(Trained.of(cell), recipe.batch) / recipe.batch
    most = peak(device, recipe.precision)
    return {
        "images_per_second": round(speed, 1),
        "flops_per_second": flops,
        "share_of_peak": flops / most if most else None,
    }


@cache
def step_flops(trained: Trained, batch: int) -> float:
    """FLOPs of one training step, as PyTorch counts them."""
    few, more = 2, 4
    counts = []
    for size in (few, more):
        # Ten classes and random weights: what is drawn for it is nobody else's to miss.
        with torch.random.fork_rng(devices=[]):
            step = training_step(trained, size, device="cpu")
            with FlopCounterMode(display=False) as counter:
                step()
        counts.append(counter.get_total_flops())
    # A multiple of the images, and what is there once a step: γ and β, and the triggers.
    return counts[0] + (counts[1] - counts[0]) / (more - few) * (batch - few)


def training_step(
    trained: Trained, batch: int, *, precision: str = "float32", device: torch.device | str
) -> Callable[[], None]:
    """A function that does one step, on images that are there, of a network that is made for it."""
    model = trained.network()
    objective: Objective = classification
    if trained.scheme:
        example = torch.zeros(2, 3, SIDE, SIDE)
        chosen = with_settings(scheme_named(trained.scheme), **dict(trained.settings))
        key = draw_by_layer(chosen, model, example, seed=bytes(32))
        chosen.insert(model, key, example)
        objective = chosen.objective(key, steps=1, normalise=CIFAR10)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    images = random_batch((batch, 3, SIDE, SIDE), device)
    return descent(model, objective, images, repeat(0), precision=precision)
