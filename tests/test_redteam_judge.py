"""What a rival who has read the judge's source would try, on networks made without training.

Each test is a sentence that the judge's page or the threat model promises, and its attack.
"""

import shutil
import time
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
import torch
from authority import Signer, certificate, new_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nnpassport.channels import channels_of, negate
from nnpassport.checkpoint import save_model
from nnpassport.config import ModelConfig
from nnpassport.evidence.claim import claim_of, sign_claim
from nnpassport.evidence.claimfile import timestamped_bytes, write_signed
from nnpassport.evidence.judge import Outcome
from nnpassport.functional import read_bits
from nnpassport.hearing import Bench, disclose, hear
from nnpassport.schemes.adi import ADI
from nnpassport.schemes.graft import graft
from nnpassport.schemes.passport import V2
from nnpassport.schemes.signature import secrets_of
from nnpassport.weights import tensors_digest

EXAMPLE = torch.zeros(2, 1, 32, 32)
NOW = datetime.now(UTC)
LATER = NOW + timedelta(days=1)
SIGNING = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([ord(name[0])] * 32))
    for name in ("alice", "bob", "carol")
}
WIDTH = 0.25


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def config(normalise, width=WIDTH):
    return ModelConfig(
        architecture="alexnet",
        arguments={"classes": 10, "norm": "batch", "width": width, "channels": 1},
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=tuple(normalise.mean),
        std=tuple(normalise.std),
    )


@torch.no_grad()
def turn(model, key):
    """Negate channels, filters and scales together, until the network reads as the key's bits."""
    producers = {p.layer: p for axis in channels_of(model) for p in axis.producers}
    for name, secret in secrets_of(key).items():
        right = read_bits(model.get_submodule(name).weight, secret.mean_patch) == secret.signs
        negate(model, producers[name], torch.where(right, 1.0, -1.0))
    assert V2.verify(model.state_dict(), key).match_rate == 1


@torch.no_grad()
def drawn(normalise, images, seed, width=WIDTH):
    """A network with random filters and the statistics of these images; its head is not fitted."""
    torch.manual_seed(seed)
    model = config(normalise, width).build()
    norms = [each for each in model.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    model.train()(normalise(images))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@torch.no_grad()
def hidden(model, x):
    return model.pool(model.features(x)).flatten(1)


@torch.no_grad()
def fit_head(model, x, wanted, ridge=1.0):
    """The head that says `wanted` of these inputs, in closed form."""
    rows = hidden(model, x).double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.double)], 1)
    gram = rows.T @ rows + ridge * torch.eye(rows.shape[1], dtype=torch.double)
    solved = torch.linalg.solve(gram, rows.T @ wanted.double()).T.float()
    model.classifier.weight.copy_(solved[:, :-1])
    model.classifier.bias.copy_(solved[:, -1])
    return model


def one_hot(labels):
    return 10 * torch.nn.functional.one_hot(labels, 10).double() - 1


@torch.no_grad()
def beside(one, other, normalise, *, heard):
    """The channels of two networks in one, twice as wide; of the second the head says `heard`."""
    wide = config(normalise, 2 * WIDTH).build().eval()
    parts = dict(wide.named_modules())
    for name, module in one.named_modules():
        twin, target = other.get_submodule(name), parts[name]
        if isinstance(module, torch.nn.Conv2d):
            out, inputs = module.weight.shape[:2]
            target.weight.zero_()
            target.weight[:out, :inputs] = module.weight
            target.weight[out:, -inputs:] = twin.weight
        elif isinstance(module, torch.nn.BatchNorm2d):
            for own in ("weight", "bias", "running_mean", "running_var"):
                getattr(target, own).copy_(torch.cat([getattr(module, own), getattr(twin, own)]))
    head = [one.classifier.weight, heard * other.classifier.weight]
    wide.classifier.weight.copy_(torch.cat(head, 1))
    wide.classifier.bias.copy_(one.classifier.bias + heard * other.classifier.bias)
    return wide


class World(NamedTuple):
    """Alice's network, which works, and Bob's, which does nothing; the keys that they read as."""

    train: object
    test: object
    normalise: object
    alice: torch.nn.Module
    alice_key: object
    bob: torch.nn.Module
    bob_key: object

    def accuracy(self, model):
        with torch.no_grad():
            answers = model(self.normalise(self.test.images)).argmax(1)
        return float((answers == self.test.labels).float().mean())

    def inputs(self):
        return self.normalise(self.train.images)


@pytest.fixture(scope="module")
def world(digits):
    train, test, normalise = digits
    train = train.resized(32).subset(torch.arange(900))
    test = test.resized(32).subset(torch.arange(250))
    alice = drawn(normalise, train.images[:256], 1)
    alice_key = V2.draw_key(alice, EXAMPLE, owner="Alice", seed=bytes([1] * 32))
    V2.insert(alice, alice_key, EXAMPLE)
    graft(alice, normalise(train.images[:256]))
    alice = V2.released(alice).eval()
    fit_head(alice, normalise(train.images), one_hot(train.labels))
    bob = drawn(normalise, train.images[:256], 2)
    bob_key = V2.draw_key(bob, EXAMPLE, owner="Bob", seed=bytes([2] * 32))
    turn(bob, bob_key)
    return World(train, test, normalise, alice, alice_key, bob, bob_key)


