"""The journal of a probe: what was settled before the first query, and every answer since.

One line of JSON each. It says which key and which service it is for and what was answered, in the
order of asking; which of the queries were triggers only the key can tell. Still, only its owner
may read it.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from nnpassport.claims.signing import read_small
from nnpassport.files.disk import brief, make_folder, sync_folder, writing
from nnpassport.scheme import UnreadableDataError, UnwritableOutputError
from nnpassport.verification.remote.asking import NO_CLASS, Answer, Kind

MAX_JOURNAL_BYTES = 2**28

_FORMAT = {"format": "nnpassport-probe", "version": 1}


@final
class Journal:
    """Answers in the order of asking; on disk, line by line, where there is a file."""

    def __init__(self, path: Path | None, terms: Mapping[str, Any], answers: list[Answer]) -> None:
        self.path, self.terms, self.answers = path, terms, answers

    def add(self, answer: Answer) -> None:
        """Keep one more answer; it is on disk when this returns.

        Raises:
            UnwritableOutputError: it could not be written.
        """
        if self.path is not None:
            facts = {"query": len(self.answers), **asdict(answer)}
            if answer.said == NO_CLASS:  # absent: journals without given names are as ever
                del facts["said"]
            if not answer.scores:
                del facts["scores"]
            _write(self.path, _line(facts), os.O_APPEND)
        self.answers.append(answer)

    def discard(self) -> None:
        """Remove the file of a run that has no answers: it may begin anew on other terms.

        Raises:
            UnwritableOutputError: it cannot be removed.
        """
        if self.path is not None and not self.answers:
            with writing(self.path):
                self.path.unlink()


def begin(path: Path | None, terms: Mapping[str, Any]) -> Journal:
    """A new journal of a run on these terms; None is one in memory.

    Raises:
        UnwritableOutputError: there is a file already, or it cannot be written.
    """
    if path is not None:
        if os.path.lexists(path):
            raise UnwritableOutputError(
                f"{path} is the journal of another run; go on with it (--resume), or name another "
                "output: an answer that was paid for is not overwritten"
            )
        with writing(path), make_folder(path.parent):
            _write(path, _line({**_FORMAT, **terms}), os.O_CREAT | os.O_EXCL)
            sync_folder(path.parent)
    return Journal(path, terms, [])


def resume(path: Path) -> Journal:
    """The journal in a file, to be gone on with; a last line that was cut off is dropped.

    Raises:
        UnreadableDataError: there is no such file, or it is no journal.
        UnwritableOutputError: the line that was cut off could not be removed.
    """
    data = read_small(path, "journal", MAX_JOURNAL_BYTES, UnreadableDataError)
    *lines, rest = data.split(b"\n")
    try:
        head, *others = [json.loads(line) for line in lines]
        terms = {name: value for name, value in head.items() if name not in _FORMAT}
        whole = head == {**_FORMAT, **terms}
        answers = [_answer(each, number) for number, each in enumerate(others)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _no_journal(path, brief(error)) from error
    if not whole:
        raise _no_journal(path, "another format or version")
    if rest:
        with writing(path):
            os.truncate(path, len(data) - len(rest))
    return Journal(path, terms, answers)


def _answer(facts: Any, number: int) -> Answer:
    kind = Kind(facts["kind"])
    said = facts.get("said", NO_CLASS)
    numbers = (facts["label"], facts["retries"], said)
    fits = (
        set(facts) - {"said", "scores"} == {"query", "kind", "label", "note", "retries", "seconds"}
        and facts["query"] == number
        and all(type(each) is int for each in numbers)
        and (facts["label"] >= 0 if kind is Kind.ANSWERED else facts["label"] == NO_CLASS)
        and isinstance(facts["note"], str)
        and isinstance(facts["seconds"], float)
    )
    if not fits:
        raise ValueError(f"query {number} is not as it was written")
    scores = tuple((str(name), float(score)) for name, score in facts.get("scores", ()))
    if not all(map(math.isfinite, (score for _, score in scores))):
        raise ValueError(f"query {number} has scores that are not finite")
    few = (facts["note"], facts["retries"], facts["seconds"])
    return Answer(kind, *numbers[:1], *few, said, scores)


def _no_journal(path: Path, what: str) -> UnreadableDataError:
    return UnreadableDataError(
        f"{path} is no journal of a probe ({what}); needed: the file as it was written; use a "
        "backup, or ask anew under another name"
    )


def _line(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, allow_nan=False).encode("ascii") + b"\n"


def _write(path: Path, line: bytes, flags: int) -> None:
    with writing(path), os.fdopen(os.open(path, os.O_WRONLY | flags, 0o600), "wb") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
