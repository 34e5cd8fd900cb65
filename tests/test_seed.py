import hashlib
import hmac
import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import nn

from nnpassport.embedding.network.equations import Geometry, geometry_of, passport_affine
from nnpassport.keys import derive as seed_module
from nnpassport.keys.context import Context, LayerShape, TriggerShape
from nnpassport.keys.derive import (
    derive_labels,
    derive_passport,
    derive_signs,
    length_prefixed,
    log10_text_choices,
    read_text,
    stream,
    trigger_stream,
    whiten_text,
)
from nnpassport.keys.key import Key
from nnpassport.scheme import BadSignatureError, UnreadableKeyError

ROOT = Path(__file__).parents[1]
SEED = bytes(range(32))
CONV = LayerShape(
    "conv", (40, 3, 3, 3), (6, 8, 8), Geometry((1, 1), ((1, 1), (1, 1)), (1, 1), groups=2)
)
LINEAR = LayerShape("fc", (13, 10), (10, 64), Geometry())
CONTEXT = Context("passport-v2", "Zoë", (CONV, LINEAR), TriggerShape(12, 10, (3, 8, 8)), b"n" * 16)


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chi_square_p(counts):
    counts = np.asarray(counts, dtype=float)
    expected = counts.sum() / len(counts)
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


# Streams


def test_stream_is_hkdf_then_shake():
    salt = hashlib.sha256(CONTEXT.encode()).digest()
    info = length_prefixed(b"nnpassport/v1", b"signs", b"conv")
    key = HKDF(hashes.SHA256(), 32, salt, info).derive(SEED)
    assert stream(SEED, CONTEXT, "signs", "conv")(1000) == hashlib.shake_256(key).digest(1000)


def test_the_oracles_give_the_published_vectors():
    # RFC 5869, A.1, and FIPS 202's empty message.
    hkdf = HKDF(hashes.SHA256(), 42, bytes(range(13)), bytes(range(0xF0, 0xFA)))
    assert hkdf.derive(b"\x0b" * 22).hex() == (
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    )
    assert hashlib.shake_256(b"").hexdigest(32) == (
        "46b9dd2b0ba88d13233b3feb743eeb243fcd52ea62b81b82b50c27646ed5762f"
    )


@given(short=st.integers(0, 300), more=st.integers(0, 300))
@settings(deadline=None, max_examples=30)
def test_more_bytes_never_change_the_earlier_ones(short, more):
    draw = trigger_stream(SEED, CONTEXT)
    assert draw(short + more)[:short] == draw(short)


@given(
    left=st.lists(st.binary(max_size=9), max_size=5),
    right=st.lists(st.binary(max_size=9), max_size=5),
)
def test_no_two_lists_are_prefixed_alike(left, right):
    assert (length_prefixed(*left) == length_prefixed(*right)) == (left == right)


def test_every_input_changes_the_stream():
    first = stream(SEED, CONTEXT, "signs", "conv")(32)
    others = [
        stream(b"\xff" + SEED[1:], CONTEXT, "signs", "conv")(32),
        stream(SEED, replace(CONTEXT, nonce=b"m" * 16), "signs", "conv")(32),
        stream(SEED, replace(CONTEXT, owner="Zoe"), "signs", "conv")(32),
        stream(SEED, CONTEXT, "passport", "conv")(32),
        stream(SEED, CONTEXT, "signs", "fc")(32),
        stream(SEED, CONTEXT, "sign", "sconv")(32),
    ]
    assert len({first, *others}) == 7


@pytest.mark.parametrize("seed", [b"", b"x" * 31, b"x" * 33, "x" * 32, bytearray(32)])
def test_refuses_a_seed_of_another_size_or_type(seed):
    with pytest.raises(UnreadableKeyError, match="token_bytes"):
        stream(seed, CONTEXT, "signs")


# What is derived


