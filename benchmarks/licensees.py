"""Copies in an order of their own: what is left of the order, and of the network, after attacks.

    python benchmarks/licensees.py run       results/licensees.json
    python benchmarks/licensees.py render    results/licensees.md from the JSON

The networks are those of `compare.py`, trained here on embedded digits.
"""

import time

import numpy as np
import torch
from common import RESULTS, command_line
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

from nnpassport.alignment.canonical import restored
from nnpassport.alignment.reorder import reordered as in_order
from nnpassport.alignment.solve import aligner
from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.trace import trace
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.lab.results import Results, made_with, read_json
from nnpassport.lab.tables import table
from nnpassport.verification.licensees import original_of, trace_arrays

STORE = Results(RESULTS)
NAMES = tuple(f"licensee {n}" for n in range(10))
KINDS, OWNERS, WRONG = ("mlp", "cnn"), 2, 100
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


def mean(one, other):
    """Of two networks, number by number."""
    return {
        name: (0.5 * (each + other[name])).astype(each.dtype) if each.dtype.kind == "f" else each
        for name, each in one.items()
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
    yield "mean of two, aligned first", mean(first, aligned(axes, second, first))
    yield "put into another order", reordered(axes, first, rng)


def run():
    """All attacks on some copies of each network."""
    started, data, cells = time.monotonic(), Digits(), []
    wrong = []
    for kind in KINDS:
        for number in range(OWNERS):
            model = trained(kind, data, number)
            example = data.images[:2]
            axes = prove(model, example, trace(model, example))
            original = original_of(tensors_of(model), axes)
            key, rng = key_of(number), np.random.default_rng(number)
            copies = [
                in_order(axes, original.arrays, original.orders(key, name)) for name in NAMES[:2]
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
            for n in range(WRONG):
                (found,) = trace_arrays(copies[0], key_of(1000 + n), original, NAMES[:1]).found
                wrong.append({"fixed": found.fixed, "axes": found.axes, "log10_p": found.log10_p})
    entry = {
        "names": len(NAMES),
        "cells": cells,
        "wrong": wrong,
        "wall_seconds": time.monotonic() - started,
        "command": "python benchmarks/licensees.py run",
    }
    STORE.keep("licensees", entry)


def render():
    """The page, from the JSON."""
    entry = read_json(STORE.path("licensees"))
    head = ("after", *(f"{kind}: {what}" for kind in KINDS for what in
                       ("accuracy, %", "in place", "log₁₀ p", "named")))  # fmt: skip
    lines = [
        "# A copy for each licensee",
        "",
        "Rendered by `python benchmarks/licensees.py render` from `results/licensees.json`, made "
        f"by `{entry['command']}`. Each of {OWNERS} networks of a kind is put into the order of a "
        f"licensee; {entry['names']} names are tried, and the p-values are corrected for them. "
        "Accuracy on all digits, the original's first. *Named*: a licensee whose copy it was, "
        "and nobody else.",
        "",
    ]
    rows = []
    for attack in dict.fromkeys(each["attack"] for each in entry["cells"]):
        row = [attack]
        for kind in KINDS:
            some = [e for e in entry["cells"] if (e["kind"], e["attack"]) == (kind, attack)]
            shares = [100 * float(np.mean([e[w] for e in some])) for w in ("original", "accuracy")]
            team = set(NAMES[:2] if attack.startswith("mean") else NAMES[:1])
            right = sum(bool(e["named"]) and set(e["named"]) <= team for e in some)
            both = sum(len(e["named"]) == 2 for e in some)
            row += [
                f"{shares[0]:.1f} → {shares[1]:.1f}",
                f"{sum(e['fixed'] for e in some)} of {sum(e['units'] for e in some)}",
                f"{max(e['log10_p'] for e in some):.0f}",
                f"{right} of {len(some)}{', both licensees' if both else ''}",
            ]
        rows.append(row)
    fixed, axes = (sum(each[w] for each in entry["wrong"]) for w in ("fixed", "axes"))
    least = min(each["log10_p"] for each in entry["wrong"])
    lines += [
        *table(head, rows),
        "",
        f"{len(entry['wrong'])} readings with wrong keys: {fixed / axes:.3f} units in place an "
        f"axis (chance gives 1 ± {1 / axes**0.5:.3f}), least p 10^{least:.1f}.",
        "",
        "Copies that are averaged as they are lose half of their answers, because units of "
        "different kinds are added up, and name both licensees. Who aligns them first has one "
        "network in the order of one licensee, who is named. Who puts a copy into another order "
        "erases this; the passport beside it is then read aligned.",
        "",
        f"{made_with(entry)}, one thread, other "
        f"work beside it; {entry['wall_seconds'] / 60:.0f} minutes.",
    ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(__doc__, lambda: {RESULTS / "licensees.md": render()}, run)
