import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mha_jax.specs import OptimizerSpec
from mha_jax.training.optimizers import decayed, learning_rate, make_optimizer


def rates(spec, d_model, steps, counts):
    schedule = jax.jit(learning_rate(spec, d_model, steps))
    return np.asarray([schedule(jnp.asarray(count)) for count in counts], np.float64)


def test_vaswani_rates_are_those_of_section_5_3():
    spec = OptimizerSpec(name="adam", learning_rate=1.0, schedule="vaswani", warmup_steps=4000)
    expected = [512**-0.5 * min(n**-0.5, n * 4000**-1.5) for n in (1, 1000, 4000, 4001, 100_000)]
    np.testing.assert_allclose(rates(spec, 512, 100_000, [0, 999, 3999, 4000, 99_999]), expected, rtol=1e-5)
    assert expected[2] == pytest.approx(6.99e-4, rel=1e-3)


def test_vaswani_rate_is_multiplied_by_learning_rate():
    spec = OptimizerSpec(name="adam", learning_rate=2.0, schedule="vaswani", warmup_steps=7)
    np.testing.assert_allclose(rates(spec, 11, 50, [0]), [2.0 * 11**-0.5 * 7**-1.5], rtol=1e-5)


def test_cosine_warms_up_peaks_and_ends_at_the_final_fraction():
    spec = OptimizerSpec(learning_rate=0.4, schedule="cosine", warmup_steps=4, final_fraction=0.25)
    # n = 1, 2, 4: rising; n = 8: a quarter of the 16 decaying steps; n = 12: half; n = 20 and after: the end.
    quarter = 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi / 4))
    expected = [0.1, 0.2, 0.4, 0.4 * quarter, 0.4 * 0.625, 0.1, 0.1]
    np.testing.assert_allclose(rates(spec, 11, 20, [0, 1, 3, 7, 11, 19, 40]), expected, rtol=1e-5)


def test_constant_stays_after_warmup():
    spec = OptimizerSpec(learning_rate=0.3, schedule="constant", warmup_steps=3)
    np.testing.assert_allclose(rates(spec, 11, 20, [0, 1, 2, 3, 19]), [0.1, 0.2, 0.3, 0.3, 0.3], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_no_warmup_starts_at_the_peak(schedule):
    spec = OptimizerSpec(learning_rate=0.3, schedule=schedule, warmup_steps=0)
    np.testing.assert_allclose(rates(spec, 11, 1000, [0]), [0.3], rtol=1e-4)


@pytest.mark.parametrize("schedule", ["vaswani", "constant", "cosine"])
def test_a_run_shorter_than_its_warmup_has_finite_rising_rates(schedule):
    spec = OptimizerSpec(name="adam", schedule=schedule, warmup_steps=100)
    found = rates(spec, 11, 5, range(5))
    assert np.all(np.isfinite(found)) and np.all(np.diff(found) > 0)


def make_params():
    return {
        "layers": [
            {
                "query": {
                    "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(11, 3, 5)), jnp.float32),
                    "bias": jnp.ones((3, 5)),
                }
            }
        ],
        "norm": {"scale": jnp.ones(11), "bias": jnp.ones(11)},
        "embedding": {"embedding": jnp.ones((13, 11))},
        "positions": {"embedding": jnp.ones((7, 11))},
    }


def test_weight_decay_reaches_kernels_only():
    flags = jax.tree.leaves_with_path(decayed(make_params()))
    assert [jax.tree_util.keystr(path) for path, flag in flags if flag] == ["['layers'][0]['query']['kernel']"]


def test_first_update_is_adam_by_hand_plus_decay_of_kernels():
    spec = OptimizerSpec(
        learning_rate=0.01, schedule="constant", warmup_steps=0, beta1=0.9, beta2=0.98, epsilon=1e-3, weight_decay=0.1
    )
    params = make_params()
    grads = jax.tree.map(lambda p: 0.5 * p + 0.1, params)
    optimizer = make_optimizer(spec, 11, 20)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)

    # At the first update the corrected moments are the gradient and its square.
    def by_hand(p, g, decay):
        return -0.01 * (g / (jnp.abs(g) + 1e-3) + decay * p)

    expected = jax.tree.map(lambda p, g, flag: by_hand(p, g, 0.1 if flag else 0.0), params, grads, decayed(params))
    for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_second_update_uses_both_betas():
    spec = OptimizerSpec(name="adam", learning_rate=1.0, schedule="constant", warmup_steps=0, beta1=0.5, beta2=0.75)
    optimizer = make_optimizer(spec, 11, 20)
    params = {"kernel": jnp.zeros((1, 1))}
    state = optimizer.init(params)
    for gradient in (1.0, 3.0):
        updates, state = optimizer.update({"kernel": jnp.full((1, 1), gradient)}, state, params)
    first = (0.5 * 0.5 * 1.0 + 0.5 * 3.0) / (1 - 0.5**2)
    second = (0.75 * 0.25 * 1.0 + 0.25 * 9.0) / (1 - 0.75**2)
    np.testing.assert_allclose(updates["kernel"], [[-first / math.sqrt(second)]], rtol=1e-5)


def test_clipping_bounds_the_global_norm():
    # A large epsilon makes Adam nearly linear, so that clipping shows.
    spec = OptimizerSpec(
        name="adam", learning_rate=1.0, schedule="constant", warmup_steps=0, epsilon=1e4, clip_norm=0.5
    )
    optimizer = make_optimizer(spec, 11, 20)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
    grads = {"a": jnp.asarray([2.0, 0.0, 0.0]), "b": jnp.asarray(1.5)}
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5 / 1e4, rtol=1e-3)
    np.testing.assert_allclose(updates["a"][0], -0.4 / 1e4, rtol=1e-3)


def test_seeds_stacked_under_vmap_equal_seeds_one_by_one():
    spec = OptimizerSpec(learning_rate=0.01, warmup_steps=2, weight_decay=0.1, clip_norm=0.5)
    optimizer = make_optimizer(spec, 11, 20)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), make_params())
    grads = jax.tree.map(lambda p: p**2, params)
    update = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))
    stacked, _ = jax.jit(jax.vmap(update))(grads, params)
    for r in range(3):
        single, _ = update(*jax.tree.map(lambda x: x[r], (grads, params)))  # noqa: B023
        for found, wanted in zip(jax.tree.leaves(stacked), jax.tree.leaves(single), strict=True):
            np.testing.assert_allclose(found[r], wanted, rtol=1e-6)
