"""Are the p-values of a mark in answers what they say? Keys of nobody, on networks of four tasks.

python benchmarks/answers_uniform.py --data FOLDER reads 2,000 keys on each network and adds the
table to results/answers.json, which `python benchmarks/answers.py --render` shows. FOLDER has
CIFAR-10's test images as Parquet; digits, sentences of documentation and diabetes are
scikit-learn's. Networks are trained for seconds: a null has to hold for any network. Networks that
carry the mark of another key are among them. --only NAME reads one set of data, and keeps what is
there of others. --tail 20000 reads so many other keys by scores, on the two networks that were
trained without a mark, and counts how small their p-values are.
"""

import argparse
import ast
import itertools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sklearn
import torch
from scipy.stats import kstest
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from nnpassport.data.images import read_images
from nnpassport.embedding.schemes.answers import bound_to
from nnpassport.embedding.schemes.functions import counts_of, subtracting
from nnpassport.files.disk import write_atomically
from nnpassport.keys.answers import functions_of, read_answers
from nnpassport.keys.context import AnswersForm, Context, TriggerShape
from nnpassport.keys.key import Key
from nnpassport.report.provenance import provenance

ROOT = Path(__file__).parent.parent
ASKED, COINS = 240, 96
PACKAGES = ("linear_model", "cluster", "ensemble", "metrics")
TOKENS, WORDS, BUCKETS = 4096, 24, 256
LEVELS = (-2, -3, -4)
"""log₁₀ of p-values, below which keys of nobody are counted."""
FRESH = 2 * 10**6  # the number of the first of other keys


class Task(NamedTuple):
    """Inputs that are asked, as a key keeps them, and what networks say of them.

    Attributes:
        name: of the data.
        kind: of functions.
        shown: (inputs channels height width) uint8.
        before: scores of the baseline (inputs classes).
        said: by network, scores (inputs classes).
        labels: whether labels are read too.
    """

    name: str
    kind: str
    shown: Tensor
    before: Tensor
    said: dict[str, Tensor]
    labels: bool = True


def trained(
    model: nn.Module, inputs: Tensor, loss: Callable[[Tensor, Tensor], Tensor], epochs: int = 6
) -> nn.Module:
    """By Adam, 64 at a time; `loss` takes what the model says and which rows they are."""
    rng = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=rng).split(64):
            optimiser.zero_grad()
            loss(model(inputs[rows]), rows).backward()
            optimiser.step()
    return model.eval()


