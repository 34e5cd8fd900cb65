"""Protocols: how an image is sent for classification, and where its label is in the answer.

A protocol is a frozen dataclass of two pure functions. An answer comes from a stranger: whatever
its bytes are, it is a label, no label (None), or `UnreachableServiceError`.

[OIP] Open Inference Protocol v2, as KServe, Triton and MLServer speak it.
"""

import base64
import json
import math
import secrets
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from nnpassport.scheme import UnreachableServiceError, UnreadableDataError, UnsuitableModelError
from nnpassport.verification.remote.answers import (
    Answered,
    Label,
    classified,
    flat,
    is_number,
    named_scores,
    number,
    parsed,
    plain,
    several,
    step,
    unreadable,
    unwrapped,
)

PLACEHOLDER = "$IMAGE"
"""Stands in a template for the image, a PNG file in base64."""

NUMBERS = '"$NUMBERS"'
"""Stands in a template for nested lists of the image's normalised numbers; a text of its own."""

INSTANCES = f'{{"instances": [{NUMBERS}]}}'
"""The template for a model of numbers behind TF-Serving's REST interface or KServe v1."""

SHOWN_NAMES = 8  # of a service's outputs, in an error


Pixels = NDArray[np.uint8]
"""A picture (channels height width), 0 to 255: an array, or a tensor on the processor."""


class Scale(Protocol):
    """How pixels become numbers, (x/255 − mean) / std by channel; a `Normalisation` or a config."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel, in units of the range 0 to 1."""

    @property
    def std(self) -> tuple[float, ...]:
        """The same; above 0."""


class Request(NamedTuple):
    """What is sent to ask for one image's label."""

    url: str
    body: bytes
    headers: Mapping[str, str]


class Service(Protocol):
    """A service that classifies images; structural, nothing is inherited."""

    @property
    def description(self) -> str:
        """The protocol and the address, without what may be secret in it."""

    def request(self, pixels: Pixels) -> Request:
        """What to send for one image."""

    @property
    def options(self) -> str:
        """What says where an answer has its label."""

    def label(self, body: bytes) -> Answered:
        """The one label in an answer as the service writes it, its scores, or None.

        Raises:
            UnreachableServiceError: it is no answer of this protocol.
        """


@final
@dataclass(frozen=True, slots=True)
class HuggingFace:
    """Image classification as the Hugging Face hub's endpoints do it: a PNG file for a list.

    The answer is `[{"label": "cat", "score": 0.9}, …]`; the highest score counts, and the first
    label where there are no scores. TorchServe's `{"cat": 0.9, …}` is read as well.
    """

    url: str

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def description(self) -> str:
        """The protocol and the address."""
        return f"Hugging Face image classification at {shown(self.url)}"

    @property
    def options(self) -> str:
        """The protocol alone."""
        return "--protocol (template with --pointer reads any JSON, multipart uploads a form)"

    def request(self, pixels: Pixels) -> Request:
        """The picture itself."""
        headers = {"Content-Type": "image/png", "Accept": "application/json"}
        return Request(self.url, png(pixels), headers)

    def label(self, body: bytes) -> Label:
        """The label with the highest score."""
        found = unwrapped(parsed(body))
        if not isinstance(found, list):
            return named_scores(found)
        if not all(isinstance(each, dict) for each in found):
            raise unreadable("JSON, but no list of labels")
        if not found:
            return None
        scores = [number(each.get("score", -math.inf)) for each in found]
        if not all(map(is_number, scores)):
            raise unreadable("a score that is no number")
        return plain(found[scores.index(max(scores))].get("label"))


