"""Files that earlier versions wrote: each format stays readable, and gives what it gave."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest

import nnpassport
from nnpassport.alignment.table import read_table
from nnpassport.claims.claim import check_claim
from nnpassport.claims.claimfile import read_signed
from nnpassport.claims.diary import check, configuration
from nnpassport.claims.signing import load_public_key
from nnpassport.claims.timestamp import load_roots
from nnpassport.files.config import read_config
from nnpassport.keys.derive import BASE
from nnpassport.verification.continuity import is_named

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(GOLDEN))

from make import given  # noqa: E402 - found by the line above

INDEX = json.loads((GOLDEN / "index.json").read_text(encoding="utf-8"))
KEYS = sorted(name for name in INDEX if name.endswith(".key") and "/" not in name)
CLAIMS = sorted(name for name in INDEX if name.startswith("claim") and name.endswith(".json"))
OF_NETWORK = {"claim-v1-of-network.json", "claim-v1-in-toto.json"}


def opened(name):
    return nnpassport.load_key(GOLDEN / name, passphrase="golden" if "locked" in name else None)


def test_no_golden_file_is_missing_or_was_changed():
    there = {
        path.relative_to(GOLDEN).as_posix()
        for path in GOLDEN.rglob("*")
        if path.is_file() and path.name not in {"index.json", "make.py"} and path.suffix != ".pyc"
    }
    assert there == set(INDEX), "tests/golden/make.py writes what is missing into the index"
    for name, told in INDEX.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == told["sha256"], name
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", told["written"])


@pytest.mark.parametrize("name", KEYS)
def test_every_key_opens_and_derives_the_same(name):
    told = given(GOLDEN / name)
    assert told == {each: INDEX[name][each] for each in ("fingerprint", "derived")}
    assert opened(name).context.owner == "Zoë"


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_holds(name):
    dated = "stamped" in name or "tokens" in name
    roots = load_roots(GOLDEN / "claim-v1-root.pem") if dated else None
    owner = load_public_key(GOLDEN / "claim-v1-owner.pub.pem")
    finding = check_claim(read_signed(GOLDEN / name), owner, roots=roots)
    assert finding.holds
    if name == "claim-v1-anchor.json":  # its key is written out in tests/test_claim.py
        assert finding.claim.context.anchor is not None
        return
    key = opened("key-v1-network.key" if name in OF_NETWORK else "key-v1.key")
    assert finding.claim.fingerprint == key.fingerprint


def test_a_network_folder_is_read_and_verified():
    config = read_config(GOLDEN / "network-v1")
    assert (config.architecture, config.input_size) == ("alexnet", (1, 32, 32))
    verdict = nnpassport.verify(GOLDEN / "network-v1", opened("key-v1-network.key"))
    assert (verdict.matches, verdict.bits, verdict.accepted) == (112, 112, True)
    assert not nnpassport.verify(
        GOLDEN / "network-v1" / "model.safetensors", opened("key-v1-network.key")
    ).corrections


@pytest.mark.parametrize(("name", "weighs"), [("channels", False), ("directions", True)])
def test_a_mark_of_channels_is_read(name, weighs):
    key = opened(f"key-v1-{name}.key")
    verdict = nnpassport.verify(GOLDEN / f"suspect-v1-{name}.safetensors", key)
    assert (verdict.matches, verdict.bits) == (64, 64)
    assert (int(key.metrics["3"][0, 0]) == BASE) == weighs


def test_a_table_of_axes_is_read():
    assert read_table(GOLDEN / "axes-v1.json")


def test_an_exhibit_is_heard(call):
    code, out, _ = call("judge", GOLDEN / "network-v1", GOLDEN / "exhibit-v1")
    assert (code, out.splitlines()[0]) == (0, "OWNER: exhibit-v1")


def test_a_diary_holds_and_is_dated():
    folder = GOLDEN / "diary-v1"
    owner = load_public_key(GOLDEN / "claim-v1-owner.pub.pem")
    found = check(folder, owner, roots=load_roots(folder / "root.pem"))
    assert found.holds
    assert [each.facts.step for each in found.entries] == [0, 0, 10]
    assert found.entries[2].facts.metrics == {"loss": 0.25}
    assert found.dated(2) is not None
    assert configuration(folder, found.entries[1].facts.configuration)
    assert is_named(folder, found.entries[1]) is None


def test_the_table_of_formats_names_every_golden_file():
    page = (Path(__file__).parent.parent / "docs" / "formats.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+-v\d[\w./-]*)`", page))
    tops = {name.partition("/")[0] + ("/" if "/" in name else "") for name in INDEX}
    assert named == tops
