"""Who may import whom: floors, one above the other, and a new arrow is a decision."""

import ast
from pathlib import Path

import pytest

import nnpassport

ROOT = Path(nnpassport.__file__).parent

FLOORS = (
    "scheme ground",
    "catalog",
    "files.disk",
    "files.arrays",
    "keys.geometry keys.chance keys.context keys.validity keys.pictures",
    "alignment.axes alignment.table alignment.order",
    "keys.patches keys.derive",
    "keys.ordered",
    "keys.key",
    "keys.keyfile keys.order keys.answers keys.counts",
    "keys.reading",
    "keys.adapters",
    "files.quantised",
    "files.pickles",
    "files",
    "alignment",
    "claims.curve claims.signing claims.timestamp claims.claimfile claims.facts claims.claim "
    "claims.entries claims.statement",
    "claims",
    "report.provenance",
    "verification",
    "report",
    "data",
    "embedding.network embedding.train.processes",
    "embedding.checkpoint",
    "embedding.train embedding.axes",
    "embedding.schemes",
    "embedding.aligning embedding.measured embedding.answering embedding.work",
    "embedding.marked embedding.anchoring",
    "embedding.owner embedding.licensing",
    "embedding.publish embedding.replaying",
    "attacks",
    "lab.marks lab.named lab.results lab.tables lab.timing",
    "lab.audit",
    "lab",
    "lab.demo",
    "cli.terminal",
    "cli.options",
    "cli",
    "__init__ __main__",
)
"""From the ground up. A module may import its own floor and all below; packages include theirs."""

LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor.split()}
ALONE = {"files.pickles.unpickling"}  # runs by itself: nothing of ours is imported there
MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room(name):
    """The longest name of the floors that covers this module, or None."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in LEVEL), None)


def imports(source, name, is_package):
    """Our own modules that a source file names, wherever in the file, without "nnpassport."."""
    package = ["nnpassport", *name.split(".")] if name != "__init__" else ["nnpassport"]
    if not is_package:
        package = package[:-1]
    for node in _run(ast.parse(source)):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{alias.name}" for alias in node.names]
        for target in found:
            if target == "nnpassport" or target.startswith("nnpassport."):
                yield target.removeprefix("nnpassport").removeprefix(".")


def _run(tree):
    """All nodes but those that only a type checker looks at."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _run(node)


def forbidden(name, target):
    """Whether module `name` stands below what it imports."""
    if target == "__version__":
        return False
    here, there = room(name), room(target)
    if there is None or name in ALONE:
        return True
    return LEVEL[there] > LEVEL[here]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_nothing_that_stands_above_it(path):
    name = dotted(path)
    if path.name == "__init__.py" and room(name) is None:
        assert name in {each.split(".")[0] for each in LEVEL}
        assert not list(imports(path.read_text(encoding="utf-8"), name, True))
        return
    assert room(name), f"{name} stands on no floor: decide on which, here and in the design"
    found = imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    wrong = sorted({target for target in found if forbidden(name, target)})
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


def test_no_more_than_fourteen_things_stand_at_the_top_of_the_package():
    """`scheme` and `catalog`, and a folder for each of the rest; Python's own names apart."""
    own = {path.name for path in ROOT.iterdir() if not path.name.startswith(("__", "."))}
    assert len(own - {"py.typed"}) <= 14


def test_the_walk_sees_every_form_of_import_and_no_types():
    source = """
import nnpassport.cli.app
from typing import TYPE_CHECKING
from nnpassport import attacks, __version__
from nnpassport.data.triggers import abstract_images
from . import derive
from ..embedding.schemes import passport
if TYPE_CHECKING:
    from nnpassport.lab import cells
def late():
    from nnpassport.claims.rules import judge
    import torch
"""
    assert sorted(imports(source, "keys.key", False)) == [
        "__version__",
        "attacks",
        "claims.rules.judge",
        "cli.app",
        "data.triggers.abstract_images",
        "embedding.schemes.passport",
        "keys.derive",
    ]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("scheme", "embedding.network.equations"),
        ("keys.context", "embedding.network.equations.filters"),
        ("keys.key", "data.triggers"),
        ("keys.derive", "keys.key.Key"),
        ("keys.derive", "data.images.ImageSet"),
        ("claims.claim", "verification.verify.verify"),
        ("embedding.checkpoint", "embedding.schemes.passport.V2"),
        ("embedding.network.models.resnet", "embedding.schemes.mark"),
        ("lab.runs", "cli.app.main"),
        ("verification.verdicts", "embedding.measured"),
        ("verification.relations", "embedding.work"),
        ("embedding.network.layers", "unheard_of"),
    ],
)
def test_a_wrong_arrow_is_found(name, target):
    assert forbidden(name, target)


GROUND = ("ground", "keys", "files", "claims", "alignment", "verification", "report")


@pytest.mark.parametrize("path", [p for p in MODULES if dotted(p).startswith(GROUND)], ids=dotted)
def test_what_reads_a_mark_needs_no_torch(path):
    """Not even late: `lazy.load` says by name where torch's side begins."""
    named = {
        alias.name.split(".")[0]
        for node in _run(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in _run(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    assert not named & {"torch", "jaxtyping", "torchvision"} or dotted(path) in LATE


LATE = {"keys.key"}
"""Where tensors are given to those who ask for them: torch is imported in that moment."""


def arrows():
    """By module, those of ours that it imports, wherever in the file."""
    names = {dotted(path) for path in MODULES}
    found = {}
    for path in MODULES:
        name, is_package = dotted(path), path.name == "__init__.py"
        targets = imports(path.read_text(encoding="utf-8"), name, is_package)
        whole = {target if target in names else target.rpartition(".")[0] for target in targets}
        found[name] = (whole & names) - {name}
    return found


def circle_in(arrows):
    """Modules that import each other in a circle, in its order; nothing where there is none."""
    done = set()

    def walked(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for each in sorted(arrows[name]):
            if circle := walked(each, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(arrows) if (circle := walked(name, []))), [])


def test_no_modules_import_each_other_in_a_circle():
    assert not circle_in(arrows())
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
