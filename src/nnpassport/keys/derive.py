"""Everything a key consists of, derived from one secret seed and one public context.

`docs/derivation.md` is the same specification for those who do not read Python.
"""

import hashlib
import hmac
import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnpassport.keys.context import Context, LayerShape, TriggerShape, check_member
from nnpassport.scheme import BadSignatureError, UnreadableKeyError

SEED_BYTES = 32

UNIT_VARIANCE = (127 * 128 / 3) / 128**2
"""Variance of each number of z, an integer uniform in −127…127 over 128."""

BASE = -(2**15)
"""In the place of a strength: what follows is no direction, but the weight of each input."""

Stream = Callable[[int], bytes]
"""The first n bytes of an endless pseudo-random string."""


def length_prefixed(*parts: bytes) -> bytes:
    """Each part after its length (8 bytes, big-endian), so that no two lists encode alike."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in parts)


def stream(
    seed: bytes, context: Context, purpose: str, layer: str = "", bound: bytes = b""
) -> Stream:
    """The endless byte string of one purpose and one layer.

        SHAKE-256(HKDF-SHA256(seed, salt = SHA-256(context), info = (version, purpose, layer)))

    The function returned gives its first n bytes: more bytes never change the earlier ones. What
    the stream is `bound` to, the digest of a key's own pictures, is a fourth part of `info`.

    Raises:
        UnreadableKeyError: the seed is not 32 bytes.
    """
    if not isinstance(seed, bytes) or len(seed) != SEED_BYTES:
        raise UnreadableKeyError(
            f"the seed is not {SEED_BYTES} bytes; needed: secrets.token_bytes({SEED_BYTES})"
        )
    salt = _salt_of(context)
    parts = (b"nnpassport/v1", purpose.encode("ascii"), layer.encode("utf-8"))
    info = length_prefixed(*parts, *([bound] if bound else []))
    # RFC 5869; one block of output, so that expanding is one HMAC.
    extracted = hmac.digest(salt, seed, "sha256")
    key = hmac.digest(extracted, info + b"\x01", "sha256")
    return lambda count: hashlib.shake_256(key).digest(count)


@lru_cache(maxsize=16)
def _salt_of(context: Context) -> bytes:
    # Every stream of a key has the same: encoding it for each would take the square of its layers.
    return hashlib.sha256(context.encode()).digest()


@lru_cache(maxsize=16)
def _starts_of(context: Context) -> dict[str, int]:
    """By layer, how many signature bits there are before its own."""
    starts = accumulate((layer.length for layer in context.layers), initial=0)
    return {layer.name: start for layer, start in zip(context.layers, starts, strict=False)}


def derive_signs(
    seed: bytes, context: Context, layer: LayerShape, bound: bytes = b""
) -> NDArray[np.float32]:
    """Signature bits b ∈ {−1, +1} of one layer (out): uniform, one for each output channel.

    Raises:
        UnreadableKeyError: the context has no such layer.
    """
    return _signs_of(_stream_bits(seed, context, layer, bound))


def derive_passport(
    seed: bytes, context: Context, layer: LayerShape, bound: bytes = b""
) -> NDArray[np.float32]:
    """Passport of one layer (2 in *space): P_γ and P_β, integers uniform in −127…127 over 127.

    Raises:
        UnreadableKeyError: the context has no such layer.
    """
    check_member(context, layer)
    shape = (2, *layer.passport)
    draw = stream(seed, context, "passport", layer.name, bound)
    return _fractions(draw, math.prod(shape)).reshape(shape)


def derive_channels(
    seed: bytes,
    context: Context,
    layer: LayerShape,
    channels: range,
    bound: bytes = b"",
    metric: NDArray[np.int16] | None = None,
) -> NDArray[np.float64]:
    """m_γ and m_β of some channels of a layer (2 channels fan_in), gains and bits left out.

        z_o: 2·fan_in integers uniform in −127…127, of SHAKE-256(K ‖ o), K the layer's own 32 bytes
        m_o = (w·z_o + Σ_k rint(2⁸·s_k·⟨u_k, z_o⟩) · 2⁻⁸·u_k) / 128

    u_k and s_k are the `metric`'s directions and strengths, w the weight of each input, 1 unless it
    says otherwise (see `spread`); without a metric m is z. All sums are of integers that float64
    holds exactly, and rounding is to even: so m is the same on every machine, and −z gives −m. For
    weights that do not depend on the seed ⟨W_o, m_o⟩ is therefore as often positive as negative, in
    each channel for itself.

    Raises:
        UnreadableKeyError: the context has no such layer.
    """
    check_member(context, layer)
    fan_in = math.prod(layer.weight[1:])
    root = stream(seed, context, "channels", layer.name, bound)(SEED_BYTES)
    rows = [
        _signed_bytes(hashlib.shake_256(root + o.to_bytes(8, "big")).digest, 2 * fan_in)
        for o in channels
    ]
    drawn = np.array(rows, np.float64).reshape(len(rows), 2, fan_in).swapaxes(0, 1)
    return (drawn if metric is None else spread(drawn, metric)) / 128


def spread(drawn: NDArray[np.float64], metric: NDArray[np.int16]) -> NDArray[np.float64]:
    """Whole numbers z below 128 (… fan_in), put in proportion to what a layer sees.

    `metric` (directions 1+fan_in) has the strengths s_k in units of 2⁻⁸ and, after them, the
    directions u_k in units of 2⁻¹⁵. A first row whose strength is `BASE` has the weights w of the
    inputs in units of 2⁻⁸; they are 0 where m is to lie in the directions alone, and all 1 in keys
    that have no such row.
    """
    weights = np.ones(metric.shape[1] - 1)
    if metric[0, 0] == BASE:
        weights, metric = metric[0, 1:].astype(np.float64) * 2.0**-8, metric[1:]
    strengths, directions = metric[:, 0].astype(np.float64), metric[:, 1:].astype(np.float64)
    along = np.rint(drawn @ directions.T * (strengths * 2.0**-15))
    turned: NDArray[np.float64] = drawn * weights + (along @ directions) * 2.0**-23
    return turned


def derive_projection(
    seed: bytes, context: Context, layer: LayerShape, bound: bytes = b""
) -> NDArray[np.float32]:
    """Projection X of one layer (bits fan_in): integers uniform in −127…127 divided by 127.

    Raises:
        UnreadableKeyError: the context has no such layer.
    """
    check_member(context, layer)
    shape = (layer.length, math.prod(layer.passport))
    draw = stream(seed, context, "projection", layer.name, bound)
    return _fractions(draw, math.prod(shape)).reshape(shape)


def triggers_of(context: Context) -> TriggerShape:
    """Shape of the trigger set.

    Raises:
        UnreadableKeyError: the context has no trigger set.
    """
    if context.triggers is None:
        raise UnreadableKeyError(
            f"the key for scheme {context.scheme!r:.80} has no trigger set; needed: a context with "
            "triggers; draw a new key with a trigger set"
        )
    return context.triggers


def derive_labels(
    seed: bytes, context: Context, bound: bytes = b"", choices: int | None = None
) -> NDArray[np.int64]:
    """Labels of the trigger images (count), uniform over the classes; or places among `choices`.

    Raises:
        UnreadableKeyError: the context has no trigger set.
    """
    count, classes, _ = triggers_of(context)
    classes = classes if choices is None else choices
    draw = stream(seed, context, "trigger-labels", bound=bound)
    ceiling = 2**32 // classes * classes
    size = 4 * count
    while True:
        words = np.frombuffer(draw(size), dtype=">u4").astype(np.int64)
        # Not a bare modulo: the first classes would come up more often than the last.
        kept = words[words < ceiling]
        if len(kept) >= count:
            return kept[:count] % classes
        size *= 2


def trigger_stream(seed: bytes, context: Context) -> Stream:
    """The byte string that trigger images are generated from.

    Raises:
        UnreadableKeyError: the context has no trigger set.
    """
    triggers_of(context)
    return stream(seed, context, "trigger-images")


def whiten_text(
    text: str, seed: bytes, context: Context, bound: bytes = b""
) -> dict[str, NDArray[np.float32]]:
    """Signature bits of every layer, such that their owner can read `text` out of them.

    The text's bits (8 for a character, most significant first) are XORed with the stream's over
    the first channels of the layers in order; all other bits are the stream's. So the bits are
    uniform to whoever has no seed, although every ASCII character starts with a zero.

    Raises:
        BadSignatureError: the text is not printable ASCII or has more characters than fit.
    """
    check_text(text, context)
    bits = [_stream_bits(seed, context, layer, bound) for layer in context.layers]
    whole = np.concatenate(bits)
    whole[: 8 * len(text)] ^= np.unpackbits(np.frombuffer(text.encode("ascii"), np.uint8))
    parts = np.split(whole, np.cumsum([len(part) for part in bits])[:-1])
    return {s.name: _signs_of(part) for s, part in zip(context.layers, parts, strict=True)}


def whitened_signs(
    text: str, seed: bytes, context: Context, layer: LayerShape, bound: bytes = b""
) -> NDArray[np.float32]:
    """The signature bits (out) of one layer as `whiten_text` has them, without those of all others.

    Raises:
        BadSignatureError: the text is not printable ASCII or has more characters than fit.
        UnreadableKeyError: the context has no such layer.
    """
    check_text(text, context)
    bits = _stream_bits(seed, context, layer, bound)
    start = _starts_of(context)[layer.name]
    spelled = np.unpackbits(np.frombuffer(text.encode("ascii"), np.uint8))[start:][: len(bits)]
    bits[: len(spelled)] ^= spelled
    return _signs_of(bits)


def read_text(signs: Any, seed: bytes, context: Context, length: int) -> str:
    """The `length` characters that `signs`, of all layers in order, spell under this seed.

    `signs` is an array or a tensor. What is not printable ASCII comes out as "�". A sign of zero
    counts as a zero bit.

    Raises:
        BadSignatureError: the number of signs is not the key's, or they cannot hold `length`.
    """
    signs, channels, longest = array_of(signs), context.bits, context.bits // 8
    if tuple(signs.shape) != (channels,) or not 0 <= length <= longest:
        raise BadSignatureError(
            f"got {tuple(signs.shape)} signs to read {length} characters from; needed: {channels} "
            f"signs and at most {longest} characters; concatenate the signs of all layers in order"
        )
    whole = np.concatenate([_stream_bits(seed, context, s) for s in context.layers] or [_NO_BITS])
    bits = (signs > 0)[: 8 * length] ^ whole[: 8 * length]
    codes = np.packbits(bits.astype(np.uint8)).tolist()
    return "".join(chr(code) if 32 <= code < 127 else "�" for code in codes)


def check_text(text: str, context: Context) -> None:
    """Refuse a text that `whiten_text` cannot lay over the layers of `context`.

    Raises:
        BadSignatureError: the text is not printable ASCII or has more characters than fit.
    """
    longest = context.bits // 8
    if not 1 <= len(text) <= longest:
        raise BadSignatureError(
            f"the signature text has {len(text)} characters, but the {context.bits} bits "
            f"of the key's layers hold 1 to {longest}; shorten the text or name more layers"
        )
    if not (text.isascii() and text.isprintable()):
        raise BadSignatureError(
            "the signature text has a character that is not printable ASCII; needed: letters, "
            "digits, punctuation and spaces; transliterate it"
        )


def log10_text_choices(text: str) -> float:
    """log₁₀ of the number of texts that must be corrected for when `text` was not committed to.

    Whoever may choose the text when he sees the suspect chooses its bits outright, apart from the
    first of each character. The union bound runs over the texts of every length at once: with 95
    characters and an end mark, Σ 96^−(length + 1) over all texts is exactly 1.
    """
    return (len(text) + 1) * math.log10(96)


def array_of(numbers: Any) -> NDArray[Any]:
    """A copy of an array or of a tensor, contiguous; what tensors are from is not imported."""
    if isinstance(numbers, np.ndarray):
        return np.array(numbers, order="C")
    array: NDArray[Any] = numbers.detach().cpu().clone().contiguous().numpy()
    return array


_NO_BITS: NDArray[np.uint8] = np.zeros(0, np.uint8)


def _stream_bits(
    seed: bytes, context: Context, layer: LayerShape, bound: bytes = b""
) -> NDArray[np.uint8]:
    check_member(context, layer)
    count = layer.length
    data = stream(seed, context, "signs", layer.name, bound)((count + 7) // 8)
    return np.unpackbits(np.frombuffer(data, np.uint8))[:count]


def _signs_of(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    return bits.astype(np.float32) * 2 - 1


def _fractions(draw: Stream, count: int) -> NDArray[np.float32]:
    numbers = _signed_bytes(draw, count).astype(np.float32)
    numbers /= np.float32(127)  # in place: a large projection is there once
    return numbers


def _signed_bytes(draw: Stream, count: int) -> NDArray[np.int8]:
    size = count + count // 200 + 64  # one byte in 256 is skipped
    while True:
        numbers = np.frombuffer(draw(size), np.int8)
        kept = numbers[numbers != -128]
        if len(kept) >= count:
            return kept[:count]
        size += size // 100 + 64
