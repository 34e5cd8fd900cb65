"""`compare`: two networks, no key; what chance gives, what it does not show, and its traps."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from nnpassport.alignment.axes import Axes, Axis, Place
from nnpassport.alignment.inside import Agreement, agreements, pairs_of, sizes_of
from nnpassport.alignment.order import (
    MOST_UNITS,
    Order,
    counted_axes,
    fixed_points,
    log10_fixed_points,
    order_of,
)
from nnpassport.report.comparison import comparison_page, summary
from nnpassport.scheme import MiscountedError, UnreadableModelError
from nnpassport.verification.cards import declared_bases
from nnpassport.verification.compare import compare
from nnpassport.verification.difference import KINDS, difference
from nnpassport.verification.equal import equal_tensors
from nnpassport.verification.lineage import Network, Outcome, open_network

INPUTS, FIRST, SECOND, CLASSES = 64, 96, 48, 10


def drawn(seed, widths=(INPUTS, FIRST, SECOND, CLASSES)):
    """A network as it is before training: matrices named as torch names them."""
    rng = np.random.default_rng(seed)
    found = {}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        found[f"{2 * index}.weight"] = rng.standard_normal((outputs, inputs)) / math.sqrt(inputs)
        found[f"{2 * index}.bias"] = 0.1 * rng.standard_normal(outputs)
    return {name: each.astype(np.float32) for name, each in found.items()}


def network(tensors, name="network", axes=None):
    return Network(name, tensors, {name: str(hash(name))}, axes)


def shaken(tensors, share, seed=0):
    """The same with noise of so much of each tensor's size."""
    rng = np.random.default_rng(1000 + seed)  # not the numbers that the network was drawn with
    return {
        name: (each + share * each.std() * rng.standard_normal(each.shape)).astype(each.dtype)
        for name, each in tensors.items()
    }


def permuted(tensors, seed=0):
    """A network of three layers whose hidden units are in another order: it computes the same."""
    rng = np.random.default_rng(seed)
    p, q = rng.permutation(FIRST), rng.permutation(SECOND)
    found = dict(tensors)
    found["0.weight"], found["0.bias"] = tensors["0.weight"][p], tensors["0.bias"][p]
    found["2.weight"], found["2.bias"] = tensors["2.weight"][q][:, p], tensors["2.bias"][q]
    found["4.weight"] = tensors["4.weight"][:, q]
    return found


AXES = Axes(
    (
        Axis(
            FIRST,
            "permute",
            (),
            (Place("0.weight", 0), Place("0.bias", 0), Place("2.weight", 1)),
        ),
        Axis(
            SECOND,
            "permute",
            (),
            (Place("2.weight", 0), Place("2.bias", 0), Place("4.weight", 1)),
        ),
    ),
    {f"{n}.weight": (1, None) for n in (0, 2, 4)},
    {},
    {},
    {},
)


def outcome(a, b, **others):
    return compare(network(a, "a"), network(b, "b"), **others).outcome


# The law


def test_the_law_of_fixed_points_is_that_of_all_permutations():
    for size in range(1, 8):
        counts = Counter(
            sum(i == j for i, j in enumerate(each)) for each in itertools.permutations(range(size))
        )
        for count in range(size + 1):
            exact = sum(n for c, n in counts.items() if c >= count) / math.factorial(size)
            assert log10_fixed_points(count, [size]) == pytest.approx(math.log10(exact), abs=1e-9)


def test_fixed_points_of_several_permutations_add_up():
    sizes = (4, 3, 5)
    laws = [
        Counter(
            sum(i == j for i, j in enumerate(each)) for each in itertools.permutations(range(n))
        )
        for n in sizes
    ]
    total = math.prod(map(math.factorial, sizes))
    for count in range(sum(sizes) + 1):
        ways = sum(
            math.prod(n for _, n in each)
            for each in itertools.product(*(law.items() for law in laws))
            if sum(c for c, _ in each) >= count
        )
        assert log10_fixed_points(count, sizes) == pytest.approx(math.log10(ways / total), abs=1e-9)


def test_all_of_many_units_in_place_have_the_p_value_of_one_permutation():
    """n! overflows every float."""
    for size in (64, 512):
        exact = -math.lgamma(size + 1) / math.log(10)
        assert log10_fixed_points(size, [size]) == pytest.approx(exact, rel=1e-9)
        assert log10_fixed_points(4 * size, [size] * 4) == pytest.approx(4 * exact, rel=1e-9)


