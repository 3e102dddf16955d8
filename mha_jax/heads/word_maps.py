"""Attention between pieces as attention between words (Clark et al. 2019, section 4.1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def to_words(
    weights_BHTS: Float[Array, "B h T T"], words_BT: Int[Array, "B T"], num_words: int
) -> Float[Array, "B h W W"]:
    """Attention to a word is the sum over its pieces, attention from a word the mean over them.

    Pieces of no word (start, end, padding) are left out, so a row sums to at most 1: the rest went to them.

    Args:    words_BT: the word that each position is a piece of, -1 for none. num_words: W, at least all words' number.
    Returns: from word [.., W, .] to word [.., ., W]; words beyond a sentence's last have zeros.
    """
    owner_BTW = jax.nn.one_hot(words_BT, num_words, dtype=weights_BHTS.dtype)
    count_BW = jnp.maximum(owner_BTW.sum(axis=1), 1)
    return jnp.einsum("btw,bhts,bsv,bw->bhwv", owner_BTW, weights_BHTS, owner_BTW, 1 / count_BW)
