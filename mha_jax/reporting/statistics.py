"""Means and interquartile means with intervals, differences and improvements paired by seed, p-values adjusted."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

_RESAMPLES = 10_000
_SEED = 0  # the same values have the same interval, whoever asks


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its two-sided t interval; low and high are None where n < 2 gives no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None
    error: float | None = None  # the standard error of the mean

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def interval(values: Sequence[float], level: float = 0.95) -> Estimate | None:
    """Mean and t interval over seeds: mean ± t(n-1) * s / sqrt(n), with s the standard deviation with n - 1.

    Values that are not finite are left out, so n says how many seeds count; None where none does.
    p is that of the mean being zero (two-sided t-test), None where n < 2.
    """
    x = np.asarray([v for v in values if math.isfinite(v)], np.float64)
    if x.size == 0:
        return None
    if x.size < 2:
        return Estimate(float(x[0]), None, None, x.size)
    mean, error = (float(v) for v in mean_and_error(x))
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1)) * error
    p = 2 * float(p_above(abs(mean), error, x.size, 0.0))
    return Estimate(mean, mean - half, mean + half, x.size, p, error)


def mean_and_error(
    x: Float[np.ndarray, "*sweeps n"],
) -> tuple[Float[np.ndarray, "*sweeps"], Float[np.ndarray, "*sweeps"]]:
    """Mean over the last axis, and its standard error s / sqrt(n), with s the standard deviation with n - 1."""
    return np.asarray(x.mean(-1)), np.asarray(x.std(-1, ddof=1) / math.sqrt(x.shape[-1]))


def p_above(mean: Any, error: Any, n: int, bound: float) -> Any:
    """One-sided p of the t-test that the true mean lies above `bound`; arrays of means and errors give arrays.

    Without any spread no test statistic exists: 0 for a mean above the bound, 1 below it, 1/2 at it.
    """
    apart, error = np.asarray(mean) - bound, np.asarray(error)
    t = apart / np.where(error > 0, error, 1.0)
    return np.where(error > 0, stats.t.sf(t, n - 1), (1 - np.sign(apart)) / 2)


def paired(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Estimate | None:
    """The difference a - b over the seeds that both have, as each seed's own difference.

    A seed fixes initialisation, data order and dropout, so what it does to both cells cancels.
    """
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], level)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979): p(i) becomes max over j <= i of min(1, (m - j + 1) * p(j)).

    None stays None and does not count towards m.
    """
    known = [i for i, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    for i, p in zip(known, holm_rows(np.array([p_values[i] for i in known], float)), strict=True):
        adjusted[i] = float(p)
    return adjusted


def holm_rows(p: Float[np.ndarray, "*sweeps m"]) -> Float[np.ndarray, "*sweeps m"]:
    """`holm` over the last axis of an array in which every p-value is known."""
    order = np.argsort(p, axis=-1)
    steps = np.minimum(1.0, np.take_along_axis(p, order, -1) * np.arange(p.shape[-1], 0, -1))
    adjusted = np.empty_like(steps)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, axis=-1), -1)
    return adjusted


def interquartile_mean(values: Sequence[float], level: float = 0.95) -> Estimate | None:
    """Mean of the middle half of the seeds, with a percentile bootstrap interval (Agarwal et al. 2021, section 4.3).

    A quarter of the seeds, rounded down, is cut off at either end; so below four seeds nothing is, and there is no
    answer: None. Values that are not finite are left out. The bootstrap draws seeds with replacement, the same draws
    at every call; at few seeds its interval is too short (ten: about 90 % instead of 95 %).
    """
    x = np.asarray([v for v in values if math.isfinite(v)], np.float64)
    if x.size < 4:
        return None
    draws = np.random.default_rng(_SEED).integers(x.size, size=(_RESAMPLES, x.size))
    low, high = np.quantile(stats.trim_mean(x[draws], 0.25, axis=-1), (0.5 - level / 2, 0.5 + level / 2))
    return Estimate(float(stats.trim_mean(x, 0.25)), float(low), float(high), x.size)


def improvement(
    a: Mapping[int, float], b: Mapping[int, float], lower_is_better: bool, level: float = 0.95
) -> Estimate | None:
    """Probability that `a` is better than `b` with the same seed (Agarwal et al. 2021, section 4.3, paired by seed).

    The share of common seeds in which it is, a tie counting one half, with the interval of Clopper and Pearson (1934),
    which is never too short. None without a common seed that is finite in both.
    """
    gains = [b[s] - a[s] if lower_is_better else a[s] - b[s] for s in sorted(a.keys() & b.keys())]
    gains = [gain for gain in gains if math.isfinite(gain)]
    n = len(gains)
    if n == 0:
        return None
    wins = sum((np.sign(gain) + 1) / 2 for gain in gains)
    low = float(stats.beta.ppf(0.5 - level / 2, wins, n - wins + 1)) if wins > 0 else 0.0
    high = float(stats.beta.ppf(0.5 + level / 2, wins + 1, n - wins)) if wins < n else 1.0
    return Estimate(float(wins / n), low, high, n)
