"""V = (E, F, V, I): what an ownership scheme is, what it answers, and how it fails.

Read this file first and `catalog.py` second; together they are the whole package in outline.

Errors, all of them reasons why something *could not be checked* (exit code 2 on the command line).
A claim that was checked and does not hold is a `Verdict`, never an exception:

    OwnershipError (ValueError)
    ├── UnsuitableModelError     the network or the named layer cannot carry this scheme
    ├── FoldedNormsError         norms are folded into layers, so no mark can be read there
    ├── HarmfulGraftError        marking a trained network would have changed its answers too much
    ├── UnreadableModelError     a model file is missing, corrupt, hostile or of another shape
    ├── UnreadableKeyError       a key file is missing, corrupt, locked or made for something else
    ├── UnreadableClaimError     a claim file is missing, corrupt or not in its one form
    ├── NoTimestampError         an authority gave no token, or there is no root to check one
    ├── UnreadableDataError      images or labels are missing, corrupt or of the wrong kind
    ├── BadSignatureError        a signature text or a digital signature that cannot be used
    ├── BadRecipeError           a training or a probe was asked to do the impossible
    ├── LostProcessError         another process of a distributed training is gone
    ├── UnreachableServiceError  a service does not answer, or too seldom to tell anything
    ├── MiscountedError          a scheme counted wrongly: more matches than bits, say
    └── UnwritableOutputError    a result could not be saved; what was there before is untouched
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any, NamedTuple, final

_LONGEST_MESSAGE = 4_000  # characters


class OwnershipError(ValueError):
    """Ownership could not be embedded, read or checked; the message says what would work.

    Messages quote files that may be hostile. So quotes are kept short, and control characters are
    spelled out.
    """

    def __init__(self, message: str = "") -> None:
        whole = message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}…"
        super().__init__(spelled(whole))


def spelled(text: str) -> str:
    """A stranger's text to be shown: what is not to be seen in it, or turns it round, is spelled.

    Control characters and marks of direction become their number, as in ``ascii``.
    """
    return "".join(map(_spelled, text))


def _spelled(letter: str) -> str:
    kept = letter.isprintable() or letter in "\n\t\N{NO-BREAK SPACE}"
    return letter if kept else ascii(letter)[1:-1]


class UnsuitableModelError(OwnershipError):
    """The network, or a layer named in it, cannot carry this scheme."""


class OtherAnchorError(UnsuitableModelError):
    """The network given for alignment is not the one to which the key is bound."""


class FoldedNormsError(OwnershipError):
    """Norms are folded into the layers that carry the mark, so it cannot be read there."""


class HarmfulGraftError(OwnershipError):
    """A graft would have changed the network's answers by more than was allowed."""


class UnreadableModelError(OwnershipError):
    """A model file is missing, corrupt, hostile or of another architecture."""


class UnreadableKeyError(OwnershipError):
    """A key file is missing, corrupt, locked or made for another model."""


class UnreadableClaimError(OwnershipError):
    """A claim file is missing, corrupt or not in canonical form."""


class NoTimestampError(OwnershipError):
    """A timestamp authority gave no usable token, or no root was given to check one against."""


class UnreadableDataError(OwnershipError):
    """Images or labels are missing, corrupt or of the wrong kind."""


class BadSignatureError(OwnershipError):
    """A signature text does not fit, or a digital signature does not hold."""


class BadRecipeError(OwnershipError):
    """A training recipe, or the terms of a probe, cannot be carried out."""


class LostProcessError(OwnershipError):
    """Another process of a distributed training is gone."""


class UnreachableServiceError(OwnershipError):
    """A service gives no usable answers, or too few of them to tell anything."""


class MiscountedError(OwnershipError):
    """Matches, or trials, that no reading can give; the scheme that counted them is at fault."""


class UnwritableOutputError(OwnershipError):
    """A result could not be saved; files that existed before are as they were."""


class UnmarkedWarning(UserWarning):
    """A network is released that does not carry the mark."""


