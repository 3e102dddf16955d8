"""The attention-graph probe: a parser that knows nothing but where all heads look (Clark et al. 2019, section 5).

  p(word i is the head of word j) ∝ exp(sum over k of w[k] a[k,i,j] + u[k] a[k,j,i]),   i another word than j

where a[k,i,j] is head k's attention from word i to word j; w and u alone are trained. The paper's second probe, whose
weights depend on the words by their GloVe vectors, is left out: those vectors are not part of this library.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import optimize

from mha_jax.data.conllu import Sentence
from mha_jax.heads.intervals import Estimate, mean_interval, share_interval
from mha_jax.heads.similarity import Head
from mha_jax.specs import UserError

_ITERATIONS = 200
_NOT_SCORED = "punct"


class Graph(NamedTuple):
    """B sentences: attention of all K heads, from word to word; the word that each depends on, -1 where that is not
    scored (roots, punctuation, no word); and which are words. Rows may be empty."""

    attention_KBWW: Float[np.ndarray, "K B W W"]
    head_BW: Int[np.ndarray, "B W"]
    word_BW: Bool[np.ndarray, "B W"]


class GraphFound(NamedTuple):
    """Unlabelled attachment scores on the test sentences, with Wilson's 95 % intervals over sentences.

    `right_branching` takes the next word for the head of each, `best_offset` the word at `offset`, `best_head` the word
    by one head's attention in one direction ("dependent" attends or "head" does): offset and head are the best of the
    training sentences. `over_head` and `over_right` are what the probe is above them, with paired t intervals.
    `w` and `u` are {attention: [H]}, of attention from the head and of attention to it; `words` are those that trained
    and those that are scored.
    """

    probe: Estimate
    right_branching: Estimate
    best_offset: Estimate
    best_head: Estimate
    over_head: Estimate
    over_right: Estimate
    offset: int
    head: Head
    direction: str
    words: tuple[int, int]
    w: dict[str, np.ndarray]
    u: dict[str, np.ndarray]


def graphs(maps: Iterable[tuple[Sequence[Sentence], Mapping[str, Float[np.ndarray, "B H W W"]]]]) -> Iterator[Graph]:
    """The graphs of sentences and {attention: weights between their words}."""
    for sentences, weights in maps:
        attention_KBWW = np.concatenate([*weights.values()], axis=1).swapaxes(0, 1)
        head_BW, word_BW = np.full(attention_KBWW.shape[1:3], -1), np.zeros(attention_KBWW.shape[1:3], bool)
        for row, sentence in enumerate(sentences):
            own = [-1 if word.relation == _NOT_SCORED else word.head for word in sentence.words]
            head_BW[row, : len(own)], word_BW[row, : len(own)] = own, True
        yield Graph(attention_KBWW, head_BW, word_BW)


def graph_probe(heads: Sequence[Head], train: Sequence[Graph], test: Iterable[Graph], l2: float = 1e-6) -> GraphFound:
    """Trains w and u by L-BFGS on all training sentences, and scores them and the baselines on the test sentences.

    The attention of the training sentences is held in memory; that of the test sentences is read once.

    Args:   l2: penalty l2 / 2 (|w|^2 + |u|^2), of a mean over words.
    Raises: UserError where either has no dependency.
    """
    words = sum(int((graph.head_BW >= 0).sum()) for graph in train)
    if not words:
        raise UserError("the training treebank has no dependency between words of a sentence that fits the model")
    count = len(heads)

    def objective(weights_N: np.ndarray) -> tuple[float, np.ndarray]:
        parts = [jax.device_get(_loss_and_slope(jnp.asarray(weights_N, jnp.float32), graph)) for graph in train]
        loss, slope = (sum(np.asarray(part[i], np.float64) for part in parts) / words for i in range(2))
        return float(loss + l2 / 2 * weights_N @ weights_N), slope + l2 * weights_N

    trained_N = optimize.minimize(
        objective, np.zeros(2 * count), jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}
    ).x
    offset = _commonest_offset(train)
    best = int(np.sum([_single_hits(graph).sum(axis=1) for graph in train], axis=0).argmax())
    single_N = np.eye(2 * count)[best]

    hits, counts = [], []
    for graph in test:
        ways = (_hits(trained_N, graph), _at(1, graph), _at(offset, graph), _hits(single_N, graph))
        hits.append(np.stack(ways))
        counts.append((graph.head_BW >= 0).sum(axis=1))
    counts_S = np.concatenate(counts) if counts else np.zeros(0)
    if not counts_S.sum():
        raise UserError("the test treebank has no dependency between words of a sentence that fits the model")
    hits_WS = np.concatenate(hits, axis=1)
    probe, right, at_offset, by_head = (share_interval(own_S, counts_S) for own_S in hits_WS)
    over_head, over_right = (mean_interval(hits_WS[0] - hits_WS[way], counts_S) for way in (3, 1))
    w, u = (_by_attention(heads, part) for part in np.split(trained_N, 2))
    direction, head = ("head", "dependent")[best // count], heads[best % count]
    return GraphFound(
        probe, right, at_offset, by_head, over_head, over_right, offset, head, direction,
        (words, int(counts_S.sum())), w, u,
    )  # fmt: skip


def _scores(weights_N: Array, graph: Graph) -> Array:
    """[B, j, i]: of word i as the head of word j, very low where it is no other word."""
    w, u = jnp.split(weights_N, 2)
    scores = jnp.einsum("k,kbij->bji", w, graph.attention_KBWW) + jnp.einsum("k,kbji->bji", u, graph.attention_KBWW)
    return jnp.where(_others(graph.word_BW), scores, -1e9)


def _others(word_BW: Any) -> Array:
    """[B, 1 or W, W]: which words may be the head of each."""
    return word_BW[:, None, :] & ~jnp.eye(word_BW.shape[1], dtype=bool)[None]


@jax.jit
def _loss_and_slope(weights_N: Array, graph: Graph) -> tuple[Array, Array]:
    def loss(weights_N: Array) -> Array:
        told = jax.nn.log_softmax(_scores(weights_N, graph), axis=-1)
        own = jnp.take_along_axis(told, jnp.maximum(graph.head_BW, 0)[..., None], axis=-1)[..., 0]
        return -jnp.where(graph.head_BW >= 0, own, 0).sum()

    return jax.value_and_grad(loss)(weights_N)


def _right(scores: Array, graph: Graph) -> Array:
    """How many words of each sentence are given their head, [B]: the best score, shared where several have it."""
    own = jnp.take_along_axis(scores, jnp.maximum(graph.head_BW, 0)[..., None], axis=-1)
    top = scores.max(axis=-1, keepdims=True)
    share = jnp.where(own == top, 1 / (scores == top).sum(axis=-1, keepdims=True), 0)[..., 0]
    return jnp.where(graph.head_BW >= 0, share, 0).sum(axis=-1)


@jax.jit
def _weighted_hits(weights_N: Array, graph: Graph) -> Array:
    return _right(_scores(weights_N, graph), graph)


def _hits(weights_N: np.ndarray, graph: Graph) -> np.ndarray:
    return np.asarray(_weighted_hits(jnp.asarray(weights_N, jnp.float32), graph), np.float64)


@jax.jit
def _single_hits(graph: Graph) -> Array:
    """Of each head alone, [2 K, B]: first where the head attends to the dependent, then the reverse."""
    both = jnp.concatenate([graph.attention_KBWW.swapaxes(2, 3), graph.attention_KBWW])
    return jax.lax.map(lambda one: _right(jnp.where(_others(graph.word_BW), one, -1e9), graph), both)


def _at(offset: int, graph: Graph) -> np.ndarray:
    """How many words of each sentence have their head at this offset, [B]."""
    right_BW = graph.head_BW == np.arange(graph.head_BW.shape[1])[None] + offset
    return ((graph.head_BW >= 0) & right_BW).sum(axis=1).astype(np.float64)


def _commonest_offset(train: Sequence[Graph]) -> int:
    found = [(graph.head_BW - np.arange(graph.head_BW.shape[1])[None])[graph.head_BW >= 0] for graph in train]
    offsets, counts = np.unique(np.concatenate(found), return_counts=True)
    return int(offsets[counts.argmax()])


def _by_attention(heads: Sequence[Head], weights_K: np.ndarray) -> dict[str, np.ndarray]:
    """{attention: [H]} of weights in the order of the heads."""
    names = dict.fromkeys(head.name for head in heads)
    return {name: weights_K[[head.name == name for head in heads]] for name in names}
