"""Attack a network with all that is known, and say what is left of the mark and who can forge it.

`audit` runs attacks and measures; `html` makes the page of its report.
"""

from typing import TYPE_CHECKING

from nnpassport.ground.lazy import lazily

if TYPE_CHECKING:
    from nnpassport.attacks.subject import Budget, Subject, Transfer
    from nnpassport.attacks.table import ATTACKS, Attack, Family
    from nnpassport.lab.audit.files import attack_once, audit_to
    from nnpassport.lab.audit.page import html, ruling, survival, words
    from nnpassport.lab.audit.run import attack_named, attempt, audit, before_attacks, plan

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
    "survival",
    "words",
]

_HOMES = {
    "attack_once": "nnpassport.lab.audit.files",
    "audit_to": "nnpassport.lab.audit.files",
    "html": "nnpassport.lab.audit.page",
    "ruling": "nnpassport.lab.audit.page",
    "survival": "nnpassport.lab.audit.page",
    "words": "nnpassport.lab.audit.page",
    "attack_named": "nnpassport.lab.audit.run",
    "attempt": "nnpassport.lab.audit.run",
    "audit": "nnpassport.lab.audit.run",
    "before_attacks": "nnpassport.lab.audit.run",
    "plan": "nnpassport.lab.audit.run",
    "Budget": "nnpassport.attacks.subject",
    "Subject": "nnpassport.attacks.subject",
    "Transfer": "nnpassport.attacks.subject",
    "ATTACKS": "nnpassport.attacks.table",
    "Attack": "nnpassport.attacks.table",
    "Family": "nnpassport.attacks.table",
}

if not TYPE_CHECKING:  # for mypy all names are those above, and no others
    __getattr__, __dir__ = lazily(__name__, _HOMES)
