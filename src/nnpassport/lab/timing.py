"""Time in turns.

Only ratios within one run mean anything. Things run in turns, A B C, B C A, …, so that whatever
else the machine does meets all of them alike, and A is compared with B in the same turn.
"""

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, final

import torch

T = TypeVar("T")
ENOUGH = 3
"""Turns from which on a ratio is judged, and time is rather spent on what has none yet."""
_LONG_TURN = 30.0  # seconds: nothing that one such turn did not warm up is left cold
_SAMPLE_SECONDS = 0.1  # shorter samples are repeated: reading the clock and the queue cost too


@final
@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds that a step took in each turn; empty if there was no time for it.

    Seconds of processor time, summed over threads, are the steadier measure on a processor that is
    shared. There are none on an accelerator, where they would only say how busy the host was.
    """

    seconds: tuple[float, ...] = ()
    processor_seconds: tuple[float, ...] = ()


def in_turns(
    runs: Mapping[T, Callable[[], object]],
    *,
    steps: Callable[[T], int] = lambda _: 1,
    repeats: int = 7,
    warmup: int = 2,
    device: str = "cpu",
    until: float = float("inf"),
    deadline: float = float("inf"),
    show: Callable[[float], None] = lambda part: None,
) -> dict[T, Timed]:
    """Time these in turns; the first `warmup` turns do not count, or the first if it is long.

    `steps` says how many steps one run does. `until` and `deadline` are readings of
    `time.monotonic`: a turn that would likely end after `until` is not begun if there are `ENOUGH`
    already, and none that would end after `deadline`. So all have as many repeats as there was time
    for, and maybe none.
    """
    calls = dict.fromkeys(runs, 1)
    order = random.Random(1)  # noqa: S311 (no secret)
    samples: dict[T, list[_Sample]] = {name: [] for name in runs}
    longest, warm, turn = 0.0, warmup, 0
    while turn < warm + repeats:
        begun = time.monotonic()
        if begun + longest > (until if turn >= warm + ENOUGH else deadline):
            break
        taken: dict[T, _Sample] = {}
        # Shuffled: in a fixed order each would always run on the caches and freed memory of the
        # same other one, and that is worth some percent.
        for name in order.sample(list(runs), len(runs)):
            if time.monotonic() >= deadline:
                break
            taken[name] = _timed(runs[name], calls[name], device)
            show((turn + len(taken) / len(runs)) / (warm + repeats))
        if len(taken) < len(runs):  # a turn that is not whole has nothing to be compared with
            break
        for name, sample in taken.items():
            if turn >= warm:
                samples[name].append(sample.per(steps(name)))
            else:
                calls[name] = max(1, round(_SAMPLE_SECONDS / sample.seconds))
        longest = time.monotonic() - begun
        turn += 1
        if longest > _LONG_TURN:
            warm = min(warm, turn)
    return {
        name: Timed(
            tuple(sample.seconds for sample in mine),
            tuple(sample.processor for sample in mine if device == "cpu"),
        )
        for name, mine in samples.items()
    }


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


@final
class Clock:
    """Seconds since it was made or read last: of the processor, all threads, and of the wall."""

    def __init__(self) -> None:
        self._then = time.process_time(), time.perf_counter()

    def read(self) -> dict[str, float]:
        """As "processor" and "wall"."""
        now = time.process_time(), time.perf_counter()
        processor, wall = (b - a for a, b in zip(self._then, now, strict=True))
        self._then = now
        return {"processor": processor, "wall": wall}


def paired(above: Sequence[float], below: Sequence[float], unit: float = 1.0) -> list[float]:
    """Turn by turn, the one over the other, `unit` of which is one."""
    return [a / (b * unit) for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and how many there are."""
    # Inclusive: the other method puts the quartiles of two numbers outside of them.
    twice = [*values] * 2 if len(values) == 1 else values
    lower, median, upper = statistics.quantiles(twice, n=4, method="inclusive")
    return {"n": len(values), "median": median, "lower_quartile": lower, "upper_quartile": upper}
