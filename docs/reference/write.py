"""The reference of commands, out of the commands themselves.

python docs/reference/write.py FILE
"""

import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import NamedTuple

HEAD = """# Commands

Made from the commands themselves. Each has `--help`, which says the same. Exit codes: 0 accepted or
done, 1 refused, 2 could not be checked, 3 undecided (`judge`), 130 interrupted. `--quiet` and
`--verbose` go with every command.
"""
WORDS = {Path: "PATH", str: "TEXT", int: "INTEGER", float: "NUMBER"}


class Word(NamedTuple):
    """An argument or an option of a command.

    Attributes:
        names: as it is written, `--out`, `-o`; of an argument its own name.
        value: what follows it, or "" for a switch.
        default: as it would be written, or "" where there is none to write.
    """

    names: tuple[str, ...]
    value: str
    said: str
    default: str
    required: bool
    argument: bool


def write_commands(path):
    """Write the page, with a section for each command in the order of `--help`."""
    from nnpassport.cli.app import app

    text = "\n".join([HEAD, *(line for each in commands(app) for line in section(*each))])
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def commands(app, path=""):
    """Each command's name, without the program's, and its function."""
    for each in app.registered_commands:
        name = each.name or each.callback.__name__.replace("_", "-")
        yield f"{path}{name}", each.callback
    for group in app.registered_groups:
        yield from commands(group.typer_instance, f"{path}{group.name} ")


def section(name, function):
    """The lines of one command: what it does, how it is called, every option."""
    words = list(parameters(function))
    needed = [each.names[0].upper() for each in words if each.argument]
    options = [each for each in words if each.required and not each.argument]
    needed += [f"{each.names[0]} {each.value}" for each in options]
    lines = [f"## {name}", "", inspect.cleandoc(function.__doc__ or ""), ""]
    lines += ["```text", " ".join(["nnpassport", name, *needed, "…"]), "```", ""]
    if words:
        lines += ["| Word | What it is | Default |", "| --- | --- | --- |"]
        lines += [f"| {_head(each)} | {_escaped(each.said)} | {_default(each)} |" for each in words]
        lines.append("")
    return lines


def parameters(function):
    """The words that a command takes, in their order."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        argument = type(info).__name__ == "ArgumentInfo"
        required = parameter.default is inspect.Parameter.empty
        switch = kind is bool
        yield Word(
            _names(name, info, argument=argument, switch=switch),
            "" if switch else _value(kind),
            info.help or "",
            "" if required else _shown(parameter.default),
            required,
            argument,
        )


def _names(name, info, *, argument, switch):
    if argument:
        return (name.replace("_", "-"),)
    first = (info.default,) if isinstance(info.default, str) else ()  # Annotated[…, Option("--x")]
    given = tuple(part for each in (*first, *(info.param_decls or ())) for part in each.split("/"))
    plain = name.replace("_", "-")
    return given or ((f"--{plain}", f"--no-{plain}") if switch else (f"--{plain}",))


def _value(kind):
    """The word that stands for a value; a list's option is repeated."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
    return WORDS.get(kind, "VALUE")


def _shown(value):
    return "" if value is None or value is False or value == [] else str(value)


def _head(word):
    names = ", ".join(f"`{each}`" for each in word.names)
    return f"{names} {word.value}" if word.value and not word.argument else names


def _default(word):
    if word.required:
        return "needed"
    return f"`{word.default}`" if word.default else ""


def _escaped(text):
    return re.sub(r"([|<*\[])", r"\\\1", re.sub(r"\s+", " ", text))


if __name__ == "__main__":
    write_commands(Path(sys.argv[1]))
