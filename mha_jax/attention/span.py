"""A learned span of attention for each head (Sukhbaatar et al. 2019): a soft mask that falls to 0 with the distance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mha_jax.attention.attend import Choice, check_call, note_backend
from mha_jax.attention.backends import einsum
from mha_jax.attention.dropout import keys_per_example
from mha_jax.attention.rule import PerHead, Rule
from mha_jax.attention.visibility import SlidingWindow
from mha_jax.specs import SpanSpec


class AdaptiveSpan(nnx.Module):
    """The spans of one attention's heads, z[h] = max_span * fraction[h]; the parameter is `fraction` [H], 0 to 1.

    m_z(x) = clamp((ramp + z - x) / ramp, 0, 1) for a key x = |t - s| away                  (eq. 4)
    w[b,h,t,s] = m(|t-s|) exp(l[b,h,t,s]) / sum over visible s' of m(|t-s'|) exp(l[b,h,t,s'])  (eq. 5)

    A fraction that a step takes out of 0 to 1 counts as the nearer end, and has a gradient only towards the inside.
    """

    def __init__(self, spec: SpanSpec, num_heads: int, *, param_dtype: DTypeLike) -> None:
        assert spec.max_span is not None
        self.max_span, self.ramp = spec.max_span, spec.ramp
        self.fraction = nnx.Param(jnp.full(num_heads, spec.init, param_dtype))

    def lengths(self) -> Float[Array, "H"]:
        """z, in tokens."""
        return self.max_span * _projected(self.fraction[...])

    def mask(self, t: Array, s: Array) -> Float[Array, "H T S"]:
        """m of every head for queries at positions t [T] and keys at s [S]."""
        z_H11 = self.lengths()[:, None, None]
        distance_1TS = abs(t[:, None] - s[None, :])[None].astype(z_H11.dtype)
        return jnp.clip((self.ramp + z_H11 - distance_1TS) / self.ramp, 0, 1)

    def attend(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        visibility: Rule,
        *,
        first_query: int | Array = 0,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
        groups: tuple[int, ...],
    ) -> Float[Array, "B T H V"]:
        """Attention within the spans, over the whole square at once; queries are at first_query and on."""
        call = check_call(q, k, v, visibility, groups, dropout_rate)
        note_backend(call, Choice("einsum (adaptive span)", {}))
        factor_HTS = self.mask(first_query + jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
        return einsum.attend(
            q,
            k,
            v,
            rule=visibility,
            dropout_rate=dropout_rate,
            dropout_keys=None if dropout_key is None else keys_per_example(dropout_key, q.shape[0]),
            scale=q.shape[-1] ** -0.5,
            groups=groups,
            factor_HTS=factor_HTS,
        )

    def windows(self) -> tuple[int, ...]:
        """How many tokens each head sees to one side, itself included: further away m is exactly 0."""
        return tuple(math.ceil(z) for z in np.asarray(self.ramp + self.lengths(), np.float64))

    def rule(self) -> Rule:
        """The windows as a rule: what it hides has weight 0 anyway; its `describe` tells what tiles would be paid."""
        return PerHead(*map(SlidingWindow, self.windows()))


@jax.custom_vjp
def _projected(fraction: Array) -> Array:
    return jnp.clip(fraction, 0, 1)


def _projected_forward(fraction: Array) -> tuple[Array, Array]:
    return _projected(fraction), fraction


def _projected_backward(fraction: Array, gradient: Array) -> tuple[Array]:
    # A step goes against the gradient. Without this, a span that falls to 0 would have no way back.
    outward = ((fraction <= 0) & (gradient > 0)) | ((fraction >= 1) & (gradient < 0))
    return (jnp.where(outward, 0, gradient),)


_projected.defvjp(_projected_forward, _projected_backward)
