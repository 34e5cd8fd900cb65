"""The command `probe`: does a service that returns only predictions run on your network?"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, final

import typer

from nnpassport.cli.options import AsJson, KeyFile, Passphrase, Report, images_from, key_from
from nnpassport.cli.spread import spread
from nnpassport.cli.terminal import (
    after_all,
    paged,
    print_result,
    print_table,
    print_verdict,
    progress_bar,
)

PROTOCOLS = ("huggingface", "openinference", "template", "instances", "multipart")

MAX_TEMPLATE_BYTES = 2**20


@final
@dataclass(frozen=True, slots=True)
class Speech:
    """How a service is asked, and where its answer has the label."""

    protocol: Annotated[str, typer.Option(help=f"{', '.join(PROTOCOLS)}.")] = PROTOCOLS[0]
    model: Annotated[
        str | None, typer.Option(help="openinference: the model's name on the server.")
    ] = None
    input_name: Annotated[
        str, typer.Option("--input", help="openinference: name of the model's input.")
    ] = "input"
    output_name: Annotated[
        str | None,
        typer.Option("--output", help="openinference: output to read (default: the first)."),
    ] = None
    channels_last: Annotated[
        bool,
        typer.Option(
            "--channels-last", help="If numbers are sent: in the order height, width, channels."
        ),
    ] = False
    mean: Annotated[
        str | None,
        typer.Option(
            help="If numbers are sent: mean of each channel, for pixels from 0 to 1, such as "
            "0.5,0.4,0.4."
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            help="If numbers are sent: standard deviation of each channel, by which to divide."
        ),
    ] = None
    template: Annotated[
        Path | None,
        typer.Option(
            help="template: file with the JSON to send; $IMAGE stands for the PNG in base64, "
            '"$NUMBERS" for nested lists.'
        ),
    ] = None
    pointer: Annotated[
        str | None,
        typer.Option(
            help="template, instances, multipart: where in the answer the label is (default: "
            "/label; instances: /predictions/0)."
        ),
    ] = None
    form_field: Annotated[
        str, typer.Option("--field", help="multipart: name of the form's field for the file.")
    ] = "file"
    ranked: Annotated[
        bool,
        typer.Option("--top", help="The answer is a list of labels or indices, the best first."),
    ] = False

    def service(self, url: str, config: Any, *, committed: bool) -> Any:
        """The service at this address; `config` says how pixels become numbers, if it is known."""
        from nnpassport.verification.remote import services

        text = _template(self.template) if self.protocol == "template" else ""
        numbers: Any = None
        if self.protocol in {"openinference", "instances"} or "$NUMBERS" in text:
            numbers = _normalisation(self.mean, self.std, config, committed=committed)
        how = (numbers, self.channels_last, self.ranked)
        if self.protocol == "openinference":
            named = _needed(self.model, "--model", "the model's name on the server")
            ends = (self.input_name, self.output_name, self.channels_last, self.ranked)
            return services.OpenInference(url, named, numbers, *ends)
        if self.protocol == "instances":
            return services.Template(url, services.INSTANCES, self._at("/predictions/0"), *how)
        if self.protocol == "multipart":
            return services.Upload(url, self._at("/label"), self.form_field, self.ranked)
        if self.protocol == "template":
            return services.Template(url, text, self._at("/label"), *how)
        if self.protocol != "huggingface":
            there = ", ".join(PROTOCOLS)
            raise typer.BadParameter(f"--protocol {self.protocol!r}; there are: {there}")
        return services.HuggingFace(url)

    def _at(self, usual: str) -> str:
        return usual if self.pointer is None else self.pointer


@final
@dataclass(frozen=True, slots=True)
class Manner:
    """Among what, how often and how patiently a service is asked."""

    cover: Annotated[
        str | None,
        typer.Option(
            help="Ordinary images among which to hide the triggers; takes what --data takes "
            "elsewhere."
        ),
    ] = None
    cover_split: Annotated[str | None, typer.Option(help="Split of --cover.")] = None
    covers: Annotated[int, typer.Option(help="Ordinary images for each trigger.")] = 1
    budget: Annotated[
        int | None,
        typer.Option(
            help="Most queries, not counting retries and one or two innocent pictures "
            "(default: all triggers)."
        ),
    ] = None
    rate: Annotated[
        float | None,
        typer.Option(help="Most requests in a second (default: as fast as the service answers)."),
    ] = None
    timeout: Annotated[float, typer.Option(help="Seconds that a whole answer may take.")] = 30.0
    retries: Annotated[int, typer.Option(help="How often to repeat a query that failed.")] = 4
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VARIABLE: send a header whose value, such as 'Bearer hf_…', is in this "
            "environment variable; repeatable."
        ),
    ] = None
    authorities: Annotated[
        Path | None,
        typer.Option("--ca", help="PEM file of certificates to trust (default: the system's)."),
    ] = None

    def asking(self, service: Any, labels: Any) -> Any:
        """The connection to a service, to be entered."""
        from nnpassport.verification.remote.asking import Limits, asking

        limits = Limits(timeout=self.timeout, retries=self.retries, rate=self.rate)
        headers = _headers(self.header or [])
        return asking(service, labels, limits, headers=headers, authorities=self.authorities)

    def images(self, size: tuple[int, int, int]) -> Any:
        """The ordinary images, if there are any."""
        if self.cover is None:
            return None
        return images_from(self.cover, self.cover_split, SimpleNamespace(input_size=size))

    def terms(self, alpha: float | None, *, any_order: bool) -> Any:
        """What is settled before the first query."""
        from nnpassport.verification.remote.plan import Terms

        chosen = {} if alpha is None else {"log10_alpha": alpha}
        return Terms(self.budget, self.covers, any_order=any_order, **chosen)


@final
@dataclass(frozen=True, slots=True)
class Answered:
    """How answers to ordinary images are read, and how many services there were."""

    labels_only: Annotated[
        bool,
        typer.Option("--labels-only", help="Keys of answers: read no scores, only labels."),
    ] = False
    looks: Annotated[
        int,
        typer.Option(
            help="Keys of answers: how often to look whether it is proved already, and stop; p is "
            "multiplied by it."
        ),
    ] = 5
    among: Annotated[
        int,
        typer.Option(help="How many services you asked, this one counted: p is multiplied by it."),
    ] = 1
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Keys of answers: say which p how many queries would reach on your own network "
            "(--like), and send nothing.",
        ),
    ] = False

    def terms(self, budget: int | None, alpha: float | None) -> Any:
        """What is settled before the first query."""
        from nnpassport.verification.remote.ordinary import OrdinaryTerms

        terms = OrdinaryTerms(budget, self.looks, labels_only=self.labels_only, among=self.among)
        return terms if alpha is None else replace(terms, log10_alpha=alpha)


@final
@dataclass(frozen=True, slots=True)
class Owned:
    """What the owner's network takes, and what its classes are called."""

    like: Annotated[
        Path | None,
        typer.Option(
            help="Your model folder, for the names of the classes (as --labels), mean and std."
        ),
    ] = None
    labels: Annotated[
        Path | None,
        typer.Option(
            help="JSON: names in the order of the classes, or {name: index}. If the key has "
            "no names, p is corrected for every map that could have been chosen."
        ),
    ] = None
    any_order: Annotated[
        bool,
        typer.Option(
            "--any-order",
            help="Accept any names of the classes in any order. The map that fits best is "
            "taken, and p is corrected for the number of maps.",
        ),
    ] = False
    claim: Annotated[
        Path | None,
        typer.Option(
            help="Your claim file, for mean, std and names of the classes as it commits to them."
        ),
    ] = None
    owner: Annotated[
        Path | None,
        typer.Option(
            help="Public key, PEM, that must have signed the claim (default: the one in the claim)."
        ),
    ] = None

    def config(self, key: Any, alpha: float | None) -> Any:
        """What the claim commits to, else the config of --like, else None.

        Raises:
            BadRecipeError: `alpha` is laxer than what the claim declares.
            BadSignatureError: the claim does not hold with this key.
            UnsuitableModelError: the claim commits to another config than that of --like.
        """
        from nnpassport.claims.facts import check_config
        from nnpassport.files.config import read_config

        config = None if self.like is None else read_config(self.like)
        if self.claim is None:
            return config
        facts = self._claimed(self.claim, key, alpha)
        if self.like is not None:
            check_config(self.like, facts)
        return config if facts is None else facts

    def _claimed(self, path: Path, key: Any, alpha: float | None) -> Any:
        from nnpassport.claims import signing
        from nnpassport.claims.claim import check_claim
        from nnpassport.claims.claimfile import read_signed
        from nnpassport.scheme import BadRecipeError, BadSignatureError

        signed = read_signed(path)
        if self.owner is None:
            public = signing.public_from_hex(signed.envelope.keyid)
        else:
            public = signing.load_public_key(self.owner)
        found = check_claim(signed.undated(), public, key=key)
        if not found.holds or found.claim is None:
            raise BadSignatureError(f"{path} does not hold with this key: {found.reason}")
        declared = found.claim.log10_alpha
        if alpha is not None and alpha > declared:
            raise BadRecipeError(
                f"--alpha {alpha} is laxer than what the claim declares, {declared}; leave it out, "
                "or give a smaller one"
            )
        return found.claim.network

    def names(self, config: Any, classes: int) -> Any:
        """The names of the classes: of --labels, of the config, or unknown."""
        from nnpassport.verification.remote.labels import Labels, read_labels

        if self.labels is not None:
            return read_labels(self.labels, classes)
        return Labels(classes) if config is None else Labels.in_order(config.classes, classes)


