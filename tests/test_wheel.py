"""What is published: a wheel and an archive of the source, built, checked, tried on their own."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nnpassport import __version__
from nnpassport.keys.context import Context, LayerShape
from nnpassport.keys.geometry import Geometry
from nnpassport.keys.key import Key
from nnpassport.keys.keyfile import save_key
from nnpassport.keys.patches import mean_patch

pytestmark = [pytest.mark.slow]
ROOT = Path(__file__).parent.parent
UNREACHED = re.compile(
    "Could not find a version|No matching distribution|Max retries|ConnectionError"
)


def run(*words, cwd, code=0, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != code and UNREACHED.search(done.stdout + done.stderr):
        pytest.skip("no package index can be reached from here")
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with both: `make wheel`'s, or one that is built now."""
    if "NNPASSPORT_DIST" in os.environ:
        return (ROOT / os.environ["NNPASSPORT_DIST"]).resolve()
    pytest.importorskip("build", reason='no build: pip install "nnpassport[packaging]"')
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


def only(dist, pattern):
    (found,) = dist.glob(pattern)
    return found


def test_both_are_well_formed(dist):
    pytest.importorskip("twine", reason='no twine: pip install "nnpassport[packaging]"')
    said = run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)
    assert said.count("PASSED") == 2


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    names = zipfile.ZipFile(only(dist, "*.whl")).namelist()
    assert {name.split("/")[0] for name in names} == {
        *("nnpassport", f"nnpassport-{__version__}.dist-info")
    }
    source = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {name for name in names if name.startswith("nnpassport/")} == source


def test_the_archive_has_what_its_tests_need(dist):
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tested = ("tests/golden/claim-v1.json", "docs/threat-model.md", "benchmarks/fuzz.py")
    for name in ("README.md", "Makefile", "constraints.txt", "SECURITY.md", *tested):
        assert name in names
    own = [name for name in names if not name.startswith("tests/golden/")]  # keys of public seeds
    assert not any(re.search(r"\.venv|\.git/|__pycache__|\.key$", name) for name in own)


@pytest.fixture(scope="module")
def bare(dist, tmp_path_factory):
    """An environment with the wheel and what it asks for, on a path with spaces."""
    folder = tmp_path_factory.mktemp("an empty place") / "env of a judge"
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "-q", only(dist, "*.whl"), cwd=folder)
    return programs


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    """A key, a network that has all of its bits, one that has none, and a file that is neither."""
    folder = tmp_path_factory.mktemp("evidence")
    layer = LayerShape("conv", (128, 3, 3, 3), (3, 8, 8), Geometry((1, 1), ((1, 1),) * 2, (1, 1)))
    key = Key(bytes(32), Context("passport-v2", "Alice", (layer,), None, bytes(16)))
    save_key(key, folder / "alice.key")
    patch = mean_patch(key.passport_array("conv"), layer.weight, layer.geometry)[0]
    weight = (key.signs_array("conv")[:, None] * patch).reshape(layer.weight).astype(np.float32)
    for name, sign in (("owned", 1), ("strange", -1)):
        (folder / name).mkdir()
        save_file({"conv.weight": sign * weight}, folder / name / "model.safetensors")
    (folder / "neither").mkdir()
    (folder / "neither" / "model.safetensors").write_bytes(b"no weights")
    return folder


def test_a_judge_installs_no_torch_and_verifies_and_rules(bare, evidence):
    installed = json.loads(
        run(bare / "python", "-m", "pip", "list", "--format", "json", cwd=evidence)
    )
    assert not {"torch", "pyarrow", "scikit-learn"} & {each["name"] for each in installed}
    tool = bare / "nnpassport"
    assert run(tool, "--version", cwd=evidence) == f"nnpassport {__version__}\n"
    for name, code, matches in (("owned", 0, 128), ("strange", 1, 0)):
        words = ("verify", f"{name}/", "--key", "alice.key", "--report", f"{name}.html", "--json")
        facts = json.loads(run(tool, *words, cwd=evidence, code=code))
        assert (facts["matches"], facts["bits"]) == (matches, 128)
        assert f"{matches} of 128" in (evidence / f"{name}.html").read_text(encoding="utf-8")
    run(tool, "verify", "neither/", "--key", "alice.key", cwd=evidence, code=2)
    golden = ROOT / "tests" / "golden"
    words = (golden / "network-v1", golden / "exhibit-v1", "--report", "ruling.html")
    assert run(tool, "judge", *words, cwd=evidence).startswith("OWNER: exhibit-v1")


def test_what_the_judge_s_side_cannot_do_says_what_to_install(bare, evidence):
    done = subprocess.run(
        [str(bare / "nnpassport"), "demo", "--out", "demo"],
        cwd=evidence,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert 'pip install "nnpassport[torch]"' in done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(evidence / "demo", ignore_errors=True)
