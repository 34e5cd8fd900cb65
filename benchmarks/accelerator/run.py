"""Everything there is to do on an accelerator, in the order of what it is worth, until time is up.

    python benchmarks/accelerator/run.py --minutes 9 --out FOLDER

1. check: does the device compute what the CPU computes, and does anything wait for it? (a minute)
2. steps: images a second, share of peak, where a step's time goes
3. ratios: what V1, V2 and V3 cost on this device
4. cells of the paper's tables by the plan `gpu`: Table 2 and the attacks, one architecture and
   task at a time

FOLDER gets results.tar.gz, written again after every cell, and a trace. `packed.py merge` puts the
results where `nnpassport reproduce` finds them. Each stage is a process of its own with a limit of
its own; whatever one of them does, the packed file is there when the minutes are over.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, final

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
if __name__ in {"__main__", "__mp_main__"}:  # the second is a worker's name for this file
    sys.path[:0] = [str(CHECKOUT / "src"), str(HERE)]

if TYPE_CHECKING:
    from nnpassport.lab.cells import Cell
    from nnpassport.lab.plans import Plan
    from nnpassport.lab.store import Store

STAGES = ("check", "steps", "ratios", "cells")
SECONDS = {"check": 60.0, "steps": 60.0, "ratios": 75.0}
"""What a stage may take at most; one that takes longer is ended."""
RESERVE = 8.0
"""Seconds at the end, in which workers are ended and the results are packed."""
ORDER = ("table2", "fig2", "table3", "fig3", "fig4", "fig5", "table1")


@final
@dataclass(frozen=True, slots=True)
class Places:
    """Where things are.

    Attributes:
        root: what `stage.py` has unpacked; networks and results of this run come there too.
        out: what leaves the machine.
        known: results of earlier runs, by plan; what is among them is not run again.
    """

    root: Path
    out: Path
    known: Path

    @property
    def results(self) -> Path:
        """One JSON a cell, by plan."""
        return self.root / "results"

    @property
    def facts(self) -> Path:
        """What the other stages found, and logs."""
        return self.root / "facts"

    def store(self) -> "Store":
        """The cells' store."""
        from nnpassport.lab.store import Store  # noqa: PLC0415 - after the path is set

        return Store(self.results, self.root / "networks", self.root / "data")

    def pack(self) -> int:
        """Write the packed file; returns how many results are in it."""
        import packed  # noqa: PLC0415

        return packed.pack(self.results, self.facts, self.out / "results.tar.gz")


def cells_in_order(plan: "Plan", store: "Store") -> "list[Cell]":
    """Table 2, then the attacks, in the order of the tables; one architecture and task at a time.

    Not all of Table 2 first: networks do not leave the machine, so what is not measured on them
    before the minutes are over costs their training once more. Cells whose images are not there are
    left out.
    """
    from nnpassport.lab.paper.contents import CONTENTS  # noqa: PLC0415
    from nnpassport.lab.tasks import missing  # noqa: PLC0415

    made = {cell.name: cell for part in ORDER for cell in CONTENTS[part](plan)}
    lacking = {task for task in (*plan.tasks, *plan.targets) if missing(store.data, task)}
    architectures = list(plan.architectures)
    return sorted(
        (c for c in made.values() if c.network.task not in lacking and c.target not in lacking),
        key=lambda cell: (
            plan.seeds.index(cell.network.seed),
            plan.tasks.index(cell.network.task),
            architectures.index(cell.network.architecture),
        ),
    )


def take_known(cells: "Sequence[Cell]", store: "Store", known: Path) -> int:
    """Copy results of earlier runs, so that their cells are not run again; returns how many.

    Not those of trainings whose networks are needed once more: the networks are not there.
    """
    from nnpassport.lab.store import Store  # noqa: PLC0415

    earlier = Store(known, store.networks, store.data)
    needed = {need.name for cell in cells if not earlier.done(cell) for need in cell.needs}
    taken = [c for c in cells if earlier.done(c) and c.name not in needed and not store.done(c)]
    for cell in taken:
        store.path(cell).parent.mkdir(parents=True, exist_ok=True)
        copyfile(earlier.path(cell), store.path(cell))
    return len(taken)


