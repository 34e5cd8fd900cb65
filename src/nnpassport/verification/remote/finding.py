"""What the answers of a service say."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.catalog import entry_named
from nnpassport.ground.lazy import load
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.keys.counts import verdict_on
from nnpassport.keys.derive import triggers_of
from nnpassport.keys.key import Key
from nnpassport.keys.reading import ANSWERED, read_answers
from nnpassport.keys.validity import RULES
from nnpassport.scheme import (
    BadRecipeError,
    UnreachableServiceError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification.relabelling import (
    best_map,
    corrected,
    log10_injections,
    log10_maps,
    log10_partial_injections,
)
from nnpassport.verification.remote.asking import NO_CLASS, OUTSIDE, Answer, Kind
from nnpassport.verification.remote.labels import Labels
from nnpassport.verification.remote.plan import Terms

if TYPE_CHECKING:
    from nnpassport.data.images import ImageSet

_ENOUGH_TO_CALL_CONSTANT = 10
_ENOUGH_TO_SUSPECT = 5
_LOG10_NO_BETTER_THAN_CHANCE = -3.0


class Tally(NamedTuple):
    """Queries by what became of them."""

    asked: int
    answered: int
    abstained: int
    refused: int
    failed: int


@final
@dataclass(frozen=True, slots=True)
class Probed:
    """Outcome of V on a service.

    Attributes:
        verdict: on the triggers that were answered.
        service: protocol and address.
        triggers: the queries that count.
        covers: the queries that hid them.
        cover_accuracy: share of the answered covers that got their own label, in [0, 1]; None
            where they have no labels of the task.
        retries: tries beyond the first of each query.
        seconds: spent on all queries, waiting included.
        notes: what else a reader has to know.
    """

    verdict: Verdict
    service: str
    triggers: Tally
    covers: Tally
    cover_accuracy: float | None
    retries: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def hidden(self) -> bool:
        """Whether ordinary images stood between the triggers."""
        return self.covers.asked > 0

    def among(self, count: int) -> "Probed":
        """The same, if it is the best of so many services that were asked.

        Raises:
            BadRecipeError: the number is below 1.
        """
        if count < 1:
            raise BadRecipeError(f"{count} services were asked; needed: at least this one")
        paid = {"networks looked at": math.log10(count)} if count > 1 else {}
        return replace(self, verdict=corrected(self.verdict, paid))

    def as_dict(self) -> dict[str, Any]:
        """The verdict and all the rest as plain JSON values."""
        return {
            **self.verdict.as_dict(),
            "service": self.service,
            "hidden": self.hidden,
            "triggers": self.triggers._asdict(),
            "covers": self.covers._asdict(),
            "cover_accuracy": self.cover_accuracy,
            "retries": self.retries,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def require_triggers(key: Key) -> None:
    """Refuse a key that no answers could match: its pictures, if it has any, have no labels.

    Raises:
        UnsuitableModelError: it is one.
    """
    name = key.context.scheme
    own = name not in RULES and entry_named(name).scheme.triggers
    if name not in ANSWERED and not own:
        raise UnsuitableModelError(
            f"a key of {name} has no triggers to ask a service about; needed: a key of a "
            "scheme that has; verify this one with the network itself"
        )


def require_power(key: Key, mask: NDArray[np.bool_], terms: Terms) -> None:
    """Refuse to ask the triggers of `mask` if not even the right answers would be recognised.

    Raises:
        BadRecipeError: as above.
    """
    best = _best(key, mask, terms)
    if best.log10_p_value is not None and not best.marked:
        raise BadRecipeError(
            f"{int(mask.sum())} triggers cannot reach α = 10^{terms.log10_alpha:.1f}, however they "
            "are answered; needed: more queries, a key with more triggers, or a larger α"
        )


def finding(
    service: str,
    key: Key,
    terms: Terms,
    answers: tuple[Sequence[Answer], Sequence[Answer]],
    cover: "ImageSet | None",
    labels: Labels | None = None,
) -> Probed:
    """What the answers to triggers and covers say; `cover` are the covers themselves, in order.

    `labels` are those by which they were read.

    Raises:
        UnreachableServiceError: so few triggers were answered that nothing could have reached α.
    """
    both = (*answers[0], *answers[1])
    if terms.any_order:
        found = _in_the_best_order(key, *answers)
    else:
        possible = [answer.label != NO_CLASS for answer in answers[0]]
        found = _Read(*answers, _names_chosen(answers[0], labels), possible)
    triggers, covers, *_ = found
    verdict = _verdict(key, terms, found)
    constant, right = _constant(both), None
    if cover is not None and len(cover.classes) == triggers_of(key.context).classes:
        pairs = zip(covers, cover.labels.tolist(), strict=True)
        right = [answer.label == truth for answer, truth in pairs if answer.label != NO_CLASS]
    if constant:
        verdict = verdict.remarked(constant)
    return Probed(
        verdict=verdict,
        service=service,
        triggers=tally(triggers),
        covers=tally(covers),
        cover_accuracy=sum(right) / len(right) if right else None,
        retries=sum(answer.retries for answer in both),
        seconds=round(sum(answer.seconds for answer in both), 3),
        notes=tuple(filter(None, (constant, *_notes(key, *answers), _chance(key, right or [])))),
    )


class _Read(NamedTuple):
    """Answers as classes.

    Attributes:
        choices: log₁₀ of how many ways to read them there were to choose from, by name.
        possible: which of the triggers could have matched, had the key had other labels.
    """

    triggers: Sequence[Answer]
    covers: Sequence[Answer]
    choices: Mapping[str, float]
    possible: Sequence[bool]


def _verdict(key: Key, terms: Terms, read: _Read) -> Verdict:
    """V on the triggers that were answered.

    Raises:
        UnreachableServiceError: they are so few that no answers could have reached α, or there
            were so many ways to read them.
    """
    count, (asked, answered, *_) = triggers_of(key.context).count, tally(read.triggers)
    answers = np.full(count, NO_CLASS)
    answers[:asked] = [answer.label for answer in read.triggers]
    if answered:
        possible = np.zeros(count, np.bool_)
        possible[:asked] = read.possible
        best = corrected(_best(key, possible, terms, answers >= 0), read.choices)
    if not answered or (best.log10_p_value is not None and not best.marked):
        declined = ", ".join(sorted({a.note for a in read.triggers if a.note})[:3])
        ways = "".join(f", with 10^{n:.1f} {name}" for name, n in read.choices.items())
        raise UnreachableServiceError(
            f"{answered} of {asked} triggers were answered ({declined}){ways}, too few to reach "
            f"α = 10^{terms.log10_alpha:.1f} however they were; needed: a service that answers "
            "more; check the labels, or verify by the weights"
        )
    verdict = corrected(_said(answers, key, terms), read.choices)
    if not verdict.accepted:
        _require_known_indices(read)
    if answered == asked:
        return verdict
    return verdict.remarked(f"{answered} of {asked} were answered")


def _require_known_indices(read: _Read) -> None:
    """Refuse to say no where an index was answered that no class of the key has.

    Raises:
        UnreachableServiceError: it counts from 1, or has another class in front, for all one knows.
    """
    outside = [a.note for a in (*read.triggers, *read.covers) if a.note.startswith(OUTSIDE)]
    if outside:
        raise UnreachableServiceError(
            f"{len(outside)} answers are no index of the key's classes ({outside[0]}), so the "
            "others may be read wrongly; needed: indices from 0; check --labels (what the service "
            "calls each class, in their order: it may count from 1, or have a class more)"
        )


def _in_the_best_order(key: Key, triggers: Sequence[Answer], covers: Sequence[Answer]) -> _Read:
    """The answers as the classes that the triggers' labels fit best, and what that choice costs.

    What the map leaves out is an answer that matches nothing.
    """
    _, wanted = key.trigger_arrays()
    classes = triggers_of(key.context).classes
    pairs = zip(triggers, wanted.tolist(), strict=False)
    said = [(answer.label, label) for answer, label in pairs if answer.label != NO_CLASS]
    counts = Counter(label for label, _ in said)
    found = best_map([label for label, _ in said], [label for _, label in said]) or {}
    reachable = {label for label, _ in counts.most_common(classes)}

    def read(answers: Sequence[Answer]) -> list[Answer]:
        known = [found.get(answer.label, classes) for answer in answers]
        return [
            answer if answer.label == NO_CLASS else replace(answer, label=label)
            for answer, label in zip(answers, known, strict=True)
        ]

    orders = {"orders of the classes": log10_injections(len(counts), classes)}
    possible = [answer.label in reachable for answer in triggers]
    return _Read(read(triggers), read(covers), orders, possible)


def _names_chosen(triggers: Sequence[Answer], labels: Labels | None) -> dict[str, float]:
    """What it costs that the names by which these answers were read are not in the key.

    Half of the level is for maps that are one-to-one, half for all others.
    """
    looked_up = {answer.said for answer in triggers if answer.said != NO_CLASS}
    if labels is None or not looked_up:
        return {}
    count = log10_partial_injections if labels.one_to_one else log10_maps
    return {"maps of names to classes": math.log10(2) + count(len(looked_up), labels.classes)}


def tally(answers: Sequence[Answer]) -> Tally:
    """Queries by what became of them."""
    counts = Counter(answer.kind for answer in answers)
    return Tally(len(answers), *(counts[kind] for kind in Kind))


def _constant(answers: Sequence[Answer]) -> str:
    labels = [answer.label for answer in answers if answer.kind is Kind.ANSWERED]
    if len(set(labels)) != 1 or len(labels) < _ENOUGH_TO_CALL_CONSTANT:
        return ""
    return f"all {len(labels)} answers are the same class, as if nothing looked at the images"


def _notes(key: Key, triggers: Sequence[Answer], covers: Sequence[Answer]) -> list[str]:
    count, notes = triggers_of(key.context).count, []
    if not covers:
        notes.append("nothing hid the triggers: a service can tell that it is being probed")
    if len(triggers) < count:
        notes.append(f"the budget was for {len(triggers)} of the key's {count} triggers")
    declined = [sum(answer.label == NO_CLASS for answer in part) for part in (triggers, covers)]
    if declined[0] >= _ENOUGH_TO_SUSPECT and covers and not declined[1]:
        notes.append(f"{declined[0]} triggers and no cover got no class: it tells them apart")
    why = Counter(answer.note for answer in (*triggers, *covers) if answer.note)
    return notes + [f"{times} times {note}" for note, times in why.most_common(5)]


def _chance(key: Key, right: Sequence[bool]) -> str:
    """A warning if ordinary images are answered as if by chance."""
    trials, classes = len(right), triggers_of(key.context).classes
    if (
        not trials
        or log10_binomial_tail(sum(right), trials, 1 / classes) <= _LOG10_NO_BETTER_THAN_CHANCE
    ):
        return ""
    return (
        f"{sum(right)} of {trials} ordinary images got their own label, no better than chance: "
        "another task, labels read wrongly, or a service that does not try"
    )


def _best(
    key: Key,
    mask: NDArray[np.bool_],
    terms: Terms,
    answered: NDArray[np.bool_] | None = None,
) -> Verdict:
    """The verdict if every trigger that `mask` names were answered as the owner's network does.

    All others that were `answered`, if any, as it does not.
    """
    _, labels = key.trigger_arrays()
    no = np.full_like(labels, NO_CLASS)
    if answered is not None:
        no[answered] = triggers_of(key.context).classes  # no label of any trigger
    return _said(np.where(mask, labels, no), key, terms)


def _said(answers: NDArray[np.int64], key: Key, terms: Terms) -> Verdict:
    """V on these answers."""
    if key.context.scheme in ANSWERED:
        return verdict_on(read_answers(answers, key), key, log10_alpha=terms.log10_alpha)
    tensor = load("nnpassport.embedding.network.tensors:as_tensor")(answers)
    scheme = entry_named(key.context.scheme).scheme  # one of the caller's own
    return scheme.verify_answers(tensor, key, log10_alpha=terms.log10_alpha)
