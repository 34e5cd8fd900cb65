"""Run attacks, measure what they leave and what they win, and keep it so that an audit goes on."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnpassport.attacks.outcome import Attacked, Forged
from nnpassport.attacks.removal import with_head
from nnpassport.attacks.subject import Subject
from nnpassport.attacks.table import ATTACKS, Attack, Family, applies, why_not
from nnpassport.embedding.axes import noise_for
from nnpassport.embedding.measured import verify_aligned, verify_model
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.files.config import other_classes
from nnpassport.ground.progress import Listener
from nnpassport.keys.key import Key
from nnpassport.lab.marks import facts_of, readings
from nnpassport.lab.named import named
from nnpassport.lab.results import write_json
from nnpassport.report.provenance import provenance
from nnpassport.scheme import (
    BadRecipeError,
    OwnershipError,
    UnreadableDataError,
    UnreadableModelError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification.verdicts import TOLERANCE

FORMAT = "nnpassport-audit"
VERSION = 1


def plan(
    subject: Subject, *, full: bool, only: Sequence[str] = ()
) -> tuple[list[tuple[str, float]], dict[str, str]]:
    """The attacks that an audit of this subject runs, and why it leaves the others out.

    Raises:
        BadRecipeError: `only` names an attack that there is not, or leaves none to run.
    """
    for name in only:
        attack_named(name)
    chosen: list[tuple[str, float]] = []
    left_out: dict[str, str] = {}
    for name, attack in ATTACKS.items():
        strengths = attack.full if full else attack.quick
        reason = why_not(attack, subject)
        if only and name not in only:
            left_out[name] = "not asked for"
        elif not applies(attack, subject):
            left_out[name] = str(reason)
        elif not strengths:
            left_out[name] = "only in a full audit"
        elif reason is not None:
            left_out[name] = reason
        elif _is_read_aligned(attack) and _lacks_anchor(subject):
            left_out[name] = "needs the network before the mark, by which such copies are read"
        else:
            chosen += [(name, strength) for strength in strengths]
    if only and not chosen:
        reasons = "; ".join(f"{name} {left_out[name]}" for name in only)
        raise BadRecipeError(f"nothing is left to run: {reasons}")
    return chosen, left_out


def _is_read_aligned(attack: Attack) -> bool:
    return attack.family is Family.OBFUSCATION or attack.turns


def _lacks_anchor(subject: Subject) -> bool:
    """Whether the key is bound to a network that is not at hand."""
    return (
        subject.key is not None
        and subject.key.context.anchor is not None
        and subject.anchor is None
    )


def audit(
    subject: Subject,
    path: Path,
    *,
    full: bool = False,
    only: Sequence[str] = (),
    resume: bool = False,
    show: Listener = lambda *_: None,
) -> dict[str, Any]:
    """Attack `subject` with all that `plan` says, into the JSON at `path`; returns what is in it.

    `only` narrows it to attacks of these names. Written after every attack; with `resume` those in
    the file are not run again.

    Raises:
        UnreadableDataError: the subject has no test images to measure on.
        UnreadableModelError: `resume` finds the audit of another network, key or data.
    """
    chosen, left_out = plan(subject, full=full, only=only)
    subject.recipe(0.01)  # a budget that makes no recipe is an error of the whole audit
    report = _begun(subject, path, resume)
    there = {entry["attack"] for entry in report["entries"]}
    report["left_out"] = {name: why for name, why in left_out.items() if name not in there}
    for done, (name, strength) in enumerate(chosen):
        show(done, len(chosen), name if not ATTACKS[name].strength else f"{name} {strength:g}")
        if _find(report, name, strength) is None:
            report["entries"].append(attempt(subject, name, strength, report["before"]))
            write_json(path, report)
    write_json(path, report)
    return report


def attempt(
    subject: Subject, name: str, strength: float, before: Mapping[str, Any]
) -> dict[str, Any]:
    """One attack and what came of it, as plain JSON values.

    An attack that cannot be carried out on this network gives an entry that says why.
    """
    try:
        outcome = ATTACKS[name].run(subject, strength)
    except UnsuitableModelError as error:
        return {**_facts(name, strength), "impossible": str(error)}
    return measured(subject, name, strength, outcome, before)


def measured(
    subject: Subject,
    name: str,
    strength: float,
    outcome: Attacked | Forged,
    before: Mapping[str, Any],
) -> dict[str, Any]:
    """What came of an attack, as plain JSON values."""
    facts = {**_facts(name, strength), "cost": outcome.cost._asdict()}
    if isinstance(outcome, Forged):
        by_answers = ATTACKS[name].marks == "triggers"
        return {**facts, **_forgery(subject, outcome, before["accuracy"], by_answers=by_answers)}
    found = _remains(subject, outcome, other_task=ATTACKS[name].other_task)
    if _is_read_aligned(ATTACKS[name]):
        found |= _aligned(subject, outcome.model)
    return {**facts, **found}


def _facts(name: str, strength: float) -> dict[str, Any]:
    attack = ATTACKS[name]
    return {
        "attack": name,
        "family": attack.family.value,
        "summary": attack.summary,
        "strength": strength if attack.strength else None,
        "strength_is": attack.strength,
    }


def before_attacks(subject: Subject) -> dict[str, Any]:
    """What is there before anybody attacks: accuracy, and the owner's mark.

    Raises:
        UnsuitableModelError: the network does not carry the key that was given.
        UnreadableDataError: there are no test images, or they are of another task.
    """
    test = subject.tested()
    if (differ := other_classes(test.classes, subject.config.classes)) is not None:
        raise UnreadableDataError(
            f"the images are of other classes than the network ({differ}); needed: images of the "
            "network's own task, with its classes in its order"
        )
    marks = _marks(subject, subject.model)
    for mark in marks.values():
        if "unreadable" in mark:
            raise UnsuitableModelError(mark["unreadable"])
        if not (mark["accepted"] or mark["matches"] == mark["bits"]):
            raise UnsuitableModelError(
                f"the network does not carry this key ({mark['matches']} of {mark['bits']} match), "
                "so nothing could be said of what attacks leave of it; give the key that it was "
                "marked with, or none"
            )
    return {"accuracy": accuracy(subject.model, test, subject.normalise), **marks}


def _remains(subject: Subject, outcome: Attacked, *, other_task: bool) -> dict[str, Any]:
    """After a removal: accuracy on the task that the network now has, and the owner's mark."""
    model, test, task = outcome.model, subject.tested(), "same"
    if other_task:
        test, task = subject.other_task().test, "other"
    found = {"accuracy": accuracy(model, test, subject.normalise), "task": task}
    # Triggers are asked with the original head: the new one has other classes.
    marked = model if task == "same" else with_head(model, subject.model)
    return {**found, **_marks(subject, marked)}


