"""Heads that are alike form clusters, and taking one out is told by the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.heads import attentions
from mha_jax.heads.redundancy import clusters, dendrogram, find_twins, measure_effects, written_grams
from mha_jax.heads.similarity import Head, Pairs
from mha_jax.models import build_model
from mha_jax.models.losses import example_sums
from tests import tiny
from tests.heads.test_similarity import copy_head

NAME = "decoder/0/attention"
HEADS = tuple(Head(NAME, h) for h in range(4))


def pairs_of(distance):
    return Pairs("js", HEADS, HEADS, np.asarray(distance, float), None)


PLANTED = pairs_of([[0, 0.1, 0.9, 0.8], [0.1, 0, 0.7, 0.9], [0.9, 0.7, 0, 0.3], [0.8, 0.9, 0.3, 0]])


def test_clusters_are_heads_within_the_cut():
    assert clusters(PLANTED, 0.2) == [HEADS[:2], HEADS[2:3], HEADS[3:]]
    assert clusters(PLANTED, 0.4) == [HEADS[:2], HEADS[2:]]
    assert clusters(PLANTED, 1.0) == [HEADS]
    assert dendrogram(PLANTED)[-1, 2] == pytest.approx(np.mean([0.9, 0.8, 0.7, 0.9]))


def test_a_single_head_is_a_cluster():
    alone = Pairs("js", HEADS[:1], HEADS[:1], np.zeros((1, 1)), None)
    assert dendrogram(alone).shape == (0, 4)
    assert clusters(alone, 0.2) == [HEADS[:1]]


def test_the_head_that_writes_less_goes_and_no_twin_that_stays():
    gram = np.diag([4.0, 1.0, 9.0, 16.0])
    gram[0, 1] = gram[1, 0] = 1.0
    found = find_twins(PLANTED, {NAME: gram}, 0.2)
    assert [(one.head.number, one.twin.number, one.redundant) for one in found] == [(1, 0, True), (2, 3, False)]
    assert (found[0].share, found[0].scale) == (0.25, 0.25)
    assert len(find_twins(PLANTED, {NAME: gram}, 0.2, limit=1)) == 1


@pytest.fixture(scope="module")
def measured():
    """Head 1 writes half of what head 0 writes; and the loss of the whole model and without head 1."""
    spec = tiny.run(model__num_layers=1)
    model = nnx.jit(lambda: build_model(spec, rngs=nnx.Rngs(0)))()
    layer = attentions(model)[NAME]
    copy_head(layer, 0, 1)
    layer.out.kernel[...] = 4 * layer.out.kernel[...].at[1].multiply(0.5)
    batches = [{name: jnp.asarray(x[0]) for name, x in batch.items()} for batch in tiny.batches(spec, 3)]
    twins = find_twins(PLANTED, written_grams(model, batches), 0.2)
    loss = jax.jit(lambda model, batch: {k: v.sum() for k, v in example_sums("lm", model, batch).items()})

    def mean_loss():
        sums = [loss(model, batch) for batch in batches]
        return sum(float(one["loss"]) for one in sums) / sum(float(one["weight"]) for one in sums)

    whole, result = mean_loss(), measure_effects("lm", model, batches, twins)
    layer.gate[...] = layer.gate[...].at[1].set(0)
    return twins, result, mean_loss() - whole


@pytest.mark.slow
def test_least_squares_finds_the_scale(measured):
    (one, *_), _, _ = measured
    assert (one.head.number, one.twin.number) == (1, 0)
    np.testing.assert_allclose((one.scale, one.share), (0.5, 1), rtol=1e-5)


@pytest.mark.slow
def test_effect_is_the_loss_without_the_head(measured):
    _, result, difference = measured
    one = result.suggestions[0]
    # Losses of about 5 nats in float32, summed over some hundred targets.
    assert one.pruned.mean == pytest.approx(difference, abs=2e-6)
    assert abs(difference) > 1e-4 and one.pruned.standard_error > 0
    assert result.together == one.pruned and result.random is not None


@pytest.mark.slow
def test_merging_a_multiple_into_its_twin_costs_nothing(measured):
    _, result, _ = measured
    assert result.suggestions[0].merged is not None
    assert abs(result.suggestions[0].merged.mean) < 2e-6
