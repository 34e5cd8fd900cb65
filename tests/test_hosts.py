"""Prediction services as people have them: read rightly, or not at all and nothing shown."""

import base64
import gzip
import io
import ipaddress
import json
import ssl
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from nnpassport.cli import app as cli
from nnpassport.keys.context import Context, TriggerShape
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.scheme import UnreachableServiceError
from nnpassport.verification.remote.asking import Clock, Limits, asking
from nnpassport.verification.remote.labels import Labels
from nnpassport.verification.remote.probe import probe
from nnpassport.verification.remote.services import HuggingFace

SIDE = 8
CLASSES = 10
NAMES = [f"class {letter}" for letter in "abcdefghij"]
KEY = Key(b"\1" * 32, Context("adi", "Alice", (), TriggerShape(60, 10, (1, 8, 8)), bytes(16)))
PICTURES, TRUTH = KEY.trigger_set()
RIGHT = {p.numpy().tobytes(): int(t) for p, t in zip(PICTURES, TRUTH, strict=True)}

NUMBERS = ("--mean", "0", "--std", "1")
V2 = ("--protocol", "openinference", "--model", "m", *NUMBERS)
B64 = ("--protocol", "template", "--template", "b64.json", "--pointer", "/predictions/0")
DATA = ("--protocol", "template", "--template", "data.json", "--pointer", "")


def in_png(body):
    return Image.open(io.BytesIO(body)).tobytes()


def in_numbers(values):
    return np.rint(np.asarray(values, float) * 255).astype(np.uint8).tobytes()


def in_form(headers, body):
    form = message_from_bytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
    (part,) = form.get_payload()
    assert part.get_content_type() == "image/png"
    return part.get_param("name", header="content-disposition"), part.get_payload(decode=True)


def picture_in(headers, body):
    """The pixels that were sent, however they were."""
    kind = headers["Content-Type"]
    if kind == "image/png":
        return in_png(body)
    if kind.startswith("multipart"):
        return in_png(in_form(headers, body)[1])
    sent = json.loads(body)
    if "inputs" in sent:
        return in_numbers(sent["inputs"][0]["data"])
    if "data" in sent:
        return in_png(base64.b64decode(sent["data"]))
    instance = sent["instances"][0]
    if isinstance(instance, list):
        return in_numbers(instance)
    return (
        in_png(base64.b64decode(instance["b64"]))
        if "b64" in instance
        else in_numbers(instance["x"])
    )


class Services:
    """Starts services on this machine; what they were shown is kept."""

    def __init__(self):
        self.running = []

    def start(self, answer, tls=None):
        """`answer(asked)` gives a JSON value, or status, JSON value or bytes, and headers."""
        shown = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                pixels = picture_in(self.headers, body)
                shown.append(pixels)
                place = RIGHT.get(pixels, sum(pixels) % CLASSES)
                asked = SimpleNamespace(
                    place=place, name=NAMES[place], headers=self.headers, body=body, n=len(shown)
                )
                found = answer(asked)
                status, said, headers = found if isinstance(found, tuple) else (200, found, {})
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"Content-Length": len(data), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        server.handle_error = lambda *_: None  # a client that hangs up in the handshake
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.running.append((server, thread))
        scheme = "http" if tls is None else "https"
        return SimpleNamespace(url=f"{scheme}://127.0.0.1:{server.server_port}/p", shown=shown)


