"""V on checkpoints larger than what it may take in memory: results/scaling/verification.json.

    python benchmarks/large_checkpoint.py --folder FOLDER

makes checkpoints of 0.7, 1.9 and 5.9 GB with the layers of a Llama of 7 billion parameters (fewer
blocks, bfloat16, shards of a gigabyte as the hub has them), in which every linear layer of every
block carries a V2 passport, put there in closed form: a row w whose bit is wrong gets the smallest
change that turns it, (t − w·m) m / |m|². Each is verified by the ordinary command in processes of
their own, and once with a key that has nothing to do with it; then it is deleted.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from nnpassport.embedding.network.equations import Geometry, read_bits
from nnpassport.embedding.schemes.signature import secret_of
from nnpassport.files.disk import sha256_of
from nnpassport.files.safetensors import INDEX_FILE, open_shards
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.lab.results import write_json
from nnpassport.lab.timing import in_turns
from nnpassport.report.provenance import provenance

RESULTS = Path(__file__).parent.parent / "results" / "scaling" / "verification.json"
WIDTH, INNER, WORDS = 4096, 11008, 32_000
SHAPES = {
    **{f"self_attn.{each}_proj": (WIDTH, WIDTH) for each in "qkvo"},
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
BLOCKS = (1, 4, 14)
SHARD = 10**9  # bytes
LEAST = 0.02  # of |γ|, so that rounding to bfloat16 turns no sign
TURNS = 3

# The ordinary command, and what its process took once it is through.
WATCHED = """
import json, resource, sys
from pathlib import Path
from nnpassport.cli.app import main
try:
    main()
finally:
    status = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines())
    io = dict(l.split(": ") for l in Path("/proc/self/io").read_text().splitlines())
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({
        "peak_bytes": 1024 * int(status["VmHWM"].split()[0]),
        "processor_seconds": used.ru_utime + used.ru_stime,
        "bytes_read": int(io["rchar"]),
    }), file=sys.stderr)
"""


def key_for(blocks: int, seed: int) -> Key:
    """A V2 key for every linear layer of so many blocks."""
    layers = tuple(
        LayerShape(f"model.layers.{i}.{name}", shape, (shape[1], 64), Geometry())
        for i in range(blocks)
        for name, shape in SHAPES.items()
    )
    return Key(bytes([seed]) * 32, Context("passport-v2", "benchmark", layers, None, bytes(16)))


def tensors(key: Key, blocks: int) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the network, one at a time; embeddings and norms carry no passport."""
    rng = torch.Generator().manual_seed(blocks)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) * 0.02

    yield "model.embed_tokens.weight", drawn(WORDS, WIDTH).bfloat16()
    for layer in key.context.layers:
        yield f"{layer.name}.weight", marked(drawn(*layer.weight), key, layer).bfloat16()
    for i in range(blocks):
        for norm in ("input", "post_attention"):
            name = f"model.layers.{i}.{norm}_layernorm.weight"
            yield name, torch.ones(WIDTH, dtype=torch.bfloat16)


def marked(rows: Tensor, key: Key, layer: LayerShape) -> Tensor:
    """The rows with the smallest change by which all γ = Wm have the signs of the key."""
    mean_patch, signs = secret_of(key, layer)[:2]
    form = mean_patch[0, 0].float()
    gamma = rows @ form
    wanted = signs * gamma.abs().clamp(min=LEAST)
    return rows.addr_((wanted - gamma) / (form @ form), form)


def write(folder: Path, parts: Iterator[tuple[str, Tensor]]) -> None:
    """Shards of about a gigabyte and their index; each shard leaves the cache of the system."""
    folder.mkdir(parents=True)
    shards: list[dict[str, Tensor]] = [{}]
    homes: dict[str, str] = {}

    def save() -> None:
        name = f"model-{len(shards):05}.safetensors"
        safetensors.torch.save_file(shards[-1], folder / name, metadata={"format": "pt"})
        homes.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    for name, tensor in parts:
        if sum(each.nbytes for each in shards[-1].values()) + tensor.nbytes > SHARD:
            save()
            shards.append({})
        shards[-1][name] = tensor
    save()
    final = {
        f"model-{i + 1:05}": f"model-{i + 1:05}-of-{len(shards):05}" for i in range(len(shards))
    }
    for old, new in final.items():
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
    index = {
        name: f"{final[home.removesuffix('.safetensors')]}.safetensors"
        for name, home in homes.items()
    }
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}))


