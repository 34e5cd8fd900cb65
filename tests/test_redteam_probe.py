"""What was tried to have answers read as somebody wishes; networks and services are constructed."""

import io
import itertools
import json
import math
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from sklearn.datasets import load_digits

from nnpassport.claims.claim import PAYLOAD_TYPE, claim_of, open_claim, sign_claim
from nnpassport.claims.claimfile import SignedClaim, read_signed, write_signed
from nnpassport.claims.facts import facts_of
from nnpassport.claims.signing import sign
from nnpassport.claims.standing import standing_of
from nnpassport.data.images import Normalisation
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.checkpoint import load_suspect, save_model
from nnpassport.embedding.measured import verify_answers
from nnpassport.embedding.network.tensors import read_weights, tensors_digest
from nnpassport.embedding.schemes.signature import read_answers
from nnpassport.files.config import ModelConfig, read_config
from nnpassport.keys.context import Context, TriggerShape, canonical_json
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import (
    BadRecipeError,
    UnreachableServiceError,
    UnreadableClaimError,
    UnreadableKeyError,
    UnsuitableModelError,
)
from nnpassport.verification import hearing
from nnpassport.verification.relabelling import (
    best_map,
    corrected,
    log10_injections,
    log10_maps,
    log10_partial_injections,
)
from nnpassport.verification.remote.asking import CLOCK, Asker, Limits
from nnpassport.verification.remote.journal import resume as read_journal
from nnpassport.verification.remote.labels import Labels
from nnpassport.verification.remote.plan import Terms
from nnpassport.verification.remote.probe import probe
from nnpassport.verification.remote.services import HuggingFace
from nnpassport.verification.verdicts import Options, verify

SIDE = 8
NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def drawn(number, *, classes=10, count=40, names=None, side=SIDE, channels=1):
    shape = TriggerShape(count, classes, (channels, side, side))
    others = {} if names is None else {"classes": names}
    return Key(bytes([number]) * 32, Context("adi", "Alice", (), shape, bytes(16), **others))


def by_picture(key, labels=None):
    """What is to be answered to each of the key's pictures: its own label, or these."""
    pictures, wanted = key.trigger_set()
    labels = wanted.tolist() if labels is None else labels
    return {p.numpy().tobytes(): each for p, each in zip(pictures, labels, strict=True)}


def asked(answers, key, labels=None, **others):
    """`probe` of a service that gives these answers; nothing goes over a wire."""

    def call(_exchange, _client, request, _limits):
        pixels = Image.open(io.BytesIO(request.body)).tobytes()
        # What a network says to pictures that it was not marked with: anything that it says at all,
        # and that can be read, lest the run end before the triggers.
        known = sorted(set(answers.values()))
        known = [each for each in known if labels.index(each) is not None] or known
        label = answers.get(pixels) or known[sum(pixels) % len(known)]
        body = json.dumps([{"label": label, "score": 0.9}]).encode()
        return SimpleNamespace(is_success=True, status_code=200, headers={}), body

    labels = labels or Labels(key.context.triggers.classes)
    service = HuggingFace("http://host/")
    portal = SimpleNamespace(call=call)
    return probe(Asker(portal, None, service, labels, Limits(), (), CLOCK), key, **others)


def named(answers, names=NAMES):
    return {picture: names[index] for picture, index in answers.items()}


def not_accepted(answers, key, labels, **others):
    try:
        return not asked(answers, key, labels, **others).verdict.accepted
    except UnreachableServiceError as error:  # no answers could have shown it
        return "however they were" in str(error)


# Names that were chosen when the answers were known


def test_names_of_a_thousand_labels_that_were_chosen_afterwards_prove_nothing():
    key = drawn(1, count=100)
    rng = torch.Generator().manual_seed(0)
    said = [f"label {n}" for n in torch.randint(0, 1000, (100,), generator=rng).tolist()]
    service = by_picture(key, said)
    fitted = dict(zip(said, key.trigger_set()[1].tolist(), strict=True))
    assert len(fitted) > 90  # of 100 pictures
    assert not_accepted(service, key, Labels(10, fitted))
    assert not_accepted(service, key, Labels(10, fitted), terms=Terms(log10_alpha=-9.0))


