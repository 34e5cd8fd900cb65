"""Weights from anybody: checked tensors, and the digest of the very bytes they came from.

A suspect is hostile. What is read is read once, within a limit; no pickle may call anything; and
no tensor may pose as larger than what is stored, or hold NaN or Inf.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Generic, NamedTuple, TypeVar

from nnpassport.files.adapter import ADAPTER_FILES, with_signed_scale
from nnpassport.files.arrays import (
    MAX_MODEL_BYTES,
    Array,
    arrays_digest,
    defect,
    fault_of,
    too_large,
)
from nnpassport.files.disk import read_once, reading, refuse_leaving
from nnpassport.files.gguf import read_gguf
from nnpassport.files.kinds import Kind, kind_of
from nnpassport.files.npz import SUFFIX as NPZ
from nnpassport.files.npz import read_npz
from nnpassport.files.onnx import ONNX, read_onnx
from nnpassport.files.pickles.distributed import METADATA, read_distributed
from nnpassport.files.pickles.torchfile import read_all_torch, read_torch
from nnpassport.files.quantised import is_quantised, restored
from nnpassport.files.safetensors import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    SUFFIX,
    Shards,
    disagreement,
    homes_of,
    is_index,
    open_shards,
)
from nnpassport.scheme import UnreadableModelError

WEIGHTS_FILE = "model.safetensors"
BIN = ".bin"
BIN_INDEX_SUFFIX = ".bin.index.json"
BIN_INDEX_FILE = f"pytorch_model{BIN_INDEX_SUFFIX}"
MAX_PICKLE_BYTES = 4 * 2**30
_DEEPSPEED = "_model_states.pt"
_ENDS = (SUFFIX, ONNX, NPZ, ".gguf", ".pt", ".pth", ".bin", ".ckpt", ".pth.tar")


PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile

T = TypeVar("T")
_MOST_ENTRIES = 20  # that a message names
_NOTHING: Mapping[str, str] = MappingProxyType({})


class Weights(NamedTuple, Generic[T]):
    """Checked weights by name, as arrays or as tensors, and SHA-256 (hex) of each file, by name.

    Attributes:
        left_out: of a suspect's tensors those that no layer can be, by name, and why.
    """

    arrays: dict[str, T]
    digests: dict[str, str]
    left_out: Mapping[str, str] = _NOTHING

    @property
    def tensors(self) -> dict[str, T]:
        """The same, where they are tensors."""
        return self.arrays

    def under(self, wanted: Iterable[str]) -> "Weights[T]":
        """The same under the `wanted` names, as far as only prefixes keep them from these."""
        names = without_prefixes(self.arrays, wanted)
        return self._replace(arrays={new: self.arrays[old] for new, old in names.items()})


Arrays = Weights[Array]


def within(folder: str, digests: Mapping[str, str]) -> dict[str, str]:
    """Digests under names that begin with their folder's."""
    return {f"{folder}/{name}": digest for name, digest in digests.items()}