@final
@dataclass(frozen=True, slots=True)
class OpenInference:
    """A model behind the Open Inference Protocol v2.                                     [OIP]

    The answer's output is an index, a text, a number for each class, of which the highest counts,
    or texts "score:index:label" as Triton's classification extension writes them.

    Attributes:
        url: the server's address, without "/v2/…".
        model: the model's name there.
        normalise: what turns pixels into the numbers that the model takes.
        input_name: name of its input.
        output_name: name of the output to read; None is the first.
        channels_last: whether the input is (1 height width channels), not channels first.
        ranked: whether the output lists labels or indices, the best first.
    """

    url: str
    model: str
    normalise: Scale
    input_name: str = "input"
    output_name: str | None = None
    channels_last: bool = False
    ranked: bool = False

    def __post_init__(self) -> None:
        check_url(self.url)

    @property
    def description(self) -> str:
        """The protocol, the model and the address."""
        return f"Open Inference Protocol v2, model {self.model!r:.80} at {shown(self.url)}"

    @property
    def options(self) -> str:
        """Which output, and how it is read."""
        return "--output (which output to read), --top (it lists labels or indices, best first)"

    def request(self, pixels: Pixels) -> Request:
        """The normalised picture as a batch of one, float32."""
        numbers = _numbers(pixels, self.normalise, self.channels_last)
        tensor = {
            "name": self.input_name,
            "shape": list(numbers.shape),
            "datatype": "FP32",
            "data": numbers.flatten().tolist(),
        }
        address = f"{self.url.rstrip('/')}/v2/models/{quote(self.model, safe='')}/infer"
        return Request(address, json.dumps({"inputs": [tensor]}).encode(), _JSON_HEADERS)

    def label(self, body: bytes) -> Answered:
        """The one value of the output, or its scores."""
        found = parsed(body)
        outputs = found.get("outputs") if isinstance(found, dict) else None
        if not isinstance(outputs, list) or not all(isinstance(each, dict) for each in outputs):
            raise unreadable("JSON, but without a list of outputs")
        named = [each for each in outputs if self.output_name in {None, each.get("name")}]
        if not named and outputs:
            names = ", ".join(f"{each.get('name')!r:.40}" for each in outputs[:SHOWN_NAMES])
            raise unreadable(f"no output {self.output_name!r:.40}, but {names}")
        if not named:
            return None
        data = named[0].get("data")
        if not isinstance(data, list):
            raise unreadable("an output without data")
        values = flat(data)
        best = classified(values)
        return several(values, ranked=self.ranked) if best is None else best


@final
@dataclass(frozen=True, slots=True)
class Template:
    """Any service that takes JSON with an image in it and answers JSON with a label in it.

    Attributes:
        url: the address to post to.
        template: the JSON to send, with "$IMAGE" in a text where the image goes, a PNG file in
            base64; or with the text "$NUMBERS" where its numbers go, as nested lists.
        pointer: where the answer has the label (RFC 6901), such as "/predictions/0/label": a text,
            an index, a list of a number for each class, of which the highest counts, or an object
            of a number for each name.
        normalise: what turns pixels into numbers; needed for "$NUMBERS" alone.
        channels_last: whether those are (height width channels), not channels first.
        ranked: whether the answer lists labels or indices, the best first.

    Raises:
        UnreachableServiceError: the template or the pointer is none.
    """

    url: str
    template: str
    pointer: str
    normalise: Scale | None = None
    channels_last: bool = False
    ranked: bool = False

    def __post_init__(self) -> None:
        check_url(self.url)
        try:
            json.loads(self.template)
            numbers = self.normalise is not None and NUMBERS in self.template
            valid = PLACEHOLDER in self.template or numbers
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise UnreachableServiceError(
                f"the template is no JSON with {PLACEHOLDER} in it; needed: what the service takes,"
                f' such as {{"image": "{PLACEHOLDER}"}}, or {INSTANCES} with mean and std'
            )
        check_pointer(self.pointer)

    @property
    def description(self) -> str:
        """The address."""
        return f"JSON service at {shown(self.url)}"

    @property
    def options(self) -> str:
        """Where the label is, and how it is read."""
        return _POINTED

    def request(self, pixels: Pixels) -> Request:
        """The template with the picture in its place; base64 needs no escaping in JSON."""
        text = self.template
        if self.normalise is not None and NUMBERS in text:
            numbers = _numbers(pixels, self.normalise, self.channels_last)[0]
            text = text.replace(NUMBERS, json.dumps(numbers.tolist()))
        if PLACEHOLDER in text:
            picture = base64.b64encode(png(pixels)).decode("ascii")
            text = text.replace(PLACEHOLDER, picture)
        return Request(self.url, text.encode(), _JSON_HEADERS)

    def label(self, body: bytes) -> Answered:
        """What the pointer points at; nothing there is no label."""
        return _pointed(body, self.pointer, ranked=self.ranked)


