"""One entry to attention: checks what it is given, picks a backend, and says which."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mha_jax.attention.backends import einsum
from mha_jax.attention.dropout import keys_per_example
from mha_jax.attention.visibility import Full, Rule
from mha_jax.specs import HeadShape, UserError

BACKENDS = {"einsum": einsum.attend}


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
    _check_arrays(q, k, v)
    (batch, queries, heads, qk_dim), keys = q.shape, k.shape[1]
    groups = _groups(heads, k.shape[2], head_to_group)
    _check_rule(visibility, batch, heads, queries, keys)
    if not 0 <= dropout_rate < 1:
        raise UserError(f"dropout_rate={dropout_rate!r} must be at least 0 and below 1")
    if dropout_rate > 0 and dropout_key is None:
        raise UserError(f"dropout_rate={dropout_rate!r} needs a dropout_key")
    dropout_keys = keys_per_example(dropout_key, batch) if dropout_rate > 0 and dropout_key is not None else None
    return BACKENDS[choose_backend(backend)](
        q,
        k,
        v,
        rule=visibility,
        gate=None if gate is None else broadcast_gate(gate, batch, queries, heads),
        dropout_rate=dropout_rate,
        dropout_keys=dropout_keys,
        scale=qk_dim**-0.5 if scale is None else scale,
        groups=groups,
    )


def choose_backend(name: str) -> str:
    """The backend that `name` stands for. Raises UserError for one that does not exist."""
    if name == "auto":
        return "einsum"
    if name not in BACKENDS:
        raise UserError(f"backend={name!r} is not one of {', '.join(map(repr, ('auto', *BACKENDS)))}")
    return name


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


def _groups(heads: int, num_groups: int, head_to_group: tuple[int, ...] | None) -> tuple[int, ...]:
    chosen = None if head_to_group is None else tuple(int(g) for g in head_to_group)
    # Both widths are given, so d_model plays no part.
    return HeadShape.resolve(1, heads, num_groups, 1, 1, chosen).groups


def _check_rule(rule: Rule, batch: int, heads: int, queries: int, keys: int) -> None:
    if not isinstance(rule, Rule):
        raise UserError(f"visibility={rule!r} is not a rule; an array goes in as Dense(array)")
    shape = jax.eval_shape(lambda: rule.mask(queries, keys)).shape
    for letter, size, given in (("B", batch, shape[0]), ("H", heads, shape[1])):
        if given not in (1, size):
            raise UserError(f"visibility is for {letter}={given}; q has {letter}={size}")
