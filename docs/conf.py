"""The site: `make docs`. It reads the repository as it is and asks nothing of the network.

Pages are the Markdown files that people read in the repository too. Two are made on the way: the
reference of commands, by `reference/write.py`, and that of the package, out of its docstrings.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT / "src"), str(HERE / "reference")]

from write import write_commands  # noqa: E402 - found by the line above

from nnpassport import __version__  # noqa: E402

project, author, copyright = "nnpassport", "The nnpassport maintainers", "2026, the maintainers"
version = release = __version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("docs/*.md", "docs/reference/*.md", "results/*.md", "benchmarks/README.md"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"),
    "benchmarks/accelerator/README.md",
]
exclude_patterns = [".*", "build", "dist", "demo", "src", "tests", "docs/reproduction-notes.md"]
exclude_patterns += ["results/bench-quick.md"]  # a table without a title
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False
default_role = "literal"
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other packages, whose sites are not asked

html_theme = "furo"
html_title = f"nnpassport {__version__}"
html_extra_path = ["site"]
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def _links(app, docname, source):
    """Links to folders, and to files of code, become their names: the site holds pages only."""
    folder = (ROOT / docname).parent

    def kept(found):
        text, target = found[1], found[2]
        if "://" in target or target.startswith("#"):
            return found[0]
        there = (folder / target.partition("#")[0]).resolve()
        if there.name == "README.md" and there.parent == ROOT:
            return text
        page = there.suffix in {".md", ".svg", ".png"} and there.exists()
        return found[0] if page else f"{text} (`{there.relative_to(ROOT)}`)"

    source[0] = re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", kept, source[0])


_CODE = re.compile(r"(``.*?``|`[^`]*`)")


def _docstring(app, what, name, obj, options, lines):
    """Our docstrings are text: indented equations stay as they are, single backticks are code."""
    out, block = [], False
    for line in lines:
        deep = line.startswith("    ") and not _in_fields(out)
        if deep and not block:
            out += [*([""] if out and out[-1] else []), "::", ""]
        elif block and not deep and line:
            out += [""] if out and out[-1] else []
        block = deep or (block and not line)
        out.append(line if deep else _plain(line))
    lines[:] = out


def _in_fields(lines):
    """Whether the last paragraph is a field (`:param x:`), whose lines are indented."""
    for line in reversed(lines):
        if line and not line.startswith(" "):
            return line.startswith((":", ".. "))
    return False


def _plain(line):
    if line.lstrip().startswith((":", "..")):
        field, colon, rest = line.partition(": ")
        return f"{field}{colon}{_plain(rest)}" if rest else line
    return "".join(
        part if part.startswith("`") else re.sub(r"([*|_\\])", r"\\\1", part)
        for part in _CODE.split(line)
    )


def setup(app):
    """Called by Sphinx: make the reference of commands, then read."""
    write_commands(HERE / "reference" / "commands.md")
    app.connect("source-read", _links)
    app.connect("autodoc-process-docstring", _docstring)
    return {"parallel_read_safe": True}
