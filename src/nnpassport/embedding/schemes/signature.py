"""Read a passport signature, or a trigger set's answers, and say how likely they are by chance."""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace

from jaxtyping import Int64
from torch import Tensor, nn

from nnpassport.data.images import ImageSet, Normalisation, evaluation_batches
from nnpassport.embedding.network import surgery
from nnpassport.embedding.network.equations import filters, mean_patch, own_shape, read_bits
from nnpassport.embedding.network.layers import own_statistics
from nnpassport.embedding.schemes.pan import encode_norms
from nnpassport.embedding.train.fidelity import accuracy, recalibrate
from nnpassport.keys.chance import (
    LOG10_ALPHA_UNCOMMITTED,
    log10_binomial_tail,
    log10_corrected,
)
from nnpassport.keys.context import LayerShape
from nnpassport.keys.derive import log10_text_choices
from nnpassport.keys.key import Key
from nnpassport.scheme import MiscountedError, UnsuitableModelError, Verdict


def secrets_of(key: Key) -> dict[str, surgery.Secret]:
    """What surgery needs of a key: each layer's mean patch and signs, by the layer's name."""
    return {layer.name: secret_of(key, layer) for layer in key.context.layers}


def secret_of(key: Key, layer: LayerShape) -> surgery.Secret:
    """The same of one layer."""
    return surgery.Secret(
        mean_patch(key.layer_passport(layer.name), layer.weight, layer.geometry),
        key.layer_signs(layer.name),
    )


