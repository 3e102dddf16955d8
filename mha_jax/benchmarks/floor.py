"""The matrix products of one training step and nothing else: what the step would cost if all the rest were free.

The products have the sizes of the model's, with axes in the order that costs least. Where the model moves heads in
front of positions, a reshape stands that moves nothing: values mean nothing here, only sizes do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mha_jax.specs import HeadShape, RunSpec

Weights = dict[str, Array]


def project(weights: Weights, x_ND: Float[Array, "N D"]) -> tuple[Array, Array, Array]:
    """Queries, keys and values, heads and width in one axis."""
    return jnp.matmul(x_ND, weights["query"]), jnp.matmul(x_ND, weights["key"]), jnp.matmul(x_ND, weights["value"])


def square(
    q: Float[Array, "N HK"],
    k: Float[Array, "N HK"],
    v: Float[Array, "N HV"],
    heads: HeadShape,
    length: int,
    keys: int | None = None,
) -> Float[Array, "N HV"]:
    """The two batched products of attention, over the whole T x T square of every head or its first `keys` columns."""
    H, K, V = heads.num_heads, heads.qk_dim, heads.v_dim
    logits = jnp.matmul(q.reshape(-1, length, K), k.reshape(-1, K, length)[..., :keys])
    return jnp.matmul(logits, v.reshape(-1, length, V)[:, :keys]).reshape(-1, H * V)


def causal_layer(weights: Weights, x_BTD: Float[Array, "B T D"], heads: HeadShape) -> Float[Array, "B T D"]:
    """The products of one causal self-attention layer: its projections, and half of every square, as columns."""
    batch, length, d_model = x_BTD.shape
    o = square(*project(weights, x_BTD.reshape(-1, d_model)), heads, length, (length + 1) // 2)
    return jnp.matmul(o, weights["out"]).reshape(batch, length, d_model)


def feed_forward(weights: Weights, x_ND: Float[Array, "N D"]) -> Float[Array, "N D"]:
    """Up and down."""
    return jnp.matmul(jnp.matmul(x_ND, weights["up"]), weights["down"])


def forward(run: RunSpec, weights: dict[str, Any], x_ND: Float[Array, "N D"]) -> Float[Array, "N C"]:
    """All products of the forward pass of a language model with as many key/value heads as heads."""
    for layer, heads in zip(weights["layers"], run.model.heads("decoder"), strict=True):
        o = square(*project(layer, x_ND), heads, run.data.length)
        x_ND = feed_forward(layer, jnp.matmul(o, layer["out"]))
    return jnp.matmul(x_ND, weights["logits"])


def draw_weights(run: RunSpec) -> dict[str, Any]:
    """Normal weights in the run's dtype that keep the chain's values near 1: so no product overflows."""
    D, F, T = run.model.d_model, run.model.d_ff, run.data.length
    keys = iter(jax.random.split(jax.random.key(0), 1 + 6 * run.model.num_layers))

    def draw(rows: int, columns: int, gain: float = 1.0) -> Array:
        return (jax.random.normal(next(keys), (rows, columns)) * gain * rows**-0.5).astype(run.model.dtype)

    def layer(heads: HeadShape) -> Weights:
        H, K, V = heads.num_heads, heads.qk_dim, heads.v_dim
        attention = {"query": draw(D, H * K), "key": draw(D, H * K), "value": draw(D, H * V, (K * T) ** -0.5)}
        return {**attention, "out": draw(H * V, D), "up": draw(D, F), "down": draw(F, D)}

    return {"layers": [layer(heads) for heads in run.model.heads("decoder")], "logits": draw(D, run.data.tokens)}


def with_backward(function: Callable[..., Any], *inputs: Any) -> Callable[[], object]:
    """A compiled call of function(*inputs) and of its backward pass to all inputs, that returns when both are done."""
    cotangents = jax.tree.map(
        lambda out: jax.random.normal(jax.random.key(1), out.shape, out.dtype), jax.eval_shape(function, *inputs)
    )

    @jax.jit
    def both(inputs: Any, cotangents: Any) -> Any:
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(cotangents)

    return lambda: jax.block_until_ready(both(inputs, cotangents))