def test_names_that_are_one_to_one_and_chosen_afterwards_prove_nothing():
    """A service that answers every picture with another label, a key of as many classes."""
    key = drawn(1, classes=1000, count=60)
    wanted = key.trigger_set()[1].tolist()
    fitted = {f"label {label}": label for label in wanted}
    service = by_picture(key, [f"label {label}" for label in wanted])
    assert Labels(1000, fitted).one_to_one
    assert not_accepted(service, key, Labels(1000, fitted))
    assert not_accepted(service, key, Labels(1000), terms=Terms(any_order=True))


def test_leaving_labels_out_of_the_names_is_a_choice_too():
    """Of labels that came up once each, name those alone that can be made to fit."""
    key = drawn(1, count=100)
    wanted = key.trigger_set()[1].tolist()
    said = [f"label {n}" for n in range(100)]
    first = {wanted.index(label): label for label in range(10)}
    fitted = {said[place]: label for place, label in first.items()}
    for terms in (Terms(log10_alpha=-9.0), Terms(log10_alpha=-1.0)):
        assert not_accepted(by_picture(key, said), key, Labels(10, fitted), terms=terms)


def test_an_owner_whose_names_nobody_committed_to_pays_for_them_and_is_accepted():
    key = drawn(1)
    found = asked(named(by_picture(key)), key, Labels.in_order(NAMES, 10)).verdict
    assert found.accepted
    seen = len(set(key.trigger_set()[1].tolist()))
    paid = math.log10(2) + log10_partial_injections(seen, 10)
    assert found.corrections == {"maps of names to classes": pytest.approx(paid)}
    assert found.log10_p_value == pytest.approx(-40 + paid)
    assert found.as_dict()["corrections"] == found.corrections
    assert "maps of names to classes" in found.reason


def test_names_that_say_no_more_than_indices_cost_nothing():
    key = drawn(1)
    answers = {picture: str(index) for picture, index in by_picture(key).items()}
    for labels in (Labels(10), Labels.in_order([str(n) for n in range(10)], 10)):
        found = asked(answers, key, labels).verdict
        assert found.corrections == {}
        assert found.log10_p_value == pytest.approx(-40)


def test_names_in_the_key_are_free_and_their_spelling_does_not_matter():
    key = drawn(1, names=NAMES)
    answers = named(by_picture(key), [f" {name.upper()}\t" for name in NAMES])
    found = asked(answers, key).verdict
    assert found.accepted
    assert found.corrections == {}
    assert found.log10_p_value == pytest.approx(-40)
    assert not_accepted(answers, drawn(2, names=NAMES), None)
    assert asked(answers, drawn(2, names=NAMES)).verdict.log10_p_value > -3


def test_names_beside_the_key_do_not_change_how_its_own_are_read():
    key = drawn(1, names=NAMES)
    turned = Labels.in_order(NAMES[1:] + NAMES[:1], 10)
    found = asked(named(by_picture(key)), key, turned).verdict
    assert found.log10_p_value == pytest.approx(-40)


def test_other_names_in_the_key_are_another_key():
    """So that choosing names to fit a network that is there already is drawing seeds."""
    one, other = drawn(1, names=NAMES), drawn(1, names=NAMES[1:] + NAMES[:1])
    assert one.fingerprint != other.fingerprint
    same = (one.trigger_set()[1] == other.trigger_set()[1]).sum()
    assert same < 15  # of 40, a tenth by chance


def test_a_key_with_names_survives_its_file_and_one_without_encodes_as_ever(tmp_path):
    plain, key = drawn(1), drawn(1, names=NAMES)
    save_key(key, tmp_path / "key")
    assert load_key(tmp_path / "key").context.classes == NAMES
    assert b"classes" not in plain.context.encode().replace(b'"classes":10', b"")
    assert Context.decode(key.context.encode()) == key.context
    for wrong in (NAMES[:9], NAMES[:9] + NAMES[:1], (*NAMES[:9], ""), (*NAMES[:9], 3), ()):
        with pytest.raises(UnreadableKeyError, match="class"):
            drawn(1, names=wrong)
    with pytest.raises(UnreadableKeyError, match="names of"):
        Context("uchida", "Alice", (), None, bytes(16), classes=NAMES)


