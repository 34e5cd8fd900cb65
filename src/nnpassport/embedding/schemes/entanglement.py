"""How a trigger set is entangled with images: what they look like to a network before its scores.

[Jia21] Jia, Choquette-Choo, Chandrasekaran, Papernot: Entangled Watermarks as a Defense against
Model Extraction, USENIX Security 2021 (arXiv 2002.12200), section 3.2.
"""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import unwrapped
from nnpassport.embedding.schemes.seen import listening
from nnpassport.scheme import UnsuitableModelError

TEMPERATURE = 0.2
"""Of distances between directions, which are from 0 to 2; the paper learns one for each layer."""


def soft_nearest_neighbours(
    points: Float[Tensor, "rows features"], marked: Bool[Tensor, " rows"]
) -> Float[Tensor, ""]:
    """SNNL: how far rows of one kind are from their own, and how near to the other kind.

        −mean_i log( Σ_{j≠i, same kind} exp(−d_ij/T) / Σ_{j≠i} exp(−d_ij/T) )     [Jia21, eq. 1]

    d is 1 − cosine. Large where both kinds lie in one another, zero where they are far apart, and
    zero as well where there are no two of each.
    """
    alike = marked[:, None] == marked[None]
    others = ~torch.eye(len(marked), dtype=torch.bool, device=marked.device)
    counted = (alike & others).any(1) & (~alike).any(1)
    if not bool(counted.any()):
        return points.sum() * 0.0
    directions = F.normalize(points.float(), dim=1)
    near = (directions @ directions.T - 1) / TEMPERATURE
    near = near.masked_fill(~others, -torch.inf)
    own = near.masked_fill(~alike, -torch.inf)
    shares = own[counted].logsumexp(1) - near[counted].logsumexp(1)
    return -shares.mean()


def before_scores(model: nn.Module) -> AbstractContextManager[list[Tensor]]:
    """What the last linear layer (of a network without one, the last convolution) receives.

    Raises:
        UnsuitableModelError: the network has neither.
    """
    modules = list(unwrapped(model).modules())
    linear: list[nn.Module] = [each for each in modules if isinstance(each, nn.Linear)]
    layers = linear or [each for each in modules if isinstance(each, nn.Conv2d)]
    if not layers:
        raise UnsuitableModelError(
            f"{type(model).__name__} has no linear layer and no convolution before its scores; "
            "needed: one, whose inputs can be entangled; another scheme of answers needs none"
        )
    return listening(layers[-1])