@final
@dataclass(frozen=True, slots=True)
class Upload:
    """A form that a picture is uploaded with, multipart/form-data [RFC 7578]; it answers JSON.

    Attributes:
        url: the address to post to.
        pointer: where the answer has the label, as for `Template`.
        field: the form's name for the file.
        ranked: whether the answer lists labels or indices, the best first.

    Raises:
        UnreachableServiceError: the field's name or the pointer cannot be one.
    """

    url: str
    pointer: str
    field: str = "file"
    ranked: bool = False

    def __post_init__(self) -> None:
        check_url(self.url)
        check_pointer(self.pointer)
        if not self.field.isprintable() or not self.field.isascii() or '"' in self.field:
            raise UnreachableServiceError(
                f"the field {self.field!r:.80} cannot be sent; needed: printable ASCII without "
                'quotes, such as "file"'
            )

    @property
    def description(self) -> str:
        """The field and the address."""
        return f"upload form with field {self.field!r:.80} at {shown(self.url)}"

    @property
    def options(self) -> str:
        """Where the label is, and how it is read."""
        return f"--field (the form's name for the file), {_POINTED}"

    def request(self, pixels: Pixels) -> Request:
        """A form with one file."""
        boundary = f"----{secrets.token_hex(16)}"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{self.field}"; '
            'filename="image.png"\r\nContent-Type: image/png\r\n\r\n'
        )
        body = head.encode() + png(pixels) + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        return Request(self.url, body, {"Content-Type": kind, "Accept": "application/json"})

    def label(self, body: bytes) -> Answered:
        """What the pointer points at; nothing there is no label."""
        return _pointed(body, self.pointer, ranked=self.ranked)


_POINTED = "--pointer (where the answer has the label), --top (it lists labels, best first)"


def _pointed(body: bytes, pointer: str, *, ranked: bool) -> Answered:
    found = parsed(body)
    for token in pointer.split("/")[1:]:
        found = step(found, token.replace("~1", "/").replace("~0", "~"))
    if isinstance(found, dict):
        return named_scores(found)
    return several(flat(found), ranked=ranked) if isinstance(found, list) else plain(found)


def _numbers(pixels: Pixels, normalise: Scale, channels_last: bool) -> NDArray[np.float32]:
    """float32 (1 channels height width), or (1 height width channels)."""
    pixels = np.asarray(pixels)
    if len(pixels) != len(normalise.mean):
        raise UnreadableDataError(
            f"images have {len(pixels)} channels, but the normalisation has "
            f"{len(normalise.mean)}; read the images with channels={len(normalise.mean)}"
        )
    mean, std = np.array([normalise.mean, normalise.std], np.float32)[:, :, None, None] * 255
    numbers: NDArray[np.float32] = ((pixels - mean) / std)[None]
    return numbers.transpose(0, 2, 3, 1) if channels_last else numbers


_JSON_HEADERS: Mapping[str, str] = {
    "Content-Type": "application/json",
    "Accept": "application/json",
}


def check_pointer(pointer: str) -> None:
    """Refuse what RFC 6901 knows as no pointer.

    Raises:
        UnreachableServiceError: it is none.
    """
    if pointer and not pointer.startswith("/"):
        raise UnreachableServiceError(
            f"the pointer {pointer!r:.80} is none of RFC 6901; needed: such as "
            '"/predictions/0/label"'
        )


def check_url(url: str) -> None:
    """Refuse what is no address of an HTTP service, or has a password in it.

    Raises:
        UnreachableServiceError: as above.
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and url.isprintable()
        _ = parts.port
        named = "@" in parts.netloc
    except ValueError:
        valid = named = False
    if named:
        raise UnreachableServiceError(
            "the address has a user name or a password in it, which would end up in journals; "
            "give credentials as a header"
        )
    if not valid:
        raise UnreachableServiceError(
            f"{url!r:.200} is no address of a service; needed: http:// or https://, and a host"
        )


def shown(url: str) -> str:
    """The address without its query, which may hold a token."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def png(pixels: Pixels) -> bytes:
    """The picture as a PNG file, without anything else in it.                      [ISO 15948]

    Raises:
        UnsuitableModelError: it is neither grey nor red, green and blue.
    """
    pixels = np.asarray(pixels)
    if len(pixels) not in {1, 3}:
        raise UnsuitableModelError(
            f"the key's trigger images have {len(pixels)} channels, and pictures are sent with "
            "1 or 3; use the Open Inference Protocol, which takes numbers"
        )
    channels, height, width = pixels.shape
    rows = pixels.transpose(1, 2, 0).reshape(height, width * channels)
    unfiltered = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(unfiltered.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in parts)


def _chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)
