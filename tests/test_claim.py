import base64
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import threading
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from authority import Signer, Website, certificate, new_key, pem
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nnpassport.claims import claim as claims
from nnpassport.claims import timestamp as timestamps
from nnpassport.claims.claim import (
    PAYLOAD_TYPE,
    Claim,
    Declared,
    check_claim,
    claim_of,
    open_claim,
    open_stamped_claim,
    sign_claim,
    stamp_claim,
)
from nnpassport.claims.claimfile import (
    SignedClaim,
    decode_signed,
    encode_signed,
    read_signed,
    timestamped_bytes,
    write_signed,
)
from nnpassport.claims.facts import Facts
from nnpassport.claims.signing import (
    load_public_key,
    load_signing_key,
    public_hex,
    save_signing_key,
    sign,
)
from nnpassport.claims.timestamp import check_timestamp, load_roots, request_timestamp
from nnpassport.embedding.network.equations import Geometry
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.keys.context import ChannelForm, Context, LayerShape, canonical_json
from nnpassport.keys.key import Key, metric_digest
from nnpassport.keys.keyfile import save_key
from nnpassport.scheme import (
    BadSignatureError,
    NoTimestampError,
    UnreadableClaimError,
    UnreadableKeyError,
    UnwritableOutputError,
)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
SEED = hashlib.sha256(b"the seed of the claims").digest()
SIGNING_SEED = hashlib.sha256(b"the signing key of the claims").digest()
SIGNING = Ed25519PrivateKey.from_private_bytes(SIGNING_SEED)
OWNER = SIGNING.public_key()
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(32))
CONV = LayerShape("layer4.conv", (40, 3, 3, 3), (3, 8, 8), Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
LINEAR = LayerShape("fc", (13, 10), (10, 64), Geometry())
KEY = Key(SEED, Context("passport-v2", "Zoë", (CONV, LINEAR), None, bytes(range(16))))
CLAIM = claim_of(
    KEY,
    OWNER,
    reference=hashlib.sha256(b"weights").hexdigest(),
    fidelity=Declared(873_200, 30_000),
    date="2026-01-31",
)
SIGNED = sign_claim(CLAIM, SIGNING)
FACTS = Facts("ab" * 32, ("cat", "café"), (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.2, 0.25, 1e-05))
WITH_FACTS = replace(CLAIM, network=FACTS)
METRIC = np.array([[300, 2**15 - 1, *[0] * 9], [-256, 0, 2**14, *[-(2**13)] * 8]], np.int16)
FORM = ChannelForm("norm", (2**24, 3 * 2**20), "fef0", metric_digest(METRIC))
ANCHORED = Key(
    SEED,
    Context(
        "passport-v2",
        "Zoë",
        (LayerShape("fc", (13, 10), (10, 1), Geometry(), channels=FORM),),
        None,
        bytes(range(16)),
        anchor=hashlib.sha256(b"before").hexdigest(),
    ),
    metrics={"fc": METRIC},
)
WITH_ANCHOR = replace(
    CLAIM,
    context=ANCHORED.context,
    fingerprint=ANCHORED.fingerprint,
    axes=hashlib.sha256(b"axes").hexdigest(),
)
WITH_AXES = replace(WITH_FACTS, axes="ab" * 32)
REFUSALS = (BadSignatureError, UnreadableClaimError)


def opened(data, owner=OWNER):
    """The claim in the bytes of a claim file."""
    return open_claim(decode_signed(data), owner)


def forged(payload, payload_type=PAYLOAD_TYPE):
    """A claim file whose owner signed `payload`, whatever it is."""
    return SignedClaim(sign(payload, payload_type, SIGNING), None)


# Signing


def test_a_signed_claim_opens_to_itself():
    assert opened(encode_signed(SIGNED)) == CLAIM
    assert CLAIM.fingerprint == KEY.fingerprint
    assert CLAIM.context == KEY.context
    assert CLAIM.owner_key == public_hex(OWNER)


def test_what_is_signed_is_what_the_dsse_specification_says():
    payload = CLAIM.encode()
    spoken = b" ".join(
        [b"DSSEv1", b"%d" % len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), b"%d" % len(payload), payload]
    )
    OWNER.verify(SIGNED.envelope.signature, spoken)
    document = json.loads(encode_signed(SIGNED))["envelope"]
    assert base64.b64decode(document["payload"]) == payload
    assert base64.b64decode(document["signatures"][0]["sig"]) == SIGNING.sign(spoken)


def test_the_example_of_the_dsse_specification():
    # Its protocol page: PAE("http://example.com/HelloWorld", "hello world")
    spoken = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    envelope = sign(b"hello world", "http://example.com/HelloWorld", SIGNING)
    assert envelope.signature == SIGNING.sign(spoken)


def test_every_changed_byte_of_a_claim_file_is_refused():
    data = encode_signed(SIGNED)
    for place in range(len(data)):
        for mask in (1, 0x20, 0x80):
            changed = bytearray(data)
            changed[place] ^= mask
            with pytest.raises(REFUSALS):
                opened(bytes(changed))


@given(st.data())
def test_any_other_bytes_are_refused(data):
    file = encode_signed(SIGNED)
    start = data.draw(st.integers(0, len(file)))
    end = data.draw(st.integers(start, min(len(file), start + 20)))
    other = data.draw(st.binary(max_size=20).filter(lambda new: new != file[start:end]))
    changed = file[:start] + other + file[end:]
    if changed != file:
        with pytest.raises(REFUSALS):
            opened(changed)


