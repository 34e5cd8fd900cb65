"""Timestamps by RFC 3161: an authority signs that some bytes were there at some time.

The authority sees SHA-256 of the bytes and nothing else. Whether a certificate was revoked is not
asked: that would need the network, and an answer that is still there years later.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cryptography import x509

from nnpassport.claims.signing import read_small
from nnpassport.files.disk import brief
from nnpassport.scheme import BadSignatureError, NoTimestampError, UnreadableKeyError

if TYPE_CHECKING:
    from rfc3161_client import TimeStampResponse, TimeStampTokenInfo

MAX_RESPONSE_BYTES = 2**18
TIMEOUT = 30.0
"""Seconds that an authority may take to answer in full."""

UNSTATED_ACCURACY = 1.0
"""Seconds by which a time may be off where the token does not say: what ETSI EN 319 421 allows."""

MOST_ACCURACY = 60.0
"""Seconds by which a time may be off and still be told from another that is off as much.

Whoever has a token that is less accurate bears it: it counts as if made at its latest moment. Else
a rival could blur anybody's order by asking an authority with a bad clock.
"""

_WHOLE_SECOND = 1.0  # what is behind the point of a token's time is not read
_MAX_ROOTS = 2**20
_SHA256 = x509.ObjectIdentifier("2.16.840.1.101.3.4.2.1")


class Timestamp(NamedTuple):
    """What a token says, once it has been checked.

    Attributes:
        time: when the authority saw the bytes, by its own clock, in UTC, in whole seconds.
        authority: subject of the certificate that signed, as RFC 4514 writes it.
        policy: the rules that the authority works by, an object identifier.
        serial: the token's serial number, in hexadecimal.
        accuracy: seconds by which the clock may be off, either way, as the token states.
    """

    time: datetime
    authority: str
    policy: str
    serial: str
    accuracy: float = UNSTATED_ACCURACY

    @property
    def latest(self) -> datetime:
        """The last moment at which the token may have been made: what it proves."""
        return _later(self.time, self.accuracy + _WHOLE_SECOND)

    @property
    def earliest(self) -> datetime:
        """The first moment that another's earlier token has to be before.

        That is `time` less the accuracy. Of a token that is off by more than `MOST_ACCURACY` only
        so much before its latest moment: that it is not more accurate is its owner's loss.
        """
        if self.accuracy <= MOST_ACCURACY:
            return _later(self.time, -self.accuracy)
        return _later(self.latest, -2 * MOST_ACCURACY)

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values; times as ISO 8601 in UTC."""
        return {
            **self._asdict(),
            "time": _said(self.time),
            "earliest": _said(self.earliest),
            "latest": _said(self.latest),
        }


def request_timestamp(
    data: bytes, url: str, roots: Sequence[x509.Certificate], *, timeout: float = TIMEOUT
) -> bytes:
    """The response (DER) of the authority at `url` over SHA-256 of `data`, already checked.

    The request has a fresh nonce, so that an old answer cannot be replayed, and asks for
    certificates, so that the answer can be checked for as long as the root is known.

    Raises:
        NoTimestampError: no answer in `timeout` seconds, an error, or a token that does not hold.
    """
    from rfc3161_client import HashAlgorithm, TimestampRequestBuilder  # noqa: PLC0415

    request = TimestampRequestBuilder(data, HashAlgorithm.SHA256, nonce=True, cert_req=True).build()
    response = _in_order(_within(timeout, url, lambda: _post(url, request.as_bytes(), timeout)))
    try:
        token = _parse(response)
        if token.tst_info.nonce != request.nonce:
            raise BadSignatureError(
                "the token has another nonce than the request: it answers another one"
            )
        check_timestamp(response, data, roots)
    except BadSignatureError as error:
        raise NoTimestampError(
            f"the authority at {url} gave no token that holds: {error}; give the root that it "
            "publishes, or ask another one"
        ) from error
    return response


