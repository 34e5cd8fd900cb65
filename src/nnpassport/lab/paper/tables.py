"""The paper's tables, measured beside reported; a field without a run behind it says so."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from nnpassport.lab.findings import (
    NONE,
    NOT_RUN,
    Entry,
    Findings,
    Group,
    Point,
    Sample,
    sample,
    signed,
)
from nnpassport.lab.paper import reported
from nnpassport.lab.paper.contents import BASELINES, COLUMNS, SCHEMES, baselines_on, targets_of
from nnpassport.lab.tables import table

TASKS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "caltech101": "Caltech-101"}
ARCHITECTURES = {"alexnet": "AlexNet", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}
_MANY = 10  # digits that a comparison of means ignores


class Table(NamedTuple):
    """One table: what it is of, its rows, and what is to be said below it."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    remarks: tuple[str, ...] = ()
    folds: bool = False

    def markdown(self) -> str:
        """The table as GitHub renders it; where nothing of it was run, that in a line."""
        measured = [row for row in self.rows if not any(NOT_RUN in field for field in row)]
        if self.folds and not measured:
            return f"**{self.title}**: {NOT_RUN}, none of {len(self.rows)} rows"
        remarks = [f"\n{remark}" for remark in self.remarks]
        return "\n".join([f"**{self.title}**", "", *table(self.head, self.rows), *remarks])


def table1(findings: Findings) -> list[Table]:
    """Marks of the baselines, and forged ones, before and after a transfer."""
    head = (
        *("scheme", "to", "accuracy after (before)", "paper", "real mark after (before)", "paper"),
        *("log₁₀ p of the real mark after", "forged by", "forged mark after (before)", "paper"),
        "log₁₀ p of the forged mark",
    )
    plan = findings.plan
    return [
        Table(_names(name, plan.tasks[0]), head, _table1_rows(findings, name, plan.tasks[0]))
        for name in baselines_on(plan)
    ]


def _table1_rows(findings: Findings, architecture: str, task: str) -> list[tuple[str, ...]]:
    rows = []
    for label, (scheme, norm) in BASELINES.items():
        group = Group(architecture, task, scheme, norm)
        for target in targets_of(findings.plan, task):
            found = list(findings.transferred(group, target).values())
            known = (architecture, task) == ("alexnet", "cifar10")
            paper = reported.TABLE1.get((scheme, target)) if known else None
            for forgery, how in _forgeries(scheme).items():
                fields = _table1_fields(found, paper, scheme, forgery)
                rows.append((label, name_of(target), *fields[:5], how, *fields[5:]))
    return rows


def _forgeries(scheme: str) -> Mapping[str, str]:
    if scheme == "uchida":
        return {"forged": "gradient descent", "forged in closed form": "closed form (ours)"}
    return {"forged": "optimised pictures"}


def _table1_fields(
    found: Sequence[Entry], paper: reported.Baseline | None, scheme: str, forgery: str
) -> tuple[str, ...]:
    mark = "bits" if scheme == "uchida" else "triggers"
    in_paper = "forged" if forgery == "forged" else ""
    return (
        _with_before(
            sample(found, lambda result: result["accuracy"]),
            sample(found, lambda result: result["source_accuracy"]),
        ),
        _published(paper, "accuracy"),
        _with_before(_found(found, "marks", mark), _found(found, "marks_before", mark)),
        _published(paper, "real"),
        _p_values(found, mark),
        _with_before(_found(found, "marks", forgery), _found(found, "marks_before", forgery)),
        _published(paper, in_paper),
        _p_values(found, forgery),
    )


def _with_before(after: Sample, before: Sample) -> str:
    if not after.values:
        return NOT_RUN
    return f"{after.spread()} ({before.spread()}), {after.number}"


def _published(paper: reported.Baseline | None, field: str) -> str:
    if paper is None or not field:
        return NONE
    found: reported.Before = getattr(paper, field)
    return f"{found.after:.2f} ({found.before:.2f})"


