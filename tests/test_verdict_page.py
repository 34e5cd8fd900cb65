"""Pages of verdicts, rulings and probes: what they say, what they fetch, how they look."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from html import escape, unescape
from html.parser import HTMLParser

import constructed
import pytest
import torch
from authority import Signer, certificate, new_key, pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

from nnpassport.attacks.obfuscation import combine
from nnpassport.claims.claim import claim_of, sign_claim
from nnpassport.claims.claimfile import timestamped_bytes, write_signed
from nnpassport.cli import app as cli
from nnpassport.data.images import Normalisation
from nnpassport.embedding.checkpoint import save_model
from nnpassport.embedding.network.equations import read_bits
from nnpassport.embedding.network.models import build
from nnpassport.embedding.network.tensors import tensors_digest
from nnpassport.embedding.schemes.passport import V2
from nnpassport.embedding.schemes.signature import secrets_of
from nnpassport.files.config import ModelConfig
from nnpassport.keys.keyfile import save_key
from nnpassport.report import tracks
from nnpassport.report import verdict as verdictpage
from nnpassport.report import words as verdictwords
from nnpassport.report.page import small
from nnpassport.report.provenance import made_with
from nnpassport.scheme import UnwritableOutputError
from nnpassport.verification.hearing import disclose

TOMORROW = (datetime.now(UTC) + timedelta(days=1)).isoformat()
ARGUMENTS = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
EVIL = "<script>alert('x')<b> & \"$x^$ onload=1 \N{CJK UNIFIED IDEOGRAPH-682A}"
LONG = "x" * 150
CASES = ("accepted", "refused", "owner", "nobody", "undecided", "probe")
WORDS = {
    "accepted": "carries the mark of the key of",
    "refused": "is not shown to carry the mark",
    "owner": "“alice” alone, of 2 claimants, proves a mark",
    "nobody": "Nobody, of one claimant, proves a claim",
    "undecided": "both prove a mark in",
    "probe": "What answers as “huggingface http",
}


def marked(seed, owner):
    """An untrained network whose filters are negated until they read as its key's bits."""
    torch.manual_seed(seed)
    model = build("alexnet", **ARGUMENTS).eval()
    key = V2.draw_key(
        model, torch.zeros(2, 1, 32, 32), owner=owner, seed=bytes([seed] * 32), passports="derived"
    )
    with torch.no_grad():
        for name, secret in secrets_of(key).items():
            weight = model.get_submodule(name).weight
            weight[read_bits(weight, secret.mean_patch) != secret.signs] *= -1
    return model, key


