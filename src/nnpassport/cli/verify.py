"""The commands `verify` and `judge`: one key and one suspect, or rival claims to it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from nnpassport.cli.options import (
    AsJson,
    Factory,
    KeyFile,
    OptionalImages,
    Passphrase,
    Reading,
    Report,
    Split,
    images_from,
    key_from,
)
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import (
    errors,
    paged,
    print_result,
    print_ruling,
    print_verdict,
    progress_bar,
)

MAX_LOG10_ALPHA = 1_000_000

Suspect = Annotated[Path, typer.Argument(help="Model folder or weights file, from anybody.")]
Appeared = Annotated[
    str | None,
    typer.Option(
        help="When the suspect is known to have been there first, ISO 8601, UTC unless it says "
        "otherwise: a claim proved to be older may use the α it declares."
    ),
]
Unrelated = Annotated[
    list[Path] | None,
    typer.Option(
        help="A network that has nothing to do with the owner's, of the same architecture; "
        "repeatable (default: mixtures of the suspect's own filters)."
    ),
]
Roots = Annotated[
    list[Path] | None,
    typer.Option("--root", help="Root certificate of a timestamp authority, PEM; repeatable."),
]


@spread
def verify(
    *,
    suspect: Suspect,
    key: KeyFile,
    data: OptionalImages = None,
    split: Split = None,
    reading: Reading,
    target: Annotated[
        float | None,
        typer.Option(help="Accuracy that was declared, 0 to 1 (default: the claim's, or its own)."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="ε_f of the fidelity test, 0 to 1 (default: the claim's, or 0.03)."),
    ] = None,
    align: Annotated[
        Path | None,
        typer.Option(
            help="Your released model folder: undo moved, negated and scaled channels first."
        ),
    ] = None,
    unrelated: Unrelated = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The network that your adapter was made for: what a merged suspect adds to it "
            "is read (keys of scheme lora)."
        ),
    ] = None,
    claim: Annotated[
        Path | None, typer.Option(help="Your claim file; the verdict is no better than it.")
    ] = None,
    owner: Annotated[
        Path | None,
        typer.Option(help="Public key that must have signed the claim, PEM (default: its own)."),
    ] = None,
    root: Roots = None,
    appeared: Appeared = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Your model folder: the architecture that the suspect has, and how images become "
            "numbers, whatever the suspect says of itself."
        ),
    ] = None,
    black_box: Annotated[
        bool, typer.Option("--black-box", help="Use only predictions on the key's triggers.")
    ] = False,
    every_reading: Annotated[
        bool,
        typer.Option(
            "--every-reading",
            help="Of answers, look also at other orders of the classes, and at pictures shown as "
            "the suspect's own config says; all of them are paid for in the p-value.",
        ),
    ] = False,
    as_published: Annotated[
        bool,
        typer.Option("--as-published", help="The rule of the scheme's paper, without p-value."),
    ] = False,
    alpha: Annotated[
        float | None,
        typer.Option(help="log10 of the threshold on p (default: the claim's, or -30.1: 2^-100)."),
    ] = None,
    factory: Factory = None,
    report: Report = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Does a network carry your key? 0: yes. 1: no. 2: it could not be checked."""
    from nnpassport.claims.facts import check_config
    from nnpassport.files.config import read_config
    from nnpassport.report.provenance import made_with
    from nnpassport.verification import verdicts as verification

    _check_alpha(alpha)
    if align is not None and (black_box or as_published):
        raise typer.BadParameter("--align is about weights; leave --black-box, --as-published out")
    if base is not None and (black_box or align is not None):
        raise typer.BadParameter("--base is about merged weights; leave --black-box, --align out")
    secret = key_from(key, passphrase)
    standing = None if claim is None else _standing(claim, owner, secret, root, appeared)
    _check_alpha(alpha, standing)
    if like is not None and standing is not None:
        check_config(like, None if standing.claim is None else standing.claim.network)
    options = verification.Options(
        reference=None if like is None else read_config(like),
        trusted_factory=factory,
        log10_alpha=alpha,
        alignment=None if align is None else verification.Alignment(align, tuple(unrelated or ())),
        base=base,
        standing=standing,
        every_reading=every_reading,
    )
    if black_box:
        from nnpassport.embedding.measured import verify_answers

        verdict = verify_answers(suspect, secret, options=options)
    elif as_published:
        verdict = verification.verify_as_published(suspect, secret, options=options)
    else:
        trial = None
        if data is not None:
            from nnpassport.embedding.measured import config_of

            images = images_from(data, split, config_of(suspect, options), reading)
            trial = verification.declared_trial(images, target, tolerance, options.standing)
        verdict = verification.verify(suspect, secret, trial=trial, options=options)
    time = _time(appeared)
    facts = {
        **verdict.as_dict(),
        "read": _read(black_box, as_published, align),
        "suspect": {"file": str(suspect), "appeared": None if time is None else time.isoformat()},
        "key": {"owner": secret.context.owner, "fingerprint": secret.fingerprint},
        "made_with": made_with(),
    }
    print_result(facts, as_json, lambda: print_verdict(verdict))
    paged("nnpassport.report.verdict:write_verdict_page", facts, report)
    raise typer.Exit(0 if verdict.accepted else 1)


