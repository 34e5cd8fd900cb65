"""A mark in ordinary answers: what it costs, who still carries it, and what thieves can shave.

python benchmarks/answers.py --data FOLDER writes results/answers.json, results/answers.md and its
picture. FOLDER has CIFAR-10 as Parquet (cifar10-train*.parquet, cifar10-test*.parquet). As it
stands it is sized for a few minutes of one slow processor: pictures of 16 pixels, small networks,
few epochs. --part directions reads copies alone, for marks in more and in fewer directions.
--part larger is AlexNet on 32 pixels, copied by ResNet-18 on 25,000 labels that are asked anew for
each augmented image; --part larger --owner resnet18 --thief alexnet is the other way round. Rows
are written as they come, and --work FOLDER keeps trained networks: a run that was interrupted goes
on where it was. The larger part takes about eight hours of one core that computes in bfloat16: a
step takes it 3 ms for each image of AlexNet's and 12 ms for each of ResNet-18's.
"""

import argparse
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.attacks.perturbation import quantise
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.answers import ANSWERS, scores_of
from nnpassport.embedding.schemes.cosine import COSINE, RATIO, signal_to_noise
from nnpassport.embedding.schemes.pictures import shuffled
from nnpassport.embedding.train.loop import Outcome, Recipe, classification, fit
from nnpassport.files.disk import write_atomically
from nnpassport.keys.answers import features, functions_of, read_answers
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.report.page import as_text, styled
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
COUNTS = (300, 1_000, 3_000)
RUNS = (("filters", 0.8, True), ("filters", 0.5, False), ("filters", 0.3, False))
"""Kinds of functions, ε, and whether copies and thieves are run or the network alone."""
BEFORE = ("the network before the mark", "that one, trained as long without a mark")
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
PARTS = {
    "directions": (Plan(precision="bfloat16"), ((640, 0.8), (640, 0.65), (640, 0.5), (160, 0.6))),
    "larger": (LARGER, ((160, 0.6),)),
    "cosine": (Plan(precision="bfloat16"), ((160, 0.1),)),
}
"""What copies are read in: sizes, and for each run how many functions there are, and ε."""
STRANGER = "a stranger's, trained on true labels"


def made(name: str, width: int, seed: int) -> nn.Module:
    """The owner's small network, or one of the catalog's architectures."""
    if name == "small":
        return network(width, seed)
    torch.manual_seed(seed)
    return build(name, classes=10, norm="batch")


