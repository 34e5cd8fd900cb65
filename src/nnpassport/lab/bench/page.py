"""Results as Markdown."""

from collections.abc import Mapping
from typing import Any

from nnpassport.lab.tables import table

_RATIO_COLUMNS = (
    "architecture", "batch", "precision", "task", "ratio", "measured", "middle half",
    "by processor time", "n", "target, at most", "met", "paper, Table 4",
)  # fmt: skip
_NUMBER_COLUMNS = (
    "architecture", "batch", "precision", "task", "network", "norm", "median", "min", "max", "n",
)  # fmt: skip


def render(results: Mapping[str, Any]) -> str:
    """The results as Markdown: ratios beside targets and paper, numbers, and what was not run."""
    source = results["provenance"]
    bounds = ", ".join(f"{name} {bound:.3f}" for name, bound in results["lower_bounds"].items())
    ratio_rows = [
        (
            subject(r), r["batch"], precision_of(r), r["task"], title(r),
            f"{r['median']:.2f}", f"{r['lower_quartile']:.2f}–{r['upper_quartile']:.2f}",
            _number(r["by_processor_time"]), r["n"], _number(r["target"]), r["met"], r["paper"],
        )
        for r in results["ratios"]
    ]  # fmt: skip
    number_rows = [
        (
            subject(e), e["batch"], precision_of(e), e["task"], e["network"], e["norm"],
            *(f"{e[key] * scale:.1f} {unit}" for key in ("median", "min", "max")), e["n"],
        )
        for e in results["numbers"]
        for scale, unit in [(2**-20, "MiB") if e["task"] == "memory" else (1e3, "ms")]
    ]  # fmt: skip
    missing = [
        f"- {subject(case)}, batch {case['batch']}, {precision_of(case)}, {case['task']}, "
        f"{case['network']} ({case['norm']} norm): {case['reason']}"
        for case in results["not_run"]
    ]
    return "\n".join(
        [
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in source.items()),
            "",
            f"Lower bound of a step of two branches, as a multiple of a plain step: {bounds}.",
            "",
            *table(_RATIO_COLUMNS, ratio_rows),
            "",
            *(f"{line}\n" for line in map(_limit, results.get("limits", []))),
            *table(_NUMBER_COLUMNS, number_rows),
            *(["", "Not run:", "", *missing] if missing else []),
        ]
    )


def subject(entry: Mapping[str, Any]) -> str:
    """The network, and where its passports are if that is not by default."""
    everywhere = ", passports everywhere" if entry.get("layers") else ""
    return f"{entry['architecture']}{everywhere}"


def title(ratio: Mapping[str, Any]) -> str:
    """The ratio's name, with the norm where the name does not say which."""
    name: str = ratio["ratio"]
    return f"{name} ({ratio['norm']} norm)" if name.endswith("/ eager") else name


def precision_of(entry: Mapping[str, Any]) -> str:
    """What was computed in, and whether it was compiled."""
    return f"{entry['precision']}{', compiled' if entry.get('compiled') else ''}"


def _limit(found: Mapping[str, Any]) -> str:
    return (
        f"{subject(found)}: {found['network']} takes {found['median']:.2f} s; "
        f"at most {found['target']:.2f} s is aimed at: {found['met']}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
