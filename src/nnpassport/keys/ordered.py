"""What a key of scheme `order` keeps of its anchor, and how units of a suspect are told by it.

The key has the anchor's table of axes, and of some units of some axes a *sketch*: a few numbers of
each, as whole numbers. Both are in the context by their digests, so whoever changes either draws
every order anew. A licensee's copy is read in the same way, against a sketch of the original. A
sketch says which unit of a suspect is most like which of the anchor; how units were permuted
follows from the seed (`keys.order`). What is compared with an order depends on the suspect, on the
sketch and on orders of *other* axes alone.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes, Axis
from nnpassport.alignment.order import assigned, counted_axes, log10_fixed_points, unit_rows
from nnpassport.alignment.table import MAX_AXES_BYTES, check_places
from nnpassport.files.arrays import Array, is_floating
from nnpassport.keys.context import NONCE_BYTES, OrderedAxis, OrderForm
from nnpassport.keys.derive import length_prefixed
from nnpassport.keys.validity import MOST_AXES, MOST_TENSORS, MOST_UNITS, SKETCHED
from nnpassport.scheme import UnreadableKeyError, UnreadableModelError, UnsuitableModelError

LARGEST = 127
"""What the largest number of a unit in one tensor becomes in its sketch."""

Where = Mapping[tuple[str, int], NDArray[np.int64]]
"""By tensor and dimension, where in it an index of the anchor is; dimensions left out stay."""


@lru_cache(maxsize=4)
def table_in(content: bytes) -> Axes:
    """The table of axes that a key keeps.

    Raises:
        UnreadableKeyError: it is none, or too large.
    """
    try:
        if len(content) > MAX_AXES_BYTES:
            raise UnreadableModelError(f"it has {len(content)} bytes")
        return Axes.from_bytes(content)
    except UnreadableModelError as error:
        raise UnreadableKeyError(f"the key's table of axes cannot be read: {error}") from None


class Seen(NamedTuple):
    """Which numbers of an axis' units are looked at.

    Attributes:
        units: of the axis, in their order in the anchor.
        columns: by tensor, which numbers of a unit's row there.
    """

    units: NDArray[np.int64]
    columns: Mapping[str, NDArray[np.int64]]


class Reference(NamedTuple):
    """What a suspect's units are told by.

    Attributes:
        axes: the table of the network that is put into order.
        chosen: those of its axes that are read.
        looks: which of their numbers.
        sketch: by axis' number, those numbers in that network.
    """

    axes: Axes
    chosen: tuple[OrderedAxis, ...]
    looks: Mapping[int, Seen]
    sketch: Mapping[str, NDArray[np.int8]]


class Placed(NamedTuple):
    """Units in place, of those of each axis; and their tail, log₁₀ of a probability."""

    axes: Mapping[str, tuple[int, int]]
    log10_tail: float

    @property
    def fixed(self) -> int:
        """Units in place."""
        return sum(fixed for fixed, _ in self.axes.values())

    @property
    def units(self) -> int:
        """Units that were looked at."""
        return sum(units for _, units in self.axes.values())


def chosen_axes(axes: Axes, arrays: Mapping[str, Array]) -> tuple[OrderedAxis, ...]:
    """Axes whose orders can be read one after the other, and the tensors that each is told by."""
    usable = {
        name: each.size for name, each in arrays.items() if each.ndim > 1 and is_floating(each)
    }
    found = []
    for number, places in counted_axes(axes, usable)[:MOST_AXES]:
        names = sorted({place.tensor for place in places}, key=lambda name: (-usable[name], name))
        tensors = tuple((name, tuple(arrays[name].shape)) for name in names[:MOST_TENSORS])
        found.append(OrderedAxis(number, min(axes.axes[number].size, MOST_UNITS), tensors))
    return tuple(found)


def check_form(form: OrderForm, axes: Axes) -> None:
    """Refuse a form whose axes are not those of the table, or whose orders depend on each other.

    The orders of the axes are read in sequence. Each has to be uniform given all that was read
    before: so no tensor that an axis is told by has one that comes later, nor itself a second time.

    Raises:
        UnreadableKeyError: naming the axis.
    """
    shapes = {name: shape for axis in form.axes for name, shape in axis.tensors}
    try:
        check_places(_within(axes, shapes), shapes)
    except UnreadableModelError as error:
        raise UnreadableKeyError(f"the key's context has other tensors: {error}") from None
    later = {axis.number for axis in form.axes}
    for axis in form.axes:
        if axis.number >= len(axes.axes) or axis.units != min(
            axes.axes[axis.number].size, MOST_UNITS
        ):
            raise _unfit(axis, "is not in the table, or has another size there")
        for name, _ in axis.tensors:
            dimensions = {p.dimension for p in axes.axes[axis.number].places if p.tensor == name}
            if len(dimensions) != 1:
                raise _unfit(axis, f"is in {len(dimensions)} dimensions of {name!r:.80}, not in 1")
            if _on(axes, name) & later != {axis.number}:
                raise _unfit(axis, f"is told by {name!r:.80}, where axes are that are read later")
        later.discard(axis.number)


def _unfit(axis: OrderedAxis, what: str) -> UnreadableKeyError:
    return UnreadableKeyError(
        f"the key's context reads axis {axis.number}, which {what}; draw a new key for this model"
    )


def _on(axes: Axes, name: str) -> set[int]:
    return {n for n, axis in enumerate(axes.axes) if any(p.tensor == name for p in axis.places)}


def _within(axes: Axes, shapes: Mapping[str, tuple[int, ...]]) -> Axes:
    """The table without what is in other tensors."""
    kept = []
    for axis in axes.axes:
        places = tuple(place for place in axis.places if place.tensor in shapes)
        if places:
            kept.append(Axis(axis.size, axis.kind, axis.traits, places))
    return Axes(tuple(kept), {}, {}, {}, {})


def seen(axes: Axes, axis: OrderedAxis, *, anchor: str, nonce: bytes) -> Seen:
    """Which units and numbers of an axis a sketch has: drawn in public, before the seed is asked.

    They are read of SHAKE-256(LP("nnpassport/order-sketch", nonce, anchor, table, axis, tensor)),
    the tensor's name empty for the units: words of 8 bytes, as `_distinct` takes them.
    """
    known = axes.axes[axis.number]
    parts = (b"nnpassport/order-sketch", nonce, bytes.fromhex(anchor), bytes.fromhex(axes.digest))

    def drawn(name: str) -> Callable[[int], bytes]:
        spelled = length_prefixed(*parts, axis.number.to_bytes(8, "big"), name.encode())
        return hashlib.shake_256(spelled).digest

    columns = {}
    for name, shape in axis.tensors:
        behind = math.prod(shape) // shape[_dimension(known, name)]
        numbers = _positions(known, name).shape[1] * behind
        each = min(numbers, max(1, SKETCHED // len(axis.tensors)))
        columns[name] = _distinct(drawn(name), each, numbers)
    return Seen(_distinct(drawn(""), axis.units, known.size), columns)


def _distinct(draw: Callable[[int], bytes], count: int, of: int) -> NDArray[np.int64]:
    """The first `count` distinct numbers below `of`, in ascending order; all where they are few.

    Words of 8 bytes modulo `of`, those left out that would make some numbers likelier.
    """
    if count >= of:
        return np.arange(of)
    ceiling = 2**64 // of * of
    size = 2 * count
    while True:
        words = [w for w in np.frombuffer(draw(8 * size), ">u8").tolist() if w < ceiling]
        found = list(dict.fromkeys(word % of for word in words))[:count]
        if len(found) == count:
            return np.array(sorted(found), np.int64)
        size *= 2


def _dimension(axis: Axis, name: str) -> int:
    return next(place.dimension for place in axis.places if place.tensor == name)


def _positions(axis: Axis, name: str) -> NDArray[np.int64]:
    """Indices of each unit (units repeats) in its dimension of a tensor."""
    return np.concatenate(
        [place.positions(axis.size) for place in axis.places if place.tensor == name], axis=1
    )


def rows_of(
    axes: Axes,
    axis: OrderedAxis,
    name: str,
    array: Array,
    units: NDArray[np.int64],
    columns: NDArray[np.int64],
    where: Where,
) -> NDArray[np.float64]:
    """Numbers of some units in a tensor (units columns), the columns being those of the anchor.

    Only the numbers that are asked for are read.
    """
    known = axes.axes[axis.number]
    dimension, at = _dimension(known, name), _positions(known, name)[units]
    others = [n for n in range(array.ndim) if n != dimension]
    sides = [array.shape[n] for n in others]
    repeats, behind = np.divmod(columns, math.prod(sides))
    index: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * array.ndim
    for n, places in zip(others, np.unravel_index(behind, sides), strict=True):
        index[n] = _moved(where.get((name, n)), places)[None, :]
    index[dimension] = _moved(where.get((name, dimension)), at[:, repeats])
    return np.asarray(array[tuple(index)], np.float64)


def _moved(where: NDArray[np.int64] | None, places: NDArray[np.int64]) -> NDArray[np.int64]:
    return places if where is None else where[places]


def places_under(
    axes: Axes,
    orders: Mapping[int, NDArray[np.int64]],
    axis: OrderedAxis,
) -> Where:
    """Where indices of the anchor are in a copy of these orders, the axis' own left as it is.

    So its units are looked at as they stand in the copy, and what is compared with their order
    cannot depend on it.
    """
    shapes = dict(axis.tensors)
    sources: dict[tuple[str, int], NDArray[np.int64]] = {}
    for number, order in orders.items():
        known = axes.axes[number]
        for place in known.places if number != axis.number else ():
            if place.tensor in shapes:
                spot = (place.tensor, place.dimension)
                source = sources.setdefault(spot, np.arange(shapes[place.tensor][place.dimension]))
                at = place.positions(known.size)
                source[at.reshape(-1)] = source[at[order].reshape(-1)]
    return {spot: np.argsort(source) for spot, source in sources.items()}


def sketch_of(
    axes: Axes,
    chosen: tuple[OrderedAxis, ...],
    arrays: Mapping[str, Array],
    *,
    anchor: str,
    nonce: bytes,
) -> dict[str, NDArray[np.int8]]:
    """What a key keeps of the anchor: by axis' number, (units numbers), tensor after tensor.

    In each tensor the largest number of a unit is 127; only directions are compared.
    """
    found = {}
    for axis in chosen:
        look = seen(axes, axis, anchor=anchor, nonce=nonce)
        parts = [
            rows_of(axes, axis, name, arrays[name], look.units, look.columns[name], {})
            for name, _ in axis.tensors
        ]
        found[str(axis.number)] = np.concatenate([_whole(part) for part in parts], axis=1)
    return found


def _whole(rows: NDArray[np.float64]) -> NDArray[np.int8]:
    rows = np.nan_to_num(rows)
    largest = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-300)
    return np.rint(rows / largest * LARGEST).astype(np.int8)


def check_sketch(
    sketch: Mapping[str, NDArray[np.int8]], form: OrderForm, axes: Axes, anchor: str, nonce: bytes
) -> None:
    """Refuse a sketch of other axes, or of another number of units or numbers.

    Raises:
        UnreadableKeyError: it is one.
    """
    wanted = {}
    for axis in form.axes:
        columns = seen(axes, axis, anchor=anchor, nonce=nonce).columns.values()
        wanted[str(axis.number)] = (axis.units, sum(map(len, columns)))
    given = {name: each.shape for name, each in sketch.items()}
    if given != wanted or any(each.dtype != np.int8 for each in sketch.values()):
        raise UnreadableKeyError(
            f"the key keeps a sketch of {given!r:.80}, but needs int8 of {wanted!r:.80}; use the "
            "original file"
        )


def likeness(
    rows: Mapping[str, NDArray[np.float64]], sketch: NDArray[np.int8], look: Seen
) -> NDArray[np.float64]:
    """How alike units are that were read (units columns, by tensor) to the sketch's (units units).

    Cosines, summed over tensors; those that were not read do not count.
    """
    total = np.zeros((len(sketch), len(sketch)))
    start = 0
    for name, columns in look.columns.items():
        part = sketch[:, start : start + len(columns)]
        start += len(columns)
        if name in rows:
            total += unit_rows(rows[name]) @ unit_rows(part.astype(np.float64)).T
    return np.nan_to_num(total)


def reference_of(axes: Axes, arrays: Mapping[str, Array], *, anchor: str) -> Reference:
    """A network at hand as what suspects' units are told by; `anchor` is its digest."""
    chosen, nonce = chosen_axes(axes, arrays), bytes(NONCE_BYTES)
    looks = {each.number: seen(axes, each, anchor=anchor, nonce=nonce) for each in chosen}
    sketch = sketch_of(axes, chosen, arrays, anchor=anchor, nonce=nonce)
    return Reference(axes, chosen, looks, sketch)


