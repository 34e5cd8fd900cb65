"""Commands in the documents have the options that are shown, and programs call what there is."""

import ast
import contextlib
import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import nnpassport
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


def snippets(text) -> Iterator[ast.Module]:
    """Programs in the document; what is part of one, as a row of a table, is not."""
    for indent, block in re.findall(r"^( *)```python\n(.*?)^ *```", text, flags=re.S | re.M):
        lines = [line.removeprefix(indent) for line in block.splitlines()]
        with contextlib.suppress(SyntaxError):
            yield ast.parse("\n".join(lines))


def wrong_names(tree: ast.Module) -> Iterator[str]:
    """Names of ours that there are not, and arguments that what is called does not take."""
    known: dict[str, Any] = {"nnpassport": nnpassport}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnpassport"):
            module = importlib.import_module(node.module or "")
            for each in node.names:
                if not hasattr(module, each.name):
                    yield f"{node.module}.{each.name}"
                else:
                    known[each.asname or each.name] = getattr(module, each.name)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        root, *path = ast.unparse(node.func).split(".")
        if root not in known:
            continue
        try:
            called = functools.reduce(getattr, path, known[root])
            taken = inspect.signature(called).parameters.values()
        except AttributeError:
            yield ast.unparse(node.func)
            continue
        if not any(each.kind is each.VAR_KEYWORD for each in taken):
            given = {each.arg for each in node.keywords if each.arg}
            yield from (f"{ast.unparse(node.func)}({n}=)" for n in given - {p.name for p in taken})


PROGRAMS = [(page, tree) for page in PAGES for tree in snippets(page.read_text())]


@pytest.mark.parametrize(("page", "tree"), PROGRAMS, ids=lambda each: getattr(each, "name", ""))
def test_programs_in_the_documents_call_what_there_is(page, tree):
    assert list(wrong_names(tree)) == []


def test_a_name_and_an_argument_that_are_not_there_are_found():
    text = """- ```python
  from nnpassport import load_key, unload_key
  key = load_key("my.key", sesame=1)
  nnpassport.V2.draw(model)
  ```
"""
    (tree,) = snippets(text.replace("- ```", "  ```"))
    found = ["nnpassport.unload_key", "load_key(sesame=)", "nnpassport.V2.draw"]
    assert list(wrong_names(tree)) == found
    assert len(PROGRAMS) > 10
