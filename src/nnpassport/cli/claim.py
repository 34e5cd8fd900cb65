"""The commands `claim …`: commit to a key before any dispute, and disclose it in one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

from nnpassport.cli.options import AsJson, KeyFile, Out, Passphrase, key_from
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import errors, print_result, print_rows

app = typer.Typer(
    help="Commit to a key before any dispute, in a signed and timestamped file.",
    no_args_is_help=True,
)

ClaimFile = Annotated[Path, typer.Argument(help="Claim file, from anybody.")]
SigningPassphrase = Annotated[
    bool,
    typer.Option(
        "--signing-passphrase",
        help="Ask for the signing key's passphrase ($NNPASSPORT_SIGNING_PASSPHRASE is used if "
        "set).",
    ),
]


@app.command()
def keygen(
    out: Out,
    public: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the public key (default: NAME.pub.pem beside the secret one)."
        ),
    ] = None,
    signing_passphrase: SigningPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Draw an Ed25519 key for signing claims: a secret file and a public one, PEM."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
    )

    from nnpassport.claims.signing import public_hex, save_signing_key

    signing = Ed25519PrivateKey.generate()
    beside = out.with_suffix(".pub.pem") if public is None else public
    secret = passphrase_of_signing(signing_passphrase, new=True)
    save_signing_key(signing, out, beside, passphrase=secret)
    known = public_hex(signing.public_key())
    said = f"{out} is secret; give {beside} to everybody: {known}"
    facts = {"public": str(beside), "owner_key": known}
    print_result(facts, as_json, lambda: errors.print(said, soft_wrap=True))


@final
@dataclass(frozen=True, slots=True)
class Networks:
    """The owner's networks to which a claim commits."""

    reference: Annotated[
        Path | None,
        typer.Option(help="Your released model folder. The claim commits to its digest."),
    ] = None
    anchor: Annotated[
        Path | None,
        typer.Option(
            help="The secret network before the mark, if the key is bound to one. It is "
            "checked, and the claim commits to its table of axes if there is one."
        ),
    ] = None
    public: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --anchor: a network that others have too, such as the base you started "
            "from; repeatable. The anchor must not be one of them."
        ),
    ] = None

    def facts(self, key: Any) -> dict[str, Any]:
        """What the claim says of them."""
        from nnpassport.files.weights import digest_of

        if self.anchor is None and key.context.anchor is not None:
            errors.print(
                "note: --anchor was not given; the key names one, and it was not looked at."
            )
        reference, aligned_to = self.reference, self.reference
        if self.anchor is not None:
            aligned_to = _checked(self.anchor, key, self.public or [])
        return {
            "reference": None if reference is None else digest_of(reference),
            "network": None if reference is None else _facts_of(reference),
            "axes": None if aligned_to is None else _axes_of(aligned_to),
        }


@final
@dataclass(frozen=True, slots=True)
class Authorities:
    """Who dates a claim."""

    authority: Annotated[
        list[str] | None,
        typer.Option(
            help="URL of an RFC 3161 timestamp authority; repeatable. Two are better than one."
        ),
    ] = None
    authority_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="The authority's root certificate, PEM; one for each authority, in their "
            "order. The token is checked at once."
        ),
    ] = None

    def pairs(self) -> list[tuple[str, Path]]:
        """Each with its root."""
        urls, roots = self.authority or (), self.authority_root or ()
        if len(urls) != len(roots):
            raise typer.BadParameter(
                "--authority and --authority-root go together; give both of each"
            )
        return list(zip(urls, roots, strict=True))


@final
@dataclass(frozen=True, slots=True)
class Declaration:
    """What else a claim declares, and in which form it is signed."""

    alpha: Annotated[
        int, typer.Option(help="log10 of the threshold α on the p-value, an integer.")
    ] = -9
    target: Annotated[
        float | None, typer.Option(help="Accuracy you declare, 0 to 1 (default: none).")
    ] = None
    tolerance: Annotated[
        float,
        typer.Option(help="How far below --target accuracy may be, 0 to 1 (the paper's ε_f)."),
    ] = 0.03
    in_toto: Annotated[
        bool,
        typer.Option(
            "--in-toto",
            help="Write an in-toto statement of the files of --reference. Other tools can "
            "check its signature too.",
        ),
    ] = False
    date: Annotated[
        str | None,
        typer.Option(
            help="Date for the record, such as 2026-01-31 (default: today). It proves nothing."
        ),
    ] = None

    def facts(self) -> dict[str, Any]:
        """What the claim says of it."""
        from nnpassport.claims.claim import Declared

        declared = None
        if self.target is not None:
            declared = Declared(_ppm(self.target), _ppm(self.tolerance))
        return {"log10_alpha": self.alpha, "fidelity": declared, "date": self.date}

    def signed(self, made: Any, reference: Path | None, owner: Any) -> Any:
        """The claim in the form that was asked for."""
        from nnpassport.claims import claim

        if not self.in_toto:
            return claim.sign_claim(made, owner)
        if reference is None:
            raise typer.BadParameter("--in-toto is a statement of files: --reference says of which")
        return claim.sign_statement(made, _files_of(reference), owner)


