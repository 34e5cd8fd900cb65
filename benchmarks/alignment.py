"""What alignment recovers, and what it does to networks that it has no business with.

    python benchmarks/alignment.py recover NETWORK --data FOLDER --runs FOLDER
    python benchmarks/alignment.py null NETWORK --runs FOLDER --unrelated FOLDER [--keys 1000]
    python benchmarks/alignment.py grind NETWORK --runs FOLDER [--keys 1000000]
    python benchmarks/alignment.py power
    python benchmarks/alignment.py time
    python benchmarks/alignment.py ways            by names, and over the axes that these show
    python benchmarks/alignment.py render          results/alignment.md from the JSON

NETWORK is v2-gn or v1-bn, trained on CIFAR-10 by benchmarks/cifar10.py into RUNS. `null` reads
fresh keys off every trained network in UNRELATED, each of which was trained from its own random
start; it goes on where it stopped.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import alignment_tables as tables
import numpy as np
import torch

from nnpassport.alignment import byaxes, names
from nnpassport.alignment.channels import flat
from nnpassport.alignment.layered import table_of
from nnpassport.attacks.obfuscation import (
    combine,
    flip_signs,
    insert_dummies,
    permute,
    rescale,
    split_channels,
)
from nnpassport.attacks.passports import draw_seed, draw_template
from nnpassport.attacks.perturbation import prune, quantise
from nnpassport.attacks.removal import fine_tune
from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.aligning import align
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.measured import verify_aligned
from nnpassport.embedding.network.channels import network_of
from nnpassport.embedding.network.equations import mean_patch, read_bits
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.tensors import read_weights
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.keys.chance import (
    LOG10_ALPHA_COMMITTED,
    LOG10_ALPHA_UNCOMMITTED,
    log10_binomial_tail,
    matches_needed,
)
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.keys.reading import forms_of, host_filters
from nnpassport.lab.results import Results
from nnpassport.lab.timing import in_turns
from nnpassport.report.provenance import provenance
from nnpassport.verification.verdicts import Alignment, Options, verify

RESULTS = Path(__file__).parent.parent / "results"
STORE = Results(RESULTS / "alignment")
SAME_SHAPE = (flip_signs, permute, rescale)
EVERYTHING = (insert_dummies, split_channels, *SAME_SHAPE)
RTAL = Recipe(epochs=3, batch=64, rate=0.01, schedule="constant", precision="bfloat16")
IMAGES = 20_000  # of CIFAR-100, for the transfer
RATES = (0.5, 0.53, 0.55)  # chances that a bit matches in a network that is unrelated


def owned(name: str, runs: Path):
    """The released network of a benchmark run, its config and key."""
    folder = runs / f"{name}-5-0"
    loaded = load_model(folder / "released")
    return loaded.model, loaded.config, load_key(folder / "owner.key")


def recover(name: str, data: Path, runs: Path) -> None:
    """Obfuscate, do something else to it, and read the bits as they stand and aligned."""
    origin = provenance()
    reference, config, key = owned(name, runs)
    normalise = Normalisation(config.mean, config.std)
    after = {
        "nothing else": lambda model: model,
        "60 % pruned": lambda model: prune(model, share=0.6).model,
        "int8": lambda model: quantise(model, "int8-channel").model,
        "int4": lambda model: quantise(model, "int4-channel").model,
        "fine-tuned to CIFAR-100": partial(to_cifar100, data=data, normalise=normalise),
    }
    entries = []
    for shape, attacks in (("same shapes", SAME_SHAPE), ("more channels", EVERYTHING)):
        obfuscated = combine(reference, torch.Generator().manual_seed(1), attacks=attacks).model
        for what, change in after.items():
            suspect = change(obfuscated).state_dict()
            entries.append(
                {"obfuscation": shape, "then": what, **readings(suspect, reference, key)}
            )
            print(entries[-1], flush=True)
    save(f"recover-{name}", {"network": name, "entries": entries, "recipe": asdict(RTAL)}, origin)


def to_cifar100(model, *, data: Path, normalise: Normalisation):
    """RTAL: a new head, and all layers trained."""
    train = read_images(str(data / "cifar100-train-q12.parquet")).at_most(IMAGES, seed=0)
    return fine_tune(model, train, RTAL, normalise=normalise, form="rtal").model


def readings(suspect: Mapping[str, torch.Tensor], reference, key) -> dict:
    """Matches and p as the suspect stands (where its shapes allow) and aligned."""
    try:
        stands = scheme_named(key.context.scheme).verify(suspect, key).matches
    except ValueError:
        stands = None
    started = time.monotonic()
    verdict, aligned = verify_aligned(suspect, key, reference)
    return {
        "bits": verdict.bits,
        "matches_as_it_stands": stands,
        "matches_aligned": verdict.matches,
        "log10_p_value": verdict.log10_p_value,
        "accepted": verdict.accepted,
        "null_matches": verdict.alignment["null"]["matches"],
        "cosines": dict(aligned.cosines),
        "dropped": aligned.dropped,
        "seconds": time.monotonic() - started,
    }


def null(name: str, runs: Path, unrelated: Path, keys: int, aligned_keys: int) -> None:
    """Fresh keys on unrelated networks, without and with alignment; and the owner's own key."""
    reference, config, own = owned(name, runs)
    scheme = scheme_named(own.context.scheme)
    folders = sorted(path.parent for path in unrelated.glob("*/model.safetensors"))
    for folder in folders:
        if STORE.has(f"null-{name}/{folder.name}"):
            continue
        started, origin = time.monotonic(), provenance()
        weights = read_weights(folder).tensors
        stands, aligned = [], []
        for number in range(keys):
            fresh = ownership.draw_key(config, scheme.name)
            stands.append(scheme.verify(weights, fresh).matches)
            if number >= aligned_keys:
                continue
            found = align(weights, reference, scheme.forms(fresh))
            aligned.append(scheme.verify(found.model.state_dict(), fresh).matches)
        genuine, blind = verify_aligned(weights, own, reference)
        whole = align(weights, reference, {})
        entry = {
            "network": folder.name,
            "bits": own.context.bits,
            "fresh_as_it_stands": stands,
            "fresh_aligned": aligned,
            "own_as_it_stands": scheme.verify(weights, own).matches,
            "own_aligned": genuine.matches,
            "own_aligned_by_whole_filters": scheme.verify(whole.model.state_dict(), own).matches,
            "own_mixtures": genuine.alignment["null"]["matches"],
            "cosines": dict(blind.cosines),
            "seconds": time.monotonic() - started,
        }
        save(f"null-{name}/{folder.name}", entry, origin)
        print(folder.name, f"{entry['seconds']:.0f} s", flush=True)


