"""The pure step: it learns, its loss is the textbook's, and a broken step changes nothing and is named."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mha_jax.benchmarks.train_step import language_model
from mha_jax.models.losses import token_losses
from mha_jax.training.diagnosis import first_non_finite
from mha_jax.training.parallel import make_program
from mha_jax.training.step import init_state, train_step
from tests import tiny


def test_token_losses_are_cross_entropies_with_the_smoothed_target():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)).astype(np.float32), rng.integers(0, 7, (3, 5))
    log_probs = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    smoothed = 0.9 * np.eye(7)[targets] + 0.1 / 7
    objective, nll = token_losses(jnp.asarray(logits), jnp.asarray(targets), 0.1)
    np.testing.assert_allclose(objective, -(smoothed * log_probs).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(nll, -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0], rtol=1e-5)


@pytest.mark.parametrize(
    "task", ["lm", *(pytest.param(t, marks=pytest.mark.slow) for t in ("translation", "classification", "masked_lm"))]
)
def test_a_tiny_model_memorises_one_batch(task):
    rate = {"optimizer__learning_rate": 2e-2, "optimizer__schedule": "constant"}
    spec = tiny.run(task, model__d_ff=40, model__num_layers=1, **rate)
    batch = tiny.batches(spec, 1)[0]
    state, losses = init_state(spec), []
    step = jax.jit(functools.partial(train_step, spec))
    for _ in range(120):
        state, metrics = step(state, batch)
        losses.append(np.asarray(metrics["loss"]))
    assert (losses[-1] < 0.25 * losses[0]).all(), (losses[0], losses[-1])


@pytest.fixture
def optimised():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.slow
def test_a_seed_alone_takes_the_bits_that_it_takes_among_others(optimised):
    # A size at which the compiler, left to itself, fuses one seed otherwise than three.
    spec = language_model(num_heads=4, num_layers=1, d_model=32, d_ff=128, length=32, batch_size=8)
    alone, among = (dataclasses.replace(spec, seeds=seeds) for seeds in ((0,), (0, 1, 2)))
    ends = []
    for spec in (alone, among):
        program = make_program(spec, jax.devices()[:1])
        state = program.init()
        for batch in tiny.batches(spec, 2):
            state, _ = program.step(state, batch)
        ends.append(state)
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


@pytest.mark.slow
def test_positions_of_weight_0_do_not_count():
    spec = tiny.run("translation", seeds=(0,), model__num_layers=1)
    batch = tiny.batches(spec, 1)[0]
    hidden = batch["weights"] == 0
    assert hidden.any()
    other = {**batch, "targets": np.where(hidden, 5, batch["targets"])}
    step, state = jax.jit(functools.partial(train_step, spec)), init_state(spec)
    a, b = (step(state, each) for each in (batch, other))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a[0]["params"], b[0]["params"]))
    np.testing.assert_array_equal(a[1]["loss"], b[1]["loss"])


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_is_named():
    spec = tiny.run("lm", seeds=(0, 1))
    state = init_state(spec)
    kernel = state["params"]["decoder"]["blocks"][1]["feed_forward"]["up"]["kernel"]
    state["params"]["decoder"]["blocks"][1]["feed_forward"]["up"]["kernel"] = kernel.at[1].set(3e38)
    batch = tiny.batches(spec, 1)[0]
    after, metrics = jax.jit(functools.partial(train_step, spec))(state, batch)
    assert metrics["good"].tolist() == [True, False]
    same = jax.tree.map(lambda a, b: [bool((a[i] == b[i]).all()) for i in (0, 1)], after["params"], state["params"])
    kernels = jax.tree.leaves(same, is_leaf=lambda x: isinstance(x, list))
    assert all(seed_1 for _, seed_1 in kernels) and not all(seed_0 for seed_0, _ in kernels)
    where = first_non_finite(spec, state, 1, {name: leaf[1] for name, leaf in batch.items()})
    assert where == "the output of decoder layer 1"