def test_counts_that_no_matching_gives_are_refused():
    for count, sizes in ((5, [4]), (-1, [4]), (0, []), (0, [0])):
        with pytest.raises(MiscountedError):
            log10_fixed_points(count, sizes)


def test_the_tail_of_many_long_axes_is_no_zero():
    """A transformer's: 37 axes of different sizes, nearly all units or all in place."""
    sizes, total = [512] * 13 + [64] * 24, 512 * 13 + 64 * 24
    exact = -sum(math.lgamma(size + 1) for size in sizes) / math.log(10)
    assert log10_fixed_points(total, sizes) == pytest.approx(exact, rel=1e-12)
    found = [log10_fixed_points(count, sizes) for count in range(total, total - 40, -1)]
    assert all(math.isfinite(each) for each in found)
    assert found == sorted(found)
    # One axis lacks two: of 512, or of 64, which of them are the two is all there is to choose.
    ways = 13 * math.comb(512, 2) + 24 * math.comb(64, 2)
    assert found[2] == pytest.approx(exact + math.log10(1 + ways), abs=1e-6)
    assert log10_fixed_points(37, sizes) == pytest.approx(math.log10(0.522), abs=0.01)


def test_units_that_are_all_alike_are_matched_by_lot():
    """Else zeroed or dead units would all be in their own place."""
    rng = np.random.default_rng(0)
    found = [fixed_points(np.zeros((32, 32)), rng) for _ in range(400)]
    assert abs(np.mean(found) - 1) < 0.25
    assert max(found) <= 7


def test_equal_units_are_matched_by_lot_also_with_ones_that_somebody_has_sorted():
    """Solvers go through rows in order: the first of equal ones got the best column, and so on."""
    rng = np.random.default_rng(0)
    for side in (1, -1):
        sorted_by_likeness = np.tile(np.arange(32.0)[::side], (32, 1))
        for similarity in (sorted_by_likeness, sorted_by_likeness.T):
            found = [fixed_points(similarity, rng) for _ in range(100)]
            assert max(found) <= 7
            assert np.mean(found) == pytest.approx(1, abs=0.5)


def test_matched_units_of_independent_networks_have_the_law():
    """1,000 pairs that share what a task gives: all rows have one pattern, none has its own."""
    rng = np.random.default_rng(1)
    common = 2 * rng.standard_normal((1, 40))
    counts = np.zeros(8)
    for _ in range(1000):
        a, b = (common + rng.standard_normal((24, 40)) for _ in range(2))
        counts[min(order_of("", [("", a, b)], rng).fixed, 7)] += 1
    expected = np.diff([10 ** log10_fixed_points(n, [24]) for n in range(8)]) * -1000
    assert abs(counts[:4] - expected[:4]).max() < 4 * math.sqrt(400)
    assert counts @ np.arange(8) / 1000 == pytest.approx(1, abs=0.13)


def test_of_a_long_axis_so_many_units_are_matched_as_are_enough():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2000, 30))
    found = order_of("", [("w", rows, rows)], rng)
    assert (found.units, found.fixed) == (MOST_UNITS, MOST_UNITS)


# Which axes count


def test_no_tensor_serves_two_axes_and_none_that_is_on_an_axis_twice():
    square = Axis(32, "permute", (), (Place("in", 0), Place("square", 0), Place("square", 1)))
    inner = Axis(16, "permute", (), (Place("up", 0), Place("down", 1)))
    outer = Axis(32, "permute", (), (Place("up", 1), Place("down", 0), Place("wide", 0)))
    table = Axes((square, inner, outer), {}, {}, {}, {})
    usable = {"in": 64, "square": 1024, "up": 512, "down": 512, "wide": 3200}
    found = dict(counted_axes(table, usable))
    served = [place.tensor for places in found.values() for place in places]
    assert "square" not in served
    assert len(served) == len(set(served)) == 4
    assert set(found) == {0, 1, 2}
    assert {place.tensor for place in found[2]} == {"wide"}  # the anchored axis comes first


