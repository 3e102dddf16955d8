"""What attention weights are like, head by head, without the T x S matrix; and the matrix of chosen heads."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mha_jax.attention.attend import check_call
from mha_jax.attention.backends import blockwise
from mha_jax.attention.backends.tiling import make_plan
from mha_jax.attention.visibility import Full, Rule
from mha_jax.specs import UserError

_ROWS = 512  # of the matrix of weights, computed at once


class HeadStatistics(NamedTuple):
    """Of the weights w[b,h,t,:] of every query, float32 [B, T, H]; all 0 where a query sees nothing.

    entropy     -sum over s of w ln w, in nats: 0 is one key alone, ln n is n keys alike
    max_weight  the greatest w
    distance    sum over s of w |t - s|, in positions
    first       the weight of key 0
    diagonal    the weight of key s = t
    """

    entropy: Array
    max_weight: Array
    distance: Array
    first: Array
    diagonal: Array


def _expected(logits: Array, t: Array, s: Array) -> Array:
    return logits


def _distance(logits: Array, t: Array, s: Array) -> Array:
    return abs(t - s).astype(logits.dtype)


def _first(logits: Array, t: Array, s: Array) -> Array:
    return (s == 0).astype(logits.dtype)


def _diagonal(logits: Array, t: Array, s: Array) -> Array:
    return (s == t).astype(logits.dtype)


def attend_with_statistics(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visibility: Rule = Full(),  # noqa: B008 (rules are frozen)
    scale: float | None = None,
    head_to_group: tuple[int, ...] | None = None,
) -> tuple[Float[Array, "B T H V"], HeadStatistics]:
    """`attend` on its blockwise backend, and the statistics of its weights from the same pass.

    Memory grows with T + S. Weights are those without dropout. Raises: UserError as `attend` does.
    """
    call = check_call(q, k, v, visibility, head_to_group)
    (batch, queries, heads, qk_dim), keys = q.shape, k.shape[1]
    if 0 in (batch, queries, keys, heads):
        empty = jnp.zeros((batch, queries, heads), jnp.float32)
        return jnp.zeros((batch, queries, heads, v.shape[3]), q.dtype), HeadStatistics(*[empty] * 5)
    factor = qk_dim**-0.5 if scale is None else scale
    plan, rule = make_plan(visibility, batch, queries, keys, heads, factor, 0.0)
    k, v = (blockwise.pad(blockwise.by_head(x, call.groups), plan.tiles.key_length) for x in (k, v))
    measures = (_expected, _distance, _first, _diagonal)
    q = blockwise.pad(q, plan.tiles.query_length)
    out_BTHV, lse_BHT, measured_BHTN = blockwise.forward(plan, rule, None, q, k, v, measures)
    max_weight, expected, *others = jnp.moveaxis(measured_BHTN, -1, 0)
    # -sum w ln w = lse - sum w logit; a row that sees nothing has 0 of each.
    found = (jnp.maximum(lse_BHT - expected, 0), max_weight, *others)
    return out_BTHV[:, :queries], HeadStatistics(*(x.swapaxes(1, 2)[:, :queries].astype(jnp.float32) for x in found))


def attention_weights(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    visibility: Rule = Full(),  # noqa: B008 (rules are frozen)
    scale: float | None = None,
    head_to_group: tuple[int, ...] | None = None,
    *,
    heads: Sequence[int] | None = None,
    examples: Sequence[int] | None = None,
    logits: bool = False,
) -> Float[Array, "b h T S"]:
    """The weights of chosen heads and examples (default: all), recomputed from queries and keys.

    Memory is that of the result, twice over, and a few hundred of its rows.

    Args:    logits: what the softmax is taken of instead, -inf where a key is not visible.
    Returns: float32 at least; a row sums to 1, or is exactly 0 where the query sees nothing.
    Raises:  UserError for a head or an example that does not exist, and as `attend` does.
    """
    call = check_call(q, k, k, visibility, head_to_group)
    chosen_b, chosen_h = _chosen("example", examples, call.batch), _chosen("head", heads, call.heads)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    factor = call.qk_dim**-0.5 if scale is None else scale
    q_bThK = q[chosen_b][:, :, chosen_h].astype(wide) * factor
    k_bShK = k[chosen_b][:, :, np.asarray(call.groups, int)[chosen_h]].astype(wide)
    visible = visibility.mask(call.queries, call.keys)
    visible = visible if visible.shape[0] == 1 else visible[chosen_b]
    visible = visible if visible.shape[1] == 1 else visible[:, chosen_h]

    def rows(start: Array | int, size: int) -> Array:
        some_q = jax.lax.dynamic_slice_in_dim(q_bThK, start, size, 1)
        seen = jax.lax.dynamic_slice_in_dim(visible, start, size, 2)
        scores = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", some_q, k_bShK), -jnp.inf)
        return scores if logits else _softmax(scores)

    if call.queries <= 2 * _ROWS:
        return rows(0, call.queries)
    # The last block begins early enough to be whole: its first rows are then computed twice.
    starts = jnp.minimum(jnp.arange(0, call.queries, _ROWS), call.queries - _ROWS)
    whole = jnp.zeros((len(chosen_b), len(chosen_h), call.queries, call.keys), wide)

    def fill(whole: Array, start: Array) -> tuple[Array, None]:
        return jax.lax.dynamic_update_slice_in_dim(whole, rows(start, _ROWS), start, 2), None

    return jax.lax.scan(fill, whole, starts)[0]


def _softmax(logits: Array) -> Array:
    """Over the last axis; 0 in a row of -inf, as the floor of its maximum is finite."""
    powers = jnp.exp(logits - logits.max(axis=-1, keepdims=True, initial=jnp.finfo(logits.dtype).min))
    total = powers.sum(axis=-1, keepdims=True)
    return powers / jnp.where(total > 0, total, 1)


def _chosen(what: str, places: Sequence[int] | None, count: int) -> np.ndarray:
    wanted = np.arange(count) if places is None else np.asarray(places, int)
    outside = [int(place) for place in wanted if not 0 <= place < count]
    if outside:
        raise UserError(f"there is no {what} {outside[0]}; there are {count}, 0 to {count - 1}")
    return wanted
