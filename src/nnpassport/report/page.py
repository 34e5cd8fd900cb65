"""Pages and pictures that explain a result: one HTML file that fetches nothing and runs nothing."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from nnpassport.scheme import spelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TONES: Mapping[str, str] = {
    "ink": "#1b1f24",
    "muted": "#596068",
    "rule": "#c9ced4",
    "paper": "#fefefe",
    "plain": "#b5480a",
    "genuine": "#00734f",
    "forged": "#1668a8",
    "zone": "#e3f1ea",
}
"""Colours by what they stand for, as on a light page; the page's own style has the dark ones."""

_MARKERS = {"plain": "D", "genuine": "o", "forged": "o"}
_BINS = 50
_WIDTH = 4.6  # inches; a phone shows it at its natural size, so that its text stays readable
_ROW, _EDGES = 0.62, 1.02  # inches: one row, and all that is above and below the rows
_STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.parse_math": False,  # a name may be $\\frac{1}$
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and restyled
    "text.color": TONES["ink"],
    "xtick.color": TONES["ink"],
    "axes.labelcolor": TONES["ink"],
}


class Row(NamedTuple):
    """One line of a panel: a point for each value, and what is to be read off it in words."""

    label: str
    values: Sequence[float]
    tone: str
    note: str


class Panel(NamedTuple):
    """Rows of points over one axis.

    Attributes:
        limits: of the axis, in the unit of the values.
        ticks: where the axis is labelled, and how.
        line: a value that is drawn across all rows, and its name.
        zone: whether what lies beyond the line is shaded.
    """

    title: str
    rows: Sequence[Row]
    axis: str
    limits: tuple[float, float]
    ticks: Mapping[float, str]
    line: tuple[float, str]
    zone: bool = False


def svg(panel: Panel, name: str) -> Markup:
    """The panel as an SVG element to stand in a page, in the page's own colours.

    `name` is put before every id, so that several can stand in one page.
    """
    words = " ".join(f"{r.label}: {r.note}." for r in panel.rows)
    return inline_svg(lambda: _figure([panel]), name, f"{panel.title}. {words}")


def inline_svg(draw: "Callable[[], Figure]", name: str, words: str) -> Markup:
    """A figure as an SVG element that reads `words` aloud; every id in it begins with `name`."""
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with styled(name):
        file = io.StringIO()
        as_text(draw()).savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for tone, colour in TONES.items():
        text = text.replace(colour, f"var(--{tone})")
    label = Markup.escape(spelled(words))
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))  # noqa: S704


def png(panels: Sequence[Panel]) -> bytes:
    """The panels side by side as a picture, for where there is no browser."""
    with styled():
        file = io.BytesIO()
        as_text(_figure(panels)).savefig(
            file, format="png", dpi=160, facecolor=TONES["paper"], metadata={"Software": None}
        )
    return file.getvalue()


def page(template: str, facts: Mapping[str, Any]) -> str:
    """The HTML page of one of `evidence/templates`; all text in `facts` is spelled and escaped.

    Raises:
        jinja2.UndefinedError: the template needs a fact that is not there.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    environment = Environment(
        loader=PackageLoader("nnpassport.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: spelled(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(tones=TONES, **facts)


def percent(share: float, digits: int = 1) -> str:
    """A share in [0, 1] as people read it: 0.981 is "98.1 %"."""
    return unbroken(f"{100 * share:.{digits}f} %")


def unbroken(text: str) -> str:
    """The text in one piece, wherever lines break."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def power_of_ten(exponent: float) -> str:
    """Ten to the exponent, rounded to a whole one: −30.1 is "10⁻³⁰"."""
    raised = f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if round(exponent) else "1"


def small(log10: float) -> str:
    """A p-value given by its logarithm, in two digits however small it is: "6.8·10⁻⁴⁹"."""
    if log10 > -2:
        return f"{10**log10:.2f}"
    exponent = math.floor(log10 - math.log10(0.995))  # 9.97 is written as 1.0 of the next power
    return f"{10 ** (log10 - exponent):.1f}·{power_of_ten(exponent)}"


