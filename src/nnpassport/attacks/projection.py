"""Removal by looking away: what the inputs of a layer do not contain, its filters need not hold.

A mark costs a network the least where its layers' inputs have little to say; from there it can be
taken at as little cost. Ours: we know of no publication of it.
"""

from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.attacks.outcome import Attacked, stopwatch
from nnpassport.attacks.perturbation import check_share
from nnpassport.embedding.network.equations import filters, own_order
from nnpassport.embedding.network.survey import survey
from nnpassport.embedding.schemes.patches import input_patches
from nnpassport.embedding.schemes.seen import listening

_PATCHES = 4096


@torch.no_grad()
def project(
    model: nn.Module,
    inputs: Float[Tensor, "batch channel height width"],
    rng: torch.Generator,
    *,
    share: float,
) -> Attacked:
    """Keep of every filter only what lies in the directions that its inputs mostly have.

    Per layer these are the principal axes of its input patches that hold `share`, in [0, 1], of
    their mean square. A few hundred `inputs`, without labels, are enough.

    Raises:
        BadRecipeError: `share` is not in [0, 1].
        UnsuitableModelError: the network has no layer that could carry a passport.
    """
    stop = stopwatch("W, D")
    check_share(share)
    projected = deepcopy(model).eval()
    for site in survey(projected, inputs[:2]).sites.values():
        weight = site.layer.get_parameter("weight")
        rows = filters(weight, site.geometry)
        with listening(site.layer) as seen:
            projected(inputs)
        patches = input_patches(seen[0], tuple(rows.shape[2:]), site.geometry, _PATCHES, rng)
        groups = rows.flatten(1).chunk(site.geometry.groups)
        kept = [
            own @ _axes_of(patches[:, index].double(), share).to(own)
            for index, own in enumerate(groups)
        ]
        weight.copy_(own_order(torch.cat(kept).view(rows.shape), site.geometry))
    return Attacked(projected, stop(len(inputs)))


def _axes_of(x: Float[Tensor, "samples fan_in"], share: float) -> Float[Tensor, "fan_in fan_in"]:
    """Projector on the principal axes that hold `share` of the mean square of `x`."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    held = values.flip(0).clamp(min=0).cumsum(0)
    count = int((held < share * held[-1]).sum()) + 1
    axes = vectors[:, -min(count, len(values)) :]
    return axes @ axes.T
