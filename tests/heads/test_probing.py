"""Probes find what was planted in a head and nothing else; controls, intervals and codes are as counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.data.conllu import Sentence, Word
from mha_jax.heads import probing
from mha_jax.heads.linear_probes import train_probes
from mha_jax.heads.probing import Split, bootstrap, label_words, online_code, probe
from mha_jax.heads.word_features import WordFeatures
from mha_jax.specs import UserError

CLASSES, WIDTH, KINDS = 3, 24, 24


def word(form: str, upos: str, **feats: str) -> Word:
    return Word(form, form, upos, feats, -1, "root", {}, True)


def split(words: int, seed: int) -> Split:
    """Head 0 has the label as a direction, head 1 noise, head 2 the word type, from which both tasks can be learnt."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, KINDS, words)
    labels = np.stack([kind % CLASSES, np.random.default_rng(9).integers(0, CLASSES, KINDS)[kind]])
    x_HNV = rng.normal(size=(3, words, WIDTH))
    x_HNV[0, np.arange(words), labels[0]] += 8
    x_HNV[2] = 0.01 * x_HNV[2] + np.random.default_rng(8).normal(size=(KINDS, WIDTH))[kind]
    return Split((3 * x_HNV + 1).astype(np.float32), labels, np.arange(words) // 4)


@pytest.fixture(scope="module")
def splits():
    return split(400, 0), split(200, 1), split(240, 2)


@pytest.fixture(scope="module")
def scores(splits):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probing, "PORTIONS", (0.1, 1.0))  # each portion is a program of its own to compile
        return probe(*splits, CLASSES, mdl=True)


def test_a_planted_label_is_found_and_noise_stays_at_chance(scores):
    accuracy, low, high = scores.accuracy
    assert accuracy[0] > 0.99
    # 240 independent words at 1/3: a standard error of 0.03.
    assert abs(accuracy[1] - 1 / 3) < 0.1 and low[1] < accuracy[1] < high[1]


def test_selectivity_is_high_where_the_label_is_and_low_where_the_word_is_learnt_by_heart(scores):
    np.testing.assert_allclose(scores.selectivity.mean, scores.accuracy.mean - scores.control, atol=1e-12)
    assert scores.selectivity.mean[0] > 0.3 and scores.selectivity.low[0] > 0
    assert scores.control[2] > 0.9 and scores.selectivity.mean[2] < 0.1


def test_the_code_is_short_where_the_label_is_and_uniform_for_noise(scores, splits):
    uniform = 400 * np.log2(CLASSES)
    assert scores.bits[0] < 0.2 * uniform < 0.95 * uniform < scores.bits[1]


def test_a_code_of_one_portion_is_uniform(splits, monkeypatch):
    monkeypatch.setattr(probing, "PORTIONS", (1.0,))
    np.testing.assert_allclose(online_code(splits[0], CLASSES, np.full(3, 1e-3)), 400 * np.log2(3))


def test_heads_labels_and_penalties_together_are_as_one_by_one(splits):
    x_HNV, labels = splits[0][:2]
    together = train_probes(x_HNV, labels, np.array([1e-4, 1e-2]), classes=CLASSES)
    alone = train_probes(x_HNV[2:], labels[1:], np.array([1e-2]), classes=CLASSES)
    # Float32 sums in another order, over 80 steps.
    np.testing.assert_allclose(together.kernel_HVLRC[2, :, 1, 1], alone.kernel_HVLRC[0, :, 0, 0], atol=1e-3)


def test_accuracy_and_loss_are_those_of_scikit_learn(splits):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is in requirements-bench.txt")
    (x_HNV, labels, _), test = splits[0], splits[2]
    ours = train_probes(x_HNV, labels[1:], np.array([1e-2]), classes=CLASSES, passes=400)
    scores = np.asarray(ours.logits(jnp.asarray(test.x_HNV)), np.float64)[:, :, 0, 0]
    for head in range(3):
        mean, deviation = x_HNV[head].mean(axis=0), x_HNV[head].std(axis=0)
        theirs = linear_model.LogisticRegression(C=1 / (len(labels[1]) * 1e-2), max_iter=1000, tol=1e-8)
        theirs.fit((x_HNV[head] - mean) / deviation, labels[1])
        log_p = theirs.predict_log_proba((test.x_HNV[head] - mean) / deviation)
        own = scores[head] - np.logaddexp.reduce(scores[head], axis=1, keepdims=True)
        np.testing.assert_allclose(own, log_p, atol=0.01)  # float32 and a fixed number of steps


