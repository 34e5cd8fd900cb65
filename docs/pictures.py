"""Pictures of our pages for the documentation, taken in a browser: `make pictures`.

Light and dark, into docs/pictures. The numbers on them are of embedded digits and new keys.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests")]

from pages import make_pages  # noqa: E402 - found by the line above
from playwright.sync_api import sync_playwright  # noqa: E402

SHOWN = ("demo", "verdict", "ruling", "audit", "compare")
WINDOW = {"width": 1000, "height": 640}


def main() -> None:
    """Make the pages, open each in both colours, and keep what a window shows."""
    program = os.environ.get("NNPASSPORT_CHROMIUM") or shutil.which("chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        made = make_pages(Path(folder))
        browser = tools.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name in filter(made.__contains__, SHOWN):
            for colours in ("light", "dark"):
                page = browser.new_page(viewport=WINDOW, color_scheme=colours)
                page.goto(made[name].as_uri())
                page.screenshot(path=HERE / "pictures" / f"{name}-{colours}.png")
                page.close()
        browser.close()


if __name__ == "__main__":
    main()
