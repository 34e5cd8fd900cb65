"""The tests that train, as other processors would run them: `make portable`.

    python tests/portable.py [--quick] [--seeds N] [pytest's own words ...]

Each run is the tests marked `trains` under one instruction set and one shift of every seed, two
runs at a time with a thread each. A shift stands for what another order of the same sums does to a
training: it ends elsewhere. Of every comparison of two numbers that passed, the closest call is
shown: whoever writes such a test keeps the worst value beside its bound. Exits with 1 if a test
failed in any run, and with 2 if a run had nothing to say.
"""

# ruff: noqa: T201 - it prints, as a command does
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
INSTRUCTION_SETS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "sse4": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}
NUMBER = r"(?:tensor\()?(-?\d+(?:\.\d*)?(?:e[-+]?\d+)?)\)?"
COMPARED = re.compile(rf"{NUMBER} (<=|>=|<|>) \(?{NUMBER}")
CLOSEST = 12


class Run(NamedTuple):
    """One instruction set and one shift, and what came of it."""

    isa: str
    shift: int
    code: int = 2
    passed: int = 0
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    calls: tuple[tuple[str, str, float, float], ...] = ()
    output: str = ""

    @property
    def name(self) -> str:
        return f"{self.isa}, seeds + {self.shift}"


def pytest_assertion_pass(item, lineno, orig, expl):
    """Write down each comparison that passed: pytest calls this where the driver asks it to."""
    found = COMPARED.match(expl.split("\n")[0])
    if found and (path := os.environ.get("NNPASSPORT_COMPARISONS")):
        facts = [f"{item.path.name}:{lineno}", orig, float(found[1]), float(found[3])]
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")


def run(planned, which, words, folder):
    """The marked tests in a process of their own."""
    name = f"{planned.isa}-{planned.shift}"
    report, comparisons = folder / f"{name}.xml", folder / f"{name}.jsonl"
    environment = {
        **os.environ,
        **INSTRUCTION_SETS[planned.isa],
        "NNPASSPORT_TEST_SHIFT": str(planned.shift),
        "NNPASSPORT_COMPARISONS": str(comparisons),
        "OMP_NUM_THREADS": "1",
        "PYTHONPYCACHEPREFIX": str(folder / "compiled"),  # asserts are compiled otherwise here
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    options = ["-p", "portable", "-p", "no:cacheprovider", "-o", "enable_assertion_pass_hook=true"]
    command = [sys.executable, "-m", "pytest", "-m", which, "--tb=short"]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *options, f"--junitxml={report}", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds, lines = time.monotonic() - started, []
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    bad = [case for case in cases if {"failure", "error"} & {each.tag for each in case}]
    skipped = [case for case in cases if "skipped" in {each.tag for each in case}]
    if comparisons.exists():
        lines = comparisons.read_text(encoding="utf-8").splitlines()
    finished = planned._replace(
        code=done.returncode,
        passed=len(cases) - len(bad) - len(skipped),
        failed=tuple(f"{case.get('classname')}::{case.get('name')}" for case in bad),
        seconds=seconds,
        calls=tuple(tuple(json.loads(line)) for line in lines),
        output=done.stdout,
    )
    print(f"{finished.name}: {finished.passed} passed, {len(finished.failed)} failed", flush=True)
    for each in finished.failed:
        print(f"    {each}", flush=True)
    return finished


def closest_calls(runs):
    """Of each comparison its closest, as (margin by its size, where, what, value, bound, run)."""
    found = {}
    for each in runs:
        for where, what, value, bound in each.calls:
            margin = abs(value - bound) / max(abs(value), abs(bound), 1e-12)
            if where not in found or margin < found[where][0]:
                found[where] = (margin, where, what, value, bound, each.name)
    return sorted(found.values())


def show(runs):
    """The summary: a line for each run, the failures, the closest calls."""
    print(f"\n{'run':24} {'passed':>7} {'failed':>7} {'seconds':>8}")
    for each in runs:
        print(f"{each.name:24} {each.passed:7} {len(each.failed):7} {each.seconds:8.0f}")
    failures = defaultdict(list)
    for each in runs:
        for name in each.failed:
            failures[name].append(each.name)
    for name, where in sorted(failures.items()):
        print(f"FAILED {name}\n    in {len(where)} of {len(runs)}: {'; '.join(where)}")
    print("\nClosest calls of all that passed (value, bound):")
    for _, where, what, value, bound, name in closest_calls(runs)[:CLOSEST]:
        print(f"  {value:.4g} {bound:.4g}  {where}  {what}  ({name})")


def plan(seeds, quick):
    """Every instruction set with the seeds as they are, and other seeds under each in turn."""
    if quick:
        return [Run("sse4", 1)]
    names = list(INSTRUCTION_SETS)
    others = [Run(names[shift % len(names)], shift) for shift in range(1, seeds + 1)]
    return [*(Run(name, 0) for name in names), *others]


def main():
    """Run, show, and say by the exit code whether everything held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one run, without slow tests")
    parser.add_argument("--seeds", type=int, default=5, help="shifts of the seeds (default: 5)")
    given, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        planned = plan(given.seeds, given.quick)
        which = "trains and not slow" if given.quick else "trains"
        words = ["-n", "2", "--dist", "loadfile", *words] if given.quick else words
        runs = list(pool.map(lambda each: run(each, which, words, Path(folder)), planned))
    for each in runs:
        if each.code:
            print(f"== {each.name}\n{each.output}")
    show(runs)
    if any(each.failed for each in runs):
        return 1
    return 2 if any(each.code or not each.passed for each in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
