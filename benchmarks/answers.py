"""A mark in ordinary answers: what it costs, who still carries it, and what thieves can shave.

python benchmarks/answers.py --data FOLDER writes results/answers.json, results/answers.md and its
picture. FOLDER has CIFAR-10 as Parquet (cifar10-train*.parquet, cifar10-test*.parquet). As it
stands it is sized for a few minutes of one slow processor: pictures of 16 pixels, small networks,
few epochs. --part directions reads copies alone, for marks in more and in fewer directions.
--part larger is AlexNet on 32 pixels, copied by ResNet-18 on 25,000 labels that are asked anew for
each augmented image; --part larger --owner resnet18 --thief alexnet is the other way round, and
--task cifar100 is on CIFAR-100 (cifar100-train*.parquet, cifar100-test.parquet). Rows are written
as they come, and --work FOLDER keeps trained networks: a run that was interrupted goes on where it
was. A part has the rows of every run beside each other, each with its sizes; --seed N runs another
seed, and --also FILE takes in what another run has written elsewhere. The larger part takes about
eight hours of one core that computes in bfloat16: a step takes it 3 ms for each image of AlexNet's
and 12 ms for each of ResNet-18's.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from answers_page import (
    BEFORE,
    COPY,
    COUNTS,
    MARKED,
    STRANGER,
    cell_of,
    drawn,
    rendered,
    runs_in,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.attacks.perturbation import quantise
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.answers import ANSWERS, Answers, scores_of
from nnpassport.embedding.schemes.cosine import COSINE, signal_to_noise
from nnpassport.embedding.schemes.pictures import shuffled
from nnpassport.embedding.train.loop import Outcome, Recipe, classification, fit
from nnpassport.files.disk import write_atomically
from nnpassport.keys.answers import features, functions_of, read_answers
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.keys.validity import MAX_COINS
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
RUNS = (("filters", 0.8, True), ("filters", 0.5, False), ("filters", 0.3, False))
"""Kinds of functions, ε, and whether copies and thieves are run or the network alone."""
TRUE = (0.5, 0.8)  # shares of true labels that a copy is trained on beside answers


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; see the module."""

    size: int = 16
    width: int = 16
    train: int = 10_000
    pictures: int = 10_000
    epochs: int = 8
    marking: int = 4
    copying: int = 7
    coins: int = 640
    seeds: int = 1
    precision: str = "float32"
    owner: str = "small"
    thief: str = "small"
    views: int = 0
    task: str = "cifar10"
    teaching: float = ANSWERS.teaching


LARGER = Plan(
    size=32,
    train=25_000,
    epochs=30,
    marking=10,
    copying=40,
    coins=160,
    precision="bfloat16",
    owner="alexnet",
    thief="resnet18",
    views=1,
)
DEVICE = ("commit", "torch", "device")
"""What rows of one run share, unless they say otherwise."""


class Cell(NamedTuple):
    """One key: how many functions a class has, ε, and of which kind they are."""

    a_class: int
    strength: float
    kind: str = "filters"

    def coins(self, classes: int) -> int:
        """All of them: as many as a key can have, at most."""
        return min(MAX_COINS, self.a_class * classes)


PARTS = {
    "directions": (
        Plan(precision="bfloat16"),
        (Cell(64, 0.8), Cell(64, 0.65), Cell(64, 0.5), Cell(16, 0.6)),
    ),
    "larger": (LARGER, (Cell(16, 0.6),)),
    "cosine": (Plan(precision="bfloat16"), (Cell(16, 0.1, "waves"),)),
}
"""What copies are read in: sizes, and the keys of each run."""


def made(name: str, width: int, seed: int, classes: int) -> nn.Module:
    """The owner's small network, or one of the catalog: "resnet18:0.5" is half as wide."""
    if name == "small":
        return network(width, seed, classes)
    torch.manual_seed(seed)
    architecture, _, share = name.partition(":")
    arguments = {"width": float(share)} if share else {}
    return build(architecture, classes=classes, norm="batch", **arguments)


