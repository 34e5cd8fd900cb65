"""In which order a stream visits its images: pure functions of row groups, batch, seed and epoch.

The row groups are dealt once and for all, in a fixed random order, to a few *lanes* of equally many
rows (a row group on a border belongs to two lanes). Every batch takes equally many images of each
lane. In an epoch a lane visits its row groups in random order, a *window* of them at a time, and
the rows of a window in random order. Whoever knows (seed, epoch, step) knows which rows a batch
has, and finds them by reading one window a lane.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnpassport.data.imageset import generator_for
from nnpassport.data.rowgroups import Group, Piece, pieces_of

MOST_LANES = 8


class Shuffle(NamedTuple):
    """All that the order of a lane depends on, besides the data."""

    lane: int
    seed: int
    epoch: int


class Window(NamedTuple):
    """Pieces whose rows are shuffled together; `first` is where in the lane they begin."""

    first: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def lanes_for(groups: int, width: int) -> int:
    """The largest power of two that divides batches of `width`, at most 8 and at most `groups`."""
    lanes = 1
    while 2 * lanes <= min(MOST_LANES, groups) and width % (2 * lanes) == 0:
        lanes *= 2
    return lanes


def deal(groups: Sequence[Group], lanes: int) -> list[list[Piece]]:
    """For each lane its row groups or parts of them; the lanes' rows differ by one at most."""
    total = sum(group.rows for group in groups)
    borders = [lane * total // lanes for lane in range(lanes + 1)]
    dealt: list[list[Piece]] = [[] for _ in range(lanes)]
    begin = 0
    for number in torch.randperm(len(groups), generator=generator_for("lanes")).tolist():
        group = groups[number]
        for lane in range(lanes):
            start = max(0, borders[lane] - begin)
            stop = min(group.rows, borders[lane + 1] - begin)
            if start < stop:
                dealt[lane] += pieces_of(number, group, start, stop, group.size)
        begin += group.rows
    return dealt


def windows(
    dealt: Sequence[Sequence[Piece]],
    groups: Sequence[Group],
    shuffle: Shuffle,
    *,
    most: int,
) -> list[Window]:
    """The windows of one lane in one epoch, of `most` bytes each.

    A piece that is larger is cut, and its parts, each a window of its own, follow one another as
    they are stored: they are read without going back.
    """
    lane = shuffle.lane
    order = torch.randperm(len(dealt[lane]), generator=generator_for("lane", *shuffle))
    # Not as much at first as later: lanes that end their windows together would wait together.
    room = most * (lane + 1) // len(dealt)
    found, gathered, first = list[Window](), list[Piece](), 0
    for number in order.tolist():
        whole = dealt[lane][number]
        parts = pieces_of(whole.group, groups[whole.group], whole.start, whole.stop, most)
        for part in parts:
            if gathered and (len(parts) > 1 or part.size > room):
                found.append(Window(first, tuple(gathered)))
                first, room, gathered = first + found[-1].rows, most, []
            gathered.append(part)
            room -= part.size
    return [*found, Window(first, tuple(gathered))]


def order_within(window: Window, shuffle: Shuffle) -> Tensor:
    """The order of a window's rows: a permutation, int64 (rows,)."""
    return torch.randperm(window.rows, generator=generator_for("window", *shuffle, window.first))
