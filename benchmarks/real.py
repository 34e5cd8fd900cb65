"""Networks that the world trained, marked and robbed: what a mark costs them, what takes it out.

    python benchmarks/real.py run NETWORK [ATTACK …] --data FOLDER    what is not there yet
    python benchmarks/real.py render                                  results/real.md from the JSON

NETWORK is a key of NETWORKS, ATTACK one of ATTACKS (default: all), with "/all" behind it to be
carried out on every layer and not only on those that the package chooses by itself, or "tuning",
for EfficientNet-Lite0: it is tuned to another task, which is no attack. FOLDER holds
caltech101-64px-train.parquet and caltech101-64px-test.parquet, for networks of images.
"""

import itertools
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import RESULTS, command_line
from torch import Tensor, nn
from torch.nn import functional

from nnpassport.attacks import informed
from nnpassport.attacks.outcome import Attacked
from nnpassport.attacks.removal import last_linear
from nnpassport.attacks.unlabelled import KEPT, Asking, Scouted, answers_of, cosine, same_classes
from nnpassport.attacks.unlabelled import scout as scouted
from nnpassport.data.images import Normalisation, batches, read_images
from nnpassport.embedding.network.layers import replace_module
from nnpassport.embedding.network.outputs import Example, call, part_of
from nnpassport.embedding.network.survey import choose_enough, survey
from nnpassport.embedding.schemes import channels
from nnpassport.embedding.schemes.graft import Report, graft_channels
from nnpassport.embedding.schemes.passport import V2
from nnpassport.keys.key import Key
from nnpassport.lab.leaderboard.board import said_p
from nnpassport.lab.marks import facts_of
from nnpassport.lab.results import Results
from nnpassport.lab.tables import in_percent, table
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
STORE = Results(RESULTS / "real")
sys.path.insert(0, str(ROOT / "tests"))

import zoo  # noqa: E402 - it is beside the tests

SEED = bytes(32)
CONFIDENT = 0.5


class Sizes(NamedTuple):
    """How many inputs the owner measures with, the thief has, and nobody has seen."""

    owner: int = 128
    thief: int = 1_000
    test: int = 300

    def cut(self, inputs: Example) -> "Inputs":
        """The first of them, the next, and those after."""
        ends = (0, self.owner, self.owner + self.thief, sum(self))
        return Inputs(*(part_of(inputs, *pair) for pair in itertools.pairwise(ends)))


class Inputs(NamedTuple):
    """What the owner measures with, what the thief has, and what nobody has seen."""

    owner: Example
    thief: Example
    test: Example


class Network(NamedTuple):
    """A published network: what it is, and how answers of two of its kind are compared."""

    kind: str
    norm: str
    answers: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Path, Sizes], Inputs]
    asking: Asking
    sizes: Sizes = Sizes()


def _images(data: Path, sizes: Sizes) -> Inputs:
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    train, test = (read_images(data / f"caltech101-64px-{part}.parquet") for part in PARTS)
    sets = (train.sample(sizes.owner + sizes.thief, seed=0), test.sample(sizes.test, seed=0))
    return sizes.cut(torch.cat([normalise(each.resized(224).images) for each in sets]))


def _sentences(_data: Path, sizes: Sizes) -> Inputs:
    texts = zoo.plain_sentences()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return sizes.cut(zoo.sentences([texts[i] for i in order[: sum(sizes)]]))


PARTS = ("train", "test")
NETWORKS: Mapping[str, Network] = {
    "EfficientNet-Lite0": Network(
        "classifier of images, ImageNet's weights",
        "batch",
        "classes",
        zoo.lite0,
        _images,
        Asking(call, same_classes),
        Sizes(thief=400),  # 224 pixels: what two shared cores get through
    ),
    "MiniLM": Network(
        "encoder of sentences, all-MiniLM-L6-v2",
        "layer",
        "cosine",
        zoo.minilm,
        _sentences,
        Asking(zoo.sentence_vectors, cosine),
    ),
}


def _drawn(
    attack: Callable[[Scouted, torch.Generator], Attacked],
) -> Callable[[Scouted], Attacked]:
    return lambda thief: attack(thief, torch.Generator().manual_seed(0))