def test_a_key_that_is_drawn_for_a_model_folder_holds_its_classes_names():
    config = a_config(classes=NAMES)
    assert ownership.draw_key(config, "adi").context.classes == NAMES
    numbered = replace(config, classes=tuple(map(str, range(10))))
    assert ownership.draw_key(numbered, "adi").context.classes is None
    assert ownership.draw_key(config, "passport-v2").context.classes is None


# Classes in another order


def test_a_service_with_other_names_in_another_order_is_found_out_and_a_stranger_s_is_not():
    key = drawn(1)
    answers = named(by_picture(key), NAMES[3:] + NAMES[:3])
    with pytest.raises(UnreachableServiceError, match=r"no trigger was shown.*--any-order"):
        asked(answers, key)
    found = asked(answers, key, terms=Terms(any_order=True)).verdict
    assert found.accepted
    seen = len(set(answers.values()))
    assert found.log10_p_value == pytest.approx(-40 + log10_injections(seen, 10))
    other = asked(answers, drawn(2), terms=Terms(any_order=True)).verdict
    assert other.matches > 8  # fitted to, and paid for
    assert other.log10_p_value > -1


def test_maps_are_counted_as_one_counts_them():
    for labels, classes in itertools.product(range(1, 5), range(2, 5)):
        places = range(classes)
        everywhere = itertools.product([None, *places], repeat=labels)
        maps = [[c for c in each if c is not None] for each in everywhere]
        partial = [each for each in maps if len(set(each)) == len(each)]
        full = [each for each in partial if len(each) == min(labels, classes)]
        for count, oracle in (
            (log10_maps, maps),
            (log10_partial_injections, partial),
            (log10_injections, full),
        ):
            assert 10 ** count(labels, classes) == pytest.approx(len(oracle))


def test_the_best_map_is_the_best_of_all():
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        said, wanted = torch.randint(0, 4, (2, 15), generator=rng).tolist()
        maps = itertools.permutations(range(4))
        best = max(sum(m[s] == w for s, w in zip(said, wanted, strict=True)) for m in maps)
        found = best_map(said, wanted)
        assert len(set(found.values())) == len(found)
        assert sum(found.get(s) == w for s, w in zip(said, wanted, strict=True)) == best


@pytest.mark.slow
def test_the_p_value_of_the_best_order_holds_for_strangers():
    """Of 2,000 keys, no more have p ≤ x against one network's answers than x of them."""
    shape = TriggerShape(24, 3, (1, 1, 1))
    answers = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(0))
    found = []
    for number in range(2_000):
        seed = number.to_bytes(32, "big")
        key = Key(seed, Context("adi", "Bob", (), shape, bytes(16)))
        order = best_map(answers.tolist(), key.trigger_set()[1].tolist())
        mapped = torch.tensor([order.get(each, 3) for each in answers.tolist()])
        verdict = read_answers(mapped, key, log10_alpha=-1.0)
        found.append(corrected(verdict, {"orders": log10_injections(3, 3)}).log10_p_value)
    for level in (0.1, 0.03, 0.01):
        assert sum(p <= math.log10(level) for p in found) <= 2_000 * level
    assert min(found) < -1  # the bound is no idle one


def test_a_run_that_goes_on_pays_for_the_names_as_before(tmp_path):
    key, labels = drawn(1), Labels.in_order(NAMES, 10)
    answers, journal = named(by_picture(key)), tmp_path / "journal"
    whole = asked(answers, key, labels, journal=journal)
    again = asked({}, key, labels, journal=journal, resume=True)
    assert again.verdict == whole.verdict
    assert all(answer.said >= 0 for answer in read_journal(journal).answers)
    with pytest.raises(BadRecipeError, match="other terms"):
        asked(answers, key, labels, terms=Terms(any_order=True), journal=journal, resume=True)
    ordered = tmp_path / "ordered"
    asked(answers, key, terms=Terms(any_order=True), journal=ordered)
    with pytest.raises(BadRecipeError, match=r"any_order"):
        asked(answers, key, journal=ordered, resume=True)


