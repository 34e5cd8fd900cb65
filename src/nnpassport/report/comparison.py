"""The page of `compare`, and the lines that it prints: each number beside what chance gives.

It says what `--json` prints, no more and no less, and fetches and runs nothing.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nnpassport.alignment.order import log10_fixed_points
from nnpassport.files.disk import write_atomically, writing
from nnpassport.report.page import page, percent, small
from nnpassport.report.tracks import Dot, Track, Tracks, short, tracks_svg

Facts = Mapping[str, Any]
SAID = {
    "related": "Related: not independently initialised",
    "none": "No sign that one was made from the other",
    "undecided": "Undecided",
}
_MEANING = {
    "none": "the same numbers",
    "cast": "the same numbers, kept in a narrower kind of number",
    "rounded": "one lies on a grid: it was quantised",
    "pruned": "one is the other with zeros",
    "sparse": "few numbers differ",
    "low rank": "the difference has few singular values, as a merged adapter has",
    "noise": "the difference has no structure",
    "training": "alike, and the difference has structure: trained further",
    "unlike": "no more alike than unrelated tensors may be",
}
_SHARES = {quarter / 4: f"{25 * quarter} %" for quarter in range(5)}
_MOST_LINES = 24
_MOST_ROWS = 60
_LOG10_RARE = -3.0

Rows = list[tuple[str, str, str]]


def summary(facts: Facts) -> Rows:
    """What was found, and what chance or unrelated networks give, line by line."""
    found = [_equal_row(facts), *_kind_rows(facts), _order_row(facts)]
    for each in facts["unrelated"]:
        both = ", ".join(f"{side.upper()} {_placed(each[side])}" for side in ("a", "b"))
        what = "both have its order" if each["explains"] else "chance"
        found.append((f"order shared with {each['name']}", both, what))
    if (aligned := facts["aligned"]) is not None:
        found.append(_aligned_row(aligned))
    if (mixture := facts["mixture"]) is not None:
        found += _mixture_rows(mixture)
    if (card := facts.get("card")) is not None:
        found.append(("the card of A", card["says"], ""))
    return found


def _equal_row(facts: Facts) -> tuple[str, str, str]:
    telling = [each for each in facts["equal"] if each["telling"]]
    moved = sum(each["how"] != "equal" for each in telling)
    renamed = sum(each["a"] != each["b"] for each in telling)
    numbers = sum(each["numbers"] for each in telling)
    total = max(1, min(each["numbers"] for each in facts["networks"]))
    if not telling:
        return ("equal tensors", "none", "none, but constants")
    text = f"{len(telling)}, with {percent(min(1.0, numbers / total))} of the numbers"
    if renamed:
        text += f"; {renamed} under other names"
    if moved:
        text += f"; {moved} in another order"
    return ("equal tensors", text, "none, but constants")


def _kind_rows(facts: Facts) -> Rows:
    rows = []
    for kind, share in facts["kinds"].items():
        some = [each for each in facts["differences"] if each["kind"] == kind]
        alike = [each["correlation"] for each in some]
        sizes = [each["relative"] for each in some]
        text = (
            f"{percent(share)} of the numbers compared; correlation {_range(alike)}, size of the "
            f"difference {_range(sizes)}"
        )
        chance = 1 / math.sqrt(max(1, sum(each["numbers"] for each in some)))
        rows.append((f"difference: {kind}", text, f"correlation 0 ± {chance:.1g}, size 1.4"))
    return rows


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _order_row(facts: Facts) -> tuple[str, str, str]:
    order = facts["order"]
    if order["log10_p"] is None:
        return ("order of hidden units", "could not be counted", "")
    return (
        "order of hidden units",
        f"{order['fixed']} of {order['units']} in one place; p = {small(order['log10_p'])}",
        f"{len(order['orders'])} on average",
    )


def _placed(order: Facts) -> str:
    if order["log10_p"] is None:
        return "not counted"
    return f"{order['fixed']} of {order['units']}, p = {small(order['log10_p'])}"


def _aligned_row(aligned: Facts) -> tuple[str, str, str]:
    p = "" if aligned["log10_p"] is None else f"; p = {small(aligned['log10_p'])}"
    others = [f"mixtures {max(aligned['mixtures'], default=0.0):.2f} at most"]
    if aligned["strangers"]:
        others.insert(0, f"unrelated {max(aligned['strangers']):.2f} at most")
    return ("aligned, likeness of units", f"{aligned['likeness']:.2f}{p}", ", ".join(others))


def _mixture_rows(mixture: Facts) -> Rows:
    rows = [
        (f"share of {name} in A", f"{value:.3f}", f"0 ± {error:.1g}")
        for name, (value, error) in mixture["coefficients"].items()
    ]
    return [*rows, ("left over of A", percent(mixture["residual"]), "100 %")]


def write_comparison_page(facts: Facts, path: Path) -> None:
    """Write the page of a comparison, from what `compare --json` prints.

    Raises:
        UnwritableOutputError: the page cannot be written; what was there before is untouched.
    """
    text = comparison_page(facts)
    with writing(path):
        # Names of files need not be text; what is not comes out as \\udc80 and the like.
        write_atomically(path, text.encode("utf-8", "backslashreplace"))


def comparison_page(facts: Facts) -> str:
    """The page of a comparison."""
    made = facts.get("made_with")
    a, b = (short(each["file"], 80) for each in facts["networks"])
    return page(
        "comparison.html.j2",
        {
            "title": "nnpassport: comparison",
            "ruling": f"{SAID[facts['outcome']]}: “{a}” and “{b}”.",
            "accepted": facts["outcome"] == "related",
            "rows": [],
            "summary": summary(facts),
            "facts": facts,
            "chart": _picture(facts),
            "orders": facts["order"]["orders"][:_MOST_ROWS],
            "left_out": max(0, len(facts["order"]["orders"]) - _MOST_ROWS),
            "differences": facts["differences"][:_MOST_ROWS],
            "more": max(0, len(facts["differences"]) - _MOST_ROWS),
            "equal": [each for each in facts["equal"] if each["telling"]][:_MOST_ROWS],
            "meaning": _MEANING,
            "small": small,
            "percent": percent,
            "commands": _commands(facts),
            "made": made,
        },
    )


def _commands(facts: Facts) -> list[str]:
    made = facts.get("made_with")
    if made is None:
        return []
    inside = [
        each["file"] if Path(each["file"]).name == name else f"{each['file']}/{name}"
        for each in facts["networks"]
        for name in each["digests"]
    ]
    return [made["command"], *(f"sha256sum {shlex.quote(each)}" for each in inside)]


def _picture(facts: Facts) -> Markup | None:
    """Units in one place, axis by axis, with what chance gives in all but one of a thousand."""
    orders = facts["order"]["orders"]
    lines = [
        Track(
            short(each["what"], 34),
            f"{each['fixed']} of {each['units']}",
            [Dot(each["fixed"] / each["units"], "genuine")],
            zone=(0.0, _by_chance([each["units"]]) / each["units"], "rule"),
        )
        for each in sorted(orders, key=lambda each: -each["units"])[:_MOST_LINES]
    ]
    for other in facts["unrelated"]:
        for side in ("a", "b"):
            order = other[side]
            if not order["units"]:
                continue
            sizes = [each["units"] for each in order["orders"]]
            lines.append(
                Track(
                    short(f"{side.upper()} and {other['name']}", 34),
                    f"{order['fixed']} of {order['units']}",
                    [Dot(order["fixed"] / order["units"], "plain")],
                    zone=(0.0, _by_chance(sizes) / order["units"], "rule"),
                )
            )
    if not lines:
        return None
    tracks = Tracks("Hidden units in one place", lines, "share of the units", (0.0, 1.0), _SHARES)
    return tracks_svg(tracks, "order")


def _by_chance(sizes: Sequence[int]) -> int:
    """How many fixed points all but one in a thousand pairs of independent networks have."""
    count = len(sizes)
    while count < sum(sizes) and log10_fixed_points(count, sizes) > _LOG10_RARE:
        count += 1
    return count
