"""Hostile files by the hundred thousand: what comes out of every parser of tests/hostile.py.

    python benchmarks/fuzz.py run                     100,000 inputs each; results/fuzz.json and .md
    python benchmarks/fuzz.py run --inputs 1000 --only Parquet
    python benchmarks/fuzz.py contexts                what tests/contexts.py spoils, and the least p
    python benchmarks/fuzz.py likeness --inputs 300   pairs of networks of tests/likeness.py
    python benchmarks/fuzz.py render                  results/fuzz.md from the JSON

Contexts are tried by scheme: each that is accepted gives a key, which reads two of twenty networks
that know nothing of it. The least p of a scheme is held against how many there were (Bonferroni).
A pair of networks is a bug where the judge finds a part that is not there or does nothing, or does
not find one that the suspect's answers come from.
Rows that are not named in `--only` stay as they were. What was done is written as it goes; with
`--resume` a row that this very commit began goes on where it stopped.

Every parser runs in a process of its own with limited address space: a crash or an input that takes
minutes is counted, named by its number, and left behind. The exit code is 1 if there was a bug.
"""

import argparse
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from nnpassport.files.disk import write_atomically
from nnpassport.lab.results import read_json, write_json
from nnpassport.lab.tables import table
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "fuzz.json"
PATIENCE = 120.0  # seconds for one input
ADDRESS_SPACE = 16 * 2**30
REPORT = 500  # inputs between two messages
OF_CONTEXTS = "contexts of "
PAIRS, PAIRS_REPORT, PAIRS_PATIENCE = "pairs of networks", 5, 3600.0


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
        readings: of how many.
        seconds: processor time of all inputs, without processes that they started.
    """

    next: int = 0
    outcomes: Counter = field(default_factory=Counter)
    bugs: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, 0)
    grown: float = 0.0
    least: float = 0.0
    readings: int = 0
    seconds: float = 0.0


def run(names: list[str] | None, inputs: int, jobs: int, resume: bool) -> bool:
    """Try `inputs` inputs of each parser; returns whether there was no bug."""
    with tempfile.TemporaryDirectory() as folder:
        shares = {name: parser.share for name, parser in _parsers(Path(folder)).items()}
    wanted = {name: max(1, inputs // shares[name]) for name in names or shares}
    return _tried("parsers", wanted, jobs, resume)


def run_contexts(names: list[str] | None, inputs: int, jobs: int, resume: bool) -> bool:
    """Try `inputs` contexts of each scheme; returns whether there was no bug, and no small p."""
    wanted = dict.fromkeys(names or _contexts(), inputs)
    sys.path.insert(0, str(ROOT / "tests"))
    import contexts  # noqa: PLC0415 - only found now

    good, rows = _tried("contexts", wanted, jobs, resume), _written()["contexts"]
    for name in wanted:
        if not contexts.explained(rows[name]["least"], rows[name]["readings"]):
            print(f"{name}: p = 10^{rows[name]['least']:.1f} in {rows[name]['readings']} readings")
            good = False
    return good


def run_likeness(inputs: int, resume: bool) -> bool:
    """Try so many pairs of networks; returns whether of each was found what is true."""
    return _tried("likeness", {PAIRS: inputs}, 1, resume)


def _tried(group: str, wanted: Mapping[str, int], jobs: int, resume: bool) -> bool:
    """Try so many inputs of each, and write what came of them as it comes; was there no bug?"""
    origin, lock, tallies = provenance(), Lock(), dict[str, Tally]()

    def keep(name: str, tally: Tally) -> None:
        row = {"parser": name, **vars(tally), "inputs": tally.next, "provenance": origin}
        with lock:
            report = _written()
            _write({**report, group: {**report.get(group, {}), name: row}})

    def one(name: str) -> None:
        before = _written().get(group, {}).get(name, {})
        same = before.get("provenance", {}).get("commit") == origin["commit"]
        begun = _begun(before) if resume and same else Tally()
        tallies[name] = tally = fuzz(name, wanted[name], begun, lambda tally: keep(name, tally))
        keep(name, tally)
        print(f"{name}: {tally.next} inputs, {len(tally.bugs)} bugs", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, wanted))
    return not any(tally.bugs for tally in tallies.values())


def _begun(row: Mapping[str, Any]) -> Tally:
    """The tally of a row, as JSON has it."""
    known = {each.name: row[each.name] for each in fields(Tally) if each.name in row}
    bugs = {int(number): what for number, what in known.get("bugs", {}).items()}
    return Tally(
        **{
            **known,
            "outcomes": Counter(known.get("outcomes", {})),
            "bugs": bugs,
            "slowest": tuple(known.get("slowest", (0.0, 0))),
        }
    )


def _written() -> dict[str, Any]:
    return read_json(RESULT) if RESULT.exists() else {}


def _write(report: dict[str, Any]) -> None:
    write_json(RESULT, report)
    write_atomically(RESULT.with_suffix(".md"), render(report).encode())


def fuzz(name: str, inputs: int, tally: Tally, keep: Callable[[Tally], None]) -> Tally:
    """All further inputs of one parser, in as many processes as it crashes."""
    context, lost = multiprocessing.get_context("spawn"), dict[int, str]()
    while tally.next < inputs:
        at = context.Value("q", tally.next)
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(
            target=work, args=(name, inputs, tally, lost, theirs, at), name=name
        )
        worker.start()
        theirs.close()
        tally, why = _watch(worker, ours, tally, at, keep)
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
    if name == PAIRS:
        _work_on_pairs(inputs, tally, lost, pipe, at)
        return
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
                taken = time.process_time() - start
                tally.slowest = max(tally.slowest, (taken, number))
                tally.seconds += taken
                if name.startswith(OF_CONTEXTS) and value is not None:
                    tally.least = min(tally.least, value.log10_p)
                    tally.readings += value.readings
                tally.outcomes[found.split(":")[0]] += 1
                if found.startswith("BUG"):
                    tally.bugs[number] = found
            if (number + 1) % REPORT == 0 or number + 1 == inputs:
                tally.next, tally.grown = number + 1, max(tally.grown, _peak() - before)
                pipe.send(tally)


def _work_on_pairs(
    inputs: int, tally: Tally, lost: dict[int, str], pipe: Connection, at: Any
) -> None:
    """The same of pairs of networks: outcomes are counted by how the suspect came about."""
    import likeness  # noqa: PLC0415 - as above

    for number in range(tally.next, inputs):
        at.value = number
        if number not in lost:
            start, pair = time.process_time(), likeness.made(number)
            found, wrong = likeness.outcome(pair)
            taken = time.process_time() - start
            tally.slowest = max(tally.slowest, (taken, number))
            tally.seconds += taken
            tally.outcomes[f"{likeness.told(pair)}|{found}"] += 1
            if wrong is not None:
                tally.bugs[number] = wrong
        if (number + 1) % PAIRS_REPORT == 0 or number + 1 == inputs:
            tally.next = number + 1
            pipe.send(tally)


def _watch(
    worker: Any, pipe: Connection, tally: Tally, at: Any, keep: Callable[[Tally], None]
) -> tuple[Tally, str | None]:
    """The last report, and why there will be no other, or None if all is done."""
    seen, since = at.value, time.monotonic()
    patience = PAIRS_PATIENCE if worker.name == PAIRS else PATIENCE
    while True:
        try:
            if pipe.poll(1.0):
                tally = pipe.recv()
                keep(tally)
        except EOFError:
            worker.join()
            return tally, None if worker.exitcode == 0 else f"CRASH: exit {worker.exitcode}"
        if at.value != seen:
            seen, since = at.value, time.monotonic()
        elif time.monotonic() - since > patience:
            worker.kill()
            worker.join()
            return tally, f"HUNG: more than {patience:.0f} s"


def _peak() -> float:
    """MiB, of this process or of one that it started to read something."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose) / 1024


