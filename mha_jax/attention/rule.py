"""Which keys a query may see, as small values that compose: `Causal() & (SlidingWindow(256) | Global(16))`.

A rule is a frozen pytree: its arrays are leaves, its integers static, so it passes through jit, grad and vmap. In all
rules t is a query position and s a key position, both counted from 0. True means visible. A rule answers two questions:
`at` tells the mask of any rectangle of the square, `bounds` what is known of it before anything runs. Kernels ask
nothing else, so they know no pattern by name.
"""

import dataclasses
import operator
import reprlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool

from mha_jax.attention.regions import Bounds, Rectangles, Span
from mha_jax.specs import UserError

if TYPE_CHECKING:
    from mha_jax.attention.blockmap import Description


class Rule:
    """Base of all rules; `&`, `|` and `~` compose rules."""

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "#b #h #t #s"]:
        """What is visible for these examples, heads, queries and keys; an axis is 1 where the rule does not vary.

        None stands for all examples or heads that the rule tells apart.
        """
        raise NotImplementedError

    def bounds(self, where: Rectangles) -> Bounds:
        """What is known of these rectangles, whatever traced arrays hold."""
        return where.unknown()

    def mask(self, query_length: int, key_length: int) -> Bool[Array, "#B #H T S"]:
        """The whole square; the first two axes are 1 where the rule does not vary along them."""
        self.check(query_length, key_length)
        mask = self.at(None, None, Span(0, query_length), Span(0, key_length))
        return jnp.broadcast_to(mask, (*mask.shape[:2], query_length, key_length))

    def check(self, query_length: int, key_length: int) -> None:
        """Raises UserError where the rule cannot be for so many queries and keys."""
        for part in self.parts:
            part.check(query_length, key_length)

    def padded(self, query_length: int, key_length: int) -> "Rule":
        """The rule with its arrays as long as this, so that `at` may ask beyond their ends (the answer is any)."""
        return self

    def describe(self, length: int, block: int = 128) -> "Description":
        """Visible share, share that tiles of this size pay for, and a small picture, for T = S = length."""
        from mha_jax.attention.blockmap import describe

        return describe(self, length, block)

    @property
    def parts(self) -> tuple["Rule", ...]:
        """The rules that this one is made of."""
        return ()

    @property
    def sees_self(self) -> bool:
        """True where every t surely sees s = t. Then, at T = S, no row is empty and no key is hidden from all."""
        return False

    @property
    def same_along_diagonals(self) -> bool:
        """True where s - t alone decides, for every example and head; `bounds` then tells single places exactly."""
        return False

    def __and__(self, other: "Rule") -> "Rule":
        return And(self, check_rule("what & joins", other))

    def __or__(self, other: "Rule") -> "Rule":
        return Or(self, check_rule("what | joins", other))

    def __invert__(self) -> "Rule":
        return Not(self)


