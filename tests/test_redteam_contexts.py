"""What a forger would try with a context or a public key of his own making, each as a sentence."""

import hashlib
import json
import subprocess
import sys
from random import Random
from types import SimpleNamespace

import contexts
import hostile
import pytest
import torch
from constructed import small_alexnet
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hostile import OWNER, SIGNING
from safetensors.torch import save_file

from nnpassport.catalog import ADAPTERS, CATALOG, scheme_named, with_settings
from nnpassport.claims import curve, signing
from nnpassport.claims.claim import PAYLOAD_TYPE, check_claim, claim_of, sign_claim
from nnpassport.claims.claimfile import SignedClaim, write_signed
from nnpassport.data.images import Normalisation
from nnpassport.embedding.network.equations import Geometry
from nnpassport.embedding.schemes.passport import V2, Passport
from nnpassport.embedding.schemes.signature import matching, read_answers
from nnpassport.embedding.schemes.triggers import answers_to
from nnpassport.keys import validity
from nnpassport.keys.context import Context, LayerShape, TriggerShape, canonical_json
from nnpassport.keys.counts import Counts, verdict_on
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.keys.validity import MAX_BYTES, RULES, cost_of
from nnpassport.scheme import (
    BadSignatureError,
    MiscountedError,
    OwnershipError,
    UnreadableKeyError,
    UnsuitableModelError,
    Verdict,
)
from nnpassport.verification import verdicts as verification
from nnpassport.verification.hearing import Bench, hear

SEED = bytes(range(32))
CONV = Geometry((1, 1), ((0, 0),) * 2, (1, 1))


def spelled(context, **changes):
    """The bytes of a context that differs from a genuine one, whether it is one or not."""
    document = json.loads(context.encode()) | changes
    return canonical_json(document)


def with_layer(context, number=0, **changes):
    document = json.loads(context.encode())
    document["layers"][number] |= changes
    return canonical_json(document)


def linear(name, out, fan_in=64, bits=None):
    passport = (fan_in, 64) if bits is None else (fan_in, 1)
    return LayerShape(name, (out, fan_in), passport, Geometry(), bits)


def passports(*layers, scheme="passport-v2", triggers=None):
    return Context(scheme, "Eve", layers, triggers, bytes(16))


# One coin for each trial.


def test_one_bit_a_layer_does_not_own_every_network():
    """One sign was compared with all channels: 200 of 201 "bits" match, whatever the network."""
    rng = torch.Generator().manual_seed(0)
    weights = {f"{n}.weight": torch.randn(200, 64, generator=rng) for n in ("a", "b")}
    data = with_layer(passports(linear("a", 200), linear("b", 200)), bits=1)
    accepted = 0
    for number in range(200):
        try:
            verdict = V2.verify(weights, Key(number.to_bytes(32), Context.decode(data)))
        except ValueError:  # no context, or more matches than trials
            continue
        accepted += verdict.accepted
    assert accepted == 0


def test_one_bit_a_layer_is_in_no_key_and_no_claim(tmp_path):
    key = Key(SEED, passports(linear("a", 200), linear("b", 200)))
    save_key(key, tmp_path / "key")
    document = json.loads((tmp_path / "key").read_bytes())
    document["secret"]["context"] = with_layer(key.context, bits=1).decode()
    (tmp_path / "forged").write_bytes(canonical_json(document))
    with pytest.raises(UnreadableKeyError, match="reads one for each of its channels"):
        load_key(tmp_path / "forged")
    claim = json.loads(claim_of(key, OWNER, date="2026-01-31").encode())
    claim["context"] = with_layer(key.context, bits=1).decode()
    signed = SignedClaim(signing.sign(canonical_json(claim), PAYLOAD_TYPE, SIGNING), None)
    with pytest.raises(OwnershipError):
        check_claim(signed, OWNER)


def test_one_bit_of_an_adapter_does_not_decide_over_all_channels():
    layer = linear("a", 64, bits=64)
    with pytest.raises(UnreadableKeyError, match="1 bits for the 64 channels"):
        Context.decode(with_layer(passports(layer, scheme="lora"), bits=1))


