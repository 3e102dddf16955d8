"""The kernels behind `pallas.py`: what one program does, for one tile of queries or of keys.

A program walks the list of tiles that its row visits, first those that need no mask, then the others. The mask of a
tile is the rule's own `at`, asked inside the kernel with the parts of its arrays that belong to the tile. Letters are
those of `mha_jax.attention.multihead`, T and S being the queries and keys of one tile. Everything here has to exist in
Triton: two-dimensional products, powers of two, no slices of values.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mha_jax.attention.blockmap import FULL, PARTIAL, BlockMap
from mha_jax.attention.dropout import attention_keep_block
from mha_jax.attention.regions import Span


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the run. `rule` is the rule's tree, `axes` the axes of each of its arrays."""

    queries: int  # before padding, as are keys
    keys: int
    forward: BlockMap
    backward: BlockMap
    groups: tuple[int, ...]
    num_groups: int
    scale: float
    dropout_rate: float
    rule: Any
    axes: tuple[str, ...]
    interpret: bool


class Context(NamedTuple):
    """Arrays beside q, k, v, as references inside a kernel. The first four are of `tiling.Visits`.

    groups: [H], the group of each head. members, first: [H] and [G + 1], the heads of each group one after the other.
    words: [2], the example's in the hash of dropout, or nothing. leaves: the rule's arrays.
    """

    start: Any
    middle: Any
    end: Any
    order: Any
    groups: Any
    members: Any
    first: Any
    words: Any
    leaves: tuple[Any, ...]


class Tile(Span):
    """A span whose part of any array has been loaded before."""

    __slots__ = ()

    def of(self, array: jax.Array, axis: int) -> jax.Array:
        return array

    @property
    def slice(self) -> Any:
        return pl.ds(self.start, self.size)


def forward(plan: Plan, q_ref: Any, k_ref: Any, v_ref: Any, context: Context, out_ref: Any, lse_ref: Any) -> None:
    """Output and log-sum-exp of one tile of queries of one head: an online softmax over the tiles of keys."""
    tiles, row, h = plan.forward, pl.program_id(0), pl.program_id(2)
    t, g, q_TK = Tile(row * tiles.block_q, tiles.block_q), context.groups[h], q_ref[...]

    def visit(column: jax.Array, carry: Any, masked: bool) -> Any:
        out_TV, top_T, total_T = carry
        s = Tile(column * tiles.block_k, tiles.block_k)
        k_SK, v_SV = k_ref[s.slice, g, :], v_ref[s.slice, g, :]
        logits_TS = _dot(q_TK, k_SK, (1, 1)) * plan.scale
        if masked:
            visible_TS = _visible(plan, context, h, t, s)
            logits_TS = jnp.where(visible_TS, logits_TS, -jnp.inf)
            v_SV = _clean(v_SV, visible_TS, axis=0)
        new_top_T = jnp.maximum(top_T, logits_TS.max(axis=1))
        shrink_T, weights_TS = jnp.exp(top_T - new_top_T), jnp.exp(logits_TS - new_top_T[:, None])
        total_T = total_T * shrink_T + weights_TS.sum(axis=1)
        if plan.dropout_rate > 0:
            weights_TS = jnp.where(_keep(plan, context, h, t, s), weights_TS, 0.0)
        return out_TV * shrink_T[:, None] + _dot(weights_TS.astype(v_SV.dtype), v_SV, (1, 0)), new_top_T, total_T

    # The floor is finite, so that an empty row gives exp(-inf) = 0 and not exp(-inf + inf).
    floor_T, none_T = jnp.full(t.size, jnp.finfo(jnp.float32).min), jnp.zeros(t.size, jnp.float32)
    out_TV = jnp.zeros(out_ref.shape, jnp.float32)
    out_TV, top_T, total_T = _walk(tiles, context, h, row, visit, (out_TV, floor_T, none_T))
    divisor_T = jnp.where(total_T > 0, total_T, 1.0)
    out_ref[...] = (out_TV / (divisor_T * (1 - plan.dropout_rate))[:, None]).astype(out_ref.dtype)
    lse_ref[...] = jnp.where(total_T > 0, top_T + jnp.log(divisor_T), 0.0)


def backward_queries(
    plan: Plan,
    q_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    k_ref: Any,
    v_ref: Any,
    context: Context,
    dq_ref: Any,
) -> None:
    """Gradient of one tile of queries of one head."""
    tiles, row, h = plan.backward, pl.program_id(0), pl.program_id(2)
    t, g = Tile(row * tiles.block_q, tiles.block_q), context.groups[h]
    rows = (q_ref[...], dout_ref[...], lse_ref[...], delta_ref[...])

    def visit(column: jax.Array, dq_TK: jax.Array, masked: bool) -> jax.Array:
        s = Tile(column * tiles.block_k, tiles.block_k)
        k_SK, v_SV = k_ref[s.slice, g, :], v_ref[s.slice, g, :]
        visible_TS = _visible(plan, context, h, t, s) if masked else None
        _, slopes_TS = _slopes(plan, context, h, t, s, rows, k_SK, v_SV, visible_TS)
        return dq_TK + _dot(slopes_TS.astype(k_SK.dtype), _clean(k_SK, visible_TS, axis=0), (1, 0))

    dq_TK = _walk(tiles, context, h, row, visit, jnp.zeros(dq_ref.shape, jnp.float32))
    dq_ref[...] = (dq_TK * plan.scale).astype(dq_ref.dtype)


