"""The rules of visibility that others are composed of; `patterns.py` has those that papers publish."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from mha_jax.attention.regions import Bounds, Rectangles, Span, multiple_within
from mha_jax.attention.rule import FARTHEST, And, Not, Or, PerHead, Rule, integer_field, places, rule_type
from mha_jax.specs import UserError

__all__ = [
    "And", "Causal", "Dense", "Full", "Global", "Not", "Or", "Padding", "PerHead", "Rule", "Segments", "SlidingWindow"
]  # fmt: skip


@rule_type()
class Full(Rule):
    """Every query sees every key."""

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 1 1"]:
        return jnp.ones((1, 1, 1, 1), bool)

    def bounds(self, where: Rectangles) -> Bounds:
        return where.bounds(True, True)

    @property
    def same_along_diagonals(self) -> bool:
        return True

    @property
    def sees_self(self) -> bool:
        return True


@rule_type("offset")
class Causal(Rule):
    """s <= t + offset."""

    offset: int = 0

    def __post_init__(self) -> None:
        integer_field(self, "offset")

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        query, key = places(t, s)
        return key <= query + self.offset

    def bounds(self, where: Rectangles) -> Bounds:
        least, most = where.offsets
        return where.bounds(least <= self.offset, most <= self.offset)

    @property
    def same_along_diagonals(self) -> bool:
        return True

    @property
    def sees_self(self) -> bool:
        return self.offset >= 0


@rule_type("window", "dilation")
class SlidingWindow(Rule):
    """|t - s| < window; with `Causal()` the last `window` keys, self included.

    With a dilation r only every r-th of them, counted from t, and the window r times as wide: as many keys, further
    apart (Beltagy et al. 2020, section 3.1).
    """

    window: int
    dilation: int = 1

    def __post_init__(self) -> None:
        integer_field(self, "window", least=1)
        integer_field(self, "dilation", least=1)

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        query, key = places(t, s)
        near = abs(query - key) < min(self.window * self.dilation, FARTHEST)
        return near if self.dilation == 1 else near & ((query - key) % self.dilation == 0)

    def bounds(self, where: Rectangles) -> Bounds:
        reach = (self.window - 1) * self.dilation
        least, most = where.offsets
        some = multiple_within(np.maximum(least, -reach), np.minimum(most, reach), self.dilation)
        within = (least >= -reach) & (most <= reach) & (self.dilation == 1)
        return where.bounds(some, within | (some & (least == most)))

    @property
    def same_along_diagonals(self) -> bool:
        return True

    @property
    def sees_self(self) -> bool:
        return True


@rule_type("count")
class Global(Rule):
    """The first `count` positions see all and are seen by all."""

    count: int

    def __post_init__(self) -> None:
        integer_field(self, "count", least=0)

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "1 1 t s"]:
        query, key = places(t, s)
        return (query < self.count) | (key < self.count)

    def bounds(self, where: Rectangles) -> Bounds:
        some = (where.first_t < self.count) | (where.first_s < self.count)
        return where.bounds(some, (where.last_t < self.count) | (where.last_s < self.count))


@rule_type()
class Padding(Rule):
    """s < lengths[b]: hides keys, never queries. `lengths` [B] integers."""

    lengths: Any

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "b 1 1 s"]:
        lengths = _integers("Padding lengths", self.lengths, "[B]", 1)
        lengths = lengths if b is None else b.of(lengths, 0)
        return s.index[None, None, None, :] < lengths[:, None, None, None]

    def bounds(self, where: Rectangles) -> Bounds:
        lengths = known(self.lengths)
        if lengths is None or not lengths.size:
            return where.unknown()
        return where.bounds(where.first_s < lengths.max(), where.last_s < lengths.min())


@rule_type()
class Segments(Rule):
    """query_ids[b,t] = key_ids[b,s]; `key_ids` [B, S] are `query_ids` [B, T] where left out."""

    query_ids: Any
    key_ids: Any = None

    def _ids(self) -> tuple[Array, Array]:
        query_ids = _integers("Segments query_ids", self.query_ids, "[B, T]", 2)
        if self.key_ids is None:
            return query_ids, query_ids
        return query_ids, _integers("Segments key_ids", self.key_ids, "[B, S]", 2)

    def check(self, query_length: int, key_length: int) -> None:
        query_ids, key_ids = self._ids()
        for name, ids, length, letter in (("query", query_ids, query_length, "T"), ("key", key_ids, key_length, "S")):
            if ids.shape[1] != length:
                raise UserError(f"Segments {name} ids have {ids.shape[1]} positions; {letter}={length}")
        if query_ids.shape[0] != key_ids.shape[0]:
            raise UserError(f"Segments has {query_ids.shape[0]} rows of query ids and {key_ids.shape[0]} of key ids")

    def padded(self, query_length: int, key_length: int) -> Rule:
        query_ids, key_ids = self._ids()
        return Segments(_lengthen(query_ids, 1, query_length), _lengthen(key_ids, 1, key_length))

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "b 1 t s"]:
        query_ids, key_ids = (ids if b is None else b.of(ids, 0) for ids in self._ids())
        return t.of(query_ids, 1)[:, None, :, None] == s.of(key_ids, 1)[:, None, None, :]

    @property
    def sees_self(self) -> bool:
        return self.key_ids is None


@rule_type()
class Dense(Rule):
    """A boolean array that broadcasts to [B, H, T, S], as an array of fewer axes does from the right."""

    array: Any

    def _mask(self) -> Array:
        array = _array("Dense mask", self.array)
        if array.dtype != bool:
            raise UserError(f"Dense mask is of {array.dtype}; it must be boolean, True where a key is visible")
        return array.reshape((1,) * (4 - array.ndim) + array.shape)

    def check(self, query_length: int, key_length: int) -> None:
        *others, rows, columns = self._mask().shape
        if len(others) > 2 or rows not in (1, query_length) or columns not in (1, key_length):
            raise UserError(
                f"Dense mask of shape {jnp.shape(self.array)} does not broadcast to "
                f"[B, H, T={query_length}, S={key_length}]"
            )

    def padded(self, query_length: int, key_length: int) -> Rule:
        mask = self._mask()
        for axis, length in ((2, query_length), (3, key_length)):
            mask = mask if mask.shape[axis] == 1 else _lengthen(mask, axis, length)
        return Dense(mask)

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "#b #h #t #s"]:
        mask = self._mask()
        for axis, span in enumerate((b, h, t, s)):
            mask = mask if span is None else span.of(mask, axis)
        return mask

    def bounds(self, where: Rectangles) -> Bounds:
        mask = known(self.array)
        if mask is None or mask.ndim > 4 or mask.size > _MOST_KNOWN:
            return where.unknown()
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        found = [_filled(any_or_all(mask, axis=0), where) for any_or_all in (np.any, np.all)]
        return Bounds(found[0] > 0, found[1] == 1)


_MOST_KNOWN = 2**26  # numbers of a mask that are worth looking through before anything runs


def known(array: Any) -> np.ndarray | None:
    """The array's values, or None while it is traced."""
    return None if isinstance(array, Tracer) else np.asarray(array)


