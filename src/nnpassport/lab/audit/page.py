"""The page of an audit: what each attack left of the mark, what each forger won, in one table."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from nnpassport.attacks.table import KINDS, MOVES
from nnpassport.report.curves import Line, Plot, plot_svg
from nnpassport.report.page import Panel, Row, page, percent, power_of_ten, svg, unbroken

Entry = Mapping[str, Any]
USEFUL = 0.05
"""A removal counts while no more accuracy than this is lost: what is left is still worth having."""

_MARKS = {"owner": "", "owner_aligned": "aligned: ", "owner_triggers": "triggers: "}


def html(report: Mapping[str, Any]) -> str:
    """The self-contained page of an audit's report."""
    entries = report["entries"]
    removals = [e for e in entries if e["family"] != "ambiguity"]
    forgeries = _gathered([e for e in entries if e["family"] == "ambiguity"])
    facts = {
        "title": "nnpassport: audit",
        "ruling": ruling(report),
        "accepted": not _removed(report) and not _owned_by_forgers(report),
        "rows": [],
        "report": report,
        "before": _before(report),
        "survival": survival(report),
        "removals": _grouped(removals, lambda e: _removal_row(report, e)),
        "forgeries": _grouped(forgeries, _forgery_row),
        "charts": charts(report),
        "useful": f"{100 * USEFUL:.0f}",
        "tolerance": f"{100 * report['tolerance']:.0f}",
        "made": report["provenance"],
        "left_out": report["left_out"],
    }
    return page("audit.html.j2", facts)


def ruling(report: Mapping[str, Any]) -> str:
    """The audit in a few sentences."""
    tried = [e for e in report["entries"] if "impossible" not in e]
    removals = [e for e in tried if e["family"] != "ambiguity" and "owner" in _owner(e)]
    forged = [e for e in tried if e["family"] == "ambiguity" and not _is_genuine(e)]
    gone = len(_removed(report))
    published = sum(e["forged"]["published_accepted"] for e in forged)
    exact = len(_owned_by_forgers(report))
    parts = []
    if removals:
        parts.append(
            f"{gone} of {len(removals)} attempts at removal hid the mark and left the network "
            "useful."
        )
    unread = sum(_unreadable(e) for e in removals)
    if unread:
        parts.append(f"After {unread} more it could not be read.")
    if forged:
        parts.append(
            f"{published} of {len(forged)} forged keys pass the published verification, "
            f"{exact} the exact one."
        )
    return " ".join(parts) or "Nothing was attacked."


def survival(report: Mapping[str, Any]) -> list[str]:
    """Which attacks the owner's mark survives, and which not; a sentence for each outcome."""
    removed = _removed(report)
    outcomes: dict[str, dict[str, list[str]]] = {
        "The mark survives": {},
        "It is hidden, and the network useful, after": {},
        "It could not be read after": {},
        "It and the network's use are both gone after": {},
    }
    survives, gone, unread, useless = outcomes.values()
    for entry in report["entries"]:
        if entry["family"] == "ambiguity" or "impossible" in entry or not _owner(entry):
            continue
        one = gone if entry in removed else unread if _unreadable(entry) else None
        one = (useless if _hidden(entry) else survives) if one is None else one
        one.setdefault(entry["attack"], []).append(_strength(entry))
    return [f"{said} {', '.join(map(_after, n.items()))}." for said, n in outcomes.items() if n]


def _after(attack: tuple[str, list[str]]) -> str:
    name, strengths = attack
    return f"{name} ({'; '.join(strengths)})" if any(strengths) else name


