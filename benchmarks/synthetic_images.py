"""Pictures like ImageNet's in size and number, drawn and not taken: to measure streaming with.

    python benchmarks/synthetic_images.py FOLDER                     4 GB of training pictures
    python benchmarks/synthetic_images.py FOLDER --gigabytes 3 --test-images 4096

1000 classes; a class is three gratings (directions, frequencies, colours), which a picture shows
with phases, contrast and lighting of its own, under a blotch and under noise. JPEG of 224 pixels a
side, 17 to 33 kB. Shards of 8192 pictures (some 200 MB) in row groups of 256, in the hub's schema:
`train-*.parquet` and `test-*.parquet`. A shard is a pure function of its name and the seed, shards
that are there are kept, and an interrupted run goes on where it was.
"""

import argparse
import io
import json
import multiprocessing
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

CLASSES = 1000
SIDE = 224
ROWS = 256  # of a row group
SHARD = 32 * ROWS
PICTURE = 25_000  # bytes, about
QUALITY = 90
GRATINGS = 3

Floats = npt.NDArray[np.float32]


class Look(NamedTuple):
    """What a class looks like: cycles a side (gratings, 2) and colours (gratings, 3)."""

    cycles: Floats
    colours: Floats


class Shard(NamedTuple):
    """Which shard to write, and where."""

    path: Path
    split: int
    number: int
    rows: int
    seed: int


@lru_cache(maxsize=CLASSES)
def look(label: int, seed: int) -> Look:
    """The class, drawn from its number."""
    rng = np.random.default_rng([seed, 1, label])
    angles, cycles = rng.uniform(0, np.pi, GRATINGS), rng.uniform(2, 24, GRATINGS)
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    colours = rng.normal(0, 1, (GRATINGS, 3))
    colours *= 32 / np.linalg.norm(colours, axis=1, keepdims=True)
    return Look((directions * cycles[:, None]).astype(np.float32), colours.astype(np.float32))


@lru_cache(maxsize=1)
def noise(seed: int) -> Floats:
    """Grains to cut each picture's noise from: drawing 150,000 numbers would take longer."""
    grains = np.random.default_rng([seed, 2]).normal(0, 16, (3 * SIDE, 3 * SIDE, 3))
    return grains.astype(np.float32)


def picture(label: int, rng: np.random.Generator, seed: int) -> bytes:
    """A picture of the class, as JPEG."""
    own = look(label, seed)
    axis = np.linspace(0, 2 * np.pi, SIDE, dtype=np.float32)
    cycles = own.cycles * rng.uniform(0.95, 1.05, (GRATINGS, 1)).astype(np.float32)
    phases = rng.uniform(0, 2 * np.pi, (GRATINGS, 1)).astype(np.float32)
    across, down = axis * cycles[:, :1] + phases, axis * cycles[:, 1:]
    # sin(x + y) = sin x cos y + cos x sin y: one product of matrices instead of many sines
    rows = np.concatenate([np.cos(down), np.sin(down)])
    columns = np.concatenate([np.sin(across), np.cos(across)])
    colours = np.concatenate([own.colours, own.colours]) * rng.uniform(0.6, 1.2)
    weighted = (columns[:, :, None] * colours[:, None, :]).reshape(2 * GRATINGS, -1)
    drawn = (rows.T @ weighted).reshape(SIDE, SIDE, 3)
    blotch = Image.fromarray(rng.integers(64, 192, (6, 6, 3), dtype=np.uint8))
    drawn += np.asarray(blotch.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    top, left = rng.integers(0, 2 * SIDE, 2)
    grain = np.float32(rng.uniform(0.5, 1.6))
    drawn += grain * noise(seed)[top : top + SIDE, left : left + SIDE]
    file = io.BytesIO()
    Image.fromarray(drawn.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write(shard: Shard) -> str:
    """Write one shard, all of it or nothing; returns what to say of it."""
    if shard.path.exists() and parquet.read_metadata(shard.path).num_rows == shard.rows:
        return f"{shard.path.name}: kept"
    schema, temporary = _schema(), shard.path.with_suffix(".tmp")
    with parquet.ParquetWriter(
        temporary, schema, compression="none", use_dictionary=False
    ) as writer:
        for columns in _row_groups(shard):
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROWS)
    temporary.replace(shard.path)
    return f"{shard.path.name}: {shard.path.stat().st_size / 1e6:.0f} MB"


def _schema() -> pa.Schema:
    names = [f"class {label:03}" for label in range(CLASSES)]
    feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.schema(
        [("image", image), ("label", pa.int64())], {"huggingface": json.dumps(feature)}
    )


def _row_groups(shard: Shard) -> Iterator[dict[str, list[object]]]:
    for first in range(0, shard.rows, ROWS):
        images, labels = list[object](), list[object]()
        for row in range(first, min(first + ROWS, shard.rows)):
            rng = np.random.default_rng([shard.seed, 3, shard.split, shard.number, row])
            labels.append(int(rng.integers(CLASSES)))
            images.append({"bytes": picture(labels[-1], rng, shard.seed), "path": None})
        yield {"image": images, "label": labels}


def shards(folder: Path, gigabytes: float, test_images: int, seed: int) -> list[Shard]:
    """All shards of the set, the test set's first."""
    train = max(1, round(gigabytes * 1e9 / PICTURE / SHARD))
    planned = []
    for split, (name, rows) in enumerate((("test", test_images), ("train", train * SHARD))):
        sizes = [min(SHARD, rows - first) for first in range(0, rows, SHARD)]
        for number, size in enumerate(sizes):
            path = folder / f"{name}-{number:05}-of-{len(sizes):05}.parquet"
            planned.append(Shard(path, split, number, size, seed))
    return planned


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the training set, about")
    parser.add_argument("--test-images", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    planned = shards(given.folder, given.gigabytes, given.test_images, given.seed)
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for said in pool.imap(write, planned):
            print(said, flush=True)


if __name__ == "__main__":
    main()
