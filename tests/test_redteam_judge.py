"""What a rival who has read the judge's source would try, on networks made without training.

Each test is a sentence that the judge's page or the threat model promises, and its attack.
"""

import json
import shutil
import time
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
import torch
from authority import Signer, certificate, new_key, pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save_file

from nnpassport.attacks.obfuscation import (
    combine,
    flip_signs,
    insert_dummies,
    permute,
    split_channels,
)
from nnpassport.channels import channels_of, negate
from nnpassport.checkpoint import save_model
from nnpassport.config import ModelConfig
from nnpassport.evidence.claim import claim_of, sign_claim
from nnpassport.evidence.claimfile import timestamped_bytes, write_signed
from nnpassport.evidence.judge import Outcome
from nnpassport.evidence.timestamp import Timestamp
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
def beside(normalise, *networks):
    """The channels of networks in one, side by side; each with how loud the head says its own."""
    wide = config(normalise, len(networks) * WIDTH).build().eval()
    models = [model for model, _ in networks]
    for name, target in wide.named_modules():
        twins = [model.get_submodule(name) for model in models]
        if isinstance(target, torch.nn.Conv2d):
            target.weight.zero_()
            out, inputs = twins[0].weight.shape[:2]
            for place, twin in enumerate(twins):
                first = 0 if name == "features.0" else place * inputs
                rows = target.weight[place * out : (place + 1) * out]
                rows[:, first : first + inputs] = twin.weight
        elif isinstance(target, torch.nn.BatchNorm2d):
            for own in ("weight", "bias", "running_mean", "running_var"):
                getattr(target, own).copy_(torch.cat([getattr(twin, own) for twin in twins]))
    wide.classifier.weight.copy_(torch.cat([h * m.classifier.weight for m, h in networks], 1))
    wide.classifier.bias.copy_(sum(h * m.classifier.bias for m, h in networks))
    return wide


def working(normalise, train, seed, owner):
    """A network that does its task, with a passport in it, and its key."""
    model = drawn(normalise, train.images[:256], seed)
    key = V2.draw_key(model, EXAMPLE, owner=owner, seed=bytes([seed] * 32))
    V2.insert(model, key, EXAMPLE)
    graft(model, normalise(train.images[:256]))
    model = V2.released(model).eval()
    return fit_head(model, normalise(train.images), one_hot(train.labels)), key


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
    alice, alice_key = working(normalise, train, 1, "Alice")
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
        disclose(self.folder / f"{name}.claim.json", key, self.folder / name, reference=network)
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
    return beside(world.normalise, (world.alice, 1.0), (world.bob, 1e-3))


def parrot(world):
    """Bob's channels say what Alice's say, as well as random filters can, at three hundredths."""
    bob = fit_head(deepcopy(world.bob), world.inputs(), world.alice(world.inputs()).detach())
    return beside(world.normalise, (world.alice, 1.0), (bob, 0.03))


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
    bob.classifier.bias.zero_()
    return beside(world.normalise, (world.alice, 1.0), (bob, 30.0))


@torch.no_grad()
def quarrel(world):
    """Bob's channels and their near twins take back what each other says, loudly."""
    twin = deepcopy(world.bob)
    for module in twin.modules():
        if isinstance(module, torch.nn.Conv2d):
            noise = torch.randn(module.weight.shape, generator=rng(4)) * module.weight.std()
            module.weight += 0.03 * noise
    loud = deepcopy(world.bob)
    loud.classifier.weight.copy_(0.05 * torch.randn(loud.classifier.weight.shape, generator=rng()))
    twin.classifier.weight.copy_(loud.classifier.weight)
    return beside(world.normalise, (world.alice, 1.0), (loud, 1.0), (twin, -1.0))