def test_few_words_a_class_that_is_not_there_and_strong_penalties_give_weights_that_are_bounded():
    x_HNV = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    x_HNV[1, :, 4:] = x_HNV[1, :, :1]  # features that say the same, so that the covariance has no inverse
    probes = train_probes(x_HNV, np.array([[0, 1, 1]]), np.array([1e-5, 1e-2, 1.0]), classes=4)
    # With a penalty the weights of three words stay small; steps that are too long would make them grow without end.
    assert np.abs(np.asarray(probes.kernel_HVLRC)).max() < 20 and np.abs(np.asarray(probes.bias_HLRC)).max() < 50


def test_the_bootstrap_draws_sentences():
    x_NH, sentence = np.repeat([[0.0], [1.0]] * 50, 4, axis=0), np.repeat(np.arange(100), 4)
    mean, low, high = bootstrap(x_NH, sentence)
    # 100 sentences, all right or all wrong: a standard error of 0.05, whereas 400 single words would have 0.025.
    np.testing.assert_allclose([mean[0], low[0], high[0]], [0.5, 0.4, 0.6], atol=0.02)


def test_labels_and_their_control_by_hand():
    train = [word("a", "DET"), word("dogs", "NOUN", Number="Plur"), word("dog", "NOUN", Number="Sing")]
    test = [word("dogs", "VERB", Number="Dual"), word("cats", "NOUN", Number="Plur"), word("a", "DET")]
    classes, (first, second) = label_words("pos", [train, test])
    assert classes == ("DET", "NOUN") and first.label.tolist() == [0, 1, 1]
    assert second.label.tolist() == [-1, 1, 0]  # no training word is a verb
    assert first.control[1] == second.control[0] and first.control[0] == second.control[2]
    assert set(first.control) | set(second.control) <= {0, 1}
    classes, (first, second) = label_words("number", [train, test])
    assert classes == ("Plur", "Sing") and first.words.tolist() == [1, 2] and second.label.tolist() == [-1, 0]


def test_the_control_follows_the_shares_of_the_labels():
    words = [word(f"type{i}", "NOUN" if i % 4 else "DET") for i in range(2000)]
    _, (labels,) = label_words("pos", [words])
    # 2000 draws at 0.75: a standard error of 0.01.
    assert abs(labels.control.mean() - 0.75) < 0.04
    assert np.corrcoef(labels.control, labels.label)[0, 1] < 0.1


@pytest.mark.parametrize(
    ("task", "told"),
    [("mood", "there is no probing task 'mood'; there are pos"), ("tense", "task tense needs two classes")],
)
def test_a_task_that_does_not_exist_or_has_no_words_is_told(task, told):
    with pytest.raises(UserError, match=told):
        label_words(task, [[word("a", "DET")], [word("a", "DET")]])


def test_attentions_of_unlike_widths_keep_their_heads_apart():
    rng = np.random.default_rng(0)

    def features(words: int) -> WordFeatures:
        labels = rng.integers(0, 2, words)
        heads = {
            "encoder/0/attention": rng.normal(size=(words, 2, 3)),
            "encoder/1/attention": rng.normal(size=(words, 1, 2)),
        }
        heads["encoder/0/attention"][:, 1, 0] += 9 * labels
        named = tuple(word(f"w{i}", "AB"[label]) for i, label in enumerate(labels))
        sentences = (Sentence("all", named),)
        embedding = rng.normal(size=(words, 4)).astype(np.float32)
        heads = {name: x.astype(np.float32) for name, x in heads.items()}
        return WordFeatures(heads, embedding, named, np.zeros(words, int), sentences)

    found = probing.probe_all("pos", features(100), features(60), features(80))
    first, second = found.heads["encoder/0/attention"], found.heads["encoder/1/attention"]
    assert first.accuracy.mean[1] > 0.95 and first.accuracy.mean[0] < 0.75 and second.accuracy.mean.shape == (1,)
    assert found.words == (100, 60, 80) and found.embedding.accuracy.mean.shape == (1,)
