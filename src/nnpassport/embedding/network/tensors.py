"""Weights as torch has them: from arrays of files, and back, in the same memory where it can be."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from nnpassport.files import weights
from nnpassport.files.arrays import BFLOAT16, DTYPES, Array, arrays_digest, finite_fault
from nnpassport.files.arrays import defect as defect_of
from nnpassport.files.disk import brief
from nnpassport.files.pickles import archive
from nnpassport.scheme import UnreadableModelError

_PLAIN = {dtype: getattr(torch, name) for name, dtype in DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16}
_AS_BITS = {1: np.uint8, 2: np.int16}


Weights = weights.Weights[Tensor]
"""What a file holds, as tensors on the CPU."""


def read_weights(path: Path) -> Weights:
    """What `files.weights.read_arrays` reads, as tensors.

    Raises:
        UnreadableModelError: missing, corrupt, too large, hostile, or NaN or Inf in a tensor.
    """
    return as_tensors(weights.read_arrays(path))


def as_tensors(found: weights.Arrays) -> Weights:
    """The same numbers as tensors, in the same memory."""
    tensors = {name: as_tensor(array) for name, array in found.arrays.items()}
    return Weights(tensors, found.digests, found.left_out)


def as_tensor(array: Array) -> Tensor:
    """The same numbers as a tensor, in the same memory."""
    if array.dtype.kind in "fiubc" and array.dtype not in (BFLOAT16,):
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(_AS_BITS[array.dtype.itemsize])).view(_PLAIN[array.dtype])


def as_array(tensor: Tensor) -> Array:
    """The same numbers as an array, in the same memory if that is the processor's."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(plain.dtype).removeprefix("torch.")
    if name.startswith(("bfloat", "float8")):
        return plain.contiguous().view(_BITS[plain.element_size()]).numpy().view(DTYPES[name])
    return plain.numpy()


@final
class ArraysOf(Mapping[str, Array]):
    """Tensors as the arrays that readers take, each converted when it is asked for."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array:
        found = self._tensors[name]
        return as_array(found) if isinstance(found, Tensor) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and Inf in any floating-point tensor.

    Raises:
        UnreadableModelError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if (fault := finite_fault(name, as_array(tensor))) is not None:
            raise UnreadableModelError(fault)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """`files.arrays.arrays_digest` of these tensors; where they lie plays no part."""
    return arrays_digest({name: as_array(tensor) for name, tensor in tensors.items()})


def defect(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the first tensor that cannot be used, or None."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or _named(tensor) not in DTYPES:
            return (
                f"{name!r} is {tensor.layout} {tensor.dtype}; needed: a dense one of plain numbers"
            )
        if tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
            return f"{name!r} of shape {tuple(tensor.shape)} does not hold all its numbers"
    return defect_of({name: as_array(tensor) for name, tensor in tensors.items()})


def _named(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def unpickle(data: bytes, path: Path) -> Any:
    """What `torch.save` wrote for us, on the CPU, without running any code in it.

    For files of the caller's own, such as training states: a stranger's might take all the time and
    memory that there is, and is read by `files.pickles`.

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
