"""What everything in the lab does alike: look a name up."""

from collections.abc import Mapping
from typing import TypeVar

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
