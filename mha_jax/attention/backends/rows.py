"""Exact attention in a few rows of queries, each over all the keys that it sees at once: plain JAX in large products.

For accelerators and heads too wide for the memory of a fused kernel's tiles. There the products dominate, which the
vendor's library does at its peak, and the softmax costs little: few heads are wide ones. It keeps the output and the
log-sum-exp; backward, every row is computed anew. The program is unrolled, a row after the other.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mha_jax.attention.backends.blockwise import by_head
from mha_jax.attention.backends.call import Call
from mha_jax.attention.backends.gradient import differentiable
from mha_jax.attention.backends.tile import Tile, clean, kept_in, logits_of, visible_in
from mha_jax.attention.backends.tiling import Plan
from mha_jax.attention.blockmap import EMPTY, FULL, BlockMap
from mha_jax.attention.dropout import key_words
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import Rule

# Queries of a row: enough to fill an accelerator, few enough to leave most of what a triangle hides.
_QUERIES = 1024
# Weights held at once, B * H * queries * S of them: a gigabyte in float32.
_HELD = 2**28
_MOST_ROWS = 64
# The keys of a row start and end at multiples of this.
_COLUMN = 128


def refusal(call: Call) -> str | None:
    """Refuses squares of so many rows that the program would grow too long."""
    if 0 in (call.batch, call.queries, call.keys, call.heads):
        return "an axis is empty; backend='einsum' would do"
    count = -(-call.queries // _row_size(call.batch, call.heads, call.queries, call.keys))
    if count > _MOST_ROWS:
        return f"it would unroll {count} rows of queries, and does {_MOST_ROWS}; backend='blockwise' would do"
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
    """Attention as `mha_jax.attention.attend` defines it, for calls that `refusal` lets through."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if not isinstance(scale, (int, float)):
        q, scale = (q * scale).astype(q.dtype), 1.0
    k, v = (by_head(x, groups) for x in (k, v))
    size = _row_size(batch, heads, queries, keys)
    tiles = BlockMap.of(rule, queries, keys, size, _COLUMN)
    all_seen = rule.sees_self and queries == keys
    plan = Plan(tiles, heads, heads, float(scale), dropout_rate, all_seen)
    words = None if dropout_keys is None else key_words(dropout_keys)
    out_BHTV: Array = _attention(plan, rule, words, *(x.swapaxes(1, 2) for x in (q, k, v)))
    return out_BHTV.swapaxes(1, 2)


def _row_size(batch: int, heads: int, queries: int, keys: int) -> int:
    return min(queries, _QUERIES, max(_HELD // (batch * heads * keys), 1))


def _rows(plan: Plan) -> list[Tile]:
    """Each row that sees anything as one tile, from its first key to its last."""
    tiles, found = plan.tiles, []
    for number in range(tiles.kinds.shape[1]):
        kinds_hC = tiles.kinds[:, number]
        seen = np.flatnonzero((kinds_hC != EMPTY).any(axis=0))
        if not len(seen):
            continue
        t, s = number * tiles.block_q, int(seen[0]) * tiles.block_k
        t_end = min(t + tiles.block_q, tiles.query_length)
        s_end = min((int(seen[-1]) + 1) * tiles.block_k, tiles.key_length)
        masked = bool((kinds_hC[:, seen[0] : seen[-1] + 1] != FULL).any())
        found.append(Tile(Span(0, plan.heads), Span(t, t_end - t), Span(s, s_end - s), masked))
    return found


def _of(x_BHTX: Array, span: Span) -> Array:
    return x_BHTX[:, :, span.start : span.start + span.size]


def _forward(
    plan: Plan, rule: Rule, words: Any, q_BHTK: Array, k_BHSK: Array, v_BHSV: Array
) -> tuple[Float[Array, "B H T V"], Float[Array, "B H T"]]:
    """The output, and log(sum over s of exp(logit)); 0 where a query sees nothing."""
    wide = jnp.promote_types(q_BHTK.dtype, jnp.float32)
    out_BHTV = jnp.zeros((*q_BHTK.shape[:3], v_BHSV.shape[3]), q_BHTK.dtype)
    lse_BHT = jnp.zeros(q_BHTK.shape[:3], wide)
    for row in _rows(plan):
        visible = visible_in(plan, rule, row)
        q, k, v = clean(plan, visible, _of(q_BHTK, row.t), _of(k_BHSK, row.s), _of(v_BHSV, row.s))
        logits = logits_of(plan, q, k, visible)
        # The floor is finite, so that a row that sees nothing gives exp(-inf) = 0 and not exp(-inf + inf).
        top = logits.max(3, keepdims=True, initial=jnp.finfo(wide).min)
        weights = jnp.exp(logits - top)
        total = weights.sum(3, keepdims=True)
        if plan.dropout_rate:
            weights = jnp.where(kept_in(plan, words, row), weights, 0)
        sums = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v.dtype), v, preferred_element_type=wide)
        divisor = jnp.where(total > 0, total, 1)
        out = (sums / (divisor * (1 - plan.dropout_rate))).astype(q.dtype)
        lse = jnp.where(total > 0, top + jnp.log(divisor), 0)[..., 0]
        at = (slice(None), slice(None), slice(row.t.start, row.t.start + row.t.size))
        out_BHTV, lse_BHT = out_BHTV.at[at].set(out), lse_BHT.at[at].set(lse)
    return out_BHTV, lse_BHT


