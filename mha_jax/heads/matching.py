"""Which head of one side is which of the other: between layers, between seeds, between models."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from mha_jax.heads.capture import Batch
from mha_jax.heads.similarity import Head, Pairs, compare
from mha_jax.models.transformer import Model

_DRAWS = 200


class Matching(NamedTuple):
    """Heads paired one to one, so that their mean similarity (1 - distance) is the greatest there is.

    pairs     (row, column) for as many heads as the smaller side has
    matched   mean similarity of the pairs
    chance    mean similarity of a random pairing: the mean of the matrix
    shuffled  mean over draws of what the best pairing reaches where what is left of the similarities after the means
              of rows and columns stands at random places: the best of many numbers is high by itself
    p_value   share of draws, this one counted, that reach `matched` (Phipson & Smyth 2010)
    """

    pairs: tuple[tuple[Head, Head], ...]
    matched: float
    chance: float
    shuffled: float
    p_value: float


class Matched(NamedTuple):
    """A matching, the names of its two sides, and the kind of attention and the measure that it is of."""

    between: tuple[str, str]
    kind: str
    measure: str
    matching: Matching


def match(pairs: Pairs, seed: int = 0) -> Matching:
    """The best pairing of rows with columns (the linear assignment problem; scipy's linear_sum_assignment)."""
    similarity = 1 - pairs.distance
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    rng, matched = np.random.default_rng(seed), float(similarity[rows, columns].mean())
    # Some heads are like all others; that alone pairs nobody.
    means = similarity.mean(1, keepdims=True) + similarity.mean(0, keepdims=True) - similarity.mean()
    left = (similarity - means).ravel()
    shuffled = np.array([_best(means + rng.permutation(left).reshape(means.shape)) for _ in range(_DRAWS)])
    return Matching(
        tuple((pairs.rows[i], pairs.columns[j]) for i, j in zip(rows, columns, strict=True)),
        matched,
        float(similarity.mean()),
        float(shuffled.mean()),
        float((1 + np.sum(shuffled >= matched)) / (1 + _DRAWS)),
    )


def match_layers(found: Mapping[str, Mapping[str, Pairs]], seed: int = 0) -> Iterator[Matched]:
    """Every two layers of one model, from what `compare` found in it. The sides go by the names of attentions."""
    for kind, by_measure in found.items():
        for measure, pairs in by_measure.items():
            names = list(dict.fromkeys(head.name for head in pairs.rows))
            places = {name: [i for i, head in enumerate(pairs.rows) if head.name == name] for name in names}
            for i, one in enumerate(names):
                for other in names[i + 1 :]:
                    yield Matched((one, other), kind, measure, match(_part(pairs, places[one], places[other]), seed))


def match_models(
    name: str, model: Model, others: Mapping[str, Model], batches: Sequence[Batch], measures: Sequence[str]
) -> Iterator[Matched]:
    """A model with each of the others, over batches that all of them can read. The sides go by the names given.

    Weights of models of another width cannot be compared, and are left out where there is another measure.
    Raises: UserError as `compare` does.
    """
    for other_name, other in others.items():
        same_width = model.tokens.d_model == other.tokens.d_model
        shared = [measure for measure in measures if same_width or measure != "weights"]
        for kind, by_measure in compare(model, batches, shared or measures, other).items():
            for measure, pairs in by_measure.items():
                yield Matched((name, other_name), kind, measure, match(pairs))


def _part(pairs: Pairs, rows: list[int], columns: list[int]) -> Pairs:
    value = pairs.value[np.ix_(rows, columns)]
    return Pairs(
        pairs.measure, tuple(pairs.rows[i] for i in rows), tuple(pairs.columns[j] for j in columns), value, None
    )


def _best(similarity: np.ndarray) -> float:
    return float(similarity[linear_sum_assignment(similarity, maximize=True)].mean())
