"""The benchmark of probes at a tiny size."""

import dataclasses

import numpy as np
import pytest

from mha_jax.benchmarks import probes

TINY = probes.Setting(heads=2, width=8, words=600, test_words=300, classes=3, compared=2, rounds=2)


def test_features_are_standardised_on_the_training_words_and_tell_the_label():
    x_HNV, label_N = probes.features(TINY)
    assert x_HNV.dtype == np.float32 and x_HNV.shape == (2, 900, 8) and label_N.shape == (900,)
    np.testing.assert_allclose(x_HNV[:, :600].std(axis=1), 1, atol=1e-4)
    x_HNV, label_N = probes.features(dataclasses.replace(TINY, words=6000))
    apart = x_HNV[0][label_N == 0].mean(axis=0) - x_HNV[0][label_N == 1].mean(axis=0)
    # Of unlike means: 8 standard errors of 0.03 each would have a length of 0.1.
    assert np.linalg.norm(apart) > 0.25


@pytest.mark.slow
def test_both_sides_answer_alike_and_are_timed_every_round():
    pytest.importorskip("sklearn", reason="scikit-learn is in requirements-bench.txt")
    result = probes.measure(TINY)
    assert [len(row["seconds"]) for row in result["rows"]] == [2, 2, 2] and len(result["accuracy"][probes.OURS]) == 2
    assert result["answers"] > 0.9
    told = probes.table({**result, "setting": {"heads": 2, "width": 8, "words": 600, "test_words": 300, "classes": 3}})
    assert probes.ONE_THREAD in told and "2 heads of width 8" in told
