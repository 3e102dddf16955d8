"""One causal self-attention layer, ours and as JAX's other libraries write it, all on our layer's parameters."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float

from mha_jax.attention import Causal, MultiHeadAttention
from mha_jax.benchmarks.programs import Layer


def our_layer(d_model: int, num_heads: int, backend: str, dtype: DTypeLike) -> tuple[Layer, Any]:
    """Our layer without biases, and its parameters: kernels "query", "key", "value" [D, H, K] and "out" [H, K, D]."""
    module = MultiHeadAttention(d_model, num_heads, dtype=dtype, param_dtype=dtype, backend=backend, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def layer(params: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return nnx.merge(graph, params, rest)(x_BTD, visibility=Causal())

    return layer, nnx.to_pure_dict(params)


def jax_nn_layer(implementation: Literal["xla", "cudnn"] | None) -> Layer:
    """jax.nn.dot_product_attention between four plain matrix products."""

    def layer(params: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        def project(name: str) -> Array:
            kernel_DHK = params[name]["kernel"]
            d_model, heads, width = kernel_DHK.shape
            y_BTX = jnp.matmul(x_BTD, kernel_DHK.reshape(d_model, heads * width))
            return y_BTX.reshape(*x_BTD.shape[:2], heads, width)

        o_BTHK = jax.nn.dot_product_attention(
            project("query"), project("key"), project("value"), is_causal=True, implementation=implementation
        )
        out_HKD = params["out"]["kernel"]
        return jnp.matmul(o_BTHK.reshape(*x_BTD.shape[:2], -1), out_HKD.reshape(-1, out_HKD.shape[-1]))

    return layer


def flax_layer(d_model: int, num_heads: int, dtype: DTypeLike) -> Layer:
    """flax.nnx.MultiHeadAttention, whose kernels have our names and axes."""
    module = nnx.MultiHeadAttention(
        num_heads,
        d_model,
        qkv_features=d_model,
        use_bias=False,
        decode=False,
        dtype=dtype,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    graph, _, rest = nnx.split(module, nnx.Param, ...)

    def layer(params: Any, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return nnx.merge(graph, params, rest)(x_BTD, is_causal=True)

    return layer
