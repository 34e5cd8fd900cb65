"""A training step: what it ran, and what it says of the bits.

A scheme's `steps_of` gives a function that runs the network on a batch and returns a `Step`. Most
marks run the network as it is and read numbers off its weights; `of_weights` is theirs.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.embedding.network.outputs import call, tensors_in, unwrapped
from nnpassport.keys.context import LayerShape
from nnpassport.scheme import Batch


class Secret(NamedTuple):
    """What a training step needs of one layer's key: `forms`, if there are any, and the bits."""

    layer: LayerShape
    rows: Tensor
    signs: Float[Tensor, " bits"]

    def to(self, like: Tensor) -> "Secret":
        """Where `like` is, in its precision."""
        return self._replace(rows=self.rows.to(like), signs=self.signs.to(like))


class Step(NamedTuple):
    """What a training step ran.

    Attributes:
        branches: outputs and their labels, of each network that was run.
        signals: numbers whose signs are the bits of all layers, with gradients; None without bits.
        signs: what these should be; 0 where there is no bit.
        more: what the step adds to the loss beside its `term`.
    """

    branches: Sequence[tuple[Any, Any]]
    signals: Float[Tensor, " bits"] | None = None
    signs: Float[Tensor, " bits"] | None = None
    more: Float[Tensor, ""] | None = None


Run = Callable[[nn.Module, Batch], Step]
"""What a step runs, on a batch."""


def of_weights(
    secrets: Sequence[Secret],
    hosts: Callable[[nn.Module, Sequence[LayerShape]], list[Any]],
    signals: Callable[[Any, Secret], Tensor],
) -> Run:
    """Run the network as it is, and take the signals of each layer off what `hosts` gives of it."""
    placed = list(secrets)
    layers = [secret.layer for secret in secrets]

    def run(model: nn.Module, batch: Batch) -> Step:
        output = call(model, batch.images)
        found = hosts(unwrapped(model), layers)
        # Brought to where the weights are in the first step.
        placed[:] = [s.to(tensors_in(h)[0]) for h, s in zip(found, placed, strict=True)]
        signs = torch.cat([secret.signs for secret in placed])
        with torch.autocast(signs.device.type, enabled=False):
            each = [signals(host, secret) for host, secret in zip(found, placed, strict=True)]
        return Step(((output, batch.labels),), torch.cat(each), signs)

    return run


def sign_match(signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]) -> Float[Tensor, ""]:
    """The share of a step's bits that match; nothing waits for the device."""
    carrying = signs != 0
    right = (signals.detach().sign() == signs) & carrying
    return right.float().sum() / carrying.float().sum()
