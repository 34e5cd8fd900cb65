"""The rules as a table: every case of two claimants, against the code and against the page."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import pytest

from nnpassport.claims.rules import ALIGNED, AS_IT_STANDS, Claimant, Outcome, Work, rule
from nnpassport.scheme import Verdict

PAGE = Path(__file__).parents[1] / "docs" / "judging.md"
DAY = datetime(2026, 1, 1, tzinfo=UTC)
BLUR = timedelta(seconds=2)

DATES = ("none", "after the suspect", "second", "first", "diary")
NETWORKS = ("none", "idle", "in the suspect")
MARKS = ("not looked for", "absent", "aligned", "stands")
KINSHIP = (True, False)
WORKS = ("not measured", "both", "a", "b")
CARRIES = {"both": (0.7, 0.6), "a": (0.95, 0.01), "b": (0.0, 1.0)}


class Has(NamedTuple):
    """What one claimant has; `mark` is where his is in the other's network."""

    date: str
    network: str
    mark: str


HAVINGS = [Has(*each) for each in product(DATES, NETWORKS, MARKS)]


def found(marked):
    p = -200.0 if marked else 0.0
    return Verdict("s", 100, 100 if marked else 50, p, -30.0)


PROVED = {AS_IT_STANDS: found(True)}
MARKED = {
    "not looked for": {},
    "absent": {AS_IT_STANDS: found(False), ALIGNED: found(False)},
    "aligned": {AS_IT_STANDS: found(False), ALIGNED: found(True)},
    "stands": {AS_IT_STANDS: found(True), ALIGNED: found(True)},
}
SPANS = {
    "none": None,
    "after the suspect": (DAY + timedelta(days=90), DAY + timedelta(days=90) + BLUR),
    "second": (DAY + timedelta(days=1), DAY + timedelta(days=1) + BLUR),
    "first": (DAY, DAY + BLUR),
    "diary": None,
}
BEGUN = (DAY - timedelta(days=30), DAY - timedelta(days=30) + BLUR)
"""When the first checkpoint that counts was stamped: claims were slower."""


@cache
def claimant(name, has, *, akin=False, carries=None, others=("a", "b")):
    span = SPANS[has.date]
    work = None if carries is None else Work(carries, 0.5, 100)
    if has.network == "idle":
        work = Work(0.0, 0.0, 100)
    return Claimant(
        name,
        time=None if span is None else span[0],
        between=span,
        older=has.date in {"first", "second"},
        readings=PROVED,
        elsewhere={other: MARKED[has.mark] for other in others if other != name},
        related=has.network != "none",
        akin={other: akin for other in others if other != name},
        work=work,
        trained=BEGUN if has.date == "diary" and has.network != "none" else None,
    )


@cache
def ruling(a, b, akin, works):
    carries = CARRIES.get(works, (None, None))
    pair = [
        claimant("a", a, akin=akin, carries=carries[0]),
        claimant("b", b, akin=akin, carries=carries[1]),
    ]
    return rule(pair)


def owner(ruled):
    """Whose it is in one word."""
    return ruled.owner if ruled.outcome is Outcome.OWNER else ruled.outcome.value


def dated(has):
    """Whether he has a dated network that the suspect was made from, by claim or by diary."""
    return has.date in {"first", "second", "diary"} and has.network == "in the suspect"


def kin(x, y, akin):
    """Whether one network was made from the other, by filters or by the mark of the earlier one."""
    order = (x.date, y.date)
    return (
        akin
        or (order == ("first", "second") and x.mark in {"aligned", "stands"})
        or (order == ("second", "first") and y.mark in {"aligned", "stands"})
    )


class Row(NamedTuple):
    """A row of the page: what it says, and when it applies, to X and Y in this order."""

    x: str
    y: str
    ruling: str
    why: str
    applies: object


