"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mha_jax.specs import UserError


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    positions: Int[Array, "T"] | Int[Array, "#B T"],
    base: float = 10000.0,
) -> Float[Array, "B T H K"]:
    """Turns each pair of neighbouring features by an angle that grows with the position (Su et al. 2021, eq. 34).

      (x[2i], x[2i+1]) -> (x[2i] cos a - x[2i+1] sin a, x[2i] sin a + x[2i+1] cos a),  a = position * base ** (-2i / K)

    The product of a rotated query and a rotated key then depends on the difference of their positions alone. Angles
    are in float32 at least, whatever the type of x.

    Args:   positions: [T], the same in every example, or [B, T].
    Raises: UserError for odd K.
    """
    width = x_BTHK.shape[-1]
    if width % 2:
        raise UserError(f"rotary positions turn pairs of features: qk_dim={width} must be even")
    wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    rates_I = base ** (-jnp.arange(0, width, 2, dtype=wide) / width)
    positions_bT = positions.reshape((-1, positions.shape[-1])).astype(wide)
    angles_bT1I = positions_bT[:, :, None, None] * rates_I[None, None, None, :]
    cos, sin = jnp.cos(angles_bT1I), jnp.sin(angles_bT1I)
    even, odd = x_BTHK[..., 0::2].astype(wide), x_BTHK[..., 1::2].astype(wide)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x_BTHK.shape).astype(x_BTHK.dtype)
