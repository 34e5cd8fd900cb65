"""What everything in the lab does alike: look a name up, and keep a result."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from nnpassport.files.disk import write_atomically
from nnpassport.scheme import BadRecipeError

T = TypeVar("T")


def named(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry of this name; `what` says of what kind it is.

    Raises:
        BadRecipeError: there is none.
    """
    if name not in table:
        raise BadRecipeError(f"{what} {name!r} is unknown; there are: {', '.join(table)}")
    return table[name]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all.

    Raises:
        UnwritableOutputError: it cannot be written; what was there is as it was.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())
