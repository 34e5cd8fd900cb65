"""A claim as an in-toto statement, for tools that know these: the same claim, of these files.

    {"_type": ".../Statement/v1", "subject": [{"name", "digest": {"sha256"}}, …],
     "predicateType": PREDICATE_TYPE, "predicate": the claim's own object}

[in-toto attestation framework, Statement v1]. It goes into the DSSE envelope under in-toto's type,
where a claim of version 1 goes under ours: the type is signed, so neither passes for the other.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from nnpassport.claims.claimfile import canonical_object
from nnpassport.keys.context import canonical_json
from nnpassport.scheme import UnreadableClaimError

STATEMENT_TYPE = "application/vnd.in-toto+json"
PREDICATE_TYPE = "https://nnpassport.example/attestation/claim/v1"
_STATEMENT = "https://in-toto.io/Statement/v1"
_DIGEST = re.compile("[0-9a-f]{64}")
_MOST_SUBJECTS = 4_096
_LONGEST_NAME = 1_000


class Statement(NamedTuple):
    """What a statement says.

    Attributes:
        claim: the claim's encoding, not yet parsed.
        subject: SHA-256 (hex) of the files of the network that it commits to, by name.
    """

    claim: bytes
    subject: Mapping[str, str]


def stated(claim: bytes, subject: Mapping[str, str]) -> bytes:
    """The one encoding of a statement: that of a claim.

    Raises:
        UnreadableClaimError: there is no file, or a name or digest is none.
    """
    _check(subject)
    return canonical_json(
        {
            "_type": _STATEMENT,
            "subject": [
                {"name": name, "digest": {"sha256": digest}}
                for name, digest in sorted(subject.items())
            ],
            "predicateType": PREDICATE_TYPE,
            "predicate": canonical_object(claim, "claim"),
        }
    )


def statement_in(payload: bytes) -> Statement:
    """The statement that `stated` made these bytes of.

    Raises:
        UnreadableClaimError: they are anything else.
    """
    document = canonical_object(payload, "statement")
    try:
        files: list[Any] = document["subject"]
        found = Statement(
            canonical_json(document["predicate"]),
            {each["name"]: each["digest"]["sha256"] for each in files},
        )
        known = isinstance(document["predicate"], dict)
        known = known and stated(found.claim, found.subject) == payload
    except UnreadableClaimError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        known = False
    if not known:
        raise UnreadableClaimError(
            f"the statement is not an in-toto Statement v1 of the predicate {PREDICATE_TYPE}, with "
            "files and their SHA-256 in the order of names; use the original file of `claim new "
            "--in-toto`"
        )
    return found


def _check(subject: Mapping[str, str]) -> None:
    named = all(
        isinstance(name, str) and name.isprintable() and 1 <= len(name) <= _LONGEST_NAME
        for name in subject
    )
    hashed = all(isinstance(d, str) and _DIGEST.fullmatch(d) for d in subject.values())
    if not (named and hashed and 1 <= len(subject) <= _MOST_SUBJECTS):
        raise UnreadableClaimError(
            f"a statement is about {len(subject)} files, and needed are 1 to {_MOST_SUBJECTS} with "
            "printable names, each with its SHA-256; give the released folder (--reference)"
        )
