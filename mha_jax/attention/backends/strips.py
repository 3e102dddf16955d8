"""Attention under rules that show a query one narrow range of keys, as windows do: a row takes its range as one strip.

So there is no online softmax, one visit a row where tiles have many, and one mask for all heads. A row's range is
mostly that of the row before: it lies in a ring, of which only what is new is written. So each key is read once, and
rows can be low, which leaves little in a strip that is hidden. Backward, columns of keys do the same with queries.
"""

from collections.abc import Callable
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

Rings = tuple[Array, ...]
Pieces = tuple[tuple[Array, int], ...]

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
    plans = _Plans(*(halved(plan, rule, batch, of_keys) for of_keys in (False, True)))
    words = None if dropout_keys is None else key_words(dropout_keys)
    q, k, v = pad(q, plan.tiles.query_length), pad(k, plan.tiles.key_length), pad(v, plan.tiles.key_length)
    return _attention(plans, rule, words, q, k, v)[:, :queries]


class _Plans(NamedTuple):
    """Forward by strips of keys for rows of queries, backward by strips of queries for columns of keys."""

    forward: Strips
    backward: Strips


def _forward(
    plans: _Plans, rule: Rule, words: Any, q_BTHK: Array, k_BSHK: Array, v_BSHV: Array
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """The output, and log(sum over s of exp(logit)); 0 where a query sees nothing."""
    plan = plans.forward
    (batch, queries, heads, qk_dim), v_dim = q_BTHK.shape, v_BSHV.shape[3]
    wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)

    def visit(i: Array, carry: tuple[Rings, tuple[Array, Array]]) -> tuple[Rings, tuple[Array, Array]]:
        rings, (out_BTHV, lse_BHT) = carry
        row, h, t, s = plan.places(i)

        def pieces(s: Span) -> Pieces:
            return (load(k_BSHK, h, s).swapaxes(2, 3), 3), (load(v_BSHV, h, s), 2)

        def turned(x: Array) -> Array:
            """As the keys lie in the rings."""
            return jnp.roll(x, s.start, 3)

        rings = k_BhKs, v_BhsV = _fetched(plan, row, pieces, rings)
        visible = turned(rule.at(None, None if plan.num_steps == 1 else h, t, s))
        q, k, v = clean(plan, visible, load(q_BTHK, h, t).astype(wide), k_BhKs.swapaxes(2, 3), v_BhsV)
        logits = logits_of(plan, q, k.swapaxes(2, 3), visible, "bhxk,bhky->bhxy")
        # The floor is finite, so that a row that sees nothing gives exp(-inf) = 0 and not exp(-inf + inf).
        top = jnp.maximum(logits.max(3, keepdims=True), jnp.finfo(wide).min)
        weights = jnp.exp(logits - top)
        total = weights.sum(3, keepdims=True)
        if plan.dropout_rate:
            weights = jnp.where(turned(kept_in(plan, words, Tile(h, t, s, True))), weights, 0)
        sums = jnp.einsum("bhts,bhsv->bhtv", weights.astype(v_BSHV.dtype).astype(wide), v)
        divisor = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(divisor), 0)[..., 0]
        out_BTHV = store(out_BTHV, sums / (divisor * (1 - plan.dropout_rate)), h, t)
        return rings, (out_BTHV, lax.dynamic_update_slice(lse_BHT, lse, (0, h.start, t.start)))

    rings = _empty(plan, batch, wide, (qk_dim, plan.width), (plan.width, v_dim))
    start = jnp.zeros((batch, queries, heads, v_dim), wide), jnp.zeros((batch, heads, queries), wide)
    _, (out_BTHV, lse_BHT) = lax.fori_loop(0, plan.num_visits, visit, (rings, start))
    return out_BTHV.astype(q_BTHK.dtype), lse_BHT


