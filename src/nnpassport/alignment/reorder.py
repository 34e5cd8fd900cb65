"""Put the units of a network's axes into another order: it computes what it did."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.files.arrays import Array
from nnpassport.keys.validity import FEWEST_UNITS

Orders = Mapping[int, NDArray[np.int64]]
"""By number of the axis, which unit comes where."""


def orderable(axes: Axes) -> dict[int, int]:
    """Axes with enough units for their order to say something: number and size."""
    return {n: axis.size for n, axis in enumerate(axes.axes) if axis.size >= FEWEST_UNITS}


def reordered(axes: Axes, arrays: Mapping[str, Array], orders: Orders) -> dict[str, Array]:
    """Copies of the arrays, in which unit i of an axis is what its unit orders[i] was."""
    sources: dict[tuple[str, int], NDArray[np.int64]] = {}
    for number, order in orders.items():
        axis = axes.axes[number]
        for place in axis.places:
            if place.tensor not in arrays:
                continue
            length, at = arrays[place.tensor].shape[place.dimension], place.positions(axis.size)
            if at.max() < length:
                source = sources.setdefault((place.tensor, place.dimension), np.arange(length))
                source[at.reshape(-1)] = source[at[order].reshape(-1)]
    found = {name: np.array(each) for name, each in arrays.items()}
    for (name, dimension), source in sources.items():  # once, however many axes are there
        found[name] = np.take(found[name], source, axis=dimension)
    return found


def restored_order(axes: Axes, arrays: Mapping[str, Array], orders: Orders) -> dict[str, Array]:
    """The arrays before `reordered` by the same orders."""
    return reordered(axes, arrays, {n: np.argsort(order) for n, order in orders.items()})
