"""Table 4: what passports cost in training, inference and verification."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnpassport.data.images import CIFAR10
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V1, V2, V3, Passport, draw_by_layer
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.ground.progress import Listener
from nnpassport.keys.key import Key
from nnpassport.lab.bench import Case, cases, collect
from nnpassport.lab.results import read_json, write_json
from nnpassport.lab.timing import in_turns
from nnpassport.scheme import Verdict

NAME = "costs.json"
BATCHES: Mapping[str, int] = {"alexnet": 64, "resnet18": 64, "resnet50": 16}
"""Images a step; ResNet-50 has fewer so that its many turns fit into minutes on a processor."""

MINUTES = 30.0
"""For training and inference at most; what does not fit is named as not run."""

VERIFICATIONS = 5
"""How often V is timed, each time with another key."""


def measure_costs(
    results: Path,
    *,
    quick: bool = False,
    minutes: float = MINUTES,
    show: Listener = lambda *_: None,
) -> dict[str, Any]:
    """Measure all of Table 4 and write it into the folder of results; not again where it is there.

    Times of training and inference are ratios of networks that run in turns, as `bench` does.
    Verification is in seconds: V in white box, and for V3 in black box too; every turn is kept,
    and their median. Where there is no checkout, the published code's cost is in "not_run".
    `quick` takes narrow networks, to try it out: its file says so and is not taken for the
    measurement.

    Raises:
        UnwritableOutputError: the folder of results cannot be written to.
    """
    path = results / (f"quick-{NAME}" if quick else NAME)
    if path.exists():
        return read_json(path)
    measured = collect(
        _cases(quick=quick), repeats=2 if quick else 7, minutes=minutes, memory=False, show=show
    )
    turns = {
        name: verifications(name, quick=quick) for name in (("alexnet",) if quick else BATCHES)
    }
    report = {
        **measured,
        "quick": quick,
        "verification": {
            name: {title: statistics.median(seconds) for title, seconds in of.items()}
            for name, of in turns.items()
        },
        "verification_turns": turns,
    }
    write_json(path, report)
    return report


def _cases(*, quick: bool) -> list[Case]:
    if quick:
        found = cases(("alexnet",), (8,), ("float32",))
        return [Case(**{**_fields(case), "width": 0.25}) for case in found]
    return [
        case
        for architecture, batch in BATCHES.items()
        for case in cases((architecture,), (batch,), ("bfloat16",))
    ]


def _fields(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in Case.__dataclass_fields__}


def verifications(architecture: str, *, quick: bool) -> dict[str, list[float]]:
    """Seconds of V, turn by turn: bits off the weights, by scheme; and V3's answers to triggers."""
    found = {}
    for title, scheme, norm in (("V1", V1, "batch"), ("V2", V2, "group"), ("V3", V3, "group")):
        model = build(architecture, norm=norm, width=0.25 if quick else 1.0).eval()
        found[title] = _seconds(partial(scheme.verify, model.state_dict()), _keys(scheme, model))
        if scheme.triggers:
            verify = partial(_by_triggers, scheme, model)
            found[f"{title} by triggers"] = _seconds(verify, _keys(scheme, model))
    return found


def _keys(scheme: Passport, model: nn.Module) -> list[Key]:
    """A new key for each turn: a key keeps what it has derived."""
    example = torch.zeros(2, 3, 32, 32)
    return [
        draw_by_layer(scheme, model, example, seed=bytes([i] * 32)) for i in range(VERIFICATIONS)
    ]


def _by_triggers(scheme: Passport, model: nn.Module, key: Key) -> Verdict:
    return scheme.verify_answers(answers_to(key, model, CIFAR10), key)


def _seconds(verify: Callable[[Key], Verdict], keys: Sequence[Key]) -> list[float]:
    left = iter(keys)
    timed = in_turns({"V": lambda: verify(next(left))}, repeats=len(keys), warmup=0)
    return [*timed["V"].seconds]
