"""The order test on two networks: by a table of axes where one is known, else by shapes."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.inside import Pair, agreements, described, pairs_of, sizes_of
from nnpassport.alignment.order import Order, counted_axes, log10_fixed_points, order_of
from nnpassport.alignment.table import check_table
from nnpassport.files.arrays import Array, is_floating
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.lineage import LOG10_ALPHA, InOrder, Network

Matrix = NDArray[np.float64]


def table_of(a: Network, b: Network) -> tuple[Axes | None, str | None]:
    """The table that the two are compared over, if there is one; and what was left out, and why.

    One that was named comes first, then that beside `b`. A table that lies beside a network and is
    not of it is left out: whoever hands the network in may have put it there.

    Raises:
        UnreadableModelError: a table that was named is of another network.
    """
    notes = [f"{each.name}: {each.note}" for each in (a, b) if each.note is not None]
    for one, other in sorted(((b, a), (a, b)), key=lambda pair: not pair[0].named):
        if one.axes is None:
            continue
        shapes = {name: tuple(each.shape) for name, each in described(one.tensors).items()}
        try:
            check_table(one.axes, shapes)
        except UnreadableModelError as error:
            if one.named:
                raise
            notes.append(f"the table beside {one.name} is left out: {error}")
            continue
        theirs = described(other.tensors)
        places = {place.tensor for axis in one.axes.axes for place in axis.places}
        same = [n for n in places if n in theirs and tuple(theirs[n].shape) == shapes[n]]
        if places and 2 * len(same) >= len(places):
            return one.axes, "; ".join(notes) or None
        notes.append(
            f"the axes of {one.name} are known, but {other.name} has {len(same)} of the "
            f"{len(places)} tensors that they are in, so bare shapes were looked at"
        )
    return None, "; ".join(notes) or None


def in_order(
    a: Network, b: Network, axes: Axes | None, pairs: list[Pair] | None, rng: np.random.Generator
) -> InOrder:
    """The order test by shapes; where there is a table of axes, over that too.

    Whoever wrote a table may have left out what would show a copy, so shapes are asked where it
    shows none. Both readings are paid for then: p is doubled.
    """
    known = pairs_of(a.tensors, b.tensors, rng) if pairs is None else pairs
    if axes is None:
        return _by_shapes(a, b, known, rng)
    table = _of_two(by_table(a, b, axes, rng))
    if table.log10_p is not None and table.log10_p <= LOG10_ALPHA:
        return table
    bare = _of_two(_by_shapes(a, b, known, rng))
    if bare.log10_p is not None and (bare.log10_p <= LOG10_ALPHA or table.log10_p is None):
        return bare._replace(reason=f"over the table of axes, {table.reason}; {bare.reason}")
    return table


def _of_two(found: InOrder) -> InOrder:
    twice = None if found.log10_p is None else min(0.0, found.log10_p + math.log10(2))
    return found._replace(log10_p=twice)


def by_table(a: Network, b: Network, axes: Axes, rng: np.random.Generator) -> InOrder:
    """The order test over a table of axes, of which no tensor serves two.

    Raises:
        IndexError: the table is of another network.
    """
    orders = list[Order]()
    for number, places in counted_axes(axes, _usable(a, b)):
        axis = axes.axes[number]
        rows = [
            (
                place.tensor,
                _rows(a.tensors[place.tensor], place.dimension, place.positions(axis.size)),
                _rows(b.tensors[place.tensor], place.dimension, place.positions(axis.size)),
            )
            for place in places
        ]
        orders.append(order_of(f"axis {number}, {axis.size} units ({axis.kind})", rows, rng))
    if not orders:
        return InOrder("axes", (), None, None, "the table has no axis that can be counted")
    fixed, sizes = sum(each.fixed for each in orders), [each.units for each in orders]
    reason = (
        f"{len(orders)} axes of the table were counted, no tensor for more than one of them: "
        f"{fixed} of {sum(sizes)} units are in one place, and chance gives {len(orders)} on average"
    )
    return InOrder("axes", tuple(orders), log10_fixed_points(fixed, sizes), None, reason)


def _usable(a: Network, b: Network) -> dict[str, int]:
    """Matrices, and more, that both have under one name, and how many numbers are in them."""
    mine, theirs = described(a.tensors), described(b.tensors)
    return {
        name: each.size
        for name, each in mine.items()
        if name in theirs
        and tuple(each.shape) == tuple(theirs[name].shape)
        and len(each.shape) > 1
        and is_floating(each)
        and is_floating(theirs[name])
    }


def _rows(array: Array, dimension: int, positions: NDArray[np.int64]) -> Matrix:
    moved = np.moveaxis(array, dimension, 0)
    return np.asarray(moved[positions.reshape(-1)], np.float64).reshape(len(positions), -1)


def _by_shapes(a: Network, b: Network, pairs: Sequence[Pair], rng: np.random.Generator) -> InOrder:
    sizes = sizes_of(a.tensors, b.tensors)
    if not pairs:
        return InOrder("shapes", (), None, None, "no two tensors of theirs have one shape")
    found = agreements(a.tensors, b.tensors, sizes.inside, pairs, rng)
    orders = tuple(order for each in found for order in each.orders)
    seen = ", ".join(str(each.size) for each in found) or "none"
    if not found or (sizes.open_ends and len(found) < 2):
        return InOrder(
            "shapes",
            (),
            None,
            None,
            f"by their shapes alone no size is certain to be inside the network (in doubt: {seen})",
        )
    reason = (
        f"by shapes, sizes {seen} are inside; {_placed(orders)}; all sizes have to agree, and of "
        "each more than half of its tensors"
    )
    log10_p = max(each.log10_p for each in found)
    least = min(each.log10_least for each in found) + math.log10(len(found))
    return InOrder("shapes", orders, log10_p, min(0.0, least), reason)


def _placed(orders: Sequence[Order]) -> str:
    fixed, units = sum(each.fixed for each in orders), sum(each.units for each in orders)
    return f"{fixed} of {units} rows are in one place, and chance gives {len(orders)} on average"
