"""V of a mark in ordinary answers over a network: ask, and stop as soon as it is proved.

What is shown are the inputs that the key is bound to: ordinary ones, in an order that its secret
decided. Nothing of the mark is shown, so nothing has to be hidden and nothing is spent.

Answers may be looked at before all of them are there, at times that are settled before the first
query; p is multiplied by how many such looks there are, and so stopping at the first that proves
the mark is paid for (Bonferroni).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.ground.progress import Listener
from nnpassport.keys.answers import NO_ANSWER, Functions, functions_of, inputs_of, read_answers
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.key import Key
from nnpassport.scheme import BadRecipeError, UnreachableServiceError, Verdict
from nnpassport.verification.relabelling import corrected
from nnpassport.verification.remote.asking import NO_CLASS, Answer, Asker
from nnpassport.verification.remote.finding import Probed, Tally, tally
from nnpassport.verification.remote.probe import ask_all, kept_in

LOOKS = 5
FEWEST = 25
"""Inputs that are answered before anything is looked at."""
MAX_CELLS = 2**25
"""Numbers that are looked at at a time: where a service has more names, those that come up most."""
_ENOUGH = 0.9  # of the answers have scores: then these are read, and else labels


@final
@dataclass(frozen=True, slots=True)
class OrdinaryTerms:
    """What is settled before the first query.

    Attributes:
        budget: most queries, retries not counted; None is all inputs of the key.
        looks: how often the answers may be looked at, each time after twice as many.
        log10_alpha: threshold on log₁₀ p, below 0.
        labels_only: read labels also where a service gives scores.
        among: how many services or networks were looked at, this one counted; p is multiplied
            by it.

    Raises:
        BadRecipeError: a number makes no sense.
    """

    budget: int | None = None
    looks: int = LOOKS
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED
    labels_only: bool = False
    among: int = 1

    def __post_init__(self) -> None:
        asks = self.budget is None or self.budget >= FEWEST
        if not (asks and 1 <= self.looks <= 20 and self.log10_alpha < 0 and self.among >= 1):
            raise BadRecipeError(
                f"the terms are {self}; needed: a budget of at least {FEWEST} queries, 1 to 20 "
                "looks, log10 of α below 0, and at least 1 service"
            )


def looks_at(queries: int, looks: int) -> list[int]:
    """After how many of the queries answers are looked at: each time twice as many, at last all."""
    counts = {-(-queries // 2**each) for each in range(looks)}
    return sorted(count for count in counts if count >= min(FEWEST, queries))


def probe_answers(
    asker: Asker,
    key: Key,
    *,
    terms: OrdinaryTerms | None = None,
    journal: Path | None = None,
    resume: bool = False,
    show: Listener | None = None,
) -> Probed:
    """Does the network that `asker` asks carry `key`, a mark in ordinary answers?

    `journal` is a file for the answers; with `resume` a run goes on from it.

    Raises:
        BadRecipeError: the terms are not the journal's.
        UnreadableKeyError: the key has no inputs yet.
        UnreachableServiceError: the service does not answer, or not often enough.
    """
    terms, asker = terms or OrdinaryTerms(), asker.in_full()
    inputs, _ = inputs_of(key)
    queries = len(inputs) if terms.budget is None else min(terms.budget, len(inputs))
    places, functions = looks_at(queries, terms.looks), functions_of(key)
    kept = kept_in(journal, _settled(asker, key, terms, queries), resume=resume)
    pictures = list(inputs[:queries])
    verdict = None
    for count in places:
        ask_all(asker, pictures[:count], kept, show)
        verdict = looked(kept.answers[:count], key, functions, terms, len(places))
        if verdict.marked:
            break
    answers = kept.answers[:count]
    if verdict is None or not tally(answers).answered:
        raise UnreachableServiceError(
            f"none of {len(answers)} inputs was answered; needed: a service that answers; check "
            "its address, and what it is sent"
        )
    return Probed(
        verdict=verdict,
        service=asker.service.description,
        triggers=tally(answers),
        covers=Tally(0, 0, 0, 0, 0),
        cover_accuracy=None,
        retries=sum(answer.retries for answer in answers),
        seconds=round(sum(answer.seconds for answer in answers), 3),
        notes=_notes(answers, queries),
    )


def looked(
    answers: Sequence[Answer], key: Key, functions: Functions, terms: OrdinaryTerms, looks: int
) -> Verdict:
    """The verdict on these answers to the key's first inputs, with all looks paid for."""
    table, labels = table_of(answers, labels_only=terms.labels_only)
    found = read_answers(
        table, key, labels=labels, log10_alpha=terms.log10_alpha, functions=functions
    )
    return corrected(found, choices_of(looks, terms.among))


def choices_of(looks: int, among: int) -> dict[str, float]:
    """log₁₀ of what p is multiplied by, by name; nothing where there was no choice."""
    found = {"looks": looks, "networks looked at": among}
    return {name: math.log10(count) for name, count in found.items() if count > 1}


class Table(NamedTuple):
    """Answers as numbers.

    Attributes:
        numbers: scores (answers columns) with NaN where there are none, or labels (answers).
        labels: whether they are labels.
    """

    numbers: NDArray[Any]
    labels: bool


def table_of(answers: Sequence[Answer], *, labels_only: bool = False) -> Table:
    """Scores where nine in ten answers have them, else labels: no sign decides on that."""
    heard = [answer for answer in answers if answer.label != NO_CLASS]
    scored = [answer for answer in heard if answer.scores]
    if labels_only or len(scored) < max(1, _ENOUGH * len(heard)):
        labels = [a.label if a.label != NO_CLASS else NO_ANSWER for a in answers]
        return Table(np.array(labels, np.int64), labels=True)
    counts = Counter(name for answer in scored for name, _ in answer.scores)
    most = max(2, MAX_CELLS // len(answers))
    names = sorted(counts, key=lambda name: (-counts[name], name))[:most]
    places = {name: place for place, name in enumerate(sorted(names))}
    table = np.full((len(answers), len(names)), np.nan)
    for row, answer in enumerate(answers):
        for name, value in answer.scores:
            if name in places:
                table[row, places[name]] = value
    return Table(table, labels=False)


def _settled(asker: Asker, key: Key, terms: OrdinaryTerms, queries: int) -> dict[str, Any]:
    """What a run must not change while it goes on."""
    return {
        "key": key.fingerprint,
        "service": asker.service.description,
        "triggers": queries,
        "covers": 0,
        "looks": terms.looks,
        "among": terms.among,
        "labels_only": terms.labels_only,
        "log10_alpha": terms.log10_alpha,
    }


def _notes(answers: Sequence[Answer], queries: int) -> tuple[str, ...]:
    notes = ["ordinary inputs were shown, and nothing of the mark: it can be asked again"]
    if len(answers) < queries:
        notes.append(f"stopped after {len(answers)} of {queries} queries: it was proved")
    declined = sorted({answer.note for answer in answers if answer.note})[:3]
    return (*notes, *([f"without an answer: {'; '.join(declined)}"] if declined else []))