ATTACKS: Mapping[str, Callable[[Scouted], Attacked]] = {
    "drown": _drawn(informed.drown),
    "narrow": informed.narrow,
    "replace": _drawn(informed.replace),
    "low-rank": informed.lower_rank,
    "shave-outliers": informed.shave_outliers,
    "unscale": _drawn(informed.unscale),
    "shave": partial(informed.shave, tries=24),
    "drown-and-imitate": _drawn(
        partial(informed.drown_and_imitate, budget=informed.Imitation(rounds=1, epochs=2))
    ),
}


class Marked(NamedTuple):
    """A network before and after its mark, and how long that took."""

    plain: nn.Module
    released: nn.Module
    key: Key
    report: Report
    seconds: float
    mebibytes: float


def marked(network: Network, inputs: Inputs) -> Marked:
    """A key drawn for the network, and grafted into it, on the package's own choice of layers."""
    plain = network.build()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    example = part_of(inputs.owner, 0, 2)
    before, begun = _resident(), time.monotonic()
    key = V2.draw_key(plain, example, owner="benchmark", seed=SEED, seen=inputs.owner)
    model = deepcopy(plain)
    V2.insert(model, key, example)
    report = graft_channels(model, inputs.owner)
    seconds, peak = time.monotonic() - begun, _peak()
    return Marked(plain, V2.released(model).eval(), key, report, seconds, peak - before)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def run(name: str, attacks: list[str], data: Path) -> None:
    """The graft of a network and these attacks, but for what has its JSON already."""
    if TUNING in attacks:
        tune(name, data)
        attacks = [each for each in attacks if each != TUNING]
    network, origin = NETWORKS[name], provenance()
    missing = [work for work in ("graft", *attacks) if not STORE.has(_slug(name, work))]
    if not missing:
        return
    inputs = network.inputs(data, network.sizes)
    subject = marked(network, inputs)
    own = answers_of(subject.released, inputs.test, network.asking)
    plain = answers_of(subject.plain, inputs.test, network.asking)

    def keep(work: str, facts: Mapping[str, Any]) -> None:
        shared = {"network": name, "inputs": [*network.sizes]}
        STORE.keep(_slug(name, work), {**shared, **facts}, origin)
        print(_slug(name, work), flush=True)

    if "graft" in missing:
        missing.remove("graft")
        keep("graft", _graft(network, subject, plain, own))
    if not missing:
        return
    chosen = _chosen(subject, inputs)
    looked = ["*"] if any("/" in attack for attack in missing) else chosen
    thief = scouted(subject.released, inputs.thief, kept=KEPT, layers=looked, asking=network.asking)
    for attack in missing:
        how, _, where = attack.partition("/")
        sites = {n: site for n, site in thief.sites.items() if where or n in chosen}
        aimed = replace(thief, sites=sites)
        begun = time.monotonic()
        model = ATTACKS[how](aimed).model
        verdict = V2.verify(model.state_dict(), subject.key)
        found = answers_of(model, inputs.test, network.asking)
        facts = {
            "attack": how,
            "layers": len(aimed.sites),
            "all_layers": bool(where),
            "keeps": KEPT,
            **facts_of(verdict),
            "kept": network.asking.alike(own, found),
            "kept_confident": _confident(network, own, found),
            "kept_of_plain": network.asking.alike(plain, found),
            "thief_believes": thief.likeness(model),
            "seconds": time.monotonic() - begun,
        }
        keep(attack, facts)


class Tuning(NamedTuple):
    """How a network of images is tuned to another task: all of it, with a head of its own."""

    size: int = 160
    batch: int = 16
    steps: int = 240
    rate: float = 0.02
    pruned: float = 0.7


TUNING = "tuning"


