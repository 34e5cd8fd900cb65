"""The page of a mark in ordinary answers, from what was run: see `answers.py`."""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from scipy.stats import binom

from nnpassport.embedding.schemes.answers import ANSWERS
from nnpassport.embedding.schemes.cosine import RATIO
from nnpassport.files.disk import write_atomically
from nnpassport.lab.tables import table
from nnpassport.report.page import as_text, styled

COUNTS = (300, 1_000, 3_000)
BEFORE = ("the network before the mark", "that one, trained as long without a mark")
MARKED, COPY = "marked", "copy by labels"
STRANGER = "a stranger's, trained on true labels"
MOST_LOST, AGREES = 0.5, 0.9
UNTESTED = "not put to the test"
NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "alexnet": "AlexNet",
    "resnet18": "ResNet-18",
    "resnet18:0.5": "ResNet-18 of half the width",
}

HEAD = """# A mark in ordinary answers

Rendered by `python benchmarks/answers.py` from `results/answers.json`. CIFAR-10 at {size} pixels;
the owner's convolutional network of width {width} sees {train:,} images for {epochs} epochs and
{marking} more with the mark, copies are of another architecture and see answers to {train:,}
other images for {copying} epochs. {coins} functions, {pictures:,} test images to ask, {seeds}
seed(s). Numbers are log₁₀ p; accuracy is on all 10,000 test images, in percent. How it works:
[docs/answers.md](../docs/answers.md).

These are small networks on small pictures, trained for minutes: what they show is the order of
things, and not what AlexNet and ResNet-18 reach on CIFAR-10 and CIFAR-100. {larger}

![p against how many images were asked](../docs/figures/answers.svg)
"""
LARGER = "That is under [Larger](#larger)."
NOT_LARGER = """That was not run;
`python benchmarks/answers.py --part larger` is for it."""
AIMS = """## What was aimed at

{table}

*Lost* is against the network before the mark and against that one trained as long without a mark.
A copy that agrees with the marked network on 90 % of the images was aimed at as well. None of
these does, so that aim was not put to the test: copies here are much less accurate than what they
copy.
"""
NOTES = """## Reading the table

- Strangers, and the networks before the mark, are coins.
- Rounding and noise make more images necessary, smoothing changes nothing, int8 little. An ensemble
  with an honest network weakens the mark more than by its share.
- Copies carry it by scores and by labels, and so do copies of copies. The more true labels are
  mixed in, the less.
- Thieves with labels of their own: *nulled* fits, with so many labels that the owner has not, the
  linear correction that makes the marked network's answers best, in a bank of random filters of the
  thief's own (the owner's is secret). What it costs is the difference to *marked* in accuracy. A
  strong correction takes the mark out at the price of many right answers, a weak one keeps both.
  More than 3,000 labels were not tried.
- Tuning weakens it; on adversarial examples it takes most of it, and many right answers.
"""


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(table(head, rows))


def runs_in(facts: dict[str, Any], part: str) -> list[dict[str, Any]]:
    """The runs of a part, each of its own sizes: {plan, rows, provenance}.

    A part used to have one run.
    """
    found = facts.get(part, [])
    return [found] if isinstance(found, dict) else found


def row_of(facts: dict[str, Any], name: str, strength: float) -> dict[str, Any] | None:
    """The first row of this name and ε, if it was run."""
    rows = (e for e in facts["rows"] if (e["name"], e["strength"]) == (name, strength))
    return next(rows, None)


