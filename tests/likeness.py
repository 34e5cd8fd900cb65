"""Pairs of networks of which is known how they came about, and what is to be found of them.

`made(n)` is pair n, the same everywhere: what an owner dated, what a rival dated, who knows nothing
of the owner's, and a suspect that was made from either, from both, or from none. `outcome` asks
the judge's machinery whose network the suspect was made from. Nothing is trained: filters are
random, and the last layer is solved on handwritten digits.
"""

import functools
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from random import Random
from typing import NamedTuple

import torch
from constructed import settle
from rearranged import take
from sklearn.datasets import load_digits
from torch import nn

from nnpassport.alignment.channels import width
from nnpassport.alignment.null import of_its_own
from nnpassport.attacks.obfuscation import flip_signs, insert_dummies, permute, rescale
from nnpassport.attacks.perturbation import add_noise, prune_layerwise
from nnpassport.claims.rules import ALIGNED, Claimant, Work, rule
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding.network.channels import network_of
from nnpassport.embedding.network.tensors import ArraysOf
from nnpassport.embedding.work import work_of
from nnpassport.files.config import ModelConfig
from nnpassport.scheme import Verdict
from nnpassport.verification.relation import relation

SIDE, EACH, STOCK = 32, 0.25, 12
RIDGE = 1.0
HOME = 0.5
"""Accuracy from which on a suspect is at home on the images."""
LOUD = (1e-3, 1e-2, 3e-2, 0.1)
DAY = datetime(2026, 1, 1, tzinfo=UTC)
PROVED = Verdict("s", 100, 100, -200.0, -30.0)
KINDS = ("stranger", "beside", "derived", "derived and beside")


class Data(NamedTuple):
    """Digits as the networks take them: to solve the last layer with, and to judge by."""

    train: torch.Tensor
    labels: torch.Tensor
    images: ImageSet
    normalise: Normalisation


class Pair(NamedTuple):
    """A suspect, what the two have dated, and what by construction is true of it.

    Attributes:
        kind: one of `KINDS`, which is what is counted.
        owned: which of the stock the owner has dated.
        rivals: which the rival has.
        done: what was done, in words, in order.
        holds_owner: whether the suspect was made from the owner's network.
        rival: what the rival's channels do in the suspect, or None where they are not there.
        accuracy: of the suspect, in [0, 1].
    """

    kind: str
    done: tuple[str, ...]
    suspect: nn.Module
    owned: int
    rivals: int
    holds_owner: bool
    rival: Work | None
    accuracy: float


@functools.cache
def data() -> Data:
    """The digits, resized to what the networks take."""
    table = load_digits()
    pixels = torch.from_numpy(table.images / 16 * 255).round().to(torch.uint8)[:, None]
    found = ImageSet(pixels, torch.from_numpy(table.target).long(), tuple("0123456789"), "digits")
    train, rest = found.resized(SIDE).split(0.3, seed=0)
    normalise = Normalisation.measured(train)
    inputs = normalise(train.images[:600])
    return Data(inputs, train.labels[:600], rest.subset(torch.arange(128)), normalise)


def config(networks: int = 1) -> ModelConfig:
    """Of a network with so many times the channels."""
    normalise = data().normalise
    return ModelConfig(
        architecture="alexnet",
        arguments={"classes": 10, "norm": "batch", "width": networks * EACH, "channels": 1},
        classes=tuple("0123456789"),
        input_size=(1, SIDE, SIDE),
        mean=tuple(normalise.mean),
        std=tuple(normalise.std),
    )


def fitted(model: nn.Module, wanted: torch.Tensor) -> nn.Module:
    """The network, its last layer solved for what it is to say of the training images."""
    with torch.no_grad():
        settle(model, data().train)
        rows = model.pool(model.features(data().train)).flatten(1).double()
        rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
        gram = rows.T @ rows + RIDGE * torch.eye(rows.shape[1]).double()
        solved = torch.linalg.solve(gram, rows.T @ wanted.double()).T.float()
        model.classifier.weight.copy_(solved[:, :-1])
        model.classifier.bias.copy_(solved[:, -1])
    return model.eval()


def right() -> torch.Tensor:
    """What a network is to say of the training images."""
    return 10 * torch.nn.functional.one_hot(data().labels, 10).double() - 1


