"""V and F on files from anybody, over a network on services, and between rivals."""

from typing import TYPE_CHECKING

from nnpassport.ground.lazy import lazily

if TYPE_CHECKING:
    from nnpassport.verification.verdicts import (
        Alignment,
        Options,
        Trial,
        declared_trial,
        under_claim,
        verify,
        verify_as_published,
    )

__all__ = [
    "Alignment",
    "Options",
    "Trial",
    "declared_trial",
    "under_claim",
    "verify",
    "verify_as_published",
]

if not TYPE_CHECKING:  # for mypy all names are those above, and no others
    __getattr__, __dir__ = lazily(
        __name__, dict.fromkeys(__all__, "nnpassport.verification.verdicts")
    )
