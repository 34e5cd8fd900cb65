"""Rule between rival claimants of one suspect, from facts that others have checked.

A mark says that a network is related to a key. It does not say who was first: whoever copies a
network can embed a mark of his own on top, or turn its channels until they read as his bits. So
where several marks are there, order decides, by two kinds of evidence:

1. X's mark stands, as it is read without alignment, in the network that Y committed to, and Y's is
   not in X's by any reading that his scheme has: then Y's network was made from one of X's. A mark
   as it stands cannot be put into a file that another has committed to. (An aligned reading does
   not count here: a copy with turned channels matches its original in both directions.)
2. X's claim is proved older than the suspect and commits to a network that the suspect was made
   from. Against whoever has no such network that is enough, however old his key is: a mark for an
   old key can be put on a copy at any time. Between two who have one each, the older network is
   first, if one was made from the other. If they have nothing to do with each other, then neither
   date says anything of the other's network, and the suspect holds both: anybody can put the
   channels of a network of his own beside another's. Images tell whose part does the work; without
   them, or if both do, it is *shared*.

An *order of hidden units* is a mark of its own kind: to put one on costs nothing, and takes every
other away. So who proves nothing else is no owner where another's dated network, whose mark he may
have taken away, is in the suspect and he has none that was there before it: undecided.

A *diary of training* dates networks too: not one that was claimed, but those on the way to it. Of
its checkpoints the first counts that a timestamp proves older than the suspect, and that the
suspect was made from by more than the diary's own beginning explains. So who was slow to claim what
he had trained for weeks is before somebody who took it and was quick; and a diary that was made up
afterwards, in whatever way, dates nothing that early (`nnpassport.verification.trained`).

Neither: undecided. Nothing here reads a file; `nnpassport.verification.hearing` does.
`docs/judging.md` has all cases in a table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple, final

from nnpassport.scheme import Verdict

DATED_ONLY = (
    "an aligned reading counts only under a claim that is proved to be older than the suspect, "
    "because a reference that was made after it can be made to fit"
)
AS_IT_STANDS = "as it stands"
ALIGNED = "aligned"


class Outcome(Enum):
    """What a ruling says."""

    OWNER = "owner"
    SHARED = "shared"
    NOBODY = "nobody"
    UNDECIDED = "undecided"


IDLE = 0.2
"""What does not carry more of a suspect's answers than this does not make them."""

WORKING = 0.5
"""What carries as much of a suspect's answers as this makes them."""

NEEDED = 0.02
"""Share of the answers that must change for a part to be needed."""


class Work(NamedTuple):
    """What the part of a suspect that was made from a claimant's network does there, on images.

    Attributes:
        carries: share of the answers' variance that this part alone explains, in [0, 1].
        changes: share of the answers that are others without it, in [0, 1].
        answers: how many were looked at.
    """

    carries: float
    changes: float
    answers: int = 0

    @property
    def idle(self) -> bool:
        """Whether the suspect answers the same without this part, and it says next to nothing."""
        return self.carries <= IDLE and self.changes <= NEEDED

    @property
    def said(self) -> str:
        """In words."""
        return (
            f"alone it explains {100 * self.carries:.0f} % of what the suspect answers on "
            f"{self.answers} images, and without it {100 * self.changes:.0f} % of the answers are "
            "others"
        )


