"""From what a service calls a class to the class's index in the owner's network.

Names that stand in the key are the owner's, fixed before anybody was asked. Names that are given
beside it may have been chosen when the answers were known, and `finding.py` has them paid for.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

from nnpassport.claims.signing import read_small
from nnpassport.files.disk import brief
from nnpassport.scheme import UnreadableDataError
from nnpassport.verification.relabelling import plain

MAX_LABELS_BYTES = 2**22

_INDEX = re.compile(r"(?:LABEL_)?(0|[1-9][0-9]{0,8})")


@final
@dataclass(frozen=True, slots=True)
class Labels:
    """How a service's labels are read: as a name of the key's, as one given beside it, as an index.

    A name is known in any case and with any blanks, where that leaves no doubt. An index is a
    number, or "LABEL_3", as Hugging Face calls classes without names. A text of digits is one as
    well, unless each of the classes has a name: it could then count from 0 or from 1.

    Attributes:
        classes: how many classes the key was made for.
        names: index of each name that was given beside the key; empty where there are none, and
            where they say no more than the indices do.
        owned: the names in the key, in the order of the classes; empty where it has none.
        digits: whether a text of digits is an index though each class has a name: the names that
            were given are the indices themselves.

    Raises:
        UnreadableDataError: a name has an index that is none of the classes.
    """

    classes: int
    names: Mapping[str, int] = field(default_factory=dict)
    owned: tuple[str, ...] = ()
    digits: bool = False

    def __post_init__(self) -> None:
        wrong = [name for name, index in self.names.items() if not self._is_class(index)]
        if wrong:
            raise UnreadableDataError(
                f"the label {wrong[0]!r:.80} has index {self.names[wrong[0]]!r:.20}; needed: one "
                f"of 0 to {self.classes - 1}, the classes that the key was made for"
            )
        if all(self._index(name) == index for name, index in self.names.items()):
            object.__setattr__(self, "digits", self.digits or bool(self.names))
            object.__setattr__(self, "names", {})

    @property
    def one_to_one(self) -> bool:
        """Whether the names that were given, however they are spelled, have a class each."""
        pairs = {(plain(name), index) for name, index in self.names.items()}
        return len(pairs) == len({name for name, _ in pairs}) == len({index for _, index in pairs})

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
        if not isinstance(label, str):
            return label if self._is_class(label) else None
        for found in (self._fixed(label), _named(label, self.names), self._number(label)):
            if found is not None:
                return found
        return None

    def numbered(self, label: str | int) -> bool:
        """Whether it is written as an index, of any number of classes."""
        return not isinstance(label, str) or bool(_INDEX.fullmatch(label))

    def chosen(self, label: str | int) -> bool:
        """Whether which class is meant was left to names that were given beside the key."""
        return bool(self.names) and isinstance(label, str) and self._fixed(label) is None

    def meant(self, label: str) -> int:
        """A number for what is looked up in the names that were given."""
        return token(plain(label) if self.one_to_one else label)

    def _fixed(self, label: str) -> int | None:
        """The class by the key's own names, or, where it has names, by the index."""
        found = _named(label, self._owned())
        return self._number(label) if found is None and self.owned else found

    def _owned(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.owned)}

    def _number(self, label: str) -> int | None:
        named = self.owned or len(set(self.names.values())) == self.classes
        ambiguous = named and not self.digits and label.isdigit()
        return None if ambiguous else self._index(label)

    def _index(self, label: str) -> int | None:
        found = _INDEX.fullmatch(label)
        index = int(found[1]) if found else -1
        return index if self._is_class(index) else None

    def _is_class(self, index: object) -> bool:
        return type(index) is int and 0 <= index < self.classes


def token(label: str | int) -> int:
    """A number that stands for what a service answered: two answers that differ have two."""
    data = f"{type(label).__name__} {label}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


def _named(label: str, names: Mapping[str, int]) -> int | None:
    """The index of the name, exactly or else as it may also be spelled, if only one may be."""
    if label in names:
        return names[label]
    found = {index for name, index in names.items() if plain(name) == plain(label)}
    return found.pop() if len(found) == 1 else None


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