@final
@dataclass(frozen=True, slots=True)
class Kept:
    """Where the result is written, and the answers on the way to it."""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the result here, and the journal of answers beside it."
        ),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the journal beside --out.")
    ] = False

    @property
    def journal(self) -> Path | None:
        """The file of answers beside --out.

        Raises:
            typer.BadParameter: it is to be resumed, and there is no --out.
        """
        if self.resume and self.out is None:
            raise typer.BadParameter("--resume goes on from the journal beside --out; give --out")
        return None if self.out is None else self.out.with_name(f"{self.out.name}.journal.jsonl")

    def write(self, facts: dict[str, Any]) -> None:
        """The result as JSON, if --out names a file."""
        from nnpassport.files.disk import write_atomically

        if (path := self.out) is not None:
            content = json.dumps(facts, indent=2).encode()
            after_all(lambda: write_atomically(path, content), str(path))


@spread
def probe(
    *,
    url: Annotated[str, typer.Argument(help="Address of the service, http:// or https://.")],
    key: KeyFile,
    speech: Speech,
    owned: Owned,
    manner: Manner,
    answered: Answered,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="log10 of the threshold α on the p-value (default: -30.1, which is 2^-100)."
        ),
    ] = None,
    kept: Kept,
    report: Report = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Does a remote service run on your network? 0: yes. 1: no. 2: it could not be checked."""
    from nnpassport.keys.derive import triggers_of
    from nnpassport.verification.remote.ordinary import probe_answers
    from nnpassport.verification.remote.probe import probe as ask_all

    journal, secret = kept.journal, key_from(key, passphrase)
    if answered.plan:
        _print_plan(owned.like, secret, manner.budget)
        raise typer.Exit(0)
    shape, config = triggers_of(secret.context), owned.config(secret, alpha)
    service = speech.service(url, config, committed=owned.claim is not None)
    names, covers = owned.names(config, shape.classes), manner.images(shape.size)
    with manner.asking(service, names) as asker, progress_bar("probe") as show:
        told: dict[str, Any] = {"journal": journal, "resume": kept.resume, "show": show}
        if secret.context.answers is None:
            terms = manner.terms(alpha, any_order=owned.any_order)
            found = ask_all(asker, secret, cover=covers, terms=terms, **told)
            found = found.among(answered.among)
        else:
            ordinary = answered.terms(manner.budget, alpha)
            found = probe_answers(asker, secret, terms=ordinary, **told)
    facts = _facts(found, secret)
    print_result(facts, as_json, lambda: _print(found))
    kept.write(facts)
    paged("nnpassport.report.verdict:write_probe_page", facts, report)
    raise typer.Exit(0 if found.verdict.accepted else 1)


def _print_plan(folder: Path | None, key: Any, budget: int | None) -> None:
    """Which p so many queries would reach on the owner's own network."""
    from nnpassport.embedding.answering import planned

    like = _needed(folder, "--like", "your network, to foretell with")
    rows = [
        (f"{each.queries:,}", f"10^{each.scores:.1f}", f"10^{each.labels:.1f}")
        for each in planned(like, key, most=budget)
    ]
    print_table(("queries", "p by scores", "p by labels"), rows)
    typer.echo("So it would be with your own network behind the service; a copy shows less.")


