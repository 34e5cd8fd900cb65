"""Folders of `torch.distributed.checkpoint` from anybody: one tensor from the pieces of many ranks.

A pickle, `.metadata`, says of each tensor which of its pieces lies where in which file beside it;
each piece is an archive of `torch.save` of its own. Both go to the process that reads pickles.
[torch.distributed.checkpoint.metadata and .filesystem, since PyTorch 2.1]
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nnpassport.files.arrays import Array
from nnpassport.files.disk import brief, read_once, refuse_leaving
from nnpassport.files.pickles.torchfile import MAX_PICKLED_BYTES, outline_of, read_each_alone
from nnpassport.scheme import UnreadableModelError

METADATA = ".metadata"
_MOST_AXES = 8


class _Piece(NamedTuple):
    """Bytes of a file, and of which part of a tensor they are."""

    file: str
    begin: int
    length: int
    packed: bool
    offsets: list[int]
    sizes: list[int]


def read_distributed(
    folder: Path, limit: int
) -> tuple[dict[str, Array], dict[str, str], dict[str, str]]:
    """The tensors of a folder, SHA-256 of its files, and the tensors that cannot be had, and why.

    Args:
        folder: where `.metadata` is.
        limit: bytes that all files may have.

    Raises:
        UnreadableModelError: damaged, hostile, too large, or without a tensor.
    """
    about = read_once(folder / METADATA, MAX_PICKLED_BYTES)
    try:
        said = outline_of(memoryview(about), "distributed")["tensors"]
        wanted = {
            name: (each["size"], [_Piece(*piece) for piece in each["pieces"]])
            for name, each in said.items()
        }
        files = {piece.file for _, pieces in wanted.values() for piece in pieces}
        held = _files(folder, sorted(files), limit)
        arrays, left_out = _joined(wanted, held)
        if not arrays and not left_out:
            raise ValueError("it names no tensor")
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise UnreadableModelError(
            f"{folder} is a checkpoint of torch.distributed.checkpoint, a part for each process, "
            f"that cannot be read ({brief(error)}); needed: the whole folder, or one file, as "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE` "
            "writes it from a folder of your own"
        ) from error
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in held.items()}
    return arrays, {METADATA: hashlib.sha256(about).hexdigest(), **digests}, left_out


def _files(folder: Path, names: list[str], limit: int) -> dict[str, bytes]:
    held: dict[str, bytes] = {}
    for name in names:
        if not isinstance(name, str) or name in (".", "..") or Path(name).name != name:
            raise ValueError(f"{name!r:.100} is not the name of a file in this folder")
        refuse_leaving(folder, folder / name)
        held[name] = read_once(folder / name, limit)
        limit -= len(held[name])
    return held


def _joined(
    wanted: Mapping[str, tuple[Any, list[_Piece]]], held: Mapping[str, bytes]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Each tensor from its pieces, and those that cannot be had."""
    left_out = {
        name: f"{name[:100]!r} is packed in a way of its own"
        for name, (_, pieces) in wanted.items()
        if any(piece.packed for piece in pieces)
    }
    kept = {name: each for name, each in wanted.items() if name not in left_out}
    places = [piece for _, pieces in kept.values() for piece in pieces]
    total = sum(piece.length for piece in places)
    if total > sum(map(len, held.values())) or min((p.length for p in places), default=0) < 0:
        raise ValueError("its pieces overlap")
    read = iter(read_each_alone([_stored(piece, held) for piece in places]))
    arrays: dict[str, Array] = {}
    for name, (size, pieces) in kept.items():
        found = [next(read) for _ in pieces]
        try:
            arrays[name] = _tensor(size, pieces, found)
        except ValueError as error:
            left_out[name] = f"{name[:100]!r} {error}"
    return arrays, left_out


def _stored(piece: _Piece, held: Mapping[str, bytes]) -> bytes:
    begin, end = piece.begin, piece.begin + piece.length
    if not 0 <= begin <= end <= len(held[piece.file]):
        raise ValueError(f"a piece leaves {piece.file[:100]!r}")
    return held[piece.file][begin:end]


def _tensor(size: list[int], pieces: list[_Piece], found: list[Array]) -> Array:
    """The numbers of all pieces, each at its place; every number is in one of them."""
    if len(size) > _MOST_AXES or sum(math.prod(each.sizes) for each in pieces) != math.prod(size):
        raise ValueError(f"of shape {tuple(size)!r:.100} does not hold all its numbers")
    for piece, array in zip(pieces, found, strict=True):
        if array.shape != tuple(piece.sizes) or array.dtype != found[0].dtype:
            raise ValueError(f"has a piece of shape {array.shape} and {array.dtype}")
        ends = [at + side for at, side in zip(piece.offsets, piece.sizes, strict=True)]
        if len(ends) != len(size) or any(
            end > whole for end, whole in zip(ends, size, strict=True)
        ):
            raise ValueError("has a piece that leaves it")
    if len(pieces) == 1:
        return found[0]
    joined = np.empty(size, found[0].dtype if found else np.float32)
    missing = np.ones(size, bool)
    for piece, array in zip(pieces, found, strict=True):
        place = tuple(
            slice(at, at + side) for at, side in zip(piece.offsets, piece.sizes, strict=True)
        )
        joined[place], missing[place] = array, False
    if missing.any():
        raise ValueError("has pieces that overlap")
    return joined