@final
@dataclass(frozen=True, slots=True)
class Claimant:
    """One claimant and what was found of him.

    Attributes:
        name: what the judge calls him.
        owner: what he calls himself; whether it is true is not for a program to say.
        fingerprint: of the disclosed key, or None where none could be read.
        refused: why his claim does not hold, or None.
        unchecked: why his claim could not be checked, or None.
        time: when a trusted timestamp authority saw the claim, or None.
        between: the first and the last moment at which that may have been; None is `time` itself.
        older: whether the claim is proved to be older than the suspect.
        owner_key: the public key that signed the claim: claimants with one key are one party.
        readings: verdicts on the suspect, by how it was read; p-values for all claimants together.
        elsewhere: by another claimant's name, verdicts on the network that *he* committed to.
        only_as_it_stands: whether his mark is never read aligned: one of answers, or an order.
        by_order: whether his mark is an order of hidden units: whoever has the network puts it on
            at no cost, and takes every earlier one away.
        related: whether the suspect was made from the network that he committed to; None is what
            his aligned reading says.
        akin: by another claimant's name, whether one of their two networks was made from the other.
        work: what the part of the suspect that was made from his network does; None: not measured.
        trained: the first and the last moment at which the first checkpoint of his diary may have
            been stamped, of those that date a network in the suspect; None where none does.
        notes: what else the judge should know, in words.
    """

    name: str
    owner: str = ""
    fingerprint: str | None = None
    refused: str | None = None
    unchecked: str | None = None
    time: datetime | None = None
    between: tuple[datetime, datetime] | None = None
    older: bool = False
    owner_key: str | None = None
    readings: Mapping[str, Verdict] = field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, Verdict]] = field(default_factory=dict)
    only_as_it_stands: bool = False
    by_order: bool = False
    related: bool | None = None
    akin: Mapping[str, bool] = field(default_factory=dict)
    work: Work | None = None
    trained: tuple[datetime, datetime] | None = None
    notes: Sequence[str] = ()

    @property
    def proves(self) -> bool:
        """Whether his claim holds and his mark is in the suspect.

        A mark that is read aligned is in the channels that were made from his network. If these do
        nothing in the suspect, then it was put beside what does.
        """
        sound = self.refused is None and self.unchecked is None
        idle = self.work is not None and self.work.idle
        return sound and any(
            verdict.accepted and not (idle and how == ALIGNED)
            for how, verdict in self.readings.items()
        )

    @property
    def dates_a_network(self) -> bool:
        """Whether he proves a mark, and has a network that claim or diary dates."""
        return self.proves and (self.older or self.trained is not None)

    @property
    def party(self) -> str:
        """Who he is to the rules: the holder of his public key, or himself."""
        return self.name if self.owner_key is None else self.owner_key

    @property
    def span(self) -> tuple[datetime, datetime] | None:
        """Between which moments his claim was seen, or None."""
        if self.time is None:
            return None
        return (self.time, self.time) if self.between is None else self.between

    @property
    def in_suspect(self) -> bool:
        """Whether the suspect was made from his network, and that does something there."""
        aligned = self.readings.get(ALIGNED)
        facts = None if aligned is None else aligned.alignment
        related = self.related
        if related is None:
            related = facts is not None and bool(facts["related"])
        return related and not (self.work is not None and self.work.idle)

    @property
    def network_span(self) -> tuple[datetime, datetime] | None:
        """Between which moments a network in the suspect was his first, or None: claim or diary."""
        found = [self.span] if self.older and self.in_suspect else []
        idle = self.work is not None and self.work.idle
        found += [] if idle else [self.trained]
        return min((each for each in found if each), key=lambda span: span[1], default=None)

    @property
    def network_time(self) -> datetime | None:
        """By when the network that the suspect was made from is proved to be his, or None."""
        return None if self.network_span is None else self.network_span[1]

    def stands_in(self, other: "Claimant") -> bool:
        """Whether his mark is in the other's network as that one is."""
        found = self.elsewhere.get(other.name, {}).get(AS_IT_STANDS)
        return found is not None and found.marked

    def absent_from(self, other: "Claimant") -> bool:
        """Whether his mark was looked for in the other's network, and no reading finds it."""
        found = self.elsewhere.get(other.name, {})
        ways = {AS_IT_STANDS} if self.only_as_it_stands else {AS_IT_STANDS, ALIGNED}
        return ways <= found.keys() and not any(each.marked for each in found.values())

    def akin_to(self, other: "Claimant") -> bool:
        """Whether one of their networks is known to have been made from the other.

        By their filters, or because the mark of the one who was first is in the other's network,
        however it is read: what he aligns to was there before.
        """
        if self.akin.get(other.name, False) or other.akin.get(self.name, False):
            return True
        return any(
            one.span is not None
            and two.span is not None
            and one.span[1] < two.span[0]
            and any(each.marked for each in one.elsewhere.get(two.name, {}).values())
            for one, two in ((self, other), (other, self))
        )


class Ruling(NamedTuple):
    """A ruling and its reasons, in the order in which they were found.

    `owner` is the one owner, if there is one; `owners` are all whose networks the suspect holds.
    """

    outcome: Outcome
    owner: str | None
    reasons: tuple[str, ...]
    owners: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "ruling": self.outcome.value,
            "owner": self.owner,
            "owners": list(self.owners),
            "reasons": list(self.reasons),
        }