def block(inputs: int, outputs: int) -> nn.Module:
    """Convolution, norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def network(width: int, seed: int, classes: int) -> nn.Module:
    """The owner's."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(block(3, width), block(width, width), nn.MaxPool2d(2)),
        *(block(width, 2 * width), block(2 * width, 2 * width), nn.MaxPool2d(2)),
        *(block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(16 * width, classes),
    )


def another(width: int, seed: int, classes: int) -> nn.Module:
    """Of another architecture: a thief's, or a stranger's."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 2 * width, 5, padding=2), nn.BatchNorm2d(2 * width), nn.GELU()),
        *(nn.AvgPool2d(2), block(2 * width, 3 * width), nn.MaxPool2d(2)),
        *(block(3 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4 * width, classes),
    )


def kept_key(key: Key, folder: Path, name: str, sizes: str, seed: int) -> Key:
    """The key that an interrupted run drew for this network, or else this one, which is kept.

    Its baseline may be another in the last place, which draws other signs. A key of another network
    has another anchor.
    """
    for path in sorted(folder.glob(f"{name}-*{seed}.key")):
        found = load_key(path)
        if (found.seed, found.context) == (key.seed, key.context):
            return found
    save_key(key, folder / f"{name}-{sizes}-{seed}.key")
    return key


def named_by(plan: Plan) -> str:
    """Sizes in a file's name: what is as it was before has no part in it, nor has another seed."""
    sizes = asdict(replace(plan, seeds=1))
    values = [str(value) for value in sizes.values()]
    usual = [str(value) for value in asdict(Plan()).values()]
    more = [each for each, old in zip(values[9:], usual[9:], strict=True) if each != old]
    return "-".join([*values[:9], *more])


