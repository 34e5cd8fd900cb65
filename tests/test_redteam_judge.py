"""What a rival who has read the judge's source would try, on networks made without training.

Each test is a sentence that the judge's page or the threat model promises, and its attack.
"""

import json
import shutil
import time
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from authority import Signer, certificate, new_key, pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rearranged import negate
from safetensors.torch import save_file

from nnpassport.attacks.obfuscation import (
    combine,
    flip_signs,
    insert_dummies,
    permute,
    split_channels,
)
from nnpassport.claims.claim import claim_of, sign_claim
from nnpassport.claims.claimfile import timestamped_bytes, write_signed
from nnpassport.claims.rules import ALIGNED, Outcome
from nnpassport.claims.timestamp import Timestamp
from nnpassport.embedding.checkpoint import load_model, save_model
from nnpassport.embedding.network.channels import channels_of
from nnpassport.embedding.network.equations import read_bits
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.schemes.adi import ADI
from nnpassport.embedding.schemes.graft import graft
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.files.config import ModelConfig
from nnpassport.verification.hearing import REFERENCE, Bench, disclose, hear, read_exhibit

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
    key = V2.draw_key(model, EXAMPLE, owner=owner, seed=bytes([seed] * 32), passports="derived")
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

    @property
    def shown(self):
        """Images that the judge brings: each is run through some twenty networks in a hearing."""
        return self.test.subset(torch.arange(64))

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
    bob_key = V2.draw_key(bob, EXAMPLE, owner="Bob", seed=bytes([2] * 32), passports="derived")
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


def exhibit(folder, normalise, name, key, *, reference=None, authority=None, width=WIDTH):
    """What this claimant hands in, in a folder of his name."""
    digest = None if reference is None else tensors_digest(reference.state_dict())
    signed = sign_claim(claim_of(key, SIGNING[name].public_key(), reference=digest), SIGNING[name])
    signed = signed if authority is None else stamped(signed, authority)
    folder.mkdir(parents=True, exist_ok=True)
    write_signed(signed, folder / f"{name}.claim.json")
    network = None
    if reference is not None:
        network = folder / f"{name}-net"
        save_model(network, reference, config(normalise, width))
    disclose(folder / f"{name}.claim.json", key, folder / name, reference=network)
    return folder / name


class Court:
    """A folder with a suspect, and the hearing of who hands in exhibits.

    The judge brings unrelated networks; by default, because that takes a fourth of the time.
    """

    def __init__(self, folder, normalise, authority, unrelated=()):
        self.folder, self.normalise, self.authority = folder, normalise, authority
        self.unrelated = unrelated

    def suspect(self, model, width=WIDTH):
        save_model(self.folder / "suspect", model, config(self.normalise, width))
        return self

    def hear(self, *exhibits, **bench):
        dates = {"roots": [self.authority.root], "appeared": LATER}
        bench = {"unrelated": self.unrelated, **dates, **bench}
        return hear(self.folder / "suspect", exhibits, Bench(**bench))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, world):
    """A network that has nothing to do with anybody."""
    folder = tmp_path_factory.mktemp("stranger")
    model = drawn(world.normalise, world.train.images[:256], 5)
    save_model(folder, model, config(world.normalise))
    return folder


@pytest.fixture
def court(tmp_path, world, authority, stranger):
    return Court(tmp_path, world.normalise, authority, (stranger,))


class Exhibits(NamedTuple):
    """Folders: what was dated first and, seconds later, what was dated after all of that."""

    bob_first: Path
    bob_key_first: Path
    bob_wide_key_first: Path
    bob_answers_first: Path
    bob_works_first: Path
    alice_first: Path
    alice: Path
    bob: Path
    bob_stole: Path


