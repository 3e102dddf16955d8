"""Attention along a few diagonals, in O(n * diagonals): for rules that see the same offsets s - t from everywhere.

LogSparse has log n of them and dilated windows their width. Tiles would pay for whole tiles around each of them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from mha_jax.attention.backends.blockwise import by_head, pad
from mha_jax.attention.backends.call import Call
from mha_jax.attention.blockmap import BlockMap
from mha_jax.attention.dropout import attention_keep_block, key_words
from mha_jax.attention.regions import Rectangles
from mha_jax.attention.rule import Rule

# Beyond so many, products of whole tiles are the quicker way.
_MOST = 64
# Keys of a tile that are worked on in the time of one key on a diagonal.
_TILED_IN_TIME_OF_ONE = 20
# Numbers of a block of queries that stay in a core's cache.
_CACHED = 2**16


def offsets(rule: Rule, queries: int, keys: int) -> np.ndarray | None:
    """All s - t at which something is visible; None where that is not all there is to know of a rule."""
    if not rule.same_along_diagonals:
        return None
    # Every offset once: along the first column and the first row.
    t, s = np.r_[np.arange(queries)[::-1], np.zeros(keys - 1, int)], np.r_[np.zeros(queries - 1, int), np.arange(keys)]
    return (s - t)[rule.bounds(Rectangles(t, t, s, s)).every[0]]


def refusal(call: Call) -> str | None:
    """Refuses rules that are not the same along every diagonal, or see more than 64 of them."""
    if 0 in (call.batch, call.queries, call.keys, call.heads):
        return "an axis is empty; backend='blockwise' would do"
    found = offsets(call.rule, call.queries, call.keys)
    if found is None:
        return "the rule is not a set of diagonals, such as LogSparse(); backend='blockwise' would do"
    if len(found) > _MOST:
        return f"the rule sees {len(found)} diagonals; up to {_MOST} are served, and backend='blockwise' would do"
    return None


def pays(call: Call) -> bool:
    """Whether it is likely quicker than tiles, which pay for whole tiles around each diagonal."""
    if refusal(call) is not None:
        return False
    found = offsets(call.rule, call.queries, call.keys)
    paid = BlockMap.of(call.rule, call.queries, call.keys, 64, 64).paid * call.keys
    return found is not None and paid > _TILED_IN_TIME_OF_ONE * len(found)


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
    """Attention as `mha_jax.attention.attend` defines it, for calls that `refusal` lets through.

    o[t] = sum over d of softmax_d(scale * <q[t], k[t+d]>) * v[t+d]
    """
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    found = offsets(rule, queries, keys)
    assert found is not None
    wide = jnp.promote_types(q.dtype, jnp.float32)
    block = max(64, 2 ** int(np.log2(max(_CACHED // (batch * heads * max(q.shape[3], v.shape[3])), 1))))
    block = min(block, -(-queries // 8) * 8)
    length = -(-queries // block) * block
    before, behind = max(0, -int(found.min(initial=0))), max(0, int(found.max(initial=0)) + length - keys)
    plan = _Plan(tuple(found.tolist()), block, before, queries, keys, dropout_rate)
    words = None if dropout_keys is None else key_words(dropout_keys)
    k, v = (jnp.pad(by_head(x, groups).astype(wide), ((0, 0), (before, behind), (0, 0), (0, 0))) for x in (k, v))
    return _attention(plan, words, pad(q.astype(wide) * scale, length), k, v)[:, :queries].astype(q.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Known before the run: the diagonals, queries at once, the zeros in front of the keys, and the real lengths."""

    offsets: tuple[int, ...]
    block: int
    before: int
    queries: int
    keys: int
    dropout_rate: float


class _Block:
    """A block of queries, and what each diagonal joins it with. Products sum over the last axis of three: XLA on CPU
    takes many times as long over the last of four where the first is 1."""

    def __init__(self, plan: _Plan, words: Any, t: Array):
        self.plan, self.words, self.t = plan, words, t

    def rows(self, x_BTX: Array, d: Array | int) -> Array:
        """What lies d positions on, where zeros stand in front."""
        return lax.dynamic_slice_in_dim(x_BTX, self.t + d, self.plan.block, 1)

    def product(self, x_BtHX: Array, y_BtHX: Array) -> Float[Array, "B t H"]:
        batch, block, heads, width = x_BtHX.shape
        x, y = (z.reshape(batch * block, heads, width) for z in (x_BtHX, y_BtHX))
        return (x * y).sum(2).reshape(batch, block, heads)

    def visible(self, d: Array) -> Bool[Array, "1 t 1"]:
        """Where a real query meets a real key."""
        query = self.t + jnp.arange(self.plan.block)
        key = query + d
        return ((query < self.plan.queries) & (key >= 0) & (key < self.plan.keys))[None, :, None]

    def logits(self, q_BtHK: Array, k_BSHK: Array, d: Array) -> Float[Array, "B t H"]:
        found = self.product(q_BtHK, self.rows(k_BSHK, self.plan.before + d))
        return jnp.where(self.visible(d), found, -jnp.inf)

    def kept(self, weights_BtH: Array, d: Array) -> Array:
        """The weights after dropout, unscaled."""
        if not self.plan.dropout_rate:
            return weights_BtH
        first, second = (word.reshape(-1, 1, 1) for word in self.words)
        t = (self.t + jnp.arange(self.plan.block))[None, :, None]
        h = jnp.arange(weights_BtH.shape[2])[None, None, :]
        return jnp.where(attention_keep_block(first, second, h, t, t + d, self.plan.dropout_rate), weights_BtH, 0)


