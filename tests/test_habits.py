"""What surrounds the code says what is so: versions, workflows, forms, the container, citations."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from no_secret import main as holds_a_secret

import nnpassport

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def read(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_there_is_one_version():
    cited = read("CITATION.cff")
    assert PROJECT["version"] == nnpassport.__version__ == cited["version"]
    assert cited["license"] == PROJECT["license"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[1] == PROJECT["version"]


def test_the_plain_package_is_the_judge_s_side():
    names = {re.split(r"[>\[]", each)[0] for each in PROJECT["dependencies"]}
    assert not names & {"torch", "accelerate", "pyarrow", "scikit-learn", "jaxtyping", "joblib"}
    extras = PROJECT["optional-dependencies"]
    assert any(each.startswith("torch>=") for each in extras["torch"])
    assert "torch" in extras["dev"][0]


def test_every_python_that_is_classified_is_tested_on_three_systems():
    versions = {
        each.rpartition(" ")[2] for each in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", each)
    }
    assert versions == {"3.11", "3.12", "3.13", "3.14"}
    matrix = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]
    assert set(matrix["python"]) == versions
    assert {each.partition("-")[0] for each in matrix["system"]} == {"ubuntu", "macos", "windows"}


def test_actions_are_pinned_by_version_and_may_do_no_more_than_they_need():
    assert {path.stem for path in WORKFLOWS} == {"ci", "fuzz", "release"}
    for path in WORKFLOWS:
        flow = read(path)
        assert flow["permissions"] == {"contents": "read"}, path.name
        for job in flow["jobs"].values():
            assert 0 < job["timeout-minutes"] <= 300
            for step in job["steps"]:
                if "uses" in step:
                    assert re.search(r"@v\d+\.\d+\.\d+$", step["uses"]), step["uses"]
    assert "attestations" in read(".github/workflows/release.yml")["jobs"]["build"]["permissions"]


def test_workflows_call_what_there_is():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"run: make (\w+)", text):
            assert re.search(rf"^{target}:", makefile, re.M), f"{path.name}: make {target}"
        for script in re.findall(r"run: python (\S+\.py)", text):
            assert (ROOT / script).is_file(), f"{path.name}: {script}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", [path for path in FORMS if path.stem != "config"]),
        ("github-issue-config", [path for path in FORMS if path.stem == "config"]),
        ("dependabot", [ROOT / ".github" / "dependabot.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_file_is_valid_by_its_published_schema(schema, files):
    pytest.importorskip("check_jsonschema", reason='pip install "nnpassport[packaging]"')
    assert files
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
        + [str(path) for path in files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_forms_ask_for_what_the_security_policy_asks_for():
    for path in FORMS:
        if path.stem != "config":
            asked = {each.get("id") for each in read(path)["body"]}
            assert "version" in asked, path.name
    policy = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "docs/threat-model.md" in policy
    assert "Never send a real key" in policy


def test_the_container_is_the_judge_s_side_and_no_root():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    said = [line for line in lines if line and not line.startswith("#")]
    assert said[-1] == 'ENTRYPOINT ["nnpassport"]'
    assert "USER judge" in said
    assert not any("[torch]" in line for line in said)
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {word for line in said if line.startswith("COPY p") for word in line.split()[1:-1]}
    assert copied <= {line[1:] for line in kept if line.startswith("!")}


def test_a_key_is_kept_out_of_the_repository(tmp_path, capsys):
    (tmp_path / "a.key").write_text('{"format": "nnpassport-key", "version": 1}')
    (tmp_path / "b.pem").write_text("-----BEGIN " + "PRIVATE KEY-----")
    (tmp_path / "c.md").write_text("keys are kept elsewhere")
    assert holds_a_secret([str(tmp_path / "c.md")]) == 0
    assert holds_a_secret([str(tmp_path / "a.key")]) == 1
    assert holds_a_secret([str(tmp_path / "b.pem")]) == 1
    assert "b.pem holds a secret key" in capsys.readouterr().err
    hooks = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert any("no_secret.py" in hook["entry"] for hook in hooks)