@functools.cache
def working(seed: int) -> nn.Module:
    """A network of its own start that does the task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return fitted(config().build(), right())


@torch.no_grad()
def beside(one: nn.Module, other: nn.Module, loud: float) -> nn.Module:
    """The channels of two networks side by side; the head hears the other's as loud as that."""
    wide = config(2).build().eval()
    for name, target in wide.named_modules():
        twins = [each.get_submodule(name) for each in (one, other)]
        if isinstance(target, nn.Conv2d):
            target.weight.zero_()
            out, inputs = twins[0].weight.shape[:2]
            for place, twin in enumerate(twins):
                first = 0 if name == "features.0" else place * inputs
                target.weight[place * out : (place + 1) * out, first : first + inputs] = twin.weight
        elif isinstance(target, nn.BatchNorm2d):
            for own in ("weight", "bias", "running_mean", "running_var"):
                getattr(target, own).copy_(torch.cat([getattr(twin, own) for twin in twins]))
    heads = one.classifier, other.classifier
    wide.classifier.weight.copy_(torch.cat([heads[0].weight, loud * heads[1].weight], 1))
    wide.classifier.bias.copy_(heads[0].bias + loud * heads[1].bias)
    return wide


@torch.no_grad()
def _kept(model: nn.Module, rng: torch.Generator, share: float) -> nn.Module:
    """A copy with this share of the channels of each layer, its last layer solved again."""
    model = deepcopy(model)
    for axis in network_of(model).axes:
        count = width(network_of(model), axis)
        order = torch.randperm(count, generator=rng)[: max(1, round(share * count))]
        take(model, axis, order.sort().values)
    return fitted(model, right())


def _changed(
    rng: Random, model: nn.Module, *, exactly: bool = False
) -> tuple[nn.Module, list[str]]:
    """What is done to a network to make another of it: up to three things, mild and less so.

    Or `exactly` such as leave its answers as they are.
    """
    done = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        draw = torch.Generator().manual_seed(rng.getrandbits(60))
        strength = rng.choice([0.02, 0.1, 0.2, 0.3])
        share = rng.choice([0.1, 0.3, 0.5])
        dummies = functools.partial(insert_dummies, share=rng.choice([0.1, 0.5]))
        exact = [
            ("permuted", permute),
            ("negated", flip_signs),
            ("rescaled", rescale),
            ("dummies", dummies),
        ]
        others = [
            (f"noise {strength}", lambda m, d, s=strength: add_noise(m, d, strength=s)),
            (f"pruned {share}", lambda m, _, s=share: prune_layerwise(m, share=s)),
        ]
        name, change = rng.choice(exact if exactly else [*exact, *others])
        model = change(model, draw).model
        done.append(name)
    return model, done


def _voice(rng: Random, owner: nn.Module, number: int) -> tuple[nn.Module, str]:
    """The rival's network, as it is put beside the owner's: a copy with another last layer."""
    rival = deepcopy(working(number))
    what = rng.choice(["says the same", "says anything", "repeats her", "says nothing"])
    head = rival.classifier
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.getrandbits(60))
        if what == "says anything":
            head.weight.copy_(torch.randn_like(head.weight) * head.weight.std())
        elif what == "repeats her":
            fitted(rival, owner(data().train))
        elif what == "says nothing":
            head.weight.zero_()
            head.bias.zero_()
    return rival, what


@torch.no_grad()
def _work(whole: nn.Module, part: nn.Module, rest: nn.Module, loud: float) -> Work:
    """What a part does that is heard as loud as that beside the rest, from the networks alone."""
    x = data().normalise(data().images.images)
    said, only, without = whole(x).double(), loud * part(x).double(), rest(x)
    centred, alone = said - said.mean(0), only - only.mean(0)
    carries = 1 - (centred - alone).square().sum() / centred.square().sum()
    changed = said.argmax(1) != without.argmax(1)
    return Work(float(carries.clamp(0, 1)), float(changed.double().mean()), len(x))


