"""What free moves do to a mark on networks that others wrote, and what alignment makes of it.

    python benchmarks/moves.py run [NETWORK ...]     results/moves.json
    python benchmarks/moves.py published --data FOLDER   results/moves-published.json
    python benchmarks/moves.py fresh [NETWORK ...]   results/moves-fresh.json
    python benchmarks/moves.py render                results/moves.md from all

Each network of tests/zoo.py is trained a little on digits or text: that is the anchor. It gets a
passport for each channel by a graft and is released. A thief makes every free move along its axes
(`attack free-moves`), and on top of them one thing more. Strangers are networks of the same
architecture, from other initialisations, trained alike and moved alike; each is aligned once, and
read with many keys, whose bits have nothing to do with it or with one another.

`fresh` does that with networks that are untrained.

Networks that their authors trained are marked as `benchmarks/real.py` does, and moved alike.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import zoo  # noqa: E402

from nnpassport import V2  # noqa: E402
from nnpassport.alignment.anchored import verify_anchored  # noqa: E402
from nnpassport.alignment.byaxes import Reference, anchor_of  # noqa: E402
from nnpassport.attacks.moves import KEEPING, KINDS, move  # noqa: E402
from nnpassport.attacks.perturbation import prune_layerwise, quantise  # noqa: E402
from nnpassport.data.images import Normalisation, batches, read_images  # noqa: E402
from nnpassport.embedding.axes import axes_of  # noqa: E402
from nnpassport.embedding.network.outputs import call, logits_of  # noqa: E402
from nnpassport.embedding.schemes.channels import Limit  # noqa: E402
from nnpassport.embedding.schemes.graft import graft_channels  # noqa: E402
from nnpassport.keys.chance import log10_binomial_tail  # noqa: E402
from nnpassport.keys.counts import Reading  # noqa: E402
from nnpassport.keys.key import Key  # noqa: E402
from nnpassport.keys.reading import read_passports  # noqa: E402
from nnpassport.lab.results import read_json, write_json  # noqa: E402
from nnpassport.lab.tables import table  # noqa: E402
from nnpassport.lab.timing import Clock  # noqa: E402
from nnpassport.report.provenance import provenance  # noqa: E402

RESULT = ROOT / "results" / "moves.json"
FRESH = ROOT / "results" / "moves-fresh.json"
PUBLISHED = ROOT / "results" / "moves-published.json"
STEPS, BATCH, SEEN = 200, 32, 128
TUNED = 500
STRANGERS, KEYS = 4, 200
SENTENCES = 16
TUNED_ON, MEAN = f"{TUNED} steps on other data", "half merged with the anchor, tuned"
ANY = Limit(1.0, 1e9)
MOST_HARM = 0.2
HEAD = f"""\
# Free moves on networks that others wrote

