"""The data of the experiments: by the paper's names, from a folder of Parquet files."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from nnpassport.data.images import ImageSet, read_images
from nnpassport.data.triggers import read_triggers
from nnpassport.scheme import UnreadableDataError

TRIGGERS = "watermarknn-trigger-set.parquet"


class Task(NamedTuple):
    """Where the images of a task are, in the folder of data; embedded ones are in none."""

    train: str
    test: str
    classes: int
    size: int = 32


class Images(NamedTuple):
    """Training and test images of a task, decoded."""

    train: ImageSet
    test: ImageSet


TASKS: Mapping[str, Task] = {
    "cifar10": Task("cifar10-train-*.parquet", "cifar10-test.parquet", 10),
    "cifar100": Task("cifar100-train-*.parquet", "cifar100-test.parquet", 100),
    "caltech101": Task("caltech101*-train.parquet", "caltech101*-test.parquet", 101),
    "digits": Task("", "", 10),
    "digits-halves": Task("", "", 2),
}


def missing(data: Path | None, task: str) -> list[str]:
    """Files of this task that the folder lacks."""
    wanted = [name for name in TASKS[task][:2] if name]
    return [name for name in wanted if data is None or not any(data.glob(name))]


@lru_cache(maxsize=4)
def images_of(data: Path | None, task: str) -> Images:
    """The task's images, 3 channels of 32 pixels a side; kept in memory once read.

    Raises:
        UnreadableDataError: the folder lacks them.
    """
    entry = TASKS[task]
    if not entry.train:
        return _digits(halves=task == "digits-halves")
    if lacking := missing(data, task):
        raise UnreadableDataError(
            f"{data or 'no folder of data'} has no {' and no '.join(lacking)}; give the folder "
            f"that holds the images of {task} as Parquet files with --data"
        )
    train, test = (str((data or Path()) / name) for name in (entry.train, entry.test))
    return Images(read_images(train, size=entry.size), read_images(test, size=entry.size))


def published_triggers(data: Path | None) -> Path:
    """The file of the trigger set that Adi et al. published.

    Raises:
        UnreadableDataError: the folder lacks it.
    """
    if data is None or not (data / TRIGGERS).exists():
        raise UnreadableDataError(
            f"{data or 'no folder of data'} has no {TRIGGERS}; this recipe uses the published "
            "trigger set: give the folder that holds it with --data, or take another recipe"
        )
    read_triggers(data / TRIGGERS)  # whether it can be read is known before hours of training
    return data / TRIGGERS


def _digits(*, halves: bool) -> Images:
    def part(split: str) -> ImageSet:
        images = read_images("digits", split=split, size=32)
        if not halves:
            return images
        upper = (images.labels >= 5).to(torch.int64)
        return ImageSet(images.images, upper, ("0-4", "5-9"), "digits-halves")

    return Images(part("train"), part("test"))