@app.command()
@spread
def new(
    *,
    key: KeyFile,
    signing: Annotated[Path, typer.Option(help="Secret signing key, from `claim keygen`.")],
    out: Out,
    networks: Networks,
    authorities: Authorities,
    declaration: Declaration,
    passphrase: Passphrase = False,
    signing_passphrase: SigningPassphrase = False,
    as_json: AsJson = False,
) -> None:
    """Commit to a secret key in a file that is safe to publish."""
    from nnpassport.claims import claim, timestamp
    from nnpassport.claims import signing as signatures
    from nnpassport.claims.claimfile import write_signed
    from nnpassport.verification.anchor import needs_anchor

    pairs = authorities.pairs()
    owner = signatures.load_signing_key(
        signing, passphrase=passphrase_of_signing(signing_passphrase, new=False)
    )
    secret = key_from(key, passphrase)
    if needs_anchor(secret):
        raise typer.BadParameter(
            f"{key} is bound to no network yet: `embed` binds it to the one before the mark, and "
            "then it is another key; embed first"
        )
    facts = {**networks.facts(secret), **declaration.facts()}
    made = claim.claim_of(secret, owner.public_key(), **facts)
    signed = declaration.signed(made, networks.reference, owner)
    for url, root in pairs:
        signed = claim.stamp_claim(signed, url, timestamp.load_roots(root))
    write_signed(signed, out)
    _print(made.as_dict(), as_json)
    stamped = "timestamped" if pairs else "not timestamped: nobody can tell how old it is"
    errors.print(f"{out}: signed, {stamped}")


