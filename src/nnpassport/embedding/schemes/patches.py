"""The input patches that a layer's kernel meets: what its filters are multiplied with."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.keys.geometry import Geometry


def input_patches(
    x: Float[Tensor, "..."],
    kernel: tuple[int, ...],
    geometry: Geometry,
    count: int,
    generator: torch.Generator,
) -> Float[Tensor, "samples groups fan_in"]:
    """A sample of what the layer's kernel meets on `x`, at most `count` patches with repetition."""
    if geometry.axes == 0:
        rows = x.reshape(-1, x.shape[-1])
        picked = torch.randint(len(rows), (count,), generator=generator)
        return rows[picked].unsqueeze(1)
    padded, steps = _sliding(x, kernel, geometry)
    sizes = [
        (side - dilation * (k - 1) - 1) // stride + 1
        for side, k, dilation, stride in zip(
            padded.shape[2:], kernel, geometry.dilation, steps, strict=True
        )
    ]
    image = torch.randint(len(x), (count,), generator=generator)
    where: list[Tensor] = [image.view(-1, *[1] * len(kernel))]
    for axis, (size, k, dilation, stride) in enumerate(
        zip(sizes, kernel, geometry.dilation, steps, strict=True)
    ):
        start = torch.randint(size, (count,), generator=generator) * stride
        taps = torch.arange(k) * dilation
        taps = taps.flip(0) if geometry.transposed else taps
        shape = [1] * (len(kernel) + 1)
        shape[0], shape[axis + 1] = count, k
        where.append((start[:, None] + taps).view(shape))
    # Channels last: then the index tensors stand side by side, and their axes come first.
    patches = padded.movedim(1, -1)[tuple(where)].movedim(-1, 1)
    return patches.unflatten(1, (geometry.groups, -1)).flatten(2)


def _sliding(
    x: Tensor, kernel: tuple[int, ...], geometry: Geometry
) -> tuple[Tensor, tuple[int, ...]]:
    """The map that a kernel slides over with these strides so that the layer's outputs appear."""
    if not geometry.transposed:
        pads = [side for pair in reversed(geometry.padding) for side in pair]
        mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
        return (nn.functional.pad(x, pads, mode=mode) if any(pads) else x), geometry.stride
    sides = [(s - 1) * step + 1 for s, step in zip(x.shape[2:], geometry.stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sides)
    every: Any = (..., *(slice(None, None, step) for step in geometry.stride))
    stuffed[every] = x
    pads = []
    for k, dilation, (before, after), extra in reversed(
        list(zip(kernel, geometry.dilation, geometry.padding, geometry.output_padding, strict=True))
    ):
        reach = dilation * (k - 1)
        pads += [reach - before, reach - after + extra]
    return nn.functional.pad(stuffed, pads), (1,) * geometry.axes
