"""The site: built without a warning, each link leads somewhere, each public name is there once."""

import inspect
import re
import subprocess
import sys
import typing
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import nnpassport
from nnpassport import scheme
from nnpassport.cli import app as cli

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "reference"))

from write import commands, parameters, section  # noqa: E402 - found by the line above

PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md"]
DOORS = ("own", "accused", "judge", "research")


class Links(HTMLParser):
    """Where a page leads, and the places in it that others may lead to."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.places = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.places |= {found[name] for name in ("id", "name") if found.get(name)}
        for name in ("href", "src"):
            if found.get(name) and not (tag == "link" and found.get("rel") == "canonical"):
                self.targets.append(found[name])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` builds it."""
    for tool in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(tool, reason='no Sphinx: pip install "nnpassport[docs]"')
    out = tmp_path_factory.mktemp("site")
    words = ["--fail-on-warning", "--keep-going", "--nitpicky", "-q", "-b", "html"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *words, "-c", "docs", ".", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_link_of_the_site_leads_somewhere_and_nothing_is_fetched(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 40
    for path, found in pages.items():
        for target in found.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                assert parts.scheme in {"https", "http", "mailto", "data"}, target
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert there.exists(), f"{path.relative_to(site)}: {target}"
            if parts.fragment and there in pages:
                place = unquote(parts.fragment)
                assert place in pages[there].places, f"{path.relative_to(site)}: {target}"
    for path in [*pages, *site.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        fetched = re.findall(r'(?:src="|url\(|<link [^>]*href=")(https?://[^")]+)', text)
        assert not fetched, path.name


@pytest.mark.slow
def test_the_doors_are_on_the_front_page_and_every_page_is_in_the_menu(site):
    front = Links((site / "docs" / "index.html").read_text(encoding="utf-8")).targets
    for door in DOORS:
        assert f"{door}.html" in front
    pages = {each.stem for each in DOCS.glob("*.md")} - {"index", "reproduction-notes"}
    assert {f"{page}.html" for page in pages} <= set(front)


def test_every_public_name_is_in_the_reference_once_and_in_its_example():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. (?:auto)?\w+:: nnpassport\.([\w.]+)$", text, flags=re.M)
    errors = [
        f"scheme.{name}"
        for name, each in vars(scheme).items()
        if inspect.isclass(each) and issubclass(each, scheme.OwnershipError)
    ]
    errors.remove("scheme.OwnershipError")
    wanted = [*nnpassport.__all__, *errors, "scheme"]
    assert sorted(named) == sorted(wanted)
    example = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    for name in nnpassport.__all__:
        assert re.search(rf"nnpassport\.{name}\b", example), name


@pytest.mark.slow
def test_the_example_of_the_reference_runs(tmp_path):
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    example = "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.S))
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", example],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "128 signature bits match" in done.stdout


def test_every_command_is_in_its_reference_with_every_option():
    there = dict(commands(cli.app))
    assert {"verify", "judge", "key new", "claim verify"} <= set(there)
    for name, function in there.items():
        text = "\n".join(section(name, function))
        assert f"## {name}\n" in text
        for word in parameters(function):
            assert all(f"`{each}`" in text for each in word.names), f"{name}: {word.names}"
        assert function.__doc__.strip().splitlines()[0] in text
    (out,) = [each for each in parameters(there["demo"]) if "--out" in each.names]
    assert out.names == ("--out", "-o")
    assert typing.get_args(typing.get_type_hints(there["demo"], include_extras=True)["out"])


def test_no_page_names_a_command_or_an_option_that_is_not_there():
    options = {}
    for name, function in commands(cli.app):
        options[name] = {word for each in parameters(function) for word in each.names}
        options[name] |= {"--help", "--json", "--quiet", "--verbose"}
    groups = {name.partition(" ")[0] for name in options if " " in name}
    checked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for words in re.findall(r"nnpassport ((?:[a-z]+ )?[a-z]+)((?: [^`\n]*)?)", text):
            first = words[0].split()[0]
            name = words[0] if first in groups else first
            if first in {"is", "loads", "and", "puts", "reads"} or not _is_code(text, words):
                continue
            assert name in options or first in groups, f"{page.name}: nnpassport {words[0]}"
            rest = words[1].partition("#")[0].partition("nnpassport")[0]
            for option in re.findall(r" (--[a-z][a-z-]*)", rest):
                if name in options:
                    assert option in options[name], f"{page.name}: {name} {option}"
                    checked += 1
    assert checked > 60


def _is_code(text, words):
    """Whether the words are between backticks or in a block, and no sentence."""
    line = f"nnpassport {words[0]}{words[1]}"
    before = text[: text.index(line)]
    return before.count("```") % 2 == 1 or before.rpartition("\n")[2].count("`") % 2 == 1
