"""Attack a network with all that is known, and say what is left of the mark and who can forge it.

`audit` runs attacks and measures; `html` makes the page of its report.
"""

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
