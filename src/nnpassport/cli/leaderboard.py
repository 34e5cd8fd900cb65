"""The command `leaderboard`: every scheme against every attack, run and rendered."""

from pathlib import Path
from typing import Annotated

import typer

from nnpassport.cli.options import AsJson
from nnpassport.cli.reproduce import Grid, narrowed, print_plan
from nnpassport.cli.spread import spread


@spread
def leaderboard(
    *,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Only this scheme; repeatable (default: the whole catalog)."),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Only this attack; repeatable (default: all that apply)."),
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(help="leaderboard, or leaderboard-trial (embedded digits, takes minutes)."),
    ] = "leaderboard",
    grid: Grid,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Markdown page to write; the HTML page and a picture are written beside it.",
        ),
    ] = None,
    render_only: Annotated[
        bool,
        typer.Option(
            "--render-only", help="Run nothing; write the pages from the results that there are."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run every pair of scheme and attack that has no result yet, and render the leaderboard.

    A run that is done is never repeated, and one that was interrupted resumes. Exit code 2 if
    something could not be run.
    """
    from nnpassport.lab.leaderboard import board, field
    from nnpassport.lab.plans import field_plan_named

    plan = narrowed(field_plan_named(recipe), grid.seeds, ())
    cells = field.cells_of(plan, scheme or (), attack or ())
    if grid.dry_run:
        print_plan(cells, grid.store, grid.jobs, as_json, costs_too=False)
        raise typer.Exit(0)
    failures = [] if render_only else grid.run("leaderboard", cells)
    page = out or grid.results / plan.name / "leaderboard.md"
    grid.end(cells, failures, {"pages": board.render(plan, grid.store, page)}, as_json)
