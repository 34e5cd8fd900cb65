"""Copies in an order of their own: what is left of the order, and of the network, after attacks.

    python benchmarks/licensees.py run       results/licensees/small.json: networks after attacks
    python benchmarks/licensees.py exact     exact.json: thousands of wrong keys of scheme order
    python benchmarks/licensees.py large     large.json: GPT-2 with 124 million random numbers
    python benchmarks/licensees.py render    results/licensees.md from these

The small networks are those of `compare.py`, trained here on embedded digits.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from compare import KINDS as MADE
from compare import (
    STEPS,
    Digits,
    adapter,
    each_matrix,
    four_bits,
    noise,
    pruned,
    reordered,
    tensors_of,
    trained,
)
from scipy import stats

from nnpassport.alignment.canonical import restored
from nnpassport.alignment.order import log10_fixed_points
from nnpassport.alignment.reorder import reordered as in_order
from nnpassport.alignment.solve import aligner
from nnpassport.embedding.axes import axes_of
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.tensors import as_array
from nnpassport.embedding.network.trace import trace
from nnpassport.files.arrays import arrays_digest
from nnpassport.files.disk import write_atomically
from nnpassport.keys.context import Context, LayerShape, OrderForm
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key, sketch_digest
from nnpassport.keys.order import read_placed
from nnpassport.keys.ordered import chosen_axes, sketch_of
from nnpassport.lab.results import Results
from nnpassport.verification.licensees import original_of, trace_arrays

RESULTS = Path(__file__).parent.parent / "results"
PARTS = Results(RESULTS / "licensees")
NAMES = tuple(f"licensee {n}" for n in range(10))
KINDS, OWNERS = ("mlp", "cnn"), 2
TEAM = 5  # licensees who average their copies, at most
READINGS = 600  # with wrong keys, of each network
LARGE = (
    *("as handed out", "noise of 10 %", "4 bits", "pruned, 60 %"),
    *("mean of two copies", "mean of five copies"),
)
LONG = 5  # times as long as the network was trained


def key_of(number):
    """Any key has orders; its own mark plays no part here."""
    layer = LayerShape("2", (48, 96), (96, 8), Geometry((), (), ()))
    context = Context("passport-v2", "benchmark", (layer,), None, bytes(16))
    return Key(number.to_bytes(32, "big"), context)


def accuracy(model, tensors, data):
    """Share of all digits that a network with these tensors answers rightly."""
    model.load_state_dict({name: torch.from_numpy(np.array(e)) for name, e in tensors.items()})
    with torch.no_grad():
        found = logits_of(model.eval()(data.images)).argmax(1)
    return float((found == data.labels).double().mean())


def mean(*several):
    """Of networks, number by number."""
    return {
        name: (sum(copy[name] for copy in several) / len(several)).astype(each.dtype)
        if each.dtype.kind == "f"
        else each
        for name, each in several[0].items()
    }


def aligned(axes, suspect, reference):
    """One copy in the order of another, as two licensees who know the axes would do it."""
    to = aligner(axes, {n: e.astype(np.float64) for n, e in reference.items()})
    found = to.align({n: e.astype(np.float64) for n, e in suspect.items()}).weights
    wide = {n: e.astype(np.float64) for n, e in reference.items()}
    return {
        name: restored(axes, wide, name, each).astype(reference[name].dtype)
        for name, each in found.items()
    }


def attacks(kind, data, model, copies, axes, rng):
    """By name: what becomes of the first copy."""
    first, second = copies[:2]
    yield "as handed out", first
    for name, change in (
        ("noise of 10 %", noise),
        ("4 bits", four_bits),
        ("pruned, 60 %", pruned),
        ("rank 4 added", adapter),
    ):
        yield name, each_matrix(change)(first, rng)
    model.load_state_dict({name: torch.from_numpy(each) for name, each in first.items()})
    for name, facts in (
        ("tuned as long again", {"steps": STEPS[kind]}),
        (f"tuned {LONG} times as long", {"steps": LONG * STEPS[kind]}),
        ("tuned to another task", {"steps": STEPS[kind], "moved": True}),
    ):
        yield name, tensors_of(trained(kind, data, 77, start=model, rate=1e-3, **facts))
    yield "mean of two copies", mean(first, second)
    yield "mean of five copies", mean(*copies[:5])
    yield "mean of two, aligned first", mean(first, aligned(axes, second, first))
    yield "put into another order", reordered(axes, first, rng)


def run():
    """All attacks on some copies of each network."""
    started, data, cells = time.monotonic(), Digits(), []
    for kind in KINDS:
        for number in range(OWNERS):
            model = trained(kind, data, number)
            example = data.images[:2]
            axes = prove(model, example, trace(model, example))
            original = original_of(tensors_of(model), axes)
            key, rng = key_of(number), np.random.default_rng(number)
            copies = [
                in_order(axes, original.arrays, original.orders(key, name)) for name in NAMES[:TEAM]
            ]
            own = accuracy(model, original.arrays, data)
            for name, tensors in attacks(kind, data, model, copies, axes, rng):
                found = trace_arrays(tensors, key, original, NAMES)
                mine = next(each for each in found.found if each.name == NAMES[0])
                cells.append(
                    {
                        "kind": kind,
                        "attack": name,
                        "original": own,
                        "accuracy": accuracy(model, tensors, data),
                        "named": list(found.named),
                        "fixed": mine.fixed,
                        "units": mine.units,
                        "axes": mine.axes,
                        "log10_p": mine.log10_p,
                    }
                )
    keep("small", {"names": len(NAMES), "cells": cells}, started, "run")


def keep(part, found, started, word):
    """Write what this part found, and how."""
    took, command = time.monotonic() - started, f"python benchmarks/licensees.py {word}"
    PARTS.keep(part, {**found, "wall_seconds": took, "command": command})


def suspects_of(kind, number):
    """A network, its axes, and what a wrong key is read on: copies, strangers, and worse."""
    rng = np.random.default_rng(number)
    model = network_of(kind, number)
    arrays = tensors_of(model)
    example = Digits().images[:2]
    axes = prove(model, example, trace(model, example))
    alike = {n: np.ones_like(e) if e.ndim > 1 else e for n, e in arrays.items()}
    signs = {n: np.sign(e) if e.ndim > 1 else e for n, e in arrays.items()}
    return (
        arrays,
        axes,
        {
            "the anchor itself": arrays,
            "a stranger": tensors_of(network_of(kind, 100 + number)),
            "the anchor, permuted": reordered(axes, arrays, rng),
            "rows that are all alike": alike,
            "signs of the anchor's weights": signs,
        },
    )


def network_of(kind, number):
    """As it is before training: whether it was trained plays no part in what chance gives."""
    torch.manual_seed(number)
    return MADE[kind][0]().eval()


def key_of_order(arrays, axes, seed):
    """A key of scheme order whose anchor are these arrays."""
    anchor, chosen = arrays_digest(arrays), chosen_axes(axes, arrays)
    sketch = sketch_of(axes, chosen, arrays, anchor=anchor, nonce=bytes(16))
    form = OrderForm(axes.digest, sketch_digest(sketch), chosen)
    context = Context("order", "benchmark", (), None, bytes(16), anchor=anchor, order=form)
    table = np.frombuffer(axes.to_bytes(), np.uint8)
    return Key(seed.to_bytes(32, "big"), context, table=table, sketch=sketch)


def exact():
    """Wrong keys of scheme order: is their p-value uniform, once ties are broken by lot?"""
    started, rng, rows = time.monotonic(), np.random.default_rng(0), []
    for kind in KINDS:
        arrays, axes, suspects = suspects_of(kind, 0)
        key = key_of_order(arrays, axes, 0)
        sizes = key.context.order.units
        for name, suspect in suspects.items():
            counts = []
            for seed in range(1, READINGS + 1):
                counts.append(read_placed(suspect, key_seeded(key, seed)).fixed)
            tails = {
                n: 10 ** log10_fixed_points(n, sizes) for n in {*counts, *(c + 1 for c in counts)}
            }
            lots = [tails[c + 1] + rng.random() * (tails[c] - tails[c + 1]) for c in counts]
            rows.append(
                {
                    "kind": kind,
                    "suspect": name,
                    "axes": len(sizes),
                    "readings": len(counts),
                    "mean": float(np.mean(counts)),
                    "most": max(counts),
                    "least_log10_p": min(log10_fixed_points(c, sizes) for c in counts),
                    "ks": float(stats.kstest(lots, "uniform").pvalue),
                }
            )
            print(rows[-1], flush=True)
            keep("exact", {"rows": rows}, started, "exact")


def key_seeded(key, seed):
    """The same key with another seed."""
    return Key(seed.to_bytes(32, "big"), key.context, table=key.table, sketch=key.sketch)


def large():
    """GPT-2 of 124 million numbers, drawn at random: ten licensees, and what they do to copies."""
    import transformers  # noqa: PLC0415 - the other parts do without

    started, rng = time.monotonic(), np.random.default_rng(0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    example = {"input_ids": torch.randint(0, 50257, (2, 8))}
    seconds, clock = {}, time.monotonic()

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.monotonic() - clock, time.monotonic()
        print(name, f"{seconds[name]:.1f}", flush=True)

    axes = axes_of(model, example)
    lap("trace and prove the axes")
    arrays = {name: as_array(each) for name, each in model.state_dict().items()}
    original = original_of(arrays, axes)
    lap("sketch the original")
    key = key_of(1)
    orders = {name: original.orders(key, name) for name in NAMES}
    copies = {name: in_order(axes, arrays, orders[name]) for name in NAMES[:TEAM]}
    lap(f"put {TEAM} copies into order")
    read = {}
    acts = (
        lambda: copies[NAMES[0]],
        lambda: each_matrix(noise)(copies[NAMES[0]], rng),
        lambda: each_matrix(four_bits)(copies[NAMES[0]], rng),
        lambda: each_matrix(pruned)(copies[NAMES[0]], rng),
        lambda: mean(*(copies[n] for n in NAMES[:2])),
        lambda: mean(*(copies[n] for n in NAMES[:TEAM])),
    )
    right = answers(model, arrays, example)
    for what, change in zip(LARGE, acts, strict=True):
        suspect = change()
        clock = time.monotonic()
        found = trace_arrays(suspect, key, original, NAMES)
        took = time.monotonic() - clock
        mine = next(each for each in found.found if each.name == NAMES[0])
        others = max(each.fixed for each in found.found if each.name not in NAMES[:TEAM])
        read[what] = {
            "fixed": mine.fixed,
            "units": mine.units,
            "axes": mine.axes,
            "log10_p": mine.log10_p,
            "named": list(found.named),
            "others": others,
            "agree": cosine(right, answers(model, suspect, example)),
            "seconds": took,
        }
        print(what, read[what], flush=True)
        whole = {
            "numbers": sum(each.numel() for each in model.parameters()),
            "names": len(NAMES),
            "seconds": seconds,
            "read": read,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        keep("large", whole, started, "large")


def answers(model, tensors, example):
    """Scores of a network with these tensors, less their mean."""
    model.load_state_dict({name: torch.from_numpy(np.array(e)) for name, e in tensors.items()})
    with torch.no_grad():
        found = logits_of(model(**example)).double()
    return (found - found.mean(-1, keepdim=True)).flatten().numpy()


def cosine(one, other):
    """Between two vectors."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def render():
    """The page, of what was kept."""
    return page(PARTS.all())