@pytest.fixture(scope="module")
def dated(tmp_path_factory, world, authority, answers_key):
    """Tokens count in whole seconds, so the two moments are some apart."""
    folder = tmp_path_factory.mktemp("exhibits")

    def stamp(place, name, key, reference=None):
        given = {"reference": reference, "authority": authority}
        return exhibit(folder / place, world.normalise, name, key, **given)

    works, works_key = working(world.normalise, world.train, 2, "Bob")
    first = (
        stamp("1", "bob", world.bob_key, world.bob),
        stamp("2", "bob", world.bob_key),
        stamp("3", "bob", wide_key(wide(world))),
        stamp("4", "bob", answers_key),
        stamp("5", "bob", works_key, works),
        stamp("6", "alice", world.alice_key, world.alice),
    )
    time.sleep(2.1)
    return Exhibits(
        *first,
        stamp("7", "alice", world.alice_key, world.alice),
        stamp("8", "bob", world.bob_key, world.bob),
        stamp("9", "bob", world.bob_key, stolen(world, world.bob_key)),
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("added", ADDED)
def test_somebody_else_s_old_network_beside_the_owner_s_takes_nothing_from_her(
    court, world, dated, added
):
    """Its holder is not the owner; the judge's images show that his part does nothing.

    With an unrelated network, and with none: what is in the suspect is of its maker's choosing.
    """
    model = ADDED[added](world)
    assert world.accuracy(model) > world.accuracy(world.alice) - 0.01
    court.suspect(model, len(model.features[0].weight) // 16 * WIDTH)
    exhibits = (dated.bob_first, dated.alice)
    if added == "is loud on noise":  # without images; see below for what is not heard at all
        heard = court.hear(*exhibits)
        assert proves(heard, "bob")  # his channels are there, for whoever counts them
        assert proves(heard, "alice")
        assert heard.ruling.owner != "bob"
        assert "alice" in heard.ruling.owners
    shown = court.hear(*exhibits, images=world.shown, unrelated=())
    assert shown.ruling.owner == "alice"
    assert shown.ruling.outcome is Outcome.OWNER
    if added == "whispers":
        assert court.hear(*exhibits, images=world.shown).ruling.owner == "alice"


@pytest.mark.slow
def test_a_network_of_his_own_beside_the_owner_s_does_not_make_a_later_rival_first(
    court, world, dated
):
    """The same the other way round: Bob dates his after Alice, and before the suspect appears."""
    court.suspect(shout_on_noise(world), 2 * WIDTH)
    heard = court.hear(dated.alice_first, dated.bob)
    assert heard.ruling.owner != "bob"
    assert "alice" in heard.ruling.owners
    assert "give images" in heard.ruling.reasons[-1]
    shown = court.hear(dated.alice_first, dated.bob, images=world.shown)
    assert shown.ruling.owner == "alice"


@pytest.mark.slow
def test_two_networks_that_both_work_are_shared_and_neither_takes_the_other_s(court, world, dated):
    """Bob's network works too, and the suspect adds up what both say: it is partly each's."""
    bob = load_model(dated.bob_works_first / REFERENCE).model
    court.suspect(beside(world.normalise, (world.alice, 1.0), (bob, 1.0)), 2 * WIDTH)
    for images in (None, world.shown):
        heard = court.hear(dated.bob_works_first, dated.alice, images=images)
        assert heard.ruling.outcome is Outcome.SHARED
        assert set(heard.ruling.owners) == {"alice", "bob"}
        assert heard.as_dict()["owner"] is None


@pytest.mark.slow
def test_a_shared_suspect_is_somebody_s_on_the_command_line(court, world, dated, call, tmp_path):
    """Bob's channels whisper, and no images show it."""
    court.suspect(whisper(world), 2 * WIDTH)
    (tmp_path / "root.pem").write_bytes(pem(court.authority.root))
    words = ("judge", tmp_path / "suspect", dated.bob_first, dated.alice)
    said = ("--root", tmp_path / "root.pem", "--appeared", LATER.isoformat(), "--json")
    code, out, _ = call(*words, *said, "--report", tmp_path / "page.html")
    facts = json.loads(out)
    assert (code, facts["ruling"], facts["owners"]) == (0, "shared", ["bob", "alice"])
    assert all(each["proves"] for each in facts["claimants"])
    assert "Shared: the network in" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("attacks", [None, (insert_dummies, split_channels, flip_signs, permute)])
def test_what_keeps_the_function_leaves_the_owner_s_part_at_work(court, world, dated, attacks):
    """With the images that she is told to give: her part is all that works, whatever is added."""
    changed = combine(world.alice, rng(4), attacks=attacks).model
    court.folder.joinpath("suspect").mkdir()
    weights = {name: values.contiguous() for name, values in changed.state_dict().items()}
    save_file(weights, court.folder / "suspect" / "model.safetensors")
    heard = court.hear(dated.alice, images=world.shown)
    assert heard.ruling.owner == "alice"
    assert heard.claimants[0].work.carries > 0.9
    assert heard.claimants[0].work.changes > 0.5


def test_a_channel_that_says_nothing_hides_nothing(court, world, dated):
    """A scale and shift of zero: its size over itself is no number, and stops nothing."""
    model = deepcopy(world.alice)
    with torch.no_grad():
        for values in (model.features[1].weight, model.features[1].bias):
            values[0] = 0
        model.features[1].running_mean[0] = 0
    court.suspect(model)
    found = court.hear(dated.alice).claimants[0]
    assert found.readings[ALIGNED].accepted
    assert found.related


def stolen(world, key):
    """Alice's network, its channels negated until they read as another's bits."""
    model = deepcopy(world.alice)
    turn(model, key)
    return model


@pytest.mark.slow
def test_old_keys_and_strange_networks_take_nothing_from_a_dated_network(court, world, dated):
    """A key alone that Bob dated first, and with a network that the suspect was not made from."""
    court.suspect(stolen(world, world.bob_key))
    for bobs in (dated.bob_key_first, dated.bob_first):
        heard = court.hear(bobs, dated.alice)
        assert proves(heard, "bob")
        assert heard.ruling.owner == "alice"


def wide(world):
    """Alice's network, and beside it noise to fill up twice the width."""
    return beside(world.normalise, (world.alice, 1.0), (world.bob, 1e-6))


def wide_key(model):
    return V2.draw_key(model, EXAMPLE, owner="Bob", seed=bytes([9] * 32), passports="derived")


def test_an_old_key_for_a_wider_network_takes_nothing_either(court, world, dated):
    """Bob drew his key for twice the width, and fills the channels up with noise that he dated."""
    model = wide(world)
    turn(model, wide_key(model))
    court.suspect(model, 2 * WIDTH)
    for images in (None, world.shown):
        heard = court.hear(dated.bob_wide_key_first, dated.alice, images=images)
        assert heard.ruling.owner == "alice"


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


def test_a_mark_of_answers_on_top_does_not_make_it_undecided(court, world, answers_key):
    """Such marks are never read aligned, so their absence is known without."""
    model = answering(world, answers_key)
    assert world.accuracy(model) > 0.9
    court.suspect(model)
    bob = exhibit(court.folder, world.normalise, "bob", answers_key, reference=model)
    alice = exhibit(court.folder, world.normalise, "alice", world.alice_key, reference=world.alice)
    heard = court.hear(bob, alice)  # nothing is dated
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_an_old_key_of_answers_does_not_make_it_undecided(court, world, dated, answers_key):
    court.suspect(answering(world, answers_key))
    heard = court.hear(dated.bob_answers_first, dated.alice)
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


def test_an_owner_whose_mark_is_in_answers_can_prove_who_was_first(
    court, world, authority, answers_key
):
    """Bob's channels are turned on a copy of hers; no reading is aligned, and her network is."""
    mine = answering(world, answers_key)
    given = {"reference": mine, "authority": authority}
    alice = exhibit(court.folder, world.normalise, "alice", answers_key, **given)
    bob = exhibit(court.folder, world.normalise, "bob", world.bob_key)
    model = deepcopy(mine)
    turn(model, world.bob_key)
    court.suspect(model)
    heard = court.hear(alice, bob)
    assert proves(heard, "alice")
    assert proves(heard, "bob")
    assert heard.ruling.owner == "alice"


@pytest.mark.slow
def test_two_claims_to_one_network_go_to_the_older_one(court, world, dated):
    """Bob dates a copy of hers, with channels turned to his bits, before the suspect appears."""
    court.suspect(stolen(world, world.bob_key))
    for images in (None, world.shown):
        heard = court.hear(dated.alice_first, dated.bob_stole, images=images)
        if images is None:  # then nothing but dates speaks against him
            assert proves(heard, "bob")
        assert heard.ruling.owner == "alice"


# How accurate a token is


def older(folder, authority, appeared):
    """Whether what was handed in is proved to be older than what appeared then."""
    return read_exhibit(folder, Bench(roots=[authority.root], appeared=appeared)).standing.older


TEN_YEARS = 10 * 365 * 24 * 3600


def test_a_token_that_may_be_ten_years_off_is_not_older_than_the_suspect(world, tmp_path):
    sloppy = authority_of(tmp_path, f"secs:{TEN_YEARS}")
    alice = exhibit(tmp_path, world.normalise, "alice", world.alice_key, authority=sloppy)
    assert not older(alice, sloppy, LATER)
    assert older(alice, sloppy, NOW + timedelta(seconds=1.1 * TEN_YEARS))


@pytest.mark.parametrize(("accuracy", "seconds"), [("", 1.0), ("secs:2, millisecs:500", 2.5)])
def test_a_token_proves_its_latest_moment(world, tmp_path, accuracy, seconds):
    """What it states, or a second where it states nothing, and the second that it is cut off to."""
    signer = authority_of(tmp_path, accuracy)
    alice = exhibit(tmp_path, world.normalise, "alice", world.alice_key, authority=signer)
    court = Court(tmp_path, world.normalise, signer).suspect(world.alice)
    claimant = court.hear(alice).claimants[0]
    assert claimant.older
    earliest, latest = claimant.between
    assert latest - claimant.time == timedelta(seconds=seconds + 1)
    assert claimant.time - earliest == timedelta(seconds=seconds)
    assert older(alice, signer, latest + timedelta(seconds=1))
    assert not older(alice, signer, latest)
    assert not older(alice, signer, claimant.time)


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


def test_a_mark_in_channels_that_do_nothing_is_nobody_s_proof(court, world, dated):
    """Alice dated nothing, so hers cannot be read; that makes Bob's no better."""
    court.suspect(whisper(world), 2 * WIDTH)
    alice = exhibit(court.folder, world.normalise, "alice", world.alice_key, reference=world.alice)
    assert court.hear(dated.bob_first, alice, images=world.shown).ruling.owner is None


def test_claims_that_do_not_hold_are_no_tries(court, world, tmp_path):
    """A hundred empty folders would take two powers of ten from everybody's p-value."""
    first = exhibit(court.folder, world.normalise, "alice", world.alice_key, reference=world.alice)
    court.suspect(world.alice)
    (alice,) = hear(court.folder / "suspect", [first], Bench()).claimants
    empty = [tmp_path / f"empty{number}" for number in range(3)]
    for folder in empty:
        folder.mkdir()
    forged = tmp_path / "forged"
    shutil.copytree(first, forged)
    claim = json.loads((forged / "claim.json").read_text())
    claim["envelope"]["signatures"][0]["sig"] = "A" * 86 + "=="
    (forged / "claim.json").write_text(json.dumps(claim, sort_keys=True, separators=(",", ":")))
    heard = hear(court.folder / "suspect", [first, *empty, forged], Bench())
    assert [each.unchecked is not None for each in heard.claimants] == [False, *[True] * 3, False]
    assert heard.claimants[-1].refused is not None
    for how, verdict in heard.claimants[0].readings.items():
        assert verdict.log10_p_value == alice.readings[how].log10_p_value
