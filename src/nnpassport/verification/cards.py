"""What a card or a bill of materials says a network was made from, held against `compare`."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nnpassport.files.disk import brief, read_once, refuse_leaving
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.lineage import Outcome

CARD_FILE = "README.md"
BOM_FILE = "bom.cdx.json"
MAX_CARD_BYTES = 2**20
MAX_BOM_BYTES = 2**22
_FENCE = "---"
_FIELD = "base_model:"
MOST_BASES = 32
_LONGEST = 200


class Ancestor(NamedTuple):
    """A network that a bill of materials names as an ancestor.

    Attributes:
        name: as the bill calls it.
        hashes: SHA-256 (hex) of its files, as the bill says.
    """

    name: str
    hashes: tuple[str, ...]


class Declared(NamedTuple):
    """What a folder declares its network to be made from.

    Attributes:
        bases: the `base_model` of its card.
        ancestors: of its bill of materials; None where there is no bill.
    """

    bases: tuple[str, ...]
    ancestors: tuple[Ancestor, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.bases, *(each.name for each in self.ancestors or ()))))


def declared(folder: Path) -> Declared:
    """What the card in a folder declares, its bill of materials, or both.

    Raises:
        UnreadableModelError: there is neither, or one of them cannot be read.
    """
    ancestors = declared_ancestors(folder) if (folder / BOM_FILE).is_file() else None
    if ancestors is not None and not (folder / CARD_FILE).is_file():
        return Declared((), ancestors)
    return Declared(declared_bases(folder), ancestors)


def declared_ancestors(folder: Path) -> tuple[Ancestor, ...]:
    """The ancestors in the pedigree of the network that a CycloneDX bill in a folder is of.

    Raises:
        UnreadableModelError: it cannot be read, or is no such bill.
    """
    path = folder / BOM_FILE
    refuse_leaving(folder, path)
    data = read_once(path, MAX_BOM_BYTES)
    try:
        document = json.loads(data.decode("utf-8"))
        if document["bomFormat"] != "CycloneDX":
            raise ValueError("its bomFormat is not CycloneDX")
        found = document["metadata"]["component"].get("pedigree", {}).get("ancestors", [])
        if len(found) > MOST_BASES:
            raise ValueError(f"it has {len(found)} ancestors, and at most {MOST_BASES} are read")
        return tuple(Ancestor(_name(each["name"]), tuple(_hashes(each))) for each in found)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UnreadableModelError(
            f"{path} cannot be read as a bill of materials ({type(error).__name__}: "
            f"{brief(error)}); needed: CycloneDX in JSON, with the network as metadata.component"
        ) from error


def _hashes(component: Any) -> Iterator[str]:
    """SHA-256 of a component and of the files in it."""
    for each in component.get("hashes", []):
        if each["alg"] == "SHA-256":
            if not re.fullmatch("[0-9a-fA-F]{64}", each["content"]):
                raise ValueError("a SHA-256 that is none")
            yield each["content"].lower()
    for inner in component.get("components", [])[:MOST_BASES]:
        for each in inner.get("hashes", []):
            if each["alg"] == "SHA-256":
                yield _name(each["content"]).lower()


def _name(text: str) -> str:
    if not text.isprintable() or len(text) > _LONGEST:
        raise ValueError("a base model has a name that is none")
    return text


def declared_bases(folder: Path) -> tuple[str, ...]:
    """The `base_model` of a card's front matter: none, one, or a list of names.

    Raises:
        UnreadableModelError: there is no card, it has no front matter, or that cannot be read.
    """
    path = folder / CARD_FILE
    if not path.is_file():
        raise UnreadableModelError(
            f"{folder} has no card; needed: a folder with a {CARD_FILE}, or no --card"
        )
    refuse_leaving(folder, path)
    try:
        lines = read_once(path, MAX_CARD_BYTES).decode("utf-8-sig").splitlines()
        if not lines or lines[0].strip() != _FENCE:
            raise ValueError("its first line is not ---")
        front = lines[1 : 1 + [line.rstrip() for line in lines[1:]].index(_FENCE)]
        return _bases(front)
    except ValueError as error:
        raise UnreadableModelError(
            f"the front matter of {path} cannot be read ({error}); needed: lines between two lines "
            "of ---, as hubs have them"
        ) from error


def _bases(front: Sequence[str]) -> tuple[str, ...]:
    for number, line in enumerate(front):
        if not line.startswith(_FIELD):
            continue
        value = line.removeprefix(_FIELD).strip()
        if value.startswith("["):
            inner = value.removeprefix("[").removesuffix("]")
            found = [_plain(each) for each in inner.split(",") if each.strip()]
        elif value:
            found = [_plain(value)]
        else:
            found = []
            for below in front[number + 1 :]:
                if not below.lstrip().startswith("- "):
                    break
                found.append(_plain(below.lstrip().removeprefix("- ")))
        if len(found) > MOST_BASES:
            raise ValueError(f"it names {len(found)} base models; at most {MOST_BASES} are read")
        return tuple(found)
    return ()


def _plain(text: str) -> str:
    """A scalar of YAML without its quotes or a comment."""
    text = text.strip()
    if text.startswith('"'):
        text = json.loads(text[: text.rindex('"') + 1])
    elif text.startswith("'"):
        text = text[1 : text.rindex("'")]
    else:
        text = text.partition(" #")[0].strip()
    return _name(text)


def declaration_says(found: Declared, outcome: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """What card and bill of A declare, and whether B bears it out; `digests` are of B's files."""
    said = card_says(found.names, outcome)
    if found.ancestors is None:
        return said
    same = [a.name for a in found.ancestors if set(a.hashes) & set(digests.values())]
    named = [{**each._asdict(), "is_b": each.name in same} for each in found.ancestors]
    told = (
        f"; by its digest B is the ancestor {', '.join(same)} of A's bill of materials"
        if same
        else "; no ancestor in A's bill of materials has a digest of B's files"
    )
    return {**said, "says": said["says"] + told, "ancestors": named}


def card_says(bases: Sequence[str], outcome: str) -> dict[str, Any]:
    """What the card of A declares, and whether B, if it is that network, bears it out."""
    named = ", ".join(bases)
    if outcome == Outcome.RELATED:
        said = (
            f"the card of A declares {named}; if B is that, the declaration is borne out"
            if bases
            else "the card of A declares no base model, and A is related to B"
        )
        agrees = bool(bases)
    elif outcome == Outcome.NONE:
        said = (
            f"the card of A declares {named}, and there is no sign of it in B: B is another "
            "network, or the declaration is not borne out"
            if bases
            else "the card of A declares no base model, and there is no sign of one in B"
        )
        agrees = not bases
    else:
        said = f"the card of A declares {named or 'no base model'}, which this leaves open"
        return {"base_model": list(bases), "agrees": None, "says": said}
    return {"base_model": list(bases), "agrees": agrees, "says": said}
