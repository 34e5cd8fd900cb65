"""Passport-aware normalisation: V2, its passport heard through a small network that is trained too.

[Zha20] Zhang, Chen, Liao, Zhang, Hua, Yu: Passport-aware Normalization for Deep Model Protection,
NeurIPS 2020; its text says what for, its public code (Image_cls/Ours) exactly what:

    γ = E(γ0),  β = E(β0),  γ0 = Avg(W ∗ P_γ),  β0 = Avg(W ∗ P_β)
    E(x) = B·LeakyReLU(A·x),   A: out → out/4,  B: out/4 → out,  no bias, one E for both

The passport branch also keeps batch-norm statistics of its own, which V2 does here as well; so E is
all that is new. Both branches are trained together, the public one is released, and the owner keeps
passport, E and statistics. It is a row of `passport.Passport` and not a class of its own.

**Whoever chooses E chooses γ and β.** E meets two vectors only, γ0 and β0, and its last layer is
linear: B = (γ, β)·(LeakyReLU(A·γ0), LeakyReLU(A·β0))⁺ answers any γ and β that one wishes for, to
any passport, on any network, with neither data nor training (`say`). Three things follow.

*Signs are read in front of E*, off γ0, by V and by the sign loss: derived bits match an independent
network as Binomial(n, ½), exactly as in V2. The public code reads them there too (lines it has
commented out read γ). Behind E every signature can be read off everything, and proves nothing.

*F proves nothing here.* With E of his choice a claimant shows the public branch's accuracy for any
key. A released network does not hold E, and a stored one would be the claimant's choice; so F
solves for the E that says what the norms say, the same for everybody, and whoever presents
whatever passport passes. V2's F refuses passports that were drawn and not trained or solved for;
that protection is lost with E. What stands between forger and owner is the exact test of derived
bits alone.

*E is no secret and is not kept.* With the passports it is taken out of a trained network again;
`evaluation` has the accuracy of the branch as trained, which is the paper's number. Training starts
at a random E, as in the public code, or, in a network that is trained already, at the E that says
what its norms say: then both branches start as one network, whatever the norm is. From scratch that
start is unstable: γ0 is small at first, and an E that makes 1 of it magnifies each of its steps.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.layers import Encoder, PassportNorm, passport_norms


def encode(model: nn.Module) -> None:
    """Give every inserted passport, in place, a small network: one at random."""
    for norm in passport_norms(model).values():
        norm.encoder = Encoder(len(norm.signs)).to(norm.signs)


def encode_norms(model: nn.Module) -> None:
    """The same, and each says what its norm says: both branches compute one thing."""
    encode(model)
    for norm in passport_norms(model).values():
        say(norm, *own_affine(norm))


@torch.no_grad()
def say(norm: PassportNorm, gamma: Float[Tensor, " out"], beta: Float[Tensor, " out"]) -> None:
    """Make a passport's small network answer this γ and β, in place: its last layer, closed form.

    The layer is the smallest that does. A layer of one channel whose γ0 and β0 have one sign cannot
    have both and gets the nearest.
    """
    if norm.encoder is None:
        return
    heard = torch.stack(norm.affine(), 1).double()
    hidden = F.leaky_relu(norm.encoder.first.double() @ heard)
    wanted = torch.stack([gamma, beta], 1).double()
    norm.encoder.second.copy_(wanted @ torch.linalg.pinv(hidden))


def own_affine(norm: PassportNorm) -> tuple[Float[Tensor, " out"], Float[Tensor, " out"]]:
    """γ° and β° of the public branch: 1 and 0 where there is none."""
    scale, shift = norm.own()
    return scale.detach().clone(), shift.detach().clone()
