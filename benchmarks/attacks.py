"""Audits of the networks of cifar10.py, as tables beside the paper's numbers.

python benchmarks/attacks.py render writes results/attacks-alexnet.md from the audit.json files that
are kept, each under the name of its network, in results/attacks-alexnet/. How each was made is a
command of its own, which README.md beside this file gives.
"""

from statistics import fmean

from common import RESULTS, command_line

from nnpassport.attacks.table import KINDS
from nnpassport.lab.results import Results, made_with
from nnpassport.lab.tables import in_percent, table

STORE = Results(RESULTS / "attacks-alexnet")
# What the paper (and [Che23] for substitution) reports for AlexNet on CIFAR-10.
REPORTED = {
    ("prune", 0.6): "about 100 % of the bits; accuracy −5 … −25 points",
    ("fake1", None): "about 10 %, at most 35 %",
    ("fake2", None): "84 % at best, of 89",
    ("fake3", 0.1): "−5 points",
    ("fake3", 0.5): "−50 points",
    ("substitute-cerb", 0.1): "88.2 of 88.9 [Che23]",
    ("substitute-cerb", 0.02): "84.2 of 90.2 [Che23]",
}


def render() -> str:
    """All audits that were kept, as Markdown; what was not run is not in it."""
    lines = [
        "# Attacks on AlexNet, CIFAR-10",
        "",
        "Rendered by `python benchmarks/attacks.py render` from JSON files; how they were made is",
        "in [benchmarks/README.md](../benchmarks/README.md), what each attack does is in",
        "[docs/attacks.md](../docs/attacks.md). Accuracies in %. One network of each kind, one run",
        "of each attack. Attackers have a part of the training images and train for few epochs,",
        "as said below, so the attacks that train are weaker than the published ones.",
    ]
    for name, report in STORE.all().items():
        lines += _audit(name, report)
    return "\n".join(lines) + "\n"


def _audit(name: str, report: dict) -> list[str]:
    before, budget = report["before"], report["budget"]
    mark = before.get("owner") or before.get("owner_triggers")
    lines = [
        "",
        f"## {name}: {report['scheme']}, {report['arguments'].get('norm')} norm",
        "",
        f"Before: {in_percent(before['accuracy'], 1)} on {report['test_images']} test images, "
        f"{mark['matches']} of {mark['bits']} bits, log₁₀ p = {mark['log10_p_value']:.1f}. "
        f"Attackers have {report['train_images']} images, {budget['epochs']} epochs, batch "
        f"{budget['batch']}, {budget['precision']}. {made_with(report)}, "
        f"{report['provenance']['date']}.",
    ]
    entries = [e for e in report["entries"] if "impossible" not in e]
    removals = [e for e in entries if e["family"] != "ambiguity"]
    forged = [e for e in entries if e["family"] == "ambiguity"]
    if removals:
        head = (
            *("attack", "strength", "accuracy", "owner's bits", "log₁₀ p", "found"),
            *("had; seconds", "the paper"),
        )
        lines += ["", *table(head, map(_removal, removals))]
    if forged:
        drawn = [e for e in forged if e["attack"] == "fake1"]
        head = (
            *("forged key", "strength", "accuracy presented", "bits not the owner's"),
            *("published verification", "log₁₀ p", "exact", "had; seconds", "the paper"),
        )
        others = [_forgery(e) for e in forged if e["attack"] != "fake1"]
        lines += ["", *table(head, [*([_random(drawn)] if drawn else []), *others])]
    impossible = [e for e in report["entries"] if "impossible" in e]
    if impossible:
        lines += ["", "Not possible here: " + ", ".join(sorted({e["attack"] for e in impossible}))]
    return lines


def _removal(entry: dict) -> tuple[str, ...]:
    mark = entry.get("owner") or entry.get("owner_triggers")
    read = ("cannot be read: other shapes", "", "no")
    if "unreadable" not in mark:
        p = "" if mark["log10_p_value"] is None else f"{mark['log10_p_value']:.1f}"
        found = "yes" if mark["accepted"] else "no"
        read = (in_percent(mark["matches"] / mark["bits"], 1), p, found)
    reached = in_percent(entry["accuracy"], 1)
    return (entry["attack"], _strength(entry), reached, *read, _cost(entry), _reported(entry))


def _forgery(entry: dict) -> tuple[str, ...]:
    forged = entry["forged"]
    p = forged["log10_p_value"]
    return (
        entry["attack"],
        _strength(entry),
        in_percent(forged["accuracy"], 1),
        in_percent(forged["differs_from_owner"], 1),
        "accepted" if forged["published_accepted"] else "refused",
        "none" if p is None else f"{p:.1f}",
        "accepted" if forged["accepted"] else "refused",
        _cost(entry),
        _reported(entry),
    )


def _random(drawn: list[dict]) -> tuple[str, ...]:
    reached = [e["forged"]["accuracy"] for e in drawn]
    passed = sum(e["forged"]["published_accepted"] for e in drawn)
    differs = fmean(e["forged"]["differs_from_owner"] for e in drawn)
    return (
        "fake1",
        f"{len(drawn)} passports",
        f"mean {in_percent(fmean(reached), 1)}, max {in_percent(max(reached), 1)}",
        in_percent(differs, 1),
        f"{passed} accepted",
        "none",
        "refused",
        _cost(drawn[0]),
        REPORTED["fake1", None],
    )


def _strength(entry: dict) -> str:
    strength, what = entry["strength"], entry["strength_is"]
    if strength is None:
        return ""
    if what == "grid":
        return KINDS[int(strength)]
    return f"{100 * strength:g} %" if what.startswith("share") else f"{strength:g}"


def _reported(entry: dict) -> str:
    return REPORTED.get((entry["attack"], entry["strength"]), "")


def _cost(entry: dict) -> str:
    cost = entry["cost"]
    return f"{cost['had']}; {cost['seconds']:.1f}"


if __name__ == "__main__":
    command_line(__doc__, lambda: {STORE.folder.with_suffix(".md"): render()})