def rule(claimants: Sequence[Claimant]) -> Ruling:
    """An owner, several of a part each, nobody, or undecided.

    Nobody: every claim was checked, and none proves anything. A claim that could not be checked
    leaves it undecided, unless another is proved.

    Raises:
        ValueError: two claimants have one name.
    """
    if len({each.name for each in claimants}) < len(claimants):
        raise ValueError("two claimants have one name; needed: distinct ones")
    reasons = [sentence for each in claimants for sentence in _found(each)]
    proved = [each for each in claimants if each.proves]
    if not proved:
        unchecked = [each.name for each in claimants if each.unchecked is not None]
        if unchecked:
            reasons.append(
                f"the claim of {_list(unchecked)} could not be checked; no other is proved"
            )
            return Ruling(Outcome.UNDECIDED, None, tuple(reasons))
        return Ruling(Outcome.NOBODY, None, (*reasons, "no claim is proved"))
    if (settled := _without_order(claimants, proved, reasons)) is not None:
        return settled
    firsts = []
    for one in proved:
        orders = [(_order(one, other), other) for other in proved if other.party != one.party]
        if all(order is not None for order, _ in orders):
            firsts.append(one)
            reasons += [_said(one, order, other) for order, other in orders if order is not None]
    parties = list(dict.fromkeys(each.party for each in firsts))
    if len(parties) == 1:
        others = [each.name for each in proved if each.party != firsts[0].party]
        reasons.append(
            f"the mark of {_list(others)} is there too, and later or beside it: a copy, a "
            "derivative or an addition, and whether a licensed one is not written in the network"
        )
        return _owner(firsts[0], reasons)
    if parties:
        owners = [next(each.name for each in firsts if each.party == party) for party in parties]
        reasons.append(
            f"the suspect holds networks of {_list(owners)}, and none of them was made from "
            f"another; {_advice(firsts)}"
        )
        return Ruling(Outcome.SHARED, None, tuple(reasons), tuple(owners))
    names = _list([each.name for each in proved])
    reasons.append(f"{names} all prove a mark, and nothing shows whose was first")
    return Ruling(Outcome.UNDECIDED, None, tuple(reasons))


def _without_order(
    claimants: Sequence[Claimant], proved: Sequence[Claimant], reasons: list[str]
) -> Ruling | None:
    """Where nobody has to be first: an order may have taken a mark away, or one party is alone."""
    names = _list([each.name for each in proved])
    if before := _displaced(claimants, proved):
        reasons.append(
            f"{names} proves an order of hidden units and no other mark; whoever has a network can "
            "put one on it and take another's away, and the suspect was made from a network of "
            f"{_list([each.name for each in before])} that is dated, and not later"
        )
        return Ruling(Outcome.UNDECIDED, None, tuple(reasons))
    if len({each.party for each in proved}) == 1:
        same = "" if len(proved) == 1 else ", all signed with one key,"
        reasons.append(f"{names}{same} alone proves a claim")
        return _owner(proved[0], reasons)
    return None


def _displaced(claimants: Sequence[Claimant], proved: Sequence[Claimant]) -> list[Claimant]:
    """Who proves no mark, where those who do have nothing but an order, and was not after them.

    His network is dated, the suspect was made from it, and theirs is not dated before it.
    """
    if not all(each.by_order for each in proved):
        return []
    parties = {each.party for each in proved}
    earliest = min((each.network_span[1] for each in proved if each.network_span), default=None)
    found = []
    for each in claimants:
        if each in proved or each.refused is not None or each.party in parties:
            continue
        span = each.network_span
        if span is not None and (earliest is None or earliest >= span[0]):
            found.append(each)
    return found


def _owner(one: Claimant, reasons: Sequence[str]) -> Ruling:
    return Ruling(Outcome.OWNER, one.name, tuple(reasons), (one.name,))


def _advice(firsts: Sequence[Claimant]) -> str:
    if any(each.work is None for each in firsts):
        return "whose part does the work was not measured: give images of the suspect's task"
    return "each does a part of the work"