def test_signs_are_the_bits_of_the_stream():
    data = stream(SEED, CONTEXT, "signs", "conv")(5)
    oracle = [1.0 if bit == "1" else -1.0 for byte in data for bit in f"{byte:08b}"]
    assert derive_signs(SEED, CONTEXT, CONV).tolist() == oracle
    assert derive_signs(SEED, CONTEXT, LINEAR).dtype == np.float32
    assert len(derive_signs(SEED, CONTEXT, LINEAR)) == 13


def test_passports_are_the_bytes_of_the_stream_without_minus_128():
    data = stream(SEED, CONTEXT, "passport", "conv")(2000)
    integers = [byte - 256 if byte > 127 else byte for byte in data if byte != 128]
    assert len(integers) < 2000  # this stream has a byte to skip
    oracle = np.array([i / 127 for i in integers[:768]], dtype=np.float32)
    passport = derive_passport(SEED, CONTEXT, CONV)
    assert passport.shape == (2, 6, 8, 8)
    assert np.array_equal(passport, oracle.reshape(2, 6, 8, 8))


def test_a_stream_with_many_skipped_bytes_is_read_on():
    pattern = bytes([128] * 500 + list(range(100)))

    def draw(count):
        return (pattern * (count // 600 + 1))[:count]

    numbers = seed_module._signed_bytes(draw, 1000)
    assert numbers.tolist() == (list(range(100)) * 10)


def test_labels_are_words_of_the_stream_below_the_ceiling():
    context = replace(CONTEXT, triggers=TriggerShape(500, 7, (3, 8, 8)))
    data = stream(SEED, context, "trigger-labels")(4000)
    words = [int.from_bytes(data[i : i + 4], "big") for i in range(0, 4000, 4)]
    oracle = [w % 7 for w in words if w < 2**32 // 7 * 7][:500]
    labels = derive_labels(SEED, context)
    assert labels.dtype == np.int64
    assert labels.tolist() == oracle


def test_labels_skip_the_words_that_would_favour_some_classes(monkeypatch):
    high = (2**32 - 1).to_bytes(4, "big")

    def skewed(*_, bound=b""):
        return lambda count: ((high * 20 + bytes(7) + b"\x05") * (count // 88 + 1))[:count]

    monkeypatch.setattr(seed_module, "stream", skewed)
    assert derive_labels(SEED, CONTEXT).tolist() == [0, 5] * 6


def test_bits_and_passports_and_labels_are_uniform():
    wide = LayerShape("wide", (20_000, 40), (40, 4000), Geometry())
    context = Context("v1", "x", (wide,), TriggerShape(20_000, 10, (1, 1, 1)), b"k" * 16)
    signs = derive_signs(SEED, context, wide)
    passport = (derive_passport(SEED, context, wide) * 127).round().astype(int) + 127
    labels = derive_labels(SEED, context)
    assert 1e-3 < chi_square_p(np.bincount(signs > 0)) < 1 - 1e-3
    assert 1e-3 < chi_square_p(np.bincount(passport.flatten())) < 1 - 1e-3
    assert len(np.bincount(passport.flatten())) == 255
    assert 1e-3 < chi_square_p(np.bincount(labels)) < 1 - 1e-3


def test_signs_of_many_seeds_match_a_fixed_network_like_coin_tosses():
    fixed = np.ones(40)
    matches = [
        int((derive_signs(i.to_bytes(32, "big"), CONTEXT, CONV) == fixed).sum())
        for i in range(1500)
    ]
    assert abs(np.mean(matches) - 20) < 4 * math.sqrt(10 / 1500)
    assert abs(np.var(matches) - 10) < 1.5


def test_a_derived_passport_goes_through_its_layer():
    conv = nn.Conv2d(6, 40, 3, padding=1, groups=2)
    layer = CONV._replace(geometry=geometry_of(conv), weight=tuple(conv.weight.shape))
    assert layer == CONV
    passport = torch.from_numpy(derive_passport(SEED, CONTEXT, CONV))
    gamma, beta = passport_affine(conv.weight, passport, CONV.geometry)
    assert gamma.shape == beta.shape == (40,)


def test_refuses_to_derive_for_a_layer_of_another_shape():
    other = CONV._replace(passport=(6, 9, 9))
    for derive in (derive_signs, derive_passport):
        with pytest.raises(UnreadableKeyError, match="'conv'"):
            derive(SEED, CONTEXT, other)
    with pytest.raises(UnreadableKeyError, match="its layers are: conv, fc"):
        CONTEXT.layer("conv2")
    assert CONTEXT.layer("fc") is LINEAR


def test_refuses_triggers_where_there_are_none():
    context = replace(CONTEXT, triggers=None)
    for derive in (derive_labels, trigger_stream):
        with pytest.raises(UnreadableKeyError, match="no trigger set"):
            derive(SEED, context)


# Text signatures


@given(text=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=6))
@settings(deadline=None)
def test_text_comes_back(text):
    signs = whiten_text(text, SEED, CONTEXT)
    whole = np.concatenate([signs["conv"], signs["fc"]])
    assert read_text(whole, SEED, CONTEXT, len(text)) == text
    drawn = np.concatenate([derive_signs(SEED, CONTEXT, layer) for layer in CONTEXT.layers])
    assert np.array_equal(whole[8 * len(text) :], drawn[8 * len(text) :])
    assert read_text(torch.from_numpy(whole), SEED, CONTEXT, len(text)) == text


def test_text_bits_are_uniform_over_seeds():
    ones = [
        int((whiten_text("AAAAAA", i.to_bytes(32, "big"), CONTEXT)["conv"] > 0).sum())
        for i in range(500)
    ]
    assert abs(np.mean(ones) - 20) < 4 * math.sqrt(10 / 500)


def test_a_flipped_bit_shows_in_the_text():
    signs = whiten_text("hello", SEED, CONTEXT)
    whole = np.concatenate([signs["conv"], signs["fc"]])
    whole[7] *= -1
    assert read_text(whole, SEED, CONTEXT, 5) == "iello"
    whole[0] *= -1
    assert read_text(whole, SEED, CONTEXT, 5) == "�ello"


@pytest.mark.parametrize("text", ["", "1234567", "x" * 1000])
def test_refuses_a_text_that_does_not_fit(text):
    with pytest.raises(BadSignatureError, match=f"{len(text)} characters.*53 bits.*1 to 6"):
        whiten_text(text, SEED, CONTEXT)


@pytest.mark.parametrize("text", ["é", "a\n", "\x7f", "\x00", "€"])
def test_refuses_a_text_that_is_not_printable_ascii(text):
    with pytest.raises(BadSignatureError, match="printable ASCII") as error:
        whiten_text(text, SEED, CONTEXT)
    assert text not in str(error.value)


def test_refuses_to_read_from_another_number_of_signs():
    for signs, length in ((torch.ones(52), 1), (torch.ones(53), 7), (torch.ones(53), -1)):
        with pytest.raises(BadSignatureError, match="needed: 53 signs"):
            read_text(signs, SEED, CONTEXT, length)


def test_text_choices_cover_the_texts_of_every_length():
    assert log10_text_choices("hello") == pytest.approx(6 * math.log10(96))
    # Kraft: the weights of all texts sum to 1, so that a union bound over all of them holds.
    total = sum(95**n * 10 ** -log10_text_choices("x" * n) for n in range(140))
    assert total == pytest.approx(1 - (95 / 96) ** 140)


# Context


sizes = st.integers(1, 9)


@st.composite
def contexts(draw):
    names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    axes, layers = draw(st.integers(0, 3)), []
    for name in draw(st.lists(names, max_size=3, unique=True)):
        groups = draw(st.integers(1, 3)) if axes else 1
        weight = (groups * draw(sizes), draw(sizes), *([3] * axes))
        space = [draw(st.integers(3, 9)) for _ in range(max(axes, 1))]
        geometry = Geometry((1,) * axes, ((1, 0),) * axes, (1,) * axes, groups, "reflect")
        layers.append(LayerShape(name, weight, (weight[1] * groups, *space), geometry))
    size = (draw(sizes), draw(sizes), draw(sizes))
    triggers = draw(st.none() | st.just(TriggerShape(draw(sizes), draw(sizes) + 1, size)))
    nonce = draw(st.binary(min_size=16, max_size=16))
    return Context(draw(names), draw(names), tuple(layers), triggers, nonce)


@given(contexts())
@settings(deadline=None)
def test_encoding_comes_back_and_is_ascii(context):
    data = context.encode()
    assert data.isascii()
    assert Context.decode(data) == context
    assert Context.decode(data).encode() == data


@given(position=st.integers(0, len(CONTEXT.encode()) - 1), byte=st.integers(0, 255))
@settings(deadline=None, max_examples=300)
def test_an_altered_context_is_refused_or_is_another_one(position, byte):
    data = bytearray(CONTEXT.encode())
    data[position] = byte
    try:
        context = Context.decode(bytes(data))
    except UnreadableKeyError:
        return
    assert context.encode() == bytes(data)


def document():
    return json.loads(CONTEXT.encode())


def encoded(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def with_layer(**changes):
    changed = document()
    changed["layers"][0] |= changes
    return encoded(changed)


def with_geometry(**changes):
    return with_layer(geometry=document()["layers"][0]["geometry"] | changes)


HOSTILE_CONTEXTS = {
    "empty": b"",
    "no object": b"[]",
    "null": b"null",
    "not utf-8": b"\xff\xfe",
    "truncated": CONTEXT.encode()[:-1],
    "whitespace": CONTEXT.encode() + b"\n",
    "pretty": json.dumps(document(), sort_keys=True).encode(),
    "unsorted": json.dumps(dict(reversed(document().items())), separators=(",", ":")).encode(),
    "raw unicode": CONTEXT.encode().replace(b"\\u00eb", "ë".encode()),
    "duplicate": CONTEXT.encode().replace(b'"version":1', b'"version":1,"version":1'),
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "balanced depth": encoded({"layers": 0}).replace(b"0", b"[" * 900 + b"]" * 900),
    "huge number": CONTEXT.encode().replace(b'"version":1', b'"version":' + b"9" * 5000),
    "nan": CONTEXT.encode().replace(b'"version":1', b'"version":NaN'),
    "unknown key": encoded(document() | {"extra": 1}),
    "version 2": encoded(document() | {"version": 2}),
    "version true": encoded(document() | {"version": True}),
    "version float": encoded(document() | {"version": 1.0}),
    "format": encoded(document() | {"format": "other"}),
    "missing": encoded({"format": "nnpassport-context", "version": 1}),
    "owner number": encoded(document() | {"owner": 1}),
    "owner empty": encoded(document() | {"owner": ""}),
    "owner long": encoded(document() | {"owner": "x" * 1001}),
    "owner surrogate": encoded(document() | {"owner": "\ud800"}),
    "scheme list": encoded(document() | {"scheme": []}),
    "nonce short": encoded(document() | {"nonce": "00"}),
    "nonce upper": encoded(document() | {"nonce": "AB" * 16}),
    "nonce spaced": encoded(document() | {"nonce": "ab " * 16}),
    "nonce null": encoded(document() | {"nonce": None}),
    "layers object": encoded(document() | {"layers": {"a": 1}}),
    "layers number": encoded(document() | {"layers": 3}),
    "layers null": encoded(document() | {"layers": [None]}),
    "layers twice": encoded(document() | {"layers": document()["layers"] * 2}),
    "layers many": encoded(document() | {"layers": [document()["layers"][0]] * 10_001}),
    "layer extra": with_layer(extra=1),
    "layer name": with_layer(name=3),
    "layer name list": with_layer(name=["a"]),
    "weight float": with_layer(weight=[40.0, 3, 3, 3]),
    "weight bool": with_layer(weight=[True, 3, 3, 3]),
    "weight empty": with_layer(weight=[]),
    "weight text": with_layer(weight="40"),
    "weight zero": with_layer(weight=[0, 3, 3, 3]),
    "weight rank": with_layer(weight=[40, 3, 3]),
    "weight huge": with_layer(weight=[10**4000, 3, 3, 3]),
    "kernel too large": with_layer(weight=[40, 3, 11, 3]),
    "passport inputs": with_layer(passport=[7, 8, 8]),
    "passport huge": with_layer(passport=[6, 2**14, 2**14]),
    "passport negative": with_layer(passport=[6, -8, 8]),
    "geometry null": with_layer(geometry=None),
    "geometry list": with_layer(geometry=[1]),
    "geometry extra": with_geometry(extra=1),
    "groups": with_geometry(groups=3),
    "groups list": with_geometry(groups=[2]),
    "stride zero": with_geometry(stride=[0, 1]),
    "stride rank": with_geometry(stride=[1]),
    "four axes": with_geometry(stride=[1, 1, 1, 1]),
    "padding negative": with_geometry(padding=[[-1, 1], [1, 1]]),
    "padding triple": with_geometry(padding=[[1, 1, 1], [1, 1]]),
    "padding flat": with_geometry(padding=[1, 1]),
    "padding mode": with_geometry(padding_mode="mirror"),
    "reflect too far": with_geometry(padding_mode="reflect", padding=[[8, 8], [1, 1]]),
    "circular too far": with_geometry(padding_mode="circular", padding=[[9, 8], [1, 1]]),
    "triggers list": encoded(document() | {"triggers": [1, 2, [3, 4, 5]]}),
    "triggers one class": encoded(
        document() | {"triggers": {"count": 1, "classes": 1, "size": [1, 1, 1]}}
    ),
    "triggers huge": encoded(
        document() | {"triggers": {"count": 2**20, "classes": 2, "size": [1, 2**9, 1]}}
    ),
    "triggers flat": encoded(document() | {"triggers": {"count": 1, "classes": 2, "size": 3}}),
    "triggers short": encoded(document() | {"triggers": {"count": 1, "classes": 2}}),
}


@pytest.mark.parametrize("data", HOSTILE_CONTEXTS.values(), ids=HOSTILE_CONTEXTS.keys())
def test_refuses_a_hostile_context(data):
    with pytest.raises(UnreadableKeyError) as error:
        Context.decode(data)
    assert len(str(error.value)) < 600


def test_the_hostile_contexts_start_from_one_that_is_accepted():
    assert encoded(document()) == CONTEXT.encode()
    assert Context.decode(with_layer(name="other")).layers[0].name == "other"
    assert Context.decode(with_geometry(padding_mode="circular", padding=[[8, 8], [1, 1]]))


def test_refuses_more_bytes_than_a_context_can_have():
    with pytest.raises(UnreadableKeyError, match="at most"):
        Context.decode(b" " * (2**24 + 1))


# The specification


def vectors():
    page = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")
    return json.loads(page.split("```json\n")[1].split("```")[0])


def test_the_vectors_in_the_specification_hold():
    known = vectors()
    seed, data = bytes.fromhex(known["seed"]), known["context"].encode("ascii")
    context = Context.decode(data)
    key, texted = Key(seed, context), Key(seed, context, text=known["text"])
    assert hashlib.sha256(data).hexdigest() == known["salt"]
    for name, start in known["streams"].items():
        assert stream(seed, context, *name.split(":"))(16).hex() == start
    for layer in context.layers:
        name, passport = layer.name, key.layer_passport(layer.name)
        for signs, k in ((known["signs"], key), (known["text_signs"], texted)):
            assert signs[name] == "".join("1" if s > 0 else "0" for s in k.layer_signs(name))
        first = (passport.flatten()[:8] * 127).round().int().tolist()
        assert first == known["passports"][name]["first"]
        digest = hashlib.sha256(passport.numpy().astype("<f4").tobytes()).hexdigest()
        assert digest == known["passports"][name]["sha256"]
    assert derive_labels(seed, context).tolist() == known["labels"]
    first_image = key.trigger_set()[0][0].numpy().tobytes()
    assert hashlib.sha256(first_image).hexdigest() == known["trigger_image"]
    assert key.fingerprint == known["fingerprint"]
    assert texted.fingerprint == known["text_fingerprint"]


def test_the_specification_names_every_purpose_and_version():
    page = (ROOT / "docs" / "derivation.md").read_text(encoding="utf-8")
    for word in ("`passport`", "`signs`", "`trigger-labels`", "`trigger-images`", "nnpassport/v1"):
        assert word in page


@pytest.mark.parametrize("text", [None, "Alice!"])
@pytest.mark.parametrize("number", range(4))
def test_the_independent_implementation_agrees(number, text):
    derive = load_example("derive_independently").derive
    seed = hashlib.sha256(bytes([number])).digest()
    context = replace(CONTEXT, triggers=TriggerShape(50, 3 + number, (1, 2, 2)))
    context = replace(context, triggers=context.triggers if number else None)
    theirs = derive(seed, context.encode(), text or "")
    ours = Key(seed, context, text=text)
    assert theirs["fingerprint"] == ours.fingerprint
    for layer in context.layers:
        signs = torch.tensor(theirs["bits"][layer.name]) * 2.0 - 1
        numbers = torch.tensor(theirs["passports"][layer.name], dtype=torch.float64) / 127
        assert torch.equal(signs, ours.layer_signs(layer.name))
        assert torch.equal(numbers.float(), ours.layer_passport(layer.name).flatten())
    assert theirs["labels"] == (derive_labels(seed, context).tolist() if number else [])


def test_the_independent_implementation_derives_projections_too():
    derive = load_example("derive_independently").derive
    layer = LayerShape("host", (4, 3, 2, 2), (3, 2, 2), CONTEXT.layers[0].geometry, 10)
    layer = layer._replace(geometry=layer.geometry._replace(groups=1, padding=((0, 0),) * 2))
    context = replace(CONTEXT, scheme="uchida", layers=(layer,), triggers=None)
    theirs, ours = derive(bytes(32), context.encode()), Key(bytes(32), context)
    assert Context.decode(context.encode()) == context
    numbers = torch.tensor(theirs["passports"]["host"], dtype=torch.float64) / 127
    assert torch.equal(numbers.float(), ours.layer_projection("host").flatten())
    assert torch.equal(torch.tensor(theirs["bits"]["host"]) * 2.0 - 1, ours.layer_signs("host"))


def test_the_independent_implementation_is_short_and_imports_only_the_standard_library():
    lines = (ROOT / "examples" / "derive_independently.py").read_text().splitlines()
    imports = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imports == {"hashlib", "hmac", "json", "math", "pathlib", "sys"}
    assert len(lines) <= 70


def test_what_is_bound_to_pictures_is_as_specified():
    """`docs/derivation.md`, pictures of the owner's own: by hand, with the standard library."""
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    choices = torch.tensor([[1, 4], [0, 3]])
    context = Context("adi", "Zoë", (), TriggerShape(2, 10, (3, 2, 2)), bytes(16))
    key = Key(bytes(32), context, trigger_images=images, trigger_choices=choices)

    def prefixed(each):
        return b"".join(len(part).to_bytes(8, "big") + part for part in each)

    def parts(name, dtype, shape, numbers):
        return [name.encode(), dtype.encode(), shape.encode(), numbers]

    numbers = b"".join(int(n).to_bytes(8, "little") for n in choices.flatten())
    spelled = parts("trigger_choices", "int64", "2,2", numbers)
    spelled += parts("trigger_images", "uint8", "2,3,2,2", bytes(range(24)))
    bound = hashlib.sha256(prefixed(spelled)).digest()
    info = prefixed([b"nnpassport/v1", b"trigger-labels", b"", bound])
    salt = hashlib.sha256(context.encode()).digest()
    extracted = hmac.new(salt, bytes(32), "sha256").digest()
    stream_key = hmac.new(extracted, info + b"\x01", "sha256").digest()
    words = hashlib.shake_256(stream_key).digest(8)
    places = [int.from_bytes(words[at : at + 4], "big") % 2 for at in (0, 4)]
    assert key.trigger_set()[1].tolist() == [[1, 4][places[0]], [0, 3][places[1]]]
