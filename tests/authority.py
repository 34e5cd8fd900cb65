"""A timestamp authority of our own: `openssl ts` behind a small web server."""

import subprocess
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID


def certificate(name, key, issuer=None, *, ca=False, days=(-1, 3650), serial=None):
    """A certificate; `issuer` is (its certificate, its key), or None for a root."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    above, above_key = issuer or (None, key)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if above is None else above.subject)
        .public_key(key.public_key())
        .serial_number(serial or x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if not ca:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(above_key, hashes.SHA256())


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


def pem(*certificates):
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


class Signer:
    """`openssl ts -reply` with one certificate, and those that it sends along.

    `accuracy` is what its tokens state, as openssl's configuration writes it; "" is nothing.
    """

    def __init__(self, folder, key, certificate, along=(), *, accuracy="secs:1"):
        self.folder, self.certificate = folder, certificate
        self.root = None
        folder.mkdir()
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (folder / "tsa.key").write_bytes(private)
        (folder / "tsa.pem").write_bytes(pem(certificate))
        (folder / "along.pem").write_bytes(pem(*along))
        (folder / "serial").write_text("01\n")
        lines = ["[tsa]", "default_tsa = t", "[t]", f"serial = {folder}/serial"]
        lines += [f"signer_cert = {folder}/tsa.pem", f"signer_key = {folder}/tsa.key"]
        lines += [f"certs = {folder}/along.pem"] if along else []
        lines += ["signer_digest = sha256", "default_policy = 1.2.3.4.1"]
        lines += ["digests = sha256, sha512"]
        lines += [f"accuracy = {accuracy}"] if accuracy else []
        (folder / "tsa.cnf").write_text("\n".join([*lines, ""]))

    def answer(self, query):
        """The response to a request, both DER."""
        (self.folder / "query").write_bytes(query)
        command = ["openssl", "ts", "-reply", "-config", "tsa.cnf", "-queryfile", "query"]
        subprocess.run(
            [*command, "-out", "reply"], cwd=self.folder, check=True, capture_output=True
        )
        return (self.folder / "reply").read_bytes()


class Website(ThreadingHTTPServer):
    """Answers every POST with what `self.answer(query)` gives: (status, body)."""

    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Page)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/tsa"
        self.asked = []

    def handle_error(self, request, client_address):
        """A client that hung up is no news."""


class Page(BaseHTTPRequestHandler):
    def do_POST(self):
        query = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.headers["Content-Type"], query))
        status, body = self.server.answer(query)
        self.send_response(status)
        self.send_header("Content-Type", "application/timestamp-reply")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Silence."""