def _found(claimant: Claimant) -> list[str]:
    """What was found of one claimant, in words."""
    name = claimant.name
    if claimant.unchecked is not None:
        return [f"{name}: could not be checked: {claimant.unchecked}", *claimant.notes]
    if claimant.refused is not None:
        return [f"{name}: the claim does not hold: {claimant.refused}"]
    said = "proves its mark" if claimant.proves else "does not prove a mark"
    read = [f"{how}, {_counted(verdict)}" for how, verdict in claimant.readings.items()]
    found = [f"{name}: the claim holds and {said}: {'; '.join(read)}", *claimant.notes]
    if claimant.work is not None:
        what = "does nothing there" if claimant.work.idle else "is in the suspect"
        found.append(f"{name}: what was made from its network {what}: {claimant.work.said}")
    return found


def _counted(verdict: Verdict) -> str:
    found = f"{verdict.matches} of {verdict.bits} match"
    if verdict.log10_p_value is None:
        return f"{found}, but parts of the key were chosen, so there is no p-value"
    below = verdict.log10_p_value <= verdict.log10_alpha
    relation = "at or below" if below else "above"
    p = f"p = 10^{verdict.log10_p_value:.1f}, {relation} α = 10^{verdict.log10_alpha:.1f}"
    if below and not verdict.marked:
        p = f"{p}, but it does not count: {DATED_ONLY}"
    if verdict.fidelity is None or verdict.fidelity.passed:
        return f"{found}, {p}"
    f = verdict.fidelity
    return (
        f"{found}, {p}, but the accuracy with the passport is {f.accuracy:.4f}, not within "
        f"{f.tolerance:.4f} of {f.target:.4f}"
    )


class _Order(NamedTuple):
    """How one stands to another to whom he need not give way, and why."""

    how: str
    why: str


_BEFORE, _INSTEAD, _BESIDE = "was there before", "and not", "stands beside"


def _order(one: Claimant, other: Claimant) -> _Order | None:
    """Whether one is before the other, or beside him; None is neither."""
    if one.stands_in(other) and other.absent_from(one):
        why = f"its mark stands in {other.name}'s network, and the other's not in its own"
        return _Order(_BEFORE, why)
    if other.stands_in(one) and one.absent_from(other):
        return None  # the same evidence, the other way: stronger than any date
    time = one.network_time
    return None if time is None else _by_date(one, other, time)


def _by_date(one: Claimant, other: Claimant, time: datetime) -> _Order | None:
    """The same of one whose network in the suspect was his by this time."""
    how = " (by its diary)" if one.trained is not None and one.trained[1] == time else ""
    said = f"the network that the suspect was made from was its own by {_day(time)}{how}"
    if other.network_span is None:
        return _Order(_BEFORE, f"{said}, and {_undated(other)}")
    if not one.akin_to(other):
        return _beside(one, other, said)
    first = other.network_span[0]
    if time >= first:
        return None
    return _Order(_BEFORE, f"{said}, and that of {other.name} is of {_day(first)} or later")


def _undated(other: Claimant) -> str:
    """Why the other has nothing to set against a dated network."""
    if other.time is None:
        return f"nothing dates the claim of {other.name}"
    if not other.older:
        return f"the claim of {other.name} is not proved to be older than the suspect"
    return (
        f"{other.name} has dated no network that the suspect was made from: the date of a key, "
        f"{_day(other.time)}, does not date a mark"
    )


def _beside(one: Claimant, other: Claimant, said: str) -> _Order | None:
    """Both have a network in the suspect, and neither was made from the other."""
    said = f"{said}, and that of {other.name} has nothing to do with it"
    mine, theirs = one.work, other.work
    if mine is not None and theirs is not None:
        if mine.carries <= IDLE and theirs.carries >= WORKING:
            return None
        if theirs.carries <= IDLE and mine.carries >= WORKING:
            return _Order(
                _INSTEAD,
                f"{said}, but its own explains {100 * mine.carries:.0f} % of what the suspect "
                f"answers, and the other {100 * theirs.carries:.0f} %",
            )
    return _Order(_BESIDE, f"{said}, so neither date orders the two")


def _said(one: Claimant, order: _Order, other: Claimant) -> str:
    return f"{one.name} {order.how} {other.name}: {order.why}"


def _day(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _list(names: Sequence[str]) -> str:
    return " and ".join(names)
