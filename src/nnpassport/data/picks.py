"""Pictures that were chosen for a batch, and how threads decode them into their places."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from nnpassport.data.decoding import Encoded, Pixels, Wanted, decode_some, same_shape, unusable
from nnpassport.data.lanes import Shuffle, Window, order_within
from nnpassport.data.rowgroups import Cursor, Rows

_TASK = 16  # pictures a thread takes at a time


class Pick(NamedTuple):
    """A picture, and the others that may take its place, in this order, if it cannot be used."""

    picture: Encoded
    others: Callable[[], Iterator[Encoded]]


class Moves(NamedTuple):
    """How `Augment` moves some images: each one's top and left edge, and whether it is mirrored."""

    pad: int
    drawn: list[list[int]]


def picks_of(rows: Rows, order: Sequence[int], places: range, *, spare: bool) -> list[Pick]:
    """The pictures at these places of the order; with `spare`, those that follow may replace them.

    After the last comes the first. Then the rows are kept for as long as the picks are.
    """

    def others(place: int) -> Iterator[Encoded]:
        following = range(place + 1, place + len(order)) if spare else ()
        return (rows[order[each % len(order)]] for each in following)

    def none() -> Iterator[Encoded]:
        return iter(())

    return [Pick(rows[order[place]], partial(others, place) if spare else none) for place in places]


@final
class LaneReader:
    """Reads one lane in the order of one epoch, and keeps one window of it in memory."""

    def __init__(
        self,
        cursor: Cursor,
        windows: Sequence[Window],
        shuffle: Shuffle,
        most: int,
        spare: bool,
    ) -> None:
        self._cursor, self._windows, self._shuffle = cursor, windows, shuffle
        self._most, self._spare = most, spare
        self._starts = [window.first for window in windows]
        self._at = -1
        self._rows, self._order = Rows(), list[int]()

    def take(self, start: int, stop: int) -> list[Pick]:
        """The pictures from place `start` of the lane to before `stop`."""
        picks = []
        while start < stop:
            number = bisect_right(self._starts, start) - 1
            if number != self._at:
                self._load(number)
            first = self._starts[number]
            last = min(stop, first + len(self._order))
            places = range(start - first, last - first)
            picks += picks_of(self._rows, self._order, places, spare=self._spare)
            start = last
        return picks

    def _load(self, number: int) -> None:
        self._rows = Rows()  # not two windows at a time
        window = self._windows[number]
        self._rows = self._cursor.load(window.pieces, self._most)
        self._order, self._at = order_within(window, self._shuffle).tolist(), number


def put_moved(place: Pixels, pixels: Pixels, pad: int, drawn: Sequence[int]) -> None:
    """Put one image in its place as `Augment.moved` would move it, in one copy."""
    top, left, mirrored = drawn
    place[...] = 0
    seen = place[:, :, ::-1] if mirrored else place
    _, height, width = pixels.shape
    rows, from_rows = _overlap(pad - top, height)
    columns, from_columns = _overlap(pad - left, width)
    seen[:, rows, columns] = pixels[:, from_rows, from_columns]


def _overlap(shift: int, length: int) -> tuple[slice, slice]:
    """Where a line that is shifted against another covers it, in the one's places and its own."""
    count, here, there = max(length - abs(shift), 0), max(shift, 0), max(-shift, 0)
    return slice(here, here + count), slice(there, there + count)


@final
@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes picks to pixels of `shape` (channels, height, width).

    Attributes:
        wanted: what the pixels should be.
        shape: what they must be.
        source: what to call the set in errors.
        skipped: gets what was replaced, and why, by name.
    """

    wanted: Wanted
    shape: tuple[int, int, int]
    source: str
    skipped: dict[str, str]

    def places(self, count: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
        """Uninitialised uint8 (count channels height width), channels last in memory, and labels.

        So lie the pixels of a decoded picture, and copying them in this order is twice as fast.
        """
        channels, height, width = self.shape
        images = np.empty((count, height, width, channels), np.uint8).transpose(0, 3, 1, 2)
        return images, np.empty(count, np.int64)

    def tasks(
        self,
        picks: Sequence[Pick],
        images: Pixels,
        labels: npt.NDArray[np.int64],
        moves: Moves | None = None,
    ) -> list[Callable[[], None]]:
        """What fills the places with the picks, for threads to share."""
        starts = range(0, len(picks), _TASK)
        places = [slice(at, min(at + _TASK, len(picks))) for at in starts]
        return [
            partial(
                self._fill,
                picks[own],
                images[own],
                labels[own],
                None if moves is None else Moves(moves.pad, moves.drawn[own]),
            )
            for own in places
        ]

    def _fill(
        self,
        picks: Sequence[Pick],
        images: Pixels,
        labels: npt.NDArray[np.int64],
        moves: Moves | None,
    ) -> None:
        results = decode_some([pick.picture for pick in picks], self.wanted)
        for place, (pick, result) in enumerate(zip(picks, results, strict=True)):
            picture, pixels = (
                self._replaced(pick, result) if isinstance(result, str) else (pick.picture, result)
            )
            if pixels.shape != self.shape:
                same_shape(self.shape, [(picture, pixels)], f"{self.source}, {picture.name}")
            labels[place] = picture.label or 0
            if moves is None:
                images[place] = pixels
            else:
                put_moved(images[place], pixels, moves.pad, moves.drawn[place])

    def _replaced(self, pick: Pick, why: str) -> tuple[Encoded, Pixels]:
        for other in pick.others():
            (pixels,) = decode_some([other], self.wanted)
            if not isinstance(pixels, str):
                self.skipped[pick.picture.name] = why
                return other, pixels
        raise unusable(pick.picture, why, self.source)