def test_what_is_only_written_or_only_read_is_outside():
    a = {"in": np.ones((96, 64)), "mid": np.ones((48, 96)), "out": np.ones((10, 48))}
    found = sizes_of(a, a)
    assert found.inside == (48, 96)
    assert set(found.outside) == {10, 64}
    assert not found.open_ends


def test_square_matrices_and_diagonals_do_not_count():
    """Two trainings that begin with an identity keep its diagonal, and share no unit."""
    rng = np.random.default_rng(0)

    def one():
        state = np.concatenate([np.eye(48), np.zeros((48, 20))], 1)
        return {
            "cell": 2 * state + 0.1 * rng.standard_normal((48, 68)),
            "square": np.eye(48) + 0.1 * rng.standard_normal((48, 48)),
            "out": rng.standard_normal((10, 48)),
        }

    a, b = one(), one()
    assert agreements(a, b, [48], pairs_of(a, b, rng), rng) == []
    assert outcome(a, b) is Outcome.UNDECIDED


def test_views_that_agree_are_not_multiplied():
    """Tensors of one size may share an axis: two that agree are worth one."""
    one = Order("", 20, 12, ())
    both = Agreement(20, (one, one), (1, 1))
    assert both.log10_p == pytest.approx(one.log10_p)  # the second best of two counts, once
    assert Agreement(20, (one, one, one), (1, 1, 1)).log10_p == pytest.approx(
        one.log10_p + math.log10(2)
    )
    chosen = Agreement(20, (one,), (7,))
    assert chosen.log10_p == pytest.approx(one.log10_p + math.log10(7))


def test_most_tensors_of_a_size_have_to_agree():
    good, bad = Order("", 20, 20, ()), Order("", 20, 1, ())
    found = Agreement(20, (good, bad), (1, 1))
    assert found.log10_p > -1
    assert found.log10_least < -15


# Networks


def test_independent_networks_show_no_sign():
    for seed in range(1, 6):
        assert outcome(drawn(0), drawn(seed)) is Outcome.NONE


def test_a_changed_copy_is_related_under_any_names_in_any_kind_of_numbers():
    copy = shaken(drawn(0), 0.3)
    renamed = {f"module.{n}.x": each for n, each in enumerate(copy.values())}
    for each in (copy, renamed, {n: e.astype(np.float16) for n, e in copy.items()}):
        found = compare(network(each, "a"), network(drawn(0), "b"))
        assert found.related
        assert found.order.log10_p < -50
        assert "not independently initialised" in found.reasons[0]


def test_related_never_says_copied():
    found = compare(network(shaken(drawn(0), 0.3), "a"), network(drawn(0), "b"))
    assert not any("copied" in each or "stolen" in each for each in found.reasons)
    assert any("one seed" in each for each in found.limits)
    assert any("first" in each for each in found.limits)


def test_two_linear_classifiers_are_not_told_apart():
    """Their rows are classes: they match between any two networks that do the same job."""
    rng = np.random.default_rng(0)
    job = rng.standard_normal((CLASSES, INPUTS))
    a, b = ({"weight": job + 0.1 * rng.standard_normal(job.shape)} for _ in range(2))
    found = compare(network(a, "a"), network(b, "b"))
    assert found.outcome is Outcome.UNDECIDED
    assert found.order.log10_p is None


def _outside_agrees(widths, shared, seed):
    """Two independent networks, of which the tensors in `shared` are one and the same job's."""
    job = np.random.default_rng(99)
    common = {}
    pair = []
    for each in (seed, seed + 1):
        tensors = drawn(each, widths)
        for name in shared:
            common.setdefault(name, 3 * job.standard_normal(tensors[name].shape))
            tensors[name] = (tensors[name] + common[name]).astype(np.float32)
        pair.append(tensors)
    return pair


@pytest.mark.parametrize(
    ("widths", "shared"),
    [
        ((64, 10, 10), ["2.weight"]),
        ((64, 12, 12), ["2.weight"]),
        ((64, 20, 20, 20), ["4.weight"]),
        ((64, 48, 20, 20), ["4.weight"]),
        ((64, 20, 48, 20), ["4.weight"]),
        ((64, 32, 64), ["2.weight"]),  # an autoencoder: pixels are written
        ((64, 48, 32, 48, 64), ["6.weight"]),
    ],
)
def test_hidden_layers_as_wide_as_what_is_outside_bring_no_false_yes(widths, shared):
    a, b = _outside_agrees(widths, shared, seed=3)
    assert outcome(a, b) is not Outcome.RELATED


