"""The command `probe`: does a service that returns only predictions run on your network?"""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from nnpassport.cli.options import AsJson, KeyFile, Passphrase, Report, images_from, key_from
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


def probe(
    url: Annotated[str, typer.Argument(help="Address of the service, http:// or https://.")],
    key: KeyFile,
    protocol: Annotated[str, typer.Option(help=f"{', '.join(PROTOCOLS)}.")] = PROTOCOLS[0],
    model: Annotated[
        str | None, typer.Option(help="openinference: the model's name on the server.")
    ] = None,
    input_name: Annotated[
        str, typer.Option("--input", help="openinference: name of the model's input.")
    ] = "input",
    output_name: Annotated[
        str | None,
        typer.Option("--output", help="openinference: output to read (default: the first)."),
    ] = None,
    channels_last: Annotated[
        bool,
        typer.Option(
            "--channels-last", help="If numbers are sent: in the order height, width, channels."
        ),
    ] = False,
    mean: Annotated[
        str | None,
        typer.Option(
            help="If numbers are sent: mean of each channel, for pixels from 0 to 1, such as "
            "0.5,0.4,0.4."
        ),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(
            help="If numbers are sent: standard deviation of each channel, by which to divide."
        ),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(
            help="template: file with the JSON to send; $IMAGE stands for the PNG in base64, "
            '"$NUMBERS" for nested lists.'
        ),
    ] = None,
    pointer: Annotated[
        str | None,
        typer.Option(
            help="template, instances, multipart: where in the answer the label is (default: "
            "/label; instances: /predictions/0)."
        ),
    ] = None,
    form_field: Annotated[
        str, typer.Option("--field", help="multipart: name of the form's field for the file.")
    ] = "file",
    ranked: Annotated[
        bool,
        typer.Option("--top", help="The answer is a list of labels or indices, the best first."),
    ] = False,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Your model folder, for the names of the classes (as --labels), mean and std."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="JSON: names in the order of the classes, or {name: index}. If the key has "
            "no names, p is corrected for every map that could have been chosen."
        ),
    ] = None,
    any_order: Annotated[
        bool,
        typer.Option(
            "--any-order",
            help="Accept any names of the classes in any order. The map that fits best is "
            "taken, and p is corrected for the number of maps.",
        ),
    ] = False,
    claim: Annotated[
        Path | None,
        typer.Option(
            help="Your claim file, for mean, std and names of the classes as it commits to them."
        ),
    ] = None,
    owner: Annotated[
        Path | None,
        typer.Option(
            help="Public key, PEM, that must have signed the claim (default: the one in the claim)."
        ),
    ] = None,
    cover: Annotated[
        str | None,
        typer.Option(
            help="Ordinary images among which to hide the triggers; takes what --data takes "
            "elsewhere."
        ),
    ] = None,
    cover_split: Annotated[str | None, typer.Option(help="Split of --cover.")] = None,
    covers: Annotated[int, typer.Option(help="Ordinary images for each trigger.")] = 1,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Most queries, not counting retries and one or two innocent pictures (default: "
            "all triggers)."
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Most requests in a second (default: as fast as the service answers)."),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a whole answer may take.")] = 30.0,
    retries: Annotated[int, typer.Option(help="How often to repeat a query that failed.")] = 4,
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VARIABLE: send a header whose value, such as 'Bearer hf_…', is in this "
            "environment variable; repeatable."
        ),
    ] = None,
    authorities: Annotated[
        Path | None,
        typer.Option("--ca", help="PEM file of certificates to trust (default: the system's)."),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="log10 of the threshold α on the p-value (default: -30.1, which is 2^-100)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the result here, and the journal of answers beside it."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the journal beside --out.")
    ] = (False),
    report: Report = None,
    passphrase: Passphrase = False,
    as_json: AsJson = False,
) -> None:
    """Does a remote service run on your network? 0: yes. 1: no. 2: it could not be checked."""
    from nnpassport.files.disk import write_atomically
    from nnpassport.keys.derive import triggers_of
    from nnpassport.verification.remote.asking import Limits, asking
    from nnpassport.verification.remote.plan import Terms
    from nnpassport.verification.remote.probe import probe as ask_all

    if resume and out is None:
        raise typer.BadParameter("--resume goes on from the journal beside --out; give --out")
    secret = key_from(key, passphrase)
    shape, config = triggers_of(secret.context), _config(like)
    if claim is not None:
        config = _committed(claim, owner, secret, like, config, alpha)
    text = _template(template) if protocol == "template" else ""
    numbers = None
    if protocol in {"openinference", "instances"} or "$NUMBERS" in text:
        numbers = _normalisation(mean, std, config, committed=claim is not None)
    if protocol == "openinference":
        how = (input_name, output_name, channels_last, ranked)
        service = _open_inference(url, model, numbers, *how)
    elif protocol == "instances":
        service = _instances(url, pointer, numbers, channels_last, ranked)
    elif protocol == "multipart":
        service = _upload(url, pointer, form_field, ranked)
    elif protocol == "template":
        service = _json(url, text, pointer, numbers, channels_last, ranked)
    else:
        service = _pictures(protocol, url)
    known = _labels(labels, config, shape.classes)
    images = None if cover is None else _covers(cover, cover_split, shape.size)
    chosen = {} if alpha is None else {"log10_alpha": alpha}
    terms = Terms(budget=budget, covers_per_trigger=covers, any_order=any_order, **chosen)
    limits = Limits(timeout=timeout, retries=retries, rate=rate)
    with (
        asking(
            service, known, limits, headers=_headers(header or []), authorities=authorities
        ) as asker,
        progress_bar("probe") as show,
    ):
        journal = None if out is None else out.with_name(f"{out.name}.journal.jsonl")
        found = ask_all(
            asker, secret, cover=images, terms=terms, journal=journal, resume=resume, show=show
        )
    facts = _facts(found, secret)
    print_result(facts, as_json, lambda: _print(found))
    if out is not None:
        after_all(lambda: write_atomically(out, json.dumps(facts, indent=2).encode()), str(out))
    paged("nnpassport.report.verdict:write_probe_page", facts, report)
    raise typer.Exit(0 if found.verdict.accepted else 1)


