"""How many seeds show a difference of a given size, and what the seeds at hand could show: power of the paired t-test.

The spread is the standard deviation of a pair's differences, seed by seed, as measured. From few seeds it is itself
barely known (`spread_factors`), and so are these numbers.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

POWER = 0.8
MOST_SEEDS = 1000


def power(size: float, spread: float, n: int, level: float = 0.95) -> float:
    """Probability that the two-sided interval of n paired differences excludes 0, their true mean being `size`.

      P(|T| > t(level; n - 1)),  T noncentral t with n - 1 degrees of freedom and size * sqrt(n) / spread

    Args:   size, spread: in the metric's unit; spread is the standard deviation of the differences.
    """
    if spread == 0:
        return float(size != 0)
    limit, shift = float(stats.t.ppf(0.5 + level / 2, n - 1)), abs(size) * math.sqrt(n) / spread
    return _beyond(limit, n - 1, shift) + _beyond(limit, n - 1, -shift)


def _beyond(limit: float, df: int, shift: float) -> float:
    """P(T > limit) for noncentral T, as a mean over its denominator: far out, where few seeds lie, scipy's is NaN."""
    return float(stats.norm.sf(limit * _denominators(df) - shift).mean())


@functools.lru_cache(maxsize=256)
def _denominators(df: int) -> np.ndarray:
    """sqrt(chi-squared / df) at the midpoints of 2000 equal shares of its distribution."""
    return np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, df) / df)


def power_of_likeness(margin: float, spread: float, n: int, level: float = 0.95) -> float:
    """Probability that the whole interval of n paired differences lies within ± margin, their true mean being 0.

    A lower bound, near from 1/2 upwards: 1 minus the probabilities of missing either side (Schuirmann 1987).
    """
    if spread == 0:
        return 1.0
    limit, shift = float(stats.t.ppf(0.5 + level / 2, n - 1)), margin * math.sqrt(n) / spread
    return max(0.0, 2 * _beyond(limit, n - 1, shift) - 1)


def seeds_needed(
    size: float,
    spread: float,
    level: float = 0.95,
    of: Callable[[float, float, int, float], float] = power,
) -> int | None:
    """The fewest seeds, at least 2, with which `of` reaches 80 %; None where more than 1000 would be needed.

    Args:   of: `power`, or `power_of_likeness` for a margin that is to hold a difference of 0.
    """
    few, many = 1, 2
    while of(size, spread, many, level) < POWER:
        few, many = many, 2 * many
        if few >= MOST_SEEDS:
            return None
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if of(size, spread, middle, level) >= POWER else (middle, many)
    return many if many <= MOST_SEEDS else None


def detectable(spread: float, n: int, level: float = 0.95) -> float:
    """The smallest true difference that n seeds show with 80 % power, in the unit of the spread."""
    if spread == 0:
        return 0.0
    # In units of the spread; with two seeds at a strict level it may be thousands.
    size = optimize.brentq(lambda size: power(size, 1.0, n, level) - POWER, 1e-6, 1e6)
    return spread * float(size)  # pyright: ignore[reportArgumentType]


def spread_factors(n: int, level: float = 0.95) -> tuple[float, float]:
    """What the spread measured from n differences is to be multiplied with for its interval (chi-squared, n - 1)."""
    low, high = (float(stats.chi2.ppf(0.5 + half, n - 1)) for half in (level / 2, -level / 2))
    return math.sqrt((n - 1) / low), math.sqrt((n - 1) / high)


def in_words(seeds: int | None) -> str:
    return f"more than {MOST_SEEDS:,}" if seeds is None else str(seeds)
