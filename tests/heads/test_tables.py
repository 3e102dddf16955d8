"""Means, errors and rank correlations of a measure are those of the textbook, over batches that have targets."""

import numpy as np
import pytest
from scipy import stats

from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.heads.tables import HeadTable, by_kind, seed_stability
from mha_jax.specs import UserError

RNG = np.random.default_rng(0)


def make_table(num_batches=6, heads=(5, 0, 3)):
    names = ("encoder/0/attention", "decoder/0/attention", "decoder/1/cross_attention")
    values = {name: RNG.normal(size=(num_batches, count)) for name, count in zip(names, heads, strict=True)}
    return HeadTable(values, np.ones(num_batches))


def test_error_of_equal_batches_is_the_standard_error_of_the_mean():
    table = make_table()
    for name, x_NH in table.values.items():
        np.testing.assert_allclose(table.mean[name], x_NH.mean(axis=0))
        np.testing.assert_allclose(table.standard_error[name], x_NH.std(axis=0, ddof=1) / np.sqrt(6))


def test_error_of_unequal_batches_is_the_spread_over_repeated_draws():
    rng = np.random.default_rng(1)
    weights = np.array([7.0, 1, 3, 3, 5, 2, 6, 4])
    # Values that are means of `weight` draws, as those of batches are.
    draws = rng.normal(size=(8, 4000)) / np.sqrt(weights)[:, None]
    table = HeadTable({"decoder/0/attention": draws}, weights)
    spread = table.mean["decoder/0/attention"].std()
    # 4000 draws give the spread to about 1 %; the estimate itself is 4 % low with eight such batches.
    estimate = np.sqrt(np.mean(table.standard_error["decoder/0/attention"] ** 2))
    np.testing.assert_allclose(estimate, spread, rtol=0.08)


def test_batch_without_targets_counts_for_nothing():
    table = make_table()
    more = {name: np.concatenate([x_NH, np.full_like(x_NH[:1], 9.0)]) for name, x_NH in table.values.items()}
    padded = HeadTable(more, np.array([1.0] * 6 + [0.0]))
    for name in more:
        np.testing.assert_array_equal(padded.standard_error[name], table.standard_error[name])


def test_exact_measure_has_neither_error_nor_stability():
    table = HeadTable.of_weights({"decoder/0/attention": np.array([1.0, 2.0, 4.0])})
    np.testing.assert_array_equal(table.mean["decoder/0/attention"], [1.0, 2.0, 4.0])
    assert table.standard_error is None and table.stability is None


def test_stability_compares_even_and_odd_batches_kind_by_kind():
    table = make_table()
    x_NH = table.values["encoder/0/attention"]
    expected = stats.spearmanr(x_NH[0::2].mean(axis=0), x_NH[1::2].mean(axis=0)).statistic
    assert table.stability["encoder"] == pytest.approx(expected)
    assert table.stability["decoder"] is None  # no heads, no order


def test_stability_over_seeds_is_the_mean_over_pairs():
    tables = [make_table() for _ in range(3)]
    means = [table.mean["decoder/1/cross_attention"] for table in tables]
    pairs = [stats.spearmanr(means[a], means[b]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
    assert seed_stability(tables)["cross"] == pytest.approx(np.mean(pairs))
    assert seed_stability(tables[:1]) is None


def test_kind_and_layer_follow_from_the_name():
    assert [kind_of(f"decoder/11/{place}") for place in ("attention", "cross_attention")] == ["decoder", "cross"]
    assert layer_of("encoder/11/attention") == 11
    assert {kind: list(found) for kind, found in by_kind(make_table().mean).items()} == {
        "encoder": ["encoder/0/attention"],
        "decoder": ["decoder/0/attention"],
        "cross": ["decoder/1/cross_attention"],
    }


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "importance over 1 batch has no error bar; give at least 2"),
        ([1.0, 0.0], "importance over 1 batch has no error bar; give at least 2"),
        ([0.0, 0.0], "there is no batch with a target in it"),
    ],
)
def test_too_few_batches_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        HeadTable({"decoder/0/attention": np.zeros((len(weights), 3))}, np.array(weights))
