"""Runs of several tasks and networks lie beside each other in one file of results, and one page."""

import json
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from test_results import ROOT, script

from nnpassport.embedding.schemes.answers import ANSWERS
from nnpassport.keys.keyfile import save_key

PLACE = {"commit": "a" * 40, "torch": "2.13.0", "device": "a processor"}
COUNTED = {f"{what} {count}": -40.0 for what in ("scores", "labels") for count in (1_000, 10_000)}


def bench():
    return script("answers")


def facts():
    return json.loads((ROOT / "results" / "answers.json").read_text())


def plan(**changed):
    return replace(bench().LARGER, **changed)


def row(name, accuracy=0.8, classes=10, **changed):
    """A row as a run of the larger networks writes it, with p of 10⁻⁴⁰ wherever it was read."""
    key = {"seed": 0, "coins": 16 * classes, "classes": classes, "strength": 0.6}
    return {**key, "name": name, "accuracy": accuracy, "agrees": 0.95, **COUNTED, **changed}


def run(sizes, rows):
    old = {
        name: value for name, value in asdict(sizes).items() if name != "task" or value != "cifar10"
    }
    return {"plan": old, "rows": rows, "provenance": PLACE}


def whole(sizes, classes=10, **copy):
    before = [row(name, 0.803, classes) for name in bench().BEFORE]
    return run(sizes, [*before, row("marked", 0.8, classes), row("copy by labels", **copy)])


def section(page, title):
    """What is under a heading of the page."""
    return page.split(f"### {title}\n")[1].split("\n### ")[0].split("\n## ")[0]


def test_two_runs_of_other_sizes_are_both_on_the_page():
    both = [whole(plan()), whole(plan(task="cifar100", owner="resnet18", thief="alexnet"), 100)]
    page = bench().rendered({**facts(), "larger": both})
    first = section(page, "CIFAR-10: AlexNet, copied by ResNet-18")
    second = section(page, "CIFAR-100: ResNet-18, copied by AlexNet")
    assert "| 16 | 0.6 | marked | 80.0 | 0.3 |" in first
    assert "| 16 | 0.6 | marked | 80.0 | 0.3 |" in second
    assert "which was not run" not in page
    assert "That was not run" not in page


def test_a_part_that_has_one_run_as_it_used_to_be_is_read_as_one_of_several():
    one = whole(plan())
    pages = [bench().rendered({**facts(), "larger": larger}) for larger in (one, [one])]
    assert pages[0] == pages[1]


def test_a_run_of_other_sizes_drops_no_rows_and_another_seed_joins_its_own():
    kept = {"larger": whole(plan())}
    rows = deepcopy(kept["larger"]["rows"])
    found = bench().run_of(kept, "larger", plan(task="cifar100"))
    assert found["rows"] == []
    assert [len(each["rows"]) for each in kept["larger"]] == [4, 0]
    assert bench().run_of(kept, "larger", plan(seeds=3)) is kept["larger"][0]
    bench().row_in(kept["larger"][0], row("marked", seed=1), PLACE)
    bench().row_in(kept["larger"][0], row("marked", seed=2), {**PLACE, "commit": "b" * 40})
    assert kept["larger"][0]["rows"][:4] == rows
    assert kept["larger"][0]["plan"]["seeds"] == 3
    origins = [
        each.get("provenance", {}).get("commit", "")[:1] for each in kept["larger"][0]["rows"]
    ]
    assert origins == ["", "", "", "", "", "b"]
    page = bench().rendered({**facts(), **kept, "larger": kept["larger"][:1]})
    assert "| seed | a class |" in page


def test_what_another_run_wrote_elsewhere_is_taken_in_once():
    mine = {name: each for name, each in facts().items() if name != "larger"}
    theirs = {**mine, "larger": whole(plan())}
    for _ in range(2):
        bench().join(mine, theirs)
    assert [len(each["rows"]) for each in mine["larger"]] == [4]
    assert mine["larger"][0]["provenance"] == PLACE
    assert mine["directions"][0]["rows"] == bench().runs_in(facts(), "directions")[0]["rows"]
    theirs["larger"] = whole(plan(task="cifar100"), 100)
    bench().join(mine, theirs)
    assert [each["plan"]["task"] for each in mine["larger"]] == ["cifar10", "cifar100"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"agrees": 0.9}, ["reached", "reached"]),
        ({"agrees": 0.9, "labels 10000": -8.9}, ["**not reached**", "reached"]),
        ({"agrees": 0.89}, ["not put to the test"] * 2),
    ],
)
def test_a_copy_that_agrees_too_little_puts_no_aim_to_the_test(changed, words):
    lines = script("answers_page").larger_aims(whole(plan(), **changed))
    assert [each[-1] for each in lines if "copy" in each[3]] == words


def test_aims_that_were_missed_or_not_run_are_said():
    page = script("answers_page")
    rows = [row(bench().BEFORE[0], 0.8051), row("marked", **{"scores 1000": -29.0})]
    lines = page.larger_aims(run(plan(), rows))
    words = {each[3]: each[4:] for each in lines}
    assert [word for _, word in words.values()] == [
        *("**not reached**", "not put to the test", "**not reached**", "reached"),
        *("not put to the test", "not put to the test"),
    ]
    assert words[f"at most 0.5 points lost, against {bench().BEFORE[0]}"][0] == "0.5"
    assert page.larger_aims(run(plan(), rows[:1])) == []


def test_a_hundred_classes_have_as_many_functions_as_a_key_may_have():
    cell = bench().Cell(16, 0.6)
    assert (cell.coins(10), cell.coins(100)) == (160, 1_600)
    assert bench().Cell(64, 0.6).coins(100) == 4_096
    shown = script("answers_page").cell_of(row("marked", classes=100))
    assert (shown.coins, shown.a_class) == (1_600, 16)


def test_names_of_trained_networks_say_all_sizes_and_are_as_they_were():
    names = [bench().named_by(each) for each in (plan(), plan(seeds=3), plan(task="cifar100"))]
    assert names[0] == "32-16-25000-10000-30-10-40-160-1-bfloat16-alexnet-resnet18-1"
    assert names[1] == names[0]
    assert names[2] == f"{names[0]}-cifar100"


def test_a_kept_key_is_of_the_same_network_or_another_is_drawn(tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    drawn = replace(ANSWERS, coins=6).draw_key(model, torch.zeros(2, 3, 4, 4), seed=bytes(32))

    def of(anchor):
        context = replace(drawn.context, anchor=anchor * 64)
        return replace(drawn, context=context)

    save_key(of("1"), tmp_path / "filters-0.6-0.key")  # as it was named before sizes were in it
    kept = bench().kept_key
    assert kept(of("1"), tmp_path, "filters-0.6", "32-16", 0).context.anchor == "1" * 64
    assert len(list(tmp_path.iterdir())) == 1
    assert kept(of("2"), tmp_path, "filters-0.6", "32-16", 0).context.anchor == "2" * 64
    assert len(list(tmp_path.iterdir())) == 2
