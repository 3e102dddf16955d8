import math

import numpy as np
import pytest
from scipy import stats

from mha_jax.reporting.statistics import holm, interval, paired


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