def test_a_skip_from_the_input_brings_no_false_yes():
    """y = x + W₂ relu(W₁ x): rows of W₂ are pixels, and another tensor reads them."""
    rng, job = np.random.default_rng(0), np.random.default_rng(1)
    pixels = 3 * job.standard_normal((784, 64))

    def one(extra):
        tensors = {
            "up": rng.standard_normal((64, 784)),
            "down": pixels + rng.standard_normal((784, 64)),
            "head": rng.standard_normal((10, 784)),
        }
        return {**tensors, **({"condition": rng.standard_normal((64, 17))} if extra else {})}

    for extra in (False, True):
        found = compare(network(one(extra), "a"), network(one(extra), "b"))
        assert found.outcome is Outcome.UNDECIDED
        assert found.order.log10_least is not None
        assert found.order.log10_least < -6  # the pixels do agree


def test_tied_embeddings_bring_no_false_yes_and_hide_no_copy():
    rng, job = np.random.default_rng(0), np.random.default_rng(1)
    words = 3 * job.standard_normal((256, 40))

    def one():
        return {
            "embedding": words + rng.standard_normal((256, 40)),
            **{f"{n}.attention": rng.standard_normal((40, 40)) for n in range(2)},
            **{f"{n}.up": rng.standard_normal((160, 40)) for n in range(2)},
            **{f"{n}.down": rng.standard_normal((40, 160)) for n in range(2)},
        }

    a = one()
    assert outcome(a, one()) is Outcome.NONE
    assert outcome(shaken(a, 0.3), a) is Outcome.RELATED


def test_a_new_part_beside_an_old_one_is_undecided_by_shapes():
    """A size that does not agree may be a new head, or the only hidden one."""
    a, b = drawn(0), drawn(1)
    half = {**shaken(a, 0.3), "2.weight": b["2.weight"], "4.weight": b["4.weight"]}
    assert outcome(half, a) is Outcome.UNDECIDED
    assert outcome(half, network(a, "b", AXES).tensors) is Outcome.UNDECIDED
    found = compare(network(half, "a"), network(a, "b", AXES))
    assert found.related  # the axes are known, and are added up


def test_networks_without_a_shape_in_common_are_undecided():
    found = compare(network(drawn(0), "a"), network(drawn(0, (7, 13, 5)), "b"))
    assert found.outcome is Outcome.UNDECIDED
    assert "one shape" in found.reasons[0]
    assert summary(found.as_dict())


def test_a_common_base_explains_everything():
    base = drawn(0)
    a, b = shaken(base, 0.3, seed=1), shaken(base, 0.3, seed=2)
    assert outcome(a, b) is Outcome.RELATED
    found = compare(network(a, "a"), network(b, "b"), unrelated=[network(base, "base")])
    assert found.outcome is Outcome.UNDECIDED
    assert "base" in found.reasons[0]
    assert found.unrelated[0].explains
    stranger = compare(network(a, "a"), network(b, "b"), unrelated=[network(drawn(7), "other")])
    assert stranger.related
    assert not stranger.unrelated[0].explains


def test_tensors_that_the_base_does_not_have_are_not_explained_by_it():
    base = drawn(0)
    a = shaken(base, 0.3, seed=1)
    b = {**shaken(base, 0.3, seed=2), "2.weight": a["2.weight"]}
    found = compare(network(a, "a"), network(b, "b"), unrelated=[network(base, "base")])
    assert found.related
    assert "2.weight" in found.reasons[0]
    kept = {**b, "2.weight": base["2.weight"]}
    a = {**a, "2.weight": base["2.weight"]}
    assert outcome(a, kept, unrelated=[network(base, "base")]) is Outcome.UNDECIDED


def test_a_permuted_copy_has_no_order_and_holds_the_same_numbers():
    found = compare(network(permuted(drawn(0)), "a"), network(drawn(0), "b"))
    assert found.order.log10_p > -3
    assert found.related
    assert "in another order" in found.reasons[0]


