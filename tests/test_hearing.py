"""Cases before the judge, on networks that were trained, with a timestamp authority that works."""

import json
import math
import shutil
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
import torch
from authority import Signer, Website, certificate, new_key, pem
from constructed import marked, reader, small_alexnet, solve_head, write_over
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rearranged import negate

from nnpassport.attacks.ambiguity import (
    grind,
    insider_passport,
    random_passport,
    reverse_engineer,
    solve_passport,
)
from nnpassport.attacks.hashbound import forge_hash_bound
from nnpassport.attacks.obfuscation import combine
from nnpassport.attacks.substitution import substitute_across, substitute_individual
from nnpassport.claims.claim import Declared, claim_of, sign_claim
from nnpassport.claims.claimfile import read_signed, write_signed
from nnpassport.claims.rules import ALIGNED, AS_IT_STANDS, Claimant, Outcome, rule
from nnpassport.claims.signing import bound_name, public_hex
from nnpassport.embedding.checkpoint import save_model
from nnpassport.embedding.network.channels import channels_of
from nnpassport.embedding.network.equations import read_bits
from nnpassport.embedding.network.layers import Branch
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.embedding.publish.onnx import export_onnx
from nnpassport.embedding.schemes.order import ORDER
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.keys import validity
from nnpassport.keys.chance import (
    LOG10_ALPHA_COMMITTED,
    LOG10_ALPHA_UNCOMMITTED,
    LOG10_BY_NAME,
)
from nnpassport.keys.keyfile import save_key
from nnpassport.scheme import (
    BadSignatureError,
    UnreadableModelError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification.hearing import CLAIM_FILE, KEY_FILE, REFERENCE, Bench, disclose, hear

SHORT = Recipe(epochs=2, batch=64, rate=0.01, schedule="constant", augment=False)
ARGUMENTS = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
EXAMPLE = torch.zeros(2, 1, 32, 32)
NOW = datetime.now(UTC)
LATER, EARLIER = NOW + timedelta(days=1), NOW - timedelta(days=1)
SIGNING = {
    name: Ed25519PrivateKey.from_private_bytes(bytes([ord(name[0])] * 32))
    for name in ("alice", "bob")
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


class World(NamedTuple):
    """Alice's marked network, Bob's overwritten copy of it, and one that is nobody's."""

    data: object
    normalise: object
    config: ModelConfig
    alice: torch.nn.Module
    alice_key: object
    bob: torch.nn.Module
    bob_key: object
    nobody: torch.nn.Module


@pytest.fixture(scope="module")
def world(digits):
    train, _, normalise = digits
    data = train.resized(32).subset(torch.arange(640))
    config = ModelConfig(
        architecture="alexnet",
        arguments=ARGUMENTS,
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=tuple(normalise.mean),
        std=tuple(normalise.std),
    )
    bare = small_alexnet()
    alice_key = V2.draw_key(bare, EXAMPLE, owner="Alice", seed=bytes([1] * 32), passports="derived")
    alice = marked(V2, bare, alice_key, data, normalise)
    bob_key = V2.draw_key(alice, EXAMPLE, owner="Bob", seed=bytes([2] * 32), passports="derived")
    bob = deepcopy(alice)
    write_over(bob, bob_key, normalise(data.images), kept=alice_key)
    solve_head(bob, [(Branch.PUBLIC, normalise(data.images), data.labels)])
    nobody = reader(small_alexnet(seed=3), data, normalise)
    return World(data, normalise, config, alice, alice_key, bob, bob_key, nobody)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary, which plays the timestamp authority")
    root_key, key = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    folder = tmp_path_factory.mktemp("authority")
    made = Signer(
        folder / "tsa",
        key,
        certificate("An Authority", key, (root, root_key)),
        accuracy="millisecs:1",
    )
    made.root = root
    return made


def stamped(signed, authority):
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    from nnpassport.claims.claimfile import timestamped_bytes

    query = TimestampRequestBuilder(timestamped_bytes(signed.envelope), HashAlgorithm.SHA256)
    return signed._replace(response=authority.answer(query.build().as_bytes()))


class Court:
    """A folder with a suspect and exhibits, and the hearing of them.

    The judge brings an unrelated network; by default, because that takes a fourth of the time.
    """

    def __init__(self, folder, world, unrelated=()):
        self.folder, self.world, self.exhibits = folder, world, []
        self.unrelated = unrelated

    def suspect(self, model):
        save_model(self.folder / "suspect", model, self.world.config)
        return self

    def claim(self, name, key, *, reference=None, authority=None, **declared):
        """Sign, stamp and disclose, as an owner does with the command line."""
        digest = None if reference is None else tensors_digest(reference.state_dict())
        claim = claim_of(key, SIGNING[name].public_key(), reference=digest, **declared)
        signed = sign_claim(claim, SIGNING[name])
        signed = signed if authority is None else stamped(signed, authority)
        write_signed(signed, self.folder / f"{name}.claim.json")
        if reference is not None:
            save_model(self.folder / f"{name}-net", reference, self.world.config)
        disclose(
            self.folder / f"{name}.claim.json",
            key,
            self.folder / name,
            reference=None if reference is None else self.folder / f"{name}-net",
        )
        self.exhibits.append(self.folder / name)
        return self

    def hear(self, **bench):
        bench = {"unrelated": self.unrelated, **bench}
        return hear(self.folder / "suspect", self.exhibits, Bench(**bench))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("stranger")
    save_model(folder, reader(small_alexnet(seed=4), world.data, world.normalise), world.config)
    return folder


@pytest.fixture
def court(tmp_path, world, stranger):
    return Court(tmp_path, world, (stranger,))


def accepted(heard, name):
    (claimant,) = (each for each in heard.claimants if each.name == name)
    return {how: verdict.accepted for how, verdict in claimant.readings.items()}


def test_the_world_is_as_the_cases_need_it(world):
    assert V2.verify(world.alice.state_dict(), world.alice_key).match_rate == 1
    assert V2.verify(world.bob.state_dict(), world.bob_key).match_rate == 1
    assert V2.verify(world.bob.state_dict(), world.alice_key).accepted
    assert not V2.verify(world.alice.state_dict(), world.bob_key).accepted
    assert not V2.verify(world.nobody.state_dict(), world.alice_key).accepted


FORGERIES = {
    "fake1": lambda w: random_passport(w.alice, V2, EXAMPLE, rng()),
    "fake2": lambda w: reverse_engineer(
        w.alice, V2, w.data, SHORT, normalise=w.normalise, rng=rng()
    ),
    "fake3": lambda w: insider_passport(
        w.alice, V2, w.alice_key, w.data, SHORT, normalise=w.normalise, rng=rng(), share=0.25
    ),
    "solve": lambda w: solve_passport(w.alice, V2, EXAMPLE, rng()),
    "IERB": lambda w: substitute_individual(
        w.alice, V2, w.data, SHORT, normalise=w.normalise, rng=rng()
    ),
    "CERB": lambda w: substitute_across(
        w.alice, V2, w.data, SHORT, normalise=w.normalise, rng=rng()
    ),
    "hash-bound": lambda w: forge_hash_bound(w.alice, V2, EXAMPLE, rng()),
    "ground": lambda w: grind(w.alice, V2, EXAMPLE, rng(), tries=300),
}


@pytest.mark.parametrize(
    "forgery",
    [
        each if each == "hash-bound" else pytest.param(each, marks=pytest.mark.slow)
        for each in FORGERIES
    ],
)
def test_the_genuine_owner_wins_against_a_forger(court, world, authority, forgery):
    """Whichever copy the forger shows, and however well his key passes the published rule."""
    forged = FORGERIES[forgery](world)
    court.suspect(forged.model)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.claim("bob", forged.key, reference=forged.model, authority=authority)
    bench = {"unrelated": ()} if forgery == "hash-bound" else {}  # there her mark is only aligned
    heard = court.hear(roots=[authority.root], appeared=LATER, **bench)
    assert (heard.ruling.outcome, heard.ruling.owner) == (Outcome.OWNER, "alice")
    assert not any(accepted(heard, "bob").values())
    honest = forgery == "ground"  # a key by the rules, and refused by its p-value alone
    assert ("chosen" in " ".join(heard.ruling.reasons)) != honest
    if forgery != "hash-bound":
        assert accepted(heard, "alice") == {AS_IT_STANDS: True, ALIGNED: True}
    else:  # its forger negates channels, so that the mark can only be read aligned
        assert accepted(heard, "alice")[ALIGNED]


def test_overwriting_is_seen_without_any_date(court, world):
    """Both marks are in Bob's network, and only Alice's mark is in both."""
    court.suspect(world.bob)
    court.claim("alice", world.alice_key, reference=world.alice)
    court.claim("bob", world.bob_key, reference=world.bob)
    heard = court.hear()
    assert heard.ruling.owner == "alice"
    assert any(accepted(heard, "bob").values())
    alice, bob = heard.claimants
    assert alice.elsewhere["bob"][AS_IT_STANDS].marked
    assert not any(each.marked for each in bob.elsewhere["alice"].values())
    said = " ".join(heard.ruling.reasons)
    assert "stands in bob's network" in said
    assert "alice: compare, of the suspect and its network: related" in said


@pytest.mark.slow
def test_a_licensed_derivative_is_decided_by_the_older_network(court, world, authority):
    """Bob hands in no network, so only dates can tell who was first."""
    court.suspect(world.bob)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    time.sleep(2.1)  # tokens count in whole seconds
    court.claim("bob", world.bob_key, authority=authority)
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert heard.ruling.owner == "alice"
    assert all(any(accepted(heard, name).values()) for name in ("alice", "bob"))
    assert "derivative" in heard.ruling.reasons[-1]


def test_without_dates_and_references_it_is_undecided(court, world):
    court.suspect(world.bob)
    court.claim("alice", world.alice_key)
    court.claim("bob", world.bob_key)
    heard = court.hear()
    assert heard.ruling.outcome is Outcome.UNDECIDED
    assert heard.ruling.owner is None


def turned(world):
    """Alice's network, its channels negated until it reads as Bob's bits: no data, no loss."""
    model = V2.released(world.alice).eval()
    producers = {p.layer: p for axis in channels_of(model) for p in axis.producers}
    with torch.no_grad():
        for name, secret in secrets_of(world.bob_key).items():
            weight = model.get_submodule(name).weight
            right = read_bits(weight, secret.mean_patch) == secret.signs
            negate(model, producers[name], torch.where(right, 1.0, -1.0))
    return model


@pytest.mark.slow
def test_turned_channels_carry_bobs_mark_and_only_the_date_tells(court, world, authority):
    """A mark costs nothing to put on: aligned, a copy and its original carry each other's."""
    model = turned(world)
    images = world.normalise(world.data.images[:64])
    torch.testing.assert_close(model(images), world.alice(images), rtol=1e-4, atol=1e-4)
    court.suspect(model)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    time.sleep(2.1)
    court.claim("bob", world.bob_key, reference=model, authority=authority)
    heard = court.hear(roots=[authority.root], appeared=LATER, unrelated=())
    assert accepted(heard, "bob")[AS_IT_STANDS]
    assert accepted(heard, "alice") == {AS_IT_STANDS: False, ALIGNED: True}
    assert heard.claimants[1].elsewhere["alice"][ALIGNED].marked  # both ways
    assert heard.ruling.owner == "alice"
    undated = court.hear()  # nothing tells that Alice's network was there before Bob's
    assert undated.ruling.owner == "bob"
    assert not any(accepted(undated, "alice").values())


def test_a_reference_that_was_fitted_to_the_suspect_proves_nothing(court, world, authority):
    """Bob turns a copy of somebody's network to his bits, and says that it is his reference."""
    court.suspect(world.alice)
    court.claim("bob", world.bob_key, reference=turned(world), authority=authority)
    for bench in ({}, {"roots": [authority.root], "appeared": EARLIER}):
        heard = court.hear(**bench)
        assert heard.claimants[0].readings[ALIGNED].match_rate == 1
        assert heard.ruling.outcome is Outcome.NOBODY
        assert "made after it can be made to fit" in " ".join(heard.ruling.reasons)


@pytest.mark.slow
def test_the_date_of_a_key_does_not_date_a_mark(court, world, authority):
    """Bob dated an empty key years ago, and turned a copy of Alice's network to it yesterday."""
    court.claim("bob", world.bob_key, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.suspect(turned(world))
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert all(any(accepted(heard, name).values()) for name in ("alice", "bob"))
    assert heard.ruling.owner == "alice"
    assert "does not date a mark" in " ".join(heard.ruling.reasons)


@pytest.mark.slow
def test_a_network_of_another_s_dates_nothing(court, world, authority):
    """Nor does it help Bob to have dated a network of his own that the suspect is not made of."""
    court.claim("bob", world.bob_key, reference=world.nobody, authority=authority)
    time.sleep(2.1)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.suspect(turned(world))
    heard = court.hear(roots=[authority.root], appeared=LATER)
    bob, alice = heard.claimants
    assert not bob.readings[ALIGNED].alignment["related"]
    assert alice.readings[ALIGNED].alignment["related"]
    assert (bob.related, alice.related) == (False, True)
    assert not alice.akin["bob"]
    assert not bob.akin["alice"]
    assert heard.ruling.owner == "alice"


def test_a_date_after_the_suspect_outweighs_nobody(court, world, authority):
    court.suspect(world.bob)
    court.claim("alice", world.alice_key)
    court.claim("bob", world.bob_key, reference=world.bob, authority=authority)
    heard = court.hear(roots=[authority.root], appeared=EARLIER)
    assert heard.ruling.outcome is Outcome.UNDECIDED


def test_an_exhibit_that_is_handed_in_twice_blocks_nobody(court, world):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, reference=world.alice)
    shutil.copytree(court.folder / "alice", court.folder / "bob")
    court.exhibits.append(court.folder / "bob")
    heard = court.hear()
    assert heard.ruling.owner == "alice"
    assert "signed with one key" in heard.ruling.reasons[-1]


@pytest.mark.slow
def test_a_stolen_claim_that_is_signed_again_is_the_younger_one(court, world, authority):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    time.sleep(2.1)
    court.claim("bob", world.alice_key, reference=world.alice, authority=authority)
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert heard.ruling.owner == "alice"
    assert heard.claimants[0].fingerprint == heard.claimants[1].fingerprint


def test_a_key_that_is_bound_to_its_owner_cannot_be_claimed_again(court, world):
    owner = bound_name("Alice", SIGNING["alice"].public_key())
    assert public_hex(SIGNING["alice"].public_key()) in owner
    key = V2.draw_key(world.alice, EXAMPLE, owner=owner, passports="derived")
    court.claim("alice", key)
    with pytest.raises(BadSignatureError, match="nobody but the first"):
        court.claim("bob", key)


def test_a_claim_after_the_fact_needs_the_stricter_threshold(court, world, authority):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, authority=authority)
    before = court.hear(roots=[authority.root], appeared=LATER).claimants[0]
    after = court.hear(roots=[authority.root], appeared=EARLIER).claimants[0]
    assert before.readings[AS_IT_STANDS].log10_alpha == LOG10_ALPHA_COMMITTED
    assert after.readings[AS_IT_STANDS].log10_alpha == LOG10_ALPHA_UNCOMMITTED
    assert after.proves  # a genuine mark passes both
    assert "but the suspect was there" in after.notes[0]


def test_a_short_mark_found_after_the_fact_is_refused(court, world, authority):
    """Fifty bits could have been found by search; before the suspect was there, they could not."""
    key = V2.draw_key(
        world.alice, EXAMPLE, layers=["features.14"], seed=bytes(32), passports="derived"
    )
    model = V2.released(world.alice).eval()
    secret = secrets_of(key)["features.14"]
    producers = {p.layer: p for axis in channels_of(model) for p in axis.producers}
    with torch.no_grad():
        weight = model.get_submodule("features.14").weight
        right = read_bits(weight, secret.mean_patch) == secret.signs
        keep = torch.arange(64) >= 56  # 8 of them are left as chance has them
        sign = torch.where(right | keep, 1.0, -1.0)
        negate(model, producers["features.14"], sign)
    court.suspect(model)
    court.claim("alice", key, authority=authority)
    assert court.hear(roots=[authority.root], appeared=LATER).ruling.owner == "alice"
    late = court.hear(roots=[authority.root], appeared=EARLIER)
    assert late.ruling.outcome is Outcome.NOBODY


def test_a_lax_threshold_is_the_judges_not_the_claimants(court, world, authority):
    key = V2.draw_key(world.alice, EXAMPLE, passports="derived")
    court.suspect(world.alice)
    court.claim("bob", key, log10_alpha=-1, authority=authority)
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert heard.claimants[0].readings[AS_IT_STANDS].log10_alpha == LOG10_ALPHA_COMMITTED


def test_nobody_owns_what_carries_no_mark(court, world):
    court.suspect(world.nobody)
    court.claim("alice", world.alice_key, reference=world.alice)
    court.claim("bob", world.bob_key, reference=world.bob)
    heard = court.hear()
    assert heard.ruling.outcome is Outcome.NOBODY
    assert not any(any(accepted(heard, name).values()) for name in ("alice", "bob"))


def test_an_obfuscated_copy_is_still_alices(court, world, authority):
    court.suspect(combine(world.alice, rng(4)).model)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.claim("bob", world.bob_key, reference=world.bob)
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert heard.ruling.owner == "alice"
    assert accepted(heard, "alice") == {AS_IT_STANDS: False, ALIGNED: True}


def test_unrelated_networks_can_be_given(court, world, authority):
    save_model(court.folder / "other", world.nobody, world.config)
    resnet = replace(world.config, architecture="resnet18")
    save_model(court.folder / "resnet", resnet.build(), resnet)
    court.suspect(combine(world.alice, rng(4)).model)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    bench = {"roots": [authority.root], "appeared": LATER}
    both = court.hear(unrelated=(court.folder / "other", court.folder / "resnet"), **bench)
    null = both.claimants[0].readings[ALIGNED].alignment["null"]
    assert len(null["matches"]) == null["skipped"] == 1
    assert both.ruling.owner == "alice"
    none = court.hear(unrelated=(court.folder / "resnet",), **bench)
    assert none.ruling.outcome is Outcome.UNDECIDED  # not refused: nothing could be aligned
    assert "there is no null" in none.claimants[0].unchecked


def test_p_values_are_for_all_claimants_together(court, world):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key)
    alone = court.hear().claimants[0].readings[AS_IT_STANDS].log10_p_value
    court.claim("bob", world.bob_key)
    both = court.hear().claimants[0].readings[AS_IT_STANDS].log10_p_value
    assert alone - both == pytest.approx(-torch.tensor(2.0).log10().item(), abs=1e-6)


