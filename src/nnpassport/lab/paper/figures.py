"""The paper's Figures 2b, 3, 4 and 5 from what was measured, with reported values drawn in."""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from nnpassport.lab.findings import Entry, Findings, Group, Point, Sample
from nnpassport.lab.paper import reported
from nnpassport.lab.paper.contents import SCHEMES
from nnpassport.lab.paper.tables import ARCHITECTURES, name_of
from nnpassport.report.page import as_text, stacked, styled

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, which people who confuse red and green tell apart.
_INK, _MUTED, _RULE = "#1b1f24", "#596068", "#c9ced4"
_PLAIN, _GENUINE, _FORGED, _TRAINED = "#1b1f24", "#009e73", "#0072b2", "#d55e00"
_ACCURACY, _BITS = "#0072b2", "#d55e00"
_WIDE, _HIGH = 3.6, 2.5  # inches of a panel
_EDGES = 0.75  # inches above, for the legend
_LIMITS = (-3.0, 108.0)


class Strip(NamedTuple):
    """A line of accuracies in percent, each a dot; `paper` is the reported one."""

    label: str
    values: Sequence[float]
    colour: str
    paper: float | None = None


class Curve(NamedTuple):
    """Points (share, percent) in order of the share; several seeds have several points a share."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    marker: str
    dashed: bool = False


Paint = Callable[["Axes"], None]


def _fig2_panel(findings: Findings, group: Group) -> Paint | None:
    """Plain network, genuine passport, counterfeit ones."""
    plain = _trained(findings, group._replace(scheme=""), "accuracy")
    return _strips(
        [
            Strip("plain", plain, _PLAIN),
            Strip("genuine", _presented(findings, group), _GENUINE),
            _random(findings, group),
        ]
    )


def _fig4_panel(findings: Findings, group: Group) -> Paint | None:
    """The valid passport, fake1 and fake2."""
    trained = _forged(findings.carried_out(group, "fake2"))
    paper = reported.FAKE2.get((group.architecture, group.task))
    return _strips(
        [
            Strip("valid", _presented(findings, group), _GENUINE),
            _random(findings, group),
            Strip("fake2", trained, _TRAINED, paper),
        ]
    )


def _random(findings: Findings, group: Group) -> Strip:
    forged = _forged(findings.carried_out(group, "fake1"))
    return Strip("fake1", forged, _FORGED, reported.FAKE1.get(group.task))


def _fig3_panel(findings: Findings, group: Group) -> Paint | None:
    """Accuracy and bits found by the share of the parameters that is pruned."""
    points = findings.carried_out(group, "prune")
    if not points:
        return None
    unpruned = {point.seed: point.before for point in points}
    accuracy = [(0.0, 100 * before["accuracy"]) for before in unpruned.values()]
    accuracy += [(p.strength, 100 * p.entry["accuracy"]) for p in points]
    found = [(0.0, _bits(before)) for before in unpruned.values()]
    found += [(p.strength, _bits(p.entry)) for p in points]
    curves = (
        Curve("accuracy", accuracy, _ACCURACY, "o"),
        Curve("bits found", found, _BITS, "^", dashed=True),
    )
    base = Sample(tuple(value for _, value in accuracy[: len(unpruned)])).mean

    def draw(axes: "Axes") -> None:
        _curves(axes, curves)
        axes.set_xlabel("share of the parameters pruned, %")
        if group.task not in reported.TASKS:
            return
        low, high = (base - loss for loss in reversed(reported.PRUNED_LOSS))
        at = 100 * reported.PRUNED_SHARE
        axes.plot(
            [at, at],
            [low, high],
            color=_MUTED,
            lw=5,
            alpha=0.45,
            solid_capstyle="butt",
            label="paper, at 60 %: 5 to 25 points lost",
        )

    return draw


def _fig5_panel(findings: Findings, group: Group) -> Paint | None:
    """Accuracy of fake3 by the share of the bits that is flipped."""
    points = findings.carried_out(group, "fake3")
    if not points:
        return None
    curve = Curve(
        "fake3",
        [(p.strength, 100 * p.entry["forged"]["accuracy"]) for p in points],
        _ACCURACY,
        "o",
    )
    base = 100 * Sample(tuple({point.seed: point.own for point in points}.values())).mean

    def draw(axes: "Axes") -> None:
        _curves(axes, (curve,))
        axes.axhline(base, color=_MUTED, lw=1, ls=(0, (4, 3)), label="the network itself")
        axes.set_xlabel("share of the bits flipped, %")
        if group.task not in reported.TASKS:
            return
        there = [(100 * share, base + lost) for share, lost in reported.FAKE3.items()]
        axes.plot(
            *zip(*there, strict=True),
            ls="",
            marker="x",
            ms=9,
            mew=2,
            color=_INK,
            label="paper, CIFAR-100: 5 and 50 points lost",
        )

    return draw


def _trained(findings: Findings, group: Group, metric: str) -> list[float]:
    return [100 * found["metrics"][metric] for found in findings.trained(group).values()]


def _presented(findings: Findings, group: Group) -> list[float]:
    """With the owner's passport, on all test images: V1 is released with it folded in."""
    one_branch = group.scheme == "passport-v1"
    return _trained(findings, group, "accuracy" if one_branch else "private_accuracy")


