"""Model folders: `model.safetensors` and `config.json`, written whole or not at all, read warily.

A suspect is hostile: `files`, `config` and `weights` read it, and here the network is put together.
A `config.json` names one of our architectures and can never make Python import something. Only
the caller can vouch for a factory (`trusted_factory`).
"""

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, final

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nnpassport.alignment.unfold import state_from, without_strangers
from nnpassport.data.imageset import Normalisation
from nnpassport.embedding.network import models
from nnpassport.embedding.network.channels import frame_of
from nnpassport.embedding.network.tensors import as_tensor, defect, require_finite, unpickle
from nnpassport.files.arrays import Array, is_floating
from nnpassport.files.config import CONFIG_FILE, ModelConfig, config_bytes, read_config_file
from nnpassport.files.disk import (
    brief,
    locked,
    make_folder,
    read_once,
    refuse_leaving,
    staged,
    sync_folder,
    write_atomically,
    writing,
)
from nnpassport.files.folder import pending, read_folder
from nnpassport.files.onnx import ONNX
from nnpassport.files.suspect import Suspect
from nnpassport.files.weights import MAX_PICKLE_BYTES, WEIGHTS_FILE, without_prefixes
from nnpassport.scheme import (
    OwnershipError,
    UnreadableModelError,
    UnsuitableModelError,
    UnwritableOutputError,
)


class Loaded(NamedTuple):
    """A network in evaluation mode, its config, and SHA-256 (hex) of each file read, by name."""

    model: nn.Module
    config: ModelConfig
    digests: dict[str, str]

    @property
    def normalise(self) -> Normalisation:
        """What turns pixels into the numbers that it takes."""
        return Normalisation(self.config.mean, self.config.std)


def save_model(folder: Path, model: nn.Module, config: ModelConfig) -> None:
    """Write `model.safetensors` and `config.json`; both are replaced, or neither is.

    Only the state dict is written, so a non-persistent buffer (a passport) never is. Equal content
    gives equal bytes. The config names the SHA-256 of the weights, so that a process that is killed
    in the middle leaves the old network or the new one, and never something of both.

    Raises:
        UnsuitableModelError: the state holds something that could not be read back.
        UnwritableOutputError: disk full, read-only, not a folder, …; the folder is as it was.
    """
    tensors = {}
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            raise UnsuitableModelError(
                f"state {name!r} is {type(value).__name__}, but a model file holds tensors only; "
                "keep extra state out of the state dict"
            )
        # clone: safetensors refuses tensors that share memory, as tied weights do
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if (fault := defect(tensors)) is not None:
        raise UnsuitableModelError(f"model cannot be saved: {fault}")
    weights = safetensors.torch.save(tensors, metadata={"format": "pt"})
    digest = hashlib.sha256(weights).hexdigest()
    with writing(folder), make_folder(folder):
        _replace_both(folder, config_bytes(config, weights=digest), weights, pending(digest))


def load_model(folder: Path, *, trusted_factory: str | None = None) -> Loaded:
    """The network in a model folder, in evaluation mode and in its architecture's own dtype.

    `trusted_factory` is the caller's own "package.module:factory"; see `ModelConfig.build`.

    Raises:
        UnreadableModelError: a file is missing, corrupt, hostile or of another architecture, or
            the weights are not those that the config was saved with.
    """
    read = read_folder(folder)
    model = _assemble(read.weights.arrays, read.config, trusted_factory, folder, _all_of)
    return Loaded(model, read.config, read.digests)


