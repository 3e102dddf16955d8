"""A planted relation is found with its accuracy; random and even attention are at chance."""

import numpy as np
import pytest

from mha_jax.data.conllu import Sentence, Word
from mha_jax.heads.relations import ALL, arcs, best_heads, halves
from mha_jax.heads.similarity import Head
from mha_jax.specs import UserError

NAME = "encoder/0/attention"
W = 12


def treebank(count, seed=0):
    """Sentences of 8 to 12 words; each word depends on one drawn evenly, by "even" or "odd" with its place."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        size = int(rng.integers(8, W + 1))
        heads = [int(rng.choice([j for j in range(size) if j != i])) if i else -1 for i in range(size)]
        words = (Word("w", "w", "X", {}, h, ("odd" if i % 2 else "even:x"), {}, True) for i, h in enumerate(heads))
        found.append(Sentence(f"s{number}", tuple(words)))
    return found


SENTENCES = treebank(300)
FULL = np.ones((len(SENTENCES), W, W), bool)


def planted(share, transposed=False, seed=0):
    """[B, 1, W, W]: so many of the "odd" dependents attend to their head, or are attended to by it."""
    rng = np.random.default_rng(seed)
    maps = rng.random((len(SENTENCES), 1, W, W)) * 0.1
    for b, sentence in enumerate(SENTENCES):
        for d, word in enumerate(sentence.words):
            if word.head >= 0 and word.relation == "odd" and rng.random() < share:
                maps[b, 0][(word.head, d) if transposed else (d, word.head)] = 1.0
    return maps


def found(maps, visible=FULL, least=20):
    rows = best_heads(*halves(arcs([(SENTENCES, {NAME: maps}, visible)])), least)
    return {(row.relation, row.direction): row for row in rows}


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(7).random((len(SENTENCES), 3, W, W))


def test_planted_relation_is_found_with_its_accuracy_in_its_direction(noise):
    maps = np.concatenate([noise, planted(0.8), planted(0.9, transposed=True)], axis=1)
    rows = found(maps)
    odd = rows["odd", "dependent"]
    chance = odd.chance  # the rest are right by luck
    assert odd.head == Head(NAME, 3) and odd.searched == 5
    assert odd.accuracy.low < 0.8 + 0.2 * chance < odd.accuracy.high
    assert odd.syntactic and odd.gain.mean == pytest.approx(odd.accuracy.mean - odd.baseline.mean)
    back = rows["odd", "head"]
    assert back.head == Head(NAME, 4) and back.best and not odd.best
    assert not rows["even", "dependent"].syntactic
    # "even:x" counts as "even"; "All" is both, of other sentences than those that chose.
    everything = rows[ALL, "dependent"]
    assert everything.occurrences == odd.occurrences + rows["even", "dependent"].occurrences
    assert everything.occurrences + everything.chosen_on == sum(len(s.words) - 1 for s in SENTENCES)


def test_random_attention_is_at_chance_within_its_interval(noise):
    rows = found(noise)
    for row in rows.values():
        assert row.accuracy.low <= row.chance <= row.accuracy.high, row
        assert not row.syntactic


def test_even_attention_is_at_chance_exactly():
    for row in found(np.ones((len(SENTENCES), 1, W, W))).values():
        assert row.accuracy.mean == pytest.approx(row.chance, abs=1e-6)


def test_offset_is_the_most_frequent_and_scored_on_the_other_half():
    chain = [Sentence(s.name, tuple(Word("w", "w", "X", {}, i - 1, "dep", {}, True) for i in range(len(s.words))))
             for s in SENTENCES]  # fmt: skip
    one = arcs([(chain, {NAME: np.ones((len(chain), 1, W, W))}, FULL)])
    rows = best_heads(*halves(one))
    assert [(row.offset, float(row.baseline.mean)) for row in rows] == [(-1, 1.0)] * 4


def test_causal_heads_are_asked_only_what_they_can_see():
    visible = np.broadcast_to(np.tril(np.ones((W, W), bool)), FULL.shape)
    rows = found(np.ones((len(SENTENCES), 1, W, W)), visible)
    one = rows[ALL, "dependent"]
    scored = [s for i, s in enumerate(SENTENCES) if i % 2]
    arcs_ = [(d, word.head) for s in scored for d, word in enumerate(s.words) if word.head >= 0]
    seen = [(d, h) for d, h in arcs_ if h < d]
    assert (one.occurrences, one.left_out) == (len(seen), len(arcs_) - len(seen))
    assert one.chance == pytest.approx(np.mean([1 / d for d, _ in seen]), abs=1e-6)
    assert one.offset < 0 and rows[ALL, "head"].offset > 0


def test_rare_relations_have_no_row():
    few = sum(word.relation == "odd" for s in SENTENCES for word in s.words)
    assert found(np.ones((len(SENTENCES), 1, W, W)), least=few) == {}


def test_a_treebank_without_dependencies_is_refused():
    alone = Sentence("s", (Word("w", "w", "X", {}, -1, "root", {}, False),))
    with pytest.raises(UserError, match="has no dependency"):
        arcs([([alone], {NAME: np.ones((1, 1, 1, 1))}, np.ones((1, 1, 1), bool))])