def render(report: dict[str, Any]) -> str:
    """The tables of results/fuzz.md."""
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
    ]
    parsers, contexts = report.get("parsers", {}), report.get("contexts", {})
    head = ("parser", *COUNTED, "memory, MiB", "slowest, s", "commit", "date")
    rows = [
        (name, *_counted(row), f"{row['grown']:.0f}", f"{row['slowest'][0]:.2f}", *_made(row))
        for name, row in parsers.items()
    ]
    lines += table(head, rows)
    lines += _table_of_contexts(contexts) if contexts else []
    pairs = report.get("likeness", {})
    lines += _table_of_pairs(pairs[PAIRS]) if pairs else []
    tried = [*parsers.values(), *contexts.values(), *pairs.values()]
    bugs = [(row["parser"], *bug) for row in tried for bug in row["bugs"].items()]
    if bugs:
        lines += ["", "Bugs, by number of the input:", ""]
        lines += [f"- {parser}, {number}: `{what}`" for parser, number, what in bugs]
    return "\n".join(lines) + "\n"


def _table_of_contexts(contexts: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in contexts.items():
        tries, told = row["readings"], ("not counted", "not known")
        if tries is not None:
            corrected = min(0.0, row["least"] + math.log10(max(1, tries)))
            told = (f"{tries:,}", f"10^{corrected:.1f}")
        scheme, least = name.removeprefix(OF_CONTEXTS), f"10^{row['least']:.1f}"
        rows.append((scheme, *_counted(row), told[0], least, told[1], *_made(row)))
    of = ("contexts", *COUNTED[1:], "readings", "least p", "corrected", "commit", "date")
    return [
        "",
        "# Hostile contexts",
        "",
        "Contexts of each scheme in which up to four things are other than the scheme would",
        "have made them (`tests/contexts.py`). Each that was accepted gave a key of a seed of its",
        "own, and two of twenty networks that know nothing of it were read. *Least p* is the",
        "smallest of all these p-values, and *corrected* that times the number of readings, at",
        "most 1. A corrected p below 10⁻³, a p below 10⁻¹², or a count that no reading gives, is a",
        "bug. Older rows, of few contexts, did not count their readings.",
        "",
        *table(("scheme", *of), rows),
    ]


def _table_of_pairs(row: dict[str, Any]) -> list[str]:
    """By how the suspect came about, in how many of the pairs which network was found in it."""
    made, kinds = row["provenance"], sorted({each.split("|")[0] for each in row["outcomes"]})
    found = ("owner", "rival", "both", "neither")
    counts = {kind: [row["outcomes"].get(f"{kind}|{each}", 0) for each in found] for kind in kinds}
    rows = [(kind, sum(each), *each) for kind, each in counts.items()]
    return [
        "",
        "# Likeness, both ways",
        "",
        "Pairs of networks by construction (`tests/likeness.py`): what an owner has dated, what a",
        "rival dated before, who knows nothing of hers, and a suspect. *Found* is whose network it",
        "was made from, and does something there, to a judge who has images of the task.",
        f"{row['inputs']:,} pairs, {len(row['bugs'])} bugs; commit {made['commit'][:12]},",
        f"{made['date']}.",
        "",
        *table(("the suspect", "pairs", *found), rows),
    ]


COUNTED = ("inputs", "read", "refused", "bugs")


def _counted(row: Mapping[str, Any]) -> tuple[object, ...]:
    read, bugs = row["outcomes"].get("read", 0), len(row["bugs"])
    return f"{row['inputs']:,}", f"{read:,}", f"{row['inputs'] - read - bugs:,}", bugs


def _made(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["provenance"]["commit"][:12], row["provenance"]["date"]


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


def _parsers(folder: Path) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    import hostile  # noqa: PLC0415 - see above

    return hostile.parsers(folder)


def main() -> None:
    """What the command line asks for."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("action", choices=["run", "contexts", "likeness", "render"])
    arguments.add_argument("--inputs", type=int, default=100_000)
    arguments.add_argument("--only", nargs="+", metavar="PARSER")
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument("--resume", action="store_true")
    asked = arguments.parse_args()
    if asked.action == "render":
        _write(_written())
        return
    if asked.action == "run":
        good = run(asked.only, asked.inputs, asked.jobs, asked.resume)
    elif asked.action == "likeness":
        sys.path.insert(0, str(ROOT / "tests"))
        good = run_likeness(asked.inputs, asked.resume)
    else:
        names = None if asked.only is None else [OF_CONTEXTS + name for name in asked.only]
        good = run_contexts(names, asked.inputs, asked.jobs, asked.resume)
    if not good:
        sys.exit(1)


if __name__ == "__main__":
    main()