`python benchmarks/moves.py run`, then `render`. Networks of `tests/zoo.py`, {STEPS} steps on digits
or text (CREPE as published), marked by a graft with a passport for each channel of the layers that
are chosen where none are named. *As it stands* is after every move that keeps the shapes; all other
columns are aligned to the network before the mark, and p is the verdict's, which pays for every
choice that was made. *Harm* is the relative error of the outputs that the graft made: in layers of
so few numbers it is large. Where it was above {MOST_HARM} (EfficientNet, RegNet) the mark is in
layers that were named. Tuning is at a third of the rate of training."""


class Owned(NamedTuple):
    """A network before and after its mark, its key, and the network to align to."""

    anchor: nn.Module
    released: nn.Module
    key: Key
    to: Reference


def run(names: Sequence[str]) -> None:
    """Measure these networks; others that were measured before stay as they are."""
    found = read_json(RESULT) if RESULT.exists() else {}
    for name in names:
        clock = Clock()
        row = measured(name)
        row |= {"seconds": clock.read()["processor"], **provenance()}
        found[name] = row
        write_json(RESULT, found)
        print(name, row["bits"], row["after"], row["log10_p"], row["strangers"]["mean"], flush=True)


def measured(name: str) -> dict[str, Any]:
    """All figures of one network."""
    network = zoo.ZOO[name]
    anchor = network.build().eval() if network.trained else trained(network, seed=0)
    key, released, harm = marked(network, anchor)
    example, _ = network.batch(2, 0)
    clock = Clock()
    axes = axes_of(anchor, example)
    tracing = clock.read()["processor"]
    to = anchor_of(axes, arrays(anchor.state_dict()), key)
    owned = Owned(anchor, released, key, to)
    moved = move(released, example, rng(1))
    clock = Clock()
    whole = aligned(moved.model, owned)
    aligning = clock.read()["processor"]
    after = {"every free move": whole}
    for label, change in CHANGES.items():
        after[label] = aligned(move(change(owned, network), example, rng(1)).model, owned)
    return {
        "bits": key.context.bits,
        "layers": len(key.context.layers),
        "harm": harm,
        "axes": {kind: sum(a.kind == kind for a in axes.axes) for kind in sorted(kinds_of(axes))},
        "unknown": list(axes.unknown),
        "moves": {kind: moved.done[kind] for kind in KINDS if moved.done[kind]},
        "error": moved.error,
        "as it stands": as_it_stands(released, example, key),
        **as_found(after),
        "tracing": tracing,
        "aligning": aligning,
        "strangers": strangers(network, owned),
    }


def run_fresh(names: Sequence[str]) -> None:
    """Read keys, no one twice, on untrained strangers; other networks stay as they are."""
    found = read_json(FRESH) if FRESH.exists() else {}
    for name in names:
        network = zoo.ZOO[name]
        anchor, *others = (unsettled(network, seed) for seed in range(STRANGERS + 1))
        key, released, _ = marked(network, anchor)
        example, _ = network.batch(2, 0)
        axes = axes_of(anchor, example)
        to = anchor_of(axes, arrays(anchor.state_dict()), key)
        owned = Owned(anchor, released, key, to)
        found[name] = {**read_strangers(others, example, owned), **provenance()}
        write_json(FRESH, found)
        print(name, found[name]["mean"], found[name]["least"], flush=True)


@torch.no_grad()
def unsettled(network: zoo.Network, seed: int) -> nn.Module:
    """A network that was never trained, whose ones and zeros are no longer that."""
    with torch.random.fork_rng():
        torch.manual_seed(90 + seed)
        model = network.build().eval()
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def run_published(names: Sequence[str], data: Path) -> None:
    """Measure these networks with their authors' weights; others stay as they are."""
    import real  # noqa: PLC0415 - it is beside this file, and needs the packages

    found = read_json(PUBLISHED) if PUBLISHED.exists() else {}
    for name in names or sorted(real.NETWORKS):
        network = real.NETWORKS[name]
        inputs = network.inputs(data, real.Sizes(owner=128, thief=2, test=2))
        subject = real.marked(network, inputs)
        example = real.part_of(inputs.owner, 0, 2)
        clock = Clock()
        axes = axes_of(subject.plain, example)
        tracing = clock.read()["processor"]
        to = anchor_of(axes, arrays(subject.plain.state_dict()), subject.key)
        owned = Owned(subject.plain, subject.released, subject.key, to)
        moved = move(subject.released, example, rng(1))
        clock = Clock()
        after = {"every free move": aligned(moved.model, owned)}
        aligning = clock.read()["processor"]
        tune = TUNE[name]
        changes: dict[str, Callable[[], nn.Module]] = {
            TUNED_ON: lambda tune=tune, owned=owned: tune(owned.released, data, TUNED),
            "60 % of each layer pruned": lambda owned=owned: pruned(owned),
            "int8, a scale for each tensor": lambda owned=owned: rounded(owned),
            MEAN: lambda tune=tune, owned=owned: mean(
                owned.released, tune(owned.anchor, data, STEPS)
            ),
        }
        for label, change in changes.items():
            after[label] = aligned(move(change(), example, rng(1)).model, owned)
            print(name, label, after[label], flush=True)
        found[name] = {
            "bits": subject.key.context.bits,
            "axes": {k: sum(a.kind == k for a in axes.axes) for k in sorted(kinds_of(axes))},
            "moves": {kind: moved.done[kind] for kind in KINDS if moved.done[kind]},
            "error": moved.error,
            "as it stands": as_it_stands(subject.released, example, subject.key),
            **as_found(after),
            "tracing": tracing,
            "aligning": aligning,
            **provenance(),
        }
        write_json(PUBLISHED, found)
        print(name, found[name]["bits"], after, flush=True)


def kinds_of(axes: Any) -> set[str]:
    """Of axes."""
    return {axis.kind for axis in axes.axes}


