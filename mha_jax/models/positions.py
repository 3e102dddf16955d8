"""What a token at a position is told about the position before the first layer."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from mha_jax.specs import ModelSpec, UserError


def embedding_scale(spec: ModelSpec) -> float:
    """What embeddings of tokens and of learned positions are multiplied by as they enter."""
    return spec.d_model**0.5 if spec.scale_embedding else 1.0


def sinusoidal_table(length: int, d_model: int) -> np.ndarray:
    """Sines and cosines of geometrically growing wavelength (Vaswani et al. 2017, section 3.5).

      table[t, 2i] = sin(t / 10000^(2i / D)),  table[t, 2i+1] = cos(t / 10000^(2i / D))

    Returns: float64 (length, d_model); with an odd D the last cosine is left out.
    """
    rates = 10_000.0 ** (-np.arange(0, d_model, 2) / d_model)
    angles = np.arange(length)[:, None] * rates[None, :]
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, -1)[:, :d_model]


class Positions(nnx.Module):
    """Adds a vector per position to the embedded tokens, or nothing.

      y[b,t] = x[b,t] + p[t]

    "sinusoidal": p is the fixed table above. "learned": p = scale * embedding[t], drawn and scaled as the tokens are.
    "rope" and "none": p = 0; rotary positions act inside the attention.
    """

    def __init__(
        self,
        kind: str,
        max_length: int,
        d_model: int,
        scale: float,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.kind, self.max_length, self.d_model, self.scale = kind, max_length, d_model, scale
        # The key is drawn whatever the kind, so that the other parameters start the same.
        key = rngs.params()
        if kind == "learned":
            draw = jax.random.normal(key, (max_length, d_model), param_dtype)
            self.embedding = nnx.Param(draw * d_model**-0.5)

    def __call__(self, x_BTD: Float[Array, "B T D"], positions_T: Int[Array, " T"]) -> Float[Array, "B T D"]:
        """Raises: UserError where more positions are asked for than the table holds."""
        if self.kind not in ("sinusoidal", "learned"):
            return x_BTD
        if len(positions_T) > self.max_length:
            raise UserError(
                f"a sequence of {len(positions_T)} tokens is longer than model.max_length={self.max_length} positions"
            )
        if self.kind == "learned":
            table_TD = self.embedding[...][positions_T] * self.scale
        else:
            table_TD = jnp.asarray(sinusoidal_table(self.max_length, self.d_model), jnp.float32)[positions_T]
        return x_BTD + table_TD[None].astype(x_BTD.dtype)
