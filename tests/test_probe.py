import base64
import io
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import threading
import time
import tracemalloc
import urllib.request
from collections import defaultdict
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nnpassport.catalog import CATALOG, with_settings
from nnpassport.cli import app as cli
from nnpassport.data.images import ImageSet, Normalisation
from nnpassport.embedding import owner as ownership
from nnpassport.embedding.schemes.signature import read_answers
from nnpassport.embedding.train.loop import Recipe
from nnpassport.files.config import ModelConfig
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.keys.reading import ANSWERED
from nnpassport.scheme import (
    BadRecipeError,
    UnreachableServiceError,
    UnreadableDataError,
    UnreadableKeyError,
    UnsuitableModelError,
    UnwritableOutputError,
)
from nnpassport.verification.remote.answers import Scores
from nnpassport.verification.remote.asking import Clock, Kind, Limits, asking
from nnpassport.verification.remote.journal import resume as read_journal
from nnpassport.verification.remote.labels import Labels, read_labels
from nnpassport.verification.remote.plan import Plan, Terms, settle
from nnpassport.verification.remote.probe import probe
from nnpassport.verification.remote.services import (
    HuggingFace,
    OpenInference,
    Template,
    Upload,
    png,
)

ROOT = Path(__file__).parents[1]
ADI = with_settings(CATALOG["adi"].scheme, triggers=40)
SIDE = 8


def drawn(number, scheme=ADI):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIDE * SIDE, 10))
    example = torch.zeros(2, 1, SIDE, SIDE)
    return scheme.draw_key(model, example, owner="Alice", seed=bytes([number]) * 32)


KEY, FRESH = drawn(1), drawn(2)
IMAGES, TRUTH = KEY.trigger_set()
RIGHT = {image.numpy().tobytes(): int(label) for image, label in zip(IMAGES, TRUTH, strict=True)}
COVER = ImageSet(
    torch.randint(0, 256, (60, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    ),
    torch.arange(60) % 10,
    tuple("0123456789"),
    "covers",
)
# What the owner's network answers, by the pixels; other images are all one to it.
FIRST = {image.numpy().tobytes(): n % 10 for n, image in enumerate(COVER.images)}
OWNERS = defaultdict(lambda: 3, {**FIRST, **RIGHT})
QUICK = Limits(timeout=30, retries=4, backoff=0.5, longest_wait=60)


class Waits:
    """A clock that nobody has to wait for; what was waited is written down."""

    def __init__(self):
        self.time, self.slept = 0.0, []

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.time += seconds

    @property
    def clock(self):
        return Clock(lambda: self.time, self.sleep)


def pixels_in(body):
    return Image.open(io.BytesIO(body)).tobytes()


def scored(label):
    return json.dumps([{"label": str(label), "score": 0.9}, {"label": "other", "score": 0.05}])


@pytest.fixture
def serve():
    """Starts servers: serve(answer) with answer(handler, body), the number of the request known."""
    servers = []

    def start(answer):
        seen = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append(SimpleNamespace(body=body, headers=dict(self.headers), path=self.path))
                try:
                    answer(self, body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def say(self, text, status=200, **headers):
                data = text if isinstance(text, bytes) else text.encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.stopping = threading.Event()
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        url = f"http://127.0.0.1:{server.server_port}/models/digits"
        return SimpleNamespace(url=url, seen=seen, stopping=server.stopping)

    yield start
    for server, thread in servers:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def owners_network(handler, body):
    handler.say(scored(OWNERS[pixels_in(body)]))


def asked(url, key=KEY, *, limits=QUICK, labels=None, headers=None, waits=None, **others):
    service = HuggingFace(url) if isinstance(url, str) else url
    clock = (waits or Waits()).clock
    labels = labels or Labels(10)
    with asking(service, labels, limits, headers=headers, clock=clock) as asker:
        return probe(asker, key, **others)


def one_answer(url, *, limits=QUICK, waits=None, labels=None, headers=None):
    clock = (waits or Waits()).clock
    labels = labels or Labels(10)
    with asking(HuggingFace(url), labels, limits, headers=headers, clock=clock) as asker:
        return asker.ask(IMAGES[0])


# Verdicts


def test_the_owners_key_is_accepted_and_a_fresh_one_refused(serve):
    server = serve(owners_network)
    found = asked(server.url, cover=COVER)
    assert found.verdict.accepted
    assert (found.verdict.matches, found.verdict.bits) == (40, 40)
    assert found.verdict.log10_p_value == pytest.approx(-40)
    assert found.triggers == found.covers == (40, 40, 0, 0, 0)
    assert found.cover_accuracy == 1
    assert found.hidden
    assert found.notes == ()

    refused = asked(server.url, FRESH, cover=COVER)
    assert not refused.verdict.accepted
    assert refused.verdict.log10_p_value > -3
    assert refused.cover_accuracy == 1


def test_a_service_that_answers_at_random_is_refused(serve):
    rng = random.Random(0)
    found = asked(serve(lambda handler, _: handler.say(scored(rng.randrange(10)))).url)
    assert not found.verdict.accepted
    assert found.verdict.log10_p_value > -3


def test_a_service_that_does_not_look_is_refused_and_it_is_said(serve):
    server = serve(lambda handler, _: handler.say(scored(3)))
    found = asked(server.url, cover=COVER)
    assert not found.verdict.accepted
    assert "same class" in found.verdict.reason
    assert any("no better than chance" in note for note in found.notes)


def test_declined_triggers_leave_the_p_value_exact(serve):
    declined = set(list(RIGHT)[::8])  # 5 of 40

    def answer(handler, body):
        pixels = pixels_in(body)
        handler.say("[]" if pixels in declined else scored(OWNERS[pixels]))

    found = asked(serve(answer).url, cover=COVER)
    assert found.verdict.accepted
    assert found.triggers == (40, 35, 5, 0, 0)
    assert found.verdict.log10_p_value == pytest.approx(-35)
    assert "35 of 40 were answered" in found.verdict.reason
    assert any("tells them apart" in note for note in found.notes)


def test_too_few_answers_could_not_be_checked_even_if_they_are_right(serve):
    few = set(list(RIGHT)[:20])

    def answer(handler, body):
        pixels = pixels_in(body)
        status = 200 if pixels in few or pixels in FIRST else 422
        handler.say(scored(OWNERS[pixels]), status)

    with pytest.raises(UnreachableServiceError, match="20 of 40 triggers were answered"):
        asked(serve(answer).url, cover=COVER)


def test_answers_of_minus_one_are_no_answers():
    answers = TRUTH.clone()
    answers[5:] = -1
    verdict = read_answers(answers, KEY)
    assert (verdict.bits, verdict.matches) == (5, 5)
    assert verdict.log10_p_value == pytest.approx(-5)
    with pytest.raises(UnsuitableModelError, match="none of the 40"):
        read_answers(torch.full((40,), -1), KEY)


def test_chosen_triggers_have_no_p_value(serve):
    chosen = Key(KEY.seed, KEY.context, trigger_images=IMAGES, trigger_labels=TRUTH)
    found = asked(serve(owners_network).url, chosen)
    assert found.verdict.log10_p_value is None
    assert not found.verdict.accepted


def test_a_key_without_triggers_cannot_ask():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 8), torch.nn.Flatten(), torch.nn.Linear(4, 2))
    uchida = with_settings(CATALOG["uchida"].scheme, bits=8)
    key = uchida.draw_key(model, torch.zeros(2, 1, 8, 8), layers=["0"])
    with pytest.raises(UnreadableKeyError, match="no trigger set"):
        asked("http://127.0.0.1:1/", key)


