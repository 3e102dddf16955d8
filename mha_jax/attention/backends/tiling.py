"""How the square is cut into tiles, in which order they are visited, and how many heads are worked on at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mha_jax.attention.blockmap import EMPTY, FULL, PARTIAL, BlockMap
from mha_jax.attention.regions import Bounds, Rectangles, Span
from mha_jax.attention.rule import Rule, rule_type
from mha_jax.attention.target import target
from mha_jax.attention.visibility import Padding
from mha_jax.cores import num_cores

# On CPU: elements of a tile that a core's cache holds next to its like, and what a visit costs beside, in elements.
_CACHED = 2**16
_VISIT = 2**12
_BLOCKS = (64, 128, 256)
# A mask costs about this share of the work on a tile.
_MASK = 0.3
# And where it is made once for all heads.
_STRIP_MASK = 0.05


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known before the run. Rows of `tiles` are tiles of queries; heads are taken `heads_at_once`."""

    tiles: BlockMap
    heads: int
    heads_at_once: int
    scale: float
    dropout_rate: float
    all_seen: bool  # every query sees a key, and every key is seen

    @property
    def num_steps(self) -> int:
        return self.heads // self.heads_at_once


@dataclasses.dataclass(frozen=True)
class Visits:
    """The tiles of each row that are visited: order[start:middle] without a mask, order[middle:end] with one.

    start, middle, end: [h, rows], h = 1 where all heads agree. order: columns, one after the other for all rows.
    """

    start: Int[Array, "h rows"]
    middle: Int[Array, "h rows"]
    end: Int[Array, "h rows"]
    order: Int[Array, " visits"]
    any_full: bool
    any_partial: bool

    def of(self, head: Array, row: Array) -> tuple[Array, Array, Array]:
        at = (head if len(self.start) > 1 else 0, row)
        return self.start[at], self.middle[at], self.end[at]


def visits(tiles: BlockMap) -> Visits:
    """The lists of a map, row by row."""
    heads, rows, _ = tiles.kinds.shape
    order: list[np.ndarray] = []
    ends = np.zeros((3, heads, rows), np.int32)
    count = 0
    for head, row in np.ndindex(heads, rows):
        found = [np.flatnonzero(tiles.kinds[head, row] == kind) for kind in (FULL, PARTIAL)]
        ends[:, head, row] = count, count + len(found[0]), count + len(found[0]) + len(found[1])
        order += found
        count += len(found[0]) + len(found[1])
    columns = np.concatenate(order).astype(np.int32) if count else np.zeros(1, np.int32)
    any_full, any_partial = (bool((tiles.kinds == kind).any()) for kind in (FULL, PARTIAL))
    # The integers of loops: 64 bits wide where JAX is.
    start, middle, end, columns = (jnp.asarray(x, int) for x in (*ends, columns))
    return Visits(start, middle, end, columns, any_full, any_partial)


@rule_type("count")
class _Within(Rule):
    """t < count: queries that fill up a tile see nothing. Else a key seen by them alone would count as seen."""

    count: int

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t 1"]:
        return (t.index < self.count)[None, None, :, None]

    def bounds(self, where: Rectangles) -> Bounds:
        return where.bounds(where.first_t < self.count, where.last_t < self.count)


def make_plan(
    rule: Rule, batch: int, queries: int, keys: int, heads: int, scale: float, dropout_rate: float
) -> tuple[Plan, Rule]:
    """The cheapest way to cut this square, and the rule over its padded lengths, which hides what was padded."""
    candidates = [
        _candidate(rule, batch, queries, keys, heads, scale, dropout_rate, block) for block in _blocks(queries, keys)
    ]
    return min(candidates, key=lambda found: tiles_cost(found[0], batch))


def plan_strips(
    rule: Rule, batch: int, queries: int, keys: int, heads: int, scale: float, dropout_rate: float
) -> tuple[Plan, Rule]:
    """Small tiles, of which `strips_of` makes one strip a row; the rule is that over padded lengths."""
    plan, rule = _candidate(rule, batch, queries, keys, heads, scale, dropout_rate, _blocks(queries, keys)[0])
    return _by_strips(plan, batch, plan.tiles.block_q * strips_of(plan.tiles)[1]), rule


def strips_of(tiles: BlockMap) -> tuple[np.ndarray, int]:
    """Where each row's strip starts, and how wide all are: every strip holds what its row sees, of any head."""
    first, width = _ranges(tiles.kinds != EMPTY)
    return np.minimum(first, tiles.kinds.shape[2] - width) * tiles.block_k, width * tiles.block_k