def table2(findings: Findings) -> list[Table]:
    """Accuracy and signature of every scheme, before and after transfers."""
    plan = findings.plan
    head = (
        *("network", "accuracy", "paper", "private accuracy", "loss to its baseline, points"),
        *("paper", "goal", "bits found", "paper", "log₁₀ p", "triggers found"),
    )
    found = []
    for architecture in plan.architectures:
        for task in plan.tasks:
            for target in ("", *targets_of(plan, task)):
                rows = [
                    _table2_row(findings, Group(architecture, task, *kind), target, column)
                    for column, kind in COLUMNS.items()
                ]
                unrun = all(row[1] == NOT_RUN for row in rows)
                found.append(Table(_names(architecture, task, target), head, rows, folds=unrun))
    return found


def _table2_row(findings: Findings, group: Group, target: str, column: str) -> tuple[str, ...]:
    found = _runs(findings, group, target)
    key = (group.architecture, group.task, target)
    paper = reported.TABLE2.get((*key, column))
    accuracy = sample(found.values(), _accuracy)
    fields = (column, accuracy.said(), NONE if paper is None else f"{paper.accuracy:.2f}")
    if not group.scheme:
        return (*fields, *(NONE,) * 8)
    loss = _loss(findings, group, target)
    least = _paper_loss(key, group.norm, column)
    triggers = group.scheme == "passport-v3"
    detection = NONE if paper is None else f"{paper.detection:g}"
    return (
        *fields,
        _private(found, group.scheme, target),
        loss.said(),
        NONE if least is None else signed(least),
        _goal((*key, column), loss, least),
        _found(found.values(), "marks", "bits").said(),
        detection,
        _p_values(found.values(), "bits"),
        _found(found.values(), "marks", "triggers").said() if triggers else NONE,
    )


def _runs(findings: Findings, group: Group, target: str) -> dict[int, Entry]:
    return findings.transferred(group, target) if target else findings.trained(group)


def _accuracy(result: Entry) -> float:
    metrics: Mapping[str, float] = result.get("metrics", result)
    return metrics["accuracy"]


def _private(found: Mapping[int, Entry], scheme: str, target: str) -> str:
    """A transferred network has a new head, and no private branch."""
    if target or scheme == "passport-v1":
        return NONE
    return sample(found.values(), lambda result: result["metrics"]["private_accuracy"]).said()


def _loss(findings: Findings, group: Group, target: str) -> Sample:
    """Points below the plain network of the same norm and seed."""
    plain = _runs(findings, group._replace(scheme=""), target)
    found = _runs(findings, group, target)
    both = [seed for seed in found if seed in plain]
    return Sample(tuple(100 * (_accuracy(plain[s]) - _accuracy(found[s])) for s in both))


def _paper_loss(key: tuple[str, str, str], norm: str, column: str) -> float | None:
    baseline = next(name for name, kind in COLUMNS.items() if kind == ("", norm))
    if (*key, column) not in reported.TABLE2:
        return None
    plain, marked = reported.TABLE2[*key, baseline], reported.TABLE2[*key, column]
    return plain.accuracy - marked.accuracy


def _goal(key: tuple[str, str, str, str], loss: Sample, least: float | None) -> str:
    """No more lost than in the paper; where ours is stricter, less than that."""
    if least is None:
        return NONE
    strict = reported.LOSS_GOAL.get(key)
    wanted = f"≤ {signed(least)}" if strict is None else f"< {strict:g}"
    if not loss.values:
        return f"{wanted}: {NOT_RUN}"
    mean = round(loss.mean, _MANY)
    reached = mean <= round(least, _MANY) if strict is None else mean < strict
    return f"{wanted}: {'reached' if reached else 'missed'}"


def table3(findings: Findings) -> list[Table]:
    """Forged passports against V1, V2 and V3, by every verification there is."""
    plan = findings.plan
    return [
        _table3(findings, architecture, task)
        for architecture in plan.architectures
        for task in plan.tasks
    ]