@pytest.mark.parametrize(
    ("read", "signs"),
    [((200,), (1,)), ((1,), (200,)), ((200,), (100,)), ((2, 3), (2, 3)), ((), ()), ((0,), (1,))],
)
def test_a_bit_is_compared_with_one_reading(read, signs):
    with pytest.raises(UnsuitableModelError, match="one reading for each bit"):
        matching(torch.ones(read), torch.ones(signs))
    assert matching(torch.tensor([1.0, 0, -1]), torch.tensor([1.0, 1, 1])) == 1


@pytest.mark.parametrize("matches", [-1, 201, 1.0, True, None])
def test_no_verdict_has_counts_that_no_reading_gives(matches):
    key = Key(SEED, passports(linear("a", 200)))
    if isinstance(matches, int):  # others do not even pass the types that tests check
        with pytest.raises(MiscountedError):
            verdict_on(Counts("bits", {"a": (matches, 200)}), key, log10_alpha=-9.0)
    with pytest.raises(MiscountedError):
        Verdict("x", 200, matches, -1.0, -9.0)
    with pytest.raises(MiscountedError):
        Verdict("x", 200, 1, -1.0, -9.0, layers={"a": (matches, 100)})


@pytest.mark.parametrize("bits", [1, 199, 201, 400])
def test_v_compares_all_bits_of_the_context_and_no_others(bits):
    key = Key(SEED, passports(linear("a", 200)))
    with pytest.raises(MiscountedError, match="a key that has 200"):
        verdict_on(Counts("bits", {"a": (1, bits)}), key, log10_alpha=-9.0)


# Contexts are those that the scheme would have made.


def test_every_scheme_says_what_its_contexts_are():
    assert set(RULES) == {*CATALOG, *ADAPTERS}


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_what_a_scheme_draws_is_a_context_of_its(name):
    settings = {
        "greedy-residuals": {"bits": 64},
        "uchida": {"bits": 64},
        "uchida-mse": {"bits": 64},
        "deepmarks": {"repeats": 3},
    }
    scheme = with_settings(CATALOG[name].scheme, **settings.get(name, {}))
    model, size = contexts.networks()[0], contexts.SIZE
    if name == "order":  # the other keeps what it computed of its weights, and has few units
        model, size = small_alexnet(), (1, 32, 32)
    # By itself a passport takes the last layers, and these have too few bits to prove anything.
    named = {"layers": ["a", "b", "c"]} if isinstance(scheme, Passport) else {}
    key = scheme.draw_key(model, torch.randn(2, *size), seed=SEED, **named)
    assert Context.decode(key.context.encode()) == key.context
    if name.startswith("passport") and not scheme.triggers:
        # A setting gives triggers to any of the passports' schemes.
        asked = with_settings(scheme, triggers=24)
        drawn = asked.draw_key(model, torch.zeros(2, *contexts.SIZE), seed=SEED, **named)
        assert Context.decode(drawn.context.encode()).triggers.count == 24


