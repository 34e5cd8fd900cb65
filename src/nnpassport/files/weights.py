"""Weights from anybody: checked tensors, and the digest of the very bytes they came from.

A suspect is hostile. What is read is read once, within a limit; no pickle may call anything; and
no tensor may pose as larger than what is stored, or hold NaN or Inf.
"""

import hashlib
import io
import os
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from nnpassport.embedding.pickles import archive
from nnpassport.embedding.pickles.torchfile import read_all_torch, read_torch
from nnpassport.files.adapter import ADAPTER_FILES, with_signed_scale
from nnpassport.files.disk import brief, is_text, read_once, reading, refuse_leaving
from nnpassport.files.onnx import ONNX, read_onnx
from nnpassport.files.safetensors import (
    INDEX_FILE,
    INDEX_SUFFIX,
    SUFFIX,
    Shards,
    finite_fault,
    is_index,
    open_shards,
)
from nnpassport.scheme import UnreadableModelError

WEIGHTS_FILE = "model.safetensors"
MAX_MODEL_BYTES = 16 * 2**30
MAX_PICKLE_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_MOST_TENSORS = 100_000
_MOST_AXES = 8
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_INTEGERS)


_NOTHING: Mapping[str, str] = MappingProxyType({})


class Weights(NamedTuple):
    """Checked tensors on the CPU by name, and SHA-256 (hex) of the file they came from.

    Attributes:
        left_out: of a suspect's tensors those that no layer can be, by name, and why.
    """

    tensors: dict[str, Tensor]
    digests: dict[str, str]
    left_out: Mapping[str, str] = _NOTHING


def read_weights(path: Path) -> Weights:
    """The tensors of a `.safetensors` or `.onnx` file, a torch checkpoint, or a folder with one.

    In a folder: `model.safetensors`, else the shards of `model.safetensors.index.json`, else
    `pytorch_model.bin`, else an adapter of peft's, else the only `*.pt`. Of an adapter, B has the
    sign of its scale (`adapter.with_signed_scale`). A checkpoint is a state dict, alone or under
    "state_dict" or "model". No code in it is run. What an ONNX file has under which names,
    `read_onnx` says.

    Raises:
        UnreadableModelError: missing, corrupt, too large, hostile, or NaN or Inf in a tensor.
    """
    path = _weights_file(path)
    if is_index(path):
        shards = open_shards(path, limit=MAX_MODEL_BYTES)
        if shards.left_out:
            raise _unusable(path, next(iter(shards.left_out.values())))
        return _checked(Weights(dict(shards), shards.digests()), path)
    if path.suffix.lower() == ONNX:
        return _checked(Weights(*read_onnx(path, MAX_MODEL_BYTES)), path)
    pickled = path.suffix.lower() in _PICKLES
    data = read_once(path, MAX_PICKLE_BYTES if pickled else MAX_MODEL_BYTES)
    tensors = read_torch(data, path) if pickled else _parse_safetensors(data, path)
    weights = _checked(Weights(tensors, {path.name: hashlib.sha256(data).hexdigest()}), path)
    return _with_scale(weights, path)


def read_suspect(path: Path) -> Weights:
    """The same of a file from anybody, without what no layer can be.

    A tensor that holds NaN, or numbers of a kind that is not read, costs a thief four bytes, and
    nobody runs it. So it ends no reading: it is left out, and `left_out` says so. Of a checkpoint
    all tensors are read, also those beside its state dict.

    Raises:
        UnreadableModelError: missing, corrupt, too large, hostile, or nothing of it can be used.
    """
    path = _weights_file(path)
    if is_index(path) or path.suffix.lower() == SUFFIX:
        shards = open_shards(path, limit=MAX_MODEL_BYTES)
        tensors = {name: shards.unchecked(name) for name in shards}
        return _with_scale(_usable(Weights(tensors, shards.digests(), shards.left_out), path), path)
    if path.suffix.lower() == ONNX:
        return _usable(Weights(*read_onnx(path, MAX_MODEL_BYTES)), path)
    data = read_once(path, MAX_PICKLE_BYTES)
    tensors, left_out = read_all_torch(data, path)
    digests = {path.name: hashlib.sha256(data).hexdigest()}
    return _with_scale(_usable(Weights(tensors, digests, left_out), path), path)


def read_lazily(path: Path) -> Shards | None:
    """The same tensors in the memory of one of them, each read when it is asked for.

    None where that cannot be had: of a pickle, of ONNX, and of an adapter, which is small.

    Raises:
        UnreadableModelError: missing, corrupt, hostile, or too large even for this.
    """
    path = _weights_file(path)
    kept = path.suffix.lower() == SUFFIX and path.name not in ADAPTER_FILES
    return open_shards(path) if kept or is_index(path) else None


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and Inf in any floating-point tensor.

    Raises:
        UnreadableModelError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if (fault := finite_fault(name, tensor)) is not None:
            raise UnreadableModelError(fault)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of every name, dtype, shape and (little-endian) byte.

    The order of the mapping, memory layout and device play no part. Every part is
    length-prefixed, so that no two different mappings are hashed as the same bytes.
    """
    digest = hashlib.sha256(b"nnpassport tensors v1\0")
    digest.update(struct.pack("<Q", len(tensors)))
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).view(-1, flat.element_size())
        if sys.byteorder == "big":
            raw = raw.flip(1)
        shape = struct.pack(f"<{tensor.dim()}Q", *tensor.shape)
        for part in (name.encode(), str(tensor.dtype).encode(), shape):
            digest.update(struct.pack("<Q", len(part)) + part)
        digest.update(struct.pack("<Q", raw.numel()))
        digest.update(raw.contiguous().numpy().data)
    return digest.hexdigest()


def unpickle(data: bytes, path: Path) -> Any:
    """What `torch.save` wrote for us, on the CPU, without running any code in it.

    For files of the caller's own, such as training states: a stranger's might take all the time and
    memory that there is, and is read by `read_torch`.

    Raises:
        UnreadableModelError: corrupt, a decompression bomb, or not only tensors and plain values.
    """
    try:
        if data.startswith(archive.MAGIC):
            archive.read_directory(data)
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        # PyTorch's own words end in advice to run whatever is in the file.
        reason = brief(error) if type(error) is ValueError else "PyTorch refuses it"
        raise UnreadableModelError(
            f"{path} is not a checkpoint that is safe to read ({reason}); needed: tensors "
            "and plain values as `torch.save` writes them, and nothing that runs code; "
            "a .safetensors file would work"
        ) from error


def defect(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the first tensor that cannot be used, or None."""
    faults = (_fault(name, tensor) for name, tensor in tensors.items())
    return next((fault for fault in faults if fault is not None), None) or _too_large(tensors)


