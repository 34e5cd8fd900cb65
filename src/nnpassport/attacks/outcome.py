"""What an attack returns, and what it cost the attacker."""

import time
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from nnpassport.keys.key import Key


class Cost(NamedTuple):
    """What the attacker had and spent.

    Attributes:
        had: in the letters of the paper's Table 3: W the released weights, D training data, P the
            genuine passports, S the genuine signature; Q only answers to queries; B the public
            network that this one was made from.
        seconds: wall time of the attack.
        samples: distinct images it was given, labelled or not.
        epochs: passes over them, or over whatever it optimises.
    """

    had: str
    seconds: float
    samples: int = 0
    epochs: int = 0


class Attacked(NamedTuple):
    """Outcome of a removal attack: a changed copy; the network that was given is untouched."""

    model: nn.Module
    cost: Cost


class Forged(NamedTuple):
    """Outcome of an ambiguity attack: a key, and the network that its forger shows with it.

    Attributes:
        model: a copy of the network that was given; where the attack says so, with other running
            statistics, or other weights that compute the same.
        key: what he presents as his secret.
    """

    model: nn.Module
    key: Key
    cost: Cost


def stopwatch(had: str) -> Callable[..., Cost]:
    """Start a clock; calling what is returned, with `samples` and `epochs`, stops it."""
    started = time.monotonic()

    def stop(samples: int = 0, epochs: int = 0) -> Cost:
        return Cost(had, time.monotonic() - started, samples, epochs)

    return stop