def styled(salt: str = "") -> AbstractContextManager[None]:
    """Matplotlib's settings for every figure of ours; text in it is text, and no formula."""
    from matplotlib import rc_context  # noqa: PLC0415 (slow to import)

    style: Any = {**_STYLE, "svg.hashsalt": salt}  # a salt makes equal pictures equal bytes
    return rc_context(style)


def as_text(figure: "Figure") -> "Figure":
    """The figure, with every text in it spelled as on a terminal."""
    from matplotlib.text import Text  # noqa: PLC0415 (slow to import)

    for text in figure.findobj(Text):
        text.set_text(spelled(text.get_text()))
    return figure


def _figure(panels: Sequence[Panel]) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    # Not pyplot: it would keep the figure, and choose a window system.
    height = _EDGES + _ROW * max(len(panel.rows) for panel in panels)
    figure = Figure(figsize=(_WIDTH * len(panels), height))
    for index, panel in enumerate(panels):
        left = (index + 0.045) / len(panels)
        bottom, top = 0.52 / height, 0.47 / height
        size = (0.91 / len(panels), 1 - bottom - top)
        _draw(figure.add_axes((left, bottom, *size)), panel)
    return figure


def _draw(axes: "Axes", panel: Panel) -> None:
    count = len(panel.rows)
    axes.set(xlim=panel.limits, ylim=(count, 0), yticks=[])
    axes.set_xticks(list(panel.ticks), list(panel.ticks.values()))
    axes.set_xlabel(panel.axis)
    axes.set_title(panel.title, loc="left", fontweight="bold", pad=19, fontsize=11)
    axes.tick_params(color=TONES["rule"], length=3)
    for side in axes.spines.values():
        side.set_visible(False)
    value, name = panel.line
    if panel.zone:
        axes.axvspan(value, panel.limits[1], color=TONES["zone"], lw=0, zorder=0)
    axes.axvline(value, color=TONES["ink"], lw=1, ls=(0, (4, 3)), zorder=1)
    axes.annotate(
        name, (value, 0), (4, 3), textcoords="offset points", color=TONES["muted"], fontsize=9
    )
    for index, row in enumerate(panel.rows):
        _draw_row(axes, index, row, panel.limits)


def _draw_row(axes: "Axes", index: int, row: Row, limits: tuple[float, float]) -> None:
    middle = index + 0.66
    across = axes.get_yaxis_transform()
    axes.axhline(middle, color=TONES["rule"], lw=0.8, zorder=1)
    free = {"facecolor": TONES["paper"], "edgecolor": "none", "pad": 1.5}  # of the line behind it
    axes.text(0, index + 0.27, row.label, transform=across, va="center", bbox=free)
    axes.text(
        1, index + 0.27, row.note, transform=across, va="center", ha="right", color=TONES["muted"]
    )
    many = len(row.values) > 1
    axes.scatter(
        row.values,
        [middle + offset for offset in stacked(row.values, limits)],
        s=12 if many else 60,
        marker=_MARKERS[row.tone],
        color=TONES[row.tone],
        edgecolors=TONES["paper"],
        linewidths=0.3 if many else 1,
        clip_on=False,
        zorder=3,
    )


def stacked(values: Sequence[float], limits: tuple[float, float]) -> list[float]:
    """How far each point is moved off its row's middle, so that equal values do not hide."""
    low, high = limits
    bins = [round((value - low) / (high - low) * _BINS) for value in values]
    most = max((bins.count(each) for each in bins), default=1)
    step = min(0.08, 0.44 / most)
    order = [bins[:index].count(each) for index, each in enumerate(bins)]
    return [(-1) ** rank * ((rank + 1) // 2) * step for rank in order]