def _marks(subject: Subject, model: nn.Module) -> dict[str, Any]:
    """The owner's mark in a network: bits by the weights, triggers by the answers."""
    if subject.key is None:
        return {}
    names = {"bits": "owner", "triggers": "owner_triggers"}
    ways = readings(subject.scheme, subject.key, model, subject.normalise)
    return {names[mark]: _read(read) for mark, read in ways.items()}


def _aligned(subject: Subject, model: nn.Module) -> dict[str, Any]:
    """The owner's mark once channels are put back where the network had them before."""
    key = subject.key
    if key is None or not subject.scheme.reads_weights:
        return {}
    weights, reference = model.state_dict(), subject.anchor or subject.model
    example = noise_for(subject.config)
    found = _read(lambda: verify_aligned(weights, key, reference, example=example).verdict)
    return {"owner_aligned": found}


def _read(verify: Callable[[], Verdict]) -> dict[str, Any]:
    try:
        verdict = verify()
    except OwnershipError as error:
        return {"unreadable": str(error)}
    return {**facts_of(verdict), "log10_alpha": verdict.log10_alpha}


def _forgery(
    subject: Subject, outcome: Forged, target: float, *, by_answers: bool
) -> dict[str, Any]:
    """After a forgery: what the paper's verification says of the key, and what the exact one."""
    scheme, key, test = subject.scheme, outcome.key, subject.tested()
    # Most forgers show the network as it is, and its accuracy on these images is known.
    same = _same(outcome.model, subject.model)
    shown = target if same else accuracy(outcome.model, test, subject.normalise)
    if by_answers:  # triggers alone were forged: nothing is presented to the network
        answers = answers_to(key, outcome.model, subject.normalise)
        verdict, reached = scheme.verify_answers(answers, key), shown
    else:
        verdict = verify_model(outcome.model, subject.normalise, key)
        reached = scheme.fidelity(outcome.model, key, test, subject.normalise)
    published = scheme.verify_as_published(verdict)
    faithful = reached >= target - TOLERANCE
    return {
        "accuracy": shown,
        "forged": {
            "accuracy": reached,
            **facts_of(verdict),
            "published_signature": published.marked,
            "published_fidelity": faithful,
            "published_accepted": published.marked and faithful,
            "derived": key.derived,
            "reason": verdict.reason,
            "differs_from_owner": _difference(subject.key, key),
        },
    }


