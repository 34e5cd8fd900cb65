"""What a claim is worth against one suspect: whether it holds, and which threshold its age allows.

A claimant who has seen the suspect can draw keys until one fits it by chance. So the threshold that
a claim declares counts only if the claim is proved to be older than the suspect; otherwise it is
2⁻¹⁰⁰, which no search reaches.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from nnpassport.claims.claim import Claim, Finding, check_claim
from nnpassport.claims.claimfile import SignedClaim
from nnpassport.claims.timestamp import Timestamp
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED, LOG10_ALPHA_UNCOMMITTED
from nnpassport.keys.key import Key


class Standing(NamedTuple):
    """A claim that was checked, and what follows for a verdict.

    Attributes:
        finding: whether signature, timestamp and key hold, and why.
        log10_alpha: the threshold on p that the claim may be judged by.
        older: whether it is proved to be older than the suspect: the last moment at which its
            token may have been made is before the suspect was there.
        age: what is known of its age, and what follows, in words.
    """

    finding: Finding
    log10_alpha: float
    older: bool
    age: str

    @property
    def claim(self) -> Claim | None:
        """What was committed to, if it may be believed."""
        return self.finding.claim

    @property
    def time(self) -> datetime | None:
        """When a timestamp authority saw the claim, or None."""
        return None if self.finding.timestamp is None else self.finding.timestamp.time

    @property
    def timestamp(self) -> Timestamp | None:
        """The authority's token, with the moments between which it was made."""
        return self.finding.timestamp

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            **self.finding.as_dict(),
            "log10_alpha": self.log10_alpha,
            "older_than_the_suspect": self.older,
            "age": self.age,
        }


def standing_of(
    signed: SignedClaim,
    owner: Ed25519PublicKey,
    key: Key,
    *,
    roots: Sequence[x509.Certificate] = (),
    appeared: datetime | None = None,
) -> Standing:
    """Check a claim and its disclosed key; a timestamp counts only if `roots` vouch for it.

    One that they do not vouch for, or that is of something else, leaves the claim undated: anybody
    can take a token off a claim, so refusing would only hurt who did not.

    `appeared` is when the suspect is known to have been there first, by whoever judges.

    Raises:
        UnreadableClaimError: its owner signed what is not a claim of this version.
    """
    finding = check_claim(signed.undated(), owner, key=key)
    undated = None
    if signed.responses and finding.holds:
        dated = check_claim(signed, owner, roots=roots, key=key) if roots else None
        if dated is not None and dated.holds:
            finding = dated
        else:
            why = "no root certificate was given for it" if dated is None else dated.reason
            undated = f"the claim's timestamp proves nothing: {why}"
    age, older = (undated, False) if undated is not None else _age(finding, appeared)
    declared = LOG10_ALPHA_COMMITTED
    if finding.claim is not None:  # a claimant may declare a stricter threshold, never a laxer one
        declared = min(declared, float(finding.claim.log10_alpha))
    alpha = declared if older else min(declared, LOG10_ALPHA_UNCOMMITTED)
    return Standing(finding, alpha, older, f"{age}: α = 10^{alpha:.1f}")


def _age(finding: Finding, appeared: datetime | None) -> tuple[str, bool]:
    if finding.timestamp is None:
        return "nothing proves how old the claim is", False
    latest = finding.timestamp.latest
    proved = f"the claim is proved to be from {_said(latest)} or before"
    if appeared is None:
        return f"{proved}; when the suspect appeared was not said", False
    if latest < appeared:
        return f"{proved}, older than the suspect ({_said(appeared)})", True
    return f"{proved}, but the suspect was there on {_said(appeared)}", False


def _said(time: datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")
