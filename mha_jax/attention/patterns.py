"""Published patterns of sparse attention, as rules: each sees O(n), O(n log n) or O(n sqrt n) of the n x n places.

Those made for language models are causal as published; the others compose: `Causal() & BigBird(...)`.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mha_jax.attention.regions import Bounds, Rectangles, Span, multiple_within
from mha_jax.attention.rule import Rule, integer_field, places, rule_type
from mha_jax.attention.visibility import Causal, Global, Padding, SlidingWindow
from mha_jax.specs import UserError


@rule_type("block")
class BlockDiagonal(Rule):
    """t // block = s // block: the sequence falls into pieces that do not see each other."""

    block: int

    def __post_init__(self) -> None:
        integer_field(self, "block", least=1)

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        query, key = places(t, s)
        return query // self.block == key // self.block

    def bounds(self, where: Rectangles) -> Bounds:
        first_t, last_t, first_s, last_s = (x // self.block for x in where)
        return where.bounds(
            (first_t <= last_s) & (first_s <= last_t), (first_t == last_t) & (first_s == last_s) & (first_t == first_s)
        )

    @property
    def sees_self(self) -> bool:
        return True


@rule_type("stride")
class EveryNth(Rule):
    """(t - s) mod stride = 0: the far head of Child's strided pattern."""

    stride: int

    def __post_init__(self) -> None:
        integer_field(self, "stride", least=1)

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        query, key = places(t, s)
        return (query - key) % self.stride == 0

    def bounds(self, where: Rectangles) -> Bounds:
        least, most = where.offsets
        some = multiple_within(least, most, self.stride)
        return where.bounds(some, (self.stride == 1) | (some & (least == most)))

    @property
    def same_along_diagonals(self) -> bool:
        return True

    @property
    def sees_self(self) -> bool:
        return True


@rule_type("block", "count")
class Summary(Rule):
    """s mod block >= block - count: the last `count` positions of every block, Child's far fixed head."""

    block: int
    count: int

    def __post_init__(self) -> None:
        integer_field(self, "block", least=1)
        integer_field(self, "count", least=1)
        if self.count > self.block:
            raise UserError(
                f"Summary count={self.count} is more than a block of {self.block} has; 1 to {self.block} fit"
            )

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 1 s"]:
        return (s.index % self.block >= self.block - self.count)[None, None, None, :]

    def bounds(self, where: Rectangles) -> Bounds:
        # From the end of its block, a position counts as 0 .. count - 1.
        first, last = self.block - 1 - where.first_s % self.block, self.block - 1 - where.last_s % self.block
        same = where.first_s // self.block == where.last_s // self.block
        return where.bounds(~same | (last < self.count), same & (first < self.count))


@rule_type()
class LogSparse(Rule):
    """|t - s| is 0 or a power of two, so that each query sees O(log n) keys (Li et al. 2019, section 4.2)."""

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        query, key = places(t, s)
        distance = abs(query - key)
        return distance & (distance - 1) == 0  # also 0 & -1

    def bounds(self, where: Rectangles) -> Bounds:
        least, most = where.offsets
        nearest = np.where((least <= 0) & (most >= 0), 0, np.minimum(abs(least), abs(most)))
        farthest = np.maximum(abs(least), abs(most))
        # The least power of two that is not below the nearest distance.
        power = 2.0 ** np.ceil(np.log2(np.maximum(nearest, 1)))
        some = (nearest == 0) | (power <= farthest)
        return where.bounds(some, (farthest <= 2) | (some & (least == most)))

    @property
    def same_along_diagonals(self) -> bool:
        return True

    @property
    def sees_self(self) -> bool:
        return True


@rule_type("block", "count", "length", "seed")
class RandomBlocks(Rule):
    """Each block of queries sees `count` blocks of keys, drawn once from those of `length` positions.

    The draw is a function of the seed alone; `PerHead` with other seeds gives heads draws of their own.
    (Zaheer et al. 2020, section 2; blocks that a window or global tokens show already are not left out of the draw.)
    """

    block: int
    count: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        integer_field(self, "block", least=1)
        integer_field(self, "length", least=1)
        integer_field(self, "count", least=0)
        integer_field(self, "seed", least=0, most=2**64 - 1)
        if self.count > self.num_blocks:
            raise UserError(
                f"RandomBlocks count={self.count} is more than the {self.num_blocks} blocks of length={self.length}"
            )

    @property
    def num_blocks(self) -> int:
        return -(-self.length // self.block)

    @property
    def drawn(self) -> np.ndarray:
        """The blocks of keys that each block of queries sees, [num_blocks, count]."""
        return _draw(self.num_blocks, self.count, self.seed)

    def check(self, query_length: int, key_length: int) -> None:
        if max(query_length, key_length) > self.length:
            raise UserError(
                f"RandomBlocks length={self.length} is shorter than T={query_length}, S={key_length}; "
                f"length={max(query_length, key_length)} would do"
            )

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        # Beyond the last block, where kernels pad, the last row answers.
        seen_tn = jnp.asarray(self.drawn)[jnp.minimum(t.index // self.block, self.num_blocks - 1)]
        hit_tsn = seen_tn[:, None, :] == (s.index // self.block)[None, :, None]
        return hit_tsn.any(-1)[None, None]

    def bounds(self, where: Rectangles) -> Bounds:
        seen = np.zeros((self.num_blocks + 1, self.num_blocks + 1), np.int64)
        np.put_along_axis(seen[1:, 1:], self.drawn, 1, axis=1)
        sums = seen.cumsum(0).cumsum(1)
        t0, t1, s0, s1 = (np.minimum(x // self.block, self.num_blocks - 1) for x in where)
        count = sums[t1 + 1, s1 + 1] - sums[t0, s1 + 1] - sums[t1 + 1, s0] + sums[t0, s0]
        return where.bounds(count > 0, count == (t1 - t0 + 1) * (s1 - s0 + 1))


@functools.cache
def _draw(num_blocks: int, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(num_blocks, count, replace=False) for _ in range(num_blocks)])


def Strided(stride: int) -> Rule:
    """The last `stride` keys, and every stride-th before (Child et al. 2019, section 4.3, both heads merged).

    With stride near sqrt(n) each query sees O(sqrt n) keys, and any key is two hops away. As separate heads:
    `PerHead(Causal() & SlidingWindow(stride), Causal() & EveryNth(stride))`.
    """
    return Causal() & (SlidingWindow(stride) | EveryNth(stride))


def Fixed(block: int, count: int) -> Rule:
    """The query's own block, and the last `count` of every earlier one (Child et al. 2019, section 4.3, merged).

    As separate heads: `PerHead(Causal() & BlockDiagonal(block), Causal() & Summary(block, count))`.
    """
    return Causal() & (BlockDiagonal(block) | Summary(block, count))


def BigBird(block: int, window: int, count: int, num_global: int, length: int, seed: int = 0) -> Rule:
    """A window, `num_global` global positions and `count` random blocks a block of queries (Zaheer et al. 2020).

    Args: window: keys to each side, self included. The paper's base: block 64, window 96, count 3, num_global 128.
    """
    return SlidingWindow(window) | Global(num_global) | RandomBlocks(block, count, length, seed)


def PrefixLM(lengths: Any) -> Rule:
    """Everybody sees the prefix, s < lengths[b], and all keys up to self. `lengths`: one integer, or integers [B]."""
    return Causal() | Padding(np.asarray([lengths]) if isinstance(lengths, int) else lengths)
