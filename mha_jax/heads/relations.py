"""Syntax in single heads: for each dependency relation the best head, against the best fixed offset.

Clark et al. 2019, section 4.2 and Table 1. For every dependent one word is predicted to be its head, in one of two
directions: "dependent" is the other word that the dependent attends to most, "head" the other word that attends most to
the dependent. Equal weights share the prediction, so that even attention is at chance: 1 over the other words seen.
Words are the units, by the rule of `word_maps`; special tokens and the word itself are no candidates.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from mha_jax.data.conllu import Sentence
from mha_jax.heads.intervals import Estimate, mean_interval, share_interval
from mha_jax.heads.similarity import Head
from mha_jax.specs import UserError

DIRECTIONS: tuple[str, ...] = ("dependent", "head")
ALL = "All"
# Offsets say where the head stands: +1 is the word to the right of the dependent.
_NOT_IN_ALL = "punct"
SYNTACTIC_GAIN = 0.1  # Voita et al. 2019, section 5.2


class Arcs(NamedTuple):
    """A dependencies of a treebank, roots left out, and what N heads predict for them.

    `hits` {direction: [A, N]} is 1 where the head of a dependent is found, a share where several words tie; `chance`
    {direction: [A]} is that of even attention, NaN where the pair cannot be seen in this direction.
    """

    heads: tuple[Head, ...]
    sentence: np.ndarray
    relation: np.ndarray
    offset: np.ndarray
    hits: dict[str, np.ndarray]
    chance: dict[str, np.ndarray]

    def of(self, sentences: np.ndarray) -> "Arcs":
        """Those of the sentences whose numbers are given."""
        own = np.isin(self.sentence, sentences)
        parts = ({way: x[own] for way, x in part.items()} for part in (self.hits, self.chance))
        return Arcs(self.heads, self.sentence[own], self.relation[own], self.offset[own], *parts)


@dataclasses.dataclass(frozen=True)
class Relation:
    """One relation in one direction, scored on other sentences than those that chose the head and the offset.

    `accuracy` and `baseline` have Wilson's intervals over sentences; `gain` is their difference, with a paired t
    interval. `occurrences` are those scored, `chosen_on` those that chose, `left_out` those scored on that the rule of
    visibility hides. `best` marks the direction with the greater gain where it was chosen.
    """

    relation: str
    direction: str
    head: Head
    searched: int
    accuracy: Estimate
    offset: int
    baseline: Estimate
    gain: Estimate
    chance: float
    occurrences: int
    chosen_on: int
    left_out: int
    best: bool

    @property
    def syntactic(self) -> bool:
        """Whether the head is syntactic: its gain, and not by chance, is at least 10 points (Voita et al. 2019)."""
        return bool(self.gain.mean >= SYNTACTIC_GAIN and self.gain.low > 0)


def arcs(
    batches: Iterable[tuple[Sequence[Sentence], Mapping[str, Float[np.ndarray, "B H W W"]], Bool[np.ndarray, "B W W"]]],
) -> Arcs:
    """Reads attention between words, as `reading.word_maps` gives it, at every dependency.

    Raises: UserError where there are no dependencies.
    """
    heads: tuple[Head, ...] = ()
    found, number = [], 0
    for sentences, weights, visible_BWW in batches:
        heads = tuple(Head(name, h) for name, x in weights.items() for h in range(x.shape[1]))
        for row, sentence in enumerate(sentences):
            own = _sentence_arcs(sentence, np.concatenate([x[row] for x in weights.values()]), visible_BWW[row])
            found += [(number, *arc) for arc in own]
            number += 1
    if not found:
        raise UserError("the treebank has no dependency between words of a sentence that fits the model")
    sentence, relation, offset, *rest = (np.array(column) for column in zip(*found, strict=True))
    hits = dict(zip(DIRECTIONS, rest[:2], strict=True))
    return Arcs(heads, sentence, relation, offset, hits, dict(zip(DIRECTIONS, rest[2:], strict=True)))


def _sentence_arcs(sentence: Sentence, weights_NWW: np.ndarray, visible_WW: np.ndarray) -> Iterable[tuple]:
    """Relation, offset, hits and chance in both directions of each dependency."""
    words = len(sentence.words)
    seen = visible_WW[:words, :words] & ~np.eye(words, dtype=bool)
    candidates = np.where(seen[None], weights_NWW[:, :words, :words], -1).astype(np.float32)
    head_W = np.array([word.head for word in sentence.words])
    dependents = np.flatnonzero(head_W >= 0)
    if not len(dependents):
        return []
    of = head_W[dependents]
    ways = [
        (candidates[:, dependents], seen[dependents]),
        (candidates[:, :, dependents].swapaxes(1, 2), seen[:, dependents].T),
    ]
    columns = []
    for rows_NDW, seen_DW in ways:
        own_ND = np.take_along_axis(rows_NDW, of[None, :, None], axis=2)[:, :, 0]
        top_ND1 = rows_NDW.max(axis=2, keepdims=True)
        hits_ND = np.where(own_ND == top_ND1[:, :, 0], 1 / (rows_NDW == top_ND1).sum(axis=2), 0)
        visible_D = seen_DW[np.arange(len(of)), of]
        chance_D = np.where(visible_D, 1 / np.maximum(seen_DW.sum(axis=1), 1), np.nan)
        columns.append((hits_ND.T.astype(np.float32), chance_D))
    relations = [sentence.words[d].relation for d in dependents]
    (hits, chance), (hits_back, chance_back) = columns
    return zip(relations, of - dependents, hits, hits_back, chance, chance_back, strict=True)


def halves(one: Arcs) -> tuple[Arcs, Arcs]:
    """The even and the odd sentences: to choose on, and to score on."""
    numbers = np.unique(one.sentence)
    return one.of(numbers[::2]), one.of(numbers[1::2])


def best_heads(chosen_on: Arcs, scored_on: Arcs, least: int = 20) -> list[Relation]:
    """Every relation with at least `least` visible occurrences on either side, "All" first, then by frequency.

    "All" is every dependency but punctuation: the accuracy of its head is the unlabelled attachment score. Where a
    causal rule hides heads or dependents, the baseline counts the same pairs as the heads do.
    """
    names, counts = np.unique(chosen_on.relation, return_counts=True)
    relations = [ALL, *(str(name) for name in names[np.argsort(-counts, kind="stable")])]
    found = []
    for relation in relations:
        rows = [_best_head(relation, way, chosen_on, scored_on, least) for way in DIRECTIONS]
        there = [row for row in rows if row is not None]
        winner = max((gain for gain, _ in there), default=0.0)
        found += [dataclasses.replace(row, best=gain == winner) for gain, row in there]
    return found


def _best_head(
    relation: str, direction: str, chosen_on: Arcs, scored_on: Arcs, least: int
) -> tuple[float, Relation] | None:
    """The gain where it was chosen, and the row; None for too few occurrences."""
    chosen, scored = (_rows(one, relation, direction) for one in (chosen_on, scored_on))
    if min(chosen.sum(), scored.sum()) < least or not chosen_on.heads:
        return None
    shares_N = chosen_on.hits[direction][chosen].mean(axis=0)
    head = int(np.argmax(shares_N))
    offsets, counts = np.unique(chosen_on.offset[chosen], return_counts=True)
    offset = int(offsets[np.argmax(counts)])
    hits = scored_on.hits[direction][scored, head].astype(np.float64)
    by_offset = (scored_on.offset[scored] == offset).astype(np.float64)
    numbers = np.unique(scored_on.sentence[scored], return_inverse=True)[1]
    count, own, base = (np.bincount(numbers, weights=x) for x in (np.ones(len(hits)), hits, by_offset))
    asked = scored_on.relation == relation if relation != ALL else scored_on.relation != _NOT_IN_ALL
    row = Relation(
        relation=relation,
        direction=direction,
        head=chosen_on.heads[head],
        searched=len(chosen_on.heads),
        accuracy=share_interval(own, count),
        offset=offset,
        baseline=share_interval(base, count),
        gain=mean_interval(own - base, count),
        chance=float(scored_on.chance[direction][scored].mean()),
        occurrences=int(scored.sum()),
        chosen_on=int(chosen.sum()),
        left_out=int(asked.sum() - scored.sum()),
        best=False,
    )
    return float(shares_N[head] - counts.max() / chosen.sum()), row


def _rows(one: Arcs, relation: str, direction: str) -> np.ndarray:
    """Which arcs are of the relation and can be seen in the direction."""
    own = one.relation != _NOT_IN_ALL if relation == ALL else one.relation == relation
    return own & ~np.isnan(one.chance[direction])