def words(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    """One attack in rows of a table, for a terminal."""
    before = entry["before"]
    row = (
        _forgery_row(entry)
        if entry["family"] == "ambiguity"
        else _removal_row({"before": before}, entry)
    )
    names = {
        "what": "attack",
        "had": "attacker had; spent",
        "accuracy": "accuracy",
        "mark": "bits or labels" if entry["family"] == "ambiguity" else "owner's mark",
        "verdict": "verdict",
        "published": "published verification",
        "exact": "exact verification",
    }
    rows = [("accuracy before", percent(before["accuracy"]))]
    return rows + [(names[n], row[n]) for n in names if row.get(n)]


def charts(report: Mapping[str, Any]) -> dict[str, Markup]:
    """The paper's figures 3, 4 and 5 on this network, as far as the audit has points for them."""
    found: dict[str, Markup] = {}
    base, chance = report["before"]["accuracy"], 1 / report["classes"]
    pruned = sorted(_of(report, "prune"), key=lambda e: e["strength"])
    if len(pruned) > 1:
        lines = [Line("accuracy", [(e["strength"], e["accuracy"]) for e in pruned], "plain")]
        if all("owner" in _owner(e) and "matches" in _owner(e)["owner"] for e in pruned):
            marks = [(e["strength"], _rate(_owner(e)["owner"])) for e in pruned]
            lines.append(Line("owner's mark found", marks, "genuine"))
        by_weights = "owner" in pruned[0]
        level = (0.5, "bits by chance") if by_weights else (chance, "labels by chance")
        plot = Plot("Pruning", lines, "share of all parameters that is zeroed", level)
        found["pruning"] = plot_svg(plot, "pruning")
    rows = _forged_rows(report)
    if rows:
        panel = Panel(
            "Accuracy by passport",
            [Row("Passport absent", [base], "plain", percent(base)), *rows],
            axis="test images classified rightly",
            limits=(0, 1),
            ticks={quarter / 4: f"{25 * quarter} %" for quarter in range(5)},
            line=(chance, "chance"),
        )
        found["passports"] = svg(panel, "passports")
    lines = [
        Line(label, points, tone)
        for name, label, tone in (
            ("flip", "γ negated", "plain"),
            ("fake3", "passports optimised (fake3)", "forged"),
        )
        if len(points := _by_difference(report, name)) > 1
    ]
    if lines:
        plot = Plot(
            "Other bits, other accuracy", lines, "share of the bits that differ", (chance, "chance")
        )
        found["flips"] = plot_svg(plot, "flips")
    return found


def _is_genuine(entry: Entry) -> bool:
    """Whether a forgery changes no bit: it is there for the curve, and the owner's passport."""
    return entry["attack"] in {"flip", "fake3"} and entry["strength"] == 0


def _forged_rows(report: Mapping[str, Any]) -> list[Row]:
    names = {
        "flip": "",
        "fake1": "random passports (fake1)",
        "fake2": "γ, β trained anew (fake2)",
        "substitute-ierb": "substitution, IERB",
        "substitute-cerb": "substitution, CERB",
        "solve": "solved passport",
        "hash-bound": "bound to a hash",
    }
    rows = []
    genuine = [e for e in _of(report, "flip") if e["strength"] == 0]
    if genuine:
        reached = genuine[0]["forged"]["accuracy"]
        rows.append(Row("Genuine passport", [reached], "genuine", percent(reached)))
    for name, label in names.items():
        values = [e["forged"]["accuracy"] for e in _of(report, name)] if label else []
        if values:
            note = percent(values[0]) if len(values) == 1 else f"mean {percent(fmean(values))}"
            count = f"{len(values)} " if len(values) > 1 else ""
            rows.append(Row(f"{count}{label}", values, "forged", note))
    return rows


def _by_difference(report: Mapping[str, Any], name: str) -> list[tuple[float, float]]:
    forged = [e["forged"] for e in _of(report, name)]
    points = [(f["differs_from_owner"], f["accuracy"]) for f in forged]
    return sorted(point for point in points if point[0] is not None)


def _of(report: Mapping[str, Any], name: str) -> list[Entry]:
    return [e for e in report["entries"] if e["attack"] == name and "impossible" not in e]


def _owner(entry: Entry) -> dict[str, Any]:
    """The owner's mark in an entry: by the weights, or else by the triggers."""
    for name in ("owner", "owner_triggers"):
        if name in entry:
            return {"owner": entry[name]}
    return {}


def _rate(mark: Mapping[str, Any]) -> float:
    return float(mark["matches"] / mark["bits"])


def _hidden(entry: Entry) -> bool:
    """Whether no verification finds the mark: by the weights, by them aligned, by the triggers."""
    return not any(entry[name].get("accepted", False) for name in _MARKS if name in entry)


def _unreadable(entry: Entry) -> bool:
    """Whether the mark is not refused but cannot be read: the network has other shapes."""
    return _hidden(entry) and "unreadable" in _owner(entry).get("owner", {})


def _is_useful(report: Mapping[str, Any], entry: Entry) -> bool:
    # Another task has another accuracy; there, useful is what the page's reader finds useful.
    return entry["task"] == "other" or entry["accuracy"] >= report["before"]["accuracy"] - USEFUL


def _removed(report: Mapping[str, Any]) -> list[Entry]:
    return [
        e
        for e in report["entries"]
        if e["family"] != "ambiguity"
        and "impossible" not in e
        and _owner(e)
        and _hidden(e)
        and not _unreadable(e)
        and _is_useful(report, e)
    ]


def _owned_by_forgers(report: Mapping[str, Any]) -> list[Entry]:
    return [e for e in report["entries"] if e.get("forged", {}).get("accepted", False)]


def _gathered(entries: Sequence[Entry]) -> list[Entry]:
    """The same, but of many random passports only the one of highest accuracy."""
    drawn = [e for e in entries if e["attack"] == "fake1" and "impossible" not in e]
    if not drawn:
        return list(entries)
    best = max(drawn, key=lambda e: e["forged"]["accuracy"])
    rest = [e for e in entries if e["attack"] != "fake1"]
    return [{**best, "summary": f"{best['summary']}: the best of {len(drawn)}"}, *rest]


def _before(report: Mapping[str, Any]) -> str:
    before = report["before"]
    mark = _owner(before).get("owner")
    found = "" if mark is None else f", {_mark_words(mark)}"
    return f"Before any attack: accuracy {percent(before['accuracy'])}{found}."


def _mark_words(mark: Mapping[str, Any]) -> str:
    if "unreadable" in mark:
        return f"cannot be read: {mark['unreadable']}"
    p = mark["log10_p_value"]
    exact = "no p-value" if p is None else unbroken(f"p = {power_of_ten(p)}")
    return f"{mark['matches']} of {mark['bits']} ({percent(_rate(mark))}), {exact}"


def _all_marks(entry: Entry) -> str:
    return "; ".join(f"{said}{_mark_words(entry[n])}" for n, said in _MARKS.items() if n in entry)


def _grouped(
    entries: Sequence[Entry], row: Callable[[Entry], dict[str, str]]
) -> list[dict[str, Any]]:
    """Rows under the attack that they are of, in the order in which the attacks were run."""
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry["attack"]
        group = groups.setdefault(name, {"name": name, "summary": entry["summary"], "rows": []})
        group["rows"].append(row(entry))
    return list(groups.values())


def _strength(entry: Entry) -> str:
    """How strong, as people say it."""
    strength, what = entry["strength"], entry["strength_is"]
    if strength is None:
        return ""
    if what in {"grid", "kind"}:
        return {"grid": KINDS, "kind": MOVES}[what][int(strength)]
    if what == "block":
        return f"block {strength:g}"
    if what.startswith("share"):
        return f"{percent(strength, 0)} {what.removeprefix('share ')}"
    if what.startswith("number"):
        return ""
    return f"{strength:g} {what}"


def _what(entry: Entry) -> str:
    strength = _strength(entry)
    return f"{entry['summary']}; {strength}" if strength else str(entry["summary"])


def _had(entry: Entry) -> str:
    cost = entry["cost"]
    spent = [f"{cost['seconds']:.1f} s" if cost["seconds"] < 100 else f"{cost['seconds']:.0f} s"]
    if cost["samples"]:
        spent.append(f"{cost['samples']} images")
    if cost["epochs"]:
        spent.append(f"{cost['epochs']} epochs")
    return f"{cost['had']}; {', '.join(spent)}"


def _removal_row(report: Mapping[str, Any], entry: Entry) -> dict[str, str]:
    if "impossible" in entry:
        return _impossible(entry)
    mark = _owner(entry).get("owner")
    task = " (other task)" if entry["task"] == "other" else ""
    verdict = "" if mark is None else ("found" if not _hidden(entry) else "hidden")
    if verdict == "found" and mark is not None and not mark.get("accepted", False):
        verdict = "found once aligned" if "owner_aligned" in entry else "found by its answers"
    if verdict == "hidden" and _unreadable(entry):
        verdict = "could not be read"
    elif verdict == "hidden" and not _is_useful(report, entry):
        verdict = "hidden, and the network is useless"
    return {
        "strength": _strength(entry),
        "what": _what(entry),
        "had": _had(entry),
        "accuracy": percent(entry["accuracy"]) + task,
        "mark": _all_marks(entry),
        "verdict": verdict,
    }


def _forgery_row(entry: Entry) -> dict[str, str]:
    if "impossible" in entry:
        return _impossible(entry)
    forged = entry["forged"]
    differs = forged["differs_from_owner"]
    other = "" if differs is None else f"; {percent(differs)} of the bits are not the owner's"
    p = forged["log10_p_value"]
    exact = "the key was chosen, so there is no p-value"
    if p is not None:
        exact = unbroken(f"p = {power_of_ten(p)}")
    return {
        "strength": _strength(entry),
        "what": _what(entry),
        "had": _had(entry),
        "accuracy": percent(forged["accuracy"]),
        "mark": f"{forged['matches']} of {forged['bits']}{other}",
        "published": "accepted" if forged["published_accepted"] else "refused",
        "exact": f"{'accepted' if forged['accepted'] else 'refused'}: {exact}",
    }


def _impossible(entry: Entry) -> dict[str, str]:
    return {"strength": _strength(entry), "what": _what(entry), "impossible": entry["impossible"]}
