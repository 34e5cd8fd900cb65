"""What a model card says a network was made from, held against what `compare` finds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnpassport.files.disk import read_once, refuse_leaving
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.lineage import Outcome

CARD_FILE = "README.md"
MAX_CARD_BYTES = 2**20
_FENCE = "---"
_FIELD = "base_model:"
_MOST = 32


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
        if len(found) > _MOST:
            raise ValueError(f"it names {len(found)} base models, and at most {_MOST} are read")
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
    if not text.isprintable() or len(text) > 200:
        raise ValueError("a base model has a name that is none")
    return text


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