# What is sent


def test_triggers_are_hidden_among_covers_in_random_order(serve, tmp_path):
    orders = []
    for run in ("a", "b"):
        server = serve(owners_network)
        asked(server.url, cover=COVER, journal=tmp_path / run)
        innocent, *pixels = (pixels_in(each.body) for each in server.seen)
        assert innocent not in pixels
        assert len(set(pixels)) == 80
        assert set(RIGHT) < set(pixels)
        triggers = [each in RIGHT for each in pixels]
        assert sum(triggers) == 40
        # In either half there are about as many of each: nobody can tell where triggers are.
        assert 8 <= sum(triggers[:40]) <= 32
        in_key_order = [list(RIGHT).index(each) for each in pixels if each in RIGHT]
        assert in_key_order != sorted(in_key_order)
        orders.append(pixels)
        headers = {
            tuple(sorted((n, v) for n, v in each.headers.items() if n != "Content-Length"))
            for each in server.seen
        }
        assert len(headers) == 1
        assert "nnpassport" not in str(headers)
    assert orders[0] != orders[1]


def test_the_budget_bounds_the_queries_and_takes_the_first_triggers(serve):
    server = serve(owners_network)
    found = asked(server.url, cover=COVER, terms=Terms(budget=64, log10_alpha=-9.0))
    assert len(server.seen) == 1 + 64
    assert found.triggers.asked == found.covers.asked == 32
    assert {pixels_in(each.body) for each in server.seen} & set(RIGHT) == set(list(RIGHT)[:32])
    assert any("budget" in note for note in found.notes)


def test_a_budget_that_can_prove_nothing_is_refused_before_anything_is_asked(serve):
    server = serve(owners_network)
    with pytest.raises(BadRecipeError, match="5 triggers cannot reach"):
        asked(server.url, terms=Terms(budget=5))
    assert server.seen == []


