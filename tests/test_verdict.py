"""A verdict's p-value, decision and words follow from its counts and from every choice paid for."""

import ast
import dataclasses
import math
from pathlib import Path

import pytest

import nnpassport
from nnpassport.keys.chance import log10_binomial_tail
from nnpassport.scheme import Fidelity, Verdict

TAIL = log10_binomial_tail(180, 200)
PLAIN = Verdict("s", 200, 180, TAIL, -30.0, "180 of 200 bits match")


def test_p_is_the_tail_times_every_choice():
    found = PLAIN.paid(0.3, of="readings").paid(2.0, of="claimants").paid(1.0, of="readings")
    assert dict(found.corrections) == {"readings": 1.3, "claimants": 2.0}
    assert found.log10_p_value == pytest.approx(TAIL + 3.3)
    assert PLAIN.paid(500.0).log10_p_value == 0.0
    assert PLAIN.paid(0.0, of="nothing").corrections == {}


def test_p_decision_and_words_cannot_be_set():
    fields = {field.name for field in dataclasses.fields(Verdict)}
    assert not fields & {"log10_p_value", "p_value", "marked", "accepted", "reason"}
    for name in ("log10_p_value", "marked", "reason"):
        with pytest.raises(TypeError):
            dataclasses.replace(PLAIN, **{name: None})


@pytest.mark.parametrize("choices", [0.0, 0.3, 1.0, 5.0, 9.0, 12.0])
def test_the_words_say_the_p_that_counts(choices):
    found = PLAIN.paid(choices, of="readings").remarked("so it is")
    said = f"p = 10^{found.log10_p_value:.1f}"
    assert said in found.reason
    assert ("is at or below α" in found.reason) == found.marked == (found.log10_p_value <= -30)
    assert ("readings" in found.reason) == (choices > 0)
    assert found.reason.endswith("; so it is")


def test_what_is_barred_counts_for_nothing():
    barred = dataclasses.replace(PLAIN, barred=True)
    assert PLAIN.accepted
    assert not barred.marked
    assert barred.log10_p_value == PLAIN.log10_p_value
    assert not dataclasses.replace(PLAIN, fidelity=Fidelity(0.5, 0.9, 0.03)).accepted


def test_a_chosen_key_and_a_published_rule_have_no_p():
    chosen = dataclasses.replace(PLAIN, log10_tail=None)
    assert chosen.log10_p_value is None
    assert not chosen.marked
    assert "anybody can solve" in chosen.reason
    assert dataclasses.replace(PLAIN, needed=180).marked
    assert not dataclasses.replace(PLAIN, needed=181).marked
    assert dataclasses.replace(PLAIN, needed=180).p_value is None


def test_everything_is_in_its_json():
    told = PLAIN.paid(1.0, of="claimants").as_dict()
    assert list(told) == [
        *("accepted", "scheme", "bits", "matches", "log10_p_value", "log10_alpha", "reason"),
        *("marked", "fidelity", "alignment", "claim", "layers", "digests", "chance"),
        *("candidates", "corrections", "match_rate", "p_value", "alpha"),
    ]
    assert told["corrections"] == {"claimants": 1.0}
    assert told["p_value"] == math.pow(10.0, TAIL + 1.0)


SET = frozenset(
    {"log10_tail", "found", "corrections", "remarks", "barred", "needed"}
    | {"matches", "bits", "candidates", "digests", "fidelity"}
)
"""What of a verdict says what it is worth, or on what; other types have no field of these names."""


def test_a_verdict_is_made_of_counts_and_nobody_patches_one():
    """Its own methods apart. Marks in answers have a tail that is no binomial, and one maker."""
    root = Path(nnpassport.__file__).parent
    patched, made = [], set()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called, where = ast.unparse(node.func), str(path.relative_to(root))
            if called in {"replace", "dataclasses.replace"} and where != "scheme.py":
                patched += [where for each in node.keywords if each.arg in SET]
            if called == "Verdict":
                made.add(where)
    assert not patched
    assert made == {"keys/counts.py", "keys/answers.py"}
