import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention import MultiHeadAttention
from mha_jax.attention.rotary import rotate
from mha_jax.specs import UserError

B, T, H, K = 2, 7, 3, 10


turned_by = jax.jit(rotate)  # op by op, each new shape would wait for a dozen compilations


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_a_layer_rotates_with_its_own_base():
    layer = MultiHeadAttention(11, 3, qk_dim=10, v_dim=5, rope=True, rope_base=50.0, rngs=nnx.Rngs(0))

    @jax.jit
    def program(x):
        q = layer.query(x)
        return layer.queries(x), rotate(q, jnp.arange(T), 50.0), rotate(q, jnp.arange(T))

    found, expected, otherwise = map(np.asarray, program(normal(B, T, 11)))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - otherwise).max() > 0.1


def test_rotation_is_multiplication_of_complex_pairs():
    x = normal(B, T, H, K)
    pairs = np.asarray(x, np.float64)[..., 0::2] + 1j * np.asarray(x, np.float64)[..., 1::2]
    angles = np.arange(T)[:, None] * 10000.0 ** (-2 * np.arange(K // 2) / K)
    turned = pairs * np.exp(1j * angles)[None, :, None, :]
    y = np.asarray(turned_by(x, np.arange(T)))
    np.testing.assert_allclose(y[..., 0::2], turned.real, atol=1e-5)
    np.testing.assert_allclose(y[..., 1::2], turned.imag, atol=1e-5)


def test_products_depend_on_the_difference_of_positions():
    q, k = normal(2, B, T, H, K)

    def products(shift):
        turned = turned_by(q, np.arange(T) + shift + 2), turned_by(k, np.arange(T) + shift)
        return np.einsum("bthk,bthk->bth", *turned)

    here, there = products(3), products(103)
    np.testing.assert_allclose(here, there, atol=1e-4)


def test_positions_may_differ_between_examples():
    x = normal(B, T, H, K)
    positions = np.stack([np.arange(T), np.arange(T)[::-1]])
    both, same = (np.asarray(turned_by(x, at)) for at in (positions, positions[1]))
    np.testing.assert_array_equal(both[1], same[1])


def test_bfloat16_angles_are_exact_at_long_positions():
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    expected = np.cos(4097.0) - np.sin(4097.0)
    assert abs(float(turned_by(x, np.array([4097]))[0, 0, 0, 0]) - expected) < 0.01


def test_odd_width_is_refused():
    with pytest.raises(UserError, match="qk_dim=3 must be even"):
        rotate(jnp.ones((1, 1, 1, 3)), jnp.arange(1))