def block(inputs: int, outputs: int) -> nn.Module:
    """Convolution, norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def network(width: int, seed: int) -> nn.Module:
    """The owner's."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(block(3, width), block(width, width), nn.MaxPool2d(2)),
        *(block(width, 2 * width), block(2 * width, 2 * width), nn.MaxPool2d(2)),
        *(block(2 * width, 4 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(16 * width, 10),
    )


def another(width: int, seed: int) -> nn.Module:
    """Of another architecture: a thief's, or a stranger's."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 2 * width, 5, padding=2), nn.BatchNorm2d(2 * width), nn.GELU()),
        *(nn.AvgPool2d(2), block(2 * width, 3 * width), nn.MaxPool2d(2)),
        *(block(3 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(4 * width, 10),
    )


def kept_key(key: Key, path: Path) -> Key:
    """The key of an earlier run that was interrupted, or this one."""
    if not path.exists():
        save_key(key, path)
    return load_key(path)


def named_by(plan: Plan) -> str:
    """Sizes in a file's name: what is as it was before has no part in it."""
    values = [str(value) for value in asdict(plan).values()]
    usual = [str(value) for value in asdict(Plan()).values()]
    more = [each for each, old in zip(values[9:], usual[9:], strict=True) if each != old]
    return "-".join([*values[:9], *more])


class Bench:
    """Data of a seed, networks that are trained once, and rows of what was read."""

    def __init__(self, plan: Plan, folder: Path, work: Path, seed: int) -> None:
        self.plan, self.seed, self.work = plan, seed, work
        work.mkdir(parents=True, exist_ok=True)
        both = [
            read_images(str(folder / f"cifar10-{part}*.parquet"), size=plan.size)
            for part in ("train", "test")
        ]
        order = torch.randperm(len(both[0]), generator=torch.Generator().manual_seed(seed))
        self.mine = both[0].subset(order[: plan.train])
        self.theirs = both[0].subset(order[plan.train : 2 * plan.train])
        self.test = both[1]
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
        net = made(self.plan.owner, self.plan.width, self.seed)
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
            return another(self.plan.width, seed)
        return made(self.plan.thief, self.plan.width, seed)

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


def rows_of(
    bench: Bench, kind: str, strength: float, *, all_of_them: bool
) -> Iterator[dict[str, Any]]:
    """Everything that is read with one key, as it comes."""
    for found in _rows_of(bench, kind, strength, all_of_them=all_of_them):
        yield {"seed": bench.seed, "kind": kind, "strength": strength, **found}


def _rows_of(
    bench: Bench, kind: str, strength: float, *, all_of_them: bool
) -> Iterator[dict[str, Any]]:
    plan, plain = bench.plan, bench.plain()
    scheme = replace(
        ANSWERS, kind=kind, strength=strength, pictures=plan.pictures, coins=plan.coins
    )
    seed = bytes([bench.seed + 1] * 32)
    key = scheme.draw_key(plain, torch.zeros(2, 3, plan.size, plan.size), seed=seed)
    order = shuffled(key, bench.test)[: plan.pictures]  # before the key is bound to them
    key = scheme.prepared(key, plain, bench.test, bench.normalise)
    key = kept_key(key, bench.work / f"{kind}-{strength}-{bench.seed}.key")
    functions, how = Known(key), bench.recipe(plan.marking, 0.05)
    named = f"{kind}-{strength}"

    def mark(model: nn.Module) -> None:
        scheme.embed(model, key, bench.mine, how, normalise=bench.normalise, trained=True)

    marked = bench.kept(f"marked-{named}", deepcopy(plain), mark)
    more = bench.kept(
        "tuned",
        deepcopy(plain),
        lambda n: fit(n, classification, bench.mine, how, normalise=bench.normalise),
    )

    def read(name: str, model: nn.Module) -> dict[str, Any]:
        whole = bench.asked(model)
        return row(name, key, functions, whole[order], bench.accuracy(whole))

    yield read(BEFORE[0], plain)
    yield read(BEFORE[1], more)
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


def directions(
    bench: Bench, coins: int, strength: float, known: set[str]
) -> Iterator[dict[str, Any]]:
    """What a copy by labels carries of a mark in so many functions, and what nobody does.

    `known` are rows that are there already.
    """
    plan, plain = bench.plan, bench.plain()
    scheme = replace(ANSWERS, strength=strength, pictures=plan.pictures, coins=coins)
    example = torch.zeros(2, 3, plan.size, plan.size)
    key = scheme.draw_key(plain, example, seed=bytes([bench.seed + 1] * 32))
    order = shuffled(key, bench.test)[: plan.pictures]
    key = scheme.prepared(key, plain, bench.test, bench.normalise)
    named = f"filters-{strength}" if coins == plan.coins else f"filters-{strength}-{coins}"
    key = kept_key(key, bench.work / f"{named}-{bench.seed}.key")
    functions, how = Known(key), bench.recipe(plan.marking, 0.05)

    def mark(model: nn.Module) -> None:
        scheme.embed(model, key, bench.mine, how, normalise=bench.normalise, trained=True)

    def tune(model: nn.Module) -> None:
        fit(model, classification, bench.mine, how, normalise=bench.normalise)

    marked = bench.kept(f"marked-{named}", deepcopy(plain), mark)
    said = bench.asked(marked)
    networks: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        (BEFORE[0], lambda: plain),
        (BEFORE[1], lambda: bench.kept("tuned", deepcopy(plain), tune)),
        ("marked", lambda: marked),
        ("copy by labels", lambda: bench.copied_by_asking(f"labels-{named}", marked)),
        (STRANGER, lambda: bench.copied("stranger", None)),
    )
    for name, network_of in networks:
        if name in known:
            continue
        whole = bench.asked(network_of())
        found = row(name, key, functions, whole[order], bench.accuracy(whole))
        agrees = float((whole.argmax(1) == said.argmax(1)).float().mean())
        yield {"seed": bench.seed, "coins": coins, "strength": strength, "agrees": agrees, **found}
    for count, l2 in itertools.product((300, 1_000, 3_000), (1e-2, 1e-3)):
        name = f"nulled with {count:,} labels in the widest {coins // 10}, ridge {l2}"
        if name not in known:
            asked = scores_of(marked, bench.theirs.images[:count], bench.normalise)
            left = said - bench.shaved_off(key, asked, coins // 10, l2)
            found = row(name, key, functions, left[order], bench.accuracy(left))
            yield {"seed": bench.seed, "coins": coins, "strength": strength, **found}


def waves(bench: Bench, coins: int, strength: float, known: set[str]) -> Iterator[dict[str, Any]]:
    """What the network and a copy by scores carry of cosine watermarks, exactly and as published.

    `ratios` are the published score, of the first wave of each class.
    """
    plan, plain = bench.plan, bench.plain()
    scheme = replace(COSINE, strength=strength, pictures=plan.pictures, coins=coins)
    example = torch.zeros(2, 3, plan.size, plan.size)
    key = scheme.draw_key(plain, example, seed=bytes([bench.seed + 1] * 32))
    order = shuffled(key, bench.test)[: plan.pictures]
    key = scheme.prepared(key, plain, bench.test, bench.normalise)
    named = f"waves-{strength}-{coins}"
    key = kept_key(key, bench.work / f"{named}-{bench.seed}.key")
    functions, how = Known(key), bench.recipe(plan.marking, 0.05)

    def mark(model: nn.Module) -> None:
        scheme.embed(model, key, bench.mine, how, normalise=bench.normalise, trained=True)

    marked = bench.kept(f"marked-{named}", deepcopy(plain), mark)
    asked = scores_of(marked, bench.theirs.images, bench.normalise)
    networks: tuple[tuple[str, Callable[[], nn.Module]], ...] = (
        (BEFORE[0], lambda: plain),
        ("marked", lambda: marked),
        ("copy by scores", lambda: bench.copied(f"scores-{named}", None, asked)),
        (STRANGER, lambda: bench.copied("stranger", None)),
    )
    for name, network_of in networks:
        if name in known:
            continue
        whole = bench.asked(network_of())
        found = row(name, key, functions, whole[order], bench.accuracy(whole))
        chances = whole[order].softmax(1).numpy()
        ratios = [signal_to_noise(chances, key, wave) for wave in range(10)]
        yield {
            "seed": bench.seed,
            "coins": coins,
            "strength": strength,
            "ratios": ratios,
            **found,
        }


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
    few = np.linalg.eigh(np.cov(theirs.T))[1][:, -(plan.coins // 10) :]  # where functions are
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


HEAD = """# A mark in ordinary answers

Rendered by `python benchmarks/answers.py` from `results/answers.json`. CIFAR-10 at {size} pixels;
the owner's convolutional network of width {width} sees {train:,} images for {epochs} epochs and
{marking} more with the mark, copies are of another architecture and see answers to {train:,}
other images for {copying} epochs. {coins} functions, {pictures:,} test images to ask, {seeds}
seed(s). Numbers are log₁₀ p; accuracy is on all 10,000 test images, in percent. How it works:
[docs/answers.md](../docs/answers.md).

These are small networks on small pictures, trained for minutes: what they show is the order of
things, and not what AlexNet and ResNet-18 reach on CIFAR-10 and CIFAR-100, which was not run;
`python benchmarks/answers.py --part larger` is for that.

![p against how many images were asked](../docs/figures/answers.svg)
"""
AIMS = """## What was aimed at

{table}

*Lost* is against the network before the mark and against that one trained as long without a mark.
A copy that agrees with the marked network on 90 % of the images was aimed at as well. None of
these does, so that aim was not put to the test: copies here are much less accurate than what they
copy.
"""
NOTES = """## Reading the table

- Strangers, and the networks before the mark, are coins.
- Rounding and noise make more images necessary, smoothing changes nothing, int8 little. An ensemble
  with an honest network weakens the mark more than by its share.
- Copies carry it by scores and by labels, and so do copies of copies. The more true labels are
  mixed in, the less.
- Thieves with labels of their own: *nulled* fits, with so many labels that the owner has not, the
  linear correction that makes the marked network's answers best, in a bank of random filters of the
  thief's own (the owner's is secret). What it costs is the difference to *marked* in accuracy. A
  strong correction takes the mark out at the price of many right answers, a weak one keeps both.
  More than 3,000 labels were not tried.
- Tuning weakens it; on adversarial examples it takes most of it, and many right answers.
"""


def table_of(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    lines = [" | ".join(each) for each in (head, ("---",) * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def row_of(facts: dict[str, Any], name: str, strength: float) -> dict[str, Any] | None:
    """The first row of this name and ε, if it was run."""
    rows = (e for e in facts["rows"] if (e["name"], e["strength"]) == (name, strength))
    return next(rows, None)


def aims(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """What was aimed at, what came out, and whether that is enough, for each ε that was run."""
    most, rows = facts["plan"]["pictures"], []
    for strength in dict.fromkeys(each["strength"] for each in facts["rows"]):
        marked = row_of(facts, "marked", strength)
        if marked is None:
            continue
        for name in BEFORE:
            before = row_of(facts, name, strength)
            lost = 100 * (before["accuracy"] - marked["accuracy"]) if before else math.nan
            words = f"at most 0.5 points lost, against {name}"
            rows.append((f"{strength}", words, f"{lost:.1f}", verdict(lost <= 0.5)))
        copy = row_of(facts, "copy by labels", strength)
        for what, each, key, aim in (
            ("marked, scores of 1,000 images", marked, "scores 1000", -30),
            (f"marked, labels of {most:,}", marked, f"labels {most}", -12),
            (f"copy by labels, labels of {most:,}", copy, f"labels {most}", -9),
            (f"copy by labels, scores of {most:,}", copy, f"scores {most}", -9),
        ):
            if each is not None:
                words = f"{what}: at most 10^{aim}"
                rows.append((f"{strength}", words, f"{each[key]:.1f}", verdict(each[key] <= aim)))
    return rows


def verdict(enough: bool) -> str:
    """In a word."""
    return "reached" if enough else "**not reached**"


def rendered(facts: dict[str, Any]) -> str:
    """The page."""
    most = facts["plan"]["pictures"]
    shown = ("scores 300", "scores 1000", f"scores {most}", "labels 1000", f"labels {most}")
    rows = [
        (
            f"{each['strength']}",
            each["name"],
            f"{100 * each['accuracy']:.1f}",
            *(f"{each[key]:.1f}" for key in shown),
        )
        for each in facts["rows"]
    ]
    heads = ("scores of 300", "of 1,000", f"of {most:,}", "labels of 1,000", f"of {most:,}")
    presented = [
        f"ε {each['strength']}: {100 * each['with the key']:.1f} %"
        for each in facts["rows"]
        if "with the key" in each
    ]
    return "\n".join(
        [
            HEAD.format(**facts["plan"]),
            AIMS.format(table=table_of(("ε", "aim", "came out", ""), aims(facts))),
            "## Everything that was read",
            "",
            table_of(("ε", "network", "accuracy", *heads), rows),
            "",
            f"F, the accuracy with the key presented: {'; '.join(presented)}. The network is",
            "trained to be right as it is released, so F is below that.",
            "",
            NOTES,
            *parts_of(facts),
        ]
    )


DIRECTIONS = """## In how many directions

Another run, in bfloat16, by `python benchmarks/answers.py --part directions`: the same sizes with
64 functions of each class, in the widest 64 directions of what the owner's filters see, and with 16
in the widest 16. *Lost* is against the network trained as long without a mark; the thief who nulls
has labels of his own.

{table}

Copies learn the widest directions best: where all of ε is in 16 of them a copy shows at 0.6 what
takes 0.8 in 64, and the network loses half as much. Who has labels nulls 16 directions at a lower
price than 64: that is the choice. `--setting coins=160` makes 16 of each of ten classes. Accuracies
are of 10,000 images and one seed: a few tenths of a point are noise.
"""
LARGER_WORDS = """## Larger

By `python benchmarks/answers.py --part larger`: {owner} at {size} pixels, {train:,} images of its
own, and {thief} trained on labels that it gave to {train:,} others, asked anew for each augmented
image.

{table}
"""
WAVES = """## Cosine watermarks

By `python benchmarks/answers.py --part cosine`: {coins} waves on probabilities, ε {strength}, the
other sizes as in the run above. *Ratio* is the published score of the first wave of each class, of
10,000 images: the median of ten and the largest; the authors' code calls a suspect marked above
{ratio:g}.

{table}

Among {coins} waves one alone is weak, so the ratio of a single one hardly says more of a marked
network than of an honest one, where their phases together decide. As published there is one wave,
which a wrapper adds; that was not trained here.
"""
UNIFORM = """## Keys of nobody

By `python benchmarks/answers_uniform.py`: p-values of keys that nobody has marked with, each with
{coins} functions of its own, of {asked} inputs. *KS* is the p-value of a Kolmogorov-Smirnov test
against uniform.

{table}

A network that gives one label to every input says nothing: its p is 1 for every key. Of 2,000 keys
the least p is about 1 in 2,000, and 1 in 20,000 in one row of ten.
"""


def parts_of(facts: dict[str, Any]) -> list[str]:
    """The sections that were run."""
    found = []
    if "directions" in facts:
        table = directions_table(facts["directions"])
        found.append(DIRECTIONS.format(table=table))
    if "larger" in facts:
        part = facts["larger"]
        found.append(LARGER_WORDS.format(**part["plan"], table=directions_table(part)))
    if "cosine" in facts:
        part = facts["cosine"]
        first = part["rows"][0]
        words = {"coins": first["coins"], "strength": first["strength"], "ratio": RATIO}
        found.append(WAVES.format(**words, table=waves_table(part["rows"])))
    if "uniform" in facts:
        part = facts["uniform"]
        words = {"coins": part["coins"], "asked": part["asked"]}
        found.append(UNIFORM.format(**words, table=uniform_table(part["rows"])))
    return found


def directions_table(part: dict[str, Any]) -> str:
    """A line for each network and key."""
    most = part["plan"]["pictures"]
    keys = ("scores 1000", f"scores {most}", "labels 1000", f"labels {most}")
    rows = []
    for each in part["rows"]:
        cell = [each[k] for k in ("seed", "coins", "strength")]
        before = next(
            (
                r["accuracy"]
                for r in part["rows"]
                if r["name"] == BEFORE[1] and [r[k] for k in ("seed", "coins", "strength")] == cell
            ),
            math.nan,
        )
        own = each["name"] == "marked" or each["name"].startswith("nulled")
        lost = f"{100 * (before - each['accuracy']):.1f}" if own else ""
        agrees = f"{100 * each['agrees']:.1f}" if each["name"] == "copy by labels" else ""
        rows.append(
            (
                f"{each['coins'] // 10}",
                f"{each['strength']}",
                each["name"],
                f"{100 * each['accuracy']:.1f}",
                lost,
                agrees,
                *(f"{each[key]:.1f}" for key in keys),
            )
        )
    head = ("a class", "ε", "network", "accuracy", "lost", "agrees")
    shown = ("scores of 1,000", f"of {most:,}", "labels of 1,000", f"of {most:,}")
    return table_of((*head, *shown), rows)


def waves_table(rows: list[dict[str, Any]]) -> str:
    """A line for each network."""
    lines = [
        (
            each["name"],
            f"{100 * each['accuracy']:.1f}",
            *(f"{each[k]:.1f}" for k in ("scores 1000", "scores 10000", "labels 10000")),
            f"{np.median(each['ratios']):.1f}",
            f"{max(each['ratios']):.1f}",
        )
        for each in rows
    ]
    shown = ("scores of 1,000", "of 10,000", "labels of 10,000", "ratio", "largest")
    return table_of(("network", "accuracy", *shown), lines)


def uniform_table(rows: list[dict[str, Any]]) -> str:
    """A line for each data set, network and way of reading."""
    lines = []
    for each in rows:
        silent = each["least"] > -1e-9
        ks = "says nothing" if silent else f"{each['ks']:.3f}"
        lines.append(
            (
                each["data"],
                each["kind"],
                each["network"],
                each["read"],
                f"{each['keys']:,}",
                ks,
                f"{100 * each['hundredth']:.2f}",
                f"{each['least']:.1f}",
            )
        )
    heads = ("data", "functions", "network", "read by", "keys", "KS")
    return table_of((*heads, "p ≤ 0.01, %", "least log₁₀ p"), lines)


def drawn(facts: dict[str, Any], path: Path) -> None:
    """The picture: log₁₀ p against the number of images asked."""
    shown = {
        "marked": "marked",
        "copy by scores": "copy by scores",
        "copy by labels": "copy by labels",
        STRANGER: "a stranger's",
    }
    most, kind = facts["plan"]["pictures"], facts["rows"][0]["kind"]
    counts = [*(n for n in COUNTS if n < most), most]
    with styled("answers"):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for colour, (name, label) in enumerate(shown.items()):
            found = [e for e in facts["rows"] if e["name"] == name and e["kind"] == kind]
            for what, style in (("scores", "-"), ("labels", "--")) if found else ():
                values = [found[0][f"{what} {count}"] for count in counts]
                axes.plot(counts, values, style, color=f"C{colour}", label=f"{label}, {what}")
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("ordinary images asked")
        axes.set_ylabel("log₁₀ p")
        axes.axhline(-9, color="grey", linewidth=0.8)
        axes.set_yscale("symlog", linthresh=10)
        axes.set_yticks([0, -5, -10, -30, -100], ["0", "−5", "−10", "−30", "−100"])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-200, 1)
        figure.legend(fontsize=8, loc="outside lower center", ncols=4)
        buffer = io.BytesIO()
        as_text(figure).savefig(buffer, format="svg", metadata={"Date": None})
    write_atomically(path, buffer.getvalue())


def run_part(part: str, plan: Plan, facts: dict[str, Any], given: argparse.Namespace) -> None:
    """A section of the results, cell by cell: what is there of the same sizes stays."""
    was = facts.get(part, {})
    if was.get("plan") != asdict(plan):
        was = {"plan": asdict(plan), "rows": []}
    facts[part] = {**was, "provenance": provenance()}
    rows = facts[part]["rows"]
    for seed in range(plan.seeds):
        bench = Bench(plan, given.data, given.work, seed)
        for coins, strength in PARTS[part][1]:
            cell = (seed, coins, strength)
            known = {r["name"] for r in rows if (r["seed"], r["coins"], r["strength"]) == cell}
            read = waves if part == "cosine" else directions
            for found in read(bench, coins, strength, known):
                rows.append(found)
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
            for found in rows_of(bench, kind, strength, all_of_them=whole):
                facts["rows"].append(found)
                write_atomically(given.out / "answers.json", as_json(facts))


def main() -> None:
    """Run, keep, render."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--work", type=Path, default=Path("answers-networks"))
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    parser.add_argument("--pictures-in", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--render", action="store_true", help="from the JSON that is there")
    parser.add_argument("--part", choices=PARTS, help="a section alone")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name}", type=type(value))
    given = parser.parse_args()
    path = given.out / "answers.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    if not given.render:
        usual = PARTS[given.part][0] if given.part else Plan()
        asked = {name: getattr(given, name) for name in asdict(usual)}
        plan = replace(usual, **{name: each for name, each in asked.items() if each is not None})
        if given.part:
            run_part(given.part, plan, facts, given)
        else:
            run_whole(plan, facts, given)
    write_atomically(given.out / "answers.md", rendered(facts).encode())
    drawn(facts, given.pictures_in / "answers.svg")


if __name__ == "__main__":
    main()
