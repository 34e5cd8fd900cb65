"""The notebooks run from top to bottom, in an empty folder, and say what their text says."""

import os
import re
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"

pytestmark = [pytest.mark.slow, pytest.mark.trains]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a notebook and gives all that it prints, cell by cell."""
    reason = 'no Jupyter: pip install "nnpassport[notebooks]"'
    nbformat = pytest.importorskip("nbformat", reason=reason)
    client = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("COLUMNS", "80")

    def printed(name):
        notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
        assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
        resources = {"metadata": {"path": str(tmp_path)}}
        client.NotebookClient(notebook, timeout=900, resources=resources).execute()
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        said = ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]
        return [re.sub(r"\x1b\[[0-9;]*m", "", each) for each in said]  # Jupyter asks for colours

    return printed


def test_a_trained_network_is_protected(run):
    said = run("protect_a_trained_network.ipynb")
    before, after = (float(re.search(r"accuracy (\S+)", said[n])[1]) for n in (1, 3))
    assert before > 0.8
    assert after > before - 0.02
    assert said[2].startswith("128 bits")
    owner, anchor = said[4].splitlines()
    assert owner.startswith("accepted: True - 128 of 128")
    assert anchor.startswith("accepted: False")
    assert int(said[5].split()[0]) > 110


def test_a_dispute_is_settled_as_far_as_the_evidence_goes(run):
    said = run("settle_a_dispute.ipynb")
    assert "error:" not in "".join(said)
    refused, accepted = said[2].split("ACCEPTED")
    assert "REFUSED" in refused
    assert "320 of 320" in accepted
    released, stolen = said[3].split("OWNER: alice")[1:]
    assert not released.strip()
    assert "320 of 320" in stolen
    assert "nothing proves how old the claim is" in " ".join(stolen.split())


def test_copies_are_told_from_strangers(run):
    said = run("is_this_a_copy.ipynb")
    stands, aligned = (
        {line.split()[0]: line.endswith("True") for line in said[n].splitlines()} for n in (3, 4)
    )
    assert stands == {"itself": True, "moved": False, "tuned": True, "other": False}
    assert aligned == {"itself": True, "moved": True, "tuned": True, "other": False}