def backward_keys(
    plan: Plan,
    k_ref: Any,
    v_ref: Any,
    q_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    context: Context,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    """Gradients of one tile of keys and values of one group: the sum over the group's heads."""
    tiles, column, g = plan.backward, pl.program_id(0), pl.program_id(2)
    s, k_SK, v_SV = Tile(column * tiles.block_k, tiles.block_k), k_ref[...], v_ref[...]

    def add_head(member: jax.Array, carry: Any) -> Any:
        h = context.members[member]

        def visit(row: jax.Array, carry: Any, masked: bool) -> Any:
            dk_SK, dv_SV = carry
            t = Tile(row * tiles.block_q, tiles.block_q)
            q_TK, dout_TV, lse_T, delta_T = (ref[t.slice, h] for ref in (q_ref, dout_ref, lse_ref, delta_ref))
            visible_TS = _visible(plan, context, h, t, s) if masked else None
            rows = (q_TK, dout_TV, lse_T, delta_T)
            weights_TS, slopes_TS = _slopes(plan, context, h, t, s, rows, k_SK, v_SV, visible_TS)
            dk_SK = dk_SK + _dot(slopes_TS.astype(q_TK.dtype), _clean(q_TK, visible_TS, axis=1), (0, 0))
            return dk_SK, dv_SV + _dot(weights_TS.astype(dout_TV.dtype), dout_TV, (0, 0))

        return _walk(tiles.transposed(), context, h, column, visit, carry)

    zeros = tuple(jnp.zeros(ref.shape, jnp.float32) for ref in (dk_ref, dv_ref))
    dk_SK, dv_SV = lax.fori_loop(context.first[g], context.first[g + 1], add_head, zeros)
    dk_ref[...], dv_ref[...] = (dk_SK * plan.scale).astype(dk_ref.dtype), dv_SV.astype(dv_ref.dtype)


def _walk(tiles: BlockMap, context: Context, h: Any, row: Any, visit: Callable[..., Any], carry: Any) -> Any:
    """Visits the tiles of a row, those without a mask first."""
    place = (h if len(tiles.kinds) > 1 else 0, row)
    start, middle, end = (ends[place] for ends in (context.start, context.middle, context.end))
    if (tiles.kinds == FULL).any():
        carry = lax.fori_loop(start, middle, lambda i, carry: visit(context.order[i], carry, False), carry)
    if (tiles.kinds == PARTIAL).any():
        carry = lax.fori_loop(middle, end, lambda i, carry: visit(context.order[i], carry, True), carry)
    return carry


def _visible(plan: Plan, context: Context, h: Any, t: Tile, s: Tile) -> jax.Array:
    """The mask [T, S] of a tile."""
    leaves = [_load(ref, axes, h, t, s) for ref, axes in zip(context.leaves, plan.axes, strict=True)]
    rule = jax.tree.unflatten(plan.rule, leaves)
    visible_TS = jnp.broadcast_to(rule.at(Tile(0, 1), Tile(h, 1), t, s), (1, 1, t.size, s.size)).reshape(t.size, s.size)
    if plan.queries < plan.forward.query_length:
        visible_TS &= (t.index < plan.queries)[:, None]
    if plan.keys < plan.forward.key_length:
        visible_TS &= (s.index < plan.keys)[None, :]
    return visible_TS


def _load(ref: Any, axes: str, h: Any, t: Tile, s: Tile) -> jax.Array:
    """A tile's part of an array with these axes out of "bhts"; an axis of 1 does not vary."""
    spans = {"b": Tile(0, 1), "h": Tile(h, 1), "t": t, "s": s}
    part = ref[tuple(pl.ds(0, 1) if size == 1 else spans[a].slice for a, size in zip(axes, ref.shape, strict=True))]
    # Masks are stored as bytes, which every GPU loads.
    return part != 0 if part.dtype == jnp.int8 else part


def _keep(plan: Plan, context: Context, h: Any, t: Tile, s: Tile) -> jax.Array:
    """Which weights [T, S] of a tile dropout keeps."""
    places = t.index[:, None], s.index[None, :]
    return attention_keep_block(context.words[0], context.words[1], h, *places, plan.dropout_rate)


def _slopes(
    plan: Plan, context: Context, h: Any, t: Tile, s: Tile, rows: Any, k_SK: Any, v_SV: Any, visible_TS: Any
) -> tuple[jax.Array, jax.Array]:
    """A tile's weights after dropout, and the loss's slopes by its scaled logits."""
    q_TK, dout_TV, lse_T, delta_T = rows
    weights_TS = jnp.exp(_dot(q_TK, k_SK, (1, 1)) * plan.scale - lse_T[:, None])
    by_weight_TS, kept_TS = _dot(dout_TV, v_SV, (1, 1)), weights_TS
    if plan.dropout_rate > 0:
        keep_TS, grown = _keep(plan, context, h, t, s), 1 / (1 - plan.dropout_rate)
        by_weight_TS, kept_TS = (jnp.where(keep_TS, x * grown, 0.0) for x in (by_weight_TS, weights_TS))
    slopes_TS = weights_TS * (by_weight_TS - delta_T[:, None])
    if visible_TS is None:
        return kept_TS, slopes_TS
    return jnp.where(visible_TS, kept_TS, 0.0), jnp.where(visible_TS, slopes_TS, 0.0)


def _clean(x: jax.Array, visible_TS: jax.Array | None, axis: int) -> jax.Array:
    """Zeroes the keys (axis 0) or queries (axis 1) that the tile does not show: in a product, 0 * NaN would spread."""
    if visible_TS is None:
        return x
    return jnp.where((visible_TS.astype(jnp.int32).max(axis=axis) > 0)[:, None], x, jnp.zeros_like(x))


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """A product summed in float32; of float32 without the shortened mantissas of tensor cores."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
