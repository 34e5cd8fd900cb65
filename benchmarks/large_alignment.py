"""How long axes take to trace, prove and align: a ViT-S, and a transformer of a billion numbers.

    python benchmarks/large_alignment.py run [PART ...]   results/large_alignment.json; all, or some
                                                          of vit, billion, growth
    python benchmarks/large_alignment.py render           results/large_alignment.md from it

The ViT-S is Hugging Face's, with random weights; a thief makes all free moves but twins. The
billion is Llama's architecture: its axes are traced with zeros that take no memory, and proved on a
narrow copy. Weights are made when they are asked for, from a seed for each tensor, and the
thief's are these with the stream rotated and the hidden units reordered, under a little noise. What
is aligned is what one marked layer needs; every other one takes as long again.

`growth` runs a narrow Llama of more and more blocks, each in a process of its own, and says how
much memory each step took at most beyond what the process had when it began (Linux alone).
"""

import argparse
import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.part import needed, only
from nnpassport.alignment.solve import aligner
from nnpassport.attacks.moves import KEEPING, move
from nnpassport.embedding.axes import axes_of, untied
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.trace import trace
from nnpassport.lab.results import read_json, write_json
from nnpassport.lab.tables import table
from nnpassport.lab.timing import Clock
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "large_alignment.json"
WIDTH, HIDDEN, BLOCKS, WORDS = 2048, 5632, 22, 16_000
NOISE = 0.05
GROWN = (4, 8, 16)
NARROW = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 704,
          "num_attention_heads": 8, "num_key_value_heads": 2}  # fmt: skip
STEPS = ("trace", "trace and proof", "alignment of all", "alignment of one layer")


def vit() -> dict[str, Any]:
    """Seconds of a ViT-S: to trace and prove, and to align a copy that was moved."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536
    )
    model = transformers.ViTForImageClassification(config).eval()
    example = {"pixel_values": torch.randn(2, 3, 224, 224)}
    clock = Clock()
    axes = axes_of(model, example)
    traced = clock.read()
    kinds = [kind for kind in KEEPING if kind != "mirror"]
    moved = move(model, example, torch.Generator().manual_seed(1), kinds=kinds)
    own = {n: t.double().numpy() for n, t in model.state_dict().items()}
    theirs = {n: t.double().numpy() for n, t in moved.model.state_dict().items()}
    clock = Clock()
    to = aligner(axes, own)
    found = to.align(theirs).weights
    aligned = clock.read()
    apart = [
        float(np.linalg.norm(found[n] - to.reference[n]) / np.linalg.norm(to.reference[n]))
        for n in found
        if found[n].ndim > 1 and n in to.on
    ]
    return {
        "numbers": sum(each.size for each in own.values()),
        "axes": len(axes.axes),
        "trace and proof": traced,
        "alignment": aligned,
        "apart": max(apart),
        "memory": memory(),
    }


def billion() -> dict[str, Any]:
    """Seconds and memory of one marked layer in a transformer of a billion numbers."""
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=BLOCKS,
        num_attention_heads=32, num_key_value_heads=4, use_cache=False,
    )  # fmt: skip
    narrow = deepcopy(config)
    narrow.update({"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128})
    clock = Clock()
    small = untied(transformers.LlamaForCausalLM(narrow).eval())
    letters = {"input_ids": torch.arange(16).view(2, 8)}
    proved = prove(small, letters, trace(small, letters))
    proof = clock.read()
    clock = Clock()
    model = without_numbers(config)
    axes = trace(model, letters)
    traced = clock.read()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    marked = f"model.layers.{BLOCKS // 2}.mlp.up_proj.weight"
    names = needed(axes, {marked})
    part = only(axes, names)
    own, theirs = Weights(shapes, part, moved=False), Weights(shapes, part, moved=True)
    clock = Clock()
    to = aligner(part, {name: own[name] for name in sorted(names)}, {marked})
    found = to.align({name: theirs[name] for name in sorted(names)}).weights
    aligned = clock.read()
    reference = to.reference[marked]
    rows = (found[marked] * reference).sum(1) / np.maximum(
        np.linalg.norm(found[marked], axis=1) * np.linalg.norm(reference, axis=1), 1e-300
    )
    return {
        "numbers": sum(int(np.prod(shape)) for shape in shapes.values()),
        "axes": len(axes.axes),
        "axes proved on the narrow one": len(proved.axes),
        "proof": proof,
        "trace": traced,
        "alignment": aligned,
        "tensors": sorted(names),
        "numbers compared": sum(int(np.prod(shapes[name])) for name in names),
        "least cosine": float(rows.min()),
        "memory": memory(),
    }


def without_numbers(config: Any) -> torch.nn.Module:
    """The network with one zero for all numbers of a tensor, which takes no memory."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros(1).expand(parameter.shape)
                module._parameters[name] = torch.nn.Parameter(zero, requires_grad=False)
    return model


