"""Files, read once and written whole: nothing half-read is used, nothing half-written is left."""

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from nnpassport.scheme import OwnershipError, UnreadableModelError, UnwritableOutputError

_LONGEST_TEXT = 4_096  # characters
_LONGEST_QUOTED = 300
# Control characters, which could drive a terminal, and lone surrogates, which cannot be printed.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def write_atomically(
    path: Path, content: bytes | Callable[[BinaryIO], object], *, mode: int = 0o644
) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename.

    Folders that are missing are made.

    `content` is the bytes, or a function that writes them to the open file. `mode` (less the
    umask) holds from the first byte. A link at `path` is replaced, not followed.

    Raises:
        UnwritableOutputError: the file could not be written; what was at `path` is untouched.
    """
    with writing(path), make_folder(path.parent), staged(path, content, mode) as temporary:
        refuse_special(path)
        os.replace(temporary, path)
        sync_folder(path.parent)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        UnreadableModelError: the file cannot be read.
    """
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_once(path: Path, limit: int) -> bytes:
    """All bytes of a regular file (or a link to one), read in one go.

    Raises:
        UnreadableModelError: missing, empty, no file, over `limit` bytes, or changed meanwhile.
    """
    with reading(path):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise UnreadableModelError(f"{path} is not a regular file; give the file itself")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= limit else b""
    if size > limit:
        raise UnreadableModelError(
            f"{path} has {size} bytes, but at most {limit} are read; "
            "split it, or convert a checkpoint to .safetensors"
        )
    if len(data) != size or not data:
        what = "changed while it was read" if data else "is empty"
        raise UnreadableModelError(f"{path} {what}; needed: a complete file; copy it again")
    return data


def refuse_leaving(folder: Path, path: Path) -> None:
    """Refuse a file of somebody's folder that is a link out of it, or lies behind one.

    Links of a hub's cache are followed; see `is_in_hub_cache`.

    Raises:
        UnreadableModelError: it leads elsewhere, or nowhere.
    """
    with reading(path):
        path.stat()  # a link that turns in circles is an OSError here
        target, home = path.resolve(), folder.resolve()
    if target.is_relative_to(home) or is_in_hub_cache(path):
        return
    raise UnreadableModelError(
        f"{path} is a link to somewhere outside its folder, and what lies there is not read; "
        "put the file itself there (in a cache of the hub, links lead into blobs/ of their own "
        "repository and are followed)"
    )


def is_in_hub_cache(path: Path) -> bool:
    """Whether a file is kept as the Hugging Face hub's cache keeps them.

    There every file below `snapshots/REVISION` is a link into `blobs` of the same repository.
    """
    target, folder = path.resolve(), path.parent.resolve()
    return any(
        each.parent.name == "snapshots" and target.is_relative_to(each.parent.parent / "blobs")
        for each in (folder, *folder.parents)
    )


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`.

    Raises:
        ValueError: a field is given twice.
    """
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a field is given twice")
    return values


def is_text(value: object) -> bool:
    """Whether it is a text that is short and holds nothing that could drive a terminal."""
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT and not _UNPRINTABLE.search(value)


def brief(error: BaseException) -> str:
    """The error's first line, printable; short but for one of ours: it may quote a hostile file."""
    text = (str(error).splitlines() or [""])[0] or type(error).__name__
    if len(text) > _LONGEST_QUOTED and not isinstance(error, OwnershipError):
        text = f"{text[:_LONGEST_QUOTED]}…"
    return text if text.isprintable() else ascii(text)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into `UnreadableModelError`."""
    try:
        yield
    except OSError as error:
        raise UnreadableModelError(
            f"{path} cannot be read: {error.strerror or error}; give a model file or folder that "
            "exists and may be read"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into `UnwritableOutputError`."""
    try:
        yield
    except OSError as error:
        raise UnwritableOutputError(
            f"{path} cannot be written: {error.strerror or error}; what was there before is "
            "untouched; needed: a folder with space and write permission; name another, or free it"
        ) from error


def refuse_special(path: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket, as renaming would.

    Raises:
        UnwritableOutputError: one of these is there; /dev/null, say.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there, or renaming will say what is wrong
        return
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
        raise UnwritableOutputError(
            f"{path} is a device, a pipe or a socket, and a file would take its place; needed: the "
            "name of a file"
        )


@contextmanager
def staged(
    path: Path, content: bytes | Callable[[BinaryIO], object], mode: int = 0o644
) -> Iterator[Path]:
    """A synced temporary file beside `path`, gone afterwards unless it was renamed."""
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def make_folder(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; on failure those that are new go again."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):  # not empty, or never made
                parent.rmdir()
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other writers of ours out of a folder meanwhile, where the system can."""
    try:
        import fcntl  # noqa: PLC0415 - there is none on Windows
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make sure that a rename in `folder` outlives a power cut, where the system can."""
    # Not every system can open a folder; the rename itself has succeeded already.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