def test_another_owner_is_refused():
    with pytest.raises(BadSignatureError, match="names the signer"):
        open_claim(SIGNED, STRANGER.public_key())
    taken = SIGNED._replace(
        envelope=SIGNED.envelope._replace(keyid=public_hex(STRANGER.public_key()))
    )
    with pytest.raises(BadSignatureError, match="does not match"):
        open_claim(taken, STRANGER.public_key())


def test_who_signs_anothers_claim_is_refused():
    with pytest.raises(BadSignatureError, match="another's"):
        sign_claim(CLAIM, STRANGER)
    stolen = SignedClaim(sign(CLAIM.encode(), PAYLOAD_TYPE, STRANGER), None)
    with pytest.raises(BadSignatureError, match="signs for himself"):
        open_claim(stolen, STRANGER.public_key())


def test_another_signed_document_is_no_claim():
    other = forged(CLAIM.encode(), "application/vnd.spdx+json")
    with pytest.raises(BadSignatureError, match="spdx"):
        open_claim(other, OWNER)
    renamed = other._replace(envelope=other.envelope._replace(payload_type=PAYLOAD_TYPE))
    with pytest.raises(BadSignatureError, match="does not match"):
        open_claim(renamed, OWNER)


def test_nothing_is_parsed_before_the_signature_was_checked(monkeypatch):
    def parse(*_):
        raise AssertionError("parsed")

    monkeypatch.setattr(claims, "_parsed", parse)
    with pytest.raises(BadSignatureError):
        open_claim(SIGNED, STRANGER.public_key())
    with pytest.raises(BadSignatureError):
        open_stamped_claim(SIGNED._replace(response=b"?"), OWNER, [])


def test_text_and_bytes_do_not_mix():
    with pytest.raises(TypeError):
        sign(CLAIM.encode().decode(), PAYLOAD_TYPE, SIGNING)


# The form of a claim


def variants():
    """Payloads with one thing wrong, by name."""
    document = json.loads(CLAIM.encode())
    context = json.loads(document["context"])

    def with_context(**changes):
        return {"context": canonical_json(context | changes).decode()}

    changes = {
        "another format": {"format": "nnpassport-context"},
        "another version": {"version": 2},
        "version true": {"version": True},
        "another owner": {"owner": "Mallory"},
        "owner null": {"owner": None},
        "owner key short": {"owner_key": CLAIM.owner_key[:-2]},
        "owner key capital": {"owner_key": CLAIM.owner_key.upper()},
        "owner key null": {"owner_key": None},
        "fingerprint bytes": {"fingerprint": list(range(32))},
        "fingerprint line": {"fingerprint": CLAIM.fingerprint + "\n"},
        "context digest": {"context": "0" * 64},
        "context object": {"context": context},
        "context unicode": {"context": document["context"].replace("\\u00eb", "ë")},
        "context more": with_context(more=1),
        "owner unprintable": {**with_context(owner="\x1b[2J"), "owner": "\x1b[2J"},
        "owner turned round": {**with_context(owner="\u202eecilA"), "owner": "\u202eecilA"},
        "reference empty": {"reference": ""},
        "reference false": {"reference": False},
        "reference list": {"reference": [CLAIM.reference]},
        "alpha float": {"log10_alpha": -9.0},
        "alpha text": {"log10_alpha": "-9"},
        "alpha zero": {"log10_alpha": 0},
        "alpha true": {"log10_alpha": True},
        "alpha huge": {"log10_alpha": -(10**30)},
        "fidelity empty": {"fidelity": {}},
        "fidelity list": {"fidelity": [1, 2]},
        "fidelity false": {"fidelity": False},
        "fidelity float": {"fidelity": {"target_ppm": 0.9, "tolerance_ppm": 1}},
        "fidelity high": {"fidelity": {"target_ppm": 1_000_001, "tolerance_ppm": 1}},
        "fidelity negative": {"fidelity": {"target_ppm": 1, "tolerance_ppm": -1}},
        "fidelity more": {"fidelity": {"target_ppm": 1, "tolerance_ppm": 1, "more": 1}},
        "date week": {"date": "2026-W05-6"},
        "date short": {"date": "20260131"},
        "date wrong": {"date": "2026-02-30"},
        "date null": {"date": None},
        "unknown field": {"seed": "00"},
    }
    for name, change in changes.items():
        yield pytest.param(canonical_json(document | change), id=name)
    for name in document:
        rest = {key: value for key, value in document.items() if key != name}
        yield pytest.param(canonical_json(rest), id=f"without {name}")
    yield pytest.param(b"[]", id="list")
    yield pytest.param(b"", id="empty")
    yield pytest.param(b'{"a":' * 50_000, id="deep")
    yield pytest.param(b"9" * 10_000, id="huge number")


@pytest.mark.parametrize("payload", list(variants()))
def test_what_its_owner_signed_must_still_be_a_claim(payload):
    with pytest.raises(UnreadableClaimError):
        open_claim(forged(payload), OWNER)


def test_a_claim_that_is_not_canonical_is_refused():
    for payload in (
        json.dumps(json.loads(CLAIM.encode()), sort_keys=True).encode(),
        CLAIM.encode() + b"\n",
        CLAIM.encode().replace(b'"version":1', b'"version":1,"version":1'),
    ):
        with pytest.raises(UnreadableClaimError, match="canonical"):
            open_claim(forged(payload), OWNER)


