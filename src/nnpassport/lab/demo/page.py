"""The demo's page and its two pictures."""

from collections.abc import Mapping, Sequence
from statistics import fmean

from nnpassport.lab.demo.result import OWNER, DemoResult, log10_p, p_value, ruling, table
from nnpassport.report.page import Panel, Row, page, percent, power_of_ten, small, svg
from nnpassport.scheme import Verdict

KEY_FILE = "alice.key"
FILES: Mapping[str, str] = {
    "demo.html": "This page.",
    "demo.png": "Its pictures.",
    KEY_FILE: f"{OWNER}'s secret key; only you can read it.",
    "owner": "Her network, what accuracy it has with her passport, and, in anchor, the network "
    "before the mark: as secret as the key.",
    "released": "What she gives away: a plain network with no secret in it.",
    "plain": "The unrelated network.",
}
COMMANDS: Sequence[tuple[str, str]] = (
    (f"nnpassport verify released --key {KEY_FILE}", "Accepted: her mark is in it."),
    (f"nnpassport verify plain --key {KEY_FILE}", "Refused: it never carried the mark."),
    (
        f"nnpassport verify released --key {KEY_FILE} --data digits --split test",
        "The same with the test of fidelity: does her passport sustain the accuracy?",
    ),
    (f"nnpassport key show {KEY_FILE}", "All of the key that is not secret."),
    ("nnpassport embed --help", "Mark a network of your own."),
)
"""What to try next, in the demo's folder, and what comes of it."""


def panels(result: DemoResult) -> tuple[Panel, Panel]:
    """The paper's figure 2b on this network, and what figure 2b leaves out: the evidence."""
    return _accuracies(result), _evidence(result)


def html(result: DemoResult) -> str:
    """The demo's page: self-contained, for light and dark, wide and narrow, screen and print."""
    names = ("accuracy", "evidence")
    facts = {
        "title": "nnpassport: the whole story",
        "ruling": ruling(result),
        "accepted": result.as_expected,
        "rows": table(result),
        "result": result,
        "charts": dict(zip(names, map(svg, panels(result), names), strict=True)),
        "alpha": small(result.owner.log10_alpha),
        "best_forged": percent(max(result.forged_accuracies)),
        "made": result.provenance,
        "owner_name": OWNER,
        "commands": COMMANDS,
        "files": FILES,
    }
    return page("demo.html.j2", facts)


def _accuracies(result: DemoResult) -> Panel:
    single = (
        ("Plain network", result.plain_accuracy, "plain"),
        ("Passport absent", result.public_accuracy, "plain"),
        ("Genuine passport", result.private.accuracy, "genuine"),
    )
    forged = result.forged_accuracies
    return Panel(
        "Accuracy by passport",
        [
            *(Row(label, [value], tone, percent(value)) for label, value, tone in single),
            Row(
                f"{len(forged)} random passports",
                forged,
                "forged",
                f"mean {percent(fmean(forged))}",
            ),
        ],
        axis="test images classified rightly",
        limits=(0, 1),
        ticks={quarter / 4: f"{25 * quarter} %" for quarter in range(5)},
        line=(result.chance, "chance"),
    )


def _evidence(result: DemoResult) -> Panel:
    alpha = result.owner.log10_alpha
    tens = int(max(-alpha, -log10_p(result.owner)) // 10) + 1
    every = 1 + tens // 8
    return Panel(
        "Evidence by key",
        [
            _key_row(f"{OWNER}'s key, released network", [result.owner], "genuine"),
            _key_row(f"{OWNER}'s key, unrelated network", [result.unrelated], "plain"),
            _key_row(f"{len(result.random_keys)} random keys", result.random_keys, "forged"),
        ],
        axis="p-value, smaller to the right",
        limits=(0, 10 * tens),
        ticks={10.0 * ten: power_of_ten(-10 * ten) for ten in range(0, tens + 1, every)},
        line=(-alpha, f"accepted: p ≤ {small(alpha)}"),
        zone=True,
    )


def _key_row(label: str, verdicts: Sequence[Verdict], tone: str) -> Row:
    best = p_value(min(verdicts, key=log10_p))
    note = best if len(verdicts) == 1 else f"best {best}"
    return Row(label, [-log10_p(each) for each in verdicts], tone, note)