def test_fidelity_is_measured_against_what_was_declared(court, world):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, fidelity=Declared(900_000, 100_000))
    found = (
        court.hear(images=world.data.subset(torch.arange(64))).claimants[0].readings[AS_IT_STANDS]
    )
    assert (found.fidelity.target, found.fidelity.tolerance) == (0.9, 0.1)
    assert found.accepted
    court = Court(court.folder / "strict", world)
    court.folder.mkdir()
    court.suspect(world.nobody)
    court.claim("alice", world.alice_key, fidelity=Declared(1_000_000, 0))
    assert court.hear(images=world.data.subset(torch.arange(64))).ruling.outcome is Outcome.NOBODY


# What is handed in may be anything


def test_another_reference_than_the_committed_one_is_not_used(court, world):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, reference=world.alice)
    save_model(court.folder / "alice" / REFERENCE, world.nobody, world.config)
    heard = court.hear()
    assert ALIGNED not in heard.claimants[0].readings
    assert "not the one that the claim commits to" in heard.claimants[0].notes[-1]
    assert heard.ruling.owner == "alice"


@pytest.mark.parametrize("file", [CLAIM_FILE, KEY_FILE])
def test_an_exhibit_that_cannot_be_read_is_told_from_one_that_does_not_hold(court, world, file):
    court.suspect(world.nobody)
    court.claim("alice", world.alice_key)
    court.claim("bob", world.bob_key)
    (court.folder / "bob" / file).write_bytes(b"{}")
    heard = court.hear()
    assert heard.ruling.outcome is Outcome.UNDECIDED
    assert heard.claimants[1].unchecked is not None
    court.suspect(world.alice)
    assert court.hear().ruling.owner == "alice"


