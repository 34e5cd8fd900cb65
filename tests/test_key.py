import base64
import copy
import errno
import hashlib
import json
import math
import os
import pickle
import stat
import time
import traceback
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as save_tensors

from nnpassport.embedding.network.equations import Geometry
from nnpassport.keys import keyfile
from nnpassport.keys.context import (
    Context,
    LayerShape,
    TriggerShape,
    base64_bytes,
    base64_text,
    canonical_json,
)
from nnpassport.keys.derive import (
    derive_labels,
    derive_passport,
    derive_signs,
    length_prefixed,
    trigger_stream,
    whiten_text,
)
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import load_key, save_key
from nnpassport.scheme import (
    BadSignatureError,
    UnreadableKeyError,
    UnwritableOutputError,
)

SEED = hashlib.sha256(b"the seed of the tests").digest()
TEXT = "Qx7#"
PASSPHRASE = "correct hörse battery"
CONV = LayerShape("layer4.conv", (40, 3, 3, 3), (3, 8, 8), Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
LINEAR = LayerShape("fc", (13, 10), (10, 64), Geometry())
CONTEXT = Context("passport-v2", "Alice", (CONV, LINEAR), TriggerShape(6, 10, (3, 8, 8)), b"n" * 16)
NAMES = ("layer4.conv", "fc")


def explicit_parts():
    draw = torch.Generator().manual_seed(3)
    return {
        "passports": {
            "layer4.conv": torch.randn(2, 3, 8, 8, generator=draw),
            "fc": torch.randn(2, 10, 64, generator=draw),
        },
        "signs": {"layer4.conv": torch.ones(40), "fc": -torch.ones(13)},
        "trigger_images": torch.randint(256, (6, 3, 8, 8), generator=draw).to(torch.uint8),
        "trigger_labels": torch.tensor([0, 9, 3, 3, 1, 2]),
    }


KEYS = {
    "derived": lambda: Key(SEED, CONTEXT),
    "text": lambda: Key(SEED, CONTEXT, text=TEXT),
    "explicit": lambda: Key(SEED, CONTEXT, **explicit_parts()),
    "explicit passports, text": lambda: Key(
        SEED, CONTEXT, text=TEXT, passports=explicit_parts()["passports"]
    ),
    "explicit labels": lambda: Key(
        SEED, CONTEXT, trigger_labels=explicit_parts()["trigger_labels"]
    ),
}


@pytest.fixture(params=KEYS)
def key(request):
    return KEYS[request.param]()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    """The bytes of a protected key file."""
    path = tmp_path_factory.mktemp("sealed") / "key"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(keyfile._SCRYPT, "n", 2**14)  # the cheapest that is read: dozens are
        save_key(KEYS["text"](), path, passphrase=PASSPHRASE)
    return path.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The bytes of a key file without a passphrase."""
    path = tmp_path_factory.mktemp("plain") / "key"
    save_key(KEYS["explicit passports, text"](), path)
    return path.read_bytes()


def same(left, right):
    """Whether two keys hold the same secrets, compared part by part."""
    tensors, others = left.explicit_tensors(), right.explicit_tensors()
    return (
        (left.seed, left.context, left.text) == (right.seed, right.context, right.text)
        and set(tensors) == set(others)
        and all(equal(tensors[name], others[name]) for name in tensors)
    )


def equal(left, right):
    """Whether two arrays, or an array and a tensor, are the same numbers of the same kind."""
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and np.array_equal(left, right)


# What a key gives


def test_a_derived_key_gives_what_the_seed_gives():
    key = KEYS["derived"]()
    for layer in (CONV, LINEAR):
        assert equal(key.layer_signs(layer.name), derive_signs(SEED, CONTEXT, layer))
        assert equal(key.layer_passport(layer.name), derive_passport(SEED, CONTEXT, layer))


def test_a_key_gives_the_same_numbers_as_arrays_and_as_tensors(key):
    for name in NAMES:
        for array, tensor in (
            (key.signs_array(name), key.layer_signs(name)),
            (key.passport_array(name), key.layer_passport(name)),
            (key.projection_array(name), key.layer_projection(name)),
        ):
            assert isinstance(array, np.ndarray)
            assert isinstance(tensor, torch.Tensor)
            assert equal(array, tensor)
    assert all(map(equal, key.trigger_arrays(), key.trigger_set()))


def test_a_key_is_the_same_made_of_arrays_or_of_tensors():
    parts = explicit_parts()
    arrays = {
        name: {n: t.numpy() for n, t in part.items()} if isinstance(part, dict) else part.numpy()
        for name, part in parts.items()
    }
    turned = {**arrays, "trigger_images": np.asfortranarray(arrays["trigger_images"])}
    turned["signs"] = {n: torch.stack([t, t], 1)[:, 0] for n, t in parts["signs"].items()}
    grown = {n: t.clone().requires_grad_() for n, t in parts["passports"].items()}
    keys = [Key(SEED, CONTEXT, **given) for given in (arrays, turned, parts | {"passports": grown})]
    assert {each.fingerprint for each in keys} == {KEYS["explicit"]().fingerprint}


def test_a_text_key_gives_the_whitened_text():
    key = KEYS["text"]()
    for name, signs in whiten_text(TEXT, SEED, CONTEXT).items():
        assert equal(key.layer_signs(name), signs)


def test_an_explicit_key_gives_what_it_was_given():
    key, parts = KEYS["explicit"](), explicit_parts()
    for name in NAMES:
        assert torch.equal(key.layer_signs(name), parts["signs"][name])
        assert torch.equal(key.layer_passport(name), parts["passports"][name])
    images, labels = key.trigger_set()
    assert torch.equal(images, parts["trigger_images"])
    assert torch.equal(labels, parts["trigger_labels"])


def test_only_a_key_without_explicit_tensors_is_derived():
    assert {name for name, make in KEYS.items() if make().derived} == {"derived", "text"}


def test_trigger_images_come_from_their_stream(monkeypatch):
    asked = []

    def abstract_images(draw, *, count, size):
        asked.append((draw(8), count, size))
        return np.zeros((count, *size), np.uint8)

    monkeypatch.setattr("nnpassport.keys.key.abstract_images", abstract_images)
    images, labels = KEYS["derived"]().trigger_set()
    assert asked == [(trigger_stream(SEED, CONTEXT)(8), 6, (3, 8, 8))]
    assert images.shape == (6, 3, 8, 8)
    assert equal(labels, derive_labels(SEED, CONTEXT))
    _, labels = KEYS["explicit labels"]().trigger_set()
    assert labels.tolist() == [0, 9, 3, 3, 1, 2]


def test_refuses_what_the_key_does_not_have():
    key = Key(SEED, Context("v1", "Alice", (CONV,), None, b"n" * 16))
    for ask in (key.layer_signs, key.layer_passport):
        with pytest.raises(UnreadableKeyError, match="no layer 'fc'"):
            ask("fc")
    with pytest.raises(UnreadableKeyError, match="no trigger set"):
        key.trigger_set()


def test_a_key_does_not_change_with_the_tensors_it_was_made_from_or_gave():
    parts = explicit_parts()
    key = Key(SEED, CONTEXT, **parts)
    before = key.fingerprint
    for tensor in (
        *parts["passports"].values(),
        *parts["signs"].values(),
        parts["trigger_images"],
        parts["trigger_labels"],
        *(key.layer_passport(name) for name in NAMES),
        *(key.layer_signs(name) for name in NAMES),
        *key.trigger_set(),
    ):
        tensor.zero_()
    parts["passports"].clear()
    assert key.fingerprint == before


def test_a_key_survives_copy_and_pickle(key):
    assert same(copy.deepcopy(key), key)
    assert same(pickle.loads(pickle.dumps(key)), key)


def test_a_file_of_explicit_parts_is_written_byte_for_byte_as_ever(tmp_path):
    """The digests are of the first release, whose keys held tensors."""

    def counted(kind, *shape):
        return (np.arange(math.prod(shape)).reshape(shape) % 251).astype(kind)

    key = Key(
        SEED,
        CONTEXT,
        passports={
            "fc": counted("float32", 2, 10, 64) / 8,
            "layer4.conv": counted("float32", 2, 3, 8, 8) / 4,
        },
        signs={
            "fc": counted("float32", 13) % 2 * 2 - 1,
            "layer4.conv": counted("float32", 40) % 2 * 2 - 1,
        },
        trigger_images=counted("uint8", 6, 3, 8, 8),
        trigger_choices=np.array([[1, 4]] * 6),
    )
    save_key(key, tmp_path / "key")
    written = (tmp_path / "key").read_bytes()
    assert key.trigger_arrays()[1].tolist() == [1, 4, 1, 1, 1, 1]
    assert key.fingerprint == "d6d3626888f01809ee148fa54d796c468e67af69a7dd8df3c2b6ae391521b5dc"
    assert hashlib.sha256(written).hexdigest() == (
        "680d98113feec9b46345233d91061dde58b5b705101004f8ec18fc360a5560ac"
    )


def bad_parts():
    parts = explicit_parts()
    passports, signs = parts["passports"], parts["signs"]
    nan = passports["fc"].clone()
    nan[0, 0, 0] = float("nan")
    zero = torch.cat([torch.ones(12), torch.zeros(1)])
    return {
        "seed short": {"seed": b"x" * 31},
        "seed text": {"seed": "x" * 32},
        "text and signs": {"text": "ab", "signs": signs},
        "passports missing": {"passports": {"fc": passports["fc"]}},
        "passports none": {"passports": {}},
        "passports more": {"passports": passports | {"other": passports["fc"]}},
        "passport shape": {"passports": passports | {"fc": torch.zeros(2, 10, 63)}},
        "passport half": {"passports": passports | {"fc": passports["fc"].half()}},
        "passport bfloat16": {"passports": passports | {"fc": passports["fc"].bfloat16()}},
        "passport sparse": {"passports": passports | {"fc": passports["fc"].to_sparse()}},
        "passport list": {"passports": passports | {"fc": passports["fc"].tolist()}},
        "passport big-endian": {
            "passports": passports | {"fc": passports["fc"].numpy().astype(">f4")}
        },
        "passport nan": {"passports": passports | {"fc": nan}},
        "signs shape": {"signs": signs | {"fc": torch.ones(12)}},
        "signs zero": {"signs": signs | {"fc": zero}},
        "signs integer": {"signs": signs | {"fc": torch.ones(13, dtype=torch.int64)}},
        "images float": {"trigger_images": torch.zeros(6, 3, 8, 8)},
        "images count": {"trigger_images": torch.zeros(5, 3, 8, 8, dtype=torch.uint8)},
        "labels count": {"trigger_labels": torch.zeros(5, dtype=torch.int64)},
        "labels high": {"trigger_labels": torch.full((6,), 10)},
        "labels low": {"trigger_labels": torch.full((6,), -1)},
        "labels int32": {"trigger_labels": torch.zeros(6, dtype=torch.int32)},
    }


@pytest.mark.parametrize("parts", bad_parts().values(), ids=bad_parts().keys())
def test_refuses_parts_that_do_not_fit(parts):
    with pytest.raises(UnreadableKeyError, match=r"but needs .*; draw a key"):
        Key(**{"seed": SEED, "context": CONTEXT} | parts)


def test_refuses_triggers_without_a_trigger_shape():
    context = Context("v1", "Alice", (CONV,), None, b"n" * 16)
    with pytest.raises(UnreadableKeyError, match="trigger"):
        Key(SEED, context, trigger_labels=torch.zeros(6, dtype=torch.int64))


def test_refuses_a_text_that_does_not_fit():
    with pytest.raises(BadSignatureError, match="7 characters"):
        Key(SEED, CONTEXT, text="1234567")


# The fingerprint


def test_fingerprint_is_the_hash_of_what_the_specification_says():
    parts = explicit_parts()
    listed = [b"nnpassport/key/v1", SEED, CONTEXT.encode(), b"no text"]
    for name, dtype, shape, tensor, form in (
        ("passports/fc", "float32", "2,10,64", parts["passports"]["fc"], "<f4"),
        ("passports/layer4.conv", "float32", "2,3,8,8", parts["passports"]["layer4.conv"], "<f4"),
        ("signs/fc", "float32", "13", parts["signs"]["fc"], "<f4"),
        ("signs/layer4.conv", "float32", "40", parts["signs"]["layer4.conv"], "<f4"),
        ("trigger_images", "uint8", "6,3,8,8", parts["trigger_images"], "u1"),
        ("trigger_labels", "int64", "6", parts["trigger_labels"], "<i8"),
    ):
        listed += [name.encode(), dtype.encode(), shape.encode()]
        listed += [tensor.numpy().astype(form).tobytes()]
    oracle = hashlib.sha256(length_prefixed(*listed)).hexdigest()
    assert KEYS["explicit"]().fingerprint == oracle


def test_every_part_changes_the_fingerprint():
    base, parts = {"seed": SEED, "context": CONTEXT}, explicit_parts()
    moved = {name: tensor.clone() for name, tensor in parts["passports"].items()}
    moved["fc"][0, 0, 0] += 1e-6
    changed = [
        {},
        {"seed": bytes(32)},
        {"context": Context("passport-v3", "Alice", CONTEXT.layers, CONTEXT.triggers, b"n" * 16)},
        {"text": "a"},
        {"text": "b"},
        {"passports": parts["passports"]},
        {"passports": moved},
        {"signs": parts["signs"]},
        {"signs": {name: -tensor for name, tensor in parts["signs"].items()}},
        {"trigger_images": parts["trigger_images"]},
        {"trigger_labels": parts["trigger_labels"]},
    ]
    assert len({Key(**base | change).fingerprint for change in changed}) == len(changed)


# Secrets stay secret


def forms(secret):
    """The ways in which a secret could be printed."""
    encoded = base64.b64encode(secret).decode()
    return [secret.hex(), secret.hex().upper(), encoded[:-4], repr(secret)[2:-1]]


def assert_silent(shown):
    """Nothing secret in `shown`, not even half of the seed."""
    hidden = [*forms(SEED), *forms(SEED[:16]), *forms(SEED[16:]), TEXT, PASSPHRASE]
    for secret in hidden:
        assert secret not in shown


def everything_said(error):
    """All that an error and those it came from could show in a log."""
    said, seen = ["".join(traceback.format_exception(error))], error
    while seen is not None:
        said += [str(seen), repr(seen), repr(vars(seen)), repr(seen.args)]
        said += [repr(getattr(seen, name, "")) for name in ("doc", "object")]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(said)


def test_a_key_never_shows_its_secrets(key):
    for shown in (repr(key), str(key), f"{key}", f"{[key]}"):
        assert_silent(shown)
        assert key.fingerprint in shown
    assert repr(KEYS["derived"]()).startswith("Key(scheme='passport-v2', owner='Alice', layers=2,")


def test_a_protected_file_holds_no_secret_in_the_clear(sealed):
    assert_silent(sealed.decode("ascii"))
    assert SEED.hex() not in sealed.decode("ascii")
    assert b"Alice" not in sealed


def damaged(plain):
    """Plain key files with one thing wrong, secrets left in."""
    document = json.loads(plain)
    secret = document["secret"]
    raw = base64.b64decode(secret["tensors"])
    context = secret["context"]

    def with_secret(**changes):
        return canonical_json(document | {"secret": secret | changes})

    half = {name: t.astype(np.float16) for name, t in KEYS["explicit"]().explicit_tensors().items()}
    extra = KEYS["explicit passports, text"]().explicit_tensors() | {"more": np.zeros(1)}
    return {
        "empty": b"",
        "truncated": plain[:-1],
        "half": plain[: len(plain) // 2],
        "longer": plain + b"}",
        "newline": plain + b"\n",
        "spaced": plain.replace(b":", b": ", 1),
        "binary": b"\x80\x81" + plain,
        "twice": plain.replace(b'"version":1', b'"version":1,"version":1', 1),
        "deep": b'{"a":' * 200_000,
        "deep inside": plain.replace(b'"version":1', b'"version":' + b"[" * 9000 + b"]" * 9000, 1),
        "huge number": plain.replace(b'"version":1', b'"version":' + b"1" * 100_000, 1),
        "infinity": plain.replace(b'"version":1', b'"version":1e999', 1),
        "list": canonical_json([document]),
        "format": canonical_json(document | {"format": "x"}),
        "version": canonical_json(document | {"version": 2}),
        "version list": canonical_json(document | {"version": [1]}),
        "extra": canonical_json(document | {"x": 1}),
        "no secret": canonical_json({k: v for k, v in document.items() if k != "secret"}),
        "secret list": canonical_json(document | {"secret": [secret]}),
        "secret text": canonical_json(document | {"secret": json.dumps(secret)}),
        "secret null": canonical_json(document | {"secret": None}),
        "protection false": canonical_json(document | {"protection": False}),
        "protection text": canonical_json(document | {"protection": "none"}),
        "secret extra": with_secret(x=1),
        "secret missing": canonical_json(
            document | {"secret": {k: v for k, v in secret.items() if k != "text"}}
        ),
        "seed short": with_secret(seed=SEED.hex()[:-2]),
        "seed odd": with_secret(seed=SEED.hex()[:-1]),
        "seed letter": with_secret(seed=SEED.hex()[:-1] + "g"),
        "seed other": with_secret(seed=SEED.hex()[:-1] + ("0" if SEED.hex()[-1] != "0" else "1")),
        "seed list": with_secret(seed=list(SEED)),
        "seed null": with_secret(seed=None),
        "context object": with_secret(context=json.loads(context)),
        "context edited": with_secret(context=context.replace("Alice", "Malice")),
        "context spaced": with_secret(context=context + " "),
        "context unicode": with_secret(context=context + "é"),
        "text other": with_secret(text=TEXT[:-1]),
        "text long": with_secret(text=TEXT * 99),
        "text unprintable": with_secret(text=TEXT + "\n"),
        "text unicode": with_secret(text=TEXT + "é"),
        "text number": with_secret(text=7),
        "text list": with_secret(text=[TEXT]),
        "text bool": with_secret(text=True),
        "tensors none": with_secret(tensors=None),
        "tensors empty": with_secret(tensors=""),
        "tensors number": with_secret(tensors=7),
        "tensors no base64": with_secret(tensors="%%%"),
        "tensors short": with_secret(tensors=base64.b64encode(raw[:-4]).decode()),
        "tensors header only": with_secret(tensors=base64.b64encode(raw[:40]).decode()),
        "tensors huge header": with_secret(
            tensors=base64.b64encode(b"\xff" * 8 + raw[8:]).decode()
        ),
        "tensors dtype": with_secret(tensors=base64.b64encode(save_tensors(half)).decode()),
        "tensors more": with_secret(tensors=base64.b64encode(save_tensors(extra)).decode()),
        "fingerprint": with_secret(fingerprint="0" * 64),
        "fingerprint null": with_secret(fingerprint=None),
    }


DAMAGES = tuple(damaged(canonical_json({"secret": {"tensors": "", "context": "{}"}})))


@pytest.mark.parametrize("damage", DAMAGES)
def test_refuses_a_damaged_file_and_says_nothing_secret(plain, tmp_path, damage):
    path = tmp_path / "key"
    path.write_bytes(damaged(plain)[damage])
    with pytest.raises(UnreadableKeyError) as error:
        load_key(path)
    assert str(path) in str(error.value)
    assert_silent(everything_said(error.value))
    assert len(str(error.value)) < 800


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_altered_byte_of_a_plain_file_is_refused(plain, tmp_path_factory, data):
    position = data.draw(st.integers(0, len(plain) - 1))
    change = data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "altered-plain"
    path.write_bytes(plain[:position] + bytes([plain[position] ^ change]) + plain[position + 1 :])
    with pytest.raises(UnreadableKeyError) as error:
        load_key(path)
    assert_silent(everything_said(error.value))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_altered_byte_of_a_protected_file_is_refused(sealed, tmp_path_factory, data):
    position = data.draw(st.integers(0, len(sealed) - 1))
    change = data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "altered-sealed"
    path.write_bytes(
        sealed[:position] + bytes([sealed[position] ^ change]) + sealed[position + 1 :]
    )
    with pytest.raises(UnreadableKeyError) as error:
        load_key(path, passphrase=PASSPHRASE)
    assert_silent(everything_said(error.value))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bytes_have_one_spelling_in_base64(size):
    text = base64_text(bytes(size))
    assert base64_bytes(text) == bytes(size)
    for other in (text.replace("A=", "B="), text.rstrip("="), text + "=", text + "\n"):
        if other != text:
            with pytest.raises(ValueError, match=r"base64|padding|characters|discontinuous|Excess"):
                base64_bytes(other)


@given(length=st.integers(0, 3000))
@settings(max_examples=40, deadline=None)
def test_a_truncated_protected_file_is_refused(sealed, tmp_path_factory, length):
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(sealed[: min(length, len(sealed) - 1)])
    with pytest.raises(UnreadableKeyError):
        load_key(path, passphrase=PASSPHRASE)


# Files


def test_a_key_comes_back_from_its_file(key, tmp_path):
    save_key(key, tmp_path / "plain")
    save_key(key, str(tmp_path / "sealed"), passphrase=PASSPHRASE)
    for loaded in (
        load_key(tmp_path / "plain"),
        load_key(str(tmp_path / "sealed"), passphrase=PASSPHRASE),
    ):
        assert same(loaded, key)
        assert loaded.fingerprint == key.fingerprint


def test_a_key_of_any_layer_name_comes_back(tmp_path):
    names = ("", "signs/é", "__metadata__", "a/b", "\n")
    layers = tuple(LINEAR._replace(name=name or "x") for name in names)
    context = Context("v1", "Alice", layers, None, b"n" * 16)
    signs = {layer.name: torch.ones(13) for layer in layers}
    key = Key(SEED, context, signs=signs)
    save_key(key, tmp_path / "key")
    assert same(load_key(tmp_path / "key"), key)


def test_two_saves_of_one_key_have_nothing_in_common(sealed, tmp_path):
    save_key(KEYS["text"](), tmp_path / "again", passphrase=PASSPHRASE)
    first, second = json.loads(sealed), json.loads((tmp_path / "again").read_bytes())
    for part in ("salt", "nonce"):
        assert first["protection"][part] != second["protection"][part]
    assert first["secret"] != second["secret"]


def test_the_same_passphrase_typed_with_other_accents_opens(tmp_path):
    save_key(KEYS["derived"](), tmp_path / "key", passphrase="ho\u0308rse")
    assert same(load_key(tmp_path / "key", passphrase="h\u00f6rse"), KEYS["derived"]())


def test_refuses_a_wrong_missing_or_needless_passphrase(sealed, plain, tmp_path):
    for name, data in (("sealed", sealed), ("plain", plain)):
        (tmp_path / name).write_bytes(data)
    cases = [
        ("sealed", PASSPHRASE + "x", "the passphrase is wrong or the file was altered"),
        ("sealed", "\udc80", "the passphrase is wrong"),
        ("sealed", "", "passphrase is empty"),
        ("sealed", None, "protected by a passphrase, but none"),
        ("plain", PASSPHRASE, "not protected, but a passphrase"),
    ]
    for name, passphrase, message in cases:
        with pytest.raises(UnreadableKeyError, match=message) as error:
            load_key(tmp_path / name, passphrase=passphrase)
        assert_silent(everything_said(error.value).replace(PASSPHRASE + "x", ""))


def test_refuses_to_protect_with_an_empty_passphrase(tmp_path):
    with pytest.raises(UnreadableKeyError, match="passphrase is empty"):
        save_key(KEYS["derived"](), tmp_path / "key", passphrase="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 2**30},
        {"n": 2**20},
        {"n": 2},
        {"n": 2**15 + 1},
        {"n": -1},
        {"n": True},
        {"n": "32768"},
        {"n": [2**15]},
        {"n": None},
        {"n": 10**4000},
        {"r": 2**20},
        {"p": 2**20},
        {"kdf": "pbkdf2"},
        {"cipher": "none"},
        {"salt": ""},
        {"salt": "00" * 2**20},
        {"salt": 5},
        {"nonce": "00" * 11},
        {"nonce": None},
        {"extra": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_hostile_file_is_refused_before_it_eats_memory(sealed, tmp_path, changes, monkeypatch):
    document = json.loads(sealed)
    document["protection"] |= changes
    (tmp_path / "key").write_bytes(canonical_json(document))

    def stretch(*_):
        raise AssertionError("asked for the memory")

    monkeypatch.setattr(keyfile, "_stretch", stretch)
    with pytest.raises(UnreadableKeyError, match="in a way that is not known"):
        load_key(tmp_path / "key", passphrase=PASSPHRASE)


@pytest.mark.parametrize("secret", [None, 5, [], {}, "", "A", "AAAA", "é"])
def test_refuses_a_protected_file_whose_secret_is_none(sealed, tmp_path, secret):
    (tmp_path / "key").write_bytes(canonical_json(json.loads(sealed) | {"secret": secret}))
    with pytest.raises(UnreadableKeyError):
        load_key(tmp_path / "key", passphrase=PASSPHRASE)


def test_refuses_a_file_that_is_too_large_or_missing_or_no_file(tmp_path, monkeypatch):
    with pytest.raises(UnreadableKeyError, match="no key file"):
        load_key(tmp_path / "missing")
    with pytest.raises(UnreadableKeyError, match="no key file"):
        load_key(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableKeyError, match="no key file"):
        load_key(tmp_path / "pipe")  # and does not wait for a writer
    monkeypatch.setattr(keyfile, "MAX_FILE_BYTES", 100)
    (tmp_path / "large").write_bytes(b" " * 1000)
    with pytest.raises(UnreadableKeyError, match="at most 100"):
        load_key(tmp_path / "large")
    with pytest.raises(UnwritableOutputError, match="at most 100"):
        save_key(KEYS["derived"](), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unreadable_file_is_an_error_of_ours(tmp_path, monkeypatch):
    (tmp_path / "key").write_bytes(b"")

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(keyfile.Path, "open", refuse)
    with pytest.raises(UnreadableKeyError, match="Permission denied"):
        load_key(tmp_path / "key")


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_only_the_owner_may_read_the_file_from_its_first_byte(tmp_path, monkeypatch, passphrase):
    seen, sync, create = [], os.fsync, os.open

    def fsync(descriptor):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        sync(descriptor)

    def open_(path, flags, mode=0o777, **more):
        descriptor = create(path, flags, mode, **more)
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        assert flags & os.O_EXCL
        return descriptor

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", open_)
    before = os.umask(0)
    try:
        save_key(KEYS["derived"](), tmp_path / "key", passphrase=passphrase)
    finally:
        os.umask(before)
    assert seen == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_refuses_to_overwrite_unless_asked(tmp_path):
    path = tmp_path / "key"
    save_key(KEYS["derived"](), path)
    before = path.read_bytes()
    with pytest.raises(UnwritableOutputError, match="exists already"):
        save_key(KEYS["text"](), path)
    assert path.read_bytes() == before
    save_key(KEYS["text"](), path, overwrite=True)
    assert same(load_key(path), KEYS["text"]())


def test_refuses_to_replace_a_link_that_leads_nowhere(tmp_path):
    (tmp_path / "key").symlink_to(tmp_path / "gone")
    with pytest.raises(UnwritableOutputError, match="exists already"):
        save_key(KEYS["derived"](), tmp_path / "key")


@pytest.mark.parametrize("failing", ["open", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_failed_save_leaves_everything_as_it_was(tmp_path, monkeypatch, failing, number):
    path = tmp_path / "key"
    save_key(KEYS["derived"](), path)
    before = path.read_bytes()

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    where = keyfile.Path if failing == "replace" else os
    with monkeypatch.context() as patch:
        patch.setattr(where, failing, fail)
        with pytest.raises(UnwritableOutputError, match=os.strerror(number)) as error:
            save_key(KEYS["text"](), path, overwrite=True)
    assert_silent(everything_said(error.value))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_key(KEYS["derived"](), tmp_path / "key")
    assert not list(tmp_path.iterdir())


def test_refuses_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("missing", "file"):
        with pytest.raises(UnwritableOutputError, match="choose another folder"):
            save_key(KEYS["derived"](), tmp_path / folder / "key")
    with pytest.raises(UnwritableOutputError, match="choose another folder"):
        save_key(KEYS["derived"](), tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_passport_of_a_large_layer_is_derived_in_a_moment():
    large = LayerShape(
        "large", (512, 512, 3, 3), (512, 74, 74), Geometry((1, 1), ((1, 1),) * 2, (1, 1))
    )
    key = Key(SEED, Context("v1", "Alice", (large,), None, b"n" * 16))
    start = time.process_time()
    assert key.layer_passport("large").nbytes > 22e6
    assert time.process_time() - start < 5  # a tenth of a second where nothing else runs


def pictures(count=40, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 8, 8), generator=rng).to(torch.uint8)


def bound_key(images, choices=None, seed=bytes(32)):
    context = Context(
        "adi", "Zoë", (), TriggerShape(len(images), 10, tuple(images.shape[1:])), bytes(16)
    )
    return Key(seed, context, trigger_images=images, trigger_choices=choices)


def test_labels_of_chosen_pictures_are_bound_to_them():
    key = bound_key(pictures())
    assert key.derived
    labels = key.trigger_set()[1]
    changed = pictures()
    changed[0, 0, 0, 0] ^= 1
    others = bound_key(changed).trigger_set()[1]
    # One bit of one picture, and every label is drawn anew: about a tenth stay by chance.
    assert int((labels == others).sum()) < 15
    assert torch.equal(labels, bound_key(pictures()).trigger_set()[1])


def test_chosen_labels_leave_nothing_derived():
    key = bound_key(pictures())
    chosen = replace(key, trigger_labels=key.trigger_set()[1])
    assert not chosen.derived
    assert chosen.bound == b""


def test_labels_come_from_the_choices_evenly():
    rng = torch.Generator().manual_seed(1)
    rows = torch.stack([torch.randperm(10, generator=rng)[:2] for _ in range(400)])
    key = bound_key(pictures(400), rows)
    labels = key.trigger_set()[1]
    assert key.label_choices == 2
    first = int((labels == rows[:, 0]).sum())
    assert first + int((labels == rows[:, 1]).sum()) == 400
    assert 150 < first < 250  # five standard deviations


@pytest.mark.parametrize(
    "rows", [[[1, 1]] * 40, [[0, 10]] * 40, [[-1, 3]] * 40, [[1]] * 40, [[1, 2]] * 39]
)
def test_choices_that_are_none_are_refused(rows):
    with pytest.raises(UnreadableKeyError):
        bound_key(pictures(), torch.tensor(rows))


def test_choices_need_pictures():
    context = bound_key(pictures()).context
    with pytest.raises(UnreadableKeyError, match="images that they are for"):
        Key(bytes(32), context, trigger_choices=torch.tensor([[1, 2]] * 40))


def test_a_bound_key_survives_its_file(tmp_path):
    key = bound_key(pictures(), torch.tensor([[1, 2]] * 40))
    save_key(key, tmp_path / "key")
    loaded = load_key(tmp_path / "key")
    assert loaded.fingerprint == key.fingerprint
    assert loaded.derived
    assert torch.equal(loaded.trigger_set()[1], key.trigger_set()[1])
