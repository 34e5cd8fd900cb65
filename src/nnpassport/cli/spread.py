"""Commands whose options are the fields of dataclasses: declared once, and given as one object."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import Parameter
from typing import Any


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command for Typer, with an option for each field of its parameters that are dataclasses.

    A field is annotated as an option is, and has its default. A parameter of such a type may have a
    default of its own: an object whose values are the options' defaults.
    """
    given = inspect.signature(command).parameters
    groups = {name: each for name, each in given.items() if _is_group(each.annotation)}
    options = [option for name, each in given.items() for option in _options(name, each)]

    @wraps(command)
    def run(**values: Any) -> None:
        made = {name: _made(each.annotation, values) for name, each in groups.items()}
        command(**values, **made)

    described: Any = run
    described.__signature__ = inspect.Signature(options)
    described.__annotations__ = {each.name: each.annotation for each in options}
    return run


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _options(name: str, parameter: Parameter) -> Iterator[Parameter]:
    kind, default = parameter.annotation, parameter.default
    if not _is_group(kind):
        yield Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        return
    for field in dataclasses.fields(kind):
        value = field.default if default is Parameter.empty else getattr(default, field.name)
        usual = Parameter.empty if value is dataclasses.MISSING else value
        inner = Parameter(field.name, Parameter.KEYWORD_ONLY, annotation=field.type, default=usual)
        yield from _options(field.name, inner)


def _made(kind: Any, values: dict[str, Any]) -> Any:
    """An object of these values, which are taken out."""
    return kind(
        **{
            field.name: _made(field.type, values)
            if _is_group(field.type)
            else values.pop(field.name)
            for field in dataclasses.fields(kind)
        }
    )
