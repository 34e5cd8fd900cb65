"""What a person sees: bars and remarks on stderr, tables and verdicts on stdout.

`--quiet` leaves results and errors; `--verbose` adds versions, time, memory and tracebacks.
"""

import inspect
import json
import os
import platform
import sys
import time
import traceback
import warnings
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
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nnpassport import __version__
from nnpassport.embedding.train.processes import leads
from nnpassport.ground.lazy import load
from nnpassport.ground.progress import heard_by
from nnpassport.scheme import OwnershipError, UnmarkedWarning, Verdict, spelled

# No markup: a path or a name may be [/b].
errors = Console(stderr=True, highlight=False, markup=False)
"""Bars and remarks; silent with --quiet."""

complaints = Console(stderr=True, highlight=False, markup=False)
"""Why something could not be done; never silent."""

_UNBROKEN = 10_000


def output() -> Console:
    """Stdout. In a file or a pipe, where nobody has set COLUMNS, no line is broken."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNBROKEN
    return console


DOORS = (
    (
        "You own a network: mark it, publish it, claim it.",
        "nnpassport layers FOLDER",
        "what in it can carry a mark",
    ),
    (
        "You are accused of a copy: see what is held against you.",
        "nnpassport compare YOURS THEIRS",
        "is it a copy? (`verify`: is it marked?)",
    ),
    (
        "You judge: check a key, a claim, a dispute.",
        "nnpassport judge SUSPECT EXHIBITS",
        "whose network is it?",
    ),
    (
        "You research marks and attacks.",
        "nnpassport schemes",
        "all schemes; `nnpassport attacks`: all attacks",
    ),
)
"""Who comes here, the next command for each, and what it tells."""

_QUIET, _VERBOSE = "--quiet", "--verbose"
_talkative = False
_AT_ONCE = 1.0  # seconds that nobody needs a bar for


def heeded(words: Sequence[str]) -> list[str]:
    """The words of a command line without --quiet and --verbose, which are heeded anywhere."""
    end = words.index("--") if "--" in words else len(words)
    said = set(words[:end]) & {_QUIET, _VERBOSE}
    tell(quiet=_QUIET in said, verbose=_VERBOSE in said)
    return [word for place, word in enumerate(words) if word not in said or place >= end]


def tell(*, quiet: bool, verbose: bool) -> None:
    """How much is said on stderr from here on; both together are tracebacks without remarks."""
    global _talkative
    errors.quiet, _talkative = quiet, verbose


@contextmanager
def measured() -> Iterator[None]:
    """With --verbose: versions before, and time and memory after what is done here."""
    if not _talkative:
        yield
        return
    system = f"Python {platform.python_version()}, {platform.platform(terse=True)}"
    complaints.print(f"nnpassport {__version__}, {system}", soft_wrap=True)
    start = time.perf_counter()
    try:
        yield
    finally:
        torch = sys.modules.get("torch")
        loaded = "" if torch is None else f", torch {torch.__version__}"
        complaints.print(f"{time.perf_counter() - start:.1f} s{_memory()}{loaded}")


@contextmanager
def warned_in_words() -> Iterator[None]:
    """Warnings of ours are a line on stderr here, without the place in the code."""
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, UnmarkedWarning):
                complaints.print("warning:", style="yellow", end=" ")
                complaints.print(spelled(str(message)), soft_wrap=True)
            else:
                before(message, category, *place, **more)

        warnings.showwarning = show
        yield


def _memory() -> str:
    try:
        import resource
    except ImportError:
        return ""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f", {most / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MiB at most"


def print_doors() -> None:
    """Who the program is for, and the next command for each."""
    out = output()
    out.print(f"nnpassport {__version__}: prove that a neural network is yours.\n")
    for who, command, tells in DOORS:
        out.print(who, style="bold")
        out.print(f"    {command}   # {tells}")
    out.print("\nNew here?   nnpassport demo   # the whole story, a minute or two")
    out.print("All commands: nnpassport --help; of each: nnpassport COMMAND --help")


def print_error(error: OwnershipError) -> None:
    """What could not be done, why, and what would work: a line each."""
    what, needed, would_work = str(error).partition("; needed: ")
    if not needed:
        what, parted, would_work = str(error).rpartition("; ")
        if not parted:
            what, would_work = would_work, "nnpassport COMMAND --help says what it needs"
    why = (inspect.getdoc(type(error)) or "").splitlines()[0].rstrip(".")
    complain(what, f"{why} ({type(error).__name__})", would_work, error)


def complain(what: str, why: str, would_work: str, error: BaseException) -> None:
    """Three lines on stderr; with --verbose the traceback before them."""
    if _talkative:
        traceback.print_exception(error)
    for word, text in (("error:", what), ("why:  ", why), ("try:  ", would_work)):
        complaints.print(word, style="red" if word == "error:" else "bold", end=" ")
        complaints.print(spelled(text.replace("\n", " ")), soft_wrap=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Any]:
    """A bar on stderr; yields the function to call with (done, total) or (done, total, text).

    What acts inside tell of themselves (`ground.progress`) has a bar of its own below it.
    """
    _alone.end()
    with _bars() as bars:
        task = bars.add_task(spelled(title), total=1, note="")

        def show(done: float, total: float, text: str | None = None) -> None:
            bars.update(task, completed=done, total=total, note=spelled(text or ""))

        with heard_by(_Told(bars)):
            yield show


@contextmanager
def told_with_bars() -> Iterator[None]:
    """What acts tell of themselves is shown while they last, once a second has gone by."""
    ready, told = time.monotonic() + _AT_ONCE, _alone

    def hear(done: float, total: float, what: str) -> None:
        if done >= total:
            told.end()
        elif time.monotonic() > ready:
            told(done, total, what)

    try:
        with heard_by(hear):
            yield
    finally:
        told.end()


class _Told:
    """The bar of what acts tell: among other bars, or by itself while there is what to show."""

    def __init__(self, bars: Progress | None) -> None:
        self._within, self._bars = bars, bars
        self._task: TaskID | None = None

    def __call__(self, done: float, total: float, what: str) -> None:
        if self._bars is None:
            self._bars = _bars()
            self._bars.start()
        if self._task is None:
            self._task = self._bars.add_task("", total=total, note="")
        going = done < total
        self._bars.update(
            self._task, description=spelled(what), completed=done, total=total, visible=going
        )

    def end(self) -> None:
        """Take the bar away, so that results can be printed."""
        if self._within is None and self._bars is not None:
            self._bars.stop()
            self._bars, self._task = None, None


_alone = _Told(None)


def _bars() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=errors, transient=True, disable=not leads())


def print_metrics(out: Path, metrics: Any, as_json: bool) -> None:
    """Print what a run measured, in percent, or as JSON as it is; one process of several does."""
    if not leads():
        return
    rows = [(n, f"{100 * value:.2f}") for n, value in metrics.items()]
    facts = {"folder": str(out), "metrics": dict(metrics)}
    print_result(facts, as_json, lambda: print_table((str(out), "%"), rows))


def print_verdict(verdict: Verdict) -> None:
    """Print a verdict and all that it rests on, for people."""
    output().print("ACCEPTED" if verdict.accepted else "REFUSED", style="bold")
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
    output().print(shown(said, "bold"))
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
        output().print(shown(f"{number}. {reason}"))


def print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows of texts on stdout; a head of empty texts is left out."""
    table = Table(show_header=any(head), box=None, pad_edge=False)
    for title in head:
        table.add_column(shown(title), overflow="fold")
    for row in rows:
        table.add_row(*map(shown, row))
    output().print(table)


def shown(text: str, style: str = "") -> Text:
    """Anybody's text for a terminal: an owner's name or a file's is no markup and no command."""
    return Text(spelled(text), style=style)


def print_result(
    facts: Any, as_json: bool, told: Callable[[], object], *, ensure_ascii: bool = True
) -> None:
    """Print a result on stdout: as JSON, or as `told` does for people."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=ensure_ascii))
    else:
        told()


def print_rows(facts: Any, as_json: bool, rows: Sequence[tuple[str, ...]]) -> None:
    """The same with a table of these rows, without a head."""
    print_result(facts, as_json, lambda: print_table(("", ""), rows))


def paged(write: str, facts: Any, report: Path | None) -> None:
    """Also write the page of a printed result; `write` is where what does it is."""
    if report is not None:
        after_all(lambda: load(write)(facts, report), str(report))


def after_all(write: Callable[[], object], what: str) -> None:
    """Write what only shows the verdict that has been printed; if that fails, the verdict stands.

    The exit code stays that of the verdict: 2 would say that nothing could be checked.
    """
    try:
        write()
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error)[:1_000]}"
        would_work = "what is printed stands, and so does the exit code; write to another place"
        complain(f"{what} was not written", reason, would_work, error)
