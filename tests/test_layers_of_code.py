"""Who may import whom: the package stays in layers, and a new arrow is a decision."""

import ast
from pathlib import Path

import pytest

import nnpassport

ROOT = Path(nnpassport.__file__).parent
CORE = {"scheme", "functional", "geometry"}
FOLDERS = {"files", "config", "weights"}
KEYS = {
    *("evidence.context", "evidence.validity", "evidence.pictures", "evidence.seed"),
    "evidence.key",
}
SIGNED = {"evidence.curve", "evidence.signing", "evidence.timestamp", "evidence.claimfile"}
CLAIMS = {"evidence.claim", *SIGNED}
EVIDENCE = {"evidence", "evidence.keyfile", *KEYS, *CLAIMS}
SCHEMES = (
    CORE
    | {
        "outputs",
        "layers",
        "survey",
        "fork",
        "surgery",
        "statistics",
        "training",
        "fidelity",
        "distributed",
    }
    | {"schemes", "schemes.lora", "data", "data.triggers", *KEYS}
)
ALL = {"*"}

# A module or a package that has no row of its own belongs to the package above it.
MAY_IMPORT = {
    "scheme": set(),
    "geometry": set(),
    "lazy": set(),
    "functional": {"geometry"},
    "statistics": {"scheme"},
    "relabelling": {"scheme", "statistics"},
    "provenance": {"__init__"},
    "models": {"models"},
    "channels": {"scheme"},
    "outputs": {"scheme"},
    "axes": {"axes", "scheme", "outputs"},
    "layers": {"functional", "outputs"},
    "survey": {"layers", "outputs", *CORE},
    "fork": {"survey", "layers", "outputs", *CORE},
    "surgery": {"survey", "fork", "layers", "outputs", *CORE},
    "data": {"scheme", "data", "data.triggers"},
    "data.triggers": {"scheme", "data"},
    "files": {"scheme"},
    "config": {"scheme", "models", "files"},
    "onnxfile": {"scheme", "files"},
    "adapter": {"scheme", "files"},
    "shards": {"scheme", "files"},
    "archive": set(),
    "unpickling": set(),  # runs by itself: nothing of ours is imported there
    "torchfile": {"scheme", "files", "archive"},
    "weights": {"scheme", "files", "onnxfile", "adapter", "shards", "archive", "torchfile"},
    "unfold": {"scheme", "channels"},
    "checkpoint": {"scheme", "models", "onnxfile", "unfold", *FOLDERS},
    "processes": set(),
    "distributed": {"scheme", "outputs", "processes", "layers"},
    "training": {"scheme", "outputs", "distributed", "data", "checkpoint", "files"},
    "fidelity": {"scheme", "outputs", "distributed", "data"},
    "evidence.validity": {"scheme", "evidence.context"},  # its types alone
    "evidence.context": {"scheme", "geometry", "evidence.validity"},
    "evidence.pictures": {"scheme"},
    "evidence.seed": {"scheme", "evidence.context"},
    "evidence.key": {"scheme", *KEYS},
    "evidence.keyfile": {"scheme", "files", *KEYS},
    "evidence.curve": set(),
    "evidence.signing": {"scheme", "files", "evidence.context", "evidence.curve"},
    "evidence.timestamp": {"scheme", "files", "evidence.signing"},
    "evidence.claimfile": {"scheme", "files", "evidence.context", *SIGNED},
    "evidence.claim": {"scheme", *KEYS, *SIGNED},
    "evidence": {*CORE, "statistics", "checkpoint", "channels", "unfold", *FOLDERS, *EVIDENCE},
    "schemes": SCHEMES,
    "schemes.lora": {*SCHEMES, "weights"},
    "attacks": {"attacks", "channels", *SCHEMES},
    "remote": {
        *("remote", "catalog", "statistics", "relabelling", "data", "scheme", "files"),
        *EVIDENCE,
    },
    "catalog": {"schemes", "schemes.lora", "scheme", "lazy", *KEYS},
    "verification": {
        *("catalog", "channels", "checkpoint", "relabelling"),
        *FOLDERS,
        *SCHEMES,
        *EVIDENCE,
    },
    "relations": {
        *("verification", "checkpoint", "onnxfile", "unfold"),
        *FOLDERS,
        *SCHEMES,
        *EVIDENCE,
    },
    "hearing": {
        "relations",
        "verification",
        "catalog",
        "checkpoint",
        *FOLDERS,
        *SCHEMES,
        *EVIDENCE,
    },
    "ownership": {"verification", "catalog", "checkpoint", *FOLDERS, *SCHEMES, *EVIDENCE},
    "marked": {"catalog", *SCHEMES},
    "interop": {"interop", "layers", "outputs", "onnxfile", "scheme", *FOLDERS, *CLAIMS},
    "bench": {
        *("bench", "models", "provenance", "checkpoint", "attacks"),
        *FOLDERS,
        *SCHEMES,
        *EVIDENCE,
    },
    "audit": {
        *(
            "lazy",
            "audit",
            "attacks",
            "catalog",
            "ownership",
            "verification",
            "checkpoint",
            "provenance",
        ),
        *SCHEMES,
        *FOLDERS,
        *EVIDENCE,
    },
    "attacking": ALL,
    "claiming": ALL,
    "inspecting": ALL,
    "judging": ALL,
    "probing": ALL,
    "publishing": ALL,
    "ranking": ALL,
    "reproducing": ALL,
    "tracing": ALL,
    "experiments": ALL,  # all but cli, see below
    "terminal": {"scheme", "processes"},
    "options": {"terminal", "checkpoint", "config", "training", "ownership", "data", *EVIDENCE},
    "cli": ALL,
    "demo": ALL,
    "__main__": ALL,
    "__init__": ALL,
}
MODULES = sorted(ROOT.rglob("*.py"))


