"""Attention under rules that show a query one narrow range of keys, as windows do: a row takes its range as one strip.

So there is no online softmax, one visit a row where tiles have many, and one mask for all heads. Backward, a column of
keys meets the whole range of its queries: dk and dv are whole at the end of it, and only dq is added up.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from mha_jax.attention.backends.blockwise import by_head, pad
from mha_jax.attention.backends.call import Call
from mha_jax.attention.backends.gradient import differentiable
from mha_jax.attention.backends.tile import (
    Tile,
    add,
    clean,
    kept_in,
    load,
    logits_of,
    store,
    sum_of_products,
)
from mha_jax.attention.backends.tiling import (
    Plan,
    Strips,
    halved,
    make_plan,
    plan_strips,
    strip_cost,
    strips_of,
    tiles_cost,
)
from mha_jax.attention.dropout import key_words
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import Rule
from mha_jax.attention.target import target

# Keys of a row, or queries of a column, that a core's cache holds.
_WIDEST = 2048


def refusal(call: Call) -> str | None:
    """Refuses rules that spread what a row sees over more than 2048 keys, or show heads different places."""
    if 0 in (call.batch, call.queries, call.keys, call.heads):
        return "an axis is empty; backend='blockwise' would do"
    tiles = _plan(call)[0].tiles
    if len(tiles.kinds) > 1:
        return "heads see places of their own; backend='blockwise' would do"
    widest = max(strips_of(tiles)[1], strips_of(tiles.transposed())[1])
    if widest > _WIDEST:
        return (
            f"rows see keys up to {widest} places apart; up to {_WIDEST} are served, and backend='blockwise' would do"
        )
    return None


def pays(call: Call) -> bool:
    """Whether it is likely quicker than tiles, on CPU: where strips leave out much and are as small as tiles."""
    if target() != "cpu" or refusal(call) is not None:
        return False
    plan, _ = _plan(call)
    tiled, _ = make_plan(call.rule, call.batch, call.queries, call.keys, call.heads, 1.0, call.dropout_rate)
    narrow = 2 * strips_of(plan.tiles)[1] <= call.keys
    return narrow and bool(strip_cost(plan, call.batch) < tiles_cost(tiled, call.batch))


def _plan(call: Call) -> tuple[Plan, Rule]:
    return plan_strips(call.rule, call.batch, call.queries, call.keys, call.heads, 1.0, call.dropout_rate)


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
    plan, rule = plan_strips(rule, batch, queries, keys, heads, float(scale), dropout_rate)
    plans = _Plans(halved(plan, rule, batch), plan)
    words = None if dropout_keys is None else key_words(dropout_keys)
    q, k, v = pad(q, plan.tiles.query_length), pad(k, plan.tiles.key_length), pad(v, plan.tiles.key_length)
    return _attention(plans, rule, words, q, k, v)[:, :queries]


class _Plans(NamedTuple):
    """Forward by strips of keys for rows of queries, backward by strips of queries for columns of keys."""

    forward: Strips
    backward: Plan


def _forward(
    plans: _Plans, rule: Rule, words: Any, q_BTHK: Array, k_BSHK: Array, v_BSHV: Array
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """The output, and log(sum over s of exp(logit)); 0 where a query sees nothing."""
    plan = plans.forward
    (batch, queries, heads, qk_dim), v_dim = q_BTHK.shape, v_BSHV.shape[3]
    wide, rows = jnp.promote_types(q_BTHK.dtype, jnp.float32), queries // plan.block

    def row(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        k_BhKs, v_BhsV, out_BTHV, lse_BHT = carry
        h, t = Span(i // rows * plan.heads_at_once, plan.heads_at_once), Span(i % rows * plan.block, plan.block)
        s = Span(jnp.asarray(plan.starts, int)[i % rows], plan.width)

        def turned(x: Array) -> Array:
            """As the keys lie in the rings."""
            return jnp.roll(x, s.start, 3)

        k_BhKs, v_BhsV = _fetched(plan, i % rows, h, (k_BSHK, v_BSHV), (k_BhKs, v_BhsV))
        tile = Tile(h, t, s, True)
        visible = turned(rule.at(None, None if plan.num_steps == 1 else h, t, s))
        q, k, v = clean(plan, visible, load(q_BTHK, h, t).astype(wide), k_BhKs.swapaxes(2, 3), v_BhsV)
        logits = logits_of(plan, q, k.swapaxes(2, 3), visible, "bhxk,bhky->bhxy")
        # The floor is finite, so that a row that sees nothing gives exp(-inf) = 0 and not exp(-inf + inf).
        top = jnp.maximum(logits.max(3, keepdims=True), jnp.finfo(wide).min)
        weights = jnp.exp(logits - top)
        total = weights.sum(3, keepdims=True)
        if plan.dropout_rate:
            weights = jnp.where(turned(kept_in(plan, words, tile)), weights, 0)
        sums = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v_BSHV.dtype).astype(wide), v, preferred_element_type=wide)
        divisor = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(divisor), 0)[..., 0]
        out_BTHV = store(out_BTHV, sums / (divisor * (1 - plan.dropout_rate)), h, t)
        return k_BhKs, v_BhsV, out_BTHV, lax.dynamic_update_slice(lse_BHT, lse, (0, h.start, t.start))

    # What a loop fills is wide: XLA on CPU writes to a bfloat16 array in place only by way of a whole copy of it.
    rings = (
        jnp.zeros((batch, plan.heads_at_once, *sizes), wide) for sizes in ((qk_dim, plan.width), (plan.width, v_dim))
    )
    found = (jnp.zeros(sizes, wide) for sizes in ((batch, queries, heads, v_dim), (batch, heads, queries)))
    *_, out_BTHV, lse_BHT = lax.fori_loop(0, plan.num_steps * rows, row, (*rings, *found))
    return out_BTHV.astype(q_BTHK.dtype), lse_BHT


def _fetched(
    plan: Strips, row: Array, h: Span, arrays: tuple[Array, Array], rings: tuple[Array, Array]
) -> tuple[Float[Array, "B h K s"], Float[Array, "B h s V"]]:
    """Rings that hold the strip of a row, place s at s % width: most is there from the row before, and stays."""
    begin, end, order = plan.fetches

    def fetch(place: Array, rings: tuple[Array, Array]) -> tuple[Array, Array]:
        s = Span(order[place] * plan.step, plan.step)
        at = s.start % plan.width
        k_BhKs, v_BhsV = rings
        k, v = (load(x, h, s).astype(k_BhKs.dtype) for x in arrays)
        k_BhKs = lax.dynamic_update_slice(k_BhKs, k.swapaxes(2, 3), (0, 0, 0, at))
        return k_BhKs, lax.dynamic_update_slice(v_BhsV, v, (0, 0, at, 0))

    return lax.fori_loop(begin[row], end[row], fetch, rings)


def _backward(
    plans: _Plans, rule: Rule, words: Any, arrays: list[Array], out_BTHV: Array, lse_BHT: Array, dout_BTHV: Array
) -> tuple[Array, Array, Array]:
    """Gradients for q, k and v; logits and weights are [s, t], as in `blockwise`."""
    plan = plans.backward
    q_BTHK, k_BSHK, v_BSHV = arrays
    tiles, wide = plan.tiles, jnp.promote_types(q_BTHK.dtype, jnp.float32)
    starts, width = strips_of(tiles.transposed())
    inner_BHT = sum_of_products(dout_BTHV, out_BTHV)

    def column(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        t, s = Span(jnp.asarray(starts, int)[i], width), Span(i * tiles.block_k, tiles.block_k)
        mask = rule.at(None, None, t, s).swapaxes(2, 3)

        def some_heads(step: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            h = Span(step * plan.heads_at_once, plan.heads_at_once)
            visible = h.of(mask, 1)
            q, k, v = load(q_BTHK, h, t), load(k_BSHK, h, s), load(v_BSHV, h, s)
            q, k, v = clean(plan, visible.swapaxes(2, 3), q, k, v)
            dout = load(dout_BTHV, h, t)
            sizes = (q.shape[0], h.size, t.size)
            lse, inner = (lax.dynamic_slice(x, (0, h.start, t.start), sizes)[:, :, None] for x in (lse_BHT, inner_BHT))
            weights = jnp.exp(logits_of(plan, k, q, visible) - lse)
            dweights = jnp.einsum("bhsv,bhtv->bhst", v, dout, preferred_element_type=wide)
            kept = weights
            if plan.dropout_rate:
                keep = kept_in(plan, words, Tile(h, t, s, True)).swapaxes(2, 3)
                kept, dweights = (jnp.where(keep, x / (1 - plan.dropout_rate), 0) for x in (weights, dweights))
            dlogits = (weights * (dweights - inner)).astype(q.dtype)
            dv = jnp.einsum("bhst,bhtv->bhsv", kept.astype(q.dtype), dout, preferred_element_type=wide)
            dk = jnp.einsum("bhst,bhtk->bhsk", dlogits, q, preferred_element_type=wide)
            dq = jnp.einsum("bhsk,bhst->bhkt", k, dlogits, preferred_element_type=wide)
            dq_BTHK, dk_BSHK, dv_BSHV = carry
            dq_BTHK = add(dq_BTHK, dq.swapaxes(2, 3) * plan.scale, h, t)
            return dq_BTHK, store(dk_BSHK, dk * plan.scale, h, s), store(dv_BSHV, dv, h, s)

        return lax.fori_loop(0, plan.num_steps, some_heads, carry)

    start = tuple(jnp.zeros(x.shape, wide) for x in arrays)
    found = lax.fori_loop(0, k_BSHK.shape[1] // tiles.block_k, column, start)
    dq_BTHK, dk_BSHK, dv_BSHV = (x.astype(y.dtype) for x, y in zip(found, arrays, strict=True))
    return dq_BTHK, dk_BSHK, dv_BSHV


_attention = differentiable(_forward, _backward)
