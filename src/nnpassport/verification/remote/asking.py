"""One question to a service from anybody: bounded in time, in bytes and in tries.

Redirects are not followed and cookies are not kept. Compressed answers are not asked for, and are
unpacked no further than their limit. Nothing that is sent names this program: a service that knows
it is being probed can answer otherwise.
"""

import copy
import re
import secrets
import ssl
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final
from urllib.parse import parse_qsl, urlsplit

from nnpassport.files.disk import brief
from nnpassport.scheme import BadRecipeError, UnreachableServiceError, UnreadableDataError
from nnpassport.verification.remote.answers import Label, Scores, is_number, number, parsed
from nnpassport.verification.remote.labels import Labels, token
from nnpassport.verification.remote.scores import scores_in
from nnpassport.verification.remote.services import Pixels, Request, Service

if TYPE_CHECKING:
    import httpx
    from anyio.from_thread import BlockingPortal

NO_CLASS = -1
"""In place of a class where there is no answer."""

UNKNOWN, OUTSIDE = "the label ", "the index "
"""How the note of an answer begins whose label is no name, or no index, of the key's classes."""

_LONGEST_NOTE = 160  # characters
_LONGEST_QUOTE = 200  # characters of what a service said
_QUOTED_BYTES = 2**13  # of an answer, among which the quote is found
_MOST_OF_AN_ERROR = 2**16  # bytes of an answer that is no success
_LONGEST_ESTIMATE = 1e9  # seconds
_SHORTEST_SECRET = 4  # characters; what is shorter would be taken out of words everywhere
_WORTH_TRYING_AGAIN = {408, 425, 429, *range(500, 600)}


