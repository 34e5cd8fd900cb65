"""The pages of `verify` and `judge`: for a lawyer to read and an expert to check."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnpassport.evidence.report import page
from nnpassport.files import write_atomically, writing

Facts = Mapping[str, Any]


def write_verdict_page(facts: Facts, path: Path) -> None:
    """Write the page of a verdict, from what `verify --json` prints."""
    _write("nnpassport: verdict", facts["reason"], facts["accepted"], path)


def write_hearing_page(facts: Facts, path: Path) -> None:
    """Write the page of a hearing, from what `judge --json` prints."""
    _write("nnpassport: ruling", "; ".join(facts["reasons"]), facts["ruling"] == "owner", path)


def _write(title: str, ruling: str, accepted: bool, path: Path) -> None:
    facts = {"title": title, "ruling": ruling, "accepted": accepted, "rows": []}
    with writing(path):
        text = page("report.html.j2", facts)
        write_atomically(path, text.encode("utf-8", "backslashreplace"))
