"""The decoder run for one more token, over the keys and values of those before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mha_jax.attention.decode import decode_attention
from mha_jax.attention.visibility import Dense
from mha_jax.models.blocks import Block, Stack


class KeysValues(NamedTuple):
    """What one attention layer has to remember, laid out as `decode_attention` reads it; zeros where nothing is yet."""

    k_BGSK: Float[Array, "B G S K"]
    v_BGSV: Float[Array, "B G S V"]


class Memory(NamedTuple):
    """The source as the decoder's cross-attention reads it: keys and values a layer, and the real lengths."""

    layers: tuple[KeysValues, ...]
    lengths_B: Int[Array, " B"]


Cache = tuple[KeysValues, ...]


def empty_cache(stack: Stack, rows: int, length: int) -> Cache:
    """Zeros for `length` positions of every row and layer."""

    def keys_values(x_BTD: Array) -> Cache:
        positions_T = jnp.arange(length)
        return tuple(_by_groups(*block.attention.keys_values(x_BTD, positions_T)) for block in stack.blocks)

    d_model = stack.positions.d_model
    shapes = jax.eval_shape(keys_values, jax.ShapeDtypeStruct((rows, length, d_model), stack.dtype))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def read_memory(stack: Stack, memory_BSD: Float[Array, "B S D"], lengths_B: Int[Array, " B"]) -> Memory:
    """Keys and values of the encoded source, computed once a sentence; values of what is no token are 0."""
    real_B1S1 = (jnp.arange(memory_BSD.shape[1])[None, :] < lengths_B[:, None])[:, None, :, None]
    layers = []
    for block in stack.blocks:
        k_BGSK, v_BGSV = _by_groups(*block.cross_attention.keys_values(memory_BSD))
        layers.append(KeysValues(k_BGSK, jnp.where(real_B1S1, v_BGSV, 0)))
    return Memory(tuple(layers), lengths_B)


def _by_groups(k_BSGK: Array, v_BSGV: Array) -> KeysValues:
    return KeysValues(k_BSGK.swapaxes(1, 2), v_BSGV.swapaxes(1, 2))


def _written(seen: KeysValues, new: KeysValues, position: Array) -> KeysValues:
    """`seen` with the one token of `new` at `position`, in place where the caller lets go of `seen`."""

    def update(seen: KeysValues, new: KeysValues, position: Array) -> KeysValues:
        return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, position, axis=2), seen, new)

    def update_in_a_loop(seen: KeysValues, new: KeysValues, position: Array) -> KeysValues:
        return lax.fori_loop(position, position + 1, lambda at, x: update(x, new, at), seen)

    # Where B or G is 1, XLA on CPU fuses a bare update with each of its readers and copies the cache for each;
    # a loop, even of one round, it leaves whole and in place. Elsewhere a loop would cost a wait for the device.
    return lax.platform_dependent(seen, new, position, cpu=update_in_a_loop, default=update)


def _own(block: Block, q_N1HK: Array, seen: KeysValues, position: Array) -> Array:
    """Self-attention of the token at `position` to those up to it."""
    groups, span = block.attention.shape.groups, block.attention.span
    if span is None:
        return decode_attention(q_N1HK, *seen, position + 1, groups=groups)
    k, v = (x.swapaxes(1, 2) for x in seen)
    up_to = Dense((jnp.arange(k.shape[1]) <= position)[None])
    return span.attend(q_N1HK, k, v, up_to, first_query=position, groups=groups)


def _cross(block: Block, x_N1D: Array, seen: KeysValues, lengths_B: Array) -> Array:
    """Cross-attention where N/B rows belong to one sentence: they are its queries, so the source is not copied."""
    q_N1HK = block.cross_attention.queries(x_N1D)
    (rows, _, heads, qk_dim), sentences = q_N1HK.shape, lengths_B.shape[0]
    q_BTHK = q_N1HK.reshape(sentences, rows // sentences, heads, qk_dim)
    o_BTHV = decode_attention(q_BTHK, *seen, lengths_B, groups=block.cross_attention.shape.groups)
    o_N1HV = o_BTHV.reshape(rows, 1, heads, o_BTHV.shape[-1])
    return block.cross_attention.output(o_N1HV, block.cross_attention.routed(x_N1D))


def cached_step(
    stack: Stack, x_N1D: Float[Array, "N 1 D"], position: Int[Array, ""], cache: Cache, memory: Memory | None = None
) -> tuple[Float[Array, "N 1 D"], Cache]:
    """One token a row through the stack: equal to the last position of the whole stack over all tokens so far.

    Attention is `decode_attention` whatever backend a layer has; the price of a step goes with groups, not with heads.

    Args:    x_N1D: the embedded token at `position`; the cache holds those before. N is a multiple of the memory's B.
    Returns: what the stack gives at `position`, and the cache with this token in it.
    """
    x_N1D = stack.enter(x_N1D, position[None])
    filled = []
    for layer, block in enumerate(stack.blocks):
        y_N1D = block.before(x_N1D, block.attention_norm)
        q_N1HK = block.attention.queries(y_N1D, position[None])
        new = _by_groups(*block.attention.keys_values(y_N1D, position[None]))
        seen = _written(cache[layer], new, position)
        filled.append(seen)
        o_N1HV = _own(block, q_N1HK, seen, position)
        y_N1D = block.attention.output(o_N1HV, block.attention.routed(y_N1D))
        x_N1D = block.after(x_N1D, y_N1D, block.attention_norm)
        if memory is not None:
            y_N1D = block.before(x_N1D, block.cross_attention_norm)
            y_N1D = _cross(block, y_N1D, memory.layers[layer], memory.lengths_B)
            x_N1D = block.after(x_N1D, y_N1D, block.cross_attention_norm)
        x_N1D = block.feed(x_N1D)
    return stack.leave(x_N1D), tuple(filled)
