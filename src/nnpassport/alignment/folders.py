"""Networks of model folders whose channels are known by the names and shapes of their tensors.

Nothing is built: a config says which of the two kinds it is and which norms stand between the
layers, and the tensors say the rest.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnpassport.alignment.channels import Channels, Network, Norm, chain, mismatch, residual
from nnpassport.files.arrays import Array, is_floating
from nnpassport.files.config import ModelConfig
from nnpassport.files.folder import read_folder
from nnpassport.scheme import UnreadableModelError

_EPS = 1e-5
_PER_GROUP = 16
_LAYERS: Mapping[tuple[str, object], int] = {
    ("alexnet", "cifar"): 6,
    ("alexnet", "imagenet"): 8,
    **{("resnet18", stem): 21 for stem in ("cifar", "imagenet")},
    **{("resnet50", stem): 54 for stem in ("cifar", "imagenet")},
}
"""How many layers there are, by architecture and stem."""

_TENSORS: Mapping[str, tuple[str, ...]] = {
    "batch": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
    **dict.fromkeys(("group", "layer", "instance"), ("weight", "bias")),
    "none": (),
}
"""What a norm of each kind has."""

_HEADS = ("classifier", "fc")
_CONV = np.zeros((0,) * 4)

_KNOWN = {architecture for architecture, _ in _LAYERS}


class Known(NamedTuple):
    """The network of a model folder, its config, and SHA-256 (hex) of each file, by name."""

    network: Network
    config: ModelConfig
    digests: dict[str, str]


def network_in(folder: Path) -> Known | None:
    """The network in a model folder; None of one whose channels are not known.

    Raises:
        UnreadableModelError: a file is missing, corrupt, hostile or of another architecture, or
            the weights are not those that the config was saved with.
    """
    read = read_folder(folder)
    if read.config.architecture not in _KNOWN:
        return None
    network = _network(read.config, read.weights.arrays)
    if isinstance(network, str):
        raise UnreadableModelError(
            f"{folder} does not fit {read.config.architecture!r} with "
            f"{dict(read.config.arguments)}: {network}; needed: exactly its tensors; give the "
            "config of the architecture that these weights were made for"
        )
    return Known(network, read.config, read.digests)


def _network(config: ModelConfig, tensors: Mapping[str, Array]) -> Network | str:
    """These tensors as such a network, in float32; or what does not fit."""
    norm = str(config.arguments.get("norm", "batch"))
    wanted = _LAYERS.get((config.architecture, config.arguments.get("stem", "cifar")))
    if wanted is None or norm not in _TENSORS:
        return "no such network is known"
    weights = {n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith(".weight")}
    layers = sorted((name for name, each in weights.items() if each.ndim > 1), key=_place)
    norms = {name: len(each) for name, each in weights.items() if each.ndim == 1}
    if len(layers) != wanted:
        return f"{len(layers)} layers are there, and it has {wanted}"
    if config.architecture == "alexnet":
        axes = chain(layers, {n: after for n in layers if (after := _after(n)) in norms})
    else:
        axes = residual(layers, lambda name: name if name in norms else None)
    fault = _strange(tensors, axes, norm) or _misshapen(tensors, norm) or mismatch(tensors, axes)
    if fault is not None:
        return fault
    arrays = {n: t.astype(np.float32) if is_floating(t) else t for n, t in tensors.items()}
    return Network(arrays, axes, {name: _norm(norm, size) for name, size in norms.items()})


def _strange(tensors: Mapping[str, Array], axes: Sequence[Channels], norm: str) -> str | None:
    """Which tensors are missing, or have no place in such a network."""
    producers = {each for axis in axes for each in axis.producers}
    layers = {each.layer for each in producers} | {name for axis in axes for name in axis.consumers}
    names = {f"{layer}.weight" for layer in layers}
    flat = {layer for layer in layers if tensors.get(f"{layer}.weight", _CONV).ndim == 2}
    names |= {f"{layer}.bias" for layer in (layers if norm == "none" else flat)}
    for producer in (each for each in producers if each.layer not in flat and norm != "none"):
        names |= {f"{producer.norm}.{own}" for own in _TENSORS[norm]}
    strange = sorted(names ^ tensors.keys())
    if not strange:
        return None
    return f"{len(strange)} missing or unexpected: {', '.join(n[:100] for n in strange[:5])}"


def _misshapen(tensors: Mapping[str, Array], norm: str) -> str | None:
    """Which tensor is of no kind that a layer or norm has, if one is not."""
    for name, each in tensors.items():
        counter = name.endswith("num_batches_tracked")
        axes = (2, 4) if name.endswith(".weight") and each.ndim > 1 else (0 if counter else 1,)
        grouped = name.endswith(".weight") and each.ndim == 1 and norm == "group"
        odd = grouped and each.size % _PER_GROUP
        if each.ndim not in axes or is_floating(each) == counter or not each.size or odd:
            return f"{name} is {each.shape} {each.dtype}"
    return None


def _norm(kind: str, channels: int) -> Norm:
    groups = {"group": max(1, channels // _PER_GROUP), "layer": 1}
    return Norm(_EPS, kind == "batch", groups.get(kind, 0))


def _after(layer: str) -> str:
    """The name of what runs next, where parts are numbered."""
    home, _, number = layer.rpartition(".")
    return f"{home}.{int(number) + 1}" if number.isdecimal() else ""


def _place(layer: str) -> tuple[bool, list[tuple[int, str]]]:
    """Where a layer runs: by numbers, heads last."""
    parts = [(int(p), "") if p.isdecimal() else (0, p) for p in re.split(r"(\d+)", layer)]
    return layer.startswith(_HEADS), parts
