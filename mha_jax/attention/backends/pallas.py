"""Flash attention of our own for GPUs, in Pallas by way of Triton: pays for the tiles that a rule shows, no others.

Forward, an online softmax over the tiles of keys; it keeps the output and the log-sum-exp (Dao 2023, algorithm 1).
Backward, two kernels that compute every tile anew, one for queries and one for keys and values (algorithm 2 there).
Lengths are padded to whole tiles and widths to powers of two, invisibly. Keys and values are not repeated by head.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mha_jax.attention.backends.call import Call
from mha_jax.attention.backends.pallas_calls import attention
from mha_jax.attention.backends.pallas_kernels import Plan
from mha_jax.attention.blockmap import FULL, PARTIAL, BlockMap
from mha_jax.attention.dropout import key_words
from mha_jax.attention.patterns import RandomBlocks
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import Rule
from mha_jax.attention.target import target
from mha_jax.attention.visibility import Dense

# True runs the kernels in Pallas' interpreter, on any platform: for tests.
INTERPRET = False
LARGEST_TILE = 128
_WIDEST = 256
_MOST_ELEMENTS = 2**31  # of a mask, whose places are 32-bit offsets
# The axes of the arrays that rules hold, by name: a kernel loads a tile's part of them.
_AXES = {"lengths": "b", "query_ids": "bt", "key_ids": "bs", "array": "bhts"}


def refusal(call: Call) -> str | None:
    """Why the kernels cannot serve a call, and what would do; None where they can."""
    if not INTERPRET and target() != "gpu":
        return f"its kernels run on GPU, and this is {target()}; backend='blockwise' would do"
    if call.partitioned:
        return "the compiler cannot split its kernels over devices; pmap or backend='blockwise' would do"
    if call.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"its kernels are for float32, bfloat16 and float16, not {call.dtype}; backend='blockwise' would do"
    if max(call.qk_dim, call.v_dim) > _WIDEST:
        return (
            f"qk_dim={call.qk_dim}, v_dim={call.v_dim} do not fit the memory of its tiles, which holds widths up to "
            f"{_WIDEST}; backend='blockwise' would do"
        )
    unknown = [name for name, _ in _leaves(call.rule) if name not in _AXES]
    if unknown:
        return f"it cannot load a rule's {unknown[0]!r} inside a kernel; backend='blockwise' would do"
    if _mask_elements(call) >= _MOST_ELEMENTS:
        return f"a mask of {_mask_elements(call)} elements is more than it can address; backend='blockwise' would do"
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
    (batch, queries, heads, qk_dim), (_, keys, num_groups, v_dim) = q.shape, v.shape
    if 0 in (batch, queries, keys, heads, qk_dim, v_dim):
        return jnp.zeros((batch, queries, heads, v_dim), q.dtype)
    if not isinstance(scale, (int, float)):
        q, scale = (q * scale).astype(q.dtype), 1.0
    forward, backward = _blocks(queries, keys, max(qk_dim, v_dim), q.dtype.itemsize)
    length_q, length_k = _whole(queries, forward[0]), _whole(keys, forward[1])
    spelled = _spelled_out(rule.padded(length_q, length_k), length_q, length_k)
    named = _leaves(spelled)
    plan = Plan(
        queries=queries,
        keys=keys,
        forward=_tiles(rule, queries, keys, length_q, length_k, *forward),
        backward=_tiles(rule, queries, keys, length_q, length_k, *backward),
        groups=groups,
        num_groups=num_groups,
        scale=float(scale),
        dropout_rate=dropout_rate,
        rule=jax.tree.structure(spelled),
        axes=tuple(_AXES[name] for name, _ in named),
        interpret=INTERPRET,
    )
    words = () if dropout_keys is None else jnp.stack(key_words(dropout_keys), axis=-1)
    leaves = tuple(leaf.astype(jnp.int8) if leaf.dtype == bool else leaf for _, leaf in named)
    out: Array = attention(plan, words, leaves, _pad(q, length_q), _pad(k, length_k), _pad(v, length_k))
    return out[:, :queries, :, :v_dim]


def _blocks(queries: int, keys: int, width: int, itemsize: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Queries and keys of a tile, forward and backward; powers of two, the forward ones no smaller."""
    length_q, length_k = _power_of_two(queries), _power_of_two(keys)
    # So that tiles fit the 99 KB that a core of a small GPU has; float32, without tensor cores, takes more registers.
    row = _power_of_two(width) * itemsize**2
    wide = max(16, min(2**16 // row, 256 // itemsize, LARGEST_TILE))
    narrow = max(16, min(2**15 // row, 128 // itemsize, LARGEST_TILE))
    return (min(wide, length_q), min(narrow, length_k)), (min(narrow, length_q), min(narrow, length_k))


def _tiles(rule: Rule, queries: int, keys: int, length_q: int, length_k: int, block_q: int, block_k: int) -> BlockMap:
    """The map of the padded square: nothing is visited beyond the ends, and a tile across the keys' end has a mask."""
    kinds = BlockMap.of(rule, queries, keys, block_q, block_k).kinds.copy()
    if keys % block_k:
        kinds[..., -1] = np.where(kinds[..., -1] == FULL, PARTIAL, kinds[..., -1])
    rows, columns = length_q // block_q - kinds.shape[1], length_k // block_k - kinds.shape[2]
    return BlockMap(length_q, length_k, block_q, block_k, np.pad(kinds, ((0, 0), (0, rows), (0, columns))))


def _spelled_out(rule: Rule, length_q: int, length_k: int) -> Rule:
    """The rule with its draws of random blocks as masks: a kernel can look nothing up in a table of the host."""

    def spell(part: Any) -> Any:
        if not isinstance(part, RandomBlocks):
            return part
        return Dense(part.at(None, None, Span(0, length_q), Span(0, length_k)))

    return jax.tree.map(spell, rule, is_leaf=lambda part: isinstance(part, RandomBlocks))


def _leaves(rule: Rule) -> list[tuple[str, Array]]:
    """The arrays that a rule holds, with the names of their fields."""
    found = jax.tree_util.tree_leaves_with_path(rule)
    return [(getattr(path[-1], "name", str(path[-1])), jnp.asarray(leaf)) for path, leaf in found]


def _mask_elements(call: Call) -> int:
    """Elements of the largest mask that a kernel would read."""
    is_draw = lambda part: isinstance(part, RandomBlocks)  # noqa: E731
    parts = jax.tree.leaves(call.rule, is_leaf=is_draw)
    return max((call.queries * call.keys if is_draw(part) else part.size for part in parts), default=0)


def _pad(x_BLHX: Array, length: int) -> Array:
    """Zeroes behind the positions, and behind the width up to a power of two that products take."""
    missing = length - x_BLHX.shape[1], _power_of_two(x_BLHX.shape[3]) - x_BLHX.shape[3]
    return jnp.pad(x_BLHX, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))


def _whole(length: int, block: int) -> int:
    return -(-length // block) * block


def _power_of_two(size: int) -> int:
    """The least power of two that is not below `size`, nor below 16, the least that a product takes."""
    return max(16, 1 << (size - 1).bit_length())
