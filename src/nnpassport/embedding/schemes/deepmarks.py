"""DeepMarks: one owner, many users, and a codeword in each user's copy that says whose it is.

[Che19] Chen, Rouhani, Fu, Zhao, Koushanfar: DeepMarks, ICMR 2019 (arXiv 1804.03648).
[Tra03] Trappe, Wu, Wang, Liu: Anti-collusion Fingerprinting for Multimedia, 2003; its code.

From the paper: the regulariser MSE(f − X·w̄) on the mean filter w̄ of one layer; fingerprints
f = U·b with U orthonormal; codewords b, complemented columns of the incidence matrix of a
(31, 6, 1) design, so that the AND of at most five users' words says whose they are.

An orthonormal U leaves the regulariser as it is, MSE(U·b − X·w̄) = MSE(b − Uᵀ·X·w̄), and X is drawn
anyway: the rows of our projection are those of Uᵀ·X.

Ours is what makes it evidence. The code is public, so each bit of it is multiplied by a derived
sign, and it is repeated over rows of their own until there are bits enough. An independent network
then matches each user's word as Binomial(n, ½), exactly; V takes the best user and corrects for the
choice. The paper's threshold on what is read is one number; `trace` measures the scale of the mark,
which training on leaves smaller.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.schemes import mark
from nnpassport.embedding.schemes.engine import Carriers, Mark, Secret
from nnpassport.embedding.schemes.signature import host_weight
from nnpassport.embedding.schemes.uchida import mean_filter_of, read_out
from nnpassport.keys import reading
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.context import LayerShape
from nnpassport.keys.key import Key
from nnpassport.keys.reading import ORDER
from nnpassport.keys.validity import LEAST_REPEATS, USERS
from nnpassport.scheme import BadRecipeError, Verdict

COLLUDERS = ORDER
"""How many users, at most, the code tells apart whose copies were averaged."""

LEAST_SHARE = 1 / (2 * COLLUDERS)
"""Of an average of copies that a user is named for: half of what one of five has."""

LEAST_SCORE = 5.0
"""Standard errors that a share has to be above zero for its user to be named."""


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """Whose copies a network was made of.

    Attributes:
        verdict: whether the owner's mark is there at all, exactly. If not, nobody is named.
        users: who is named, by share and score.
        published: who is named by the paper's rule: each position of the user's line reads as zero.
        shares: each user's part in an average of copies: 0 is none, 1/c that of one of c users.
            They sum to one.
        scores: each share over its standard error, as the repeats of the code show it. No p-value:
            the network was trained on the key's signs.
    """

    verdict: Verdict
    users: tuple[int, ...]
    published: tuple[int, ...]
    shares: tuple[float, ...]
    scores: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True)
class DeepMarks(Mark):
    """Users' words in an anti-collusion code, read off one layer's mean filter.       [Che19]

    One key serves all users, and V and `trace` need no more than that.

    Attributes:
        name: as in keys and on the command line.
        user: whose word E embeds, from 0 to 30.
        repeats: how often the 31 bits of the code are there, each time through rows of its own.
            An average of two users' copies reads ten of the 31 as zero, of either sign: with 12 it
            is still the owner's at α = 2⁻¹⁰⁰, with 8 only for a claim that is dated.
        strength: λ_r, factor on the mean of squares over the bits.
        threshold: share of the bits that must match by the published rule.
    """

    name: str
    user: int = 0
    repeats: int = 12
    strength: float = 10.0
    threshold: float = 1.0

    def __post_init__(self) -> None:
        if self.user not in range(USERS):
            raise BadRecipeError(
                f"user {self.user} has no codeword; needed: a number from 0 to {USERS - 1}"
            )
        if self.repeats < LEAST_REPEATS:
            raise BadRecipeError(
                f"{self.repeats} repeats of the code; needed: at least {LEAST_REPEATS}"
            )

    parts = frozenset({"projection"})

    def carriers(
        self, model: nn.Module, example: Example, layers: Sequence[str] | None
    ) -> Carriers:
        """One layer, as for Uchida's, for all users.

        Raises:
            UnsuitableModelError: not one layer, a grouped one, or one with fewer numbers than bits.
        """
        bits = self.repeats * USERS
        return Carriers((mean_filter_of(self.name, model, example, layers, bits),))

    def wanted(self, key: Key, layer: LayerShape) -> Float[Tensor, " bits"]:
        """b: the word of `user` under the key's signs."""
        return words_of(key, layer)[self.user]

    def signals(
        self, host: Float[Tensor, "out fan_in *kernel"], secret: Secret, /
    ) -> Float[Tensor, " bits"]:
        """X·w̄."""
        return read_out(host, secret.rows)

    def term(
        self, signals: Float[Tensor, " bits"], signs: Float[Tensor, " bits"]
    ) -> Float[Tensor, ""]:
        """λ_r·MSE(b − X·w̄)."""
        return self.strength * F.mse_loss(signals, signs)


