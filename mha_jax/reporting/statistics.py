"""Means with intervals, differences paired by seed, and p-values adjusted for their number."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over n seeds and its two-sided t interval; low and high are None where n < 2 gives no spread."""

    mean: float
    low: float | None
    high: float | None
    n: int
    p: float | None = None

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
    mean = float(x.mean())
    if x.size < 2:
        return Estimate(mean, None, None, x.size)
    error = float(x.std(ddof=1)) / math.sqrt(x.size)
    if error == 0.0:  # equal to the last bit: no test statistic exists
        return Estimate(mean, mean, mean, x.size, p=1.0 if mean == 0.0 else 0.0)
    half = float(stats.t.ppf(0.5 + level / 2, x.size - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, x.size - 1))
    return Estimate(mean, mean - half, mean + half, x.size, p)


def paired(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Estimate | None:
    """The difference a - b over the seeds that both have, as each seed's own difference.

    A seed fixes initialisation, data order and dropout, so what it does to both cells cancels.
    """
    return interval([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())], level)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for their number (Holm 1979): p(i) becomes max over j <= i of min(1, (m - j + 1) * p(j)).

    None stays None and does not count towards m.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted
