"""Dropout whose every bit is a function of a key and an element's place: no state, no order, no tiling.

Forward, backward and every backend compute the same bits anew, whatever block of the square they hold, so nothing is
stored and nothing depends on the device. Threefry would do the same at some fifty times the cost on CPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from mha_jax.specs import UserError


def keys_per_example(key: Key[Array, "..."], batch: int) -> Key[Array, "B"]:
    """One key an example: key[b] = fold_in(key, b), or the B keys themselves where they are given.

    Raises: UserError for a key that is not a typed one (jax.random.key), or keys that are not B.
    """
    if not jnp.issubdtype(getattr(key, "dtype", type(key)), jax.dtypes.prng_key):
        told = f" is an array of {key.dtype}" if hasattr(key, "dtype") else f"={key!r} is no key"
        raise UserError(f"dropout_key{told}; use a typed key, jax.random.key(seed)")
    if key.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise UserError(f"dropout_key has shape {key.shape}; one key, or B={batch} keys, would do")
    return key


def dropout(x: Float[Array, "B *shape"], keys: Key[Array, "B"], rate: float) -> Float[Array, "B *shape"]:
    """x / (1 - rate) where an element is kept, 0 where it is dropped; independent for every element and example."""
    if rate == 0:
        return x
    return jnp.where(keep_mask(keys, x.shape[1:], rate), x * (1 / (1 - rate)), 0)


def keep_mask(keys: Key[Array, "B"], shape: tuple[int, ...], rate: float) -> Bool[Array, "B ..."]:
    """True with probability 1 - rate, for every element of a [B, *shape] array."""
    size = 1
    place = jnp.zeros((1,) * (len(shape) + 1), jnp.uint32)
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), axis + 1)
        place = place + index * jnp.uint32(size % 2**32)
        size *= shape[axis]
    first, second = (_trailing(word, len(shape)) for word in key_words(keys))
    return _finish(_finish(first ^ place) + second) >= _threshold(rate)


def attention_keep(
    keys: Key[Array, "B"],
    heads: Int[Array, "H"],
    queries: Int[Array, "T"],
    keys_index: Int[Array, "S"],
    rate: float,
) -> Bool[Array, "B H T S"]:
    """Which attention weights are kept, for any block of the square given by its absolute indices."""
    first, second = (_trailing(word, 3) for word in key_words(keys))
    return attention_keep_block(
        first, second, heads[None, :, None, None], queries[None, None, :, None], keys_index[None, None, None, :], rate
    )


def attention_keep_block(
    first: UInt32[Array, "..."],
    second: UInt32[Array, "..."],
    heads: Int[Array, "..."],
    queries: Int[Array, "..."],
    keys_index: Int[Array, "..."],
    rate: float,
) -> Bool[Array, "..."]:
    """`attention_keep` for use inside kernels: broadcasts an example's two words with indices of any shape."""
    h, t, s = (index.astype(jnp.uint32) for index in (heads, queries, keys_index))
    # Two words a row: one would repeat between some of the million rows of a long example.
    row_first = _finish(_finish(first ^ h) + t)
    row_second = _finish(_finish(second + h) ^ t)
    return _finish(_finish(row_first ^ s) + row_second) >= _threshold(rate)


def key_words(keys: Key[Array, "*B"]) -> tuple[UInt32[Array, "*B"], UInt32[Array, "*B"]]:
    """The two words that stand for a typed key in the hash."""
    data = jax.random.key_data(keys)
    # Keys of small seeds differ in few bits; the constant moves them off 0, the hash's fixed point.
    first = _finish(data[..., 0] + jnp.uint32(0x9E3779B9))
    return first, _finish(data[..., -1] ^ first)


def _finish(word: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finaliser of MurmurHash3 (Appleby 2011): a bijection of 32 bits in which every bit reaches every other."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _threshold(rate: float) -> UInt32[Array, ""]:
    return jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _trailing(word: UInt32[Array, "B"], count: int) -> UInt32[Array, "..."]:
    return word.reshape(word.shape + (1,) * count)