def check_timestamp(response: bytes, data: bytes, roots: Sequence[x509.Certificate]) -> Timestamp:
    """What the token in an RFC 3161 response says of `data`, if one of `roots` vouches for it.

    The certificates have to be valid at the token's own time, not today: a timestamp outlives
    the authority that made it.

    Raises:
        BadSignatureError: corrupt, over other data, or its chain does not end in one of `roots`.
    """
    from rfc3161_client import VerifierBuilder  # noqa: PLC0415

    token = _parse(response)
    signer = _signer(token)
    if token.tst_info.message_imprint.hash_algorithm != _SHA256:
        raise BadSignatureError("the token is over another digest than SHA-256; ask for a new one")
    try:
        VerifierBuilder(roots=list(roots)).build().verify_message(token, data)
    except Exception as error:  # the library's, cryptography's and ValueError; bytes from anybody
        raise BadSignatureError(f"the timestamp does not hold: {brief(error)}") from error
    facts = token.tst_info
    return Timestamp(
        time=facts.gen_time.astimezone(UTC),
        authority=_printable(signer.subject.rfc4514_string()),
        policy=facts.policy.dotted_string,
        serial=f"{facts.serial_number:x}",
        accuracy=_accuracy(facts),
    )


def load_roots(path: Path) -> list[x509.Certificate]:
    """The trusted certificates in a PEM file.

    Raises:
        UnreadableKeyError: missing, corrupt, or without a certificate.
    """
    data = read_small(path, "root certificate", _MAX_ROOTS, UnreadableKeyError)
    try:
        return x509.load_pem_x509_certificates(data)
    except Exception as error:  # ValueError, InvalidVersion and others; bytes from anybody
        raise UnreadableKeyError(
            f"{path} holds no certificates ({brief(error)}); needed: PEM, as the authority "
            "publishes its root"
        ) from error


def _parse(response: bytes) -> "TimeStampResponse":
    from rfc3161_client import PKIStatus, decode_timestamp_response  # noqa: PLC0415

    try:
        token = decode_timestamp_response(response)
        granted = token.status == PKIStatus.GRANTED
        if granted:
            _ = token.tst_info, token.signed_data  # parsed only now
    except Exception as error:  # the parser names no class of its own; bytes from anybody
        raise BadSignatureError(f"it is no RFC 3161 response ({brief(error)})") from error
    if not granted:
        said = _printable("; ".join(token.status_string))[:200] or "no reason given"
        raise BadSignatureError(f"the request was not granted (status {token.status}: {said})")
    return token


def _accuracy(facts: "TimeStampTokenInfo") -> float:
    """Seconds by which the token says that its time may be off, either way."""
    try:
        stated = facts.accuracy
        if stated is None:
            return UNSTATED_ACCURACY
        seconds, millis, micros = stated.seconds or 0, stated.millis or 0, stated.micros or 0
        return float(max(0, seconds)) + max(0, millis) / 1e3 + max(0, micros) / 1e6
    except Exception as error:  # the parser's, and OverflowError; bytes from anybody
        raise BadSignatureError(f"the token's accuracy cannot be read ({brief(error)})") from error


def _later(time: datetime, seconds: float) -> datetime:
    """So many seconds later, as far as the calendar goes."""
    try:
        return time + timedelta(seconds=seconds)
    except OverflowError:
        return (datetime.max if seconds > 0 else datetime.min).replace(tzinfo=UTC)