def trace(
    weights: Mapping[str, Tensor], key: Key, *, log10_alpha: float = LOG10_ALPHA_UNCOMMITTED
) -> Trace:
    """Whose copies were averaged into a network with these weights, if up to five users' were.

    A position of the code then reads s·(1 − 2·Σ x_u), x_u the shares of the users on whose line it
    is and s the mark's scale. Any two lines have one point in common and the shares sum to one, so
    all positions sum to 19·s and those of user u's line to s·(4 − 10·x_u): linear, solved here.

    Raises:
        UnsuitableModelError: the host layer is missing or has another shape.
        UnreadableKeyError: the key's bits are no whole number of codewords.
    """
    mark.check_scheme(DEEPMARKS.name, key)
    (layer,) = key.context.layers
    verdict = DEEPMARKS.verify(weights, key, log10_alpha=log10_alpha)
    read = _read(weights, key, layer) * key.layer_signs(layer.name)
    shares, scores, position = _shares(read.reshape(-1, USERS))
    named = (shares > LEAST_SHARE) & (scores > LEAST_SCORE)
    # Midway between what is read where nobody has a zero, and where one of five has.
    zero = position < 1 - 1 / COLLUDERS
    return Trace(
        verdict,
        _users(named) if verdict.marked else (),
        _users((zero | ~incidence()).all(1)) if verdict.marked else (),
        tuple(shares.tolist()),
        tuple(scores.tolist()),
    )


def incidence() -> Bool[Tensor, "lines points"]:
    """`keys.reading.incidence`, as a tensor."""
    return torch.from_numpy(reading.incidence())


def words_of(key: Key, layer: LayerShape) -> Float[Tensor, "words bits"]:
    """`keys.reading.words_of`, as a tensor."""
    return torch.from_numpy(reading.words_of(key, layer))


def _read(weights: Mapping[str, Tensor], key: Key, layer: LayerShape) -> Float[Tensor, " bits"]:
    weight = host_weight(weights, layer).detach().cpu().double()
    return read_out(weight, key.layer_projection(layer.name))


def _shares(
    read: Float[Tensor, "repeats positions"],
) -> tuple[Float[Tensor, " users"], Float[Tensor, " users"], Float[Tensor, " positions"]]:
    """Shares, their scores, and what each position reads in units of the mark's scale."""
    line = ORDER + 1
    position = read.mean(0)
    scale = position.sum() / (USERS - 2 * line)
    position = position / scale
    shares = (line - 2 - incidence().to(position) @ position) / (2 * ORDER)
    # Of one reading; then of the mean of its repeats, and of the sum over a line.
    error = read.var(0).mean().sqrt() / scale
    error = error / len(read) ** 0.5 * line**0.5 / (2 * ORDER)
    return shares, shares / error, position


def _users(named: Bool[Tensor, " users"]) -> tuple[int, ...]:
    return tuple(named.nonzero()[:, 0].tolist())


DEEPMARKS = DeepMarks("deepmarks")
