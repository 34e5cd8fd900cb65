"""What a source of labelled pictures is, and how its classes are numbered.

It knows how many pictures there are and names their classes; it decodes nothing.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nnpassport.data.decoding import Encoded
from nnpassport.scheme import UnreadableDataError

LABELS = ("label", "labels", "fine_label", "cls", "class", "category", "target")
"""What data sets call the column of classes, in order of preference."""
_MOST_CLASSES = 1_000_000


class Source(NamedTuple):
    """`total` pictures to decode in order; `files` is all that they depend on, () if unknown."""

    name: str
    total: int
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    pictures: Iterator[Encoded]


class Columns(NamedTuple):
    """Names of the columns of pictures and labels."""

    image: str
    label: str


class Asked(NamedTuple):
    """The same as they were asked for; None is whatever data sets usually call them."""

    image: str | None = None
    label: str | None = None


def classes_of(labels: Iterator[Any], name: str) -> tuple[str, ...]:
    """Sorted names, or "0" to the largest number."""
    present = {label for label in labels if label is not None}
    if not present:
        raise UnreadableDataError(f"{name}: no row has a label; needed: labelled pictures")
    if all(isinstance(label, str) for label in present):
        return tuple(sorted(present))
    if not 0 <= min(present) <= max(present) < _MOST_CLASSES:
        raise UnreadableDataError(
            f"{name}: labels run from {min(present)} to {max(present)}; "
            f"needed: class indices from 0 to below {_MOST_CLASSES}"
        )
    return tuple(map(str, range(max(present) + 1)))


def index_of(label: Any, index: dict[str, int]) -> int | None:
    """Class index of a stored label, a name or a number; None if it is missing or no class."""
    if isinstance(label, str):
        return index.get(label)
    return label if label is not None and 0 <= label < len(index) else None