def _table3(findings: Findings, architecture: str, task: str) -> Table:
    tolerance = reported.FIDELITY.get(architecture, 3.0)
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, str] = {}
    for work, label, strengths in _forged_rows(findings):
        for column, kind in SCHEMES.items():
            group = Group(architecture, task, *kind)
            points = [
                point
                for point in findings.points(group, work)
                if strengths is None or point.strength in strengths
            ]
            share = None if strengths is None else strengths[0]
            paper = _reported_forgery(group, work, share)
            rows.append((label, column, *_table3_fields(points, tolerance / 100, paper)))
            reasons |= {
                f"{label}, {column}": p.entry["impossible"]
                for p in points
                if "impossible" in p.entry
            }
    head = (
        *("forged by", "scheme", "attacker has", "network's own accuracy", "genuine passport"),
        *("forged passport", "published", f"F (ε = {tolerance:g} points)", "F in the paper"),
        *("bits not the owner's", "V as published", "V exact"),
    )
    remarks = tuple(f"Impossible: {name}: {reason}." for name, reason in reasons.items())
    return Table(_names(architecture, task), head, rows, remarks, folds=True)


def _forged_rows(findings: Findings) -> list[tuple[str, str, tuple[float, ...] | None]]:
    """Attack, its name in the table, and the strengths that are one row; None is all of them."""

    def by_strength(work: str, name: Callable[[float], str]) -> list[Any]:
        return [(work, name(strength), (strength,)) for strength in findings.strengths(work)]

    return [
        ("fake1", "fake1: random passports", None),
        ("fake2", "fake2: γ, β trained anew", None),
        *by_strength("fake3", lambda s: f"fake3: {100 * s:g} % of the bits flipped"),
        ("solve", "solved (ours)", None),
        ("hash-bound", "solved, bits bound to a hash (ours)", None),
        *by_strength("grind", lambda s: f"best of {s:g} honest keys (ours)"),
        *by_strength("substitute-cerb", lambda s: f"substitution, {100 * s:g} % of the images"),
    ]


def _reported_forgery(group: Group, work: str, share: float | None) -> tuple[str, str]:
    """Accuracy and outcome of F as published."""
    if group.task not in reported.TASKS:
        return NONE, NONE
    accuracy = NONE
    if work == "fake1" and group.task in reported.FAKE1:
        accuracy = f"{reported.FAKE1[group.task]:g}"
    if work == "fake2" and (group.architecture, group.task) in reported.FAKE2:
        accuracy = f"at best {reported.FAKE2[group.architecture, group.task]:g}"
    if work == "fake3" and share is not None and share in reported.FAKE3:
        accuracy = f"{signed(reported.FAKE3[share], 0)} points on CIFAR-100"
    if work == "substitute-cerb" and share is not None:
        found = reported.SUBSTITUTION.get((group.architecture, group.task, share))
        accuracy = NONE if found is None else f"{found.forged:.2f} of {found.original:.2f} [Che23]"
    known = "fake3 without flips" if (work, share) == ("fake3", 0) else work
    return accuracy, reported.OUTCOMES.get(known, NONE)


def _table3_fields(
    points: Sequence[Point], tolerance: float, paper: tuple[str, str]
) -> tuple[str, ...]:
    done = [point for point in points if "impossible" not in point.entry]
    if points and not done:
        return (*("impossible",) * 4, paper[0], "impossible", paper[1], *("impossible",) * 3)
    forged = [point.entry["forged"] for point in done]
    networks = {point.seed: point for point in done}.values()
    genuine = [100 * p.genuine for p in networks if p.genuine is not None]
    faithful = [p.entry["forged"]["accuracy"] >= p.own - tolerance for p in done]
    other = [100 * f["differs_from_owner"] for f in forged if f["differs_from_owner"] is not None]
    return (
        done[0].entry["cost"]["had"] if done else NOT_RUN,
        Sample(tuple(100 * point.own for point in networks)).said(),
        Sample(tuple(genuine)).said(),
        Sample(tuple(100 * each["accuracy"] for each in forged)).said(),
        paper[0],
        tally(faithful, "passes", "fails"),
        paper[1],
        Sample(tuple(other)).said(1),
        tally([each["published_signature"] for each in forged], "accepted", "refused"),
        _exact(forged),
    )