# What a suspect says of itself


def a_config(classes=NAMES, mean=0.25, std=0.5, **arguments):
    given = {"classes": 10, "norm": "group", "width": 0.25, "channels": 1, **arguments}
    return ModelConfig("alexnet", given, classes, (1, 32, 32), (mean,), (std,))


KEY = drawn(1, count=100, side=32)
OWN = a_config()


@torch.no_grad()
def network(config=OWN, key=KEY, seed=0):
    """A network that answers the key's pictures as labelled: its last layer is solved for."""
    torch.manual_seed(seed)
    model = config.build().eval()
    pictures, labels = key.trigger_set()
    seen = []
    handle = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(Normalisation(config.mean, config.std)(pictures))
    handle.remove()
    features = torch.cat([seen[0], torch.ones(len(labels), 1)], 1).double()
    wanted = torch.nn.functional.one_hot(labels, 10).double()
    solved = torch.linalg.pinv(features) @ wanted
    model.classifier.weight.copy_(solved[:-1].T)
    model.classifier.bias.copy_(solved[-1])
    return model


@pytest.fixture(scope="module")
def owned(tmp_path_factory):
    """The owner's model folder."""
    folder = tmp_path_factory.mktemp("owned") / "net"
    save_model(folder, network(), OWN)
    return folder


def test_the_network_carries_the_key(owned):
    assert verify_answers(owned, KEY).matches == 100
    assert not verify_answers(owned, drawn(2, count=100, side=32)).accepted


