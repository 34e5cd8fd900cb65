"""What a person sees: bars on stderr, tables and verdicts on stdout."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nnpassport.processes import leads
from nnpassport.scheme import Verdict

errors = Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar on stderr; yields the function to call with (done, total) or (done, total, text)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not leads()) as progress:
        task = progress.add_task(title, total=1, note="")

        def show(done: float, total: float, text: str | None = None) -> None:
            progress.update(task, completed=done, total=total, note=text or "")

        yield show


def print_metrics(out: Path, metrics: Any, as_json: bool) -> None:
    """Print what a run measured, in percent, or as JSON as it is; one process of several does."""
    if not leads():
        return
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "metrics": dict(metrics)}, indent=2))
        return
    print_table((str(out), "%"), [(n, f"{100 * value:.2f}") for n, value in metrics.items()])


def print_verdict(verdict: Verdict, as_json: bool) -> None:
    """Print a verdict and all that it rests on."""
    facts = verdict.as_dict()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    Console().print("ACCEPTED" if verdict.accepted else "REFUSED", style="bold")
    p = "none" if verdict.log10_p_value is None else f"10^{verdict.log10_p_value:.1f}"
    rows = [
        ("scheme", verdict.scheme),
        ("matches", f"{verdict.matches} of {verdict.bits} ({100 * verdict.match_rate:.2f} %)"),
        ("p-value", f"{p} against α = 10^{verdict.log10_alpha:.1f}"),
        *((f"  {n}", f"{hits} of {bits}") for n, (hits, bits) in verdict.layers.items()),
    ]
    if (f := verdict.fidelity) is not None:
        reached = f"{100 * f.accuracy:.2f} % with the passport presented"
        declared = f"target {100 * f.target:.2f} %, tolerance {100 * f.tolerance:.2f} points"
        rows.append(("fidelity", f"{'passed' if f.passed else 'failed'}: {reached}; {declared}"))
    if (a := verdict.alignment) is not None:
        null = a["null"]
        likeness = ", ".join(f"{name} {value:.2f}" for name, value in a["cosines"].items())
        rows += [
            ("alignment", f"mean |cosine|: {likeness}"),
            ("null", f"{null['networks']}: {null['matches']} of {null['bits']} match"),
        ]
    if verdict.claim is not None:
        rows += [("claim", f"{verdict.claim['reason']}; {verdict.claim['age']}")]
    rows += [("reason", verdict.reason)]
    rows += [(f"sha256 {name}", digest) for name, digest in verdict.digests.items()]
    print_table(("", ""), rows)


def print_ruling(facts: Any) -> None:
    """Print a ruling, its reasons, and what every reading found."""
    owner, owners, ruling = facts["owner"], facts["owners"], str(facts["ruling"])
    said = f"OWNER: {owner}" if owner else ruling.upper()
    if owners and not owner:
        said = f"SHARED: {', '.join(owners)}, a part each"
    Console().print(Text(said, style="bold"))
    rows = []
    for each in facts["claimants"]:
        for how, found in each["readings"].items():
            p = "none" if found["log10_p_value"] is None else f"10^{found['log10_p_value']:.1f}"
            said = "accepted" if found["accepted"] else "refused"
            count = f"{found['matches']} of {found['bits']}"
            rows.append((each["name"], how, count, f"p = {p}", said))
        if not each["readings"]:
            why = "not checked" if each["unchecked"] else "claim does not hold"
            rows.append((each["name"], "", "", "", why))
    print_table(("claimant", "read", "matches", "p-value", ""), rows)
    for number, reason in enumerate(facts["reasons"], 1):
        Console(highlight=False).print(Text(f"{number}. {reason}"))


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of texts on stdout; a head of empty texts is left out."""
    table = Table(show_header=any(head), box=None, pad_edge=False)
    for title in head:
        table.add_column(Text(title), overflow="fold")
    for row in rows:
        # Text, not str: an owner's name or a file's must not be read as markup.
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)
