"""Trigger images: the same bytes give the same pixels for ever, and no two look alike."""

import hashlib
import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from scipy.spatial.distance import cdist

from nnpassport.data.triggers import read_triggers
from nnpassport.keys.pictures import abstract_images
from nnpassport.scheme import UnreadableDataError

GOLDEN_SMALL = "c3d9d92338c5fd077f4b13eddd2942495087fa5812c8bdb2607d9f3fd39ac0f5"
GOLDEN_ODD = "256a705357ff51b9d6374caca3e68dc9305e8b5da05b27e1f4c72eb4f5e1a6cc"


def secret(seed):
    return lambda count: hashlib.shake_256(seed).digest(count)


def digest(images):
    return hashlib.sha256(images.tobytes()).hexdigest()


def test_abstract_images_never_change():
    small = abstract_images(secret(b"a"), count=10, size=(3, 32, 32))
    odd = abstract_images(secret(b"b"), count=3, size=(1, 17, 40))
    assert small.dtype == odd.dtype == np.uint8
    assert small.shape == (10, 3, 32, 32)
    assert odd.shape == (3, 1, 17, 40)
    assert digest(small) == GOLDEN_SMALL
    assert digest(odd) == GOLDEN_ODD


def stretched(g, i, side):
    t = 1024 * i // max(1, side - 1)
    k = min(t // 256, 3)
    f = t - 256 * k
    return ((256 - f) * g[k] + f * g[k + 1]) // 256


def covers(shape, i, j, height, width):
    q, y, x, a, b, l, w, d = shape  # noqa: E741 - the letters of the specification
    down, across = 256 * i // height - y, 256 * j // width - x
    sine, cosine = a - 128, b - 128
    along, beside = cosine * across + sine * down, cosine * down - sine * across
    outer = 24 + l // 3
    inner = outer - 8 - w * (outer - 8) // 255
    return (
        along // (16 * (96 + d)) % 2 == 0,
        inner**2 <= across**2 + down**2 < outer**2,
        abs(along // 128) < 16 + l // 4 and abs(beside // 128) < 8 + w // 5,
        along > 0,
    )[q % 4]


def specified_image(content, channels, height, width):
    """One image, number by number as `docs/derivation.md` says."""
    values = []
    for c in range(channels):
        grid = [content[25 * c + 5 * u : 25 * c + 5 * u + 5] for u in range(5)]
        columns = list(zip(*grid, strict=True))
        tall = [[stretched(column, i, height) for column in columns] for i in range(height)]
        values.append([[stretched(row, j, width) for j in range(width)] for row in tall])
    for n in range(4):
        shape = content[25 * channels + n * (8 + channels) :][: 8 + channels]
        for i in range(height):
            for j in range(width):
                if covers(shape[:8], i, j, height, width):
                    for c in range(channels):
                        values[c][i][j] = (3 * shape[8 + c] + values[c][i][j]) // 4
    return values


@pytest.mark.parametrize("size", [(3, 32, 32), (1, 17, 40), (2, 1, 5), (1, 1, 1)])
def test_abstract_images_are_those_of_the_specification(size):
    each = 25 * size[0] + 4 * (8 + size[0])
    content = secret(b"c")(12 * each)
    images = abstract_images(secret(b"c"), count=12, size=size).tolist()
    assert images == [specified_image(content[n * each : (n + 1) * each], *size) for n in range(12)]


def test_abstract_images_differ_from_each_other_and_between_secrets():
    images = np.concatenate(
        [abstract_images(secret(seed), count=60, size=(3, 32, 32)) for seed in (b"a", b"b")]
    )
    flat = images.reshape(len(images), -1).astype(np.float64)
    distances = cdist(flat, flat) / flat.shape[1] ** 0.5
    apart = distances[~np.eye(len(flat), dtype=bool)]
    assert apart.min() > 20  # levels of 255, root mean square
    assert flat.std(axis=1).min() > 10


def test_one_altered_byte_alters_an_image():
    def altered(count):
        content = bytearray(secret(b"a")(count))
        content[0] ^= 255
        return bytes(content)

    assert not np.array_equal(
        abstract_images(secret(b"a"), count=1, size=(3, 16, 16)),
        abstract_images(altered, count=1, size=(3, 16, 16)),
    )


def test_abstract_images_of_a_single_pixel_and_of_extreme_bytes_are_possible():
    assert abstract_images(secret(b"a"), count=2, size=(1, 1, 1)).shape == (2, 1, 1, 1)
    for value in (0, 128, 255):
        images = abstract_images(lambda n, v=value: bytes([v]) * n, count=1, size=(3, 8, 8))
        assert np.unique(images).tolist() == [value]


@pytest.mark.parametrize(("count", "size"), [(0, (3, 8, 8)), (1, (0, 8, 8)), (1, (3, 8, -1))])
def test_refuses_to_draw_nothing(count, size):
    with pytest.raises(UnreadableDataError, match="at least 1"):
        abstract_images(secret(b"a"), count=count, size=size)


def encoded(colour, side):
    file = io.BytesIO()
    Image.new("RGB", (side, side + 2), colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{colour}.png"}


def test_reads_a_published_set_at_its_own_crop_and_at_any_other_size(tmp_path):
    rows = {
        "image": [encoded("red", 60), encoded("lime", 50)],
        "crop32": [encoded("blue", 32), encoded("white", 32)],
        "label": [3, 1],
    }
    parquet.write_table(pa.table(rows), tmp_path / "triggers.parquet")
    crops = read_triggers(tmp_path / "triggers.parquet")
    assert crops.images.shape == (2, 3, 32, 32)
    assert crops.images[0, :, 5, 5].tolist() == [0, 0, 255]
    assert crops.labels.tolist() == [3, 1]
    scaled = read_triggers(tmp_path / "triggers.parquet", size=24)
    assert scaled.images.shape == (2, 3, 24, 24)
    assert scaled.images[1, :, 5, 5].tolist() == [0, 255, 0]


def test_reads_a_set_without_crops(tmp_path):
    rows = {"image": [encoded("red", 60), encoded("lime", 50)], "label": [0, 1]}
    parquet.write_table(pa.table(rows), tmp_path / "triggers.parquet")
    assert read_triggers(tmp_path / "triggers.parquet").images[0, 0].min() == 255


def test_refuses_what_is_no_trigger_set(tmp_path):
    (tmp_path / "not.parquet").write_bytes(b"PAR1 but not really PAR1")
    for name in ("not.parquet", "missing.parquet"):
        with pytest.raises(UnreadableDataError, match=name):
            read_triggers(tmp_path / name)
