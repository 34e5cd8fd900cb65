"""The network before the mark: a secret file that suspects are aligned to, and what may be one.

A key names its anchor by digest, and all that it derives depends on that: bits are coins for
whatever network is aligned to it. Who has the anchor can subtract the mark, so it is kept as a key
is, and a network that others have too is none.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nnpassport.files.arrays import Array, arrays_digest, is_floating
from nnpassport.files.weights import Arrays, read_arrays
from nnpassport.keys.key import Key
from nnpassport.scheme import OtherAnchorError, UnsuitableModelError

ANCHOR = "anchor"
"""Name of the folder with the network before the mark, beside the network that has it."""

ALIKE = 0.01
"""A network that differs by less, of its matrices' length, is the same one to a thief: marks of
trained networks move them by some hundredths."""


def require_anchor(digest: str, key: Key) -> None:
    """Refuse a network with this digest, if it is not the one that the key names.

    Raises:
        OtherAnchorError: it is another.
        UnsuitableModelError: the key names none and could not do without.
    """
    require_alignable(key)
    if key.context.anchor is not None and digest != key.context.anchor:
        raise OtherAnchorError(
            "the network given to align to is not the key's anchor; needed: the network as it was "
            f"before the mark, which `embed` wrote into {ANCHOR}/ beside the marked one"
        )


def require_alignable(key: Key) -> None:
    """Refuse a key that no network can be aligned for.

    Raises:
        UnsuitableModelError: it has a passport for each channel, and no anchor.
    """
    if needs_anchor(key):
        raise UnsuitableModelError(
            "the key has a passport for each channel and no anchor: aligning to the marked network "
            "is not blind to it; verify it as it is, or let `embed` bind a new key to the network "
            "before the mark"
        )


def of_channels(key: Key) -> bool:
    """Whether a key has a passport for each channel."""
    return any(layer.channels is not None for layer in key.context.layers)


def needs_anchor(key: Key) -> bool:
    """Whether a key has a passport for each channel and is bound to no network yet."""
    return of_channels(key) and key.context.anchor is None


def anchor_in(folder: Path) -> Path:
    """Where the anchor is: in a folder of that name inside this one, or this one itself."""
    return folder / ANCHOR if (folder / ANCHOR).is_dir() else folder


def read_anchor(folder: Path, key: Key) -> Arrays:
    """The network in a folder, or in `anchor/` there, if it is the key's anchor.

    Raises:
        UnreadableModelError: it cannot be read.
        UnsuitableModelError: it is another network.
    """
    weights = read_arrays(anchor_in(folder))
    require_anchor(arrays_digest(weights.arrays), key)
    return weights


def require_secret(anchor: Mapping[str, Array], public: Mapping[str, Mapping[str, Array]]) -> None:
    """Refuse an anchor that others have too; the networks that they have are `public`, by name.

    Raises:
        UnsuitableModelError: it is one of them, or next to one.
    """
    for name, theirs in public.items():
        apart = distance(anchor, theirs)
        if apart < ALIKE:
            raise UnsuitableModelError(
                f"the network before the mark is {name}, but for {apart:.1e} of its length, and "
                "others have that: whoever subtracts it from the marked network holds the mark, "
                "and whoever wants the network takes theirs; needed: a network that nobody else "
                "has; train it on first (`train --init`), and draw the key for what comes out"
            )


def distance(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    """‖one − other‖ / ‖one‖ over the matrices that both have; 1 where they share none.

    Names are those of the same library; a copy under other names is not looked for.
    """
    squares = apart = 0.0
    for name, mine in one.items():
        theirs = other.get(name)
        if mine.ndim > 1 and is_floating(mine) and theirs is not None:
            if theirs.shape != mine.shape or not is_floating(theirs):
                continue
            wide = np.asarray(mine, np.float64)
            squares += float(np.square(wide).sum())
            apart += float(np.square(wide - np.asarray(theirs, np.float64)).sum())
    return float(np.sqrt(apart / squares)) if squares else 1.0