def _backward(
    plan: Plan, rule: Rule, words: Any, arrays: list[Array], out_BHTV: Array, lse_BHT: Array, dout_BHTV: Array
) -> tuple[Array, Array, Array]:
    """Gradients for q, k and v."""
    (q_BHTK, k_BHSK, v_BHSV), wide = arrays, lse_BHT.dtype
    inner_BHT = (dout_BHTV.astype(wide) * out_BHTV.astype(wide)).sum(3)
    dq_BHTK = jnp.zeros_like(q_BHTK)
    dk_BHSK, dv_BHSV = jnp.zeros(k_BHSK.shape, wide), jnp.zeros(v_BHSV.shape, wide)
    for row in _rows(plan):
        visible = visible_in(plan, rule, row)
        q, k, v = clean(plan, visible, _of(q_BHTK, row.t), _of(k_BHSK, row.s), _of(v_BHSV, row.s))
        dout, lse, inner = _of(dout_BHTV, row.t), _of(lse_BHT, row.t)[..., None], _of(inner_BHT, row.t)[..., None]
        weights = jnp.exp(logits_of(plan, q, k, visible) - lse)
        dweights = jnp.einsum("bhtv,bhsv->bhts", dout, v, preferred_element_type=wide)
        kept = weights
        if plan.dropout_rate:
            keep, grow = kept_in(plan, words, row), 1 / (1 - plan.dropout_rate)
            kept, dweights = (jnp.where(keep, x * grow, 0) for x in (weights, dweights))
        dlogits = (weights * (dweights - inner) * plan.scale).astype(q.dtype)
        dq = jnp.einsum("bhts,bhsk->bhtk", dlogits, k, preferred_element_type=wide)
        dk = jnp.einsum("bhts,bhtk->bhsk", dlogits, q, preferred_element_type=wide)
        dv = jnp.einsum("bhts,bhtv->bhsv", kept.astype(q.dtype), dout, preferred_element_type=wide)
        t, s = (slice(span.start, span.start + span.size) for span in (row.t, row.s))
        dq_BHTK = dq_BHTK.at[:, :, t].set(dq.astype(q.dtype))
        dk_BHSK, dv_BHSV = dk_BHSK.at[:, :, s].add(dk), dv_BHSV.at[:, :, s].add(dv)
    return dq_BHTK, dk_BHSK.astype(k_BHSK.dtype), dv_BHSV.astype(v_BHSV.dtype)


_attention = differentiable(_forward, _backward)
