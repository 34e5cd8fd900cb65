"""The command `leaderboard`: every scheme against every attack, run and rendered."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nnpassport.cli.options import AsJson
from nnpassport.cli.reproduce import narrowed, print_plan
from nnpassport.cli.terminal import errors, print_table, progress_bar


def leaderboard(
    scheme: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeatable (default: the catalog).")
    ] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeatable (default: all that apply).")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="leaderboard, or leaderboard-trial (embedded digits, minutes).")
    ] = "leaderboard",
    data: Annotated[
        Path | None, typer.Option(help="Folder of the images, as Parquet files.")
    ] = None,
    results: Annotated[
        Path, typer.Option(help="Results are kept here, one file a run; no secrets.")
    ] = Path("results"),
    networks: Annotated[
        Path, typer.Option(help="Networks are kept here with their owners' keys: secret.")
    ] = Path("runs/reproduction"),
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page, Markdown; HTML and a picture go beside it."),
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Such as 0,1,2: a network each (default: the recipe's).")
    ] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time.")] = 1,
    backend: Annotated[
        str, typer.Option(help="loky (this machine), or the cluster of dask or ray.")
    ] = "loky",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to run, and for how long.")
    ] = False,
    render_only: Annotated[
        bool, typer.Option("--render-only", help="Run nothing: the pages from what was run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run what is missing of scheme × attack, and render the leaderboard.

    What was run is never run again; what was interrupted goes on. Exit code 2 if something could
    not be run.
    """
    from nnpassport.lab import grid
    from nnpassport.lab.leaderboard import (
        board,
        field,
    )
    from nnpassport.lab.plans import field_plan_named
    from nnpassport.lab.store import Store

    plan = narrowed(field_plan_named(recipe), seeds, ())
    store = Store(results, networks, data)
    cells = field.cells_of(plan, scheme or (), attack or ())
    if dry_run:
        print_plan(cells, store, jobs, as_json, costs_too=False)
        raise typer.Exit(0)
    failures: list[grid.Failure] = []
    if not render_only:
        with progress_bar("leaderboard") as show:
            failures = grid.run_grid(cells, store, jobs=jobs, backend=backend, show=show)
    pages = board.render(plan, store, out or results / plan.name / "leaderboard.md")
    done = sum(store.done(cell) for cell in cells)
    if as_json:
        failed = {failure.cell.slug: failure.reason for failure in failures}
        summary = {"cells": len(cells), "done": done, "failed": failed, "pages": pages}
        typer.echo(json.dumps(summary, indent=2))
    else:
        print_table(("", ""), [("runs", f"{done} of {len(cells)}"), ("pages", "\n".join(pages))])
    for failure in failures:
        errors.print(f"not run: {failure.cell.slug}: {failure.reason}", markup=False)
    raise typer.Exit(2 if failures else 0)