UCHIDA_LAYER = LayerShape("c", (16, 12, 3, 3), (12, 3, 3), CONV, 62)
TRIGGERS = TriggerShape(32, 10, (1, 5, 5))
STEPPED = CONV._replace(stride=(2, 2))
NOT_MADE = {
    "passports of no layer": ("passport-v1", (), None),
    "passports with bits": ("passport-v3", (linear("a", 8, bits=8),), TRIGGERS),
    "pan with bits": ("pan", (linear("a", 8, bits=1),), None),
    "groups of what has none": (
        "passport-v2",
        (linear("a", 10)._replace(geometry=Geometry(groups=10), passport=(640, 64)),),
        None,
    ),
    "projection without bits": ("uchida", (linear("a", 8),), None),
    "two layers": ("uchida", (UCHIDA_LAYER, UCHIDA_LAYER._replace(name="d")), None),
    "no layer": ("uchida-mse", (), None),
    "triggers": ("uchida", (UCHIDA_LAYER,), TRIGGERS),
    "more bits than numbers": ("uchida", (UCHIDA_LAYER._replace(bits=109),), None),
    "read elsewhere": ("uchida", (UCHIDA_LAYER._replace(passport=(12, 3, 4)),), None),
    "sliding": ("uchida", (UCHIDA_LAYER._replace(geometry=STEPPED),), None),
    "grouped": (
        "uchida",
        (UCHIDA_LAYER._replace(geometry=CONV._replace(groups=4), passport=(48, 3, 3)),),
        None,
    ),
    "no codewords": ("deepmarks", (UCHIDA_LAYER._replace(bits=63),), None),
    "one codeword": ("deepmarks", (UCHIDA_LAYER._replace(bits=31),), None),
    "rows too short": ("greedy-residuals", (UCHIDA_LAYER._replace(bits=109),), None),
    "activations without pictures": ("deepsigns", (linear("a", 8, bits=32),), None),
    "activations without bits": ("deepsigns", (linear("a", 8),), TRIGGERS),
    "half a group": (
        "deepsigns",
        (linear("a", 8, bits=32),),
        TRIGGERS._replace(count=40),
    ),
    "bits for no group": ("deepsigns", (linear("a", 8, bits=33),), TRIGGERS),
    "positions": (
        "deepsigns",
        (linear("a", 8, bits=32)._replace(passport=(64, 2)),),
        TRIGGERS,
    ),
    "answers without pictures": ("adi", (), None),
    "answers and a layer": ("guo", (linear("a", 8),), TRIGGERS),
    "adapter without bits": ("lora", (linear("a", 8),), None),
    "adapter with triggers": ("lora", (linear("a", 8, bits=8),), TRIGGERS),
    "adapter, fewer bits": ("lora", (linear("a", 8, bits=7),), None),
    "adapter, sliding": (
        "lora",
        (UCHIDA_LAYER._replace(bits=16, geometry=STEPPED),),
        None,
    ),
}


@pytest.mark.parametrize("what", NOT_MADE)
def test_a_context_that_no_scheme_makes_is_refused(what):
    scheme, layers, triggers = NOT_MADE[what]
    with pytest.raises(UnreadableKeyError):
        Context(scheme, "Eve", layers, triggers, bytes(16))
    try:
        context = Context("some other", "Eve", layers, triggers, bytes(16))
    except UnreadableKeyError:  # no scheme of whatever name has such a layer
        return
    with pytest.raises(UnreadableKeyError):
        Context.decode(spelled(context, scheme=scheme))


def test_a_key_of_another_scheme_is_not_read():
    key = Key(SEED, passports(linear("a", 8), linear("b", 8)))
    for name in ("uchida", "deepmarks", "greedy-residuals"):
        with pytest.raises(UnsuitableModelError, match="key is for passport-v2"):
            scheme_named(name).verify({}, key)


# A p-value is honest whatever an honest context's geometry is.


@pytest.mark.parametrize("scheme", contexts.SCHEMES)
def test_no_context_has_a_smaller_p_than_tries_allow(scheme):
    """`results/fuzz.md` has many more; a broken one showed among the first thirty."""
    seeds = contexts.genuine(scheme)
    parser = hostile.Parser(seeds, contexts.spoiled, contexts.least)
    made = [contexts.spoiled(Random(f"{scheme} {number}"), seeds) for number in range(60)]
    found = [hostile.result(parser, data) for data in [*seeds, *made]]
    assert not [outcome for outcome, _ in found if outcome.startswith("BUG")]
    assert all(value is not None for _, value in found[: len(seeds)])
    read = [value for _, value in found if value is not None]
    assert len(read) > 5
    assert contexts.explained(
        min(each.log10_p for each in read), sum(each.readings for each in read)
    )


def test_the_least_of_many_p_values_is_held_against_their_number():
    assert contexts.explained(-6.9, 10_000)
    assert not contexts.explained(-7.1, 10_000)
    assert not contexts.explained(-3.1, 1)


def like_coins(matches, trials, chance=0.5):
    """Whether these counts have mean and variance of a binomial, at five standard errors."""
    found = torch.tensor(matches, dtype=torch.float64)
    mean, variance = trials * chance, trials * chance * (1 - chance)
    deviation = (variance / len(matches)) ** 0.5
    spread = variance * (2 / len(matches)) ** 0.5
    return abs(found.mean() - mean) < 5 * deviation and abs(found.var() - variance) < 5 * spread