class Weights(Mapping[str, Any]):
    """Tensors that are made when they are asked for; `moved`: as a thief has them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], axes: Axes, *, moved: bool) -> None:
        self._shapes, self._axes, self._moved = shapes, axes, moved

    def __getitem__(self, name: str) -> Any:
        seed = int.from_bytes(name.encode()[-12:], "big")
        draw, shape = np.random.default_rng(seed), self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape)
        tensor = draw.standard_normal(shape) * 0.02
        if self._moved:
            tensor += NOISE * 0.02 * draw.standard_normal(shape)
            for number, axis in enumerate(self._axes.axes):
                for place in axis.places:
                    if place.tensor == name and axis.kind != "inner":
                        tensor = _moved(tensor, place.dimension, axis.size, axis.kind, number)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _moved(tensor: Any, dimension: int, size: int, kind: str, number: int) -> Any:
    draw = np.random.default_rng(number)
    if kind == "permute":
        return np.take(tensor, draw.permutation(size), dimension)
    # A product of reflections: a rotation that takes no square matrix.
    rows = np.moveaxis(tensor, dimension, -1)
    for _ in range(8):
        normal = draw.standard_normal(size)
        normal /= np.linalg.norm(normal)
        rows = rows - 2 * (rows @ normal)[..., None] * normal
    return np.moveaxis(rows, -1, dimension)


def memory() -> float:
    """GiB that the process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def growth() -> dict[str, Any]:
    """By the number of blocks, the memory of each step; each number in a process of its own."""
    found = {}
    for blocks in GROWN:
        command = [sys.executable, __file__, "blocks", str(blocks)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[str(blocks)] = json.loads(done.stdout.splitlines()[-1])
    return {"blocks": found}


def of_blocks(blocks: int) -> dict[str, Any]:
    """MiB that each step takes at most, in a narrow network of so many blocks."""
    config = transformers.LlamaConfig(**NARROW, num_hidden_layers=blocks, use_cache=False)
    letters = {"input_ids": torch.arange(16).view(2, 8)}
    model = without_numbers(config)
    table: dict[str, Axes] = {}
    found = {"trace": _at_most(lambda: table.update(axes=trace(model, letters)))}
    real = transformers.LlamaForCausalLM(config).eval()
    found["trace and proof"] = _at_most(lambda: table.update(axes=axes_of(real, letters)))
    axes, real = table["axes"], None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    marked = f"model.layers.{blocks // 2}.mlp.up_proj.weight"
    for label, names in zip(STEPS[2:], (set(shapes), needed(axes, {marked})), strict=True):
        part = only(axes, names)
        own, theirs = (
            {n: each[n] for n in sorted(names)}
            for each in (Weights(shapes, part, moved=False), Weights(shapes, part, moved=True))
        )
        found[label] = _at_most(lambda: aligner(part, own, {marked}).align(theirs))  # noqa: B023
    return {"numbers": sum(int(np.prod(shape)) for shape in shapes.values()), "MiB": found}


def _at_most(step: Callable[[], Any]) -> float:
    """MiB that the process had at most during a step, beyond what it had before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, and does not hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # from now on the peak counts anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(which)).split()[1]) / 1024


WHAT = {"vit": vit, "billion": billion, "growth": growth}


def page(found: Mapping[str, Any]) -> str:
    """The page of these results."""

    def seconds(each: Mapping[str, float]) -> str:
        return f"{each['processor']:.1f} ({each['wall']:.1f})"

    columns = [_of_vit(found["vit"], seconds)] if "vit" in found else []
    columns += [_of_billion(found["billion"], seconds)] if "billion" in found else []
    rows = [(name, *(each[name] for each in columns)) for name in columns[0]]
    lines = "\n".join(table(rows[0], rows[1:]))
    commits = ", ".join(sorted({each["commit"][:12] for each in found.values()}))
    return f"""\
# How long alignment takes

`python benchmarks/large_alignment.py run`, then `render`. Seconds of one processor, and in brackets
of the wall, on a machine whose two processors many others used as well: upper bounds.

{lines}

The ViT-S was moved by all free moves but mirrors and twins. A marked layer of a large network needs
what is on its own axes, and of the stream the embeddings and the head: time grows in proportion to
the marked layers, and memory hardly with the number of blocks, as below. Within a layer, comparing
rows takes width × hidden² products, the assignment about as many, and the stream's rotation words ×
width² and width³.
{_of_growth(found["growth"]) if "growth" in found else ""}
Commit {commits}.
"""


def _of_growth(row: Mapping[str, Any]) -> str:
    """How memory grows with the number of blocks."""
    seen = row["blocks"]
    rows = [
        (blocks, f"{each['numbers']:,}", *(f"{each['MiB'][step]:.0f}" for step in STEPS))
        for blocks, each in seen.items()
    ]
    few, many = (seen[str(n)] for n in (GROWN[0], GROWN[-1]))
    added = GROWN[-1] - GROWN[0]
    block = (many["numbers"] - few["numbers"]) * 8 / 2**20 / added
    each = {step: (many["MiB"][step] - few["MiB"][step]) / added for step in STEPS}
    lines = "\n".join(table(("blocks", "numbers", *STEPS), rows))
    return f"""
## How memory grows

MiB that each step takes at most beyond what there was before it (both networks are there when it is
aligned), in Llama's architecture {NARROW["hidden_size"]} wide; `run growth`. The trace is of a
network without numbers.

{lines}

A block has {block:.1f} MiB of numbers in float64. Each block more adds {each[STEPS[0]]:.1f} MiB to
the trace, {each[STEPS[1]]:.1f} to trace and proof, {each[STEPS[2]]:.1f} to the alignment of all,
and {each[STEPS[3]]:.1f} to that of what one marked layer needs.
"""


def _of_vit(row: Mapping[str, Any], seconds: Any) -> dict[str, str]:
    return {
        "what": "ViT-S",
        "numbers": f"{row['numbers']:,}",
        "axes": str(row["axes"]),
        "trace and proof": seconds(row["trace and proof"]),
        "compared": "all",
        "alignment": seconds(row["alignment"]),
        "how far from the original": f"{row['apart']:.0e}",
        "GiB at most": f"{row['memory']:.1f}",
    }


def _of_billion(row: Mapping[str, Any], seconds: Any) -> dict[str, str]:
    compared = f"{row['numbers compared']:,} in {len(row['tensors'])} tensors, for one marked layer"
    least = f"least cosine of a row {row['least cosine']:.4f}, under noise of {NOISE}"
    return {
        "what": "Llama's architecture",
        "numbers": f"{row['numbers']:,}",
        "axes": f"{row['axes']}; {row['axes proved on the narrow one']} proved",
        "trace and proof": f"{seconds(row['trace'])}; a narrow copy {seconds(row['proof'])}",
        "compared": compared,
        "alignment": seconds(row["alignment"]),
        "how far from the original": least,
        "GiB at most": f"{row['memory']:.1f}",
    }


def main() -> None:
    """Run or render."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "render", "blocks"))
    parser.add_argument("parts", nargs="*", default=sorted(WHAT))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "blocks":
        sys.stdout.write(json.dumps(of_blocks(int(asked.parts[0]))) + "\n")
        return
    found = read_json(RESULT) if RESULT.exists() else {}
    if asked.what == "run":
        for part in asked.parts:
            found[part] = {**WHAT[part](), **provenance()}
            write_json(RESULT, found)
            sys.stdout.write(f"{part} {found[part]}\n")
    if found:
        RESULT.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