ROWS = (
    Row(
        "a mark that stands in Y's network",
        "no mark in X's network by any reading, whatever else he has",
        "X",
        "Y's network was made from one of X's; no date says otherwise",
        lambda x, y, akin, works: x.mark == "stands" and y.mark == "absent",
    ),
    Row(
        "a diary with a checkpoint in the suspect, dated before any network of Y's",
        "a network dated later by claim or diary, and one of the two was made from the other",
        "X",
        "X was training it when Y had nothing; that Y claimed it first is no matter",
        lambda x, y, akin, works: (
            dated(x) and x.date == "diary" and dated(y) and y.date != "diary" and kin(x, y, akin)
        ),
    ),
    Row(
        "a dated network in the suspect",
        "none: an older key, a dated network that the suspect was not made from or in which it "
        "does nothing, a claim after the suspect, or no date",
        "X",
        "a mark for a key of any age can be put on a copy",
        lambda x, y, akin, works: dated(x) and not dated(y),
    ),
    Row(
        "a dated network in the suspect",
        "one that is younger, and one of the two was made from the other",
        "X",
        "X had it first",
        lambda x, y, akin, works: (
            dated(x) and dated(y) and kin(x, y, akin) and (x.date, y.date) == ("first", "second")
        ),
    ),
    Row(
        "a dated network in the suspect",
        "one of the same moment, and one of the two was made from the other",
        "undecided",
        "clocks do not tell the two apart",
        lambda x, y, akin, works: dated(x) and dated(y) and kin(x, y, akin) and x.date == y.date,
    ),
    Row(
        "a dated network in the suspect that does the work on the judge's images",
        "a dated network, unrelated to X's, whose channels are there and explain next to nothing",
        "X",
        "anybody can put channels beside others",
        lambda x, y, akin, works: dated(x) and dated(y) and not kin(x, y, akin) and works == "x",
    ),
    Row(
        "a dated network in the suspect",
        "another, unrelated to X's; no images, or each does a part of the work",
        "shared",
        "the suspect holds both, and neither was made from the other",
        lambda x, y, akin, works: (
            dated(x) and dated(y) and not kin(x, y, akin) and works in {"both", "not measured"}
        ),
    ),
    Row(
        "no dated network in the suspect",
        "none either, and no mark stands in the other's network alone",
        "undecided",
        "nothing shows whose was first",
        lambda x, y, akin, works: not dated(x) and not dated(y),
    ),
)


def by_the_table(a, b, akin, works):
    """The first row that applies, read in both directions."""
    sides = [
        (a, b, {"a": "x", "b": "y"}.get(works, works), ("a", "b")),
        (b, a, {"b": "x", "a": "y"}.get(works, works), ("b", "a")),
    ]
    for row in ROWS:
        said = {
            {"X": names[0], "Y": names[1]}.get(row.ruling, row.ruling)
            for x, y, does, names in sides
            if row.applies(x, y, akin, does)
        }
        if said:
            (one,) = said  # never for both at once
            return one
    raise AssertionError("no row of the table applies")


def test_the_code_rules_as_the_table_says_in_every_case():
    cases = 0
    for a, b in product(HAVINGS, HAVINGS):
        for akin, works in product(KINSHIP, WORKS):
            assert owner(ruling(a, b, akin, works)) == by_the_table(a, b, akin, works)
            cases += 1
    assert cases == 28_800


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.x)
def test_every_row_of_the_table_decides_some_case(row):
    others = ROWS[: ROWS.index(row)]
    for a, b in product(HAVINGS, HAVINGS):
        for akin, works in product(KINSHIP, ("not measured", "both", "x", "y")):
            swapped = {"x": "y", "y": "x"}.get(works, works)
            earlier = any(
                each.applies(a, b, akin, works) or each.applies(b, a, akin, swapped)
                for each in others
            )
            if row.applies(a, b, akin, works) and not earlier:
                return
    raise AssertionError("it is never reached")


