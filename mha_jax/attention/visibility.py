"""Which keys a query may see, as small values that compose: `Causal() & (SlidingWindow(256) | Global(16))`.

A rule is a frozen pytree: its arrays are leaves, its integers static, so it passes through jit, grad and vmap. In all
rules t is a query position and s a key position, both counted from 0. True means visible.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mha_jax.specs import UserError


class Rule:
    """Base of all rules: `mask` spells a rule out, `&`, `|` and `~` compose rules."""

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B #H T S"]:
        """What is visible; the first two axes are 1 where the rule does not vary along them."""
        raise NotImplementedError

    @property
    def sees_self(self) -> bool:
        """True where every t surely sees s = t. Then, at T = S, no row is empty and no key is hidden from all."""
        return False

    def __and__(self, other: "Rule") -> "Rule":
        return And(self, other)

    def __or__(self, other: "Rule") -> "Rule":
        return Or(self, other)

    def __invert__(self) -> "Rule":
        return Not(self)


def _rule(*static: str) -> Any:
    """Makes a class a frozen dataclass and a pytree whose fields are leaves, but for those named."""

    def decorate(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return decorate


def _integer(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
        wanted = "an integer" if least is None else f"an integer of at least {least}"
        raise UserError(f"{name}={value!r} must be {wanted}")


def _positions(query_length: int, key_length: int) -> tuple[Array, Array]:
    return jnp.arange(query_length)[None, None, :, None], jnp.arange(key_length)[None, None, None, :]


def _spread(mask: Array, query_length: int, key_length: int) -> Array:
    return jnp.broadcast_to(mask, (*mask.shape[:2], query_length, key_length))


@_rule()
class Full(Rule):
    """Every query sees every key."""

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "1 1 T S"]:
        return jnp.ones((1, 1, query_length, key_length), bool)

    @property
    def sees_self(self) -> bool:
        return True


@_rule("offset")
class Causal(Rule):
    """s <= t + offset."""

    offset: int = 0

    def __post_init__(self) -> None:
        _integer("Causal offset", self.offset)

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "1 1 T S"]:
        t, s = _positions(query_length, key_length)
        return s <= t + self.offset

    @property
    def sees_self(self) -> bool:
        return self.offset >= 0


@_rule("window")
class SlidingWindow(Rule):
    """|t - s| < window; with `Causal()` the last `window` keys, self included."""

    window: int

    def __post_init__(self) -> None:
        _integer("SlidingWindow window", self.window, least=1)

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "1 1 T S"]:
        t, s = _positions(query_length, key_length)
        return abs(t - s) < self.window

    @property
    def sees_self(self) -> bool:
        return True


@_rule("count")
class Global(Rule):
    """The first `count` positions see all and are seen by all."""

    count: int

    def __post_init__(self) -> None:
        _integer("Global count", self.count, least=0)

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "1 1 T S"]:
        t, s = _positions(query_length, key_length)
        return (t < self.count) | (s < self.count)


@_rule()
class Padding(Rule):
    """s < lengths[b]: hides keys, never queries. `lengths` [B] integers."""

    lengths: Any

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "B 1 T S"]:
        lengths = _integers("Padding lengths", self.lengths, "[B]", 1)
        _, s = _positions(query_length, key_length)
        return _spread(s < lengths[:, None, None, None], query_length, key_length)


@_rule()
class Segments(Rule):
    """query_ids[b,t] = key_ids[b,s]; `key_ids` [B, S] are `query_ids` [B, T] where left out."""

    query_ids: Any
    key_ids: Any = None

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "B 1 T S"]:
        query_ids = _integers("Segments query_ids", self.query_ids, "[B, T]", 2)
        key_ids = query_ids if self.key_ids is None else _integers("Segments key_ids", self.key_ids, "[B, S]", 2)
        for name, ids, length, letter in (("query", query_ids, query_length, "T"), ("key", key_ids, key_length, "S")):
            if ids.shape[1] != length:
                raise UserError(f"Segments {name} ids have {ids.shape[1]} positions; {letter}={length}")
        if query_ids.shape[0] != key_ids.shape[0]:
            raise UserError(f"Segments has {query_ids.shape[0]} rows of query ids and {key_ids.shape[0]} of key ids")
        return query_ids[:, None, :, None] == key_ids[:, None, None, :]

    @property
    def sees_self(self) -> bool:
        return self.key_ids is None


@_rule()
class Dense(Rule):
    """A boolean array that broadcasts to [B, H, T, S], as an array of fewer axes does from the right."""

    array: Any

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B #H T S"]:
        array = jnp.asarray(self.array)
        if array.dtype != bool:
            raise UserError(f"Dense mask is of {array.dtype}; it must be boolean, True where a key is visible")
        lengths = ((1,) * 4 + array.shape)[-2:]
        if array.ndim > 4 or lengths[0] not in (1, query_length) or lengths[1] not in (1, key_length):
            raise UserError(
                f"Dense mask of shape {array.shape} does not broadcast to [B, H, T={query_length}, S={key_length}]"
            )
        return _spread(array.reshape((1,) * (4 - array.ndim) + array.shape), query_length, key_length)


@dataclasses.dataclass(frozen=True, init=False)
class PerHead(Rule):
    """One rule a head: `PerHead(Causal(), Causal() & SlidingWindow(64))` for H = 2."""

    rules: tuple[Any, ...]

    def __init__(self, *rules: Any) -> None:
        object.__setattr__(self, "rules", rules)

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B H T S"]:
        masks = [rule.mask(query_length, key_length) for rule in self.rules]
        for head, mask in enumerate(masks):
            if mask.shape[1] != 1:
                raise UserError(f"PerHead rule {head} tells {mask.shape[1]} heads apart; it must be a rule for one")
        batch = _common("PerHead", 0, masks)
        masks = [jnp.broadcast_to(mask, (batch, *mask.shape[1:])) for mask in masks]
        return jnp.concatenate([jnp.ones((batch, 0, query_length, key_length), bool), *masks], axis=1)

    @property
    def sees_self(self) -> bool:
        return all(rule.sees_self for rule in self.rules)


jax.tree_util.register_pytree_node(PerHead, lambda rule: (rule.rules, None), lambda _, rules: PerHead(*rules))


@_rule()
class And(Rule):
    """Visible where both rules say so."""

    left: Any
    right: Any

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B #H T S"]:
        masks = _matching("&", self, query_length, key_length)
        return masks[0] & masks[1]

    @property
    def sees_self(self) -> bool:
        return self.left.sees_self and self.right.sees_self


@_rule()
class Or(Rule):
    """Visible where either rule says so."""

    left: Any
    right: Any

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B #H T S"]:
        masks = _matching("|", self, query_length, key_length)
        return masks[0] | masks[1]

    @property
    def sees_self(self) -> bool:
        return self.left.sees_self or self.right.sees_self


@_rule()
class Not(Rule):
    """Visible where the rule says not."""

    rule: Any

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B #H T S"]:
        return ~self.rule.mask(query_length, key_length)


def _matching(sign: str, pair: And | Or, query_length: int, key_length: int) -> list[Array]:
    masks = [rule.mask(query_length, key_length) for rule in (pair.left, pair.right)]
    for axis in (0, 1):
        _common(sign, axis, masks)
    return masks


def _common(name: str, axis: int, masks: list[Array]) -> int:
    """The size along B or H that masks share, where 1 goes with any."""
    sizes = {mask.shape[axis] for mask in masks} - {1}
    if len(sizes) > 1:
        what = ("examples", "heads")[axis]
        raise UserError(f"rules joined by {name} are for different numbers of {what}: {sorted(sizes)}")
    return sizes.pop() if sizes else 1


def _integers(name: str, value: Any, letters: str, ndim: int) -> Array:
    array = jnp.asarray(value)
    if array.ndim != ndim or not jnp.issubdtype(array.dtype, jnp.integer):
        raise UserError(f"{name} is of {array.dtype} and shape {array.shape}; it must be integers {letters}")
    return array