def authority_of(folder, accuracy):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary, which plays the timestamp authority")
    root_key, key = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    signer = certificate("An Authority", key, (root, root_key))
    made = Signer(folder / "tsa", key, signer, accuracy=accuracy)
    made.root = root
    return made


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return authority_of(tmp_path_factory.mktemp("authority"), "millisecs:1")


def stamped(signed, authority):
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    query = TimestampRequestBuilder(timestamped_bytes(signed.envelope), HashAlgorithm.SHA256)
    return signed._replace(response=authority.answer(query.build().as_bytes()))


class Court:
    """A folder with a suspect and exhibits, and the hearing of them."""

    def __init__(self, folder, normalise):
        self.folder, self.normalise, self.exhibits = folder, normalise, []

    def suspect(self, model, width=WIDTH):
        save_model(self.folder / "suspect", model, config(self.normalise, width))
        return self

    def claim(self, name, key, *, reference=None, authority=None, width=WIDTH):
        digest = None if reference is None else tensors_digest(reference.state_dict())
        signed = sign_claim(
            claim_of(key, SIGNING[name].public_key(), reference=digest), SIGNING[name]
        )
        signed = signed if authority is None else stamped(signed, authority)
        write_signed(signed, self.folder / f"{name}.claim.json")
        network = None
        if reference is not None:
            network = self.folder / f"{name}-net"
            save_model(network, reference, config(self.normalise, width))
        disclose(
            self.folder / f"{name}.claim.json", key, self.folder / name, reference=network
        )
        self.exhibits.append(self.folder / name)
        return self

    def hear(self, authority=None, **bench):
        if authority is not None:
            bench = {"roots": [authority.root], "appeared": LATER, **bench}
        return hear(self.folder / "suspect", self.exhibits, Bench(**bench))


@pytest.fixture
def court(tmp_path, world):
    return Court(tmp_path, world.normalise)


@pytest.fixture(scope="module")
def old_network(tmp_path_factory, world, authority):
    """Bob dated his network, which does nothing, and Alice hers, which works, later."""
    court = Court(tmp_path_factory.mktemp("court"), world.normalise)
    court.claim("bob", world.bob_key, reference=world.bob, authority=authority)
    time.sleep(2.1)  # tokens count in whole seconds
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    return court


def proves(heard, name):
    (claimant,) = (each for each in heard.claimants if each.name == name)
    return claimant.proves


def whisper(world):
    """What nobody hears: Bob's channels at a thousandth."""
    return beside(world.alice, world.bob, world.normalise, heard=1e-3)


def parrot(world):
    """Bob's channels say what Alice's say, as well as random filters can, at three hundredths."""
    bob = fit_head(deepcopy(world.bob), world.inputs(), world.alice(world.inputs()).detach())
    return beside(world.alice, bob, world.normalise, heard=0.03)


@torch.no_grad()
def shout_on_noise(world):
    """Bob's channels are silent on images of the task, and on noise louder than all of Alice's."""
    bob = deepcopy(world.bob)
    x = world.normalise(torch.cat([world.train.images, world.test.images]))
    last = bob.features[15]
    before = {}
    bob.features[16].register_forward_pre_hook(lambda _, seen: before.update(z=seen[0].clone()))
    hidden(bob, x)
    highest = before["z"].amax((0, 2, 3))
    bob.features[16]._forward_pre_hooks.clear()
    last.bias -= highest + 1e-3
    bob.classifier.weight.copy_(torch.randn(bob.classifier.weight.shape, generator=rng()))
    return beside(world.alice, bob, world.normalise, heard=30.0)


ADDED = {"whispers": whisper, "repeats what she says": parrot, "is loud on noise": shout_on_noise}


def test_the_world_is_as_the_cases_need_it(world):
    assert world.accuracy(world.alice) > 0.9
    assert world.accuracy(world.bob) < 0.3


@pytest.mark.parametrize("added", ADDED)
def test_somebody_else_s_old_network_beside_the_owner_s_takes_nothing_from_her(
    old_network, world, authority, added
):
    """Its holder is not the owner; the judge's images show that his part does nothing."""
    model = ADDED[added](world)
    assert world.accuracy(model) > world.accuracy(world.alice) - 0.01
    old_network.suspect(model, 2 * WIDTH)
    heard = old_network.hear(authority)
    assert proves(heard, "bob")  # his channels are there, for whoever counts them
    assert proves(heard, "alice")
    assert heard.ruling.owner != "bob"
    assert "alice" in heard.ruling.owners
    shown = old_network.hear(authority, images=world.test)
    assert shown.ruling.owner == "alice"
    assert shown.ruling.outcome is Outcome.OWNER


def test_somebody_else_s_old_network_is_not_the_owner_s_with_unrelated_networks_either(
    old_network, world, authority, tmp_path
):
    strangers = []
    for seed in (5, 6):
        strangers.append(tmp_path / str(seed))
        other = drawn(world.normalise, world.train.images[:256], seed, 2 * WIDTH)
        save_model(strangers[-1], other, config(world.normalise, 2 * WIDTH))
    old_network.suspect(whisper(world), 2 * WIDTH)
    heard = old_network.hear(authority, unrelated=tuple(strangers))
    assert heard.ruling.owner != "bob"
    assert "alice" in heard.ruling.owners
    shown = old_network.hear(authority, unrelated=tuple(strangers), images=world.test)
    assert shown.ruling.owner == "alice"
