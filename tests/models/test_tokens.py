"""The scores of tokens where they are computed in narrow numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention.target import made_for
from mha_jax.models.tokens import _wide_scores


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_scores_of_narrow_numbers_and_their_slopes_are_those_of_wide_ones(platform):
    x, table, slopes = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 8), (13, 8), (5, 13)])
    )
    exact, pull = jax.vjp(lambda x, table: x @ table.T, x, table)
    with made_for(platform):
        found, pull_narrow = jax.vjp(
            functools.partial(_wide_scores, jnp.dtype("float32")), x.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
        )
        narrow = pull_narrow(slopes)
    assert found.dtype == jnp.float32 and found.shape == exact.shape
    # bfloat16 rounds at 4e-3, and each number is the sum of up to 13 products near 1.
    for mine, expected in zip((found, *narrow), (exact, *pull(slopes)), strict=True):
        np.testing.assert_allclose(mine.astype(jnp.float32), expected, atol=0.1)