def aims(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was aimed at, what came out, and whether that is enough, for each ε that was run."""
    most, rows = facts["plan"]["pictures"], []
    for strength in dict.fromkeys(each["strength"] for each in facts["rows"]):
        marked = row_of(facts, MARKED, strength)
        if marked is None:
            continue
        for name in BEFORE:
            before = row_of(facts, name, strength)
            lost = 100 * (before["accuracy"] - marked["accuracy"]) if before else math.nan
            words = f"at most 0.5 points lost, against {name}"
            rows.append((f"{strength}", words, f"{lost:.1f}", verdict(lost <= 0.5)))
        copy = row_of(facts, COPY, strength)
        for what, each, key, aim in (
            ("marked, scores of 1,000 images", marked, "scores 1000", -30),
            (f"marked, labels of {most:,}", marked, f"labels {most}", -12),
            (f"copy by labels, labels of {most:,}", copy, f"labels {most}", -9),
            (f"copy by labels, scores of {most:,}", copy, f"scores {most}", -9),
        ):
            if each is not None:
                words = f"{what}: at most 10^{aim}"
                rows.append((f"{strength}", words, f"{each[key]:.1f}", verdict(each[key] <= aim)))
    return rows


def verdict(enough: bool) -> str:
    """In a word."""
    return "reached" if enough else "**not reached**"


def rendered(facts: dict[str, Any]) -> str:
    """The page."""
    most = facts["plan"]["pictures"]
    shown = ("scores 300", "scores 1000", f"scores {most}", "labels 1000", f"labels {most}")
    rows = [
        (
            f"{each['strength']}",
            each["name"],
            f"{100 * each['accuracy']:.1f}",
            *(f"{each[key]:.1f}" for key in shown),
        )
        for each in facts["rows"]
    ]
    heads = ("scores of 300", "of 1,000", f"of {most:,}", "labels of 1,000", f"of {most:,}")
    presented = [
        f"ε {each['strength']}: {100 * each['with the key']:.1f} %"
        for each in facts["rows"]
        if "with the key" in each
    ]
    return "\n".join(
        [
            HEAD.format(**facts["plan"], larger=LARGER if "larger" in facts else NOT_LARGER),
            AIMS.format(table=table_of(("ε", "aim", "came out", ""), aims(facts))),
            "## Everything that was read",
            "",
            table_of(("ε", "network", "accuracy", *heads), rows),
            "",
            f"F, the accuracy with the key presented: {'; '.join(presented)}. The network is",
            "trained to be right as it is released, so F is below that.",
            "",
            NOTES,
            *parts_of(facts),
        ]
    )


DIRECTIONS = """## In how many directions

Another run, in bfloat16, by `python benchmarks/answers.py --part directions`: the same sizes with
64 functions of each class, in the widest 64 directions of what the owner's filters see, and with 16
in the widest 16. *Lost* is against the network trained as long without a mark; the thief who nulls
has labels of his own.

{table}

Copies learn the widest directions best: where all of ε is in 16 of them a copy shows at 0.6 what
takes 0.8 in 64, and the network loses half as much. Who has labels nulls 16 directions at a lower
price than 64: that is the choice. `--setting coins=160` makes 16 of each of ten classes. Accuracies
are of 10,000 images and one seed: a few tenths of a point are noise.
"""
LARGER_WORDS = """## Larger

By `python benchmarks/answers.py --part larger`. Aimed at were the same numbers as above, and of
copies those that agree with the marked network on 90 % of the images or more. *Mirrored*: functions
to which a picture and its mirror image are one; all others are `filters`.

{runs}
"""
RUN = """### {task}: {owner}, copied by {thief}{taught}

{owner} at {size} pixels, trained on {train:,} images for {epochs} epochs and {marking} more with
the mark; {thief} trained on labels that it gave to {train:,} others{views}, for {copying} epochs.

    {command}

{aims}

{table}
"""
MIRRORS = """## Mirror images

By `python benchmarks/answers_mirrors.py`: functions that tell a picture from its mirror image
(`filters`) and functions to which both are one (`mirrored`), {a_class} of each class, ε {strength},
of {asked:,} small pictures of CIFAR-10. Networks are solved and not trained, each on random filters
of its own; without a mark the owner's is right about {before:.1f} %. A copy has the labels of
pictures, or their mirror images as well, under the same label or asked for. *Averaged* is what a
network says of a picture and of its mirror image, the mean. The median of {seeds} keys.

{table}

Copies whose mirror images got the picture's label, and means over both, lose a third of `filters`
and more, and nothing of `mirrored`, which show hardly less where nobody mirrors anything.
"""
WAVES = """## Cosine watermarks

By `python benchmarks/answers.py --part cosine`: {coins} waves on probabilities, ε {strength}, the
other sizes as in the run above. *Ratio* is the published score of the first wave of each class, of
10,000 images: the median of {classes} and the largest; the code of its authors calls a suspect
marked above {ratio:g}.

{table}

Among {coins} waves one alone is weak, so the ratio of a single one hardly says more of a marked
network than of an honest one, where their phases together decide. As published there is one wave,
which a wrapper adds; that was not trained here.
"""
UNIFORM = """## Keys of nobody

By `python benchmarks/answers_uniform.py`: p-values of keys that nobody has marked with, each with
{coins} functions of its own, of {asked} inputs. *KS* is the p-value of a Kolmogorov-Smirnov test
against uniform.

{table}

A network that gives one label to every input says nothing: its p is 1 for every key. Of 2,000 keys
the least p is about 1 in 2,000, and 1 in 20,000 in one row of ten. Rows of one set of data have the
same keys, so that rows of networks that are alike are no rows of their own.
"""
TAIL = """### How small they are

By `python benchmarks/answers_uniform.py --tail N`: other keys of nobody, by scores. How many
are below each p, beside how many of so many uniform numbers are; in brackets, how often there are
so many or more.

{table}
"""


def parts_of(facts: dict[str, Any]) -> list[str]:
    """The sections that were run."""
    found = []
    for part in runs_in(facts, "directions"):
        found.append(DIRECTIONS.format(table=directions_table(part)))
    if "mirrors" in facts:
        part = facts["mirrors"]
        seeds = len({each["seed"] for each in part["rows"]})
        words = {**part, "before": 100 * part["before"], "seeds": seeds}
        found.append(MIRRORS.format(**words, table=mirrors_table(part["rows"])))
    larger = runs_in(facts, "larger")
    if larger:
        found.append(LARGER_WORDS.format(runs="\n".join(map(larger_run, larger))))
    for part in runs_in(facts, "cosine"):
        first = part["rows"][0]
        words = {"coins": first["coins"], "strength": first["strength"], "ratio": RATIO}
        table = waves_table(part["rows"])
        found.append(WAVES.format(**words, classes=first.get("classes", 10), table=table))
    for name, text, lines in (("uniform", UNIFORM, uniform_table), ("tail", TAIL, tail_table)):
        if name in facts:
            part = facts[name]
            words = {"coins": part["coins"], "asked": part["asked"]}
            found.append(text.format(**words, table=lines(part["rows"])))
    return found


def larger_run(part: dict[str, Any]) -> str:
    """The section of one run of the larger networks."""
    plan = {"task": "cifar10", "views": 0, "teaching": ANSWERS.teaching, **part["plan"]}
    words = {each: NAMES.get(plan[each], plan[each]) for each in ("task", "owner", "thief")}
    views = ", asked anew for each augmented image" if plan["views"] else ""
    head = ("seed", "a class", "ε", "aim", "came out", "")
    reached = table_of(head, larger_aims(part))
    usual = plan["teaching"] == ANSWERS.teaching
    taught = "" if usual else f", a share of {plan['teaching']:g} of the loss for its old scores"
    sizes = ("task", "owner", "thief", "epochs", "marking", "copying", "teaching")
    asked = " ".join(f"--{name} {plan[name]}" for name in sizes)
    cells = ",".join(dict.fromkeys(cell_of(row).asked for row in part["rows"]))
    command = f"python benchmarks/answers.py --part larger {asked} --cells {cells}"
    filled = {**plan, **words, "views": views, "taught": taught, "command": command}
    return RUN.format(**filled, aims=reached, table=directions_table(part))


def larger_aims(part: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was aimed at with each key of a run, what came out, and whether that is enough."""
    lines, most = [], part["plan"]["pictures"]
    for cell in dict.fromkeys(map(cell_of, part["rows"])):
        rows = {each["name"]: each for each in part["rows"] if cell_of(each) == cell}
        if MARKED not in rows:
            continue
        aimed = [*lost_aims(rows), *least_aims(rows, most)]
        shown = (f"{cell.seed}", cell.functions, f"{cell.strength}")
        lines += [(*shown, *each) for each in aimed]
    return lines


def lost_aims(rows: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """Points that were lost, against each network without the mark."""
    found = []
    for name in BEFORE:
        words = f"at most {MOST_LOST} points lost, against {name}"
        if name in rows:
            lost = 100 * (rows[name]["accuracy"] - rows[MARKED]["accuracy"])
            found.append((words, f"{lost:.1f}", verdict(lost <= MOST_LOST)))
        else:
            found.append((words, "", UNTESTED))
    return found


def least_aims(rows: dict[str, dict[str, Any]], most: int) -> list[tuple[str, ...]]:
    """How small p is of the marked network, and of a copy that is as good as was aimed at."""
    found, copy = [], rows.get(COPY)
    for what, key, aim in (
        ("scores of 1,000 images", "scores 1000", -30),
        (f"labels of {most:,}", f"labels {most}", -12),
    ):
        value = rows[MARKED][key]
        found.append((f"marked, {what}: at most 10^{aim}", f"{value:.1f}", verdict(value <= aim)))
    for what in ("labels", "scores"):
        words = f"copy by labels that agrees on 90 %, {what} of {most:,}: at most 10^-9"
        if copy is None:
            found.append((words, "", UNTESTED))
            continue
        value, agrees = copy[f"{what} {most}"], copy["agrees"]
        came = f"{value:.1f}, agrees on {100 * agrees:.1f} %"
        found.append((words, came, verdict(value <= -9) if agrees >= AGREES else UNTESTED))
    return found


class RowKey(NamedTuple):
    """Which key a row was read with."""

    seed: int
    coins: int
    strength: float
    kind: str
    a_class: int

    @property
    def asked(self) -> str:
        """As `--cells` has it."""
        usual = self.kind == ANSWERS.kind
        return f"{self.a_class}:{self.strength}" + ("" if usual else f":{self.kind}")

    @property
    def functions(self) -> str:
        """How many of a class, and of which kind if it is not the usual one."""
        usual = self.kind in {ANSWERS.kind, "waves"}
        return f"{self.a_class}" if usual else f"{self.a_class} {self.kind}"


def cell_of(row: dict[str, Any]) -> RowKey:
    """Of a row of a part; older ones are of ten classes and of filters."""
    a_class = row["coins"] // row.get("classes", 10)
    return RowKey(row["seed"], row["coins"], row["strength"], row.get("kind", "filters"), a_class)


def directions_table(part: dict[str, Any]) -> str:
    """A line for each network and key."""
    most, seeds = part["plan"]["pictures"], len({each["seed"] for each in part["rows"]}) > 1
    keys = ("scores 1000", f"scores {most}", "labels 1000", f"labels {most}")
    without = {cell_of(r): r["accuracy"] for r in part["rows"] if r["name"] == BEFORE[1]}
    rows = []
    for each in part["rows"]:
        cell = cell_of(each)
        own = each["name"] == MARKED or each["name"].startswith("nulled")
        lost = 100 * (without.get(cell, math.nan) - each["accuracy"])
        agrees = f"{100 * each['agrees']:.1f}" if each["name"] == COPY else ""
        rows.append(
            (
                *([f"{cell.seed}"] if seeds else []),
                cell.functions,
                f"{cell.strength}",
                each["name"],
                f"{100 * each['accuracy']:.1f}",
                f"{lost:.1f}" if own else "",
                agrees,
                *(f"{each[key]:.1f}" for key in keys),
            )
        )
    head = (*(["seed"] if seeds else []), "a class", "ε", "network", "accuracy", "lost", "agrees")
    shown = ("scores of 1,000", f"of {most:,}", "labels of 1,000", f"of {most:,}")
    return table_of((*head, *shown), rows)


def mirrors_table(rows: list[dict[str, Any]]) -> str:
    """A line for each network and kind of functions: the medians of all keys."""
    lines = []
    for kind, network in dict.fromkeys((each["kind"], each["network"]) for each in rows):
        cells = [f"`{kind}`", network]
        for averaged in (False, True):
            same = (kind, network, averaged)
            own = [r for r in rows if (r["kind"], r["network"], r["averaged"]) == same]
            medians = {k: np.median([r[k] for r in own]) for k in ("accuracy", "scores", "labels")}
            cells += [f"{100 * medians['accuracy']:.1f}"]
            cells += [f"{medians[way]:.1f}" for way in ("scores", "labels")]
        lines.append(tuple(cells))
    shown = ("accuracy", "scores", "labels")
    head = ("functions", "network", *shown, *(f"{each}, averaged" for each in shown))
    return table_of(head, lines)


def waves_table(rows: list[dict[str, Any]]) -> str:
    """A line for each network."""
    lines = [
        (
            each["name"],
            f"{100 * each['accuracy']:.1f}",
            *(f"{each[k]:.1f}" for k in ("scores 1000", "scores 10000", "labels 10000")),
            f"{np.median(each['ratios']):.1f}",
            f"{max(each['ratios']):.1f}",
        )
        for each in rows
    ]
    shown = ("scores of 1,000", "of 10,000", "labels of 10,000", "ratio", "largest")
    return table_of(("network", "accuracy", *shown), lines)


def tail_table(rows: list[dict[str, Any]]) -> str:
    """A line for each network: how many p-values are so small, beside what chance makes."""
    levels = list(rows[0]["below"])
    lines = []
    for each in rows:
        cells = []
        for level in levels:
            found, wanted = each["below"][level], each["keys"] * 10 ** int(level)
            often = binom.sf(found - 1, each["keys"], 10 ** int(level))
            cells.append(f"{found}, {wanted:g} ({often:.2f})")
        lines.append(
            (each["data"], each["network"], f"{each['keys']:,}", f"{each['ks']:.3f}", *cells)
        )
    shown = [f"p ≤ 10^{level}" for level in levels]
    return table_of(("data", "network", "keys", "KS", *shown), lines)


def uniform_table(rows: list[dict[str, Any]]) -> str:
    """A line for each data set, network and way of reading."""
    lines = []
    for each in rows:
        silent = each["least"] > -1e-9
        ks = "says nothing" if silent else f"{each['ks']:.3f}"
        lines.append(
            (
                each["data"],
                each["kind"],
                each["network"],
                each["read"],
                f"{each['keys']:,}",
                ks,
                f"{100 * each['hundredth']:.2f}",
                f"{each['least']:.1f}",
            )
        )
    heads = ("data", "functions", "network", "read by", "keys", "KS")
    return table_of((*heads, "p ≤ 0.01, %", "least log₁₀ p"), lines)


def drawn(facts: dict[str, Any], path: Path) -> None:
    """The picture: log₁₀ p against the number of images asked."""
    shown = {
        "marked": "marked",
        "copy by scores": "copy by scores",
        "copy by labels": "copy by labels",
        STRANGER: "a stranger's",
    }
    most, kind = facts["plan"]["pictures"], facts["rows"][0]["kind"]
    counts = [*(n for n in COUNTS if n < most), most]
    with styled("answers"):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for colour, (name, label) in enumerate(shown.items()):
            found = [e for e in facts["rows"] if e["name"] == name and e["kind"] == kind]
            for what, style in (("scores", "-"), ("labels", "--")) if found else ():
                values = [found[0][f"{what} {count}"] for count in counts]
                axes.plot(counts, values, style, color=f"C{colour}", label=f"{label}, {what}")
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("ordinary images asked")
        axes.set_ylabel("log₁₀ p")
        axes.axhline(-9, color="grey", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks([0, -5, -10, -30, -100], ["0", "−5", "−10", "−30", "−100"])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-200, 1)
        figure.legend(fontsize=8, loc="outside lower center", ncols=4)
        buffer = io.BytesIO()
        as_text(figure).savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(path, buffer.getvalue())
