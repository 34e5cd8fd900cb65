import base64
import json
import re
import shlex
import stat
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nnpassport.cli.app import app
from nnpassport.data.images import Normalisation, read_images
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.network.models import build
from nnpassport.embedding.schemes.passport import V2
from nnpassport.keys.keyfile import load_key
from nnpassport.lab.demo import COMMANDS, FILES, STAGES, Budget, demo, ruling, table
from nnpassport.lab.demo.page import KEY_FILE, html
from nnpassport.lab.demo.story import present_each
from nnpassport.report import page as report
from nnpassport.scheme import UnwritableOutputError

TINY = Budget(epochs=2, test_images=180)
SEEDS = [sha256(b"demo %d" % number).digest() for number in range(1 + TINY.random_keys)]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The folder of a tiny demo, what it found, and what it showed on the way."""
    folder, shown = tmp_path_factory.mktemp("demo"), []
    result = demo(folder, show=lambda *step: shown.append(step), budget=TINY, key_seeds=SEEDS)
    return folder, result, shown


@pytest.mark.slow
@pytest.mark.trains
def test_the_owner_is_accepted_and_nobody_else(told):
    _, result, _ = told
    assert result.owner.accepted
    assert result.owner.log10_p_value < result.owner.log10_alpha < -30
    assert len(result.random_keys) == 50
    assert result.random_accepted == 0
    assert not result.unrelated.marked
    assert not result.unrelated.fidelity.passed
    assert result.as_expected


@pytest.mark.slow
@pytest.mark.trains
def test_a_copy_of_answers_alone_leans_as_the_owner_signed(told):
    """Of 3 seeds 10⁻⁶ to 10⁻¹⁴."""
    found = told[1].copied
    assert found.by_network.log10_p_value < -30
    assert found.by_copy.log10_p_value < -1
    assert found.by_copy.log10_p_value < found.by_stranger.log10_p_value
    assert min(found.plain, found.marked, found.copy) > 0.8


@pytest.mark.slow
@pytest.mark.trains
def test_only_the_genuine_passport_works(told):
    _, result, _ = told
    assert result.private.passed
    assert result.private.accuracy > 0.75
    assert len(result.forged_accuracies) == 50
    assert fmean(result.forged_accuracies) < 0.3
    assert result.forged_passed == 0


@pytest.mark.slow
@pytest.mark.trains
def test_random_bits_match_like_coin_flips(told):
    _, result, _ = told
    bits = sum(verdict.bits for verdict in result.random_keys)
    matches = sum(verdict.matches for verdict in result.random_keys)
    assert abs(matches - bits / 2) < 4 * (bits / 4) ** 0.5


@pytest.mark.slow
@pytest.mark.trains
def test_accuracies_of_many_passports_are_those_of_one_after_the_other(told):
    folder, result, _ = told
    model, config, _ = load_model(folder / "released")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    normalise = Normalisation(config.mean, config.std)
    test = read_images("digits", split="test", size=32).subset(torch.arange(TINY.test_images))
    keys = [
        V2.draw_key(model, torch.zeros(1, 3, 32, 32), owner="a rival", seed=s, passports="channel")
        for s in SEEDS
    ]
    keys = [load_key(folder / KEY_FILE), *keys[1:3]]
    alone = [V2.fidelity(model, key, test, normalise) for key in keys]
    assert present_each(model, keys, test, normalise) == pytest.approx(alone)
    assert alone == pytest.approx([result.private.accuracy, *result.forged_accuracies[:2]])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.trains
def test_leaves_the_files_it_names(told):
    folder, _, _ = told
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert stat.S_IMODE((folder / KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.slow
@pytest.mark.trains
def test_releases_a_plain_network_and_nothing_else(told):
    folder, result, _ = told
    model, config, _ = load_model(folder / "released")
    assert set(model.state_dict()) == set(build("alexnet", **config.arguments).state_dict())
    assert dict(config.metrics) == {"accuracy": result.public_accuracy}
    assert not config.notes
    released = folder / "released"
    assert {path.name for path in released.iterdir()} == {"config.json", "model.safetensors"}


def secrets_of(key):
    """Everything in a key that must not leave the owner's folder, in the forms it might take."""
    yield from (key.seed, key.seed.hex().encode(), base64.b64encode(key.seed))
    for layer in key.context.layers:
        signs = key.layer_signs(layer.name)
        yield signs.numpy().tobytes()
        yield key.metrics[layer.name].tobytes()
        for _, passports in key.channel_arrays(layer.name):
            for passport in passports.reshape(-1, passports.shape[-1]):
                yield from (passport.tobytes(), passport.astype(np.float32).tobytes())
        bits = (signs > 0).int()
        packed = int("".join(map(str, bits.tolist())), 2).to_bytes(-(-len(bits) // 8), "big")
        yield from (packed, packed.hex().encode(), base64.b64encode(packed))
        yield "".join(map(str, bits.tolist())).encode()


@pytest.mark.slow
@pytest.mark.trains
def test_no_file_but_the_key_holds_a_secret(told):
    folder, result, _ = told
    key = load_key(folder / KEY_FILE)
    assert key.seed == SEEDS[0]
    assert key.seed.hex().encode() in (folder / KEY_FILE).read_bytes()
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != KEY_FILE]
    assert len(files) == 2 + 4 * 2
    contents = [*(path.read_bytes() for path in files), json.dumps(result.as_dict()).encode()]
    for secret in secrets_of(key):
        assert not any(secret in content for content in contents)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes = Counter(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs


@pytest.mark.slow
@pytest.mark.trains
def test_the_page_fetches_and_runs_nothing(told):
    folder, _, _ = told
    text = (folder / "demo.html").read_text()
    page = Page(text)
    fetching = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image"}
    assert not fetching & set(page.tags)
    assert page.tags["svg"] == 2
    assert not re.search(r"https?:|@import|javascript:|url\((?!#)", text)
    links = [value for name, value in page.attributes if name in {"href", "src", "xlink:href"}]
    assert all(link.startswith("#") for link in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    ids = Counter(value for name, value in page.attributes if name == "id")
    assert max(ids.values()) == 1
    assert {link[1:] for link in links} <= set(ids)


@pytest.mark.slow
@pytest.mark.trains
def test_the_page_tells_what_was_found(told):
    folder, result, _ = told
    text = (folder / "demo.html").read_text()
    assert ruling(result).startswith("Accepted")
    for words in (ruling(result), *(cell for row in table(result) for cell in row)):
        assert words.replace("'", "&#39;") in text
    assert result.fingerprint in text
    assert result.owner.digests["model.safetensors"] in text
    assert str(folder) not in text
    assert text == html(result)


@pytest.mark.slow
@pytest.mark.trains
def test_a_failed_run_says_so(told):
    _, result, _ = told
    failed = replace(result, unrelated=result.owner)
    assert not failed.as_expected
    assert "did not go as it should" in ruling(failed)
    assert "is claimed by mistake" in table(failed)[-2][-1]
    assert 'class="ruling refused"' in html(failed)


@pytest.mark.slow
@pytest.mark.trains
def test_the_result_is_json(told):
    _, result, _ = told
    facts = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert facts["as_expected"] is True
    assert facts["owner"]["accepted"] is True
    assert facts["random_keys"]["accepted"] == 0
    assert list(facts["seconds"]) == list(STAGES)


@pytest.mark.slow
@pytest.mark.trains
def test_shows_where_it_stands(told):
    _, _, shown = told
    done = [step[0] for step in shown]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, len(STAGES))
    assert {total for _, total, _ in shown} == {len(STAGES)}


@pytest.mark.slow
@pytest.mark.trains
def test_never_overwrites_a_key_unasked(told, tmp_path):
    (tmp_path / KEY_FILE).write_text("precious")
    with pytest.raises(UnwritableOutputError, match="lost for good"):
        demo(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_refuses_a_folder_that_cannot_be_written_before_it_trains(tmp_path):
    (tmp_path / "file").touch()
    shown = []
    with pytest.raises(UnwritableOutputError):
        demo(tmp_path / "file" / "folder", show=lambda *step: shown.append(step))
    assert not shown


@pytest.mark.slow
@pytest.mark.trains
@pytest.mark.parametrize(("command", "outcome"), COMMANDS)
def test_the_commands_to_try_next_do_what_the_page_says(told, command, outcome, monkeypatch):
    monkeypatch.chdir(told[0])
    monkeypatch.delenv("NNPASSPORT_PASSPHRASE", raising=False)
    program, *arguments = shlex.split(command)
    assert program == "nnpassport"
    done = CliRunner().invoke(app, arguments, standalone_mode=False)
    assert done.exception is None
    assert bool(done.return_value) == outcome.startswith("Refused")
    assert SEEDS[0].hex() not in done.output


@pytest.mark.parametrize(
    ("log10", "text"),
    [
        (0.0, "1.00"),
        (-0.3, "0.50"),
        (-1.99, "0.01"),
        (-2.0, "1.0·10⁻²"),
        (-48.1648, "6.8·10⁻⁴⁹"),
        (-2.0001, "1.0·10⁻²"),
        (-1234.5, "3.2·10⁻¹²³⁵"),
    ],
)
def test_a_p_value_is_readable_however_small(log10, text):
    assert report.small(log10) == text


def test_texts_in_a_page_are_escaped():
    evil = "<script>alert('x')</script>"
    facts = {"title": evil, "ruling": evil, "accepted": False, "rows": [(evil, evil, evil)]}
    assert "<script" not in report.page("report.html.j2", facts)
    row = report.Row(evil, [0.5], "plain", evil)
    panel = report.Panel(evil, [row], evil, (0, 1), {0: evil}, (0.2, evil))
    assert "<script" not in report.svg(panel, "name")


def test_equal_points_do_not_hide_each_other():
    row = report.Row("", [0.5] * 40 + [0.9], "forged", "")
    panel = report.Panel("", [row], "", (0, 1), {0: "0"}, (0.2, ""))
    places = re.findall(
        r'<use xlink:href="#[^"]*" x="([\d.]+)" y="([\d.]+)" style="fill', report.svg(panel, "x")
    )
    assert len(set(places)) == len(places) > 40
