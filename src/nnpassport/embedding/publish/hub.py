"""A folder that can be uploaded as it is: weights, config, card, bill, and never a secret."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, final

from nnpassport.claims.claim import Claim, check_claim
from nnpassport.claims.claimfile import encode_signed, read_signed
from nnpassport.claims.signing import public_from_hex
from nnpassport.embedding.anchoring import NEVER_RELEASED
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.embedding.publish.bom import BOM_FILE, bill_of, declared_parts
from nnpassport.embedding.publish.card import CARD_FILE, Facts, model_card
from nnpassport.files.config import CONFIG_FILE, MAX_CONFIG_BYTES, read_config
from nnpassport.files.disk import make_folder, read_once, reading, sha256_of, writing
from nnpassport.files.weights import WEIGHTS_FILE
from nnpassport.scheme import (
    UnreadableClaimError,
    UnreadableModelError,
    UnsuitableModelError,
    UnwritableOutputError,
)

CLAIM_FILE = "nnpassport.claim.json"

# What `release` and the `save_pretrained` of models, tokenisers and image processors write.
_ALLOWED = (
    *(WEIGHTS_FILE, CONFIG_FILE, "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.txt", "spiece.model"),
    *("tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja", "*.onnx", "*.onnx.data"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md"),
)
_SECRETS = {
    b"nnpassport-key": "a secret key",
    b"PRIVATE KEY-----": "a private key",
    NEVER_RELEASED.encode(): "of the secret network before a mark",
}
_WRITTEN = {CARD_FILE, BOM_FILE}
_SEARCHED = 2**24  # bytes at the start of a file, which is all of any but the weights
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@final
@dataclass(frozen=True, slots=True)
class Packaged:
    """What was packaged: the files, and the digests that the card states, in hexadecimal.

    `bases` are what `compare` says of each network that this one is declared to be made from.
    """

    files: tuple[str, ...]
    weights: str
    claim: str
    bases: Mapping[str, str]


def package(
    source: Path,
    claim: Path,
    folder: Path,
    *,
    licence: str | None = None,
    name: str | None = None,
    publish_claim: bool = False,
    bases: Mapping[str, Path] | None = None,
    adapters: Mapping[str, Path] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Packaged:
    """Write a folder for a model hub out of a released one, whole or not at all.

    `source` is a folder of `nnpassport release`, or one that a Hugging Face model was saved into:
    its files are copied byte for byte, and a model card and a bill of materials (CycloneDX) are
    added, in place of those that are there. `bases` are networks that this one is declared to be
    made from, by name: the bill has their digests and what `compare` says of each; `adapters` were
    merged into it.
    `claim` must hold, and be about these weights if it names any; the card states its digest, and
    `publish_claim` adds the file.
    `finish` is called with the folder before it takes its name, to sign it, say.

    Raises:
        UnsuitableModelError: the folder holds a secret or what is not known to be none, or the
            claim is about another network, or the licence is no identifier.
        UnreadableModelError: weights or config are missing, corrupt or hostile.
        UnreadableClaimError: the claim cannot be read or does not hold.
        UnwritableOutputError: `folder` is not empty, or cannot be written.
    """
    _check_new(folder)
    _check_licence(licence)
    files = _files(source)
    weights = read_weights(source / WEIGHTS_FILE)
    digest = tensors_digest(weights.tensors)
    committed, claim_bytes = _claim(claim, digest)
    facts = _facts(source, committed, name or folder.name)
    claim_digest = hashlib.sha256(claim_bytes).hexdigest()
    digests = {"file": weights.digests[WEIGHTS_FILE], "tensors": digest, "claim": claim_digest}
    count = sum(t.numel() for t in weights.tensors.values() if t.is_floating_point())
    made_from, merged = declared_parts(source / WEIGHTS_FILE, bases or {}, adapters or {})
    names = tuple(each.name for each in made_from)
    card = model_card(facts, committed, digests, parameters=count, licence=licence, bases=names)
    claim_file = CLAIM_FILE if publish_claim else None

    def fill(staged: Path) -> None:
        _copy(files, source, staged, digests["file"])
        (staged / CARD_FILE).write_text(card, encoding="utf-8")
        if claim_file is not None:
            (staged / claim_file).write_bytes(claim_bytes)
        there = {each.name: sha256_of(each) for each in sorted(staged.iterdir())}
        told = {"licence": licence, "claim_file": claim_file}
        bill = bill_of(facts, committed, digests, there, made_from, merged, **told)
        (staged / BOM_FILE).write_bytes(bill)
        if finish is not None:
            finish(staged)

    _write_folder(folder, fill)
    made = tuple(sorted(each.name for each in folder.iterdir()))
    found = {each.name: each.found.outcome.value for each in made_from if each.found is not None}
    return Packaged(made, digest, claim_digest, found)


def _copy(files: Sequence[str], source: Path, staged: Path, weights: str) -> None:
    """The files, byte for byte; `weights` is what the weights' digest was when they were read."""
    for each in files:
        shutil.copyfile(source / each, staged / each)
    if sha256_of(staged / WEIGHTS_FILE) != weights:
        raise UnreadableModelError(f"{source} changed while it was read; try again")


