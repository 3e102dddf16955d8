"""Shapley values against every order of a small game, and against losses of a model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.heads import attentions
from mha_jax.heads.prefix import with_gates
from mha_jax.heads.shapley import exact_values, layer_shapley, model_shapley, sampled_values
from mha_jax.models import build_model
from mha_jax.models.losses import example_sums
from mha_jax.specs import UserError
from tests import tiny

PLAYERS = 5
_WORTH = np.random.default_rng(0).normal(size=2**PLAYERS)


def worth(members):
    """Any number for every coalition: a game without structure."""
    return _WORTH[members.astype(int) @ (1 << np.arange(PLAYERS))]


def by_orders(value, players):
    """The definition: what each adds, averaged over all orders."""
    found = np.zeros(players)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        members = np.zeros((1, players), bool)
        for p in order:
            before = value(members)[0]
            members[0, p] = True
            found[p] += value(members)[0] - before
    return found / len(orders)


def test_exact_values_are_the_mean_over_all_orders():
    found = exact_values(worth, PLAYERS)
    np.testing.assert_allclose(found, by_orders(worth, PLAYERS), rtol=1e-12)
    assert found.sum() == pytest.approx(_WORTH[-1] - _WORTH[0], rel=1e-12)


def test_sampled_values_sum_to_the_whole_in_every_order_and_come_within_their_error():
    found = sampled_values(worth, PLAYERS, 400, np.random.default_rng(1))
    np.testing.assert_allclose(found.sum(axis=1), _WORTH[-1] - _WORTH[0], rtol=1e-12)
    error = found.std(axis=0, ddof=1) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - exact_values(worth, PLAYERS)) < 4 * error).all()
    np.testing.assert_array_equal(found, sampled_values(worth, PLAYERS, 400, np.random.default_rng(1)))


@pytest.mark.parametrize("players", [1, 2])
def test_games_of_one_and_two(players):
    def value(members):
        return members.sum(axis=1) ** 2.0

    np.testing.assert_allclose(exact_values(value, players), players)
    np.testing.assert_allclose(sampled_values(value, players, 3, np.random.default_rng(0)).sum(axis=1), players**2)


def test_too_many_heads_for_exact_values_are_refused_with_the_way_out():
    with pytest.raises(UserError, match=r"13 heads need 2\^13 coalitions; at most 12 .* sampled by permutations"):
        exact_values(lambda members: members.sum(axis=1), 13)
    with pytest.raises(UserError, match="permutations"):
        sampled_values(worth, PLAYERS, 0, np.random.default_rng(0))


@pytest.fixture(scope="module")
def opened():
    run = tiny.run("lm", seeds=(0,), model__num_heads=(3, 0), model__num_kv_heads=(1, 0))
    model = nnx.jit(lambda: build_model(run, rngs=nnx.Rngs(0)))()
    return model, [{name: jnp.asarray(leaf[0]) for name, leaf in batch.items()} for batch in tiny.batches(run, 2)]


def gained(model, batch, names):
    """Nats a target that these attentions bring, by the whole model with their gates at 1 and at 0."""
    off = {name: jnp.zeros(attentions(model)[name].shape.num_heads) for name in names}
    losses = [
        float(jax.jit(example_sums, static_argnums=0)("lm", m, batch)["loss"].sum() / batch["weights"].sum())
        for m in (with_gates(model, off), model)
    ]
    return losses[0] - losses[1]


@pytest.mark.slow
def test_values_of_a_layers_heads_sum_to_what_the_layer_brings(opened):
    model, batches = opened
    exact = layer_shapley("lm", model, batches)
    sampled = layer_shapley("lm", model, batches, permutations=2, names=["decoder/0/attention"])
    expected = [gained(model, batch, ["decoder/0/attention"]) for batch in batches]
    # Differences of float32 losses of about 6 nats.
    np.testing.assert_allclose(exact.values["decoder/0/attention"].sum(axis=1), expected, atol=2e-6)
    np.testing.assert_allclose(sampled.values["decoder/0/attention"].sum(axis=1), expected, atol=2e-6)
    assert exact.values["decoder/1/attention"].shape == (2, 0)
    assert np.abs(exact.values["decoder/0/attention"] - sampled.values["decoder/0/attention"]).max() > 0


@pytest.mark.slow
def test_values_of_all_heads_sum_to_what_they_bring_together(opened):
    model, batches = opened
    found = model_shapley("lm", model, batches, permutations=3)
    expected = [gained(model, batch, ["decoder/0/attention", "decoder/1/attention"]) for batch in batches]
    total = sum(values.sum(axis=1) for values in found.values.values())
    np.testing.assert_allclose(total, expected, atol=2e-6)
    # All heads are in one layer: the two games are one.
    exact = layer_shapley("lm", model, batches, names=["decoder/0/attention"])
    np.testing.assert_allclose(
        found.mean["decoder/0/attention"], exact.mean["decoder/0/attention"], atol=3 * np.ptp(_values(found)) + 1e-4
    )
    with pytest.raises(UserError, match="there is no attention 'decoder/9/attention'"):
        layer_shapley("lm", model, batches, names=["decoder/9/attention"])


def _values(table):
    return np.concatenate([x.ravel() for x in table.values.values()])