def made(number: int) -> Pair:
    """Pair `number`."""
    rng = Random(f"likeness {number}")
    kind = rng.choice(KINDS)
    one, two, three = rng.sample(range(STOCK), 3)
    suspect, done, rival = deepcopy(working(one)), [], None
    if kind == "stranger":
        suspect = deepcopy(working(three))
    elif kind == "derived" and rng.random() < 0.25:
        share = rng.choice([0.8, 0.9])
        suspect = _kept(suspect, torch.Generator().manual_seed(rng.getrandbits(60)), share)
        done.append(f"kept {share}")
    if kind.endswith("beside"):
        if kind.startswith("derived"):
            suspect, done = _changed_alike(rng, suspect)
        loud = rng.choice(LOUD)
        voice, what = _voice(rng, suspect, two)
        whole = beside(suspect, voice, loud)
        rival = _work(whole, voice, suspect, loud)
        suspect, done = whole, [*done, f"beside, {what} at {loud}"]
    if kind != "beside":
        # Noise on both would make either part hear the other, and do what it did not do.
        suspect, more = _changed(rng, suspect, exactly=rival is not None)
        done += more
    with torch.no_grad():
        x = data().normalise(data().images.images)
        accuracy = float((suspect(x).argmax(1) == data().images.labels).double().mean())
    return Pair(kind, tuple(done), suspect, one, two, kind != "stranger", rival, accuracy)


def _changed_alike(rng: Random, model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The same, of as many channels."""
    while True:
        changed, done = _changed(rng, model)
        if all(
            each.weight.shape == other.weight.shape
            for each, other in zip(changed.features, model.features, strict=True)
            if isinstance(each, nn.Conv2d)
        ):
            return changed, done


@functools.cache
def _akin(one: int, other: int) -> bool:
    """What is found of two networks of the stock; strangers all."""
    weights, reference = dict(ArraysOf(working(one).state_dict())), network_of(working(other))
    return relation(weights, reference, of_its_own(weights, reference)).akin


def _found(pair: Pair, whose: str) -> Claimant:
    """What is found of one of the two, who has dated a network: the rival before the owner."""
    mine, other = (pair.owned, pair.rivals) if whose == "owner" else (pair.rivals, pair.owned)
    weights, reference = dict(ArraysOf(pair.suspect.state_dict())), network_of(working(mine))
    relates = relation(weights, reference, of_its_own(weights, reference))
    x = data().normalise(data().images.images)
    name = "rival" if whose == "owner" else "owner"
    return Claimant(
        whose,
        time=DAY + timedelta(days=whose == "owner"),
        older=True,
        readings={ALIGNED: PROVED},
        related=relates.related,
        akin={name: _akin(other, mine)},
        work=work_of(relates, working(mine), x) if relates.related else None,
    )


def outcome(pair: Pair) -> tuple[str, str | None]:
    """Whose network the suspect is found to hold, and what is wrong with that, or None."""
    owner, rival = _found(pair, "owner"), _found(pair, "rival")
    hers, his = owner.in_suspect, rival.in_suspect
    held = {(True, True): "both", (True, False): "owner", (False, True): "rival"}
    ruling = rule([each for each in (owner, rival) if each.in_suspect])
    wrong = _wrong(pair, hers, his, ruling.owner)
    if wrong is not None:
        said = [f"{each.name} {each.work}" for each in (owner, rival)]
        wrong = f"{wrong}: {', '.join(pair.done)}; {'; '.join(said)}; rival really {pair.rival}"
    return held.get((hers, his), "neither"), wrong


def told(pair: Pair) -> str:
    """How the suspect came about, as it is counted."""
    said = {
        "stranger": "a stranger's, changed",
        "beside": "the owner's, the rival's channels beside it",
        "derived": "the owner's, changed",
        "derived and beside": "the owner's, the rival's beside it, changed",
    }[pair.kind]
    if pair.rival is not None:
        said += ", which do nothing" if pair.rival.idle else ", which do something"
    if pair.holds_owner and pair.accuracy <= HOME:
        said += "; it fails at its task"
    return said


def _wrong(pair: Pair, hers: bool, his: bool, owner: str | None) -> str | None:
    if hers and not pair.holds_owner:
        return "the owner's is found in a stranger's"
    if his and (pair.rival is None or pair.rival.idle):
        return "the rival's is found, which is not there or does nothing"
    if owner == "rival":
        return "the rival alone is the owner"
    if pair.holds_owner and not hers and pair.accuracy > HOME:
        return "the owner's is not found"
    return None