@pytest.fixture
def services():
    found = Services()
    yield found
    for server, thread in found.running:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `probe` on a service: its exit code, and all that it printed."""
    save_key(KEY, tmp_path / "alice.key")
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    (tmp_path / "b64.json").write_text('{"instances": [{"b64": "$IMAGE"}]}')
    (tmp_path / "data.json").write_text('{"data": "$IMAGE"}')
    (tmp_path / "named.json").write_text('{"instances": [{"x": "$NUMBERS"}]}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "2000")

    def run(url, *options):
        options = ("--key", "alice.key", "--labels", "names.json", "--retries", "0", *options)
        monkeypatch.setattr(sys, "argv", ["nnpassport", "probe", url, *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, " ".join("".join(capsys.readouterr()).split())

    return run


def scores(place, count=CLASSES):
    return [0.9 if each == place else 0.01 * each for each in range(count)]


def best(place, count=3):
    return [(place + each) % CLASSES for each in range(count)]


def hub(asked, count=5):
    found = [{"label": NAMES[each], "score": 0.1} for each in best(asked.place, count)]
    return [found[0] | {"score": 0.9}, *found[1:]]


def v2(*outputs):
    named = [{"name": name, "datatype": kind, "data": data} for name, kind, data in outputs]
    return {"model_name": "m", "outputs": named}


def v2_indices(asked):
    return v2(("indices", "INT64", best(asked.place)))


def v2_pair(asked):
    return v2(("scores", "FP32", [0.8, 0.1, 0.05]), ("classes", "INT64", best(asked.place)))


def v2_background(asked):
    return v2(("probs", "FP32", [0.0, *scores(asked.place)]))


def v2_ranking(asked):
    return v2(("ranks", "INT64", best(asked.place, CLASSES)))


def v2_embedding(asked):
    features = [0.1] * asked.place + [0.2] + [0.1] * (63 - asked.place)
    return v2(("embedding", "FP32", features), ("logits", "FP32", scores(asked.place)))


def v2_names(asked):
    return v2(("labels", "BYTES", [NAMES[each] for each in best(asked.place)]))


def v2_triton(asked):
    texts = [
        f"{0.1 * (9 - n):.6f}:{each}:{NAMES[each]}" for n, each in enumerate(best(asked.place))
    ]
    return v2(("probs", "BYTES", texts))


def v1(asked):
    return {"predictions": [scores(asked.place)]}


def v1_index(asked):
    return {"predictions": [asked.place]}


def v1_best(asked):
    return {"predictions": [{"classes": best(asked.place), "scores": [0.8, 0.1, 0.05]}]}


def v1_texts(asked):
    return {"predictions": [[str(each) for each in scores(asked.place)]]}


def v1_one_hot(asked):
    return {"predictions": [[each == asked.place for each in range(CLASSES)]]}


def tensorflow(asked):
    if "b64" in asked.body.decode():
        return 400, {"error": "JSON object: does not have named input: x"}, {}
    return v1(asked)


def torchserve(asked):
    return {each["label"]: each["score"] for each in hub(asked)}


def form(asked):
    if not asked.headers["Content-Type"].startswith("multipart/form-data"):
        return 422, {"detail": [{"loc": ["body", "file"], "msg": "field required"}]}, {}
    if in_form(asked.headers, asked.body)[0] != "upload":
        return 422, {"detail": [{"loc": ["body", "upload"], "msg": "field required"}]}, {}
    return {"label": asked.name}


def nested(asked):
    return [hub(asked)]


def packed(asked):
    return 200, gzip.compress(json.dumps(hub(asked)).encode()), {"Content-Encoding": "gzip"}


def score_texts(asked):
    return [each | {"score": str(each["score"])} for each in hub(asked)]


def label_index(asked):
    return [{"label": f"LABEL_{asked.place}", "score": 0.9}]


READ = {
    "01 indices, best first": (v2_indices, *V2, "--top"),
    "02 scores beside indices": (v2_pair, *V2, "--output", "classes", "--top"),
    "05 names, best first": (v2_names, *V2, "--top"),
    "05 classification extension": (v2_triton, *V2),
    "14 the right output": (v2_embedding, *V2, "--output", "logits"),
    "all classes, best first": (v2_ranking, *V2, "--top"),
    "06 scores": (v1, *B64),
    "06 an index": (v1_index, *B64),
    "06 best of several": (v1_best, *B64[:-1], "/predictions/0/classes/0"),
    "06 best of several, ranked": (v1_best, *B64[:-1], "/predictions/0/classes", "--top"),
    "08 numbers in JSON": (tensorflow, "--protocol", "instances", *NUMBERS),
    "09 scores as texts": (v1_texts, *B64),
    "09 one of ten is true": (v1_one_hot, *B64),
    "10 scores by name": (torchserve,),
    "10 scores by name, base64": (torchserve, *DATA),
    "11 upload form": (form, "--protocol", "multipart", "--field", "upload"),
    "lists of one list": (nested,),
    "gzip": (packed,),
    "texts for scores": (score_texts,),
    "indices with a prefix": (label_index,),
}


@pytest.mark.parametrize("case", READ)
def test_a_service_of_a_known_form_is_read(services, command, case):
    answer, *options = READ[case]
    service = services.start(answer)
    code, printed = command(service.url, *options)
    assert code == 0, printed
    assert "60" in printed
    assert set(RIGHT) < set(service.shown)


def upper(asked):
    return [{"label": asked.name.upper().replace(" ", "_"), "score": 0.9}]


def from_one(asked):
    return [{"label": str(asked.place + 1), "score": 0.9}]


def wants_token(asked):
    if asked.headers["Authorization"] != "Bearer tok":
        return 403, {"error": f"bad token {asked.headers['Authorization']}"}, {}
    return hub(asked)


def redirect(_):
    return 307, b"", {"Location": "https://elsewhere.example/v1"}


def page(_):
    return 200, b"<html>Please \x1b[2J log in</html>", {"Content-Type": "text/html"}


def error_and_ok(_):
    return {"error": "You must be authenticated"}


UNREAD = {
    "01 indices": (v2_indices, V2, ["3 numbers", "10 classes", "--top"]),
    "02 scores first": (v2_pair, V2, ["3 numbers", "--output"]),
    "02 indices named": (v2_pair, (*V2, "--output", "classes"), ["3 numbers", "--top"]),
    "all classes, best first": (v2_ranking, V2, ["ranking", "--top"]),
    "04 a class in front": (v2_background, V2, ["11 numbers", "10 classes"]),
    "embedding": (v2_embedding, V2, ["64 numbers", "--output"]),
    "05 names": (v2_names, V2, ["class ", "--top"]),
    "08 numbers wanted": (tensorflow, B64, ["status 400", "does not have named input"]),
    "11 form wanted": (form, (), ["status 422", "field required", "--protocol", "multipart"]),
    "11 other field": (form, ("--protocol", "multipart"), ["upload", "--field"]),
    "13 other spelling": (upper, (), ["CLASS_", "--labels", "--any-order"]),
    "14 pointer": (v1, (*B64[:-1], "/prediction/0"), ["no label", "predictions", "--pointer"]),
    "14 output": (v2_embedding, (*V2, "--output", "logit"), ["'embedding', 'logits'", "--output"]),
    "15 from one": (from_one, (), ["the index", "count from 1", "--labels"]),
    "17 wrong token": (
        wants_token,
        ("--header", "Authorization=BADTOK"),
        ["status 403", "bad token …", "--header"],
    ),
    "19 redirect": (redirect, (), ["307", "elsewhere.example"]),
    "19 page": (page, (), ["<html>Please \\x1b[2J log in"]),
    "19 error with status 200": (error_and_ok, (), ["You must be authenticated"]),
}


@pytest.mark.parametrize("case", UNREAD)
def test_what_cannot_be_read_is_said_before_a_trigger_is_shown(
    services, command, case, monkeypatch
):
    monkeypatch.setenv("BADTOK", "Bearer nope")
    answer, options, said = UNREAD[case]
    service = services.start(answer)
    code, printed = command(service.url, *options, "--out", "result.json")
    assert code == 2, printed
    assert not set(RIGHT) & set(service.shown)
    assert 1 <= len(service.shown) <= 2
    assert [each for each in said if each not in printed] == []
    assert "nope" not in printed
    assert "; no trigger was shown" in printed
    assert "an answer with one of the 10 classes; check" in printed
    # Nothing was answered, so the name is free for the run with the right options.
    again = services.start(hub)
    assert command(again.url, "--out", "result.json")[0] == 0


def test_17_headers_are_given_by_the_name_of_a_variable(services, command, monkeypatch):
    service = services.start(wants_token)
    for variable, value in {"GOOD": "Bearer tok", "BROKEN": "Bearer tok\n"}.items():
        monkeypatch.setenv(variable, value)
    assert command(service.url, "--header", "Authorization=GOOD")[0] == 0
    count = len(service.shown)
    for wrong in ("Authorization=BROKEN", "Authorization: Bearer tok"):
        code, printed = command(service.url, "--header", wrong)
        assert code == 2
        assert "--header" in printed or "header" in printed
    assert len(service.shown) == count


def test_indices_outside_the_classes_are_no_ground_for_a_no(services, command):
    """Indices from 1, as numbers: innocent pictures do not tell, ten triggers' answers do."""
    service = services.start(lambda asked: {"predictions": [asked.place + 1]})
    code, printed = command(service.url, *B64)
    assert code == 2
    assert "count from 1" in printed


