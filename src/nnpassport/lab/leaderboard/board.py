"""The leaderboard as a page in Markdown, a page in HTML and a picture, all from the same lines."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nnpassport.attacks.table import ATTACKS
from nnpassport.catalog import CATALOG
from nnpassport.files.disk import write_atomically
from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.lab.leaderboard.standings import (
    KEPT,
    Ambiguity,
    Outcome,
    Removal,
    Standing,
    standings,
)
from nnpassport.lab.plans import Plan
from nnpassport.lab.store import Store
from nnpassport.lab.tables import table
from nnpassport.report.page import as_text, page, styled
from nnpassport.report.provenance import provenance
from nnpassport.scheme import UnreadableDataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_RUN, NOTHING = "not run", "–"
# Okabe and Ito's, which people who confuse red and green tell apart; text says it as well.
_COLOURS = {"good": "#bfe3d5", "middling": "#f6e2b3", "bad": "#f2b8a0", "": "#ffffff"}
_LEGEND = {
    "good": "the mark is found; nobody else is accepted",
    "middling": "hidden only together with the accuracy",
    "bad": "hidden in a network that works; somebody else is accepted",
}
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_INK, _MUTED = "#1b1f24", "#596068"


class Box(NamedTuple):
    """One cell of the board: what it says, and how that is for the owner.

    Attributes:
        tone: "good", "middling", "bad", or "" where there is nothing to judge.
    """

    text: str
    tone: str = ""
    more: str = ""


class Board(NamedTuple):
    """Lines and columns of the board, in the order of their tables."""

    lines: Sequence[Standing]
    removals: Sequence[str]
    ambiguities: Sequence[str]


def board_of(lines: Sequence[Standing]) -> Board:
    """The lines, every attack that was run on one of them, and every informed thief."""
    known = {n for line in lines for n in line.removals if ATTACKS[n].informed}
    run = {n for line in lines for n, each in line.removals.items() if each is not None}
    return Board(
        lines,
        [n for n in ATTACKS if n in run | known],
        [n for n in ATTACKS if any(line.ambiguities.get(n) is not None for line in lines)],
    )


def removal_box(found: Removal | None, *, applies: bool = True) -> Box:
    """What an attack left of a mark: log₁₀ p at the strength that kept the accuracy."""
    if not applies:
        return Box(NOTHING)
    if found is None:
        return Box(NOT_RUN)
    if found.outcome is Outcome.IMPOSSIBLE:
        return Box("impossible", more="the attack cannot be carried out on this network")
    if found.log10_p is None:
        tone = "good" if found.outcome is Outcome.HELD else "middling"
        word = "held" if found.outcome is Outcome.HELD else "with accuracy"
        return Box(word, tone, "no strength kept the accuracy")
    at = "" if found.strength is None else f" at {found.strength:g}"
    more = f"log10 p = {found.log10_p:.1f}{at}, accuracy {100 * (found.accuracy or 0):.1f} %"
    more += ", read aligned" if found.aligned else ""
    said = said_p(found.log10_p)
    tones = {Outcome.HELD: "good", Outcome.SPOILT: "middling", Outcome.REMOVED: "bad"}
    words = {Outcome.HELD: said, Outcome.SPOILT: f"{said}*", Outcome.REMOVED: f"lost, {said}"}
    return Box(words[found.outcome], tones[found.outcome], more)


def said_p(log10_p: float) -> str:
    """A p-value by its exponent: "10⁻⁶¹"; 1 where there is no evidence at all."""
    return "1" if round(log10_p) == 0 else f"10{f'{log10_p:.0f}'.translate(_RAISED)}"


def forged_box(found: Ambiguity | None, *, exact: bool) -> Box:
    """How many of a forger's keys a verification accepted."""
    if found is None:
        return Box(NOT_RUN)
    if not found.possible:
        return Box("impossible")
    won = found.exact if exact else found.published
    more = "" if found.best_log10_p is None else f"smallest p {said_p(found.best_log10_p)}"
    return Box(f"{won} of {found.tries}", "bad" if won else "good", more if exact else "")