def authority(folder):
    """A timestamp authority whose root lies in `folder`, or None where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl binary, which plays the timestamp authority")
    root_key, key = new_key(), new_key()
    root = certificate("A Root", root_key, ca=True)
    (folder / "root.pem").write_bytes(pem(root))
    return Signer(folder / "tsa", key, certificate("An Authority", key, (root, root_key)))


def exhibit(folder, name, model, key, config, signer):
    """What a claimant hands to a judge, as `claim disclose` makes it; the claim lies beside."""
    signing = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    reference = tensors_digest(model.state_dict())
    claim = claim_of(key, signing.public_key(), reference=reference)
    file, network = folder / f"{len(list(folder.iterdir()))}.claim.json", folder / "network"
    signed = sign_claim(claim, signing)
    query = TimestampRequestBuilder(timestamped_bytes(signed.envelope), HashAlgorithm.SHA256)
    signed = signed._replace(response=signer.answer(query.build().as_bytes()))
    write_signed(signed, file)
    save_model(network, model, config)
    disclose(file, key, folder / name, reference=network)
    shutil.rmtree(network)
    return file


@pytest.fixture(scope="module")
def pages(tmp_path_factory, digits):
    """Facts and page of every case, as the commands write them."""
    folder = tmp_path_factory.mktemp("pages")
    normalise = Normalisation((0.5,), (0.5,))
    config = ModelConfig(
        architecture="alexnet",
        arguments=ARGUMENTS,
        classes=tuple("0123456789"),
        input_size=(1, 32, 32),
        mean=(0.5,),
        std=(0.5,),
    )
    known = digits[0].resized(32).subset(torch.arange(320))
    bare, key = marked(1, "Alice")
    model = constructed.marked(V2, bare, key, known, normalise)
    other, others = marked(2, EVIL)
    signer = authority(folder)
    claim = exhibit(folder, "alice", model, key, config, signer)
    exhibit(folder, EVIL, other, others, config, signer)
    exhibit(folder, LONG, model, key, config, signer)
    save_model(folder / "released", model, config)
    rng = torch.Generator().manual_seed(3)
    save_model(folder / "suspect", combine(model, rng).model, config)
    save_key(key, folder / "alice.key")
    verify = ("verify", "suspect", "--key", "alice.key")
    save_model(folder / "stranger", marked(4, "Nobody")[0], config)
    dated, early = ("--root", "root.pem", "--appeared", TOMORROW), ("--appeared", "2026-01-31")
    unrelated = ("--unrelated", "stranger")  # a fourth of the time of mixtures
    aligned = (*verify, "--align", "released", "--claim", claim.name, *dated)
    data = ("--data", "digits", "--split", "test", "--target", "0.3")
    commands = {
        "accepted": (0, (*aligned, *data)),
        "refused": (1, verify),
        "owner": (0, ("judge", "suspect", "alice", EVIL, *dated, *unrelated)),
        "nobody": (1, ("judge", "suspect", EVIL, *dated, *unrelated)),
        "undecided": (3, ("judge", "released", "alice", LONG, *unrelated, *early)),
    }
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, (code, words) in commands.items():
            argv = ["nnpassport", *words, "--report", f"{name}.html", "--json"]
            facts, page = called(patch, argv, code), folder / f"{name}.html"
            found[name] = (facts, page)
    facts = probed(found["refused"][0])
    verdictpage.write_probe_page(facts, folder / "probe.html")
    return {**found, "probe": (facts, folder / "probe.html")}


def called(patch, argv, code):
    """What the command prints, read as JSON."""
    patch.setattr(sys, "argv", argv)
    printed = []
    patch.setattr("typer.echo", printed.append)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code, printed
    return json.loads(printed[0])


def probed(facts):
    """The shape of what `probe --json` prints, on numbers of a verdict."""
    tally = {"asked": 50, "answered": 50, "abstained": 0, "refused": 0, "failed": 0}
    left = {name: value for name, value in facts.items() if name not in {"suspect", "read"}}
    made = {name: value for name, value in facts["made_with"].items() if name != "command"}
    return {
        **left,
        "layers": {},
        "accepted": True,
        "marked": True,
        "log10_p_value": -600.25,
        "made_with": made,
        "service": "huggingface http://localhost:8000/predict",
        "hidden": True,
        "triggers": tally,
        "covers": tally,
        "cover_accuracy": 0.875,
        "retries": 2,
        "seconds": 1.5,
        "notes": [EVIL],
    }


def text_of(page):
    """What a reader sees and hears, without tags."""
    kept = re.sub(r"<(style|script).*?</\1>", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", kept)))


def verdicts_in(facts):
    """Every verdict that these facts hold, wherever."""
    if isinstance(facts, dict):
        if "log10_p_value" in facts:
            yield facts
        for each in facts.values():
            yield from verdicts_in(each)
    elif isinstance(facts, list):
        for each in facts:
            yield from verdicts_in(each)


def digests_in(facts):
    return set(re.findall(r"\b[0-9a-f]{64}\b", json.dumps(facts)))


@pytest.mark.parametrize("name", CASES)
def test_the_ruling_is_one_sentence(pages, name):
    _, page = pages[name]
    ruling = re.search(r'<p class="ruling[^>]*>(.*?)</p>', page.read_text(), re.DOTALL).group(1)
    assert WORDS[name] in unescape(ruling)
    assert unescape(ruling).endswith(".")
    assert ('class="ruling refused"' in page.read_text()) == (
        name in {"refused", "nobody", "undecided"}
    )


@pytest.mark.parametrize("name", CASES)
def test_the_page_says_what_the_json_says(pages, name):
    facts, page = pages[name]
    text = text_of(page)
    assert digests_in(facts) <= set(re.findall(r"\b[0-9a-f]{64}\b", text))
    found = list(verdicts_in(facts))
    assert found
    for each in found:
        assert f"{each['matches']} of {each['bits']}" in text
        assert small(each["log10_p_value"]) in text
        assert f"{each['log10_p_value']:.2f}".replace("-0.00", "0.00").replace("-", "−") in text
        assert small(each["log10_alpha"]) in text
        for layer, (hits, bits) in each["layers"].items():
            assert f"{layer}: {hits} of {bits}" in text
        if each["alignment"]:
            assert ", ".join(map(str, each["alignment"]["null"]["matches"])) in text
        if each["fidelity"]:
            assert (
                f"{100 * each['fidelity']['accuracy']:.2f}\N{NO-BREAK SPACE}%" in page.read_text()
            )
    made = facts["made_with"]
    for value in made.values():
        assert value is None or str(value) in text
    reasons = facts["reasons"] if "reasons" in facts else [facts["reason"]]
    assert all(re.sub(r"\s+", " ", reason) in text for reason in reasons)


@pytest.mark.parametrize("name", CASES)
def test_the_page_tells_what_it_does_not_say(pages, name):
    _, page = pages[name]
    text = text_of(page)
    assert "A licence is not written in a network" in text
    assert "who holds that key is not" in text
    undated = name not in {"accepted", "owner", "nobody"}
    assert ("nothing here proves when that key was drawn" in text) == undated


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.pictures = Counter(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "svg":
            self.pictures.append(dict(attrs))


@pytest.mark.parametrize("name", CASES)
def test_the_page_fetches_and_runs_nothing(pages, name):
    _, page = pages[name]
    text = page.read_text()
    seen = Tags(text)
    fetching = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    assert not fetching & set(seen.tags)
    assert not seen.tags["b"]
    style = re.search(r"<style>.*?</style>", text, re.DOTALL).group()
    assert not re.search(r"@import|url\(|https?:", style)
    values = {n: v for n, v in seen.attributes if n.startswith("on") or "javascript:" in (v or "")}
    assert not values
    assert not [v for _, v in seen.attributes if v and re.search(r"url\((?!#)", v)]
    links = [v for n, v in seen.attributes if n in {"href", "src", "xlink:href"}]
    assert all(link.startswith("#") for link in links)
    ids = Counter(v for n, v in seen.attributes if n == "id")
    assert max(ids.values()) == 1
    assert {link[1:] for link in links} <= set(ids)
    assert seen.pictures
    assert all(each["role"] == "img" and each["aria-label"] for each in seen.pictures)


def test_names_of_strangers_are_text(pages):
    facts, page = pages["owner"]
    assert facts["claimants"][1]["name"] == facts["claimants"][1]["owner"] == EVIL
    assert EVIL not in page.read_text()
    assert escape(EVIL).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in page.read_text()
    assert EVIL in text_of(page)


def test_no_secret_is_on_a_page(pages):
    for facts, page in pages.values():
        for seed in (bytes([1] * 32), bytes([2] * 32)):
            assert seed.hex() not in page.read_text() + json.dumps(facts)


def test_the_command_is_there_to_be_repeated(pages):
    facts, page = pages["accepted"]
    assert facts["made_with"]["command"].startswith("nnpassport verify suspect --key alice.key")
    assert "sha256sum suspect/model.safetensors" in text_of(page)


def test_a_page_that_cannot_be_written_is_an_error(pages, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableOutputError, match="cannot be written"):
        verdictpage.write_verdict_page(pages["refused"][0], tmp_path / "file" / "page.html")


def test_a_name_that_is_no_text_can_be_written(pages, tmp_path):
    facts = {**pages["refused"][0], "suspect": {"file": "net\udc80", "appeared": None}}
    verdictpage.write_verdict_page(facts, tmp_path / "page.html")
    assert "net" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"log10_p_value": None}, "no p-value says what that is worth"),
        ({"log10_p_value": -20.0}, "too few: p = 1.0·10⁻²⁰, and 7.9·10⁻³¹ or less is needed"),
        ({"marked": True}, "but the accuracy with the passport is too low"),
        ({"claim": {"holds": False}}, "the claim itself does not hold"),
    ],
)
def test_a_refusal_says_why(pages, changes, words):
    facts = {**pages["refused"][0], **changes}
    claimant = {"owner": "Alice", "readings": {verdictwords.AS_IT_STANDS: facts}}
    case = {"suspect": facts["suspect"], "claimants": [claimant]}
    assert words in verdictwords.verdict_ruling(case)


def test_the_papers_own_rule_is_called_weak(pages):
    facts = {**pages["refused"][0], "accepted": True, "marked": True, "log10_p_value": None}
    page = verdictpage.verdict_page({**facts, "read": verdictwords.AS_PUBLISHED})
    assert "forged keys can pass it" in page


@pytest.mark.parametrize(
    ("log10_p", "words"),
    [(-0.5, "what chance gives"), (-2.0, "in 100 "), (-255.8, "in 10²⁵⁵ "), (-600.2, "in 10⁶⁰⁰ ")],
)
def test_odds_are_in_words(log10_p, words):
    assert words in verdictwords.odds(log10_p)


def test_texts_in_pictures_are_one_printable_line():
    assert tracks.short("a\nb\x1b\u202ec") == r"a\nb\x1b\u202ec"
    assert tracks.short("x" * 50, 10) == "x" * 9 + "…"


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to look with")
MEASURE = """
const out = [];
const frames = [...document.querySelectorAll("iframe")];
addEventListener("load", () => {
  for (const frame of frames) {
    const inside = frame.contentDocument, wide = frame.clientWidth;
    let most = inside.documentElement.scrollWidth, who = "";
    for (const each of inside.querySelectorAll("body *:not(defs *, clipPath, clipPath *)")) {
      const right = each.getBoundingClientRect().right;
      if (right > most + 0.5) { most = right; who = each.outerHTML.slice(0, 200); }
    }
    out.push([wide, Math.floor(most), who]);
  }
  document.body.textContent = "measured " + JSON.stringify(out) + " end";
});
"""


def browse(folder, *options):
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *options],
        cwd=folder,
        env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@in_a_browser
def test_nothing_is_cut_off_on_a_desk_a_phone_or_paper(pages, tmp_path):
    frames = []
    for name, (_, page) in pages.items():
        text = page.read_text()
        (tmp_path / f"{name}.html").write_text(text)
        paper = text.replace("@media screen", "@media speech").replace("@media print", "@media all")
        (tmp_path / f"{name}-paper.html").write_text(paper)
        frames += [(f"{name}.html", width) for width in (1280, 500, 360)]
        frames.append((f"{name}-paper.html", 700))
    inside = "".join(
        f'<iframe src="{file}" style="border:0;width:{width}px;height:900px"></iframe>'
        for file, width in frames
    )
    (tmp_path / "all.html").write_text(f"<body>{inside}<script>{MEASURE}</script>")
    options = ("--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom")
    seen = browse(tmp_path, *options, f"file://{tmp_path}/all.html")
    measured = json.loads(unescape(re.search(r"measured (.*) end", seen).group(1)))
    assert len(measured) == len(frames)
    cut = [
        (each, *found) for each, found in zip(frames, measured, strict=True) if found[1] > found[0]
    ]
    assert not cut


@pytest.mark.slow
@in_a_browser
@pytest.mark.parametrize("name", ["accepted", "undecided"])
def test_it_prints_on_pages(pages, name, tmp_path):
    _, page = pages[name]
    browse(tmp_path, f"--print-to-pdf={tmp_path}/page.pdf", f"file://{page}")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 12


def test_a_command_is_kept_without_what_an_address_lets_in(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/nnpassport", "judge", "http://me:word@host/x", "a b"])
    assert made_with()["command"] == "nnpassport judge http://host/x 'a b'"
