"""Decoded pictures kept on disk, so that a data set is decoded once.

A cache is a convenience: whatever is wrong with it, the pictures are decoded again. Each entry is
one uncompressed .npz file, whose checksums tell when it is damaged.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL

_VERSION = 1


class Table(NamedTuple):
    """uint8 (images channels height width), int64 (images,), class names, what was skipped."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def default_folder() -> Path:
    """$NNPASSPORT_CACHE, or the folder "nnpassport" where this platform keeps caches."""
    chosen = os.environ.get("NNPASSPORT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        root = "~/Library/Caches"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "nnpassport"


def entry(folder: Path, files: Sequence[Path], options: Sequence[object]) -> Path:
    """Where the decoded `files` belong: a name that changes with any file and any option."""
    facts = [(str(file.resolve()), file.stat()) for file in files]
    identity = json.dumps(
        [
            [_VERSION, PIL.__version__, *options],
            [[name, stat.st_size, stat.st_mtime_ns] for name, stat in facts],
        ]
    )
    return folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.npz"


def load(path: Path) -> Table | None:
    """What is stored at `path`, or None if that is nothing, or nothing usable."""
    try:
        # Opened here: numpy leaves a file open when it finds that it is no archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            table = Table(
                stored["images"],
                stored["labels"],
                tuple(map(str, stored["classes"])),
                tuple(map(str, stored["skipped"])),
            )
    # Damaged zip and array headers raise many types; none of them is a reason not to decode.
    except Exception:
        return None
    return table if len(table.images) == len(table.labels) else None


def store(path: Path, table: Table) -> None:
    """Keep `table` at `path`, all of it or nothing; does nothing where it cannot be written."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            np.savez(
                file,
                images=table.images,
                labels=table.labels,
                classes=np.array(table.classes, dtype=np.str_),
                skipped=np.array(table.skipped, dtype=np.str_),
            )
        temporary.replace(path)
    except OSError:  # read-only, full or no folder at all: then there is no cache
        return
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
