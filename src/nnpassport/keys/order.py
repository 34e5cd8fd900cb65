"""Orders of hidden units, derived from a key's seed: one for each licensee, or the key's own mark.

    σ = the indices 0 … n−1, sorted by 16 bytes each of
        SHAKE-256(HKDF(seed, salt = SHA-256(context), info = ("order", licensee, bound)))
    bound = SHA-256(LP(network's digest, digest of the table of axes, axis as 8 bytes))

Two equal strings of 16 bytes among n have a chance of n²·2⁻¹²⁹: the order is uniform to that. The
order that is a key's own mark, of scheme `order`, has the empty name in place of a licensee's; its
network is the key's anchor.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.order import log10_fixed_points
from nnpassport.files.arrays import Array
from nnpassport.keys.context import Context, OrderForm
from nnpassport.keys.derive import length_prefixed, stream
from nnpassport.keys.key import Key
from nnpassport.keys.ordered import Placed, Reference, placed, seen, table_in
from nnpassport.keys.validity import FEWEST_UNITS
from nnpassport.scheme import UnreadableKeyError

MAX_LICENSEE = 1_000
_EACH = 16


def derive_order(
    key: Key, licensee: str, *, network: str, axes: str, number: int, size: int
) -> NDArray[np.int64]:
    """The order of one axis in the copy for `licensee` (size): unit i there is unit σ(i) here.

    Args:
        key: the owner's; any scheme's will do.
        licensee: who gets the copy.
        network: digest of the network that is put into order (`arrays_digest`).
        axes: digest of its table of axes.
        number: which axis of the table.
        size: how many units that has.

    Raises:
        UnreadableKeyError: the licensee has no name, or one that is no text or too long.
    """
    if not 1 <= len(licensee) <= MAX_LICENSEE or not licensee.isprintable():
        raise UnreadableKeyError(
            f"a licensee called {licensee!a:.80}; needed: a printable name of 1 to {MAX_LICENSEE} "
            "characters"
        )
    return _derived(key, licensee, network, axes, number, size)


def _derived(
    key: Key, name: str, network: str, axes: str, number: int, size: int
) -> NDArray[np.int64]:
    parts = (bytes.fromhex(network), bytes.fromhex(axes), number.to_bytes(8, "big"))
    bound = hashlib.sha256(length_prefixed(*parts)).digest()
    drawn = stream(key.seed, key.context, "order", name, bound)(_EACH * size)
    words = np.frombuffer(drawn, ">u8").reshape(size, 2)
    return np.lexsort((words[:, 1], words[:, 0])).astype(np.int64)


# The order that is a key's own mark


def form_of(context: Context) -> OrderForm:
    """Which orders a key of scheme `order` has.

    Raises:
        UnreadableKeyError: it is a key of another scheme.
    """
    if context.order is None:
        raise UnreadableKeyError(
            f"the key for {context.scheme!r:.80} has no order of units; needed: a key of scheme "
            "order, from `key new --scheme order`"
        )
    return context.order


def own_orders(key: Key) -> dict[int, NDArray[np.int64]]:
    """The order of every axis in the network that carries the key: unit i there is σ(i) before."""
    form, axes = form_of(key.context), axes_in(key)
    return {
        number: _derived(key, "", str(key.context.anchor), form.table, number, axis.size)
        for number, axis in enumerate(axes.axes)
        if axis.size >= FEWEST_UNITS
    }


def axes_in(key: Key) -> Axes:
    """The anchor's table of axes, as the key keeps it."""
    form_of(key.context)
    return table_in(key.table.tobytes())


def log10_at_best(context: Context) -> float:
    """The log₁₀ p of a network whose units are all in place."""
    units = form_of(context).units
    return log10_fixed_points(sum(units), units)


def tensors_read(context: Context) -> set[str]:
    """Names of the tensors that units are told by; none for other schemes."""
    if context.order is None:
        return set()
    return {name for axis in context.order.axes for name, _ in axis.tensors}


def read_placed(weights: Mapping[str, Array], key: Key) -> Placed:
    """How many units of a network stand where the key's order has them.

    Raises:
        UnsuitableModelError: it has no tensor that they are told by.
    """
    form, axes = form_of(key.context), axes_in(key)
    anchor, nonce = str(key.context.anchor), key.context.nonce
    looks = {each.number: seen(axes, each, anchor=anchor, nonce=nonce) for each in form.axes}
    reference = Reference(axes, form.axes, looks, key.sketch or {})
    return placed(weights, reference, own_orders(key))