class Bench:
    """Data of a seed, networks that are trained once, and rows of what was read."""

    def __init__(self, plan: Plan, folder: Path, work: Path, seed: int) -> None:
        self.plan, self.seed, self.work = plan, seed, work
        work.mkdir(parents=True, exist_ok=True)
        both = [
            read_images(str(folder / f"{plan.task}-{part}*.parquet"), size=plan.size)
            for part in ("train", "test")
        ]
        order = torch.randperm(len(both[0]), generator=torch.Generator().manual_seed(seed))
        self.mine = both[0].subset(order[: plan.train])
        self.theirs = both[0].subset(order[plan.train : 2 * plan.train])
        self.test, self.classes = both[1], len(both[0].classes)
        self.normalise = Normalisation.measured(self.mine)
        self._banked: tuple[np.ndarray, np.ndarray] | None = None

    def recipe(self, epochs: int, rate: float = 0.1) -> Recipe:
        """So many epochs of one-cycle, without crops: four of 16 pixels are much of a picture."""
        return Recipe(
            epochs=epochs,
            batch=128,
            rate=rate,
            schedule="one-cycle",
            seed=self.seed,
            augment=self.plan.size >= 32,
            precision=self.plan.precision,
        )

    def kept(self, name: str, made: nn.Module, train: Callable[[nn.Module], Any]) -> nn.Module:
        """The network of this name, trained unless it was before."""
        path = self.work / f"{name}-{named_by(self.plan)}-{self.seed}.pt"
        if path.exists():
            made.load_state_dict(torch.load(path, weights_only=True))
            return made.eval()
        start = time.perf_counter()
        train(made)
        torch.save(made.state_dict(), path)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return made.eval()

    def plain(self) -> nn.Module:
        """The owner's network before the mark."""
        net = made(self.plan.owner, self.plan.width, self.seed, self.classes)
        how = self.recipe(self.plan.epochs)
        return self.kept(
            "plain", net, lambda n: fit(n, classification, self.mine, how, normalise=self.normalise)
        )

    def copied(
        self, name: str, labels: Tensor | None, soft: Tensor | None = None, seed: int = 50
    ) -> nn.Module:
        """A network of another architecture, trained on answers to `theirs`."""
        data = self.theirs if labels is None else replace(self.theirs, labels=labels)
        how, net = self.recipe(self.plan.copying), self.thiefs(self.seed + seed)
        if soft is None:
            return self.kept(
                name, net, lambda n: fit(n, classification, data, how, normalise=self.normalise)
            )
        numbered = replace(
            self.theirs,
            labels=torch.arange(len(self.theirs)),
            classes=tuple(map(str, range(len(self.theirs)))),
        )
        chances = soft.softmax(1)

        def objective(model: nn.Module, batch: Any) -> Outcome:
            logits = model(batch.images)
            loss = -(chances[batch.labels] * logits.log_softmax(1)).sum(1).mean()
            return Outcome(loss, {})

        return self.kept(
            name, net, lambda n: fit(n, objective, numbered, how, normalise=self.normalise)
        )

    def thiefs(self, seed: int) -> nn.Module:
        """Of another architecture than the owner's, untrained."""
        if self.plan.thief == "small":
            return another(self.plan.width, seed, self.classes)
        return made(self.plan.thief, self.plan.width, seed, self.classes)

    def copied_by_asking(self, name: str, marked: nn.Module) -> nn.Module:
        """Trained on labels; with `views` each image is augmented, and asked anew in each epoch."""
        if not self.plan.views:
            asked = scores_of(marked, self.theirs.images, self.normalise)
            return self.copied(name, asked.argmax(1))

        def objective(model: nn.Module, batch: Any) -> Outcome:
            with torch.no_grad():
                labels = marked(batch.images).argmax(1)
            return Outcome(F.cross_entropy(model(batch.images), labels), {})

        how = self.recipe(self.plan.copying)
        return self.kept(
            name,
            self.thiefs(self.seed + 50),
            lambda n: fit(n, objective, self.theirs, how, normalise=self.normalise),
        )

    def shaved_off(self, key: Key, asked: Tensor, widest: int, l2: float) -> Tensor:
        """What a thief with so many labels takes off the answers to the test images.

        In the widest directions of a bank of filters of his own.
        """
        count = len(asked)
        if self._banked is None:
            own = functions_of(replace(key, seed=bytes([99] * 32))).bank
            few = self.theirs.images[:3_000].numpy()
            self._banked = (
                features("filters", few, own),
                features("filters", self.test.images.numpy(), own),
            )
        theirs, test = self._banked
        axes = np.linalg.eigh(np.cov(theirs.T))[1][:, -widest:]
        labels = self.theirs.labels[:count]
        return shaved(theirs[:count] @ axes, asked, labels, test @ axes, l2)

    def accuracy(self, scores: Tensor) -> float:
        """Share of the test images that these scores are right about."""
        return float((scores.argmax(1) == self.test.labels).float().mean())

    def asked(self, model: nn.Module) -> Tensor:
        """Scores of all test images."""
        return scores_of(model, self.test.images, self.normalise)


class Known:
    """The key's functions of the inputs that it is bound to, computed once."""

    def __init__(self, key: Key) -> None:
        self.functions = functions_of(key)
        self._phi = self.functions(np.asarray(key.trigger_images))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """φ of the first inputs."""
        return self._phi[: len(inputs)]


class Owned(NamedTuple):
    """A network that was marked, its key, and what reads that.

    Attributes:
        scheme: with its settings.
        key: bound to test images.
        order: of all test images, those that the key is bound to.
        functions: of these.
        marked: the network.
        name: of the key, in names of files.
    """

    scheme: Answers
    key: Key
    order: Tensor
    functions: Known
    marked: nn.Module
    name: str


