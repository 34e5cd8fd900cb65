"""From measurements to ratios, beside what is aimed at and what the paper's Table 4 reports."""

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from nnpassport.bench.networks import FULL, QUICK, SLOW_REFERENCE, Cell, lower_bound, work
from nnpassport.bench.timing import ENOUGH, Measurement, measure, peak_memory
from nnpassport.files import write_atomically
from nnpassport.provenance import provenance

Show = Callable[[float, float, str], None]


class Facts(NamedTuple):
    """What a target may depend on."""

    architecture: str
    batch: int
    bound: float  # of a step of two branches, as a multiple of a plain step


class Comparison(NamedTuple):
    """A ratio of one network to another of the same norm.

    Attributes:
        paper: the range in the paper's Table 4, as a ratio.
        target: the most that it should be, or None where the row is there for comparison.
        unit: what the lower network's number is multiplied by.
    """

    task: str
    above: str
    below: str
    norm: str
    paper: str = ""
    target: Callable[[Facts], float | None] = lambda _: None
    unit: Callable[[Facts], float] = lambda _: 1.0
    unit_name: str = ""

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.above} / {self.below}{self.unit_name}"


_MEMORY = {"alexnet": 1.6, "resnet18": 1.4}
_COMPARISONS = (
    Comparison("train", "V1", "plain", "batch", "1.15–1.30", lambda _: 1.03),
    Comparison("train", "slow V1", "plain", "batch", "1.15–1.30"),
    Comparison("train", "V2", "plain", "group", "2.00–2.25", lambda f: 1.10 * f.bound),
    Comparison(
        "train", "V2", "plain", "group", "", lambda _: 1.10, lambda f: f.bound, " × lower bound"
    ),
    Comparison("train", "forked", "plain", "group"),
    Comparison("train", "V2", "forked", "group"),
    Comparison("train", "slow V2", "plain", "group", "2.00–2.25"),
    Comparison("train", "V3", "plain", "group", "2.00–2.50"),
    Comparison("train", "V3", "V2", "group", "", lambda f: 1 + 2 / f.batch),
    Comparison("train", "slow V3", "plain", "group", "2.00–2.50"),
    Comparison("infer", "V1 presented", "plain", "batch", "1.10", lambda _: 1.02),
    Comparison("infer", "V1 folded", "plain", "batch", "", lambda _: 1.0),
    Comparison("infer", "V2 released", "plain", "group", "1.00", lambda _: 1.0),
    Comparison("memory", "V1", "plain", "batch"),
    Comparison("memory", "V2", "plain", "group", "", lambda f: _MEMORY.get(f.architecture)),
    Comparison("memory", "V3", "plain", "group"),
    Comparison("memory", "slow V2", "plain", "group"),
)


def run(
    out: Path | None = None,
    *,
    full: bool = False,
    minutes: float = float("inf"),
    show: Show = lambda done, total, text: None,
) -> str:
    """Measure the quick or all cells, write `out` as JSON if given, and return the tables.

    Raises:
        UnwritableOutputError: `out` cannot be written.
    """
    results = collect(FULL if full else QUICK, minutes=minutes, show=show)
    if out is not None:
        write_atomically(out, (json.dumps(results, indent=1) + "\n").encode())
    return render(results)


def collect(
    cells: Sequence[Cell],
    *,
    repeats: int = 7,
    warmup: int = 2,
    minutes: float = float("inf"),
    memory: bool = True,
    show: Show = lambda done, total, text: None,
) -> dict[str, Any]:
    """Times and memory of the cells, and all ratios there are between them, as plain JSON values.

    What does not fit into `minutes` is named under "not_run" and nothing is put in its place. Once
    a group of cells has enough turns, it gets more only within its share of the time by its work: a
    short budget means few repeats of everything rather than all repeats of a few.
    """
    begun = time.monotonic()
    deadline = begun + 60 * minutes
    there = [cell for cell in cells if SLOW_REFERENCE.exists() or "slow" not in cell.network]
    entries = [_left_out(c, c.task, "needs a checkout") for c in cells if c not in there]
    parts = [p for p in _parts(there, repeats + warmup) if memory or not p.of_memory]
    for i, part in enumerate(parts):
        now = time.monotonic()
        share = part.work / sum(later.work for later in parts[i:])

        def progress(fraction: float, i: int = i, title: str = part.title) -> None:
            show(i + fraction, len(parts), title)

        entries += (
            _probed(part.cells, deadline, progress)
            if part.of_memory
            else _timed(
                measure(
                    part.cells,
                    repeats=repeats,
                    warmup=warmup,
                    until=now + (deadline - now) * share,
                    deadline=deadline,
                    show=progress,
                )
            )
        )
    bounds = {name: lower_bound(name) for name in dict.fromkeys(c.architecture for c in cells)}
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
        "numbers": numbers,
        "not_run": [entry for entry in entries if "reason" in entry],
    }


class _Part(NamedTuple):
    cells: list[Cell]
    of_memory: bool
    work: float

    @property
    def title(self) -> str:
        return " ".join(map(str, [*self.cells[0].group, *["memory"] * self.of_memory]))


def _parts(cells: Iterable[Cell], turns: int) -> list[_Part]:
    """Groups of cells to be timed together, each followed by those whose memory is compared."""
    parts = []
    for _, members in itertools.groupby(cells, key=lambda cell: cell.group):
        group = list(members)
        parts.append(_Part(group, of_memory=False, work=turns * sum(map(work, group))))
        probed = [cell for cell in group if _has_memory(cell)]
        if probed:
            # Three runs, and about as long as two more to start a process.
            parts.append(_Part(probed, of_memory=True, work=5 * sum(map(work, probed))))
    return parts


