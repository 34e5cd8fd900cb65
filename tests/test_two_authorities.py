"""Claims with tokens of several authorities: the one counts that proves the claim oldest."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from test_claim import KEY, OWNER, SIGNED

from nnpassport.claims import claim as claims
from nnpassport.claims.claim import check_claim, open_stamped_claim
from nnpassport.claims.claimfile import MOST_TOKENS, decode_signed, encode_signed
from nnpassport.claims.standing import standing_of
from nnpassport.claims.timestamp import Timestamp
from nnpassport.scheme import BadSignatureError, NoTimestampError, UnreadableClaimError

DAY = datetime(2026, 1, 1, tzinfo=UTC)
ROOTS = ["roots of both"]


@pytest.fixture(autouse=True)
def authorities(monkeypatch):
    """Tokens that say seconds after midnight, an accuracy and a name; "bad" ones do not hold."""

    def checked(response, covered, roots):
        time, accuracy, name = response.decode().split()
        if name not in ("A", "B"):
            raise BadSignatureError(f"{name} is vouched for by nobody")
        moment = DAY + timedelta(seconds=float(time))
        return Timestamp(moment, f"CN={name}", "1.2", "1", float(accuracy))

    monkeypatch.setattr(claims, "check_timestamp", checked)


def stamped(*tokens):
    signed = SIGNED
    for token in tokens:
        signed = signed.with_token(token.encode())
    return signed


def test_a_file_with_several_tokens_is_read_back_and_one_with_one_is_as_ever():
    two = stamped("10 1 A", "20 1 B")
    assert decode_signed(encode_signed(two)) == two
    assert two.responses == (b"10 1 A", b"20 1 B")
    assert two.undated() == SIGNED
    one = stamped("10 1 A")
    assert json.loads(encode_signed(one))["timestamp"].keys() == {"response"}
    (same,) = {encode_signed(one), encode_signed(SIGNED._replace(response=b"10 1 A"))}
    assert decode_signed(same) == one


@pytest.mark.parametrize(
    ("tokens", "counted"),
    [
        (("10 1 A", "20 1 B"), "CN=A"),
        (("20 1 B", "10 1 A"), "CN=A"),
        (("10 60 A", "20 1 B"), "CN=B"),  # A's may be of second 71
        (("10 5 A", "20 1 B"), "CN=A"),
        (("10 1 nobody", "20 1 B"), "CN=B"),
        (("20 1 B", "10 1 nobody"), "CN=B"),
    ],
)
def test_the_earlier_proved_one_counts(tokens, counted):
    _, timestamp = open_stamped_claim(stamped(*tokens), OWNER, ROOTS)
    assert timestamp.authority == counted


def test_a_token_more_never_makes_a_claim_younger():
    seconds = [(0, 1), (5, 30), (9, 2), (40, 0.5)]
    tokens = [f"{time} {accuracy} A" for time, accuracy in seconds] + ["0 0 nobody"]
    for first in tokens[:4]:
        alone = open_stamped_claim(stamped(first), OWNER, ROOTS)[1].latest
        for second in tokens:
            both = open_stamped_claim(stamped(first, second), OWNER, ROOTS)[1].latest
            assert both <= alone


def test_what_other_tokens_say_is_said():
    finding = check_claim(stamped("10 1 A", "20 1 B", "1 1 nobody"), OWNER, roots=ROOTS, key=KEY)
    assert finding.holds
    assert "from 2026-01-01T00:00:12Z or older" in finding.reason
    assert "CN=B says 2026-01-01T00:00:22Z or older too" in finding.reason
    assert "another timestamp proves nothing: nobody is vouched for" in finding.reason


def test_without_one_that_holds_the_claim_does_not():
    finding = check_claim(stamped("10 1 nobody", "20 1 none"), OWNER, roots=ROOTS)
    assert not finding.holds
    with pytest.raises(NoTimestampError):
        check_claim(stamped("10 1 A", "20 1 B"), OWNER)
    standing = standing_of(stamped("10 1 nobody", "20 1 B"), OWNER, KEY, roots=ROOTS)
    assert standing.timestamp.authority == "CN=B"
    undated = standing_of(stamped("10 1 nobody"), OWNER, KEY, roots=ROOTS)
    assert undated.timestamp is None


def test_no_more_tokens_than_are_read():
    full = stamped(*["10 1 A"] * MOST_TOKENS)
    assert decode_signed(encode_signed(full)) == full
    more = encode_signed(full.with_token(b"10 1 A"))
    with pytest.raises(UnreadableClaimError, match="at most 4 timestamps"):
        decode_signed(more)
    with pytest.raises(UnreadableClaimError, match="at most 4"):
        claims.stamp_claim(full, "http://127.0.0.1:9/", [])


@pytest.mark.parametrize(
    "stamp",
    [
        {"response": "AAAA", "also": []},
        {"also": ["AAAA"]},
        {"response": "AAAA", "also": "AAAA"},
        {"response": "AAAA", "also": [None]},
        {"response": "AAAA", "more": []},
    ],
)
def test_a_file_has_one_form(stamp):
    document = json.loads(encode_signed(SIGNED)) | {"timestamp": stamp}
    data = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(UnreadableClaimError):
        decode_signed(data)


def test_the_command_pairs_authorities_with_roots(tmp_path, call):
    words = ("claim", "new", "--key", "a", "--signing", "b", "-o", tmp_path / "c")
    code, _, errors = call(*words, "--authority", "http://a", "--authority", "http://b")
    assert code == 2
    assert "go together" in errors
