"""A mark in answers of networks that read: sentences of documentation, and numbers."""

import ast
import re
import zlib
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import sklearn
import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F

from nnpassport.embedding.schemes.answers import ANSWERS, bound_to
from nnpassport.embedding.schemes.functions import counts_of, subtracting
from nnpassport.keys.answers import pairs_of, read_answers
from nnpassport.scheme import Batch

PACKAGES = ("linear_model", "cluster", "ensemble", "metrics")
WORDS, TOKENS, BUCKETS = 24, 4096, 256


def sentences(package):
    """What scikit-learn's documentation says in this package, in words."""
    found = set()
    for path in sorted((Path(sklearn.__file__).parent / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                for part in re.split(r"(?<=[.:])\s+|\n\n", ast.get_docstring(node) or ""):
                    found.add(tuple(re.findall(r"[a-z]{2,}", part.lower())[:WORDS]))
    return sorted(words for words in found if len(words) >= 6)


def tokens(words):
    """A number for each word; short sentences repeat themselves."""
    numbers = [zlib.crc32(word.encode()) % TOKENS for word in words]
    return (numbers * WORDS)[:WORDS]


@pytest.fixture(scope="module")
def texts():
    """Sentences as tokens, and which package each is of, shuffled."""
    rows = [(tokens(s), n) for n, p in enumerate(PACKAGES) for s in sentences(p)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    inputs, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    return inputs[order], labels[order]


def trained(model, loss, inputs, epochs=12):
    rng = torch.Generator().manual_seed(1)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        for rows in torch.randperm(len(inputs), generator=rng).split(64):
            optimiser.zero_grad()
            loss(model, inputs[rows], rows).backward()
            optimiser.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.trains
def test_a_network_that_reads_sentences_carries_it_and_answers_as_well_as_before(texts):
    """Of real text. The least of 3 runs: 10⁻¹⁹ by scores, 10⁻⁶ by labels."""
    inputs, labels = texts
    torch.manual_seed(0)
    mine, asked = slice(0, 2_500), slice(2_500, None)

    def classify(model, shown, rows):
        return F.cross_entropy(model(shown), labels[mine][rows])

    network = nn.Sequential(nn.EmbeddingBag(TOKENS, 32), nn.Linear(32, len(PACKAGES)))
    plain = trained(network, classify, inputs[mine])
    scheme = replace(ANSWERS, strength=1.0, pictures=len(inputs[asked]), buckets=BUCKETS)
    key = scheme.draw_key(plain, inputs[:2], seed=bytes(32))
    shown = counts_of(inputs[asked], BUCKETS).to(torch.uint8)[:, None, None]
    key = bound_to(key, shown, plain(inputs[asked]).detach(), None)
    objective = scheme.objective(key, steps=1)

    def marking(model, shown, rows):
        return objective(model, Batch(shown, labels[mine][rows])).loss

    marked = trained(deepcopy(plain).train(), marking, inputs[mine])
    as_long = trained(deepcopy(plain).train(), classify, inputs[mine])  # without a mark
    with torch.no_grad():
        before, said, unmarked = (each(inputs[asked]) for each in (plain, marked, as_long))
    found = read_answers(said.numpy(), key)
    assert found.log10_p_value < -12
    assert read_answers(said.argmax(1).numpy(), key, labels=True).log10_p_value < -2
    assert read_answers(before.numpy(), key).log10_p_value > -3
    right = [float((z.argmax(1) == labels[asked]).float().mean()) for z in (unmarked, said)]
    assert right[0] > 0.7
    assert right[1] > right[0] - 0.02


@pytest.mark.slow
@pytest.mark.trains
def test_a_copy_that_read_nothing_but_answers_to_other_sentences_carries_it(texts):
    """16 functions for each class: words that are everywhere. The least of two keys: 10⁻⁶."""
    inputs, labels = texts
    mine, theirs, asked = slice(0, 1_300), slice(1_300, 2_600), slice(2_600, None)

    def right(of):
        return lambda model, shown, rows: F.cross_entropy(model(shown), labels[of][rows])

    torch.manual_seed(0)
    network = nn.Sequential(nn.EmbeddingBag(TOKENS, 32), nn.Linear(32, len(PACKAGES)))
    plain = trained(network, right(mine), inputs[mine])
    scheme = replace(ANSWERS, coins=64, strength=1.0, pictures=len(inputs[asked]))
    key = scheme.draw_key(plain, inputs[:2], seed=bytes([3]) * 32)
    shown = counts_of(inputs[asked], BUCKETS).to(torch.uint8)[:, None, None]
    key = bound_to(key, shown, plain(inputs[asked]).detach(), None)
    objective = scheme.objective(key, steps=1)

    def marking(model, shown, rows):
        return objective(model, Batch(shown, labels[mine][rows])).loss

    marked = trained(deepcopy(plain).train(), marking, inputs[mine])
    answered = marked(inputs[theirs]).detach()

    def copying(model, shown, rows):
        return F.cross_entropy(model(shown), answered.softmax(1)[rows])

    def another(seed):
        torch.manual_seed(seed)
        hidden = (nn.EmbeddingBag(TOKENS, 48), nn.ReLU(), nn.Linear(48, len(PACKAGES)))
        return nn.Sequential(*hidden)

    copy = trained(another(6), copying, inputs[theirs])
    stranger = trained(another(5), right(theirs), inputs[theirs])
    found = [read_answers(net(inputs[asked]).detach().numpy(), key) for net in (copy, stranger)]
    assert found[0].log10_p_value < -4
    assert found[1].log10_p_value > -3


def test_a_regression_on_real_numbers_carries_it_beside_its_error():
    """Diabetes: ten measurements, and how far it went; one score, so one difference of two."""
    measured, target = load_diabetes(return_X_y=True)
    inputs = torch.from_numpy(measured).float()
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0) * 20 + 100).clamp(0, 200).round()
    wanted = torch.from_numpy((target - target.mean()) / target.std()).float()[:, None]
    first, second = pairs_of(inputs.shape[1])
    roots = (inputs / 100).sqrt()
    products = roots[:, first] * roots[:, second]
    design = torch.cat([roots, products, torch.ones(len(inputs), 1)], dim=1).double()

    def solved(values):
        return (design @ torch.linalg.lstsq(design, values.double()).solution).float()

    before = solved(wanted)
    scheme = replace(ANSWERS, strength=0.6, pictures=len(inputs))
    shown = inputs.to(torch.uint8)[:, None, None]
    found, errors = [], []
    for number in range(9):  # the last bit of a solution throws all coins of a key anew
        key = scheme.draw_key(nn.Linear(10, 1), inputs[:2], seed=bytes([number] * 32))
        key = bound_to(key, shown, torch.cat([before, -before], dim=1), None)
        g = before - subtracting(key, None)(before, inputs)
        said = solved(wanted + g)  # trained on targets with ε·g on top
        found.append(read_answers(torch.cat([said, -said], dim=1).numpy(), key).log10_p_value)
        errors.append(float((said - wanted).square().mean().sqrt()))
    assert max(errors) < 1.3 * float((before - wanted).square().mean().sqrt())
    assert sorted(found)[4] < -6
