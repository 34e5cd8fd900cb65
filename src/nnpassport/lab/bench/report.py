"""Measure the cases that there is time for; what there is none for is named."""

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from nnpassport.ground.progress import Listener
from nnpassport.lab.bench.cases import NETWORKS, QUICK, Case, plan, rows_of
from nnpassport.lab.bench.comparisons import limits, ratios
from nnpassport.lab.bench.networks import SLOW_REFERENCE, lower_bound, work
from nnpassport.lab.bench.page import render
from nnpassport.lab.bench.timing import Measurement, measure, peak_memory
from nnpassport.lab.results import write_json
from nnpassport.report.provenance import provenance
from nnpassport.scheme import BadRecipeError


def run(
    out: Path | None = None,
    *,
    cases: Sequence[Case] | None = None,
    minutes: float = float("inf"),
    show: Listener = lambda done, total, text: None,
) -> str:
    """Measure these cases or the quick ones, write `out` as JSON if given, return the tables.

    Raises:
        UnwritableOutputError: `out` cannot be written.
    """
    if cases is None:
        results = collect(QUICK, minutes=minutes, show=show)
    else:
        results = collect(cases, minutes=minutes, memory=False, show=show)
    if out is not None:
        write_json(out, results)
    return render(results)


def choose(
    *,
    full: bool = False,
    architectures: Sequence[str] = (),
    batches: Sequence[int] = (),
    precisions: Sequence[str] = (),
    compiled: bool | None = None,
    only: Collection[str] = (),
) -> tuple[Case, ...] | None:
    """The cases that these options name; None are the quick ones, as they are without any.

    What is not named is as in the quick cases, or with `full` all there is.

    Raises:
        BadRecipeError: one of them is unknown.
    """
    if not (full or architectures or batches or precisions or only or compiled):
        return None
    both = (False, True) if full else (False,)
    return plan(
        architectures or (NETWORKS if full else ("alexnet", "resnet18")),
        batches or ((64, 256) if full else (64,)),
        precisions or (("float32", "bfloat16") if full else ("float32",)),
        compiled=both if compiled is None else (compiled,),
        tasks=_tasks(only, full=full),
    )


_PARTS: Mapping[str, tuple[str, ...]] = {
    **{task: (task,) for task in ("infer", "train", "memory", "loop")},
    "acts": ("act", "long act"),
}


def _tasks(only: Collection[str], *, full: bool) -> tuple[str, ...]:
    unknown = [name for name in only if name not in _PARTS]
    if unknown:
        raise BadRecipeError(
            f"the benchmark has no part {', '.join(unknown)}; there are: {', '.join(_PARTS)}"
        )
    default = _PARTS if full else ("infer", "train", "memory")
    return tuple(task for name in only or default for task in _PARTS[name])


def collect(
    cases: Sequence[Case],
    *,
    repeats: int = 7,
    warmup: int = 2,
    minutes: float = float("inf"),
    memory: bool = True,
    show: Listener = lambda done, total, text: None,
) -> dict[str, Any]:
    """Times and memory of the cases, and all ratios there are between them, as plain JSON values.

    With `memory` that of the training cases too. What does not fit into `minutes` is named under
    "not_run" and nothing is put in its place. Once a group of cases has enough turns, it gets more
    only within its share of the time by its work: a short budget means few repeats of everything
    rather than all repeats of a few.
    """
    begun = time.monotonic()
    deadline = begun + 60 * minutes
    cases = _with_memory(cases) if memory else cases
    there = [case for case in cases if SLOW_REFERENCE.exists() or "slow" not in case.network]
    entries = [_left_out(case, "needs a checkout") for case in cases if case not in there]
    entries += _measured(_parts(there, repeats + warmup), repeats, warmup, deadline, show)
    bounds = {name: lower_bound(name) for name in dict.fromkeys(c.architecture for c in cases)}
    numbers = [entry for entry in entries if "reason" not in entry]
    return {
        "provenance": {
            **provenance(),
            "repeats": repeats,
            "warmup": warmup,
            "wall_seconds": round(time.monotonic() - begun, 1),
        },
        "lower_bounds": bounds,
        "ratios": ratios(numbers, bounds),
        "limits": limits(numbers),
        "numbers": numbers,
        "not_run": [entry for entry in entries if "reason" in entry],
    }


def _measured(
    parts: "Sequence[_Part]", repeats: int, warmup: int, deadline: float, show: Listener
) -> list[dict[str, Any]]:
    """What each part came to, one after the other."""
    entries = []
    for i, part in enumerate(parts):
        now = time.monotonic()
        share = part.work / sum(later.work for later in parts[i:])

        def progress(fraction: float, i: int = i, title: str = part.title) -> None:
            show(i + fraction, len(parts), title)

        if part.of_memory:
            entries += _probed(part.cases, deadline, progress)
            continue
        times = measure(
            part.cases,
            repeats=repeats,
            warmup=warmup,
            until=now + (deadline - now) * share,
            deadline=deadline,
            show=progress,
        )
        entries += _timed(times)
    return entries


class _Part(NamedTuple):
    cases: list[Case]
    work: float

    @property
    def of_memory(self) -> bool:
        return self.cases[0].task == "memory"

    @property
    def title(self) -> str:
        first = self.cases[0]
        words = (first.architecture, first.batch, first.precision, first.task, first.layers or "")
        return " ".join([*filter(None, map(str, words)), *["compiled"] * first.compiled])


def _parts(cases: Iterable[Case], turns: int) -> list[_Part]:
    """Groups of cases to be timed together; memory one case after the other."""
    parts = []
    for _, members in itertools.groupby(cases, key=lambda case: case.group):
        group = list(members)
        # Three runs, and about as long as two more to start a process.
        runs = 5 if group[0].task == "memory" else turns
        parts.append(_Part(group, runs * sum(map(work, group))))
    return parts


def _with_memory(cases: Iterable[Case]) -> list[Case]:
    """The cases, each group of training cases followed by those whose memory is compared."""
    found = []
    for _, members in itertools.groupby(cases, key=lambda case: case.group):
        group = list(members)
        compared = rows_of("memory", group[0].architecture) if group[0].task == "train" else ()
        probed = [
            replace(case, task="memory")
            for case in group
            if (case.network, case.norm) in compared and not case.compiled
        ]
        found += group + probed
    return found


def _timed(measured: Iterable[Measurement]) -> list[dict[str, Any]]:
    return [
        _entry(m.case, m.timed.seconds, m.timed.processor_seconds)
        if m.timed.seconds
        else _left_out(m.case, m.refused or "no time left")
        for m in measured
    ]


def _probed(
    cases: Sequence[Case], deadline: float, show: Callable[[float], None]
) -> list[dict[str, Any]]:
    entries = []
    for i, case in enumerate(cases):
        show(i / len(cases))
        if time.monotonic() < deadline:
            entries.append(_entry(case, [peak_memory(case)], []))
        else:
            entries.append(_left_out(case, "no time left"))
    return entries


def _left_out(case: Case, reason: str) -> dict[str, Any]:
    return {**asdict(case), "reason": reason}


def _entry(case: Case, values: Sequence[float], processor: Sequence[float]) -> dict[str, Any]:
    """One case's numbers: seconds of a step, or bytes where the task is "memory"."""
    return {
        **asdict(case),
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
        "processor_seconds": list(processor),
    }
