"""The cells of the leaderboard: every scheme of the catalog against every attack of the table."""

from collections.abc import Iterator, Mapping, Sequence

from nnpassport.attacks.table import ATTACKS, Attack, aims_at
from nnpassport.catalog import CATALOG, scheme_named
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.plans import Plan
from nnpassport.scheme import BadRecipeError, UnsuitableModelError

NORM = "batch"


def strengths_of(attack: Attack) -> tuple[float, ...]:
    """The weakest, the middle and the strongest of a quick audit; or the first of a full one."""
    known = tuple(attack.quick) or tuple(attack.full[:1])
    return tuple(dict.fromkeys((known[0], known[len(known) // 2], known[-1])))


def attacks_on(plan: Plan, scheme: Scheme) -> Mapping[str, Attack]:
    """What the leaderboard runs against this scheme."""
    return {
        name: attack
        for name, attack in ATTACKS.items()
        if name not in plan.skipped and aims_at(attack, scheme)
    }


def cells_of(
    plan: Plan, schemes: Sequence[str] = (), attacks: Sequence[str] = ()
) -> tuple[Cell, ...]:
    """The cells to run, networks first; `schemes` and `attacks` narrow them by name.

    Raises:
        UnsuitableModelError: there is no such scheme.
        BadRecipeError: there is no such attack, or the plan leaves it out.
    """
    for name in schemes:
        if name not in CATALOG:
            raise UnsuitableModelError(
                f"scheme {name!r} is not in the catalog; there are: {', '.join(CATALOG)}"
            )
    for name in attacks:
        if name not in ATTACKS or name in plan.skipped:
            why = plan.skipped.get(name, f"there are: {', '.join(ATTACKS)}")
            raise BadRecipeError(f"attack {name!r} is not run: {why}")
    return tuple(dict.fromkeys(_cells(plan, tuple(schemes) or tuple(CATALOG), tuple(attacks))))


def _cells(plan: Plan, schemes: tuple[str, ...], attacks: tuple[str, ...]) -> Iterator[Cell]:
    networks = [
        Network(architecture, task, scheme, NORM, seed, tuned=True)
        for architecture in plan.architectures
        for task in plan.tasks
        for seed in plan.seeds
        for scheme in ("", *schemes)
    ]
    for network in networks:
        yield Cell(plan, network)
    marked = [network for network in networks if network.scheme]
    for network in marked:
        yield Cell(plan, network, "strangers")
        yield Cell(plan, network, "cost")
    for network in marked:
        for name, attack in attacks_on(plan, scheme_named(network.scheme)).items():
            if not attacks or name in attacks:
                yield Cell(plan, network, name, strengths=strengths_of(attack))
