"""Are the p-values of a mark in answers what they say? Keys of nobody, on networks of four tasks.

python benchmarks/answers_uniform.py --data FOLDER reads 2,000 keys on each network and adds the
table to results/answers.json, which `python benchmarks/answers.py --render` shows. FOLDER has
CIFAR-10's test images as Parquet; digits, sentences of documentation and diabetes are
scikit-learn's. Networks are trained for seconds: a null has to hold for any network. Networks that
carry the mark of another key are among them.
"""

import argparse
import ast
import json
import re
import zlib
from collections.abc import Callable, Iterator
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


def tasks(folder: Path) -> Iterator[Task]:
    """All of them, one by one."""
    table = load_digits()
    pixels = torch.from_numpy(table.images / 16 * 255).round().to(torch.uint8)[:, None]
    pixels = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    yield of_pictures("digits", "layout", pixels, torch.from_numpy(table.target).long())
    yield of_sentences()
    yield of_diabetes()
    test = read_images(str(folder / "cifar10-test*.parquet"), size=16)
    yield of_pictures("CIFAR-10", "filters", test.images, test.labels)


def rows_of(task: Task, keys: int) -> list[dict[str, Any]]:
    """A row for each network and way of reading."""
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(keys):
        key = key_of(number, task.kind, task.shown, task.before)
        phi = _Known(functions_of(key), key)
        for who, said in task.said.items():
            ways = {"scores": said.numpy()}
            if task.labels:
                ways["labels"] = said.argmax(1).numpy()
            for way, numbers in ways.items():
                verdict = read_answers(numbers, key, labels=way == "labels", functions=phi)
                found.setdefault((who, way), []).append(verdict.log10_p_value)
    return [
        {
            "data": task.name,
            "kind": task.kind,
            "network": who,
            "read": way,
            "keys": keys,
            "ks": float(kstest(10 ** np.array(values), "uniform").pvalue),
            "hundredth": float((np.array(values) <= -2).mean()),
            "least": min(values),
        }
        for (who, way), values in found.items()
    ]


class _Known:
    """φ of the key's inputs, computed once for all networks."""

    def __init__(self, functions: Any, key: Key) -> None:
        self._phi = functions(np.asarray(key.trigger_images))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        return self._phi[: len(inputs)]


def main() -> None:
    """Read, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--keys", type=int, default=2_000)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "answers.json")
    given = parser.parse_args()
    made = {"provenance": provenance(), "asked": ASKED, "coins": COINS, "rows": []}
    for task in tasks(given.data):
        made["rows"] += rows_of(task, given.keys)
        print(json.dumps(made["rows"][-1]), flush=True)
        facts = json.loads(given.out.read_text()) if given.out.exists() else {}
        text = json.dumps({**facts, "uniform": made}, indent=1) + "\n"
        write_atomically(given.out, text.encode())


if __name__ == "__main__":
    main()