def _said(time: datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")


def _signer(token: "TimeStampResponse") -> x509.Certificate:
    """The one certificate that signed.

    Two with its issuer and serial number are refused: the signature could be checked with one and
    the right to sign timestamps read off the other, which anybody can put there.
    """
    try:
        signed = token.signed_data
        certificates = [x509.load_der_x509_certificate(each) for each in signed.certificates]
        (info,) = signed.signer_infos
        (signer,) = (
            each
            for each in certificates
            if (each.issuer, each.serial_number) == (info.issuer, info.serial_number)
        )
        versions = (signed.version, info.version)
    except Exception as error:  # as above
        raise BadSignatureError(
            f"the token does not have exactly one signer with one certificate ({brief(error)})"
        ) from error
    # Not covered by the signature; RFC 5652 leaves no choice, so another value is damage.
    if versions != (3, 1):
        raise BadSignatureError(f"the token has CMS versions {versions}; needed: (3, 1)")
    return signer


def _in_order(response: bytes) -> bytes:
    """The response with its certificates sorted, as DER wants a SET; `openssl ts` does not sort.

    No signature covers their order. What is not of the expected form is returned as it is: then the
    parser refuses it.
    """
    try:
        _, content = _elements(response, *_inside(response, 0))  # status, token
        _, explicit = _elements(response, *content)  # its type, SignedData
        (signed_data,) = _elements(response, *explicit)
        certificates = _elements(response, *signed_data)[3]
        parts = _whole(response, *certificates)
    except (IndexError, ValueError):
        return response
    start, end = certificates
    return response[:start] + b"".join(sorted(parts)) + response[end:]


def _inside(data: bytes, start: int) -> tuple[int, int]:
    """Where the content of the DER element at `start` begins and ends."""
    size, start = data[start + 1], start + 2
    if size >= 0x80:
        octets = size - 0x80
        size, start = int.from_bytes(data[start : start + octets], "big"), start + octets
    if start + size > len(data):
        raise ValueError("the element ends after the data")
    return start, start + size


def _elements(data: bytes, start: int, end: int) -> list[tuple[int, int]]:
    """Where the contents of the DER elements between `start` and `end` are."""
    found = []
    while start < end:
        found += [_inside(data, start)]
        start = found[-1][1]
    return found


def _whole(data: bytes, start: int, end: int) -> list[bytes]:
    """The DER elements between `start` and `end`, tags and lengths included."""
    stops = [stop for _, stop in _elements(data, start, end)]
    return [data[a:b] for a, b in zip([start, *stops], stops, strict=False)]


def _within(seconds: float, url: str, ask: Callable[[], bytes]) -> bytes:
    """What `ask` returns, if that is soon enough.

    A server that sends its headers byte by byte never exceeds the limits of the HTTP library, which
    are for one read each. The thread ends with the connection, or with the program.
    """
    answer: Future[bytes] = Future()

    def wait() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # to be raised where it is waited for
            answer.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        raise NoTimestampError(
            f"the authority at {url} does not answer within {seconds:g} seconds; ask another one"
        ) from error


def _post(url: str, query: bytes, timeout: float) -> bytes:
    import httpx  # noqa: PLC0415

    headers = {
        "Content-Type": "application/timestamp-query",
        "Accept": "application/timestamp-reply",
        "Accept-Encoding": "identity",
    }
    deadline, answer = time.monotonic() + timeout, bytearray()
    try:
        with httpx.stream("POST", url, content=query, headers=headers, timeout=timeout) as reply:
            if reply.status_code != httpx.codes.OK:
                raise NoTimestampError(
                    f"the authority at {url} answers with HTTP status {reply.status_code}, but "
                    "needed is 200 and a token; check the address, or ask another one"
                )
            for part in reply.iter_raw():
                answer += part
                if len(answer) > MAX_RESPONSE_BYTES or time.monotonic() > deadline:
                    raise NoTimestampError(
                        f"the authority at {url} takes more than {MAX_RESPONSE_BYTES} bytes or "
                        f"{timeout:.0f} seconds; ask another one"
                    )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NoTimestampError(
            f"the authority at {url} does not answer ({type(error).__name__}: {brief(error)}); "
            "needed: an address that speaks RFC 3161 over HTTP; check it, or ask another one"
        ) from error
    return bytes(answer)


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)
