"""Splash attention, JAX's block-sparse flash kernel for TPUs, with our rules compiled into its mask.

What of a rule is the same for all examples becomes tiles that the kernel skips, masks or takes whole; `Padding` and
`Segments`, whose arrays are known only when the program runs, become the kernel's segment ids. Elsewhere than on a TPU
the kernel is interpreted: right, and slow.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jaxtyping import Array, Bool, Float, Int, Key

from mha_jax.attention.backends.call import Call, regular_groups
from mha_jax.attention.backends.tiles import TileMask, head_masks
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import And, Rule
from mha_jax.attention.visibility import Full, Padding, Segments, known

# Not tuned, for want of a TPU: large tiles feed the matrix unit, and blocks must be multiples of its 128 lanes.
_BLOCKS = (512, 256, 128)


def refusal(call: Call) -> str | None:
    """Why this kernel cannot take the call, and what would do; None where it keeps the whole contract."""
    if call.partitioned:
        return "the compiler cannot split it over devices; parallel='pmap', one device or backend='blockwise' would do"
    if call.dropout_rate > 0:
        return "it has no dropout on attention weights; dropout_rate=0 or backend='blockwise' would do"
    if call.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it takes float32 and bfloat16, not {jnp.dtype(call.dtype)}; backend='blockwise' would do"
    if jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        return "it needs 32-bit JAX; JAX_ENABLE_X64=0 or backend='blockwise' would do"
    parts = _Parts.of(call.rule)
    if len(parts.segments) > 1:
        return f"it takes one Segments, not {len(parts.segments)} joined by &; backend='blockwise' would do"
    if any(known(leaf) is None for leaf in jax.tree.leaves(parts.static)):
        return (
            "its mask must be known before the program runs, but for Padding and Segments joined by & to all else; "
            "such a rule, or backend='blockwise', would do"
        )
    if jax.eval_shape(lambda: parts.static.mask(call.queries, call.keys)).shape[0] > 1:
        return "its mask must be the same for all examples, but for Padding and Segments; backend='blockwise' would do"
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
    """Attention of H heads over G groups, as `mha_jax.attention.attend` defines it; `refusal` says what it cannot do.

    The kernel cannot be split by the compiler: on several devices it wants pmap or shard_map, not a mesh under jit.
    In bfloat16 the scaled queries are rounded once more than in the reference, where `scale` is no power of two.
    """
    assert dropout_rate == 0 and dropout_keys is None
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    parts, blocks = _Parts.of(rule), (_block(queries), _block(keys))
    masks = head_masks(parts.static, queries, keys, *blocks) if keys else []
    if 0 in (batch, queries, heads) or not any(mask.index_RC.any() for mask in masks):
        return jnp.zeros((batch, queries, heads, v.shape[-1]), q.dtype)
    if groups != regular_groups(heads, k.shape[2]):
        k, v = (jnp.take(x, np.array(groups), axis=2) for x in (k, v))
    sees_BHT = None
    if not (rule.sees_self and queries == keys):
        sees_BHT, seen_BHS = _coverage(rule, parts, masks, queries, keys)
        q, k, v = _zero_invisible(q, k, v, sees_BHT, seen_BHS)
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    ids = parts.segment_ids(batch, queries, keys)
    ids = None if ids is None else splash.SegmentIds(*(_lengthen(x, 1, n) for x, n in zip(ids, blocks, strict=True)))
    operands = (*(_lengthen(x.swapaxes(1, 2), 2, n) for x, n in zip((q, k, v), (*blocks, blocks[1]), strict=True)), ids)
    kernel = functools.partial(_kernel, tuple(masks * (heads // len(masks))))
    out_BHTV = lax.platform_dependent(
        *operands, tpu=functools.partial(kernel, False), default=functools.partial(kernel, True)
    )[:, :, :queries]
    if sees_BHT is not None:
        # Such a row would get the mean of v.
        out_BHTV = jnp.where(sees_BHT[..., None], out_BHTV, 0)
    return out_BHTV.swapaxes(1, 2)


def _kernel(masks: tuple[TileMask, ...], interpret: bool, q_BHTK: Array, k_BGSK: Array, v_BGSV: Array, ids: Any) -> Any:
    """The library's kernel, [B, H, T, V], over lengths that are multiples of the blocks."""
    rows, columns = masks[0].block
    sizes = splash.BlockSizes(rows, columns, columns, rows, columns, columns, rows, columns)
    kernel = splash.make_splash_mha(
        splash_attention_mask.MultiHeadMask(masks),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q_BHTK, k_BGSK, v_BGSV, ids)