def test_without_covers_the_result_says_that_nothing_hid_the_triggers(serve):
    found = asked(serve(owners_network).url)
    assert not found.hidden
    assert "nothing hid" in found.notes[0]


def test_plans():
    shape = KEY.context.triggers
    assert settle(shape, Terms(), COVER) == Plan(40, 40)
    assert settle(shape, Terms(covers_per_trigger=3), COVER) == Plan(40, 60)
    assert settle(shape, Terms(budget=10, covers_per_trigger=3), COVER) == Plan(2, 6)
    assert settle(shape, Terms(budget=1), COVER) == Plan(1, 0)
    assert settle(shape, Terms(budget=10), None) == Plan(10, 0)
    for terms in ({"budget": 0}, {"covers_per_trigger": -1}, {"log10_alpha": 0.0}):
        with pytest.raises(BadRecipeError, match="needed"):
            Terms(**terms)
    with pytest.raises(UnreadableDataError, match="tell them apart"):
        settle(shape, Terms(), COVER.resized(9))


def test_no_secret_is_in_journal_result_or_messages(serve, tmp_path):
    def answer(handler, _):
        token = handler.headers["Authorization"]
        handler.say(scored(1) if len(server.seen) % 2 else scored(f"{token} {token}\x1b[2J"))

    server = serve(answer)
    with pytest.raises(UnreachableServiceError) as caught:
        asked(
            server.url + "?token=hidden-in-url",
            headers={"Authorization": "Bearer hf_secret"},
            journal=tmp_path / "journal",
        )
    written = (tmp_path / "journal").read_text() + str(caught.value)
    assert stat.S_IMODE((tmp_path / "journal").stat().st_mode) == 0o600
    for secret in ("hf_secret", "hidden-in-url", "\x1b", KEY.seed.hex()):
        assert secret not in written
    assert "unknown" in written
    assert len(server.seen) == 1 + 40


# Patience


def test_errors_of_the_server_are_retried_with_growing_pauses(serve):
    def answer(handler, _):
        handler.say(scored(4)) if len(server.seen) > 3 else handler.say("<html>", 503)

    server, waits = serve(answer), Waits()
    answered = one_answer(server.url, waits=waits)
    assert (answered.kind, answered.label, answered.retries) == (Kind.ANSWERED, 4, 3)
    for pause, most in zip(waits.slept, (0.5, 1, 2), strict=True):
        assert most / 2 <= pause <= most
    assert answered.seconds == pytest.approx(sum(waits.slept), abs=1e-3)


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [
        ("7", 7, 7),
        ("999999999", 60, 60),
        ("9" * 5000, 0.25, 0.5),
        ("-5", 0.25, 0.5),
        ("soon", 0.25, 0.5),
        ("Fri, 31 Dec 9998 23:59:59 GMT", 60, 60),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.25, 0.5),
        ("Sun, 06 Nov 999999999 08:49:37 +9999", 0.25, 0.5),
    ],
)
def test_a_service_may_ask_for_a_pause_but_not_for_ever(serve, retry_after, least, most):
    def answer(handler, _):
        if len(server.seen) > 1:
            handler.say(scored(4))
        else:
            handler.say("", 429, Retry_After=retry_after)

    server, waits = serve(answer), Waits()
    assert one_answer(server.url, waits=waits).label == 4
    assert least <= waits.slept[0] <= most


def test_the_rate_bounds_every_try(serve):
    waits = Waits()
    asked(serve(owners_network).url, limits=Limits(rate=4), waits=waits)
    assert waits.time == pytest.approx(40 / 4)


@pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
def test_a_refusal_is_counted_and_not_repeated(serve, status):
    server = serve(lambda handler, _: handler.say("no", status))
    answer = one_answer(server.url)
    assert (answer.kind, answer.note) == (Kind.REFUSED, f"HTTP status {status}")
    assert len(server.seen) == 1


def test_refusals_of_everything_stop_the_run_early(serve, tmp_path):
    server = serve(lambda handler, _: handler.say("no", 401))
    with pytest.raises(UnreachableServiceError, match=r"401.*no trigger was shown.*--header"):
        asked(server.url, journal=tmp_path / "journal")
    assert len(server.seen) == 2
    assert not (tmp_path / "journal").exists()
    server = serve(lambda handler, _: handler.say(*gone[len(server.seen) > 1]))
    gone = ((scored(1),), ("no", 401))
    with pytest.raises(UnreachableServiceError, match=r"401.*incomplete, 40 of 40"):
        asked(server.url, journal=tmp_path / "journal")
    assert len(server.seen) == 1 + 10
    assert read_journal(tmp_path / "journal").answers == []