def placed(
    weights: Mapping[str, Array], reference: Reference, orders: Mapping[int, NDArray[np.int64]]
) -> Placed:
    """How many units stand where these orders have them.

    An axis of which no tensor is there, in its shape, has none: it counts as not in order.

    Raises:
        UnsuitableModelError: that is so of every axis.
    """
    found, read = dict[str, tuple[int, int]](), 0
    for axis in reference.chosen:
        fixed = _in_place(weights, reference, axis, orders)
        read += fixed is not None
        found[f"axis {axis.number}"] = (fixed or 0, axis.units)
    if not read:
        names = ", ".join(n for axis in reference.chosen[:3] for n, _ in axis.tensors[:2])
        raise UnsuitableModelError(
            "the network has no tensor that units are told by, of the original's names and shapes; "
            f"needed: a copy of that network, with such as {names:.200}"
        )
    units = [axis.units for axis in reference.chosen]
    return Placed(found, log10_fixed_points(sum(fixed for fixed, _ in found.values()), units))


def _in_place(
    weights: Mapping[str, Array],
    reference: Reference,
    axis: OrderedAxis,
    orders: Mapping[int, NDArray[np.int64]],
) -> int | None:
    """Units of one axis that are in place; None if nothing of it can be read.

    Units of the suspect are matched with the sketch's as they stand, without this axis' order. Only
    then is that order compared with what was found, so it is as likely as any other.
    """
    look, order = reference.looks[axis.number], orders[axis.number]
    where = places_under(reference.axes, orders, axis)
    there = np.flatnonzero(np.isin(order, look.units))
    rows = {
        name: rows_of(reference.axes, axis, name, array, there, look.columns[name], where)
        for name, shape in axis.tensors
        if (array := _readable(weights, name, shape)) is not None
    }
    if not rows:
        return None
    alike = likeness(rows, reference.sketch[str(axis.number)], look)
    matched = look.units[assigned(alike, np.random.default_rng(0))]
    return int((matched == order[there]).sum())


def _readable(weights: Mapping[str, Array], name: str, shape: tuple[int, ...]) -> Array | None:
    if name not in weights:
        return None
    try:
        array = weights[name]
    except UnreadableModelError:  # it holds NaN, say
        return None
    return array if tuple(array.shape) == shape and is_floating(array) else None