@dataclasses.dataclass(frozen=True)
class Strips(Plan):
    """A plan by which each row, `block` places of one axis, takes all that it sees of the other axis as one strip.

    starts: where each row's strip starts, a multiple of `step`. width: of every strip, a multiple too.
    """

    block: int
    step: int
    starts: tuple[int, ...]
    width: int

    @property
    def num_visits(self) -> int:
        return self.num_steps * len(self.starts)

    def places(self, i: Array) -> tuple[Array, Span, Span, Span]:
        """Of the i-th visit: the row, the heads, the row's places and those of its strip. Heads come one after the
        other, so that rows do."""
        row, rows = i % len(self.starts), i // len(self.starts)
        heads = Span(rows * self.heads_at_once, self.heads_at_once)
        return row, heads, Span(row * self.block, self.block), Span(jnp.asarray(self.starts, int)[row], self.width)

    @property
    def fetches(self) -> tuple[Array, Array, Array]:
        """The steps of each row's strip that the row before does not have: order[begin:end]."""
        strips = self._strips()
        return _apart(strips, [range(0), *strips[:-1]])

    @property
    def leaves(self) -> tuple[Array, Array, Array]:
        """The steps of each row's strip that the row after does not have: order[begin:end]."""
        strips = self._strips()
        return _apart(strips, [*strips[1:], range(0)])

    def _strips(self) -> list[range]:
        return [range(start // self.step, (start + self.width) // self.step) for start in self.starts]


def _apart(strips: list[range], others: list[range]) -> tuple[Array, Array, Array]:
    found = [[step for step in strip if step not in other] for strip, other in zip(strips, others, strict=True)]
    ends = np.cumsum([0, *map(len, found)])
    begin, end, order = (jnp.asarray(x, int) for x in (ends[:-1], ends[1:], np.concatenate(found)))
    return begin, end, order


def halved(plan: Plan, rule: Rule, batch: int, of_keys: bool) -> Strips:
    """Strips for rows of half a tile, of queries or of keys: the fewer places a row has, the less of its strip is
    hidden from most of them."""
    tiles = plan.tiles.transposed() if of_keys else plan.tiles
    (starts, width), (block, step) = strips_of(tiles), (tiles.block_q // 2, tiles.block_k // 2)
    first, origin = np.arange(0, tiles.query_length, block)[:, None], starts.repeat(2)[:, None]
    row, strip = ((x, x + size - 1) for x, size in ((first, block), (origin + np.arange(0, width, step), step)))
    seen = rule.bounds(Rectangles(*strip, *row) if of_keys else Rectangles(*row, *strip)).some
    nearest, steps = _ranges(seen)
    starts = np.minimum(origin[:, 0] + nearest * step, tiles.key_length - steps * step)
    plan = _by_strips(plan, batch, block * steps * step)
    return Strips(**vars(plan), block=block, step=step, starts=tuple(starts.tolist()), width=steps * step)


def _by_strips(plan: Plan, batch: int, area: int) -> Plan:
    # A strip is gone through once, where tiles go back to their sums: twice as much at once is better.
    return dataclasses.replace(plan, heads_at_once=_heads_at_once(batch, plan.heads, area // 2, per_head=False))


def _ranges(seen: np.ndarray) -> tuple[np.ndarray, int]:
    """The first place that any head sees of each row, and how many places the widest range has; seen: [h, rows, s]."""
    seen = np.asarray(seen.any(0))
    first, end = seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)
    return first, int(np.where(seen.any(1), end - first, 1).max())


def strip_cost(plan: Plan, batch: int) -> float:
    """As `tiles_cost`, for a strip a row."""
    rows, width = plan.tiles.kinds.shape[1], strips_of(plan.tiles)[1]
    elements = (1 + _STRIP_MASK) * rows * plan.tiles.block_q * width * batch * plan.heads
    return elements + _VISIT * rows * plan.heads / plan.heads_at_once


def _blocks(queries: int, keys: int) -> list[int]:
    """Tile sizes worth trying: none much larger than the square, none that makes millions of tiles."""
    longest = max(queries, keys)
    fit = [block for block in _BLOCKS if block == _BLOCKS[0] or block < 2 * longest]
    return [block for block in fit if (longest / block) ** 2 <= 2**18] or fit[-1:]


def _candidate(
    rule: Rule, batch: int, queries: int, keys: int, heads: int, scale: float, dropout_rate: float, block: int
) -> tuple[Plan, Rule]:
    block_q, block_k = (min(block, -(-length // 8) * 8) for length in (queries, keys))
    padded_q, padded_k = (-(-length // size) * size for length, size in ((queries, block_q), (keys, block_k)))
    if padded_k > keys:
        rule = rule & Padding(np.array([keys]))
    all_seen = rule.sees_self and queries == keys
    if padded_q > queries and not all_seen:
        rule = rule & _Within(queries)
    rule = rule.padded(padded_q, padded_k)
    tiles = BlockMap.of(rule, padded_q, padded_k, block_q, block_k)
    at_once = _heads_at_once(batch, heads, block_q * block_k, per_head=len(tiles.kinds) > 1)
    return Plan(tiles, heads, at_once, scale, dropout_rate, all_seen), rule


def _heads_at_once(batch: int, heads: int, area: int, per_head: bool) -> int:
    """All heads on an accelerator; on CPU as many as a cache holds, and one where heads visit tiles of their own."""
    if target() != "cpu":
        return heads
    if per_head:
        return 1
    fit = [count for count in range(1, heads + 1) if heads % count == 0 and count * batch * area <= _cached_elements()]
    return max(fit, default=1)


def _cached_elements() -> int:
    # A device of many threads splits each operation among them, and needs larger ones.
    threads = max(num_cores() // jax.local_device_count(), 1)
    return _CACHED if threads == 1 else _CACHED * 16


def tiles_cost(plan: Plan, batch: int) -> float:
    """Elements worked on, and visits counted as elements."""
    kinds = plan.tiles.kinds
    heads = plan.heads // len(kinds)
    tiles = ((kinds != EMPTY).sum() + _MASK * (kinds == PARTIAL).sum()) * plan.tiles.block_q * plan.tiles.block_k
    return tiles * heads * batch + _VISIT * (kinds != EMPTY).sum() * heads / plan.heads_at_once