def dotted(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def row(name):
    """The longest row of the table that covers this module, or None."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in MAY_IMPORT), None)


def imports(source, name, is_package):
    """Our own modules that a source file names, wherever in the file, without "nnpassport."."""
    package = ["nnpassport", *name.split(".")] if name != "__init__" else ["nnpassport"]
    if not is_package:
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
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


def forbidden(name, target):
    """Whether the table lacks the arrow from module `name` to what it imports."""
    if target == "__version__":
        return False
    here, there = row(name), row(target)
    if there is None or there in {"cli", "__main__"}:
        return here not in {"cli", "demo", "__main__", "__init__"}
    return MAY_IMPORT[here] != ALL and there not in MAY_IMPORT[here]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_module_imports_only_what_its_row_allows(path):
    name = dotted(path)
    assert row(name), f"{name} has no row: decide what it may import, here and in the design"
    found = imports(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")
    wrong = sorted({target for target in found if forbidden(name, target)})
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


def test_the_walk_sees_every_form_of_import():
    source = """
import nnpassport.cli
from nnpassport import attacks, __version__
from nnpassport.data.triggers import abstract_images
from . import seed
from ..schemes import passport
def late():
    from nnpassport.evidence.judge import judge
    import torch
"""
    assert sorted(imports(source, "evidence.key", False)) == [
        "__version__",
        "attacks",
        "cli",
        "data.triggers.abstract_images",
        "evidence.judge.judge",
        "evidence.seed",
        "schemes.passport",
    ]


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("scheme", "functional"),
        ("evidence.context", "functional.filters"),
        ("evidence.key", "data.triggers"),
        ("models.resnet", "scheme.Batch"),
        ("checkpoint", "evidence.key.Key"),
        ("evidence.seed", "evidence.key.Key"),
        ("evidence.seed", "data.images.ImageSet"),
        ("schemes.passport", "evidence.claim.Claim"),
        ("experiments.runs", "cli.main"),
        ("layers", "unheard_of"),
    ],
)
def test_a_wrong_arrow_is_found(name, target):
    assert forbidden(name, target)