def forget(folder: Path) -> None:
    """Drop the files from the cache of the system, so that they come from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def verified(folder: Path, key: Path) -> dict[str, Any]:
    """One run of `nnpassport verify` in a new process."""
    command = [sys.executable, "-c", WATCHED, "verify", str(folder), "--key", str(key), "--json"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begun
    if not done.stdout:  # nothing was decided
        raise RuntimeError(done.stderr)
    verdict = json.loads(done.stdout)
    return {
        "seconds": seconds,
        **json.loads(done.stderr.splitlines()[-1]),
        "exit": done.returncode,
        **{name: verdict[name] for name in ("bits", "matches", "log10_p_value", "accepted")},
    }


def measured(folder: Path, blocks: int) -> dict[str, Any]:
    """Make a checkpoint, verify it in several processes, and delete it."""
    checkpoint, own, other = folder / "checkpoint", folder / "own.key", folder / "other.key"
    key = key_for(blocks, seed=1)
    save_key(key, own, overwrite=True)
    save_key(key_for(blocks, seed=2), other, overwrite=True)
    try:
        write(checkpoint, tensors(key, blocks))
        shards = open_shards(checkpoint / INDEX_FILE)
        hosts = [shards.places[f"{layer.name}.weight"] for layer in key.context.layers]
        turns = []
        for _ in range(TURNS):
            forget(checkpoint)
            turns.append(verified(checkpoint, own))
        return {
            "blocks": blocks,
            "tensors": len(shards),
            "shards": len(shards.files) - 1,
            "bytes": sum(source.size for source in shards.files),
            "host_bytes": sum(place.end - place.begin for place in hosts),
            "largest_host_bytes": max(place.end - place.begin for place in hosts),
            "host_numbers": sum(place.shape[0] * place.shape[1] for place in hosts),
            "passport_numbers": sum(2 * 64 * place.shape[1] for place in hosts),
            "turns": turns,
            "stranger": verified(checkpoint, other),
        }
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


def rates(folder: Path) -> dict[str, float]:
    """What one layer of the smallest shape takes, in processor seconds: what a model is made of."""
    key = key_for(1, seed=3)
    layer = key.context.layers[0]
    weight = torch.randn(*layer.weight).bfloat16()
    path = folder / "one.safetensors"
    safetensors.torch.save_file({"w": weight}, path)
    secret = secret_of(key, layer)
    opened = open_shards(path)
    try:
        return {
            "sha256_bytes_per_second": path.stat().st_size / _seconds(lambda: sha256_of(path)),
            "load_bytes_per_second": weight.nbytes / _seconds(lambda: opened["w"]),
            "numbers_per_second": weight.numel()
            / _seconds(lambda: read_bits(weight, secret.mean_patch)),
            "passport_numbers_per_second": 128 * WIDTH / _seconds(lambda: secret_of(key, layer)),
        }
    finally:
        path.unlink()


def smallest(folder: Path) -> dict[str, Any]:
    """The same command on next to nothing: what starting it takes."""
    checkpoint, own = folder / "small", folder / "small.key"
    layer = LayerShape("a", (256, 64), (64, 64), Geometry())
    key = Key(bytes(32), Context("passport-v2", "benchmark", (layer,), None, bytes(16)))
    save_key(key, own, overwrite=True)
    try:
        write(checkpoint, iter([("a.weight", marked(torch.randn(256, 64), key, layer))]))
        return {"turns": [verified(checkpoint, own) for _ in range(TURNS)]}
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _seconds(run: Callable[[], object]) -> float:
    """Processor seconds of a run, the median of seven after one that does not count."""
    return statistics.median(in_turns({"": run}, warmup=1)[""].processor_seconds)


def main() -> None:
    """Measure all sizes, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for 6 GB, deleted afterwards")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = given.folder
    folder.mkdir(parents=True)
    try:
        results: dict[str, Any] = {"provenance": provenance(), "turns": TURNS}
        results |= {"start": smallest(folder), "rates": rates(folder), "checkpoints": []}
        for blocks in given.blocks:
            results["checkpoints"].append(measured(folder, blocks))
            print(json.dumps(results["checkpoints"][-1]["turns"][-1]), file=sys.stderr)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(given.out, results)


if __name__ == "__main__":
    main()