class Kind(StrEnum):
    """What became of one query."""

    ANSWERED = "answered"  # with a class that the key knows
    ABSTAINED = "abstained"  # with no label, or one that is none of the key's classes
    REFUSED = "refused"  # HTTP status 4xx
    FAILED = "failed"  # no answer of the protocol, after all tries


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one query.

    Attributes:
        label: the class, or −1 where there is none; where the classes may be in any order, a number
            that stands for what was answered.
        note: why there is none; it may quote the service, and is printable and short.
        retries: how often it was asked again.
        seconds: how long it took, waiting included.
        said: a number that stands for what was answered, where it was looked up in names that were
            given beside the key; else −1.
        scores: what was answered in full, (name, number) each, where that was asked for.
    """

    kind: Kind
    label: int = NO_CLASS
    note: str = ""
    retries: int = 0
    seconds: float = 0.0
    said: int = NO_CLASS
    scores: tuple[tuple[str, float], ...] = ()


@final
@dataclass(frozen=True, slots=True)
class Limits:
    """How much patience there is with a service.

    Attributes:
        timeout: seconds that one try may take in full, from connecting to the last byte.
        retries: how often a query that failed is asked again.
        backoff: seconds before the first retry, doubled before each further one; a random share of
            up to half is taken off, so that many clients do not come back together.
        longest_wait: seconds, the most that is waited before a retry, whatever the service asks.
        rate: most tries a second; None is as fast as it answers.
        answer_bytes: most bytes of an answer that are read.

    Raises:
        BadRecipeError: a number makes no sense.
    """

    timeout: float = 30.0
    retries: int = 4
    backoff: float = 0.5
    longest_wait: float = 60.0
    rate: float | None = None
    answer_bytes: int = 2**20

    def __post_init__(self) -> None:
        positive = (self.timeout, self.rate or 1, self.answer_bytes)
        others = (self.retries, self.backoff, self.longest_wait)
        if not (
            all(0 < each < 1e9 for each in positive) and all(0 <= each < 1e9 for each in others)
        ):
            raise BadRecipeError(
                f"the limits are {self}; needed: finite numbers, and time-out, rate and bytes "
                "above 0"
            )


class Clock(NamedTuple):
    """Seconds since some moment, and how to let them pass."""

    now: Callable[[], float]
    sleep: Callable[[float], None]


CLOCK = Clock(time.monotonic, time.sleep)


class _Try(NamedTuple):
    """One try: what came of it, whether to try again, and when the service asks for that."""

    answer: Answer
    again: bool = False
    wait: float | None = None


@contextmanager
def asking(
    service: Service,
    labels: Labels,
    limits: Limits | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    authorities: Path | None = None,
    clock: Clock = CLOCK,
) -> Iterator["Asker"]:
    """Somebody who asks `service`, over one connection where it allows that.

    `headers` go with every try: an API token, say. They are secret and are never shown.
    `authorities` is a PEM file of the certificates to trust instead of the usual ones.

    Raises:
        BadRecipeError: a header cannot be sent.
        UnreadableDataError: the file of certificates holds none.
    """
    import httpx  # noqa: PLC0415
    from anyio.from_thread import start_blocking_portal  # noqa: PLC0415

    _check_headers(headers or {})
    # Asynchronous inside: a blocking client bounds each read and so never the whole, and a service
    # that sends a byte now and then could hold it for ever.
    client = httpx.AsyncClient(
        headers={"Accept-Encoding": "identity", **(headers or {})},
        timeout=None,  # noqa: S113 - `_exchange` bounds the whole
        follow_redirects=False,
        verify=_trusting(authorities),
        limits=httpx.Limits(max_connections=1),
    )
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(client):
        hidden = tuple((headers or {}).values())
        yield Asker(portal, client, service, labels, limits or Limits(), hidden, clock)


@final
class Asker:
    """Asks one query after the other, no faster than the limits allow."""

    def __init__(
        self,
        portal: "BlockingPortal",
        client: "httpx.AsyncClient",
        service: Service,
        labels: Labels,
        limits: Limits,
        hidden: tuple[str, ...],
        clock: Clock,
    ) -> None:
        self._portal, self._client = portal, client
        self.service, self.labels = service, labels
        self._limits, self._hidden, self._clock = limits, hidden, clock
        self._next = clock.now()
        self._any_order = self._in_full = False
        self.said = ""
        """The last reply's status and up to 200 characters of it; printable, without secrets."""

    def reading(self, labels: Labels, *, any_order: bool = False) -> "Asker":
        """The same asker, for whom these are the labels; or whatever is answered is a class."""
        other = copy.copy(self)
        other.labels, other._any_order = labels, any_order
        return other

    def in_full(self) -> "Asker":
        """The same asker, who takes any label for a class and keeps all scores that there are."""
        other = self.reading(self.labels, any_order=True)
        other._in_full = True
        return other

    def ask(self, pixels: Pixels) -> Answer:
        """What the service calls one image, asked again while that is worth it."""
        started, retries = self._clock.now(), 0
        request = self.service.request(pixels)
        done = self._try(request)
        while done.again and retries < self._limits.retries:
            self._clock.sleep(self._pause(retries, done.wait))
            retries += 1
            done = self._try(request)
        seconds = round(float(self._clock.now() - started), 3)
        note = _presentable(done.answer.note, self._hidden)
        return replace(done.answer, note=note, retries=retries, seconds=seconds)

    def _try(self, request: Request) -> _Try:
        if self._limits.rate is not None:
            self._clock.sleep(max(0.0, self._next - self._clock.now()))
            self._next = self._clock.now() + 1 / self._limits.rate
        import httpx  # noqa: PLC0415

        self.said = ""
        try:
            reply, body = self._portal.call(_exchange, self._client, request, self._limits)
            body = _unpacked(body, reply, self._limits.answer_bytes)
        except TimeoutError:
            return _failed(f"no whole answer in {self._limits.timeout:g} seconds", again=True)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return _unconnected(error)
        hidden = (*self._hidden, *_credentials(request.url, self._hidden))
        self.said = f"HTTP status {reply.status_code}: {_quoted(body, hidden)}"
        if reply.is_success:
            return self._read(body)
        return _unsuccessful(reply, body)

    def _read(self, body: bytes) -> _Try:
        if len(body) > self._limits.answer_bytes:
            return _failed(f"an answer of more than {self._limits.answer_bytes} bytes")
        try:
            if self._in_full and (scores := scores_in(self.service, body)):
                best = max(scores, key=lambda pair: pair[1])[0]
                return _Try(Answer(Kind.ANSWERED, token(best), scores=scores))
            label = self.service.label(body)
        except UnreachableServiceError as error:
            return _failed(_what(error), again=True)
        if not isinstance(label, Scores):
            return self._heard(label)
        try:
            return self._heard(label.top(self.labels.classes))
        except UnreachableServiceError as error:  # another try would have the same form
            return _failed(_what(error))

    def _heard(self, label: Label) -> _Try:
        if label is None:
            return _Try(Answer(Kind.ABSTAINED, note="no label"))
        if self._any_order:
            return _Try(Answer(Kind.ANSWERED, token(label)))
        index, said = self.labels.index(label), NO_CLASS
        if isinstance(label, str) and self.labels.chosen(label):
            said = self.labels.meant(label)
        if index is None:
            known = self.labels.numbered(label)
            what = f"{OUTSIDE if known else UNKNOWN}{str(label)[:1000]!r} is unknown"
            return _Try(Answer(Kind.ABSTAINED, note=what, said=said))
        return _Try(Answer(Kind.ANSWERED, index, said=said))

    def _pause(self, retries: int, wait: float | None) -> float:
        # The exponent is bounded, or a patient caller's thousandth retry would overflow a float.
        backoff = self._limits.backoff * 2 ** min(retries, 64)
        backoff *= secrets.SystemRandom().uniform(0.5, 1)
        return min(max(backoff, wait or 0), self._limits.longest_wait)


