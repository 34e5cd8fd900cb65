"""The page on diaries: its commands run as they stand, and its example names what there is."""

import re
import shlex
from pathlib import Path

import pytest

from nnpassport.claims import signing
from nnpassport.claims.entries import Entry
from nnpassport.embedding.train import keeping, loop

PAGE = (Path(__file__).parent.parent / "docs" / "diary.md").read_text(encoding="utf-8")


def commands():
    text = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


@pytest.mark.slow
def test_the_page_s_commands_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for words in commands():
        code, out, errors = call(*words[1:])
        assert code == 0, (words, errors)
    assert "the very same numbers" in " ".join(out.split())


def test_the_page_s_example_names_what_there_is():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    for module, names in re.findall(r"from nnpassport\.([\w.]+) import (.*)", example):
        home = {
            "claims.signing": signing,
            "embedding.train.keeping": keeping,
            "embedding.train.loop": loop,
        }[module]
        assert all(hasattr(home, name) for name in names.split(", "))


def test_the_table_of_keys_is_what_an_entry_has():
    table = PAGE.split("has exactly these keys:\n")[1].strip().split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines())))
    written = Entry(0, None, "ab" * 32, "2026-01-31T12:00:00Z").encode().decode()
    assert named == set(re.findall(r'"(\w+)":', written))
