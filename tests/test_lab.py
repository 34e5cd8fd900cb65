"""What everything in the lab does alike: results, tables, time in turns."""

import json
from collections import Counter

import pytest

from nnpassport.lab import timing
from nnpassport.lab.results import Results, made_with
from nnpassport.lab.tables import in_percent, table
from nnpassport.report.provenance import provenance
from nnpassport.scheme import UnreadableDataError


def test_a_result_says_where_it_is_from_and_is_found_by_its_name(tmp_path):
    results = Results(tmp_path / "experiment")
    assert not results.has("b")
    assert results.read("b") is None
    assert results.all() == {}
    kept = results.keep("b", {"bits": 3})
    assert results.keep("a", {"bits": 1}, {"device": "x", "torch": "2"})["provenance"] == {
        "device": "x",
        "torch": "2",
    }
    assert kept == {"bits": 3, "provenance": json.loads(json.dumps(provenance()))}
    assert results.read("b") == kept
    assert [*results.all()] == ["a", "b"]
    assert made_with(results.all()["a"]) == "x, torch 2"


@pytest.mark.parametrize("text", ["", "{", "\x00"])
def test_what_is_no_result_is_named(tmp_path, text):
    results = Results(tmp_path)
    results.path("broken").write_text(text)
    with pytest.raises(UnreadableDataError, match=r"broken\.json is no JSON"):
        results.read("broken")


def test_a_table_has_a_field_for_every_value():
    assert table(("a", "b"), [(1, None), ("x", 2.5)]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "| x | 2.5 |",
    ]
    assert (in_percent(0.12345), in_percent(1, 0), in_percent(None)) == ("12.35", "100", "")


class Hands:
    """A clock that only goes on when it is told to: what is timed here takes as long as it says."""

    def __init__(self):
        self.now = 100.0

    def pass_by(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    process_time = monotonic = perf_counter


@pytest.fixture
def hands(monkeypatch):
    """That clock in place of the machine's; no sample is made of many runs."""
    clock = Hands()
    monkeypatch.setattr(timing, "time", clock)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 0.0)
    return clock


def test_all_are_timed_in_every_turn_and_in_another_order(hands):
    order = []
    runs = {name: lambda name=name: (order.append(name), hands.pass_by(1)) for name in "abcd"}
    timed = timing.in_turns(runs, repeats=5, warmup=2)
    turns = [tuple(order[at : at + 4]) for at in range(0, len(order), 4)]
    assert len(turns) == 7
    assert {frozenset(turn) for turn in turns} == {frozenset("abcd")}
    assert len(set(turns)) > 3
    assert set(timed.values()) == {timing.Timed((1.0,) * 5, (1.0,) * 5)}


def test_a_turn_that_is_not_whole_counts_for_none(hands):
    runs, count = {}, Counter()
    for name in "abc":
        runs[name] = lambda name=name: (count.update(name), hands.pass_by(1))
    timed = timing.in_turns(runs, repeats=9, warmup=0, deadline=hands.now + 7.5)
    assert {len(each.seconds) for each in timed.values()} == {2}
    assert sum(count.values()) == 6  # a third turn would not have ended in time
    assert timing.in_turns(runs, deadline=0.0) == dict.fromkeys("abc", timing.Timed())
    timed = timing.in_turns(runs, repeats=9, warmup=0, until=hands.now)
    assert {len(each.seconds) for each in timed.values()} == {timing.ENOUGH}


def test_a_step_is_a_share_of_its_run(hands):
    runs = {name: lambda: hands.pass_by(2) for name in ("one", "ten")}
    steps = {"one": 1, "ten": 10}
    timed = timing.in_turns(runs, steps=lambda name: steps[name], repeats=3, warmup=0)
    assert timed["one"].seconds == (2, 2, 2)
    assert timed["ten"].seconds == pytest.approx((0.2, 0.2, 0.2))


def test_the_middle_half_of_two_turns_lies_between_them():
    assert timing.paired([2.0, 9.0], [1.0, 3.0]) == [2, 3]
    found = timing.spread([2.0, 3.0])
    assert found == {"n": 2, "median": 2.5, "lower_quartile": 2.25, "upper_quartile": 2.75}
    assert timing.spread([4.0])["lower_quartile"] == 4


def test_a_clock_counts_from_when_it_was_read_last(hands):
    clock = timing.Clock()
    hands.pass_by(3)
    assert clock.read() == {"processor": 3, "wall": 3}
    hands.pass_by(1)
    assert clock.read()["wall"] == 1
