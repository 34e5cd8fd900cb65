"""From what a service calls a class to the class's index in the owner's network."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

from nnpassport.evidence.signing import read_small
from nnpassport.files import brief
from nnpassport.scheme import UnreadableDataError

MAX_LABELS_BYTES = 2**22

_INDEX = re.compile(r"(?:LABEL_)?(0|[1-9][0-9]{0,8})")


@final
@dataclass(frozen=True, slots=True)
class Labels:
    """How a service's labels are read: first as a name, then as an index.

    An index is a number, a text of digits, or "LABEL_3", as Hugging Face calls classes without
    names.

    Attributes:
        classes: how many classes the key was made for.
        names: index of each name; empty where there are none.

    Raises:
        UnreadableDataError: a name has an index that is none of the classes.
    """

    classes: int
    names: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [name for name, index in self.names.items() if not self._is_class(index)]
        if wrong:
            raise UnreadableDataError(
                f"the label {wrong[0]!r:.80} has index {self.names[wrong[0]]!r:.20}; needed: one "
                f"of 0 to {self.classes - 1}, the classes that the key was made for"
            )

    @classmethod
    def in_order(cls, names: Sequence[str], classes: int) -> Self:
        """Names in the order of the classes.

        Raises:
            UnreadableDataError: two classes have one name, or there is not one name for each class.
        """
        if len(set(names)) != len(names) or len(names) != classes:
            raise UnreadableDataError(
                f"{len(names)} labels are given, {len(set(names))} of them distinct; needed: a "
                f"name of its own for each of the {classes} classes that the key was made for, in "
                'their order, or an object such as {"cat": 3}'
            )
        return cls(classes, {name: index for index, name in enumerate(names)})

    def index(self, label: str | int) -> int | None:
        """The class that a service means by `label`, or None if it is not known."""
        if isinstance(label, str):
            if label in self.names:
                return self.names[label]
            found = _INDEX.fullmatch(label)
            label = int(found[1]) if found else -1
        return label if self._is_class(label) else None

    def _is_class(self, index: object) -> bool:
        return type(index) is int and 0 <= index < self.classes


def read_labels(path: Path, classes: int) -> Labels:
    """Labels from a JSON file: names in the order of the classes, or an index for each name.

    Raises:
        UnreadableDataError: the file is missing, too large, or something else.
    """
    data = read_small(path, "label", MAX_LABELS_BYTES, UnreadableDataError)
    try:
        found: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _no_labels(path, brief(error)) from error
    if isinstance(found, list) and all(isinstance(name, str) for name in found):
        return Labels.in_order(found, classes)
    if isinstance(found, dict):
        return Labels(classes, found)
    raise _no_labels(path, "JSON of another form")


def _no_labels(path: Path, what: str) -> UnreadableDataError:
    return UnreadableDataError(
        f'{path} holds no labels ({what}); needed: a JSON list of names, or an object {{"name": 3}}'
    )
