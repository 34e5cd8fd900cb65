"""Our pages and the site in a real browser: `make browser`.

Each page is opened at the widths of a phone, a desk and a sheet of paper, light and dark. It must
not be wider than the window, complain in the console, show a picture without words or a column
without its name, or set text with less contrast than WCAG AA asks for.
"""

import os
import shutil
from pathlib import Path

import pytest
from pages import make_pages

pytestmark = pytest.mark.browser
ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "site"
NAMES = ("demo", "verdict", "refusal", "ruling", "audit", "leaderboard", "compare")
OF_SITE = ("index", "own", "judge", "api", "reference/commands", "leaderboard", "threat-model")
SIZES = {"phone": (360, 740), "desk": (1280, 900), "paper": (720, 1000)}
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session")
def browser():
    """Chromium, from $NNPASSPORT_CHROMIUM or the path; without one these tests are skipped."""
    playing = pytest.importorskip("playwright.sync_api", reason='pip install "nnpassport[browser]"')
    found = os.environ.get("NNPASSPORT_CHROMIUM")
    found = found or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("there is no Chromium on the path; $NNPASSPORT_CHROMIUM may name one")
    with playing.sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def made(browser, tmp_path_factory):
    """After the browser: where there is none, no page is made."""
    return make_pages(tmp_path_factory.mktemp("pages of a story"))


@pytest.fixture
def opened(browser):
    """A function that opens a page of this size in these colours; complaints fail the test."""
    contexts, complaints = [], []

    def heard(said):
        if said.type == "error":
            complaints.append(said.text)

    def show(path, size, colours="light"):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=colours, offline=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        if size == "paper":
            page.emulate_media(media="print")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not complaints


FLAWS = (Path(__file__).parent / "flaws.js").read_text(encoding="utf-8")
NONE = {
    "wider than the window by": 0,
    "pictures without words": [],
    "columns without names": [],
    "faint": [],
}


def flaws(page):
    return page.evaluate(FLAWS)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_of_ours_has_no_flaw(made, opened, name, size, colours):
    if name not in made:
        pytest.skip(f"there is no command that writes the page {name}")
    assert flaws(opened(made[name], size, colours)) == NONE


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("size", ["phone", "desk"])
@pytest.mark.parametrize("name", OF_SITE)
def test_a_page_of_the_site_has_no_flaw(browser, opened, name, size, colours):
    path = SITE / "docs" / f"{name}.html"
    if not path.is_file():
        pytest.skip("the site is not built: make docs")
    assert flaws(opened(path, size, colours)) == NONE


def test_the_checks_find_each_flaw(opened, tmp_path):
    """Else the tests above would pass whatever a page looks like."""
    (tmp_path / "bad.html").write_text(
        "<style>thead { display: none }</style><body style='margin:0;background:#fff'>"
        "<div style='width:900px'>wide</div><img src='data:,'><svg width=5 height=5></svg>"
        "<p style='color:#999'>faint</p><table><thead><tr><th>a<th>b<th>c</tr></thead>"
        "<tbody><tr><td>1<td>2<td>3</tr></tbody></table>"
    )
    found = flaws(opened(tmp_path / "bad.html", "phone"))
    assert found["wider than the window by"] == 540
    assert len(found["pictures without words"]) == 2
    assert len(found["columns without names"]) == 1
    assert found["faint"] == ["2.85 P.: faint"]


def test_the_leaderboard_scrolls_in_itself_and_names_its_columns(made, opened):
    page = opened(made["leaderboard"], "phone")
    board = page.locator(".board.screen")
    assert board.evaluate("e => e.scrollWidth > e.clientWidth")
    assert board.locator("thead th").first.is_visible()
    assert page.locator("table.ranking tbody tr").count() > 10
