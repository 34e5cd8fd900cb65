"""Answers that somebody collected, in a file: what `verify --answers` reads. No torch is needed.

A CSV file with a header. The first column, `input`, says which input a row is for, by its place
from 0 (file names such as `00012.png` count as 12). After it is either one column `label` (an index
or a name) or a column of numbers for each class. Inputs that are missing were not answered. The
page is docs/formats.md.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.claims.signing import read_small
from nnpassport.keys.answers import NO_ANSWER
from nnpassport.scheme import UnreadableDataError

MAX_BYTES = 2**28
MAX_COLUMNS = 20_001
MAX_CELLS = 2**26
"""Scores of all inputs, whether they are in the file or not."""
LABELS = frozenset({"label", "class", "prediction"})
"""Names of columns that hold no scores, in any case: one of them beside others is refused."""
_PLACE = re.compile(r"(?:.*[/\\])?0*([0-9]{1,8})(?:\.[A-Za-z0-9]{1,8})?")


class Collected(NamedTuple):
    """Answers as numbers.

    Attributes:
        numbers: scores (inputs classes) with NaN where there are none, or labels (inputs), −1
            where there are none.
        labels: whether they are labels.
    """

    numbers: NDArray[Any]
    labels: bool

    @property
    def whole(self) -> bool:
        """Whether every input has all its answers."""
        if self.labels:
            return bool((self.numbers != NO_ANSWER).all())
        return bool(np.isfinite(self.numbers).all())

    def as_labels(self) -> "Collected":
        """The same by the place of the highest score alone; labels stay as they are."""
        if self.labels:
            return self
        there = np.isfinite(self.numbers)
        highest = np.where(there, self.numbers, -np.inf).argmax(1)
        return Collected(np.where(there.any(1), highest, NO_ANSWER), labels=True)


def read_collected(path: Path, inputs: int) -> Collected:
    """The answers in a CSV file, to so many inputs.

    Raises:
        UnreadableDataError: the file is missing, too large or something else, or has a row for an
            input that there is not, or two for one.
    """
    data = read_small(path, "answers", MAX_BYTES, UnreadableDataError)
    try:
        rows = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        return _numbers(path, _checked(path, rows), inputs)
    except (UnicodeDecodeError, csv.Error) as error:
        raise _no_answers(path, f"{error!s:.80}") from None


def _checked(path: Path, rows: Iterator[list[str]]) -> tuple[list[str], Iterator[list[str]]]:
    header = [name.strip() for name in next(rows, [])]
    if header[:1] != ["input"] or not 2 <= len(header) <= MAX_COLUMNS:
        raise _no_answers(path, f"a header {','.join(header)!r:.80}")
    if len(header) == 2 and header[1] != "label":
        raise _no_answers(path, "one column of scores")
    if len(header) > 2 and (both := [name for name in header if name.casefold() in LABELS]):
        raise _no_answers(path, f"a column {both[0]!r:.40} beside columns of scores")
    return header, rows


def _numbers(path: Path, table: tuple[list[str], Iterator[list[str]]], inputs: int) -> Collected:
    header, rows = table
    found: dict[int, list[str]] = {}
    for number, row in enumerate(rows, start=2):
        if not row:
            continue
        place = _PLACE.fullmatch(row[0].strip())
        if place is None or not int(place[1]) < inputs or len(row) != len(header):
            raise _no_answers(
                path, f"line {number}: {','.join(row)!r:.60}, where there are {inputs} inputs"
            )
        if int(place[1]) in found:
            raise _no_answers(path, f"line {number}: a second answer to input {place[1]}")
        found[int(place[1])] = row[1:]
    if not found:
        raise _no_answers(path, "no answers")
    if len(header) == 2:
        return Collected(_labels(found, inputs), labels=True)
    if inputs * len(header) > MAX_CELLS:
        raise _no_answers(path, f"{len(header) - 1} columns for {inputs} inputs, which are many")
    scores = np.full((inputs, len(header) - 1), np.nan)
    for place_, values in found.items():
        scores[place_] = [_number(path, value) for value in values]
    return Collected(scores, labels=False)


def _labels(found: dict[int, list[str]], inputs: int) -> NDArray[np.int64]:
    """Indices where all labels are, else a number for each name; V finds out which is which."""
    said = {place: values[0].strip() for place, values in found.items()}
    known = [label for label in said.values() if label]
    indices = all(re.fullmatch("[0-9]{1,9}", label) for label in known)
    names: Sequence[str] = sorted(set(known))
    numbers = {name: int(name) if indices else at for at, name in enumerate(names)}
    labels = np.full(inputs, NO_ANSWER, np.int64)
    for place, label in said.items():
        labels[place] = numbers.get(label, NO_ANSWER)
    return labels


def _number(path: Path, text: str) -> float:
    if not text.strip():
        return math.nan
    try:
        value = float(text)
    except ValueError:
        raise _no_answers(path, f"a score {text!r:.40} that is no number") from None
    return value if math.isfinite(value) else math.nan


def _no_answers(path: Path, what: str) -> UnreadableDataError:
    return UnreadableDataError(
        f"{path} holds no answers ({what}); needed: CSV with the header input,label or "
        "input,CLASS,CLASS,… and a row for each input, by its place from 0"
    )
