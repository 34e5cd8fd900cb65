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

from nnpassport.bench.networks import Cell, default_device, prepare

ENOUGH = 3
"""Turns from which on a ratio is judged, and time is rather spent on what has none yet."""
_SAMPLE_SECONDS = 0.1  # shorter samples are repeated: reading the clock and the queue cost too


@final
@dataclass(frozen=True, slots=True)
class Measurement:
    """Seconds that one run of a cell took in each turn; empty if there was no time for it.

    Seconds of processor time, summed over threads, are the steadier measure on a processor that is
    shared. There are none on an accelerator, where they would only say how busy the host was.
    """

    cell: Cell
    seconds: tuple[float, ...]
    processor_seconds: tuple[float, ...]


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
    """Time the cells in turns; the first `warmup` turns do not count.

    `until` and `deadline` are readings of `time.monotonic`: a turn that would likely end after
    `until` is not begun if there are `ENOUGH` already, and none that would end after `deadline`. So
    all cells have as many repeats as there was time for, and maybe none.
    """
    device = device or default_device()
    runs = [prepare(cell, device) for cell in cells] if time.monotonic() < deadline else []
    calls = [1] * len(cells)
    order = random.Random(1)  # noqa: S311 (no secret)
    samples: list[list[_Sample]] = [[] for _ in cells]
    longest = 0.0
    for turn in range(warmup + repeats):
        begun = time.monotonic()
        if begun + longest > (until if turn >= warmup + ENOUGH else deadline):
            break
        # Shuffled: in a fixed order each cell would always run on the caches and freed memory of
        # the same other one, and that is worth some percent.
        for done, i in enumerate(order.sample(range(len(runs)), len(runs))):
            sample = _timed(runs[i], calls[i], device)
            if turn >= warmup:
                samples[i].append(sample)
            else:
                calls[i] = max(1, round(_SAMPLE_SECONDS / sample.seconds))
            show((turn + (done + 1) / len(cells)) / (warmup + repeats))
        longest = time.monotonic() - begun
    return [
        Measurement(
            cell,
            tuple(sample.seconds for sample in mine),
            tuple(sample.processor for sample in mine if device == "cpu"),
        )
        for cell, mine in zip(cells, samples, strict=True)
    ]


class _Sample(NamedTuple):
    seconds: float
    processor: float


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
