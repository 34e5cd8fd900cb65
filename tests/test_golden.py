"""Files that earlier versions wrote: each format stays readable, and gives what it gave."""

import hashlib
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import nnpassport
from nnpassport.alignment import axes as axes_module
from nnpassport.alignment import table
from nnpassport.alignment.axes import KINDS, Axes, Place
from nnpassport.alignment.table import AXES_FILE, read_table
from nnpassport.claims.claim import check_claim
from nnpassport.claims.claimfile import read_signed
from nnpassport.claims.diary import check, configuration
from nnpassport.claims.signing import load_public_key
from nnpassport.claims.timestamp import load_roots
from nnpassport.files.config import read_config
from nnpassport.keys.derive import BASE
from nnpassport.scheme import UnreadableModelError
from nnpassport.verification.continuity import is_named

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parent.parent / "docs" / "formats.md"
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


TABLES = sorted(name for name in INDEX if name.startswith("axes"))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_axes_is_read_and_has_the_digest_of_its_bytes(name):
    found = read_table(GOLDEN / name)
    assert found.to_bytes() == (GOLDEN / name).read_bytes()
    assert found.digest == INDEX[name]["sha256"]


def test_a_table_of_axes_is_of_its_network_and_a_claim_commits_to_it(tmp_path, call):
    folder = shutil.copytree(GOLDEN / "network-v1", tmp_path / "network")
    shutil.copy(GOLDEN / "axes-v1.json", folder / AXES_FILE)
    assert call("claim", "keygen", "-o", tmp_path / "a.pem")[0] == 0
    claimed = ("--key", GOLDEN / "key-v1-network.key", "--signing", tmp_path / "a.pem")
    made = ("-o", tmp_path / "a.claim.json", "--reference", folder, "--json")
    code, out, _ = call("claim", "new", *claimed, *made)
    assert (code, json.loads(out)["axes"]) == (0, INDEX["axes-v1.json"]["sha256"])


def rows(heading):
    """Of the first table behind these words of the page: its first two columns."""
    page = PAGE.read_text(encoding="utf-8").partition("\n## The table of axes\n")[2]
    lines = page.partition(heading)[2].splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| ---")) + 1
    cells = [line.split("|") for line in [*lines[start:], ""]]
    kept = itertools.takewhile(lambda row: len(row) > 1, cells)
    return {row[1].strip(): row[2].strip() for row in kept}


def test_the_page_of_tables_of_axes_names_every_field_and_kind():
    documents = [json.loads((GOLDEN / name).read_bytes()) for name in TABLES]
    fields = {field for each in documents for field in each}
    assert rows("**Fields.**").keys() == {f"`{field}`" for field in fields}
    axes = [axis for each in documents for axis in (*each["axes"], *each.get("pairs", ()))]
    assert rows("**An axis**").keys() == {f"`{field}`" for axis in axes for field in axis}
    assert rows("| kind").keys() == {f"`{kind}`" for kind in KINDS}
    assert {axis["kind"] for axis in axes} == {*KINDS} - {"invertible"}


def test_an_index_of_an_axis_is_where_the_page_says():
    place = Place("classifier.weight", 1, 0, 16, ((4, 4), (4, 1)))
    assert place in read_table(GOLDEN / "axes-v1.json").axes[2].places
    by_hand = [[16 * j + 4 * k + step for k in range(4) for step in range(4)] for j in range(32)]
    assert place.positions(32).tolist() == by_hand


def altered(change):
    document = json.loads((GOLDEN / "axes-v1.json").read_bytes())
    change(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def first(document):
    return document["axes"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=2),
        lambda d: d.update(format="another"),
        lambda d: d.update(more=[]),
        lambda d: d.update(pairs=[]),
        lambda d: d.pop("unknown"),
        lambda d: first(d).update(kind="mirror"),
        lambda d: first(d).update(size=1),
        lambda d: first(d)["places"][0].__setitem__(2, -1),
        lambda d: first(d)["places"][0].__setitem__(4, [[2, 0]] * 9),
        lambda d: first(d).update(places=first(d)["places"][:1] * 100_001),
        lambda d: d.update(axes=d["axes"][:1] * 10_001),
        lambda d: d.update(norms={"n": [None, True, 0.0]}),
        lambda d: d.update(batch_norms={"n": ["w", "b", "m", "v", 1.0]}),
    ],
)
def test_what_the_page_does_not_allow_in_a_table_is_refused(change):
    assert Axes.from_bytes(altered(lambda document: None))
    with pytest.raises(UnreadableModelError):
        Axes.from_bytes(altered(change))


def test_the_page_has_the_limits_of_tables_of_axes():
    limits = (table.MAX_AXES_BYTES, axes_module._MOST_AXES, axes_module._MOST_PLACES,
              axes_module._MOST_REPEATS, table.LONGEST, *table.LONGEST_OF_KIND.values(),
              table.MOST_WORK, table._MOST_SHARED)  # fmt: skip
    assert [*rows("**Limits.**").values()] == [f"{limit:,}" for limit in limits]
    of_kind = [f"`{kind}`" for kind in table.LONGEST_OF_KIND]
    assert re.findall(r"of kind (`\w+`)", " ".join(rows("**Limits.**"))) == of_kind


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
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w./-]+-v\d[\w./-]*)`", page))
    tops = {name.partition("/")[0] + ("/" if "/" in name else "") for name in INDEX}
    assert named == tops