def owned(bench: Bench, cell: Cell) -> Owned:
    """Draw a key for the owner's network, and mark that."""
    plan, plain, coins = bench.plan, bench.plain(), cell.coins(bench.classes)
    usual = COSINE if cell.kind == "waves" else replace(ANSWERS, kind=cell.kind)
    sizes = {"pictures": plan.pictures, "coins": coins, "teaching": plan.teaching}
    scheme = replace(usual, strength=cell.strength, **sizes)
    example = torch.zeros(2, 3, plan.size, plan.size)
    key = scheme.draw_key(plain, example, seed=bytes([bench.seed + 1] * 32))
    order = shuffled(key, bench.test)[: plan.pictures]  # before the key is bound to them
    key = scheme.prepared(key, plain, bench.test, bench.normalise)
    counted = cell.kind == "waves" or coins != plan.coins
    name = f"{cell.kind}-{cell.strength}" + (f"-{coins}" if counted else "")
    key = kept_key(key, bench.work, name, named_by(plan), bench.seed)

    def mark(model: nn.Module) -> None:
        how = bench.recipe(plan.marking, 0.05)
        scheme.embed(model, key, bench.mine, how, normalise=bench.normalise, trained=True)

    marked = bench.kept(f"marked-{name}", deepcopy(plain), mark)
    return Owned(scheme, key, order, Known(key), marked, name)


def tuned(bench: Bench) -> nn.Module:
    """The owner's network, trained as long as with the mark, without one."""
    how = bench.recipe(bench.plan.marking, 0.05)
    return bench.kept(
        "tuned",
        deepcopy(bench.plain()),
        lambda n: fit(n, classification, bench.mine, how, normalise=bench.normalise),
    )


def row(name: str, key: Key, functions: Known, said: Tensor, right: float) -> dict[str, Any]:
    """What was read of scores (pictures classes), and by labels alone."""
    found: dict[str, Any] = {"name": name, "accuracy": right}
    for what, answers in (("scores", said), ("labels", said.argmax(1))):
        for count in [n for n in COUNTS if n < len(said)] + [len(said)]:
            verdict = read_answers(
                answers[:count].numpy(), key, labels=what == "labels", functions=functions
            )
            found[f"{what} {count}"] = verdict.log10_p_value
        found[f"{what} matches"] = verdict.matches
        found[f"{what} counted"] = log10_binomial_tail(verdict.matches, verdict.bits)
    print(json.dumps(found), flush=True)
    return found


def adversarial(model: nn.Module, batch: Any) -> Outcome:
    """Cross-entropy of images after one step of 8 / 255 that raises it (of a deviation of ¼)."""
    images = batch.images.detach().requires_grad_()
    (uphill,) = torch.autograd.grad(F.cross_entropy(model(images), batch.labels), [images])
    moved = images.detach() + 4 * 8 / 255 * uphill.sign()
    return Outcome(F.cross_entropy(model(moved), batch.labels), {})