def test_the_page_has_this_table():
    rows = [f"| {row.x} | {row.y} | {row.ruling} | {row.why} |" for row in ROWS]
    wanted = "\n".join(["| X has | Y has | ruling | because |", "| --- | --- | --- | --- |", *rows])
    assert wanted in PAGE.read_text(encoding="utf-8")


def test_names_and_order_do_not_matter():
    named = {"a": "b", "b": "a"}
    for a, b in product(HAVINGS[::3], HAVINGS):
        for akin, works in product(KINSHIP, WORKS):
            one = owner(ruling(a, b, akin, works))
            other = owner(ruling(b, a, akin, named.get(works, works)))
            assert one == named.get(other, other)


BETTER = {"b": 0, "undecided": 1, "shared": 2, "a": 3}
STRONGER = [
    # Not from "first" to "diary": who has the diary alone has lost the date of his claim.
    *(("date", pair) for pair in combinations(DATES, 2) if pair != ("first", "diary")),
    *(("network", (less, "in the suspect")) for less in NETWORKS[:2]),
    *(("mark", pair) for pair in [("absent", "aligned"), ("absent", "stands")]),
    *(("mark", pair) for pair in [("aligned", "stands"), ("not looked for", "stands")]),
]


@pytest.mark.parametrize(("what", "change"), STRONGER)
def test_more_evidence_never_moves_the_ruling_away(what, change):
    less, more = change
    for a, b in product(HAVINGS, HAVINGS):
        if getattr(a, what) != less:
            continue
        for akin, works in product(KINSHIP, WORKS):
            before = owner(ruling(a, b, akin, works))
            after = owner(ruling(a._replace(**{what: more}), b, akin, works))
            assert BETTER[after] >= BETTER[before]


def test_a_diary_beside_a_claim_never_moves_the_ruling_away():
    for a, b in product(HAVINGS, HAVINGS):
        if a.network == "none" or a.date == "diary":
            continue
        for akin, carries in product(KINSHIP, (None, 0.7)):
            mine = claimant("a", a, akin=akin, carries=carries)
            his = claimant("b", b, akin=akin, carries=carries)
            before = owner(rule([mine, his]))
            after = owner(rule([replace(mine, trained=BEGUN), his]))
            assert BETTER[after] >= BETTER[before]


def test_a_mark_that_is_found_in_one_s_own_network_never_helps_the_other():
    """What Y shows in X's network is Y's evidence; that it is not there is X's."""
    for a, b in product(HAVINGS, HAVINGS):
        if b.mark == "absent":
            continue
        for akin, works in product(KINSHIP, WORKS):
            before = owner(ruling(a, b, akin, works))
            after = owner(ruling(a, b._replace(mark="absent"), akin, works))
            assert BETTER[after] >= BETTER[before]


def test_images_on_which_one_s_part_works_never_hurt_him():
    for a, b, akin in product(HAVINGS, HAVINGS, KINSHIP):
        before = owner(ruling(a, b, akin, "not measured"))
        assert BETTER[owner(ruling(a, b, akin, "a"))] >= BETTER[before]


OWNER = Has("second", "in the suspect", "absent")
CHEAP = [each for each in HAVINGS if each.mark != "stands"]
"""What anybody can have: whatever he likes, but no mark as it stands in another's old file."""


def cheap(has, akin):
    """Nor a network that hers was made from, or that was made from hers before she dated it.

    Nor is his mark in hers aligned to an older network of his: hers was not made from it.
    """
    if has.date == "first" and has.network == "in the suspect" and has.mark == "aligned":
        return False
    return not (akin and dated(has))


def test_no_cheap_act_of_a_rival_makes_a_provable_owner_undecided():
    """She dated the network that the suspect was made from; he has all that is to be had."""
    for mine, rival in product(MARKS, CHEAP):
        for akin, works in product(KINSHIP, ("not measured", "both", "a")):
            if not cheap(rival, akin):
                continue
            ruled = ruling(OWNER._replace(mark=mine), rival, akin, works)
            assert "a" in ruled.owners
            if works == "a" or not dated(rival):
                assert ruled.owner == "a"


