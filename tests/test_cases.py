"""The tables of what is read are of tests that there are, and the page has them."""

import ast
import re
from pathlib import Path

import pytest
from cases import PAGE, TABLES, render

from nnpassport.files.disk import brief
from nnpassport.scheme import OwnershipError

ROWS = [row for rows in TABLES.values() for row in rows]
SOURCES = Path(__file__).parent.parent / "src" / "nnpassport"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.test)
def test_each_row_is_a_test(row):
    tree = ast.parse((Path(__file__).parent / f"test_{row.file}.py").read_text(encoding="utf-8"))
    assert row.test in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_the_page_has_them():
    assert PAGE.read_text(encoding="utf-8").endswith(render())


def messages():
    """Every text that the sources have in an error, f-strings with ‹› for what is filled in."""
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                continue
            for argument in node.exc.args:
                if isinstance(argument, ast.JoinedStr):
                    parts = (getattr(each, "value", None) for each in argument.values)
                    text = "".join(each if isinstance(each, str) else "‹›" for each in parts)
                    yield path.relative_to(SOURCES), text
                elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield path.relative_to(SOURCES), argument.value


def options():
    """Names of every option of the command line, by its sources."""
    text = "\n".join(each.read_text(encoding="utf-8") for each in (SOURCES / "cli").glob("*.py"))
    named = set(re.findall(r'"(--[a-z][a-z-]+)[/"]', text))
    arguments = re.findall(r"^    ([a-z_]+): ", text, re.MULTILINE)
    return named | {f"--{name.replace('_', '-')}" for name in arguments}


def test_no_message_names_an_option_that_there_is_not():
    of_others = {"--help", "--no-compile", "--fsdp"}  # accelerate's --fsdp_version
    there = options() | of_others
    found = [
        (str(path), option)
        for path, text in messages()
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)
        if option not in there
    ]
    assert not found


def test_no_message_advises_to_load_unsafely():
    said = [
        text for _, text in messages() if "weights_only=False" in text or "trust_remote" in text
    ]
    assert not said


def test_no_message_of_ours_is_cut_and_one_of_others_says_that_it_is():
    long = "x" * 400 + "; needed: y"
    assert brief(OwnershipError(long)) == long
    assert brief(ValueError(long)) == "x" * 300 + "…"
    assert brief(ValueError("short")) == "short"