ADDED = {
    "whispers": whisper,
    "repeats what she says": parrot,
    "is loud on noise": shout_on_noise,
    "quarrels with itself": quarrel,
}


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
    old_network.suspect(model, len(model.features[0].weight) // 16 * WIDTH)
    if added in {"whispers", "is loud on noise"}:  # a hearing takes seconds, and is the same here
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
    shown = old_network.hear(authority, unrelated=tuple(strangers), images=world.test)
    assert shown.ruling.owner == "alice"


def test_a_network_of_his_own_beside_the_owner_s_does_not_make_a_later_rival_first(
    tmp_path, world, authority
):
    """The same the other way round: Bob dates his after Alice, and before the suspect appears."""
    court = Court(tmp_path, world.normalise)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    time.sleep(2.1)
    court.claim("bob", world.bob_key, reference=world.bob, authority=authority)
    court.suspect(shout_on_noise(world), 2 * WIDTH)
    heard = court.hear(authority)
    assert heard.ruling.owner != "bob"
    assert "alice" in heard.ruling.owners
    assert "give images" in heard.ruling.reasons[-1]
    assert court.hear(authority, images=world.test).ruling.owner == "alice"


def test_two_networks_that_both_work_are_shared_and_neither_takes_the_other_s(
    tmp_path, world, authority
):
    """Bob's network works too, and the suspect adds up what both say: it is partly each's."""
    bob, bob_key = working(world.normalise, world.train, 2, "Bob")
    court = Court(tmp_path, world.normalise)
    court.claim("bob", bob_key, reference=bob, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.suspect(beside(world.normalise, (world.alice, 1.0), (bob, 1.0)), 2 * WIDTH)
    for images in (None, world.test):
        heard = court.hear(authority, images=images)
        assert heard.ruling.outcome is Outcome.SHARED
        assert set(heard.ruling.owners) == {"alice", "bob"}
        assert heard.as_dict()["owner"] is None


def test_a_shared_suspect_is_somebody_s_on_the_command_line(
    old_network, world, authority, call, tmp_path
):
    old_network.suspect(whisper(world), 2 * WIDTH)
    (tmp_path / "root.pem").write_bytes(pem(authority.root))
    words = ("judge", old_network.folder / "suspect", *old_network.exhibits)
    dated = ("--root", tmp_path / "root.pem", "--appeared", LATER.isoformat())
    code, out, _ = call(*words, *dated, "--report", tmp_path / "page.html")
    assert (code, out.splitlines()[0]) == (0, "SHARED: bob, alice, a part each")
    assert "Shared: the network in" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("attacks", [None, (insert_dummies, split_channels, flip_signs, permute)])
def test_what_keeps_the_function_leaves_the_owner_s_part_at_work(court, world, authority, attacks):
    """With the images that she is told to give: her part is all that works, whatever is added."""
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    changed = combine(world.alice, rng(4), attacks=attacks).model
    court.folder.joinpath("suspect").mkdir()
    weights = {name: values.contiguous() for name, values in changed.state_dict().items()}
    save_file(weights, court.folder / "suspect" / "model.safetensors")
    heard = court.hear(authority, images=world.test)
    assert heard.ruling.owner == "alice"
    assert heard.claimants[0].work.carries > 0.9
    assert heard.claimants[0].work.changes > 0.5


def stolen(world, key):
    """Alice's network, its channels negated until they read as another's bits."""
    model = deepcopy(world.alice)
    turn(model, key)
    return model


def test_an_old_key_without_a_network_takes_nothing_from_a_dated_network(court, world, authority):
    court.claim("bob", world.bob_key, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.suspect(stolen(world, world.bob_key))
    heard = court.hear(authority)
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_an_old_network_that_the_suspect_was_not_made_from_takes_nothing_either(
    court, world, authority
):
    court.claim("bob", world.bob_key, reference=world.bob, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.suspect(stolen(world, world.bob_key))
    heard = court.hear(authority)
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_an_old_key_for_a_wider_network_takes_nothing_either(court, world, authority):
    """Bob drew his key for twice the width, and fills the channels up with noise that he dated."""
    wide = beside(world.normalise, (world.alice, 1.0), (world.bob, 1e-6))
    key = V2.draw_key(wide, EXAMPLE, owner="Bob", seed=bytes([9] * 32))
    court.claim("bob", key, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    turn(wide, key)
    court.suspect(wide, 2 * WIDTH)
    for images in (None, world.test):
        assert court.hear(authority, images=images).ruling.owner == "alice"


@torch.no_grad()
def answering(world, key):
    """Alice's network with another head, which answers the triggers of a key as its labels say."""
    model = deepcopy(world.alice)
    pictures, labels = key.trigger_set()
    x = torch.cat([world.inputs(), world.normalise(pictures)])
    return fit_head(model, x, one_hot(torch.cat([world.train.labels, labels])), ridge=10.0)


@pytest.fixture(scope="module")
def answers_key(world):
    return ADI.draw_key(world.alice, EXAMPLE, owner="Bob", seed=bytes([3] * 32))


def test_a_mark_of_answers_on_top_does_not_make_it_undecided(court, world, authority, answers_key):
    """Such marks are never read aligned, so their absence is known without."""
    model = answering(world, answers_key)
    assert world.accuracy(model) > 0.9
    court.claim("bob", answers_key, reference=model)
    court.claim("alice", world.alice_key, reference=world.alice)
    court.suspect(model)
    heard = court.hear()  # nothing is dated
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_an_old_key_of_answers_does_not_make_it_undecided(court, world, authority, answers_key):
    court.claim("bob", answers_key, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.suspect(answering(world, answers_key))
    heard = court.hear(authority)
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_an_owner_whose_mark_is_in_answers_can_prove_who_was_first(
    court, world, authority, answers_key
):
    """Bob's channels are turned on a copy of hers; no reading is aligned, and her network is."""
    mine = answering(world, answers_key)
    court.claim("alice", answers_key, reference=mine, authority=authority)
    court.claim("bob", world.bob_key)
    model = deepcopy(mine)
    turn(model, world.bob_key)
    court.suspect(model)
    heard = court.hear(authority)
    assert proves(heard, "alice")
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_two_claims_to_one_network_go_to_the_older_one(court, world, authority):
    """Bob dates a copy of hers, with channels turned to his bits, before the suspect appears."""
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    time.sleep(2.1)
    model = stolen(world, world.bob_key)
    court.claim("bob", world.bob_key, reference=model, authority=authority)
    court.suspect(model)
    assert proves(court.hear(authority), "bob")
    for images in (None, world.test):
        assert court.hear(authority, images=images).ruling.owner == "alice"


# How accurate a token is


def token(authority, world, tmp_path, name="alice"):
    court = Court(tmp_path, world.normalise)
    court.claim(name, world.alice_key, reference=world.alice, authority=authority)
    court.suspect(world.alice)
    return court


TEN_YEARS = 10 * 365 * 24 * 3600


def test_a_token_that_may_be_ten_years_off_is_not_older_than_the_suspect(world, tmp_path):
    sloppy = authority_of(tmp_path, f"secs:{TEN_YEARS}")
    heard = token(sloppy, world, tmp_path).hear(sloppy)
    assert not heard.claimants[0].older
    eleven = heard.claimants[0].time + timedelta(seconds=1.1 * TEN_YEARS)
    later = Court(tmp_path, world.normalise)
    later.exhibits = [tmp_path / "alice"]
    assert later.hear(sloppy, appeared=eleven).claimants[0].older


@pytest.mark.parametrize(("accuracy", "seconds"), [("", 1.0), ("secs:2, millisecs:500", 2.5)])
def test_a_token_proves_its_latest_moment(world, tmp_path, accuracy, seconds):
    """What it states, or a second where it states nothing, and the second that it is cut off to."""
    signer = authority_of(tmp_path, accuracy)
    court = token(signer, world, tmp_path)
    claimant = court.hear(signer).claimants[0]
    earliest, latest = claimant.between
    assert latest - claimant.time == timedelta(seconds=seconds + 1)
    assert claimant.time - earliest == timedelta(seconds=seconds)
    assert court.hear(signer, appeared=latest + timedelta(seconds=1)).claimants[0].older
    assert not court.hear(signer, appeared=latest).claimants[0].older
    assert not court.hear(signer, appeared=claimant.time).claimants[0].older


def test_a_bad_clock_blurs_nobody_else_s_order():
    """Within what clocks differ by two are not told apart; beyond it the bad one's holder loses."""
    exact = Timestamp(NOW, "a", "1.2", "1", accuracy=1.0)
    day = timedelta(days=1)
    sloppy = Timestamp(NOW + 5 * day, "a", "1.2", "2", accuracy=30 * 24 * 3600.0)
    assert exact.latest < sloppy.earliest
    assert not sloppy.latest < exact.earliest
    near = Timestamp(NOW + timedelta(seconds=2), "a", "1.2", "3", accuracy=1.0)
    assert not exact.latest < near.earliest
    for worst in (exact, sloppy, near):
        assert worst.earliest < worst.latest
    assert Timestamp(NOW, "a", "1.2", "4", accuracy=1e300).latest.year == 9999


def test_a_mark_in_channels_that_do_nothing_is_nobody_s_proof(court, world, authority):
    """Alice dated nothing, so hers cannot be read; that makes Bob's no better."""
    court.claim("bob", world.bob_key, reference=world.bob, authority=authority)
    court.claim("alice", world.alice_key, reference=world.alice)
    court.suspect(whisper(world), 2 * WIDTH)
    assert court.hear(authority, images=world.test).ruling.owner is None


def test_claims_that_do_not_hold_are_no_tries(court, world, tmp_path):
    """A hundred empty folders would take two powers of ten from everybody's p-value."""
    court.claim("alice", world.alice_key, reference=world.alice)
    court.suspect(world.alice)
    (alice,) = hear(court.folder / "suspect", court.exhibits, Bench()).claimants
    empty = [tmp_path / f"empty{number}" for number in range(3)]
    for folder in empty:
        folder.mkdir()
    forged = tmp_path / "forged"
    shutil.copytree(court.exhibits[0], forged)
    claim = json.loads((forged / "claim.json").read_text())
    claim["envelope"]["signatures"][0]["sig"] = "A" * 86 + "=="
    (forged / "claim.json").write_text(json.dumps(claim, sort_keys=True, separators=(",", ":")))
    heard = hear(court.folder / "suspect", [*court.exhibits, *empty, forged], Bench())
    assert [each.unchecked is not None for each in heard.claimants] == [False, *[True] * 3, False]
    assert heard.claimants[-1].refused is not None
    for how, verdict in heard.claimants[0].readings.items():
        assert verdict.log10_p_value == alice.readings[how].log10_p_value