def grind(name: str, runs: Path, keys: int) -> None:
    """So many honest keys for the network's first layer; how the best of them does.

    The first layer, because its 64 bits take half a millisecond a try.
    """
    origin, started = provenance(), time.monotonic()
    model, _, _ = owned(name, runs)
    scheme, weights = scheme_named("passport-v2"), model.state_dict()
    example = torch.zeros(2, 3, 32, 32)
    rng = torch.Generator().manual_seed(0)
    template = draw_template(scheme, model, example, rng, layers=["features.0"])
    layer = template.context.layers[0]
    counts = [0] * (layer.length + 1)
    for _ in range(keys):
        key = replace(template, seed=draw_seed(rng))
        patch = mean_patch(key.layer_passport(layer.name), layer.weight, layer.geometry)
        read = read_bits(weights[f"{layer.name}.weight"], patch)
        counts[int((read == key.layer_signs(layer.name)).sum())] += 1
    best = max(count for count, times in enumerate(counts) if times)
    entry = {
        "network": name,
        "keys": keys,
        "bits": layer.length,
        "best": best,
        "log10_p_value": log10_binomial_tail(best, layer.length),
        "keys_by_matches": counts,
        "seconds": time.monotonic() - started,
    }
    save(f"grind-{name}", entry, origin)


def power() -> None:
    """The smallest share of surviving bits that is still accepted; the others match by chance."""
    rows = []
    for bits in (896, 2560):
        for log10_alpha in (LOG10_ALPHA_COMMITTED, LOG10_ALPHA_UNCOMMITTED):
            for rate in RATES:
                needed = matches_needed(bits, log10_alpha, rate)
                # On average (1 − s)·½ of the bits match by chance where s survive.
                share = 2 * needed / bits - 1
                rows.append(
                    {"bits": bits, "log10_alpha": log10_alpha, "rate": rate, "needed": needed}
                    | {"surviving": share}
                )
    save("power", {"rows": rows}, provenance())


