"""The part of a large network that some of its layers need to be aligned.

A layer is put in order along its own axes: hidden units, heads, and the stream that it reads or
writes. Of a stream, which every block is on, what is anchored (embeddings, the head) is enough.
"""

from collections.abc import Collection
from dataclasses import replace

from nnpassport.alignment.axes import Axes, Axis

_OF_A_BLOCK = 16
"""An axis in more matrices than that is a stream, if there is an anchor on it."""
_READERS = 2  # of a stream, beside what is looked up, are enough


def needed(axes: Axes, layers: Collection[str]) -> frozenset[str]:
    """Names of the tensors that are compared so that these can be read."""
    on: dict[str, set[int]] = {}
    for number, axis in enumerate(axes.axes):
        for place in axis.places:
            on.setdefault(place.tensor, set()).add(number)
    found, waiting = set[str](), list(layers)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for number in on.get(name, ()):
            own = {place.tensor for place in axes.axes[number].places}
            readers = sorted(each for each in own if each in axes.reads and on[each] == {number})
            anchors = set(readers[:_READERS]) | {
                each for each in own if on[each] == {number} and _looked_up(axes, each)
            }
            stream = sum(each in axes.reads for each in own) > _OF_A_BLOCK and bool(anchors)
            waiting += sorted((anchors if stream else own) - found)
    return frozenset(found | _vectors(axes, found))


def _looked_up(axes: Axes, name: str) -> bool:
    """Whether a tensor may be a table of embeddings: it is in no product, and is no vector."""
    dimensions = {p.dimension for a in axes.axes for p in a.places if p.tensor == name}
    return name not in axes.reads and dimensions == {1}


def _vectors(axes: Axes, names: Collection[str]) -> set[str]:
    """What canonical form scales these with."""
    found = set[str]()
    for name in names:
        gain = axes.reads.get(name, (0, None))[1]
        if gain is not None:
            found.add(gain)
            norm = axes.norms.get(gain)
            found |= {norm.shift} if norm is not None and norm.shift is not None else set()
        if name in axes.gains:
            found.add(axes.gains[name])
        if name in axes.batch_norms:
            found |= {each for each in axes.batch_norms[name][:4] if isinstance(each, str)}
    return found


def only(axes: Axes, names: Collection[str]) -> Axes:
    """The table of these tensors alone; axes that are in none of them are gone."""

    def kept(several: tuple[Axis, ...]) -> tuple[Axis, ...]:
        cut = (
            replace(axis, places=tuple(p for p in axis.places if p.tensor in names))
            for axis in several
        )
        return tuple(axis for axis in cut if axis.places)

    return replace(
        axes,
        axes=kept(axes.axes),
        reads={n: each for n, each in axes.reads.items() if n in names},
        norms={n: each for n, each in axes.norms.items() if n in names},
        batch_norms={n: each for n, each in axes.batch_norms.items() if n in names},
        gains={n: each for n, each in axes.gains.items() if n in names},
        pairs=kept(axes.pairs),
    )
