"""Images that do not fit into memory: streamed from Parquet shards, decoded on all processors.

An `ImageStream` stands where an `ImageSet` does in a training run. Its order is a pure function of
(seed, epoch), as there, so a run goes on in the middle of an epoch without reading what came
before. It is shuffled less than one in memory: see `nnpassport.data.lanes`.
"""

import glob
import hashlib
import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from nnpassport.data import sources
from nnpassport.data.ahead import done_ahead
from nnpassport.data.batching import Augment, moved_to, slice_of, steps_from, steps_per_epoch
from nnpassport.data.decoding import Encoded, Wanted, decode_all, decode_some, unusable
from nnpassport.data.imageset import ImageSet, Normalisation, generator_for
from nnpassport.data.lanes import MOST_LANES, Shuffle, deal, lanes_for, windows
from nnpassport.data.picks import Decoder, LaneReader, Moves, Pick, picks_of
from nnpassport.data.rowgroups import (
    Cursor,
    Group,
    Piece,
    Shard,
    groups_of,
    labels_in,
    pieces_of,
    shards_of,
)
from nnpassport.data.source import Asked, Columns, Source, index_of
from nnpassport.data.tables import columns_in, schema_of
from nnpassport.scheme import WHOLE, Batch, Part, UnreadableDataError

BUFFER = 2**28
_AHEAD = 512  # images that are decoded before they are asked for, if that is 2 to 16 batches
_SAMPLED = 16  # pieces of row groups that a sample is drawn from, at least
_LOOKED_AT = 64  # pictures, for one whose shape can be told
_VERSION = 1


def open_stream(
    location: str | Path,
    *,
    split: str | None = None,
    size: int | None = None,
    channels: int | None = 3,
    image_column: str | None = None,
    label_column: str | None = None,
    buffer: int = BUFFER,
    workers: int | None = None,
    skip_corrupt: bool = False,
) -> "ImageStream":
    """The labelled images of Parquet shards, of which only the footers are read now.

    Where the footers do not name the classes, the column of labels is read as well; where `size`
    or `channels` is None, the first picture.

    Args:
        location: a .parquet file, a folder of them, or a pattern that several match, in the hub's
            schema, as for `read_images`.
        split: which part of a folder.
        size: pixels a side; the square in the middle is scaled to it. None: as they are, which
            must then be all the same.
        channels: 3 for colour, 1 for grey, None for as they are. Transparency becomes white.
        image_column: name of the column of pictures; None: as for `read_images`.
        label_column: name of the column of class indices or class names; None likewise.
        buffer: bytes of encoded pictures that are in memory and shuffled together. The order
            depends on it, so a run must be resumed with the same.
        workers: threads that decode. None: one for each processor, 16 at most.
        skip_corrupt: put another picture in the place of one that cannot be used, and name it in
            `skipped`. Otherwise such a picture is an error.

    Warns:
        UserWarning: a row group is larger than its share of the buffer, so that its pictures are
            shuffled with their neighbours only, and starting in the middle of it reads past what
            comes before.

    Raises:
        UnreadableDataError: there are no such files, or they cannot be streamed.
    """
    if channels not in {None, 1, 3} or (size is not None and size < 1) or buffer < 1:
        raise UnreadableDataError(
            f"size is {size}, channels is {channels} and buffer is {buffer}; needed: at least "
            "1 pixel (or None), 1 or 3 channels (or None), and at least 1 byte"
        )
    asked = Asked(image_column, label_column)
    found = _found(str(location), split, asked)
    shards = shards_of(found.files)
    columns = columns_in(schema_of(found.files[0]), str(found.files[0]), asked)
    stream = ImageStream(
        name=found.name,
        classes=found.classes,
        shards=shards,
        groups=groups_of(shards, columns),
        columns=columns,
        wanted=Wanted(size, channels),
        shape=(channels or 0, size or 0, size or 0),
        buffer=buffer,
        workers=workers or min(16, os.cpu_count() or 1),
        skip_corrupt=skip_corrupt,
    )
    _warn_of_large_groups(stream)
    return stream if all(stream.shape) else replace(stream, shape=_first_shape(stream))


def _found(location: str, split: str | None, asked: Asked) -> Source:
    path = Path(location).expanduser()
    files = [path] if path.is_file() else list(map(Path, glob.glob(str(path))))
    if path.is_dir() or (files and all(map(_is_parquet, files))):
        found = sources.find(location, split, asked)
        if found.files and all(map(_is_parquet, found.files)):
            return found
    raise UnreadableDataError(
        f"{location!r} cannot be streamed; needed: a .parquet file, a folder of them, or a pattern "
        "that several match. Read anything else into memory, with read_images"
    )


def _is_parquet(file: Path) -> bool:
    return file.suffix in {".parquet", ".pq"}


