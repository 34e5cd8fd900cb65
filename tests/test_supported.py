"""What the documentation says of layers and architectures is what trying them says now."""

import importlib.util
from pathlib import Path

import pytest
import zoo

ROOT = Path(__file__).parent.parent


def script():
    spec = importlib.util.spec_from_file_location("supported", ROOT / "benchmarks" / "supported.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_committed_page_is_what_the_script_writes():
    committed = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8").splitlines()
    if zoo.pitch_package() is None:
        committed = [line for line in committed if not line.startswith("| CREPE |")]
    assert script().render().splitlines() == committed


def test_every_network_of_the_zoo_has_a_row():
    committed = (ROOT / "docs" / "supported.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} | `" in committed for name in zoo.ZOO)
