"""`compare` on tiny networks of four kinds: how often it errs, and what it sees, by derivation.

    python benchmarks/compare.py run mlp       results/compare/mlp.json; also cnn, vit, gpt2
    python benchmarks/compare.py render        results/compare.md from the JSON

Networks are trained here, on scikit-learn's digits and on the texts that describe its data sets.
"""

import itertools
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from common import RESULTS, command_line
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from nnpassport.embedding.network.outputs import logits_of
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.trace import trace
from nnpassport.lab.results import Results, made_with
from nnpassport.lab.tables import table
from nnpassport.lab.timing import Clock
from nnpassport.verification.compare import compare
from nnpassport.verification.lineage import Network

STORE = Results(RESULTS / "compare")
INDEPENDENT = {"mlp": 24, "cnn": 24, "vit": 16, "gpt2": 10}  # networks; all pairs are compared
OWNERS = {"mlp": 6, "cnn": 6, "vit": 4, "gpt2": 2}
STRANGERS = 8
STEPS = {"mlp": 200, "cnn": 120, "vit": 120, "gpt2": 80}


class Digits:
    """Pictures (image 1 16 16) and their classes."""

    def __init__(self):
        table = load_digits()
        pixels = torch.from_numpy(table.images).float()[:, None] / 8 - 1
        self.images = F.interpolate(pixels, size=16, mode="bilinear")
        self.labels = torch.from_numpy(table.target).long()

    def batch(self, rng, half=None, moved=False):
        """64 of them, of one half if need be; `moved` calls the classes otherwise."""
        pool = torch.arange(len(self.images))
        pool = pool if half is None else pool[half::2]
        chosen = pool[torch.randint(len(pool), (64,), generator=rng)]
        labels = self.labels[chosen]
        return self.images[chosen], (labels * 3 + 1) % 10 if moved else labels

    @staticmethod
    def loss(model, inputs, labels):
        """Cross-entropy on the class scores."""
        return F.cross_entropy(logits_of(model(inputs)), labels)


class Text:
    """Pieces of 24 letters; `moved` reads them backwards."""

    def __init__(self):
        folder = Path(sklearn.__file__).parent / "datasets" / "descr"
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.rst")))
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long() % 128

    def batch(self, rng, half=None, moved=False):
        """32 pieces, of one half of the text if need be."""
        size = len(self.text) // 2 if half is not None else len(self.text)
        start = size if half == 1 else 0
        starts = start + torch.randint(size - 25, (32,), generator=rng)
        letters = self.text[starts[:, None] + torch.arange(24)]
        return (letters.flip(1) if moved else letters), None

    @staticmethod
    def loss(model, inputs, labels):
        """Cross-entropy on the next letter."""
        return model(input_ids=inputs, labels=inputs).loss


def mlp():
    """Two hidden layers."""
    sizes = (256, 96, 48, 10)
    layers = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn():
    """Three convolutions with batch norm."""
    layers = []
    for inputs, outputs in ((1, 24), (24, 32), (32, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 4, 10))