def test_a_redirect_is_not_followed(serve):
    elsewhere = serve(owners_network)
    server = serve(lambda h, _: h.say("", 307, Location=elsewhere.url))
    answer = one_answer(server.url)
    assert (answer.kind, answer.retries) == (Kind.FAILED, 0)
    assert "elsewhere" in answer.note
    assert elsewhere.seen == []


def hang(handler, _):
    handler.server.stopping.wait()


def drip_header(handler, _):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b"a")


def drip_body(handler, _):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n[")
    while not handler.server.stopping.wait(0.02):
        handler.wfile.write(b" ")


@pytest.mark.parametrize("slow", [hang, drip_header, drip_body])
def test_a_slow_service_is_left_after_the_time_out(serve, slow):
    limits = Limits(timeout=0.3, retries=1)
    answer = one_answer(serve(slow).url, limits=limits)
    assert (answer.kind, answer.retries) == (Kind.FAILED, 1)
    assert "0.3 seconds" in answer.note


def drop(handler, _):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def drop_in_the_middle(handler, _):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n[{")
    drop(handler, _)


def no_http(handler, _):
    handler.wfile.write(b"\x00\xffSSH-2.0-what\r\n\r\n")
    drop(handler, _)


def deep(handler, _):
    handler.say("[" * 200_000)


def page(handler, _):
    handler.say("<html><body>Sign in</body></html>", Content_Type="text/html")


def packed(handler, _):
    handler.say(b"\x1f\x8b\x08\x00junk", Content_Encoding="gzip")


def object_instead(handler, _):
    handler.say('{"error": "no model"}')


def not_a_number(handler, _):
    handler.say('[{"label": "3", "score": NaN}]')


def digits_without_end(handler, _):
    handler.say("[" + "9" * 100_000 + "]")


def binary(handler, _):
    handler.say(bytes(range(256)))


HOSTILE = [
    drop,
    drop_in_the_middle,
    no_http,
    deep,
    page,
    packed,
    object_instead,
    not_a_number,
    digits_without_end,
    binary,
]


@pytest.mark.parametrize("answer", HOSTILE)
def test_what_is_no_answer_is_a_failure_after_all_tries(serve, answer):
    server, waits = serve(answer), Waits()
    found = one_answer(server.url, limits=Limits(retries=2), waits=waits)
    assert (found.kind, found.label, found.retries) == (Kind.FAILED, -1, 2)
    assert found.note.isprintable()
    assert len(found.note) <= 160
    assert len(waits.slept) == 2


def test_a_service_that_is_down_stops_the_run(serve):
    with pytest.raises(UnreachableServiceError, match="no trigger was shown"):
        asked("http://127.0.0.1:1/", limits=Limits(retries=1))
    server = serve(lambda h, b: drop(h, b) if len(server.seen) > 1 else h.say(scored(1)))
    with pytest.raises(UnreachableServiceError, match="incomplete"):
        asked(server.url, limits=Limits(retries=1))


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_takes_little_memory(serve, declared):
    def flood(handler, _):
        length = b"Content-Length: 999999999999\r\n" if declared else b""
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n")
        while not handler.server.stopping.is_set():
            handler.wfile.write(bytes(2**16))

    server = serve(flood)
    tracemalloc.start()
    answer = one_answer(server.url)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.kind is Kind.FAILED
    assert "more than 1048576 bytes" in answer.note
    assert peak < 32 * 2**20


# Resuming


def test_a_resumed_run_asks_nothing_twice_and_gives_the_same_verdict(serve, tmp_path):
    declined = set(list(RIGHT)[:4])

    def answer(handler, body):
        if breaks and len(server.seen) > breaks[0]:
            return drop(handler, body)
        pixels = pixels_in(body)
        return handler.say("[]" if pixels in declined else scored(OWNERS[pixels]))

    breaks, server = [], serve(answer)
    limits = Limits(retries=0)

    def whole(name, **others):
        journal = tmp_path / name
        return asked(server.url, limits=limits, cover=COVER, journal=journal, **others)

    straight = whole("straight")
    server.seen.clear()
    breaks.append(1 + 30)
    with pytest.raises(UnreachableServiceError, match="50 of 80 queries are left"):
        whole("broken")
    breaks.clear()
    answered = server.seen[1:31]
    (tmp_path / "broken").write_bytes((tmp_path / "broken").read_bytes() + b'{"query": 30, "ki')
    server.seen.clear()
    found = whole("broken", resume=True)
    assert len(server.seen) == 50
    assert not {each.body for each in answered} & {each.body for each in server.seen}
    assert found.verdict == straight.verdict
    assert found.triggers == straight.triggers
    server.seen.clear()
    assert whole("broken", resume=True).verdict == found.verdict
    assert server.seen == []
    with pytest.raises(UnwritableOutputError, match="another run"):
        whole("broken")


def test_a_run_goes_on_only_under_the_same_terms(serve, tmp_path):
    server, journal = serve(owners_network), tmp_path / "journal"
    asked(server.url, cover=COVER, journal=journal)
    changed = [
        {"key": FRESH},
        {"terms": Terms(log10_alpha=-9.0)},
        {"terms": Terms(budget=70)},
        {"cover": COVER.subset(torch.arange(50))},
        {"labels": Labels.in_order([f"digit {n}" for n in range(10)], 10)},
        {"url": server.url + "2"},
    ]
    for change in changed:
        arguments = {"url": server.url, "cover": COVER, **change}
        with pytest.raises(BadRecipeError, match="other terms"):
            asked(**arguments, journal=journal, resume=True)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b'{"format": "nnpassport-probe", "version": 2}\n',
        b'{"format": "nnpassport-probe", "version": 1}\n{}\n',
        b'{"format": "nnpassport-probe", "version": 1}\n[' + b"[" * 100_000 + b"\n",
        b'{"format": "nnpassport-probe", "version": 1}\n\xff\n',
        b'{"format": "nnpassport-probe", "version": 1}\n{"query": 1, "kind": "answered", '
        b'"label": 3, "note": "", "retries": 0, "seconds": 0.1}\n',
        b'{"format": "nnpassport-probe", "version": 1}\n{"query": 0, "kind": "answered", '
        b'"label": -1, "note": "", "retries": 0, "seconds": 0.1}\n',
    ],
)
def test_what_is_no_journal_is_not_gone_on_with(tmp_path, content):
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(UnreadableDataError):
        read_journal(tmp_path / "journal")


# Protocols


def test_the_template_takes_any_json(serve):
    def answer(handler, body):
        sent = json.loads(body)
        assert sent["model"] == "digits"
        picture = base64.b64decode(sent["inputs"][0]["url"].removeprefix("data:image/png;base64,"))
        label = f"digit {OWNERS[pixels_in(picture)]}"
        handler.say(json.dumps({"a/b": [{"~": {"label": label}}]}))

    template = '{"model": "digits", "inputs": [{"url": "data:image/png;base64,$IMAGE"}]}'
    service = Template(serve(answer).url, template, "/a~1b/0/~0/label")
    names = Labels.in_order([f"digit {n}" for n in range(10)], 10)
    assert asked(service, labels=names, cover=COVER).verdict.accepted


def test_open_inference_sends_normalised_numbers(serve):
    normalise = Normalisation((0.25,), (0.5,))

    def answer(handler, body):
        (tensor,) = json.loads(body)["inputs"]
        assert (tensor["name"], tensor["datatype"]) == ("x", "FP32")
        assert tensor["shape"] == [1, 1, SIDE, SIDE]
        numbers = (torch.tensor(tensor["data"]) * 0.5 + 0.25) * 255
        label = OWNERS[numbers.round().to(torch.uint8).numpy().tobytes()]
        logits = [float(n == label) for n in range(10)]
        output = {"name": "y", "shape": [1, 10], "datatype": "FP32", "data": logits}
        handler.say(json.dumps({"model_name": "m", "outputs": [output]}))

    server = serve(answer)
    service = OpenInference(server.url.removesuffix("/models/digits"), "a b", normalise, "x")
    assert asked(service, cover=COVER).verdict.accepted
    assert server.seen[0].path == "/v2/models/a%20b/infer"


def test_open_inference_with_channels_last():
    pixels = torch.arange(2 * 3 * 3).view(3, 2, 3).to(torch.uint8)
    service = OpenInference(
        "http://h", "m", Normalisation((0.0,) * 3, (1.0,) * 3), channels_last=True
    )
    (tensor,) = json.loads(service.request(pixels).body)["inputs"]
    assert tensor["shape"] == [1, 2, 3, 3]
    assert [round(255 * n) for n in tensor["data"][:6]] == [0, 6, 12, 1, 7, 13]


V2 = OpenInference("http://h", "m", Normalisation((0.5,), (0.5,)))
JSON = Template("http://h", '{"image": "$IMAGE"}', "/x")
HUB = HuggingFace("http://h")
RANKED = replace(V2, ranked=True)
UPLOAD = Upload("http://h", "/x")


@pytest.mark.parametrize(
    ("service", "answer", "label"),
    [
        (HUB, [{"label": "a", "score": 0.1}, {"label": "b", "score": 0.9}], "b"),
        (HUB, [{"label": "a"}, {"label": "b"}], "a"),
        (HUB, [{"label": 7}], 7),
        (HUB, [{"score": 1.0}], None),
        (HUB, [], None),
        (HUB, [[{"label": "a", "score": "0.1"}, {"label": "b", "score": "9e-1"}]], "b"),
        (HUB, {"tabby": 0.1, "tiger cat": "0.9"}, "tiger cat"),
        (V2, {"outputs": [{"data": [0.1, 0.9]}]}, Scores((0.1, 0.9))),
        (V2, {"outputs": [{"data": [[-3, -1, -2]]}]}, Scores((-3, -1, -2))),
        (V2, {"outputs": [{"data": ["-3", "1e1"]}]}, Scores((-3.0, 10.0))),
        (V2, {"outputs": [{"data": [False, True, False]}]}, Scores((0.0, 1.0, 0.0))),
        (V2, {"outputs": [{"data": ["0.1:4:cat", "0.9:3:dog:s"]}]}, "dog:s"),
        (V2, {"outputs": [{"data": ["0.9:3"]}]}, 3),
        (RANKED, {"outputs": [{"data": [4, 1, 0]}]}, 4),
        (RANKED, {"outputs": [{"data": [["cat", "dog"]]}]}, "cat"),
        (UPLOAD, {"x": "cat"}, "cat"),
        (JSON, {"x": {"cat": 0.1, "dog": 0.2}}, "dog"),
        (V2, {"outputs": [{"data": [4]}]}, 4),
        (V2, {"outputs": [{"data": [4.0]}]}, 4),
        (V2, {"outputs": [{"data": ["cat"]}]}, "cat"),
        (V2, {"outputs": [{"data": []}]}, None),
        (V2, {"outputs": []}, None),
        (JSON, {"x": "cat"}, "cat"),
        (JSON, {"x": [0.1, 0.2, 0.3]}, Scores((0.1, 0.2, 0.3))),
        (JSON, {"x": None}, None),
        (JSON, {}, None),
        (JSON, [1], None),
    ],
)
def test_labels_are_found_where_the_protocol_has_them(service, answer, label):
    assert service.label(json.dumps(answer).encode()) == label


@pytest.mark.parametrize(
    ("service", "answer"),
    [
        (HUB, {"label": "a"}),
        (HUB, {"error": "no token"}),
        (HUB, {}),
        (replace(V2, output_name="logit"), {"outputs": [{"name": "logits", "data": [1]}]}),
        (V2, {"outputs": [{"data": [True, True, False]}]}),
        (V2, {"outputs": [{"data": ["0.1:4:cat", "dog"]}]}),
        (RANKED, {"outputs": [{"data": [0.9, 0.1]}]}),
        (HUB, ["a"]),
        (HUB, [{"label": "a", "score": "high"}]),
        (HUB, [{"label": True}]),
        (V2, {"outputs": [{}]}),
        (V2, {"outputs": {"data": [1]}}),
        (V2, {"outputs": [{"data": ["a", "b"]}]}),
        (V2, {"outputs": [{"data": [None, 1]}]}),
        (V2, {"outputs": [{"data": [0.5]}]}),
        (JSON, {"x": {"label": 3}}),
        (JSON, {"x": False}),
    ],
)
def test_what_is_not_of_the_protocol_is_not_guessed_at(service, answer):
    with pytest.raises(UnreachableServiceError, match="the service answers with"):
        service.label(json.dumps(answer).encode())


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
wrapped = st.one_of(
    values,
    st.lists(st.fixed_dictionaries({"label": values}, optional={"score": values})),
    st.fixed_dictionaries({"outputs": st.lists(st.fixed_dictionaries({"data": values}))}),
    st.fixed_dictionaries({"x": values}),
)


@given(st.one_of(st.binary(), wrapped.map(json.dumps).map(str.encode)))
def test_any_bytes_are_a_label_or_an_error_of_ours(body):
    for service in (HUB, V2, JSON, RANKED, UPLOAD):
        try:
            label = service.label(body)
        except UnreachableServiceError:
            continue
        assert label is None or isinstance(label, str | int | Scores)
        if isinstance(label, Scores):
            assert len(label.numbers) > 1
        elif label is not None:
            index = Labels(10, {"cat": 3}).index(label)
            assert index is None or 0 <= index < 10


@pytest.mark.parametrize(
    "url", ["", "digits", "file:///etc/passwd", "ftp://h/", "http://", "http://h:x/", "http://h/\n"]
)
def test_only_addresses_of_services_are_asked(url):
    for make in (
        HuggingFace,
        lambda u: Template(u, '"$IMAGE"', ""),
        lambda u: V2.__class__(u, "m", V2.normalise),
    ):
        with pytest.raises(UnreachableServiceError, match="no address"):
            make(url)


def test_a_password_in_an_address_is_refused_and_not_shown():
    with pytest.raises(UnreachableServiceError) as caught:
        HuggingFace("http://me:hunter2@host/")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "pointer"),
    [('{"image": 1}', ""), ("$IMAGE", ""), ("", ""), ('"$IMAGE"', "label"), ("[" * 10**5, "")],
)
def test_what_is_no_template_is_refused(template, pointer):
    with pytest.raises(UnreachableServiceError, match=r"is none of|is no JSON"):
        Template("http://h", template, pointer)