def test_whatever_a_claimant_hands_in_it_stops_no_other(court, world, monkeypatch):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, reference=world.alice)
    check = validity.check
    monkeypatch.setattr(validity, "check", lambda context: None)  # his own program has no such
    odd = {
        "no layers": replace(world.bob_key.context, layers=()),
        "bits": replace(
            world.bob_key.context,
            layers=tuple(each._replace(bits=8) for each in world.bob_key.context.layers),
        ),
        "uchida": replace(world.bob_key.context, scheme="uchida"),
        "unheard of": replace(world.bob_key.context, scheme="unheard of"),
    }
    for number, context in enumerate(odd.values()):
        claimed = Court(court.folder / str(number), world)
        claimed.folder.mkdir()
        claimed.claim("bob", replace(world.bob_key, context=context), reference=world.bob)
        court.exhibits += claimed.exhibits
    monkeypatch.setattr(validity, "check", check)
    heard = court.hear()
    assert heard.ruling.owner == "alice"
    assert all(each.unchecked for each in heard.claimants[1:])
    assert len(heard.claimants) == 1 + len(odd)


@pytest.mark.parametrize("content", [None, b"{}"])
def test_a_reference_without_a_config_is_its_claimants_trouble(court, world, content):
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, reference=world.alice)
    court.claim("bob", world.bob_key, reference=world.bob)
    config = court.folder / "bob" / REFERENCE / "config.json"
    config.unlink()
    if content is not None:
        config.write_bytes(content)
    heard = court.hear()
    assert heard.ruling.owner == "alice"
    assert heard.claimants[1].unchecked


