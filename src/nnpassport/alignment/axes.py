"""What is known of a network's axes, as plain data that is read without the network."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nnpassport.scheme import UnreadableModelError

FORMAT = "nnpassport-axes"
VERSION = 1
KINDS = ("permute", "orthogonal", "invertible", "inner")
"""What may be done along an axis that no output feels:

    permute      put its indices into another order
    orthogonal   rotate it, once norms' gains are in what reads them
    invertible   apply any invertible matrix, and its inverse where it is read
    inner        the inside of an attention head: invertible, head by head; or, with the trait
                 "batched", the heads themselves: put into another order
"""
_MOST_AXES, _MOST_PLACES, _MOST_SIZE = 10_000, 100_000, 2**40
_MOST_REPEATS = 8


class Place(NamedTuple):
    """Index j of an axis in a tensor: at offset + j·stride of `dimension`, and at every repeat."""

    tensor: str
    dimension: int
    offset: int = 0
    stride: int = 1
    repeats: tuple[tuple[int, int], ...] = ()

    def positions(self, size: int) -> NDArray[np.int64]:
        """Indices into the dimension (size repeats)."""
        found = np.arange(size, dtype=np.int64)[:, None] * self.stride + self.offset
        for count, stride in self.repeats:
            more = np.arange(count, dtype=np.int64) * stride
            found = (found[:, :, None] + more).reshape(size, -1)
        return found


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """Dimensions that must move together.

    Attributes:
        kind: one of `KINDS`.
        traits: what the network does along it, as the trace says it.
        places: where it is, in the order of the network's tensors.
    """

    size: int
    kind: str
    traits: tuple[str, ...]
    places: tuple[Place, ...]


class Norm(NamedTuple):
    """A norm without statistics of its own.

    Attributes:
        shift: name of what it adds.
        centred: whether it takes the mean away.
        added: what its code adds to its gain before it multiplies with it; Gemma's add one.
    """

    shift: str | None
    centred: bool
    added: float = 0.0


class Statistics(NamedTuple):
    """A batch norm behind a layer: names of its tensors, and its ε."""

    weight: str | None
    bias: str | None
    mean: str
    variance: str
    epsilon: float


@final
@dataclass(frozen=True, slots=True)
class Axes:
    """All proved axes of a network, and what else is needed to compare two of its kind.

    Attributes:
        axes: the largest first.
        reads: by tensor, the dimension that meets what the network computes, and the gain of the
            norm in front of it, if that is the same wherever it is used.
        norms: by gain, the norms in `reads`.
        batch_norms: by a layer's weight, the batch norm that its output goes into.
        gains: by a layer's weight, the vector that its output is multiplied with.
        unknown: operations without a rule; what met them is rigid.
        pairs: inside heads whose positions are told by rotations, the pairs that are rotated: each
            may be turned and stretched, in queries one way and in keys the other. The places of one
            tensor are those of the first of each pair, and then of the second; of a fused tensor
            those of its queries, and then of its keys.
    """

    axes: tuple[Axis, ...]
    reads: Mapping[str, tuple[int, str | None]]
    norms: Mapping[str, Norm]
    batch_norms: Mapping[str, Statistics]
    gains: Mapping[str, str]
    unknown: tuple[str, ...] = ()
    pairs: tuple[Axis, ...] = ()

    def to_bytes(self) -> bytes:
        """The table as JSON with sorted keys: the same table, the same bytes."""
        # Absent, not empty: tables of networks without such pairs have the bytes that they had.
        pairs = {"pairs": [_said(axis) for axis in self.pairs]} if self.pairs else {}
        document = {
            **pairs,
            "format": FORMAT,
            "version": VERSION,
            "axes": [_said(axis) for axis in self.axes],
            "reads": {name: list(each) for name, each in self.reads.items()},
            # Two where nothing is added, as tables had before there was a third.
            "norms": {n: list(each if each.added else each[:2]) for n, each in self.norms.items()},
            "batch_norms": {name: list(each) for name, each in self.batch_norms.items()},
            "gains": dict(self.gains),
            "unknown": list(self.unknown),
        }
        return (json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n").encode()

    @property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, in hexadecimal."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Axes":
        """The table in what `to_bytes` wrote; other bytes for the same table are refused.

        Raises:
            UnreadableModelError: it is no such table.
        """
        found = cls._parsed(content)
        if found.to_bytes() != content:
            raise UnreadableModelError(
                "this is a table of axes in other bytes than this package writes for it; needed: "
                "the file as it was written"
            )
        return found

    @classmethod
    def _parsed(cls, content: bytes) -> "Axes":
        try:
            if content.count(b"{") > _MOST_AXES + 100:
                raise ValueError(f"needed: at most {_MOST_AXES} axes")
            document = json.loads(content)
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise ValueError("format or version is another")
            return cls(
                axes=tuple(_axis(each) for each in _at_most(document["axes"], _MOST_AXES)),
                reads={_text(n): (_count(d), _name(g)) for n, (d, g) in _pairs(document, "reads")},
                norms={
                    _text(n): Norm(_name(s), _flag(c), *map(_real, more))
                    for n, (s, c, *more) in _pairs(document, "norms")
                },
                batch_norms={
                    _text(n): Statistics(_name(w), _name(b), _text(m), _text(v), _number(e))
                    for n, (w, b, m, v, e) in _pairs(document, "batch_norms")
                },
                gains={_text(n): _text(g) for n, g in _pairs(document, "gains")},
                unknown=tuple(map(_text, document["unknown"])),
                pairs=tuple(_axis(e) for e in _at_most(document.get("pairs", []), _MOST_AXES)),
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UnreadableModelError(
                f"this is no table of axes ({error!r:.200}); needed: one that was written by "
                f"this package, format {FORMAT!r}, version {VERSION}"
            ) from error


def _said(axis: Axis) -> dict[str, Any]:
    return {
        "size": axis.size,
        "kind": axis.kind,
        "traits": list(axis.traits),
        "places": [[*place[:4], [list(r) for r in place.repeats]] for place in axis.places],
    }


def _axis(stored: Any) -> Axis:
    size, kind = _count(stored["size"]), stored["kind"]
    if kind not in KINDS or size < 2:
        raise ValueError(f"an axis of {size} of kind {kind!r}")
    places = tuple(_place(each) for each in _at_most(stored["places"], _MOST_PLACES))
    return Axis(size, kind, tuple(map(_text, stored["traits"])), places)


def _place(stored: Any) -> Place:
    tensor, dimension, offset, stride, repeats = stored
    return Place(
        _text(tensor),
        _count(dimension),
        _count(offset),
        _count(stride),
        tuple((_count(count), _count(step)) for count, step in _at_most(repeats, _MOST_REPEATS)),
    )


def _pairs(document: Mapping[str, Any], name: str) -> Iterator[tuple[Any, Any]]:
    yield from document[name].items()


def _at_most(values: Any, most: int) -> Any:
    if not isinstance(values, list) or len(values) > most:
        raise ValueError(f"needed: a list of at most {most}")
    return values


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST_SIZE:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _number(value: Any) -> float:
    if type(value) not in {int, float} or not 0 <= value < 1:
        raise ValueError(f"{value!r:.40} is no ε")
    return float(value)


def _real(value: Any) -> float:
    if type(value) not in {int, float} or not abs(value) < _MOST_SIZE:
        raise ValueError(f"{value!r:.40} is no number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is no name")
    return value


def _name(value: Any) -> str | None:
    return None if value is None else _text(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r:.40} is no flag")
    return value