# Labels, limits, headers


def test_labels_are_names_first_and_then_indices(tmp_path):
    names = Labels(10, {"cat": 3, "7": 1})
    known = {"cat": 3, " Cat ": 3, "7": 1, "8": 8, "LABEL_2": 2, 5: 5, 0: 0}
    unknown = ["cats", "10", 10, -1, "-1", "LABEL_10", "", "²", "٣", "1e0", 10**5000]
    assert {label: names.index(label) for label in known} == known
    assert [names.index(label) for label in unknown] == [None] * len(unknown)
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(list("abcdefghij")))
    assert read_labels(path, 10).index("c") == 2
    path.write_text('{"cat": 3, "kitten": 3}')
    assert read_labels(path, 10).index("kitten") == 3
    for wrong in (
        '["a"]',
        '{"a": 10}',
        '{"a": "1"}',
        '{"a": true}',
        "3",
        "[1]",
        "[" * 10**5,
        "\xff",
    ):
        path.write_text(wrong, encoding="latin-1")
        with pytest.raises(UnreadableDataError):
            read_labels(path, 10)
    path.write_text(json.dumps(["a"] * 10))
    with pytest.raises(UnreadableDataError, match="a name of its own"):
        read_labels(path, 10)


@pytest.mark.parametrize(
    "numbers",
    [{"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}, {"rate": -1.0}, {"backoff": 1e99}],
)
def test_limits_that_make_no_sense_are_refused(numbers):
    with pytest.raises(BadRecipeError, match="limits"):
        Limits(**numbers)


@pytest.mark.parametrize(
    ("name", "value"), [("A b", "x"), ("A", "secret\n"), ("A", "secret\r\nB: c"), ("A", "sécret")]
)
def test_a_header_that_cannot_be_sent_is_refused_and_not_shown(name, value):
    with pytest.raises(BadRecipeError) as caught, asking(HUB, Labels(10), headers={name: value}):
        pass
    assert "cret" not in str(caught.value)


# The command


def run(capsys, *arguments):
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        cli_main(*arguments)
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def cli_main(*arguments):
    import sys

    before, sys.argv = sys.argv, ["nnpassport", *map(str, arguments)]
    try:
        cli.main()
    finally:
        sys.argv = before


@pytest.fixture
def files(tmp_path):
    """Key files, and a folder of covers as the command reads them."""
    for name, key in (("alice", KEY), ("fresh", FRESH)):
        save_key(key, tmp_path / f"{name}.key")
    import numpy as np

    np.savez(tmp_path / "cover.npz", images=COVER.images.numpy(), labels=COVER.labels.numpy())
    return tmp_path


def test_the_command_accepts_refuses_and_says_what_could_not_be_checked(
    serve, files, capsys, monkeypatch
):
    monkeypatch.setenv("TOKEN_OF_MINE", "Bearer hf_secret")

    def answer(handler, body):
        if handler.headers["Authorization"] != "Bearer hf_secret":
            return handler.say("no", 401)
        return handler.say(scored(OWNERS[pixels_in(body)]))

    server = serve(answer)
    token = ("--header", "Authorization=TOKEN_OF_MINE")
    common = ("probe", server.url, "--cover", files / "cover.npz", "--json")
    out = files / "result.json"
    page = files / "page.html"
    shown = ("--out", out, "--report", page)
    code, text, _ = run(capsys, *common, "--key", files / "alice.key", *token, *shown)
    assert code == 0
    facts = json.loads(text)
    assert "carries the mark of the key of" in page.read_text()
    assert facts["key"]["fingerprint"] in page.read_text()
    assert "hf_secret" not in page.read_text()
    assert facts == json.loads(out.read_text())
    assert facts["accepted"]
    assert facts["matches"] == facts["bits"] == 40
    assert facts["hidden"]
    assert facts["covers"] == {
        "asked": 40,
        "answered": 40,
        "abstained": 0,
        "refused": 0,
        "failed": 0,
    }
    everything = text + (files / "result.json.journal.jsonl").read_text()
    assert "hf_secret" not in everything
    code, text, _ = run(
        capsys, *common, "--key", files / "alice.key", *token, "--out", out, "--resume"
    )
    assert code == 0
    assert len(server.seen) == 1 + 80
    code, text, _ = run(capsys, *common, "--key", files / "fresh.key", *token)
    assert code == 1
    assert not json.loads(text)["accepted"]
    code, text, error = run(capsys, *common, "--key", files / "alice.key")
    assert code == 2
    assert text == ""
    assert "UnreachableServiceError" in error
    code, text, _ = run(
        capsys, "probe", server.url, "--key", files / "alice.key", *token, "--alpha", "-9"
    )
    assert code == 0
    assert text.startswith("ACCEPTED")
    assert "nothing hid" in text


def test_the_command_asks_for_what_a_protocol_needs(files, capsys):
    key = ("--key", files / "alice.key")
    wrong = [
        ("--protocol", "grpc"),
        ("--protocol", "openinference", "--model", "m"),
        ("--protocol", "openinference", "--mean", "0", "--std", "1"),
        ("--protocol", "openinference", "--model", "m", "--mean", "0", "--std", "0"),
        ("--protocol", "template"),
        ("--resume",),
        ("--header", "Authorization=NO_SUCH_VARIABLE"),
        ("--header", "hf_secret_on_the_line"),
    ]
    for arguments in wrong:
        code, text, _ = run(capsys, "probe", "http://127.0.0.1:1/", *key, *arguments)
        assert (code, text) == (2, "")


# A real server


def mlserver():
    """The command of a real server of the Open Inference Protocol, or None."""
    return os.environ.get("NNPASSPORT_MLSERVER") or shutil.which("mlserver")


def free_port():
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        return probe_socket.getsockname()[1]


@pytest.fixture
def served(tmp_path, digits):
    """A released V3 network of digits behind MLServer: its address, its key, its folder."""
    train, _, normalise = digits
    data = train.resized(32).subset(torch.arange(640))
    scheme = with_settings(CATALOG["passport-v3"].scheme, triggers=40, triggers_per_step=8)
    arguments = {"classes": 10, "norm": "batch", "width": 0.25, "channels": 1}
    config = ModelConfig("alexnet", arguments, data.classes, (1, 32, 32), (0.5,), (0.5,))
    key, fresh = (
        scheme.draw_key(config.build(), torch.zeros(2, 1, 32, 32), seed=bytes([n]) * 32)
        for n in (1, 2)
    )
    recipe = Recipe(epochs=8, batch=32, rate=0.05, schedule="one-cycle", augment=False)
    sets = ownership.Sets(data, data, None, normalise)
    ownership.embed(tmp_path / "marked", config, key, sets, recipe, scheme=scheme)
    folder = tmp_path / "served"
    shutil.copytree(ROOT / "examples" / "serve_with_mlserver", folder)
    ownership.release(tmp_path / "marked", key, folder / "released")
    save_key(key, tmp_path / "alice.key")
    save_key(fresh, tmp_path / "fresh.key")
    ports = {name: free_port() for name in ("http_port", "grpc_port", "metrics_port")}
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | ports))
    url = f"http://127.0.0.1:{ports['http_port']}"
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([mlserver(), "start", folder], stdout=log, stderr=log)
        try:
            wait_until_ready(server, url, tmp_path / "log")
            yield SimpleNamespace(url=url, folder=folder / "released", keys=tmp_path)
        finally:
            server.terminate()
            server.wait(60)