def tally(outcomes: Sequence[bool], yes: str, no: str) -> str:
    """What became of each, in a word if it is the same for all."""
    if not outcomes:
        return NOT_RUN
    count, of = sum(outcomes), len(outcomes)
    word = no if count == 0 else yes
    return word if of == 1 else f"{word} ({of if count in {0, of} else count} of {of})"


def _exact(forged: Sequence[Mapping[str, Any]]) -> str:
    """V by keys that are derived: what is not has no p-value, and is refused for that."""
    said = tally([each["accepted"] for each in forged], "accepted", "refused")
    logs = [each["log10_p_value"] for each in forged if each["log10_p_value"] is not None]
    if not forged:
        return said
    return f"{said}: log₁₀ p = {signed(min(logs), 1)}" if logs else f"{said}: not derived"


def table4(costs: Mapping[str, Any] | None) -> Table:
    """What passports cost in time, measured (`costs.measure_costs`) and reported."""
    measured = costs or {"ratios": [], "verification": {}}
    ratios = {(r["architecture"], r["task"], r["ratio"]): r for r in measured["ratios"]}
    rows = []
    for architecture, title in ARCHITECTURES.items():
        for scheme, cost in reported.TABLE4.items():
            own = architecture == "resnet50"
            spread = f"+{cost.training[0]:g} … {cost.training[1]:g} %"
            answer = "V1 folded" if scheme == "V1" else "V2 released"
            seconds = measured["verification"].get(architecture, {})
            black = seconds.get(f"{scheme} by triggers")
            rows.append(
                (
                    title,
                    scheme,
                    _more(ratios.get((architecture, "train", f"{scheme} / plain"))),
                    _more(ratios.get((architecture, "train", f"slow {scheme} / plain"))),
                    f"+{cost.resnet50:g} %" if own else spread,
                    _more(ratios.get((architecture, "infer", f"{answer} / plain"))),
                    _more(ratios.get((architecture, "infer", "V1 presented / plain")))
                    if scheme == "V1"
                    else NONE,
                    f"+{cost.inference:g} %" if cost.inference else "none",
                    (f"{seconds[scheme]:.2f} s" if scheme in seconds else NOT_RUN)
                    + (f", by triggers {black:.2f} s" if black is not None else ""),
                )
            )
    head = (
        *("network", "scheme", "training", "training as in the published code", "paper"),
        *("inference as released", "inference, passport presented", "paper", "verification"),
    )
    return Table("More time than the plain network of the same norm", head, rows)


def _more(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return NOT_RUN
    low, middle, high = (
        100 * (ratio[part] - 1) for part in ("lower_quartile", "median", "upper_quartile")
    )
    return f"{middle:+.0f} % ({low:+.0f} … {high:+.0f}, n={ratio['n']})".replace("-", "−")


def name_of(task: str) -> str:
    """A task by the name that people know."""
    return TASKS.get(task, task)


def _names(architecture: str, *tasks: str) -> str:
    path = " → ".join(name_of(task) for task in tasks if task)
    return f"{ARCHITECTURES.get(architecture, architecture)}, {path}"


def _found(results: Iterable[Entry], when: str, mark: str) -> Sample:
    """Bits or triggers of a mark that are read as its key has them."""
    return sample(
        results, lambda result: result[when][mark]["matches"] / result[when][mark]["bits"]
    )


def _p_values(results: Iterable[Entry], mark: str) -> str:
    """The largest: the weakest of these proofs."""
    logs = [result["marks"][mark]["log10_p_value"] for result in results]
    if not logs:
        return NOT_RUN
    return "none" if None in logs else signed(max(logs), 1)