def _output(plan: _Plan, words: Any, q_BTHK: Array, k_BSHK: Array, v_BSHV: Array) -> Array:
    return _forward(plan, words, q_BTHK, k_BSHK, v_BSHV)[0]


def _attention_fwd(plan: _Plan, words: Any, q_BTHK: Array, k_BSHK: Array, v_BSHV: Array) -> Any:
    out_BTHV, lse_BTH = _forward(plan, words, q_BTHK, k_BSHK, v_BSHV)
    return out_BTHV, (words, q_BTHK, k_BSHK, v_BSHV, out_BTHV, lse_BTH)


def _attention_bwd(plan: _Plan, saved: Any, dout_BTHV: Array) -> Any:
    words, *arrays, out_BTHV, lse_BTH = saved
    return None, *_backward(plan, words, arrays, out_BTHV, lse_BTH, dout_BTHV)


_attention: Any = jax.custom_vjp(_output, nondiff_argnums=(0,))
_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(
    plan: _Plan, words: Any, q_BTHK: Array, k_BSHK: Array, v_BSHV: Array
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """The output, and log(sum over d of exp(logit)); 0 where a query sees nothing."""
    (batch, length, heads, _), wide = q_BTHK.shape, q_BTHK.dtype
    diagonals = jnp.asarray(plan.offsets, int)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        block = _Block(plan, words, i * plan.block)
        q = block.rows(q_BTHK, 0)
        logits = lax.map(lambda d: block.logits(q, k_BSHK, d), diagonals)
        # The floor is finite, so that a row that sees nothing gives exp(-inf) = 0 and not exp(-inf + inf).
        top = logits.max(0, initial=jnp.finfo(wide).min)
        weights = jnp.exp(logits - top[None])
        total = weights.sum(0)
        share = 1 / (jnp.where(total > 0, total, 1) * (1 - plan.dropout_rate))

        def collect(sums: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
            d, weight = each
            return sums + block.kept(weight, d)[..., None] * block.rows(v_BSHV, plan.before + d), None

        sums, _ = lax.scan(collect, jnp.zeros((batch, plan.block, heads, v_BSHV.shape[3]), wide), (diagonals, weights))
        lse = jnp.where(total > 0, top + jnp.log(total), 0)
        found = sums * share[..., None], lse
        out_BTHV, lse_BTH = (
            lax.dynamic_update_slice_in_dim(x, y, block.t, 1) for x, y in zip(carry, found, strict=True)
        )
        return out_BTHV, lse_BTH

    start = jnp.zeros((batch, length, heads, v_BSHV.shape[3]), wide), jnp.zeros((batch, length, heads), wide)
    return lax.fori_loop(0, length // plan.block, step, start)


def _backward(
    plan: _Plan, words: Any, arrays: list[Array], out: Array, lse: Array, dout: Array
) -> tuple[Array, Array, Array]:
    """Gradients for q, k and v: block by block, each diagonal adding to the keys and values that it meets."""
    q_BTHK, k_BSHK, v_BSHV = arrays
    diagonals, grow = jnp.asarray(plan.offsets, int), 1 / (1 - plan.dropout_rate)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        block = _Block(plan, words, i * plan.block)
        q, do, top = (block.rows(x, 0) for x in (q_BTHK, dout, lse))
        inner = block.product(do, block.rows(out, 0))

        def along(carry: tuple[Array, Array, Array], d: Array) -> tuple[tuple[Array, Array, Array], None]:
            dq, dk_BSHK, dv_BSHV = carry
            weights = jnp.exp(block.logits(q, k_BSHK, d) - top)
            dweights = block.kept(block.product(do, block.rows(v_BSHV, plan.before + d)), d) * grow
            # Not a product with a weight of 0: a NaN that no query sees must not reach its own gradient.
            dlogits = jnp.where(block.visible(d), weights * (dweights - inner), 0)[..., None]
            dv = (block.kept(weights, d) * grow)[..., None] * do
            dq = dq + dlogits * block.rows(k_BSHK, plan.before + d)
            return (dq, add(dk_BSHK, dlogits * q, d), add(dv_BSHV, dv, d)), None

        def add(x_BSHX: Array, rows: Array, d: Array) -> Array:
            place = block.t + plan.before + d
            there = lax.dynamic_slice_in_dim(x_BSHX, place, plan.block, 1)
            return lax.dynamic_update_slice_in_dim(x_BSHX, there + rows, place, 1)

        dq_BTHK, dk_BSHK, dv_BSHV = carry
        (dq, dk_BSHK, dv_BSHV), _ = lax.scan(along, (jnp.zeros_like(q), dk_BSHK, dv_BSHV), diagonals)
        return lax.dynamic_update_slice_in_dim(dq_BTHK, dq, block.t, 1), dk_BSHK, dv_BSHV

    start = jnp.zeros_like(q_BTHK), jnp.zeros_like(k_BSHK), jnp.zeros_like(v_BSHV)
    return lax.fori_loop(0, q_BTHK.shape[1] // plan.block, step, start)
