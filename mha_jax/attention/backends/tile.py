"""One tile of the square, for some heads: what it reads and writes, what of it is visible, and its logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mha_jax.attention.backends.tiling import Plan, visits
from mha_jax.attention.blockmap import BlockMap
from mha_jax.attention.dropout import attention_keep_block
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import Rule


class Tile(NamedTuple):
    """One tile of some heads: which, and where it lies."""

    h: Span
    t: Span
    s: Span
    masked: bool


def load(x_BTHX: Array, h: Span, t: Span) -> Float[Array, "B h t X"]:
    """These heads' rows of these positions."""
    batch, _, _, width = x_BTHX.shape
    return lax.dynamic_slice(x_BTHX, (0, t.start, h.start, 0), (batch, t.size, h.size, width)).swapaxes(1, 2)


def store(x_BTHX: Array, tile_BhtX: Array, h: Span, t: Span) -> Array:
    """The array with these heads' rows of these positions replaced."""
    return lax.dynamic_update_slice(x_BTHX, tile_BhtX.swapaxes(1, 2).astype(x_BTHX.dtype), (0, t.start, h.start, 0))


def add(x_BTHX: Array, tile_BhtX: Array, h: Span, t: Span) -> Array:
    """The array with something added to these heads' rows of these positions."""
    return store(x_BTHX, load(x_BTHX, h, t) + tile_BhtX, h, t)


def sum_of_products(x_BTHX: Array, y_BTHX: Array) -> Float[Array, "B H T"]:
    """Sums over the last axis, in float32 at least. XLA on CPU takes ten times as long over a sum as over a product."""
    *axes, width = x_BTHX.shape
    wide = jnp.promote_types(x_BTHX.dtype, jnp.float32)
    products = (x_BTHX.astype(wide) * y_BTHX.astype(wide)).reshape(-1, width)
    return jnp.dot(products, jnp.ones(width, wide), precision=lax.Precision.HIGHEST).reshape(axes).swapaxes(1, 2)


def visible_in(plan: Plan, rule: Rule, tile: Tile) -> Array | None:
    """The mask of a tile, [b, h, t, s] with 1 where it does not vary; None where all of it is visible."""
    if not tile.masked:
        return None
    heads = None if plan.num_steps == 1 else tile.h
    return rule.at(None, heads, tile.t, tile.s)


def clean(plan: Plan, visible: Array | None, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Zeroes what the tile hides whole, keys from all queries and queries from all keys: 0 * NaN would reach others."""
    if visible is None or plan.all_seen:
        return q, k, v
    sees, seen = visible.any(3)[..., None], visible.any(2)[..., None]
    return jnp.where(sees, q, 0), jnp.where(seen, k, 0), jnp.where(seen, v, 0)


def kept_in(plan: Plan, words: Any, tile: Tile) -> Array:
    """Which weights of a tile dropout keeps, [B, h, t, s]."""
    first, second = (word.reshape(-1, 1, 1, 1) for word in words)
    h, t, s = tile.h.index[None, :, None, None], tile.t.index[None, None, :, None], tile.s.index[None, None, None, :]
    return attention_keep_block(first, second, h, t, s, plan.dropout_rate)


def logits_of(
    plan: Plan, x: Array, y: Array, visible: Array | None, product: str = "bhxk,bhyk->bhxy"
) -> Float[Array, "B h x y"]:
    """Scaled products of queries and keys, either first, in float32 at least; -inf where a key is hidden."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    # Scaling one side is cheaper than scaling the products, where it loses no digits.
    x, rest = (x * plan.scale, 1.0) if x.dtype == wide else (x, plan.scale)
    logits = jnp.einsum(product, x, y, preferred_element_type=wide) * rest
    return logits if visible is None else jnp.where(visible, logits, -jnp.inf)


def for_each(tiles: BlockMap, row: Array, h: Span, visit: Callable[[Array, bool, Any], Any], state: Any) -> Any:
    """Visits the tiles of a row, first the full ones and then the partial ones."""
    lists = visits(tiles)
    start, middle, end = lists.of(h.start, row)

    def call(masked: bool, place: Array, state: Any) -> Any:
        return visit(lists.order[place], masked, state)

    if lists.any_full:
        state = lax.fori_loop(start, middle, functools.partial(call, False), state)
    if lists.any_partial:
        state = lax.fori_loop(middle, end, functools.partial(call, True), state)
    return state
