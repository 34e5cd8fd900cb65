import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnpassport.keys.chance import (
    LOG10_ALPHA_COMMITTED,
    LOG10_ALPHA_UNCOMMITTED,
    log10_binomial_tail,
    log_binomial_tail,
    matches_needed,
)
from nnpassport.scheme import MiscountedError

HALF, TENTH = Fraction(1, 2), Fraction(1, 10)


def exact_log_tail(matches, trials, chance):
    """Log of the tail by integer arithmetic; 1 − complement where the tail is nearly 1."""
    hit, all_ = chance.numerator, chance.denominator
    counts = [
        math.comb(trials, i) * hit**i * (all_ - hit) ** (trials - i)
        for i in range(matches, trials + 1)
    ]
    with mpmath.workdps(400):
        return mpmath.log(mpmath.mpf(sum(counts)) / mpmath.mpf(all_) ** trials)


def summed_log_tail(matches, trials, chance):
    """Log of the tail above the mean, term by term in 60 digits until nothing is added."""
    with mpmath.workdps(60):
        hit = mpmath.mpf(chance.numerator) / chance.denominator
        term = mpmath.exp(
            mpmath.loggamma(trials + 1)
            - mpmath.loggamma(matches + 1)
            - mpmath.loggamma(trials - matches + 1)
            + matches * mpmath.log(hit)
            + (trials - matches) * mpmath.log(1 - hit)
        )
        total, odds = mpmath.mpf(0), hit / (1 - hit)
        for i in range(matches, trials + 1):
            total += term
            term *= odds * (trials - i) / (i + 1)
            if term < total * mpmath.mpf(10) ** -40:
                break
        return mpmath.log(total)


def relative_error(value, oracle):
    return float(abs((mpmath.mpf(value) - oracle) / oracle))


@pytest.mark.parametrize("chance", [HALF, TENTH, Fraction(9, 10), Fraction(1, 1000)])
@pytest.mark.parametrize("trials", [1, 2, 7, 64, 311])
def test_tail_is_that_of_exact_arithmetic(trials, chance):
    for matches in range(1, trials + 1, max(1, trials // 40)):
        value = log_binomial_tail(matches, trials, float(chance))
        assert relative_error(value, exact_log_tail(matches, trials, chance)) < 1e-9


@pytest.mark.parametrize(
    ("matches", "chance"),
    [
        *((k, HALF) for k in (50_001, 50_100, 51_000, 60_000, 99_999, 100_000)),
        *((k, TENTH) for k in (10_001, 10_100, 12_000, 50_000, 100_000)),
    ],
)
def test_tail_of_a_hundred_thousand_trials_is_exact(matches, chance):
    value = log_binomial_tail(matches, 100_000, float(chance))
    assert relative_error(value, summed_log_tail(matches, 100_000, chance)) < 1e-11


@pytest.mark.parametrize("matches", [48_000, 49_000, 49_900, 50_000])
def test_tail_near_one_is_exact(matches):
    # At chance ½ the complement P[X < k] is the mirrored tail P[X ≥ n − k + 1].
    with mpmath.workdps(60):
        complement = mpmath.exp(summed_log_tail(100_001 - matches, 100_000, HALF))
        oracle = mpmath.log1p(-complement)
    assert relative_error(log_binomial_tail(matches, 100_000), oracle) < 1e-9


def test_known_values():
    assert log10_binomial_tail(2560, 2560) == pytest.approx(-2560 * math.log10(2), rel=1e-13)
    assert log10_binomial_tail(100_000, 100_000) == pytest.approx(-30102.99956639812, rel=1e-12)
    assert log_binomial_tail(1, 1) == pytest.approx(math.log(0.5))
    assert log_binomial_tail(3, 5) == pytest.approx(math.log(0.5))


@given(trials=st.integers(1, 3000), chance=st.floats(0.001, 0.999), data=st.data())
@settings(max_examples=60, deadline=None)
def test_tail_falls_with_every_match(trials, chance, data):
    matches = data.draw(st.integers(0, trials - 1))
    here, next_ = (log_binomial_tail(k, trials, chance) for k in (matches, matches + 1))
    assert next_ <= here <= 0


def test_no_matches_are_certain():
    assert log_binomial_tail(0, 10) == 0.0


@pytest.mark.parametrize("chance", [0.0, 1.0, -0.1, 1.1, math.nan])
def test_refuses_a_chance_that_is_none(chance):
    with pytest.raises(ValueError, match="chance"):
        log_binomial_tail(1, 2, chance)


@pytest.mark.parametrize(
    ("matches", "trials"),
    [(3, 2), (0, 0), (0, -1), (-3, 10), (1.0, 2), (True, 2), (1, 2.0), (np.int64(1), 2)],
)
def test_refuses_counts_that_no_reading_gives(matches, trials):
    with pytest.raises(MiscountedError, match="trials"):
        log_binomial_tail(matches, trials)


@given(
    trials=st.integers(1, 2000),
    log10_alpha=st.floats(-60, -0.01),
    chance=st.sampled_from([0.5, 0.1, 0.01]),
)
@settings(max_examples=40, deadline=None)
def test_matches_needed_is_the_smallest_number_that_suffices(trials, log10_alpha, chance):
    needed = matches_needed(trials, log10_alpha, chance)
    if needed <= trials:
        assert log10_binomial_tail(needed, trials, chance) <= log10_alpha
    assert log10_binomial_tail(needed - 1, trials, chance) > log10_alpha


def test_matches_needed_says_when_nothing_suffices():
    assert matches_needed(20, LOG10_ALPHA_COMMITTED) == 21
    assert matches_needed(30, LOG10_ALPHA_COMMITTED) == 30


def test_thresholds():
    assert LOG10_ALPHA_COMMITTED == -9
    assert pytest.approx(2.0**-100, rel=1e-12) == 10.0**LOG10_ALPHA_UNCOMMITTED
    assert matches_needed(100, LOG10_ALPHA_UNCOMMITTED + 1e-9) == 100
