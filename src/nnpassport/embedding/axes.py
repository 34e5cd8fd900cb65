"""The axes of a network: traced, proved by reordering; in a model folder on noise."""

from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from nnpassport.alignment.axes import Axes
from nnpassport.alignment.table import check_table
from nnpassport.embedding.checkpoint import load_model
from nnpassport.embedding.network.outputs import Example
from nnpassport.embedding.network.prove import prove
from nnpassport.embedding.network.trace import trace
from nnpassport.files.config import ModelConfig

IMAGES = 2


def axes_of(model: nn.Module, example: Example) -> Axes:
    """The proved axes of a network whose tied parameters may part: whoever has it may untie them.

    Raises:
        UnsuitableModelError: its scores are not found among its outputs.
    """
    apart = untied(deepcopy(model))
    return prove(apart, example, trace(apart, example))


def untied(model: nn.Module) -> nn.Module:
    """The network with a module and a parameter of its own under each name, in place."""
    seen = set[int]()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in seen and any(True for _ in module.parameters()):
            home, _, own = name.rpartition(".")
            model.get_submodule(home)._modules[own] = deepcopy(module)
        seen.add(id(module))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in tied(model):
        put_tensor(model, name, parameters[name].detach().clone())
    return model


def tied(model: nn.Module) -> list[str]:
    """Names of parameters that are under another name too, but for the first of each."""
    seen, found = set[int](), []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            found.append(name)
        seen.add(id(parameter))
    return found


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Another parameter or buffer under this name, in place; its shape may be another too."""
    home, _, own = name.rpartition(".")
    module = model.get_submodule(home)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(value, requires_grad=value.is_floating_point())
    else:
        module._buffers[own] = value


def noise_for(config: ModelConfig) -> Tensor:
    """What a network for images is traced on: always the same."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, *config.input_size, generator=rng)


def axes_of_folder(folder: Path, trusted_factory: str | None = None) -> Axes:
    """The proved axes of the owner's network, as a claim can commit to them.

    Raises:
        UnreadableModelError: the folder cannot be read.
    """
    loaded = load_model(folder, trusted_factory=trusted_factory)
    found = axes_of(loaded.model, noise_for(loaded.config))
    state = loaded.model.state_dict()
    check_table(found, {name: tuple(tensor.shape) for name, tensor in state.items()})
    return found