def _forged(points: Sequence[Point]) -> list[float]:
    return [100 * point.entry["forged"]["accuracy"] for point in points]


def _bits(entry: Entry) -> float:
    owner: Entry = entry["owner"]
    return 100 * owner["matches"] / owner["bits"]


def picture(findings: Findings, name: str) -> bytes | None:
    """The figure as SVG; None where nothing of it was measured.

    A row of panels for each network and task of which anything was: V1, V2 and V3.
    """
    plan = findings.plan
    rows = []
    for architecture in plan.architectures:
        for task in plan.tasks:
            title = f"{ARCHITECTURES.get(architecture, architecture)}, {name_of(task)}"
            drawn = {
                f"{title}: {column}": PANELS[name](findings, Group(architecture, task, *kind))
                for column, kind in SCHEMES.items()
            }
            if any(drawn.values()):
                rows.append(drawn)
    if not rows:
        return None
    with styled(f"{plan.name}-{name}"):
        file = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        as_text(_figure(rows)).savefig(file, format="svg", facecolor="#ffffff", metadata=nothing)
    return file.getvalue()


def _figure(rows: Sequence[Mapping[str, Paint | None]]) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    columns, height = len(SCHEMES), _HIGH * len(rows) + _EDGES
    figure = Figure(figsize=(_WIDE * columns, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    handles: dict[str, Artist] = {}
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, (title, draw) in zip(axes_row, row.items(), strict=True):
            _frame(axes, title)
            if draw is None:
                axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=_MUTED)
                axes.set(xticks=[], yticks=[])
            else:
                draw(axes)
            there, labels = axes.get_legend_handles_labels()
            handles |= dict(zip(labels, there, strict=True))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper left",
        ncols=len(handles),
        frameon=False,
        fontsize=9,
    )
    return figure


PANELS: Mapping[str, Callable[[Findings, Group], Paint | None]] = {
    "fig2": _fig2_panel,
    "fig3": _fig3_panel,
    "fig4": _fig4_panel,
    "fig5": _fig5_panel,
}
"""What paints the panel of one scheme, or None where nothing of it was measured."""


def _frame(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.tick_params(color=_RULE, length=3, labelsize=9)
    axes.xaxis.label.set_fontsize(9)
    for side in axes.spines.values():
        side.set_visible(False)


def _strips(strips: Sequence[Strip]) -> Paint | None:
    if not any(strip.values for strip in strips):
        return None

    def draw(axes: "Axes") -> None:
        axes.set(xlim=_LIMITS, ylim=(len(strips) - 0.45, -0.75), xlabel="accuracy, %")
        axes.set_yticks(range(len(strips)), [strip.label for strip in strips])
        axes.tick_params(axis="y", length=0)
        for line, strip in enumerate(strips):
            _strip(axes, line, strip)

    return draw


def _strip(axes: "Axes", line: int, strip: Strip) -> None:
    axes.axhline(line, color=_RULE, lw=0.8, zorder=1)
    heights = [line + 0.9 * offset for offset in stacked(strip.values, _LIMITS)]
    many = len(strip.values) > 1
    axes.scatter(
        strip.values,
        heights,
        s=9 if len(strip.values) > 10 else 30,
        color=strip.colour,
        zorder=3,
        lw=0,
    )
    said = "not run"
    if strip.values:
        count = f", n={len(strip.values)}"
        said = f"{'mean ' if many else ''}{Sample(tuple(strip.values)).mean:.1f}{count}"
    across = axes.get_yaxis_transform()
    axes.text(1, line - 0.22, said, transform=across, ha="right", fontsize=8.5, color=_MUTED)
    if strip.paper is not None:
        axes.plot(
            [strip.paper],
            [line],
            ls="",
            marker="x",
            ms=9,
            mew=2,
            color=_INK,
            zorder=4,
            label="paper",
        )


def _curves(axes: "Axes", curves: Sequence[Curve]) -> None:
    axes.set(xlim=(-3, 103), ylim=(-3, 108), ylabel="%")
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.yaxis.label.set_fontsize(9)
    axes.grid(axis="y", color=_RULE, lw=0.6)
    for curve in curves:
        points = sorted(curve.points)
        means = [
            (100 * share, Sample(tuple(value for _, value in same)).mean)
            for share, same in ((s, list(g)) for s, g in groupby(points, key=lambda p: p[0]))
        ]
        axes.plot(
            *zip(*means, strict=True),
            color=curve.colour,
            lw=1.6,
            ls=(0, (4, 2)) if curve.dashed else "-",
            label=curve.label,
            marker=curve.marker,
            ms=4.5,
        )
        if len(points) > len(means):
            shares, values = zip(*points, strict=True)
            across = [100 * share for share in shares]
            axes.scatter(across, values, s=8, color=curve.colour, alpha=0.5, lw=0)