def page(known):
    """The page, of those parts that were run."""
    parts = {"small": _small, "exact": _exact, "large": _large}
    lines = [
        "# A copy for each licensee, and a key's own order",
        "",
        "Rendered by `python benchmarks/licensees.py render` from `results/licensees/`. A key "
        "of scheme `order` is read by the same lines as a licensee's copy, under an empty name.",
        "",
    ]
    for name, write in parts.items():
        if name in known:
            lines += [*write(known[name]), _made(known[name]), ""]
    return "\n".join(lines)


def _made(entry):
    took = entry["wall_seconds"]
    spent = "" if took is None else f"; {took / 60:.0f} minutes"
    by = entry["provenance"]
    return (
        f"`{entry['command']}`: {by['device']}, torch {by['torch']}, one thread, other work "
        f"beside it{spent}."
    )


def _small(entry):
    kinds = list(dict.fromkeys(each["kind"] for each in entry["cells"]))
    head = ["after"]
    for kind in kinds:
        head += [f"{kind}: {w}" for w in ("accuracy, %", "in place", "log₁₀ p", "named")]
    lines = [
        "## Trained networks, after attacks",
        "",
        f"Each of {OWNERS} networks of a kind is put into the order of a licensee; "
        f"{entry['names']} names are tried, and the p-values are corrected for them. Accuracy on "
        "all digits, the original's first. *Named*: a licensee whose copy it was, nobody else.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
    ]
    for attack in dict.fromkeys(each["attack"] for each in entry["cells"]):
        row = [attack]
        for kind in kinds:
            some = [e for e in entry["cells"] if (e["kind"], e["attack"]) == (kind, attack)]
            row += _row(attack, some)
        lines.append(f"| {' | '.join(row)} |")
    return [
        *lines,
        "",
        "Copies that are averaged as they are lose half of their answers, because units of "
        "different kinds are added up, and name those who did it. Who aligns them first has one "
        "network in the order of one licensee, who is named. Who puts a copy into another order "
        "erases this; the passport beside it is then read aligned.",
        "",
        *([entry["note"], ""] if "note" in entry else []),
    ]


