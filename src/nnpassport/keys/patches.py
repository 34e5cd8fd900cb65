"""m(P): the mean of the input patches that a layer's kernel meets on a passport, in numpy.

A derived passport holds n/127 in float32, each a multiple of 2⁻³⁰ below 1. So in float64 the sums
over up to 2²² positions are exact in any order, and m(P) is the same on every machine.
"""

import numpy as np
from numpy.typing import NDArray

from nnpassport.files.arrays import Array
from nnpassport.keys.geometry import Geometry

_PADDING = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def mean_patch(
    passport: Array, weight_shape: tuple[int, ...], geometry: Geometry
) -> NDArray[np.float64]:
    """m(P) of P_γ and P_β (2 groups fan_in): Avg(W ∗ P) is ⟨W_o, m(P)⟩.     [Fan19, eq. 3]

    `passport` is (2 in *space), `weight_shape` that of the filters: (out fan_in *kernel).
    """
    wide, kernel = passport.astype(np.float64), weight_shape[2:]
    if geometry.axes == 0:
        return wide.mean(2)[:, None]
    if geometry.transposed:
        sums, count = _spread(wide, kernel, geometry)
    else:
        sums, count = _met(wide, kernel, geometry)
    return (sums / count).reshape(2, geometry.groups, -1)


def _met(
    passport: NDArray[np.float64], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[NDArray[np.float64], int]:
    """By channel and place in the kernel, the sum of what it meets, and at how many positions."""
    pads = [(0, 0), (0, 0), *geometry.padding]
    mode = _PADDING.get(geometry.padding_mode, "constant")
    padded = np.pad(passport, pads, mode=mode) if any(map(any, pads)) else passport  # type: ignore[call-overload]
    steps = list(zip(kernel, geometry.stride, geometry.dilation, strict=True))
    positions = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, (k, stride, dilation) in zip(padded.shape[2:], steps, strict=True)
    ]
    sums = np.empty((*passport.shape[:2], *kernel))
    for place in np.ndindex(*kernel):
        window = tuple(
            slice(at * dilation, at * dilation + (count - 1) * stride + 1, stride)
            for at, count, (_, stride, dilation) in zip(place, positions, steps, strict=True)
        )
        axes = tuple(range(2, passport.ndim))
        sums[:, :, *place] = padded[:, :, *window].sum(axes)
    return sums, int(np.prod(positions))


def _spread(
    passport: NDArray[np.float64], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[NDArray[np.float64], int]:
    """The same of a transposed convolution: of what each place sends to within the output."""
    space, axes = passport.shape[2:], range(geometry.axes)
    sizes = [
        (space[a] - 1) * geometry.stride[a]
        - 2 * geometry.padding[a][0]
        + geometry.dilation[a] * (kernel[a] - 1)
        + geometry.output_padding[a]
        + 1
        for a in axes
    ]
    sums = np.empty((*passport.shape[:2], *kernel))
    for place in np.ndindex(*kernel):
        there = passport
        for a in axes:
            shift = place[a] * geometry.dilation[a] - geometry.padding[a][0]
            reached = np.arange(space[a]) * geometry.stride[a] + shift
            held = np.flatnonzero((reached >= 0) & (reached < sizes[a]))
            there = there.take(held, axis=2 + a)
        sums[:, :, *place] = there.sum(tuple(range(2, passport.ndim)))
    return sums, int(np.prod(sizes))


def filters(weight: Array, geometry: Geometry) -> Array:
    """The weight of a layer with its output channels first, whatever its own order.

    A transposed convolution keeps (in, out / groups, *kernel), GPT-2's matrices (in, out). It is
    its own inverse.
    """
    if not geometry.transposed:
        return weight
    # (groups · in, out, …) → (groups, in, out, …) → (groups, out, in, …) → (groups · out, in, …)
    split = weight.reshape(geometry.groups, -1, *weight.shape[1:]).swapaxes(1, 2)
    return split.reshape(-1, *split.shape[2:])


def own_shape(rows: tuple[int, ...], geometry: Geometry) -> tuple[int, ...]:
    """Shape of a layer's own weight whose filters have this shape."""
    if not geometry.transposed:
        return tuple(rows)
    out, inputs, *kernel = rows
    return (inputs * geometry.groups, out // geometry.groups, *kernel)
