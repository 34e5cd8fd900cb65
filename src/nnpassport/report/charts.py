"""The pictures of verdicts and rulings: when, which layers, how unlikely, how accurate."""

import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from nnpassport.keys.chance import matches_needed
from nnpassport.report.page import percent, power_of_ten
from nnpassport.report.tracks import Dot, Track, Tracks, short, tracks_svg
from nnpassport.report.words import ALIGNED, p_value

Facts = Mapping[str, Any]

_SHARES = {quarter / 4: f"{25 * quarter} %" for quarter in range(5)}
_NAME = 14  # characters of a claimant's name in a picture
_MOST_LAYERS = 40
_LOG10_RARE = math.log10(0.0005)  # at each end
_DAY = 86_400.0


def pictures(case: Facts) -> dict[str, Markup]:
    """The plots that these facts have numbers for, in order, by name."""
    found = {
        "p-values": _p_values(case),
        "null": _null(case),
        "accuracy": _accuracy(case),
        **{f"layers-{index}": _layers(each) for index, each in enumerate(case["claimants"])},
    }
    return {name: tracks_svg(each, name) for name, each in found.items() if each.lines}


def timeline(case: Facts) -> Markup:
    """When each claim was proved to be there, and when the suspect was."""
    lines = [_claim_line(each) for each in case["claimants"]]
    appeared = case["suspect"]["appeared"]
    when = [] if appeared is None else [Dot(_seconds(appeared), "plain")]
    lines.append(Track("Suspect appeared", _said(appeared) if appeared else "not said", when))
    made = case["made_with"]
    if made is not None:
        dots = [Dot(_seconds(made["time"]), "ink")]
        lines.append(Track("This page was made", _said(made["time"]), dots))
    times = [dot.value for line in lines for dot in line.dots] or [0.0]
    low, high = min(times), max(times)
    pad = max((high - low) * 0.16, _DAY)
    ticks = {low: _day(low)} if high - low < _DAY else {at: _day(at) for at in (low, high)}
    tracks = Tracks(
        "Claims and suspect in time", lines, "date, UTC", (low - pad, high + pad), ticks
    )
    return tracks_svg(tracks, "timeline")


def _claim_line(claimant: Facts) -> Track:
    label, standing = f"Claim of {_name(claimant)}", claimant["standing"]
    if standing is None:
        return Track(label, "none was given")
    if standing["timestamp"] is not None:
        time = standing["timestamp"]["time"]
        return Track(label, f"proved: {_said(time)}", [Dot(_seconds(time), "genuine")])
    claim = standing["claim"]
    date = None if claim is None else claim["date"]
    if date is None:
        return Track(label, "undated")
    return Track(label, f"undated; says {date}", [Dot(_seconds(date), "muted", hollow=True)])


def _p_values(case: Facts) -> Tracks:
    readings = [each for each in _readings(case) if each[2]["log10_p_value"] is not None]
    furthest = max(
        (max(-r["log10_p_value"], -r["log10_alpha"]) for _, _, r in readings), default=1.0
    )
    tens = int(furthest // 10) + 1
    every = next(step for step in (1, 2, 5, 10, 20, 50, 10**6) if tens <= 6 * step)
    limits = (0.0, 10.0 * tens)
    lines = [
        Track(
            f"{name}, {how}" if name else how.capitalize(),
            f"p = {p_value(found)}",
            [Dot(-found["log10_p_value"], "genuine" if found["marked"] else "plain")],
            zone=(-found["log10_alpha"], limits[1], "zone"),
            mark=-found["log10_alpha"],
        )
        for name, how, found in readings
    ]
    ticks = {10.0 * ten: power_of_ten(-10 * ten) for ten in range(0, tens + 1, every)}
    return Tracks("How likely by chance", lines, "p-value, smaller to the right", limits, ticks)


def _null(case: Facts) -> Tracks:
    lines = []
    for name, how, found in _readings(case):
        if how != ALIGNED or not found["alignment"] or not found["alignment"]["null"]["matches"]:
            continue
        null = found["alignment"]["null"]
        rates = [count / null["bits"] for count in null["matches"]]
        whose = f"{name}: " if name else ""
        others = [Dot(rate, "forged") for rate in rates]
        lines += [
            Track(
                f"{whose}{len(rates)} unrelated",
                f"best {percent(max(rates))}",
                others,
                zone=(*_chance(null["bits"]), "rule"),
                mark=0.5,
            ),
            Track(
                f"{whose}the suspect",
                percent(found["match_rate"]),
                [Dot(found["match_rate"], "genuine" if found["marked"] else "plain")],
                zone=(*_chance(null["bits"]), "rule"),
                mark=0.5,
            ),
        ]
    return Tracks("Against unrelated networks", lines, "bits that match", (0, 1), _SHARES)


def _accuracy(case: Facts) -> Tracks:
    lines = [
        Track(
            f"{name}, {how}" if name else how.capitalize(),
            f"{percent(f['accuracy'], 2)}; target {percent(f['target'], 2)}",
            [Dot(f["accuracy"], "genuine" if f["passed"] else "plain")],
            zone=(max(0.0, f["target"] - f["tolerance"]), 1.0, "zone"),
            mark=f["target"],
        )
        for name, how, found in _readings(case)
        if (f := found["fidelity"]) is not None
    ]
    axis = "test images classified rightly"
    return Tracks("Accuracy with the passport", lines, axis, (0, 1), _SHARES)


def _layers(claimant: Facts) -> Tracks:
    readings: Mapping[str, Facts] = claimant["readings"]
    names = list(dict.fromkeys(name for found in readings.values() for name in found["layers"]))
    lines = []
    for layer in names[:_MOST_LAYERS]:
        counts = [found["layers"][layer] for found in readings.values()]
        dots = [
            Dot(hits / bits, "genuine" if found["marked"] else "plain", how != ALIGNED)
            for (how, found), (hits, bits) in zip(readings.items(), counts, strict=True)
        ]
        note = " → ".join(str(hits) for hits, _ in counts) + f" of {counts[0][1]}"
        band = (*_chance(counts[0][1]), "rule")
        lines.append(Track(short(layer, 28), note, dots, zone=band, mark=0.5))
    return Tracks(f"Layers: {_name(claimant)}", lines, "bits that match", (0, 1), _SHARES)


def _chance(bits: int) -> tuple[float, float]:
    """Between which shares all but one in a thousand layers match that know nothing of the key."""
    high = min(1.0, matches_needed(bits, _LOG10_RARE) / bits)
    return 1 - high, high


def _readings(case: Facts) -> Iterator[tuple[str, str, Facts]]:
    """Whose (empty if there is but one), how read, and the verdict."""
    alone = len(case["claimants"]) == 1
    for each in case["claimants"]:
        for how, found in each["readings"].items():
            yield "" if alone else _name(each), how, found


def _name(claimant: Facts) -> str:
    return short(claimant["name"], _NAME)


def _seconds(text: str) -> float:
    time = datetime.fromisoformat(text)
    aware = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds()


def _said(text: str) -> str:
    return text[:16].replace("T", " ")


def _day(seconds: float) -> str:
    days = math.floor(seconds / _DAY)
    return datetime.fromordinal(datetime(1970, 1, 1).toordinal() + days).date().isoformat()
