"""Gates: the formulas of hard concrete, their gradients, and what dropped heads do to the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention import MultiHeadAttention
from mha_jax.attention.gates import HardConcreteGate, drop_heads, make_gate, uniform
from mha_jax.attention.multihead import Gate

LOG_ALPHA = np.array([-4.0, -2.41, -2.39, -0.5, 0.0, 1.0, 2.39, 2.41, 5.0])


def gate_of(log_alpha):
    gate = HardConcreteGate(len(log_alpha), 0.0, jnp.asarray(log_alpha).dtype)
    gate.log_alpha[...] = jnp.asarray(log_alpha)
    return gate


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_drawn_gates_follow_the_formula_of_the_released_code():
    u = np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, len(LOG_ALPHA))
    stretched = sigmoid((np.log(u) - np.log(1 - u) + LOG_ALPHA) / 0.33) * 1.2 - 0.1
    # Tolerance: float32 logits of u near 1 lose some 1e-6; a wrong constant shows at 1e-2.
    drawn = gate_of(LOG_ALPHA.astype(np.float32)).drawn(jnp.asarray(u, jnp.float32))
    np.testing.assert_allclose(drawn, np.clip(stretched, 0, 1), atol=1e-5)


def test_evaluated_gates_are_exactly_0_below_and_exactly_1_above_2_40():
    gates = np.asarray(gate_of(LOG_ALPHA.astype(np.float32))())
    assert (gates[:2] == 0).all() and (gates[-2:] == 1).all()
    assert ((gates[2:-2] > 0) & (gates[2:-2] < 1)).all()
    np.testing.assert_allclose(gates[3:6], sigmoid(LOG_ALPHA[3:6]) * 1.2 - 0.1, rtol=1e-5)


def test_the_probability_of_an_open_gate_is_how_often_draws_are_not_0():
    gate, draws = gate_of(LOG_ALPHA.astype(np.float32)), 40_000
    uniform_NH = uniform(jax.random.key(0), draws * len(LOG_ALPHA), jnp.float32).reshape(draws, -1)
    often_H = np.asarray(jax.jit(jax.vmap(gate.drawn))(uniform_NH) != 0).mean(axis=0)
    probability_H = np.asarray(gate.open_probability())
    # Five standard errors of a mean of so many draws.
    assert (np.abs(often_H - probability_H) <= 5 * np.sqrt(probability_H * (1 - probability_H) / draws) + 1e-5).all()
    np.testing.assert_allclose(probability_H, sigmoid(LOG_ALPHA - 0.33 * np.log(0.1 / 1.1)), rtol=1e-5)


@pytest.mark.parametrize("what", ["drawn", "evaluated", "open_probability"])
def test_gradients_are_those_of_finite_differences_in_float64(what):
    with jax.enable_x64(True):
        log_alpha = jnp.asarray([-1.3, -0.2, 0.4, 1.7])
        u = jnp.asarray([0.7, 0.5, 0.42, 0.2])

        def value(log_alpha):
            gate = gate_of(log_alpha)
            found = {"drawn": lambda: gate.drawn(u), "evaluated": gate, "open_probability": gate.open_probability}
            return found[what]()

        step = 1e-6
        slopes = jax.jit(jax.vmap(jax.grad(lambda a, i: value(a)[i]), (None, 0)))(log_alpha, jnp.arange(4)).diagonal()
        ends = [np.asarray(jax.jit(value)(np.asarray(log_alpha) + h)) for h in (step, -step)]
        central = (ends[0] - ends[1]) / (2 * step)
    assert (np.abs(central) > 1e-3).all()
    # Tolerance: central differences are off by step ** 2 and by rounding, 1e-16 / step.
    np.testing.assert_allclose(slopes, central, rtol=1e-7)


def test_dropped_heads_leave_a_sum_of_H_and_a_mean_of_1_less_all_dropped():
    heads, rate, examples = 3, 0.4, 30_000
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(examples))
    factor_BH = np.asarray(jax.jit(lambda keys_B: drop_heads(keys_B, heads, rate))(keys_B))
    sums_B = factor_BH.sum(axis=1)
    np.testing.assert_allclose(sums_B[sums_B > 0], heads, rtol=1e-6)
    np.testing.assert_allclose((factor_BH == 0).mean(axis=0), rate, atol=0.015)
    np.testing.assert_allclose(factor_BH.mean(axis=0), 1 - rate**heads, atol=0.03)


@pytest.mark.parametrize("kind", ["scalar", "hard_concrete"])
def test_a_learned_gate_of_0_is_zeroed_rows_of_out(kind):
    layer = MultiHeadAttention(11, 3, qk_dim=2, v_dim=5, rngs=nnx.Rngs(0))
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 11)), jnp.float32)
    run = nnx.jit(lambda layer: layer(x_BTD))  # op by op, each shape would wait for dozens of compilations
    gate = make_gate(kind, 3, 5.0, jnp.float32)
    param = gate.log_alpha if isinstance(gate, HardConcreteGate) else gate.scale
    param[...] = jnp.asarray([1.0, 0.0, 1.0] if kind == "scalar" else [5.0, -5.0, 5.0])
    layer.learned_gate = gate
    gated = run(layer)
    layer.gate = Gate(jnp.ones((2, 3)))  # as it is while a step drops heads of each example
    np.testing.assert_array_equal(run(layer), gated)
    layer.gate = Gate(jnp.ones(3))
    layer.learned_gate = None
    layer.out.kernel[...] = layer.out.kernel[...].at[1].set(0)
    np.testing.assert_array_equal(gated, run(layer))