@app.command()
def axes(
    reference: Annotated[
        Path,
        typer.Argument(
            help="The key's anchor if it has one, else your released model folder. axes.json "
            "is written into it."
        ),
    ],
    factory: Annotated[
        str | None,
        typer.Option(help="Your own architecture, package.module:factory; its code will be run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Trace and prove a network's axes, so that `claim new` can commit to them. Needs PyTorch."""
    from nnpassport.alignment.table import AXES_FILE
    from nnpassport.files.disk import write_atomically
    from nnpassport.verification.bridge import running

    table = running("nnpassport.embedding.axes:axes_of_folder", "tracing a network")(
        reference, factory
    )
    write_atomically(reference / AXES_FILE, table.to_bytes())
    facts = {
        "axes": len(table.axes),
        "tensors": len({place.tensor for axis in table.axes for place in axis.places}),
        "unknown": list(table.unknown),
        "digest": table.digest,
    }
    _print(facts, as_json)
    errors.print(
        f"{reference / AXES_FILE}: claim new --reference {reference} (of an anchor --anchor) "
        "commits to it",
        soft_wrap=True,
    )


@app.command()
def show(
    path: ClaimFile,
    owner: Annotated[
        Path | None,
        typer.Option(
            help="Owner's public key, PEM (default: the one in the file, which proves nothing "
            "about the owner)."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the signature of a claim and print it; `verify` also checks the timestamp."""
    from nnpassport.claims import (
        claim,
        signing,
    )
    from nnpassport.claims.claimfile import read_signed

    signed = read_signed(path)
    if owner is None:
        public = signing.public_from_hex(signed.envelope.keyid)
    else:
        public = signing.load_public_key(owner)
    finding = claim.check_claim(signed.undated(), public)
    facts: dict[str, Any] = finding.as_dict()
    count = len(signed.responses)
    facts["timestamp"] = f"there are {count}; `verify` checks them" if count else None
    facts["self_asserted"] = owner is None
    if finding.holds and (subject := claim.subject_of(signed, public)) is not None:
        facts["subject"] = dict(subject)
    _print_finding(facts, as_json)
    if owner is None and finding.holds:
        errors.print("Self-asserted: the signature was checked against the key in the file itself.")
    raise typer.Exit(0 if finding.holds else 1)


@app.command()
def verify(
    path: ClaimFile,
    owner: Annotated[Path, typer.Option(help="Owner's public key, PEM.")],
    root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Root certificate of a timestamp authority, PEM; repeatable. With it a "
            "timestamp is required; if several hold, the earliest date that is proved "
            "counts."
        ),
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="A disclosed key, to check that it is the one to which the claim commits."
        ),
    ] = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Does a claim hold? 0: yes. 1: signature, timestamp or key does not. 2: not checked."""
    from nnpassport.claims import (
        claim,
        signing,
        timestamp,
    )
    from nnpassport.claims.claimfile import read_signed

    finding = claim.check_claim(
        read_signed(path),
        signing.load_public_key(owner),
        roots=None if not root else [one for path in root for one in timestamp.load_roots(path)],
        key=None if key is None else key_from(key, passphrase),
    )
    _print_finding(finding.as_dict(), as_json)
    raise typer.Exit(0 if finding.holds else 1)


@app.command()
def disclose(
    path: ClaimFile,
    key: KeyFile,
    out: Out,
    reference: Annotated[
        Path | None, typer.Option(help="The released model folder to which the claim commits.")
    ] = None,
    anchor: Annotated[
        Path | None,
        typer.Option(help="The secret network before the mark, if the key is bound to one."),
    ] = None,
    diary: Annotated[
        Path | None, typer.Option(help="The diary of its training, from `diary new`. It is copied.")
    ] = None,
    passphrase: Passphrase = False,
) -> None:
    """Put claim, key, networks and diary into a folder for a judge. They are secret no longer."""
    from nnpassport.verification import hearing

    secret = key_from(key, passphrase)
    if anchor is None and secret.context.anchor is not None:
        errors.print("note: without --anchor no suspect can be aligned; the key names one.")
    given = {"reference": reference, "anchor": anchor, "diary": diary}
    hearing.disclose(path, secret, out, **given)
    errors.print(f"{out}: give it to the judge, and to nobody else before.", soft_wrap=True)


def _checked(anchor: Path, key: Any, public: list[Path]) -> Path:
    """The folder of the key's anchor, which is neither released nor public."""
    from nnpassport.files.weights import read_arrays
    from nnpassport.verification.anchor import anchor_in, read_anchor, require_secret

    weights = read_anchor(anchor, key)
    require_secret(weights.arrays, {str(path): read_arrays(path).arrays for path in public})
    return anchor_in(anchor)


def _files_of(reference: Path) -> dict[str, str]:
    """SHA-256 of the files of the network, and of its config if it has one, by name."""
    from nnpassport.files.config import CONFIG_FILE
    from nnpassport.files.disk import sha256_of
    from nnpassport.files.weights import read_arrays

    files = dict(read_arrays(reference).digests)
    if reference.is_dir() and os.path.lexists(reference / CONFIG_FILE):
        files[CONFIG_FILE] = sha256_of(reference / CONFIG_FILE)
    return files


def _axes_of(reference: Path) -> str | None:
    """The digest of the table of axes beside the network, if it has one, and it is of it."""
    from hashlib import sha256

    from nnpassport.alignment.table import AXES_FILE, check_table, read_table
    from nnpassport.files.weights import read_arrays

    if not os.path.lexists(reference / AXES_FILE):
        return None
    table = read_table(reference / AXES_FILE)
    check_table(table, {n: each.shape for n, each in read_arrays(reference).arrays.items()})
    return sha256(table.to_bytes()).hexdigest()


def _facts_of(reference: Path) -> Any:
    """What the config says, which a file of weights does not have."""
    from nnpassport.claims.facts import facts_of
    from nnpassport.files.config import CONFIG_FILE

    return facts_of(reference) if os.path.lexists(reference / CONFIG_FILE) else None


def _ppm(share: float) -> int:
    """A share in [0, 1] in parts per million; claims have no floating-point numbers."""
    if not 0 <= share <= 1:
        raise typer.BadParameter(f"--target and --tolerance are from 0 to 1, not {share}")
    return round(share * 1_000_000)


def passphrase_of_signing(ask: bool, *, new: bool) -> str | None:
    """The signing key's passphrase: the environment's, or asked for if `ask`."""
    given = os.environ.get("NNPASSPORT_SIGNING_PASSPHRASE")
    if given is not None or not ask:
        return given
    words = "New passphrase of the signing key" if new else "Passphrase of the signing key"
    return str(typer.prompt(words, hide_input=True, confirmation_prompt=new, err=True))


def _print_finding(facts: dict[str, Any], as_json: bool) -> None:
    print_result(facts, as_json, lambda: _print_facts(facts))


def _print_facts(facts: dict[str, Any]) -> None:
    others = {name: value for name, value in facts.items() if name not in {"claim", "holds"}}
    typer.echo("HOLDS" if facts["holds"] else "DOES NOT HOLD")
    _print({**others, **(facts["claim"] or {})}, False)


def _print(facts: dict[str, Any], as_json: bool) -> None:
    print_rows(facts, as_json, [(name, _words(value)) for name, value in facts.items()])


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{name} {_in_line(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return "\n".join(value)
    return "none" if value is None else str(value)


def _in_line(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
