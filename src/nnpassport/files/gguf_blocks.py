"""What GGUF's blocks of quantised numbers stand for.

    Q8_0      32 numbers     d (half), 32 of 8 bits                       w = d·q
    Q4_0      32 numbers     d (half), 32 of 4 bits                       w = d·(q − 8)
    Q4_1      32 numbers     d, m (half), 32 of 4 bits                    w = d·q + m
    Q5_0      32 numbers     d (half), a fifth bit each, 32 of 4 bits     w = d·(q − 16)
    Q5_1      32 numbers     d, m (half), the same                        w = d·q + m
    Q2_K      256 numbers    s, t (4 bits) of each 16, 256 of 2 bits, d, m      w = d·s·q − m·t
    Q3_K      256 numbers    a third bit each, 256 of 2 bits, s (6 bits) of each 16, d   w = d·s·q
    Q4_K      256 numbers    d, m, s and t (6 bits) of each 32, 256 of 4 bits   w = d·s·q − m·t
    Q5_K      256 numbers    the same, and a fifth bit each before them
    Q6_K      256 numbers    256 of 4 bits, 2 more each, s (8 bits) of each 16, d        w = d·s·q

Of 4 bits in blocks of 32, the lower halves of the bytes are the first sixteen numbers and the upper
ones the rest. In blocks of 256 the bits of a byte are of numbers 32 apart.
[ggml-common.h and ggml-quants.c of github.com/ggml-org/ggml]
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from nnpassport.files.arrays import Array


class Form(NamedTuple):
    """A kind of blocks: `size` bytes and `numbers` numbers each; (n size) → (n numbers)."""

    name: str
    size: int
    numbers: int
    read: Callable[[Array], Array]


def _halves(blocks: Array, at: int) -> Array:
    """The half-precision number at a byte of each block (blocks 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(blocks: Array, at: int) -> Array:
    """32 numbers of 4 bits each, from a byte on (blocks 32)."""
    some = blocks[:, at : at + 16]
    return np.concatenate([some & 15, some >> 4], 1)


def _fifths(blocks: Array, at: int) -> Array:
    """The same with a fifth bit each, which are in four bytes before (blocks 32)."""
    bits = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return _nibbles(blocks, at + 4) | bits << 4


def _spread(some: Array, bits: int, each: int) -> Array:
    """Numbers of so many bits: of `each` bytes the lowest, then their next ones (n numbers)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    groups = some.reshape(len(some), -1, 1, each)
    return (groups >> shifts[:, None] & (2**bits - 1)).reshape(len(some), -1)


def _scaled(whole: Array, scales: Array, numbers: Array) -> Array:
    """d·s·q, with a scale for each of equal parts of a block."""
    parts = numbers.reshape(*scales.shape, -1).astype(np.float32)
    return ((whole * scales.astype(np.float32))[..., None] * parts).reshape(len(whole), -1)


def _six_bits(packed: Array) -> tuple[Array, Array]:
    """Eight scales and eight of what is subtracted, in twelve bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack([first & 63, rest & 15 | first >> 6 << 4])
    return scales, np.hstack([second & 63, rest >> 4 | second >> 6 << 4])


def _q2_k(b: Array) -> Array:
    scales, numbers = b[:, :16], _spread(b[:, 16:80], 2, 32)
    less = _scaled(_halves(b, 82), scales >> 4, np.ones_like(numbers))
    return _scaled(_halves(b, 80), scales & 15, numbers) - less


def _q3_k(b: Array) -> Array:
    third, packed = _spread(b[:, :32], 1, 32), b[:, 96:108]
    low = np.hstack([packed[:, :8] & 15, packed[:, :8] >> 4])
    scales = (low | _spread(packed[:, 8:], 2, 4) << 4).astype(np.int8) - 32
    numbers = _spread(b[:, 32:96], 2, 32).astype(np.int8) - 4 * (1 - third.astype(np.int8))
    return _scaled(_halves(b, 108), scales, numbers)


def _q4_k(b: Array) -> Array:
    return _with_minima(b, _spread(b[:, 16:], 4, 32))


def _q5_k(b: Array) -> Array:
    return _with_minima(b, _spread(b[:, 48:], 4, 32) | _spread(b[:, 16:48], 1, 32) << 4)


def _with_minima(b: Array, numbers: Array) -> Array:
    scales, minima = _six_bits(b[:, 4:16])
    less = _scaled(_halves(b, 2), minima, np.ones_like(numbers))
    return _scaled(_halves(b, 0), scales, numbers) - less


def _q6_k(b: Array) -> Array:
    low, high = _spread(b[:, :128], 4, 64), _spread(b[:, 128:192], 2, 32)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _scaled(_halves(b, 208), scales, (low | high << 4).astype(np.int8) - 32)


def _q8_0(b: Array) -> Array:
    return _halves(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8).astype(np.float32)


FORMS: Mapping[int, Form] = {
    2: Form("Q4_0", 18, 32, lambda b: _halves(b, 0) * (_nibbles(b, 2).astype(np.float32) - 8)),
    3: Form("Q4_1", 20, 32, lambda b: _halves(b, 0) * _nibbles(b, 4) + _halves(b, 2)),
    6: Form("Q5_0", 22, 32, lambda b: _halves(b, 0) * (_fifths(b, 2).astype(np.float32) - 16)),
    7: Form("Q5_1", 24, 32, lambda b: _halves(b, 0) * _fifths(b, 4) + _halves(b, 2)),
    8: Form("Q8_0", 34, 32, _q8_0),
    10: Form("Q2_K", 84, 256, _q2_k),
    11: Form("Q3_K", 110, 256, _q3_k),
    12: Form("Q4_K", 144, 256, _q4_k),
    13: Form("Q5_K", 176, 256, _q5_k),
    14: Form("Q6_K", 210, 256, _q6_k),
}
"""Blocks by GGUF's number of their kind."""
