"""Removal by merging: a weighted mean of two networks of one origin, which often works as well."""

from copy import deepcopy

import torch
from torch import nn

from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.scheme import BadRecipeError, UnsuitableModelError


@torch.no_grad()
def merge(model: nn.Module, other: nn.Module, *, share: float) -> Attacked:
    """A copy that is the mean of two networks, `share` of it the other.

    What is no floating-point number stays as it is in `model`.

    Raises:
        BadRecipeError: the share is not in [0, 1].
        UnsuitableModelError: the other has other tensors.
    """
    if not 0 <= share <= 1:
        raise BadRecipeError(f"share must be in [0, 1], got {share}")
    stop = stopwatch("W, B")
    found, theirs = deepcopy(model), other.state_dict()
    own = model.state_dict().keys()
    for name, tensor in (*found.named_parameters(), *found.named_buffers()):  # shared ones once
        if name not in own:
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise UnsuitableModelError(
                f"{name!r} of shape {tuple(tensor.shape)} is not in the other network; needed for "
                "merging: two networks with the same tensors, as of one origin"
            )
        if tensor.is_floating_point():
            tensor.lerp_(theirs[name].to(tensor), share)
    return Attacked(found, stop())
