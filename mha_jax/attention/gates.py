"""Factors a head that are trained or drawn: learned scalars, hard-concrete gates, heads dropped at random.

A gate multiplies what its head hands to `out`, so a gate of exactly 0 is a head that can be removed.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from mha_jax.attention.dropout import keep_mask

# Voita et al. 2019: the constants of their released code (lib/layers/concrete_gate.py).
TEMPERATURE, LOWER, UPPER, EPSILON = 0.33, -0.1, 1.1, 1e-6


class ScalarGate(nnx.Module):
    """One learned factor a head, 1 at the start."""

    def __init__(self, num_heads: int, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(num_heads, dtype))

    def __call__(self) -> Float[Array, " H"]:
        return self.scale[...]


class HardConcreteGate(nnx.Module):
    """A gate a head that is exactly 0 or exactly 1 with some probability (Louizos et al. 2018; Voita et al. 2019).

      drawn      min(1, max(0, sigmoid((log u - log(1 - u) + log_alpha) / 0.33) * 1.2 - 0.1)),  u uniform in (0, 1)
      evaluated  min(1, max(0, sigmoid(log_alpha) * 1.2 - 0.1))
      P(gate is not 0) = sigmoid(log_alpha - 0.33 log(0.1 / 1.1))

    An evaluated gate is 0 below log_alpha = -2.40 and 1 above 2.40.
    """

    def __init__(self, num_heads: int, initial_log_alpha: float, dtype: DTypeLike) -> None:
        self.log_alpha = nnx.Param(jnp.full(num_heads, initial_log_alpha, dtype))

    def __call__(self) -> Float[Array, " H"]:
        return _stretched(jax.nn.sigmoid(self.log_alpha[...]))

    def drawn(self, uniform_H: Float[Array, " H"]) -> Float[Array, " H"]:
        """The gates that these numbers in (0, 1) draw."""
        logit_H = jnp.log(uniform_H) - jnp.log1p(-uniform_H)
        return _stretched(jax.nn.sigmoid((logit_H + self.log_alpha[...]) / TEMPERATURE))

    def open_probability(self) -> Float[Array, " H"]:
        """P(gate is not 0)."""
        return jax.nn.sigmoid(self.log_alpha[...] - TEMPERATURE * jnp.log(-LOWER / UPPER))


def make_gate(
    kind: Literal["scalar", "hard_concrete"], num_heads: int, initial_log_alpha: float, dtype: DTypeLike
) -> ScalarGate | HardConcreteGate:
    """The trained gate of one attention."""
    if kind == "scalar":
        return ScalarGate(num_heads, dtype)
    return HardConcreteGate(num_heads, initial_log_alpha, dtype)


def uniform(key: Key[Array, ""], count: int, dtype: DTypeLike) -> Float[Array, " N"]:
    """Numbers in (1e-6, 1 - 1e-6), so that their logits are finite."""
    return jax.random.uniform(key, (count,), dtype, EPSILON, 1 - EPSILON)


def drop_heads(keys: Key[Array, " B"], num_heads: int, rate: float) -> Float[Array, "B H"]:
    """DropHead (Zhou et al. 2020): 0 for a dropped head, and H / (heads kept) for the others of an example.

    A row sums to H, and is 0 where all its heads are dropped: the mean factor is 1 - rate ** H.
    """
    kept_BH = keep_mask(keys, (num_heads,), rate).astype(jnp.float32)
    return kept_BH * num_heads / jnp.maximum(kept_BH.sum(axis=1, keepdims=True), 1)


def _stretched(share: Array) -> Array:
    return jnp.clip(share * (UPPER - LOWER) + LOWER, 0, 1)
