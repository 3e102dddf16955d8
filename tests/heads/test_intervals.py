import numpy as np
import pytest

from mha_jax.heads.intervals import mean_interval, share_interval


def test_examples_of_one_length_give_the_t_interval_of_their_means():
    x = np.array([0.1, 0.5, 0.3, 0.7])
    found = mean_interval(3 * x, np.full(4, 3))
    half = 3.182446 * x.std(ddof=1) / 2  # t of 3 degrees of freedom
    np.testing.assert_allclose(found, [0.4, 0.4 - half, 0.4 + half], atol=1e-6)  # digits of the quantile


def test_longer_examples_weigh_more_and_empty_ones_nothing():
    found = mean_interval(np.array([4.0, 0.0, 1.0]), np.array([4, 0, 2]))
    assert found.mean == pytest.approx(5 / 6)
    assert found.high - found.mean == pytest.approx(12.7062 * np.sqrt(2 * ((4 - 10 / 3) ** 2 * 2)) / 6, rel=1e-4)


def test_one_example_has_no_bounds_and_none_no_value():
    one, none = mean_interval(np.array([0.2]), np.array([1])), mean_interval(np.zeros(3), np.zeros(3))
    assert (one.low, one.high) == (-np.inf, np.inf)
    assert np.isnan(none).all()


def test_share_is_wilsons_where_answers_are_independent_and_wider_where_examples_agree():
    hits = np.tile([1.0, 0.0, 1.0, 1.0], 25)
    alone = share_interval(hits, np.ones(100))
    # Wilson 1927 for 75 of 100 with z = 1.96; the standard error over examples has N - 1, hence the tolerance.
    np.testing.assert_allclose(alone, [0.75, 0.6570, 0.8245], atol=2e-3)
    together = share_interval(np.array([5.0, 0.0, 5.0, 5.0] * 5), np.full(20, 5))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_all_right_is_not_certain():
    found = share_interval(np.ones(20), np.ones(20))
    z2 = 1.959964**2
    assert (found.mean, found.high) == (1, pytest.approx(1))
    assert found.low == pytest.approx(20 / (20 + z2), abs=1e-6)
