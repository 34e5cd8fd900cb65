"""An audit in a folder, and one attack with what it made."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnpassport.attacks.outcome import Attacked, Forged
from nnpassport.audit.page import html
from nnpassport.audit.run import Show, attack_named, audit, before_attacks, measured
from nnpassport.audit.subject import Subject
from nnpassport.checkpoint import save_model
from nnpassport.evidence.keyfile import save_key
from nnpassport.files import write_atomically


def audit_to(
    folder: Path,
    subject: Subject,
    *,
    full: bool,
    only: Sequence[str] = (),
    resume: bool,
    show: Show,
) -> dict[str, Any]:
    """Audit `subject` into `folder`: audit.json, written after every attack, and audit.html."""
    path = folder / "audit.json"
    report = audit(subject, path, full=full, only=only, resume=resume, show=show)
    write_atomically(folder / "audit.html", html(report).encode())
    return report


def attack_once(subject: Subject, name: str, strength: float, out: Path | None) -> dict[str, Any]:
    """Carry out one attack, write what it made to `out`, and say what came of it.

    A removal writes a model folder. A forger writes a key file, and where he had to change the
    network, that too, in the folder `out` with ".model" after it.

    Raises:
        OwnershipError: the attack cannot be carried out on this subject; the message says why.
    """
    outcome = attack_named(name).run(subject, strength)
    if out is not None:
        _save(subject, outcome, out)
    before = before_attacks(subject)
    return {"before": before, **measured(subject, name, strength, outcome, before)}


def _save(subject: Subject, outcome: Attacked | Forged, out: Path) -> None:
    if isinstance(outcome, Attacked):
        save_model(out, outcome.model, subject.config)
        return
    save_key(outcome.key, out)
    same = subject.model.state_dict()
    theirs = outcome.model.state_dict()
    if any(not value.equal(same[name]) for name, value in theirs.items()):
        save_model(out.with_name(f"{out.name}.model"), outcome.model, subject.config)