def _same(shown: nn.Module, given: nn.Module) -> bool:
    mine, theirs = shown.state_dict(), given.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def _difference(owner: Key | None, forged: Key) -> float | None:
    """Share of the forged signature's bits that are not the owner's; None where none compare."""
    if owner is None:
        return None
    known = {layer.name: layer.length for layer in owner.context.layers}
    same = [layer.name for layer in forged.context.layers if known.get(layer.name) == layer.length]
    if not same:
        return None
    pairs = [(owner.layer_signs(name), forged.layer_signs(name)) for name in same]
    return float(torch.cat([(mine != theirs).float() for mine, theirs in pairs]).mean())


def _begun(subject: Subject, path: Path, resume: bool) -> dict[str, Any]:
    identity = _identity(subject)
    if resume and path.exists():
        try:
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UnreadableModelError(
                f"{path} is no report of an audit; remove it, or write to an empty folder"
            ) from error
        if report.get("identity") != identity or report.get("version") != VERSION:
            raise UnreadableModelError(
                f"{path} is the audit of another network, key, budget or data; resuming needs the "
                "same ones: repeat the options of the first call, or write to an empty folder"
            )
        return report
    return {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "scheme": subject.scheme.name,
        "architecture": subject.config.architecture,
        "arguments": dict(subject.config.arguments),
        "test_images": len(subject.tested()),
        "train_images": 0 if subject.train is None else len(subject.train),
        "classes": len(subject.config.classes),
        "budget": subject.budget._asdict(),
        "tolerance": TOLERANCE,
        "before": before_attacks(subject),
        "left_out": {},
        "entries": [],
        "provenance": provenance(),
    }


def _identity(subject: Subject) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(subject.model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    transfer = subject.transfer
    sets = (subject.test, subject.train, *(() if transfer is None else transfer))
    parts: list[object] = [s.digest() if s is not None else "none" for s in sets]
    parts.append("none" if subject.key is None else subject.key.fingerprint)
    parts += [asdict(subject.normalise), subject.budget, subject.seed, subject.scheme.name]
    hashed.update(repr(parts).encode())
    return hashed.hexdigest()


def _find(report: Mapping[str, Any], name: str, strength: float) -> dict[str, Any] | None:
    wanted = strength if ATTACKS[name].strength else None
    found: Iterator[dict[str, Any]] = (
        entry
        for entry in report["entries"]
        if entry["attack"] == name and entry["strength"] == wanted
    )
    return next(found, None)


def attack_named(name: str) -> Attack:
    """The attack called `name`.

    Raises:
        BadRecipeError: there is none.
    """
    return named(ATTACKS, name, "attack")
