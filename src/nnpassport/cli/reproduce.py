"""The command `reproduce`: the paper's tables and figures, run and rendered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, final

import typer

from nnpassport.cli.options import AsJson
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_result, print_rows, print_table, progress_bar

if TYPE_CHECKING:
    from nnpassport.lab.cells import Cell
    from nnpassport.lab.grid import Failure
    from nnpassport.lab.plans import Plan
    from nnpassport.lab.store import Store

PARTS = ("table1", "table2", "table3", "table4", "fig2", "fig3", "fig4", "fig5")


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """Where runs are kept, which of them there are to be, and how they are run."""

    data: Annotated[Path | None, typer.Option(help="Folder of the images, as Parquet files.")] = (
        None
    )
    results: Annotated[
        Path, typer.Option(help="Folder for results, one file for each run. It holds no secrets.")
    ] = Path("results")
    networks: Annotated[
        Path, typer.Option(help="Folder for networks and their owners' keys. Keep it secret.")
    ] = Path("runs/reproduction")
    seeds: Annotated[
        str,
        typer.Option(
            help="Seeds, such as 0,1,2; each trains a network of its own (default: the recipe's)."
        ),
    ] = ""
    jobs: Annotated[int, typer.Option(min=1, help="Number of runs at the same time.")] = 1
    backend: Annotated[
        str, typer.Option(help="Where to run: loky (this machine), or dask or ray (a cluster).")
    ] = "loky"
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Run nothing; list what there is to run, and how long it takes."
        ),
    ] = False

    @property
    def store(self) -> "Store":
        """Where results, networks and images are."""
        from nnpassport.lab.store import Store

        return Store(self.results, self.networks, self.data)

    def run(self, title: str, cells: "Sequence[Cell]") -> "list[Failure]":
        """Run what is missing of these cells, with a bar on stderr."""
        from nnpassport.lab import grid

        with progress_bar(title) as show:
            return grid.run_grid(cells, self.store, jobs=self.jobs, backend=self.backend, show=show)

    def end(
        self,
        cells: "Sequence[Cell]",
        failures: "Sequence[Failure]",
        made: Mapping[str, str | Sequence[str]],
        as_json: bool,
    ) -> NoReturn:
        """Say what was run and `made` of it; exit code 2 if something could not be run."""
        done = sum(self.store.done(cell) for cell in cells)
        failed = {failure.cell.slug: failure.reason for failure in failures}
        lines = {n: each if isinstance(each, str) else "\n".join(each) for n, each in made.items()}
        facts = {"cells": len(cells), "done": done, "failed": failed, **made}
        print_rows(facts, as_json, [("runs", f"{done} of {len(cells)}"), *lines.items()])
        for name, reason in failed.items():
            errors.print(f"not run: {name}: {reason}", markup=False)
        raise typer.Exit(2 if failures else 0)


OF_THE_PAPER = Grid(results=Path("results/reproduction"))


@spread
def reproduce(
    what: Annotated[list[str], typer.Argument(help=f"{', '.join(PARTS)}, or all.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="Recipe: steady, short, gpu, gpu-short, paper, sound, or trial (embedded digits)."
        ),
    ] = "short",
    grid: Grid = OF_THE_PAPER,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write (default: in --results).")
    ] = None,
    architecture: Annotated[
        list[str] | None,
        typer.Option(help="Only this architecture; repeatable (default: the recipe's)."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of the paper's tables and figures, and render them all.

    A run that is done is never repeated, and one that was interrupted resumes. Exit code 2 if
    something could not be run.
    """
    from nnpassport.lab.paper import contents, document
    from nnpassport.lab.plans import PLANS, plan_named

    named = [part for word in what for part in (PARTS if word == "all" else (word,))]
    parts = tuple(dict.fromkeys(named))
    plan = narrowed(plan_named(recipe), grid.seeds, architecture or ())
    cells = contents.cells_of(plan, parts)
    if grid.dry_run:
        print_plan(cells, grid.store, grid.jobs, as_json, costs_too="table4" in parts)
        raise typer.Exit(0)
    failures = grid.run("reproduce", cells)
    if "table4" in parts:
        from nnpassport.lab.paper.costs import measure_costs

        with progress_bar("table4") as show:
            measure_costs(grid.results, quick=recipe == "trial", show=show)
    page = out or grid.results / "reproduction.md"
    document.render(grid.results, PLANS.values(), page)
    grid.end(cells, failures, {"page": str(page)}, as_json)


def narrowed(plan: "Plan", seeds: str, architectures: Sequence[str]) -> "Plan":
    """The plan for these seeds, "0,1,2", and architectures; none of either leaves the plan's own.

    Raises:
        BadRecipeError: seeds are no whole numbers, or the plan has no such architecture.
    """
    from nnpassport.scheme import BadRecipeError

    try:
        numbers = tuple(int(seed) for seed in seeds.split(",") if seed.strip())
    except ValueError:
        raise BadRecipeError(
            f"seeds {seeds!r} are no whole numbers; needed: such as 0,1,2"
        ) from None
    for name in architectures:
        if name not in plan.architectures:
            raise BadRecipeError(
                f"recipe {plan.name} has no {name!r}; it has: {', '.join(plan.architectures)}"
            )
    chosen = {
        n: a for n, a in plan.architectures.items() if not architectures or n in architectures
    }
    return replace(plan.with_seeds(numbers), architectures=chosen)


def print_plan(
    cells: "Sequence[Cell]", store: "Store", jobs: int, as_json: bool, *, costs_too: bool
) -> None:
    """Print what there is to run, and for how long about."""
    from nnpassport.lab import (
        estimate,
        grid,
    )
    from nnpassport.lab.paper import costs
    from nnpassport.lab.tasks import missing

    to_run = [cell for wave in grid.waves(cells, store) for cell in wave]
    known = estimate.seconds(to_run, store)
    names = {cell.name for cell in cells}
    rows: list[dict[str, Any]] = [
        {"cell": cell.slug, "state": "done", "seconds": None} for cell in cells if store.done(cell)
    ]
    for cell in to_run:
        lacking = [n for t in (cell.network.task, cell.target) if t for n in missing(store.data, t)]
        state = f"no data: {', '.join(lacking)}" if lacking else "to run"
        if cell.name not in names or store.done(cell):
            state += ": its network is needed and is not there"
        rows.append({"cell": cell.slug, "state": state, "seconds": known[cell.name]})
    if costs_too:
        there = (store.results / costs.NAME).exists()
        state = "done" if there else f"to run, {costs.MINUTES:g} minutes at most"
        rows.append({"cell": "costs of Table 4", "state": state, "seconds": None})
    total = sum(value for value in known.values() if value is not None) / jobs

    def told() -> None:
        print_table(
            ("run", "state", "about"),
            [(r["cell"], r["state"], _words(r["seconds"])) for r in rows],
        )
        print_table(("", ""), [("to run", str(len(to_run))), (f"with {jobs} jobs", _words(total))])

    print_result({"cells": rows, "jobs": jobs, "seconds": total}, as_json, told)


def _words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