def tune(name: str, data: Path) -> None:
    """A marked network of images, tuned to classes of Caltech-101, then pruned."""
    if STORE.has(_slug(name, TUNING)):
        return
    network, origin, how = NETWORKS[name], provenance(), Tuning()
    subject = marked(network, network.inputs(data, network.sizes))
    images = read_images(data / f"caltech101-64px-{PARTS[0]}.parquet").resized(how.size)
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    model, begun = deepcopy(subject.released).requires_grad_(True), time.monotonic()
    head = last_linear(model)
    inner = model.get_submodule(head)
    torch.manual_seed(0)
    replace_module(model, head, nn.Linear(inner.in_features, len(images.classes)))
    model.train()
    descent = torch.optim.SGD(model.parameters(), how.rate, momentum=0.9, weight_decay=1e-4)
    right: list[float] = []
    given = itertools.islice(batches(images, normalise, size=how.batch, seed=0, epoch=0), how.steps)
    for batch in given:
        scores = model(batch.images)
        functional.cross_entropy(scores, batch.labels).backward()
        descent.step()
        descent.zero_grad()
        right.append(float((scores.argmax(1) == batch.labels).float().mean()))
    tuned = V2.verify(model.state_dict(), subject.key)
    for layer in subject.key.context.layers:
        weight = model.get_parameter(f"{layer.name}.weight").data
        weight[weight.abs() < weight.abs().flatten().quantile(how.pruned)] = 0
    left = V2.verify(model.state_dict(), subject.key)
    facts = {
        "network": name,
        **how._asdict(),
        "classes": len(images.classes),
        "right_at_last": sum(right[-20:]) / len(right[-20:]),
        "tuned": facts_of(tuned),
        "also_pruned": facts_of(left),
        "seconds": time.monotonic() - begun,
    }
    STORE.keep(_slug(name, TUNING), facts, origin)


def _chosen(subject: Marked, inputs: Inputs) -> list[str]:
    """The layers that the package takes by itself, as anybody knows."""
    found = survey(subject.released, part_of(inputs.thief, 0, 2))
    chosen = choose_enough(subject.released, found, None, bits=channels.BITS)
    return [site.name for site in chosen]


def _graft(network: Network, subject: Marked, plain: Tensor, own: Tensor) -> dict[str, Any]:
    verdict = V2.verify(subject.released.state_dict(), subject.key)
    return {
        "kind": network.kind,
        "norm": network.norm,
        "answers": network.answers,
        "layers": [layer.name for layer in subject.key.context.layers],
        "bits": verdict.bits,
        "matches": verdict.matches,
        "felt": [float(each.felt) for each in subject.report.layers.values()],
        "kept": network.asking.alike(plain, own),
        "kept_confident": _confident(network, plain, own),
        "private_error": subject.report.harm.private_error,
        "seconds": subject.seconds,
        "mebibytes": subject.mebibytes,
    }


def _confident(network: Network, before: Tensor, after: Tensor) -> float | None:
    """The same of the answers that were sure, where answers are classes."""
    if network.answers != "classes":
        return None
    sure = before.softmax(1).amax(1) > CONFIDENT
    return same_classes(before[sure], after[sure])


def _slug(network: str, work: str) -> str:
    return f"{network}-{work}".lower().replace("/", "-")


def render() -> str:
    """All that was run, as Markdown; what was not run is said to be so."""
    entries = STORE.all().values()
    grafts = {e["network"]: e for e in entries if "bits" in e and "attack" not in e}
    removals = {n: [e for e in entries if e["network"] == n and "attack" in e] for n in grafts}
    lines = [*_ABOUT, "", "## What a mark costs, and the best removal found", ""]
    lines += table(
        ("network", "norm", "inputs", "layers", "bits", "answers kept", "sure ones kept",
         "private against public", "seconds", "MiB", "best removal found"),
        [_graft_row(network, entry, removals[network]) for network, entry in grafts.items()],
    )  # fmt: skip
    lines += ["", "## Every thief", "", _THIEVES, ""]
    lines += table(
        ("network", "thief", "on", "bits left", "p", "answers kept", "sure ones kept",
         "of the plain network's", "seconds"),
        [row for network in grafts for row in _thief_rows(network, removals[network])],
    )  # fmt: skip
    lines += ["", "## Tuned to another task", ""]
    lines += [_tuning_said(e) for e in entries if "tuned" in e] or ["Not run."]
    return "\n".join([*lines, ""])


