"""How fast a training ran, and what share of the device's peak that is."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path

from nnpassport.bench.networks import Cell as Timed
from nnpassport.bench.networks import work
from nnpassport.experiments.cells import Cell, embed_recipe

_SCHEMES = {"passport-v1": "V1", "passport-v2": "V2", "passport-v3": "V3"}

PEAKS: Mapping[tuple[str, str], float] = {
    ("H100", "bfloat16"): 989.4e12,
    ("H200", "bfloat16"): 989.4e12,
    ("A100", "bfloat16"): 312e12,
    ("H100", "float32"): 66.9e12,
    ("H200", "float32"): 66.9e12,
    ("A100", "float32"): 19.5e12,
}
"""FLOPs a second at most, dense, from the data sheets of NVIDIA's H100 SXM, H200 SXM and A100."""


def training_speed(cell: Cell, folder: Path, device: str) -> dict[str, float | None]:
    """Images and FLOPs a second, of the journal's median, and the share of peak; {} without one.

    FLOPs are those of convolutions and linear layers, the backward pass twice the forward. Where
    the device's peak is not known, as of processors, its share is None.
    """
    path = folder / "training" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    speeds = [e["images_per_second"] for e in map(json.loads, lines) if "images_per_second" in e]
    if not speeds:
        return {}
    speed, recipe = statistics.median(speeds), embed_recipe(cell.plan, cell.network)
    network = _SCHEMES.get(cell.network.scheme, "plain")
    width = float(cell.plan.architectures[cell.network.architecture].get("width", 1.0))
    timed = Timed(
        *(cell.network.architecture, 1, recipe.precision, "train", network, cell.network.norm),
        width=width,
    )
    flops = speed * work(timed) if width == 1.0 else None
    peak = next((p for (n, t), p in PEAKS.items() if n in device and t == recipe.precision), None)
    return {
        "images_per_second": round(speed, 1),
        "flops_per_second": flops,
        "share_of_peak": flops / peak if flops and peak else None,
    }
