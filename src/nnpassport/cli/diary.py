"""The commands `diary …`: what a training came to, step by step, signed and dated."""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport.cli.claim import passphrase_of_signing
from nnpassport.cli.options import AsJson, Factory, Held, Images, Initial, Split
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_table

app = typer.Typer(
    help="Keep a diary of training: a chain of signed, timestamped entries.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(help="The diary's folder.")]
Signing = Annotated[Path, typer.Option(help="Secret signing key, from `claim keygen`.")]
Root = Annotated[
    list[Path] | None,
    typer.Option("--root", help="Root certificate of a timestamp authority, PEM; repeatable."),
]


@app.command()
def new(
    folder: Folder,
    signing: Signing,
    note: Annotated[
        str, typer.Option(help="What is being trained: one line, for the record.")
    ] = "",
) -> None:
    """Begin a diary. `train --diary` and `embed --diary` write into it, and so does `diary add`."""
    from nnpassport.claims import diary

    line = diary.begin(folder, _signing_key(signing), note)
    errors.print(f"{folder}: begun, signed with {line.entry.owner_key}", soft_wrap=True)


@app.command()
def add(
    folder: Folder,
    signing: Signing,
    step: Annotated[int, typer.Option(help="Optimiser steps so far.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The network as it is now: a model folder or weights file.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep a copy of the checkpoint in the diary's folder.")
    ] = False,
    configuration: Annotated[
        Path | None, typer.Option(help="A file that says how the network is trained. It is copied.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="SHA-256 of the training data, 64 hex digits.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="A measurement, such as loss=0.25; repeatable.")
    ] = None,
    note: Annotated[str, typer.Option(help="A remark of one line, for the record.")] = "",
    as_json: AsJson = False,
) -> None:
    """Add an entry about the state of a training, from a loop that is not ours."""
    from nnpassport.claims import diary
    from nnpassport.claims.entries import Facts
    from nnpassport.files.weights import digest_of

    if keep and checkpoint is None:
        raise typer.BadParameter("--keep keeps --checkpoint; give it, or leave --keep out")
    named = None if checkpoint is None else digest_of(checkpoint)
    told = None if configuration is None else _configured(folder, configuration)
    facts = Facts(step, named, None, told, data, _metrics(metric or []), note)
    line = diary.add(folder, _signing_key(signing), facts)
    if keep and checkpoint is not None:
        _keep(folder, line.entry.number, checkpoint)
    if as_json:
        typer.echo(json.dumps(line.entry.as_dict(), indent=2))
        return
    errors.print(f"entry {line.entry.number}: {line.digest}", soft_wrap=True)


@app.command()
def stamp(
    folder: Folder,
    authority: Annotated[str, typer.Option(help="URL of an RFC 3161 timestamp authority.")],
    authority_root: Annotated[
        Path,
        typer.Option(help="The authority's root certificate, PEM. The token is checked at once."),
    ],
) -> None:
    """Have the last entry timestamped, and with it all before it. Once a day is enough."""
    from nnpassport.claims import diary, timestamp

    number = diary.stamp(folder, authority, timestamp.load_roots(authority_root))
    errors.print(f"entry {number} and all before it are timestamped")


@app.command()
def verify(
    folder: Folder,
    owner: Annotated[Path, typer.Option(help="Owner's public key, PEM.")],
    root: Root = None,
    network: Annotated[
        Path | None, typer.Option(help="A network, to check that the diary names it.")
    ] = None,
    chain_only: Annotated[
        bool, typer.Option("--chain-only", help="Do not compare the checkpoints that were kept.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Does a diary hold? 0: yes. 1: chain, dates, checkpoints or network do not. 2: not checked.

    Kept checkpoints are compared, each with the one before and with the first. No network is run:
    `diary replay` does that, and is what nobody can forge.
    """
    from nnpassport.claims import diary
    from nnpassport.claims.signing import load_public_key
    from nnpassport.claims.timestamp import load_roots
    from nnpassport.files.weights import digest_of
    from nnpassport.verification.continuity import continuity

    roots = None if root is None else [each for path in root for each in load_roots(path)]
    found = diary.check(folder, load_public_key(owner), roots=roots)
    facts: dict[str, Any] = found.as_dict()
    holds = found.holds and (roots is None or bool(found.stamps))
    if found.holds and not chain_only:
        kept = continuity(folder, found.entries)
        facts["continuity"] = kept.as_dict()
        holds = holds and kept.continued is not False
    if network is not None:
        entry = found.naming(digest_of(network))
        token = None if entry is None else found.dated(entry.number)
        facts["network"] = {
            "entry": None if entry is None else entry.number,
            "latest": None if token is None else token.as_dict()["latest"],
        }
        holds = holds and entry is not None
    facts["holds"] = holds
    _print(facts, as_json)
    raise typer.Exit(0 if holds else 1)


@final
@dataclass(frozen=True, slots=True)
class Again:
    """Which stretch of a diary is run again, and what its run was given."""

    data: Images
    split: Split = None
    validation: Held = 0.05
    start: Annotated[
        int | None,
        typer.Option("--from", help="Entry from which to start (default: drawn at random)."),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(help="The key, if the run was one of `embed`. It is then no longer secret."),
    ] = None
    init: Initial = None
    tolerance: Annotated[
        float,
        typer.Option(help="What always counts as rounding: a share of the way gone."),
    ] = 0.05
    factory: Factory = None

    def run(self, folder: Path, entries: Any) -> Any:
        """A stretch, drawn by lot among those that there are, run once more.

        Raises:
            UnreadableClaimError: the diary has no such stretch.
        """
        from nnpassport.cli.options import key_from
        from nnpassport.embedding.replaying import replay, running_as, stretches
        from nnpassport.scheme import UnreadableClaimError

        there = [s for s in stretches(folder, entries) if self.start in (None, s.start.number)]
        if not there:
            raise UnreadableClaimError(
                f"{folder} has no stretch of one run between two kept checkpoints"
                f"{'' if self.start is None else f' that begins at entry {self.start}'}; needed: a "
                "diary whose --diary-keep kept them"
            )
        stretch = secrets.choice(there)
        run = running_as(
            folder,
            stretch,
            self.data,
            split=self.split,
            validation=self.validation,
            key=None if self.key is None else key_from(self.key, False),
            initial=self.init,
            trusted_factory=self.factory,
        )
        return replay(folder, stretch, run, tolerance=self.tolerance)


@app.command()
@spread
def replay(
    *,
    folder: Folder,
    owner: Annotated[Path, typer.Option(help="Owner's public key, PEM.")],
    again: Again,
    as_json: AsJson = False,
) -> None:
    """Run a stretch again, from one kept checkpoint to the next. 0: it ends there. 1: it does not.

    2: not checked. 3: rounding carries the stretch so far that it cannot be told.

    Give what the run was given: data, its split and held-out share, and the key and the initial
    network if there were any. Everything else is in the diary.
    """
    from nnpassport.claims import diary
    from nnpassport.claims.signing import load_public_key
    from nnpassport.scheme import BadSignatureError

    found = diary.check_chain(folder, load_public_key(owner))
    if not found.holds:
        raise BadSignatureError(found.reason)
    done = again.run(folder, found.entries)
    _print(done.as_dict(), as_json)
    raise typer.Exit({True: 0, False: 1, None: 3}[done.holds])


def _signing_key(path: Path) -> Any:
    from nnpassport.claims.signing import load_signing_key

    return load_signing_key(path, passphrase=passphrase_of_signing(False, new=False))


def _configured(folder: Path, path: Path) -> str:
    from nnpassport.claims import diary
    from nnpassport.claims.signing import read_small
    from nnpassport.scheme import UnreadableClaimError

    data = read_small(path, "configuration", diary.MAX_CONFIGURATION_BYTES, UnreadableClaimError)
    return diary.configured(folder, data)


def _metrics(words: list[str]) -> dict[str, float]:
    found = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise typer.BadParameter(f"--metric {word!r} is no NAME=NUMBER") from None
    return found


def _keep(folder: Path, number: int, checkpoint: Path) -> None:
    from nnpassport.claims.diary import kept_in
    from nnpassport.files.arrays import MAX_MODEL_BYTES
    from nnpassport.files.config import CONFIG_FILE
    from nnpassport.files.disk import read_once, write_atomically
    from nnpassport.files.weights import read_arrays

    inside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    names = list(read_arrays(checkpoint).digests)
    if checkpoint.is_dir() and os.path.lexists(checkpoint / CONFIG_FILE):
        names.append(CONFIG_FILE)
    for name in names:
        content = read_once(inside / name, MAX_MODEL_BYTES)
        write_atomically(kept_in(folder, number) / name, content, mode=0o600)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    said = {True: "HOLDS", False: "DOES NOT HOLD", None: "UNDECIDED"}
    typer.echo(said[facts.pop("holds")])
    rows = []
    for name, value in facts.items():
        if name == "stamps":
            shown = "\n".join(f"entry {s['entry']}: {s['latest']}, {s['authority']}" for s in value)
        elif isinstance(value, dict):
            shown = str(value.get("reason", value))
        elif isinstance(value, list):
            shown = "\n".join(map(str, value))
        else:
            shown = str(value)
        rows.append((name, shown or "none"))
    print_table(("", ""), rows)
