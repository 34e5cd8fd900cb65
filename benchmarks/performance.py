"""What marks cost, measured in turns: docs/performance.md and its picture.

    python benchmarks/performance.py collect    every part of PARTS that results/ does not have yet
    python benchmarks/performance.py render     the page, from results/performance/*.json alone

Numbers are only worth something on a machine that does nothing else meanwhile.
"""

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nnpassport.files.disk import write_atomically
from nnpassport.lab.bench.cases import CHEAPER, LOOP_STEPS
from nnpassport.lab.bench.page import precision_of, subject, title
from nnpassport.lab.results import Results
from nnpassport.lab.tables import table
from nnpassport.report.page import as_text, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = "figures/performance.svg"


class Part(NamedTuple):
    """One call of `nnpassport bench`, and the minutes that it may take."""

    name: str
    options: str
    minutes: float


SMALL = "--architecture alexnet --architecture resnet18"
BOTH = "--only infer --only train"
PARTS = (
    Part("acts", f"{SMALL} --only acts", 1),
    Part("acts-resnet50", "--architecture resnet50 --only acts", 3),
    Part("alexnet", f"--architecture alexnet {BOTH} --only memory", 2),
    Part("alexnet-256", f"--architecture alexnet --batch 256 {BOTH}", 2.5),
    Part("alexnet-bfloat16", f"--architecture alexnet --precision bfloat16 {BOTH}", 1.5),
    Part("resnet18", f"--architecture resnet18 --precision bfloat16 {BOTH}", 4),
    Part("resnet50", f"--architecture resnet50 --batch 16 --precision bfloat16 {BOTH}", 4),
    Part("vit", f"--architecture vit-tiny --precision bfloat16 {BOTH}", 2),
    Part("loop", "--architecture alexnet --precision bfloat16 --only loop", 3.5),
    Part("compiled", f"--architecture alexnet --compile {BOTH}", 4),
)

Entry = Mapping[str, Any]


class Collected(NamedTuple):
    """All files together, in the order of their names."""

    ratios: Sequence[Entry]
    numbers: Sequence[Entry]
    limits: Sequence[Entry]
    not_run: Sequence[Entry]
    sources: Mapping[str, Entry]


