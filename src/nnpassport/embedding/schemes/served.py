"""Probabilities with waves on them, as a service of [Cha22] answers, and who learns them.

With q the probabilities of K classes and a_c(x) in [−1, 1] the wave of class c, what is served is

    q̂_c = (q_c + ε·(1 + ½·a_c − ½·mean_{j≠c} a_j)) / (1 + K·ε)

A wave of one class is met by its opposite, 1 / (K − 1) of it, in the others, as in the paper; there
one class has a wave, here all have. There, a wrapper adds it while it serves. Here the network that
is released has to have them: it is trained on what the wrapper would have answered, as the paper's
students are.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.embedding.network.outputs import call, logits_of, tensors_in
from nnpassport.embedding.train.labels import mean_loss, plain_loss, share_right
from nnpassport.embedding.train.loop import Objective, Outcome
from nnpassport.scheme import Batch

_LEAST = 1e-6  # that is left of a probability whose wave is taken off
_DEVIATIONS = 1.5  # of g, that make a wave of 1


def served(
    chances: Float[Tensor, "batch classes"], g: Float[Tensor, "batch classes"], strength: float
) -> Float[Tensor, "batch classes"]:
    """What is served for probabilities, `g` being ε·g of the key and `strength` ε."""
    added = _added(g, strength)
    return (chances + added) / (1 + added.sum(1, keepdim=True))


def taken_off(
    scores: Float[Tensor, "batch classes"], g: Float[Tensor, "batch classes"], strength: float
) -> Float[Tensor, "batch classes"]:
    """The logarithm of q, of scores whose probabilities are q̂; none is below log 10⁻⁶."""
    added = _added(g, strength)
    return (scores.softmax(1) * (1 + added.sum(1, keepdim=True)) - added).clamp(min=_LEAST).log()


def _added(g: Tensor, strength: float) -> Tensor:
    waves = (g / _DEVIATIONS).clamp(-strength, strength)
    others = (waves.sum(1, keepdim=True) - waves) / max(1, waves.shape[1] - 1)
    return strength + (waves - others) / 2


def serving(
    leaning: Callable[[Any], Tensor],
    presented: Callable[[Any, Any], Any],
    strength: float,
    teacher: tuple[float, nn.Module] | None = None,
) -> Objective:
    """Cross-entropy with q̂, q being the label, or that and a share of a teacher's probabilities."""

    def objective(model: nn.Module, batch: Batch) -> Outcome:
        output, g = call(model, batch.images), leaning(batch.images)
        scores = logits_of(output)
        wanted = batch.labels
        if not wanted.is_floating_point():
            wanted = F.one_hot(wanted.long(), scores.shape[1])
        wanted = wanted.to(g)
        if teacher is not None:
            share, network = teacher
            wanted = (1 - share) * wanted + share * _chances(network, batch)
        loss = mean_loss(plain_loss(output, served(wanted, g, strength)))
        shown = {"accuracy": scores, "with_key": logits_of(presented(output, batch.images))}
        return Outcome(loss, {n: share_right(each, batch.labels) for n, each in shown.items()})

    return objective


def _chances(network: nn.Module, batch: Batch) -> Tensor:
    network.to(tensors_in(batch.images)[0].device)
    with torch.no_grad():
        return logits_of(call(network, batch.images)).float().softmax(1)
