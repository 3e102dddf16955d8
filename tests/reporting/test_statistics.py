import math

import numpy as np
import pytest
from scipy import stats

from mha_jax.reporting.statistics import (
    holm,
    holm_rows,
    improvement,
    interquartile_mean,
    interval,
    mean_and_error,
    p_above,
    paired,
)


def test_interval_is_that_of_scipy():
    values = [1.31, 1.27, 1.44, 1.38, 1.29]
    found = interval(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None and found.n == 5
    np.testing.assert_allclose((found.low, found.high), expected, rtol=1e-12)


def test_interval_of_three_seeds_by_hand():
    """s = 1, t(0.975, 2) = 4.302653, so 2 ± 4.302653 / sqrt(3)."""
    found = interval([1.0, 2.0, 3.0])
    assert found is not None
    assert found.half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_a_mean_and_no_interval():
    found = interval([2.5])
    assert found is not None
    assert (found.mean, found.low, found.high, found.n, found.p, found.half_width) == (2.5, None, None, 1, None, None)


def test_seeds_that_diverged_do_not_count():
    found = interval([1.0, math.nan, 3.0, math.inf])
    assert found is not None and (found.n, found.mean) == (2, 2.0)
    assert interval([math.nan]) is None


def test_paired_difference_is_that_of_scipy_and_ignores_seeds_without_a_partner():
    a, b = {0: 1.52, 1: 1.47, 2: 1.61, 7: 9.0}, {2: 1.55, 0: 1.49, 1: 1.46, 5: -3.0}
    found = paired(a, b)
    expected = stats.ttest_rel([1.52, 1.47, 1.61], [1.49, 1.46, 1.55])
    assert found is not None and found.n == 3
    assert found.mean == pytest.approx(0.1 / 3)
    assert found.p == pytest.approx(expected.pvalue)
    np.testing.assert_allclose((found.low, found.high), expected.confidence_interval(0.95))


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.25, 0.0)])
def test_equal_differences_need_no_test_statistic(shift: float, p: float):
    found = paired({0: 1.0 + shift, 1: 2.0 + shift}, {0: 1.0, 1: 2.0})
    assert found is not None and (found.low, found.high, found.p) == (shift, shift, p)


def test_holm_by_hand():
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (not below the one before), 0.06."""
    assert holm([0.03, 0.01, None, 0.04, 0.02]) == pytest.approx([0.06, 0.04, None, 0.06, 0.06])


def test_holm_stops_at_one():
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_holm_over_rows_is_holm_of_each_row():
    p = np.random.default_rng(3).random((5, 2, 4)) ** 3
    expected = [[holm(list(row)) for row in block] for block in p]
    np.testing.assert_array_equal(holm_rows(p), expected)


def test_one_sided_p_without_spread_takes_the_side():
    np.testing.assert_array_equal(p_above([1.0, -1.0, 0.5], [0.0, 0.0, 0.0], 3, 0.5), [0.0, 1.0, 0.5])


def test_one_sided_p_is_that_of_scipy():
    x = [0.3, 0.1, 0.7, 0.2]
    mean, error = mean_and_error(np.array(x))
    _, expected = stats.ttest_1samp(x, 0.1, alternative="greater")
    assert p_above(mean, error, 4, 0.1) == pytest.approx(expected)


def test_interquartile_mean_by_hand():
    """Of ten values int(10 / 4) = 2 are cut off at either end: the mean of 3, 4, 5, 6, 7 and 8."""
    found = interquartile_mean([100.0, 1.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0, -50.0, 9.0])
    assert found is not None and found.n == 10
    assert found.mean == pytest.approx(33 / 6)
    assert found.low is not None and found.high is not None and -50 < found.low < found.mean < found.high < 100


def test_interquartile_mean_needs_four_seeds():
    assert interquartile_mean([1.0, 2.0, 3.0]) is None
    assert interquartile_mean([1.0, 2.0, 3.0, math.nan]) is None
    assert interquartile_mean([1.0, 2.0, 4.0, 9.0]).mean == pytest.approx(3.0)  # pyright: ignore


def test_bootstrap_is_the_same_at_every_call():
    values = [1.31, 1.27, 1.44, 1.38, 1.29]
    assert interquartile_mean(values) == interquartile_mean(list(values))


def test_bootstrap_covers_about_as_often_as_it_says():
    """Ten normal seeds, 60 times: a percentile interval is short, 90 % here; binomial error 4 %."""
    samples = np.random.default_rng(0).standard_normal((60, 10))
    inside = [e.low < 0 < e.high for x in samples if (e := interquartile_mean(list(x)))]  # pyright: ignore
    assert 0.78 < np.mean(inside) < 0.99


def test_improvement_by_hand():
    """Better in 3 of 4 common seeds; Clopper and Pearson give 0.1941 to 0.9937."""
    a, b = {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0, 8: 0.0}, {0: 1.1, 1: 2.1, 2: 3.1, 3: 4.0, 9: 0.0}
    found = improvement(a, b, lower_is_better=True)
    assert found is not None and (found.mean, found.n) == (0.75, 4)
    expected = stats.binomtest(3, 4).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert improvement(a, b, lower_is_better=False).mean == 0.25  # pyright: ignore


def test_improvement_counts_ties_half_and_stays_within_0_and_1():
    tie = improvement({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}, lower_is_better=True)
    sure = improvement({0: 0.0, 1: 0.0, 2: 0.0}, {0: 1.0, 1: 1.0, 2: 1.0}, lower_is_better=True)
    assert tie is not None and tie.mean == 0.5
    assert sure is not None and (sure.mean, sure.high) == (1.0, 1.0) and sure.low == pytest.approx(0.025 ** (1 / 3))
    assert improvement({0: math.nan}, {0: 1.0}, lower_is_better=True) is None
