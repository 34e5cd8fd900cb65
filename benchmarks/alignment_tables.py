"""The tables of benchmarks/alignment.py, from its JSON."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from scipy import stats

from nnpassport.keys.chance import LOG10_ALPHA_COMMITTED
from nnpassport.lab.results import Results, made_with
from nnpassport.lab.tables import table

ROOT = Path(__file__).parent.parent / "results"
STORE = Results(ROOT / "alignment")


def render() -> str:
    """Everything that was run, as Markdown."""
    parts = [
        "# Alignment: what it recovers, and what it does to others",
        "",
        "Rendered by `python benchmarks/alignment.py render` from `results/alignment/`.",
        *_recovered(),
        *_null("v2-gn"),
        *_power(),
        *_forged(),
        *_times(),
    ]
    return "\n".join(parts) + "\n"


def _made(entry: Mapping) -> str:
    made = entry["provenance"]
    commit = (made["commit"] or "?")[:12]
    return f"`{entry['command']}`; {made_with(entry)}, {made['date']}, commit {commit}."


def _recovered() -> list[str]:
    lines = [
        "",
        "## A mark under other weights of the same function",
        "",
        "AlexNet on CIFAR-10, 896 bits, one network of each kind, one run. *Same shapes*:",
        "channels negated, permuted and rescaled; *more channels*: dummies and splits first.",
        "p is the more cautious one, for two readings, with eight mixtures as null.",
        "",
    ]
    head = (
        *("network", "obfuscation", "then", "matches as it stands", "aligned", "log₁₀ p"),
        *("null, best of 8", "least mean cosine", "s"),
    )
    notes, rows = [], []
    for name in ("v2-gn", "v1-bn"):
        found = STORE.read(f"recover-{name}")
        if found is None:
            continue
        notes += ["", _made(found)]
        for e in found["entries"]:
            stands = e["matches_as_it_stands"]
            rows.append(
                (
                    name,
                    e["obfuscation"],
                    e["then"],
                    "other shapes" if stands is None else stands,
                    e["matches_aligned"],
                    f"{e['log10_p_value']:.1f}",
                    max(e["null_matches"]),
                    f"{min(e['cosines'].values()):.3f}",
                    f"{e['seconds']:.1f}",
                )
            )
    return lines + table(head, rows) + notes


def _null(name: str) -> list[str]:
    found = [*Results(STORE.folder / f"null-{name}").all().values()]
    if not found:
        return []
    bits = found[0]["bits"]
    stands = [count for e in found for count in e["fresh_as_it_stands"]]
    aligned = [count for e in found for count in e["fresh_aligned"]]
    head = (
        *("key", "reading", "n", "mean %", "standard deviation, %", "most, %", "least p"),
        *("KS test, p", "accepted at 10⁻⁹"),
    )
    owners = {
        "as it stands": [e["own_as_it_stands"] for e in found],
        "aligned": [e["own_aligned"] for e in found],
        "aligned by whole filters": [e["own_aligned_by_whole_filters"] for e in found],
        "aligned, on mixtures": [count for e in found for count in e["own_mixtures"]],
    }
    rows = [
        _null_row("fresh", "as it stands", stands, bits),
        _null_row("fresh", "aligned", aligned, bits),
        *(_null_row("the owner's", how, counts, bits) for how, counts in owners.items()),
    ]
    quantiles = [
        (share, *(f"{np.quantile(_p_values(e, bits), share):.4f}" for e in (stands, aligned)))
        for share in (0.1, 0.01, 0.001)
    ]
    return [
        "",
        "## Networks that have nothing to do with the owner's",
        "",
        f"{len(found)} AlexNets (group norm) trained on CIFAR-10 from starts of their own (8 for",
        "one epoch on 47,500 images, the others for one epoch on 24,500); the reference is the V2",
        f"network above. Fresh keys are drawn anew for every network. Of {bits} bits:",
        "",
        *table(head, rows),
        "",
        f"By chance: 50 %, standard deviation {50 / bits**0.5:.2f} %. KS: Kolmogorov and",
        "Smirnov's test of the p-values against the uniform distribution, each p-value drawn",
        "uniformly inside its step, because matches are whole numbers (seed 0).",
        "",
        *table(
            ("share of keys", "p as it stands, at that share", "p aligned, fresh keys"), quantiles
        ),
        "",
        "On the cautious side means: at least the share itself, up to sampling. These p-values are",
        "the analytic ones; what a verdict counts is doubled, and at the null's best rate.",
        "",
        _made(found[0]),
    ]


def _p_values(counts: list[int], bits: int) -> np.ndarray:
    return stats.binom.sf(np.asarray(counts) - 1, bits, 0.5)


def _null_row(key: str, reading: str, counts: list[int], bits: int) -> list[str]:
    rates, p = 100 * np.asarray(counts) / bits, _p_values(counts, bits)
    inside = stats.binom.sf(np.asarray(counts), bits, 0.5)
    drawn = inside + np.random.default_rng(0).random(len(p)) * (p - inside)
    uniform = stats.kstest(drawn, "uniform").pvalue
    deviation = rates.std(ddof=1) if len(rates) > 1 else float("nan")
    accepted = int((p <= 10.0**LOG10_ALPHA_COMMITTED).sum())
    cells = [key, reading, str(len(p)), f"{rates.mean():.2f}", f"{deviation:.2f}"]
    return [*cells, f"{rates.max():.1f}", f"{p.min():.2g}", f"{uniform:.3g}", str(accepted)]


def _power() -> list[str]:
    found = STORE.read("power")
    if found is None:
        return []
    head = ("bits", "α", "rate", "matches needed", "surviving bits, %")
    rows = [
        (
            row["bits"],
            "10⁻⁹" if row["log10_alpha"] > -10 else "2⁻¹⁰⁰",
            row["rate"],
            row["needed"],
            f"{100 * row['surviving']:.1f}",
        )
        for row in found["rows"]
    ]
    return [
        "",
        "## How much of a mark must survive",
        "",
        "The smallest number of matches that is accepted, and the share of bits that must have",
        "survived for it on average if the others match by chance. *Rate*: the null's best",
        "network; 0.5 is a reading without alignment.",
        "",
        *table(head, rows),
        "",
        _made(found),
    ]


def _forged() -> list[str]:
    lines = ["", "## Forged keys before the exact verdict", ""]
    total = accepted = published = 0
    for report in Results(ROOT / "attacks-alexnet").all().values():
        for entry in report["entries"]:
            if "forged" in entry:
                total += 1
                accepted += entry["forged"]["accepted"]
                published += entry["forged"]["published_accepted"]
    lines += [
        f"Of {total} forged keys in the audits of `results/attacks-alexnet/` (fake1, fake2, fake3,",
        "negated, solved, hash-bound, substituted, ground) the published verification accepts "
        f"{published}, and",
        f"the exact verdict {accepted}.",
    ]
    found = STORE.read("grind-v2-gn")
    if found is not None:
        lines += [
            "",
            f"Ground: of {found['keys']:,} honest keys for the first layer ({found['bits']} "
            f"bits) the best matches {found['best']},",
            f"p = 10^{found['log10_p_value']:.1f}: what so many tries reach, and neither 10⁻⁹ nor "
            f"2⁻¹⁰⁰ ({found['seconds'] / 60:.0f} minutes).",
            "",
            _made(found),
        ]
    return lines


def _times() -> list[str]:
    found = STORE.read("time")
    if found is None:
        return []
    rows = []
    for entry in found["entries"]:
        low, *_, high = seconds = entry["seconds"]
        middle = seconds[len(seconds) // 2]
        rows.append((entry["reading"], f"{low:.2f}", f"{middle:.2f}", f"{high:.2f}"))
    return [
        "",
        "## Time",
        "",
        "`nnpassport verify` on ResNet-18 (2,560 bits): loading, hashing, reading, and imports",
        "unless it says otherwise; aligned: with the null of eight mixtures. Without images. Seven",
        "runs each.",
        "",
        *table(("reading", "least s", "median s", "most s"), rows),
        "",
        _made(found),
    ]
