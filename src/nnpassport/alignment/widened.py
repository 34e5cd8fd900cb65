"""Attentions of more heads than the reference's, or of larger ones, brought to its shapes.

Whoever has a network may add heads that do nothing, or that cancel each other, and make heads
larger by what nobody reads. How many heads there are no tensor says, its length alone leaves that
open: every number is tried, and that one taken whose best heads are most like the reference's.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.canonical import Weights
from nnpassport.alignment.heads import Attention, Inside, Side
from nnpassport.alignment.match import assigned, in_groups, unit_rows
from nnpassport.alignment.spots import Spot, spots_of

Matrix = NDArray[np.float64]
MOST = 4
"""So many times the reference's heads are tried."""


class _Tensor(NamedTuple):
    """A tensor with heads along one dimension.

    Attributes:
        copies: of each head, which lie side by side.
        size: numbers of each along it, in the reference.
    """

    spot: Spot
    copies: int
    size: int


def narrowed(
    axes: Axes, attention: Attention, weights: Weights, reference: Mapping[str, Matrix]
) -> Weights | None:
    """Tensors of an attention in the reference's shapes; None where nothing fits.

    Heads are the best there are, with what of their insides the reference has. A vector along
    insides that were larger is left as it is.
    """
    tensors = _tensors(axes, attention, weights, reference)
    if tensors is None:
        return None
    heads, copies = attention.size
    theirs = [
        _products(attention, inside, tensors, reference, heads) for inside in attention.insides
    ]
    best: tuple[float, int, NDArray[np.int64]] | None = None
    for count in _counts(attention, tensors, weights):
        mine = [_products(attention, i, tensors, weights, count) for i in attention.insides]
        cosines = np.zeros((heads * copies, count * copies))
        for own, other in zip(mine, theirs, strict=True):
            cosines += unit_rows(other) @ unit_rows(own).T
        order = in_groups(cosines, heads) if copies > 1 else assigned(cosines)
        fit = float(cosines[np.arange(len(order)), order].mean())
        if best is None or fit > best[0]:
            best = fit, count, order
    if best is None:
        return None
    _, count, order = best
    found = {n: _chosen(each, weights[n], count, order, copies) for n, each in tensors.items()}
    for inside in attention.insides:
        _shrink(inside.sides, tensors, found, heads)
    fits = {n for n, each in tensors.items() if found[n].shape[1] == each.size}
    return {n: _laid_out(tensors[n], found[n], reference[n]) for n in fits}