def trained(network: zoo.Network, *, seed: int, model: nn.Module | None = None, data: int = 0,
            steps: int = STEPS, turned: bool = False) -> nn.Module:  # fmt: skip
    """A network of this kind after some steps; `turned`: on classes in another order.

    One that is given is tuned, at a third of the rate.
    """
    fresh = model is None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network.build() if model is None else deepcopy(model)
        model.train()
        rate = network.rate if fresh else network.rate / 3
        optimiser = torch.optim.AdamW(model.parameters(), rate)
        for step in range(steps):
            inputs, labels = network.batch(BATCH, 1000 * (data + 1) + step)
            if turned and network.task is None:
                labels = (labels + 1) % (int(labels.max()) + 1)
            output = call(model, inputs)
            loss = (
                F.cross_entropy(logits_of(output), labels)
                if network.task is None
                else network.task(output, labels)
            )
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return model.eval()


def marked(network: zoo.Network, anchor: nn.Module) -> tuple[Key, nn.Module, float]:
    """A key for this network, the network with the mark, and the relative error of its outputs.

    In the layers that are chosen where none are named; where that harms so small a network by more
    than `MOST_HARM`, in those that the zoo names.
    """
    found = marked_in(network, anchor, None)
    return found if found[2] <= MOST_HARM else marked_in(network, anchor, network.layers)


def marked_in(
    network: zoo.Network, anchor: nn.Module, layers: Sequence[str] | None
) -> tuple[Key, nn.Module, float]:
    """The same in these layers."""
    example, _ = network.batch(2, 0)
    seen, _ = network.batch(SEEN, 1)
    key = V2.draw_key(anchor, example, seed=bytes(32), layers=layers, seen=seen)
    owned = deepcopy(anchor)
    V2.insert(owned, key, example)
    report = graft_channels(owned, seen, limit=ANY)
    return key, V2.released(owned).eval(), report.harm.error


def aligned(model: nn.Module, owned: Owned) -> tuple[int, float]:
    """Bits that are found once the suspect is aligned to the network before the mark; log₁₀ p."""
    before = arrays(owned.anchor.state_dict())
    read = Reading.by(read_passports, owned.key).through(lambda found: {**before, **found})
    found = verify_anchored(read, arrays(model.state_dict()), owned.to)
    return found.matches, read.log10_p(found)


