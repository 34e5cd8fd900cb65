"""Kernels that are kept in another form, laid out as the reference's are.

A convolution computes the same with zeros around its kernel, or between the numbers of one that was
dilated; and a file may keep it in another framework's order, or as the matrix that multiplies
patches. The numbers are there, and which form they are in their shapes say.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import product
from math import prod

import numpy as np

from nnpassport.files.arrays import Array, is_floating

KEPT = 0.99
"""Share of a kernel's energy that must be left once what is around or between it is taken away."""
KEPT_OF_KNOWN = 1 - 1e-6
"""The same of a kernel that could be the reference's as it is."""
MOST_SIDES = 4
"""A kernel is so many times as long as the reference's at most."""
_ORDERS = {3: ((2, 1, 0), (0, 2, 1)), 4: ((3, 2, 0, 1), (0, 3, 1, 2))}
"""Of other frameworks: positions, channels in, channels out; and channels out, positions, in."""


def laid_out(suspect: Mapping[str, Array], reference: Mapping[str, Array]) -> Mapping[str, Array]:
    """The suspect's tensors; those that are no kernel of the reference's as they could be one.

    Under a name that the reference has, that is its own kernel; else any that it has.
    """
    shapes = {tuple(each.shape) for each in reference.values()}
    kernels = {shape for shape in shapes if len(shape) > 2}
    found = {}
    for name, tensor in suspect.items():
        own = {tuple(reference[name].shape)} if name in reference else shapes
        wanted = {s for s in own if len(s) > 2} or kernels
        other = is_floating(tensor) and tensor.size and tensor.ndim > 1 and wanted
        form = None
        if other and tuple(tensor.shape) not in own:
            form = next(_forms(tensor, wanted, shapes), None)
        elif other and name not in reference and tensor.ndim > 2:
            form = next(_smaller(tensor, wanted), None)
        found[name] = tensor if form is None else form
    return found


def _forms(
    tensor: Array, wanted: Collection[tuple[int, ...]], shapes: Collection[tuple[int, ...]]
) -> Iterator[Array]:
    """What such a tensor may be, in the order in which it is believed."""
    if tensor.ndim == 2:
        yield from _patches(tensor, wanted)
        return
    sizes = sorted({shape[2:] for shape in wanted if len(shape) == tensor.ndim}, key=prod)
    turned = [tensor.transpose(order) for order in _ORDERS.get(tensor.ndim, ())]
    for each in turned:
        if tuple(each.shape) in shapes and tensor.shape[2:] not in sizes:
            yield each
    for each in (tensor, *turned):
        if each.shape[2:] in sizes:
            continue
        for size in sizes:
            yield from _within(each, size)


def _smaller(tensor: Array, wanted: Collection[tuple[int, ...]]) -> Iterator[Array]:
    """A smaller kernel of the reference's with zeros around it, which look like a larger one's."""
    out_in = tensor.shape[:2]
    sizes = {s[2:] for s in wanted if s[:2] == out_in and len(s) == tensor.ndim}
    for size in sorted(sizes - {tensor.shape[2:]}, key=prod):
        yield from _within(tensor, size, KEPT_OF_KNOWN)


def _patches(tensor: Array, wanted: Collection[tuple[int, ...]]) -> Iterator[Array]:
    """A matrix whose columns are the numbers of a patch: by channel, or by position."""
    for shape in sorted(wanted):
        if tuple(tensor.shape) == (shape[0], prod(shape[1:])):
            yield tensor.reshape(shape)


def _within(tensor: Array, size: tuple[int, ...], kept: float = KEPT) -> Iterator[Array]:
    """The kernel of this size that nearly all of a larger one is."""
    there = tensor.shape[2:]
    sides = list(zip(there, size, strict=True))
    if any(mine < theirs or mine > MOST_SIDES * theirs + 1 for mine, theirs in sides):
        return
    energy = np.square(tensor.astype(np.float64)).sum((0, 1))
    least = kept * float(energy.sum())
    for grid in product(*(_grids(mine, theirs) for mine, theirs in sides)):
        if float(energy[grid].sum()) >= least:
            yield tensor[(slice(None), slice(None), *grid)]
            return


def _grids(length: int, size: int) -> Iterator[slice]:
    """Where so many positions may lie in a longer row: side by side, or evenly apart."""
    steps = range(1, (length - 1) // max(1, size - 1) + 1) if size > 1 else (1,)
    for step in steps:
        reach = step * (size - 1) + 1
        for start in sorted(range(length - reach + 1), key=lambda at: abs(2 * at + reach - length)):
            yield slice(start, start + reach, step)
