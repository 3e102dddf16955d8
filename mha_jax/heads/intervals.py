"""95 % intervals of a share or a mean, over examples that each bring a sum and a count."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

_LEVEL = 0.975


class Estimate(NamedTuple):
    """A ratio of sums and its 95 % interval, a number each or an array; NaN where there is nothing to count."""

    mean: Any
    low: Any
    high: Any


def mean_interval(sums_N: ArrayLike, counts_N: ArrayLike) -> Estimate:
    """Sum of all sums over sum of all counts, with Student's t over the N examples (axis 0).

      se^2 = N / (N - 1) * sum over n of (x_n - r c_n)^2 / (sum c)^2      (ratio of means, Cochran 1977, section 2.11)

    Examples differ in length, so their sums do not weigh alike; tokens of one example are not taken as independent.
    N are the examples that count at all; one alone gives an interval from -inf to inf.
    """
    mean, error, examples = _ratio(np.asarray(sums_N, np.float64), np.asarray(counts_N, np.float64))
    freedom = np.maximum(examples - 1, 1)
    half = np.where(examples > 1, stats.t.ppf(_LEVEL, freedom) * error, np.where(examples == 1, np.inf, np.nan))
    return Estimate(mean, mean - half, mean + half)


def share_interval(hits_N: ArrayLike, counts_N: ArrayLike) -> Estimate:
    """As `mean_interval` for a share of right answers, with Wilson's interval, which stays between 0 and 1.

    Wilson's n is the number of answers that would give the standard error over examples if they were independent
    (Korn and Graubard 1998), at most the number that there are.
    """
    counts_N = np.asarray(counts_N, np.float64)
    mean, error, _ = _ratio(np.asarray(hits_N, np.float64), counts_N)
    total = counts_N.sum(axis=0)
    effective = np.where(error > 0, mean * (1 - mean) / np.where(error > 0, error, 1) ** 2, np.inf)
    n = np.minimum(np.where((mean > 0) & (mean < 1), effective, np.inf), total)
    z = stats.norm.ppf(_LEVEL)
    with np.errstate(divide="ignore", invalid="ignore"):
        middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * np.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return Estimate(mean, middle - half, middle + half)


def _ratio(sums_N: np.ndarray, counts_N: np.ndarray) -> tuple[Any, Any, Any]:
    """The ratio, its standard error over examples, and how many examples there are."""
    total, examples = counts_N.sum(axis=0), (counts_N > 0).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums_N.sum(axis=0) / total
        squares = np.square(sums_N - mean[None] * counts_N).sum(axis=0)
        error = np.sqrt(examples / np.maximum(examples - 1, 1) * squares) / total
    return mean, error, examples
