"""Time of cells, in turns, and their peak memory."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from nnpassport.lab.bench.cells import Cell
from nnpassport.lab.bench.networks import default_device
from nnpassport.lab.bench.prepared import NotCompiledError, prepare
from nnpassport.lab.timing import Timed, in_turns


class Measurement(NamedTuple):
    """What a step of a cell took, and why it could not be run, if it could not."""

    cell: Cell
    timed: Timed
    refused: str = ""


def measure(
    cells: Sequence[Cell],
    *,
    repeats: int = 7,
    warmup: int = 2,
    device: str | None = None,
    until: float = float("inf"),
    deadline: float = float("inf"),
    show: Callable[[float], None] = lambda part: None,
) -> list[Measurement]:
    """Time the cells by `lab.timing.in_turns`, once what there is time for has been prepared."""
    device = device or default_device()
    runs, refused = _ready(cells, device, deadline)
    timed = in_turns(
        runs,
        steps=lambda cell: cell.steps,
        repeats=repeats,
        warmup=warmup,
        device=device,
        until=until,
        deadline=deadline,
        show=show,
    )
    return [Measurement(c, timed.get(c, Timed()), refused.get(c, "")) for c in cells]


def _ready(
    cells: Sequence[Cell], device: str, deadline: float
) -> tuple[dict[Cell, Callable[[], object]], dict[Cell, str]]:
    """What runs each cell, as far as there is time to prepare it; and why others cannot be run."""
    torch.compiler.reset()  # of the last group's graphs
    runs, refused = {}, {}
    longest = 0.0
    for cell in cells:
        begun = time.monotonic()
        if begun + longest >= deadline:  # compiling takes its time
            break
        try:
            runs[cell] = prepare(cell, device)
        except NotCompiledError as error:
            refused[cell] = str(error)
        longest = max(longest, time.monotonic() - begun)
    return runs, refused


def peak_memory(cell: Cell, device: str | None = None) -> int:
    """Most bytes that a run of this cell needs at a time, in a fresh process.

    Weights, gradients, momentum, activations and workspace; not Python and its libraries. On CUDA
    what the allocator handed out, else growth of the resident set (Linux).
    """
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as process:
        return process.submit(
            _growth, cell, device or default_device(), torch.get_num_threads()
        ).result()


def _growth(cell: Cell, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    # What the libraries load on first use is not the network's: a very narrow one loads it first.
    prepare(replace(cell, width=0.01, batch=2), device)()
    before = 0 if device == "cuda" else _resident()["VmRSS"]
    run = prepare(cell, device)
    for _ in range(3):
        run()
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident()["VmHWM"] - before


def _resident() -> dict[str, int]:
    # Not getrusage: its ru_maxrss survives exec, so a small child reports its parent's peak.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    sizes = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): 1024 * int(size) for name, size, _ in sizes}
