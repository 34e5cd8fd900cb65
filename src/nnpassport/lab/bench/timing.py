"""Time of cases, in turns, and their peak memory."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from nnpassport.lab.bench.cases import Case
from nnpassport.lab.bench.networks import default_device
from nnpassport.lab.bench.prepared import NotCompiledError, prepare
from nnpassport.lab.timing import Timed, in_turns


class Measurement(NamedTuple):
    """What a step of a case took, and why it could not be run, if it could not."""

    case: Case
    timed: Timed
    refused: str = ""


def measure(
    cases: Sequence[Case],
    *,
    repeats: int = 7,
    warmup: int = 2,
    until: float = float("inf"),
    deadline: float = float("inf"),
    show: Callable[[float], None] = lambda part: None,
) -> list[Measurement]:
    """Time the cases by `lab.timing.in_turns`, once what there is time for has been prepared."""
    device = default_device()
    runs, refused = _ready(cases, device, deadline)
    timed = in_turns(
        runs,
        steps=lambda case: case.steps,
        repeats=repeats,
        warmup=warmup,
        device=device,
        until=until,
        deadline=deadline,
        show=show,
    )
    return [Measurement(c, timed.get(c, Timed()), refused.get(c, "")) for c in cases]


def _ready(
    cases: Sequence[Case], device: str, deadline: float
) -> tuple[dict[Case, Callable[[], object]], dict[Case, str]]:
    """What runs each case, as far as there is time to prepare it; and why others cannot be run."""
    torch.compiler.reset()  # of the last group's graphs
    runs, refused = {}, {}
    longest = 0.0
    for case in cases:
        begun = time.monotonic()
        if begun + longest >= deadline:  # compiling takes its time
            break
        try:
            runs[case] = prepare(case, device)
        except NotCompiledError as error:
            refused[case] = str(error)
        longest = max(longest, time.monotonic() - begun)
    return runs, refused


def peak_memory(case: Case, device: str | None = None) -> int:
    """Most bytes that a run of this case needs at a time, in a fresh process.

    Weights, gradients, momentum, activations and workspace; not Python and its libraries. On CUDA
    what the allocator handed out, else growth of the resident set (Linux).
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(
            _growth, case, device or default_device(), torch.get_num_threads()
        ).result()


def _growth(case: Case, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # What the libraries load on first use is not the network's: a very narrow one loads it first.
    prepare(replace(case, width=0.01, batch=2), device)()
    before = 0 if device == "cuda" else _resident()["VmRSS"]
    run = prepare(case, device)
    for _ in range(3):
        run()
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident()["VmHWM"] - before


def _resident() -> dict[str, int]:
    # Not getrusage: its ru_maxrss survives exec, so a small child reports its parent's peak.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in sizes}
