"""The commands `verify` and `judge`: one key and one suspect, or rival claims to it."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast, final

import typer

from nnpassport.cli.options import (
    AS_USUAL,
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
Entry = Annotated[
    str | None,
    typer.Option(
        help="If the file has several networks: the one whose tensors have this prefix, such "
        "as teacher or state.ema (default: all are tried, and p is corrected for their "
        "number)."
    ),
]
Appeared = Annotated[
    str | None,
    typer.Option(
        help="When the suspect is first known to have existed, ISO 8601, UTC unless it says "
        "otherwise. A claim that is proved to be older may use the α it declares."
    ),
]
Unrelated = Annotated[
    list[Path] | None,
    typer.Option(
        help="A network of the same architecture that has nothing to do with the owner's; "
        "repeatable (default: mixtures of the suspect's own filters)."
    ),
]
Roots = Annotated[
    list[Path] | None,
    typer.Option("--root", help="Root certificate of a timestamp authority, PEM; repeatable."),
]


@final
@dataclass(frozen=True, slots=True)
class OnImages:
    """What F is measured on, and against what."""

    data: OptionalImages = None
    split: Split = None
    reading: Reading = AS_USUAL
    target: Annotated[
        float | None,
        typer.Option(
            help="Declared accuracy, 0 to 1 (default: the claim's, or the network's own)."
        ),
    ] = None
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="How far below --target accuracy may be, 0 to 1 (default: the claim's, or 0.03)."
        ),
    ] = None

    def inputs(self, key: Any) -> Any:
        """The images as a key of scheme answers takes them, or None without images."""
        if self.data is None:
            return None
        from nnpassport.keys.answers import form_of

        _, shape = form_of(key.context)
        sized = SimpleNamespace(input_size=shape.size)
        return images_from(self.data, self.split, sized, self.reading)

    def trial(self, suspect: Any, options: Any) -> Any:
        """The images as the suspect takes them and what was declared, or None without images."""
        if self.data is None:
            return None
        from nnpassport.embedding.measured import config_of
        from nnpassport.verification.verdicts import declared_trial

        images = images_from(self.data, self.split, config_of(suspect, options), self.reading)
        return declared_trial(images, self.target, self.tolerance, options.standing)


@final
@dataclass(frozen=True, slots=True)
class Look:
    """How a suspect is looked at."""

    align: Annotated[
        Path | None,
        typer.Option(
            help="Undo moved, negated and scaled channels first. Give the folder of the key's "
            "anchor, such as `embed` wrote; if the key has none, your released model "
            "folder."
        ),
    ] = None
    unrelated: Unrelated = None
    base: Annotated[
        Path | None,
        typer.Option(
            help="The network for which your adapter was made. What a merged suspect adds to "
            "it is read (keys of scheme lora)."
        ),
    ] = None
    claim: Annotated[
        Path | None,
        typer.Option(help="Your claim file. It must hold, and its age decides the threshold."),
    ] = None
    owner: Annotated[
        Path | None,
        typer.Option(
            help="Public key, PEM, that must have signed the claim (default: the one in the claim)."
        ),
    ] = None
    root: Roots = None
    appeared: Appeared = None
    like: Annotated[
        Path | None,
        typer.Option(
            help="Your model folder. Its architecture, and how it turns images into numbers, "
            "are used in place of the suspect's own."
        ),
    ] = None
    entry: Entry = None
    black_box: Annotated[
        bool,
        typer.Option(
            "--black-box",
            help="Read the mark from predictions on the key's triggers, not from weights.",
        ),
    ] = False
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="SUSPECT is a CSV file of answers that somebody collected, to the inputs of a key "
            "of scheme answers, or to --data.",
        ),
    ] = False
    among: Annotated[
        int,
        typer.Option(
            help="How many networks or services you looked at, this one counted: p is multiplied "
            "by it."
        ),
    ] = 1
    every_reading: Annotated[
        bool,
        typer.Option(
            "--every-reading",
            help="For marks of answers: also try other orders of the classes, and pictures "
            "prepared as the suspect's own config says. p is corrected for all of them.",
        ),
    ] = False
    as_published: Annotated[
        bool,
        typer.Option(
            "--as-published", help="Apply the rule of the scheme's paper, which has no p-value."
        ),
    ] = False
    alpha: Annotated[
        float | None,
        typer.Option(
            help="log10 of the threshold α on the p-value (default: the claim's, or -30.1, "
            "which is 2^-100)."
        ),
    ] = None
    factory: Factory = None

    def options(self, key: Any) -> Any:
        """The same as `verification.verdicts` takes it.

        Raises:
            typer.BadParameter: some of it does not go together.
        """
        from nnpassport.claims.facts import check_config
        from nnpassport.files.config import read_config
        from nnpassport.verification.verdicts import Alignment, Options

        standing = None if self.claim is None else self._standing(key)
        _check_alpha(self.alpha, standing)
        if self.like is not None and standing is not None:
            check_config(self.like, None if standing.claim is None else standing.claim.network)
        aligned = None
        if self.align is not None:
            aligned = Alignment(self.align, tuple(self.unrelated or ()))
        return Options(
            reference=None if self.like is None else read_config(self.like),
            trusted_factory=self.factory,
            log10_alpha=self.alpha,
            alignment=aligned,
            base=self.base,
            standing=standing,
            every_reading=self.every_reading,
        )

    def check(self) -> None:
        """Refuse what does not go together, before anything is read."""
        _check_alpha(self.alpha)
        if self.among < 1:
            raise typer.BadParameter(f"--among {self.among} is no number of networks, such as 3")
        if self.answers and (self.as_published or self.every_reading):
            raise typer.BadParameter(
                "--answers is of ordinary inputs; leave --as-published, --every-reading out"
            )
        weights_alone = not self.answers
        if weights_alone and self.align is not None and (self.black_box or self.as_published):
            raise typer.BadParameter(
                "--align is about weights; leave --black-box, --as-published out"
            )
        if self.base is not None and (self.black_box or self.align is not None):
            raise typer.BadParameter(
                "--base is about merged weights; leave --black-box, --align out"
            )

    def verdict(self, path: Path, key: Any, images: OnImages) -> Any:
        """V, and F if there are images; paid for, if it is the best of several."""
        found = self._verdict(path, key, images)
        return found.paid(math.log10(self.among), of="networks looked at")

    def _verdict(self, path: Path, key: Any, images: OnImages) -> Any:
        from nnpassport.files.suspect import Suspect as Opened
        from nnpassport.verification import verdicts

        options, suspect = self.options(key), Opened(path, self.entry)
        if self.answers:
            from nnpassport.embedding.answering import collected

            data = images.inputs(key)
            return collected(path, key, options, data, labels_only=self.black_box)
        if self.black_box:
            from nnpassport.embedding.measured import verify_answers

            return verify_answers(suspect, key, options=options)
        if self.as_published:
            return verdicts.verify_as_published(suspect, key, options=options)
        trial = images.trial(suspect, options)
        return verdicts.verify(suspect, key, trial=trial, options=options)

    @property
    def way(self) -> str:
        """How the suspect is read, in words."""
        from nnpassport.report import words

        if self.black_box or self.answers:
            return words.ANSWERS
        if self.as_published:
            return words.AS_PUBLISHED
        return words.AS_IT_STANDS if self.align is None else words.ALIGNED

    def _standing(self, key: Any) -> Any:
        from nnpassport.claims import signing
        from nnpassport.claims.claimfile import read_signed
        from nnpassport.claims.standing import standing_of

        signed = read_signed(cast(Path, self.claim))
        if self.owner is None:
            public = signing.public_from_hex(signed.envelope.keyid)
            errors.print(
                "The claim is checked against the public key in itself; --owner gives one."
            )
        else:
            public = signing.load_public_key(self.owner)
        roots, appeared = _roots(self.root), _time(self.appeared)
        return standing_of(signed, public, key, roots=roots, appeared=appeared)


@spread
def verify(
    *,
    suspect: Suspect,
    key: KeyFile,
    images: OnImages,
    look: Look,
    report: Report = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Does a network carry your key? 0: yes. 1: no. 2: it could not be checked."""
    from nnpassport.report.provenance import made_with

    look.check()
    secret = key_from(key, passphrase)
    verdict, time = look.verdict(suspect, secret, images), _time(look.appeared)
    facts = {
        **verdict.as_dict(),
        "read": look.way,
        "suspect": {
            "file": str(suspect),
            **({} if look.entry is None else {"entry": look.entry}),
            "appeared": None if time is None else time.isoformat(),
        },
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
        list[Path],
        typer.Argument(help="The exhibit of each claimant: a folder from `claim disclose`."),
    ],
    entry: Entry = None,
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
    from nnpassport.files import suspect as files
    from nnpassport.report.provenance import made_with
    from nnpassport.verification import hearing
    from nnpassport.verification import verdicts as verification

    there, images = files.Suspect(suspect, entry), {}
    if data is not None:
        from nnpassport.embedding import measured

        # Read here, as what is wrong with them is no claimant's fault
        configs = hearing.networks(there, exhibits)
        for config in configs or [measured.config_of(there, verification.Options())]:
            images[config.input_size] = images_from(data, split, config, reading)
    bench = hearing.Bench(_roots(root), _time(appeared), tuple(unrelated or ()), images)
    with progress_bar("judge") as show:
        heard = hearing.hear(there, exhibits, bench, show=show)
    facts = heard.as_dict()
    facts["suspect"]["file"] = str(suspect)
    facts["made_with"] = made_with()
    print_result(facts, as_json, lambda: print_ruling(facts))
    paged("nnpassport.report.verdict:write_hearing_page", facts, report)
    codes = {"owner": 0, "shared": 0, "nobody": 1, "undecided": 3}
    raise typer.Exit(codes[heard.ruling.outcome.value])


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
