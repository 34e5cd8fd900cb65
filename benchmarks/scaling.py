"""A model of what marks cost beyond this machine, held to what was measured here: docs/scaling.md.

`python benchmarks/scaling.py` writes the page from `results/`; a test holds the committed page to
what this renders now. Nothing is timed here.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.embedding.network.equations import (
    HOSTS,
    Geometry,
    filters,
    geometry_of,
    passport_space,
)
from nnpassport.embedding.network.models import ARCHITECTURES, build
from nnpassport.embedding.network.survey import PAPER_LAYERS
from nnpassport.embedding.schemes.passport import V3
from nnpassport.files.disk import write_atomically
from nnpassport.keys.context import Context, LayerShape
from nnpassport.lab.results import read_json
from nnpassport.lab.tables import table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "scaling.md"
MEASURED = {
    "costs": ROOT / "results" / "reproduction" / "costs.json",
    "bench": ROOT / "results" / "bench-quick.json",
    "large": ROOT / "results" / "scaling" / "verification.json",
}
PROCESSES = 8
GIGA = 10**9
BLOCKS, WIDTH, INNER, WORDS, SEQUENCE = 32, 4096, 11_008, 32_000, 4096
MARKED_BLOCKS = 10  # the last ones
IMAGENET, EPOCHS = 1_281_167, 90
_BACKWARD = 2  # as many FLOPs again for each of the gradients of inputs and of weights


class Host(NamedTuple):
    """A linear layer, as far as costs go.

    Attributes:
        weight: shape, output channels first.
        outputs: numbers that it puts out for a sample.
        after: whether it runs in each branch, after the fork.
        passport: shape (in, *space) of its passport, or None.
    """

    name: str
    weight: tuple[int, ...]
    outputs: int
    after: bool
    passport: tuple[int, ...] | None
    geometry: Geometry = Geometry()

    @property
    def numbers(self) -> int:
        """Of its weight."""
        return math.prod(self.weight)

    @property
    def forward(self) -> int:
        """FLOPs for a sample: a product and a sum for each weight that an output meets."""
        return 2 * self.outputs * math.prod(self.weight[1:])


class Subject(NamedTuple):
    """A network and how it is trained.

    Attributes:
        sample: what one of a batch is.
        other: numbers that no host has: norms, embeddings.
        attention: FLOPs of a forward of a sample that no host has, before and after the fork.
        weight_bytes: of a number of a weight in a file and on the wire.
        state_bytes: of a number in training: weight, gradient, and what the optimiser keeps.
        activation_bytes: of a number that is kept for the backward.
    """

    name: str
    hosts: tuple[Host, ...]
    sample: str
    batch: int
    other: int = 0
    attention: tuple[int, int] = (0, 0)
    weight_bytes: int = 4
    state_bytes: int = 12
    activation_bytes: int = 4

    @property
    def numbers(self) -> int:
        """Of all parameters."""
        return sum(host.numbers for host in self.hosts) + self.other

    @property
    def marked(self) -> tuple[Host, ...]:
        """Hosts of a passport."""
        return tuple(host for host in self.hosts if host.passport is not None)

    @property
    def forward(self) -> int:
        """FLOPs for a sample."""
        return sum(host.forward for host in self.hosts) + sum(self.attention)

    @property
    def after(self) -> int:
        """FLOPs for a sample of what runs in each branch."""
        return sum(host.forward for host in self.hosts if host.after) + self.attention[1]

    @property
    def affine(self) -> int:
        """FLOPs of γ and β in a step, however large the batch: two products, and their gradients.

        The mean patch is known, and has no gradient: forward and backward take 4 for each weight.
        """
        return 8 * sum(host.numbers for host in self.marked)

    def step(self, scheme: str) -> float:
        """FLOPs of a training step of `batch` samples."""
        rows = self.batch + (V3.shown_at_once if scheme == "V3" else 0)
        forward = self.forward + (self.after if scheme in {"V2", "V3"} else 0)
        return (1 + _BACKWARD) * forward * rows + (0 if scheme == "plain" else self.affine)

    def activations(self, scheme: str, *, factor: int = 2) -> int:
        """Bytes kept for the backward: what each host puts out, and what is made of it."""
        rows = self.batch + (V3.shown_at_once if scheme == "V3" else 0)
        kept = sum(h.outputs * (1 + (h.after and scheme in {"V2", "V3"})) for h in self.hosts)
        return factor * kept * rows * self.activation_bytes

    def memory(self, scheme: str) -> int:
        """Bytes of a training step on one device: state and activations."""
        return self.numbers * self.state_bytes + self.activations(scheme)

    @property
    def passport_numbers(self) -> int:
        """Of both passports of all layers: the bytes of the stream, but for one in 256."""
        return sum(2 * math.prod(host.passport or ()) for host in self.marked)

    @property
    def bits(self) -> int:
        """One for each channel that carries a passport."""
        return sum(host.weight[0] for host in self.marked)

    @property
    def marked_bytes(self) -> int:
        """Of the weights that verifying reads, in a file."""
        return self.weight_bytes * sum(host.numbers for host in self.marked)


def network(
    name: str, architecture: str, side: int, *, batch: int, everywhere: bool = False, **more: Any
) -> Subject:
    """One of our networks, by running its shapes alone; passports where the paper has them."""
    with torch.device("meta"):
        model = build(architecture, norm="group", **more)
        image = torch.zeros(1, 3, side, side)
    ran: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    for layer, module in model.named_modules():
        if isinstance(module, HOSTS):
            module.register_forward_hook(
                lambda m, args, out, layer=layer: ran.append((layer, m, args[0], out))
            )
    model(image)
    patterns = ("*",) if everywhere else PAPER_LAYERS[type(model).__name__]
    carrying = [each for each in ran[:-1] if any(fnmatch(each[0], p) for p in patterns)]
    first = next(i for i, each in enumerate(ran) if each[0] == carrying[0][0])
    trunk = carrying[0][2]  # the fork is behind the norm: what else sees this input is before it
    hosts = []
    for i, (layer, module, seen, out) in enumerate(ran):
        geometry, weight = geometry_of(module), module.weight
        shape = tuple(filters(weight, geometry).shape)
        space = passport_space(tuple(seen.shape[2:]), shape[2:], geometry)
        carries = any(layer == each[0] for each in carrying)
        passport = (shape[1] * geometry.groups, *space) if carries else None
        hosts.append(
            Host(layer, shape, out.numel(), i > first and seen is not trunk, passport, geometry)
        )
    whole = sum(parameter.numel() for parameter in model.parameters())
    return Subject(name, tuple(hosts), "image", batch, whole - sum(h.numbers for h in hosts))


def transformer(name: str, *, marked: int, blocks: int = BLOCKS) -> Subject:
    """A decoder with Llama-7B's layers, a passport in every linear layer of the last blocks.

    A sample is a sequence. The score matrix is counted in full.
    """
    shapes = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]
    hosts = [
        Host(
            f"{i}.{n}",
            shape,
            SEQUENCE * shape[0],
            # q, k and v of the first block with passports see the same input: before the fork.
            i > blocks - marked or (i == blocks - marked and n > 2),
            (shape[1], 64) if i >= blocks - marked else None,
        )
        for i in range(blocks)
        for n, shape in enumerate(shapes)
    ]
    hosts.append(Host("head", (WORDS, WIDTH), SEQUENCE * WORDS, True, None))
    attention = 4 * SEQUENCE**2 * WIDTH
    return Subject(
        name,
        tuple(hosts),
        f"sequence of {SEQUENCE}",
        1,
        WORDS * WIDTH + (2 * blocks + 1) * WIDTH,
        (attention * (blocks - marked), attention * marked),
        weight_bytes=2,
        state_bytes=16,
        activation_bytes=2,
    )


def context_of(subject: Subject) -> Context:
    """What a key for this subject would be for; refused where it exceeds the limits of a key."""
    layers = tuple(
        LayerShape(host.name, host.weight, host.passport or (), host.geometry)
        for host in subject.marked
    )
    return Context("passport-v2", "model", layers, None, bytes(16))


class Rates(NamedTuple):
    """What this machine does in a processor second, and what starting the command takes."""

    sha256: float
    load: float
    numbers: float
    passports: float
    start_seconds: float
    start_bytes: float

    def seconds(self, whole: float, hosts: float, numbers: float, passports: float) -> float:
        """Of a processor, to verify a file of `whole` bytes, `hosts` of them under passports."""
        parts = (whole / self.sha256, hosts / self.load, numbers / self.numbers)
        return self.start_seconds + sum(parts) + passports / self.passports

    def peak(self, largest: float) -> float:
        """Bytes of memory: the started command, one layer, and a part of it in float64."""
        return self.start_bytes + largest + 8 * 2**20


def rates(large: Mapping[str, Any]) -> Rates:
    """As measured on one layer and on the smallest checkpoint."""
    found, turns = large["rates"], large["start"]["turns"]
    return Rates(
        found["sha256_bytes_per_second"],
        found["load_bytes_per_second"],
        found["numbers_per_second"],
        found["passport_numbers_per_second"],
        _median(turns, "processor_seconds"),
        _median(turns, "peak_bytes"),
    )


def step_rows(measured: Mapping[str, Any], source: str) -> Iterable[list[str]]:
    """Training steps: FLOPs of the model beside processor time."""
    for entry in measured["ratios"]:
        above, _, below = entry["ratio"].partition(" / ")
        if entry["task"] != "train" or below != "plain" or above not in {"V1", "V2", "V3"}:
            continue
        if entry["architecture"] not in ARCHITECTURES:
            continue
        small = network("", entry["architecture"], 32, batch=entry["batch"])
        predicted = small.step(above) / small.step("plain")
        found = entry["by_processor_time"]
        yield [
            *(entry["architecture"], str(entry["batch"]), entry["precision"], entry["ratio"]),
            *(f"{predicted:.3f}", f"{found:.3f}", _error(predicted, found), source),
        ]


def memory_rows(measured: Mapping[str, Any]) -> Iterable[list[str]]:
    """Peaks of a step beside the model's bytes."""
    for entry in measured["numbers"]:
        if entry["task"] != "memory" or entry["network"] not in {"plain", "V1", "V2", "V3"}:
            continue
        if entry["architecture"] not in ARCHITECTURES or entry["precision"] != "float32":
            continue
        small = network("", entry["architecture"], 32, batch=entry["batch"])
        predicted, found = small.memory(entry["network"]), entry["median"]
        yield [
            *(entry["architecture"], str(entry["batch"]), entry["network"], entry["norm"]),
            *(f"{predicted / 2**20:.0f}", f"{found / 2**20:.0f}", _error(predicted, found)),
        ]


