"""A label of whole sentences is found in the head that has it; vectors and labels of sentences are as by hand."""

import numpy as np
import pytest

from mha_jax.heads.sentence_labels import label_sentences, probe_sentences, sentence_means, text_sentences
from mha_jax.heads.word_features import WordFeatures
from mha_jax.specs import UserError

NAME = "encoder/0/attention"


def features(count: int, seed: int) -> tuple[WordFeatures, dict[str, str]]:
    """Sentences of 2 to 5 words; one word of each tells the label to head 1, head 0 has noise."""
    rng = np.random.default_rng(seed)
    sizes, labels = rng.integers(2, 6, count), rng.integers(0, 2, count)
    texts = [" ".join(f"w{rng.integers(99)}" for _ in range(size)) for size in sizes]
    lines = [("ab"[label], text) for label, text in zip(labels, texts, strict=True)]
    sentences, named = text_sentences(lines)
    number = np.repeat(np.arange(count), sizes)
    x_NHV = rng.normal(size=(len(number), 2, 4)).astype(np.float32)
    x_NHV[np.cumsum(sizes) - 1, 1, 0] += 40 * labels
    words = tuple(word for sentence in sentences for word in sentence.words)
    embedding = rng.normal(size=(len(number), 4)).astype(np.float32)
    return WordFeatures({NAME: x_NHV}, embedding, words, number, tuple(sentences)), named


def test_a_label_that_one_head_knows_is_found_there_alone():
    files, named = zip(*(features(count, seed) for seed, count in enumerate((300, 200, 200))), strict=True)
    found = probe_sentences(files, named)
    accuracy, selectivity = found.heads[NAME].accuracy, found.heads[NAME].selectivity
    # 200 sentences at 1/2: a standard error of 0.035.
    assert accuracy.mean[1] > 0.97 and abs(accuracy.mean[0] - 0.5) < 0.12
    assert selectivity.low[1] > 0.3 and selectivity.low[0] < 0 < selectivity.high[0]
    assert found.classes == ("a", "b") and found.words == (300, 200, 200)


def test_a_sentences_vector_is_the_mean_of_its_words():
    sentences, _ = text_sentences([("a", "one two"), ("b", "three")])
    x_NHV = np.array([[[1.0, 2.0]], [[3.0, 6.0]], [[5.0, 7.0]]], np.float32)
    words = tuple(word for sentence in sentences for word in sentence.words)
    one = sentence_means(WordFeatures({NAME: x_NHV}, x_NHV[:, 0], words, np.array([0, 0, 1]), tuple(sentences)))
    np.testing.assert_allclose(one.heads[NAME], [[[2, 4]], [[5, 7]]])
    np.testing.assert_allclose(one.embedding, [[2, 4], [5, 7]])
    assert one.sentence.tolist() == [0, 1] and one.words == ()


def test_words_and_labels_of_texts_by_hand():
    sentences, named = text_sentences([("a", "One  two"), ("b", "three"), ("a", "three")])
    assert [[(w.form, w.space_before) for w in one.words] for one in sentences] == [
        [("One", False), ("two", True)], [("three", False)], [("three", False)],
    ]  # fmt: skip
    classes, (labels,) = label_sentences([sentences], [named])
    assert classes == ("a", "b") and labels.label.tolist() == [0, 1, 0]
    assert labels.control[1] == labels.control[2]  # the same text
    with pytest.raises(UserError, match="task label needs two classes"):
        label_sentences([sentences[:1]], [named])
