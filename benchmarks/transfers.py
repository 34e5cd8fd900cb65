"""What survives a transfer: marks and forged marks on AlexNet from CIFAR-10 to other tasks.

    python benchmarks/transfers.py run NETWORK TARGET --data FOLDER --runs FOLDER
    python benchmarks/transfers.py render              results/transfers-alexnet.md from the JSON

NETWORK is v2-gn or v1-bn (trained by benchmarks/cifar10.py), or uchida or adi, which are embedded
here into the plain group-norm network of that benchmark. TARGET is cifar100 or caltech101. The
transfer is RTAL: a new head, and all layers trained. Before it, and with the network's original
head after it, the owner's mark is read, and for the baselines also one that was forged before the
transfer: the paper's Table 1, and of its Table 2 the columns that these networks have.
"""

import time
from dataclasses import asdict
from pathlib import Path

import torch
from common import RESULTS, command_line, key_in, sets_in, trained

from nnpassport.attacks.forging import forge_triggers, forge_uchida, forge_uchida_by_gradient
from nnpassport.attacks.removal import fine_tune, with_head
from nnpassport.catalog import scheme_named
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding import measured
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.train.fidelity import accuracy
from nnpassport.embedding.train.loop import Recipe
from nnpassport.keys.keyfile import load_key
from nnpassport.lab.marks import facts_of
from nnpassport.lab.results import Results, made_with
from nnpassport.lab.tables import in_percent, table
from nnpassport.report.provenance import provenance

STORE = Results(RESULTS / "transfers-alexnet")
NETWORKS = ("uchida", "adi", "v1-bn", "v2-gn")
SETTINGS = {"uchida": {"strength": 0.01}, "adi": {"triggers_per_step": 8}}
EMBED = Recipe(
    epochs=1, batch=128, rate=0.02, schedule="one-cycle", nesterov=True, precision="bfloat16"
)


class Target:
    """Another task: its files, how many images are used, and for how many epochs."""

    def __init__(self, train: str, test: str, images: int, epochs: int) -> None:
        self.train, self.test, self.images, self.epochs = train, test, images, epochs


TARGETS = {
    "cifar100": Target("cifar100-train-q12.parquet", "cifar100-test.parquet", 20_000, 3),
    "caltech101": Target("caltech101-64px-train.parquet", "caltech101-64px-test.parquet", 6907, 6),
}
# The paper's Table 1 and Table 2, AlexNet from CIFAR-10, accuracy after transfer in percent.
REPORTED = {
    ("uchida", "cifar100"): "64.25; 100 (100), forged 100 (100)",
    ("uchida", "caltech101"): "74.08; 100 (100), forged 100 (100)",
    ("adi", "cifar100"): "65.20; 25.00 (100), forged 27.80 (100)",
    ("adi", "caltech101"): "75.06; 43.60 (100), forged 46.80 (100)",
    ("v1-bn", "cifar100"): "64.64; 100",
    ("v1-bn", "caltech101"): "73.03; 100",
    ("v2-gn", "cifar100"): "59.31; 99.91",
    ("v2-gn", "caltech101"): "70.87; 100",
}


def owned(name: str, data: Path, runs: Path, epochs: int):
    """Folder of a network that carries a mark, and its key; baselines are embedded if need be."""
    if name in {"v1-bn", "v2-gn"}:
        folder = runs / f"{name}-{epochs}-0"
        return folder / "released", load_key(folder / "owner.key")
    folder, plain = runs / f"{name}-gn", load_model(runs / f"plain-gn-{epochs}-0")
    if not (folder / "config.json").exists():
        how = {"scheme": name, "settings": SETTINGS[name], "initial": plain.model.state_dict()}
        trained(folder, plain.config, sets_in(data), EMBED, **how)
    return folder, key_in(folder, plain.config, name)