def without_prefixes(there: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """By name without the prefixes that wrappers for training put before all, the name there is.

    A stranger's tensor that has none does not keep the others from losing theirs.
    """
    wanted, names = set(wanted), {name: name for name in there}
    for prefix in PREFIXES * 2:
        if names.keys() >= wanted:
            break
        shorter = {name.removeprefix(prefix): old for name, old in names.items()}
        names = shorter if len(shorter) == len(names) else names
    return names


def read_arrays(path: Path) -> Arrays:
    """The tensors of a `.safetensors` or `.onnx` file, a torch checkpoint, or a folder with one.

    In a folder: `model.safetensors`, else the shards of `model.safetensors.index.json`, else
    `pytorch_model.bin` or the shards of its index, else an adapter of peft's, else the only `*.pt`,
    else what `torch.distributed.checkpoint` wrote.
    Of an adapter, B has the sign of its scale (`adapter.with_signed_scale`). A checkpoint is a
    state dict, alone or under "state_dict" or "model". No code in it is run. What an ONNX file has
    under which names, `read_onnx` says.

    Raises:
        UnreadableModelError: missing, corrupt, too large, hostile, or NaN or Inf in a tensor.
    """
    path = _weights_file(path)
    if not _is_folder_s(path) and kind_of(path) is Kind.TORCH:
        data = read_once(path, MAX_PICKLE_BYTES)
        read = Arrays(read_torch(data, path), {path.name: hashlib.sha256(data).hexdigest()})
    else:
        read = _read(path)
    if read.left_out:
        raise _unusable(path, next(iter(read.left_out.values())))
    return _with_scale(_checked(read, path), path)


def _read(path: Path, *, whole: bool = False) -> Arrays:
    """All that a file holds; of a checkpoint also what is beside its state dict.

    With `whole` every name begins with the dictionaries that the tensor is in.
    """
    if path.name.lower().endswith(BIN_INDEX_SUFFIX):
        return _read_bins(path)
    if path.name == METADATA:
        arrays, files, others = read_distributed(path.parent, MAX_PICKLE_BYTES)
        return Arrays(arrays, files, others)
    kind = Kind.SAFETENSORS if is_index(path) else kind_of(path)
    if kind is Kind.SAFETENSORS:
        shards = open_shards(path, limit=MAX_MODEL_BYTES)
        return Arrays(*shards.whole(), shards.left_out)
    if kind is Kind.ONNX:
        return Arrays(*read_onnx(path, MAX_MODEL_BYTES))
    data = read_once(path, MAX_MODEL_BYTES if kind is Kind.GGUF else MAX_PICKLE_BYTES)
    of_torch = functools.partial(read_all_torch, whole=whole)
    read = {Kind.NPZ: read_npz, Kind.GGUF: read_gguf}.get(kind, of_torch)
    tensors, left_out = read(data, path)
    return Arrays(tensors, {path.name: hashlib.sha256(data).hexdigest()}, left_out)


def _is_folder_s(path: Path) -> bool:
    """Whether this file says what other files beside it hold."""
    of_bins = path.name.lower().endswith(BIN_INDEX_SUFFIX)
    return of_bins or path.name == METADATA or is_index(path)


def _read_bins(index: Path) -> Arrays:
    """All that the index of a folder of `.bin` files names, each from the file that it names."""
    homes, left = homes_of(index, BIN), MAX_PICKLE_BYTES
    digests = {index.name: hashlib.sha256(read_once(index, MAX_INDEX_BYTES)).hexdigest()}
    arrays: dict[str, Array] = {}
    left_out: dict[str, str] = {}
    for shard in dict.fromkeys(homes.values()):
        path = index.parent / shard
        refuse_leaving(index.parent, path)
        data = read_once(path, left)
        left -= len(data)
        digests[shard] = hashlib.sha256(data).hexdigest()
        found, others = read_all_torch(data, path)
        for name in (*found, *others):
            if homes.get(name) != shard:
                why = disagreement(index, name, shard, homes.get(name))
                left_out[f"{shard}: {name}"] = why
        arrays |= {name: each for name, each in found.items() if homes.get(name) == shard}
        left_out |= {name: why for name, why in others.items() if homes.get(name) == shard}
    for name, shard in homes.items():
        if name not in arrays and name not in left_out:
            left_out[name] = f"{name[:100]!r} is not in {shard}, where {index.name} has it"
    return Arrays(arrays, digests, left_out)


def digest_of(path: Path) -> str:
    """What claims and keys name a network by, in hexadecimal.

    Raises:
        UnreadableModelError: as `read_arrays`.
    """
    return arrays_digest(read_arrays(path).arrays)


def read_suspect(path: Path, entry: str | None = None) -> Arrays:
    """The same of a file from anybody, without what no layer can be.

    A tensor that holds NaN, or numbers of a kind that is not read, costs a thief four bytes, and
    nobody runs it. So it ends no reading: it is left out, and `left_out` says so. Of a checkpoint
    all tensors are read, also those beside its state dict. Integers that stand for weights are
    brought back to them (`quantised`).

    Args:
        path: file or folder.
        entry: of a file with several networks, the one whose names begin so; they are left without.

    Raises:
        UnreadableModelError: missing, corrupt, too large, hostile, or nothing of it can be used.
    """
    path = _weights_file(path)
    read = _read(path) if entry is None else _under(_read(path, whole=True), entry, path)
    found = restored(read.arrays)
    kept = {name: array for name, array in found.arrays.items() if name not in found.unknown}
    left_out = {**read.left_out, **found.unknown}
    return _with_scale(_usable(Arrays(kept, read.digests, left_out), path), path)


def _under(read: Arrays, entry: str, path: Path) -> Arrays:
    """What has names that begin so, without this beginning."""
    begin = f"{entry.rstrip('.')}."
    arrays = {n.removeprefix(begin): each for n, each in read.arrays.items() if n.startswith(begin)}
    others = {n.removeprefix(begin): why for n, why in read.left_out.items() if n.startswith(begin)}
    if not arrays and not others:
        parts = [name.split(".") for name in read.arrays]
        there = sorted(
            {".".join(each[:depth]) for each in parts for depth in (1, 2)[: len(each) - 1]}
        )
        more = f" and {len(there) - _MOST_ENTRIES} others" if len(there) > _MOST_ENTRIES else ""
        raise UnreadableModelError(
            f"{path} has nothing under {entry[:100]!r}; needed: one of "
            f"{', '.join(map(ascii, there[:_MOST_ENTRIES])) or 'none: no name has parts'}{more}"
        )
    return Arrays(arrays, read.digests, others)


def read_lazily(path: Path) -> Shards | None:
    """The same tensors in the memory of one of them, each read when it is asked for.

    None where that cannot be had: of a pickle, of ONNX, of integers that stand for weights, and of
    an adapter, which is small.

    Raises:
        UnreadableModelError: missing, corrupt, hostile, or too large even for this.
    """
    path = _weights_file(path)
    if _is_folder_s(path) and not is_index(path):
        return None
    if not is_index(path) and (path.name in ADAPTER_FILES or kind_of(path) is not Kind.SAFETENSORS):
        return None
    shards = open_shards(path)
    return None if is_quantised(shards.described()) else shards


def _checked(weights: Arrays, path: Path) -> Arrays:
    if (fault := defect(weights.arrays)) is not None:
        raise _unusable(path, fault)
    return weights


def _usable(weights: Arrays, path: Path) -> Arrays:
    """The same without the tensors that cannot be used."""
    faults = {name: fault_of(name, array) for name, array in weights.arrays.items()}
    found = {name: fault for name, fault in faults.items() if fault is not None}
    left_out = {**weights.left_out, **found}
    arrays = {name: each for name, each in weights.arrays.items() if name not in found}
    if left_out and not arrays:
        raise _unusable(path, next(iter(left_out.values())))
    if (fault := too_large(arrays)) is not None:
        raise _unusable(path, fault)
    return Arrays(arrays, weights.digests, left_out)


def _unusable(path: Path, fault: str) -> UnreadableModelError:
    return UnreadableModelError(f"{path} cannot be used: {fault}")


def _with_scale(weights: Arrays, path: Path) -> Arrays:
    """Of an adapter, B has the sign of its scale."""
    if path.name not in ADAPTER_FILES:
        return weights
    signed, digest = with_signed_scale(weights.arrays, path.parent)
    return weights._replace(arrays=signed, digests={**weights.digests, **digest})


def _weights_file(path: Path) -> Path:
    """The file itself, or the one in a folder that holds the weights."""
    if not path.is_dir():
        return path
    for name in (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", BIN_INDEX_FILE, *ADAPTER_FILES):
        if os.path.lexists(path / name):
            refuse_leaving(path, path / name)
            return path / name
    with reading(path):
        there = sorted(each for each in path.iterdir() if each.name.lower().endswith(_ENDS))
        unpacked = (path / "data.pkl").exists()
        distributed = os.path.lexists(path / METADATA)
    # Of DeepSpeed's folder: what lies beside it are the optimiser's states.
    there = [each for each in there if each.name.endswith(_DEEPSPEED)] or there
    if len(there) == 1:
        refuse_leaving(path, there[0])
        return there[0]
    if distributed:
        return path / METADATA
    if unpacked:
        raise UnreadableModelError(
            f"{path} is an archive of torch.save that was unpacked; needed: the file itself"
        )
    raise UnreadableModelError(
        f"{path} holds {len(there)} files of weights and no {WEIGHTS_FILE}; needed: "
        f"{WEIGHTS_FILE}, {INDEX_FILE}, pytorch_model.bin, {BIN_INDEX_FILE} or a single file that "
        f"ends in {', '.join(_ENDS)}, or give the file itself"
    )