def test_names_of_wrappers_are_taken_off(court, world):
    from safetensors.torch import save_file

    weights = {f"module.{n}": t.contiguous() for n, t in world.alice.state_dict().items()}
    save_model(court.folder / "suspect", world.alice, world.config)
    save_file(weights, court.folder / "suspect" / "model.safetensors")
    court.claim("alice", world.alice_key, reference=world.alice)
    assert court.hear().ruling.owner == "alice"


def test_another_key_than_the_committed_one_is_refused(court, world):
    court.suspect(world.alice)
    court.claim("bob", world.bob_key)
    (court.folder / "bob" / KEY_FILE).unlink()
    save_key(world.alice_key, court.folder / "bob" / KEY_FILE)
    heard = court.hear()
    assert heard.ruling.outcome is Outcome.NOBODY
    assert "another" in heard.claimants[0].refused
    assert heard.claimants[0].readings == {}


def test_a_timestamp_that_is_not_over_this_claim_dates_nothing(court, world, authority):
    """Taking it off would have been as easy, so it makes nothing worse either."""
    court.suspect(world.alice)
    court.claim("alice", world.alice_key, authority=authority)
    court.claim("bob", world.bob_key, authority=authority)
    mine, theirs = (read_signed(court.folder / name / CLAIM_FILE) for name in ("alice", "bob"))
    (court.folder / "alice" / CLAIM_FILE).unlink()
    write_signed(mine._replace(response=theirs.response), court.folder / "alice" / CLAIM_FILE)
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert heard.claimants[0].time is None
    assert "proves nothing" in heard.claimants[0].notes[0]
    assert heard.claimants[0].readings[AS_IT_STANDS].log10_alpha == LOG10_ALPHA_UNCOMMITTED
    assert heard.ruling.owner == "alice"
    assert court.hear(roots=[]).claimants[0].time is None