def as_found(after: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """As it is kept."""
    return {
        "after": {label: matches for label, (matches, _) in after.items()},
        "log10_p": {label: p for label, (_, p) in after.items()},
    }


def as_it_stands(released: nn.Module, example: Any, key: Key) -> int:
    """The same without alignment, after all moves that keep the shapes."""
    model = move(released, example, rng(1), kinds=KEEPING).model
    return V2.verify(model.state_dict(), key).matches


def tuned(owned: Owned, network: zoo.Network) -> nn.Module:
    """Trained on, to other classes where there are any."""
    return trained(network, seed=5, model=owned.released, data=7, steps=TUNED, turned=True)


def tuned_on_photos(model: nn.Module, data: Path, steps: int) -> nn.Module:
    """All of a network of images, tuned to the classes of Caltech-101 as `benchmarks/real.py` does.

    Their scores are the first ones that it has.
    """
    import real  # noqa: PLC0415 - it is beside this file, and needs the packages

    how, normalise = real.Tuning(), Normalisation((0.5,) * 3, (0.5,) * 3)
    images = read_images(data / f"caltech101-64px-{real.PARTS[0]}.parquet").resized(how.size)
    model = deepcopy(model).requires_grad_(True).train()
    descent = torch.optim.SGD(model.parameters(), how.rate, momentum=0.9, weight_decay=1e-4)
    epochs = (batches(images, normalise, size=how.batch, seed=5, epoch=n) for n in count())
    for batch in islice(chain.from_iterable(epochs), steps):
        F.cross_entropy(model(batch.images), batch.labels).backward()
        descent.step()
        descent.zero_grad()
    return model.eval()


def tuned_on_sentences(model: nn.Module, _data: Path, steps: int) -> nn.Module:
    """All of an encoder of sentences, tuned so that one read twice with dropout is itself.

    Gao et al. 2021, SimCSE (arXiv 2104.08821): without labels, at a temperature of 0.05.
    """
    texts = zoo.plain_sentences()
    draw = torch.Generator().manual_seed(5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = deepcopy(model).requires_grad_(True).train()
        descent = torch.optim.AdamW(model.parameters(), 3e-5)
        for _ in range(steps):
            chosen = torch.randint(len(texts), (SENTENCES,), generator=draw).tolist()
            inputs = zoo.sentences([texts[each] for each in chosen])
            one, two = (zoo.sentence_vectors(model, inputs) for _ in range(2))
            F.cross_entropy(one @ two.T / 0.05, torch.arange(SENTENCES)).backward()
            descent.step()
            descent.zero_grad()
    return model.eval()


TUNE: Mapping[str, Callable[[nn.Module, Path, int], nn.Module]] = {
    "EfficientNet-Lite0": tuned_on_photos,
    "MiniLM": tuned_on_sentences,
}


def pruned(owned: Owned, _: object = None) -> nn.Module:
    """The smallest weights of each layer are zero."""
    return prune_layerwise(owned.released, share=0.6).model


def rounded(owned: Owned, _: object = None) -> nn.Module:
    """Rounded."""
    return quantise(owned.released, "int8-tensor").model


def merged(owned: Owned, network: zoo.Network) -> nn.Module:
    """Half the released network, half the anchor after training of its own."""
    return mean(owned.released, trained(network, seed=6, model=owned.anchor, data=8, steps=STEPS))


def mean(model: nn.Module, other: nn.Module) -> nn.Module:
    """Half the one, half the other."""
    found, theirs = deepcopy(model), other.state_dict()
    for name, tensor in found.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(theirs[name], 0.5)
    return found


CHANGES: Mapping[str, Callable[[Owned, zoo.Network], nn.Module]] = {
    TUNED_ON: tuned,
    "60 % of each layer pruned": pruned,
    "int8, a scale for each tensor": rounded,
    MEAN: merged,
}


def strangers(network: zoo.Network, owned: Owned) -> dict[str, Any]:
    """p-values of many keys on networks that have nothing to do with the owner's."""
    others = list[nn.Module]()
    for number in range(STRANGERS):
        if network.trained:
            with torch.random.fork_rng():
                torch.manual_seed(50 + number)
                other = deepcopy(owned.anchor)
                for parameter in other.parameters():
                    parameter.data = torch.randn_like(parameter) * parameter.std()
        else:
            other = trained(network, seed=50 + number, data=20 + number, steps=STEPS // 2)
        others.append(other)
    return read_strangers(others, network.batch(2, 0)[0], owned)


def read_strangers(others: Sequence[nn.Module], example: Any, owned: Owned) -> dict[str, Any]:
    """The same of these networks; each is read with keys of its own."""
    matches = list[int]()
    for number, other in enumerate(others):
        first = 1 + KEYS * number
        seeds = [each.to_bytes(32, "big") for each in range(first, first + KEYS)]
        suspect = arrays(move(other, example, rng(number)).model.state_dict())
        placed = owned.to.place(suspect).arrays
        tensors = {n: torch.from_numpy(np.array(t)).float() for n, t in placed.items()}
        state: dict[str, Tensor] = {**owned.anchor.state_dict(), **tensors}
        matches += [V2.verify(state, replace(owned.key, seed=seed)).matches for seed in seeds]
    bits = owned.key.context.bits
    draw = np.random.default_rng(0).random(len(matches))
    values = [p_between(m, bits, u) for m, u in zip(matches, draw, strict=True)]
    return {
        "readings": len(matches),
        "mean": float(np.mean(matches)) / bits,
        "least": min(log10_binomial_tail(m, bits, 0.5) for m in matches),
        "p_values": [round(value, 4) for value in values],
    }


def with_p(row: Mapping[str, Any], label: str) -> str:
    """A count and its p-value, which older rows have of the count alone."""
    if label not in row["after"]:
        return "not run"
    matches = row["after"][label]
    known = row.get("log10_p", {}).get(label, log10_binomial_tail(matches, row["bits"], 0.5))
    return f"{matches}, 10^{known:.0f}"


def p_between(matches: int, bits: int, share: float) -> float:
    """A p-value that is uniform for coins: between this count's and the next one's."""
    upper, lower = stats.binom.sf([matches - 1, matches], bits, 0.5)
    return float(lower + share * (upper - lower))


def arrays(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """As numpy has them."""
    return {name: tensor.detach().numpy() for name, tensor in state.items()}


def rng(seed: int) -> torch.Generator:
    """Randomness of one act."""
    return torch.Generator().manual_seed(seed)


def _published(found: Mapping[str, Any]) -> list[str]:
    labels = ["every free move", *CHANGES]
    head = ("network", "bits", "axes", "moves", "error", "as it stands", *labels)
    return [
        "## With their authors' weights",
        "",
        "`python benchmarks/moves.py published --data FOLDER`: marked by default choice, as",
        "`results/real.md` has it. All of Lite0 is tuned to Caltech-101, as there; all of MiniLM",
        "without labels, on sentences that are read twice with dropout. Where that was not run the",
        "row is older, and its p is of the count alone.",
        "",
        *table(head, [(name, row["bits"], *_moved(row, labels)) for name, row in found.items()]),
    ]


def _moved(row: Mapping[str, Any], labels: Sequence[str]) -> tuple[object, ...]:
    return (
        ", ".join(f"{n} {kind}" for kind, n in row["axes"].items()),
        sum(row["moves"].values()),
        f"{row['error']:.0e}",
        row["as it stands"],
        *(with_p(row, label) for label in labels),
    )


def _fresh(found: Mapping[str, Any]) -> list[str]:
    values = [p for row in found.values() for p in row["p_values"]]
    means = ", ".join(f"{name} {row['mean']:.4f}" for name, row in found.items())
    return [
        f"Of networks that were never trained (`benchmarks/moves.py fresh`): {len(values):,}",
        f"readings of {len(found)} architectures, the least p 10^"
        f"{min(row['least'] for row in found.values()):.1f},",
        f"Kolmogorov–Smirnov p {stats.kstest(values, 'uniform').pvalue:.2f}; means: {means}.",
    ]


def page(found: Mapping[str, Any], published: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """The page of these results."""
    labels = ["every free move", *CHANGES]
    head = ("network", "bits", "harm", "axes", "moves", "error", "as it stands", *labels)
    rows = [
        (name, row["bits"], f"{row['harm']:.3f}", *_moved(row, labels))
        for name, row in found.items()
    ]
    lines = [*HEAD.splitlines(), "", *table(head, rows)]
    values = [p for row in found.values() for p in row["strangers"]["p_values"]]
    test = stats.kstest(values, "uniform")
    means = [row["strangers"]["mean"] for row in found.values()]
    lines += [
        "",
        "## Strangers",
        "",
        f"{len(values):,} readings of {STRANGERS} networks of each architecture, aligned to the",
        f"anchor: between {min(means):.4f} and {max(means):.4f} of the bits, the least p 10^"
        f"{min(row['strangers']['least'] for row in found.values()):.1f}.",
        "Against uniform (between neighbouring counts at random): Kolmogorov–Smirnov p "
        f"{test.pvalue:.2f}.",
        "",
    ]
    head = (
        *("network", "readings", "mean", "least log₁₀ p", "seconds to trace and prove"),
        "to align",
    )
    seen = {name: row["strangers"] for name, row in found.items()}
    rows = [
        (
            *(name, seen[name]["readings"], f"{seen[name]['mean']:.4f}"),
            *(f"{each:.1f}" for each in (seen[name]["least"], row["tracing"], row["aligning"])),
        )
        for name, row in found.items()
    ]
    lines += table(head, rows)
    lines += ["", *_fresh(fresh)] if fresh else []
    lines += ["", *_published(published)] if published else []
    commits = sorted({r["commit"][:12] for of in (found, published, fresh) for r in of.values()})
    lines += ["", f"Commit {', '.join(commits)}; seconds are of one processor, others running."]
    return "\n".join(lines) + "\n"


def render() -> None:
    """Write the page."""
    more = [read_json(path) if path.exists() else {} for path in (PUBLISHED, FRESH)]
    RESULT.with_suffix(".md").write_text(page(read_json(RESULT), *more))


def main() -> None:
    """Run or render."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "published", "fresh", "render"))
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--data", type=Path, default=Path("data"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "run":
        run(asked.networks or sorted(zoo.ZOO))
    if asked.what == "fresh":
        run_fresh(asked.networks or sorted(zoo.ZOO))
    if asked.what == "published":
        run_published(asked.networks, asked.data)
    render()


if __name__ == "__main__":
    main()