def test_a_permuted_and_changed_copy_is_seen_over_its_axes_alone():
    suspect = permuted(shaken(drawn(0), 0.3))
    bare = compare(network(suspect, "a"), network(drawn(0), "b"))
    assert bare.outcome is Outcome.NONE
    assert any("put into another order" in each for each in bare.limits)
    owner = network(drawn(0), "b", AXES)
    alone = compare(network(suspect, "a"), owner)
    assert alone.outcome is Outcome.UNDECIDED  # only mixtures to hold it against
    strangers = [network(drawn(seed), str(seed)) for seed in range(10, 18)]
    found = compare(network(suspect, "a"), owner, unrelated=strangers)
    assert found.related
    assert found.aligned.log10_p < -6
    other = compare(network(drawn(1), "a"), owner, unrelated=strangers)
    assert other.outcome is Outcome.NONE


def test_over_a_table_of_axes_orders_are_independent_and_add_up():
    found = compare(network(shaken(drawn(0), 0.3), "a"), network(drawn(0), "b", AXES))
    assert found.order.how == "axes"
    assert (found.order.log10_p, len(found.order.orders)) == (
        pytest.approx(-(math.lgamma(FIRST + 1) + math.lgamma(SECOND + 1)) / math.log(10), rel=0.01),
        2,
    )
    assert outcome(drawn(1), drawn(0)) is Outcome.NONE


def test_a_table_of_another_network_is_refused_if_it_was_named_and_else_left_out():
    other = network(drawn(0, (64, 30, 10)), "b", AXES)
    with pytest.raises(UnreadableModelError):
        compare(network(drawn(0), "a"), other._replace(named=True))
    assert "left out" in compare(network(drawn(0), "a"), other).order.reason


def test_no_table_that_a_suspect_brings_along_hides_a_copy():
    """One without axes, one whose axes are none, one of another network, and one with his own."""
    copy, owner = shaken(drawn(0), 0.3), network(drawn(0), "b")
    rigid = Axes((), {}, {}, {}, {})
    classes = Axis(CLASSES, "permute", (), (Place("4.bias", 0),))
    pixels = Axis(INPUTS, "permute", (), (Place("0.weight", 1),))
    for axes in (rigid, replace(AXES, axes=(classes,)), replace(AXES, axes=(pixels,)), AXES):
        found = compare(network(copy, "a", axes), owner)
        assert found.related, found.reasons
        assert compare(network(drawn(1), "a", axes), owner).outcome is not Outcome.RELATED


def test_a_table_is_of_no_use_where_the_names_are_others():
    other = {f"x.{name}": each for name, each in shaken(drawn(0), 0.1).items()}
    found = compare(network(other, "a"), network(drawn(0), "b", AXES))
    assert found.order.how == "shapes"
    assert "bare shapes" in found.order.reason
    assert found.related


def test_a_mixture_says_its_parents_shares():
    p, q, r = (network(shaken(drawn(0), 0.5, seed), str(seed)) for seed in (1, 2, 3))
    mixed = {n: 0.7 * p.tensors[n] + 0.3 * q.tensors[n] for n in p.tensors}
    found = compare(network(mixed, "a"), p, parents=[q, r])
    shares = {name: value for name, (value, _) in found.mixture.coefficients.items()}
    assert shares["1"] == pytest.approx(0.7, abs=1e-3)
    assert shares["2"] == pytest.approx(0.3, abs=1e-3)
    assert shares["3"] == pytest.approx(0, abs=1e-3)
    assert found.mixture.residual < 1e-3
    strange = compare(network(drawn(5), "a"), p, parents=[q])
    assert strange.mixture.residual > 0.95


# Equal tensors


def test_equal_tensors_are_found_under_any_name_in_any_kind_of_numbers():
    a = {"w": np.arange(200, dtype=np.float32).reshape(10, 20), "ones": np.ones((10, 20))}
    b = {
        "x": a["w"].astype(np.float64),
        "turned": np.ascontiguousarray(a["w"].T),
        "sorted": a["w"][::-1],
        "one": np.ones((10, 20), np.float16),
        "other": a["w"] + 1,
    }
    found = {each.b: each for each in equal_tensors(a, b)}
    assert {name: each.how for name, each in found.items()} == {
        "x": "equal",
        "turned": "transposed",
        "sorted": "in another order",
        "one": "equal",
    }
    assert found["x"].telling
    assert not found["one"].telling


