"""What a file of weights is by its first bytes, whatever it is called."""

import stat
from enum import Enum
from pathlib import Path

from nnpassport.files.disk import reading
from nnpassport.scheme import UnreadableModelError

_FIRST = 512


class Kind(Enum):
    """Forms of weights that are read."""

    SAFETENSORS = "safetensors"
    TORCH = "torch"
    ONNX = "ONNX"
    NPZ = "npz"
    GGUF = "GGUF"


_BY_NAME = {
    ".safetensors": Kind.SAFETENSORS,
    ".onnx": Kind.ONNX,
    ".npz": Kind.NPZ,
    ".gguf": Kind.GGUF,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl"), Kind.TORCH),
}
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a pointer of Git LFS, which stands for the file and does not hold it",
        "the file itself, as `git lfs pull` or the hub's download button gives it",
    ),
    (b"<", "a web page or another text with tags", "the file itself: the download was not one"),
    (b"{", "a text in JSON", "the weights that it belongs to"),
    (b"ORTM", "in onnxruntime's own format", "the ONNX file that it was made from"),
    (b"\x89HDF", "HDF5", "its weights as .npz or .safetensors"),
    (b"\x1f\x8b", "packed by gzip", "the file that is in it: unpack it first"),
    (b"7z\xbc\xaf", "packed by 7-Zip", "the file that is in it: unpack it first"),
    (b"Rar!", "packed by RAR", "the file that is in it: unpack it first"),
)


def kind_of(path: Path) -> Kind:
    """What a file of weights is by its content; ONNX, which has no mark, by its name.

    Raises:
        UnreadableModelError: it is missing, empty, or nothing that holds weights.
    """
    with reading(path):
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise UnreadableModelError(f"{path} is not a regular file; give the file itself")
        with path.open("rb") as file:
            first = file.read(_FIRST)
            size = file.seek(0, 2)
    suffix = path.suffix.lower()
    if not first:
        raise UnreadableModelError(f"{path} is empty; needed: a complete file, copy it again")
    start = first[4:] if first[4:8] == b"ORTM" else first.lstrip(b"\xef\xbb\xbf \t\r\n")
    for mark, what, needed in _OTHERS:
        if start.startswith(mark):
            raise UnreadableModelError(f"{path} is {what}; needed: {needed}")
    if first.startswith(b"GGUF"):
        return Kind.GGUF
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") < size:
        return Kind.SAFETENSORS
    if first.startswith(b"PK"):
        return Kind.NPZ if suffix == ".npz" else Kind.TORCH
    if first.startswith(b"\x80") and first[1:2] in b"\1\2\3\4\5":
        return Kind.TORCH
    if suffix in _BY_NAME:  # whose reader says what is wrong
        return _BY_NAME[suffix]
    raise UnreadableModelError(
        f"{path} is neither a folder nor a model file; needed: a folder that holds one, or a file "
        "as safetensors, torch.save, numpy.savez, ONNX or llama.cpp write it "
        f"({', '.join(_BY_NAME)})"
    )