def test_a_claim_holds_no_floating_point_number():
    def refuse(text):
        raise AssertionError(text)

    outer = json.loads(encode_signed(SIGNED), parse_float=refuse, parse_constant=refuse)
    inner = json.loads(base64.b64decode(outer["envelope"]["payload"]), parse_float=refuse)
    json.loads(inner["context"], parse_float=refuse)


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file | {"more": 1},
        lambda file: {"envelope": file["envelope"]},
        lambda file: file | {"timestamp": {}},
        lambda file: file | {"timestamp": {"response": "AA=="}, "more": 1},
        lambda file: file | {"timestamp": {"response": "AA==", "more": 1}},
        lambda file: file | {"timestamp": {"response": "AB=="}},
        lambda file: file | {"timestamp": {"response": None}},
        lambda file: file | {"timestamp": "AA=="},
        lambda file: file | {"timestamp": False},
        lambda file: file | {"envelope": None},
        lambda file: file | {"envelope": [file["envelope"]]},
        lambda file: file | {"envelope": file["envelope"] | {"more": 1}},
        lambda file: file | {"envelope": file["envelope"] | {"signatures": []}},
        lambda file: file | {"envelope": file["envelope"] | {"signatures": {}}},
        lambda file: (
            file
            | {"envelope": file["envelope"] | {"signatures": 2 * file["envelope"]["signatures"]}}
        ),
        lambda file: file | {"envelope": file["envelope"] | {"payload": 1}},
        lambda file: file | {"envelope": file["envelope"] | {"payloadType": 1}},
        lambda file: file | {"timestamp": {"response": "AAAA" * 2**17}},
    ],
)
def test_a_file_with_other_fields_is_refused(change):
    document = change(json.loads(encode_signed(SIGNED)))
    with pytest.raises(UnreadableClaimError):
        decode_signed(canonical_json(document))


def test_a_huge_file_is_refused_without_being_read_whole(tmp_path):
    path = tmp_path / "claim"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: it takes no space
    with pytest.raises(UnreadableClaimError, match="the most"):
        read_signed(path)


def test_a_claim_that_could_not_be_read_back_is_not_signed():
    layers = tuple(CONV._replace(name=f"{n}" + "x" * 900) for n in range(4000))
    large = Key(SEED, Context("passport-v2", "Zoë", layers, None, bytes(16)))
    with pytest.raises(UnreadableClaimError, match="at most"):
        sign_claim(claim_of(large, OWNER), SIGNING)


def test_refuses_what_is_missing_or_no_file(tmp_path):
    with pytest.raises(UnreadableClaimError, match="No such file"):
        read_signed(tmp_path / "missing")
    with pytest.raises(UnreadableClaimError, match="regular"):
        read_signed(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableClaimError, match="regular"):
        read_signed(tmp_path / "pipe")  # and does not wait for a writer


def test_a_claim_file_comes_back(tmp_path):
    stamped = SIGNED._replace(response=b"\x30\x00")
    write_signed(stamped, tmp_path / "claim")
    assert read_signed(tmp_path / "claim") == stamped


def test_a_claim_is_dated_today_if_nothing_is_said():
    before = datetime.now().astimezone().date().isoformat()
    date = claim_of(KEY, OWNER).date
    assert before <= date <= datetime.now().astimezone().date().isoformat()


# A disclosed key


def test_the_key_opens_its_claim():
    finding = check_claim(SIGNED, OWNER, key=KEY)
    assert finding.holds
    assert "the disclosed key is the one committed to" in finding.reason
    assert finding.claim == CLAIM


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Key(bytes(32), KEY.context), "another fingerprint"),
        (Key(SEED, KEY.context, text="ab"), "another fingerprint"),
        (Key(SEED, Context("passport-v3", "Zoë", (CONV,), None, b"n" * 16)), "another context"),
    ],
)
def test_no_other_key_opens_it(other, reason):
    finding = check_claim(SIGNED, OWNER, key=other)
    assert not finding.holds
    assert reason in finding.reason


def test_a_context_that_is_not_the_keys_does_not_open():
    # An owner could sign the context of another scheme beside the fingerprint of his key.
    other = Context("passport-v3", "Zoë", (CONV, LINEAR), None, bytes(16))
    mixed = Claim(CLAIM.owner_key, KEY.fingerprint, other, None, -9, None, "2026-01-31")
    assert not check_claim(sign_claim(mixed, SIGNING), OWNER, key=KEY).holds


# Keys to sign with


@pytest.fixture
def pems(tmp_path):
    """Where a signing key and its public half are."""
    paths = tmp_path / "owner.pem", tmp_path / "owner.pub.pem"
    save_signing_key(SIGNING, *paths)
    return paths


def test_signing_keys_come_back(pems, tmp_path):
    secret, public = pems
    assert load_signing_key(secret).private_bytes_raw() == SIGNING_SEED
    assert public_hex(load_public_key(public)) == public_hex(OWNER)
    save_signing_key(SIGNING, tmp_path / "p.pem", tmp_path / "p.pub.pem", passphrase="hörse")
    assert load_signing_key(tmp_path / "p.pem", passphrase="hörse").private_bytes_raw()
    assert SIGNING_SEED not in base64.b64decode(
        b"".join((tmp_path / "p.pem").read_bytes().splitlines()[1:-1])
    )


