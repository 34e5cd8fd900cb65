"""Pictures of findings: one line for each, with what was found and the range it is held against."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from markupsafe import Markup

from nnpassport.report.page import TONES, inline_svg, stacked
from nnpassport.scheme import spelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _ROW, _EDGES = 4.6, 0.62, 0.92  # inches, as the other pictures of a page
_LONGEST_LABEL = 34  # characters; what is longer is in full beside the picture
_BREAKS = str.maketrans({"\n": "\\n", "\t": "\\t"})


class Dot(NamedTuple):
    """What was found, in the unit of the axis; a hollow one stands for what is only said."""

    value: float
    tone: str
    hollow: bool = False


class Track(NamedTuple):
    """One line.

    Attributes:
        zone: from where to where the line is shaded, and in which tone.
        mark: a value that the dots are held against.
    """

    label: str
    note: str
    dots: Sequence[Dot] = ()
    zone: tuple[float, float, str] | None = None
    mark: float | None = None


class Tracks(NamedTuple):
    """Lines over one axis; `ticks` say where it is labelled, and how."""

    title: str
    lines: Sequence[Track]
    axis: str
    limits: tuple[float, float]
    ticks: Mapping[float, str]


def tracks_svg(tracks: Tracks, name: str) -> Markup:
    """The picture as an SVG element to stand in a page; every id in it begins with `name`."""
    words = " ".join(f"{line.label}: {line.note}." for line in tracks.lines)
    with warnings.catch_warnings():
        # The browser writes the text, in whichever script; matplotlib's own font does not matter.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        return inline_svg(lambda: _figure(tracks), name, f"{tracks.title}. {words}")


def short(text: str, most: int = _LONGEST_LABEL) -> str:
    """A stranger's text for a picture: one line, spelled out, cut where it is too long."""
    line = spelled(text).translate(_BREAKS)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _figure(tracks: Tracks) -> "Figure":
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    height = _EDGES + _ROW * len(tracks.lines)
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.add_axes((0.05, 0.52 / height, 0.9, 1 - 0.86 / height))
    axes.set(xlim=tracks.limits, ylim=(len(tracks.lines), 0), yticks=[])
    axes.set_xticks(list(tracks.ticks), list(tracks.ticks.values()))
    axes.set_xlabel(tracks.axis)
    axes.set_title(tracks.title, loc="left", fontweight="bold", fontsize=11, pad=9)
    axes.tick_params(color=TONES["rule"], length=3)
    for side in axes.spines.values():
        side.set_visible(False)
    for index, line in enumerate(tracks.lines):
        _draw(axes, index, line, tracks.limits)
    return figure


def _draw(axes: "Axes", index: int, line: Track, limits: tuple[float, float]) -> None:
    middle, across = index + 0.67, axes.get_yaxis_transform()
    upper: Any = {"transform": across, "va": "center"}
    axes.text(0, index + 0.26, short(line.label), **upper)
    axes.text(1, index + 0.26, line.note, ha="right", color=TONES["muted"], **upper)
    if line.zone is not None:
        low, high, tone = line.zone
        axes.barh(middle, high - low, 0.36, left=low, color=TONES[tone], lw=0, zorder=0)
    axes.plot(limits, [middle, middle], color=TONES["rule"], lw=0.8, zorder=1)
    if line.mark is not None:
        ends = [middle - 0.22, middle + 0.22]
        axes.plot([line.mark] * 2, ends, color=TONES["ink"], lw=1.2, zorder=2)
    offsets = stacked([dot.value for dot in line.dots], limits)
    for dot, offset in zip(line.dots, offsets, strict=True):
        axes.plot(
            dot.value,
            middle + offset,
            "o",
            ms=4 if len(line.dots) > 2 else 8,
            mfc=TONES["paper"] if dot.hollow else TONES[dot.tone],
            mec=TONES[dot.tone],
            mew=1.3,
            clip_on=False,
            zorder=3,
        )
