"""What a person sees on a terminal: four doors, errors in three lines, as much as was asked for."""

import re

import pytest

from nnpassport.cli import app as cli
from nnpassport.cli.terminal import DOORS, errors, heeded, print_error, print_table, tell
from nnpassport.scheme import UnreadableKeyError, UnreadableModelError


@pytest.fixture(autouse=True)
def as_ever():
    yield
    tell(quiet=False, verbose=False)


def test_without_a_command_it_says_who_it_is_for_and_what_to_type_next(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call()
    assert (code, err) == (0, "")
    commands = {each.name or each.callback.__name__ for each in cli.app.registered_commands}
    assert len(DOORS) == 4
    for who, command, tells in DOORS:
        assert who in out
        assert f"{command}   # {tells}" in out
        assert command.split()[1] in commands
    assert "nnpassport demo" in out
    assert all(len(line) <= 80 for line in out.splitlines())


LONG = "alexnet-cifar10-passport-v2-group-0-transfer-caltech101"


def test_in_a_pipe_no_line_is_broken_and_a_name_can_be_searched_for(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(("run", "state"), [(LONG, "to run" * 10)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [LONG, "to", *["runto"] * 9, "run"]
    assert max(map(len, lines)) < 2 * len(LONG) + 10  # and none is padded


def test_a_line_is_as_wide_as_was_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_table(("run", "state"), [(LONG, "to run")])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_an_error_has_three_lines_what_why_and_what_would_work(call, tmp_path):
    code, out, err = call("verify", tmp_path, "--key", tmp_path / "none.key")
    assert (code, out) == (2, "")
    what, why, would_work = err.splitlines()
    assert what == f"error: there is no key file at {tmp_path / 'none.key'}"
    assert why.startswith("why:   A key file is missing")
    assert why.endswith("(UnreadableKeyError)")
    assert would_work == "try:   a file that `save_key` wrote; check the path"


@pytest.mark.parametrize(
    ("message", "what", "would_work"),
    [
        ("a is b; needed: c; use d", "a is b", "c; use d"),
        ("a cannot be read; give b", "a cannot be read", "give b"),
        ("a is lost", "a is lost", "nnpassport COMMAND --help says what it needs"),
        ("a\nb; needed: c\x1b[2J", "a b", r"c\x1b[2J"),
    ],
)
def test_every_message_becomes_three_lines_whatever_it_says(message, what, would_work, capsys):
    print_error(UnreadableModelError(message))
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[2]) == (f"error: {what}", f"try:   {would_work}")
    assert len(lines) == 3


def test_a_command_that_is_not_understood_says_so_the_same_way(call):
    for words in (["verify"], ["verify", "x", "--kee", "y"], ["verfy"]):
        code, out, err = call(*words)
        assert (code, out) == (2, "")
        what, why, would_work = err.splitlines()
        assert what.startswith("error: ")
        assert "nothing was done" in why
        assert would_work.endswith("--help")


def test_a_fault_of_the_program_is_no_verdict_and_keeps_its_traceback(call, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda *_, **__: 1 / 0)
    code, _, err = call("schemes")
    assert code == 2
    assert "Traceback" in err
    assert "why:   this is a fault of the program and says nothing about the network" in err


def test_quiet_leaves_results_and_errors(call, tmp_path):
    words = ["claim", "keygen", "-o"]
    code, _, err = call(*words, tmp_path / "a.pem")
    assert (code, "is secret" in err) == (0, True)
    code, _, err = call(*words, tmp_path / "b.pem", "--quiet")
    assert (code, err) == (0, "")
    assert errors.quiet
    code, _, err = call("--quiet", *words, tmp_path / "b.pem")
    assert code == 2
    assert err.startswith("error: ")
    assert not call("schemes", "--json")[2]
    assert not errors.quiet


def test_verbose_adds_versions_time_memory_and_tracebacks(call, tmp_path):
    code, out, err = call("schemes", "--verbose")
    assert (code, out) == (0, call("schemes")[1])
    assert re.search(r"^nnpassport \S+, Python 3\.\d+", err)
    assert re.search(r"^\d+\.\d s", err, flags=re.M)
    code, _, err = call("verify", tmp_path, "--key", tmp_path / "none.key", "--verbose")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("try:")


def test_words_behind_two_dashes_are_left_alone():
    assert heeded(["verify", "--quiet", "--", "--verbose"]) == ["verify", "--", "--verbose"]
    assert errors.quiet
    assert heeded(["--verbose"]) == []


def test_an_error_quotes_no_secret(call, tmp_path):
    (tmp_path / "broken.key").write_text('{"secret": "deadbeef"}')
    for more in ([], ["--verbose"]):
        code, _, err = call("key", "show", tmp_path / "broken.key", *more)
        assert code == 2
        assert "deadbeef" not in err
    with pytest.raises(UnreadableKeyError):
        raise UnreadableKeyError("as above")
