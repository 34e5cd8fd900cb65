"""What a passport for each channel costs in a training step, beside one for a whole layer.

python benchmarks/channels.py prints seconds of processor time of a step (the median of --turns, one
thread), networks in turns, and their ratios: to the plain network, and of V2 to its bound, a plain
network's arithmetic with what comes after the fork done twice.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from nnpassport.embedding.marked import mark
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V1, V2
from nnpassport.lab.timing import in_turns, paired


def prepared(architecture: str, name: str) -> tuple[nn.Module, Callable[..., Tensor], float]:
    """A network, its loss, and what its step costs in arithmetic beside the plain network's."""
    torch.manual_seed(0)
    scheme = {"V1": V1, "V2": V2}.get(name.split(maxsplit=1)[0])
    model = build(
        architecture, classes=10, norm="batch" if name != "plain group" else "group"
    ).train()
    if scheme is None:
        return model, lambda x, y: nn.functional.cross_entropy(model(x), y), 1.0
    example = torch.zeros(2, 3, 32, 32)
    passports = "channel" if name.endswith("channels") else "derived"
    key = scheme.draw_key(model, example, seed=bytes(32), passports=passports)
    marked = mark(model, key, example)
    return model, marked.loss, 1.0 if marked.fork is None else marked.fork.step_cost


def main() -> None:
    """Time them, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--architecture", action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, 3, 32, 32, generator=rng)
    y = torch.randint(10, (options.batch,), generator=rng)
    names = ("plain", "V1 layers", "V1 channels", "V2 layers", "V2 channels")
    for architecture in options.architecture or ("alexnet", "resnet18"):
        networks = {name: prepared(architecture, name) for name in names}
        steps = {
            name: partial(step, model, loss, x, y) for name, (model, loss, _) in networks.items()
        }
        timed = in_turns(steps, repeats=options.turns, warmup=1)
        seconds = {name: each.processor_seconds for name, each in timed.items()}
        for name, (_, _, bound) in networks.items():
            ratio = median(paired(seconds[name], seconds["plain"]))
            print(
                f"{architecture} {name}: {median(seconds[name]):.3f} s, {ratio:.3f} of plain, "
                f"{ratio / bound:.3f} of its bound {bound:.3f}",
                flush=True,
            )


def step(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> None:
    """Forward and backward."""
    loss(x, y).backward()
    model.zero_grad()


if __name__ == "__main__":
    main()
