"""Names that are loaded when they are first asked for, so that what needs no torch loads none."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def load(where: str) -> Any:
    """The object at "package.module:NAME"."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def lazily(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package (PEP 562) whose names live elsewhere: name → module.

    Modules of the package are found as well, as they are after an import that loads them.
    """

    def attribute(name: str) -> Any:
        if name in homes:
            return load(f"{homes[name]}:{name}")
        missing = AttributeError(f"module {package!r} has no attribute {name!r}")
        if name.startswith("_"):
            raise missing
        try:
            return import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
            raise missing from None

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return attribute, names