def run_cell(cell: "Cell", store: "Store") -> None:
    """One cell. A training that is known, and whose network is not there, is done once more."""
    from nnpassport.lab.runs import run  # noqa: PLC0415

    if cell.work == "train" and store.done(cell) and not store.ready(cell):
        store = replace(store, results=store.networks / "again")
    run(cell, store)


def prepare_worker() -> None:
    """A worker's own settings: its part of the processor, and float32 that is float32."""
    import torch  # noqa: PLC0415

    torch.set_num_threads(max(1, int(os.environ.get("KIT_THREADS", "1"))))
    torch.backends.cudnn.allow_tf32 = False  # of matrices it is so already


def decode_ahead(plan: "Plan", store: "Store") -> "subprocess.Popen[bytes]":
    """Decode the pictures into the cache while the device is checked: workers find them there."""
    code = (
        "import sys; from pathlib import Path\n"
        "from nnpassport.lab.tasks import images_of, missing\n"
        "data = Path(sys.argv[1])\n"
        "[images_of(data, task) for task in sys.argv[2:] if not missing(data, task)]\n"
    )
    tasks = dict.fromkeys((*plan.tasks, *plan.targets))
    return subprocess.Popen([sys.executable, "-c", code, str(store.data), *tasks])


def run_stage(name: str, places: Places, seconds: float, options: Sequence[str]) -> str:
    """One stage in a process of its own, its output in a log; "" or what went wrong."""
    script = {"check": "checks.py", "steps": "steps.py", "ratios": "ratios.py"}[name]
    command = [sys.executable, str(HERE / script), str(places.facts / f"{name}.json"), *options]
    # Sums in one order only, where a check asks for it: has to be known before CUDA starts.
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    with (places.facts / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            code = process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"ended after {seconds:.0f} seconds"
    return "" if code == 0 else f"exit code {code}"


def in_time(places: Places, deadline: float, work: Callable[[], None]) -> None:
    """Do the work, and pack at its end; or at the deadline if it has not ended by then.

    `deadline` is a reading of `time.monotonic`. A work that hangs is left where it is: the process
    ends, and with it all that it has started.
    """

    def pull_the_plug() -> None:
        print("the minutes are over", flush=True)
        try:
            places.pack()
            for child in _children():
                os.kill(child, signal.SIGKILL)
        finally:  # whatever is wrong: the packed file of the last cell is there
            os._exit(3)

    watchdog = threading.Timer(deadline - time.monotonic(), pull_the_plug)
    watchdog.daemon = True
    watchdog.start()
    try:
        work()
    finally:
        places.pack()
        watchdog.cancel()


def _children() -> list[int]:
    import multiprocessing  # noqa: PLC0415

    return [p.pid for p in multiprocessing.active_children() if p.pid is not None]


def work_through(
    places: Places,
    plan: "Plan",
    stages: Sequence[str],
    deadline: float,
    options: argparse.Namespace,
) -> None:
    """The stages in their order; each is noted in facts/run.json as soon as it is done."""
    notes: dict[str, Any] = {"plan": plan.name, "jobs": options.jobs, "stages": {}, "failures": {}}
    begun = time.monotonic()

    def note(**more: Any) -> None:
        notes.update(more, seconds=round(time.monotonic() - begun, 1))
        (places.facts / "run.json").write_text(json.dumps(notes, indent=1) + "\n")
        places.pack()

    decoding = decode_ahead(plan, places.store()) if "cells" in stages else None
    for name in (stage for stage in STAGES if stage in stages and stage != "cells"):
        limit = min(SECONDS[name], deadline - time.monotonic())
        if name == "ratios" and "cells" not in stages:
            limit = deadline - time.monotonic()
        words = ["--small"] * options.small
        if name == "ratios":  # it needs some of its time to end
            words += ["--minutes", f"{max(1.0, limit - 15) / 60}"]
            words += ["--compiled"] * options.compiled
        started = time.monotonic()
        notes["stages"][name] = run_stage(name, places, limit, words) or "done"
        print(f"{name}: {notes['stages'][name]}, {time.monotonic() - started:.0f} s", flush=True)
        print((places.facts / f"{name}.log").read_text(errors="replace")[-1500:], flush=True)
        note()
    if decoding is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            decoding.wait(max(0.0, deadline - time.monotonic()))
        decoding.kill()
        _cells(places, plan, deadline, options, notes, note)


def _cells(
    places: Places,
    plan: "Plan",
    deadline: float,
    options: argparse.Namespace,
    notes: dict[str, Any],
    note: Callable[..., None],
) -> None:
    import pool  # noqa: PLC0415

    store = places.store()
    cells = cells_in_order(plan, store)
    known = take_known(cells, store, places.known)
    print(f"cells: {len(cells)}, {known} known, {options.jobs} at a time", flush=True)

    def ended(one: pool.Ended) -> None:
        print(f"  {one.cell.slug}: {one.failure or 'done'}, {one.seconds:.0f} s", flush=True)
        if one.failure:
            notes["failures"][one.cell.slug] = one.failure
        note(done=sum(map(store.done, cells)), of=len(cells))

    workers = [pool.Process(cells, store, run_cell, prepare_worker) for _ in range(options.jobs)]
    left = pool.run_until(cells, store, workers, deadline=deadline, ended=ended)
    note(done=sum(map(store.done, cells)), of=len(cells), left=[cell.slug for cell in left])
    print(f"cells: {sum(map(store.done, cells))} of {len(cells)} are known now", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of this script."""
    began = time.monotonic()
    options = _parser().parse_args(arguments)
    places = Places(options.root.resolve(), options.out.resolve(), options.known.resolve())
    for folder in (places.facts, places.results, places.out, places.root / "data"):
        folder.mkdir(parents=True, exist_ok=True)
    _settle_in(places.root, options.jobs)

    from nnpassport.cli.reproduce import narrowed  # noqa: PLC0415
    from nnpassport.lab.plans import plan_named  # noqa: PLC0415 - after `_settle_in`

    plan = narrowed(plan_named(options.plan), options.seeds, options.architecture)
    if options.architecture:
        ordered = {name: plan.architectures[name] for name in options.architecture}
        plan = replace(plan, architectures=ordered)
    end = began + 60 * options.minutes
    in_time(
        places,
        end - RESERVE / 4,
        lambda: work_through(places, plan, options.stages, end - RESERVE, options),
    )
    trace = places.facts / "trace.json.gz"
    if trace.exists() and trace.stat().st_size < 15 * 2**20:
        (places.out / trace.name).write_bytes(trace.read_bytes())
    print(f"packed: {places.out / 'results.tar.gz'}, after {time.monotonic() - began:.0f} s")
    return 0


def _settle_in(root: Path, jobs: int) -> None:
    """What this process and its own find: the package, what was brought, the commit."""
    site, paths = root / "site", [str(CHECKOUT / "src"), str(HERE)]
    if site.exists():
        paths.append(str(site))
        sys.path.append(str(site))
    earlier = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *([earlier] if earlier else [])])
    os.environ.setdefault("NNPASSPORT_CACHE", str(root / "cache"))
    os.environ.setdefault("KIT_THREADS", str(max(1, (os.cpu_count() or 1) // max(1, jobs))))
    manifest = root / "manifest.json"
    if manifest.exists() and (commit := json.loads(manifest.read_text())["commit"]):
        os.environ.setdefault("NNPASSPORT_COMMIT", commit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="until everything is packed")
    parser.add_argument("--out", type=Path, required=True, help="what is to be brought back")
    parser.add_argument("--root", type=Path, default=CHECKOUT / "runs" / "accelerator")
    parser.add_argument("--known", type=Path, default=CHECKOUT / "results" / "reproduction")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--plan", default="gpu", help="as in nnpassport reproduce --recipe")
    parser.add_argument("--seeds", default="", help="such as 0,1,2")
    parser.add_argument("--architecture", nargs="*", default=[], help="these alone, in this order")
    parser.add_argument("--jobs", type=int, default=3, help="cells at a time on the one device")
    parser.add_argument("--compiled", action="store_true", help="ratios of compiled networks")
    parser.add_argument("--small", action="store_true", help="narrow networks, for a trial")
    return parser


if __name__ == "__main__":
    sys.exit(main())