def run(name: str, target_name: str, data: Path, runs: Path, epochs: int) -> None:
    """One transfer and what it leaves, into its JSON."""
    origin, target = provenance(), TARGETS[target_name]
    folder, key = owned(name, data, runs, epochs)
    loaded = load_model(folder)
    normalise = Normalisation(loaded.config.mean, loaded.config.std)
    source_test = read_images(data / "cifar10-test.parquet").at_most(5000, seed=0)
    train = read_images(data / target.train, size=32).at_most(target.images, seed=0)
    test = read_images(data / target.test, size=32)
    keys = {"real": key, **forgeries(name, loaded.model, normalise)}
    before = {n: marks(loaded.model, k, normalise) for n, k in keys.items()}
    recipe = Recipe(
        epochs=target.epochs, batch=64, rate=0.01, schedule="constant", precision="bfloat16"
    )
    started = time.monotonic()
    tuned = fine_tune(loaded.model, train, recipe, normalise=normalise, form="rtal").model
    original_head = with_head(tuned, loaded.model)
    entry = {
        "network": name,
        "target": target_name,
        "scheme": key.context.scheme,
        "accuracy_before": accuracy(loaded.model, source_test, normalise),
        "accuracy_after": accuracy(tuned, test, normalise),
        "marks_before": before,
        "marks_after": {n: marks(original_head, k, normalise) for n, k in keys.items()},
        "train_images": len(train),
        "test_images": len(test),
        "recipe": asdict(recipe),
        "embedding": asdict(EMBED) | SETTINGS[name] if name in SETTINGS else None,
        "seconds": time.monotonic() - started,
        "reported": REPORTED[name, target_name],
        "command": f"python benchmarks/transfers.py run {name} {target_name}",
    }
    STORE.keep(f"{name}-{target_name}", entry, origin)


def forgeries(name: str, model, normalise) -> dict:
    """Keys that somebody forged on the network before it was transferred."""
    rng, example = torch.Generator().manual_seed(1), torch.zeros(2, 3, 32, 32)
    if name == "adi":
        scheme = scheme_named("adi")
        forged = forge_triggers(model, scheme, example, rng, normalise=normalise)
        return {"forged": forged.key}
    if name == "uchida":
        scheme = scheme_named("uchida")
        return {
            "forged": forge_uchida(model, scheme, example, rng).key,
            "forged by gradient": forge_uchida_by_gradient(model, scheme, example, rng).key,
        }
    return {}


def marks(model, key, normalise) -> dict:
    """What V reads: matches, and the p-value where the key is derived."""
    return facts_of(measured.verify_model(model, normalise, key))


def render() -> str:
    """A table of all transfers that were run, as Markdown; those not run are not in it."""
    found = {(e["network"], e["target"]): e for e in STORE.all().values()}
    cells = ((n, t) for n in NETWORKS for t in TARGETS)
    head = (
        *("network", "target", "images, epochs", "accuracy before", "after", "real mark"),
        *("log₁₀ p", "forged mark", "the paper: accuracy; marks"),
    )
    return "\n".join(
        [
            "# Marks after a transfer: AlexNet, CIFAR-10 to other tasks",
            "",
            "Rendered by `python benchmarks/transfers.py render` from its JSON files.",
            "RTAL; accuracies and detection in %, detection after (before) the transfer; triggers "
            "are",
            "asked with the original head. A forged key has no p-value: it is not derived from a "
            "seed.",
            "",
            *table(head, [_row(found[cell]) for cell in cells if cell in found]),
            "",
            f"Device: {'; '.join(sorted(set(map(made_with, found.values()))))}; n = 1 run a cell.",
            "",
        ]
    )


def _row(e: dict) -> tuple[object, ...]:
    before, after = e["marks_before"], e["marks_after"]
    rates = {n: f"{_rate(after[n])} ({_rate(before[n])})" for n in before}
    p = [marks["real"]["log10_p_value"] for marks in (after, before)]
    return (
        *(e["network"], e["target"], f"{e['train_images']}, {e['recipe']['epochs']}"),
        *(in_percent(e["accuracy_before"]), in_percent(e["accuracy_after"]), rates["real"]),
        f"{p[0]:.1f} ({p[1]:.1f})",
        "; ".join(f"{n}: {rate}" for n, rate in rates.items() if n != "real"),
        e["reported"],
    )


def _rate(mark: dict) -> str:
    return in_percent(mark["matches"] / mark["bits"])


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {STORE.folder.with_suffix(".md"): render()},
        run,
        {
            "name": {"choices": NETWORKS, "metavar": "NETWORK"},
            "target_name": {"choices": TARGETS, "metavar": "TARGET"},
            "--data": {"type": Path, "required": True},
            "--runs": {"type": Path, "default": Path("runs")},
            "--epochs": {"type": int, "default": 5, "help": "of the networks in --runs"},
        },
    )
