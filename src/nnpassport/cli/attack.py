"""The commands `attack` and `audit`: from files to a subject, and its results back to files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from nnpassport.cli.options import (
    AsJson,
    Factory,
    Images,
    Passphrase,
    Precision,
    Resume,
    Seed,
    Split,
    images_from,
    key_from,
)
from nnpassport.cli.terminal import errors, print_table, progress_bar

Network = Annotated[Path, typer.Argument(help="Released model folder.")]
OwnerKey = Annotated[
    Path | None, typer.Option("--key", help="The owner's key: what is left of it is measured.")
]
AttackerImages = Annotated[
    str | None, typer.Option("--train", help="Images that attackers have (none: no training).")
]
AttackerSplit = Annotated[str | None, typer.Option("--train-split", help="Split of --train.")]
OtherTask = Annotated[
    str | None, typer.Option("--transfer", help="Images of another task, to fine-tune to.")
]
OtherTest = Annotated[
    str | None, typer.Option("--transfer-test", help="Test images of that task (default: a tenth).")
]
Forge = Annotated[
    str, typer.Option("--scheme", help="Without --key: the scheme that forgers are to forge.")
]
Passes = Annotated[int, typer.Option("--epochs", help="Passes that attackers train for.")]
StepSize = Annotated[int, typer.Option("--batch", help="Images in an attacker's step.")]
Limit = Annotated[
    int | None, typer.Option(help="Measure on so many of the images only (default: all).")
]
TrainLimit = Annotated[
    int | None, typer.Option(help="Give attackers so many of their images only (default: all).")
]


def attack(
    name: Annotated[str, typer.Argument(help="Attack; `nnpassport attacks` lists them.")],
    model: Network,
    data: Images,
    split: Split = None,
    strength: Annotated[
        float | None, typer.Option(help="How strong; what it means depends on the attack.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the attacked model folder or the forged key here."),
    ] = None,
    key: OwnerKey = None,
    scheme: Forge = "passport-v2",
    train: AttackerImages = None,
    train_split: AttackerSplit = None,
    transfer: OtherTask = None,
    transfer_test: OtherTest = None,
    epochs: Passes = 10,
    batch: StepSize = 64,
    precision: Precision = "float32",
    limit: Limit = None,
    train_limit: TrainLimit = None,
    seed: Seed = 0,
    factory: Factory = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """One attack on a network: what is left of the mark, or what the forger wins."""
    from nnpassport.lab import audit as auditing

    chosen = auditing.attack_named(name)
    subject = _subject(
        _Files(model, (data, split), key, scheme, (train, train_split), (transfer, transfer_test)),
        budget=auditing.Budget(epochs, batch, precision),
        limits=(limit, train_limit),
        seed=seed,
        factory=factory,
        passphrase=passphrase,
    )
    power = (chosen.quick or chosen.full)[0] if strength is None else strength
    entry = auditing.attack_once(subject, name, power, out)
    if as_json:
        typer.echo(json.dumps(entry, indent=2, ensure_ascii=False))
        return
    print_table(("", ""), auditing.words(entry))


def audit(
    model: Network,
    data: Images,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")],
    split: Split = None,
    key: OwnerKey = None,
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="What `embed` wrote, with the network before the mark in `anchor/`: what thieves "
            "moved is read by it."
        ),
    ] = None,
    scheme: Forge = "passport-v2",
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="All strengths and attacks that train, or minutes."),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this attack; repeatable (default: all).")
    ] = None,
    train: AttackerImages = None,
    train_split: AttackerSplit = None,
    transfer: OtherTask = None,
    transfer_test: OtherTest = None,
    epochs: Passes = 10,
    batch: StepSize = 64,
    precision: Precision = "float32",
    limit: Limit = None,
    train_limit: TrainLimit = None,
    seed: Seed = 0,
    resume: Resume = False,
    factory: Factory = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Attack a network with all that is known; writes audit.json and audit.html."""
    from nnpassport.lab import audit as auditing

    subject = _subject(
        _Files(model, (data, split), key, scheme, (train, train_split), (transfer, transfer_test)),
        budget=auditing.Budget(epochs, batch, precision),
        limits=(limit, train_limit),
        seed=seed,
        factory=factory,
        passphrase=passphrase,
    )
    if anchor is not None:
        subject = replace(subject, anchor=_anchor_of(subject.key, anchor, factory))
    with progress_bar("audit") as show:
        report = auditing.audit_to(
            out, subject, full=full, only=only or (), resume=resume, show=show
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
        return
    typer.echo(auditing.ruling(report))
    errors.print(f"Every attack, with pictures: {out / 'audit.html'}")


def list_attacks(as_json: AsJson = False) -> None:
    """Name every attack, what it does and what it needs."""
    from nnpassport.lab.audit import ATTACKS

    facts = [
        {"name": n, "family": a.family.value, "summary": a.summary, "needs": sorted(a.needs)}
        for n, a in ATTACKS.items()
    ]
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    rows = [
        (str(f["name"]), str(f["family"]), str(f["summary"]), ", ".join(f["needs"])) for f in facts
    ]
    print_table(("attack", "family", "what it does", "needs"), rows)


def _anchor_of(key: Any, folder: Path, factory: str | None) -> Any:
    """The network before the mark, if it is the one that the key is bound to."""
    from nnpassport.embedding.checkpoint import load_model
    from nnpassport.scheme import UnreadableKeyError
    from nnpassport.verification.anchor import anchor_in, read_anchor

    if key is None:
        raise UnreadableKeyError("an anchor was given and no key; needed: --key too, or neither")
    read_anchor(folder, key)
    return load_model(anchor_in(folder), trusted_factory=factory).model


class _Files(NamedTuple):
    """What the options name: a released network, and images as (source, split)."""

    model: Path
    data: tuple[str, str | None]
    key: Path | None
    scheme: str
    train: tuple[str | None, str | None]
    transfer: tuple[str | None, str | None]


def _subject(
    files: _Files,
    *,
    budget: Any,
    limits: tuple[int | None, int | None],
    seed: int,
    factory: str | None,
    passphrase: bool,
) -> Any:
    """A subject from files."""
    from nnpassport.catalog import scheme_named
    from nnpassport.data.images import Normalisation
    from nnpassport.embedding.checkpoint import load_model
    from nnpassport.lab.audit import Subject, Transfer

    loaded = load_model(files.model, trusted_factory=factory)
    secret = None if files.key is None else key_from(files.key, passphrase)

    def read(name: str | None, split: str | None, most: int | None) -> Any:
        if name is None:
            return None
        return images_from(name, split, loaded.config).at_most(most, seed=seed)

    other = None
    if files.transfer[0] is not None:
        images = read(files.transfer[0], None, limits[1])
        if files.transfer[1] is None:
            other = Transfer(*images.split(0.1, seed=seed))
        else:
            other = Transfer(images, read(files.transfer[1], None, limits[0]))
    return Subject(
        model=loaded.model,
        config=loaded.config,
        scheme=scheme_named(files.scheme if secret is None else secret.context.scheme),
        normalise=Normalisation(loaded.config.mean, loaded.config.std),
        key=secret,
        test=read(*files.data, limits[0]),
        train=read(*files.train, limits[1]),
        transfer=other,
        budget=budget,
        seed=seed,
    )
