"""All the scores in an answer of a service, by name: what a mark in ordinary answers is read of.

Answers come from a stranger: whatever the bytes are, they are scores, none, or
`UnreachableServiceError`.
"""

from heapq import nlargest
from typing import Any

from nnpassport.verification.remote.answers import (
    Scores,
    is_number,
    number,
    parsed,
    step,
    unwrapped,
)
from nnpassport.verification.remote.services import (
    HuggingFace,
    Service,
    Template,
    Upload,
)

MAX_SCORES = 2_000
"""Most scores of one answer that are kept: the highest."""

Named = tuple[tuple[str, float], ...]


def scores_in(service: Service, body: bytes) -> Named:
    """The scores in an answer, (name, number) each; empty where it holds a label and no scores.

    Lists have the names "0", "1", … of their places. Those that are not finite are left out.

    Raises:
        UnreachableServiceError: it is no answer of the protocol.
    """
    if isinstance(service, HuggingFace):
        return _listed(unwrapped(parsed(body)))
    if isinstance(service, Template | Upload):
        found = parsed(body)
        for token in service.pointer.split("/")[1:]:
            found = step(found, token.replace("~1", "/").replace("~0", "~"))
        if isinstance(found, dict):
            return _named(found.items())
    several = service.label(body)
    if isinstance(several, Scores):
        return _named((str(place), each) for place, each in enumerate(several.numbers))
    return ()


def _listed(found: Any) -> Named:
    """`[{"label": "cat", "score": 0.9}, …]`, or an object of scores by name."""
    if isinstance(found, dict):
        return _named(found.items())
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        return ()
    return _named((str(each.get("label")), each.get("score")) for each in found)


def _named(pairs: Any) -> Named:
    kept: dict[str, float] = {}
    for name, value in pairs:
        each = number(value)
        if is_number(each) and -1e30 < each < 1e30:
            kept[str(name)[:200]] = float(each)
    if len(kept) > MAX_SCORES:
        kept = dict(nlargest(MAX_SCORES, kept.items(), key=lambda pair: pair[1]))
    return tuple(kept.items()) if len(kept) > 1 else ()
