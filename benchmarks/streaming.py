"""What streaming from Parquet shards costs, beside what two threads can decode at best.

    python benchmarks/synthetic_images.py FOLDER --gigabytes 3
    python benchmarks/streaming.py run FOLDER         results/streaming.json and .md
    python benchmarks/streaming.py render             results/streaming.md from the JSON

The ceiling is two threads that decode pictures which are in memory, and do nothing else. It and the
stream run in turns; a share is the median over turns. Shares are given of wall-clock time, and of
processor time, which other load on the machine disturbs less. Memory and times to the first batch
are those of fresh processes; the files are read once before.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nnpassport.data.decoding import Encoded, Wanted, decode_some
from nnpassport.data.images import IMAGENET, Augment
from nnpassport.data.rowgroups import Piece
from nnpassport.data.stream import ImageStream, open_stream
from nnpassport.files.disk import write_atomically
from nnpassport.lab.results import read_json, write_json
from nnpassport.lab.tables import table
from nnpassport.lab.timing import paired
from nnpassport.report.provenance import provenance
from nnpassport.scheme import Batch

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "streaming.json"
SIZE, BATCH, WORKERS = 224, 256, 2
TURNS, BATCHES = 5, 6
TASK = 16
LONGER = 47  # batches, in which every lane reads a second window


def opened(location: str) -> ImageStream:
    """The training images, decoded by two threads."""
    split = "train" if Path(location).is_dir() else None
    return open_stream(location, split=split, size=SIZE, workers=WORKERS)


def run(folder: Path) -> None:
    """Measure everything, and write it down."""
    origin, load = provenance(), [os.getloadavg()[0]]
    torch.set_num_threads(1)
    for file in folder.glob("*.parquet"):
        file.read_bytes()
    rates = throughput(str(folder))
    load.append(os.getloadavg()[0])
    print(json.dumps(rates), flush=True)
    fresh = {
        name: in_fresh_process(str(location), step)
        for name, location, step in (
            ("whole set, from the start", folder, 0),
            ("whole set, from the middle", folder, None),
            ("a third of it, from the start", folder / "train-0000[0-4]-*.parquet", 0),
            ("a third of it, from the middle", folder / "train-0000[0-4]-*.parquet", None),
        )
    }
    load.append(os.getloadavg()[0])
    report = {
        "provenance": {**origin, "load_average": load, "workers": WORKERS, "batch": BATCH},
        "throughput": rates,
        "fresh_processes": fresh,
    }
    write_json(RESULT, report)
    write_atomically(RESULT.with_suffix(".md"), render(report).encode())


def throughput(location: str) -> list[dict[str, Any]]:
    """Images a second of the ceiling and of the stream, in turns."""
    data = opened(location)
    pictures = in_memory(data, BATCH * BATCHES)
    rows: dict[str, list[dict[str, float]]] = {}
    ways: dict[str, Callable[[int], Iterator[Any]]] = {
        "decoded bytes": lambda turn: decoded(data, turn),
        "batches": lambda turn: batches(data, turn, None),
        "batches, augmented": lambda turn: batches(data, turn, Augment()),
    }
    for turn in range(TURNS):
        rows.setdefault("ceiling", []).append(timed(lambda: ceiling(pictures)))
        for name, way in ways.items():
            with closing(way(turn)) as stream:  # type: ignore[type-var]
                for _ in range(4):  # until as much is ahead as will be
                    next(stream)
                taken = timed(lambda stream=stream: take(stream))  # type: ignore[misc]
            rows.setdefault(name, []).append(taken)
    best = rows["ceiling"]
    return [
        {
            "what": name,
            "images_per_second": median(each["per_second"] for each in own),
            "processor_milliseconds": median(each["processor_ms"] for each in own),
            "share_of_ceiling": _shares(own, best, "per_second"),
            "share_by_processor": _shares(best, own, "processor_ms"),
        }
        for name, own in rows.items()
    ]


def _shares(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> list[float]:
    return sorted(paired(*([turn[key] for turn in each] for each in (ours, theirs))))


def in_memory(data: ImageStream, count: int) -> list[Encoded]:
    """Encoded pictures of row groups all over the set."""
    each = data.groups[0].rows
    every = len(data.groups) * each // count
    pieces = [Piece(number, 0, each, 0) for number in range(0, len(data.groups), every)]
    with closing(data.cursor()) as cursor:
        rows = cursor.load(pieces, 2**32)
    return [rows[place] for place in range(count)]


def ceiling(pictures: list[Encoded]) -> int:
    """Decode what is in memory; returns how many."""
    wanted = Wanted(SIZE, 3)
    tasks = [pictures[at : at + TASK] for at in range(0, len(pictures), TASK)]
    with ThreadPoolExecutor(WORKERS) as pool:
        return sum(pool.map(lambda task: len(decode_some(task, wanted)), tasks))


def batches(data: ImageStream, epoch: int, augment: Augment | None) -> Iterator[Batch]:
    """What a training loop sees: floats, normalised."""
    return data.batches(IMAGENET, size=BATCH, seed=0, epoch=epoch, augment=augment)


def decoded(data: ImageStream, epoch: int) -> Iterator[Batch]:
    """Pixels as bytes, as they leave for an accelerator that augments and normalises itself."""
    as_they_are = lambda pixels: pixels  # noqa: E731 - in the place of a normalisation
    return data.batches(as_they_are, size=BATCH, seed=0, epoch=epoch)  # type: ignore[arg-type]


def take(stream: Iterator[Batch]) -> int:
    """Take some batches; returns how many images they had."""
    return sum(len(next(stream).labels) for _ in range(BATCHES))


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Images a second, and processor time of all threads for an image, in milliseconds."""
    started, before = time.perf_counter(), time.process_time()
    count = work()
    used, passed = time.process_time() - before, time.perf_counter() - started
    return {"per_second": count / passed, "processor_ms": 1e3 * used / count}


