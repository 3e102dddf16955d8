"""Rollout and flow of three tokens through two layers, worked out by hand."""

import numpy as np
import pytest

from mha_jax.heads.rollout import flow, mixed, rollout
from mha_jax.specs import UserError

# Layer 1 has two heads, whose mean is [1 0 0; .5 .5 0; 0 .5 .5]; layer 2 has one, where all look at the first token.
FIRST = np.array([[[1.0, 0, 0], [1, 0, 0], [0, 1, 0]], [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]])
SECOND = np.array([[[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]])


def test_a_layer_is_the_mean_of_its_heads_beside_the_residual_stream():
    np.testing.assert_allclose(mixed(FIRST), [[1, 0, 0], [0.25, 0.75, 0], [0, 0.25, 0.75]])
    np.testing.assert_allclose(mixed(FIRST, residual=0.0), [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]])
    np.testing.assert_allclose(mixed(np.zeros((0, 3, 3))), np.eye(3))
    np.testing.assert_allclose(mixed(np.zeros((1, 3, 3)), residual=0.0), np.eye(3))


def test_rollout_is_the_product_of_the_layers():
    first, second = rollout([FIRST, SECOND])
    np.testing.assert_allclose(first, mixed(FIRST))
    # Row 2: half of row 0 of the first layer, half of its row 2.
    np.testing.assert_allclose(second, [[1, 0, 0], [0.625, 0.375, 0], [0.5, 0.125, 0.375]])
    np.testing.assert_allclose(second.sum(axis=1), 1)


def test_flow_is_as_wide_as_the_narrowest_edges_on_the_way():
    # From position 2 after layer 2: half goes to position 0, whose only token is 0; half to position 2, which passes on
    # 0.25 to token 1 and 0.75 to token 2: the flow to token 2 is min(0.5, 0.75), to token 1 min(0.5, 0.25).
    found = flow([FIRST, SECOND])
    np.testing.assert_allclose(found, [[1, 0, 0], [0.5 + 0.25, 0.5, 0], [0.5, 0.25, 0.5]], atol=1e-6)


def test_a_residual_that_is_no_share_is_refused():
    with pytest.raises(UserError, match=r"residual=1.5 must lie between 0 and 1"):
        rollout([FIRST], residual=1.5)