def _tuning_said(e: Mapping[str, Any]) -> str:
    tuned, pruned = (
        f"{n['matches']:,} of {n['bits']:,} bits (p = {said_p(n['log10_p_value'])})"
        for n in (e["tuned"], e["also_pruned"])
    )
    return (
        f"{e['network']}, all of it tuned to {e['classes']} classes of Caltech-101 at "
        f"{e['size']} pixels, {e['steps']} steps of {e['batch']} images at a rate of {e['rate']:g} "
        f"(in the last twenty {in_percent(e['right_at_last'], 0)} % were right): {tuned}. Then "
        f"{100 * e['pruned']:g} % of each marked layer pruned: {pruned}. "
        "`python benchmarks/real.py run EfficientNet-Lite0 tuning`, one run."
    )


_ABOUT = [
    "# Networks that the world trained",
    "",
    "Rendered by `python benchmarks/real.py render` from `results/real/*.json`. V2, a passport for "
    "each channel, on the layers that the package chooses by itself. *Inputs* are those to measure "
    "with, others for the thief, who has no labels, and those that neither has seen, to say what "
    "became of the answers: images of Caltech-101 at 224 pixels, sentences of scikit-learn's own "
    "documentation. *Kept* is the share of classes that stay, or the mean "
    "cosine of sentence vectors, in %; *sure* answers have p > ½. Seconds and memory were measured "
    "on two cores that others used as well: they are upper bounds. One run each.",
]
_THIEVES = (
    f"Each does the most that keeps {100 * KEPT:g} % of the network's own answers, by a quarter of "
    "his own inputs. *Chosen* thieves know which layers the package takes by itself and leave the "
    "others alone; *all* work on every layer whose filters have 16 numbers or more. A mark is gone "
    "where p > 10⁻⁹."
)


def _graft_row(network: str, entry: Any, removals: list[Any]) -> list[str]:
    best = max(removals, key=lambda e: e["log10_p_value"], default=None)
    found = "none was run" if best is None else _said(best)
    return [
        f"{network}, {entry['kind']}",
        entry["norm"],
        " / ".join(f"{each:,}" for each in entry["inputs"]),
        str(len(entry["layers"])),
        f"{entry['matches']:,} of {entry['bits']:,}",
        in_percent(entry["kept"], 1),
        in_percent(entry["kept_confident"], 1),
        f"{entry['private_error']:.0e}",
        f"{entry['seconds']:.0f}",
        f"{entry['mebibytes']:.0f}",
        found,
    ]


def _said(entry: Any) -> str:
    left = f"{entry['matches']:,} bits left, p = {said_p(entry['log10_p_value'])}"
    return f"{_name(entry)}: {left}, {in_percent(entry['kept'], 1)} kept"


def _name(entry: Any) -> str:
    return f"{entry['attack']} on {'all' if entry['all_layers'] else 'chosen'} layers"


def _thief_rows(network: str, removals: list[Any]) -> list[list[str]]:
    run = {(e["attack"], e["all_layers"]): e for e in removals}
    rows = []
    for name in ATTACKS:
        for everywhere in (False, True):
            entry = run.get((name, everywhere))
            where = "all" if everywhere else "chosen"
            if entry is None:
                rows.append([network, name, where, "not run", *[""] * 5])
                continue
            rows.append(
                [
                    network,
                    name,
                    f"{where}, {entry['layers']}",
                    f"{entry['matches']:,} of {entry['bits']:,}",
                    said_p(entry["log10_p_value"]),
                    in_percent(entry["kept"], 1),
                    in_percent(entry["kept_confident"], 1),
                    in_percent(entry["kept_of_plain"], 1),
                    f"{entry['seconds']:.0f}",
                ]
            )
    return rows


if __name__ == "__main__":
    command_line(
        __doc__,
        lambda: {RESULTS / "real.md": render()},
        run,
        {
            "name": {"choices": NETWORKS, "metavar": "NETWORK"},
            "attacks": {"nargs": "*", "default": [*ATTACKS]},
            "--data": {"type": Path, "default": Path()},
        },
    )