def verification_rows(large: Mapping[str, Any]) -> Iterable[list[str]]:
    """Checkpoints that were verified, beside the model."""
    machine = rates(large)
    for each in large["checkpoints"]:
        seconds = machine.seconds(
            each["bytes"], each["host_bytes"], each["host_numbers"], each["passport_numbers"]
        )
        peak = machine.peak(each["largest_host_bytes"])
        turns, (first, *_) = each["turns"], each["turns"]
        found = _median(turns, "processor_seconds")
        memory = max(turn["peak_bytes"] for turn in turns)
        yield [
            *(f"{each['bytes'] / GIGA:.2f}", str(each["shards"])),
            f"{first['matches']} of {first['bits']}",
            f"{first['log10_p_value']:.0f}",
            f"{each['stranger']['matches'] / each['stranger']['bits']:.3f}",
            f"{_median(turns, 'bytes_read') / GIGA:.2f}",
            f"{_median(turns, 'seconds'):.1f}",
            *(f"{seconds:.1f}", f"{found:.1f}", _error(seconds, found)),
            *(f"{peak / 2**20:.0f}", f"{memory / 2**20:.0f}", _error(peak, memory)),
        ]


def subjects() -> tuple[Subject, ...]:
    """What the plan is for."""
    large = {"stem": "imagenet", "classes": 1000}
    return (
        network(
            "ResNet-50, 224 pixels, passports in `layer4`", "resnet50", 224, batch=256, **large
        ),
        network(
            "ResNet-50, 224 pixels, passports everywhere",
            *("resnet50", 224),
            batch=256,
            everywhere=True,
            **large,
        ),
        transformer(f"7-billion transformer, last {MARKED_BLOCKS} blocks", marked=MARKED_BLOCKS),
        transformer("7-billion transformer, all blocks", marked=BLOCKS),
    )


