"""WebDataset archives: a picture and its class are files of one name, one behind the other."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nnpassport.data.decoding import Encoded
from nnpassport.data.source import LABELS, Asked, Source, classes_of, index_of
from nnpassport.scheme import UnreadableDataError

PICTURES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"}
NAMED = {"cls", "txt", "label"}
_MOST_PICTURE, _MOST_LABEL = 2**28, 2**20  # bytes
_MOST_MEMBERS = 50_000_000


class _Place(NamedTuple):
    """A picture in an archive that is not packed: where its bytes are."""

    name: str
    offset: int
    size: int
    label: int | str | None


def in_archives(files: Sequence[Path], name: str, asked: Asked) -> Source:
    """The samples of tar archives, one archive after the other.

    A sample is the files that share their name up to its first dot: a picture, and its class as
    `.cls` (a number or a name), `.txt`, `.label`, or a member of `.json`. `asked` names the
    extension of the picture or of the class (or the member), where there are several.

    Raises:
        UnreadableDataError: an archive is damaged or packed, or has no labelled pictures.
    """
    places = {file: list(_places(file, asked)) for file in files}
    labels = [place.label for found in places.values() for place in found]
    if not labels:
        raise UnreadableDataError(
            f"{name}: the archives hold no pictures; needed: files such as 0001.jpg and 0001.cls, "
            f"pictures with one of the extensions {', '.join(sorted(PICTURES))}"
        )
    classes = classes_of(iter(labels), name)
    index = {each: label for label, each in enumerate(classes)}

    def pictures() -> Iterator[Encoded]:
        for file, found in places.items():
            with file.open("rb") as archive:
                for place in found:
                    archive.seek(place.offset)
                    called = f"{file.name}: {place.name}"
                    yield Encoded(called, archive.read(place.size), index_of(place.label, index))

    return Source(name, len(labels), classes, tuple(files), pictures())


def _places(file: Path, asked: Asked) -> Iterator[_Place]:
    try:
        # "r:": not packed, so that a picture is where its header says and nothing is unpacked.
        with tarfile.open(file, "r:") as archive:
            sample, parts = "", dict[str, tarfile.TarInfo]()
            for number, member in enumerate(archive):
                if number > _MOST_MEMBERS:
                    raise UnreadableDataError(
                        f"{file} has more than {_MOST_MEMBERS} members; split it"
                    )
                if not member.isreg() or PurePosixPath(member.name).name.startswith("."):
                    continue
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                called = str(path.with_name(stem))
                if called != sample and parts:
                    yield from _sample(archive, sample, parts, asked, file)
                    parts = {}
                sample = called
                parts[extension.lower()] = member
            yield from _sample(archive, sample, parts, asked, file)
            end = archive.offset
        _check_end(file, end)
    except UnreadableDataError:
        raise
    except Exception as error:  # tarfile's own and others; bytes from anybody
        raise UnreadableDataError(
            f"{file} is not a readable tar archive: {error}; needed: a whole one that is not "
            "compressed, as WebDataset writes it (gunzip it first)"
        ) from error


def _check_end(file: Path, end: int) -> None:
    # tarfile takes a header that is cut off for the end, and would read fewer pictures in silence.
    with file.open("rb") as archive:
        archive.seek(end)
        block = archive.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("it ends without the blocks that end an archive")


def _sample(
    archive: tarfile.TarFile,
    name: str,
    parts: dict[str, tarfile.TarInfo],
    asked: Asked,
    file: Path,
) -> Iterator[_Place]:
    """The picture of one sample; a sample without any picture is none."""
    wanted = {asked.image} if asked.image else PICTURES
    pictures = [extension for extension in parts if extension in wanted]
    if len(pictures) > 1:
        raise UnreadableDataError(
            f"{file}: sample {name!r} has pictures {', '.join(pictures)}; name the extension with "
            "--image-column (in Python image_column=)"
        )
    for extension in pictures:
        member = parts[extension]
        if member.size > _MOST_PICTURE:
            raise UnreadableDataError(
                f"{file}: {member.name} has {member.size} bytes; needed: at most {_MOST_PICTURE}"
            )
        label = _label(archive, parts, asked)
        yield _Place(member.name, member.offset_data, member.size, label)


def _label(
    archive: tarfile.TarFile, parts: dict[str, tarfile.TarInfo], asked: Asked
) -> int | str | None:
    for extension in (asked.label,) if asked.label in parts else sorted(NAMED & parts.keys()):
        text = _text(archive, parts[str(extension)])
        if text:
            return _as_label(text)
    if "json" in parts:
        try:
            facts = json.loads(_text(archive, parts["json"]))
        except (ValueError, RecursionError):
            return None
        names = (asked.label,) if asked.label else LABELS
        found: Any = next((facts[n] for n in names if isinstance(facts, dict) and n in facts), None)
        return found if isinstance(found, int | str) and not isinstance(found, bool) else None
    return None


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = archive.extractfile(member) if member.size <= _MOST_LABEL else None
    return "" if content is None else content.read().decode("utf-8", "replace").strip()


def _as_label(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text
