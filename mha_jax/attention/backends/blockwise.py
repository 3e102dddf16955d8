"""Exact attention tile by tile, in plain JAX: memory grows with T + S, never with T * S. It serves every call.

Forward, an online softmax over the tiles of a row (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1); it keeps
the output and the logarithm of the softmax's sum. Backward, every tile is computed anew (algorithm 4 there). Tiles that
the rule's block map calls empty are not visited, and on full ones no mask is made.

Tiles are [t, s] on the way forward and [s, t] on the way back: so all products but one have the form that a CPU does at
its peak even where K is 8, which is never that of a large transposed left side.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from mha_jax.attention.backends.call import Call, regular_groups
from mha_jax.attention.backends.gradient import differentiable
from mha_jax.attention.backends.tile import (
    Tile,
    add,
    clean,
    for_each,
    kept_in,
    load,
    logits_of,
    store,
    sum_of_products,
    visible_in,
)
from mha_jax.attention.backends.tiling import Plan, make_plan
from mha_jax.attention.dropout import key_words
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import Rule


def refusal(call: Call) -> str | None:
    """None: it serves every call."""
    return None


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    rule: Rule,
    dropout_rate: float,
    dropout_keys: Key[Array, "B"] | None,
    scale: float | Float[Array, ""],
    groups: tuple[int, ...],
) -> Float[Array, "B T H V"]:
    """Attention as `mha_jax.attention.attend` defines it; arguments are checked there."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if 0 in (batch, queries, keys, heads):
        return jnp.zeros((batch, queries, heads, v.shape[3]), q.dtype)
    if not isinstance(scale, (int, float)):
        q, scale = (q * scale).astype(q.dtype), 1.0
    k, v = (by_head(x, groups) for x in (k, v))
    plan, rule = make_plan(rule, batch, queries, keys, heads, float(scale), dropout_rate)
    words = None if dropout_keys is None else key_words(dropout_keys)
    q, k, v = pad(q, plan.tiles.query_length), pad(k, plan.tiles.key_length), pad(v, plan.tiles.key_length)
    return _attention(plan, rule, words, q, k, v)[:, :queries]