def strangers_box(line: Standing, *, exact: bool) -> Box:
    """How many keys were accepted on networks that do not carry them."""
    if line.strangers is None:
        return Box(NOT_RUN)
    won = line.strangers.exact if exact else line.strangers.published
    more = f"smallest p {said_p(line.strangers.least_log10_p)}" if exact else ""
    return Box(f"{won} of {line.strangers.readings}", "bad" if won else "good", more)


def thieves_box(line: Standing) -> Box:
    """How many informed thieves took the mark out."""
    found = line.against(informed=True)
    run = {name: each for name, each in found.items() if each is not None}
    if not run:
        return Box(f"{NOT_RUN} (of {len(found)})" if found else NOTHING)
    won = [name for name in run if name in line.broken_by]
    return Box(f"{len(won)} of {len(run)}", "bad" if won else "good", ", ".join(won))


def worth(line: Standing) -> list[Box]:
    """Accuracy, what embedding cost of it, what a step costs, and the mark."""
    lost = NOT_RUN if line.lost is None else _points(line.lost)
    cost = NOT_RUN if line.cost is None else f"{line.cost[1]:.2f}"
    spread = "" if line.cost is None else f"middle half {line.cost[0]:.2f} to {line.cost[2]:.2f}"
    p = "none" if line.mark.log10_p is None else said_p(line.mark.log10_p)
    return [
        Box(f"{100 * line.accuracy:.2f}"),
        Box(lost),
        Box(cost, more=spread),
        Box(f"{line.mark.found} of {line.mark.of}"),
        Box(p),
    ]


WORTH = ("Accuracy, %", "Lost, points", "Step, × plain", "Found", "p")


def rows(board: Board) -> list[tuple[Standing, list[Box], list[Box], list[Box]]]:
    """Every line with its boxes: what it is worth, what removes it, what forges it."""
    return [
        (
            line,
            worth(line),
            [removal_box(line.removals.get(n), applies=n in line.removals) for n in board.removals],
            _ambiguous(line),
        )
        for line in board.lines
    ]


def _ambiguous(line: Standing) -> list[Box]:
    return [
        *(_ways(line, exact=exact) for exact in (False, True)),
        *(strangers_box(line, exact=exact) for exact in (False, True)),
    ]


def _ways(line: Standing, *, exact: bool) -> Box:
    """In how many of the ways that apply a forger's key was accepted."""
    run = {n: each for n, each in line.ambiguities.items() if each is not None and each.possible}
    if not run:
        return Box(NOT_RUN if line.ambiguities else NOTHING)
    won = [n for n, each in run.items() if (each.exact if exact else each.published)]
    return Box(f"{len(won)} of {len(run)}", "bad" if won else "good", ", ".join(won))


def markdown(plan: Plan, board: Board, *, picture: str | None = None) -> str:
    """The page: one picture, what it says, and every number in tables."""
    found = rows(board)
    parts = ["# The field side by side", "", *_story(plan, board), ""]
    if picture:
        parts += [f"![Every scheme against every attack]({picture})", ""]
    parts += ["## What each scheme costs, and how it stands", ""]
    parts += table(
        ("Scheme", "From", *WORTH, "Removed by", "Informed thieves"),
        [
            [
                line.label,
                line.source,
                *(box.text for box in boxes),
                ", ".join(line.broken_by) or "none",
                thieves_box(line).text,
            ]
            for line, boxes, _, _ in found
        ],
    )
    parts += ["", "## What removes it", "", _REMOVALS, ""]
    parts += table(
        ("Attack", *(line.label for line in board.lines)),
        [
            [name, *(row[2][place].text for row in found)]
            for place, name in enumerate(board.removals)
        ],
    )
    parts += ["", "## Who else can claim it", "", _AMBIGUITIES, ""]
    parts += table(
        ("Scheme", *CLAIMED),
        [[line.label, *(box.text for box in boxes)] for line, _, _, boxes in found],
    )
    parts += ["", "Each way by itself:", ""]
    parts += table(
        ("Scheme", "Forgery", "Published", "Exact", "Smallest p of a derived key"),
        [row for line in board.lines for row in _forgeries(line)],
    )
    parts += ["", "## What the attacks are", ""]
    named = [*board.removals, *board.ambiguities]
    parts += table(("Attack", "What it does"), [[n, ATTACKS[n].summary] for n in named])
    parts += ["", "## What was left out", ""]
    parts += [f"- `{name}`: {why}." for name, why in plan.skipped.items()]
    return "\n".join([*parts, ""])


