"""Images streamed from Parquet shards: one order, whoever reads it and from whichever step on."""

import gc
import io
import itertools
import json
import os
import threading
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from nnpassport.data import picks, rowgroups, stream
from nnpassport.data.ahead import done_ahead
from nnpassport.data.batching import Augment, steps_per_epoch
from nnpassport.data.images import CIFAR10, Normalisation, read_images
from nnpassport.data.imageset import generator_for
from nnpassport.data.stream import open_stream
from nnpassport.scheme import BadRecipeError, Part, UnreadableDataError

DATA = Path(os.environ.get("NNPASSPORT_DATA") or Path(__file__).parents[2] / "shared" / "data")
PLAIN = Normalisation((0.0,) * 3, (1 / 255,) * 3)  # pixels as they are, as floats
SIDE = 8


def picture(number, side=SIDE):
    """A picture that says its number."""
    pixels = np.full((side, side, 3), [number % 256, number // 256, 7], np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def numbers(batch):
    """Which pictures a batch has."""
    pixels = batch.images[:, :, SIDE // 2, SIDE // 2].round().long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def write(path, contents, labels, rows, **options):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    stored = pa.array([{"bytes": each, "path": None} for each in contents], kind)
    names = [f"class {label}" for label in range(4)]
    feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = pa.table({"image": stored, "label": pa.array(labels, pa.int64())})
    table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    parquet.write_table(table, path, row_group_size=rows, **{"use_dictionary": False} | options)


def write_shards(folder, files=3, each=160, rows=10, spoilt=()):
    folder.mkdir(exist_ok=True)
    for file in range(files):
        own = range(file * each, (file + 1) * each)
        contents = [b"spoilt" if number in spoilt else picture(number) for number in own]
        write(folder / f"part-{file}.parquet", contents, [n % 4 for n in own], rows)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """480 pictures in 3 files of 16 row groups of 10."""
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def size_of_group(shards):
    """Bytes of one row group."""
    return max(group.size for group in open_stream(shards, size=SIDE).groups)


def opened(folder, groups=16, size_of_group=1_000, **options):
    """With room for so many row groups: 2 a lane, where there are 8 lanes."""
    return open_stream(folder, size=SIDE, buffer=groups * size_of_group, **options)


@pytest.fixture
def data(shards, size_of_group):
    return opened(shards, size_of_group=size_of_group)


def epoch(data, number=0, *, size=16, seed=5, **options):
    return data.batches(PLAIN, size=size, seed=seed, epoch=number, **options)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def same(ours, theirs):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.step == b.step
        for a, b in zip(ours, theirs, strict=True)
    )


def workers():
    return [each.name for each in threading.enumerate() if each.name.startswith("nnpassport")]


@pytest.fixture
def opened_groups(monkeypatch):
    """Which row groups are opened, one after the other."""
    seen, before = [], rowgroups.Cursor._open
    monkeypatch.setattr(
        rowgroups.Cursor, "_open", lambda self, group: (seen.append(group), before(self, group))
    )
    return seen


# Order


@pytest.mark.parametrize("groups", [100, 16, 3], ids=["one window", "some", "row groups are cut"])
@pytest.mark.parametrize("start", [1, 13, 29, 30])
@pytest.mark.filterwarnings("ignore:.*has a row group:UserWarning")
def test_a_run_goes_on_from_any_step_bit_for_bit(shards, size_of_group, groups, start):
    data = opened(shards, groups, size_of_group)
    whole = list(epoch(data, 2, augment=Augment()))
    assert [batch.step for batch in whole] == list(range(60, 90))
    again = opened(shards, groups, size_of_group)
    assert same(epoch(again, 2, augment=Augment(), start=start), whole[start:])


def test_what_came_before_is_neither_read_nor_decoded(data, opened_groups, monkeypatch):
    decoded, before = [], picks.decode_some
    monkeypatch.setattr(
        picks, "decode_some", lambda some, wanted: decoded.extend(some) or before(some, wanted)
    )
    assert len(list(epoch(data, start=27))) == 3
    assert len(decoded) == 3 * 16
    assert len(set(opened_groups)) <= 8 * 2 + 7  # of 48; a window has two, or three where cut
    opened_groups.clear()
    assert len(list(epoch(data))) == 30
    assert len(set(opened_groups)) == 48


def test_an_epoch_shows_every_image_at_most_once_and_another_epoch_differs(data):
    size = 32
    epochs = [[n for batch in epoch(data, e, size=size) for n in numbers(batch)] for e in range(2)]
    for seen in epochs:
        assert len(seen) == len(set(seen)) == size * data.steps_per_epoch(size)
    assert data.steps_per_epoch(size) == steps_per_epoch(480, size) == 15
    first, second = (np.array(each) for each in epochs)
    assert (first == second).mean() < 0.05
    other = [n for batch in epoch(data, size=size, seed=6) for n in numbers(batch)]
    assert (first == np.array(other)).mean() < 0.05


@pytest.mark.parametrize("size", [7, 50, 64, 500])
def test_any_batch_size_visits_as_many_images_as_in_memory(data, size):
    seen = [numbers(batch) for batch in epoch(data, size=size)]
    assert [len(each) for each in seen] == [min(size, 480)] * steps_per_epoch(480, size)
    assert max(Counter(flat(seen)).values()) == 1


def test_images_keep_their_labels(data):
    for batch in epoch(data):
        assert batch.labels.tolist() == [number % 4 for number in numbers(batch)]


def test_what_lies_together_is_not_seen_together(data):
    batches = [numbers(batch) for batch in epoch(data, size=16)]
    seen = np.array(flat(batches))
    noise = 1 / np.sqrt(len(seen))
    assert abs(np.corrcoef(np.arange(len(seen)), seen)[0, 1]) < 4 * noise
    # In memory, 16 images of 480 come from 13.8 of the 48 row groups; here from up to 2 of each
    # lane: 12, and fewer while lanes are in their first window or in two. Unshuffled it is 8.
    assert np.mean([len({n // 10 for n in batch}) for batch in batches]) > 10
    # The rows of a window are shuffled together: of two that follow one another in a lane, half
    # are of one row group where a window has two, and not all.
    lanes = np.concatenate([seen.reshape(-1, 8, 2)[:, lane] for lane in range(8)]).reshape(8, -1)
    assert 0.3 < (lanes[:, 1:] // 10 == lanes[:, :-1] // 10).mean() < 0.6


@pytest.mark.parametrize("shape", [(9, 3, 6, 5), (1, 3, 7, 7), (5, 1, 4, 4), (4, 3, 1, 1)])
def test_images_are_normalised_alike_in_either_layout(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator_for("images"))
    normalise = Normalisation(CIFAR10.mean[: shape[1]], CIFAR10.std[: shape[1]])
    ours = normalise(images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(ours, normalise(images))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("pad", "side"), [(4, 8), (2, 5), (9, 8), (0, 8)])
def test_one_image_is_moved_as_a_batch_of_them_is(pad, side):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (200, 3, side, side + 2), dtype=torch.uint8, generator=rng)
    augment = Augment(pad)
    drawn = augment.draw(200, rng)
    placed = torch.full_like(images, 255).numpy()
    for place, image, own in zip(placed, images.numpy(), drawn.T.tolist(), strict=True):
        picks.put_moved(place, image, pad, own)
    assert torch.equal(torch.from_numpy(placed), augment.moved(images, drawn))


@pytest.mark.parametrize("early", [True, False], ids=["while decoding", "on the device"])
def test_an_epoch_is_augmented_as_an_epoch_in_memory_is(data, early, monkeypatch):
    monkeypatch.setattr(stream, "_is_cpu", lambda _: early)
    plain, moved = (list(epoch(data, 1, augment=each)) for each in (None, Augment()))
    for step, (ours, theirs) in enumerate(zip(plain, moved, strict=True)):
        generator = generator_for("augment", 5, 1, step)
        assert torch.equal(Augment()(ours.images.to(torch.uint8), generator), theirs.images)


# Parts


@pytest.mark.parametrize(("size", "of"), [(16, 2), (16, 8), (32, 16), (12, 3), (10, 5), (9, 3)])
def test_parts_together_are_the_whole(data, size, of):
    whole = list(epoch(data, size=size, augment=Augment()))[:6]
    parts = [
        list(epoch(data, size=size, augment=Augment(), part=Part(index, of))) for index in range(of)
    ]
    for step, batch in enumerate(whole):
        own = [part[step] for part in parts]
        assert [each.part for each in own] == [Part(index, of) for index in range(of)]
        assert {each.step for each in own} == {batch.step}
        assert torch.equal(torch.cat([each.images for each in own]), batch.images)
        assert torch.equal(torch.cat([each.labels for each in own]), batch.labels)


@pytest.mark.parametrize("of", [2, 4, 8])
def test_parts_read_row_groups_of_their_own(data, opened_groups, of):
    read = []
    for index in range(of):
        assert len(list(epoch(data, part=Part(index, of)))) == 30
        read.append(set(opened_groups))
        opened_groups.clear()
    assert set().union(*read) == set(range(48))
    assert max(len(each) for each in read) == 48 // of  # 480 images: borders are between groups


def test_a_part_that_cannot_be_is_refused_at_once(data):
    with pytest.raises(BadRecipeError, match="cannot be shared by 3 processes"):
        epoch(data, size=16, part=Part(0, 3))
    with pytest.raises(BadRecipeError):
        epoch(data, size=16, part=Part(2, 2))
    with pytest.raises(BadRecipeError):
        data.evaluation_batches(PLAIN, 16, part=Part(2, 2))
    with pytest.raises(BadRecipeError, match="needed: 0 to 30"):
        epoch(data, start=31)
    with pytest.raises(BadRecipeError, match="batch size is 0"):
        epoch(data, size=0)


# Evaluation


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_evaluation_covers_every_image_once_for_any_number_of_parts(data, of):
    parts = [list(data.evaluation_batches(PLAIN, 50, part=Part(i, of))) for i in range(of)]
    by_step = {batch.step: numbers(batch) for part in parts for batch in part}
    assert flat(by_step[step] for step in range(10)) == list(range(480))
    assert [sorted(b.step for b in part) for part in parts] == [
        list(range(i, 10, of)) for i in range(of)
    ]


def test_pixels_are_those_of_read_images(tmp_path):
    rng = np.random.default_rng(0)
    contents = []
    for number in range(60):
        shape = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(
            file, ("JPEG", "PNG", "WEBP")[number % 3]
        )
        contents.append(file.getvalue())
    write(tmp_path / "a.parquet", contents[:35], [n % 4 for n in range(35)], 10)
    write(tmp_path / "b.parquet", contents[35:], [n % 4 for n in range(35, 60)], 7)
    for channels in (1, 3):
        memory = read_images(tmp_path, size=24, channels=channels, cache=False)
        data = open_stream(tmp_path, size=24, channels=channels)
        plain = Normalisation((0.0,) * channels, (1 / 255,) * channels)
        batches = list(data.evaluation_batches(plain, 16))
        assert torch.equal(torch.cat([b.images for b in batches]), plain(memory.images))
        assert torch.equal(torch.cat([b.labels for b in batches]), memory.labels)
        assert (data.name, data.classes, len(data)) == (memory.name, memory.classes, 60)
        assert all(b.images.is_contiguous(memory_format=torch.channels_last) for b in batches)


def test_pixels_of_cifar10_are_those_of_read_images(tmp_path):
    whole = DATA / "cifar10-test.parquet"
    if not whole.exists():
        pytest.skip(f"no CIFAR-10 in {DATA}; NNPASSPORT_DATA names the folder that has it")
    location = tmp_path / "cifar10-test.parquet"
    parquet.write_table(parquet.read_table(whole).slice(0, 2_000), location, row_group_size=200)
    data, memory = open_stream(location), read_images(location, cache=False)
    assert data.shape == (3, 32, 32)
    stored = torch.cat([b.images for b in data.evaluation_batches(CIFAR10, 1000)])
    assert torch.equal(stored, CIFAR10(memory.images))
    seen = [b.labels for b in data.batches(CIFAR10, size=128, seed=0, epoch=0)]
    assert [len(each) for each in seen] == [128] * 15
    left_out = memory.labels.bincount(minlength=10) - torch.cat(seen).bincount(minlength=10)
    assert left_out.min() >= 0
    assert left_out.sum() == 2_000 - 15 * 128
    again = data.batches(CIFAR10, size=128, seed=0, epoch=0, start=12)
    assert all(torch.equal(b.labels, own) for b, own in zip(again, seen[12:], strict=True))
    # of what the images themselves are, from a sample: within four standard errors of the whole's
    measured = Normalisation.measured(data.sample(500, seed=0))
    exact = Normalisation.measured(memory)
    for ours, theirs, std in zip(measured.mean, exact.mean, exact.std, strict=True):
        assert abs(ours - theirs) < 4 * std / np.sqrt(500)


# Memory


@pytest.fixture
def heavy(tmp_path):
    """64 MB in two files of small pictures, each with 128 kB that no decoder looks at."""
    rng = np.random.default_rng(0)
    for file in range(2):
        own = range(256 * file, 256 * (file + 1))
        contents = [picture(n) + rng.bytes(2**17) for n in own]
        labels = [n % 4 for n in own]
        write(tmp_path / f"{file}.parquet", contents, labels, 8, compression="none")
        (tmp_path / "large").mkdir(exist_ok=True)
        write(
            tmp_path / "large" / f"{file}.parquet",
            contents,
            labels,
            256,
            write_batch_size=8,
            compression="none",
        )
    return tmp_path


@pytest.fixture
def most_in_memory(monkeypatch):
    """The most bytes that Arrow held when pictures had been read."""
    seen, before = [0], rowgroups.Cursor.load

    def load(self, *args):
        loaded = before(self, *args)
        seen[0] = max(seen[0], pa.total_allocated_bytes())
        return loaded

    monkeypatch.setattr(rowgroups.Cursor, "load", load)
    return seen


@pytest.mark.parametrize("large", [False, True], ids=["row groups of 1 MB", "of 32 MB"])
@pytest.mark.filterwarnings("ignore:.*has a row group:UserWarning")
def test_encoded_pictures_in_memory_are_bounded_by_the_buffer(heavy, most_in_memory, large):
    gc.collect()
    before, buffer = pa.total_allocated_bytes(), 2**24
    data = open_stream(heavy / "large" if large else heavy, size=SIDE, buffer=buffer)
    seen = [n for batch in epoch(data, size=32) for n in numbers(batch)]
    assert sorted(seen) == list(range(512))
    # In a row group that is read in parts, a lane also has what it unpacks, of 4 MiB, in part.
    lanes = 2 if large else 1
    assert buffer / 2 < most_in_memory[0] - before < buffer + lanes * 2 * 2**22
    gc.collect()
    assert pa.total_allocated_bytes() - before < 2**20


def test_a_lane_drops_its_window_before_it_reads_the_next(data, monkeypatch):
    alive, most, before = weakref.WeakSet(), [0], rowgroups.Cursor.load

    def load(self, *args):
        alive.add(loaded := before(self, *args))
        most[0] = max(most[0], sum(map(len, list(alive))))
        return loaded

    monkeypatch.setattr(rowgroups.Cursor, "load", load)
    assert len(list(epoch(data))) == 30
    assert 100 < most[0] <= 8 * 2 * 10


def test_no_more_results_are_begun_than_ahead():
    begun, taken = [], []
    results = done_ahead(range(50), lambda job: (begun.append(job) or job, ()), workers=2, ahead=3)
    for result in results:
        taken.append(result)
        assert len(begun) - len(taken) <= 3
    assert taken == list(range(50))


# Threads


def test_no_thread_is_left_however_it_ends(data, shards):
    assert not workers()
    batches = epoch(data)
    assert not workers()  # nothing is begun before it is asked for
    next(batches)
    assert workers()
    batches.close()
    assert not workers()
    for batch in epoch(data):
        del batch
        break
    gc.collect()
    assert not workers()
    evaluation = data.evaluation_batches(PLAIN, 10)
    next(evaluation)
    evaluation.close()
    assert not workers()
    assert len(list(epoch(data))) == 30
    assert not workers()


def test_ctrl_c_while_it_waits_leaves_no_thread(data, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    batches = epoch(data)
    next(batches)
    monkeypatch.setattr("concurrent.futures.Future.result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    monkeypatch.undo()
    assert not workers()


# Pictures that cannot be used


def test_a_corrupt_picture_is_named(tmp_path):
    data = opened(write_shards(tmp_path, spoilt={163}))
    with pytest.raises(UnreadableDataError, match=r"part-1.parquet row 3 cannot be used"):
        list(epoch(data))
    assert not workers()
    with pytest.raises(UnreadableDataError, match=r"part-1.parquet row 3 cannot be used"):
        list(data.evaluation_batches(PLAIN, 32))
    with pytest.raises(UnreadableDataError, match=r"part-1.parquet row 3 cannot be used"):
        data.sample(480, seed=0)


def test_corrupt_pictures_are_replaced_the_same_way_for_everybody(tmp_path):
    spoilt = {3, 163, 164, 165, 400}
    data = opened(write_shards(tmp_path, spoilt=spoilt), skip_corrupt=True)
    whole = list(epoch(data, augment=Augment(0)))
    seen = Counter(n for batch in whole for n in numbers(batch))
    assert sum(seen.values()) == 480
    assert not spoilt & set(seen)
    names = {f"part-{n // 160}.parquet row {n % 160}" for n in spoilt}
    assert set(data.skipped) == names
    assert all("identify" in why for why in data.skipped.values())
    assert same(epoch(data, augment=Augment(0), start=11), whole[11:])
    parts = [list(epoch(data, augment=Augment(0), part=Part(i, 4))) for i in range(4)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].labels for part in parts]), batch.labels)
        assert torch.equal(torch.cat([part[step].images for part in parts]), batch.images)
    evaluated = [n for b in data.evaluation_batches(PLAIN, 32) for n in numbers(b)]
    assert len(evaluated) == 480
    assert set(evaluated) == set(range(480)) - spoilt
    assert len(data.sample(480, seed=0)) == 475


def test_a_window_without_any_picture_is_an_error_even_then(tmp_path):
    data = opened(write_shards(tmp_path, files=1, spoilt=set(range(160))), skip_corrupt=True)
    with pytest.raises(UnreadableDataError, match="cannot be used"):
        list(epoch(data))
    with pytest.raises(UnreadableDataError, match="cannot be used"):
        open_stream(tmp_path, skip_corrupt=True)


def test_pictures_of_different_sizes_are_refused_unless_a_size_is_given(tmp_path):
    contents = [picture(n, side=8 + n % 2) for n in range(20)]
    write(tmp_path / "x.parquet", contents, [n % 4 for n in range(20)], 10)
    with pytest.raises(UnreadableDataError, match="Pass size="):
        list(epoch(open_stream(tmp_path), size=4))
    assert len(list(epoch(open_stream(tmp_path, size=8), size=4))) == 5


def test_a_label_that_is_no_class_is_named(tmp_path):
    write(tmp_path / "x.parquet", [picture(n) for n in range(20)], [0, 9] * 10, 10)
    with pytest.raises(UnreadableDataError, match="no label, or one that is no class"):
        list(epoch(open_stream(tmp_path, size=8), size=4))


# Files that are not what they were


def test_a_shard_that_changes_while_it_is_read_is_named(tmp_path, size_of_group):
    data = opened(write_shards(tmp_path), size_of_group=size_of_group)
    batches = epoch(data)
    next(batches)
    write(tmp_path / "part-1.parquet", [picture(n) for n in range(99)], [0] * 99, 10)
    with pytest.raises(UnreadableDataError, match=r"part-1.parquet has changed"):
        list(batches)
    assert not workers()


def test_a_shard_that_vanishes_while_it_is_read_is_named(tmp_path, size_of_group):
    data = opened(write_shards(tmp_path), size_of_group=size_of_group)
    batches = epoch(data)
    next(batches)
    (tmp_path / "part-2.parquet").unlink()
    with pytest.raises(UnreadableDataError, match=r"part-2.parquet .* cannot be read any more"):
        list(batches)


def test_a_damaged_shard_is_named(tmp_path):
    path = write_shards(tmp_path, files=1) / "part-0.parquet"
    content = bytearray(path.read_bytes())
    content[500 : len(content) // 2] = bytes(len(content) // 2 - 500)
    path.write_bytes(content)
    with pytest.raises(UnreadableDataError, match=r"part-0.parquet is damaged"):
        list(epoch(opened(tmp_path)))


def test_a_shard_that_unpacks_to_far_more_than_it_declares_is_refused(tmp_path):
    contents = [picture(0) + bytes(2**20)] * 64
    write(tmp_path / "x.parquet", contents, [0, 1] * 32, 8, use_dictionary=True)
    assert (tmp_path / "x.parquet").stat().st_size < 2**20
    with pytest.raises(UnreadableDataError, match="holds more than the"):
        list(epoch(open_stream(tmp_path, size=SIDE, buffer=2**24), size=8))
    assert len(list(epoch(open_stream(tmp_path, size=SIDE), size=8))) == 8


def test_large_row_groups_are_warned_of(tmp_path):
    write_shards(tmp_path, files=2, rows=160)
    with pytest.warns(UserWarning, match="row_group_size=.* or less"):
        data = open_stream(tmp_path, size=SIDE, buffer=2_000)
    seen = [n for batch in epoch(data) for n in numbers(batch)]
    assert sorted(seen) == list(range(320))
    again = [n for batch in epoch(data, start=9) for n in numbers(batch)]
    assert again == seen[9 * 16 :]


# The set


def test_digest_depends_on_files_and_options_and_not_on_where_they_are(tmp_path, data, shards):
    copy = write_shards(tmp_path / "elsewhere")
    buffer = data.buffer
    assert open_stream(copy, size=SIDE, buffer=buffer).digest() == data.digest()
    others = [
        open_stream(copy, size=SIDE, buffer=buffer + 1),
        open_stream(copy, size=SIDE + 1, buffer=buffer),
        open_stream(copy / "part-0.parquet", size=SIDE, buffer=buffer),
        *data.split(0.5, seed=0),
    ]
    write(copy / "part-0.parquet", [picture(n + 1) for n in range(160)], [0, 1] * 80, 10)
    others.append(open_stream(copy, size=SIDE, buffer=buffer))
    digests = {each.digest() for each in (data, *others)}
    assert len(digests) == 7


def test_split_is_a_partition_by_row_groups_that_the_seed_decides(data):
    train, held_out = data.split(0.25, seed=1)
    assert (len(train), len(held_out)) == (360, 120)
    own, others = (
        {n for b in each.evaluation_batches(PLAIN, 64) for n in numbers(b)}
        for each in (train, held_out)
    )
    assert own | others == set(range(480))
    assert not own & others
    assert len({n // 10 for n in others}) == 12
    assert data.split(0.25, seed=1)[1].digest() == held_out.digest()
    assert data.split(0.25, seed=2)[1].digest() != held_out.digest()
    seen = [n for batch in epoch(train) for n in numbers(batch)]
    assert len(seen) == len(set(seen)) == 352
    assert set(seen) <= own
    for fraction in (0.0, 1.0, -3):
        with pytest.raises(UnreadableDataError, match="on either side"):
            data.split(fraction, seed=0)


def test_sample_is_random_and_the_seed_decides_it(data):
    sample = data.sample(100, seed=1)
    assert len(sample) == 100
    assert sample.classes == data.classes
    found = (sample.images[:, 0, 0, 0].int() + 256 * sample.images[:, 1, 0, 0].int()).tolist()
    assert len(set(found)) == 100
    assert sample.labels.tolist() == [number % 4 for number in found]
    assert len({number // 10 for number in found}) == 16
    assert data.sample(100, seed=1).digest() == sample.digest()
    assert data.sample(100, seed=2).digest() != sample.digest()
    assert len(data.sample(10_000, seed=0)) == 480
    with pytest.raises(UnreadableDataError, match="at least 1"):
        data.sample(0, seed=0)


def test_one_class_is_refused_where_classes_are_needed(data, tmp_path):
    assert data.require_classes(4) is data
    with pytest.raises(UnreadableDataError, match="needs at least 5 classes"):
        data.require_classes(5)
    write(tmp_path / "x.parquet", [picture(n) for n in range(20)], [2] * 20, 10)
    with pytest.raises(UnreadableDataError, match="needs at least two classes"):
        open_stream(tmp_path, size=8).require_classes()


@pytest.mark.parametrize("location", ["digits", "hub:owner/name", "owner/name", "{}/nothing"])
def test_what_cannot_be_streamed_says_how_to_read_it(tmp_path, location):
    with pytest.raises(UnreadableDataError, match="into memory, with read_images"):
        open_stream(location.format(tmp_path))


def test_other_files_and_wrong_options_are_refused(tmp_path, shards):
    (tmp_path / "classes" / "red").mkdir(parents=True)
    (tmp_path / "classes" / "red" / "0.png").write_bytes(picture(0))
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8), np.uint8), labels=[0, 1])
    for location in (tmp_path / "classes", tmp_path / "x.npz"):
        with pytest.raises(UnreadableDataError, match="into memory, with read_images"):
            open_stream(location)
    for options in ({"channels": 2}, {"size": 0}, {"buffer": 0}):
        with pytest.raises(UnreadableDataError, match="needed"):
            open_stream(shards, **options)
    with pytest.raises(UnreadableDataError, match="no column 'picture'"):
        open_stream(shards, image_column="picture")
    with pytest.raises(UnreadableDataError, match="has no split 'test'"):
        open_stream(shards, split="test")


def test_nothing_of_the_pictures_is_read_when_a_set_is_opened(shards, monkeypatch):
    def read(*_, **__):
        raise AssertionError("pictures were read")

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", read)
    assert len(open_stream(shards, size=SIDE)) == 480
    assert stream.BUFFER == 2**28
