"""One entry to attention: checks what it is given, picks a backend, and says which."""

import contextlib
import contextvars
import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mha_jax.attention.backends import blockwise, cudnn, diagonals, einsum, pallas, rows, splash, strips
from mha_jax.attention.backends.call import Call
from mha_jax.attention.dropout import keys_per_example
from mha_jax.attention.regions import Span
from mha_jax.attention.rule import check_rule
from mha_jax.attention.target import target
from mha_jax.attention.visibility import Full, PerHead, Rule
from mha_jax.specs import HeadShape, UserError, checks

BACKENDS = {
    "einsum": einsum,
    "blockwise": blockwise,
    "diagonals": diagonals,
    "strips": strips,
    "cudnn": cudnn,
    "pallas": pallas,
    "rows": rows,
    "splash": splash,
}
# What "auto" asks in turn; `blockwise` serves every call.
_PREFERRED = {"gpu": ("cudnn", "pallas", "rows", "blockwise"), "tpu": ("splash", "blockwise")}
# So many weights, B * H * T * S of them, are quicker held whole (8 MB in float32) than visited tile by tile, of squares
# in which few tiles could be left out.
_FEW_WEIGHTS, _SMALL_SQUARE = 2**21, 2**17


def attend(
    q: Array,
    k: Array,
    v: Array,
    visibility: Rule = Full(),  # noqa: B008 (rules are frozen)
    gate: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    scale: float | Array | None = None,
    head_to_group: tuple[int, ...] | None = None,
    backend: str = "auto",
) -> Float[Array, "B T H V"]:
    """Scaled dot-product attention with the head as an axis (Vaswani et al. 2017, eq. 1; GQA: Ainslie et al. 2023).

      w[b,h,t,s] = softmax over the visible s of <q[b,t,h], k[b,s,g(h)]> * scale
      o[b,t,h]   = gate[h] * sum over s of w[b,h,t,s] * v[b,s,g(h)]

    A query that sees nothing gives exactly 0, with gradient 0. A NaN in a key or value that nobody may see reaches
    nobody. The softmax is in float32 at least.

    Args:
      q, k, v: [B, T, H, K], [B, S, G, K], [B, S, G, V], of one floating type; K and V are free of each other.
      visibility: which keys a query may see.
      gate: [H], [B, H] or [B, T, H]; multiplies each head's output.
      dropout_rate: of attention weights, independent per example, head, query and key; needs `dropout_key`.
      dropout_key: a typed key, or B of them, one an example.
      scale: default K ** -0.5.
      head_to_group: the group that each head reads; default: neighbouring heads share one, g(h) = h // (H / G).
      backend: "auto" or one of `BACKENDS`.

    Returns: o [B, T, H, V] in the type of q.
    Raises: UserError for shapes that do not fit, G that does not divide H without a map, dropout without a key.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    call = check_call(q, k, v, visibility, head_to_group, dropout_rate)
    if call.dropout_rate > 0 and dropout_key is None:
        raise UserError(f"dropout_rate={dropout_rate!r} needs a dropout_key")
    dropout_keys = keys_per_example(dropout_key, call.batch) if dropout_rate > 0 and dropout_key is not None else None
    chosen = choose_backend(backend, call)
    note_backend(call, chosen)
    o = BACKENDS[chosen.name].attend(
        q,
        k,
        v,
        rule=visibility,
        dropout_rate=call.dropout_rate,
        dropout_keys=dropout_keys,
        scale=call.qk_dim**-0.5 if scale is None else scale,
        groups=call.groups,
    )
    if gate is None:
        return o
    wide = jnp.promote_types(o.dtype, jnp.float32)
    factor = broadcast_gate(gate, call.batch, call.queries, call.heads)
    return (o * factor[..., None].astype(wide)).astype(o.dtype)


def check_call(
    q: Array,
    k: Array,
    v: Array,
    visibility: Rule,
    head_to_group: tuple[int, ...] | None = None,
    dropout_rate: float = 0.0,
) -> Call:
    """What these arguments ask for. Raises: UserError for what does not fit, in the letters of `attend`."""
    _check_arrays(q, k, v)
    (batch, queries, heads, qk_dim), (keys, num_groups) = q.shape, k.shape[1:3]
    groups = _groups(heads, num_groups, head_to_group)
    _check_rule(visibility, batch, heads, queries, keys)
    checks.rate("dropout_rate", dropout_rate)
    rate = float(dropout_rate)
    sizes = (batch, queries, keys, heads, groups, num_groups, qk_dim, v.shape[3])
    return Call(*sizes, q.dtype, visibility, rate, _partitioned.get())


class Choice(NamedTuple):
    """The backend taken, and what those said that would have come first: {name: refusal}."""

    name: str
    refused: dict[str, str]


def check_backend(name: str) -> None:
    """Raises UserError for a backend that does not exist."""
    if name != "auto" and name not in BACKENDS:
        raise UserError(f"backend={name!r} is not one of {', '.join(map(repr, ('auto', *BACKENDS)))}")


def choose_backend(name: str, call: Call) -> Choice:
    """The backend that serves a call: the one that is named, or with "auto" the quickest that does not refuse it.

    Raises: UserError where the one that is named does not exist, or refuses; it says which limit and what would do.
    """
    check_backend(name)
    if name != "auto":
        reason = BACKENDS[name].refusal(call)
        if reason is not None:
            raise UserError(f"backend={name!r} cannot serve this attention: {reason}")
        return Choice(name, {})
    if held_whole(call.batch * call.heads, call.queries, call.keys):
        return Choice("einsum", {})
    if diagonals.pays(call):
        return Choice("diagonals", {})
    if strips.pays(call):
        return Choice("strips", {})
    refused: dict[str, str] = {}
    for candidate in _PREFERRED.get(target(), ("blockwise",)):
        reason = BACKENDS[candidate].refusal(call)
        if reason is None:
            return Choice(candidate, refused)
        refused[candidate] = reason
    raise AssertionError("blockwise serves every call")


def held_whole(squares: int, queries: int, keys: int) -> bool:
    """Whether "auto" holds all weights at once, of so many squares (B * H) of T x S."""
    return queries * keys <= _SMALL_SQUARE and squares * queries * keys <= _FEW_WEIGHTS


_partitioned: contextvars.ContextVar[bool] = contextvars.ContextVar("partitioned", default=False)


@contextlib.contextmanager
def partitioned(value: bool) -> Iterator[None]:
    """What is traced inside is to be split over several devices by the compiler, or not: `Call.partitioned`."""
    token = _partitioned.set(value)
    try:
        yield
    finally:
        _partitioned.reset(token)


_notes: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


@contextlib.contextmanager
def noting_backends() -> Iterator[list[str]]:
    """Collects one line for every kind of attention that is traced inside: its sizes, its backend, what refused it."""
    lines: list[str] = []
    token = _notes.set(lines)
    try:
        yield lines
    finally:
        _notes.reset(token)


def note_backend(call: Call, chosen: Choice) -> None:
    """Adds a call's line to those that `noting_backends` collects."""
    lines = _notes.get()
    if lines is None:
        return
    refusals = "".join(f"; {name}: {reason}" for name, reason in chosen.refused.items())
    heads = f"H={call.heads} G={call.num_groups} K={call.qk_dim} V={call.v_dim}"
    line = f"T={call.queries} S={call.keys} {heads} {call.dtype}: {chosen.name}{refusals}"
    if line not in lines:
        lines.append(line)


