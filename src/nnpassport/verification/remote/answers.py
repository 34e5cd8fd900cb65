"""Values out of JSON from a stranger: each is what it should be, or `UnreachableServiceError`."""

import json
from typing import Any

from nnpassport.files.disk import brief
from nnpassport.scheme import UnreachableServiceError

Label = str | int | None
"""What a service answers: a name, an index, or nothing."""


def parsed(body: bytes) -> Any:
    """The JSON in an answer.

    Raises:
        UnreachableServiceError: it is none.
    """
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:  # also bad UTF-8 and endless digits
        raise unreadable(f"no JSON ({brief(error)})") from error


def unreadable(what: str) -> UnreachableServiceError:
    """The error for an answer that is none of its protocol."""
    return UnreachableServiceError(
        f"the service answers with {what}; needed: an answer of the protocol that was named"
    )


def step(found: Any, token: str) -> Any:
    """One step of RFC 6901; None where there is nothing."""
    if isinstance(found, dict):
        return found.get(token)
    if isinstance(found, list) and token.isascii() and token.isdigit() and len(token) < 10:
        return found[int(token)] if int(token) < len(found) else None
    return None


def plain(value: Any) -> Label:
    """A text or an index; a whole float counts as an index, as some servers know no integers."""
    if value is None or isinstance(value, str) or type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise unreadable("a label that is neither a text nor an index")


def top(values: list[Any]) -> Label:
    """One value is the label itself; several are numbers, and the place of the highest counts."""
    if len(values) < 2:
        return plain(values[0]) if values else None
    if not all(map(is_number, values)):
        raise unreadable("several values that are not all numbers")
    return values.index(max(values))


def flat(values: list[Any]) -> list[Any]:
    """The values of nested lists in their order; not recursive, for a stranger nested them."""
    flat, waiting = [], [iter(values)]
    while waiting:
        for value in waiting[-1]:
            if isinstance(value, list):
                waiting.append(iter(value))
                break
            flat.append(value)
        else:
            waiting.pop()
    return flat


def is_number(value: object) -> bool:
    """Whether it can be compared with other numbers."""
    # NaN differs from itself; math.isnan would choke on an integer of a thousand digits.
    return isinstance(value, int | float) and type(value) is not bool and value == value  # noqa: PLR0124
