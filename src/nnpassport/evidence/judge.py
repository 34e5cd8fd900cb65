"""Rule between rival claimants of one suspect, from facts that others have checked.

A mark says that a network is related to a key. It does not say who was first: whoever copies a
network can embed a mark of his own on top, or turn its channels until they read as his bits. So
where several marks are there, order decides, by two kinds of evidence:

1. X's mark stands, as it is read without alignment, in the network that Y committed to, and Y's is
   not in X's by any reading: then Y's network was made from one of X's. A mark as it stands cannot
   be put into a file that another has committed to. (An aligned reading does not count here: a copy
   with turned channels matches its original in both directions.)
2. X's claim is proved older than the suspect and commits to a network that the suspect was made
   from, and it is older than Y's claim, or nothing dates Y's before the suspect. The date of a key
   alone proves nothing here: a mark for an old key can be put on a copy at any time.

Neither: undecided. Nothing here reads a file; `nnpassport.hearing` does.
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
    NOBODY = "nobody"
    UNDECIDED = "undecided"


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
        older: whether the claim is proved to be older than the suspect.
        owner_key: the public key that signed the claim: claimants with one key are one party.
        readings: verdicts on the suspect, by how it was read; p-values for all claimants together.
        elsewhere: by another claimant's name, verdicts on the network that *he* committed to.
        notes: what else the judge should know, in words.
    """

    name: str
    owner: str = ""
    fingerprint: str | None = None
    refused: str | None = None
    unchecked: str | None = None
    time: datetime | None = None
    older: bool = False
    owner_key: str | None = None
    readings: Mapping[str, Verdict] = field(default_factory=dict)
    elsewhere: Mapping[str, Mapping[str, Verdict]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def proves(self) -> bool:
        """Whether his claim holds and his mark is in the suspect."""
        sound = self.refused is None and self.unchecked is None
        return sound and any(verdict.accepted for verdict in self.readings.values())

    @property
    def party(self) -> str:
        """Who he is to the rules: the holder of his public key, or himself."""
        return self.name if self.owner_key is None else self.owner_key

    @property
    def network_time(self) -> datetime | None:
        """When the network that the suspect was made from is proved to have been his, or None."""
        aligned = self.readings.get(ALIGNED)
        facts = None if aligned is None else aligned.alignment
        return self.time if self.older and facts is not None and facts["related"] else None

    def stands_in(self, other: "Claimant") -> bool:
        """Whether his mark is in the other's network as that one is."""
        found = self.elsewhere.get(other.name, {}).get(AS_IT_STANDS)
        return found is not None and found.marked

    def absent_from(self, other: "Claimant") -> bool:
        """Whether his mark was looked for in the other's network, and no reading finds it."""
        found = self.elsewhere.get(other.name, {})
        sought = {AS_IT_STANDS, ALIGNED} <= found.keys()
        return sought and not any(each.marked for each in found.values())


class Ruling(NamedTuple):
    """A ruling and its reasons, in the order in which they were found."""

    outcome: Outcome
    owner: str | None
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {"ruling": self.outcome.value, "owner": self.owner, "reasons": list(self.reasons)}


def rule(claimants: Sequence[Claimant]) -> Ruling:
    """An owner, nobody, or undecided.

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
    if len({each.party for each in proved}) == 1:
        names = _list([each.name for each in proved])
        same = "" if len(proved) == 1 else ", all signed with one key,"
        reasons.append(f"{names}{same} alone proves a claim")
        return Ruling(Outcome.OWNER, proved[0].name, tuple(reasons))
    firsts = []
    for one in proved:
        rivals = [other for other in proved if other.party != one.party]
        orders = [(_before(one, other), other) for other in rivals]
        if all(why is not None for why, _ in orders):
            firsts.append(one)
            reasons += [f"{one.name} was there before {other.name}: {why}" for why, other in orders]
    if len({each.party for each in firsts}) == 1:
        others = [each.name for each in proved if each.party != firsts[0].party]
        reasons.append(
            f"the mark of {_list(others)} is there too, and later: a copy or a derivative, and "
            "whether a licensed one is not written in the network"
        )
        return Ruling(Outcome.OWNER, firsts[0].name, tuple(reasons))
    names = _list([each.name for each in proved])
    reasons.append(f"{names} all prove a mark, and nothing shows whose was first")
    return Ruling(Outcome.UNDECIDED, None, tuple(reasons))


def _found(claimant: Claimant) -> list[str]:
    """What was found of one claimant, in words."""
    name = claimant.name
    if claimant.unchecked is not None:
        return [f"{name}: could not be checked: {claimant.unchecked}", *claimant.notes]
    if claimant.refused is not None:
        return [f"{name}: the claim does not hold: {claimant.refused}"]
    said = "proves its mark" if claimant.proves else "does not prove a mark"
    read = [f"{how}, {_counted(verdict)}" for how, verdict in claimant.readings.items()]
    return [f"{name}: the claim holds and {said}: {'; '.join(read)}", *claimant.notes]


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


def _before(one: Claimant, other: Claimant) -> str | None:
    """Why one was before the other, or None."""
    if one.stands_in(other) and other.absent_from(one):
        return f"its mark stands in {other.name}'s network, and the other's not in its own"
    if other.stands_in(one) and one.absent_from(other):
        return None  # the same evidence, the other way: stronger than any date
    time = one.network_time
    if time is None or (other.time is not None and time >= other.time):
        return None
    said = f"the network that the suspect was made from was its own on {_day(time)}"
    if other.time is None:
        return f"{said}, and nothing dates the claim of {other.name}"
    return f"{said}, and the claim of {other.name} is of {_day(other.time)}"


def _day(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _list(names: Sequence[str]) -> str:
    return " and ".join(names)
