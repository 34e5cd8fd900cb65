"""The commands `export` and `package`: a released network for those who have other tools."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport.cli.options import AsJson, Factory, Out
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_result, print_rows

Released = Annotated[Path, typer.Argument(help="Model folder, from `release`.")]


def export(
    source: Released,
    onnx: Annotated[Path, typer.Option("--onnx", help="ONNX file to write, such as OUT.onnx.")],
    factory: Factory = None,
    as_json: AsJson = False,
) -> None:
    """Write a network as ONNX, with every weight under its own name. Needs the extra `onnx`."""
    import torch

    from nnpassport.embedding.checkpoint import load_model
    from nnpassport.embedding.publish.onnx import export_onnx
    from nnpassport.verification.anchor import ANCHOR

    loaded = load_model(source, trusted_factory=factory)
    if ANCHOR in loaded.config.notes:
        raise typer.BadParameter(f"{source} is {loaded.config.notes[ANCHOR]}")
    done = export_onnx(loaded.model, torch.zeros(2, *loaded.config.input_size), onnx)
    files, left_out = [str(path) for path in done.files], done.left_out
    told = f"{len(done.names)} tensors under their own names, {len(left_out)} left out"
    lines = "\n".join([*files, told])
    facts = {"files": files, "left_out": left_out}
    print_result(facts, as_json, lambda: errors.print(lines, markup=False, soft_wrap=True))


@final
@dataclass(frozen=True, slots=True)
class Contents:
    """What is published beside the weights."""

    licence: Annotated[
        str | None,
        typer.Option("--license", help="Licence, by the hub's identifier, such as apache-2.0."),
    ] = None
    name: Annotated[
        str | None, typer.Option(help="Title of the model card (default: the folder's name).")
    ] = None
    publish_claim: Annotated[
        bool,
        typer.Option("--publish-claim", help="Add the claim file itself, not only its digest."),
    ] = False
    base: Annotated[
        list[str] | None,
        typer.Option(
            help="A network from which this one was made, as NAME=FOLDER; repeatable. The two "
            "are compared, and the bill of materials says what was found."
        ),
    ] = None
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="An adapter that was merged into this network, as NAME=FOLDER; repeatable."
        ),
    ] = None

    def packaged(
        self, source: Path, claim: Path, out: Path, finish: Callable[[Path], None] | None
    ) -> Any:
        """The folder for a hub, written; `finish` is called before it takes its name."""
        from nnpassport.embedding.publish import hub

        return hub.package(
            source,
            claim,
            out,
            licence=self.licence,
            name=self.name,
            publish_claim=self.publish_claim,
            bases=_named(self.base, "--base"),
            adapters=_named(self.adapter, "--adapter"),
            finish=finish,
        )


@final
@dataclass(frozen=True, slots=True)
class Signed:
    """Who signs the files."""

    signing: Annotated[
        Path | None,
        typer.Option(
            help="Private key, PEM, with which to sign all files (OpenSSF Model Signing); on "
            "an elliptic curve such as prime256v1. Its passphrase is in "
            "$NNPASSPORT_SIGNING_PASSPHRASE."
        ),
    ] = None

    def checked(self) -> Callable[[Path], None] | None:
        """What signs all files of a folder, once the key is known to fit; None if nobody does."""
        from nnpassport.embedding.publish import signed

        if (key := self.signing) is None:
            return None
        passphrase = os.environ.get("NNPASSPORT_SIGNING_PASSPHRASE")
        signed.check_signing_key(key, passphrase)

        def finish(folder: Path) -> None:
            signed.sign_folder(folder, key, passphrase)

        return finish


@spread
def package(
    *,
    source: Annotated[
        Path, typer.Argument(help="Model folder, from `release` or from `save_pretrained`.")
    ],
    claim: Annotated[Path, typer.Option(help="Your claim, from `claim new`.")],
    out: Out,
    contents: Contents,
    signed: Signed,
    as_json: AsJson = False,
) -> None:
    """Write a folder that can be uploaded to a model hub as it is: no secret is in it.

    Weights, a model card, and a bill of materials (CycloneDX 1.6, bom.cdx.json).
    """
    finish = signed.checked()
    done = contents.packaged(source, claim, out, finish)
    for each, outcome in done.bases.items():
        errors.print(f"{each}: {outcome}", markup=False, soft_wrap=True)
    digests = {"folder": str(out), "weights": done.weights, "claim": done.claim}
    rows = [*digests.items(), ("files", "\n".join(done.files))]
    print_rows({**digests, "files": done.files, "bases": dict(done.bases)}, as_json, rows)
    if contents.licence is None and not as_json:
        errors.print("The card names no license; --license says what others may do with it.")


def _named(words: list[str] | None, option: str) -> dict[str, Path]:
    """Folders by name, from words that are NAME=FOLDER."""
    found = {}
    for word in words or ():
        name, equals, path = word.partition("=")
        if not (name and equals and path) or name in found:
            raise typer.BadParameter(f"{option} {word!r} is not NAME=FOLDER, or a name comes twice")
        found[name] = Path(path)
    return found
