"""Hostile files by the hundred thousand: what comes out of every parser of tests/hostile.py.

    python benchmarks/fuzz.py run                     100,000 inputs each; results/fuzz.json and .md
    python benchmarks/fuzz.py run --inputs 1000 --only Parquet
    python benchmarks/fuzz.py contexts                what tests/contexts.py spoils, and the least p
    python benchmarks/fuzz.py render                  results/fuzz.md from the JSON

Contexts are tried by scheme: each that is accepted gives a key, which reads two of twenty networks
that know nothing of it. Rows of schemes that are not named in `--only` stay as they were.

Every parser runs in a process of its own with limited address space: a crash or an input that takes
minutes is counted, named by its number, and left behind. The exit code is 1 if there was a bug.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nnpassport.files import write_atomically
from nnpassport.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "fuzz.json"
PATIENCE = 120.0  # seconds for one input
ADDRESS_SPACE = 16 * 2**30
REPORT = 500  # inputs between two messages
OF_CONTEXTS = "contexts of "


@dataclass
class Tally:
    """What came of the inputs so far.

    Attributes:
        next: number of the first input that has not been tried.
        outcomes: how many inputs were read, and how many refused with which error.
        bugs: outcome of each input that came to something else, by its number.
        slowest: processor seconds of the slowest input, and its number.
        grown: MiB that the process, or one that it started, took at its peak beyond what it had
            before the first input.
        least: smallest log₁₀ p of all keys of contexts, or 0.
    """

    next: int = 0
    outcomes: Counter = field(default_factory=Counter)
    bugs: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)
    grown: float = 0.0
    least: float = 0.0


def run(names: list[str] | None, inputs: int, jobs: int) -> bool:
    """Try `inputs` inputs of each parser; returns whether there was no bug."""
    started, origin = time.monotonic(), provenance()
    with tempfile.TemporaryDirectory() as folder:
        known = {name: parser.share for name, parser in _parsers(Path(folder)).items()}
    rows = _rows(names, known, inputs, jobs)
    made = {**origin, "jobs": jobs, "wall_seconds": round(time.monotonic() - started, 1)}
    known_rows = {"provenance": made, "parsers": rows}
    _write({**_written(), **(_beside_earlier(rows, made, known) if names else known_rows)})
    return not any(row["bugs"] for row in rows)


def run_contexts(names: list[str] | None, inputs: int, jobs: int) -> bool:
    """Try `inputs` contexts of each scheme; returns whether there was no bug, and no small p."""
    known = dict.fromkeys(_contexts(), 1)
    report, good = _written(), True
    for name in names or known:  # one by one, so that what was done is kept
        started, origin = time.monotonic(), provenance()
        (row,) = _rows([name], known, inputs, jobs)
        row["provenance"] = {**origin, "wall_seconds": round(time.monotonic() - started, 1)}
        report["contexts"] = {**report.get("contexts", {}), name: row}
        _write(report)
        good = good and not row["bugs"]
    return good


def _rows(
    names: list[str] | None, known: dict[str, int], inputs: int, jobs: int
) -> list[dict[str, Any]]:
    tallies: dict[str, Tally] = {}

    def one(name: str) -> None:
        tallies[name] = tally = fuzz(name, max(1, inputs // known[name]))
        print(f"{name}: {tally.next} inputs, {len(tally.bugs)} bugs", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, names or known))
    return [
        {"parser": name, **vars(tallies[name]), "inputs": tallies[name].next}
        for name in known
        if name in tallies
    ]


def _written() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return found


def _write(report: dict[str, Any]) -> None:
    write_atomically(RESULT, json.dumps(report, indent=1).encode() + b"\n")
    write_atomically(RESULT.with_suffix(".md"), render(report).encode())


def _beside_earlier(rows: list[Any], made: Any, known: Mapping[str, int]) -> dict[str, Any]:
    """The last report with these rows in place of its own; each says where it comes from."""
    report: dict[str, Any] = json.loads(RESULT.read_text())
    found = {row["parser"]: row for row in report["parsers"]}
    found |= {row["parser"]: {**row, "provenance": made} for row in rows}
    return {**report, "parsers": [found[name] for name in known if name in found]}


def fuzz(name: str, inputs: int) -> Tally:
    """All inputs of one parser, in as many processes as it crashes."""
    context, tally, lost = multiprocessing.get_context("spawn"), Tally(), dict[int, str]()
    while tally.next < inputs:
        at = context.Value("q", tally.next)
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(name, inputs, tally, lost, theirs, at))
        worker.start()
        theirs.close()
        tally, why = _watch(worker, ours, tally, at)
        if why is not None:
            if at.value in lost:
                raise RuntimeError(f"{name} does not even start: {why}")
            lost[at.value] = why
    tally.bugs |= lost
    tally.outcomes.update(each.split(":")[0] for each in lost.values())
    return tally


def work(
    name: str, inputs: int, tally: Tally, lost: dict[int, str], pipe: Connection, at: Any
) -> None:
    """Go on from `tally`, leaving out the inputs that were lost, and report now and then."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in C complain there
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import hostile  # noqa: PLC0415 - only found once `_parsers` or spawning has set the path

    with tempfile.TemporaryDirectory() as folder:
        known = _contexts() if name.startswith(OF_CONTEXTS) else hostile.parsers(Path(folder))
        parser = known[name]
        hostile.outcome(parser, parser.seeds[0])  # what is imported late shall not count
        before = _peak()
        for number in range(tally.next, inputs):
            at.value = number
            if number not in lost:
                data, start = hostile.hostile_input(name, parser, number), time.process_time()
                found, value = hostile.result(parser, data)
                tally.least = min(tally.least, value if isinstance(value, float) else 0.0)
                tally.slowest = max(tally.slowest, (time.process_time() - start, number))
                tally.outcomes[found.split(":")[0]] += 1
                if found.startswith("BUG"):
                    tally.bugs[number] = found
            if (number + 1) % REPORT == 0 or number + 1 == inputs:
                tally.next, tally.grown = number + 1, max(tally.grown, _peak() - before)
                pipe.send(tally)


