"""Cosine watermarks: waves along secret projections of a picture, on the probabilities served.

[Cha22] Charette, Chu, Chen, Pei, Wang, Zhang: Cosine Model Watermarking Against Ensemble
Distillation, AAAI 2022 (arXiv 2203.02777).

There, a key is a class i*, a frequency f and a random vector v of length 1. A service adds
a(x) = cos(f·vᵀx) to the probability of i*, and its opposite to those of the other classes
(`served.py` has the equation). Whoever is trained on such answers is said to answer in the same
wave: over inputs that he gives to i* with some confidence, the power at f of a Lomb-Scargle
periodogram of his answers against vᵀx is compared with the mean power elsewhere. That ratio is
`signal_to_noise`, and the authors' code calls a suspect marked where it is above 8.

What its null hides: the ratio has no distribution that holds for a network nobody marked. Answers
depend on pictures, and pictures vary along any vector, so the power at a slow f is above that
elsewhere in honest networks too. A rank among the ratios of N other keys would be exact, and is no
less than 1 / N.

Here, there are many waves, each with a vector, a frequency and a class of its own and with a
phase of 0 or π. The phases are the seed's coins and are read as a mark in answers is
(`keys/answers.py`), so that p is exact. One wave, as published, is one coin: p = ½ at best.
Slow ones, from 2 to 8 radians for a unit of the projection where the paper has 30: the network that
is released must have learnt them, where the paper's service adds them to each answer.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnpassport.embedding.schemes.answers import Answers
from nnpassport.keys.answers import coins_of, form_of, functions_of, inputs_of
from nnpassport.keys.key import Key
from nnpassport.scheme import UnreadableKeyError

RATIO = 8.0
"""Signal to noise above which the authors' code calls a suspect marked."""
FASTEST = 80.0 * np.pi
"""Radians in a unit of the projection: up to there the paper's noise is looked at."""
_HALF_WIDTH = 0.005  # radians, of the window around the key's frequency
_PLACES = 4_000  # frequencies at which the noise is looked at
_FEWEST = 8  # inputs of the wave's class
_AT_ONCE = 500  # frequencies

Read = NDArray[np.float64]


def signal_to_noise(chances: Any, key: Key, wave: int = 0) -> float:
    """The paper's score of one wave, of a suspect's probabilities (inputs classes) as answered.

    Inputs are those that the key is bound to and that its baseline gives to the wave's class; of
    these, the half to which the suspect gives more of it.

    Raises:
        UnreadableKeyError: the key is none of `cosine`, or bound to too few inputs of that class.
    """
    inputs, baseline = inputs_of(key)
    form, _ = form_of(key.context)
    if form.kind != "waves":
        raise UnreadableKeyError(
            f"the key of {key.context.scheme} has functions of kind {form.kind}; needed: waves, of "
            "the scheme cosine"
        )
    own = int(coins_of(key).classes[wave])
    direction = functions_of(key).bank[:, wave]
    frequency = float(np.linalg.norm(direction))
    there = np.flatnonzero(baseline.argmax(1) == own)
    said = np.asarray(chances, np.float64)[there, own]
    if len(there) < _FEWEST:
        raise UnreadableKeyError(
            f"the key is bound to {len(there)} inputs that its baseline gives to class {own}; "
            f"needed: {_FEWEST}"
        )
    sure = said >= np.median(said)
    along = inputs[there].reshape(len(there), -1)[sure] / 255.0 @ (direction / frequency)
    window = frequency + np.array([-_HALF_WIDTH, 0.0, _HALF_WIDTH])
    elsewhere = np.linspace(2 * np.pi * 0.002, FASTEST, _PLACES)
    elsewhere = elsewhere[np.abs(elsewhere - frequency) > _HALF_WIDTH]
    noise = float(power(along, said[sure], elsewhere).mean())
    return float(power(along, said[sure], window).mean()) / noise if noise > 0 else 0.0


def power(places: Read, values: Read, frequencies: Read) -> Read:
    """Lomb-Scargle: ½ of the squares of `values` that a wave of each frequency explains.

    `places` and `values` are (inputs); frequencies are in radians for a unit of place. A constant
    is fitted beside each wave.
    """
    centred = values - values.mean()
    found = []
    for at in range(0, len(frequencies), _AT_ONCE):
        phases = np.outer(frequencies[at : at + _AT_ONCE], places)
        cosine, sine = np.cos(phases), np.sin(phases)
        cosine -= cosine.mean(1, keepdims=True)
        sine -= sine.mean(1, keepdims=True)
        cc, ss, cs = (np.einsum("fi,fi->f", *each) for each in _pairs(cosine, sine))
        yc, ys = cosine @ centred, sine @ centred
        left = np.maximum(cc * ss - cs * cs, 1e-12)
        found.append((yc * yc * ss + ys * ys * cc - 2 * yc * ys * cs) / left / 2)
    return np.concatenate(found)


def _pairs(cosine: Read, sine: Read) -> tuple[tuple[Read, Read], ...]:
    return (cosine, cosine), (sine, sine), (cosine, sine)


COSINE = Answers("cosine", strength=0.05, kind="waves")
"""ε as in the paper; 16 waves of each class."""