def _tensors(
    axes: Axes, attention: Attention, weights: Weights, reference: Mapping[str, Matrix]
) -> dict[str, _Tensor] | None:
    """Those that have the heads along a whole dimension, one after the other."""
    if attention.heads is None:
        return None
    heads, copies = attention.size
    shared = {
        (place.tensor, place.dimension)
        for place in (axes.axes[attention.copies].places if attention.copies is not None else ())
    }
    found: dict[str, _Tensor] = {}
    for spot in spots_of(axes, axes.axes[attention.heads]):
        if spot.tensor not in weights:
            continue
        length = reference[spot.tensor].shape[spot.dimension]
        mine, theirs = weights[spot.tensor], reference[spot.tensor]
        whole = np.array_equal(spot.positions.reshape(-1), np.arange(length))
        others = [n for n in range(theirs.ndim) if n != spot.dimension]
        like = mine.ndim == theirs.ndim and all(mine.shape[n] == theirs.shape[n] for n in others)
        if not whole or not like or spot.tensor in found:
            return None
        several = copies if (spot.tensor, spot.dimension) in shared else 1
        found[spot.tensor] = _Tensor(spot, several, length // heads // several)
    sides = [side for inside in attention.insides for side in inside.sides]
    fit = all(side.whole.tensor in found and _is_plain(side, found, heads) for side in sides)
    return found if fit else None


def _is_plain(side: Side, tensors: Mapping[str, _Tensor], heads: int) -> bool:
    """Whether rows lie by head, copy and inside."""
    _, copies, size = tensors[side.whole.tensor]
    at = np.arange(heads * copies * size).reshape(heads, copies, size).swapaxes(1, 2)
    return np.array_equal(side.whole.positions, at.reshape(heads * size, copies))


def _counts(
    attention: Attention, tensors: Mapping[str, _Tensor], weights: Weights
) -> Iterator[int]:
    """How many heads there may be, by the lengths of all that have them."""
    heads = attention.size[0]
    free = {side.whole.tensor for inside in attention.insides for side in inside.sides}
    for count in range(heads, MOST * heads + 1):
        sizes = {
            name: divmod(weights[name].shape[each.spot.dimension], count * each.copies)
            for name, each in tensors.items()
        }
        fit = all(
            over == 0 and (size == tensors[name].size or (size > tensors[name].size))
            for name, (size, over) in sizes.items()
        )
        alike = all(
            len({sizes[side.whole.tensor] for side in inside.sides}) == 1
            for inside in attention.insides
        )
        kept = all(
            sizes[name][0] == each.size
            for name, each in tensors.items()
            if name not in free and weights[name].ndim > 1
        )
        if fit and alike and kept:
            yield count


def _by_head(tensor: _Tensor, weight: Matrix, count: int) -> Matrix:
    """Rows of a tensor (heads·copies size rest)."""
    moved = np.moveaxis(weight, tensor.spot.dimension, 0)
    return moved.reshape(count * tensor.copies, len(moved) // count // tensor.copies, -1)


def _products(
    attention: Attention,
    inside: Inside,
    tensors: Mapping[str, _Tensor],
    weights: Mapping[str, Matrix],
    count: int,
) -> Matrix:
    """Of each head and copy what its two sides make together (heads·copies numbers)."""
    blocks = []
    for side in inside.sides:
        tensor = tensors[side.whole.tensor]
        rows = _by_head(tensor, weights[side.whole.tensor], count)
        blocks.append(np.repeat(rows, attention.size[1] // tensor.copies, axis=0))
    return np.einsum("hdi,hdj->hij", *blocks).reshape(len(blocks[0]), -1)


def _chosen(
    tensor: _Tensor, weight: Matrix, count: int, order: NDArray[np.int64], copies: int
) -> Matrix:
    rows = _by_head(tensor, weight, count)
    by = order if tensor.copies > 1 else order[::copies] // copies
    return rows[by]


def _shrink(
    sides: tuple[Side, Side], tensors: Mapping[str, _Tensor], found: Weights, heads: int
) -> None:
    """Bring the insides of heads to the reference's size, in place.

    Only what the two sides make together counts, of which the size is the rank: on either side
    there may be anything where the other has nothing.
    """
    names = [side.whole.tensor for side in sides]
    size = tensors[names[0]].size
    if all(found[name].shape[1] == size for name in names):
        return
    first, second = (_together(found[name], heads) for name in names)
    kept = [_factors(one, two, size) for one, two in zip(first, second, strict=True)]
    for which, name in enumerate(names):
        rows = np.stack([pair[which] for pair in kept])
        copies, rest = tensors[name].copies, found[name].shape[2]
        apart = rows.reshape(heads, size, copies, rest).swapaxes(1, 2)
        found[name] = apart.reshape(heads * copies, size, rest)


def _factors(one: Matrix, two: Matrix, size: int) -> tuple[Matrix, Matrix]:
    """Two matrices (size numbers) whose product oneᵀ·two is the nearest that has this rank."""
    (left, upper), (right, other) = np.linalg.qr(one.T), np.linalg.qr(two.T)
    u, values, v = np.linalg.svd(upper @ other.T)
    root = np.sqrt(values[:size, None])
    return root * (left @ u[:, :size]).T, root * (v[:size] @ right.T)


def _together(rows: Matrix, heads: int) -> Matrix:
    """Copies of each head side by side (heads size copies·rest)."""
    count, size, rest = rows.shape
    apart = rows.reshape(heads, count // heads, size, rest).swapaxes(1, 2)
    return apart.reshape(heads, size, -1)


def _laid_out(tensor: _Tensor, rows: Matrix, like: Matrix) -> Matrix:
    others = [side for n, side in enumerate(like.shape) if n != tensor.spot.dimension]
    return np.moveaxis(rows.reshape(-1, *others), 0, tensor.spot.dimension)
