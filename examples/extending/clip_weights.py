"""An attack in one file: clip the largest weights of every layer."""

from copy import deepcopy

import torch
from torch import nn

from nnpassport.attacks.outcome import Attacked, stopwatch


def clip_weights(model: nn.Module, *, share: float) -> Attacked:
    """Clip the largest `share`, in (0, 1), of every layer's weights to the largest of the others.

    An attack takes a network and returns a changed copy, and what it took: W is the released
    weights, D would be training images.
    """
    stop = stopwatch("W")
    clipped = deepcopy(model)
    with torch.no_grad():
        for weight in clipped.parameters():
            if weight.dim() > 1:
                most = max(1, round((1 - share) * weight.numel()))
                bound = weight.abs().flatten().kthvalue(most).values
                weight.clamp_(-bound, bound)
    return Attacked(clipped, stop())
