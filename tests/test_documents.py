"""Commands in the documents exist, with the options that they are shown with."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from nnpassport.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for folder in ("", "docs", "docs/reference", "results", "benchmarks")
    for page in sorted((ROOT / folder).glob("*.md"))
    if page.name not in {"CHANGELOG.md", "log.md"}  # what was, under the names that it had
]


def commands_of(command, path=()) -> Iterator[tuple[tuple[str, ...], set[str]]]:
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_of(inner, (*path, name))
    options = {word for each in command.params for word in (*each.opts, *each.secondary_opts)}
    yield path, {*options, "--help"}


COMMANDS = dict(commands_of(typer.main.get_command(app)))


def shown(text) -> Iterator[str]:
    """Lines of code blocks that call the program, and everything in backticks."""
    text = text.replace("\\\n", " ")
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M):
        yield from (line.split("#")[0] for line in block.splitlines() if "nnpassport " in line)
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def call(text) -> tuple[tuple[str, ...], set[str]] | None:
    """(command, options) of what calls the program, or one of its commands by name."""
    words = re.split(r"[|;>]|&&", text.partition("nnpassport ")[2] or text)[0].split()
    count = 0
    while tuple(words[: count + 1]) in COMMANDS and count < len(words):
        count += 1
    if not count:
        return None
    options = {
        re.split(r"[=.,;:)]", word)[0] for word in words[count:] if re.match("--?[a-z]", word)
    }
    return tuple(words[:count]), options


def unknown(text) -> list[str]:
    """Calls with options that their command has not."""
    calls = filter(None, map(call, shown(text)))
    return [f"{' '.join(name)}: {gone}" for name, has in calls if (gone := has - COMMANDS[name])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_documents_have_the_options_that_are_shown(page):
    assert unknown(page.read_text()) == []


def test_what_no_command_has_is_found():
    text = "`nnpassport key new --scheme answers --weight=3`, `verify --align A --twist`:\n"
    block = "```sh\nnnpassport judge a \\\n    --jury b  # --not-this\n```\n"
    assert unknown(text) == ["key new: {'--weight'}", "verify: {'--twist'}"]
    assert unknown(block) == ["judge: {'--jury'}"]


def test_the_documents_show_most_commands():
    """So that the test above reads what it is meant to."""
    calls = [call(text) for page in PAGES for text in shown(page.read_text())]
    seen = {name for name, options in filter(None, calls) if options}
    ends = {name for name in COMMANDS if name and not any(o[:-1] == name for o in COMMANDS)}
    assert len(seen & ends) > 0.8 * len(ends)