def load_suspect(
    suspect: Suspect | Path,
    reference: ModelConfig | None = None,
    *,
    trusted_factory: str | None = None,
) -> Loaded:
    """The network of a folder or file that somebody else made.

    `reference`, the owner's, says how it is read: it is built as that if its weights fit, and takes
    what that takes. Only if they do not fit is it built as the folder's own `config.json` says, if
    that names an architecture of ours, and even then images become numbers as `reference` has it.
    Without a `reference` there is nothing but the suspect's own word. The config returned says
    which. `trusted_factory` vouches for the reference's factory only.

    Raises:
        UnreadableModelError: the file is missing, corrupt or hostile, or does not fit.
    """
    suspect = Suspect.of(suspect)
    path, weights = suspect.path, suspect.arrays
    if reference is None:
        own, digests = _own_config(path)
        if own is None:
            raise UnreadableModelError(
                f"{path} does not say which architecture it is; needed: a {CONFIG_FILE} that names "
                f"one of {', '.join(sorted(models.ARCHITECTURES))}, or the owner's config (--like "
                "FOLDER)"
            )
        model = _assemble(weights.arrays, own, None, path, _unfolded)
        return Loaded(model, own, {**digests, **weights.digests})
    own, digests = _stated(path)
    try:
        model = _assemble(weights.arrays, reference, trusted_factory, path, _unfolded)
        return Loaded(model, reference, {**digests, **weights.digests})
    except UnreadableModelError:
        if own is None:
            raise
    facts = replace(reference, architecture=own.architecture, arguments=own.arguments)
    model = _assemble(weights.arrays, facts, None, path, _unfolded)
    return Loaded(model, facts, {**digests, **weights.digests})


def own_config(path: Path) -> ModelConfig | None:
    """What a suspect says about itself, if it is one of our architectures and can be read at all.

    It is the suspect's word: nothing that is known otherwise is to be taken from it.
    """
    return _stated(path)[0]


def _own_config(path: Path) -> tuple[ModelConfig | None, dict[str, str]]:
    """The folder's config, if it has one of an architecture of ours, and its digest.

    Raises:
        UnreadableModelError: it has one that cannot be read.
    """
    if not os.path.lexists(path / CONFIG_FILE):
        return None, {}
    refuse_leaving(path, path / CONFIG_FILE)
    # Which weights it says it belongs to is not asked: a thief might say anything.
    own, digest, _ = read_config_file(path / CONFIG_FILE)
    return own if own.architecture in models.ARCHITECTURES else None, {CONFIG_FILE: digest}


def _stated(path: Path) -> tuple[ModelConfig | None, dict[str, str]]:
    """The same; one that cannot be read says nothing: who is not asked cannot hinder."""
    try:
        return _own_config(path)
    except UnreadableModelError:
        return None, {}


def save_training(path: Path, state: Mapping[str, Any]) -> None:
    """Write what resuming needs (tensors and plain values), whole or not at all.

    Raises:
        UnwritableOutputError: not writable, or the state holds what could not be loaded again.
    """
    buffer = io.BytesIO()
    try:
        torch.save(dict(state), buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True, map_location="cpu")
    except Exception as error:
        raise UnwritableOutputError(
            f"training state for {path} holds what cannot be loaded again ({brief(error)}); "
            "needed: tensors, numbers, texts, lists and dicts of them; convert the rest to these"
        ) from error
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def load_training(path: Path) -> dict[str, Any]:
    """What `save_training` wrote, with every tensor on the CPU.

    Raises:
        UnreadableModelError: missing, corrupt, or not a training state.
    """
    try:
        state = unpickle(read_once(path, MAX_PICKLE_BYTES), path)
    except UnreadableModelError as error:
        raise UnreadableModelError(
            f"{error}; resume from an older training state, or remove this one to start again"
        ) from error
    if not isinstance(state, dict):
        raise UnreadableModelError(
            f"{path} holds {type(state).__name__}, but a training state is a dict; "
            "give the file that an interrupted training left"
        )
    return state


_Chosen = Callable[[Mapping[str, Array], nn.Module], dict[str, Array]]
"""Which of a file's tensors have to fit a network."""


def _all_of(arrays: Mapping[str, Array], model: nn.Module) -> dict[str, Array]:
    """Of a network of one's own: one that differs is another file than was meant."""
    return dict(arrays)


def _unfolded(arrays: Mapping[str, Array], model: nn.Module) -> dict[str, Array]:
    """Of a stranger's: what is no part of the network is left out, and folded norms are undone."""
    frame = frame_of(model)
    there = without_strangers(arrays, frame)
    if there.keys() >= frame.names:
        return there
    state = state_from(there, frame)
    moved = {id(array) for name, array in state.items() if name not in there}
    strange = {n: a for n, a in there.items() if n not in frame.names and id(a) not in moved}
    return state | strange