def test_numbers_go_where_the_template_has_them(services, command):
    sent = []

    def answer(asked):
        sent.append(json.loads(asked.body)["instances"][0])
        return v1(asked)

    service = services.start(answer)
    how = ("--protocol", "template", "--template", "named.json", "--pointer", "/predictions/0")
    assert command(service.url, *how, *NUMBERS, "--channels-last")[0] == 0
    assert np.shape(sent[0]["x"]) == (SIDE, SIDE, 1)


# Services that are busy


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


def asked(service, **limits):
    waits, names = Waits(), Labels.in_order(NAMES, CLASSES)
    with asking(HuggingFace(service.url), names, Limits(**limits), clock=waits.clock) as asker:
        return probe(asker, KEY), waits.slept


def test_18_a_service_that_asks_for_a_pause_gets_it(services):
    def busy(asked):
        return (429, {"error": "rate"}, {"Retry-After": "3"}) if asked.n % 5 == 0 else hub(asked)

    found, slept = asked(services.start(busy))
    assert found.verdict.accepted
    # Of 61 pictures each fifth request is put off; none is the innocent one, which is the first.
    assert slept == [3.0] * found.retries
    assert found.retries == 15


LOADING = {"error": "Model x is currently loading", "estimated_time": 20.0}


def test_18_a_model_that_is_loading_is_waited_for(services):
    found, slept = asked(
        services.start(lambda asked: (503, LOADING, {}) if asked.n <= 3 else hub(asked))
    )
    assert found.verdict.accepted
    assert slept == [20.0] * 3
    service = services.start(lambda _: (503, LOADING, {}))
    with pytest.raises(UnreachableServiceError, match=r"503.*currently loading.*no trigger"):
        asked(service)
    assert not set(RIGHT) & set(service.shown)


