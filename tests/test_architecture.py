"""`docs/architecture.md` names files and functions as they are."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "nnpassport"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALKS = PAGE.partition("\n## Three walks\n")[2].partition("\n## ")[0]
STEPS = re.split(r"\n(?=\d+\. )", WALKS)[1:]
QUOTED = re.compile(r"`([^`]+)`")
PLACED = re.compile(r"`([^`/]+)` \(`([\w/]+\.py)`")
"""A name, and behind it in brackets the file that it is in."""


def files():
    """All of the package, by their paths below it."""
    return {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}


@cache
def names_in(path):
    """What a module defines: functions, classes, their members, and what is assigned to."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def place_of(path):
    """The one module whose path ends so, or None."""
    ends = [each for name, each in files().items() if f"/{name}".endswith(f"/{path}")]
    return ends[0] if len(ends) == 1 else None


def wrong(quoted):
    """What is wrong with something in backquotes: a file, a name, or "module.name"; or None."""
    if quoted.endswith(".py"):
        return None if place_of(quoted) else f"{quoted} is no file, or is several"
    name = quoted.partition("(")[0]
    folder, _, last = name.rpartition("/")
    module, _, member = last.rpartition(".")
    if folder:
        place = place_of(f"{folder}/{module or last}.py")
        there = place is not None and (not module or member in names_in(place))
        return None if there else f"{quoted} is not there"
    if module and (place := place_of(f"{module}.py")):
        return None if member in names_in(place) else f"{module}.py has no {member}"
    known = {each for path in files().values() for each in names_in(path)}
    known |= {path.stem for path in files().values()}
    return None if (member or last) in known else f"there is no {quoted}"


def misplaced(step):
    """Names that are not in the file behind them."""
    found = []
    for quoted, path in PLACED.findall(step):
        name = quoted.partition("(")[0].rpartition(".")[2]
        place = place_of(path)
        if place is None or name not in names_in(place):
            found.append(f"{name} is not in {path}")
    return found


def test_there_are_three_walks_of_ten_steps():
    assert len(STEPS) == 30
    assert WALKS.count("**") == 6


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[:30])
def test_a_step_names_what_is_there_and_where_it_is(step):
    assert QUOTED.findall(step)
    assert not [fault for quoted in QUOTED.findall(step) if (fault := wrong(quoted))]
    assert not misplaced(step)


def test_files_of_the_whole_page_are_there():
    named = {each for each in QUOTED.findall(PAGE) if re.fullmatch(r"[\w/]+\.py", each)}
    named = {each for each in named if not (ROOT / each).is_file()}
    assert not [fault for each in sorted(named) if (fault := wrong(each))]


@pytest.mark.parametrize(
    "said", ["keys/nowhere.py", "unheard_of", "keys/chance.unheard_of", "verdicts.unheard_of"]
)
def test_what_is_not_there_is_found(said):
    assert wrong(said)


def test_a_name_in_another_file_is_found():
    assert misplaced("`verdict_on` (`keys/chance.py`)")
    assert not misplaced("`verdict_on(counts, key)` (`keys/counts.py`)")