LIES = {
    "mean": {"mean": 0.9},
    "both": {"mean": 0.0, "std": 1.0},
    "norm": {"norm": "instance"},
    "classes": {"classes": NAMES[::-1]},
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_suspect_says_of_itself_changes_nothing_where_the_owner_s_facts_are_known(
    tmp_path, lie
):
    save_model(tmp_path, network(), a_config(**LIES[lie]))
    if lie != "classes":
        assert verify_answers(tmp_path, KEY).matches < 90  # what its own word makes of it
    found = verify_answers(tmp_path, KEY, options=Options(reference=OWN))
    assert found.matches == 100
    assert found.accepted
    assert "the owner's config" in found.reason
    assert verify(tmp_path, KEY, options=Options(reference=OWN)).accepted


@pytest.mark.parametrize("config", ["", "{", '{"architecture": 3}', "[" * 100_000])
def test_a_config_that_cannot_be_read_hinders_nobody_who_needs_it_not(tmp_path, config):
    save_model(tmp_path, network(), OWN)
    (tmp_path / "config.json").write_text(config)
    found = verify_answers(tmp_path, KEY, options=Options(reference=OWN))
    assert found.accepted


def test_a_suspect_of_another_architecture_is_built_as_it_says_and_shown_what_the_owner_s_sees(
    tmp_path,
):
    wide = a_config(width=0.5)
    save_model(tmp_path, network(wide), a_config(width=0.5, mean=0.9))
    loaded = load_suspect(tmp_path, OWN)
    assert loaded.config == wide
    assert verify_answers(tmp_path, KEY, options=Options(reference=OWN)).accepted


def test_the_command_takes_the_owner_s_word_before_the_suspect_s(tmp_path, owned, call):
    save_model(tmp_path / "suspect", network(), a_config(mean=0.9))
    save_key(KEY, tmp_path / "alice.key")
    words = ("verify", tmp_path / "suspect", "--key", tmp_path / "alice.key", "--json")
    code, out, _ = call(*words, "--like", owned, "--black-box")
    assert (code, json.loads(out)["matches"]) == (0, 100)
    code, out, _ = call(*words, "--black-box")
    assert code == 1
    assert "the suspect's own config says" in json.loads(out)["reason"]


# What the owner committed to


SIGNING = Ed25519PrivateKey.from_private_bytes(bytes([7] * 32))


def committed(folder, owned, *, key=KEY, facts=True):
    """A claim to the key and to the network in `owned`, with what its config says or without."""
    digest = tensors_digest(read_weights(owned).tensors)
    network = facts_of(owned) if facts else None
    claim = claim_of(key, SIGNING.public_key(), reference=digest, network=network)
    write_signed(sign_claim(claim, SIGNING), folder / "alice.claim.json")
    save_key(key, folder / "alice.key", overwrite=True)
    return folder / "alice.claim.json"


def test_under_a_claim_a_suspect_that_states_another_normalisation_is_read_by_the_owner_s(
    tmp_path, owned, call
):
    save_model(tmp_path / "suspect", network(), a_config(mean=0.9, std=0.1))
    words = ("verify", tmp_path / "suspect", "--key", tmp_path / "alice.key", "--black-box")
    claim = committed(tmp_path, owned)
    code, out, _ = call(*words, "--claim", claim, "--json")
    assert (code, json.loads(out)["matches"]) == (0, 100)
    assert "images became numbers as the claim commits to" in json.loads(out)["reason"]
    assert call(*words)[0] == 1
    code, _, err = call(*words, "--claim", claim, "--alpha", "-30")  # an undated claim: -30.1
    assert code == 2
    assert "laxer than what the claim may be judged by" in err.replace("\n", " ")
    assert call(*words, "--claim", claim, "--alpha", "-40")[0] == 0
    claim = committed(tmp_path, owned, facts=False)  # as they were before there was such a field
    assert call(*words, "--claim", claim)[0] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"mean": [0.9]},
        {"std": [0.1]},
        {"input_size": [1, 64, 64]},
        {"classes": [*NAMES[1:], NAMES[0]]},
        {"notes": {"what": "another file, though the facts are the same"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_is_not_the_one_committed_to_is_refused_under_the_claim(
    tmp_path, owned, call, change
):
    forged = tmp_path / "forged"
    shutil.copytree(owned, forged)
    said = json.loads((forged / "config.json").read_text())
    (forged / "config.json").write_text(json.dumps(said | change))
    words = ("verify", owned, "--key", tmp_path / "alice.key", "--black-box")
    claim = committed(tmp_path, owned)
    assert call(*words, "--claim", claim, "--like", owned)[0] == 0
    code, _, err = call(*words, "--claim", claim, "--like", forged)
    assert code == 2
    assert "not the one that the claim commits to" in " ".join(err.split())
    standing = standing_of(read_signed(claim), SIGNING.public_key(), KEY)
    if "notes" not in change:
        options = Options(reference=read_config(forged), standing=standing)
        with pytest.raises(UnsuitableModelError, match="than the claim commits to"):
            verify_answers(owned, KEY, options=options)
    alice = tmp_path / "alice"
    alice.mkdir()
    hearing.disclose(claim, KEY, alice, reference=owned)
    (alice / "reference" / "config.json").write_text(json.dumps(said | change))
    save_model(tmp_path / "suspect", network(), a_config(mean=0.9, std=0.1))
    heard = hearing.hear(tmp_path / "suspect", [alice], hearing.Bench())
    assert any("config is not the one" in note for note in heard.claimants[0].notes)
    assert heard.claimants[0].proves  # by what was committed to


def test_facts_of_a_network_stand_in_the_claim_and_nothing_else_reads_as_them(tmp_path, owned):
    facts = facts_of(owned)
    assert not facts.differs_from(OWN)
    claim = open_claim(read_signed(committed(tmp_path, owned)), SIGNING.public_key())
    assert claim.network == facts
    document = json.loads(claim.encode())
    assert document["network"]["mean"] == ["0.25"]
    plain = open_claim(read_signed(committed(tmp_path, owned, facts=False)), SIGNING.public_key())
    assert "network" not in json.loads(plain.encode())
    known = document["network"]
    for wrong in (
        None,
        {},
        known | {"mean": [0.25]},
        known | {"mean": ["0.250"]},
        known | {"mean": ["nan"]},
        known | {"mean": ["0.25", "0.25"]},
        known | {"std": ["0.0"]},
        known | {"std": ["-1.0"]},
        known | {"classes": []},
        known | {"classes": ["cat\n"]},
        known | {"classes": "cat"},
        known | {"input_size": [1, 32]},
        known | {"input_size": [1, 32, 0]},
        known | {"input_size": [1, 32, True]},
        known | {"config": "0"},
        known | {"more": 1},
    ):
        payload = canonical_json(document | {"network": wrong})
        signed = SignedClaim(sign(payload, PAYLOAD_TYPE, SIGNING), None)
        with pytest.raises(UnreadableClaimError):
            open_claim(signed, SIGNING.public_key())


class Inference(BaseHTTPRequestHandler):
    """Answers as a server of the Open Inference Protocol does; `model` is what it runs."""

    model = None

    def do_POST(self):
        (given,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        images = torch.tensor(given["data"]).view(given["shape"])
        with torch.no_grad():
            said = self.model(images)
        output = {"name": "y", "shape": list(said.shape), "datatype": "FP32"}
        body = json.dumps({"outputs": [output | {"data": said.flatten().tolist()}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def inference():
    handler = type("Handler", (Inference,), {"model": network()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_probe_takes_what_the_claim_commits_to(tmp_path, owned, call, inference):
    claim = committed(tmp_path, owned)
    words = ("probe", inference, "--key", tmp_path / "alice.key", "--protocol", "openinference")
    words = (*words, "--model", "m")
    code, out, _ = call(*words, "--claim", claim, "--json")
    assert (code, json.loads(out)["matches"]) == (0, 100)
    assert call(*words, "--mean", "0.9", "--std", "0.1")[0] == 1
    assert call(*words, "--claim", claim, "--mean", "0.9", "--std", "0.1")[0] == 2
    code, _, err = call(*words, "--claim", claim, "--alpha", "-8.5")  # it declares -9
    assert (code, "laxer than what the claim declares" in err.replace("\n", " ")) == (2, True)
    save_model(tmp_path / "other", network(), a_config(mean=0.9))
    assert call(*words, "--claim", claim, "--like", tmp_path / "other")[0] == 2
    save_key(drawn(2, count=100, side=32), tmp_path / "bob.key")
    assert call(*words[:3], tmp_path / "bob.key", *words[4:], "--claim", claim)[0] == 2
    plain = committed(tmp_path, owned, facts=False)
    assert call(*words, "--claim", plain)[0] == 2  # it says no mean and std
    assert call(*words, "--claim", plain, "--like", owned)[0] == 0


def turned(model, order):
    """The same network with its classes in another order."""
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(model.classifier.bias[order])
    return model


ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def test_classes_in_another_order_are_found_and_every_order_is_paid_for(tmp_path, call):
    save_model(tmp_path, turned(network(), ORDER), OWN)
    plain = verify_answers(tmp_path, KEY)
    assert not plain.accepted
    assert "in another order of the classes it matches" in plain.reason
    found = verify_answers(tmp_path, KEY, options=Options(every_reading=True))
    assert found.accepted
    assert found.corrections == {
        "readings": pytest.approx(math.log10(2)),
        "orders of the classes": pytest.approx(math.log10(math.factorial(10))),
    }
    assert found.log10_p_value == pytest.approx(-100 + sum(found.corrections.values()))
    save_key(KEY, tmp_path / "alice.key")
    words = ("verify", tmp_path, "--key", tmp_path / "alice.key", "--black-box")
    assert call(*words)[0] == 1
    assert call(*words, "--every-reading")[0] == 0


def test_a_normalisation_that_was_folded_into_the_weights_is_found_and_paid_for(tmp_path):
    """A thief may have the first layer do it, as his config then says; both ways are looked at."""
    folded = a_config(mean=0.6, std=0.2)
    save_model(tmp_path, network(folded), folded)
    strict = Options(reference=OWN)
    assert not verify_answers(tmp_path, KEY, options=strict).accepted
    found = verify_answers(tmp_path, KEY, options=replace(strict, every_reading=True))
    assert found.accepted
    assert found.corrections == {"readings": pytest.approx(math.log10(4))}


def test_every_reading_accepts_no_stranger_s_network(tmp_path):
    save_model(tmp_path, network(key=drawn(9, count=100, side=32)), a_config(mean=0.6))
    options = Options(reference=OWN, every_reading=True)
    for number in range(5):
        found = verify_answers(tmp_path, drawn(20 + number, count=100, side=32), options=options)
        assert found.log10_p_value > -3


def test_a_network_that_does_not_take_the_pictures_could_not_be_checked(tmp_path):
    three = {"arguments": {**OWN.arguments, "channels": 3}, "input_size": (3, 32, 32)}
    config = replace(OWN, **three, mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.manual_seed(0)
    save_model(tmp_path, config.build(), config)
    with pytest.raises(UnsuitableModelError, match=r"does not (take|run on) the key's pictures"):
        verify_answers(tmp_path, KEY, options=Options(reference=OWN))


def exhibit(folder, key, network_folder, weights):
    """What a claimant hands in, undated; with the folder of his network."""
    folder.mkdir()
    signing = Ed25519PrivateKey.generate()
    claim = claim_of(key, signing.public_key(), reference=weights)
    write_signed(sign_claim(claim, signing), folder / "claim.json")
    hearing.disclose(folder / "claim.json", key, folder, reference=network_folder)
    return folder


def test_the_judge_reads_a_suspect_that_lies_and_turns_its_classes_as_the_owner_s(tmp_path, owned):
    save_model(tmp_path / "suspect", turned(network(), ORDER), a_config(mean=0.9))
    digest = tensors_digest(read_weights(owned).tensors)
    alice = exhibit(tmp_path / "alice", KEY, owned, digest)
    bob_key = drawn(2, count=100, side=32)
    save_model(tmp_path / "bobs", network(key=bob_key), OWN)
    theirs = tensors_digest(read_weights(tmp_path / "bobs").tensors)
    bob = exhibit(tmp_path / "bob", bob_key, tmp_path / "bobs", theirs)
    heard = hearing.hear(tmp_path / "suspect", [alice, bob], hearing.Bench())
    assert heard.ruling.outcome.value == "owner"
    assert [each.proves for each in heard.claimants] == [True, False]


def test_what_a_suspect_says_it_takes_does_not_size_the_judge_s_images(tmp_path, owned, call):
    """Nor does a claimant's word of huge images, which would take the judge's memory."""
    tiny = replace(OWN, input_size=(1, 4, 4))
    save_model(tmp_path / "suspect", network(), tiny)
    digest = tensors_digest(read_weights(owned).tensors)
    alice = exhibit(tmp_path / "alice", KEY, owned, digest)
    assert hearing.networks(tmp_path / "suspect", [alice]) == [tiny, OWN]
    huge = json.loads((alice / "reference" / "config.json").read_text())
    huge["input_size"] = [1, 65_536, 65_536]
    vast = tmp_path / "vast"
    (vast / "reference").mkdir(parents=True)
    (vast / "reference" / "config.json").write_text(json.dumps(huge))
    assert hearing.networks(tmp_path / "suspect", [vast, alice, tmp_path]) == [tiny, OWN]
    table, few = load_digits(), tmp_path / "few.npz"
    images, labels = (table.images[:64] * 15.9).astype(np.uint8), table.target[:64]
    np.savez(few, images=images, labels=labels, classes=np.array(NAMES))
    words = ("judge", tmp_path / "suspect", alice, "--data", few, "--json")
    code, out, _ = call(*words)
    (found,) = json.loads(out)["claimants"][0]["readings"].values()
    assert (found["marked"], found["matches"]) == (True, 100)
    assert code in {0, 1}  # it was checked; what it makes of digits is F's business
    (tmp_path / "suspect" / "config.json").unlink()
    assert call(*words)[0] == code
    assert call(*words[:4], tmp_path / "missing.npz", "--json")[0] == 2
