"""The commands `attack` and `audit`: from files to a subject, and its results back to files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

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
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_result, print_table, progress_bar

Released = Annotated[Path, typer.Argument(help="Released model folder.")]


@final
@dataclass(frozen=True, slots=True)
class Attackers:
    """What attackers have, and what is measured of what they do."""

    key: Annotated[
        Path | None,
        typer.Option("--key", help="The owner's key, to measure what is left of the mark."),
    ] = None
    scheme: Annotated[
        str, typer.Option("--scheme", help="Without --key: the scheme that forgers attack.")
    ] = "passport-v2"
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            help="Images that attackers have (default: none, so attacks that train are left out).",
        ),
    ] = None
    train_split: Annotated[str | None, typer.Option("--train-split", help="Split of --train.")] = (
        None
    )
    transfer: Annotated[
        str | None,
        typer.Option(
            "--transfer",
            help="Images of another task, for attacks that fine-tune the network to it.",
        ),
    ] = None
    transfer_test: Annotated[
        str | None,
        typer.Option(
            "--transfer-test", help="Test images of that task (default: a tenth of --transfer)."
        ),
    ] = None
    base: Annotated[
        Path | None,
        typer.Option(
            help="Model folder of the public network that this one was made from, for attacks that "
            "merge the two (default: with --anchor, the network before the mark)."
        ),
    ] = None
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="Folder from `embed`, with the network before the mark in `anchor/`. "
            "Networks whose channels were moved are aligned to it."
        ),
    ] = None
    epochs: Annotated[
        int, typer.Option("--epochs", help="Passes over the images when attackers train.")
    ] = 10
    batch: Annotated[
        int, typer.Option("--batch", help="Images in a step when attackers train.")
    ] = 64
    precision: Precision = "float32"
    limit: Annotated[
        int | None, typer.Option(help="Measure on at most N images (default: all).")
    ] = None
    train_limit: Annotated[
        int | None, typer.Option(help="Give attackers at most N images (default: all).")
    ] = None
    seed: Seed = 0
    factory: Factory = None
    passphrase: Passphrase = False

    def subject(self, folder: Path, data: str, split: str | None) -> Any:
        """The network in `folder` and all that attackers of it have."""
        from nnpassport.catalog import scheme_named
        from nnpassport.embedding.checkpoint import load_model
        from nnpassport.lab.audit import Budget, Subject

        loaded = load_model(folder, trusted_factory=self.factory)
        secret = None if self.key is None else key_from(self.key, self.passphrase)
        scheme = self.scheme if secret is None else secret.context.scheme
        other = self._other_task(loaded.config)
        anchor = None if self.anchor is None else _anchor_of(secret, self.anchor, self.factory)
        base = anchor
        if self.base is not None:
            base = load_model(self.base, trusted_factory=self.factory).model
        return Subject(
            model=loaded.model,
            config=loaded.config,
            scheme=scheme_named(scheme),
            normalise=loaded.normalise,
            key=secret,
            test=self._read(data, split, loaded.config, self.limit),
            train=self._read(self.train, self.train_split, loaded.config, self.train_limit),
            transfer=other,
            budget=Budget(self.epochs, self.batch, self.precision),
            seed=self.seed,
            anchor=anchor,
            base=base,
        )

    def _other_task(self, config: Any) -> Any:
        from nnpassport.lab.audit import Transfer

        images = self._read(self.transfer, None, config, self.train_limit)
        if images is None:
            return None
        if self.transfer_test is None:
            return Transfer(*images.split(0.1, seed=self.seed))
        return Transfer(images, self._read(self.transfer_test, None, config, self.limit))

    def _read(self, name: str | None, split: str | None, config: Any, most: int | None) -> Any:
        if name is None:
            return None
        return images_from(name, split, config).at_most(most, seed=self.seed)


@spread
def attack(
    *,
    name: Annotated[
        str, typer.Argument(help="Name of the attack; `nnpassport attacks` lists them.")
    ],
    model: Released,
    data: Images,
    split: Split = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength of the attack, in the attack's own unit.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the attacked model folder or the forged key here."),
    ] = None,
    attackers: Attackers,
    as_json: AsJson = False,
) -> None:
    """Run one attack on a network, and say what is left of the mark or what the forger wins."""
    from nnpassport.lab import audit as auditing

    chosen = auditing.attack_named(name)
    subject = attackers.subject(model, data, split)
    power = (chosen.quick or chosen.full)[0] if strength is None else strength
    entry = auditing.attack_once(subject, name, power, out)
    told = auditing.words(entry)
    print_result(entry, as_json, lambda: print_table(("", ""), told), ensure_ascii=False)


@spread
def audit(
    *,
    model: Released,
    data: Images,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the report.")],
    split: Split = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick",
            help="--full: all strengths, and attacks that train. --quick: what takes minutes.",
        ),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only this attack; repeatable (default: all).")
    ] = None,
    attackers: Attackers,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run every known attack on a network; writes audit.json and audit.html."""
    from nnpassport.lab import audit as auditing

    subject = attackers.subject(model, data, split)
    with progress_bar("audit") as show:
        report = auditing.audit_to(
            out, subject, full=full, only=only or (), resume=resume, show=show
        )
    told = "\n".join([auditing.ruling(report), *auditing.survival(report)])
    print_result(report, as_json, lambda: typer.echo(told), ensure_ascii=False)
    if not as_json:
        errors.print(f"Every attack, with pictures: {out / 'audit.html'}")


def list_attacks(as_json: AsJson = False) -> None:
    """List every attack, what it does and what it needs."""
    from nnpassport.lab.audit import ATTACKS

    facts = [
        {"name": n, "family": a.family.value, "summary": a.summary, "needs": sorted(a.needs)}
        for n, a in ATTACKS.items()
    ]
    rows = [
        (str(f["name"]), str(f["family"]), str(f["summary"]), ", ".join(f["needs"])) for f in facts
    ]
    head = ("attack", "family", "what it does", "needs")
    print_result(facts, as_json, lambda: print_table(head, rows))


def _anchor_of(key: Any, folder: Path, factory: str | None) -> Any:
    """The network before the mark, if it is the one that the key is bound to."""
    from nnpassport.embedding.checkpoint import load_model
    from nnpassport.scheme import UnreadableKeyError
    from nnpassport.verification.anchor import anchor_in, read_anchor

    if key is None:
        raise UnreadableKeyError("an anchor was given and no key; needed: --key too, or neither")
    read_anchor(folder, key)
    return load_model(anchor_in(folder), trusted_factory=factory).model