def rule_type(*static: str) -> Any:
    """Makes a class a frozen dataclass and a pytree whose fields are leaves, but for those named."""

    def decorate(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [field.name for field in dataclasses.fields(cls) if field.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return decorate


def check_rule(name: str, value: Any) -> Rule:
    """The value. Raises: UserError for what is no rule."""
    if not isinstance(value, Rule):
        told = " ".join(reprlib.repr(value).split())
        raise UserError(f"{name}={told} is not a rule; an array goes in as Dense(array)")
    return value


# Positions are in int32, and so is what rules add to them.
FARTHEST = 2**30


def integer(name: str, value: Any, least: int = -FARTHEST, most: int = FARTHEST) -> int:
    """The value as an int. Raises: UserError for what is no integer, or one out of these bounds."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not least <= number <= most:
        raise UserError(f"{name}={value!r} must be an integer of at least {least} and at most {most}")
    return number


def integer_field(rule: Rule, field: str, least: int = -FARTHEST, most: int = FARTHEST) -> None:
    """Makes a field of a rule an int, with the checks of `integer`."""
    number = integer(f"{type(rule).__name__} {field}", getattr(rule, field), least, most)
    object.__setattr__(rule, field, number)


def places(t: Span, s: Span) -> tuple[Array, Array]:
    """The positions of queries and of keys, to broadcast to [b, h, t, s]."""
    return t.index[None, None, :, None], s.index[None, None, None, :]


@dataclasses.dataclass(frozen=True, init=False)
class PerHead(Rule):
    """One rule a head: `PerHead(Causal(), Causal() & SlidingWindow(64))` for H = 2."""

    rules: tuple[Any, ...]

    def __init__(self, *rules: Any) -> None:
        for head, rule in enumerate(rules):
            check_rule(f"PerHead rule {head}", rule)
        object.__setattr__(self, "rules", rules)

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self.rules

    def padded(self, query_length: int, key_length: int) -> Rule:
        return PerHead(*(rule.padded(query_length, key_length) for rule in self.rules))

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "#b #h t s"]:
        masks = [rule.at(b, None, t, s) for rule in self.rules]
        for head, mask in enumerate(masks):
            if mask.shape[1] != 1:
                raise UserError(f"PerHead rule {head} tells {mask.shape[1]} heads apart; it must be a rule for one")
        shape = (_common("PerHead", 0, [mask.shape for mask in masks]), 1, t.size, s.size)
        if h is None:
            masks = [jnp.broadcast_to(mask, shape) for mask in masks]
            return jnp.concatenate([jnp.ones((shape[0], 0, *shape[2:]), bool), *masks], axis=1)
        # Only the rule of the head at hand is worked out.
        each = [lambda rule=rule: jnp.broadcast_to(rule.at(b, None, t, s), shape) for rule in self.rules]
        return jnp.concatenate([lax.switch(h.start + i, each) for i in range(h.size)], axis=1)

    def bounds(self, where: Rectangles) -> Bounds:
        found = [rule.bounds(where) for rule in self.rules]
        none = np.zeros((0, *where.shape), bool)
        return Bounds(
            np.concatenate([none, *(one.some for one in found)]), np.concatenate([none, *(one.every for one in found)])
        )

    @property
    def sees_self(self) -> bool:
        return all(rule.sees_self for rule in self.rules)


def _per_head(_: None, rules: Any) -> PerHead:
    """Unchecked: JAX also puts what stands for rules in their place."""
    made = object.__new__(PerHead)
    object.__setattr__(made, "rules", tuple(rules))
    return made


jax.tree_util.register_pytree_node(PerHead, lambda rule: (rule.rules, None), _per_head)


class _Pair(Rule):
    """Two rules and a sign between them."""

    left: Any
    right: Any
    sign: str

    @property
    def parts(self) -> tuple[Rule, ...]:
        return self.left, self.right

    def padded(self, query_length: int, key_length: int) -> Rule:
        return type(self)(*(rule.padded(query_length, key_length) for rule in self.parts))

    @property
    def same_along_diagonals(self) -> bool:
        return all(rule.same_along_diagonals for rule in self.parts)

    def _masks(self, b: Span | None, h: Span | None, t: Span, s: Span) -> list[Array]:
        masks = [rule.at(b, h, t, s) for rule in self.parts]
        for axis in (0, 1):
            _common(self.sign, axis, [mask.shape for mask in masks])
        return masks


@rule_type()
class And(_Pair):
    """Visible where both rules say so."""

    left: Any
    right: Any
    sign = "&"

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "#b #h #t #s"]:
        left, right = self._masks(b, h, t, s)
        return left & right

    def bounds(self, where: Rectangles) -> Bounds:
        left, right = (rule.bounds(where) for rule in self.parts)
        return Bounds(left.some & right.some, left.every & right.every)

    @property
    def sees_self(self) -> bool:
        return self.left.sees_self and self.right.sees_self


@rule_type()
class Or(_Pair):
    """Visible where either rule says so."""

    left: Any
    right: Any
    sign = "|"

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "#b #h #t #s"]:
        left, right = self._masks(b, h, t, s)
        return left | right

    def bounds(self, where: Rectangles) -> Bounds:
        left, right = (rule.bounds(where) for rule in self.parts)
        return Bounds(left.some | right.some, left.every | right.every)

    @property
    def sees_self(self) -> bool:
        return self.left.sees_self or self.right.sees_self


@rule_type()
class Not(Rule):
    """Visible where the rule says not."""

    rule: Any

    @property
    def parts(self) -> tuple[Rule, ...]:
        return (self.rule,)

    def padded(self, query_length: int, key_length: int) -> Rule:
        return Not(self.rule.padded(query_length, key_length))

    @property
    def same_along_diagonals(self) -> bool:
        return self.rule.same_along_diagonals

    def at(self, b: Span | None, h: Span | None, t: Span, s: Span) -> Bool[Array, "#b #h #t #s"]:
        return ~self.rule.at(b, h, t, s)

    def bounds(self, where: Rectangles) -> Bounds:
        some, every = self.rule.bounds(where)
        return Bounds(~every, ~some)


def _common(name: str, axis: int, shapes: list[tuple[int, ...]]) -> int:
    """The size along b or h that masks share, where 1 goes with any."""
    sizes = {shape[axis] for shape in shapes} - {1}
    if len(sizes) > 1:
        what = ("examples", "heads")[axis]
        raise UserError(f"rules joined by {name} are for different numbers of {what}: {sorted(sizes)}")
    return sizes.pop() if sizes else 1
