"""The floor has the products of the model, each once forward and twice backward."""

import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.benchmarks import floor, train_step
from mha_jax.benchmarks.train_step import language_model
from mha_jax.models import cost


def dot_flops(jaxpr):
    """Two FLOPs a multiply-add, over every matrix product of a jaxpr and of those inside of it."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        total += sum(dot_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def small(num_heads):
    return language_model(num_heads, num_layers=2, d_model=12, d_ff=29, length=7, batch_size=3)


def chain(run):
    x_ND = jax.random.normal(jax.random.key(0), (3 * 7, 12))
    return (lambda weights, x: floor.forward(run, weights, x)), (floor.draw_weights(run), x_ND)


@pytest.mark.parametrize("num_heads", [1, 3, 12])
def test_forward_products_are_those_of_the_cost_model(num_heads):
    run = small(num_heads)
    function, inputs = chain(run)
    assert dot_flops(jax.make_jaxpr(function)(*inputs).jaxpr) == 3 * 7 * cost.flops_per_token(run)


def test_backward_costs_twice_the_forward_and_nothing_is_left_out():
    run = small(3)
    function, inputs = chain(run)

    def both(inputs, cotangent):
        out, pull = jax.vjp(function, *inputs)
        return out, pull(cotangent)

    jaxpr = jax.make_jaxpr(both)(inputs, jnp.ones((3 * 7, 260)))
    assert dot_flops(jaxpr.jaxpr) == 3 * 3 * 7 * cost.flops_per_token(run)


def test_values_stay_far_from_overflow_and_from_denormals_which_slow_a_product_down():
    run = language_model(4, num_layers=4, d_model=32, d_ff=64, length=32, batch_size=2)
    for leaf in jax.tree.leaves(train_step.floor_step(run, jax.devices()[:1])()):
        assert np.isfinite(leaf).all()
        assert 1e-12 < np.abs(leaf).mean() < 1e12
