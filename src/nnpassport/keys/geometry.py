"""How a linear layer slides over its input: what a key says of a layer, and an equation needs."""

from typing import NamedTuple


class Geometry(NamedTuple):
    """How a linear layer slides over its input; empty tuples are a fully connected layer.

    `padding` is per axis as (before, after) so that "same" with an even kernel is covered.
    `transposed` is a transposed convolution, or a matrix that is kept as (in, out).
    """

    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def axes(self) -> int:
        """Spatial axes: 0 for a Linear, 1 to 3 for a convolution."""
        return len(self.stride)