def by_head(x_BSGX: Float[Array, "B S G X"], groups: tuple[int, ...]) -> Float[Array, "B S H X"]:
    """The keys or values that each head reads."""
    num_groups = x_BSGX.shape[2]
    if groups == tuple(range(num_groups)):
        return x_BSGX
    if groups == regular_groups(len(groups), num_groups):
        return jnp.repeat(x_BSGX, len(groups) // num_groups, axis=2)
    return jnp.take(x_BSGX, np.array(groups), axis=2)


def pad(x_BTHX: Float[Array, "B T H X"], length: int) -> Float[Array, "B length H X"]:
    """Zeros behind the end."""
    return jnp.pad(x_BTHX, ((0, 0), (0, length - x_BTHX.shape[1]), (0, 0), (0, 0)))


# What is averaged by the weights beside the values: a number for each place, from its logit, query and key position.
Measure = Callable[[Array, Array, Array], Array]


def forward(
    plan: Plan,
    rule: Rule,
    words: Any,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHV: Array,
    measures: tuple[Measure, ...] = (),
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"], Float[Array, "B H T N"]]:
    """The output; log(sum over s of exp(logit)) of every row; greatest weight and means of the measures.

    All are 0 where a row sees nothing. The last is [B, H, T, 0] where no measures are asked for.
    """
    tiles, heads = plan.tiles, plan.heads_at_once
    (batch, queries, _, _), wide = q_BTHK.shape, jnp.promote_types(q_BTHK.dtype, jnp.float32)
    rows, V = queries // tiles.block_q, v_BSHV.shape[3]

    def row(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        h, t = Span(i // rows * heads, heads), Span(i % rows * tiles.block_q, tiles.block_q)
        q_tile = load(q_BTHK, h, t)

        def visit(column: Array, masked: bool, state: Any) -> Any:
            top, total, sums, measured = state
            tile = Tile(h, t, Span(column * tiles.block_k, tiles.block_k), masked)
            visible = visible_in(plan, rule, tile)
            q, k, v = clean(plan, visible, q_tile, load(k_BSHK, h, tile.s), load(v_BSHV, h, tile.s))
            logits = logits_of(plan, q, k, visible)
            new_top = jnp.maximum(top, logits.max(3, keepdims=True))
            weights, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
            total = total * shrink + weights.sum(3, keepdims=True)
            if measures:
                t_index, s_index = t.index[None, None, :, None], tile.s.index[None, None, None, :]
                seen = jnp.where(weights > 0, logits, 0)
                found = [(weights * measure(seen, t_index, s_index)).sum(3) for measure in measures]
                measured = measured * shrink + jnp.stack(found, axis=-1)
            if plan.dropout_rate:
                weights = jnp.where(kept_in(plan, words, tile), weights, 0)
            products = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v.dtype), v, preferred_element_type=wide)
            return new_top, total, sums * shrink + products, measured

        # The floor is finite, so that a row that sees nothing gives exp(-inf) = 0 and not exp(-inf + inf).
        top = jnp.full((batch, heads, t.size, 1), jnp.finfo(wide).min, wide)
        sums, measured = (jnp.zeros((batch, heads, t.size, width), wide) for width in (V, len(measures)))
        state = for_each(tiles, i % rows, h, visit, (top, jnp.zeros_like(top), sums, measured))
        top, total, sums, measured = state
        out_BTHV, lse_BHT, measured_BHTN = carry
        share = jnp.where(total > 0, 1, 0) / jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(total), 0)[..., 0]
        if measures:
            # The greatest weight is exp(top - top) / total.
            measured = jnp.concatenate([share, measured * share], axis=-1)
            measured_BHTN = lax.dynamic_update_slice(measured_BHTN, measured, (0, h.start, t.start, 0))
        out_BTHV = store(out_BTHV, sums * (share / (1 - plan.dropout_rate)), h, t)
        return out_BTHV, lax.dynamic_update_slice(lse_BHT, lse, (0, h.start, t.start)), measured_BHTN

    out_BTHV = jnp.zeros((*q_BTHK.shape[:3], V), q_BTHK.dtype)
    lse_BHT = jnp.zeros((batch, plan.heads, queries), wide)
    measured_BHTN = jnp.zeros((batch, plan.heads, queries, len(measures) and len(measures) + 1), wide)
    return lax.fori_loop(0, plan.num_steps * rows, row, (out_BTHV, lse_BHT, measured_BHTN))


def _backward(
    plan: Plan, rule: Rule, words: Any, arrays: list[Array], out_BTHV: Array, lse_BHT: Array, dout_BTHV: Array
) -> tuple[Array, Array, Array]:
    """Gradients for q, k and v: tile by tile along the keys, dk and dv whole at the end of each, dq added up."""
    q_BTHK, k_BSHK, v_BSHV = arrays
    tiles, heads = plan.tiles, plan.heads_at_once
    (batch, keys, _, qk_dim), wide = k_BSHK.shape, jnp.promote_types(q_BTHK.dtype, jnp.float32)
    columns = keys // tiles.block_k
    inner_BHT = sum_of_products(dout_BTHV, out_BTHV)

    def column(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        h, s = Span(i // columns * heads, heads), Span(i % columns * tiles.block_k, tiles.block_k)
        k_tile, v_tile = load(k_BSHK, h, s), load(v_BSHV, h, s)

        def visit(row: Array, masked: bool, state: Any) -> Any:
            dq_BTHK, dk, dv = state
            tile = Tile(h, Span(row * tiles.block_q, tiles.block_q), s, masked)
            visible = visible_in(plan, rule, tile)
            q, k, v = clean(plan, visible, load(q_BTHK, h, tile.t), k_tile, v_tile)
            lse, inner = (
                lax.dynamic_slice(x, (0, h.start, tile.t.start), (batch, heads, tile.t.size))[:, :, None]
                for x in (lse_BHT, inner_BHT)
            )
            weights = jnp.exp(logits_of(plan, k, q, None if visible is None else visible.swapaxes(2, 3)) - lse)
            dout = load(dout_BTHV, h, tile.t)
            dweights = jnp.einsum("bhsv,bhtv->bhst", v, dout, preferred_element_type=wide)
            kept = weights
            if plan.dropout_rate:
                keep, grow = kept_in(plan, words, tile).swapaxes(2, 3), 1 / (1 - plan.dropout_rate)
                kept, dweights = jnp.where(keep, weights * grow, 0), jnp.where(keep, dweights * grow, 0)
            dlogits = (weights * (dweights - inner)).astype(q.dtype)
            dv = dv + jnp.einsum("bhst,bhtv->bhsv", kept.astype(q.dtype), dout, preferred_element_type=wide)
            dk = dk + jnp.einsum("bhst,bhtk->bhsk", dlogits, q, preferred_element_type=wide)
            dq = jnp.einsum("bhsk,bhst->bhkt", k, dlogits, preferred_element_type=wide)
            return add(dq_BTHK, dq.swapaxes(2, 3), h, tile.t), dk, dv

        dq_BTHK, dk_BSHK, dv_BSHV = carry
        empty = (jnp.zeros((batch, heads, s.size, width), wide) for width in (qk_dim, v_BSHV.shape[3]))
        dq_BTHK, dk, dv = for_each(tiles.transposed(), i % columns, h, visit, (dq_BTHK, *empty))
        return dq_BTHK, store(dk_BSHK, dk * plan.scale, h, s), store(dv_BSHV, dv, h, s)

    start = jnp.zeros(q_BTHK.shape, wide), jnp.zeros_like(k_BSHK), jnp.zeros_like(v_BSHV)
    dq_BTHK, dk_BSHK, dv_BSHV = lax.fori_loop(0, plan.num_steps * columns, column, start)
    return (dq_BTHK * plan.scale).astype(q_BTHK.dtype), dk_BSHK, dv_BSHV


_attention = differentiable(forward, _backward)
