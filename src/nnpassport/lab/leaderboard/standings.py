"""What the leaderboard says of a scheme, gathered from its cells; what was not run stays empty.

A mark is what a verdict is about: the bits of a scheme, or its answers. V3 has both, and a line for
each: whoever loses one may still hold the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, unique
from typing import Any, NamedTuple

from nnpassport.attacks.table import ATTACKS, Family
from nnpassport.catalog import CATALOG, scheme_named
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.leaderboard.field import NORM, attacks_on, strengths_of
from nnpassport.lab.plans import Plan
from nnpassport.lab.store import Store

KEPT = 0.05
"""A removal counts while the accuracy stays within so much of what it was: five points."""

Entry = Mapping[str, Any]


@unique
class Outcome(Enum):
    """What came of an attack on a mark."""

    HELD = "held"  # p ≤ α at every strength that was tried
    SPOILT = "spoilt"  # lost only where more than five points of accuracy were lost with it
    REMOVED = "removed"  # p > α, and the network still works
    IMPOSSIBLE = "impossible"  # the attack cannot be carried out on this network


class Removal(NamedTuple):
    """A removal or an obfuscation at all its strengths, and what it left of one mark.

    Attributes:
        log10_p: the largest among the strengths that kept the accuracy; None where none did.
        accuracy: what that strength left, in [0, 1].
        strength: which one it was; None where the attack has none.
        aligned: whether the mark was read aligned to the owner's network.
    """

    outcome: Outcome
    log10_p: float | None = None
    accuracy: float | None = None
    strength: float | None = None
    aligned: bool = False


class Ambiguity(NamedTuple):
    """A forgery at all its strengths: how many of its keys which verification accepted."""

    tries: int
    published: int
    exact: int
    best_log10_p: float | None

    @property
    def possible(self) -> bool:
        """Whether a key was forged at all."""
        return self.tries > 0


class Strangers(NamedTuple):
    """Keys read on networks that do not carry them: how many which verification accepted."""

    readings: int
    published: int
    exact: int
    least_log10_p: float


class Mark(NamedTuple):
    """Bits or answers, as the released network carries them."""

    kind: str
    of: int
    found: int
    log10_p: float | None


class Standing(NamedTuple):
    """One line of the leaderboard: a mark of a scheme, put into one network.

    Attributes:
        lost: accuracy that embedding cost, against the plain network trained on as long; in [0, 1].
        cost: seconds of a training step over a plain one's: lower quartile, median, upper.
        removals: by attack; None was not run.
        ambiguities: the same.
    """

    scheme: str
    summary: str
    source: str
    network: Network
    mark: Mark
    accuracy: float
    lost: float | None
    presented: float | None
    cost: tuple[float, float, float] | None
    removals: Mapping[str, Removal | None]
    ambiguities: Mapping[str, Ambiguity | None]
    strangers: Strangers | None

    @property
    def label(self) -> str:
        """What the line is called: the scheme, and which of its marks."""
        return f"{self.scheme}, {self.mark.kind}"

    @property
    def broken_by(self) -> list[str]:
        """Attacks that removed the mark and kept the accuracy."""
        found = self.removals.items()
        return [n for n, each in found if each is not None and each.outcome is Outcome.REMOVED]

    def against(self, *, informed: bool) -> Mapping[str, Removal | None]:
        """What informed thieves left of it, or everybody else."""
        found = self.removals.items()
        return {name: each for name, each in found if ATTACKS[name].informed == informed}

    @property
    def tried(self) -> int:
        """How many of the attacks on it were run, informed thieves left out."""
        return sum(each is not None for each in self.against(informed=False).values())


def standings(plan: Plan, store: Store) -> list[Standing]:
    """All lines of which the network at least was trained, in the catalog's order.

    Raises:
        UnreadableDataError: a result is not that of its cell.
    """
    return [line for network in _networks(plan) for line in _lines(plan, store, network)]


def control_accuracy(plan: Plan, store: Store, network: Network) -> float | None:
    """Accuracy of the plain network trained on as long, without a mark; None if it was not."""
    found = store.read(Cell(plan, network._replace(scheme="")))
    return None if found is None else float(found["result"]["metrics"]["accuracy"])


def _networks(plan: Plan) -> Iterator[Network]:
    for architecture in plan.architectures:
        for task in plan.tasks:
            for scheme in CATALOG:
                for seed in plan.seeds:
                    yield Network(architecture, task, scheme, NORM, seed, tuned=True)


def _lines(plan: Plan, store: Store, network: Network) -> Iterator[Standing]:
    trained = store.read(Cell(plan, network))
    if trained is None:
        return
    result, entry = trained["result"], CATALOG[network.scheme]
    metrics = result["metrics"]
    control = control_accuracy(plan, store, network)
    for name, found in result["marks"].items():
        kind = "answers" if name == "triggers" else "bits"
        where = "owner_triggers" if name == "triggers" else "owner"
        yield Standing(
            scheme=network.scheme,
            summary=entry.summary,
            source=entry.source,
            network=network,
            mark=Mark(kind, found["bits"], found["matches"], found["log10_p_value"]),
            accuracy=metrics["accuracy"],
            lost=None if control is None else control - metrics["accuracy"],
            presented=metrics.get("private_accuracy"),
            cost=_cost(store.read(Cell(plan, network, "cost"))),
            removals=_removals(plan, store, network, where),
            ambiguities=_ambiguities(plan, store, network, kind),
            strangers=_strangers(store.read(Cell(plan, network, "strangers")), name),
        )


def _cost(found: Entry | None) -> tuple[float, float, float] | None:
    if found is None:
        return None
    low, high = found["result"]["quartiles"]
    return low, found["result"]["ratio"], high


def _attacked(plan: Plan, store: Store, network: Network, name: str) -> Entry | None:
    strengths = strengths_of(ATTACKS[name])
    found = store.read(Cell(plan, network, name, strengths=strengths))
    return None if found is None else found["result"]


def _removals(plan: Plan, store: Store, network: Network, where: str) -> dict[str, Removal | None]:
    found: dict[str, Removal | None] = {}
    for name, attack in attacks_on(plan, scheme_named(network.scheme)).items():
        if attack.family is not Family.AMBIGUITY:
            result = _attacked(plan, store, network, name)
            found[name] = None if result is None else removal(result, where)
    return found


def removal(result: Entry, where: str) -> Removal:
    """What the strengths of one attack left of the mark that entries keep under `where`.

    A mark of weights is read aligned where the attack turned or moved channels: that is the reading
    that its owner has against it.
    """
    before, entries = result["before"]["accuracy"], result["entries"]
    done = [each for each in entries if "impossible" not in each]
    if not done:
        return Removal(Outcome.IMPOSSIBLE)
    aligned = f"{where}_aligned"
    kept = [each for each in done if each["accuracy"] >= before - KEPT]
    if not kept:
        held = all(_log10_p(each, where, aligned) <= LOG10_ALPHA_COMMITTED for each in done)
        return Removal(Outcome.HELD if held else Outcome.SPOILT)
    worst = max(kept, key=lambda each: (_log10_p(each, where, aligned), each["strength"] or 0.0))
    log10_p = _log10_p(worst, where, aligned)
    lost = [each for each in done if _log10_p(each, where, aligned) > LOG10_ALPHA_COMMITTED]
    outcome = Outcome.SPOILT if lost else Outcome.HELD
    if log10_p > LOG10_ALPHA_COMMITTED:
        outcome = Outcome.REMOVED
    return Removal(outcome, log10_p, worst["accuracy"], worst["strength"], aligned in worst)


def _log10_p(entry: Entry, where: str, aligned: str) -> float:
    """Zero, p = 1, where the mark could not be read: its owner has nothing to show then."""
    read = entry.get(aligned) or entry[where]
    found = read.get("log10_p_value")
    return 0.0 if found is None else float(found)


def _ambiguities(
    plan: Plan, store: Store, network: Network, kind: str
) -> dict[str, Ambiguity | None]:
    found: dict[str, Ambiguity | None] = {}
    for name, attack in attacks_on(plan, scheme_named(network.scheme)).items():
        of_answers = attack.marks == "triggers"
        if attack.family is Family.AMBIGUITY and of_answers == (kind == "answers"):
            result = _attacked(plan, store, network, name)
            found[name] = None if result is None else ambiguity(result["entries"])
    return found


def ambiguity(entries: Sequence[Entry]) -> Ambiguity:
    """How the keys of one forger fared; the exact verdict at the α of a committed key.

    A forger's key is not committed before the network was public, so that he is judged more mildly
    here than he would be.
    """
    keys = [each["forged"] for each in entries if "forged" in each]
    known = [key["log10_p_value"] for key in keys if key["log10_p_value"] is not None]
    return Ambiguity(
        tries=len(keys),
        published=sum(key["published_accepted"] for key in keys),
        exact=sum(log10_p <= LOG10_ALPHA_COMMITTED for log10_p in known),
        best_log10_p=min(known, default=None),
    )


def _strangers(found: Entry | None, mark: str) -> Strangers | None:
    if found is None:
        return None
    readings = [each for each in found["result"]["readings"] if each["mark"] == mark]
    return Strangers(
        readings=len(readings),
        published=sum(each["published_accepted"] for each in readings),
        exact=sum(each["accepted"] for each in readings),
        least_log10_p=min(each["log10_p_value"] for each in readings),
    )