def test_a_suspect_that_cannot_be_read_is_an_error(court, world):
    court.claim("alice", world.alice_key)
    with pytest.raises(UnreadableModelError):
        court.hear()


def test_only_a_key_and_a_network_that_fit_the_claim_are_disclosed(court, world):
    court.claim("alice", world.alice_key, reference=world.alice)
    claim = court.folder / "alice.claim.json"
    with pytest.raises(BadSignatureError, match="does not hold with this key"):
        disclose(claim, world.bob_key, court.folder / "wrong")
    save_model(court.folder / "other", world.nobody, world.config)
    with pytest.raises(UnsuitableModelError, match="not the network"):
        disclose(claim, world.alice_key, court.folder / "wrong", reference=court.folder / "other")
    assert not (court.folder / "wrong").exists()
    copied = read_weights(court.folder / "alice" / REFERENCE).tensors
    assert tensors_digest(copied) == tensors_digest(world.alice.state_dict())


# The rules alone, in every combination of what can be found


def found(marked, **facts):
    p = -200.0 if marked else 0.0
    return Verdict("s", 100, 100 if marked else 50, p, -30.0, **facts)


def claimant(
    name, *, day=None, older=True, related=True, stands=None, aligned=None, proves=True, akin=True
):
    other = "b" if name == "a" else "a"
    readings = {AS_IT_STANDS: stands, ALIGNED: aligned}
    return Claimant(
        name,
        time=None if day is None else NOW + timedelta(days=day),
        older=older and day is not None,
        readings={
            AS_IT_STANDS: found(proves),
            ALIGNED: found(True, alignment={"related": related}),
        },
        elsewhere={other: {how: found(each) for how, each in readings.items() if each is not None}},
        akin={"a": akin, "b": akin, "c": akin},
    )