def _forgeries(line: Standing) -> list[list[str]]:
    return [
        [
            line.label,
            name,
            forged_box(found, exact=False).text,
            forged_box(found, exact=True).text,
            "none" if found is None or found.best_log10_p is None else said_p(found.best_log10_p),
        ]
        for name, found in line.ambiguities.items()
    ]


CLAIMED = ("Forged, published", "Forged, exact", "Strangers, published", "Strangers, exact")
"""Heads of the columns of who else can claim a network."""

_REMOVALS = (
    "What is left of the mark: the p-value at the strength that hurt it most and kept the "
    f"accuracy within {100 * KEPT:.0f} points. **lost** is above α = "
    f"{said_p(LOG10_ALPHA_COMMITTED)}. A star says that another strength hides it, together with "
    "more of the accuracy; *with accuracy*, that this is so of every strength that was tried; "
    "*held*, that no strength kept the accuracy and none hid the mark. Marks of weights are read "
    "aligned where channels were turned or moved. The last removals before channels are turned are "
    "those of informed thieves, who know where a mark of weights must lie and have unlabelled "
    "images: all others are weak attackers, and to hold against them says little "
    "(`results/real.md` has informed thieves on networks that the world trained, "
    "`results/thieves.md` on marks of weights side by side)."
)
_AMBIGUITIES = (
    "In how many of the ways that apply a forger's key was accepted, and how many keys of "
    "strangers were: drawn honestly and read on networks which nobody marked with them. "
    "*Published* is the rule of the scheme's own paper and the accuracy with the key presented; "
    "*exact* is a derived key's p-value at the same α."
)
_ERASED = (
    "An order of hidden units (`order`) needs no run to be last: any permutation of the units, "
    "which costs nothing and moves no answer, takes it away, and no alignment brings it back "
    "(`results/licensees.md` has what it withstands). It stands beside the others."
)
_ORDER = (
    "In order of how many attacks removed the mark, then of the accuracy lost; where fewer were "
    "run, less is known. *Forged* and *strangers* count what the rule of the scheme's own paper "
    "accepts."
)


def _story(plan: Plan, board: Board) -> list[str]:
    tuning, made = _counted(plan.tuning.epochs, "epoch"), provenance()
    spent = _counted(plan.attackers.epochs, "epoch")
    images = "all" if plan.tuning_images is None else f"{plan.tuning_images:,}"
    seeds = ", ".join(map(str, sorted({line.network.seed for line in board.lines})))
    kinds = sorted({(line.network.architecture, line.network.task) for line in board.lines})
    named = " and ".join(f"{architecture} on {task}" for architecture, task in kinds)
    return [
        f"{_which(board)} put into the same trained network ({named}, batch norm) "
        f"in {tuning} on {images} training images; *lost* is against that network trained on as "
        f"long without a mark. Attackers had {plan.attack_images or 'all'} images and {spent}. "
        f"Accuracies under attack are of {plan.attack_test_images or 'all'} test images. "
        f"Seeds: {seeds}; one network a line. "
        f"Rendered by nnpassport {made['nnpassport']}; each result says by what it was made.",
        "",
        _found(board),
        "",
        _ORDER,
        "",
        *([_ERASED, ""] if "order" not in {line.scheme for line in board.lines} else []),
        *table(RANKED, [[place, f"**{mark}**", *rest] for place, mark, *rest in ranking(board)]),
    ]