def collect(only: Sequence[str]) -> None:
    """Run what is missing, part after part."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = shutil.which("nnpassport", path=Path(sys.executable).parent) or "nnpassport"
    for part in PARTS:
        path = RESULTS / f"{part.name}.json"
        if path.exists() or (only and part.name not in only):
            continue
        words = part.options.split()
        print("nnpassport bench", *words, "--minutes", part.minutes, flush=True)
        subprocess.run(
            [command, "bench", *words, "--minutes", str(part.minutes), "--out", str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def read(folder: Path) -> Collected:
    """What the files of a folder hold.

    Raises:
        SystemExit: the same was measured twice, and it is not for this page to choose.
    """
    files = Results(folder).all()
    seen: dict[tuple[Any, ...], str] = {}
    for name, found in files.items():
        for entry in found["numbers"]:
            cell = tuple(entry[part] for part in _CELL)
            # What others are compared with is measured in every group again.
            if seen.setdefault(cell, name) != name:
                raise SystemExit(f"{cell} is in {seen[cell]}.json and in {name}.json: keep one")

    def all_of(part: str) -> list[Entry]:
        return [entry for found in files.values() for entry in found[part]]

    measured = {tuple(entry[part] for part in _CELL) for entry in all_of("numbers")}
    return Collected(
        all_of("ratios"),
        all_of("numbers"),
        all_of("limits"),
        [e for e in all_of("not_run") if tuple(e[part] for part in _CELL) not in measured],
        {name: found["provenance"] for name, found in files.items()},
    )


_CELL = ("architecture", "batch", "precision", "compiled", "layers", "task", "network", "norm")


def render(folder: Path, out: Path) -> str:
    """Write the page and its picture; returns the page."""
    found = read(folder)
    lines = [
        "# What marks cost",
        "",
        "Rendered by `python benchmarks/performance.py render` from `results/performance/*.json`,",
        "which `python benchmarks/performance.py collect` measures with `nnpassport bench`.",
        "Every ratio is one of networks that ran in turns, in one process: the median over the",
        "turns, and between which values the middle half of them lies.",
        *_targets(found),
        *_table4(found),
        *_pictured(found, out.parent / PICTURE),
        *_cheaper(found),
        *_compiled(found),
        *_acts(found),
        *_loop(found),
        *_memory(found),
        *_HOW,
        *_made(found),
        *_not_run(found),
    ]
    page = "\n".join(lines) + "\n"
    write_atomically(out, page.encode())
    return page


def _where(entry: Entry) -> str:
    return f"{subject(entry)}, {precision_of(entry)}, batch {entry['batch']}"


def _spread(entry: Entry) -> str:
    low, high = entry["lower_quartile"], entry["upper_quartile"]
    return f"{entry['median']:.2f} ({low:.2f}–{high:.2f}, n={entry['n']})"


def _section(heading: str, words: Sequence[str], lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    return ["", f"## {heading}", "", *words, "", *lines] if len(lines) > 2 else []


def _targets(found: Collected) -> list[str]:
    rows = [
        (_where(r), r["task"], title(r), _spread(r), f"{r['target']:.2f}", r["met"])
        for r in found.ratios
        if r["target"] is not None
    ]
    rows += [
        (
            subject(each), "act", each["network"],
            f"{each['median']:.2f} s ({each['lower_quartile']:.2f}–{each['upper_quartile']:.2f}, "
            f"n={each['n']})",
            f"{each['target']:.2f} s", each["met"],
        )
        for each in found.limits
    ]  # fmt: skip
    words = [
        "A target is met if the ratio, to two decimals, is at most the target; it is *within",
        "noise* if only the lower quartile is. Fewer than three turns are not judged. *verify*",
        "derives the key from its seed, collapses its passports and reads the bits.",
    ]
    columns = ("network", "task", "ratio", "measured", "at most", "met")
    return _section("What is aimed at", words, table(columns, rows))


def _table4(found: Collected) -> list[str]:
    wheres = dict.fromkeys(
        _where(r) for r in found.ratios if r["task"] == "train" and not r["compiled"]
    )
    rows = []
    for where in wheres:
        here = {(r["task"], r["ratio"]): r for r in found.ratios if _where(r) == where}
        for scheme, released in (("V1", "V1 folded"), ("V2", "V2 released"), ("V3", "V2 released")):
            trained = here.get(("train", f"{scheme} / plain"))
            if trained is None:
                continue
            slow = here.get(("train", f"slow {scheme} / plain"))
            inferred = here.get(("infer", f"{released} / plain"))
            presented = here.get(("infer", f"{scheme} presented / plain"))
            rows.append(
                (
                    where, scheme, _more(trained), _more(slow), _percent(trained["paper"]),
                    _more(inferred), _more(presented),
                    {"V1": "+10 %"}.get(scheme, "none") if trained["paper"] else "–",
                )
            )  # fmt: skip
    columns = (
        *("network", "scheme", "training", "as the published code", "paper"),
        *("inference, released", "passport presented", "paper"),
    )
    words = [
        "More time than the plain network of the same norm takes. The paper has ranges for",
        "AlexNet and ResNet-18 (its Table 4), and one number each for ResNet-50 (its section",
        "4.3). *As the published code*: `benchmarks/slow_reference.py`, in the same turns. V3",
        "is released as V2 is. A transformer's layers that carry passports have no norm behind",
        "them: there V1 is refused, because it could not be released.",
    ]
    return _section("Beside the paper's Table 4", words, table(columns, rows))


def _more(ratio: Entry | None) -> str:
    if ratio is None:
        return "–"
    low, middle, high = (
        100 * (ratio[part] - 1) for part in ("lower_quartile", "median", "upper_quartile")
    )
    return f"{middle:+.0f} % ({low:+.0f} … {high:+.0f}, n={ratio['n']})".replace("-", "−")


def _percent(paper: str) -> str:
    shares = [f"{100 * (float(number) - 1):.0f}" for number in _numbers(paper)]
    return f"+{'–'.join(shares)} %" if shares else "–"


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+\.\d+", text)


def _cheaper(found: Collected) -> list[str]:
    plain = {(_where(r), r["ratio"]): r for r in found.ratios if r["task"] == "train"}
    rows = [
        (where, name.removesuffix(" / plain"), _spread(r), f"{r['bound']:.2f}", _spread(relative))
        for (where, name), r in plain.items()
        if name.removesuffix(" / plain") in {"V2", "V3", *CHEAPER} and not r["compiled"]
        for relative in [plain.get((where, f"{name} × lower bound"))]
        if relative is not None
    ]
    words = [
        "A step of two branches costs at least 1 + (FLOPs after the fork) / (all FLOPs); with",
        "the private branch on a share of each batch, in every other step, or in the last steps",
        "only, less. Whole cycles are timed and divided by their steps: *late 3/4* is three",
        "steps without the private branch and one with it. What it costs in accuracy:",
        "[results/cheaper.md](../results/cheaper.md).",
    ]
    columns = ("network", "training", "to plain", "bound", "to plain × bound")
    return _section("Below the bound", words, table(columns, rows))


def _compiled(found: Collected) -> list[str]:
    rows = [
        (_where(r), r["task"], title(r), _spread(r))
        for r in found.ratios
        if r["compiled"] and "×" not in r["ratio"]
    ]
    words = [
        "Through `torch.compile`, each network beside a plain one that is compiled as well;",
        "*eager* is the plain one that is not. Compiling itself is not counted.",
    ]
    columns = ("network", "task", "ratio", "measured")
    return _section("Compiled", words, table(columns, rows))


def _acts(found: Collected) -> list[str]:
    scale = {
        (_where(r), r["ratio"].removesuffix(" / plain")): r
        for r in found.ratios
        if r["task"] in {"act", "long act"}
    }
    rows = [
        (
            subject(e), e["network"],
            *(f"{1e3 * e[part]:.1f}" for part in ("median", "min", "max")), e["n"],
            f"{scale[_where(e), e['network']]['median']:.3f}",
        )
        for e in found.numbers
        if e["task"] in {"act", "long act"} and (_where(e), e["network"]) in scale
    ]  # fmt: skip
    words = [
        "Milliseconds, and as a multiple of one plain inference of 64 images. *derive* is all",
        "passports and bits of a key from its seed, *collapse* all mean patches, *read bits*",
        "the signs alone, *verify* the three together with the p-value. *align* puts a released",
        "network beside its reference; *solve* is the attack that solves for passports, on the",
        "default layers. On the processor, whatever else there is.",
    ]
    columns = ("network", "act", "median, ms", "least", "most", "n", "of an inference")
    return _section("Acts on keys", words, table(columns, rows))


def _loop(found: Collected) -> list[str]:
    numbers = {(_where(e), e["network"]): e for e in found.numbers if e["task"] == "loop"}
    rows = []
    for r in found.ratios:
        if r["task"] == "loop":
            whole, bare = (numbers[_where(r), name] for name in r["ratio"].split(" / "))
            speeds = (f"{e['batch'] / e['median']:.0f}" for e in (whole, bare))
            rows.append((_where(r), r["ratio"].split()[0], *speeds, _spread(r)))
    words = [
        f"Images a second of an epoch of `fit`, {LOOP_STEPS} steps with augmentation, journal",
        "and checkpoint and without evaluation, and of the same steps bare, on one batch that",
        "is there already.",
    ]
    columns = ("network", "training", "fit, images/s", "bare", "time of fit / bare")
    return _section("The loop", words, table(columns, rows))


def _memory(found: Collected) -> list[str]:
    ratios = {
        (_where(r), r["ratio"].removesuffix(" / plain")): r
        for r in found.ratios
        if r["task"] == "memory"
    }
    rows = [
        (
            _where(e), e["network"], e["norm"], f"{e['median'] / 2**20:.0f}",
            f"{ratio['median']:.2f}" if ratio else "",
        )
        for e in found.numbers
        if e["task"] == "memory"
        for ratio in [ratios.get((_where(e), e["network"]))]
    ]  # fmt: skip
    words = ["Most that three training steps take, in a process of its own; one run each."]
    columns = ("network", "training", "norm", "MiB", "to plain")
    return _section("Memory", words, table(columns, rows))


_HOW = (
    "",
    "## How it is measured",
    "",
    "A training step is forward, backward and SGD as in `fit`, on one batch that is there",
    "already; an inference one forward in evaluation mode; images have 32 pixels. Networks of a",
    "group run in turns, each turn in another order; turns that warm up do not count. A budget in",
    "minutes is shared out by work, and what did not fit is named below. FLOPs are PyTorch's own",
    "count.",
    "More of it: [benchmarks/README.md](../benchmarks/README.md).",
)


def _made(found: Collected) -> list[str]:
    options = {part.name: f"{part.options} --minutes {part.minutes:g}" for part in PARTS}
    rows = [
        (
            name, f"`{options[name]}`" if name in options else "–", made["device"],
            f"{made['threads']} of {made['cores']}", made["torch"], made["date"],
            (made["commit"] or "?")[:12], f"{made['wall_seconds'] / 60:.1f}",
        )
        for name, made in found.sources.items()
    ]  # fmt: skip
    columns = ("file", "options", "device", "threads", "torch", "date", "commit", "minutes")
    return ["", *table(columns, rows)]


def _not_run(found: Collected) -> list[str]:
    missing: dict[tuple[str, str, str], list[str]] = {}
    for e in found.not_run:
        name = f"{e['network']} ({e['norm']})"
        missing.setdefault((_where(e), e["task"], e["reason"]), []).append(name)
    lines = [
        f"- {where}, {task}: {', '.join(names)}: {reason}"
        for (where, task, reason), names in missing.items()
    ]
    never = [
        f"- {architecture}, {precision}{', compiled' if compiled else ''}, batch {batch}, "
        "training and inference: not asked for"
        for architecture in ("alexnet", "resnet18", "resnet50", "vit-tiny")
        for batch in (64, 256)
        for precision in ("float32", "bfloat16")
        for compiled in (False, True)
        if not _timed(found, architecture, batch, precision, compiled)
    ]
    return ["", "## Not run", "", *lines, *never]


def _timed(found: Collected, architecture: str, batch: int, precision: str, compiled: bool) -> bool:
    wanted = (architecture, batch, precision, compiled)
    return any(
        (e["architecture"], e["batch"], e["precision"], e["compiled"]) == wanted
        for e in (*found.numbers, *found.not_run)
        if e["task"] in {"train", "infer"}
    )


_INK, _MUTED, _RULE, _OURS, _SLOW, _PAPER = (
    *("#1b1f24", "#596068", "#c9ced4"),
    *("#0072b2", "#d55e00", "#e8c468"),
)
_SHOWN = ("V1", "V2", "V3", *CHEAPER, "slow V1", "slow V2", "slow V3")


def _pictured(found: Collected, path: Path) -> list[str]:
    panels: dict[str, dict[str, Entry]] = {}
    for r in found.ratios:
        name = r["ratio"].removesuffix(" / plain")
        if r["task"] == "train" and not r["compiled"] and name in _SHOWN:
            panels.setdefault(_where(r), {})[name] = r
    if not panels:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _picture(panels))
    return [
        "",
        "## Training steps, as multiples of the plain network's",
        "",
        f"![Training steps beside their bounds and the paper's]({PICTURE})",
    ]


def _picture(panels: Mapping[str, Mapping[str, Entry]]) -> bytes:
    from matplotlib.figure import Figure  # noqa: PLC0415 (slow to import)

    with styled("performance"):
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        tallest = max(map(len, panels.values()))
        size = (5.4 * columns, rows * (0.9 + 0.27 * tallest) + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes in grid[len(panels) :]:
            axes.remove()
        handles: dict[str, Any] = {}
        for axes, (where, found) in zip(grid, panels.items(), strict=False):
            _panel(axes, where, found)
            there, labels = axes.get_legend_handles_labels()
            handles = {**dict(zip(labels, there, strict=True)), **handles}
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left",
            ncols=2 if columns == 1 else 4,
            frameon=False,
            fontsize=9,
        )
        file = io.BytesIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        as_text(figure).savefig(file, format="svg", facecolor="#ffffff", metadata=nothing)
    return file.getvalue()


def _panel(axes: "Axes", where: str, found: Mapping[str, Entry]) -> None:
    names = [name for name in _SHOWN if name in found]
    axes.set_title(where, loc="left", fontsize=10, fontweight="bold")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", color=_RULE, labelsize=9)
    axes.grid(axis="x", color=_RULE, lw=0.5)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.axvline(1, color=_INK, lw=0.8)
    for line, name in enumerate(names):
        _row(axes, line, found[name], _SLOW if name.startswith("slow") else _OURS)
    axes.set_xlim(left=min(0.9, axes.get_xlim()[0]))


def _row(axes: "Axes", line: int, ratio: Entry, colour: str) -> None:
    paper = [float(number) for number in _numbers(ratio["paper"])]
    if len(paper) == 1:
        axes.plot(paper, [line], color=_PAPER, ls="", marker="o", ms=9, label="paper", zorder=1)
    elif paper:
        width = {"lw": 9, "solid_capstyle": "round"}
        axes.plot(paper, [line] * 2, color=_PAPER, label="paper", zorder=1, **width)
    slow = colour == _SLOW
    axes.plot(
        [ratio["lower_quartile"], ratio["upper_quartile"]],
        [line, line],
        color=colour,
        lw=2.5,
        zorder=2,
    )
    axes.plot(
        [ratio["median"]],
        [line],
        color=colour,
        ls="",
        marker="o",
        ms=5.5,
        zorder=3,
        label="as the published code" if slow else "nnpassport",
    )
    if ratio["bound"] is not None and not slow:
        axes.plot(
            [ratio["bound"]],
            [line],
            color=_INK,
            ls="",
            marker="|",
            ms=11,
            mew=1.6,
            zorder=4,
            label="bound of the FLOPs",
        )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("collect")
    one.add_argument("--only", action="append", default=[], choices=[p.name for p in PARTS])
    two = commands.add_parser("render")
    two.add_argument("--results", type=Path, default=RESULTS)
    two.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    if given.command == "collect":
        collect(given.only)
    else:
        render(given.results, given.out)


if __name__ == "__main__":
    main()
