"""What V reads of a key in a network that can be run, each mark by itself; what is kept of it."""

from collections.abc import Callable
from typing import Any

from torch import nn

from nnpassport.data.images import Normalisation
from nnpassport.embedding.schemes.protocol import Scheme
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.key import Key
from nnpassport.scheme import Verdict


def readings(
    scheme: Scheme,
    key: Key,
    model: nn.Module,
    normalise: Normalisation,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> dict[str, Callable[[], Verdict]]:
    """How each mark of a key is read: "bits" of weights or activations, "triggers" by answers."""
    found: dict[str, Callable[[], Verdict]] = {}
    if scheme.reads_weights or not scheme.triggers:
        found["bits"] = lambda: scheme.verify_network(
            model, key, normalise, log10_alpha=log10_alpha
        )
    if scheme.triggers:
        found["triggers"] = lambda: scheme.verify_answers(
            answers_to(key, model, normalise), key, log10_alpha=log10_alpha
        )
    return found


def facts_of(verdict: Verdict) -> dict[str, Any]:
    """What results keep of a verdict."""
    return {
        "bits": verdict.bits,
        "matches": verdict.matches,
        "log10_p_value": verdict.log10_p_value,
        "accepted": verdict.accepted,
    }
