"""Heads chosen by the input: a router gives every token a factor for each head, 0 for those that it does not use.

All heads are computed and then gated, so that this saves no time by itself; `gathered_attention` computes the chosen
ones only.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from mha_jax.specs import HeadShape, RoutingSpec


class Route(NamedTuple):
    """What a router decided. E are the heads that it chooses among: all but the shared ones, which come first."""

    gate_BTH: Float[Array, "B T H"]
    chosen_BTE: Bool[Array, "B T E"]
    scores_BTE: Float[Array, "B T E"]


class Router(nnx.Module):
    """Scores each token for each head. Parameter: kernel [D, H], or [D, H + 2] where some heads are shared.

      r = softmax_E(x W_r), chosen the top_k greatest of r, c = r where chosen else 0

      "moa"  gate = c / stop_gradient(sum c)                                      (Zhang et al. 2022, section 3.2)
      "moh"  gate = (2 a_1 shared softmax(x W_s), 2 a_2 top_k c / sum c),  a = softmax(x W_a)
             without shared heads gate = top_k c / sum c                          (Jin et al. 2024, eqs. 5 to 7)

    MoH's equations have neither the factors 2, shared and top_k nor the division by sum c; the authors' program has
    them, so that the mean factor of a head in use is 1, and so has this. W_s, W_r and W_a are neighbouring columns.
    Softmaxes are in float32 at least. Nothing is random: evaluation routes as training does.
    """

    def __init__(
        self, spec: RoutingSpec, d_model: int, shape: HeadShape, *, key: Key[Array, ""], param_dtype: DTypeLike
    ) -> None:
        spec.check(shape)
        self.spec = spec
        columns = spec.columns(shape)
        limit = (6 / (d_model + columns)) ** 0.5
        self.kernel = nnx.Param(jax.random.uniform(key, (d_model, columns), param_dtype, -limit, limit))

    def __call__(self, x: Float[Array, "B T D"]) -> Route:
        kernel = self.kernel[...]
        wide = jnp.promote_types(x.dtype, kernel.dtype)
        logits_BTC = x.astype(wide) @ kernel.astype(wide)
        shared = self.spec.shared
        heads = logits_BTC.shape[-1] - (2 if shared else 0)
        scores_BTE = logits_BTC[..., shared:heads]
        probabilities_BTE = jax.nn.softmax(scores_BTE)
        chosen_BTE = _greatest(probabilities_BTE, self.spec.top_k)
        kept_BTE = jnp.where(chosen_BTE, probabilities_BTE, 0)
        total_BT1 = kept_BTE.sum(axis=-1, keepdims=True)
        if self.spec.kind == "moa":
            return Route(kept_BTE / jax.lax.stop_gradient(total_BT1), chosen_BTE, scores_BTE)
        gate_BTE = self.spec.top_k * kept_BTE / total_BT1
        if not shared:
            return Route(gate_BTE, chosen_BTE, scores_BTE)
        parts_BT2 = 2 * jax.nn.softmax(logits_BTC[..., heads:])
        shared_BTH = parts_BT2[..., :1] * shared * jax.nn.softmax(logits_BTC[..., :shared])
        return Route(jnp.concatenate([shared_BTH, parts_BT2[..., 1:] * gate_BTE], axis=-1), chosen_BTE, scores_BTE)


def _greatest(x_BTE: Float[Array, "B T E"], count: int) -> Bool[Array, "B T E"]:
    """Where the `count` greatest are; of equal ones the first."""
    _, index_BTk = jax.lax.top_k(x_BTE, count)
    return (index_BTk[..., None] == jnp.arange(x_BTE.shape[-1]).reshape(1, 1, 1, -1)).any(axis=-2)


_routes: contextvars.ContextVar[list[Route] | None] = contextvars.ContextVar("routes", default=None)


@contextlib.contextmanager
def routes() -> Iterator[list[Route]]:
    """Collects what every router inside decides, in the order of the forward pass.

    What a scan or a checkpoint traces must be handed out as its result: collect there, return, and `note_routes` again.
    """
    found: list[Route] = []
    token = _routes.set(found)
    try:
        yield found
    finally:
        _routes.reset(token)


def note_routes(found: Sequence[Route]) -> None:
    """Hands routes to whoever collects them."""
    collected = _routes.get()
    if collected is not None:
        collected += found
