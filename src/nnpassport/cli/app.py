"""The command line. Exit codes: 0 accepted, 1 refused, 2 could not be checked, 130 interrupted.

`judge`, `compare` and `diary replay` also have 3: it was checked, and the evidence does not tell.
"""

import json
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport import __version__
from nnpassport.cli import attack as attacking
from nnpassport.cli import claim as claiming
from nnpassport.cli import compare as comparing
from nnpassport.cli import diary as keeping
from nnpassport.cli import key as drawing
from nnpassport.cli import layers as inspecting
from nnpassport.cli import leaderboard as ranking
from nnpassport.cli import probe as probing
from nnpassport.cli import publish as publishing
from nnpassport.cli import reproduce as reproducing
from nnpassport.cli import trace as tracing
from nnpassport.cli import verify as judging
from nnpassport.cli.options import (
    AsJson,
    Factory,
    Images,
    KeyFile,
    Network,
    Out,
    Passphrase,
    Public,
    Run,
    Sets,
    Setting,
    key_from,
    opened_key,
    save_bound,
)
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import (
    complain,
    complaints,
    errors,
    heeded,
    measured,
    print_doors,
    print_error,
    print_metrics,
    print_result,
    print_table,
    print_verdict,
    progress_bar,
    tell,
    told_with_bars,
    warned_in_words,
)
from nnpassport.embedding.train.processes import world
from nnpassport.scheme import OwnershipError

app = typer.Typer(
    name="nnpassport",
    help="Prove that a neural network is yours, and make sure that nobody else can claim it.",
    epilog="Exit codes: 0 accepted or done, 1 refused, 2 could not be checked; judge, compare: 3 "
    "undecided. "
    "Start with: nnpassport demo",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)
app.add_typer(drawing.app, name="key")
app.add_typer(claiming.app, name="claim")
app.add_typer(keeping.app, name="diary")


@app.command()
def demo(
    out: Out = Path("nnpassport-demo"),
    as_json: AsJson = False,
) -> None:
    """Tell the whole story on embedded data, in a minute or two: embed, release, verify, forge."""
    from nnpassport.lab.demo import COMMANDS, table
    from nnpassport.lab.demo import demo as run_demo

    with progress_bar("demo") as show:
        result = run_demo(out, show=show)
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
        raise typer.Exit(0 if result.as_expected else 1)
    print_table(("what", "result", "what it means"), table(result))
    errors.print(f"\nThe picture, and what it shows and does not show: {out / 'demo.html'}")
    errors.print(f"What to try next, in {out}:")
    for command, outcome in COMMANDS:
        errors.print(f"  {outcome}")
        errors.print(f"      {command}", soft_wrap=True)
    raise typer.Exit(0 if result.as_expected else 1)


@app.command()
def schemes(as_json: AsJson = False) -> None:
    """List the schemes: what each is, and the paper it is from."""
    from nnpassport.catalog import CATALOG

    facts = {n: {"source": e.source, "summary": e.summary} for n, e in CATALOG.items()}
    rows = [(n, e.source, e.summary) for n, e in CATALOG.items()]
    print_result(facts, as_json, lambda: print_table(("scheme", "from", "what it is"), rows))


@app.command()
@spread
def train(
    data: Images,
    out: Out,
    sets: Sets,
    network: Network,
    run: Run,
    as_json: AsJson = False,
) -> None:
    """Train a plain network, without any mark, to compare marked ones with."""
    from nnpassport.embedding import owner as ownership

    recipe, base = run.chosen, run.base(network)
    images = sets.divided(data, base, run)
    with run.journal(out) as journal:
        done = ownership.train(
            out, base.config_for(images), images, recipe, initial=base.weights, journal=journal
        )
    print_metrics(out, done.metrics, as_json)


@final
@dataclass(frozen=True, slots=True)
class Marking:
    """What a mark is to be like, and what it may cost."""

    late: Annotated[
        float | None,
        typer.Option(
            help="V2, V3: share of steps before the private branch is trained too (default: 0; "
            "1, never, with passports of channels, V1 too)."
        ),
    ] = None
    triggers_per_step: Annotated[
        int | None,
        typer.Option(
            help="V3, adi: trigger images in each step (default: 2, or more if the training is "
            "too short to learn them)."
        ),
    ] = None
    harm: Annotated[
        float | None,
        typer.Option(
            help="With --init: share of confident answers that the mark may change (default: "
            "0.02). If it would change more, the network is restored."
        ),
    ] = None
    harm_error: Annotated[
        float | None,
        typer.Option(
            help="The same if no answer is confident: relative error of the outputs (default: 0.1)."
        ),
    ] = None
    public: Public = None
    setting: Setting = None

    def scheme(self, key: Any) -> Any:
        """The key's scheme, with these settings."""
        from nnpassport.catalog import (
            read_settings,
            require_settings,
            scheme_named,
            with_settings,
        )

        settings = read_settings(self.setting or ())
        require_settings(key, settings)
        given = {n: getattr(self, n) for n in ("late", "triggers_per_step", "harm", "harm_error")}
        chosen = with_settings(scheme_named(key.context.scheme), **given)
        return with_settings(chosen, **settings)


