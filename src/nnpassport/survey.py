"""Find the layers of a network that can carry a passport, by watching it run."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nnpassport.functional import Geometry, geometry_of
from nnpassport.layers import Branch, on_branch
from nnpassport.scheme import UnsuitableModelError

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

# The paper's choice for its networks, by the name of the class. [Fan19, sect. 4]
PAPER_LAYERS: Mapping[str, tuple[str, ...]] = {
    "AlexNet": ("features.8", "features.11", "features.14"),
    "ResNet": ("layer4.*",),
}

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch, sync-batch and instance norm have no public base
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


_HOSTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class Site(NamedTuple):
    """A layer that can carry a passport.

    Attributes:
        name: dotted name of the layer, as in `named_modules`.
        norm: dotted name of the norm that its output feeds, or None: the layer stands alone.
        space: spatial shape of the layer's input; () for a Linear.
        channel_axis: where the output's channels are: 1 after a convolution, −1 after a Linear.
    """

    name: str
    layer: nn.Module
    norm: str | None
    geometry: Geometry
    space: tuple[int, ...]
    channel_axis: int


class Survey(NamedTuple):
    """The layers that can carry a passport, in the order they run, and why the others cannot."""

    sites: dict[str, Site]
    refused: dict[str, str]


def survey(model: nn.Module, example: Example) -> Survey:
    """Find the layers of `model` that can carry a passport by watching it run on `example`.

    A norm is paired with the layer whose output tensor it receives, whatever the two are called.
    The model is run in evaluation mode without gradients and left as it was.
    """
    watched = _watch(model, example)
    sites: dict[str, Site] = {}
    refused: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) and not _is_convolution(layer):
            continue
        reason = _refusal(name, layer, watched)
        if reason is not None:
            refused[name] = reason
            continue
        run = watched.layers[name][0]
        sites[name] = Site(
            name,
            layer,
            watched.pairs.get(name, [None])[0],
            geometry_of(layer),
            () if isinstance(layer, nn.Linear) else run.space,
            -1 if isinstance(layer, nn.Linear) else 1,
        )
    order = {name: i for i, name in enumerate(watched.layers)}
    return Survey(dict(sorted(sites.items(), key=lambda item: order[item[0]])), refused)


def choose(model: nn.Module, found: Survey, patterns: Sequence[str] | None = None) -> list[Site]:
    """The sites that `patterns` name, in the order they run.

    A pattern is a layer's dotted name, a prefix of it, or has wildcards: "features.8", "layer4",
    "layer4.*". None is the paper's choice for its networks, else the last third of all sites.

    Raises:
        UnsuitableModelError: a pattern names no suitable layer, or the model has none.
    """
    names = list(found.sites)
    if not names:
        raise UnsuitableModelError(
            f"{type(model).__name__} has no layer that can carry a passport; needed: a Conv1d, "
            f"Conv2d, Conv3d or Linear before the last layer{_because(found.refused)}"
        )
    if patterns is not None and not patterns:
        raise UnsuitableModelError(
            "no layer was named, and a passport needs at least one; suitable layers of this "
            f"model: {', '.join(names)}"
        )
    if patterns is None:
        patterns = PAPER_LAYERS.get(type(model).__name__, ())
        if not all(any(_matches(n, p) for n in names) for p in patterns) or not patterns:
            return list(found.sites.values())[-max(1, len(names) // 3) :]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            refused = {n: r for n, r in found.refused.items() if _matches(n, pattern)}
            raise UnsuitableModelError(
                f"layer {pattern!r} cannot carry a passport"
                f"{_because(refused) or ': no layer of that name ran'}; "
                f"suitable layers of this model: {', '.join(names)}"
            )
    return [s for s in found.sites.values() if any(_matches(s.name, p) for p in patterns)]


def call(model: nn.Module, example: Example) -> Any:
    """The network's output on a tensor, on positional or on named inputs."""
    if isinstance(example, Tensor):
        return model(example)
    return model(**example) if isinstance(example, Mapping) else model(*example)


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in a network's output, whatever it is made of, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    parts = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(parts, list | tuple):
        return [tensor for part in parts for tensor in tensors_in(part)]
    return []


class _Run(NamedTuple):
    output: Tensor
    version: int
    space: tuple[int, ...]


class _Watched(NamedTuple):
    layers: dict[str, list[_Run]]  # every call of every layer, in order of the first
    pairs: dict[str, list[str]]  # layer -> the norms that receive its output
    norms: dict[str, list[nn.Module]]  # norm -> itself, once for every time that it ran
    named: set[str]  # layers and norms that were called with named arguments
    output: Any


def _watch(model: nn.Module, example: Example) -> _Watched:
    watched = _Watched({}, {}, {}, set(), None)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _NORMS):
            hook = _before_norm(name, watched)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif isinstance(module, nn.Linear) or _is_convolution(module):
            hook = _after_layer(name, watched)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.no_grad(), on_branch(model, Branch.PUBLIC):
            output = call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return watched._replace(output=output)


def _after_layer(name: str, watched: _Watched) -> Callable[..., None]:
    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        x = _received(name, args, kwargs, watched)
        run = _Run(output, output._version, tuple(x.shape[2:]))
        watched.layers.setdefault(name, []).append(run)

    return hook


def _before_norm(name: str, watched: _Watched) -> Callable[..., None]:
    def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = _received(name, args, kwargs, watched)
        watched.norms.setdefault(name, []).append(norm)
        for layer, runs in watched.layers.items():
            # The version tells conv → norm from conv → relu(inplace) → norm, where the tensor
            # object is the same and its content is not.
            if any(r.output is x and r.version == x._version for r in runs):
                watched.pairs.setdefault(layer, []).append(name)

    return hook


def _received(
    name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], watched: _Watched
) -> Tensor:
    if kwargs:
        watched.named.add(name)
    return next(iter((*args, *kwargs.values())))


def _refusal(name: str, layer: nn.Module, watched: _Watched) -> str | None:
    """Why a layer cannot carry a passport, or None if it can."""
    runs = watched.layers.get(name, [])
    norms = watched.pairs.get(name, [])
    own = any(run.output is tensor for run in runs for tensor in tensors_in(watched.output))
    again = max((len(watched.norms[norm]) for norm in norms), default=1)
    stray = [n for n in norms if not _over_channels(watched.norms[n][0], layer, runs[0].output)]
    reasons = {
        f"{type(layer).__name__} has no passport function": not isinstance(layer, _HOSTS),
        "its weight is computed (a parametrization, or pruning)": "weight" not in layer._parameters,
        "it did not run": not runs,
        f"it ran {len(runs)} times in one forward": len(runs) > 1,
        "its output is the network's own": own,
        # A log-softmax or a squeeze may follow: then the output is another tensor.
        "it is the last layer to run": not norms and name == next(reversed(watched.layers), None),
        f"its output feeds {len(norms)} norms: {', '.join(norms)}": len(norms) > 1,
        f"its norm ran {again} times in one forward": again > 1,
        f"its norm {', '.join(stray)} is over other axes than the layer's channels": bool(stray),
        "it or its norm is called with named arguments": bool({name, *norms} & watched.named),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _over_channels(norm: nn.Module, layer: nn.Module, output: Tensor) -> bool:
    """Whether the norm's weight and bias are one each for every channel of the layer."""
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        return isinstance(layer, nn.Linear) and tuple(norm.normalized_shape) == output.shape[-1:]
    return not isinstance(layer, nn.Linear) or output.dim() == 2


def _is_convolution(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _because(refused: Mapping[str, str]) -> str:
    return "".join(f"; {name}: {reason}" for name, reason in list(refused.items())[:5])