def _warn_of_large_groups(stream: "ImageStream") -> None:
    room = stream.buffer // lanes_for(len(stream.groups), MOST_LANES)
    largest = max(stream.groups, key=lambda group: group.size)
    if largest.size > room:
        rows = max(1, room * largest.rows // largest.size // 4)
        warnings.warn(
            f"{stream.shards[largest.shard].path} has a row group of {largest.rows} rows and "
            f"{largest.size / 1e6:.0f} MB, where {room / 1e6:.0f} MB of each are shuffled "
            "together: its pictures will be shuffled with their neighbours only. Write the file "
            f"again with row_group_size={rows} or less, or pass a larger buffer=",
            stacklevel=3,
        )


def _first_shape(stream: "ImageStream") -> tuple[int, int, int]:
    count = min(_LOOKED_AT, stream.groups[0].rows) if stream.skip_corrupt else 1
    with closing(stream.cursor()) as cursor:
        rows = cursor.load([Piece(0, 0, count, 0)], stream.buffer)
    for place in range(count):
        (pixels,) = decode_some([rows[place]], stream.wanted)
        if not isinstance(pixels, str):
            channels, height, width = pixels.shape
            return channels, height, width
    raise unusable(rows[count - 1], str(pixels), stream.name)


@final
@dataclass(frozen=True, slots=True, eq=False)
class ImageStream:
    """Labelled images of one size that are read when they are needed; made by `open_stream`.

    In memory are, at most: `buffer` bytes of encoded pictures, or twice that where footers declare
    too little (beyond it the file is refused) or `skip_corrupt` keeps those of batches on their
    way; what is being unpacked, one row group or, of row groups that are larger than their share of
    the buffer, a page for each lane (pyarrow puts 1024 rows into a page); the decoded batches
    ahead, as uint8: 512 images, or two batches where these are more; and one picture for each
    worker, of at most `decoding.MOST_PIXELS`. The number of images plays no part, nor that of
    shards but for their footers.

    Attributes:
        name: what to call the set in messages and reports.
        classes: class names.
        shards: the files as they were when the set was opened.
        groups: the row groups that belong to the set, in stored order.
        columns: names of the columns of pictures and labels.
        wanted: what the pixels should be.
        shape: channels, height and width in pixels, of every image.
        buffer: bytes of encoded pictures that are shuffled together.
        workers: threads that decode.
        skip_corrupt: whether pictures that cannot be used are replaced.
        skipped: those that have been, by name, and why.
    """

    name: str
    classes: tuple[str, ...] = field(repr=False)
    shards: tuple[Shard, ...] = field(repr=False)
    groups: tuple[Group, ...] = field(repr=False)
    columns: Columns
    wanted: Wanted
    shape: tuple[int, int, int]
    buffer: int
    workers: int
    skip_corrupt: bool
    skipped: dict[str, str] = field(init=False, default_factory=dict, repr=False)

    def __len__(self) -> int:
        return sum(group.rows for group in self.groups)

    def digest(self) -> str:
        """SHA-256, in hex, of all that decides on the batches but the pictures' own bytes.

        That is names, sizes and footers of the files, which row groups, how they are decoded and
        shuffled. Bytes that were changed within a picture, and nothing else, are not noticed.
        """
        facts = [
            [_VERSION, *self.columns, *self.wanted, self.buffer, self.skip_corrupt],
            [
                [each.path.name, each.size, each.metadata.num_rows, each.footer]
                for each in self.shards
            ],
            [[group.shard, group.number] for group in self.groups],
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def require_classes(self, least: int = 2) -> "ImageStream":
        """This set, once it is known to have images of at least `least` classes.

        Labels are read until so many have been found.

        Raises:
            UnreadableDataError: it has fewer, and nothing can be learnt or measured on it.
        """
        present, index = set[int | None](), self._index()
        for labels in labels_in(self.shards, self.groups, self.columns):
            present |= {index_of(label, index) for label in labels} - {None}
            if len(present) >= least:
                return self
        raise UnreadableDataError(
            f"{self.name} has images of {len(present)} class; needs at least "
            f"{'two' if least == 2 else least} classes: "
            "check the labels, or add images of other classes"
        )

    def split(self, fraction: float, *, seed: int) -> tuple["ImageStream", "ImageStream"]:
        """Training and validation set: random row groups, of about `fraction` of the images.

        The same seed gives the same split on every machine. Where a row group holds images of few
        classes, so may the validation set.

        Raises:
            UnreadableDataError: one of the two would be empty.
        """
        held_out, room = set[int](), fraction * len(self)
        for number in torch.randperm(len(self.groups), generator=generator_for("split", seed)):
            rows = self.groups[int(number)].rows
            if rows <= 2 * room:  # nearer with it than without
                held_out.add(int(number))
                room -= rows
        if not 0 < len(held_out) < len(self.groups):
            raise UnreadableDataError(
                f"{self.name} has {len(self.groups)} row groups and a fraction of {fraction} was "
                "asked for validation; needed: at least one row group on either side. Write the "
                "files again with a smaller row_group_size, or name files of their own"
            )
        train, validation = (
            tuple(g for n, g in enumerate(self.groups) if (n in held_out) is inside)
            for inside in (False, True)
        )
        return replace(self, groups=train), replace(self, groups=validation)

    def sample(self, count: int, *, seed: int) -> ImageSet:
        """A random choice of `count` of the images, in memory; all where there are no more.

        Drawn from at least 16 random row groups if there are so many, and not from all: each is
        read whole. With `skip_corrupt` it lacks what cannot be used, which `skipped` names.

        Raises:
            UnreadableDataError: `count` is below 1, or a picture cannot be used.
        """
        if count < 1:
            raise UnreadableDataError(f"{count} images were asked for; needed: at least 1")
        generator, most = generator_for("sample", seed), self.buffer // MOST_LANES
        pieces = [
            piece
            for number, group in enumerate(self.groups)
            for piece in pieces_of(number, group, 0, group.rows, most)
        ]
        chosen, rows = list[Piece](), 0
        for number in torch.randperm(len(pieces), generator=generator).tolist():
            if rows >= count and len(chosen) >= _SAMPLED:
                break
            chosen.append(pieces[number])
            rows += chosen[-1].stop - chosen[-1].start
        places = torch.randperm(rows, generator=generator)[:count].sort()[0].tolist()
        decoded = decode_all(
            self._at(sorted(chosen), places),
            len(places),
            self.wanted,
            source=self.name,
            skip_corrupt=self.skip_corrupt,
        )
        for each in decoded.skipped:
            name, _, why = each.partition(": ")
            self.skipped[name] = why
        images, labels = torch.from_numpy(decoded.images), torch.from_numpy(decoded.labels)
        return ImageSet(images, labels, self.classes, self.name)

    def steps_per_epoch(self, size: int) -> int:
        """Whole batches in the set, the same in every epoch; a set smaller than one batch is one.

        Raises:
            BadRecipeError: the batch size is below 1.
        """
        return steps_per_epoch(len(self), size)

    def batches(
        self,
        normalise: Normalisation,
        *,
        size: int,
        seed: int,
        epoch: int,
        start: int = 0,
        augment: Augment | None = None,
        device: torch.device | str = "cpu",
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """As `batching.batches`: a part's slice of one epoch's batches, from step `start` on.

        All parts together see the batches that one alone would. A part reads the lanes that its
        slice is made of, so where `part.of` divides the number of lanes (8, or the largest power
        of two that divides `size`) no two parts read the same row group, but for those on the
        borders of lanes. No thread is left when the iterator ends, is closed or raises.

        Raises:
            BadRecipeError: batch size, `start` or `part` is out of range.
            UnreadableDataError: on the way: a picture cannot be used, a file is damaged, has
                changed or is gone.
        """
        todo, steps = steps_from(start, len(self), size), self.steps_per_epoch(size)
        width = min(size, len(self))
        epoch_ = _Epoch(seed, epoch, steps, width, slice_of(width, part), part)
        return self._batches(normalise, epoch_, todo, augment, device)

    def _batches(
        self,
        normalise: Normalisation,
        epoch: "_Epoch",
        todo: range,
        augment: Augment | None,
        device: torch.device | str,
    ) -> Iterator[Batch]:
        with ExitStack() as stack:
            pick = self._picking(epoch, stack)
            # Threads that decode for the CPU put each picture where it is wanted at once, which is
            # ten times as fast as moving it afterwards; an accelerator does that faster itself.
            early, late = (augment, None) if _is_cpu(device) else (None, augment)
            moves = None if early is None else epoch.moves(early)
            done = stack.enter_context(closing(self._decoded(todo, pick, epoch.share, moves)))
            for step, (images, labels) in zip(todo, done, strict=True):
                pixels = moved_to(images, device)
                if late is not None:
                    pixels = late.moved(pixels, moved_to(epoch.drawn(late, step), device))
                number = epoch.number * epoch.steps + step
                yield _batch(pixels, labels, number, normalise, device)._replace(part=epoch.part)

    def _picking(self, epoch: "_Epoch", stack: ExitStack) -> Callable[[int], list[Pick]]:
        """What chooses the pictures of a step; the files it opens are closed with the stack."""
        count = lanes_for(len(self.groups), epoch.width)
        share, most = epoch.width // count, self.buffer // count
        dealt, visited = deal(self.groups, count), list[tuple[LaneReader, int, int]]()
        for lane in range(count):
            first = max(epoch.own.start - lane * share, 0)
            last = min(epoch.own.stop - lane * share, share)
            if first < last:
                shuffle = Shuffle(lane, epoch.seed, epoch.number)
                found = windows(dealt, self.groups, shuffle, most=most)
                cursor = stack.enter_context(closing(self.cursor()))
                spare = self.skip_corrupt
                visited.append((LaneReader(cursor, found, shuffle, most, spare), first, last))

        def pick(step: int) -> list[Pick]:
            begin = step * share
            return [
                each
                for reader, first, last in visited
                for each in reader.take(begin + first, begin + last)
            ]

        return pick

    def evaluation_batches(
        self,
        normalise: Normalisation,
        size: int,
        *,
        device: torch.device | str = "cpu",
        part: Part = WHOLE,
    ) -> Iterator[Batch]:
        """All images as they are stored, the last batch as small as it comes; nothing is random.

        A part takes every `part.of`-th batch, from its index on.

        Raises:
            BadRecipeError: batch size or `part` is out of range.
            UnreadableDataError: on the way, as for `batches`.
        """
        steps_per_epoch(len(self), size)
        slice_of(part.of, part)  # is there such a part?
        return self._evaluation_batches(normalise, size, device, part)

    def _evaluation_batches(
        self, normalise: Normalisation, size: int, device: torch.device | str, part: Part
    ) -> Iterator[Batch]:
        total = len(self)
        todo = range(part.index, -(-total // size), part.of)
        with closing(self.cursor()) as cursor:

            def pick(number: int) -> list[Pick]:
                stored = self._stored(number * size, min((number + 1) * size, total))
                rows = cursor.load(stored, self.buffer)
                return picks_of(rows, range(len(rows)), range(len(rows)), spare=self.skip_corrupt)

            with closing(self._decoded(todo, pick, size)) as done:
                for number, (images, labels) in zip(todo, done, strict=True):
                    yield _batch(moved_to(images, device), labels, number, normalise, device)

    def _decoded(
        self,
        todo: Iterable[int],
        pick: Callable[[int], list[Pick]],
        count: int,
        moves: Callable[[int], Moves] | None = None,
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        decoder = Decoder(self.wanted, self.shape, self.name, self.skipped)

        def prepare(step: int) -> tuple[tuple[Tensor, Tensor], list[Callable[[], None]]]:
            picks = pick(step)
            images, labels = decoder.places(len(picks))
            result = torch.from_numpy(images), torch.from_numpy(labels)
            own = None if moves is None else moves(step)
            return result, decoder.tasks(picks, images, labels, own)

        ahead = min(16, max(2, _AHEAD // count))
        return done_ahead(todo, prepare, workers=self.workers, ahead=ahead)

    def _stored(self, start: int, stop: int) -> list[Piece]:
        """The pieces of row groups that images `start` to before `stop` are stored in."""
        ends = list(accumulate(group.rows for group in self.groups))
        pieces = []
        for number in range(bisect_right(ends, start), len(ends)):
            first = ends[number] - self.groups[number].rows
            if first >= stop:
                break
            pieces.append(Piece(number, max(start - first, 0), min(stop, ends[number]) - first, 0))
        return pieces

    def _at(self, pieces: Iterable[Piece], places: Sequence[int]) -> Iterator[Encoded]:
        """The pictures at ascending `places` of the rows of all pieces, one after the other."""
        begin, taken = 0, 0
        with closing(self.cursor()) as cursor:
            for piece in pieces:
                rows = cursor.load([piece], self.buffer)
                while taken < len(places) and places[taken] < begin + len(rows):
                    yield rows[places[taken] - begin]
                    taken += 1
                begin += len(rows)

    def cursor(self) -> Cursor:
        """What reads the encoded pictures."""
        return Cursor(self.shards, self.groups, self.columns, self._index())

    def _index(self) -> dict[str, int]:
        return {name: label for label, name in enumerate(self.classes)}


class _Epoch(NamedTuple):
    """One epoch as one part sees it: its `own` places in each of the batches of `width` images."""

    seed: int
    number: int
    steps: int
    width: int
    own: slice
    part: Part

    @property
    def share(self) -> int:
        return self.own.stop - self.own.start

    def drawn(self, augment: Augment, step: int) -> Tensor:
        """What is drawn for the part's images; as for an image set, it is drawn for all parts."""
        generator = generator_for("augment", self.seed, self.number, step)
        return augment.draw(self.width, generator)[:, self.own]

    def moves(self, augment: Augment) -> Callable[[int], Moves]:
        """For each step, how the part's images are moved."""
        return lambda step: Moves(augment.pad, self.drawn(augment, step).T.tolist())


def _is_cpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cpu"


def _batch(
    pixels: Tensor,
    labels: Tensor,
    step: int,
    normalise: Normalisation,
    device: torch.device | str,
) -> Batch:
    images = normalise(pixels).contiguous(memory_format=torch.channels_last)
    return Batch(images, moved_to(labels, device), step)
