"""Curves for pages: shares in percent over one axis."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from nnpassport.report.page import TONES, inline_svg, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (4.6, 3.3)  # inches, as wide as the other pictures of a page


class Line(NamedTuple):
    """One curve: its name, points (x, share in [0, 1]) in order of x, and its tone."""

    label: str
    points: Sequence[tuple[float, float]]
    tone: str


class Plot(NamedTuple):
    """Several curves over one axis.

    Attributes:
        level: a share that is drawn across, and what to call it.
    """

    title: str
    lines: Sequence[Line]
    axis: str
    level: tuple[float, str]


def plot_svg(plot: Plot, name: str) -> Markup:
    """The plot as an SVG element to stand in a page, in the page's own colours."""
    ends = (
        f"{line.label}: from {percent(line.points[0][1])} to {percent(line.points[-1][1])}."
        for line in plot.lines
    )
    return inline_svg(lambda: _figure(plot), name, f"{plot.title}. {' '.join(ends)}")


def _figure(plot: Plot) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    figure = Figure(figsize=_SIZE)
    axes = figure.add_axes((0.12, 0.16, 0.84, 0.70))
    axes.set_title(plot.title, loc="left", fontweight="bold", fontsize=11, pad=12)
    axes.set_ylim(-0.02, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel(plot.axis)
    axes.tick_params(color=TONES["rule"], length=3, labelcolor=TONES["ink"])
    axes.grid(axis="y", color=TONES["rule"], lw=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    value, words = plot.level
    axes.axhline(value, color=TONES["ink"], lw=1, ls=(0, (4, 3)))
    right = max((point[0] for line in plot.lines for point in line.points), default=1.0)
    axes.annotate(
        words,
        (right, value),
        (0, 4),
        textcoords="offset points",
        color=TONES["muted"],
        fontsize=9,
        ha="right",
    )
    for line, marker in zip(plot.lines, "osD^", strict=False):
        xs, ys = zip(*line.points, strict=True)
        axes.plot(xs, ys, color=TONES[line.tone], marker=marker, ms=4.5, lw=1.6, label=line.label)
    axes.legend(frameon=False, fontsize=9, loc="best", labelcolor=TONES["ink"])
    return figure
