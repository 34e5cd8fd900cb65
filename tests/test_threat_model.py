"""The threat model promises nothing that no test shows."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(test_\w+)`")


def promises():
    """The rows of the table of promises: what is promised, and the tests that show it."""
    section = PAGE.split("## What is promised\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    cells = [row.strip("| ").rsplit(" | ", 1) for row in rows]
    return {promise: NAMED.findall(tests) for promise, tests in cells}


@functools.cache
def existing_tests():
    """Names of all test functions in this folder, as pytest finds them."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.glob("tests/test_*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_there():
    assert len(promises()) >= 20
    assert all(promise for promise in promises())


@pytest.mark.parametrize("promise", promises())
def test_every_promise_names_tests_that_exist(promise):
    named = promises()[promise]
    assert named, "no test is named"
    assert set(named) <= existing_tests()


def test_every_test_that_the_page_names_exists():
    assert set(NAMED.findall(PAGE)) <= existing_tests()


def test_every_file_that_the_page_names_exists():
    for name in re.findall(r"\]\((\S+?)\)", PAGE):
        assert (ROOT / "docs" / name).is_file()