def _row(attack, some):
    shares = [100 * float(np.mean([e[w] for e in some])) for w in ("original", "accuracy")]
    size = 5 if "five" in attack else 2 if attack.startswith("mean") else 1
    right = sum(bool(e["named"]) and set(e["named"]) <= set(NAMES[:size]) for e in some)
    counts = sorted({len(each["named"]) for each in some})
    named = f"{' or '.join(map(str, counts))} licensee{'' if counts == [1] else 's'}"
    several = f", {named}" if size > 1 and right else ""
    return [
        f"{shares[0]:.1f} → {shares[1]:.1f}",
        f"{sum(e['fixed'] for e in some)} of {sum(e['units'] for e in some)}",
        f"{max(e['log10_p'] for e in some):.0f}",
        f"{right} of {len(some)}{several}",
    ]


def _exact(entry):
    lines = [
        "## Keys that are wrong",
        "",
        "Keys of scheme `order` with other seeds, on networks that have not their order. By "
        "chance one unit of each axis is in place. *KS*: of p against the uniform law, once ties "
        "of whole numbers are broken by lot; below 10⁻³ it would say that p is not exact.",
        "",
        "| network | read on | readings | in place, an axis | chance | most | least p | KS |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in entry["rows"]:
        spread = 1 / (row["axes"] * row["readings"]) ** 0.5
        lines.append(
            f"| {row['kind']} | {row['suspect']} | {row['readings']} "
            f"| {row['mean'] / row['axes']:.3f} | 1 ± {spread:.3f} | {row['most']} "
            f"| 10^{row['least_log10_p']:.1f} | {row['ks']:.3f} |"
        )
    total = sum(row["readings"] for row in entry["rows"])
    least = min(row["least_log10_p"] for row in entry["rows"])
    return [*lines, "", f"{total:,} readings, least p 10^{least:.1f}.", ""]


def _large(entry):
    seconds = "; ".join(f"{name}: {took:.0f} s" for name, took in entry["seconds"].items())
    memory = entry["memory"]
    most = "Memory was not measured" if memory is None else f"At most {memory / 2**30:.1f} GiB"
    missing = [w for w in LARGE if w not in entry["read"]]
    stopped = f" The run was stopped before: {', '.join(missing)}." if missing else ""
    lines = [
        "## GPT-2",
        "",
        f"GPT-2 with {entry['numbers'] / 1e6:.0f} million random numbers (no trained ones were at "
        f"hand). {seconds}. {most}. *Answers*: cosine of the scores with the original's.{stopped}",
        "",
        "| after | in place | axes | log₁₀ p | named | others, at most | answers | "
        f"seconds for {entry['names']} names |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in entry["read"].items():
        lines.append(
            f"| {name} | {row['fixed']:,} of {row['units']:,} | {row['axes']} "
            f"| {row['log10_p']:,.0f} | {len(row['named'])} of {entry['names']} "
            f"| {row['others']} | {row['agree']:.3f} | {row['seconds']:.0f} |"
        )
    busy = "Seconds are of a machine with six times as much to do as it has processors."
    return [*lines, "", busy, ""]


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "exact", "large", "render"])
    torch.set_num_threads(1)
    parts = {"run": run, "exact": exact, "large": large}
    parts.get(parser.parse_args().what, lambda: None)()
    write_atomically(RESULTS / "licensees.md", render().encode())


if __name__ == "__main__":
    main()
