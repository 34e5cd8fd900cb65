"""Forging signatures that are a hash of the passport, by negating channels.

Binding the bits to the passport stops a forger from choosing both. It does not stop him from
choosing the network: a negated channel computes the same and reads as the other bit.
"""

import hashlib
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnpassport.attacks.outcome import Forged, stopwatch
from nnpassport.attacks.passports import draw_template, forged, passports_for, solvable
from nnpassport.embedding.network.survey import survey
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.scheme import UnsuitableModelError

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def hashed_signs(passport: Float[Tensor, "2 in *space"], length: int) -> Float[Tensor, " length"]:
    """`length` signature bits ±1 that are the SHAKE-256 of a passport's numbers (binary32)."""
    data = passport.detach().cpu().contiguous().numpy().astype("<f4").tobytes()
    stream = hashlib.shake_256(data).digest((length + 7) // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))[:length]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1)


@torch.no_grad()
def forge_hash_bound(
    model: nn.Module, scheme: Scheme, example: Tensor, rng: torch.Generator
) -> Forged:
    """A passport whose hash is the signature that it reads, and a network of equal outputs.

    The released shift β is first moved into the running mean, exactly; then P_γ is solved for the
    released γ and P_β for zero; then each channel whose sign disagrees with the hash is negated,
    which leaves both P_γ's hash and the network's outputs as they are. Batch norm only: elsewhere
    channels share their statistics and cannot be negated one by one.

    With the network's own statistics, which the paper shares between the branches, F is passed
    exactly. Where statistics are measured anew, as `fidelity` here does for V2 and V3, the shift is
    lost, and how much that costs depends on how large it was.

    Raises:
        UnsuitableModelError: no passport layer has a batch norm and filters long enough.
    """
    stop = stopwatch("W")
    template = draw_template(scheme, model, example, rng)
    shown = deepcopy(model)
    sites = survey(shown, example).sites
    passports, signs = {}, {}
    for layer in template.context.layers:
        norm = shown.get_submodule(sites[layer.name].norm or layer.name)
        if not (isinstance(norm, _BATCH_NORMS) and norm.affine and solvable(layer)):
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue
        host = shown.get_submodule(layer.name)
        weight, gamma = host.get_parameter("weight"), norm.weight
        deviation = (norm.running_var + norm.eps).sqrt()
        movable = gamma != 0  # a channel of constant output keeps its shift
        norm.running_mean -= torch.where(movable, norm.bias * deviation / gamma, 0.0)
        norm.bias.copy_(torch.where(movable, 0.0, norm.bias))
        passport = passports_for(weight, gamma, torch.zeros_like(gamma), layer, rng)
        bits = hashed_signs(passport, layer.length)
        turn = torch.where(gamma.sign() == bits, 1.0, -1.0).to(weight)
        weight.mul_(turn.view(-1, *[1] * (weight.dim() - 1)))
        if getattr(host, "bias", None) is not None:
            host.get_parameter("bias").mul_(turn)
        norm.running_mean.mul_(turn)
        gamma.mul_(turn)
        passports[layer.name], signs[layer.name] = passport, bits
    if not passports:
        raise UnsuitableModelError(
            "no passport layer has a batch norm behind it and filters long enough to solve for; "
            "needed: a network with batch norm"
        )
    key = replace(forged(template, passports, shown.state_dict()), signs=signs)
    return Forged(shown, key, stop())
