"""The model card: what a network is, whose it says it is, and how anybody can check that."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from nnpassport.claims.claim import Claim

CARD_FILE = "README.md"
_LONGEST_CELL = 200  # characters


@final
@dataclass(frozen=True, slots=True)
class Facts:
    """What a card says of a network.

    Attributes:
        task: a pipeline tag of the hub, or None.
        about: further rows of the table, as pairs of texts.
        metrics: finite numbers by name; accuracies in [0, 1].
    """

    title: str
    owner: str
    architecture: str
    library: str
    task: str | None
    about: tuple[tuple[str, str], ...]
    metrics: Mapping[str, float]


def model_card(
    facts: Facts,
    claim: Claim,
    digests: Mapping[str, str],
    *,
    parameters: int,
    licence: str | None,
    bases: Sequence[str] = (),
) -> str:
    """The README of a model repository: front matter for the hub, and Markdown.

    `digests` are SHA-256 in hexadecimal: of the weights as "file" and as "tensors", of the "claim".
    `bases` are networks that this one is declared to be made from.
    """
    rows = [
        ("architecture", facts.architecture),
        ("parameters", f"{parameters:,}"),
        *facts.about,
        *((name, f"{value:.6g}") for name, value in facts.metrics.items()),
        ("SHA-256 of model.safetensors", digests["file"]),
    ]
    claimed = [
        ("owner", facts.owner),
        ("owner's public key (Ed25519)", claim.owner_key),
        ("scheme, bits", f"{claim.context.scheme}, {claim.context.bits}"),
        ("fingerprint of the secret key", claim.fingerprint),
        ("date by the owner's own clock", claim.date),
        ("digest of the weights committed to", claim.reference or "none"),
        ("digest of the weights in this folder", digests["tensors"]),
        ("SHA-256 of the claim file", digests["claim"]),
    ]
    return _CARD.format(
        front=_front_matter(facts, licence, bases),
        title=_cell(facts.title),
        rows=_table(rows),
        claimed=_table(claimed),
    )


def _front_matter(facts: Facts, licence: str | None, bases: Sequence[str]) -> str:
    fields: dict[str, object] = {
        "license": licence,
        "base_model": list(bases),
        "library_name": facts.library,
        "pipeline_tag": facts.task,
        "tags": ["nnpassport", "model-ownership", "watermark"],
        "metrics": ["accuracy"] if "accuracy" in facts.metrics else None,
    }
    # A JSON value is a YAML value, and nothing in it can end the block.
    return "\n".join(f"{k}: {json.dumps(value)}" for k, value in fields.items() if value)


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)


def _cell(text: str) -> str:
    """Text that stays text: no markup, no HTML, no further cell, no line of its own."""
    line = "".join(c if c.isprintable() else " " for c in text[:_LONGEST_CELL])
    escaped = html.escape(line, quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#!~$" else letter for letter in escaped)


_CARD = """---
{front}
---

# {title}

| | |
| --- | --- |
{rows}

## Whose it is

This network carries the mark of a secret key, embedded while it was trained. Its owner has
committed to that key in a signed claim:

| | |
| --- | --- |
{claimed}

## How to check it

The claim's signature, with the owner's public key from a source that you trust:

    pip install nnpassport
    nnpassport claim verify nnpassport.claim.json --owner owner.pub.pem --root authority.pem

The mark itself is read with the secret key, which the owner discloses to a judge in a dispute. Of
a suspect in any format, the claim holding, it says with which probability a network that is not
related to the key would match as well:

    nnpassport verify SUSPECT --key owner.key --claim nnpassport.claim.json

If this folder holds `model.sig`, all other files are signed (OpenSSF Model Signing):

    pip install model-signing pyOpenSSL
    model_signing verify key . --signature model.sig --public_key signer.pub.pem

Nothing in this folder is secret.
"""