@pytest.mark.parametrize(
    ("a", "b", "owner"),
    [
        # his mark stands in the other's network and not the other way: stronger than any date
        ({"stands": True}, {"stands": False, "aligned": False}, "a"),
        ({"stands": True, "day": 2}, {"stands": False, "aligned": False, "day": 1}, "a"),
        ({"stands": False, "aligned": False}, {"stands": True}, "b"),
        ({"stands": False}, {"stands": True}, None),  # it was not looked for aligned
        # an aligned reading is no evidence of order
        ({"stands": False, "aligned": True}, {"stands": False, "aligned": False}, None),
        ({"stands": True}, {"stands": False, "aligned": True}, None),
        ({"stands": True, "day": 2}, {"stands": False, "aligned": True, "day": 1}, "b"),
        # it was not looked for in the other's network, so nothing is known of it
        ({"stands": True}, {}, None),
        # dates
        ({"day": 1}, {"day": 2}, "a"),
        ({"day": 1}, {"day": 1}, None),
        ({"day": 1}, {}, "a"),
        ({}, {}, None),
        # only of the network that the suspect was made from, and only before the suspect
        ({"day": 1, "related": False}, {"day": 2}, "b"),
        ({"day": 1, "related": False}, {}, None),
        ({"day": 1}, {"day": 2, "related": False}, "a"),
        ({"day": 1, "older": False}, {"day": 2, "older": False}, None),
        ({"day": 1, "older": False}, {}, None),
    ],
)
def test_who_was_first(a, b, owner):
    ruling = rule([claimant("a", **a), claimant("b", **b)])
    assert ruling.owner == owner
    assert ruling.outcome is (Outcome.UNDECIDED if owner is None else Outcome.OWNER)
    turned_round = rule([claimant("b", **b), claimant("a", **a)])
    assert turned_round.owner == owner