def test_only_the_owner_may_read_a_signing_key_from_its_first_byte(tmp_path, monkeypatch):
    seen, sync = [], os.fsync

    def fsync(descriptor):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    before = os.umask(0)
    try:
        save_signing_key(SIGNING, tmp_path / "k.pem", tmp_path / "k.pub.pem")
    finally:
        os.umask(before)
    assert seen[0] == 0o600
    assert stat.S_IMODE((tmp_path / "k.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "k.pub.pem").stat().st_mode) == 0o644


def test_refuses_to_overwrite_a_signing_key(pems, tmp_path):
    secret, public = pems
    before = secret.read_bytes()
    for where in ((secret, tmp_path / "new"), (tmp_path / "new", public)):
        with pytest.raises(UnwritableOutputError, match="exists already"):
            save_signing_key(STRANGER, *where)
    assert secret.read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_refuses_files_that_are_no_such_key(pems, tmp_path):
    secret, public = pems
    pem = secret.read_bytes()
    other = ec.generate_private_key(ec.SECP256R1())
    wrong = {
        "missing": None,
        "empty": b"",
        "half": pem[:60],
        "public": public.read_bytes(),
        "elliptic": other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
    for name, data in wrong.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UnreadableKeyError) as error:
            load_signing_key(path)
        assert_silent(everything_said(error.value))
    with pytest.raises(UnreadableKeyError, match="this passphrase"):
        load_signing_key(secret, passphrase="x")
    with pytest.raises(UnreadableKeyError, match="empty"):
        save_signing_key(SIGNING, tmp_path / "a", tmp_path / "b", passphrase="")
    for path in (secret, tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UnreadableKeyError):
            load_public_key(path)


def test_a_wrong_passphrase_is_refused(tmp_path):
    path = tmp_path / "p.pem"
    save_signing_key(SIGNING, path, tmp_path / "p.pub.pem", passphrase="right")
    for passphrase in ("wrong", None):
        with pytest.raises(UnreadableKeyError, match="does not open") as error:
            load_signing_key(path, passphrase=passphrase)
        assert "right" not in everything_said(error.value).replace("right\n", "")


# Secrets stay secret


def everything_said(error):
    """All that an error and those it came from could show in a log."""
    said, seen = ["".join(traceback.format_exception(error))], error
    while seen is not None:
        said += [str(seen), repr(vars(seen)), repr(seen.args)]
        seen = seen.__cause__ or seen.__context__
    return "\n".join(said)


def assert_silent(shown):
    """Nothing of the key's seed or the signing key's in `shown`, not even half."""
    for secret in (SEED, SIGNING_SEED):
        for part in (secret, secret[:16], secret[16:]):
            encoded = base64.b64encode(part).decode().rstrip("=")[:-1]
            for form in (part.hex(), part.hex().upper(), encoded, repr(part)[2:-1]):
                assert form not in shown


def test_a_claim_holds_no_secret():
    for data in (encode_signed(SIGNED), CLAIM.encode()):
        assert SEED not in data
        assert SIGNING_SEED not in data
        assert_silent(data.decode("ascii"))
    for shown in (CLAIM, SIGNED, check_claim(SIGNED, OWNER, key=KEY), KEY, SIGNING):
        assert_silent(repr(shown))
    with pytest.raises(BadSignatureError) as error:
        open_claim(SIGNED, STRANGER.public_key())
    assert_silent(everything_said(error.value))


@pytest.fixture
def website(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Website() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    """An authority that works as it should, directly below its root."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary, which plays the timestamp authority")
    folder = tmp_path_factory.mktemp("authority")
    root_key, key = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    made = Signer(folder / "tsa", key, certificate("An Authority", key, (root, root_key)))
    made.root, made.root_key, made.key = root, root_key, key
    return made


@pytest.fixture
def authority(signer, website):
    website.answer = lambda query: (200, signer.answer(query))
    return website


@pytest.fixture(scope="module")
def stamped(signer):
    """The claim with a good token."""
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    data = timestamped_bytes(SIGNED.envelope)
    query = TimestampRequestBuilder(data, HashAlgorithm.SHA256).build().as_bytes()
    return SIGNED._replace(response=signer.answer(query))


def test_a_token_over_the_envelope_holds(authority, signer):
    before = datetime.now(UTC).replace(microsecond=0)
    signed = stamp_claim(SIGNED, authority.url, [signer.root])
    claim, stamp = open_stamped_claim(decode_signed(encode_signed(signed)), OWNER, [signer.root])
    assert claim == CLAIM
    assert before <= stamp.time <= datetime.now(UTC)
    assert (stamp.authority, stamp.policy) == ("CN=An Authority", "1.2.3.4.1")
    finding = check_claim(signed, OWNER, roots=[signer.root], key=KEY)
    assert finding.holds
    assert stamp.as_dict()["latest"] in finding.reason
    ((kind, query),) = authority.asked
    assert kind == "application/timestamp-query"
    assert hashlib.sha256(timestamped_bytes(SIGNED.envelope)).digest() in query


def test_openssl_agrees_about_the_token_and_the_bytes(stamped, signer, tmp_path):
    file = encode_signed(stamped)
    bytes_in_file = file[len(b'{"envelope":') : file.index(b',"timestamp":')]
    (tmp_path / "data").write_bytes(bytes_in_file)
    (tmp_path / "reply").write_bytes(stamped.response)
    (tmp_path / "root.pem").write_bytes(pem(signer.root))
    command = ["openssl", "ts", "-verify", "-data", "data", "-in", "reply", "-CAfile", "root.pem"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Verification: OK" in done.stdout + done.stderr


def test_every_request_has_a_nonce_of_its_own_and_asks_for_certificates(authority, signer):
    for _ in range(2):
        request_timestamp(b"data", authority.url, [signer.root])
    first, second = (query for _, query in authority.asked)
    assert first != second
    assert first.endswith(b"\x01\x01\xff")  # certReq TRUE


def test_a_replayed_token_is_refused(authority, signer):
    old = request_timestamp(b"data", authority.url, [signer.root])
    authority.answer = lambda _: (200, old)
    with pytest.raises(NoTimestampError, match="nonce"):
        request_timestamp(b"data", authority.url, [signer.root])


def test_an_authority_that_nobody_trusts_is_refused(authority, stamped, signer):
    other_key = new_key()
    # The same name, another key: names prove nothing.
    other = certificate("A Root", other_key, ca=True)
    with pytest.raises(BadSignatureError, match="does not hold"):
        open_stamped_claim(stamped, OWNER, [other])
    with pytest.raises(BadSignatureError, match="does not hold"):
        open_stamped_claim(stamped, OWNER, [])
    with pytest.raises(NoTimestampError, match="no token that holds"):
        stamp_claim(SIGNED, authority.url, [other])
    unrelated = certificate("Another Root", other_key, ca=True)
    assert check_claim(stamped, OWNER, roots=[unrelated, signer.root]).holds


@pytest.mark.parametrize("days", [(-10, -1), (1, 10)], ids=["expired", "not yet"])
def test_a_certificate_that_is_not_valid_at_the_time_is_refused(signer, website, tmp_path, days):
    key = new_key()
    late = certificate("Late", key, (signer.root, signer.root_key), days=days)
    other = Signer(tmp_path / "late", key, late)
    website.answer = lambda query: (200, other.answer(query))
    with pytest.raises(NoTimestampError, match="does not hold"):
        stamp_claim(SIGNED, website.url, [signer.root])


def test_an_intermediate_certificate_that_is_sent_along_is_used(signer, tmp_path, website):
    middle_key, key = new_key(), new_key()
    middle = certificate("Middle", middle_key, (signer.root, signer.root_key), ca=True)
    leaf = certificate("Leaf", key, (middle, middle_key))
    along = Signer(tmp_path / "along", key, leaf, [middle])
    website.answer = lambda query: (200, along.answer(query))
    assert request_timestamp(b"data", website.url, [signer.root])
    alone = Signer(tmp_path / "alone", key, leaf)
    website.answer = lambda query: (200, alone.answer(query))
    with pytest.raises(NoTimestampError, match="does not hold"):
        request_timestamp(b"data", website.url, [signer.root])


def test_an_authority_cannot_make_authorities(signer, tmp_path, website):
    key = new_key()
    child = certificate("Child", key, (signer.certificate, signer.key))
    other = Signer(tmp_path / "child", key, child, [signer.certificate])
    website.answer = lambda query: (200, other.answer(query))
    with pytest.raises(NoTimestampError, match="does not hold"):
        request_timestamp(b"data", website.url, [signer.root])


def test_two_certificates_for_one_signer_are_refused(signer, tmp_path, website):
    # Anybody can add a certificate to a token; this one says what the signer's own may not.
    twin = certificate(
        "Twin", new_key(), (signer.root, new_key()), serial=signer.certificate.serial_number
    )
    other = Signer(tmp_path / "twin", signer.key, signer.certificate, [twin])
    website.answer = lambda query: (200, other.answer(query))
    with pytest.raises(NoTimestampError, match="exactly one signer"):
        request_timestamp(b"data", website.url, [signer.root])


def test_a_token_for_other_data_is_refused(stamped, signer):
    with pytest.raises(BadSignatureError, match="does not hold"):
        check_timestamp(stamped.response, b"other", [signer.root])
    # The token of one claim beside another, or beside the same one signed anew with other words.
    other = sign_claim(claim_of(KEY, OWNER, date="2020-01-01"), SIGNING)
    moved = other._replace(response=stamped.response)
    assert open_claim(moved, OWNER)
    with pytest.raises(BadSignatureError, match="does not hold"):
        open_stamped_claim(moved, OWNER, [signer.root])
    finding = check_claim(moved, OWNER, roots=[signer.root])
    assert not finding.holds
    assert finding.claim is None


def test_a_changed_byte_of_a_token_is_refused_or_changes_nothing(stamped, signer):
    """ASN.1 has bytes that no signature covers, such as the names of algorithms that are known."""
    data, good = timestamped_bytes(SIGNED.envelope), stamped.response
    told = check_timestamp(good, data, [signer.root])
    believed = 0
    for place in range(len(good)):
        changed = bytearray(good)
        changed[place] ^= 1 << place % 8
        try:
            assert check_timestamp(bytes(changed), data, [signer.root]) == told
        except BadSignatureError:
            continue
        believed += 1
    assert believed < 20


def test_a_token_over_another_digest_is_refused(signer):
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

    query = TimestampRequestBuilder(b"data", HashAlgorithm.SHA512).build().as_bytes()
    with pytest.raises(BadSignatureError, match="another digest than SHA-256"):
        check_timestamp(signer.answer(query), b"data", [signer.root])


@pytest.mark.parametrize("which", [0, 1], ids=["of the token", "of its signer"])
def test_a_token_with_another_version_is_refused(stamped, signer, which):
    old, new = (
        (b"\x02\x01\x03\x31", b"\x02\x01\x01\x31"),
        (b"\x02\x01\x01\x30", b"\x02\x01\x03\x30"),
    )[which]
    head, _, tail = stamped.response.rpartition(old)
    with pytest.raises(BadSignatureError, match="CMS versions"):
        check_timestamp(head + new + tail, timestamped_bytes(SIGNED.envelope), [signer.root])


@pytest.mark.parametrize(
    "body",
    [b"", b"garbage", b"<html></html>", b"\x30\x80", b"\x30\x05\x30\x03\x02\x01\x00", b"\x00" * 99],
)
def test_garbage_for_an_answer_is_refused(website, body):
    website.answer = lambda _: (200, body)
    with pytest.raises(NoTimestampError, match="no RFC 3161 response"):
        stamp_claim(SIGNED, website.url, [])


def test_a_refusal_is_passed_on_with_its_reason(website):
    # PKIStatusInfo: rejection, "no such policy"
    said = b"\x0c\x0eno such policy"
    status = b"\x02\x01\x02\x30" + bytes([len(said)]) + said
    body = b"\x30" + bytes([len(status)]) + status
    website.answer = lambda _: (200, b"\x30" + bytes([len(body)]) + body)
    with pytest.raises(NoTimestampError, match=r"not granted .*no such policy"):
        stamp_claim(SIGNED, website.url, [])


@pytest.mark.parametrize("status", [500, 404, 301, 204])
def test_an_http_error_is_no_token(website, status):
    website.answer = lambda _: (status, b"")
    with pytest.raises(NoTimestampError, match=f"HTTP status {status}"):
        stamp_claim(SIGNED, website.url, [])


def test_an_authority_that_never_answers_is_given_up(website):
    over = threading.Event()

    def answer(_):
        over.wait()
        return 200, b""

    website.answer = answer
    try:
        with pytest.raises(NoTimestampError, match="does not answer"):
            request_timestamp(b"data", website.url, [], timeout=0.2)
    finally:
        over.set()


def test_an_endless_answer_is_given_up(website):
    website.answer = lambda _: (200, bytes(2 * timestamps.MAX_RESPONSE_BYTES))
    with pytest.raises(NoTimestampError, match="takes more than"):
        stamp_claim(SIGNED, website.url, [])


def test_an_address_where_nobody_is_is_an_error_of_ours(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for bad in (url, "ftp://127.0.0.1", "no address", "http://", "http://[", ""):
            with pytest.raises(NoTimestampError, match="does not answer"):
                request_timestamp(b"data", bad, [])


def test_a_timestamp_needs_a_root_and_a_root_needs_a_timestamp(stamped, signer):
    with pytest.raises(NoTimestampError, match="no root certificate"):
        check_claim(stamped, OWNER)
    finding = check_claim(SIGNED, OWNER, roots=[signer.root])
    assert not finding.holds
    assert "no timestamp" in finding.reason


def test_a_claim_without_timestamp_says_so():
    finding = check_claim(SIGNED, OWNER)
    assert finding.holds
    assert "nothing proves the claim's age" in finding.reason


def test_roots_come_from_pem(signer, tmp_path):
    (tmp_path / "roots.pem").write_bytes(pem(signer.root, signer.certificate))
    assert load_roots(tmp_path / "roots.pem") == [signer.root, signer.certificate]
    for data in (b"", b"garbage", pem(signer.root)[:100]):
        (tmp_path / "bad.pem").write_bytes(data)
        with pytest.raises(UnreadableKeyError, match="no certificates"):
            load_roots(tmp_path / "bad.pem")
    with pytest.raises(UnreadableKeyError, match="cannot be read"):
        load_roots(tmp_path / "missing.pem")


# Commands


@pytest.fixture
def house(tmp_path, pems, monkeypatch):
    """A folder to work in, with a key, a signing key and a released model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NNPASSPORT_PASSPHRASE", raising=False)
    monkeypatch.delenv("NNPASSPORT_SIGNING_PASSPHRASE", raising=False)
    save_key(KEY, "zoe.key")
    (tmp_path / "released").mkdir()
    save_file({"w": torch.ones(2, 3)}, tmp_path / "released" / "model.safetensors")
    return tmp_path


NEW = ("claim", "new", "--key", "zoe.key", "--signing", "owner.pem", "-o", "zoe.claim.json")
VERIFY = ("claim", "verify", "zoe.claim.json", "--owner", "owner.pub.pem")


def test_the_commands_from_beginning_to_end(call, house, authority, signer):
    Path("root.pem").write_bytes(pem(signer.root))
    stamp = ("--authority", authority.url, "--authority-root", "root.pem")
    declared = ("--reference", "released", "--target", "0.8732", "--alpha", "-12")
    code, out, _ = call(*NEW, *stamp, *declared, "--json")
    assert code == 0
    assert json.loads(out)["fidelity"] == {"target_ppm": 873_200, "tolerance_ppm": 30_000}
    assert json.loads(out)["reference"] == tensors_digest({"w": torch.ones(2, 3)})

    code, out, _ = call(*VERIFY, "--root", "root.pem", "--key", "zoe.key", "--json")
    finding = json.loads(out)
    assert (code, finding["holds"], finding["claim"]["log10_alpha"]) == (0, True, -12)
    assert finding["timestamp"]["authority"] == "CN=An Authority"
    assert call(*VERIFY, "--root", "root.pem")[0] == 0

    code, out, err = call(*VERIFY)
    assert (code, out) == (2, "")
    assert "NoTimestampError" in err


def test_a_claim_without_timestamp_on_the_command_line(call, house):
    code, _, err = call(*NEW)
    assert (code, "not timestamped" in err) == (0, True)
    code, out, _ = call(*VERIFY)
    assert code == 0
    assert out.startswith("HOLDS\n")
    assert "no timestamp" in out
    assert "Zoë" in out


def test_keygen_makes_a_pair_that_works(call, house):
    code, out, _ = call("claim", "keygen", "-o", "new.pem", "--json")
    assert code == 0
    assert json.loads(out) == {
        "public": "new.pub.pem",
        "owner_key": public_hex(load_public_key(Path("new.pub.pem"))),
    }
    new = ("claim", "new", "--key", "zoe.key", "--signing", "new.pem", "-o", "new.json")
    assert call(*new)[0] == 0
    assert call("claim", "verify", "new.json", "--owner", "new.pub.pem")[0] == 0
    assert call("claim", "verify", "new.json", "--owner", "owner.pub.pem")[0] == 1
    assert call("claim", "keygen", "-o", "new.pem")[0] == 2  # never overwritten


def test_a_signing_key_under_a_passphrase(call, house, monkeypatch):
    monkeypatch.setenv("NNPASSPORT_SIGNING_PASSPHRASE", "horse")
    assert call("claim", "keygen", "-o", "new.pem")[0] == 0
    new = ("claim", "new", "--key", "zoe.key", "--signing", "new.pem", "-o", "new.json")
    assert call(*new)[0] == 0
    monkeypatch.delenv("NNPASSPORT_SIGNING_PASSPHRASE")
    code, _, err = call(*new)
    assert code == 2
    assert "passphrase" in err


def test_show_checks_before_it_prints(call, house):
    call(*NEW)
    code, out, err = call("claim", "show", "zoe.claim.json", "--json")
    assert code == 0
    assert json.loads(out)["claim"]["owner"] == "Zoë"
    assert json.loads(out)["self_asserted"] is True
    assert "Self-asserted" in err
    code, out, err = call("claim", "show", "zoe.claim.json", "--owner", "owner.pub.pem", "--json")
    assert (code, json.loads(out)["self_asserted"]) == (0, False)
    assert "Self-asserted" not in err
    document = json.loads(Path("zoe.claim.json").read_bytes())
    payload = base64.b64decode(document["envelope"]["payload"]).replace(b":-9", b":-8")
    document["envelope"]["payload"] = base64.b64encode(payload).decode()
    Path("zoe.claim.json").write_bytes(canonical_json(document))
    for owner in ((), ("--owner", "owner.pub.pem")):
        code, out, _ = call("claim", "show", "zoe.claim.json", *owner)
        assert code == 1
        assert "passport-v2" not in out
    code, out, _ = call(*VERIFY, "--json")
    assert (code, json.loads(out)["claim"]) == (1, None)


def test_a_wrong_key_is_refused_on_the_command_line(call, house):
    call(*NEW)
    save_key(Key(bytes(32), KEY.context), "other.key")
    code, out, _ = call(*VERIFY, "--key", "other.key", "--json")
    assert (code, json.loads(out)["holds"]) == (1, False)


@pytest.mark.parametrize(
    "words",
    [
        ("claim", "verify", "missing.json", "--owner", "owner.pub.pem"),
        ("claim", "verify", "owner.pem", "--owner", "owner.pub.pem"),
        (*VERIFY[:3], "--owner", "missing.pem"),
        (*VERIFY, "--root", "missing.pem"),
        (*VERIFY, "--key", "missing.key"),
        ("claim", "show", "missing.json"),
        (*NEW, "--authority", "http://127.0.0.1:9"),
        (*NEW, "--authority-root", "root.pem"),
        (*NEW, "--alpha", "0"),
        (*NEW, "--alpha", "-9.5"),
        (*NEW, "--target", "87.3"),
        (*NEW, "--date", "yesterday"),
        (*NEW, "--reference", "missing"),
    ],
    ids=lambda words: " ".join(words[1:]),
)
def test_what_cannot_be_checked_exits_with_2(call, house, words):
    call(*NEW)
    before = Path("zoe.claim.json").read_bytes()
    code, out, _ = call(*words)
    assert (code, out) == (2, "")
    assert Path("zoe.claim.json").read_bytes() == before


def test_no_claim_is_written_where_no_token_came(call, house, website):
    website.answer = lambda _: (500, b"")
    Path("root.pem").write_bytes(pem(certificate("A Root", new_key(), ca=True)))
    code, _, err = call(*NEW, "--authority", website.url, "--authority-root", "root.pem")
    assert (code, "NoTimestampError" in err) == (2, True)
    assert not Path("zoe.claim.json").exists()


# The format, for ever


def test_claims_of_version_1_hold_for_ever():
    owner = load_public_key(GOLDEN / "claim-v1-owner.pub.pem")
    finding = check_claim(read_signed(GOLDEN / "claim-v1.json"), owner, key=KEY)
    assert finding.holds
    assert finding.claim == CLAIM
    roots = load_roots(GOLDEN / "claim-v1-root.pem")
    stamped = read_signed(GOLDEN / "claim-v1-stamped.json")
    finding = check_claim(stamped, owner, roots=roots, key=KEY)
    assert finding.holds
    assert finding.timestamp.as_dict() == {
        "time": "2026-11-23T02:00:00Z",
        "authority": "CN=Golden Authority",
        "policy": "1.2.3.4.1",
        "serial": "2",
        "accuracy": 1.0,
        "earliest": "2026-11-23T01:59:59Z",
        "latest": "2026-11-23T02:00:02Z",
    }


def test_claims_are_still_written_as_in_version_1():
    assert encode_signed(SIGNED) == (GOLDEN / "claim-v1.json").read_bytes()


def page():
    return (ROOT / "docs" / "claim-format.md").read_text(encoding="utf-8")


def test_the_vectors_of_the_specification_without_our_code():
    (block,) = re.findall(r"```json\n(.*?)\n```", page(), re.DOTALL)
    vectors = json.loads(block)
    signing = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vectors["signing_seed"]))
    public = signing.public_key().public_bytes_raw().hex()
    payload = vectors["payload"].encode("ascii")
    kind = "application/vnd.nnpassport.claim.v1+json"
    signed = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    signature = signing.sign(signed)
    envelope = (
        f'{{"payload":"{base64.b64encode(payload).decode()}","payloadType":"{kind}",'
        f'"signatures":[{{"keyid":"{public}","sig":"{base64.b64encode(signature).decode()}"}}]}}'
    ).encode()
    file = b'{"envelope":' + envelope + b',"timestamp":null}'
    claim = json.loads(payload)
    context = claim["context"].encode()
    parts = (b"nnpassport/key/v1", bytes.fromhex(vectors["key_seed"]), context, b"no text")
    prefixed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    assert claim["fingerprint"] == hashlib.sha256(prefixed).hexdigest()
    assert claim["owner_key"] == public == vectors["owner_key"]
    assert claim["owner"] == json.loads(context)["owner"]
    assert vectors["signed_sha256"] == hashlib.sha256(signed).hexdigest()
    assert vectors["signature"] == signature.hex()
    assert vectors["timestamped_sha256"] == hashlib.sha256(envelope).hexdigest()
    assert vectors["file_sha256"] == hashlib.sha256(file).hexdigest()
    assert file == (GOLDEN / "claim-v1.json").read_bytes()


def test_the_commands_of_the_specification_check_a_claim_by_hand(tmp_path):
    missing = [name for name in ("jq", "openssl", "sh", "base64") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)}, which the page uses")
    script = re.findall(r"```sh\n(.*?)```", page(), re.DOTALL)[1]
    for name, file in (
        ("claim.json", "claim-v1-stamped.json"),
        ("owner.pub.pem", "claim-v1-owner.pub.pem"),
        ("root.pem", "claim-v1-root.pem"),
    ):
        shutil.copy(GOLDEN / file, tmp_path / name)
    lived = check_claim(
        read_signed(tmp_path / "claim.json"), OWNER, roots=load_roots(tmp_path / "root.pem")
    )
    then = int(lived.timestamp.time.timestamp())
    script = script.replace("-CAfile", f"-attime {then} -CAfile")
    done = subprocess.run(
        ["sh", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "Signature Verified Successfully" in said
    assert "Verification: OK" in said
    assert (tmp_path / "claim").read_bytes() == CLAIM.encode()


def test_the_page_lists_exactly_the_fields_of_a_claim():
    table = page().split("## The claim\n")[1].split("\n\n**")[0]
    document = json.loads(WITH_AXES.encode())
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(document)
    assert set(document) - set(json.loads(CLAIM.encode())) == {"network", "axes"}


def test_the_page_lists_exactly_the_facts_of_a_network():
    table = page().split("**Facts about the network.**")[1].split("\n\n**")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", table, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert named == set(json.loads(WITH_FACTS.encode())["network"])


def test_a_claim_with_facts_stays_readable():
    """Written on 2026-11-27; its bytes are what this version signs as well."""
    data = (GOLDEN / "claim-v1-network.json").read_bytes()
    assert opened(data) == WITH_FACTS
    assert data == encode_signed(sign_claim(WITH_FACTS, SIGNING))


def test_a_claim_with_axes_stays_readable():
    """Written on 2026-11-28; its bytes are what this version signs as well."""
    data = (GOLDEN / "claim-v1-axes.json").read_bytes()
    assert opened(data) == WITH_AXES
    assert data == encode_signed(sign_claim(WITH_AXES, SIGNING))


def test_a_claim_with_an_anchor_stays_readable():
    """Written on 2026-11-28: passports of channels, for the network before the mark."""
    data = (GOLDEN / "claim-v1-anchor.json").read_bytes()
    assert opened(data) == WITH_ANCHOR
    assert data == encode_signed(sign_claim(WITH_ANCHOR, SIGNING))
    assert ANCHORED.signs_array("fc").tolist() == [-1, -1, 1, 1, -1, 1, 1, -1, 1, 1, 1]
    ((_, arrays),) = ANCHORED.channel_arrays("fc")
    drawn = hashlib.sha256(arrays.astype("<f8").tobytes()).hexdigest()
    assert drawn == "d2a253643c36552db541c594d939661a09613cf15d442d93cf06c62630135f59"


def test_a_stronger_signing_key_made_with_openssl_opens(pems, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary")
    stronger = tmp_path / "stronger.pem"
    command = re.search(r"`(openssl pkcs8 .*?)`", page(), re.DOTALL).group(1)
    words = command.replace("alice.pem", str(pems[0])).replace("stronger.pem", str(stronger))
    words = words.replace("1000000", "20000")  # the million takes a second
    subprocess.run([*words.split(), "-passout", "pass:horse"], check=True, capture_output=True)
    assert load_signing_key(stronger, passphrase="horse").private_bytes_raw() == SIGNING_SEED
