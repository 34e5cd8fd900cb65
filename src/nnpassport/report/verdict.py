"""The pages of `verify`, `judge` and `probe`: for a lawyer to read and an expert to check.

They say what `--json` prints, no more and no less, and fetch and run nothing.
"""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nnpassport.files.disk import write_atomically, writing
from nnpassport.report.charts import pictures, timeline
from nnpassport.report.page import page, percent, small
from nnpassport.report.words import (
    ANSWERS,
    accuracy,
    finding,
    hearing_ruling,
    limits,
    matched,
    p_value,
    verdict_ruling,
    why,
)

Facts = Mapping[str, Any]


def write_verdict_page(facts: Facts, path: Path) -> None:
    """Write the page of a verdict, from what `verify --json` prints.

    Raises:
        UnwritableOutputError: the page cannot be written; what was there before is untouched.
    """
    _write(verdict_page(facts), path)


def write_hearing_page(facts: Facts, path: Path) -> None:
    """Write the page of a hearing, from what `judge --json` prints.

    Raises:
        UnwritableOutputError: as `write_verdict_page`.
    """
    _write(hearing_page(facts), path)


def write_probe_page(facts: Facts, path: Path) -> None:
    """Write the page of a probe, from what `probe --json` prints.

    Raises:
        UnwritableOutputError: as `write_verdict_page`.
    """
    _write(probe_page(facts), path)


def verdict_page(facts: Facts) -> str:
    """The page of a verdict."""
    case = _case_of(facts, facts["read"])
    said = [("Verdict", facts["reason"])]
    return _page("verdict", case, verdict_ruling(case), facts["accepted"], said)


def hearing_page(facts: Facts) -> str:
    """The page of a hearing."""
    case = {"made_with": None, **facts}
    numbered = [(str(number), each) for number, each in enumerate(facts["reasons"], 1)]
    return _page("ruling", case, hearing_ruling(case), bool(facts["owners"]), numbered)


def probe_page(facts: Facts) -> str:
    """The page of a probe."""
    service = {"suspect": {"file": facts["service"], "appeared": None}}
    case = _case_of({**facts, **service}, ANSWERS)
    said = [("Verdict", facts["reason"]), *(("Note", note) for note in facts["notes"])]
    for what in ("triggers", "covers"):
        said.append((what.capitalize(), ", ".join(f"{n} {k}" for k, n in facts[what].items())))
    if facts["cover_accuracy"] is not None:
        said.append(("Covers", f"{percent(facts['cover_accuracy'], 2)} classified rightly"))
    said.append(("Took", f"{facts['seconds']} s, {facts['retries']} retries"))
    return _page("probe", case, verdict_ruling(case), facts["accepted"], said)


def _case_of(facts: Facts, how: str) -> Facts:
    """A verdict with one key as a case with one claimant."""
    key = facts.get("key") or {"owner": "the key’s owner", "fingerprint": None}
    claimant = {
        "name": key["owner"],
        "owner": key["owner"],
        "fingerprint": key["fingerprint"],
        "proves": facts["accepted"],
        "refused": None,
        "unchecked": None,
        "readings": {how: facts},
        "elsewhere": {},
        "notes": [],
        "standing": facts["claim"],
    }
    made = facts.get("made_with")
    return {"suspect": facts["suspect"], "claimants": [claimant], "made_with": made}


def _page(kind: str, case: Facts, ruling: str, accepted: bool, said: list[tuple[str, str]]) -> str:
    readings = [row for each in case["claimants"] for row in _rows(each)]
    facts = {
        "title": f"nnpassport: {kind}",
        "ruling": ruling,
        "accepted": accepted,
        "rows": [],
        "case": case,
        "why": why(case),
        "limits": limits(case),
        "timeline": timeline(case),
        "charts": pictures(case),
        "groups": [(each, _rows(each)) for each in case["claimants"]],
        "nulls": [(row, row["null"]) for row in readings if row["null"] is not None],
        "layered": [row for row in readings if row["layers"]],
        "digests": _digests(case),
        "said": said,
        "made": case["made_with"],
        "commands": _commands(case),
    }
    return page("verdict.html.j2", facts)


def _commands(case: Facts) -> list[str]:
    """How to find the same, and that the suspect is the same."""
    if case["made_with"] is None or "command" not in case["made_with"]:
        return []
    file, names = case["suspect"]["file"], case["suspect"].get("digests")
    if names is None:
        found = next(iter(case["claimants"][0]["readings"].values()))
        names = [name for name in found["digests"] if "/" not in name and name != "images"]
    inside = [file if Path(file).name == name else f"{file}/{name}" for name in names]
    return [case["made_with"]["command"], *(f"sha256sum {shlex.quote(each)}" for each in inside)]


def _rows(claimant: Facts) -> list[dict[str, Any]]:
    return [_row(claimant, where, how, found) for where, how, found in _everywhere(claimant)]


def _everywhere(claimant: Facts) -> Iterator[tuple[str | None, str, Facts]]:
    """In whose network (None: in the suspect), how read, and the verdict."""
    for how, found in claimant["readings"].items():
        yield None, how, found
    for other, readings in claimant["elsewhere"].items():
        for how, found in readings.items():
            yield other, how, found


def _row(claimant: Facts, where: str | None, how: str, found: Facts) -> dict[str, Any]:
    place = "the suspect" if where is None else f"the network of “{where}”"
    log10_p = found["log10_p_value"]
    alignment = found["alignment"]
    return {
        "name": claimant["name"],
        "place": place,
        "how": how,
        "matches": f"{matched(found)} ({percent(found['match_rate'])})",
        "p": p_value(found),
        "log10_p": None if log10_p is None else _signed(log10_p),
        "alpha": small(found["log10_alpha"]),
        "log10_alpha": _signed(found["log10_alpha"]),
        "accuracy": accuracy(found),
        "finding": finding(found),
        "tone": "yes" if found["accepted"] else "no" if where is None else "",
        "layers": found["layers"],
        "cosines": {} if alignment is None else alignment["cosines"],
        "alignment": alignment,
        "null": None if alignment is None else alignment["null"],
        "scheme": found["scheme"],
    }


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00")


def _digests(case: Facts) -> list[tuple[str, str]]:
    """Every digest that any reading rests on, by whose and which file, without repetition."""
    known: dict[tuple[str, str], None] = {}
    for name, digest in case["suspect"].get("digests", {}).items():
        known[f"suspect: {name}", digest] = None
    for each in case["claimants"]:
        for where, _, found in _everywhere(each):
            for name, digest in found["digests"].items():
                known[_whose(each["name"], where, name), digest] = None
    return list(known)


def _whose(claimant: str, where: str | None, name: str) -> str:
    if name in {"images", "covers"}:
        return name
    if name.startswith("reference/"):
        return f"network of {claimant}: {name.removeprefix('reference/')}"
    if "/" in name:
        return f"unrelated network: {name}"
    return f"{'suspect' if where is None else f'network of {where}'}: {name}"


def _write(text: str, path: Path) -> None:
    with writing(path):
        # Names of files need not be text; what is not comes out as \udc80 and the like.
        write_atomically(path, text.encode("utf-8", "backslashreplace"))