@pytest.mark.parametrize("estimate", ["soon", -5, 1e300, True, None, [20], "9" * 500])
def test_an_estimate_that_is_none_is_not_waited_for(services, estimate):
    said = {"estimated_time": estimate}
    service = services.start(lambda asked: (503, said, {}) if asked.n == 1 else hub(asked))
    _, slept = asked(service)
    assert len(slept) == 1
    assert slept[0] <= 0.5


def test_18_a_slow_service_is_not_shown_a_trigger(services, command):
    def slow(asked):
        time.sleep(0.3)
        return hub(asked)

    service = services.start(slow)
    code, printed = command(service.url, "--timeout", "0.1")
    assert code == 2
    assert "0.1 seconds" in printed
    assert not set(RIGHT) & set(service.shown)


def test_a_packed_answer_is_unpacked_no_further_than_its_limit(services):
    bomb = gzip.compress(bytes(2**24))
    service = services.start(lambda _: (200, bomb, {"Content-Encoding": "gzip"}))
    with pytest.raises(UnreachableServiceError, match="more than 1048576 bytes"):
        asked(service, retries=0)


@pytest.mark.parametrize("shift", range(0, 24, 5))
def test_no_part_of_a_token_is_quoted_wherever_the_quote_ends(services, shift):
    """A service that sends the token back many times, so that quotes and limits cut through it."""
    token = "Bearer s3cretS3CRET"
    body = b"x" * shift + token.encode() * 2000
    service = services.start(lambda _: (400, body, {}))
    names = Labels.in_order(NAMES, CLASSES)
    with asking(HuggingFace(service.url), names, headers={"Authorization": token}) as asker:
        asker.ask(PICTURES[0])
        assert "…" in asker.said
        assert "s3c" not in asker.said
        assert "Bea" not in asker.said
        assert len(asker.said) <= 230


# Certificates


@pytest.fixture
def certificate(tmp_path):
    """A certificate that nobody but its owner knows, and a server's context that shows it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (tmp_path / "tls.crt").write_bytes(made.public_bytes(pem))
    (tmp_path / "tls.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    return SimpleNamespace(file=tmp_path / "tls.crt", context=context)


def test_20_a_private_certificate_is_named_or_refused(services, command, certificate, monkeypatch):
    service = services.start(hub, tls=certificate.context)
    code, printed = command(service.url)
    assert code == 2
    assert "--ca" in printed
    assert service.shown == []
    assert command(service.url, "--ca", str(certificate.file))[0] == 0
    for wrong in ("names.json", "nowhere.pem"):
        code, printed = command(service.url, "--ca", wrong)
        assert code == 2
        assert "PEM" in printed
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    assert command(service.url)[0] == 0