def test_nor_do_several_of_them_together():
    several = CHEAP[::2]
    for one, other in product(several, several):
        for akin in KINSHIP:
            rivals = [
                claimant(name, has, akin=akin, others=("a", "b", "c"))
                for name, has in (("b", one), ("c", other))
                if cheap(has, akin)
            ]
            # What the rivals are to each other is theirs; to her network they are not akin.
            mine = claimant("a", OWNER, akin=akin, others=("a", "b", "c"))
            ruled, turned_round = rule([mine, *rivals]), rule([*rivals, mine])
            assert "a" in ruled.owners
            assert set(ruled.owners) == set(turned_round.owners)


def test_what_cannot_be_checked_or_does_not_hold_changes_nothing():
    worthless = [
        Claimant("c", unchecked="it cannot be read"),
        Claimant("c", refused="the signature does not hold"),
        replace(claimant("c", HAVINGS[0], others=("a", "b", "c")), readings={}),
    ]
    for a, b in product(HAVINGS[::2], HAVINGS[::2]):
        before = ruling(a, b, False, "not measured")
        pair = [claimant("a", a), claimant("b", b)]
        for each in worthless:
            assert owner(rule([*pair, each])) == owner(before)


def test_a_later_younger_token_of_the_same_network_is_told_from_the_first():
    """Intervals, not points: what overlaps is no order."""
    first = claimant("a", Has("first", "in the suspect", "absent"), akin=True)
    for seconds, wanted in ((1, "undecided"), (2, "undecided"), (3, "a")):
        start = DAY + timedelta(seconds=seconds)
        second = replace(
            claimant("b", Has("second", "in the suspect", "absent"), akin=True),
            time=start,
            between=(start, start + BLUR),
        )
        assert owner(rule([first, second])) == wanted


def test_of_a_mark_of_answers_one_reading_is_all_there_is():
    """It is never read aligned, so what is not there as it stands is absent."""
    answers = replace(
        claimant("b", HAVINGS[0]),
        only_as_it_stands=True,
        elsewhere={"a": {AS_IT_STANDS: found(False)}},
    )
    assert rule([claimant("a", Has("none", "none", "stands")), answers]).owner == "a"
    weights = replace(answers, only_as_it_stands=False)
    assert rule([claimant("a", Has("none", "none", "stands")), weights]).owner is None


def test_who_proves_an_order_alone_is_no_owner_over_a_dated_network_that_lost_its_mark():
    """An order costs nothing and takes another's away; a passport does not."""
    victim = replace(claimant("a", Has("first", "in the suspect", "absent")), readings={})
    thief = claimant("b", Has("second", "in the suspect", "stands"))
    undated = claimant("b", Has("none", "none", "stands"))
    assert rule([victim, thief]).owner == "b"  # a mark is what is asked for
    for one in (thief, undated):
        assert owner(rule([victim, replace(one, by_order=True)])) == "undecided"
    assert owner(rule([replace(thief, by_order=True)])) == "b"


def test_nothing_that_is_cheap_takes_an_order_s_owner_his_ruling():
    """Another's network has to be dated, in the suspect, and there before his."""
    mine = replace(claimant("a", Has("first", "in the suspect", "not looked for")), by_order=True)
    for date, network in product(DATES, NETWORKS):
        other = replace(claimant("b", Has(date, network, "absent")), readings={})
        before = network == "in the suspect" and date in {"diary", "first"}  # or the same moment
        wanted = "undecided" if before else "a"
        assert owner(rule([mine, other])) == wanted, (date, network)
    same = replace(
        claimant("b", Has("first", "in the suspect", "absent")), readings={}, owner_key="k"
    )
    assert owner(rule([replace(mine, owner_key="k"), same])) == "a"