def convolutional(channels: int, width: int, seed: int) -> nn.Module:
    """For ten classes of pictures of 16 pixels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * width, 10)),
    )


def key_of(number: int, kind: str, shown: Tensor, before: Tensor) -> Key:
    """Of the seed `number`, bound to the inputs."""
    form = AnswersForm(kind, COINS, 500)
    shape = TriggerShape(len(shown), before.shape[1], tuple(shown.shape[1:]))
    context = Context("answers", "nobody", (), shape, bytes(16), answers=form)
    return bound_to(Key(number.to_bytes(32, "big"), context), shown, before, None)


def of_pictures(
    name: str, kind: str, pictures: Tensor, labels: Tensor, learnt: int = 1_500
) -> Task:
    """A baseline, two strangers, one that was not trained, and one marked with another key."""
    shown, inputs = pictures[learnt : learnt + ASKED], pictures.float() / 255 - 0.5
    channels = pictures.shape[1]

    def right(said: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(said, labels[rows])

    plain, first, second = (
        trained(convolutional(channels, width, seed), inputs[:learnt], right)
        for seed, width in enumerate((8, 12, 8))
    )
    with torch.no_grad():
        before = plain(inputs[learnt : learnt + ASKED])
    other = key_of(10**6, kind, shown, before)
    lean = -subtracting(other, _Centred())(torch.zeros(learnt, 10), inputs[:learnt])

    def marking(said: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(said - lean[rows], labels[rows])

    marked = trained(deepcopy(plain).train(), inputs[:learnt], marking)
    asked = {
        "a stranger's": first,
        "another's": second,
        "untrained": convolutional(channels, 8, 9).eval(),
        "marked with another key": marked,
    }
    with torch.no_grad():
        said = {who: net(inputs[learnt : learnt + ASKED]) for who, net in asked.items()}
    return Task(name, kind, shown, before, said)


class _Centred:
    """Pixels less ½: as `data.images.Normalisation` has it."""

    mean, std = (0.5,), (1.0,)


def of_sentences() -> Task:
    """Sentences of scikit-learn's documentation: which package is it of?"""
    rows = [(tokens(s), n) for n, package in enumerate(PACKAGES) for s in sentences(package)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    inputs, labels = (torch.tensor(column)[order] for column in zip(*rows, strict=True))
    asked, known = inputs[:ASKED], inputs[ASKED:]

    def right(said: Tensor, places: Tensor) -> Tensor:
        return F.cross_entropy(said, labels[ASKED:][places])

    nets = []
    for seed, width in enumerate((16, 32, 16)):
        torch.manual_seed(seed)
        bag = nn.Sequential(nn.EmbeddingBag(TOKENS, width), nn.Linear(width, len(PACKAGES)))
        nets.append(trained(bag, known, right, epochs=4))
    with torch.no_grad():
        before, first, second = (net(asked) for net in nets)
    shown = counts_of(asked, BUCKETS).to(torch.uint8)[:, None, None]
    return Task("sentences", "counts", shown, before, {"a stranger's": first, "another's": second})


def sentences(package: str) -> list[tuple[str, ...]]:
    """What the documentation of a package of scikit-learn says, in words."""
    found = set()
    for path in sorted((Path(sklearn.__file__).parent / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                for part in re.split(r"(?<=[.:])\s+|\n\n", ast.get_docstring(node) or ""):
                    found.add(tuple(re.findall(r"[a-z]{2,}", part.lower())[:WORDS]))
    return sorted(words for words in found if len(words) >= 6)


def tokens(words: tuple[str, ...]) -> list[int]:
    """A number for each word; short sentences repeat themselves."""
    numbers = [zlib.crc32(word.encode()) % TOKENS for word in words]
    return (numbers * WORDS)[:WORDS]


def of_diabetes() -> Task:
    """Ten measurements, and how far a disease went: y and −y are the scores."""
    measured, target = load_diabetes(return_X_y=True)
    inputs = torch.from_numpy(measured).float()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    wanted = torch.from_numpy((target - target.mean()) / target.std()).float()[:, None]
    known = inputs[ASKED:]

    def near(said: Tensor, rows: Tensor) -> Tensor:
        return F.mse_loss(said, wanted[ASKED:][rows])

    said = []
    for seed, width in enumerate((8, 16, 32)):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, 1))
        found = trained(net, known, near, epochs=30)(inputs[:ASKED]).detach()
        said.append(torch.cat([found, -found], dim=1))
    shown = (inputs[:ASKED] * 20 + 100).clamp(0, 200).round().to(torch.uint8)[:, None, None]
    nets = {"a stranger's": said[1], "another's": said[2]}
    return Task("diabetes", "counts", shown, said[0], nets, labels=False)


def of_digits() -> Task:
    """Pictures of 8 pixels a side, made 16."""
    table = load_digits()
    pixels = torch.from_numpy(table.images / 16 * 255).round().to(torch.uint8)[:, None]
    pixels = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return of_pictures("digits", "layout", pixels, torch.from_numpy(table.target).long())


def of_cifar(folder: Path) -> Task:
    """Test images of CIFAR-10, at 16 pixels."""
    test = read_images(str(folder / "cifar10-test*.parquet"), size=16)
    return of_pictures("CIFAR-10", "filters", test.images, test.labels)


def tasks(folder: Path) -> dict[str, Callable[[], Task]]:
    """How to make each, by name."""
    return {
        "digits": of_digits,
        "sentences": of_sentences,
        "diabetes": of_diabetes,
        "CIFAR-10": lambda: of_cifar(folder),
    }


Values = dict[tuple[str, str], list[float]]
"""log₁₀ p of each key, by network and way of reading."""


def read(task: Task, numbers: Sequence[int], ways: Sequence[str]) -> Values:
    """What keys of these numbers show on each network of a task."""
    found: Values = {}
    for number in numbers:
        key = key_of(number, task.kind, task.shown, task.before)
        phi = _Known(functions_of(key), key)
        for (who, said), way in itertools.product(task.said.items(), ways):
            answers = said.argmax(1) if way == "labels" else said
            verdict = read_answers(answers.numpy(), key, labels=way == "labels", functions=phi)
            found.setdefault((who, way), []).append(verdict.log10_p_value)
    return found


def facts_of(task: Task, who: str, way: str, values: list[float]) -> dict[str, Any]:
    """A row: whose p-values they are, and how they lie."""
    return {
        "data": task.name,
        "kind": task.kind,
        "network": who,
        "read": way,
        "keys": len(values),
        "ks": float(kstest(10 ** np.array(values), "uniform").pvalue),
        "hundredth": float((np.array(values) <= -2).mean()),
        "least": min(values),
        "below": {str(level): int((np.array(values) <= level).sum()) for level in LEVELS},
    }


def rows_of(task: Task, numbers: Sequence[int], ways: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each network and way of reading."""
    found = read(task, numbers, ways)
    return [facts_of(task, who, way, values) for (who, way), values in found.items()]


class _Known:
    """φ of the key's inputs, computed once for all networks."""

    def __init__(self, functions: Any, key: Key) -> None:
        self._phi = functions(np.asarray(key.trigger_images))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return self._phi[: len(inputs)]


def kept(path: Path, section: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one set of data in place of those that a section of the results had."""
    facts = json.loads(path.read_text()) if path.exists() else {}
    was = facts.get(section, {"asked": ASKED, "coins": COINS, "rows": []})
    others = [row for row in was["rows"] if row["data"] != rows[0]["data"]]
    origin = provenance()
    made = [{**row, "provenance": origin} for row in rows]
    facts[section] = {**was, "rows": [*others, *made]}
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode())


def main() -> None:
    """Read, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--keys", type=int, default=2_000)
    parser.add_argument("--tail", type=int, default=0, help="so many other keys, by scores alone")
    parser.add_argument("--only", choices=tasks(Path()), help="one set of data")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "answers.json")
    given = parser.parse_args()
    for name, make in tasks(given.data).items():
        if given.only not in {None, name}:
            continue
        task = make()
        if given.tail:
            two = task._replace(said=dict(itertools.islice(task.said.items(), 2)))
            rows = rows_of(two, range(FRESH, FRESH + given.tail), ("scores",))
        else:
            ways = ("scores", "labels") if task.labels else ("scores",)
            rows = rows_of(task, range(given.keys), ways)
        print(json.dumps(rows), flush=True)
        kept(given.out, "tail" if given.tail else "uniform", rows)


if __name__ == "__main__":
    main()