def time_verification() -> None:
    """`verify` on ResNet-18, loading, hashing and reading: as a call, and as a whole process."""
    origin = provenance()
    config = ModelConfig(
        architecture="resnet18",
        arguments={"classes": 10, "norm": "batch"},
        classes=tuple(map(str, range(10))),
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, key = Path(scratch) / "net", Path(scratch) / "owner.key"
        torch.manual_seed(0)
        save_model(folder, config.build().eval(), config)
        save_key(ownership.draw_key(config, "passport-v2"), key)
        own = load_key(key)
        aligned = Options(alignment=Alignment(folder))
        words = [sys.executable, "-m", "nnpassport.cli.app", "verify", str(folder), "--json"]
        words += ["--key", str(key)]

        def whole(*more: str) -> None:
            subprocess.run([*words, *more], capture_output=True, check=False)

        timed = in_turns(
            {
                "as it stands, imports apart": lambda: verify(folder, own),
                "aligned, imports apart": lambda: verify(folder, own, options=aligned),
                "as it stands": whole,
                "aligned": lambda: whole("--align", str(folder)),
            },
            warmup=0,
        )
    entries = [{"reading": n, "seconds": sorted(each.seconds)} for n, each in timed.items()]
    save("time", {"architecture": "resnet18", "entries": entries}, origin)


def ways() -> None:
    """Bits that a key reads as before, of networks whose channels were moved, aligned both ways."""
    for architecture, width in (("alexnet", 0.25), ("resnet18", 0.125)):
        for norm in ("batch", "group", "layer", "none"):
            torch.manual_seed(0)
            model = build(architecture, norm=norm, width=width).eval()
            for module in model.modules():  # no scale is 1, no shift 0
                for values in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    if values.dim() == 1:
                        values.data.normal_(0, 0.3).abs_().add_(0.1)
            example = torch.zeros(2, 3, 32, 32)
            key = V2.draw_key(model, example, seed=bytes(32), passports="derived")
            flips = (flip_signs,) if norm != "none" else ()
            attacks = {"same shapes": (*flips, permute, rescale)}
            if norm != "layer":
                attacks["more channels"] = (
                    insert_dummies,
                    split_channels,
                    *flips,
                    permute,
                    rescale,
                )
            for what, several in attacks.items():
                rng = torch.Generator().manual_seed(3)
                suspect = network_of(combine(model, rng, attacks=several).model).arrays
                print(architecture, norm, what, *_both_ways(suspect, network_of(model), key))


def _both_ways(suspect, reference, key):
    """Bits by names and over axes, of how many, and seconds of processor time of each."""
    table = byaxes.reference_of(table_of(reference), reference.arrays, key)
    told = []
    for place in (
        lambda: names.align(suspect, reference, forms_of(key)).arrays,
        lambda: {**reference.arrays, **table.place(suspect).arrays},
    ):
        started = time.process_time()
        placed = place()
        read, wanted = map(_bits(key), (placed, reference.arrays))
        same = sum(int((a == b).sum()) for a, b in zip(read, wanted, strict=True))
        told.append(f"{same} in {time.process_time() - started:.2f} s")
    return *told, f"of {key.context.bits}"


def _bits(key):
    """What reads a key's bits off arrays, by layer."""
    forms = forms_of(key)
    hosts = [(layer, forms[layer.name][0]) for layer in key.context.layers]
    return lambda arrays: [np.sign(flat(host_filters(arrays, e)) @ form) for e, form in hosts]


def save(name: str, entry: dict, origin: dict) -> None:
    """Write one JSON of results with its provenance."""
    command = " ".join(["python", "benchmarks/alignment.py", *sys.argv[1:3]])
    STORE.keep(name, {**entry, "command": command}, origin)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("recover", "null", "grind"):
        command = commands.add_parser(name)
        command.add_argument("network", choices=("v2-gn", "v1-bn"))
        command.add_argument("--runs", type=Path, required=True)
        command.add_argument("--data", type=Path)
        command.add_argument("--unrelated", type=Path)
        command.add_argument("--keys", type=int, default=1000)
        command.add_argument("--aligned-keys", type=int, default=1000)
    for name in ("power", "time", "ways", "render"):
        commands.add_parser(name)
    chosen = parser.parse_args()
    match chosen.command:
        case "recover":
            recover(chosen.network, chosen.data, chosen.runs)
        case "null":
            null(chosen.network, chosen.runs, chosen.unrelated, chosen.keys, chosen.aligned_keys)
        case "grind":
            grind(chosen.network, chosen.runs, chosen.keys)
        case "render":
            (RESULTS / "alignment.md").write_text(tables.render(), encoding="utf-8")
        case "power":
            power()
        case "time":
            time_verification()
        case "ways":
            ways()


if __name__ == "__main__":
    main()
