"""A bill of materials of a network, CycloneDX 1.6: what it is made of, and what was found of that.

The network is a component of type machine-learning-model; networks that it is declared to be made
from are ancestors in its pedigree, each with its digests and what `compare` says of the two. An
ancestor is what its owner declares, and the comparison is what anybody can repeat: `compare --card`
holds both against a network.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnpassport import __version__
from nnpassport.claims.claim import Claim
from nnpassport.embedding.publish.card import Facts
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.weights import read_arrays
from nnpassport.scheme import UnsuitableModelError
from nnpassport.verification.cards import BOM_FILE, MOST_BASES
from nnpassport.verification.compare import compare
from nnpassport.verification.lineage import Lineage, open_network

SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
_OURS = "nnpassport"
_NETWORK = "network"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://nnpassport.example/bom/v1")
_THIS = {"type": "application", "name": _OURS, "version": __version__}
_LONGEST_NAME = 200


class Part(NamedTuple):
    """A network that another was made from, or an adapter that was merged into it.

    Attributes:
        name: as hubs and people call it.
        files: SHA-256 (hex) of its files, by name.
        tensors: digest of its tensors, whatever file they are in.
        found: what `compare` says of it and the network; None of an adapter.
    """

    name: str
    files: Mapping[str, str]
    tensors: str
    found: Lineage | None = None


def declared_parts(
    network: Path, bases: Mapping[str, Path], adapters: Mapping[str, Path]
) -> tuple[list[Part], list[Part]]:
    """The networks and adapters that `network` is declared to be made from, read and compared.

    Raises:
        UnreadableModelError: one of them cannot be read.
        UnsuitableModelError: there are too many, or a name is none.
    """
    for name in (*bases, *adapters):
        if not name.isprintable() or not 1 <= len(name) <= _LONGEST_NAME:
            raise UnsuitableModelError(
                f"{name!a:.80} is no name of a network; needed: 1 to {_LONGEST_NAME} printable "
                "characters"
            )
    if len(bases) + len(adapters) > MOST_BASES:
        raise UnsuitableModelError(
            f"{len(bases) + len(adapters)} networks and adapters are declared; needed: at most "
            f"{MOST_BASES}"
        )
    mine = open_network(network) if bases else None
    found = {
        name: None if mine is None else compare(mine, open_network(path))
        for name, path in bases.items()
    }
    return (
        [_part(name, path, found[name]) for name, path in bases.items()],
        [_part(name, path, None) for name, path in adapters.items()],
    )


def _part(name: str, path: Path, found: Lineage | None) -> Part:
    weights = read_arrays(path)
    return Part(name, weights.digests, arrays_digest(weights.arrays), found)


def bill_of(
    facts: Facts,
    claim: Claim,
    digests: Mapping[str, str],
    files: Mapping[str, str],
    bases: Sequence[Part] = (),
    adapters: Sequence[Part] = (),
    *,
    licence: str | None = None,
    claim_file: str | None = None,
) -> bytes:
    """The bill as JSON; the same network and parts give the same bytes.

    Args:
        facts: what the card says of the network.
        claim: what its owner has committed to.
        digests: as the card states them: of the weights as "file" and "tensors", of the "claim".
        files: SHA-256 (hex) of every file that is published, by name.
        bases: networks that it is declared to be made from.
        adapters: what was merged into it.
        licence: an identifier of the hub's.
        claim_file: where the claim is, if it is published too.
    """
    network = _described(facts, claim, digests, files)
    if licence is not None:
        network["licenses"] = [{"license": {"name": licence}}]
    if claim_file is not None:
        network["externalReferences"] = [
            {"type": "attestation", "url": claim_file, "hashes": [_hash(digests["claim"])]}
        ]
    if bases:
        network["pedigree"] = {
            "ancestors": [_ancestor(each, number) for number, each in enumerate(bases)],
            "notes": "Declared by the owner; what was found of each is in its properties.",
        }
    merged = [_component(each, f"adapter-{n}") for n, each in enumerate(adapters)]
    return _numbered(
        {
            "$schema": SCHEMA,
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"tools": {"components": [_THIS]}, "component": network},
            "components": merged,
            "dependencies": [{"ref": _NETWORK, "dependsOn": [each["bom-ref"] for each in merged]}],
        }
    )


def _described(
    facts: Facts, claim: Claim, digests: Mapping[str, str], files: Mapping[str, str]
) -> dict[str, Any]:
    """The network as a component: its card, what was claimed, and its files."""
    claimed = {
        "claim:fingerprint": claim.fingerprint,
        "claim:owner_key": claim.owner_key,
        "claim:reference": claim.reference or "none",
        "claim:scheme": claim.context.scheme,
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": _NETWORK,
        "name": _plain(facts.title),
        "authors": [{"name": _plain(facts.owner)}],
        "hashes": [_hash(digests["file"])],
        "modelCard": _model_card(facts),
        "properties": _properties(tensors=digests["tensors"], claim=digests["claim"], **claimed),
        "components": [
            {"type": "file", "bom-ref": f"file-{n}", "name": name, "hashes": [_hash(digest)]}
            for n, (name, digest) in enumerate(sorted(files.items()))
        ],
    }


def _numbered(document: dict[str, Any]) -> bytes:
    """The document as JSON, with a serial number that follows from what is in it."""
    number = uuid.uuid5(_SPACE, json.dumps(document, sort_keys=True))
    numbered = {**document, "serialNumber": f"urn:uuid:{number}"}
    return json.dumps(numbered, indent=1, sort_keys=True).encode() + b"\n"


def _component(part: Part, reference: str) -> dict[str, Any]:
    """The weights as one component, with a hash of its own if they are one file."""
    (one, *more) = sorted(part.files.items())
    files = [{"type": "file", "name": name, "hashes": [_hash(digest)]} for name, digest in more]
    return {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": part.name,
        "hashes": [_hash(one[1])],
        "properties": _properties(tensors=part.tensors, file=one[0]),
        **({"components": files} if files else {}),
    }


def _ancestor(part: Part, number: int) -> dict[str, Any]:
    component = _component(part, f"ancestor-{number}")
    if part.found is None:
        return component
    order = part.found.order
    fixed, units = (sum(getattr(o, what) for o in order.orders) for what in ("fixed", "units"))
    said = {
        "compare": part.found.outcome.value,
        "compare:reason": _plain(part.found.reasons[0]),
        "compare:units": f"{fixed} of {units}",
        "compare:log10_p": "none" if order.log10_p is None else f"{order.log10_p:.1f}",
    }
    return {**component, "properties": [*component["properties"], *_properties(**said)]}


def _model_card(facts: Facts) -> dict[str, Any]:
    card: dict[str, Any] = {"modelParameters": {"modelArchitecture": _plain(facts.architecture)}}
    if facts.task is not None:
        card["modelParameters"]["task"] = facts.task
    if facts.metrics:
        card["quantitativeAnalysis"] = {
            "performanceMetrics": [
                {"type": _plain(name), "value": f"{value:.6g}"}
                for name, value in sorted(facts.metrics.items())
            ]
        }
    return card


def _properties(**values: str) -> list[dict[str, str]]:
    return [{"name": f"{_OURS}:{name}", "value": value} for name, value in values.items()]


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


__all__ = ["BOM_FILE", "SCHEMA", "Part", "bill_of", "declared_parts"]