@app.command()
@spread
def embed(
    data: Images,
    key: KeyFile,
    out: Out,
    sets: Sets,
    network: Network,
    marking: Marking,
    run: Run,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Train a network that carries your key. Interrupt at will; --resume continues exactly there.

    A key with a passport for each channel is bound to the network before the mark: the network of
    --init, or the one after the first part of training. It is written into anchor/.
    """
    from nnpassport.embedding import owner as ownership

    secret, phrase = opened_key(key, passphrase)
    scheme, recipe, base = marking.scheme(secret), run.chosen, run.base(network)
    images = sets.divided(data, base, run)
    config = base.config_of_its_task(images)
    with run.journal(out) as journal:
        begun = {"initial": base.weights, "journal": journal}
        bound = ownership.bind_key(
            out, config, secret, images, recipe, public=marking.public or (), **begun
        )
        if bound is not secret:
            save_bound(bound, key, phrase, out)
        done = ownership.embed(out, config, bound, images, recipe, scheme=scheme, **begun)
    print_metrics(out, done.metrics, as_json)


@app.command()
def release(
    source: Annotated[Path, typer.Argument(help="Model folder, from `embed`.")],
    key: KeyFile,
    out: Out,
    licensee: Annotated[
        str | None,
        typer.Option(
            help="Who gets this copy. Its hidden units are put into an order of their own, so "
            "that `trace` can tell whose copy leaked. The answers stay the same."
        ),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            help="With --licensee: your release without it, with axes.json (`claim axes`), as "
            "`trace` takes it. All copies are then in orders of that table. By default the axes "
            "are traced anew."
        ),
    ] = None,
    factory: Factory = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Write the copy you publish: the plain network, with no trace of the key."""
    from nnpassport.embedding.licensing import release_to
    from nnpassport.embedding.owner import release as release_plain

    if original is not None and licensee is None:
        raise typer.BadParameter("--original goes with --licensee: a release has no order without")
    secret = key_from(key, passphrase)
    told = ""
    if licensee is None:
        verdict = release_plain(source, secret, out, trusted_factory=factory)
    else:
        made = release_to(licensee, source, secret, out, original=original, trusted_factory=factory)
        verdict, table = made.verdict, f"table {made.table[:16]}…"
        told = f"The copy for {licensee}: {made.axes} axes are in an order of their own, by {table}"
    print_result(verdict.as_dict(), as_json, lambda: print_verdict(verdict))
    if told:
        errors.print(told, markup=False, soft_wrap=True)
    errors.print(f"Released to {out}. The key stays with you.")


@app.command()
def bench(
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the result to this file, as JSON."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Measure everything, not only the quick part.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(help="Minutes to spend; the output names what did not fit in.")
    ] = 10.0,
    architecture: Annotated[
        list[str] | None, typer.Option(help="Only this architecture; repeatable.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Only this many images in a step; repeatable.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Only this precision; repeatable.")
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Only compiled networks, or only others (default: both)."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this part: infer, train, memory, acts or loop; repeatable."),
    ] = None,
) -> None:
    """Measure what marks cost in training, inference and other acts, against the plain network."""
    from nnpassport.lab.bench import choose, run

    cases = choose(
        full=full,
        architectures=architecture or (),
        batches=batch or (),
        precisions=precision or (),
        compiled=compiled,
        only=only or (),
    )
    with progress_bar("bench") as show:
        typer.echo(run(out, cases=cases, minutes=minutes, show=show))


app.command()(inspecting.layers)
app.command()(judging.verify)
app.command()(judging.judge)
app.command()(comparing.compare)
app.command()(probing.probe)
app.command()(publishing.export)
app.command()(publishing.package)
app.command()(reproducing.reproduce)
app.command()(ranking.leaderboard)
app.command()(tracing.trace)
app.command()(attacking.attack)
app.command("attacks")(attacking.list_attacks)
app.command()(attacking.audit)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"nnpassport {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="Print only results and errors. Works with every command."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            help="Also print versions, time, memory and tracebacks. Works with every command.",
        ),
    ] = False,
) -> None:
    if quiet or verbose:
        tell(quiet=quiet, verbose=verbose)
    if context.invoked_subcommand is None:
        print_doors()


# ClickException: click's own under older typers, typer's copy of it under newer ones.
_BadUsage: type[Exception] = typer.BadParameter.__mro__[2]


def main() -> None:
    """Run the command line and exit; anything unexpected is "could not be checked", never "no"."""
    words = heeded(sys.argv[1:])
    try:
        with measured(), warned_in_words(), told_with_bars():
            code = app(words, standalone_mode=False)
    except OwnershipError as error:
        if _first_to_say(type(error).__name__):
            print_error(error)
        sys.exit(2)
    except _BadUsage as error:
        _complain_of_usage(error)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        complaints.print("interrupted; an interrupted run continues with --resume")
        sys.exit(130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == __package__.partition(".")[0]:
            traceback.print_exc()
        else:
            _complain_of_missing(missing, error)
        sys.exit(2)
    except Exception as error:  # an error of ours must not look like a refusal
        traceback.print_exc()
        why = "this is a fault of the program and says nothing about the network"
        complain(f"{type(error).__name__}", why, "report it, with the lines above", error)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def _complain_of_usage(error: Any) -> None:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "nnpassport"
    why = "the command was not understood, and nothing was done"
    complain(error.format_message(), why, f"{path} --help", error)


def _complain_of_missing(name: str, error: ModuleNotFoundError) -> None:
    what = f"this needs {_NAMES.get(name, name)}, which is not installed"
    why = "without it marks in weights are verified, and claims and keys are shown"
    complain(what, why, 'pip install "nnpassport[torch]"', error)


_NAMES = {"torch": "PyTorch", "PIL": "Pillow", "sklearn": "scikit-learn"}


def _first_to_say(what: str) -> bool:
    """Whether no other of several processes that fail alike has said so."""
    if world() == 1:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all when one has failed
    from nnpassport.embedding.train.team import first_to_say

    return first_to_say(what)


if __name__ == "__main__":
    main()
