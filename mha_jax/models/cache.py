"""The decoder run for one more token, over the keys and values of those before it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mha_jax.attention.attend import attend
from mha_jax.attention.multihead import MultiHeadAttention
from mha_jax.attention.visibility import Padding, Rule
from mha_jax.models.blocks import Block, Stack


class KeysValues(NamedTuple):
    """What one attention layer has to remember."""

    k_BSGK: Float[Array, "B S G K"]
    v_BSGV: Float[Array, "B S G V"]


class Memory(NamedTuple):
    """The source as the decoder's cross-attention reads it: keys and values a layer, and the real lengths."""

    layers: tuple[KeysValues, ...]
    lengths_B: Int[Array, " B"]


Cache = tuple[KeysValues, ...]


def empty_cache(stack: Stack, rows: int, length: int) -> Cache:
    """Zeros for `length` positions of every row and layer."""

    def keys_values(x_BTD: Array) -> Cache:
        positions_T = jnp.arange(length)
        return tuple(KeysValues(*block.attention.keys_values(x_BTD, positions_T)) for block in stack.blocks)

    d_model = stack.positions.d_model
    shapes = jax.eval_shape(keys_values, jax.ShapeDtypeStruct((rows, length, d_model), stack.dtype))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def read_memory(stack: Stack, memory_BSD: Float[Array, "B S D"], lengths_B: Int[Array, " B"]) -> Memory:
    """Keys and values of the encoded source, computed once a sentence."""
    layers = tuple(KeysValues(*block.cross_attention.keys_values(memory_BSD)) for block in stack.blocks)
    return Memory(layers, lengths_B)


def _attend(attention: MultiHeadAttention, q_BTHK: Array, seen: KeysValues, visibility: Rule) -> Array:
    return attend(
        q_BTHK,
        seen.k_BSGK,
        seen.v_BSGV,
        visibility=visibility,
        head_to_group=attention.shape.head_to_group,
        backend=attention.backend,
    )


def _cross(block: Block, x_N1D: Array, seen: KeysValues, lengths_B: Array) -> Array:
    """Cross-attention where N/B rows belong to one sentence: they are its queries, so the source is not copied."""
    q_N1HK = block.cross_attention.queries(x_N1D)
    (rows, _, heads, qk_dim), sentences = q_N1HK.shape, lengths_B.shape[0]
    q_BTHK = q_N1HK.reshape(sentences, rows // sentences, heads, qk_dim)
    o_BTHV = _attend(block.cross_attention, q_BTHK, seen, Padding(lengths_B))
    return block.cross_attention.output(o_BTHV.reshape(rows, 1, heads, o_BTHV.shape[-1]))


def cached_step(
    stack: Stack, x_N1D: Float[Array, "N 1 D"], position: Int[Array, ""], cache: Cache, memory: Memory | None = None
) -> tuple[Float[Array, "N 1 D"], Cache]:
    """One token a row through the stack: equal to the last position of the whole stack over all tokens so far.

    Args:    x_N1D: the embedded token at `position`; the cache holds those before. N is a multiple of the memory's B.
    Returns: what the stack gives at `position`, and the cache with this token in it.
    """
    rows = x_N1D.shape[0]
    seen_so_far = Padding(jnp.full((rows,), position + 1))
    x_N1D = stack.enter(x_N1D, position[None])
    filled = []
    for layer, block in enumerate(stack.blocks):
        y_N1D = block.before(x_N1D, block.attention_norm)
        k_N1GK, v_N1GV = block.attention.keys_values(y_N1D, position[None])
        seen = KeysValues(
            lax.dynamic_update_slice_in_dim(cache[layer].k_BSGK, k_N1GK, position, axis=1),
            lax.dynamic_update_slice_in_dim(cache[layer].v_BSGV, v_N1GV, position, axis=1),
        )
        filled.append(seen)
        o_N1HV = _attend(block.attention, block.attention.queries(y_N1D, position[None]), seen, seen_so_far)
        x_N1D = block.after(x_N1D, block.attention.output(o_N1HV), block.attention_norm)
        if memory is not None:
            y_N1D = block.before(x_N1D, block.cross_attention_norm)
            y_N1D = _cross(block, y_N1D, memory.layers[layer], memory.lengths_B)
            x_N1D = block.after(x_N1D, y_N1D, block.cross_attention_norm)
        x_N1D = block.feed(x_N1D)
    return stack.leave(x_N1D), tuple(filled)
