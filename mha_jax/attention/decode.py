"""Attention of a few new queries over cached keys and values, at the price of G groups, not of H heads.

A step of decoding does little arithmetic: its time is that of reading the cache. So the cache lies by groups,
[B, G, S, K], all heads of a group are rows of one product with it, and nothing of its size is written: no copy a head,
no transpose, no mask over values.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def decode_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BGSK: Float[Array, "B G S K"],
    v_BGSV: Float[Array, "B G S V"],
    lengths: Int[Array, ""] | Int[Array, " B"],
    *,
    groups: tuple[int, ...],
) -> Float[Array, "B T H V"]:
    """`attend(q, k, v, Padding(lengths), head_to_group=groups)` for keys and values that lie by groups.

      o[b,t,h] = sum over s < lengths[b] of softmax_s(<q[b,t,h], k[b,g,s]> / sqrt(K)) * v[b,g,s],  g = groups[h]

    All T queries see the same keys: T is 1 in self-attention, and in cross-attention the hypotheses of one sentence.
    The softmax is in float32 at least, and the products add up in it. An example of length 0 gives exactly 0.

    Hidden keys may hold anything. Hidden values must be finite (a weight of 0 times NaN is NaN): whoever fills the
    cache keeps zeros there, because to mask them here would write all values anew at every step.

    Args:    lengths: how many positions are visible; a scalar holds for every example.
             groups: the group that each head reads, of any map; a group that no head reads is legal.
    Returns: o [B, T, H, V] in the type of q.
    """
    (batch, queries, heads, qk_dim), (_, num_groups, keys, v_dim) = q_BTHK.shape, v_BGSV.shape
    if heads == 0:
        return jnp.zeros((batch, queries, 0, v_dim), q_BTHK.dtype)
    head_in_slot, slot_of_head = _slots(groups, num_groups)
    in_order = np.array_equal(head_in_slot, np.arange(heads))
    q_BTYK = q_BTHK if in_order else jnp.take(q_BTHK, head_in_slot, axis=2)
    # Slots Y split into groups and slots of a group; with T, the latter are the rows X of one product a group.
    q_BGXK = (
        q_BTYK.reshape(batch, queries, num_groups, -1, qk_dim).swapaxes(1, 2).reshape(batch, num_groups, -1, qk_dim)
    )
    visible_bS = jnp.arange(keys)[None, :] < lengths.reshape(-1, 1)
    o_BGXV = _grouped_softmax(q_BGXK, k_BGSK, v_BGSV, visible_bS)
    o_BTYV = o_BGXV.reshape(batch, num_groups, queries, -1, v_dim).swapaxes(1, 2).reshape(batch, queries, -1, v_dim)
    return o_BTYV if in_order else jnp.take(o_BTYV, slot_of_head, axis=2)


def _grouped_softmax(q_BGXK: Array, k_BGSK: Array, v_BGSV: Array, visible_bS: Array) -> Array:
    """Attention of X rows a group that all see the same keys."""
    rows, wide = q_BGXK.shape[2], jnp.promote_types(q_BGXK.dtype, jnp.float32)
    if rows == 1 and q_BGXK.dtype != wide:
        # For the product of a lone row XLA writes the whole cache out in float32; two rows it reads in bfloat16.
        q_BGXK = jnp.repeat(q_BGXK, 2, axis=2)
    logits_BGXS = jnp.einsum("BGXK,BGSK->BGXS", q_BGXK, k_BGSK, preferred_element_type=wide)
    logits_BGXS = jnp.where(visible_bS[:, None, None, :], logits_BGXS * q_BGXK.shape[-1] ** -0.5, -jnp.inf)
    # The floor is finite, so that an empty row gives exp(-inf) = 0 and not exp(-inf + inf).
    weights_BGXS = jnp.exp(logits_BGXS - logits_BGXS.max(axis=-1, keepdims=True, initial=jnp.finfo(wide).min))
    total_BGX1 = weights_BGXS.sum(axis=-1, keepdims=True)
    o_BGXV = jnp.einsum("BGXS,BGSV->BGXV", weights_BGXS.astype(v_BGSV.dtype), v_BGSV, preferred_element_type=wide)
    return (o_BGXV / jnp.where(total_BGX1 > 0, total_BGX1, 1))[:, :, :rows].astype(q_BGXK.dtype)


def _slots(groups: tuple[int, ...], num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Gives every group as many slots as the most read one needs: the head in each (0 where none is), and back."""
    per_group = max(groups.count(group) for group in range(num_groups))
    slot_of_head = np.array([group * per_group + groups[:head].count(group) for head, group in enumerate(groups)])
    head_in_slot = np.zeros(num_groups * per_group, int)
    head_in_slot[slot_of_head] = np.arange(len(groups))
    return head_in_slot, slot_of_head