def read_signature(
    weights: Mapping[str, Tensor],
    key: Key,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Verdict:
    """V: read sign(Avg(W ∗ P_γ)) off the weights, and how likely so many matches are by chance.

    `weights` is a state dict, or one whose tensors are read when they are asked for: they are, one
    after the other, and one at a time is kept. Derived bits are uniform and independent of any
    network that was not trained on them, so their matches are Binomial(n, ½) whatever the weights:
    the p-value is exact. A key whose passports or bits were chosen freely has no p-value, because a
    linear system finds passports for any bits.

    Raises:
        UnsuitableModelError: a layer that the key names is missing or has another shape.
    """
    counts = {layer.name: _matches(weights, key, layer) for layer in key.context.layers}
    verdict = judged(
        key,
        "signature bits",
        bits=sum(bits for _, bits in counts.values()),
        matches=sum(matches for matches, _ in counts.values()),
        chance=0.5,
        log10_alpha=log10_alpha,
    )
    return replace(verdict, layers=counts)


def _matches(weights: Mapping[str, Tensor], key: Key, layer: LayerShape) -> tuple[int, int]:
    """How many bits of one layer match, and of how many."""
    host = host_weight(weights, layer)
    secret = secret_of(key, layer)
    return matching(read_bits(host.cpu(), secret.mean_patch), secret.signs), layer.length


def matching(read: Tensor, signs: Tensor) -> int:
    """How many bits were read as the key has them, each compared with one reading of its own.

    Raises:
        UnsuitableModelError: there is not one reading for each bit. Comparing them all the same
            would let one bit of the key decide over several readings.
    """
    if read.shape != signs.shape or read.dim() != 1:
        raise UnsuitableModelError(
            f"V reads {tuple(read.shape)} where the key has {tuple(signs.shape)} bits; needed: one "
            "reading for each bit; draw a key for this network"
        )
    return int((read == signs).sum())


def as_published(verdict: Verdict, *, threshold: float) -> Verdict:
    """The verdict by a rule of the kind that papers state: enough of the mark is there.

    `threshold` is the share of it, in [0, 1], that suffices. It says nothing of chance or of forged
    keys; the exact verdict does.
    """
    needed = math.ceil(threshold * verdict.bits - 1e-9)
    return replace(
        verdict,
        log10_p_value=None,
        marked=verdict.matches >= needed,
        reason=f"{verdict.matches} of {verdict.bits} match; the published rule needs {needed} "
        "of them and knows no p-value",
    )


def read_answers(
    answers: Int64[Tensor, " triggers"],
    key: Key,
    *,
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED,
) -> Verdict:
    """V of the trigger set: derived labels are uniform over K classes, so chance matches 1/K.

    Where labels are drawn from c classes chosen for each image, chance matches at most 1/c of them.

    `answers` are the predicted classes of the key's trigger images, in order; −1 is no answer.
    Derived labels are independent of whatever an independent network does, and so of which
    images it declines: the matches among the n answers are Binomial(n, 1/K) all the same. That
    holds if the images to ask about were settled before the first answer was seen.

    Raises:
        UnsuitableModelError: the key has no triggers, the answers are not one for each, or none
            of them was answered.
    """
    shape = key.context.triggers
    if shape is None:
        raise UnsuitableModelError(
            f"the key is for {key.context.scheme} and has no trigger set; needed: a key of a "
            "scheme with triggers. Without them a network is verified by its weights"
        )
    _, labels = key.trigger_set()
    if answers.shape != labels.shape:
        raise UnsuitableModelError(
            f"got answers of shape {tuple(answers.shape)}; needed: one class for each of the "
            f"{len(labels)} trigger images, in order"
        )
    answered = int((answers >= 0).sum())
    if not answered:
        raise UnsuitableModelError(
            f"none of the {len(labels)} trigger images was answered, so nothing can be said; "
            "needed: predicted classes from 0; ask again, or verify by the weights"
        )
    return _judged(
        key,
        "trigger labels",
        bits=answered,
        matches=matching(answers.cpu(), labels),
        chance=1 / key.label_choices,
        log10_alpha=log10_alpha,
    )


def presented_accuracy(
    model: nn.Module,
    key: Key,
    data: ImageSet,
    normalise: Normalisation,
    *,
    two_branches: bool,
    encoded: bool = False,
    calibration: ImageSet | None = None,
) -> float:
    """Accuracy of a plain network when `key` is presented to it; the network is left untouched.

    Running statistics of a private branch are measured from the images of `calibration` (default:
    of `data`; no label is used), since a released network does not hold them. `encoded`: the
    passport is heard through small networks that say what the norms say (see `pan`).
    """
    copy = deepcopy(model).eval()
    example = normalise(data.images[:2]).to(next(copy.parameters()))
    surgery.wrap(copy, secrets_of(key), example, two_branches=two_branches)
    if encoded:
        encode_norms(copy)
    surgery.present(copy)
    private = own_statistics(copy)
    if private:
        source = data if calibration is None else calibration
        parts = evaluation_batches(source, normalise, size=256, device=example.device)
        recalibrate(copy, private, parts)
    return accuracy(copy, data, normalise)


def judged(
    key: Key,
    what: str,
    *,
    bits: int,
    matches: int,
    chance: float,
    log10_alpha: float,
    log10_choices: float = 0.0,
) -> Verdict:
    """The exact verdict on so many matches, each by chance with probability `chance`.

    `bits` is how many were compared: all that the key has, each once. `log10_choices` is log₁₀ of
    how many counts of matches V took the best of.

    Raises:
        MiscountedError: V compared more or fewer bits than the key has, or matched more.
    """
    if bits != key.context.bits:
        raise MiscountedError(
            f"V compared {bits} bits of a key that has {key.context.bits}; needed: each of them, "
            "once; draw a key for this network"
        )
    return _judged(
        key,
        what,
        bits=bits,
        matches=matches,
        chance=chance,
        log10_alpha=log10_alpha,
        log10_choices=log10_choices,
    )


def _judged(
    key: Key,
    what: str,
    *,
    bits: int,
    matches: int,
    chance: float,
    log10_alpha: float,
    log10_choices: float = 0.0,
) -> Verdict:
    found = f"{matches} of {bits} {what} match"
    verdict = Verdict(
        scheme=key.context.scheme,
        bits=bits,
        matches=matches,
        log10_p_value=None,
        log10_alpha=log10_alpha,
        marked=False,
        reason=f"{found}, but parts of the key were chosen and not derived from a seed, "
        "so they have no p-value: anybody can solve for such a key",
    )
    if not key.derived:
        return verdict
    log10_p = log10_corrected(log10_binomial_tail(matches, bits, chance), log10_choices)
    if key.text is not None:
        # A text that nobody has committed to is the claimant's choice among all of its length.
        log10_p = log10_corrected(log10_p, log10_text_choices(key.text))
    marked = log10_p <= log10_alpha
    relation = "at or below" if marked else "above"
    return replace(
        verdict,
        log10_p_value=log10_p,
        marked=marked,
        reason=f"{found}; p = 10^{log10_p:.1f} is {relation} α = 10^{log10_alpha:.1f}",
    )


def host_weight(weights: Mapping[str, Tensor], layer: LayerShape) -> Tensor:
    """Weight of a host layer out of a state dict, its output channels first.

    Raises:
        UnsuitableModelError: it is missing or has another shape.
    """
    weight = weights.get(f"{layer.name}.weight")
    if weight is None:
        there = [name for name, each in weights.items() if each.dim() > 1]
        raise UnsuitableModelError(
            f"the network has no {layer.name}.weight, which the key was made for; needed: one "
            "of the owner's architecture (if the library that saved it renames layers, "
            "load it with that library and verify the state dict); this one has: "
            f"{', '.join(there[:40]) or 'no layers'}"
        )
    expected = own_shape(layer.weight, layer.geometry)
    if tuple(weight.shape) != expected:
        raise UnsuitableModelError(
            f"{layer.name}.weight has shape {tuple(weight.shape)}; the key was made for "
            f"{expected}; a network of the owner's architecture is needed"
        )
    return filters(weight, layer.geometry)