def in_fresh_process(location: str, step: int | None) -> dict[str, float]:
    """`fresh` in a process of its own."""
    command = [sys.executable, __file__, "fresh", location, *(() if step is None else [str(step)])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def fresh(location: str, step: int | None) -> dict[str, float]:
    """Seconds to the first batch from this step on (None: the middle), and what memory grew by."""
    torch.set_num_threads(1)
    data = opened(location)
    begin = data.steps_per_epoch(BATCH) // 2 if step is None else step
    before, started = peak(), time.perf_counter()
    stream = data.batches(IMAGENET, size=BATCH, seed=0, epoch=0, start=begin, augment=Augment())
    next(stream)
    first, read = time.perf_counter() - started, _bytes_read()
    for _ in range(LONGER):
        next(stream)
    return {
        "images": len(data),
        "gigabytes": sum(shard.size for shard in data.shards) / 1e9,
        "step": begin,
        "seconds_to_first_batch": first,
        "megabytes_read_for_it": read / 1e6,
        "grown_mib": peak() - before,
        "of_that_buffer_mib": data.buffer / 2**20,
    }


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    (line,) = (e for e in Path("/proc/self/status").read_text().splitlines() if e[:6] == "VmHWM:")
    return int(line.split()[1]) / 1024


def _bytes_read() -> int:
    (line,) = (e for e in Path("/proc/self/io").read_text().splitlines() if e[:6] == "rchar:")
    return int(line.split()[1])


def render(report: dict[str, Any]) -> str:
    """The tables of results/streaming.md."""
    origin = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in _facts(report))
    turns = len(report["throughput"][0]["share_of_ceiling"])
    rates = [
        (
            *(row["what"], f"{row['images_per_second']:.0f}", _spread(row["share_of_ceiling"])),
            *(f"{row['processor_milliseconds']:.2f}", _spread(row["share_by_processor"])),
        )
        for row in report["throughput"]
    ]
    fresh = [
        (
            *(name, f"{row['images']:,}", f"{row['gigabytes']:.2f}", row["step"]),
            *(f"{row['seconds_to_first_batch']:.2f}", f"{row['megabytes_read_for_it']:.0f}"),
            f"{row['grown_mib']:.0f}",
        )
        for name, row in report["fresh_processes"].items()
    ]
    row = next(iter(report["fresh_processes"].values()))
    floats = 4 * BATCH * 3 * SIZE**2 / 2**20
    lines = [
        "# Streaming from Parquet shards",
        "",
        "Rendered by `python benchmarks/streaming.py render` from `streaming.json`; the pictures",
        f"are those of `benchmarks/synthetic_images.py`, JPEG of {SIZE} pixels a side. The ceiling",
        "is two threads that decode pictures which are in memory, and do nothing else. Shares of",
        f"it are medians over {turns} turns, with the least and the most.",
        "",
        origin,
        "",
        *table(
            (
                *("", "images/s", "share of the ceiling", "ms of processor an image"),
                "share by processor",
            ),
            rates,
        ),
        "",
        "*Decoded bytes* is what leaves for an accelerator, which augments and normalises there;",
        "*batches* are normalised floats, made on the same two cores.",
        "",
        f"In fresh processes, {LONGER + 1} batches each:",
        "",
        *table(
            (
                *("", "images", "GB", "from step", "first batch, s", "MB read by then"),
                "memory grown, MiB",
            ),
            fresh,
        ),
        "",
        f"Of the memory, {row['of_that_buffer_mib']:.0f} MiB are the buffer of encoded pictures,",
        f"and {floats:.0f} MiB each batch of floats. MB read are of all files, modules too.",
        "",
    ]
    return "\n".join(lines)


def _facts(report: dict[str, Any]) -> list[tuple[str, Any]]:
    origin = report["provenance"]
    loads = ", ".join(f"{each:.1f}" for each in origin["load_average"])
    return [
        *((key, value) for key, value in origin.items() if key != "load_average"),
        ("load average before, between and after", loads),
    ]


def _spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    """One of the commands above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["run", "render", "fresh"])
    parser.add_argument("location", nargs="?")
    parser.add_argument("step", nargs="?", type=int)
    given = parser.parse_args()
    if given.command == "run":
        run(Path(given.location))
    elif given.command == "fresh":
        print(json.dumps(fresh(given.location, given.step)))
    else:
        report = read_json(RESULT)
        write_atomically(RESULT.with_suffix(".md"), render(report).encode())


if __name__ == "__main__":
    main()
