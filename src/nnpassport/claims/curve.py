"""Which 32 bytes are a public key of Ed25519 that only one secret can sign for.   [RFC 8032, 5.1]

OpenSSL takes any 32 bytes that decode to a point. Points of small order are among them, and for
these one signature holds for every message: with A = 0 it is (R, S) = (0, 0) once and for all. So
does an encoding with y ≥ p, which is a second name of another key. RFC 8032 leaves the first to the
caller, and so does ZIP 215, which takes both on purpose.

A public key A = s·B is of prime order L, so honest keys pass; what is not canonical, not on the
curve, of small order, or has a part of small order, does not. The arithmetic is slow and not
constant in time, which nothing secret asks for here.
"""

from functools import lru_cache
from typing import NamedTuple

P = 2**255 - 19
"""The field."""
L = 2**252 + 27742317777372353535851937790883648493
"""The order of the base point: prime."""
D = -121665 * pow(121666, -1, P) % P
"""−x² + y² = 1 + d·x²·y²."""

_ROOT = pow(2, (P - 1) // 4, P)  # of −1


class Point(NamedTuple):
    """Extended coordinates: x = X/Z, y = Y/Z, T = X·Y/Z."""

    x: int
    y: int
    z: int
    t: int


ZERO = Point(0, 1, 1, 0)
"""The neutral element."""


@lru_cache(maxsize=256)
def is_sound(key: bytes) -> bool:
    """Whether these bytes are the one encoding of a point of prime order, L."""
    point = decoded(key)
    return point is not None and not _is_zero(point) and _is_zero(times(L, point))


def decoded(key: bytes) -> Point | None:
    """The point that 32 bytes are the canonical encoding of, or None.       [RFC 8032, 5.1.3]"""
    whole = int.from_bytes(key, "little")
    sign, y = whole >> 255, whole & (2**255 - 1)
    if len(key) != 32 or y >= P:
        return None
    # x² = (y² − 1) / (d·y² + 1)
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * _ROOT % P
    if (x * x - square) % P or (x == 0 and sign):
        return None
    if x & 1 != sign:
        x = P - x
    return Point(x, y, 1, x * y % P)


def encoded(point: Point) -> bytes:
    """The canonical encoding of a point."""
    inverse = pow(point.z, -1, P)
    x, y = point.x * inverse % P, point.y * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def plus(one: Point, other: Point) -> Point:
    """The sum of two points, which may be the same.                        [RFC 8032, 5.1.4]"""
    a = (one.y - one.x) * (other.y - other.x) % P
    b = (one.y + one.x) * (other.y + other.x) % P
    c = 2 * one.t * other.t * D % P
    d = 2 * one.z * other.z % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return Point(e * f % P, g * h % P, f * g % P, e * h % P)


def times(number: int, point: Point) -> Point:
    """`number`·`point`, by doubling and adding."""
    total = ZERO
    for bit in f"{number:b}":
        total = plus(total, total)
        if bit == "1":
            total = plus(total, point)
    return total


def _is_zero(point: Point) -> bool:
    return point.x == 0 and point.y == point.z