def _filled(mask_hts: np.ndarray, where: Rectangles) -> np.ndarray:
    """The visible share of each rectangle, [h, *shape], from sums over all corners at the origin."""
    heads, rows, columns = mask_hts.shape
    sums = np.zeros((heads, rows + 1, columns + 1), np.int64)
    sums[:, 1:, 1:] = mask_hts.cumsum(1, dtype=np.int64).cumsum(2)
    t0, t1 = (where.first_t, where.last_t + 1) if rows > 1 else (0 * where.first_t, 0 * where.last_t + 1)
    s0, s1 = (where.first_s, where.last_s + 1) if columns > 1 else (0 * where.first_s, 0 * where.last_s + 1)
    count = sums[:, t1, s1] - sums[:, t0, s1] - sums[:, t1, s0] + sums[:, t0, s0]
    return count / ((t1 - t0) * (s1 - s0))


def _lengthen(array: Array, axis: int, length: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, length - array.shape[axis])
    return jnp.pad(array, widths)


def _array(name: str, value: Any) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise UserError(f"{name}={value!r} is not an array") from None


def _integers(name: str, value: Any, letters: str, ndim: int) -> Array:
    array = _array(name, value)
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f"{name} is of {array.dtype} and shape {array.shape}; it must be integers {letters}")
    return array