async def _exchange(
    client: "httpx.AsyncClient", request: Request, limits: Limits
) -> tuple["httpx.Response", bytes]:
    """The reply and its body, which is read no further than allowed."""
    import anyio  # noqa: PLC0415

    client.cookies.clear()
    body = bytearray()
    with anyio.fail_after(limits.timeout):
        async with client.stream(
            "POST", request.url, content=request.body, headers=dict(request.headers)
        ) as reply:
            most = limits.answer_bytes
            most = most if reply.is_success else min(most, _MOST_OF_AN_ERROR)
            async for part in reply.aiter_raw():
                body += part
                if len(body) > most:
                    break
    return reply, bytes(body)


def _unpacked(body: bytes, reply: "httpx.Response", most: int) -> bytes:
    """The body as it was before gzip or deflate, and one byte too many if it is too long.

    Raises:
        ValueError: it is not what its header says.
    """
    if reply.headers.get("Content-Encoding", "identity").lower() not in {"gzip", "deflate"}:
        return body
    try:
        return zlib.decompressobj(wbits=32 + zlib.MAX_WBITS).decompress(body, most + 1)
    except zlib.error as error:
        raise ValueError(f"an answer that cannot be unpacked ({error})") from error


def _unconnected(error: Exception) -> _Try:
    refused = "CERTIFICATE_VERIFY_FAILED" in str(error)
    note = f"{type(error).__name__}: {brief(error)}"
    if refused:
        note = "its certificate is not trusted; --ca FILE names a private authority"
    return _failed(note, again=not refused)


def _trusting(authorities: Path | None) -> "ssl.SSLContext | bool":
    if authorities is None:
        return True
    try:
        return ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise UnreadableDataError(
            f"{authorities} holds no certificates ({brief(error)}); needed: a PEM file of the "
            "authority, or of the service's own certificate"
        ) from error


def _unsuccessful(reply: "httpx.Response", body: bytes) -> _Try:
    status = reply.status_code
    if status in _WORTH_TRYING_AGAIN:
        wait = _seconds(reply.headers.get("Retry-After", "")) or _estimated(body)
        return _failed(f"HTTP status {status}", again=True, wait=wait)
    if reply.is_client_error:
        return _Try(Answer(Kind.REFUSED, note=f"HTTP status {status}"))
    elsewhere = f", elsewhere: {reply.headers.get('Location', '')}" if reply.is_redirect else ""
    return _failed(f"HTTP status {status}{elsewhere}")


def _what(error: UnreachableServiceError) -> str:
    """What was found, without what is needed: whoever shows it says that."""
    return str(error).partition("; needed")[0]


def _failed(note: str, *, again: bool = False, wait: float | None = None) -> _Try:
    return _Try(Answer(Kind.FAILED, note=note), again, wait)


def _seconds(retry_after: str) -> float | None:
    """Retry-After of RFC 9110, 10.2.3: seconds or a date; None for anything else."""
    if re.fullmatch("[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _credentials(url: str, headers: tuple[str, ...]) -> list[str]:
    """What a service may send back of an address's query and of headers such as "Bearer hf_…"."""
    query = urlsplit(url).query
    values = [value for _, value in parse_qsl(query)]
    words = [word for header in headers for word in header.split()[1:]]
    return [each for each in (query, *values, *words) if len(each) >= _SHORTEST_SECRET]


def _estimated(body: bytes) -> float | None:
    """`estimated_time` in seconds, as Hugging Face says how long a model will be loading."""
    try:
        found: Any = parsed(body)
    except UnreachableServiceError:
        return None
    wait: Any = number(found.get("estimated_time")) if isinstance(found, dict) else None
    return float(wait) if is_number(wait) and 0 <= wait < _LONGEST_ESTIMATE else None


def _presentable(note: str, hidden: tuple[str, ...], longest: int = _LONGEST_NOTE) -> str:
    """The note without the caller's secrets, which a service could send back; printable, short."""
    note = _without(note, hidden)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in note)[:longest]


def _quoted(body: bytes, hidden: tuple[str, ...]) -> str:
    """The beginning of an answer without secrets, not even one that the end cuts in two."""
    text = _without(body[:_QUOTED_BYTES].decode(errors="replace"), hidden)
    cut = len(body) > _QUOTED_BYTES
    text = text[: len(text) - max(map(len, hidden), default=0)] if cut else text
    return _presentable(text, hidden, _LONGEST_QUOTE)


def _without(text: str, hidden: tuple[str, ...]) -> str:
    for secret in sorted(hidden, key=len, reverse=True):
        text = text.replace(secret, "…") if secret else text
    return text


def _check_headers(headers: Mapping[str, str]) -> None:
    # The client's own message would quote the value.
    for name, value in headers.items():
        token = re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,200}", name)
        if not (token and value.isascii() and value.isprintable() and value == value.strip()):
            raise BadRecipeError(
                f"the header {name!r:.80} cannot be sent; needed: a name of letters, digits and "
                "hyphens, and a value of printable ASCII without blanks around it"
            )