def _which(board: Board) -> str:
    """Whose lines there are: of the whole catalog, or of so many of its schemes."""
    there = {line.scheme for line in board.lines}
    absent = [name for name in CATALOG if name not in there]
    if not absent:
        return "Every scheme of the catalog was"
    return f"{len(there)} of the catalog's {len(CATALOG)} schemes (not: {', '.join(absent)}) were"


def _found(board: Board) -> str:
    """What all cells together say."""
    tried = [each for line in board.lines for each in line.removals.values() if each is not None]
    removed = sum(each.outcome is Outcome.REMOVED for each in tried)
    ways = [each for line in board.lines for each in line.ambiguities.values() if each is not None]
    ways = [each for each in ways if each.possible]
    strange = [line.strangers for line in board.lines if line.strangers is not None]
    read = sum(each.readings for each in strange)
    return (
        f"Of {len(tried)} attacks on a mark that were run, {removed} hid it and left the network "
        f"within {100 * KEPT:.0f} points. Of {len(ways)} ways to forge a key, the published rules "
        f"accepted {sum(each.published > 0 for each in ways)} and the exact ones "
        f"{sum(each.exact > 0 for each in ways)}. Of {read} readings of keys on networks that do "
        f"not carry them, the published rules accepted {sum(each.published for each in strange)} "
        f"and the exact ones {sum(each.exact for each in strange)}."
    )


RANKED = (
    *("Place", "Mark", "Removed by", "By informed thieves", "Lost, points", "Step, × plain"),
    *("Forged by", "Strangers"),
)
"""Heads of the ranking; forgeries and strangers are by the rule of the scheme's own paper."""


def ranking(board: Board) -> list[list[str]]:
    """The marks, best first: how many attacks removed it, what it costs, who else is accepted."""
    attacked = [line for line in board.lines if line.tried]
    best = sorted(attacked, key=lambda line: (len(line.broken_by), line.lost or 0.0))
    return [[str(place), *_ranked(line)] for place, line in enumerate(best, 1)]


def _ranked(line: Standing) -> list[str]:
    ways = {n: each for n, each in line.ambiguities.items() if each is not None}
    forged = [name for name, each in ways.items() if each.published]
    by = f": {', '.join(forged)}" if forged else ""
    weak = line.against(informed=False)
    won = [name for name in line.broken_by if name in weak]
    return [
        line.label,
        f"{len(won)} of {line.tried} run, of {len(weak)}",
        _by_thieves(line),
        NOTHING if line.lost is None else _points(line.lost),
        NOT_RUN if line.cost is None else f"{line.cost[1]:.2f}",
        f"{len(forged)} of {_counted(len(ways), 'way')}{by}" if ways else NOT_RUN,
        strangers_box(line, exact=False).text,
    ]


def _by_thieves(line: Standing) -> str:
    found, box = line.against(informed=True), thieves_box(line)
    return box.text if any(each is not None for each in found.values()) else NOT_RUN


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


def html(plan: Plan, board: Board) -> str:
    """The same as one HTML page that fetches nothing and runs nothing."""
    facts: Mapping[str, Any] = {
        "title": "nnpassport: the field side by side",
        "ruling": f"{len({line.scheme for line in board.lines})} schemes, "
        f"{len(board.removals)} attacks on the mark, {len(board.ambiguities)} forgeries of keys",
        "accepted": True,
        "rows": [],
        "story": [_plain(text) for text in (*_story(plan, board)[:1], _found(board))],
        "order": _plain(_ORDER),
        "ranked": RANKED,
        "ranking": ranking(board),
        "board": rows(board),
        "worth": WORTH,
        "removals": board.removals,
        "claimed": CLAIMED,
        "about": {"removals": _plain(_REMOVALS), "ambiguities": _plain(_AMBIGUITIES)},
        "attacks": [(n, ATTACKS[n].summary) for n in (*board.removals, *board.ambiguities)],
        "left_out": plan.skipped,
        "made": provenance(),
    }
    return page("leaderboard.html.j2", facts)


def _plain(text: str) -> str:
    return text.replace("**", "").replace("*", "")