def _check_licence(licence: str | None) -> None:
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise UnsuitableModelError(
            f"the licence {licence!r:.80} is no identifier; needed: one of the hub's, such as "
            "apache-2.0, mit, cc-by-nc-4.0 or other"
        )


def _check_new(folder: Path) -> None:
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UnwritableOutputError(
            f"{folder} is there already, and only what is new is sure to hold no secret; name "
            "another folder, or remove it"
        )


def _write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    with (
        writing(folder),
        make_folder(folder.parent),
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".package-") as temporary,
    ):
        staged = Path(temporary) / "content"
        staged.mkdir()  # not the temporary folder itself, which nobody else may read
        fill(staged)
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails
        staged.rename(folder)


def _files(source: Path) -> list[str]:
    """Names of the files in `source`, once each is known to be fit for everybody's eyes.

    Raises:
        UnsuitableModelError: one of them is, or may be, a secret.
    """
    with reading(source):
        found = sorted(source.iterdir())
    for path in found:
        what = _secret_in(path) if path.is_file() else None
        if what is not None:
            raise UnsuitableModelError(
                f"{path} is {what}, and everything in this folder would be published; move it to "
                "where nobody else can read it, and draw another if it was ever uploaded"
            )
    strangers = [p.name for p in found if not p.is_file() or not _is_allowed(p.name)]
    strangers = [name for name in strangers if name not in _WRITTEN]
    if strangers:
        raise UnsuitableModelError(
            f"{source} also holds {', '.join(map(repr, strangers[:5]))}, and nobody can say that "
            "they are no secret; needed: a released folder with nothing but "
            f"{', '.join(_ALLOWED)}; run `nnpassport release`, or move them away"
        )
    if missing := {WEIGHTS_FILE, CONFIG_FILE} - {path.name for path in found}:
        raise UnreadableModelError(
            f"{source} has no {', '.join(sorted(missing))}; needed: a folder of `nnpassport "
            "release`, or of `save_pretrained`, with the weights in one file"
        )
    return [path.name for path in found if path.name not in _WRITTEN]


def _is_allowed(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _ALLOWED)


def _secret_in(path: Path) -> str | None:
    with reading(path), path.open("rb") as file:
        start = file.read(_SEARCHED)
    return next((what for sign, what in _SECRETS.items() if sign in start), None)


def _claim(path: Path, digest: str) -> tuple[Claim, bytes]:
    """The claim, checked against the public key in itself, and the bytes of its file."""
    signed = read_signed(path)
    owner = public_from_hex(signed.envelope.keyid)
    finding = check_claim(signed.undated(), owner)
    if finding.claim is None or not finding.holds:
        raise UnreadableClaimError(
            f"{path} does not hold ({finding.reason}); use the original file of `claim new`"
        )
    if finding.claim.reference not in (None, digest):
        raise UnsuitableModelError(
            f"{path} commits to a network with the digest {finding.claim.reference}, and this "
            f"one's is {digest}; give the folder that `claim new --reference` was given, or make "
            "a claim for this one"
        )
    return finding.claim, encode_signed(signed)


def _facts(source: Path, claim: Claim, name: str) -> Facts:
    raw = read_once(source / CONFIG_FILE, MAX_CONFIG_BYTES)
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        document = None
    if isinstance(document, dict) and isinstance(document.get("model_type"), str):
        return _of_transformers(document, claim, name)
    config = read_config(source)
    size = "×".join(map(str, config.input_size))
    return Facts(
        title=name,
        owner=claim.context.owner,
        architecture=f"{config.architecture} {dict(config.arguments)}",
        library="nnpassport",
        task="image-classification",
        about=(("classes", str(len(config.classes))), ("input", f"{size}, channels first")),
        metrics=dict(config.metrics),
    )


def _of_transformers(document: dict[str, Any], claim: Claim, name: str) -> Facts:
    if "auto_map" in document:
        raise UnsuitableModelError(
            "config.json names code of its own (auto_map), which is not packaged; needed: an "
            "architecture that transformers has"
        )
    given = document.get("architectures")
    names = [n for n in given if isinstance(n, str)] if isinstance(given, list) else []
    return Facts(
        title=name,
        owner=claim.context.owner,
        architecture=", ".join(names) or document["model_type"],
        library="transformers",
        task=_task_of(names),
        about=(("model type", document["model_type"]),),
        metrics={},
    )


def _task_of(architectures: Sequence[str]) -> str | None:
    tasks = {
        "ForImageClassification": "image-classification",
        "ForSequenceClassification": "text-classification",
        "ForTokenClassification": "token-classification",
        "ForQuestionAnswering": "question-answering",
        "ForCausalLM": "text-generation",
        "LMHeadModel": "text-generation",
        "ForMaskedLM": "fill-mask",
        "ForSemanticSegmentation": "image-segmentation",
        "ForObjectDetection": "object-detection",
        "ForAudioClassification": "audio-classification",
    }
    found = [task for end, task in tasks.items() if any(n.endswith(end) for n in architectures)]
    return found[0] if found else None
