"""Architectures by name; none of them knows that passports exist."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nnpassport.embedding.network.models.alexnet import AlexNet, alexnet
from nnpassport.embedding.network.models.resnet import ResNet, resnet18, resnet50
from nnpassport.scheme import UnsuitableModelError

__all__ = [
    "ARCHITECTURES",
    "AlexNet",
    "ResNet",
    "alexnet",
    "build",
    "import_factory",
    "resnet18",
    "resnet50",
]

ARCHITECTURES: Mapping[str, Callable[..., nn.Module]] = {
    "alexnet": alexnet,
    "resnet18": resnet18,
    "resnet50": resnet50,
}
"""What a configuration file may name. Code outside this table goes through `import_factory`."""


def build(architecture: str, **arguments: object) -> nn.Module:
    """A freshly initialised network of this table; safe on a configuration nobody has checked.

    Raises:
        ValueError: the table has no such name, or the architecture takes no such arguments.
    """
    factory = ARCHITECTURES.get(architecture) if isinstance(architecture, str) else None
    if factory is None:
        raise ValueError(
            f"architecture {architecture!r} is not in the table; there are: "
            f"{', '.join(ARCHITECTURES)}. For code of your own use import_factory"
        )
    known = inspect.signature(factory).parameters
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(
            f"{architecture} takes no argument {', '.join(map(repr, unknown))}; "
            f"it takes: {', '.join(known)}"
        )
    return factory(**arguments)


def import_factory(name: str) -> Callable[..., nn.Module]:
    """The caller's own factory, named as "package.module:factory".

    Imports and so runs that module: never for a name that came out of a suspect's files.

    Raises:
        ValueError: the name has another form, the module cannot be imported or lacks the factory.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute) or module_name.startswith("."):
        raise ValueError(f"{name!r} does not name a factory; needed: package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"module {module_name!r} of {name!r} cannot be imported ({error}); "
            "install it, or put its folder on PYTHONPATH"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ValueError(
            f"module {module_name!r} has no callable {attribute!r}; "
            "needed: a function that returns the network"
        )
    return factory


def build_from(
    architecture: str, arguments: Mapping[str, Any], trusted_factory: str | None = None
) -> nn.Module:
    """As `files.config.ModelConfig.build` says.

    Raises:
        UnsuitableModelError: the architecture is unknown, not trusted or refuses its arguments.
    """
    named = architecture in ARCHITECTURES
    if not named and architecture != trusted_factory:
        raise UnsuitableModelError(
            f"architecture {architecture!r} is not one of ours, and the caller vouched "
            f"for {trusted_factory or 'none'}; needed: one of "
            f"{', '.join(sorted(ARCHITECTURES))}, or "
            "trusted_factory='package.module:factory' if that code is your own"
        )
    try:
        if named:
            return build(architecture, **arguments)
        return import_factory(architecture)(**arguments)
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise UnsuitableModelError(
            f"{architecture!r} cannot be built from {dict(arguments)}: {error}"
        ) from error
