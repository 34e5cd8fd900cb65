"""Time in turns and peak memory.

Only ratios within one run mean anything. Cells run in turns, A B C, B C A, …, so that whatever else
the machine does meets all of them alike, and A is compared with B in the same turn.
"""

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, final

import torch

from nnpassport.lab.bench.cells import Cell
from nnpassport.lab.bench.networks import default_device
from nnpassport.lab.bench.prepared import NotCompiledError, prepare

ENOUGH = 3
"""Turns from which on a ratio is judged, and time is rather spent on what has none yet."""
_LONG_TURN = 30.0  # seconds: nothing that one such turn did not warm up is left cold
_SAMPLE_SECONDS = 0.1  # shorter samples are repeated: reading the clock and the queue cost too


@final
@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds that one step of a cell took in each turn; empty if there was no time for it.

    `refused` says why it could not be run, if it could not. Seconds of processor time, summed over
    threads, are the steadier measure on a processor that is shared. There are none on an
    accelerator, where they would only say how busy the host was.
    """

    cell: Cell
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]
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
    """Time the cells in turns; the first `warmup` turns do not count, or the first if it is long.

    `until` and `deadline` are readings of `time.monotonic`: a turn that would likely end after
    `until` is not begun if there are `ENOUGH` already, and none that would end after `deadline`. So
    all cells have as many repeats as there was time for, and maybe none.
    """
    device = device or default_device()
    runs, refused = _ready(cells, device, deadline)
    calls = dict.fromkeys(runs, 1)
    order = random.Random(1)  # noqa: S311 (no secret)
    samples: dict[Cell, list[_Sample]] = {cell: [] for cell in cells}
    longest, warm = 0.0, warmup
    turn = 0
    while turn < warm + repeats:
        begun = time.monotonic()
        if begun + longest > (until if turn >= warm + ENOUGH else deadline):
            break
        taken: dict[Cell, _Sample] = {}
        # Shuffled: in a fixed order each cell would always run on the caches and freed memory of
        # the same other one, and that is worth some percent.
        for cell in order.sample(list(runs), len(runs)):
            if time.monotonic() >= deadline:
                break
            taken[cell] = _timed(runs[cell], calls[cell], device)
            show((turn + len(taken) / len(runs)) / (warm + repeats))
        if len(taken) < len(runs):  # a turn that is not whole has nothing to be compared with
            break
        for cell, sample in taken.items():
            if turn >= warm:
                samples[cell].append(sample.per(cell.steps))
            else:
                calls[cell] = max(1, round(_SAMPLE_SECONDS / sample.seconds))
        longest = time.monotonic() - begun
        turn += 1
        if longest > _LONG_TURN:
            warm = min(warm, turn)
    return [
        Measurement(
            cell,
            tuple(sample.seconds for sample in mine),
            tuple(sample.processor for sample in mine if device == "cpu"),
            refused.get(cell, ""),
        )
        for cell, mine in samples.items()
    ]


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


class _Sample(NamedTuple):
    seconds: float
    processor: float

    def per(self, steps: int) -> "_Sample":
        return _Sample(self.seconds / steps, self.processor / steps)


def _timed(run: Callable[[], object], calls: int, device: str) -> _Sample:
    _wait_for(device)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    _wait_for(device)
    return _Sample((time.perf_counter() - wall) / calls, (time.process_time() - processor) / calls)


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
