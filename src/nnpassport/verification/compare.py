"""Is one of two networks made from the other? No key, no architecture, nothing is run.

The order of hidden units decides (`alignment.order`): independent training gives it by lot, so its
p-value is exact. What else is found (equal tensors, what kind of difference, mixtures of parents,
likeness after alignment) says how, and is shown beside what chance or unrelated networks give.

An order in common says that the two networks were *not independently initialised*. Both may have
begun with one seed, or were made from a third network; nor does it say which of them was first.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.inside import pairs_of
from nnpassport.verification.alike import FEWEST_STRANGERS, aligned_reading, mixture_of
from nnpassport.verification.difference import ALIKE, difference
from nnpassport.verification.equal import equal_tensors
from nnpassport.verification.inorder import in_order, table_of
from nnpassport.verification.lineage import (
    LOG10_ALPHA,
    LOG10_DOUBT,
    AlignedReading,
    Beside,
    Equal,
    InOrder,
    Lineage,
    Network,
    Outcome,
)

_MOST_TENSORS = 512  # whose difference is described


def compare(
    a: Network,
    b: Network,
    *,
    parents: Sequence[Network] = (),
    unrelated: Sequence[Network] = (),
) -> Lineage:
    """What `a` and `b` have in common, and whether one may have been made from the other.

    Args:
        a: the suspect, or either.
        b: the other.
        parents: networks that one of them may be a mixture of.
        unrelated: networks that have nothing to do with the question: of other makers, or a public
            base that both were allowed to begin with.

    Raises:
        UnreadableModelError: a table of axes is of another network.
    """
    rng = np.random.default_rng(_seed(a, b))
    equal = equal_tensors(a.tensors, b.tensors, [each.tensors for each in unrelated])
    pairs = pairs_of(a.tensors, b.tensors, rng)
    axes, note = table_of(a, b)
    order = in_order(a, b, axes, pairs, rng)
    if note is not None:
        order = order._replace(reason=f"{note}; {order.reason}")
    beside = tuple(
        Beside(each.name, *(in_order(one, each, axes, None, rng) for one in (a, b)))
        for each in unrelated
    )
    differences = {
        (pair.a, pair.b): difference(a.tensors[pair.a], b.tensors[pair.b])
        for pair in pairs[:_MOST_TENSORS]
    }
    # A graph's axes do not say where what the network computes is met, which aligning asks.
    aligned = (
        None if axes is None or not axes.reads else aligned_reading(a, b, axes, unrelated, rng)
    )
    mixture = mixture_of(a, [b, *parents]) if parents else None
    matrices = min(a.matrices, b.matrices)
    outcome, reasons = _ruled(order, equal, matrices, aligned, beside)
    return Lineage(
        outcome,
        reasons,
        _limits(outcome, order, axes, aligned),
        *(a, b),
        equal,
        differences,
        order,
        aligned,
        mixture,
        beside,
    )


def _seed(a: Network, b: Network) -> int:
    """Lots are drawn from what was read, so that the same files give the same answer."""
    digest = hashlib.sha256()
    for each in (a, b):
        for name, value in sorted(each.digests.items()):
            digest.update(f"{name}:{value};".encode())
    return int.from_bytes(digest.digest()[:8], "big")


def _ruled(
    order: InOrder,
    equal: Sequence[Equal],
    matrices: int,
    aligned: AlignedReading | None,
    beside: Sequence[Beside],
) -> tuple[Outcome, tuple[str, ...]]:
    because = [order.reason]
    found = _by_order(order, because)
    found = _by_alignment(found, aligned, because)
    explained = [each.name for each in beside if each.explains]
    if explained and found is Outcome.RELATED:
        found = Outcome.UNDECIDED
        because.insert(
            0,
            f"both have the order of {', '.join(explained)}, which was given as unrelated: that "
            "explains what they have in common",
        )
    return _by_numbers(found, equal, matrices, bool(explained), because), tuple(because)


def _by_order(order: InOrder, because: list[str]) -> Outcome:
    if order.log10_p is None:
        return Outcome.UNDECIDED
    if order.log10_p <= LOG10_ALPHA:
        because.insert(0, f"not independently initialised: {_p(order.log10_p)} for their order")
        return Outcome.RELATED
    if order.log10_p <= LOG10_DOUBT:
        because.insert(0, f"an order in common that chance seldom gives: {_p(order.log10_p)}")
        return Outcome.UNDECIDED
    if order.log10_least is not None and order.log10_least <= LOG10_ALPHA:
        because.insert(
            0,
            f"some tensors are in one order ({_p(order.log10_least)}), and others of the same size "
            "or of another are not: what is in order may be outside the network, or a part of it "
            "was taken",
        )
        return Outcome.UNDECIDED
    because.insert(0, f"no order in common: {_p(order.log10_p)}")
    return Outcome.NONE


def _by_alignment(found: Outcome, aligned: AlignedReading | None, because: list[str]) -> Outcome:
    if aligned is None or found is Outcome.RELATED:
        return found
    said = f"aligned, matched units are {aligned.likeness:.2f} alike"
    if aligned.log10_p is None:
        best = max((*aligned.mixtures, *aligned.strangers), default=0.0)
        if aligned.likeness >= best + ALIKE * (1 - best):
            because.insert(
                0,
                f"{said}, mixtures of the suspect's own rows {best:.2f} at most; needed for an "
                f"answer: {FEWEST_STRANGERS} unrelated networks or more",
            )
            return Outcome.UNDECIDED
        return found
    best = max(*aligned.strangers, *aligned.mixtures)
    said = f"{said}, unrelated networks and mixtures {best:.2f} at most ({_p(aligned.log10_p)})"
    alike = aligned.likeness >= best + ALIKE * (1 - best)
    if aligned.log10_p <= LOG10_ALPHA and alike:
        because.insert(0, f"not independently initialised, and put into another order: {said}")
        return Outcome.RELATED
    because.append(said)
    return Outcome.UNDECIDED if alike else found


def _by_numbers(
    found: Outcome,
    equal: Sequence[Equal],
    matrices: int,
    explained: bool,
    because: list[str],
) -> Outcome:
    """The same numbers, in whichever order: training does not give them twice.

    Where a common base explains the order, one tensor that the base does not have is enough; else
    half of the numbers, because a network may hold tables that everybody computes alike.
    """
    same = [each for each in equal if each.telling and not each.elsewhere]
    share = sum(each.numbers for each in same) / max(1, matrices)
    if found is Outcome.RELATED or not same or not (explained or share >= 0.5):
        return found
    moved = " in another order" if same[0].how != "equal" else ""
    because.insert(
        0,
        f"{len(same)} tensors, such as {same[0].b!r:.60}, hold the very same numbers{moved}"
        f"{', which none of the unrelated networks has' if explained else ''}: training from "
        "starting values that were drawn by lot does not give them twice",
    )
    return Outcome.RELATED


def _limits(
    outcome: Outcome, order: InOrder, axes: Axes | None, aligned: AlignedReading | None
) -> tuple[str, ...]:
    said = [
        "which of the two was there first: dates show that",
        "that anything was copied: two trainings that begin with one seed keep one order, and so "
        "do two networks that were made from a third",
    ]
    if outcome is not Outcome.RELATED and (aligned is None or aligned.log10_p is None):
        needed = "" if axes is not None else "the network's axes (`claim axes`) and "
        said.append(
            "that no copy was put into another order: who permutes the units leaves no order in "
            f"common. Needed to look at that: {needed}unrelated networks of the same kind"
        )
    if order.how == "axes" and order.orders:
        said.append(
            "whether the table of axes is true: it fits the network's shapes, and whoever made it "
            "says that its axes are hidden"
        )
    said.append(
        "anything where units did not begin alike: a network whose units were given fixed starting "
        "values has its order from those"
    )
    return tuple(said)


def _p(log10: float) -> str:
    return f"p = 10^{log10:.1f}" if log10 < -2 else f"p = {10**log10:.2f}"
