"""The guide "Is this network a copy?": its commands do what it says."""

import re
import shlex
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.trains]

GUIDE = (Path(__file__).parent.parent / "docs" / "comparing.md").read_text(encoding="utf-8")


def commands():
    """Words, and the exit code that the comment beside them promises."""
    text = "\n".join(re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.S)).replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        code = re.search(r"# exit code (\d)", line)
        if words:
            yield words, 0 if code is None else int(code[1])


def test_the_guide_s_commands_end_as_it_says(tmp_path, monkeypatch, call):
    """Three trainings of an epoch: half a minute."""
    monkeypatch.chdir(tmp_path)
    seen = []
    for words, code in commands():
        ended, _, errors = call(*words[1:])
        assert ended == code, (words, errors)
        seen.append(words[1])
    assert seen.count("compare") == 4
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
