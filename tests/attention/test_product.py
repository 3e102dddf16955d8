import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention.product import dot_general, product
from mha_jax.attention.target import made_for


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("widths", [(24, 8), (8, 24)], ids=["narrowing", "widening"])
def test_its_values_and_gradients_are_those_of_a_plain_product(widths):
    x, kernel, dy = drawn(0, 6, widths[0]), drawn(1, *widths), drawn(2, 6, widths[1])
    y, pull = jax.vjp(product, x, kernel)
    dx, dkernel = pull(dy)
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    for found, expected in ((y, x @ kernel), (dx, dy @ kernel.T), (dkernel, x.T @ dy)):
        np.testing.assert_allclose(found, expected, atol=2e-5)  # sums of 24 products in float32


@pytest.mark.parametrize(("platform", "copies"), [("cpu", 1), ("tpu", 0)])
def test_a_narrowing_product_copies_its_rows_for_the_gradient_on_cpu_alone(platform, copies):
    with made_for(platform):
        gradient = jax.jit(jax.grad(lambda kernel, x: product(x, kernel).sum()))
        text = gradient.lower(drawn(1, 24, 8), drawn(0, 6, 24)).as_text()
    assert len(re.findall("optimization_barrier", text)) == copies


def test_as_a_dot_general_it_takes_any_axes_in_front():
    x, kernel = drawn(0, 2, 3, 5), drawn(1, 5, 4)
    np.testing.assert_allclose(dot_general(x, kernel), jnp.einsum("abi,io->abo", x, kernel), atol=1e-5)
