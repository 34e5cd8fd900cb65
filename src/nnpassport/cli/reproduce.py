"""The command `reproduce`: the paper's tables and figures, run and rendered."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nnpassport.cli.options import AsJson
from nnpassport.cli.terminal import errors, print_table, progress_bar

if TYPE_CHECKING:
    from nnpassport.lab.cells import Cell
    from nnpassport.lab.plans import Plan
    from nnpassport.lab.store import Store

PARTS = ("table1", "table2", "table3", "table4", "fig2", "fig3", "fig4", "fig5")


def reproduce(
    what: Annotated[list[str], typer.Argument(help=f"{', '.join(PARTS)}, or all.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="steady, short, gpu, gpu-short, paper, sound, or trial (embedded digits)."
        ),
    ] = "short",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the images, as Parquet files.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Results are kept here, one file a run; no secrets.")
    ] = Path("results/reproduction"),
    networks: Annotated[
        Path, typer.Option(help="Networks are kept here with their owners' keys: secret.")
    ] = Path("runs/reproduction"),
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page (default: in --results).")
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Such as 0,1,2: a network each (default: the recipe's).")
    ] = "",
    architecture: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeatable (default: the recipe's).")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    backend: Annotated[
        str, typer.Option(help="loky (this machine), or the cluster of dask or ray.")
    ] = "loky",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to run, and for how long.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of the paper's tables and figures, and render them all.

    What was run is never run again; what was interrupted goes on. Exit code 2 if something could
    not be run.
    """
    from nnpassport.lab import grid
    from nnpassport.lab.paper import (
        contents,
        document,
    )
    from nnpassport.lab.plans import PLANS, plan_named
    from nnpassport.lab.store import Store

    named = [part for word in what for part in (PARTS if word == "all" else (word,))]
    parts = tuple(dict.fromkeys(named))
    plan = narrowed(plan_named(recipe), seeds, architecture or ())
    store = Store(results, networks, data)
    cells = contents.cells_of(plan, parts)
    if dry_run:
        print_plan(cells, store, jobs, as_json, costs_too="table4" in parts)
        raise typer.Exit(0)
    with progress_bar("reproduce") as show:
        failures = grid.run_grid(cells, store, jobs=jobs, backend=backend, show=show)
    if "table4" in parts:
        from nnpassport.lab.paper.costs import measure_costs

        with progress_bar("table4") as show:
            measure_costs(results, quick=recipe == "trial", show=show)
    page = out or results / "reproduction.md"
    document.render(results, PLANS.values(), page)
    done = sum(store.done(cell) for cell in cells)
    if as_json:
        failed = {failure.cell.slug: failure.reason for failure in failures}
        summary = {"cells": len(cells), "done": done, "failed": failed, "page": str(page)}
        typer.echo(json.dumps(summary, indent=2))
    else:
        print_table(("", ""), [("runs", f"{done} of {len(cells)}"), ("page", str(page))])
    for failure in failures:
        errors.print(f"not run: {failure.cell.slug}: {failure.reason}", markup=False)
    raise typer.Exit(2 if failures else 0)


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
    if as_json:
        typer.echo(json.dumps({"cells": rows, "jobs": jobs, "seconds": total}, indent=2))
        return
    print_table(
        ("run", "state", "about"),
        [(r["cell"], r["state"], _words(r["seconds"])) for r in rows],
    )
    print_table(("", ""), [("to run", str(len(to_run))), (f"with {jobs} jobs", _words(total))])


def _words(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