def test_channels_whose_factors_are_all_the_same_still_match_like_coins():
    """Padding so large that every patch is alike, of a passport of one number, and equal filters.

    All γ of a layer then have one sign; and one tensor stands under two names. The bits do not.
    """
    geometry = Geometry((1, 1), ((30, 30),) * 2, (1, 1))
    layers = [LayerShape(name, (64, 1, 1, 1), (1, 1, 1), geometry) for name in ("a", "a.")]
    weights = dict.fromkeys(("a.weight", "a..weight"), torch.ones(64, 1, 1, 1))
    keys = [Key(number.to_bytes(32), passports(*layers)) for number in range(200)]
    # A factor of zero, one in 255 here, matches nothing: that never helps, and is left out.
    keys = [key for key in keys if all(key.layer_passport(each.name).all() for each in layers)]
    assert len(keys) > 180
    assert like_coins([V2.verify(weights, key).matches for key in keys], 128)


def test_a_projection_of_one_number_matches_like_coins():
    layer = LayerShape("a", (64, 1), (1, 1), Geometry(), 1)
    rows = LayerShape("a", (64, 1), (1, 1), Geometry(), 4)
    weights = {"a.weight": torch.ones(64, 1)}
    for scheme, shape in (("uchida", layer), ("greedy-residuals", rows)):
        read = scheme_named(scheme).verify
        matches = [
            read(weights, Key(n.to_bytes(32), passports(shape, scheme=scheme))).matches
            for n in range(400)
        ]
        assert like_coins(matches, shape.length)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_pictures_that_are_all_one_and_a_network_that_always_says_zero_match_like_dice(classes):
    """Choosing pictures is drawing seeds; more classes than answers match more seldom, not less."""
    picture = torch.zeros((1, 1, 5, 5), dtype=torch.uint8).expand(100, 1, 5, 5)
    context = Context("adi", "Eve", (), TriggerShape(100, classes, (1, 5, 5)), bytes(16))
    answers = torch.zeros(100, dtype=torch.int64)
    keys = [Key(n.to_bytes(32), context, trigger_images=picture) for n in range(400)]
    assert like_coins([read_answers(answers, key).matches for key in keys], 100, 1 / classes)


def test_one_class_and_one_choice_are_none():
    context = Context("adi", "Eve", (), TriggerShape(4, 2, (1, 5, 5)), bytes(16))
    with pytest.raises(UnreadableKeyError, match="2 classes"):
        Context.decode(spelled(context, triggers=context.triggers._asdict() | {"classes": 1}))
    pictures = torch.zeros((4, 1, 5, 5), dtype=torch.uint8)
    for choices in ([[0]] * 4, [[1, 1]] * 4, [[0, 2]] * 4):
        with pytest.raises(UnreadableKeyError, match="choices"):
            Key(SEED, context, trigger_images=pictures, trigger_choices=torch.tensor(choices))


def test_a_text_that_is_chosen_for_each_seed_pays_for_every_text():
    """Bits of a text are no coins: seven in eight are the forger's, and none of them is counted."""
    context = passports(linear("a", 240))
    signs = torch.ones(240)
    for number in range(20):
        seed = number.to_bytes(32)
        stream = Key(seed, context).layer_signs("a")
        wanted = (stream != signs).view(-1, 8).flip(1).to(torch.int64)
        codes = (wanted * 2 ** torch.arange(8)).sum(1).tolist()
        nearest = [min(range(32, 127), key=lambda c, code=c: (c ^ code).bit_count()) for c in codes]
        key = Key(seed, context, text="".join(map(chr, nearest)))
        matches = int((key.layer_signs("a") == signs).sum())
        assert matches > 180
        found = verdict_on(Counts("bits", {"a": (matches, 240)}), key)
        assert found.log10_p_value > -2


# Costs.


