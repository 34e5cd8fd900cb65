"""A model folder: its config, and the very weights that this was saved with."""

import os
from pathlib import Path
from typing import NamedTuple

from nnpassport.files.config import CONFIG_FILE, ModelConfig, read_config_file
from nnpassport.files.disk import refuse_leaving
from nnpassport.files.weights import WEIGHTS_FILE, Arrays, read_arrays
from nnpassport.scheme import UnreadableModelError


class Folder(NamedTuple):
    """What a model folder holds, and SHA-256 (hex) of each file read, by name."""

    config: ModelConfig
    weights: Arrays
    digests: dict[str, str]


def read_folder(folder: Path) -> Folder:
    """The config and the weights of one save.

    Raises:
        UnreadableModelError: a file is missing, corrupt or hostile, or the weights are not those
            that the config was saved with.
    """
    if os.path.lexists(folder / CONFIG_FILE):
        refuse_leaving(folder, folder / CONFIG_FILE)
    read = read_config_file(folder / CONFIG_FILE)
    weights = _weights_of(folder, read.weights)
    return Folder(read.config, weights, {CONFIG_FILE: read.digest, **weights.digests})


def pending(digest: str) -> str:
    """The name of weights that are whole and wait for their config."""
    return f".model.{digest[:16]}.safetensors"


def _weights_of(folder: Path, digest: str | None) -> Arrays:
    """The weights that a config with this digest was saved with; any, if it has none."""
    if digest is None:
        return read_arrays(folder)
    waiting = folder / pending(digest)
    interrupted = os.path.lexists(waiting)
    if not interrupted or os.path.lexists(folder / WEIGHTS_FILE):
        weights = read_arrays(folder)
        if weights.digests.get(WEIGHTS_FILE) == digest:
            return weights
    if interrupted:
        # The save was killed after its config was in place; its weights are whole.
        found = read_arrays(waiting)
        weights = Arrays(found.arrays, {WEIGHTS_FILE: found.digests[waiting.name]})
        if weights.digests[WEIGHTS_FILE] == digest:
            return weights
    raise UnreadableModelError(
        f"{folder} holds other weights than its {CONFIG_FILE} was saved with (SHA-256 "
        f"{digest[:16]}…); needed: both files of one save; copy them again, or take "
        "'weights_sha256' out of the config if you exchanged the weights yourself"
    )
