"""Values out of JSON from a stranger: each is what it should be, or `UnreachableServiceError`."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from nnpassport.files.disk import brief
from nnpassport.scheme import UnreachableServiceError

Label = str | int | None
"""What a service answers: a name, an index, or nothing."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_CLASSIFIED = re.compile(r"([^:]{1,64}):([0-9]{1,9})(?::(.*))?", re.DOTALL)
_LONGEST_NUMBER = 64  # characters of a number that is written as a text
_FEWEST_RANKED = 3  # [0, 1] may be a mark at the second of two classes


@final
@dataclass(frozen=True, slots=True)
class Scores:
    """Several numbers, as a service gave them; the key knows how many classes there are."""

    numbers: tuple[float, ...]

    def top(self, classes: int) -> int:
        """The place of the highest, where there is one finite number for each of the classes.

        Raises:
            UnreachableServiceError: they are more, fewer, not finite, or places themselves.
        """
        if len(self.numbers) != classes:
            raise unreadable(
                f"{len(self.numbers)} numbers where the key has {classes} classes, which are no "
                "scores"
            )
        if not all(-math.inf < each < math.inf for each in self.numbers):
            raise unreadable("scores that are not all finite")
        if classes >= _FEWEST_RANKED and sorted(self.numbers) in _rankings(classes):
            raise unreadable(f"the numbers of all {classes} classes, a ranking and no scores")
        return self.numbers.index(max(self.numbers))


Answered = Label | Scores
"""What an answer holds: one label, or numbers of which the highest may count."""


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


def several(values: list[Any], *, ranked: bool = False) -> Answered:
    """One value is the label itself, and so is the first of ranked ones; several are scores."""
    if len(values) < 2 or ranked:
        return plain(values[0]) if values else None
    if sum(each is True for each in values) == 1 and all(type(each) is bool for each in values):
        return Scores(tuple(map(float, values)))
    numbers = [number(each) for each in values]
    if not all(map(is_number, numbers)):
        raise unreadable("several values that are not all numbers")
    return Scores(tuple(numbers))


def named_scores(found: Any) -> Label:
    """The name with the highest score in `{"cat": 0.9, "dog": 0.1}`.

    Raises:
        UnreachableServiceError: it is no such object.
    """
    scores = [number(each) for each in found.values()] if isinstance(found, dict) else []
    if not scores or not all(map(is_number, scores)) or {"label", "score"} & set(found):
        raise unreadable("JSON that is neither a list of labels nor an object of scores")
    return str(list(found)[scores.index(max(scores))])


def classified(values: list[Any]) -> Label:
    """The best of `"score:index:label"` or `"score:index"`; None where the texts are none.

    So Triton's classification extension writes them.
    """
    parts = [_CLASSIFIED.fullmatch(each) for each in values if isinstance(each, str)]
    found = [each for each in parts if each and is_number(number(each[1]))]
    if not found or len(found) != len(values):
        return None
    best = max(found, key=lambda each: number(each[1]))
    return best[3] or int(best[2])


def number(value: Any) -> Any:
    """The number that a text is, or else the value as it came."""
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        return float(value)
    return value


def unwrapped(found: Any) -> Any:
    """What lists of one list hold; not recursive, for a stranger nested them."""
    while isinstance(found, list) and len(found) == 1 and isinstance(found[0], list):
        found = found[0]
    return found


def _rankings(classes: int) -> Sequence[list[int]]:
    return [list(range(classes)), list(range(1, classes + 1))]


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
