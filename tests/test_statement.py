"""Claims as in-toto statements: read here as claims, and by tools that are not ours."""

import base64
import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_claim import CLAIM, OWNER, SIGNING, STRANGER

from nnpassport.claims.claim import (
    PAYLOAD_TYPE,
    open_claim,
    sign_claim,
    sign_statement,
    subject_of,
)
from nnpassport.claims.claimfile import SignedClaim, decode_signed, encode_signed
from nnpassport.claims.signing import document_of, public_hex, save_signing_key, sign
from nnpassport.claims.statement import PREDICATE_TYPE, STATEMENT_TYPE, stated, statement_in
from nnpassport.keys.context import canonical_json
from nnpassport.scheme import BadSignatureError, UnreadableClaimError

FILES = {"model.safetensors": "ab" * 32, "config.json": "cd" * 32}
SIGNED = sign_statement(CLAIM, FILES, SIGNING)
REFUSALS = (BadSignatureError, UnreadableClaimError)


def test_a_statement_opens_to_the_claim_that_it_is_made_of():
    again = decode_signed(encode_signed(SIGNED))
    assert open_claim(again, OWNER) == CLAIM
    assert subject_of(again, OWNER) == FILES
    assert subject_of(sign_claim(CLAIM, SIGNING), OWNER) is None


def test_its_signature_is_what_the_dsse_specification_says():
    """Written from the specification: PAE, Ed25519, nothing of ours."""
    document = document_of(SIGNED.envelope)
    payload, kind = base64.b64decode(document["payload"]), document["payloadType"].encode()
    assert kind == b"application/vnd.in-toto+json"
    spoken = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
    OWNER.verify(base64.b64decode(document["signatures"][0]["sig"]), spoken)


def test_securesystemslib_verifies_its_signature():
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    hexed = public_hex(OWNER)
    key = signer.SSlibKey(hexed, "ed25519", "ed25519", {"public": hexed})
    envelope = dsse.Envelope.from_dict(document_of(SIGNED.envelope))
    assert envelope.verify([key], threshold=1)
    stranger = public_hex(STRANGER.public_key())
    other = signer.SSlibKey(hexed, "ed25519", "ed25519", {"public": stranger})
    with pytest.raises(Exception, match="signature"):
        envelope.verify([other], threshold=1)


def test_in_toto_s_own_library_takes_it_for_a_statement():
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2

    parsed = json_format.Parse(SIGNED.envelope.payload, statement_pb2.Statement())
    checked = statement.Statement.copy_from_pb(parsed)
    checked.validate()
    assert [each.name for each in parsed.subject] == sorted(FILES)
    assert parsed.predicate_type == PREDICATE_TYPE
    assert parsed.predicate["owner_key"] == public_hex(OWNER)


@given(st.data())
def test_any_other_bytes_are_refused(data):
    file = encode_signed(SIGNED)
    start = data.draw(st.integers(0, len(file)))
    end = data.draw(st.integers(start, min(len(file), start + 20)))
    other = data.draw(st.binary(max_size=20).filter(lambda new: new != file[start:end]))
    with pytest.raises(REFUSALS):
        open_claim(decode_signed(file[:start] + other + file[end:]), OWNER)


def test_a_claim_under_the_one_type_is_none_under_the_other():
    for payload, kind in (
        (CLAIM.encode(), STATEMENT_TYPE),
        (stated(CLAIM.encode(), FILES), PAYLOAD_TYPE),
    ):
        with pytest.raises(UnreadableClaimError):
            open_claim(SignedClaim(sign(payload, kind, SIGNING), None), OWNER)


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "https://in-toto.io/Statement/v0.1"},
        {"predicateType": "https://slsa.dev/provenance/v1"},
        {"subject": []},
        {"subject": [{"name": "a", "digest": {"sha1": "ab" * 20}}]},
        {"subject": [{"name": "a", "digest": {"sha256": "AB" * 32}}]},
        {"subject": [{"name": "\x1b", "digest": {"sha256": "ab" * 32}}]},
        {"subject": [{"name": "a", "digest": {"sha256": "ab" * 32}, "uri": "b"}]},
        {"predicate": []},
        {"predicate": {}},
        {"more": 1},
    ],
)
def test_what_its_owner_signed_has_one_form(change):
    document = json.loads(stated(CLAIM.encode(), FILES))
    payload = canonical_json({**document, **change})
    signed = SignedClaim(sign(payload, STATEMENT_TYPE, SIGNING), None)
    with pytest.raises(REFUSALS):
        open_claim(signed, OWNER)


def test_files_are_in_the_order_of_their_names():
    document = json.loads(stated(CLAIM.encode(), FILES))
    document["subject"].reverse()
    with pytest.raises(UnreadableClaimError, match="order of names"):
        statement_in(canonical_json(document))


def test_a_claim_of_no_network_is_no_statement_of_any_file():
    with pytest.raises(UnreadableClaimError, match="no reference"):
        sign_statement(replace(CLAIM, reference=None), FILES, SIGNING)
    with pytest.raises(UnreadableClaimError, match="0 files"):
        sign_statement(CLAIM, {}, SIGNING)
    with pytest.raises(BadSignatureError, match="another's"):
        sign_statement(CLAIM, FILES, STRANGER)


def test_the_command_states_the_files_of_the_released_folder(tmp_path, call):
    import test_golden as golden

    save_signing_key(SIGNING, tmp_path / "a.pem", tmp_path / "a.pub.pem")
    key, reference = golden.GOLDEN / "key-v1-network.key", golden.GOLDEN / "network-v1"
    new = ("claim", "new", "--key", key, "--signing", tmp_path / "a.pem", "--in-toto")
    assert call(*new, "-o", tmp_path / "c.json")[0] == 2
    assert call(*new, "--reference", reference, "-o", tmp_path / "c.json")[0] == 0
    code, out, _ = call("claim", "show", tmp_path / "c.json", "--json")
    assert code == 0
    shown = json.loads(out)["subject"]
    assert shown == {
        name: hashlib.sha256((reference / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    checking = ("claim", "verify", tmp_path / "c.json", "--owner", tmp_path / "a.pub.pem")
    assert call(*checking, "--key", key)[0] == 0