def wait_until_ready(server, url, log):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        try:
            opener.open(f"{url}/v2/models/released/ready", timeout=10).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(log.read_text(errors="replace"))


@pytest.mark.skipif(
    mlserver() is None,
    reason="no MLServer: pip install nnpassport[serving] in an environment of its own, and name "
    "its mlserver command in NNPASSPORT_MLSERVER",
)
def test_a_released_network_behind_mlserver_is_recognised(served, capsys):
    common = ("probe", served.url, "--protocol", "openinference", "--model", "released")
    options = ("--like", served.folder, "--cover", "digits", "--json")
    code, text, _ = run(capsys, *common, "--key", served.keys / "alice.key", *options)
    facts = json.loads(text)
    assert code == 0
    assert facts["accepted"]
    assert facts["triggers"]["answered"] == 40
    assert facts["cover_accuracy"] > 0.9
    code, text, _ = run(capsys, *common, "--key", served.keys / "fresh.key", *options)
    assert code == 1
    assert not json.loads(text)["accepted"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_a_png_of_the_same_pixels(channels):
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    with Image.open(io.BytesIO(png(pixels))) as picture:
        assert picture.mode == ("L" if channels == 1 else "RGB")
        found = torch.from_numpy(np.array(picture))
    assert torch.equal(found if channels == 1 else found.permute(2, 0, 1), pixels.squeeze(0))


def test_a_service_is_sent_the_numbers_that_a_network_gets():
    pixels = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8)
    normalise = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    service = OpenInference("http://h", "m", normalise)
    (tensor,) = json.loads(service.request(pixels).body)["inputs"]
    numbers = torch.tensor(tensor["data"]).view(tensor["shape"])
    torch.testing.assert_close(numbers, normalise(pixels[None]))


def test_the_schemes_that_can_be_asked_are_those_with_labels():
    assert {name for name, entry in CATALOG.items() if entry.scheme.triggers} == ANSWERED