def _assemble(
    arrays: dict[str, Array],
    config: ModelConfig,
    trusted_factory: str | None,
    path: Path,
    chosen: _Chosen,
) -> nn.Module:
    try:
        # fork_rng: reading a file must not change what the caller draws next
        with torch.random.fork_rng(devices=[]):
            if config.architecture in models.ARCHITECTURES:
                # Shapes only and first, so that a config cannot exhaust the memory.
                with torch.device("meta"), _WithoutDrawing():
                    skeleton = config.build()
                _fit(arrays, skeleton, config, path, chosen)
            model = config.build(trusted_factory=trusted_factory)
    except UnreadableModelError:
        raise
    except (OwnershipError, RuntimeError, ArithmeticError) as error:
        raise UnreadableModelError(f"{path} cannot be built: {brief(error)}") from error
    fitting = _fit(arrays, model, config, path, chosen)
    model.load_state_dict({name: as_tensor(array) for name, array in fitting.items()})
    # A finite float64 may be infinite in the model's own dtype.
    require_finite(model.state_dict())
    return model.eval()


@final
class _WithoutDrawing(TorchFunctionMode):
    """Leaves random initial values out: on the meta device they cost two seconds of imports."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in {"kaiming_uniform_", "normal_", "uniform_"}:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _fit(
    arrays: dict[str, Array], model: nn.Module, config: ModelConfig, path: Path, chosen: _Chosen
) -> dict[str, Array]:
    """The tensors under the model's own names, once every one is known to fit."""
    wanted = {n: _kind(t.shape, t.is_floating_point()) for n, t in model.state_dict().items()}
    names = without_prefixes(arrays, wanted)
    arrays = chosen({new: arrays[old] for new, old in names.items()}, model)
    if path.suffix.lower() == ONNX:
        arrays = state_from(arrays, frame_of(model))
    there = {name: _kind(array.shape, is_floating(array)) for name, array in arrays.items()}
    faults = {
        "missing": [name for name in wanted if name not in there],
        "unexpected": [repr(name[:100]) for name in there if name not in wanted],
        "of another shape": [
            f"{name} {there[name]} instead of {kind}"
            for name, kind in wanted.items()
            if there.get(name, kind) != kind
        ],
    }
    if any(faults.values()):
        lists = "; ".join(
            f"{len(names)} {fault}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
            for fault, names in faults.items()
            if names
        )
        raise UnreadableModelError(
            f"{path} does not fit {config.architecture!r} with {dict(config.arguments)}: {lists}; "
            f"needed: exactly its {len(wanted)} tensors; give the config of the architecture "
            "that these weights were made for"
        )
    return arrays


def _kind(shape: Sequence[int], floating: bool) -> str:
    # Any float may stand for any float (half precision is common), but no integer for a float.
    return f"{tuple(shape)}{'' if floating else ' integer'}"


def _replace_both(folder: Path, new_config: bytes, new_weights: bytes, name: str) -> None:
    config, weights, waiting = folder / CONFIG_FILE, folder / WEIGHTS_FILE, folder / name
    with staged(config, new_config) as one, staged(weights, new_weights) as other, locked(folder):
        # The old config is copied before anything is touched: undoing then needs no space.
        old = config.read_bytes() if config.exists() else None
        with staged(config, old or b"") as old_config:
            os.replace(other, waiting)
            try:
                sync_folder(folder)
                os.replace(one, config)  # from here on the folder is the new network
                try:
                    os.replace(waiting, weights)
                except BaseException:
                    if old is None:
                        config.unlink()
                    else:
                        os.replace(old_config, config)
                    raise
            except BaseException:
                waiting.unlink(missing_ok=True)
                raise
        for left in folder.glob(pending("?" * 16)):  # by a save that was killed
            left.unlink(missing_ok=True)
        sync_folder(folder)
