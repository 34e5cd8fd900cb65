"""Table 4: what passports cost in training, inference and verification."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnpassport.bench import Cell, cells, collect
from nnpassport.data.images import CIFAR10
from nnpassport.evidence.key import Key
from nnpassport.files import write_atomically
from nnpassport.models import build
from nnpassport.scheme import Verdict
from nnpassport.schemes.passport import V1, V2, V3, Passport
from nnpassport.schemes.triggers import answers_to

NAME = "costs.json"
BATCHES: Mapping[str, int] = {"alexnet": 64, "resnet18": 64, "resnet50": 16}
"""Images a step; a step of ResNet-50 with 64 takes half a minute on a processor core."""

Show = Callable[[float, float, str], None]
_REPEATS = 5


def measure_costs(
    results: Path,
    *,
    quick: bool = False,
    minutes: float = 30.0,
    show: Show = lambda *_: None,
) -> dict[str, Any]:
    """Measure all of Table 4 and write it into the folder of results; not again where it is there.

    Times of training and inference are ratios of networks that run in turns, as `bench` does.
    Verification is in seconds: V in white box, and for V3 in black box too. `quick` takes narrow
    networks, to try it out: its file says so and is not taken for the measurement.
    """
    path = results / (f"quick-{NAME}" if quick else NAME)
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    measured = collect(
        _cells(quick=quick), repeats=2 if quick else 7, minutes=minutes, memory=False, show=show
    )
    names = ("alexnet",) if quick else tuple(BATCHES)
    report = {
        **measured,
        "quick": quick,
        "verification": {name: verification_seconds(name, quick=quick) for name in names},
    }
    write_atomically(path, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _cells(*, quick: bool) -> list[Cell]:
    if quick:
        found = cells(("alexnet",), (8,), ("float32",))
        return [Cell(**{**_fields(cell), "width": 0.25}) for cell in found]
    return [
        cell
        for architecture, batch in BATCHES.items()
        for cell in cells((architecture,), (batch,), ("bfloat16",))
    ]


def _fields(cell: Cell) -> dict[str, Any]:
    return {name: getattr(cell, name) for name in Cell.__dataclass_fields__}


def verification_seconds(architecture: str, *, quick: bool) -> dict[str, float]:
    """Median seconds of V: bits off the weights, by scheme; and V3's triggers, answers included."""
    found = {}
    for title, scheme, norm in (("V1", V1, "batch"), ("V2", V2, "group"), ("V3", V3, "group")):
        model = build(architecture, norm=norm, width=0.25 if quick else 1.0).eval()
        example = torch.zeros(2, 3, 32, 32)
        weights = model.state_dict()
        # Another seed each time: a key keeps what it has derived.
        keys = [scheme.draw_key(model, example, seed=bytes([i] * 32)) for i in range(_REPEATS)]
        found[title] = _median(partial(scheme.verify, weights), keys)
        if scheme.triggers:
            found[f"{title} by triggers"] = _median(partial(_by_triggers, scheme, model), keys)
    return found


def _by_triggers(scheme: Passport, model: nn.Module, key: Key) -> Verdict:
    return scheme.verify_answers(answers_to(key, model, CIFAR10), key)


def _median(verify: Callable[[Key], Verdict], keys: Sequence[Key]) -> float:
    times = []
    for key in keys:
        begun = time.perf_counter()
        verify(key)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)