def _facts(found: Any, key: Any) -> dict[str, Any]:
    from nnpassport.report.provenance import made_with

    # Without the command: an address may have a token in it.
    made = {name: value for name, value in made_with().items() if name != "command"}
    known = {"owner": key.context.owner, "fingerprint": key.fingerprint}
    return {**found.as_dict(), "key": known, "made_with": made}


def _print(found: Any) -> None:
    print_verdict(found.verdict)
    print_table(("", ""), _rows(found))


def _needed(value: Any, option: str, what: str) -> Any:
    if value is None:
        raise typer.BadParameter(f"this protocol needs {option}: {what}")
    return value


def _normalisation(
    mean: str | None, std: str | None, config: Any, *, committed: bool = False
) -> Any:
    if committed and config is not None and (mean, std) != (None, None):
        raise typer.BadParameter("the claim says what --mean and --std are; leave them out")
    if mean is None and std is None and config is not None:
        return config
    if mean is None or std is None:
        raise typer.BadParameter(
            "this protocol takes normalised numbers: give --like, or --mean and --std (0 and 1 for "
            "a model that normalises by itself)"
        )
    try:
        given = [tuple(map(float, each.split(","))) for each in (mean, std)]
    except ValueError as error:
        raise typer.BadParameter(f"--mean and --std: {error}") from error
    if len(given[0]) != len(given[1]) or not all(each > 0 for each in given[1]):
        raise typer.BadParameter(
            f"--mean and --std: mean is {given[0]} and std is {given[1]}; needed: one of each for "
            "every channel, and every std above 0"
        )
    return SimpleNamespace(mean=given[0], std=given[1])