@spread
def judge(
    *,
    suspect: Suspect,
    exhibits: Annotated[
        list[Path], typer.Argument(help="A folder of each claimant, from `claim disclose`.")
    ],
    root: Roots = None,
    appeared: Appeared = None,
    unrelated: Unrelated = None,
    data: OptionalImages = None,
    split: Split = None,
    reading: Reading,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Whose is it? 0: somebody's, or shared. 1: nobody's. 2: not checked. 3: undecided."""
    from nnpassport.report.provenance import made_with
    from nnpassport.verification import hearing
    from nnpassport.verification import verdicts as verification

    images = {}
    if data is not None:
        from nnpassport.embedding import measured

        # Read here, as what is wrong with them is no claimant's fault
        configs = hearing.networks(suspect, exhibits)
        for config in configs or [measured.config_of(suspect, verification.Options())]:
            images[config.input_size] = images_from(data, split, config, reading)
    bench = hearing.Bench(_roots(root), _time(appeared), tuple(unrelated or ()), images)
    with progress_bar("judge") as show:
        heard = hearing.hear(suspect, exhibits, bench, show=show)
    facts = heard.as_dict()
    facts["suspect"]["file"] = str(suspect)
    facts["made_with"] = made_with()
    print_result(facts, as_json, lambda: print_ruling(facts))
    paged("nnpassport.report.verdict:write_hearing_page", facts, report)
    codes = {"owner": 0, "shared": 0, "nobody": 1, "undecided": 3}
    raise typer.Exit(codes[heard.ruling.outcome.value])


def _read(black_box: bool, as_published: bool, align: Path | None) -> str:
    from nnpassport.report import words

    if black_box or as_published:
        return words.ANSWERS if black_box else words.AS_PUBLISHED
    return words.AS_IT_STANDS if align is None else words.ALIGNED


def _check_alpha(alpha: float | None, standing: Any = None) -> None:
    """Refuse a threshold that is none, or laxer than a claim allows."""
    if alpha is None:
        return
    if not -MAX_LOG10_ALPHA <= alpha < 0:
        raise typer.BadParameter(f"--alpha {alpha} is no power of ten below 1, such as -9")
    if standing is not None and alpha > standing.log10_alpha:
        raise typer.BadParameter(
            f"--alpha {alpha} is laxer than what the claim may be judged by, "
            f"{standing.log10_alpha:.1f} ({standing.age}); leave it out, or give a smaller one"
        )


def _standing(
    path: Path, owner: Path | None, key: Any, roots: list[Path] | None, appeared: str | None
) -> Any:
    from nnpassport.claims import signing
    from nnpassport.claims.claimfile import read_signed
    from nnpassport.claims.standing import standing_of

    signed = read_signed(path)
    if owner is None:
        public = signing.public_from_hex(signed.envelope.keyid)
        errors.print("The claim is checked against the public key in itself; --owner gives one.")
    else:
        public = signing.load_public_key(owner)
    return standing_of(signed, public, key, roots=_roots(roots), appeared=_time(appeared))


def _roots(paths: list[Path] | None) -> list[Any]:
    from nnpassport.claims.timestamp import load_roots

    return [root for path in paths or () for root in load_roots(path)]


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"--appeared {text!r} is no time, such as 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)
