"""What a way of reading counts, and the one place where counts become a verdict.

Whoever reads a suspect, as it stands, aligned, under other names, by its answers, gives `Counts`:
what matches, and by name every choice that there was. `verdict_on` makes the verdict of them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.files.arrays import Array
from nnpassport.keys.chance import LOG10_ALPHA_UNCOMMITTED, log10_binomial_tail
from nnpassport.keys.context import LayerShape
from nnpassport.keys.derive import log10_text_choices
from nnpassport.keys.key import Key
from nnpassport.scheme import MiscountedError, UnsuitableModelError, Verdict, check_counts

Read = NDArray[np.float64]
Weights = Mapping[str, Array]

_NONE: Mapping[str, Any] = MappingProxyType({})


class Counts(NamedTuple):
    """What a reader found.

    Attributes:
        what: which kind of bits these are, in words.
        layers: by layer, how many bits match and how many there are.
        chance: with which an independent network has one bit as the key has it, in [0, 1].
        choices: of how many counts these are the best.
        chosen: what these counts are of, in the plural.
        whose: said before all else, if it is not nothing.
        listed: whether the verdict has the counts of each layer.
        some: whether these are only some of the key's bits or labels: those that were answered.
        log10_tail: log₁₀ of the probability that an independent network matches as well, where the
            matches are no independent trials of one chance.
        found: what was counted, in words, where it is more than how many match.
        corrections: by the name of each choice that there was in reading, log₁₀ of the factor by
            which it multiplies the p-value.
        remarks: further sentences on how it was read.
        barred: whether these count for nothing; a remark says why.
        alignment: what was aligned, and how well, as `Verdict.alignment` has it.
        candidates: which tensors were read, as `Verdict.candidates` has it.
        digests: SHA-256 of every file that was read, by name.
    """

    what: str
    layers: Mapping[str, tuple[int, int]]
    chance: float = 0.5
    choices: int = 1
    chosen: str = "counts"
    whose: str = ""
    listed: bool = False
    some: bool = False
    log10_tail: float | None = None
    found: str = ""
    corrections: Mapping[str, float] = _NONE
    remarks: tuple[str, ...] = ()
    barred: bool = False
    alignment: Mapping[str, Any] | None = None
    candidates: Mapping[str, Any] | None = None
    digests: Mapping[str, str] = _NONE

    @property
    def matches(self) -> int:
        """How many bits match."""
        return sum(matches for matches, _ in self.layers.values())

    @property
    def bits(self) -> int:
        """Of how many."""
        return sum(bits for _, bits in self.layers.values())

    @property
    def tail(self) -> float:
        """log₁₀ of the probability that an independent network matches as well in this reading."""
        if self.log10_tail is not None:
            return self.log10_tail
        return log10_binomial_tail(self.matches, self.bits, self.chance)

    def paid(self, log10_choices: float, reason: str = "", *, of: str) -> "Counts":
        """The counts, of one of 10^`log10_choices` (from 0) readings that there could have been.

        `of` names what was chosen among, in the plural; `reason` is a remark on it.
        """
        corrections = {**self.corrections, of: self.corrections.get(of, 0.0) + log10_choices}
        paid = self._replace(corrections=corrections)
        return paid.remarked(reason) if reason else paid

    def remarked(self, *remarks: str) -> "Counts":
        """The counts with one more remark."""
        return self._replace(remarks=(*self.remarks, *remarks))


Reader = Callable[[Weights, Key], Counts]


def verdict_on(
    counts: Counts, key: Key, *, log10_alpha: float = LOG10_ALPHA_UNCOMMITTED
) -> Verdict:
    """The exact verdict on these counts.

    Derived bits are uniform and independent of any network that was not trained on them, so their
    matches are Binomial(n, ½) whatever the weights. A key whose passports or bits were chosen
    freely has no p-value, because a linear system finds passports for any bits.

    Raises:
        MiscountedError: more or fewer bits were compared than the key has, or more matched.
    """
    for matches, bits in counts.layers.values():
        check_counts(matches, bits)
    bits, matches = counts.bits, counts.matches
    if bits != key.context.bits and not counts.some:
        raise MiscountedError(
            f"V compared {bits} bits of a key that has {key.context.bits}; needed: each of them, "
            "once; draw a key for this network"
        )
    whose = f"{counts.whose}: " if counts.whose else ""
    verdict = Verdict(
        scheme=key.context.scheme,
        bits=bits,
        matches=matches,
        log10_tail=counts.tail if key.derived else None,
        log10_alpha=log10_alpha,
        found=counts.found or f"{whose}{matches} of {bits} {counts.what} match",
        remarks=counts.remarks,
        barred=counts.barred,
        alignment=counts.alignment,
        layers=dict(counts.layers) if counts.listed else {},
        digests=dict(counts.digests),
        chance=counts.chance if counts.some else None,
        candidates=counts.candidates,
    ).paid(math.log10(counts.choices), of=counts.chosen)
    if key.text is not None and key.derived:
        # A text that nobody has committed to is the claimant's choice among all of its length.
        verdict = verdict.paid(log10_text_choices(key.text), of="texts")
    for name, log10_choices in counts.corrections.items():
        verdict = verdict.paid(log10_choices, of=name)
    return verdict


@final
@dataclass(frozen=True, slots=True)
class Reading:
    """How one key is read off arrays under its names, and what the counts are worth.

    Attributes:
        key: whose bits these are.
        read: what counts them.
        log10_alpha: threshold on log₁₀ p.
    """

    key: Key
    read: Callable[[Weights], Counts]
    log10_alpha: float = LOG10_ALPHA_UNCOMMITTED

    @classmethod
    def by(
        cls, reader: Reader, key: Key, *, log10_alpha: float = LOG10_ALPHA_UNCOMMITTED
    ) -> "Reading":
        """Of this key, with a reader of its scheme."""
        return cls(key, lambda weights: reader(weights, key), log10_alpha)

    def __call__(self, weights: Weights) -> Counts:
        """What these arrays have of the bits."""
        return self.read(weights)

    def through(self, changed: Callable[[Weights], Weights]) -> "Reading":
        """The same, of arrays that are changed so before they are read."""
        return replace(self, read=lambda weights: self.read(changed(weights)))

    def verdict(self, counts: Counts) -> Verdict:
        """What the counts come to."""
        return verdict_on(counts, self.key, log10_alpha=self.log10_alpha)

    def marked(self, counts: Counts) -> bool:
        """Whether that is the mark."""
        return self.verdict(counts).marked

    def log10_p(self, counts: Counts) -> float:
        """log₁₀ of their p-value; 0 where there is none."""
        return self.verdict(counts).log10_p_value or 0.0


def as_published(verdict: Verdict, *, threshold: float) -> Verdict:
    """The verdict by a rule of the kind that papers state: enough of the mark is there.

    `threshold` is the share of it, in [0, 1], that suffices. It says nothing of chance or of forged
    keys; the exact verdict does.
    """
    needed = math.ceil(threshold * verdict.bits - 1e-9)
    return verdict.by_rule(needed)


def matching(read: Any, signs: Any) -> int:
    """How many bits were read as the key has them, each compared with one reading of its own.

    Both are arrays, or both tensors.

    Raises:
        UnsuitableModelError: there is not one reading for each bit. Comparing them all the same
            would let one bit of the key decide over several readings.
    """
    if tuple(read.shape) != tuple(signs.shape) or len(read.shape) != 1:
        raise UnsuitableModelError(
            f"V reads {tuple(read.shape)} where the key has {tuple(signs.shape)} bits; needed: one "
            "reading for each bit; draw a key for this network"
        )
    return int((read == signs).sum())


def counted(what: str, key: Key, layer: LayerShape, read: Read) -> Counts:
    """The bits of a key's one layer, each the sign of a number that was read.

    A number of exactly zero matches neither bit.

    Raises:
        UnsuitableModelError: there is not one number for each bit.
    """
    matches = matching(np.sign(read), key.signs_array(layer.name))
    return Counts(what, {layer.name: (matches, layer.length)})