def dressed(said: Tensor, honest: Tensor, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """What a service can do to scores without training: (name, what it answers)."""
    chances = said.softmax(1)
    yield "scores rounded to 0.01", chances.mul(100).round() / 100 + 0.0
    yield "scores rounded to 0.1", chances.mul(10).round() / 10 + 0.0
    yield "smoothed, a softmax at 5", said / 5
    noise = torch.randn(said.shape, generator=rng) * said.std()
    yield "half as much noise as scores vary", said + noise / 2
    for share in (0.5, 0.8):
        mixed = (1 - share) * chances + share * honest.softmax(1)
        yield f"ensemble, {share:.0%} of it an honest network", mixed.clamp(min=1e-9).log()


def shaved(known: np.ndarray, said: Tensor, labels: Tensor, test: np.ndarray, l2: float) -> Tensor:
    """What to take off scores of `test` features: the linear correction that fits labels best."""
    mean, scale = known.mean(0), known.std(0) + 1e-9
    fitted = torch.from_numpy((known - mean) / scale).float()
    shown = torch.from_numpy((test - mean) / scale).float()
    weight = torch.zeros(fitted.shape[1], said.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=40)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(said - fitted @ weight, labels) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return shown @ weight.detach()


def rows_of(bench: Bench, cell: Cell, *, all_of_them: bool) -> Iterator[dict[str, Any]]:
    """Everything that is read with one key, as it comes."""
    for found in _rows_of(bench, cell, all_of_them=all_of_them):
        yield {"seed": bench.seed, "kind": cell.kind, "strength": cell.strength, **found}


def _rows_of(bench: Bench, cell: Cell, *, all_of_them: bool) -> Iterator[dict[str, Any]]:
    plan = bench.plan
    scheme, key, order, functions, marked, named = owned(bench, cell)

    def read(name: str, model: nn.Module) -> dict[str, Any]:
        whole = bench.asked(model)
        return row(name, key, functions, whole[order], bench.accuracy(whole))

    yield read(BEFORE[0], bench.plain())
    yield read(BEFORE[1], tuned(bench))
    presented = scheme.fidelity(marked, key, bench.test, bench.normalise)
    yield {**read("marked", marked), "with the key": presented}
    if not all_of_them:
        return
    yield read("marked, int8", quantise(marked, kind="int8-channel").model)
    few = bench.theirs.at_most(1_000, seed=1)
    gently = bench.recipe(plan.marking, 0.01)
    yield read(
        "marked, tuned on 1,000 true labels of others",
        bench.kept(
            f"tuned-{named}",
            deepcopy(marked),
            lambda n: fit(n, classification, few, gently, normalise=bench.normalise),
        ),
    )
    yield read(
        "marked, tuned on adversarial examples of these 1,000",
        bench.kept(
            f"adversarial-{named}",
            deepcopy(marked),
            lambda n: fit(n, adversarial, few, gently, normalise=bench.normalise),
        ),
    )
    asked = scores_of(marked, bench.theirs.images, bench.normalise)
    true = bench.theirs.labels
    by_labels = bench.copied(f"labels-{named}", asked.argmax(1))
    yield read("copy by labels", by_labels)
    yield read("copy by scores", bench.copied(f"scores-{named}", None, asked))
    drawn = torch.rand(len(true), generator=torch.Generator().manual_seed(3))
    for share in TRUE:
        mixed = torch.where(drawn < share, true, asked.argmax(1))
        copy = bench.copied(f"true-{share}-{named}", mixed)
        yield read(f"copy by labels, {share:.0%} of them true ones", copy)
    again = scores_of(by_labels, bench.theirs.images, bench.normalise).argmax(1)
    yield read(
        "copy by labels of the copy by labels", bench.copied(f"twice-{named}", again, seed=51)
    )
    stranger = bench.copied("stranger", None)
    yield read(STRANGER, stranger)
    rng = torch.Generator().manual_seed(5)
    for name, answers in dressed(bench.asked(marked), bench.asked(stranger), rng):
        yield row(name, key, functions, answers[order], bench.accuracy(answers))
    yield from nulled(bench, key, functions, asked, bench.asked(marked), order)


def compared(
    bench: Bench,
    mine: Owned,
    networks: Iterable[tuple[str, Callable[[], nn.Module]]],
    known: set[str],
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """(a row, all scores) of each of these networks that has no row yet."""
    said = bench.asked(mine.marked).argmax(1)
    for name, network_of in networks:
        if name not in known:
            whole = bench.asked(network_of())
            found = row(name, mine.key, mine.functions, whole[mine.order], bench.accuracy(whole))
            yield {"agrees": float((whole.argmax(1) == said).float().mean()), **found}, whole


def directions(bench: Bench, cell: Cell, known: set[str]) -> Iterator[dict[str, Any]]:
    """What a copy by labels carries of a mark in so many functions, and what nobody does.

    `known` are rows that are there already.
    """
    mine = owned(bench, cell)
    networks: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        (BEFORE[0], bench.plain),
        (BEFORE[1], lambda: tuned(bench)),
        (MARKED, lambda: mine.marked),
        (COPY, lambda: bench.copied_by_asking(f"labels-{mine.name}", mine.marked)),
    )
    for found, _ in compared(bench, mine, networks, known):
        yield found
    said, widest = bench.asked(mine.marked), cell.a_class
    for count, l2 in itertools.product((300, 1_000, 3_000), (1e-2, 1e-3)):
        name = f"nulled with {count:,} labels in the widest {widest}, ridge {l2}"
        if name not in known:
            asked = scores_of(mine.marked, bench.theirs.images[:count], bench.normalise)
            left = said - bench.shaved_off(mine.key, asked, widest, l2)
            yield row(name, mine.key, mine.functions, left[mine.order], bench.accuracy(left))
    strange = ((STRANGER, lambda: bench.copied("stranger", None)),)
    for found, _ in compared(bench, mine, strange, known):
        yield found


def waves(bench: Bench, cell: Cell, known: set[str]) -> Iterator[dict[str, Any]]:
    """What the network and a copy by scores carry of cosine watermarks, exactly and as published.

    `ratios` are the published score, of the first wave of each class.
    """
    mine = owned(bench, cell)

    def copy() -> nn.Module:
        asked = scores_of(mine.marked, bench.theirs.images, bench.normalise)
        return bench.copied(f"scores-{mine.name}", None, asked)

    networks: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        (BEFORE[0], bench.plain),
        (MARKED, lambda: mine.marked),
        ("copy by scores", copy),
        (STRANGER, lambda: bench.copied("stranger", None)),
    )
    for found, whole in compared(bench, mine, networks, known):
        chances = whole[mine.order].softmax(1).numpy()
        ratios = [signal_to_noise(chances, mine.key, wave) for wave in range(bench.classes)]
        yield {"ratios": ratios, **found}


