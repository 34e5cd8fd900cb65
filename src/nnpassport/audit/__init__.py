"""Attack a network with all that is known, and say what is left of the mark and who can forge it.

`audit` runs attacks and measures; `html` makes the page of its report.
"""

from typing import TYPE_CHECKING

from nnpassport.lazy import lazily

if TYPE_CHECKING:
    from nnpassport.audit.files import attack_once, audit_to
    from nnpassport.audit.page import html, ruling, words
    from nnpassport.audit.run import attack_named, attempt, audit, before_attacks, plan
    from nnpassport.audit.subject import Budget, Subject, Transfer
    from nnpassport.audit.table import ATTACKS, Attack, Family

__all__ = [
    "ATTACKS",
    "Attack",
    "Budget",
    "Family",
    "Subject",
    "Transfer",
    "attack_named",
    "attack_once",
    "attempt",
    "audit",
    "audit_to",
    "before_attacks",
    "html",
    "plan",
    "ruling",
    "words",
]

_HOMES = {
    "attack_once": "nnpassport.audit.files",
    "audit_to": "nnpassport.audit.files",
    "html": "nnpassport.audit.page",
    "ruling": "nnpassport.audit.page",
    "words": "nnpassport.audit.page",
    "attack_named": "nnpassport.audit.run",
    "attempt": "nnpassport.audit.run",
    "audit": "nnpassport.audit.run",
    "before_attacks": "nnpassport.audit.run",
    "plan": "nnpassport.audit.run",
    "Budget": "nnpassport.audit.subject",
    "Subject": "nnpassport.audit.subject",
    "Transfer": "nnpassport.audit.subject",
    "ATTACKS": "nnpassport.audit.table",
    "Attack": "nnpassport.audit.table",
    "Family": "nnpassport.audit.table",
}

if not TYPE_CHECKING:  # for mypy all names are those above, and no others
    __getattr__, __dir__ = lazily(__name__, _HOMES)