def _backward(
    plans: _Plans, rule: Rule, words: Any, arrays: list[Array], out_BTHV: Array, lse_BHT: Array, dout_BTHV: Array
) -> tuple[Array, Array, Array]:
    """Gradients for q, k and v; logits and weights are [s, t], as in `blockwise`.

    dk and dv are whole at the end of a column. dq is added up in a ring, and whole where its queries leave it.
    """
    plan = plans.backward
    q_BTHK, k_BSHK, v_BSHV = arrays
    (batch, _, _, qk_dim), v_dim = k_BSHK.shape, v_BSHV.shape[3]
    narrow, wide = q_BTHK.dtype, jnp.promote_types(q_BTHK.dtype, jnp.float32)
    inner_BHT = sum_of_products(dout_BTHV, out_BTHV)

    def visit(i: Array, carry: tuple[Rings, Rings]) -> tuple[Rings, Rings]:
        rings, (dq_BTHK, dk_BSHK, dv_BSHV) = carry
        column, h, s, t = plan.places(i)

        def pieces(t: Span) -> Pieces:
            sizes = (batch, h.size, t.size)
            lse, inner = (lax.dynamic_slice(x, (0, h.start, t.start), sizes)[:, :, None] for x in (lse_BHT, inner_BHT))
            q, dout = (load(x, h, t) for x in (q_BTHK, dout_BTHV))
            return (lse, 3), (inner, 3), (q, 2), (dout, 2), (jnp.zeros_like(q.swapaxes(2, 3)), 3)

        def turned(x: Array) -> Array:
            """As the queries lie in the rings."""
            return jnp.roll(x.swapaxes(2, 3), t.start, 3)

        *held, dq_BhKt = _fetched(plan, column, pieces, rings)
        lse, inner, q_BhtK, dout = held
        visible = turned(rule.at(None, None if plan.num_steps == 1 else h, t, s))
        k, v = (load(x, h, s).astype(wide) for x in (k_BSHK, v_BSHV))
        q, k, v = clean(plan, visible.swapaxes(2, 3), q_BhtK, k, v)
        weights = jnp.exp(logits_of(plan, k, q, visible) - lse)
        dweights = jnp.einsum("bhsv,bhtv->bhst", v, dout)
        kept = weights
        if plan.dropout_rate:
            keep = turned(kept_in(plan, words, Tile(h, t, s, True)))
            kept, dweights = (jnp.where(keep, x / (1 - plan.dropout_rate), 0) for x in (weights, dweights))
        kept, dlogits = (x.astype(narrow).astype(wide) for x in (kept, weights * (dweights - inner)))
        dv_BSHV = store(dv_BSHV, jnp.einsum("bhst,bhtv->bhsv", kept, dout), h, s)
        dk_BSHK = store(dk_BSHK, jnp.einsum("bhst,bhtk->bhsk", dlogits, q) * plan.scale, h, s)
        # The barrier keeps XLA from taking the transposition into the product, which would then last a fifth longer.
        k_BhKs = lax.optimization_barrier(k.swapaxes(2, 3))
        dq_BhKt = dq_BhKt + jnp.einsum("bhks,bhst->bhkt", k_BhKs, dlogits)

        def leave(place: Array, dq_BTHK: Array) -> Array:
            t = Span(order[place] * plan.step, plan.step)
            dq = lax.dynamic_slice_in_dim(dq_BhKt, t.start % plan.width, plan.step, 3)
            return add(dq_BTHK, dq.swapaxes(2, 3) * plan.scale, h, t)

        begin, end, order = plan.leaves
        dq_BTHK = lax.fori_loop(begin[column], end[column], leave, dq_BTHK)
        return (*held, dq_BhKt), (dq_BTHK, dk_BSHK, dv_BSHV)

    sizes = (1, plan.width), (1, plan.width), (plan.width, qk_dim), (plan.width, v_dim), (qk_dim, plan.width)
    start = tuple(jnp.zeros(x.shape, wide) for x in arrays)
    _, found = lax.fori_loop(0, plan.num_visits, visit, (_empty(plan, batch, wide, *sizes), start))
    dq_BTHK, dk_BSHK, dv_BSHV = (x.astype(narrow) for x in found)
    return dq_BTHK, dk_BSHK, dv_BSHV


def _empty(plan: Strips, batch: int, dtype: Any, *sizes: tuple[int, int]) -> Rings:
    """Rings of these last two axes, in a wide type: XLA on CPU copies all of a bfloat16 array to write a part of it."""
    return tuple(jnp.zeros((batch, plan.heads_at_once, *size), dtype) for size in sizes)


def _fetched(plan: Strips, row: Array, pieces: Callable[[Span], Pieces], rings: Rings) -> Rings:
    """Rings that hold the strip of a row, place p at p % width: most is there from the row before, and stays.

    pieces: what each ring is to hold of some places, and along which axis they lie.
    """
    begin, end, order = plan.fetches

    def fetch(at: Array, rings: Rings) -> Rings:
        places = Span(order[at] * plan.step, plan.step)
        return tuple(
            lax.dynamic_update_slice_in_dim(ring, piece.astype(ring.dtype), places.start % plan.width, axis)
            for ring, (piece, axis) in zip(rings, pieces(places), strict=True)
        )

    return lax.fori_loop(begin[row], end[row], fetch, rings)


_attention = differentiable(_forward, _backward)
