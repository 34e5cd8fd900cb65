"""What each table and figure of the paper is made of."""

from collections.abc import Iterator, Mapping
from itertools import product

from nnpassport.lab.cells import Cell, Network
from nnpassport.lab.plans import Plan
from nnpassport.scheme import BadRecipeError

COLUMNS: Mapping[str, tuple[str, str]] = {
    "baseline BN": ("", "batch"),
    "V1 (BN)": ("passport-v1", "batch"),
    "baseline GN": ("", "group"),
    "V2 (GN)": ("passport-v2", "group"),
    "V3 (GN)": ("passport-v3", "group"),
}
"""The columns of Table 2: scheme and norm."""

SCHEMES: Mapping[str, tuple[str, str]] = {
    name: COLUMNS[name] for name in ("V1 (BN)", "V2 (GN)", "V3 (GN)")
}
BASELINES: Mapping[str, tuple[str, str]] = {
    "Uchida": ("uchida", "batch"),
    "Adi": ("adi", "batch"),
}
PRUNED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
FLIPPED = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SUBSTITUTED = (0.02, 0.1)


def networks(
    plan: Plan, columns: Mapping[str, tuple[str, str]], architectures: tuple[str, ...] | None = None
) -> Iterator[Network]:
    """Every network of these columns."""
    chosen = tuple(plan.architectures) if architectures is None else architectures
    for architecture, task, seed in product(chosen, plan.tasks, plan.seeds):
        for scheme, norm in columns.values():
            yield Network(architecture, task, scheme, norm, seed)


def targets_of(plan: Plan, task: str) -> tuple[str, ...]:
    """What networks of this task are transferred to."""
    return tuple(target for target in plan.targets if target != task)


def cell(
    plan: Plan,
    network: Network,
    work: str = "train",
    target: str = "",
    *,
    strengths: tuple[float, ...] = (),
) -> Cell:
    """A cell of the plan as it is for the network's architecture."""
    return Cell(plan.of(network.architecture), network, work, target, strengths)


def baselines_on(plan: Plan) -> tuple[str, ...]:
    """Architectures of Table 1, of those that the plan has."""
    return tuple(name for name in plan.baselines_on if name in plan.architectures)


def table1(plan: Plan) -> Iterator[Cell]:
    """Marks of the baselines, real and forged, before and after transfers; CIFAR-10 alone."""
    for network in networks(plan, BASELINES, baselines_on(plan)):
        if network.task == plan.tasks[0]:
            yield cell(plan, network)
            for target in targets_of(plan, network.task):
                yield cell(plan, network, "transfer", target)


def table2(plan: Plan) -> Iterator[Cell]:
    """Accuracy and signature of every scheme, before and after transfers."""
    for network in networks(plan, COLUMNS):
        yield cell(plan, network)
    for network in networks(plan, COLUMNS):
        for target in targets_of(plan, network.task):
            yield cell(plan, network, "transfer", target)


def fake12(plan: Plan) -> Iterator[Cell]:
    """fake1 and fake2: Figures 2b and 4."""
    for network in networks(plan, SCHEMES):
        yield cell(plan, network)
        yield cell(plan, network, "fake1", strengths=tuple(map(float, range(plan.fakes))))
        yield cell(plan, network, "fake2", strengths=(0.0,))


def fig2(plan: Plan) -> Iterator[Cell]:
    """Accuracy with genuine and with counterfeit passports, beside the plain network's."""
    for network in networks(plan, COLUMNS):
        yield cell(plan, network)
    yield from (each for each in fake12(plan) if each.work != "fake2")


def fig3(plan: Plan) -> Iterator[Cell]:
    """Accuracy and signature of pruned networks."""
    for network in networks(plan, SCHEMES):
        yield cell(plan, network)
        yield cell(plan, network, "prune", strengths=PRUNED)


def fig5(plan: Plan) -> Iterator[Cell]:
    """fake3 at rising shares of flipped bits."""
    for share, network in product(FLIPPED, networks(plan, SCHEMES)):
        yield cell(plan, network, "fake3", strengths=(share,))


def table3(plan: Plan) -> Iterator[Cell]:
    """The three fakes against the three schemes; and what was published since."""
    yield from fake12(plan)
    for network in networks(plan, SCHEMES):
        for work in ("solve", "hash-bound"):
            yield cell(plan, network, work, strengths=(0.0,))
        yield cell(plan, network, "grind", strengths=(100.0, 1000.0))
    for share, network in product(SUBSTITUTED, networks(plan, SCHEMES)):
        yield cell(plan, network, "substitute-cerb", strengths=(share,))
    yield from fig5(plan)


CONTENTS = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "fig2": fig2,
    "fig3": fig3,
    "fig4": fake12,
    "fig5": fig5,
}
"""Table 4, the costs, is measured at once and has no cells of this kind."""


def cells_of(plan: Plan, parts: tuple[str, ...]) -> tuple[Cell, ...]:
    """The cells that these tables and figures are made of, each once, in the order to run them.

    All that is measured on a network follows its training, since networks are large and results are
    small: whoever loses the networks has lost one that was not done. Further seeds come last, and
    before them the baselines.

    Raises:
        BadRecipeError: there is no such table or figure.
    """
    for part in parts:
        if part not in CONTENTS and part != "table4":
            raise BadRecipeError(
                f"{part!r} is unknown; there are: {', '.join(sorted([*CONTENTS, 'table4']))}, all"
            )
    found = (cell for part in parts if part in CONTENTS for cell in CONTENTS[part](plan))
    by_name = {each.name: each for each in found}
    networks_in_order = list(dict.fromkeys(each.network for each in by_name.values()))
    baselines = {scheme for scheme, _ in BASELINES.values()}

    def place(each: Cell) -> tuple[int, ...]:
        network = each.network
        return (
            plan.seeds.index(network.seed),
            network.scheme in baselines,
            list(plan.architectures).index(network.architecture),
            plan.tasks.index(network.task),
            networks_in_order.index(network),
        )

    return tuple(sorted(by_name.values(), key=place))