def _template(path: Path | None) -> str:
    from nnpassport.claims.signing import read_small
    from nnpassport.scheme import UnreadableDataError

    path = _needed(path, "--template", 'a file with JSON such as {"image": "$IMAGE"}')
    data = read_small(path, "template", MAX_TEMPLATE_BYTES, UnreadableDataError)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UnreadableDataError(f"{path} is no UTF-8; needed: a JSON file") from None


def _headers(given: list[str]) -> dict[str, str]:
    headers = {}
    for pair in given:
        name, _, variable = pair.partition("=")
        value = os.environ.get(variable) if variable else None
        if not name or value is None:
            raise typer.BadParameter(
                f"--header {name!r:.80}: needed is NAME=VARIABLE, the name of a variable that is "
                "set in the environment; a token itself would be seen by everybody on this machine"
            )
        headers[name] = value
    return headers


def _rows(found: Any) -> list[tuple[str, str]]:
    rows = [("service", found.service)]
    for what, tally in (("triggers", found.triggers), ("covers", found.covers)):
        counts = (f"{count} {kind}" for kind, count in tally._asdict().items())
        rows.append((what, ", ".join(counts)))
    if found.cover_accuracy is not None:
        rows.append(("accuracy", f"{100 * found.cover_accuracy:.2f} % on the covers"))
    rows.append(("took", f"{found.seconds:.1f} s, {found.retries} retries"))
    return rows + [("note", note) for note in found.notes]