def _facts(found: Any, key: Any) -> dict[str, Any]:
    from nnpassport.report.provenance import made_with

    # Without the command: an address may have a token in it.
    made = {name: value for name, value in made_with().items() if name != "command"}
    known = {"owner": key.context.owner, "fingerprint": key.fingerprint}
    return {**found.as_dict(), "key": known, "made_with": made}


def _print(found: Any) -> None:
    print_verdict(found.verdict)
    print_table(("", ""), _rows(found))


def _open_inference(url: str, model: str | None, *how: Any) -> Any:
    from nnpassport.verification.remote.services import OpenInference

    return OpenInference(url, _needed(model, "--model", "the model's name on the server"), *how)


def _instances(url: str, pointer: str | None, *how: Any) -> Any:
    from nnpassport.verification.remote.services import INSTANCES, Template

    return Template(url, INSTANCES, "/predictions/0" if pointer is None else pointer, *how)


def _json(url: str, template: str, pointer: str | None, *how: Any) -> Any:
    from nnpassport.verification.remote.services import Template

    return Template(url, template, "/label" if pointer is None else pointer, *how)


def _upload(url: str, pointer: str | None, *how: Any) -> Any:
    from nnpassport.verification.remote.services import Upload

    return Upload(url, "/label" if pointer is None else pointer, *how)


def _pictures(protocol: str, url: str) -> Any:
    from nnpassport.verification.remote.services import HuggingFace

    if protocol != "huggingface":
        raise typer.BadParameter(f"--protocol {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    return HuggingFace(url)


def _config(folder: Path | None) -> Any:
    from nnpassport.files.config import read_config

    return None if folder is None else read_config(folder)


def _committed(
    path: Path, owner: Path | None, key: Any, like: Path | None, config: Any, alpha: float | None
) -> Any:
    """What the claim commits to of the owner's network, or `config` if it commits to nothing.

    Raises:
        BadRecipeError: `alpha` is laxer than what the claim declares.
        BadSignatureError: the claim does not hold with this key.
        UnsuitableModelError: the claim commits to another config than that of `like`.
    """
    from nnpassport.claims import signing
    from nnpassport.claims.claim import check_claim
    from nnpassport.claims.claimfile import read_signed
    from nnpassport.claims.facts import check_config
    from nnpassport.scheme import BadRecipeError, BadSignatureError

    signed = read_signed(path)
    if owner is None:
        public = signing.public_from_hex(signed.envelope.keyid)
    else:
        public = signing.load_public_key(owner)
    found = check_claim(signed._replace(response=None), public, key=key)
    if not found.holds or found.claim is None:
        raise BadSignatureError(f"{path} does not hold with this key: {found.reason}")
    declared = found.claim.log10_alpha
    if alpha is not None and alpha > declared:
        raise BadRecipeError(
            f"--alpha {alpha} is laxer than what the claim declares, {declared}; leave it out, or "
            "give a smaller one"
        )
    facts = found.claim.network
    if like is not None:
        check_config(like, facts)
    return config if facts is None else facts


def _needed(value: Any, option: str, what: str) -> Any:
    if value is None:
        raise typer.BadParameter(f"this protocol needs {option}: {what}")
    return value


def _normalisation(
    mean: str | None, std: str | None, config: Any, *, committed: bool = False
) -> Any:
    from nnpassport.data.images import Normalisation

    if committed and config is not None and (mean, std) != (None, None):
        raise typer.BadParameter("the claim says what --mean and --std are; leave them out")
    if mean is None and std is None and config is not None:
        return Normalisation(config.mean, config.std)
    if mean is None or std is None:
        raise typer.BadParameter(
            "this protocol takes normalised numbers: give --like, or --mean and --std (0 and 1 for "
            "a model that normalises by itself)"
        )
    try:
        return Normalisation(*(tuple(map(float, each.split(","))) for each in (mean, std)))
    except ValueError as error:
        raise typer.BadParameter(f"--mean and --std: {error}") from error


def _template(path: Path | None) -> str:
    from nnpassport.claims.signing import read_small
    from nnpassport.scheme import UnreadableDataError

    path = _needed(path, "--template", 'a file with JSON such as {"image": "$IMAGE"}')
    data = read_small(path, "template", MAX_TEMPLATE_BYTES, UnreadableDataError)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UnreadableDataError(f"{path} is no UTF-8; needed: a JSON file") from None


def _labels(path: Path | None, config: Any, classes: int) -> Any:
    from nnpassport.verification.remote.labels import Labels, read_labels

    if path is not None:
        return read_labels(path, classes)
    return Labels(classes) if config is None else Labels.in_order(config.classes, classes)


def _covers(source: str, split: str | None, size: tuple[int, int, int]) -> Any:
    return images_from(source, split, SimpleNamespace(input_size=size))


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
