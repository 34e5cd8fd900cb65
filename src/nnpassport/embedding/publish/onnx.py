"""Write a released network as an ONNX file that keeps the names of its weights."""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.embedding.network.layers import passport_norms
from nnpassport.embedding.network.modes import evaluated
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.tensors import read_weights
from nnpassport.files.disk import brief, make_folder, writing
from nnpassport.files.onnx import ONNX
from nnpassport.scheme import UnsuitableModelError

INLINE_BYTES = 2**30
"""A larger network keeps its numbers in `NAME.onnx.data` beside the file."""

_KEPT = ("pkg.torch.onnx.name_scopes",)
# What torch.export says of itself, and of two inputs that share an axis as they should.
_NOISE = (r".*isinstance\(treespec, LeafSpec\).*", "(?s).*The axis name: batch will not be used.*")


class Exported(NamedTuple):
    """What is in an ONNX file.

    Attributes:
        files: the file, and the one with its numbers if there is one.
        names: of the state dict, those that are in the file as they are.
        left_out: those that are not: counters of batch norms, tied weights, what the network does
            not use.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    left_out: tuple[str, ...]


def export_onnx(model: nn.Module, example: Example, path: Path) -> Exported:
    """Write `model`, in evaluation mode, as ONNX; the first axis of every input is the batch.

    Weights have the names and the values of the state dict, so that V reads the file as it reads
    the model folder: nothing is folded or transposed, which is left to whoever runs it. The file
    says nothing of the machine that wrote it. The model is left as it was.

    Raises:
        UnsuitableModelError: the model carries passports, ONNX libraries are missing, it cannot
            be exported, or a weight would not be in the file as it is; nothing is written.
        UnwritableOutputError: the file could not be written.
    """
    if norms := passport_norms(model):
        raise UnsuitableModelError(
            f"{', '.join(norms)} carry passports, which would be in the file for all to see; "
            "needed: a released network; export what `released()` or `nnpassport release` gives"
        )
    if path.suffix.lower() != ONNX:
        raise UnsuitableModelError(f"{path} does not end in {ONNX}; call it so")
    program = _program(model, _batched(example))
    for node in program.model.graph.all_nodes():
        # Stack traces name folders and quote the source.
        for name in set(node.metadata_props) - set(_KEPT):
            del node.metadata_props[name]
    outside = sum(t.numel() * t.element_size() for t in _state(model).values()) > INLINE_BYTES
    with (
        writing(path),
        make_folder(path.parent),
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder,
    ):
        staged = Path(folder) / path.name
        program.save(staged, external_data=outside)
        names = _names_in(staged, model)
        files = [path.with_name(each.name) for each in sorted(Path(folder).iterdir(), reverse=True)]
        for each in files:  # the numbers first: without them the file is of no use
            os.replace(Path(folder) / each.name, each)
    left_out = tuple(name for name in _state(model) if name not in names)
    return Exported(tuple(reversed(files)), names, left_out)


def _program(model: nn.Module, example: Example) -> Any:
    try:
        import onnx  # noqa: F401, PLC0415
        import onnxscript  # noqa: F401, PLC0415
    except ImportError as error:
        raise UnsuitableModelError(
            f"{error.name} is not installed; needed to write ONNX files: pip install "
            "nnpassport[onnx]"
        ) from error
    batch = torch.export.Dim("batch")
    named = isinstance(example, Mapping)
    parts: Any = dict(example) if isinstance(example, Mapping) else example
    shapes = _shapes(parts if named else tuple(parts), batch)
    try:
        with evaluated(model), torch.no_grad(), _quiet():
            return torch.onnx.export(
                model,
                () if named else tuple(parts),
                kwargs=parts if named else None,
                dynamic_shapes=shapes,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise UnsuitableModelError(
            f"{type(model).__name__} cannot be exported ({brief(cause)}); needed: a network that "
            "torch.export takes, with a batch of any size; try torch.export.export on it, which "
            "says more"
        ) from error


def _batched(example: Example) -> Any:
    """The inputs with two rows at least: torch.export takes an axis of length one for constant."""
    if isinstance(example, Mapping):
        return {name: _doubled(value) for name, value in example.items()}
    return tuple(map(_doubled, (example,) if isinstance(example, Tensor) else example))


def _doubled(value: Any) -> Any:
    single = isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1
    return torch.cat([value, value]) if single else value


def _shapes(parts: Any, batch: Any) -> Any:
    if isinstance(parts, dict):
        return {name: _shapes(value, batch) for name, value in parts.items()}
    if isinstance(parts, list | tuple):
        return type(parts)(_shapes(value, batch) for value in parts)
    return {0: batch} if isinstance(parts, Tensor) and parts.dim() else None


def _names_in(path: Path, model: nn.Module) -> tuple[str, ...]:
    """Names of the state dict under which the file holds the same numbers.

    Raises:
        UnsuitableModelError: it holds others, or not all weights of the layers that were used.
    """
    there = read_weights(path).tensors
    state = _state(model)
    wrong = [n for n in state if n in there and not torch.equal(there[n], state[n])]
    if wrong:
        raise UnsuitableModelError(
            f"{', '.join(wrong[:5])} would not be in the file as they are; export a plain network "
            "in its own precision"
        )
    return tuple(name for name in state if name in there)


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict().items()
    return {name: value.detach().cpu() for name, value in state if isinstance(value, Tensor)}


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("torch.onnx._internal.exporter._registration")  # of torchvision, absent
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        log.disabled = disabled