def _watch(worker: Any, pipe: Connection, tally: Tally, at: Any) -> tuple[Tally, str | None]:
    """The last report, and why there will be no other, or None if all is done."""
    seen, since = at.value, time.monotonic()
    while True:
        try:
            if pipe.poll(1.0):
                tally = pipe.recv()
        except EOFError:
            worker.join()
            return tally, None if worker.exitcode == 0 else f"CRASH: exit {worker.exitcode}"
        if at.value != seen:
            seen, since = at.value, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            worker.kill()
            worker.join()
            return tally, f"HUNG: more than {PATIENCE:.0f} s"


def _peak() -> float:
    """MiB, of this process or of one that it started to read something."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose) / 1024


def render(report: dict[str, Any]) -> str:
    """The table of results/fuzz.md."""
    lines = [
        "# Hostile files",
        "",
        "Rendered by `python benchmarks/fuzz.py render` from `fuzz.json`; what the inputs are is",
        "in `tests/hostile.py`. A bug is anything but a result or an error of ours, a crash, or an",
        f"input that takes {PATIENCE:.0f} seconds. Memory is what the process grew by at its peak",
        "over all inputs, or a process that it started to read a pickle; time is that of the",
        "slowest input on the processor, without that process. Read is what came to a result;",
        "that a signature or a timestamp does not hold is one.",
        "",
        _made(report["provenance"]),
        "",
        "| parser | inputs | read | refused | bugs | memory, MiB | slowest, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in report["parsers"]:
        read, bugs = row["outcomes"].get("read", 0), len(row["bugs"])
        lines.append(
            f"| {row['parser']} | {row['inputs']:,} | {read:,} | {row['inputs'] - read - bugs:,} "
            f"| {bugs} | {row['grown']:.0f} | {row['slowest'][0]:.2f} |"
        )
    contexts = report.get("contexts", {})
    lines += _table_of_contexts(contexts) if contexts else []
    later = [row for row in report["parsers"] if "provenance" in row]
    for row in later:
        lines += ["", f"Of these later, {row['parser']}: {_made(row['provenance'])}"]
    rows = [*report["parsers"], *contexts.values()]
    bugs = [(row["parser"], *bug) for row in rows for bug in row["bugs"].items()]
    if bugs:
        lines += ["", "Bugs, by number of the input:", ""]
        lines += [f"- {parser}, {number}: `{what}`" for parser, number, what in bugs]
    return "\n".join(lines) + "\n"


def _table_of_contexts(contexts: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "# Hostile contexts",
        "",
        "Contexts of each scheme in which up to four things are other than the scheme would",
        "have made them (`tests/contexts.py`). Each that was accepted gave a key of a seed of its",
        "own, and two of twenty networks that know nothing of it were read. *Least p* is the",
        "smallest of all these p-values; N of them allow about 1/N. A p below 10⁻¹², or a count",
        "that no reading gives, is a bug.",
        "",
        "| scheme | contexts | read | refused | bugs | least p | commit | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in contexts.items():
        read, bugs, made = row["outcomes"].get("read", 0), len(row["bugs"]), row["provenance"]
        lines.append(
            f"| {name.removeprefix(OF_CONTEXTS)} | {row['inputs']:,} | {read:,} "
            f"| {row['inputs'] - read - bugs:,} | {bugs} | 10^{row['least']:.1f} "
            f"| {made['commit'][:12]} | {made['date']} |"
        )
    return lines


def _contexts() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    import contexts  # noqa: PLC0415 - see above
    import hostile  # noqa: PLC0415

    return {
        f"{OF_CONTEXTS}{scheme}": hostile.Parser(
            contexts.genuine(scheme), contexts.spoiled, contexts.least
        )
        for scheme in contexts.SCHEMES
    }


def _made(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{fact} {value}".replace("_", " ") for fact, value in facts.items())


def _parsers(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    import hostile  # noqa: PLC0415 - see above

    return hostile.parsers(folder)


def main() -> None:
    """What the command line asks for."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("action", choices=["run", "contexts", "render"])
    arguments.add_argument("--inputs", type=int, default=100_000)
    arguments.add_argument("--only", nargs="+", metavar="PARSER")
    arguments.add_argument("--jobs", type=int, default=1)
    asked = arguments.parse_args()
    if asked.action == "render":
        report = json.loads(RESULT.read_text())
        write_atomically(RESULT.with_suffix(".md"), render(report).encode())
        return
    if asked.action == "run":
        good = run(asked.only, asked.inputs, asked.jobs)
    else:
        names = None if asked.only is None else [OF_CONTEXTS + name for name in asked.only]
        good = run_contexts(names, asked.inputs, asked.jobs)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