class _Parts(NamedTuple):
    """A conjunction: what the tiles say, and what the segment ids say."""

    static: Rule
    paddings: tuple[Padding, ...]
    segments: tuple[Segments, ...]

    @classmethod
    def of(cls, rule: Rule) -> "_Parts":
        parts = _conjuncts(rule)
        static = [part for part in parts if not isinstance(part, Padding | Segments)]
        return cls(
            functools.reduce(And, static or [Full()]),
            tuple(part for part in parts if isinstance(part, Padding)),
            tuple(part for part in parts if isinstance(part, Segments)),
        )

    def segment_ids(self, batch: int, queries: int, keys: int) -> tuple[Int[Array, "B T"], Int[Array, "B S"]] | None:
        """Ids that are equal where the dynamic parts let a query see a key; None where there are none."""
        if not self.paddings and not self.segments:
            return None
        query_ids, key_ids = jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, keys), jnp.int32)
        for rule in self.segments:
            query_ids = jnp.asarray(rule.query_ids)
            key_ids = query_ids if rule.key_ids is None else jnp.asarray(rule.key_ids)
        # Types of 32 bits and less go into int32 one to one; refusal keeps wider ones out.
        query_ids, key_ids = (
            jnp.broadcast_to(ids.astype(jnp.int32), (batch, ids.shape[1])) for ids in (query_ids, key_ids)
        )
        for rule in self.paddings:
            inside_BS = rule.at(None, None, Span(0, queries), Span(0, keys))[:, 0, 0]
            key_ids = jnp.where(jnp.broadcast_to(inside_BS, key_ids.shape), key_ids, _free_id(query_ids))
        return query_ids, key_ids


def _conjuncts(rule: Rule) -> list[Rule]:
    return [one for part in rule.parts for one in _conjuncts(part)] if isinstance(rule, And) else [rule]


def _free_id(ids_BT: Int[Array, "B T"]) -> Int[Array, "B 1"]:
    """A number that is not among the ids: of 0 .. T, T ids leave one free."""
    length = ids_BT.shape[1]
    slots = jnp.where((ids_BT >= 0) & (ids_BT <= length), ids_BT, length + 1)
    taken = jax.vmap(lambda slot: jnp.zeros(length + 2, bool).at[slot].set(True))(slots)
    return jnp.argmin(taken[:, : length + 1], axis=1, keepdims=True).astype(jnp.int32)


def _coverage(
    rule: Rule, parts: _Parts, masks: list[TileMask], queries: int, keys: int
) -> tuple[Bool[Array, "#B #H T"], Bool[Array, "#B #H S"]]:
    """Which queries see anything, and which keys are seen by any."""
    if not parts.paddings and not parts.segments:
        sees, seen = zip(*(mask.coverage(queries) for mask in masks), strict=True)
        return jnp.asarray(np.stack(sees)[None]), jnp.asarray(np.stack(seen)[None, :, :keys])
    # The compiler fuses the square into the reductions, so it is never held.
    visible_BHTS = rule.at(None, None, Span(0, queries), Span(0, keys))
    sees_BHT, seen_BHS = visible_BHTS.any(axis=3), visible_BHTS.any(axis=2)
    return (
        jnp.broadcast_to(sees_BHT, (*sees_BHT.shape[:2], queries)),
        jnp.broadcast_to(seen_BHS, (*seen_BHS.shape[:2], keys)),
    )


def _zero_invisible(
    q_BTHK: Array, k_BSGK: Array, v_BSGV: Array, sees_BHT: Array, seen_BHS: Array
) -> tuple[Array, Array, Array]:
    """Zeroes keys that nobody sees and queries that see nothing: in a product, 0 * NaN would reach others."""
    batch, heads, keys = seen_BHS.shape
    if heads > 1:
        seen_BHS = seen_BHS.reshape(batch, k_BSGK.shape[2], -1, keys).any(axis=2)
    sees_BTH1, seen_BSG1 = (x.swapaxes(1, 2)[..., None] for x in (sees_BHT, seen_BHS))
    return jnp.where(sees_BTH1, q_BTHK, 0), jnp.where(seen_BSG1, k_BSGK, 0), jnp.where(seen_BSG1, v_BSGV, 0)


def _block(length: int) -> int:
    """The largest block by which a length grows little when it is filled up to a multiple."""
    least = -(-length // _BLOCKS[-1]) * _BLOCKS[-1]
    return next(block for block in _BLOCKS if -(-length // block) * block <= least * 1.125)


def _lengthen(x: Array, axis: int, block: int) -> Array:
    """Zeroes at the end of an axis, up to a multiple of the block."""
    return jnp.pad(x, [(0, -x.shape[i] % block if i == axis else 0) for i in range(x.ndim)])
