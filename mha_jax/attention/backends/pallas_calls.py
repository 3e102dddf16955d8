"""The programs of `pallas.py`: grids, blocks and operands of its kernels, and the gradient that joins them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mha_jax.attention.backends import pallas_kernels as kernels
from mha_jax.attention.backends.pallas_kernels import Context, Plan
from mha_jax.attention.backends.tiling import visits
from mha_jax.attention.blockmap import BlockMap


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(plan: Plan, words: Any, leaves: tuple[Any, ...], q: Any, k: Any, v: Any) -> jax.Array:
    """Attention over padded arrays. words: [B, 2] of dropout, or (); leaves: the rule's arrays, as long as q and k."""
    return _forward(plan, words, leaves, q, k, v)[0]


def _forward(plan: Plan, words: Any, leaves: tuple[Any, ...], q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    (batch, length, heads, _), tiles = q.shape, plan.forward
    context, context_specs = _context(plan, tiles, words, leaves)
    out = jax.ShapeDtypeStruct((batch, length, heads, v.shape[3]), q.dtype)
    lse = jax.ShapeDtypeStruct((batch, length, heads), jnp.float32)
    out, lse = _call(
        plan,
        kernels.forward,
        grid=(length // tiles.block_q, batch, heads),
        in_specs=[_tile(q, tiles.block_q), _example(k), _example(v), context_specs],
        outputs=[(x, tiles.block_q) for x in (out, lse)],
    )(q, k, v, context)
    return out, (words, leaves, q, k, v, out, lse)


def _backward(plan: Plan, saved: Any, dout: Any) -> tuple[Any, ...]:
    words, leaves, q, k, v, out, lse = saved
    (batch, length, heads, _), tiles = q.shape, plan.backward
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=3)
    by_row = (q, dout, lse, delta)
    context, context_specs = _context(plan, tiles, words, leaves)
    (dq,) = _call(
        plan,
        kernels.backward_queries,
        grid=(length // tiles.block_q, batch, heads),
        in_specs=[*(_tile(x, tiles.block_q) for x in by_row), _example(k), _example(v), context_specs],
        outputs=[(q, tiles.block_q)],
    )(*by_row, k, v, context)
    context, context_specs = _context(plan, tiles.transposed(), words, leaves)
    dk, dv = _call(
        plan,
        kernels.backward_keys,
        grid=(k.shape[1] // tiles.block_k, batch, plan.num_groups),
        in_specs=[*(_tile(x, tiles.block_k) for x in (k, v)), *map(_example, by_row), context_specs],
        outputs=[(x, tiles.block_k) for x in (k, v)],
    )(k, v, *by_row, context)
    return None, None, dq, dk, dv


attention.defvjp(_forward, _backward)


def _call(plan: Plan, kernel: Any, grid: tuple[int, ...], in_specs: list[Any], outputs: list[Any]) -> Any:
    """A kernel as a function of arrays; `outputs` are arrays like those that it makes, with the length of a tile."""
    wide = max(x.shape[-1] for x, _ in outputs if len(x.shape) == 4)
    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=grid,
        in_specs=in_specs,
        out_specs=[_tile(*output) for output in outputs],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs],
        # Named, since the compiler that Pallas takes by default differs between versions of JAX.
        compiler_params=triton.CompilerParams(num_warps=8 if wide >= 128 else 4, num_stages=2),
        interpret=plan.interpret,
        name=kernel.__name__,
    )


def _context(plan: Plan, tiles: BlockMap, words: Any, leaves: tuple[Any, ...]) -> tuple[Context, Context]:
    """What kernels read beside q, k, v to walk such tiles, and the blocks that they see of it."""
    found, groups = visits(tiles), np.array(plan.groups, np.int32)
    first = np.searchsorted(np.sort(groups), np.arange(plan.num_groups + 1)).astype(np.int32)
    context = Context(
        start=found.start,
        middle=found.middle,
        end=found.end,
        order=found.order,
        groups=jnp.asarray(groups),
        members=jnp.asarray(np.argsort(groups, kind="stable").astype(np.int32)),
        first=jnp.asarray(first),
        words=words,
        leaves=leaves,
    )
    specs = jax.tree.map(_whole, context)
    return context, specs._replace(words=jax.tree.map(_example, words), leaves=tuple(map(_leaf, leaves)))


# Blocks are no copies here: a kernel gets the place of a block's first element and loads from there what it asks for.


def _tile(x: Any, size: int) -> pl.BlockSpec:
    """Of [B, L, heads, ...], the program's own `size` positions of one head."""
    rest = x.shape[3:]
    return pl.BlockSpec((None, size, None, *rest), lambda row, b, head: (b, row, head, *(0 for _ in rest)))


def _example(x: Any) -> pl.BlockSpec:
    """Of [B, ...], the program's example."""
    rest = x.shape[1:]
    return pl.BlockSpec((None, *rest), lambda row, b, head: (b, *(0 for _ in rest)))


def _leaf(x: Any) -> pl.BlockSpec:
    """Of [B or 1, ...], the program's example, its axis kept."""
    same, rest = x.shape[0] == 1, x.shape[1:]
    return pl.BlockSpec((1, *rest), lambda row, b, head: (0 if same else b, *(0 for _ in rest)))


def _whole(x: Any) -> pl.BlockSpec:
    return pl.BlockSpec(x.shape, lambda row, b, head: (0,) * x.ndim)
