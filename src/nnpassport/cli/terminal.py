"""What a person sees: bars on stderr, tables and verdicts on stdout."""

import json
from collections.abc import Callable, Iterator, Sequence
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

from nnpassport.embedding.train.processes import leads
from nnpassport.scheme import Verdict, spelled

# No markup: a path or a name may be [/b].
errors = Console(stderr=True, highlight=False, markup=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar on stderr; yields the function to call with (done, total) or (done, total, text)."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True, disable=not leads()) as progress:
        task = progress.add_task(spelled(title), total=1, note="")

        def show(done: float, total: float, text: str | None = None) -> None:
            progress.update(task, completed=done, total=total, note=spelled(text or ""))

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
            ("null", _null(null)),
        ]
    if verdict.claim is not None:
        rows += [("claim", f"{verdict.claim['reason']}; {verdict.claim['age']}")]
    rows += [("reason", verdict.reason)]
    rows += [(f"sha256 {name}", digest) for name, digest in verdict.digests.items()]
    print_table(("", ""), rows)


def _null(null: Any) -> str:
    matches = f": {null['matches']} of {null['bits']} match" if null["matches"] else ""
    return f"{null['networks']}{matches}"


def print_ruling(facts: Any) -> None:
    """Print a ruling, its reasons, and what every reading found."""
    owner, owners, ruling = facts["owner"], facts["owners"], str(facts["ruling"])
    said = f"OWNER: {owner}" if owner else ruling.upper()
    if owners and not owner:
        said = f"SHARED: {', '.join(owners)}, a part each"
    Console().print(shown(said, "bold"))
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
        Console(highlight=False).print(shown(f"{number}. {reason}"))


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of texts on stdout; a head of empty texts is left out."""
    table = Table(show_header=any(head), box=None, pad_edge=False)
    for title in head:
        table.add_column(shown(title), overflow="fold")
    for row in rows:
        table.add_row(*map(shown, row))
    Console(highlight=False).print(table)


def shown(text: str, style: str = "") -> Text:
    """Anybody's text for a terminal: an owner's name or a file's is no markup and no command."""
    return Text(spelled(text), style=style)


def after_all(write: Callable[[], object], what: str) -> None:
    """Write what only shows the verdict that has been printed; if that fails, the verdict stands.

    The exit code stays that of the verdict: 2 would say that nothing could be checked.
    """
    try:
        write()
    except Exception as error:
        errors.print(f"error: {what} was not written; what is printed stands, and so does the exit")
        errors.print(f"code. {type(error).__name__}: {spelled(str(error)[:1_000])}", soft_wrap=True)