def _has_memory(cell: Cell) -> bool:
    return cell.task == "train" and any(
        cell.norm == c.norm and cell.network in {c.above, c.below}
        for c in _COMPARISONS
        if c.task == "memory"
    )


def _timed(measured: Iterable[Measurement]) -> list[dict[str, Any]]:
    return [
        _entry(m.cell, m.cell.task, m.seconds, m.processor_seconds)
        if m.seconds
        else _left_out(m.cell, m.cell.task, "no time left")
        for m in measured
    ]


def _probed(
    cells: Sequence[Cell], deadline: float, show: Callable[[float], None]
) -> list[dict[str, Any]]:
    entries = []
    for i, cell in enumerate(cells):
        show(i / len(cells))
        if time.monotonic() < deadline:
            entries.append(_entry(cell, "memory", [peak_memory(cell)], []))
        else:
            entries.append(_left_out(cell, "memory", "no time left"))
    return entries


def _left_out(cell: Cell, task: str, reason: str) -> dict[str, Any]:
    return {**asdict(cell), "task": task, "reason": reason}


def _entry(
    cell: Cell, task: str, values: Sequence[float], processor: Sequence[float]
) -> dict[str, Any]:
    """One cell's numbers: seconds, or bytes where the task is "memory"."""
    return {
        **asdict(cell),
        "task": task,
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
        "processor_seconds": list(processor),
    }


def ratios(
    numbers: Sequence[Mapping[str, Any]], bounds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Every comparison whose two networks were both measured, turn by turn."""
    groups: dict[tuple[Any, ...], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for entry in numbers:
        group = tuple(entry[part] for part in ("architecture", "batch", "precision", "task"))
        groups.setdefault(group, {})[entry["network"], entry["norm"]] = entry
    return [
        {
            "architecture": architecture,
            "batch": batch,
            "precision": precision,
            **_ratio(
                comparison,
                Facts(architecture, batch, bounds[architecture]),
                found[comparison.above, comparison.norm],
                found[comparison.below, comparison.norm],
            ),
        }
        for (architecture, batch, precision, task), found in groups.items()
        for comparison in _COMPARISONS
        if comparison.task == task
        and {(comparison.above, comparison.norm), (comparison.below, comparison.norm)} <= set(found)
    ]


def _ratio(
    comparison: Comparison, facts: Facts, above: Mapping[str, Any], below: Mapping[str, Any]
) -> dict[str, Any]:
    unit = comparison.unit(facts)
    values, processor = (
        [a / (b * unit) for a, b in zip(above[kind], below[kind], strict=True)]
        for kind in ("values", "processor_seconds")
    )
    # Inclusive: the other method puts the quartiles of two numbers outside of them.
    twice = values * 2 if len(values) == 1 else values
    lower, median, upper = statistics.quantiles(twice, n=4, method="inclusive")
    target = comparison.target(facts)
    return {
        "task": comparison.task,
        "ratio": comparison.name,
        "n": len(values),
        "median": median,
        "lower_quartile": lower,
        "upper_quartile": upper,
        "by_processor_time": statistics.median(processor) if processor else None,
        "target": target,
        "met": _met(
            median, lower, target, enough=comparison.task == "memory" or len(values) >= ENOUGH
        ),
        "paper": comparison.paper,
    }


def _met(median: float, lower: float, target: float | None, *, enough: bool) -> str | None:
    """Judged as printed, to two decimals."""
    if target is None:
        return None
    if not enough:
        return "too few turns"
    if round(median, 2) <= round(target, 2):
        return "yes"
    return "within noise" if round(lower, 2) <= round(target, 2) else "no"


def render(results: Mapping[str, Any]) -> str:
    """The results as Markdown: ratios beside targets and paper, numbers, and what was not run."""
    source = results["provenance"]
    bounds = ", ".join(f"{name} {bound:.3f}" for name, bound in results["lower_bounds"].items())
    ratio_rows = [
        (
            r["architecture"], r["batch"], r["precision"], r["task"], r["ratio"],
            f"{r['median']:.2f}", f"{r['lower_quartile']:.2f}–{r['upper_quartile']:.2f}",
            _number(r["by_processor_time"]), r["n"], _number(r["target"]), r["met"], r["paper"],
        )
        for r in results["ratios"]
    ]  # fmt: skip
    number_rows = [
        (
            e["architecture"], e["batch"], e["precision"], e["task"], e["network"], e["norm"],
            *(f"{e[key] * scale:.1f} {unit}" for key in ("median", "min", "max")), e["n"],
        )
        for e in results["numbers"]
        for scale, unit in [(2**-20, "MiB") if e["task"] == "memory" else (1e3, "ms")]
    ]  # fmt: skip
    missing = [
        f"- {cell['architecture']}, batch {cell['batch']}, {cell['precision']}, {cell['task']}, "
        f"{cell['network']} ({cell['norm']} norm): {cell['reason']}"
        for cell in results["not_run"]
    ]
    return "\n".join(
        [
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in source.items()),
            "",
            f"Lower bound of a step of two branches, as a multiple of a plain step: {bounds}.",
            "",
            *_table(_RATIO_COLUMNS, ratio_rows),
            "",
            *_table(_NUMBER_COLUMNS, number_rows),
            *(["", "Not run:", "", *missing] if missing else []),
        ]
    )


_RATIO_COLUMNS = (
    "architecture", "batch", "precision", "task", "ratio", "measured", "middle half",
    "by processor time", "n", "target, at most", "met", "paper, Table 4",
)  # fmt: skip
_NUMBER_COLUMNS = (
    "architecture", "batch", "precision", "task", "network", "norm", "median", "min", "max", "n",
)  # fmt: skip


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join('' if v is None else str(v) for v in line)} |" for line in lines]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