def test_of_three_the_first_must_be_before_both():
    dated = [
        replace(claimant(name, day=day), elsewhere={})
        for name, day in (("a", 3), ("b", 1), ("c", 2))
    ]
    assert rule(dated).owner == "b"
    dated[2] = replace(dated[2], time=dated[1].time)
    assert rule(dated).outcome is Outcome.UNDECIDED


def test_two_of_one_name_are_told_apart(court, world):
    with pytest.raises(ValueError, match="one name"):
        rule([claimant("a"), claimant("a")])
    court.suspect(world.alice)
    court.claim("alice", world.alice_key)
    court.exhibits.append(court.folder / "alice")
    assert [each.name for each in court.hear().claimants] == ["alice", "alice (2)"]
    shutil.copytree(court.folder / "alice", court.folder / "alice (2)")
    court.exhibits.append(court.folder / "alice (2)")
    assert len({each.name for each in court.hear().claimants}) == 3


# The commands


def test_judge_says_owner_nobody_or_undecided_by_its_exit_code(court, world, call):
    court.suspect(world.bob)
    court.claim("alice", world.alice_key, reference=world.alice)
    court.claim("bob", world.bob_key, reference=world.bob)
    suspect = court.folder / "suspect"
    words = ("judge", suspect, *court.exhibits)
    code, out, _ = call(*words, "--unrelated", court.unrelated[0], "--json")
    facts = json.loads(out)
    assert (code, facts["ruling"], facts["owner"]) == (0, "owner", "alice")
    for secret in (world.alice_key.seed, world.bob_key.seed):
        assert secret.hex() not in out
    keys = Court(court.folder / "keys", world)
    keys.folder.mkdir()
    keys.suspect(world.nobody).claim("alice", world.alice_key).claim("bob", world.bob_key)
    words = ("judge", keys.folder / "suspect", *keys.exhibits)
    assert call(*words)[0] == 1
    (keys.folder / "bob" / CLAIM_FILE).write_bytes(b"{}")
    assert call(*words)[0] == 3
    keys.suspect(world.alice)
    assert call(*words)[1].startswith("OWNER: alice")
    assert call("judge", court.folder / "missing", *court.exhibits)[0] == 2