def nulled(
    bench: Bench, key: Key, functions: Known, asked: Tensor, whole: Tensor, order: Tensor
) -> Iterator[dict[str, Any]]:
    """A thief who has read this: he fits a correction in the space of functions, with labels.

    Of a secret bank he has none, and draws one of his own.
    """
    plan, kind = bench.plan, functions.functions.form.kind
    own = functions.functions.bank
    if kind == "filters":
        stolen = replace(key, seed=bytes([99] * 32))
        own = functions_of(stolen).bank
    known = bench.theirs.subset(torch.arange(min(3_000, len(bench.theirs))))
    theirs = features(kind, known.images.numpy(), own)
    test = features(kind, bench.test.images.numpy(), own)
    few = np.linalg.eigh(np.cov(theirs.T))[1][
        :, -(plan.coins // bench.classes) :
    ]  # where functions are
    spaces = {
        "all features": (theirs, test),
        f"the widest {few.shape[1]}": (theirs @ few, test @ few),
    }
    for (space, (mine, shown)), count, l2 in itertools.product(
        spaces.items(), (300, 1_000, len(known)), (1e-2, 1e-3)
    ):
        given = (mine[:count], asked[:count], known.labels[:count])
        left = whole - shaved(*given, shown, l2)
        name = f"nulled with {count:,} labels in {space}, ridge {l2}"
        yield row(name, key, functions, left[order], bench.accuracy(left))


READERS = {"cosine": waves, "directions": directions, "larger": directions}


def run_of(facts: dict[str, Any], part: str, plan: Plan) -> dict[str, Any]:
    """The run of these sizes among those of a part, which is added where there is none.

    How many seeds there are is no size.
    """
    runs = runs_in(facts, part)
    facts[part] = runs
    for run in runs:
        if replace(Plan(**run["plan"]), seeds=1) == replace(plan, seeds=1):
            return run
    runs.append({"plan": asdict(replace(plan, seeds=1)), "rows": [], "provenance": provenance()})
    return runs[-1]


def row_in(run: dict[str, Any], row: dict[str, Any], origin: dict[str, Any]) -> None:
    """Add a row, with where it is from if that is not where the run is from."""
    was = run["provenance"]
    same = all(was[each] == origin[each] for each in DEVICE)
    run["rows"].append(row if same else {**row, "provenance": origin})
    run["plan"]["seeds"] = len({each["seed"] for each in run["rows"]})


def join(facts: dict[str, Any], other: dict[str, Any]) -> None:
    """Take in the rows of all parts that another run wrote elsewhere, unless they are there."""
    for part in PARTS:
        for theirs in runs_in(other, part):
            run = run_of(facts, part, Plan(**theirs["plan"]))
            if not run["rows"]:
                run["provenance"] = theirs["provenance"]
            known = {(*cell_of(each), each["name"]) for each in run["rows"]}
            for row in theirs["rows"]:
                if (*cell_of(row), row["name"]) not in known:
                    row_in(run, row, row.get("provenance", theirs["provenance"]))


def run_part(
    part: str, plan: Plan, cells: Iterable[Cell], facts: dict[str, Any], given: argparse.Namespace
) -> None:
    """A section of the results, cell by cell: what is there stays, and is not run again."""
    run, origin = run_of(facts, part, plan), provenance()
    for seed in [given.seed] if given.seed is not None else range(plan.seeds):
        bench = Bench(plan, given.data, given.work, seed)
        for cell in cells:
            coins = {"coins": cell.coins(bench.classes), "classes": bench.classes}
            key = {"seed": seed, **coins, "strength": cell.strength}
            if cell.kind == "mirrored":
                key["kind"] = cell.kind
            known = {each["name"] for each in run["rows"] if cell_of(each) == cell_of(key)}
            for found in READERS[part](bench, cell, known):
                row_in(run, {**key, **found}, origin)
                write_atomically(given.out / "answers.json", as_json(facts))


def as_json(facts: dict[str, Any]) -> bytes:
    """As it is kept."""
    return (json.dumps(facts, indent=1) + "\n").encode()


def run_whole(plan: Plan, facts: dict[str, Any], given: argparse.Namespace) -> None:
    """Everything that is read, for each of `RUNS`."""
    facts.update(plan=asdict(plan), provenance=provenance(), rows=[])
    for seed in range(plan.seeds):
        bench = Bench(plan, given.data, given.work, seed)
        for kind, strength, whole in RUNS:
            cell = Cell(plan.coins // bench.classes, strength, kind)
            for found in rows_of(bench, cell, all_of_them=whole):
                facts["rows"].append(found)
                write_atomically(given.out / "answers.json", as_json(facts))


def cell_from(text: str) -> Cell:
    """`16:0.6` or `16:0.6:mirrored`."""
    a_class, strength, *kind = text.split(":")
    return Cell(int(a_class), float(strength), *kind)


def main() -> None:
    """Run, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path("answers-networks"))
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--pictures-in", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--render", action="store_true", help="from the JSON that is there")
    parser.add_argument("--also", type=Path, help="take in the rows of another such JSON")
    parser.add_argument("--part", choices=PARTS, help="a section alone")
    parser.add_argument("--seed", type=int, help="this seed of a part alone")
    parser.add_argument(
        "--cells",
        type=lambda text: tuple(map(cell_from, text.split(","))),
        help="keys of a part: functions a class and ε, as 64:0.5,16:0.6",
    )
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value))
    given = parser.parse_args()
    path = given.out / "answers.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    if given.also:
        join(facts, json.loads(given.also.read_text()))
        write_atomically(path, as_json(facts))
    if not given.render:
        usual, cells = PARTS[given.part] if given.part else (Plan(), ())
        asked = {name: getattr(given, name) for name in asdict(usual)}
        plan = replace(usual, **{name: each for name, each in asked.items() if each is not None})
        if given.part:
            run_part(given.part, plan, given.cells or cells, facts, given)
        elif given.task or given.cells or given.seed is not None:
            parser.error("--task, --cells and --seed are for a part: name it with --part")
        else:
            run_whole(plan, facts, given)
    write_atomically(given.out / "answers.md", rendered(facts).encode())
    drawn(facts, given.pictures_in / "answers.svg")


if __name__ == "__main__":
    main()
