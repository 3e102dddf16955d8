"""The attention-graph probe finds a planted graph with its score; random attention is at chance; scores as by hand."""

import numpy as np
import pytest

from mha_jax.data.conllu import Sentence, Word
from mha_jax.heads.graph_probe import graph_probe, graphs
from mha_jax.heads.similarity import Head
from mha_jax.specs import UserError

NAME, W = "encoder/0/attention", 8
HEADS = [Head(NAME, number) for number in range(4)]


def sentence(heads, relations=None):
    relations = relations or ["obj"] * len(heads)
    words = (Word("w", "w", "X", {}, head, of, {}, True) for head, of in zip(heads, relations, strict=True))
    return Sentence("s", tuple(words))


def treebank(count, seed):
    """Sentences of 8 words, each of which depends on one drawn evenly from the others."""
    rng = np.random.default_rng(seed)
    drawn = [[int(rng.choice([j for j in range(W) if j != i])) for i in range(W)] for _ in range(count)]
    return [sentence(heads) for heads in drawn]


def maps(sentences, seed, planted):
    """Attention of four heads: noise, the heads of words at even places, those at odd places the other way, noise."""
    rng = np.random.default_rng(seed)
    weights = 0.3 * rng.random((len(sentences), 4, W, W))
    for b, one in enumerate(sentences if planted else ()):
        for j, word in enumerate(one.words):
            if j % 2:
                weights[b, 2, word.head, j] += 1
            else:
                weights[b, 1, j, word.head] += 1
    return [(sentences, {NAME: weights})]


def found(planted):
    train, test = treebank(200, 0), treebank(150, 1)
    return graph_probe(HEADS, list(graphs(maps(train, 2, planted))), graphs(maps(test, 3, planted)))


def test_a_graph_that_two_heads_share_is_found_by_the_mix_and_half_by_the_best_of_them():
    one = found(planted=True)
    assert one.probe.mean > 0.95
    # Half of the words are found, and of the others 1 in 7 by luck: 0.57 with a standard error of 0.014.
    assert (one.head.number, one.direction) in {(1, "dependent"), (2, "head")}
    assert abs(one.best_head.mean - 0.57) < 0.06
    assert one.over_head.mean == pytest.approx(one.probe.mean - one.best_head.mean) and one.over_head.low > 0.3
    assert one.u[NAME].argmax() == 1 and one.w[NAME].argmax() == 2
    assert one.words == (200 * W, 150 * W)


def test_random_attention_is_at_chance():
    one = found(planted=False)
    # 1200 words at 1/7: a standard error of 0.01.
    for score in (one.probe, one.best_head, one.right_branching):
        assert abs(score.mean - 1 / 7) < 0.04
    assert one.over_head.low < 0 < one.over_head.high


def test_scores_of_a_small_treebank_are_those_counted_by_hand():
    test = [
        sentence([1, -1, 1, 2], ["det", "root", "obj", "punct"]),  # scored: word 0 at +1, word 2 at -1
        sentence([1, 2, -1], ["det", "nsubj", "root"]),  # both at +1
        sentence([-1, 0, 0], ["root", "obj", "obj"]),  # at -1 and -2
    ]
    train = [sentence([-1, 0, 1], ["root", "obj", "obj"])]
    even = {NAME: np.full((1, 4, W, W), 0.1)}
    rows = [(test, {NAME: np.full((4, 4, W, W), 0.1)})]  # a row of padding is last
    one = graph_probe(HEADS, list(graphs([(train, even)])), graphs(rows))
    assert one.right_branching.mean == pytest.approx(3 / 6) and one.words == (2, 6)
    assert one.offset == -1 and one.best_offset.mean == pytest.approx(2 / 6)
    # Even attention gives each of the 3 or 2 other words the same share.
    assert one.best_head.mean == one.probe.mean == pytest.approx((2 / 3 + 2 / 2 + 2 / 2) / 6)


def test_a_treebank_without_dependencies_is_told():
    empty = list(graphs([([sentence([-1])], {NAME: np.ones((1, 4, W, W))})]))
    with pytest.raises(UserError, match="training treebank has no dependency"):
        graph_probe(HEADS, empty, empty)
    with pytest.raises(UserError, match="test treebank has no dependency"):
        graph_probe(HEADS, list(graphs(maps(treebank(2, 0), 0, True))), empty)