def embedding_rows() -> Iterable[list[str]]:
    """FLOPs and bytes of a training step."""
    for each in subjects():
        plain = each.step("plain")
        yield [
            *(each.name, f"{each.numbers / 1e6:.0f}", f"{each.batch} × {each.sample}"),
            f"{plain / 1e12:.1f}",
            *(f"{each.step(scheme) / plain:.4f}" for scheme in ("V1", "V2")),
            f"{each.step('V3') / plain:.4f}" if each.sample == "image" else "—",
            f"{each.affine / plain:.1e}",
            f"{each.numbers * each.state_bytes / GIGA:.1f}",
            *(f"{each.activations(scheme) / GIGA:.1f}" for scheme in ("plain", "V2")),
        ]


def communication_rows() -> Iterable[list[str]]:
    """Bytes that each of some processes sends in a step."""
    share = (PROCESSES - 1) / PROCESSES
    for each in subjects():
        whole = each.numbers * each.weight_bytes
        yield [
            each.name,
            f"{2 * share * whole / GIGA:.2f}",
            f"{3 * share * whole / GIGA:.2f}",
            f"{2 * share * each.marked_bytes / GIGA:.2f}",
            f"{2 * each.marked_bytes / (3 * whole):.2f}",
        ]


def reading_rows(large: Mapping[str, Any]) -> Iterable[list[str]]:
    """What deriving a key and verifying take."""
    machine = rates(large)
    for each in subjects():
        context_of(each)
        whole = each.numbers * each.weight_bytes
        numbers = sum(host.numbers for host in each.marked)
        largest = each.weight_bytes * max(host.numbers for host in each.marked)
        seconds = machine.seconds(whole, each.marked_bytes, numbers, each.passport_numbers)
        yield [
            *(each.name, str(each.bits), f"{each.passport_numbers * 256 / 255 / 1e6:.1f}"),
            *(f"{whole / GIGA:.2f}", f"{(whole + each.marked_bytes) / GIGA:.2f}"),
            *(f"{4 * numbers / GIGA:.1f}", f"{seconds:.0f}"),
            *(f"{largest / 2**20:.0f}", f"{machine.peak(largest) / 2**20:.0f}"),
        ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, as one text."""
    return "\n".join(table(head, rows))


def render(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    large = measured["large"]
    machine = rates(large)
    resnet, _, decoder, _ = subjects()
    made = large["provenance"]
    training = resnet.step("plain") * IMAGENET * EPOCHS / resnet.batch
    return f"""# Beyond this machine

This page is for whoever plans to mark or verify a network that is larger than any we have run. It
estimates what that costs in computation, memory and communication. `python benchmarks/scaling.py`
writes the page from a cost model and from files in `results/`. The sections "Checked" compare the
model with measurements and give its error. **Everything under "Predictions" is a prediction that
nothing here checks**: no network of that size was trained, and no cluster was used.

V1, V2 and V3 are the three kinds of mark in [the leaderboard](leaderboard.md); a *passport* is the
secret tensor that marks one layer, here a *host* layer. The *fork* is the first place where the
network with passports differs from the one without ([terms](notation.md#terms)).

## The model

- A host layer takes 2 FLOPs for each weight that an output meets, and its backward twice as many.
  V2 and V3 run everything after the fork a second time: a step is 3 × (forward + part after the
  fork). V3 adds {V3.shown_at_once} trigger images to the batch. For AlexNet, ResNet-18 and
  ResNet-50 at 32 pixels, the part after the fork is exactly what surgery finds (a test).
- γ and β take 8 FLOPs for each weight under a passport in a step, whatever the batch. The mean
  patch is computed once, when the passport is inserted.
- A step needs memory for weights, gradients and the optimiser's state: 12 bytes a number for SGD
  with momentum in float32, 16 for Adam in mixed precision. For the backward it also keeps two
  numbers for each output of a host layer, and in V2 and V3 twice as many after the fork.
  Activations are not recomputed.
- DDP sends 2 (n − 1) / n of the gradients' bytes. Passports are no parameters and add nothing.
  FSDP gathers the weights twice and scatters the gradients: 3 (n − 1) / n. It gathers a passport
  layer's weight once more for γ and β, and scatters its gradient once more.
- Verifying reads a file twice where there are passports (SHA-256, then the layer) and once
  elsewhere. It takes 4 FLOPs for each weight under a passport. The key's stream is one byte for
  each number of a passport.

## Checked: training steps

Ratios to the plain step of our own networks, by processor time. The model counts host layers only.
It leaves out norms, activations and memory traffic, and it is wrong where these are much of a step.

{
        markdown(
            ["network", "batch", "precision", "ratio", "FLOPs", "measured", "error", "from"],
            [
                *step_rows(measured["bench"], "`bench-quick.json`"),
                *step_rows(measured["costs"], "`reproduction/costs.json`"),
            ],
        )
    }

## Checked: memory of a training step

Growth of the resident set, float32, MiB (`bench-quick.json`). The model is a lower bound, since it
leaves out the workspace of convolutions and what the allocator keeps.

{
        markdown(
            ["network", "batch", "step", "norm", "model", "measured", "error"],
            memory_rows(measured["bench"]),
        )
    }

## Checked: verification in bounded memory

We ran `nnpassport verify FOLDER --key KEY` on synthetic checkpoints with Llama-7B's layers, in
bfloat16 and shards of a gigabyte, with a passport on every linear layer of every block. Each was
verified {large["turns"]} times, each time in a process of its own, with the files dropped from the
system's cache beforehand ([`large_checkpoint.py`](../benchmarks/large_checkpoint.py),
[`verification.json`](../results/scaling/verification.json)). The model's rates do not come from
these checkpoints. They come from one layer of 4096 × 4096 and from the command on next to nothing
({machine.start_seconds:.1f} s, {machine.start_bytes / 2**20:.0f} MiB). *Stranger* is the share of
bits that match a key that was not put in. {made["device"]}, one thread, torch {made["torch"]},
{made["date"]}, commit {(made["commit"] or "unknown")[:7]}. Other work ran on the machine, so we
compare processor seconds and only report wall seconds.

{
        markdown(
            [
                *("GB", "shards", "bits", "log₁₀ p", "stranger", "GB read", "wall s"),
                *(
                    "model, processor s",
                    "measured",
                    "error",
                    "model, peak MiB",
                    "measured",
                    "error",
                ),
            ],
            verification_rows(large),
        )
    }

## Predictions: embedding

{
        markdown(
            [
                *("network", "10⁶ numbers", "batch of a device", "plain step, TFLOP"),
                *("V1", "V2", "V3", "γ, β alone", "state, GB"),
                *("activations, plain, GB", "V2, GB"),
            ],
            embedding_rows(),
        )
    }

{EPOCHS} epochs of ImageNet ({IMAGENET:,} images) on ResNet-50 are {training:.1e} FLOPs, with V2
{training * resnet.step("V2") / resnet.step("plain"):.1e}. 10⁹ tokens through the transformer are
{decoder.step("plain") * 1e9 / SEQUENCE:.1e}, with the last {MARKED_BLOCKS} blocks marked by V2
{decoder.step("V2") * 1e9 / SEQUENCE:.1e}. V3 is for networks that take images.

## Predictions: communication

Gigabytes that each of {PROCESSES} processes sends in a step, with gradients in the precision of the
weights.

{
        markdown(
            ["network", "DDP", "FSDP", "more for passports, FSDP", "share"],
            communication_rows(),
        )
    }

## Predictions: keys and verification

These use the rates above, for the machine on which they were measured. A key for each of these
networks is within the limits of a key's context. All shards together may have
{2**40 / GIGA:,.0f} GB. That limits time and not memory, since every byte goes through SHA-256.
Alignment, F (the check of accuracy) and the judge still load the whole network into memory, and
read at most 16 GiB of file.

{
        markdown(
            [
                *("network", "bits", "key stream, MB", "file, GB", "GB read", "GFLOP"),
                *("processor s", "largest layer, MiB", "peak, MiB"),
            ],
            reading_rows(large),
        )
    }
"""


def load() -> dict[str, Any]:
    """What was measured."""
    return {name: read_json(path) for name, path in MEASURED.items()}


def _median(turns: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.median(turn[name] for turn in turns)


def _error(predicted: float, found: float) -> str:
    return f"{100 * (predicted / found - 1):+.0f} %"


if __name__ == "__main__":
    write_atomically(PAGE, render(load()).encode())