@final
@dataclass(frozen=True, slots=True)
class Part:
    """Which of several equal parts of a step's images this is: the whole, unless processes share.

    Attributes:
        index: from 0 to below `of`.
        of: how many parts there are.
    """

    index: int = 0
    of: int = 1


WHOLE = Part()


class Batch(NamedTuple):
    """Normalised images (batch channel height width), class indices, and the number of the step.

    In a loop of the caller's own `images` is whatever the network takes, named or positional, and
    `labels` whatever its loss takes. `part` says which part of the step's images these are, where
    several processes train together.
    """

    images: Any
    labels: Any
    step: int = 0
    part: Part = WHOLE


@final
@dataclass(frozen=True, slots=True)
class Fidelity:
    """Outcome of F: is the accuracy within `tolerance` of `target`?   [Fan19, def. 1.II]

    All three are in [0, 1].
    """

    accuracy: float
    target: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """|M − M_t| ≤ ε_f; doing better than the target is no failure."""
        return self.accuracy >= self.target - self.tolerance


def check_counts(matches: int, trials: int) -> None:
    """Refuse counts that no reading gives.

    Raises:
        MiscountedError: not whole numbers, or not 0 to `trials` matches.
    """
    whole = type(matches) is int and type(trials) is int
    if not whole or not 0 <= matches <= trials:
        raise MiscountedError(
            f"got {matches!r:.40} matches in {trials!r:.40} trials; needed: whole numbers, and no "
            "more matches than trials: each bit of the key is compared once, with one reading"
        )


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of V on one suspect with one key.

    It holds the counts, and every choice for which the p-value is corrected. The p-value, the
    decision and the words follow from these, here and nowhere else.

    Raises:
        MiscountedError: no reading can give these counts.

    Attributes:
        bits: how many committed bits (or trigger labels) there are.
        matches: how many of them were read as committed.
        log10_tail: log₁₀ of the probability that an independent network matches as well, in one
            reading that was settled beforehand. None if there is no such probability.
        log10_alpha: log₁₀ of the declared threshold α; the mark counts if p ≤ α.
        found: what was counted, in words: the beginning of `reason`.
        corrections: by the name of each choice, log₁₀ of the factor by which it multiplies the
            p-value.
        remarks: further sentences, in order: the rest of `reason`.
        barred: whether the mark counts for nothing despite its p-value; a remark says why.
        needed: how many matches a published rule takes; such a rule has no p-value.
        fidelity: outcome of F, or None where no data were given.
        alignment: what alignment did to the suspect before it was read, or None.
        claim: the claim under which the verdict was given, and whether it holds, or None.
        digests: SHA-256 of every file that was read, by name.
        candidates: which tensors were read, which could have been, and what that choice costs; None
            if there was no choice.
        chance: probability in [0, 1] that an independent network answers one trigger as labelled;
            None if V does not give one.
    """

    scheme: str
    bits: int
    matches: int
    log10_tail: float | None
    log10_alpha: float
    found: str = ""
    _: KW_ONLY
    corrections: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    barred: bool = False
    needed: int | None = None
    fidelity: Fidelity | None = None
    alignment: Mapping[str, Any] | None = None
    claim: Mapping[str, Any] | None = None
    layers: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    chance: float | None = None
    candidates: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for matches, trials in ((self.matches, self.bits), *self.layers.values()):
            check_counts(matches, trials)

    @property
    def accepted(self) -> bool:
        """Whether the ownership claim holds: the mark is there, and F has not failed."""
        return self.marked and (self.fidelity is None or self.fidelity.passed)

    @property
    def marked(self) -> bool:
        """Whether the mark is there, by the p-value or by a published rule."""
        if self.barred:
            return False
        if self.needed is not None:
            return self.matches >= self.needed
        p = self.log10_p_value
        return p is not None and p <= self.log10_alpha

    @property
    def log10_p_value(self) -> float | None:
        """log₁₀ of the probability that an independent network matches as well, at most 0.

        Corrected for every choice that there was. None if there is no p-value: `reason` says why.
        """
        if self.log10_tail is None or self.needed is not None:
            return None
        return min(0.0, sum(self.corrections.values(), self.log10_tail))

    @property
    def p_value(self) -> float | None:
        """The p-value itself; 0.0 where it is below what a float can hold (see `log10_p_value`)."""
        return None if self.log10_p_value is None else math.pow(10.0, self.log10_p_value)

    @property
    def match_rate(self) -> float:
        """Fraction of the bits that were read as committed, in [0, 1]."""
        return self.matches / self.bits

    @property
    def reason(self) -> str:
        """The verdict in words: what was counted, what that is worth, and all remarks."""
        return "; ".join([self._worth(), *self.remarks])

    def _worth(self) -> str:
        if self.needed is not None:
            return (
                f"{self.matches} of {self.bits} match; the published rule needs {self.needed} of "
                "them and knows no p-value"
            )
        p = self.log10_p_value
        if p is None:
            return (
                f"{self.found}, but parts of the key were chosen and not derived from a seed, "
                "so they have no p-value: anybody can solve for such a key"
            )
        several = [
            f"{_count(number)} {name}" for name, number in self.corrections.items() if number > 0.1
        ]
        paid = f" (for {' and '.join(several)})" if several else ""
        relation = "at or below" if p <= self.log10_alpha else "above"
        return f"{self.found}; p = 10^{p:.1f}{paid} is {relation} α = 10^{self.log10_alpha:.1f}"

    def paid(self, log10_choices: float, reason: str = "", *, of: str = "choices") -> "Verdict":
        """The verdict, corrected for a choice among 10^`log10_choices` (from 0) possible readings.

        `of` names what was chosen among, in the plural; `reason` is a remark on it.
        """
        corrections = dict(self.corrections)
        if log10_choices:
            corrections[of] = corrections.get(of, 0.0) + log10_choices
        paid = replace(self, corrections=corrections)
        return paid.remarked(reason) if reason else paid

    def remarked(self, *remarks: str) -> "Verdict":
        """The verdict with one more remark."""
        return replace(self, remarks=(*self.remarks, *remarks))

    def beside(
        self,
        *,
        digests: Mapping[str, str] | None = None,
        fidelity: Fidelity | None = None,
        claim: Mapping[str, Any] | None = None,
        barred: bool = False,
    ) -> "Verdict":
        """The verdict beside what was found out without the bits: F, files, and the claim.

        `digests` are added to those that it has. Nothing lifts a bar.
        """
        return replace(
            self,
            digests={**self.digests, **(digests or {})},
            fidelity=fidelity or self.fidelity,
            claim=claim or self.claim,
            barred=barred or self.barred,
        )

    def by_rule(self, needed: int) -> "Verdict":
        """By a published rule, which knows no p-value, for which so many matches are enough."""
        return replace(self, needed=needed, barred=False, remarks=())

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, including what follows from the counts."""
        fidelity = None
        if self.fidelity is not None:
            fidelity = {**asdict(self.fidelity), "passed": self.fidelity.passed}
        kept = ("alignment", "claim", "layers", "digests", "chance", "candidates", "corrections")
        return {
            "accepted": self.accepted,
            "scheme": self.scheme,
            "bits": self.bits,
            "matches": self.matches,
            "log10_p_value": self.log10_p_value,
            "log10_alpha": self.log10_alpha,
            "reason": self.reason,
            "marked": self.marked,
            "fidelity": fidelity,
            **{name: deepcopy(getattr(self, name)) for name in kept},
            "match_rate": self.match_rate,
            "p_value": self.p_value,
            "alpha": math.pow(10.0, self.log10_alpha),
        }


def _count(log10: float) -> str:
    return f"{10**log10:.0f}" if log10 < 4 else f"10^{log10:.1f}"
