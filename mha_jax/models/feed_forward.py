"""What a block is made of beside attention: norms, linear layers, the feed-forward layer."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from mha_jax.attention.product import dot_general
from mha_jax.specs import ModelSpec

Norm = nnx.LayerNorm | nnx.RMSNorm
# What stands between the products of a feed-forward layer; with "swiglu", what is multiplied there.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "swiglu": jax.nn.silu,
}


def param_dtype(spec: ModelSpec) -> DTypeLike:
    """What parameters, norms and logits are held in: float32 unless the whole model is float64."""
    return jnp.float64 if spec.dtype == "float64" else jnp.float32


def make_norm(spec: ModelSpec, rngs: nnx.Rngs) -> Norm:
    """A norm over D, held and computed in the parameters' dtype."""
    kind = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}[spec.normalization]
    dtype, epsilon = param_dtype(spec), spec.norm_epsilon
    return kind(spec.d_model, epsilon=epsilon, dtype=dtype, param_dtype=dtype, use_fast_variance=False, rngs=rngs)


def normed(norm: Norm, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """norm(x), in the type of x."""
    # Rows of one matrix: with more axes, XLA on CPU takes two to three times as long for norms and their gradients.
    rows = x_BTD.reshape(-1, x_BTD.shape[-1])
    return norm(rows).reshape(x_BTD.shape).astype(x_BTD.dtype)


def linear(spec: ModelSpec, inputs: int, outputs: int, *, use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A Glorot-uniform linear layer that computes in the model's dtype."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=jnp.dtype(spec.dtype),
        param_dtype=param_dtype(spec),
        kernel_init=nnx.initializers.glorot_uniform(),
        dot_general=dot_general,
        rngs=rngs,
    )


class FeedForward(nnx.Module):
    """Two products with something that is not linear between them, F wide inside.

      y[b,t] = down(activation(up(x[b,t])))               for all but "swiglu" (Vaswani et al. 2017, eq. 2)
      y[b,t] = down(silu(gating(x[b,t])) * up(x[b,t]))    for "swiglu" (Shazeer 2020, eq. 6)

    Each product has a bias with `use_ff_bias`.
    """

    def __init__(self, spec: ModelSpec, d_ff: int, *, rngs: nnx.Rngs) -> None:
        self.activation = ACTIVATIONS[spec.activation]
        biased = spec.use_ff_bias
        self.up = linear(spec, spec.d_model, d_ff, use_bias=biased, rngs=rngs)
        self.down = linear(spec, d_ff, spec.d_model, use_bias=biased, rngs=rngs)
        gated = spec.activation == "swiglu"
        self.gating = linear(spec, spec.d_model, d_ff, use_bias=biased, rngs=rngs) if gated else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        # Rows of one matrix: with more axes, XLA on CPU takes half as long again for the gradients.
        rows = x_BTD.reshape(-1, x_BTD.shape[-1])
        if self.gating is None:
            return self.down(self.activation(self.up(rows))).reshape(x_BTD.shape)
        return self.down(self.activation(self.gating(rows)) * self.up(rows)).reshape(x_BTD.shape)