COSTLY = {
    "a projection without bits": (
        "uchida",
        (LayerShape("a", (2**20, 2**14), (2**14, 1), Geometry()),),
        None,
    ),
    "a projection of all that a weight could have": (
        "uchida",
        (LayerShape("a", (2, 2**15), (2**15, 1), Geometry(), 2**15),),
        None,
    ),
    "an adapter of a huge layer": (
        "lora",
        (LayerShape("a", (2**15, 2**15), (2**15, 1), Geometry(), 2**15),),
        None,
    ),
    "more bits than a tail has memory for": (
        "passport-v2",
        tuple(linear(f"{n}", 2**24, 1) for n in range(4)),
        None,
    ),
    "a passport of a quarter of a billion numbers": (
        "passport-v2",
        (LayerShape("a", (1, 1, 1, 1), (1, 2**13, 2**14), CONV),),
        None,
    ),
    "pictures of many channels": ("adi", (), TriggerShape(2, 2, (2**24, 1, 1))),
    "a huge picture": ("adi", (), TriggerShape(1, 2, (1, 2**14, 2**14))),
    "a weight that no machine holds": (
        "passport-v2",
        (LayerShape("a", (2**24, 2**24), (2**24, 1), Geometry()),),
        None,
    ),
}


@pytest.mark.parametrize("what", COSTLY)
def test_a_small_key_cannot_ask_for_gigabytes(what, monkeypatch):
    scheme, layers, triggers = COSTLY[what]
    monkeypatch.setattr(hashlib, "shake_256", None)  # nothing is derived before costs are known
    with pytest.raises(UnreadableKeyError):
        Context(scheme, "Eve", layers, triggers, bytes(16))


MEASURED = [
    ("uchida", (LayerShape("a", (2, 8192), (8192, 1), Geometry(), 1500),), None),
    ("lora", (LayerShape("a", (2048, 6144), (6144, 1), Geometry(), 2048),), None),
    (
        "passport-v2",
        (LayerShape("a", (8, 64, 3, 3), (64, 96, 96), Geometry((1, 1), ((1, 1),) * 2, (1, 1))),),
        None,
    ),
    ("adi", (), TriggerShape(12, 10, (3, 512, 512))),
]

