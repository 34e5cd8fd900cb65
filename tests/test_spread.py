"""Options made from dataclasses: as many as fields, and as they were before."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from nnpassport.cli.app import app
from nnpassport.cli.spread import spread

BEFORE = json.loads((Path(__file__).parent / "options-0.2.json").read_text())


@dataclass(frozen=True)
class Inner:
    depth: Annotated[int, typer.Option(help="How deep.")] = 2


@dataclass(frozen=True)
class Outer:
    name: Annotated[str, typer.Option("--called")]
    inner: Inner = Inner(7)
    loud: bool = False


SOFT = Inner(5)


class Command(NamedTuple):
    app: typer.Typer
    said: list


@pytest.fixture
def command():
    said, made = [], typer.Typer()

    @made.command()
    @spread
    def speak(*, first: Annotated[str, typer.Argument()], outer: Outer, times: int = 1) -> None:
        """Say it."""
        said.append((first, outer, times))

    @made.command()
    @spread
    def hum(inner: Inner = SOFT) -> None:
        """Hum it."""
        said.append(inner)

    return Command(made, said)


def test_fields_are_options_and_come_as_one_object(command):
    done = CliRunner().invoke(command.app, ["speak", "a", "--called", "b", "--depth", "3"])
    assert done.exit_code == 0, done.output
    assert command.said == [("a", Outer("b", Inner(3)), 1)]


def test_a_default_of_the_command_goes_before_those_of_the_fields(command):
    assert CliRunner().invoke(command.app, ["hum"]).exit_code == 0
    assert CliRunner().invoke(command.app, ["speak", "a", "--called", "b"]).exit_code == 0
    assert command.said == [Inner(5), ("a", Outer("b", Inner(7)), 1)]


def test_a_field_without_default_is_asked_for(command):
    done = CliRunner().invoke(command.app, ["speak", "a"])
    assert done.exit_code == 2
    assert "--called" in done.output


def options(command, path=""):
    yield path, {"/".join(each.opts): each for each in command.params}
    for name, inner in getattr(command, "commands", {}).items():
        yield from options(inner, f"{path} {name}".strip())


def test_no_option_of_this_version_is_lost_or_has_another_default():
    now = dict(options(typer.main.get_command(app)))
    for command, known in BEFORE.items():
        there = now[command if command != "nnpassport" else ""]
        assert not known.keys() - there.keys(), command
        for name, told in known.items():
            default = there[name].default
            said = str(default) if isinstance(default, Path) else default
            if there[name].required or said is Ellipsis:
                said = None
            assert (said, there[name].required) == (told["default"], told["required"]), name