def test_tables_that_everybody_computes_alike_prove_nothing():
    """Positions as sines, a mask, filters of a Fourier transform."""
    angle = np.outer(np.arange(50), 1.0 / 10 ** np.linspace(0, 4, 24))
    table = {"positions": np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)}
    assert outcome({**drawn(0), **table}, {**drawn(1), **table}) is Outcome.NONE


# The kind of a difference


def matrix(seed, shape=(60, 80)):
    return np.random.default_rng(seed).standard_normal(shape)


def pruned(w):
    return np.where(np.abs(w) < np.quantile(np.abs(w), 0.6), 0, w)


def rounded(w, bits=4, axis=None):
    step = np.abs(w).max(axis, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.round(w / step) * step


def sparse(w):
    changed = w.copy()
    changed[3, ::7] += 1
    return changed


MADE = {
    "none": lambda w: w.copy(),
    "cast": lambda w: w.astype(np.float16),
    "pruned": pruned,
    "rounded": rounded,
    "sparse": sparse,
    "low rank": lambda w: w + 0.2 * matrix(3, (60, 4)) @ matrix(4, (4, 80)),
    "noise": lambda w: w + 0.05 * matrix(5),
    "training": lambda w: w + 0.1 * matrix(5) * np.linspace(0, 3, 60)[:, None],
    "unlike": lambda w: matrix(6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_a_difference_is_told(kind):
    w = matrix(0)
    for a, b in ((MADE[kind](w), w), (w, MADE[kind](w))):
        found = difference(a, b)
        assert found.kind == kind, found


def test_figures_of_a_difference_are_those_of_what_was_done():
    w = matrix(0)
    assert "60.0 %" in difference(MADE["pruned"](w), w).detail
    assert "rank 4" in difference(MADE["low rank"](w), w).detail
    assert "0.0" in difference(MADE["noise"](w), w).detail
    for bits in (2, 3, 4, 8):
        for axis, where in ((None, "the tensor"), (1, "each row")):
            found = difference(rounded(w, bits, axis), w)
            assert found.detail == f"{bits} bits, one grid for {where}"


def test_small_numbers_beside_zeros_are_not_called_the_same_in_another_kind():
    """In 8 bits all of them would be zero."""
    assert difference(1e-6 * matrix(0), np.zeros((60, 80))).kind != "cast"


def test_norms_that_are_all_near_one_are_not_alike_for_that():
    """Two gains near 1 have cosine 0.99, which says nothing: correlation is of what is left."""
    rng = np.random.default_rng(0)
    a, b = (1 + 0.1 * rng.standard_normal(600) for _ in range(2))
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.98
    found = difference(a, b)
    assert found.kind == "unlike"
    assert abs(found.correlation) < 0.2


# The card


@pytest.mark.parametrize(
    ("front", "bases"),
    [
        ("base_model: someone/thing", ("someone/thing",)),
        ('license: "mit"\nbase_model: "someone/thing"  # of ours', ("someone/thing",)),
        ("base_model: [a/b, 'c/d']", ("a/b", "c/d")),
        ("base_model:\n- a/b\n  - c/d\ntags:\n- other", ("a/b", "c/d")),
        ("tags:\n- base_model", ()),
        ("base_model:", ()),
    ],
)
def test_a_card_s_base_models_are_read(tmp_path, front, bases):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nbase_model: not this\n")
    assert declared_bases(tmp_path) == bases


@pytest.mark.parametrize(
    "text", ["", "no front matter", "---\nnever ends", '---\nbase_model: "half\n---\n', "---\n"]
)
def test_a_card_that_cannot_be_read_is_refused(tmp_path, text):
    with pytest.raises(UnreadableModelError, match="no card"):
        declared_bases(tmp_path)
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(UnreadableModelError):
        declared_bases(tmp_path)


def test_what_a_card_declares_is_held_against_what_is_found(folder, call):
    for name, tensors, front, agrees in (
        ("declared", shaken(drawn(0), 0.3), "base_model: mine", True),
        ("silent", shaken(drawn(0), 0.3), "license: mit", False),
        ("false", drawn(1), "base_model: mine", False),
        ("own", drawn(1), "license: mit", True),
    ):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        (folder / name / "README.md").write_text(f"---\n{front}\n---\n")
        code, out, _ = call("compare", name, "owner.safetensors", "--card", "--json")
        assert code == (1 if tensors["0.bias"][0] == drawn(1)["0.bias"][0] else 0)
        assert json.loads(out)["card"]["agrees"] is agrees
    code, out, _ = call("compare", "false", "owner.safetensors", "--card")
    assert "no sign of it in B" in " ".join(out.split())
    assert call("compare", "owner.safetensors", "owner.safetensors", "--card")[0] == 2


# The command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(drawn(0), "owner.safetensors")
    save_file(drawn(1), "stranger.safetensors")
    save_file(shaken(drawn(0), 0.3), "tuned.safetensors")
    save_file({"w": shaken(drawn(0), 0.3)["4.weight"]}, "linear.safetensors")
    (tmp_path / "axes.json").write_bytes(AXES.to_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("suspect", "code", "said"),
    [
        ("tuned", 0, "not independently initialised"),
        ("owner", 0, "not independently initialised"),
        ("stranger", 1, "no order in common"),
        ("linear", 3, "no size is certain"),
    ],
)
def test_the_command_s_exit_code_is_the_outcome(folder, call, suspect, code, said):
    ended, out, _ = call("compare", f"{suspect}.safetensors", "owner.safetensors")
    assert ended == code
    assert said in " ".join(out.split())
    ended, out, _ = call("compare", f"{suspect}.safetensors", "owner.safetensors", "--json")
    facts = json.loads(out)
    assert ended == code
    assert facts["made_with"]["command"].startswith("nnpassport")


def test_what_cannot_be_read_is_exit_code_2(folder, call):
    assert call("compare", "absent.safetensors", "owner.safetensors")[0] == 2
    (folder / "bad.safetensors").write_bytes(b"\xff" * 100)
    assert call("compare", "bad.safetensors", "owner.safetensors")[0] == 2
    (folder / "wrong.json").write_bytes(b"{}")
    words = ("compare", "tuned.safetensors", "owner.safetensors", "--axes", "wrong.json")
    assert call(*words)[0] == 2


def test_a_table_beside_the_network_or_named_is_used(folder, call):
    words = ("compare", "tuned.safetensors", "owner.safetensors", "--axes", "axes.json", "--json")
    facts = json.loads(call(*words)[1])
    assert facts["order"]["how"] == "axes"
    beside = folder / "owner"
    beside.mkdir()
    save_file(drawn(0), beside / "model.safetensors")
    (beside / "axes.json").write_bytes(AXES.to_bytes())
    assert open_network(beside).axes == AXES
    facts = json.loads(call("compare", "tuned.safetensors", "owner", "--json")[1])
    assert facts["order"]["how"] == "axes"
    (beside / "axes.json").write_bytes(b"no table")
    code, out, _ = call("compare", "tuned.safetensors", "owner", "--json")
    assert code == 0
    assert "its axes were left out" in json.loads(out)["order"]["reason"]


def test_the_page_says_what_the_json_says(folder, call):
    words = ("compare", "tuned.safetensors", "owner.safetensors")
    more = ("--unrelated", "stranger.safetensors", "--parents", "stranger.safetensors")
    code, out, _ = call(*words, *more, "--report", "page.html", "--json")
    facts, text = json.loads(out), (folder / "page.html").read_text()
    assert code == 0
    for each in (*facts["reasons"], *facts["limits"]):
        assert each.replace("'", "&#39;") in text
    for each in facts["networks"]:
        assert all(digest in text for digest in each["digests"].values())
    for what, found, chance in summary(facts):
        assert what in text
        assert found in text
        assert chance in text
    assert text.count("<svg") == 1
    assert "http" not in text.replace("http-equiv", "")


def test_names_of_strangers_are_text_on_the_page():
    evil = "<script>alert('x')</script>\x1b[31m"
    a = {f"{evil}{name}": each for name, each in drawn(0).items()}
    found = compare(network(a, evil), network(drawn(0), "b"), unrelated=[network(a, evil)])
    text = comparison_page(found.as_dict())
    assert "<script>" not in text
    assert "\x1b" not in text


def test_the_same_files_give_the_same_answer(folder, call):
    words = ("compare", "stranger.safetensors", "owner.safetensors", "--json")
    first, second = (json.loads(call(*words)[1]) for _ in range(2))
    assert {**first, "made_with": None} == {**second, "made_with": None}