@pytest.mark.slow
def test_the_whole_story_on_the_command_line(court, world, call, authority, monkeypatch):
    """Bind, claim with a timestamp, verify under the claim, disclose, be judged."""
    monkeypatch.chdir(court.folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    import threading

    save_model(court.folder / "released", world.alice, world.config)
    court.suspect(combine(world.alice, rng(4)).model)
    save_key(world.alice_key, court.folder / "alice.key")
    (court.folder / "root.pem").write_bytes(pem(authority.root))
    assert call("claim", "keygen", "-o", "alice.pem")[0] == 0
    with Website() as server:
        server.answer = lambda query: (200, authority.answer(query))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        new = ("claim", "new", "--key", "alice.key", "--signing", "alice.pem")
        committed = ("--reference", "released", "-o", "alice.claim.json")
        stamp = ("--authority", server.url, "--authority-root", "root.pem")
        assert call(*new, *committed, *stamp)[0] == 0
        server.shutdown()
        thread.join()
    assert call("verify", "suspect", "--key", "alice.key")[0] == 1
    verify = ("verify", "suspect", "--key", "alice.key", "--align", "released")
    under = ("--claim", "alice.claim.json", "--owner", "alice.pub.pem", "--root", "root.pem")
    code, out, _ = call(*verify, *under, "--appeared", LATER.isoformat(), "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["log10_alpha"] == LOG10_ALPHA_COMMITTED
    assert facts["claim"]["older_than_the_suspect"]
    null = facts["alignment"]["null"]
    assert facts["log10_p_value"] == pytest.approx(
        max(null["log10_p_empirical"], null["log10_p_analytic"]) + math.log10(2) + LOG10_BY_NAME
    )
    undated = call(*verify, "--claim", "alice.claim.json", "--json")
    assert undated[0] == 1
    assert "made to fit" in json.loads(undated[1])["reason"]
    save_model(court.folder / "another", world.nobody, world.config)
    mistaken = call("verify", "suspect", "--key", "alice.key", "--align", "another", *under)
    assert mistaken[0] == 2
    disclosed = ("claim", "disclose", "alice.claim.json", "--key", "alice.key")
    assert call(*disclosed, "--reference", "released", "-o", "exhibit")[0] == 0
    judge = ("judge", "suspect", "exhibit", "--root", "root.pem", "--appeared")
    assert call(*judge, "2999")[0] == 2  # no time
    code, out, _ = call(*judge, LATER.isoformat())
    assert (code, out.splitlines()[0]) == (0, "OWNER: exhibit")


def without_torch(*words):
    """What a command says in JSON where torch is not installed, and with which exit code."""
    program = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
from nnpassport.cli.app import main
main()
"""
    command = [sys.executable, "-c", program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def differences(one, other, at=""):
    """Where two documents differ by more than rounding, and by what they say of parts on noise."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() | other.keys()
        each = [differences(one.get(n), other.get(n), f"{at}.{n}") for n in names - {"made_with"}]
        return [found for several in each for found in several]
    if isinstance(one, list) and isinstance(other, list):
        one, other = ([v for v in side if "its part" not in str(v)] for side in (one, other))
        if len(one) == len(other):
            pairs = enumerate(zip(one, other, strict=True))
            each = [differences(*pair, f"{at}[{n}]") for n, pair in pairs]
            return [found for several in each for found in several]
    alike = one == (pytest.approx(other) if isinstance(one, float) else other)
    return [] if alike else [f"{at}: {one!r:.200} and {other!r:.200}"]


@pytest.mark.parametrize("suspect", ["suspect", pytest.param("x.onnx", marks=pytest.mark.slow)])
def test_alignment_and_the_judge_need_no_torch(court, world, call, authority, suspect):
    """The same verdict and the same ruling, of a copy whose channels moved."""
    thief = combine(world.bob, rng(4)).model
    court.suspect(thief)
    court.claim("alice", world.alice_key, reference=world.alice, authority=authority)
    court.claim("bob", world.bob_key, reference=world.bob, authority=authority)
    (court.folder / "root.pem").write_bytes(pem(authority.root))
    if suspect.endswith("onnx"):
        export_onnx(thief, EXAMPLE, court.folder / suspect)
    save_key(world.alice_key, court.folder / "alice.key")
    when = ("--root", court.folder / "root.pem", "--appeared", LATER.isoformat())
    network = court.folder / suspect
    owners = ("--key", court.folder / "alice.key", "--align", court.folder / "alice-net")
    judge = ("judge", network, *court.exhibits, "--unrelated", court.unrelated[0], *when)
    for words in (("verify", network, *owners, "--json"), (*judge, "--json")):
        code, out, _ = call(*words)
        there, facts = without_torch(*words)
        assert code == there == 0
        assert differences(json.loads(out), facts) == []


def test_verify_under_a_claim_of_another_key_is_refused(court, world, call):
    court.suspect(world.alice)
    court.claim("bob", world.bob_key)
    save_key(world.alice_key, court.folder / "alice.key")
    words = ("verify", court.folder / "suspect", "--key", court.folder / "alice.key")
    assert call(*words)[0] == 0
    code, out, _ = call(*words, "--claim", court.folder / "bob.claim.json", "--json")
    assert code == 1
    assert "does not hold" in json.loads(out)["reason"]


@pytest.mark.parametrize("marked_too", [True, False])
def test_a_copy_in_an_order_of_a_thief_s_own_is_not_his(court, world, authority, marked_too):
    """Alice's passport is read aligned; where hers is not there, it is undecided and not Bob's."""
    stolen, example = deepcopy(world.alice), torch.randn(2, 1, 32, 32, generator=rng())
    order = ORDER.draw_key(stolen, example, owner="Bob", seed=bytes([9] * 32))
    ORDER.insert(stolen, order, example)
    alice = world.alice_key if marked_too else replace(world.alice_key, seed=bytes([8] * 32))
    court.suspect(stolen).claim("alice", alice, reference=world.alice, authority=authority)
    court.claim("bob", order, reference=stolen)
    heard = court.hear(roots=[authority.root], appeared=LATER)
    assert accepted(heard, "bob") == {AS_IT_STANDS: True}
    if marked_too:
        assert (heard.ruling.outcome, heard.ruling.owner) == (Outcome.OWNER, "alice")
    else:
        assert heard.ruling.outcome is Outcome.UNDECIDED
        assert "take another's away" in heard.ruling.reasons[-1]
