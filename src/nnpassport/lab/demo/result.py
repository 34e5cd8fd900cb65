"""What the demo found, and how to say it: one sentence, or a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, final

from nnpassport.lab.demo.copied import Copied
from nnpassport.report.page import percent, small, unbroken
from nnpassport.scheme import Fidelity, Verdict

OWNER = "Alice"


@final
@dataclass(frozen=True, slots=True)
class DemoResult:
    """All that the demo found. No secret is in it; accuracies are in [0, 1], on the test images.

    Attributes:
        fingerprint: SHA-256 that commits to the owner's key.
        test_images: how many images every accuracy was measured on.
        chance: accuracy of a guess.
        plain_accuracy: of the unrelated network, trained alike without a mark.
        public_accuracy: of the marked network without its passport, as it is released.
        owner: the owner's key against the released network, with the accuracy of her passport.
        unrelated: the owner's key against the unrelated network.
        random_keys: a rival's random keys against the released network, bits only.
        forged_accuracies: of the released network with the passports of those keys.
        copied: what a network answers that was trained on another's answers alone.
        seconds: wall time by stage.
        provenance: commit, versions and device.
    """

    seed: int
    fingerprint: str
    test_images: int
    chance: float
    plain_accuracy: float
    public_accuracy: float
    owner: Verdict
    unrelated: Verdict
    random_keys: tuple[Verdict, ...]
    forged_accuracies: tuple[float, ...]
    copied: Copied
    seconds: Mapping[str, float]
    provenance: Mapping[str, Any]

    @property
    def private(self) -> Fidelity:
        """Accuracy of the released network with the owner's passport, and what she declared."""
        if self.owner.fidelity is None:
            raise ValueError("the owner's verdict has no fidelity; needed: one that was measured")
        return self.owner.fidelity

    @property
    def random_accepted(self) -> int:
        """How many random keys were accepted; there should be none."""
        return sum(verdict.accepted for verdict in self.random_keys)

    @property
    def forged_passed(self) -> int:
        """How many forged passports reach the accuracy that F asks of the owner's."""
        target, tolerance = self.private.target, self.private.tolerance
        return sum(Fidelity(a, target, tolerance).passed for a in self.forged_accuracies)

    @property
    def as_expected(self) -> bool:
        """Whether the owner was accepted, and nobody and nothing else."""
        return self.owner.accepted and not self.unrelated.accepted and not self.random_accepted

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "as_expected": self.as_expected,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "test_images": self.test_images,
            "chance": self.chance,
            "plain_accuracy": self.plain_accuracy,
            "public_accuracy": self.public_accuracy,
            "private_accuracy": self.private.accuracy,
            "owner": self.owner.as_dict(),
            "unrelated": self.unrelated.as_dict(),
            "random_keys": {
                "count": len(self.random_keys),
                "accepted": self.random_accepted,
                "match_rates": [verdict.match_rate for verdict in self.random_keys],
                "log10_p_values": [verdict.log10_p_value for verdict in self.random_keys],
            },
            "forged_passports": {
                "count": len(self.forged_accuracies),
                "passed_fidelity": self.forged_passed,
                "mean_accuracy": fmean(self.forged_accuracies),
                "best_accuracy": max(self.forged_accuracies),
                "accuracies": list(self.forged_accuracies),
            },
            "copied": {
                name: each.as_dict() if isinstance(each, Verdict) else each
                for name, each in self.copied._asdict().items()
            },
            "seconds": dict(self.seconds),
            "provenance": dict(self.provenance),
        }


def ruling(result: DemoResult) -> str:
    """What came out, in one sentence."""
    owner = result.owner
    if not result.as_expected:
        return (
            f"This run did not go as it should: {OWNER}'s claim to the released network was "
            f"{word(owner)}, to the unrelated one {word(result.unrelated)}, and "
            f"{result.random_accepted} of {len(result.random_keys)} random keys were accepted."
        )
    return (
        f"Accepted: the released network is {OWNER}'s. {owner.matches} of her {owner.bits} secret "
        f"bits are in it; by chance that happens with probability {small(log10_p(owner))}."
    )


def table(result: DemoResult) -> list[tuple[str, str, str]]:
    """The numbers as rows: what, result, meaning."""
    owner, private, forged = result.owner, result.private, result.forged_accuracies
    tries, best = result.random_keys, min(result.random_keys, key=log10_p)
    threshold = unbroken(f"p ≤ {small(owner.log10_alpha)}")
    return [
        (
            "Plain network",
            percent(result.plain_accuracy),
            f"unmarked, to compare with; one of the {result.test_images} test images is "
            f"{100 / result.test_images:.1f} points",
        ),
        (
            "Marked network, passport absent",
            percent(result.public_accuracy),
            f"what users get; {_difference(result.public_accuracy, result.plain_accuracy)} plain",
        ),
        (
            f"{OWNER}'s passport presented",
            percent(private.accuracy),
            f"the genuine one {'works' if private.passed else 'fails'}: "
            f"{percent(private.target)} was declared, and {100 * private.tolerance:.0f} points "
            "less would do",
        ),
        (
            f"{len(forged)} random passports presented",
            f"{percent(fmean(forged))} on average, {percent(max(forged))} at best",
            f"chance is {percent(result.chance, 0)}; {result.forged_passed} of these guesses reach "
            "what was declared",
        ),
        (
            f"{OWNER}'s key, released network",
            outcome(owner),
            f"the mark is {'' if owner.marked else 'not '}there; the threshold is {threshold}",
        ),
        (
            f"{len(tries)} random keys, released network",
            f"{result.random_accepted} accepted",
            f"{percent(fmean(each.match_rate for each in tries))} of the bits match on average, "
            f"{percent(best.match_rate)} at best ({p_value(best)}): coin flips",
        ),
        (
            f"{OWNER}'s key, unrelated network",
            outcome(result.unrelated),
            "a network that was never marked is "
            f"{'' if result.unrelated.accepted else 'not '}claimed by mistake",
        ),
        _copied(result.copied),
    ]


def _copied(found: Copied) -> tuple[str, str, str]:
    return (
        "A copy trained on answers alone, asked digits",
        f"{p_value(found.by_copy)}",
        f"another network and architecture, {percent(found.copy)} right; its scores of the "
        f"{found.asked} test images lean as {OWNER} signed. Her own small network has "
        f"{p_value(found.by_network)} at {percent(found.marked)}, before the mark "
        f"{percent(found.plain)}; a stranger's has {p_value(found.by_stranger)}",
    )


def _difference(reached: float, other: float) -> str:
    if reached == other:
        return "just as accurate as"
    return f"{100 * abs(reached - other):.1f} points {'below' if reached < other else 'above'}"


def outcome(verdict: Verdict) -> str:
    """A verdict in a few words."""
    return f"{word(verdict)}: {verdict.matches} of {verdict.bits} bits, {p_value(verdict)}"


def p_value(verdict: Verdict) -> str:
    """The p-value as "p = 0.81", in one piece wherever lines break."""
    return unbroken(f"p = {small(log10_p(verdict))}")


def word(verdict: Verdict) -> str:
    """A verdict in one."""
    return "accepted" if verdict.accepted else "refused"


def log10_p(verdict: Verdict) -> float:
    """log₁₀ of the p-value; 0 where there is none, which no derived key's verdict is."""
    return 0.0 if verdict.log10_p_value is None else verdict.log10_p_value