MEASURING = """
import os, resource, sys
import torch
from nnpassport.catalog import scheme_named
from nnpassport.keys.context import Context
from nnpassport.keys.key import Key
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for line in sys.stdin.buffer:
    context = Context.decode(line.strip())
    key, scheme = Key(bytes(32), context), scheme_named(context.scheme)
    if os.fork() == 0:  # the peak of a child begins at what its parent has
        weights = {f"{layer.name}.weight": torch.ones(layer.weight) for layer in context.layers}
        before = peak()
        key.trigger_set() if context.triggers else scheme.verify(weights, key)
        print(peak() - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
def test_costs_are_those_of_what_is_allocated():
    made = [Context(s, "Eve", layers, shown, bytes(16)) for s, layers, shown in MEASURED]
    lines = b"\n".join(context.encode() for context in made)
    command = [sys.executable, "-c", MEASURING]
    done = subprocess.run(command, input=lines, capture_output=True, check=True)
    for context, spent in zip(made, done.stdout.split(), strict=True):
        counted = validity._pictures_bytes(context)
        counted += sum(cost_of(layer).bytes for layer in context.layers)
        assert 2**24 < int(spent) < counted + 2**25, context.scheme
        assert counted < MAX_BYTES / 4  # the numbers above are far from what is refused


# Only errors of ours.


def saved(tmp_path, key, weights):
    save_key(key, tmp_path / "key", overwrite=True)
    save_file(weights, tmp_path / "suspect.safetensors")
    return tmp_path / "suspect.safetensors", load_key(tmp_path / "key")


def test_pictures_of_another_size_are_an_error_of_ours():
    model = contexts.networks()[0]
    for size in ((3, 5, 5), (1, 5, 1)):
        key = Key(SEED, Context("adi", "Eve", (), TriggerShape(4, 10, size), bytes(16)))
        dense = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(25, 10))
        plain = Normalisation((0.5,) * size[0], (0.5,) * size[0])
        with pytest.raises(UnsuitableModelError, match="does not run on the key's pictures"):
            answers_to(key, dense, plain)
        with pytest.raises(OwnershipError):
            answers_to(key, dense, Normalisation((0.5,) * 2, (0.5,) * 2))
    layer = LayerShape("fc", (10, 16), (16, 1), Geometry(), 32)
    context = Context("deepsigns", "Eve", (layer,), TriggerShape(32, 10, (3, 5, 5)), bytes(16))
    key = Key(SEED, context, trigger_images=torch.zeros((32, 3, 5, 5), dtype=torch.uint8))
    plain = Normalisation((0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UnsuitableModelError, match="does not run on"):
        scheme_named("deepsigns").verify_network(model, key, plain)


def test_answers_do_not_depend_on_how_many_pictures_are_shown_at_once(monkeypatch):
    from nnpassport.embedding.schemes import triggers

    key = Key(SEED, Context("adi", "Eve", (), TriggerShape(30, 10, (1, 5, 5)), bytes(16)))
    model, plain = contexts.networks()[1], Normalisation((0.5,), (0.5,))
    whole = answers_to(key, model, plain)
    monkeypatch.setattr(triggers, "_SHOWN", 7)
    assert torch.equal(whole, answers_to(key, model, plain))
    assert len(whole) == 30


def test_whatever_the_layers_are_verify_gives_a_verdict_or_an_error_of_ours(tmp_path):
    weights = {"a.weight": torch.randn(8, 64), "c.weight": torch.randn(16, 12, 3, 3)}
    turned = Geometry(transposed=True)
    for number, (scheme, layer) in enumerate(
        [
            ("passport-v2", linear("a", 8)),
            ("passport-v2", linear("a", 64)._replace(geometry=turned)),
            ("passport-v1", LayerShape("a", (64, 8), (8, 64), turned)),
            ("passport-v2", LayerShape("c", (2**20, 2**19), (2**19, 64), Geometry())),
            ("uchida", UCHIDA_LAYER),
            ("greedy-residuals", UCHIDA_LAYER),
            ("deepmarks", UCHIDA_LAYER),
            ("lora", linear("a", 8, bits=8)),
            ("lora", linear("b", 8, bits=8)),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        suspect, key = saved(folder, Key(SEED, passports(layer, scheme=scheme)), weights)
        try:
            assert not verification.verify(suspect, key).accepted
        except OwnershipError:
            continue


# Public keys that one signature satisfies for everything.

SMALL_ORDER = [  # RFC 8032's encoding of the eight points whose eightfold is zero
    "0100000000000000000000000000000000000000000000000000000000000000",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0000000000000000000000000000000000000000000000000000000000000080",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
    "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
    "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa",
]
NOT_CANONICAL = [  # the same points by other bytes, which ZIP 215 takes
    "0100000000000000000000000000000000000000000000000000000000000080",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
    # y = p + 2 to p + 18: second names of other points, or of none
    *(((2**255 - 19 + y) | sign << 255).to_bytes(32, "little").hex()
      for y in range(2, 19) for sign in (0, 1)),
]  # fmt: skip
RFC_8032 = [  # public keys of its test vectors
    "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
    "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    "278117fc144c72340f67d0f2316e8386ceffbf2b2428c9c51fef7c597f1d426e",
]


def mixed_order():
    """A key of prime order with a point of small order added to it."""
    sound = curve.decoded(SIGNING.public_key().public_bytes_raw())
    return [
        curve.encoded(curve.plus(sound, curve.decoded(bytes.fromhex(each)))).hex()
        for each in SMALL_ORDER[1:]
    ]


WEAK = [*SMALL_ORDER, *NOT_CANONICAL, *mixed_order()]


@pytest.mark.parametrize("key", WEAK)
def test_no_weak_public_key_opens_anything(key):
    raw = bytes.fromhex(key)
    owner = SimpleNamespace(public_bytes_raw=lambda: raw, verify=lambda *_: None)
    assert not curve.is_sound(raw)
    envelope = signing.Envelope(b"anything", PAYLOAD_TYPE, bytes(64), key)
    with pytest.raises(BadSignatureError, match="holds for anything"):
        signing.open_envelope(envelope, PAYLOAD_TYPE, owner)


def test_the_eight_points_are_all_of_small_order_and_there_are_no_others():
    points = [curve.decoded(bytes.fromhex(each)) for each in SMALL_ORDER]
    assert len(set(points)) == 8
    assert all(curve.encoded(curve.times(8, each)) == curve.encoded(curve.ZERO) for each in points)
    assert all(curve.encoded(p).hex() == each for p, each in zip(points, SMALL_ORDER, strict=True))
    assert all(curve.decoded(bytes.fromhex(each)) is None for each in NOT_CANONICAL)


def test_one_signature_that_held_for_every_claim_holds_for_none():
    """With A = 0, (R, S) = (0, 0) is a signature of every message, says the library."""
    owner = Ed25519PublicKey.from_public_bytes(bytes.fromhex(SMALL_ORDER[0]))
    constant = bytes.fromhex(SMALL_ORDER[0]) + bytes(32)
    for context in (passports(linear("a", 200)), passports(linear("b", 200))):
        claim = claim_of(Key(SEED, context), owner, date="2026-01-31")
        payload = claim.encode()
        owner.verify(constant, signing._pre_authentication(payload, PAYLOAD_TYPE))
        envelope = signing.Envelope(payload, PAYLOAD_TYPE, constant, SMALL_ORDER[0])
        finding = check_claim(SignedClaim(envelope, None), owner)
        assert not finding.holds
        assert finding.claim is None


def test_a_claim_under_a_weak_key_is_refused_by_the_judge_and_not_left_open(tmp_path):
    key = Key(SEED, passports(linear("a", 200)))
    owner = Ed25519PublicKey.from_public_bytes(bytes.fromhex(SMALL_ORDER[0]))
    payload = claim_of(key, owner, date="2026-01-31").encode()
    constant = bytes.fromhex(SMALL_ORDER[0]) + bytes(32)
    envelope = signing.Envelope(payload, PAYLOAD_TYPE, constant, SMALL_ORDER[0])
    folder = tmp_path / "eve"
    folder.mkdir()
    write_signed(SignedClaim(envelope, None), folder / "claim.json")
    save_key(key, folder / "disclosed.key")
    save_file({"a.weight": torch.randn(200, 64)}, tmp_path / "suspect.safetensors")
    hearing = hear(tmp_path / "suspect.safetensors", [folder], Bench())
    (claimant,) = hearing.claimants
    assert claimant.unchecked is None
    assert "holds for anything" in claimant.refused
    assert hearing.ruling.outcome.value == "nobody"


def test_a_file_with_a_weak_public_key_is_not_read(tmp_path):
    from cryptography.hazmat.primitives import serialization

    owner = Ed25519PublicKey.from_public_bytes(bytes.fromhex(SMALL_ORDER[4]))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "weak.pem").write_bytes(owner.public_bytes(serialization.Encoding.PEM, spki))
    with pytest.raises(UnreadableKeyError, match="no one secret belongs to"):
        signing.load_public_key(tmp_path / "weak.pem")


def test_keys_that_a_secret_belongs_to_are_sound():
    for each in RFC_8032:
        assert curve.is_sound(bytes.fromhex(each))
    for number in range(20):
        secret = Ed25519PrivateKey.from_private_bytes(number.to_bytes(32))
        raw = secret.public_key().public_bytes_raw()
        assert curve.is_sound(raw)
        assert curve.encoded(curve.decoded(raw)) == raw
    for wrong in (b"", bytes(31), bytes(33)):
        assert not curve.is_sound(wrong)


def test_a_signature_with_the_order_added_to_it_does_not_hold():
    key = Key(SEED, passports(linear("a", 200)))
    signed = sign_claim(claim_of(key, OWNER, date="2026-01-31"), SIGNING)
    r, s = signed.envelope.signature[:32], signed.envelope.signature[32:]
    for times in range(1, 16):
        moved = int.from_bytes(s, "little") + times * curve.L
        if moved >= 2**256:
            break
        signature = r + moved.to_bytes(32, "little")
        with pytest.raises(InvalidSignature):
            OWNER.verify(
                signature, signing._pre_authentication(signed.envelope.payload, PAYLOAD_TYPE)
            )
        altered = signed._replace(envelope=signed.envelope._replace(signature=signature))
        assert not check_claim(altered, OWNER).holds
    assert times > 5
    assert check_claim(signed, OWNER).holds
