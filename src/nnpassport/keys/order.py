"""An order of hidden units for each licensee, derived from a key's seed.

    σ = the indices 0 … n−1, sorted by 16 bytes each of
        SHAKE-256(HKDF(seed, salt = SHA-256(context), info = ("order", licensee, bound)))
    bound = SHA-256(LP(network's digest, digest of the table of axes, axis as 8 bytes))

Two equal strings of 16 bytes among n have a chance of n²·2⁻¹²⁹: the order is uniform to that.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys.derive import length_prefixed, stream
from nnpassport.keys.key import Key
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
    parts = (bytes.fromhex(network), bytes.fromhex(axes), number.to_bytes(8, "big"))
    bound = hashlib.sha256(length_prefixed(*parts)).digest()
    drawn = stream(key.seed, key.context, "order", licensee, bound)(_EACH * size)
    words = np.frombuffer(drawn, ">u8").reshape(size, 2)
    return np.lexsort((words[:, 1], words[:, 0])).astype(np.int64)
