"""How fast steps are, alone on the device, and where their time goes.

Started by `run.py`; alone: python benchmarks/accelerator/steps.py OUT.json [--small]
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nnpassport.data.images import CIFAR10, ImageSet
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V1, V2, V3, Passport
from nnpassport.embedding.train.loop import Outcome, Recipe, classification, fit
from nnpassport.embedding.train.team import together
from nnpassport.lab.plans import GPU
from nnpassport.lab.results import write_json
from nnpassport.lab.speed import Trained, peak, step_flops
from nnpassport.report.provenance import device_name
from nnpassport.scheme import Batch

SCHEMES: Mapping[str, Passport] = {"passport-v1": V1, "passport-v2": V2, "passport-v3": V3}
NETWORKS = (
    ("alexnet", "group", ""),
    ("alexnet", "group", "passport-v2"),
    ("resnet18", "group", ""),
    ("resnet18", "group", "passport-v2"),
)
TRACED = NETWORKS[-1]


class Window(NamedTuple):
    """Steps to time and steps to trace, counted from 0."""

    warm: int = 15
    timed: int = 40
    traced: int = 10

    @property
    def steps(self) -> int:
        """All of them, and one after: it marks the end of the last."""
        return self.warm + self.timed + self.traced + 2


def measure(
    architecture: str,
    norm: str,
    scheme: str,
    *,
    recipe: Recipe,
    window: Window,
    width: float = 1.0,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Images a second of `fit` itself, batches and logging included, and what the device did."""
    torch.manual_seed(0)
    model, objective = build(architecture, classes=10, norm=norm, width=width), classification
    example = torch.zeros(2, 3, 32, 32)
    if scheme:
        passport = SCHEMES[scheme]
        key = passport.draw_key(model, example, seed=bytes(32))
        passport.insert(model, key, example)
        objective = passport.objective(key, steps=window.steps, normalise=CIFAR10)
    device = together().device
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    profiler = profile(activities=kinds)
    marks: dict[str, float] = {}

    def watched(network: nn.Module, batch: Batch) -> Outcome:
        place = batch.step - window.warm
        if place in {0, window.timed}:
            _drain(device)
            marks["begun" if place == 0 else "ended"] = time.perf_counter()
        if place == window.timed:
            profiler.start()
        if place == window.timed + window.traced:
            _drain(device)
            profiler.stop()
        return objective(network, batch)

    rng = torch.Generator().manual_seed(0)
    count = window.steps * recipe.batch
    pixels = torch.randint(256, (count, 3, 32, 32), generator=rng, dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(count) % 10, tuple("0123456789"))
    fit(model, watched, data, recipe, normalise=CIFAR10)
    speed = window.timed * recipe.batch / (marks["ended"] - marks["begun"])
    trained = Trained(architecture, (("width", width),), norm, scheme)
    flops = speed * step_flops(trained, recipe.batch) / recipe.batch
    most = peak(device_name(), recipe.precision)
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return {
        "network": " ".join(filter(None, (architecture, norm, scheme))),
        "batch": recipe.batch,
        "precision": recipe.precision,
        "images_per_second": speed,
        "flops_per_second": flops,
        "share_of_peak": flops / most if most else None,
        **_where(profiler, window.traced),
    }


def _where(profiler: profile, steps: int) -> dict[str, Any]:
    """What ran on the device, how much of the time something did, and what the host waited for."""
    events = profiler.events() or []
    kernels = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if "CUDA" in str(e.device_type) and not getattr(e, "is_user_annotation", False)
    ]
    averages = profiler.key_averages()
    host = sorted(averages, key=lambda e: -e.self_cpu_time_total)[:12]
    return {
        **of_device(kernels, steps),
        "host": [
            {
                "what": e.key,
                "ms_a_step": e.self_cpu_time_total / 1000 / steps,
                "calls": e.count / steps,
            }
            for e in host
        ],
        "waits_a_step": {
            e.key: e.count / steps for e in averages if "Synchronize" in e.key and e.count >= steps
        },
    }


def of_device(kernels: Iterable[tuple[float, float, str]], steps: int) -> dict[str, Any]:
    """Share of the time that the device is busy, its gaps, and the kernels that take longest.

    Kernels are (start, end, name) in microseconds; those at the same time count once.
    """
    ordered = sorted(kernels)
    if not ordered:
        return {"busy": None, "kernels": []}
    busy, gaps, last = 0.0, [], ordered[0][0]
    took: dict[str, list[float]] = defaultdict(list)
    for start, end, name in ordered:
        if start > last:
            gaps.append((start - last, name))
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
        took[name].append(end - start)
    whole = last - ordered[0][0]
    longest = sorted(took.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "busy": busy / whole if whole else 1.0,
        "ms_a_step": whole / 1000 / steps,
        "kernels_a_step": len(ordered) / steps,
        "longest_gaps": [{"us": us, "before": name[:90]} for us, name in sorted(gaps)[-5:][::-1]],
        "kernels": [
            {"what": n[:90], "share": sum(t) / busy if busy else 0.0, "calls": len(t) / steps}
            for n, t in longest
        ],
    }


def _drain(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(out: Path, *, small: bool) -> list[dict[str, Any]]:
    """Every network of `NETWORKS`, written to `out` after each."""
    window = Window(2, 2, 1) if small else Window()
    found: list[dict[str, Any]] = []
    for network in NETWORKS[:2] if small else NETWORKS:
        recipe = GPU.of(network[0]).embed
        # One epoch: all its steps in a row.
        recipe = Recipe(epochs=1, batch=8 if small else recipe.batch, precision=recipe.precision)
        trace = out.parent / "trace.json.gz" if network == TRACED else None
        width = 0.125 if small else 1.0
        found.append(measure(*network, recipe=recipe, window=window, width=width, trace=trace))
        write_json(out, {"device": device_name(), "steps": found})
    return found


def main() -> int:
    """As a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    for facts in run(options.out, small=options.small):
        busy = "" if facts["busy"] is None else f"; the device is busy {facts['busy']:.0%}"
        share = facts["share_of_peak"]
        of_peak = "" if share is None else f", {share:.0%} of peak"
        print(f"{facts['network']}: {facts['images_per_second']:.0f} images/s{of_peak}{busy}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