def _fault(name: str, tensor: Tensor) -> str | None:
    """What is wrong with this tensor, or None."""
    if not is_text(name):
        return f"the name {name[:100]!r} is too long or holds control characters"
    if tensor.layout is not torch.strided or tensor.dtype not in _DTYPES:
        supported = ", ".join(sorted(str(dtype) for dtype in _DTYPES))
        return f"{name!r} is {tensor.layout} {tensor.dtype}; needed: one of {supported}"
    # A few stored bytes may pose as any shape (stride 0); using such a tensor would expand it.
    if tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"{name!r} of shape {tuple(tensor.shape)} does not hold all its numbers"
    if tensor.dim() > _MOST_AXES:
        return f"{name!r} has more than {_MOST_AXES} axes"
    return finite_fault(name, tensor)


def _too_large(tensors: Mapping[str, Tensor]) -> str | None:
    total = sum(tensor.nbytes for tensor in tensors.values())
    return f"its tensors exceed {MAX_MODEL_BYTES} bytes" if total > MAX_MODEL_BYTES else None


def _checked(weights: Weights, path: Path) -> Weights:
    if (fault := defect(weights.tensors)) is not None:
        raise _unusable(path, fault)
    return weights


def _usable(weights: Weights, path: Path) -> Weights:
    """The same without the tensors that cannot be used."""
    faults = {name: _fault(name, tensor) for name, tensor in weights.tensors.items()}
    found = {name: fault for name, fault in faults.items() if fault is not None}
    left_out = {**weights.left_out, **found}
    tensors = {name: each for name, each in weights.tensors.items() if name not in found}
    if left_out and not tensors:
        raise _unusable(path, next(iter(left_out.values())))
    if (fault := _too_large(tensors)) is not None:
        raise _unusable(path, fault)
    return Weights(tensors, weights.digests, left_out)


def _unusable(path: Path, fault: str) -> UnreadableModelError:
    return UnreadableModelError(f"{path} cannot be used: {fault}")


def _with_scale(weights: Weights, path: Path) -> Weights:
    """Of an adapter, B has the sign of its scale."""
    if path.name not in ADAPTER_FILES:
        return weights
    signed, digest = with_signed_scale(weights.tensors, path.parent)
    return weights._replace(tensors=signed, digests={**weights.digests, **digest})


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        if path.suffix.lower() in (SUFFIX, ONNX, *_PICKLES) or is_index(path):
            return path
        ends = ", ".join((SUFFIX, INDEX_SUFFIX, ONNX, *_PICKLES))
        raise UnreadableModelError(
            f"{path} is neither a folder nor a model file; needed: a folder that holds "
            f"{WEIGHTS_FILE} or {INDEX_FILE}, or a file that ends in {ends}"
        )
    for name in (WEIGHTS_FILE, INDEX_FILE, "pytorch_model.bin", *ADAPTER_FILES):
        if os.path.lexists(path / name):
            refuse_leaving(path, path / name)
            return path / name
    with reading(path):
        pickles = sorted(path.glob("*.pt"))
    if len(pickles) == 1:
        refuse_leaving(path, pickles[0])
        return pickles[0]
    raise UnreadableModelError(
        f"{path} holds {len(pickles)} files *.pt and no {WEIGHTS_FILE}; "
        f"needed: {WEIGHTS_FILE}, {INDEX_FILE}, pytorch_model.bin or a single *.pt, or give the "
        "file itself"
    )


def _parse_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    declared = int.from_bytes(data[:8], "little")
    if len(data) < 8 or declared > min(len(data) - 8, MAX_HEADER_BYTES):
        raise UnreadableModelError(
            f"{path} declares a header of {declared} bytes in a file of {len(data)}, but it "
            f"must lie in the file and have at most {MAX_HEADER_BYTES}; it is truncated or not a "
            "safetensors file: copy it again"
        )
    # A tensor without numbers takes forty bytes of the file, but a thousand of memory.
    if (count := data.count(b"{", 8, 8 + declared)) > _MOST_TENSORS:
        raise UnreadableModelError(
            f"{path} has a header of {count} entries, but at most {_MOST_TENSORS} tensors are "
            "read; split it"
        )
    try:
        # The library checks the rest: offsets that overlap, leave gaps or disagree with a shape.
        return dict(safetensors.torch.load(data))
    except Exception as error:
        raise UnreadableModelError(
            f"{path} is not a sound safetensors file ({brief(error)}); needed: a complete file "
            "as `safetensors` writes it; copy it again"
        ) from error
