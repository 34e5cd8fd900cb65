"""The lower bounds of `pyproject.toml` are the releases that `make lowest` installs."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = {  # they look at the code, or build what is around it: always the newest
    *("mypy", "ruff", "build", "twine", "check-jsonschema", "sphinx", "myst-parser", "furo"),
    "cyclonedx-python-lib",
    *("nbclient", "nbformat", "ipykernel"),
}


def bounds(requirements):
    """By name, the lowest release that each direct dependency may have; extras are followed."""
    found = {}
    for text in requirements:
        each = Requirement(text)
        if each.name == "nnpassport":
            for extra in each.extras:
                found |= bounds(PROJECT["optional-dependencies"][extra])
            continue
        (least,) = each.specifier
        assert least.operator == ">=", f"{text}: a lower bound and nothing else"
        found[canonicalize_name(each.name)] = Version(least.version)
    return found


def pinned(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {canonicalize_name(pair[1]): Version(pair[2]) for pair in pairs if pair}


def test_the_lowest_releases_are_those_that_pyproject_allows():
    wanted = bounds([*PROJECT["dependencies"], "nnpassport[dev]"])
    lowest = pinned("constraints-lowest.txt")
    assert lowest.pop("torch") == pinned("constraints.txt")["torch"] >= wanted.pop("torch")
    assert lowest == {name: least for name, least in wanted.items() if name not in TOOLS}