def fell_back(line: str) -> bool:
    """Whether a line of `noting_backends` names a backend that would have come first, and refused."""
    return "; " in line


def broadcast_gate(gate: Array, batch: int, queries: int, heads: int) -> Float[Array, "b t H"]:
    """A gate [H], [B, H] or [B, T, H] with three axes, 1 where it does not vary."""
    gate = jnp.asarray(gate)
    if gate.shape not in ((heads,), (batch, heads), (batch, queries, heads)):
        raise UserError(
            f"gate has shape {gate.shape}; [H={heads}], [B={batch}, H={heads}] or "
            f"[B={batch}, T={queries}, H={heads}] would do"
        )
    gate = gate if jnp.issubdtype(gate.dtype, jnp.floating) else gate.astype(jnp.float32)
    return gate[:, None] if gate.ndim == 2 else gate.reshape((1,) * (3 - gate.ndim) + gate.shape)


def _check_arrays(q: Array, k: Array, v: Array) -> None:
    for name, x, letters in (("q", q, "[B, T, H, K]"), ("k", k, "[B, S, G, K]"), ("v", v, "[B, S, G, V]")):
        if x.ndim != 4:
            raise UserError(f"{name} has shape {x.shape}; it must be {letters}")
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != q.dtype:
            raise UserError(f"q, k, v are of {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating type")
    shared = {
        "B": {"q": q.shape[0], "k": k.shape[0], "v": v.shape[0]},
        "K": {"q": q.shape[3], "k": k.shape[3]},
        "S": {"k": k.shape[1], "v": v.shape[1]},
        "G": {"k": k.shape[2], "v": v.shape[2]},
    }
    for letter, sizes in shared.items():
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{size} in {name}" for name, size in sizes.items())
            raise UserError(f"{letter} differs: {told}; q is [B, T, H, K], k [B, S, G, K], v [B, S, G, V]")
    if not q.shape[3]:
        raise UserError("K=0 in q and k; a head needs a width of at least 1")


def _groups(heads: int, num_groups: int, head_to_group: tuple[int, ...] | None) -> tuple[int, ...]:
    chosen = head_to_group
    if chosen is not None:
        # Numbers of NumPy become ints; the check of what else there may be is HeadShape's.
        chosen = tuple(operator.index(g) if hasattr(g, "__index__") else g for g in chosen)
    # Both widths are given, so d_model plays no part.
    return HeadShape.resolve(1, heads, num_groups, 1, 1, chosen).groups


def _check_rule(rule: Rule, batch: int, heads: int, queries: int, keys: int) -> None:
    check_rule("visibility", rule).check(queries, keys)
    for given in _heads_listed(rule):
        # The shape below does not tell: one rule would broadcast to all heads.
        if given != heads:
            raise UserError(f"visibility is for H={given}; q has H={heads}")
    shape = jax.eval_shape(lambda: rule.at(None, None, Span(0, queries), Span(0, keys))).shape
    for letter, size, given in (("B", batch, shape[0]), ("H", heads, shape[1])):
        if given not in (1, size):
            raise UserError(f"visibility is for {letter}={given}; q has {letter}={size}")


def _heads_listed(rule: Rule) -> list[int]:
    """The number of rules in each PerHead that this one is made of."""
    if isinstance(rule, PerHead):
        return [len(rule.rules)]
    return [heads for part in rule.parts for heads in _heads_listed(part)]
