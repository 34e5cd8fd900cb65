"""The networks that are compared, their inputs, and what they cost in FLOPs."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnpassport.embedding.network.layers import private_count
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V2, V3, draw_by_layer
from nnpassport.embedding.train.loop import PRECISIONS
from nnpassport.lab.bench.cases import CHEAPER, TRANSFORMER, Case
from nnpassport.lab.bench.vit import ViT

SLOW_REFERENCE = Path(__file__).parents[4] / "benchmarks" / "slow_reference.py"
"""A step as the published code runs it; in a checkout, and not in an installed package."""


def default_device() -> str:
    """CUDA if there is any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def example() -> Tensor:
    """What all networks run on, as far as keys are concerned."""
    return torch.zeros(2, 3, 32, 32)


def network(case: Case) -> nn.Module:
    """A new one, without a passport."""
    if case.architecture == TRANSFORMER:
        return ViT(width=case.width)
    return build(case.architecture, norm=case.norm, width=case.width)


def images(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """One batch and its labels, the same every time."""
    rng = torch.Generator().manual_seed(0)
    drawn = torch.randn(case.batch, 3, 32, 32, generator=rng)
    labels = torch.randint(10, (case.batch,), generator=rng)
    return drawn.to(device, memory_format=torch.channels_last), labels.to(device)


def precision(case: Case, device: str) -> torch.autocast:
    """The context to compute in."""
    dtype = PRECISIONS[case.precision]
    return torch.autocast(device, dtype, enabled=dtype is not None)


def lower_bound(architecture: str) -> float:
    """1 + (FLOPs after the fork) / (all FLOPs): what a step of two branches must cost at least.

    The fork is at the norm of the first passport layer: that layer itself is in the trunk, and so
    is every other passport layer on the same input.
    """
    flops = _flops(architecture)
    return 1 + flops.after_fork / (flops.trunk + flops.after_fork)


def private_work(name: str, batch: int) -> float:
    """The private branch's share of what it would be, had it every image in every step."""
    scheme = CHEAPER.get(name, V2)
    share = private_count(batch, scheme.private_share) / batch
    return (1 - (scheme.late or 0)) * share / scheme.private_every


def step_bound(name: str, batch: int, bound: float) -> float:
    """What a step of this network must cost at least, as a multiple of a plain one.

    `bound` is the `lower_bound`; triggers are images beside those of the batch.
    """
    rows = batch + V3.shown_at_once if name.startswith("V3") else batch
    return rows / batch * (1 + (bound - 1) * private_work(name, rows))


def work(case: Case) -> float:
    """About the FLOPs of one run of the case, to share out time by."""
    flops = _flops(case.architecture)
    forward = float(flops.trunk + flops.after_fork)
    if case.network in {"slow V2", "slow V3"}:
        forward *= 2
    elif "V2" in case.network or "V3" in case.network or case.network == "forked":
        forward += flops.after_fork
    times = {"infer": 1, "act": 1, "long act": 4}.get(case.task, 3)
    return case.batch * forward * times * case.steps


class _Flops(NamedTuple):
    trunk: int
    after_fork: int


@cache
def _flops(architecture: str) -> _Flops:
    """FLOPs of one image's forward, as PyTorch counts them.

    A backward has twice as many in each layer, so shares are the same for a whole step.
    """
    norm = "layer" if architecture == TRANSFORMER else "group"
    model = network(Case(architecture, 2, "float32", "infer", "plain", norm))
    # Attention as plain products: what PyTorch runs in their place on a processor is not counted.
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example())
        fork = V2.insert(model, draw_by_layer(V2, model, example(), seed=bytes(32)), example()).fork
    whole = counter.get_total_flops() // len(example())
    after = round(whole * (fork.step_cost - 1)) if fork else 0
    return _Flops(whole - after, after)
