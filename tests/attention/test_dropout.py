import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention.dropout import attention_keep, dropout, keep_mask, key_words, keys_per_example
from mha_jax.specs import UserError

RATE = 0.3


# Compiled whole: op by op, each new shape would wait for a dozen compilations.
block = jax.jit(attention_keep, static_argnames="rate")
mask = jax.jit(keep_mask, static_argnames=("shape", "rate"))


def square(keys, heads=5, queries=37, key_length=41, rate=RATE):
    return np.asarray(block(keys, np.arange(heads), np.arange(queries), np.arange(key_length), rate=rate))


def correlation(a, b):
    """Correlation in units of its standard error under independence."""
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    return abs((a * b).mean() / (a.std() * b.std())) * np.sqrt(a.size)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_share_of_kept_elements_is_one_minus_rate(rate):
    keys = jax.random.split(jax.random.key(0), 4)
    for kept in (square(keys, 8, 128, 128, rate), np.asarray(mask(keys, shape=(8, 128, 128), rate=rate))):
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size)


@pytest.fixture(scope="module")
def large_square():
    return square(keys_per_example(jax.random.key(1), 32), 32, 48, 48).astype(float)


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["examples", "heads", "queries", "keys"])
@pytest.mark.parametrize("step", [1, 2, 16])
def test_attention_dropout_is_independent_along_every_axis(large_square, axis, step):
    kept = large_square
    first, second = np.split(kept, [step], axis)[1], np.split(kept, [kept.shape[axis] - step], axis)[0]
    assert correlation(first, second) < 5


def test_neighbouring_keys_of_small_seeds_are_independent():
    keys = jax.vmap(jax.random.key)(jnp.arange(12))
    for kept in (square(keys, 3, 64, 64), mask(keys, shape=(3, 64, 64), rate=RATE)):
        kept = np.asarray(kept, float)
        worst = max(correlation(kept[i], kept[j]) for i, j in itertools.combinations(range(12), 2))
        assert worst < 5


def test_layers_that_fold_in_their_number_are_independent():
    layers = [
        square(keys_per_example(jax.random.fold_in(jax.random.key(2), layer), 4)).astype(float) for layer in (0, 1)
    ]
    assert correlation(*layers) < 5


def test_rows_of_the_square_never_repeat():
    rows = square(keys_per_example(jax.random.key(3), 2), 7, 301, 61, 0.5).reshape(-1, 61)
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_bits_do_not_depend_on_the_tiling():
    keys = keys_per_example(jax.random.key(4), 2)
    whole = square(keys)
    tile = block(keys, np.array([3]), np.arange(11, 29), np.arange(7, 13), rate=RATE)
    np.testing.assert_array_equal(tile, whole[:, 3:4, 11:29, 7:13])


def test_bits_are_reproducible_in_and_out_of_jit():
    keys = keys_per_example(jax.random.key(5), 3)
    spots = [jnp.arange(size) for size in (2, 3, 5)]
    eager = attention_keep(keys, *spots, RATE)
    for again in (attention_keep(keys, *spots, RATE), block(keys, *spots, rate=RATE)):
        np.testing.assert_array_equal(again, eager)
    np.testing.assert_array_equal(mask(keys, shape=(5, 7), rate=RATE), keep_mask(keys, (5, 7), RATE))


def test_hash_wraps_as_32_bit_integers_do():
    def finish(word):
        word = ((word ^ (word >> 16)) * 0x85EBCA6B) % 2**32
        word = ((word ^ (word >> 13)) * 0xC2B2AE35) % 2**32
        return word ^ (word >> 16)

    keys = jax.random.split(jax.random.key(6), 2)
    first, second = (np.asarray(word).tolist() for word in key_words(keys))
    for b, (h, t, s) in itertools.product(range(2), [(0, 0, 0), (1, 3, 2), (4, 2**31 - 1, 2**20)]):
        row = finish(finish(first[b] ^ h) + t & 0xFFFFFFFF), finish(finish(second[b] + h & 0xFFFFFFFF) ^ t)
        bits = finish(finish(row[0] ^ s) + row[1] & 0xFFFFFFFF)
        for rate in (0.2, 0.5, 0.8):
            kept = block(keys, np.array([h]), np.array([t]), np.array([s]), rate=rate)
            assert bool(kept[b, 0, 0, 0]) == (bits >= rate * 2**32)


def test_rate_zero_changes_nothing():
    keys = keys_per_example(jax.random.key(7), 2)
    x = jnp.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    np.testing.assert_array_equal(dropout(x, keys, 0.0), x)
    assert square(keys, rate=0.0).all()


def test_dropout_scales_what_it_keeps_and_its_gradient_has_the_same_bits():
    keys = keys_per_example(jax.random.key(8), 2)
    x = jnp.ones((2, 7, 11))
    slopes = jax.grad(lambda x: dropout(x, keys, RATE).sum())
    y, gradient = jax.jit(lambda x: (dropout(x, keys, RATE), slopes(x)))(x)
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - RATE)], rtol=1e-6)
    np.testing.assert_array_equal(y, gradient)


def test_example_keeps_its_bits_in_another_batch():
    keys = keys_per_example(jax.random.key(9), 5)
    masks = [np.asarray(mask(some, shape=(7, 11), rate=RATE)) for some in (keys, keys[3:4])]
    np.testing.assert_array_equal(masks[0][3], masks[1][0])


def test_keys_given_one_an_example_are_used_as_they_are():
    keys = jax.random.split(jax.random.key(10), 3)
    assert keys_per_example(keys, 3) is keys


def test_wrong_keys_are_refused():
    with pytest.raises(UserError, match=r"typed key, jax.random.key\(seed\)"):
        keys_per_example.__wrapped__(jax.random.PRNGKey(0), 2)
    with pytest.raises(UserError, match="dropout_key=0 is no key; use a typed key"):
        keys_per_example.__wrapped__(0, 2)
    with pytest.raises(UserError, match=r"shape \(3,\); one key, or B=2 keys"):
        keys_per_example(jax.random.split(jax.random.key(0), 3), 2)
