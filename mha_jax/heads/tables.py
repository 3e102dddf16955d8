"""One measure of every head, batch by batch: its mean, its standard error, and how steady the ranking of heads is."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from mha_jax.heads.capture import kind_of
from mha_jax.specs import UserError

Heads = dict[str, np.ndarray]


def by_kind(heads: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{kind: {name: values}}: encoder self-attention, decoder self-attention and cross-attention apart."""
    kinds: dict[str, dict[str, np.ndarray]] = {}
    for name, values in heads.items():
        kinds.setdefault(kind_of(name), {})[name] = values
    return kinds


@dataclasses.dataclass(frozen=True)
class HeadTable:
    """Values of one measure: {attention: float64 [N, H]} over N batches, and the weight [N] of each batch.

    A weight is how many targets (or queries) the batch's value is the mean of; batches without any are left out.
    A measure that reads no data is `exact`: N = 1, and nothing varies.
    `p_values` {attention: [H]}: where a measure has a paired test of its mean being 0, adjusted for all heads (Holm).

    Raises: UserError for fewer than two batches of a measure that is not exact.
    """

    values: Heads
    weights: np.ndarray
    exact: bool = False
    p_values: Heads | None = None

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, np.float64)
        kept = weights > 0
        check_batches(int(kept.sum()), least=1 if self.exact else 2)
        values = {name: np.asarray(x_NH, np.float64)[kept] for name, x_NH in self.values.items()}
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "weights", weights[kept])

    @classmethod
    def of_weights(cls, values: Mapping[str, np.ndarray]) -> "HeadTable":
        """The table of a measure that reads no data, from {attention: [H]}."""
        return cls({name: np.asarray(x_H)[None] for name, x_H in values.items()}, np.ones(1), exact=True)

    @property
    def mean(self) -> Heads:
        """{attention: [H]}: mean over batches by their weights, which is the mean over all targets."""
        return {name: np.average(x_NH, axis=0, weights=self.weights) for name, x_NH in self.values.items()}

    @property
    def standard_error(self) -> Heads | None:
        """{attention: [H]}: of the mean, over batches, or None where nothing varies.

        se^2 = N / (N - 1) * sum over n of (w_n / sum w)^2 (x_n - mean)^2      (Cochran 1977, section 6.4)

        With equal weights this is the standard deviation (with N - 1) over sqrt(N).
        """
        if self.exact:
            return None
        share_N1 = (self.weights / self.weights.sum())[:, None]
        count, mean = len(self.weights), self.mean
        return {
            name: np.sqrt(count / (count - 1) * np.sum((share_N1 * (x_NH - mean[name][None])) ** 2, axis=0))
            for name, x_NH in self.values.items()
        }

    @property
    def stability(self) -> dict[str, float | None] | None:
        """{kind: Spearman's rank correlation, over the heads of the kind, of even batches' mean with odd batches'}.

        None where nothing varies, or for a kind whose ranks `spearman` cannot compare.
        """
        if self.exact:
            return None
        return _correlations(self._half(0), self._half(1))

    def _half(self, first: int) -> Heads:
        weights = self.weights[first::2]
        return {name: np.average(x_NH[first::2], axis=0, weights=weights) for name, x_NH in self.values.items()}


def seed_stability(tables: Sequence[HeadTable]) -> dict[str, float | None] | None:
    """{kind: mean over all pairs of seeds of Spearman's rank correlation over the heads of the kind}.

    Heads are compared by layer and number. With independent initial weights a number means nothing from seed to seed,
    so what agrees then is what tells layers apart. None for one seed.
    """
    means = [table.mean for table in tables]
    if len(means) < 2:
        return None
    found: dict[str, list[float]] = {kind: [] for kind in by_kind(means[0])}
    for a, b in itertools.combinations(means, 2):
        for kind, correlation in _correlations(a, b).items():
            found[kind] += [] if correlation is None else [correlation]
    return {kind: float(np.mean(known)) if known else None for kind, known in found.items()}


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation; None below three heads, or where all of one side are equal: no order to compare."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def check_batches(count: int, least: int = 2) -> None:
    """Raises UserError for fewer batches than give a standard error."""
    if count == 0:
        raise UserError("importance needs data: there is no batch with a target in it")
    if count < least:
        raise UserError(f"importance over {count} batch has no error bar; give at least {least}")


def _correlations(a: Heads, b: Heads) -> dict[str, float | None]:
    other = by_kind(b)
    return {
        kind: spearman(np.concatenate(list(layers.values())), np.concatenate(list(other[kind].values())))
        for kind, layers in by_kind(a).items()
    }