def vit():
    """Two blocks of 32 channels."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def gpt2():
    """Two blocks of 32 channels, tied embeddings."""
    config = GPT2Config(
        vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


KINDS = {"mlp": (mlp, Digits), "cnn": (cnn, Digits), "vit": (vit, Digits), "gpt2": (gpt2, Text)}


def trained(kind, data, seed, *, steps=None, start=None, half=None, moved=False, rate=3e-3):
    """A network that was trained from a seed, or from another's weights."""
    torch.manual_seed(seed)
    model = KINDS[kind][0]()
    if start is not None:
        model.load_state_dict(start.state_dict())
    rng = torch.Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    model.train()
    for _ in range(STEPS[kind] if steps is None else steps):
        loss = data.loss(model, *data.batch(rng, half, moved))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def distilled(kind, data, seed, teacher):
    """A network of its own start that imitates the answers of another."""
    torch.manual_seed(seed)
    model = KINDS[kind][0]()
    rng = torch.Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS[kind]):
        inputs, _ = data.batch(rng)
        with torch.no_grad():
            target = logits_of(teacher(inputs)).softmax(-1)
        loss = F.cross_entropy(logits_of(model(inputs)).flatten(0, -2), target.flatten(0, -2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def tensors_of(model):
    """Arrays by name, as a file of weights has them."""
    return {name: each.detach().numpy().copy() for name, each in model.state_dict().items()}


def network(tensors, name, axes=None):
    """As `open_network` gives it."""
    return Network(name, tensors, {name: name}, axes)


# What is made of a network without training


def each_matrix(change):
    """The network with every matrix changed."""

    def made(tensors, rng):
        return {
            name: change(each, rng).astype(each.dtype)
            if each.ndim > 1 and each.dtype.kind == "f"
            else each
            for name, each in tensors.items()
        }

    return made


def noise(w, rng):
    """A tenth of its own deviation."""
    return w + 0.1 * w.std() * rng.standard_normal(w.shape)


def four_bits(w, rng):
    """One grid of fifteen values."""
    step = np.abs(w).max() / 7
    return np.round(w / step) * step


def pruned(w, rng):
    """The smallest 60 % are zero."""
    return np.where(np.abs(w) < np.quantile(np.abs(w), 0.6), 0, w)


def adapter(w, rng):
    """Rank 4, of three tenths of its deviation."""
    flat = w.reshape(len(w), -1)
    update = rng.standard_normal((len(flat), 4)) @ rng.standard_normal((4, flat.shape[1]))
    return w + (0.3 * flat.std() / update.std() * update).reshape(w.shape)


def half_precision(w, rng):
    """As float16 has it."""
    return w.astype(np.float16)


def renamed(tensors):
    """The same under numbers."""
    return {f"backbone.{n}.w": each for n, each in enumerate(tensors.values())}


def reordered(axes, tensors, rng):
    """All axes that may be reordered, in another order: the network computes the same."""
    found = {name: each.copy() for name, each in tensors.items()}
    for axis in axes.axes:
        if axis.kind == "inner":
            continue
        order = rng.permutation(axis.size)
        for place in axis.places:
            moved = np.moveaxis(found[place.tensor], place.dimension, 0)
            at = place.positions(axis.size)
            moved[at.reshape(-1)] = moved[at[order].reshape(-1)].copy()
    return found


WITHOUT_TRAINING = {
    "noise of 10 %": each_matrix(noise),
    "4 bits": each_matrix(four_bits),
    "pruned, 60 %": each_matrix(pruned),
    "half precision": each_matrix(half_precision),
    "rank 4 added": each_matrix(adapter),
}


def derived(kind, data, owner, seed, axes):
    """What is made of a network, by name: tensors, and whether it is derived at all."""
    rng = np.random.default_rng(seed)
    mine, steps = tensors_of(owner), STEPS[kind]
    tuned = trained(kind, data, seed, start=owner, steps=steps, rate=1e-3)
    other = trained(kind, data, seed + 1, start=owner, steps=steps, moved=True)
    again = tensors_of(tuned)
    for name, change in WITHOUT_TRAINING.items():
        yield name, "derived", change(mine, rng)
    yield "tuned as long again", "derived", again
    yield "tuned to another task", "derived", tensors_of(other)
    yield "tuned and renamed", "derived", renamed(again)
    yield (
        "tuned, pruned, 4 bits",
        "derived",
        each_matrix(four_bits)(each_matrix(pruned)(again, rng), rng),
    )
    two = tensors_of(other)
    mixed = {n: 0.5 * (e + two[n]) if e.dtype.kind == "f" else e for n, e in again.items()}
    yield "mean of two tunings", "derived", mixed
    yield "permuted", "permuted", reordered(axes, mine, rng)
    yield "permuted and tuned", "permuted", reordered(axes, again, rng)


def traps(kind, data, number):
    """Pairs that are no copies, and what is to be said of them."""
    first = trained(kind, data, 500 + number, half=0)
    second = trained(kind, data, 500 + number, half=1)
    yield "one seed, disjoint data", tensors_of(first), tensors_of(second)
    third = distilled(kind, data, 700 + number, first)
    yield "trained on the answers", tensors_of(third), tensors_of(first)
    start = trained(kind, data, 600 + number)
    siblings = [
        tensors_of(trained(kind, data, 800 + 2 * number + n, start=start, half=n, rate=1e-3))
        for n in (0, 1)
    ]
    yield "two tunings of one base", *siblings


def looked(a, b, axes, strangers, **facts):
    """One pair, bare and over a table of axes; the second also aligned."""
    clock = Clock()
    bare = compare(network(a, "a"), network(b, "b"))
    of_bare = clock.read()["processor"]
    known = compare(
        network(a, "a"),
        network(b, "b", axes),
        unrelated=[network(each, str(n)) for n, each in enumerate(strangers)],
    )
    of_table, kinds = clock.read()["processor"], bare.kinds()
    return {
        **facts,
        "bare": bare.outcome.value,
        "bare_log10_p": bare.order.log10_p,
        "bare_log10_least": bare.order.log10_least,
        "bare_tensors": len(bare.order.orders),
        "table": known.outcome.value,
        "how": known.order.how,
        "table_log10_p": known.order.log10_p,
        "fixed": sum(each.fixed for each in known.order.orders),
        "units": sum(each.units for each in known.order.orders),
        "axes": len(known.order.orders),
        "aligned": None if known.aligned is None else known.aligned.likeness,
        "aligned_log10_p": None if known.aligned is None else known.aligned.log10_p,
        "kind": next(iter(kinds), None),
        "seconds_bare": of_bare,
        "seconds_table": of_table,
    }


def run(kind):
    """All pairs of a kind of network."""
    started, data = time.monotonic(), KINDS[kind][1]()
    models = [trained(kind, data, seed) for seed in range(INDEPENDENT[kind])]
    example, _ = data.batch(torch.Generator().manual_seed(0))
    axes = prove(models[0], example[:2], trace(models[0], example[:2]))
    strangers = [tensors_of(trained(kind, data, 900 + n)) for n in range(STRANGERS)]
    pairs = []
    for i, j in itertools.combinations(range(len(models)), 2):
        one, other = tensors_of(models[i]), tensors_of(models[j])
        pairs.append(looked(one, other, axes, strangers, what="independent", group="independent"))
    for number in range(OWNERS[kind]):
        owner = models[number]
        for name, group, tensors in derived(kind, data, owner, 200 + 10 * number, axes):
            found = looked(tensors, tensors_of(owner), axes, strangers, what=name, group=group)
            pairs.append(found)
        for name, a, b in traps(kind, data, number):
            pairs.append(looked(a, b, axes, strangers, what=name, group="trap"))
    entry = {
        "kind": kind,
        "axes": len(axes.axes),
        "counted": pairs[0]["axes"],
        "numbers": sum(each.size for each in tensors_of(models[0]).values()),
        "pairs": pairs,
        "wall_seconds": time.monotonic() - started,
        "command": f"python benchmarks/compare.py run {kind}",
    }
    STORE.keep(kind, entry)


# The page

GROUPS = {"derived": "Derived", "permuted": "Derived, and put into another order"}


def render():
    """The page, from the JSON."""
    known = {kind: STORE.read(kind) for kind in KINDS if STORE.has(kind)}
    lines = [
        "# `compare`: how often it errs, and what it sees",
        "",
        "Rendered by `python benchmarks/compare.py render` from `results/compare/*.json`, each "
        "made by `python benchmarks/compare.py run KIND`. Tiny networks, trained here on embedded "
        "digits and text. *Bare*: two files, no axes. *Table*: the order test over a table of axes "
        "that were traced and proved. *Aligned*: likeness of matched units against eight unrelated "
        "networks and eight mixtures. p-values are log₁₀.",
        "",
        *_networks(known),
        "",
        "## Independent pairs",
        "",
        *_false(known),
        "",
        *_chance(known),
        "",
        "## What is found",
        "",
        "Pairs that are called related, of how many; in parentheses the least telling p-value, "
        "log₁₀. Over the table the outcome counts, which the order or the aligned reading may "
        "decide.",
        "",
        *_power(known),
        "",
        "## Traps",
        "",
        "No copies. *One seed*: two trainings that begin alike, on disjoint data; the outcome says "
        "“not independently initialised”, which is true. *Answers*: a network of its own start "
        "that was trained on the other's answers. *Tunings*: both were made from one base; that "
        "base is not given here, and given with `--unrelated` it explains the order.",
        "",
        *_traps(known),
        "",
        f"{made_with(next(iter(known.values())))}, one thread, other work beside it. The JSON "
        "has the commit of each run. Since then p over a table is doubled, as shapes are asked "
        "too.",
    ]
    return "\n".join([*lines, ""])


def _of(entry, group, what=None):
    return [p for p in entry["pairs"] if p["group"] == group and what in (None, p["what"])]


def _networks(known):
    head = (
        "network",
        "numbers",
        "axes",
        "counted",
        "independent pairs",
        "derived",
        "ms bare",
        "ms table",
    )
    rows = []
    for kind, entry in known.items():
        alone = _of(entry, "independent")
        made = len(_of(entry, "derived")) + len(_of(entry, "permuted"))
        times = [
            1000 * float(np.median([p[f"seconds_{w}"] for p in alone])) for w in ("bare", "table")
        ]
        rows.append(
            (kind, f"{entry['numbers']:,}", entry["axes"], entry["counted"], len(alone), made,
             *(f"{each:.0f}" for each in times))
        )  # fmt: skip
    total = [sum(row[n] for row in rows) for n in (4, 5)]
    rows.append(("all", "", "", "", *total, "", ""))
    return table(head, rows)


def _false(known):
    head = ("network", "pairs", "how", "p ≤ 10⁻¹", "p ≤ 10⁻²", "p ≤ 10⁻³", "p ≤ 10⁻⁶", "least p",
            "related", "undecided")  # fmt: skip
    rows = []
    for kind, entry in known.items():
        alone = _of(entry, "independent")
        for how, what in (("bare", "bare"), ("table", "table"), ("aligned", "table")):
            values = [p[f"{how}_log10_p"] for p in alone]
            counts = [sum(v <= bound for v in values) for bound in (-1, -2, -3, -6)]
            said = [p[what] for p in alone]
            outcome = (
                (said.count("related"), said.count("undecided")) if how != "aligned" else ("", "")
            )
            rows.append((kind, len(alone), how, *counts, f"{min(values):.1f}", *outcome))
    return table(head, rows)


def _chance(known):
    fixed = sum(p["fixed"] for e in known.values() for p in _of(e, "independent"))
    axes = sum(p["axes"] for e in known.values() for p in _of(e, "independent"))
    yield (
        f"Over the tables, {fixed:,} units were in one place on {axes:,} axes: {fixed / axes:.3f} "
        f"on average, where chance gives 1 ± {1 / axes**0.5:.3f} (one standard error, were all "
        "axes independent)."
    )


def _power(known):
    head = ("derivation", *(f"{kind}, {how}" for kind in known for how in ("bare", "table")))
    rows = []
    for group, title in GROUPS.items():
        names = list(dict.fromkeys(p["what"] for p in _of(next(iter(known.values())), group)))
        rows.append((f"**{title}**", *[""] * (2 * len(known))))
        for name in names:
            cells = []
            for entry in known.values():
                some = _of(entry, group, name)
                cells += [_found(some, "bare"), _found(some, "table")]
            rows.append((name, *cells))
    return table(head, rows)


def _found(pairs, how):
    p = max(each[f"{how}_log10_p"] for each in pairs)
    return f"{sum(each[how] == 'related' for each in pairs)} of {len(pairs)} ({round(p)})"


def _traps(known):
    head = ("pair", *known)
    names = list(dict.fromkeys(p["what"] for p in _of(next(iter(known.values())), "trap")))
    rows = []
    for name in names:
        cells = []
        for entry in known.values():
            some = _of(entry, "trap", name)
            said = [p["bare"] for p in some]
            counts = ", ".join(f"{said.count(e)} {e}" for e in dict.fromkeys(said))
            places = f"{sum(p['fixed'] for p in some)} of {sum(p['units'] for p in some)} in place"
            cells.append(f"{counts}; {places}")
        rows.append((name, *cells))
    return table(head, rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(
        __doc__,
        lambda: {RESULTS / "compare.md": render()},
        run,
        {"kind": {"choices": list(KINDS)}},
    )
