import jax.numpy as jnp
import numpy as np

from mha_jax.heads.word_maps import to_words


def test_attention_to_a_split_word_is_summed_and_from_it_is_averaged():
    # start, "new" (two pieces), "car": by hand.
    weights = np.array(
        [[[[1.0, 0.0, 0.0, 0.0], [0.2, 0.1, 0.3, 0.4], [0.0, 0.5, 0.5, 0.0], [0.1, 0.2, 0.3, 0.4]]]], np.float32
    )
    found = np.asarray(to_words(jnp.asarray(weights), jnp.array([[-1, 0, 0, 1]]), 3))
    expected = [[(0.1 + 0.3 + 0.5 + 0.5) / 2, 0.4 / 2, 0], [0.2 + 0.3, 0.4, 0], [0, 0, 0]]
    np.testing.assert_allclose(found[0, 0], expected, atol=1e-6)  # a few float32 roundings


def test_uniform_attention_stays_uniform_over_pieces():
    words = jnp.array([[0, 1, 1, 1, 2, -1]])
    found = np.asarray(to_words(jnp.full((1, 2, 6, 6), 1 / 6), words, 3))
    np.testing.assert_allclose(found, np.broadcast_to(np.array([1, 3, 1]) / 6, (1, 2, 3, 3)), atol=1e-6)