def picture(board: Board) -> bytes:
    """The board as SVG, as wide as a page's column: a line for each mark, a box for each attack."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    heads = [*WORTH[1:3], *board.removals, *CLAIMED]
    lines = [
        (line.label, [_brief(box) for box in (*boxes[1:3], *lost, *forged)])
        for line, boxes, lost, forged in rows(board)
    ]
    wide, high = _LABELS + _LEANING + _COLUMN * len(heads), 2.3 + _LINE * len(lines)
    with styled("leaderboard"):
        figure = Figure(figsize=(wide, high))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(-_LABELS, wide - _LABELS), ylim=(high - 1.55, -1.55))
        axes.axis("off")
        _draw(axes, heads, lines)
        file = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        as_text(figure).savefig(file, format="svg", facecolor="#ffffff", metadata=nothing)
    return file.getvalue()


_LABELS, _LEANING, _COLUMN, _LINE = 1.85, 0.45, 0.345, 0.255  # inches; so is all that is drawn
_BRIEF = {NOT_RUN: "", "impossible": NOTHING, "with accuracy": "*"}


def _brief(box: Box) -> Box:
    """The box in five letters: of a p-value its exponent, of a count its numbers."""
    text = _BRIEF.get(box.text, box.text)
    if text.startswith("lost"):
        return box._replace(text="lost")
    exponent = text.removeprefix("10").translate(_LOWERED) if text.startswith("10⁻") else text
    return box._replace(text=exponent.removeprefix("-").replace(" of ", "/"))


def _draw(axes: "Axes", heads: Sequence[str], lines: Sequence[tuple[str, Sequence[Box]]]) -> None:
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    for place, head in enumerate(heads):
        left = (place + 0.45) * _COLUMN
        axes.text(left, -0.06, head, rotation=55, fontsize=8, color=_MUTED)
    for row, (label, boxes) in enumerate(lines):
        top, middle = row * _LINE, (row + 0.5) * _LINE
        axes.text(-0.07, middle, label, ha="right", va="center", fontsize=8)
        for place, box in enumerate(boxes):
            corner = (place * _COLUMN + 0.01, top + 0.01)
            size = (_COLUMN - 0.02, _LINE - 0.02)
            axes.add_patch(Rectangle(corner, *size, color=_COLOURS[box.tone], lw=0))
            axes.text(
                (place + 0.5) * _COLUMN,
                middle,
                box.text,
                ha="center",
                va="center",
                fontsize=7.5,
                color=_INK if box.tone else _MUTED,
            )
    _explain(axes, len(lines) * _LINE + 0.16)


def _explain(axes: "Axes", top: float) -> None:
    """What the colours and the numbers stand for, below the lines."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    for place, (tone, meaning) in enumerate(_LEGEND.items()):
        left = (-1.75, 1.05, 3.55)[place]
        axes.add_patch(Rectangle((left, top), 0.2, 0.16, color=_COLOURS[tone], lw=0))
        axes.text(left + 0.27, top + 0.085, meaning, va="center", fontsize=8)
    said = "Numbers under attacks: what evidence is left, −log₁₀ p. Empty: not run."
    axes.text(-1.75, top + 0.36, said, va="center", fontsize=8, color=_MUTED)


def render(plan: Plan, store: Store, out: Path) -> list[str]:
    """Write the page to `out`, HTML beside it and the picture into `figures`; returns the paths.

    Raises:
        UnreadableDataError: a result is not that of its cell, or nothing was run at all.
    """
    lines = standings(plan, store)
    if not lines:
        raise UnreadableDataError(
            f"{store.results / plan.name} has no network of recipe {plan.name}, so there is "
            "nothing to show; run `nnpassport leaderboard` without --render-only first"
        )
    drawn = board_of(lines)
    figure = out.parent / "figures" / f"{out.stem}.svg"
    figure.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(figure, picture(drawn))
    write_atomically(out, markdown(plan, drawn, picture=f"figures/{figure.name}").encode())
    write_atomically(out.with_suffix(".html"), html(plan, drawn).encode())
    return [str(path) for path in (out, out.with_suffix(".html"), figure)]
