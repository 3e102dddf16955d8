import math

import numpy as np
import pytest
from scipy import stats

from mha_jax.reporting.power import detectable, power, power_of_likeness, seeds_needed, spread_factors


@pytest.mark.parametrize(("size", "n"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_needed_are_those_of_the_tables(size: float, n: int):
    """Paired t-test, two-sided 5 %, power 80 % (Cohen 1988): the size in standard deviations of the differences."""
    assert seeds_needed(size, 1.0) == n
    assert seeds_needed(-0.03 * size, 0.03) == n  # in any unit and whichever way


@pytest.mark.parametrize("n", [2, 3, 10, 40])
def test_power_is_that_of_scipys_noncentral_t(n: int):
    """The mean over 2000 shares of the denominator is off by less than 1e-5; a seed more changes power by 1e-3."""
    limit, shift = stats.t.ppf(0.975, n - 1), 0.7 * math.sqrt(n)
    expected = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
    assert power(1.4, 2.0, n) == pytest.approx(expected, abs=2e-5)


def test_without_an_effect_power_is_the_error():
    assert power(0.0, 1.0, 7) == pytest.approx(0.05, abs=2e-5)


def test_what_is_detectable_is_found_with_80_percent_power():
    for n, level in ((2, 0.95), (3, 0.99), (10, 0.95)):
        assert power(detectable(0.02, n, level), 0.02, n, level) == pytest.approx(0.8, abs=1e-6)
    assert detectable(1.0, 10) == pytest.approx(0.996, abs=1e-3)  # so that 10 seeds are needed for 1.0, and 9 miss it


def test_power_of_likeness_bounds_the_share_of_drawn_sweeps_from_below():
    x = np.random.default_rng(0).standard_normal((40_000, 10))
    mean, half = x.mean(1), stats.t.ppf(0.975, 9) * x.std(1, ddof=1) / math.sqrt(10)
    share = np.mean((mean + half < 1.3) & (mean - half > -1.3))
    assert power_of_likeness(1.3, 1.0, 10) == pytest.approx(share, abs=0.02)
    n = seeds_needed(1.3, 1.0, of=power_of_likeness)
    assert n is not None and power_of_likeness(1.3, 1.0, n - 1) < 0.8 <= power_of_likeness(1.3, 1.0, n)


def test_what_no_sweep_can_afford_is_no_number():
    assert seeds_needed(1e-4, 1.0) is None
    assert seeds_needed(0.0, 1.0) is None


def test_without_spread_two_seeds_show_anything():
    assert seeds_needed(0.01, 0.0) == 2
    assert detectable(0.0, 3) == 0.0
    assert seeds_needed(0.01, 0.0, of=power_of_likeness) == 2


def test_far_out_there_is_a_number_still():
    """A hundred spreads apart, at a level that few seeds bear: scipy's noncentral t is NaN there."""
    assert seeds_needed(100.0, 1.0, level=0.9999) == 3


def test_the_spread_of_three_seeds_is_barely_known():
    """sqrt(2 / 7.3778) and sqrt(2 / 0.050636), the chi-squared quantiles with 2 degrees of freedom."""
    assert spread_factors(3) == pytest.approx((0.5207, 6.2847), abs=1e-3)
