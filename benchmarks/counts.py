"""How large the package is: lines, modules, what stands at its top, its longest functions.

python benchmarks/counts.py [CHECKOUT] prints it, of this checkout or of another.
"""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LONG = 40
"""Lines from which on a function is counted as long."""


class Function(NamedTuple):
    """A function, and how many lines it has with its signature and docstring."""

    lines: int
    name: str


def functions(path: Path, tree: ast.Module) -> Iterator[Function]:
    """Those of a module, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(lines, f"{path.as_posix()}:{node.name}")


def code_lines(text: str, tree: ast.Module) -> int:
    """Lines that are neither blank nor a comment nor of a docstring."""
    said = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            said |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        1
        for number, line in lines
        if number not in said and line.strip() and not line.strip().startswith("#")
    )


def counted(package: Path) -> Iterator[tuple[str, str]]:
    """What there is, and how much of it."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    top = [path.name for path in package.iterdir() if not path.name.startswith(("__", "."))]
    found = [each for path in texts for each in functions(path.relative_to(package), trees[path])]
    code = sum(code_lines(text, trees[path]) for path, text in texts.items())
    yield "entries at the top", str(len(set(top) - {"py.typed"}))
    yield "modules", str(len(texts))
    yield "lines", f"{sum(len(text.splitlines()) for text in texts.values()):,}"
    yield "lines without blank ones, comments and docstrings", f"{code:,}"
    yield f"functions of more than {LONG} lines", str(sum(e.lines > LONG for e in found))
    longest = sorted(found, reverse=True)[:5]
    yield "longest functions", ", ".join(f"{each.name} {each.lines}" for each in longest)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).parent.parent
    parser.add_argument("checkout", type=Path, nargs="?", default=here)
    package = parser.parse_args().checkout / "src" / "nnpassport"
    for what, number in counted(package):
        print(f"{what}: {number}")


if __name__ == "__main__":
    main()
