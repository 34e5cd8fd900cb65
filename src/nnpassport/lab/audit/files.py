"""An audit in a folder, and one attack with what it made."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnpassport.attacks.outcome import Attacked, Forged
from nnpassport.attacks.subject import Subject
from nnpassport.attacks.table import why_not
from nnpassport.embedding.checkpoint import save_model
from nnpassport.files.disk import write_atomically
from nnpassport.ground.progress import Listener
from nnpassport.keys.keyfile import save_key
from nnpassport.lab.audit.page import html
from nnpassport.lab.audit.run import attack_named, audit, before_attacks, measured
from nnpassport.scheme import BadRecipeError, UnwritableOutputError


def audit_to(
    folder: Path,
    subject: Subject,
    *,
    full: bool,
    only: Sequence[str] = (),
    resume: bool,
    show: Listener,
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
    attack = attack_named(name)
    if (reason := why_not(attack, subject)) is not None:
        raise BadRecipeError(f"attack {name} {reason}")
    if out is not None and os.path.lexists(out):
        raise UnwritableOutputError(f"{out} exists already; choose another name")
    before = before_attacks(subject)
    outcome = attack.run(subject, strength)
    if out is not None:
        _save(subject, outcome, out, other_task=attack.other_task)
    return {"before": before, **measured(subject, name, strength, outcome, before)}


def _save(subject: Subject, outcome: Attacked | Forged, out: Path, *, other_task: bool) -> None:
    config = replace(subject.config, metrics={}, notes={})
    if isinstance(outcome, Attacked):
        if other_task:
            classes = subject.other_task().train.classes
            arguments = {**config.arguments, "classes": len(classes)}
            config = replace(config, classes=classes, arguments=arguments)
        save_model(out, outcome.model, config)
        return
    save_key(outcome.key, out)
    same = subject.model.state_dict()
    theirs = outcome.model.state_dict()
    if any(not value.equal(same[name]) for name, value in theirs.items()):
        save_model(out.with_name(f"{out.name}.model"), outcome.model, config)
