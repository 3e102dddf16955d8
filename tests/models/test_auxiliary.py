"""Losses beside the task's: they are what their equations say, over real tokens, however layers are run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp, softmax

from mha_jax.attention import Causal
from mha_jax.attention.routing import routes
from mha_jax.models import build_model
from mha_jax.models.auxiliary import auxiliary_losses, observations
from mha_jax.models.cache import cached_step, empty_cache
from mha_jax.models.losses import loss_sums
from tests import tiny

MOH = {"model__routing__kind": "moh", "model__routing__shared": 1, "model__routing__top_k": 2}
MOA = {"model__routing__kind": "moa", "model__routing__top_k": 3, "model__num_kv_heads": 1}
WEIGHTS = {"model__routing__balance_weight": 0.5, "model__routing__z_weight": 0.25}
SPANS = {"model__adaptive_span__max_span": 9, "model__adaptive_span__ramp": 3, "model__adaptive_span__init": 0.5}


def looked_into(spec, model, batch):
    with routes() as found:
        loss = loss_sums(spec.task, model, batch, None, 0.0)["loss"]
    losses = auxiliary_losses(spec, model, batch, found, lambda tree: tree)
    return loss, losses, observations(spec, model, batch, found), found


@functools.cache
def built(task="lm", **options):
    """A tiny run, its model, one batch for one seed, and what is seen of it."""
    spec = tiny.run(task, seeds=(0,), **options)
    batch = {name: jnp.asarray(leaf[0]) for name, leaf in tiny.batches(spec, 1)[0].items()}
    model = build_model(spec, rngs=nnx.Rngs(0))
    return spec, model, batch, jax.jit(functools.partial(looked_into, spec))(model, batch)


def real_tokens(task, batch):
    if task == "lm":
        return [np.asarray(batch["weights"] > 0)] * 2
    width = np.arange(batch["source"].shape[1])
    decoder = np.asarray(batch["weights"] > 0)
    encoder = (width[None] < np.asarray(batch["source_lengths"])[:, None]) & decoder.any(1, keepdims=True)
    return [encoder] * 2 + [decoder] * 4


@pytest.mark.parametrize(
    ("task", "options"),
    [("lm", MOA), pytest.param("translation", MOH, marks=pytest.mark.slow)],
    ids=["lm, moa", "translation, moh"],
)
def test_routing_losses_are_their_equations_over_real_tokens(task, options):
    spec, _, batch, (_, losses, seen, found) = built(task, **options, **WEIGHTS)
    balance, squares = [], []
    for route, real in zip(found, real_tokens(task, batch), strict=True):
        scores, chosen = (np.asarray(x, np.float64)[real] for x in (route.scores_BTE, route.chosen_BTE))
        used = chosen.mean(0) / (spec.model.routing.top_k if spec.model.routing.kind == "moa" else 1)
        balance.append(scores.shape[1] * (used * softmax(scores, axis=-1).mean(0)).sum())
        squares.append((logsumexp(scores, axis=-1) ** 2).mean())
    # Tolerance: float32 means of a hundred numbers.
    np.testing.assert_allclose(losses["balance_loss"], 0.5 * np.mean(balance), rtol=1e-5)
    np.testing.assert_allclose(losses["router_loss"], 0.25 * np.mean(squares), rtol=1e-5)
    active = [value for name, value in seen.items() if name.startswith("active_heads/")]
    np.testing.assert_allclose(active, [3.0] * len(found), rtol=1e-6)


def test_spans_are_summed_over_layers_and_told_by_name():
    spec, model, _, (_, losses, seen, found) = built(**SPANS)
    assert found == []
    np.testing.assert_allclose(losses["span_loss"], spec.model.adaptive_span.weight * 2 * 4.5, rtol=1e-6)
    assert {name: float(value) for name, value in seen.items()} == {
        "span/decoder/0/attention": 4.5,
        "span/decoder/1/attention": 4.5,
    }
    assert model.decoder.blocks[0].attention.span.windows() == (8,) * 4


def test_a_plain_model_has_nothing_beside_its_loss():
    _, model, _, (_, losses, seen, found) = built()
    assert (losses, seen, found) == ({}, {}, [])
    assert model.decoder.blocks[0].attention.router is None and model.decoder.blocks[0].attention.span is None


@pytest.mark.slow
@pytest.mark.parametrize("way", [("scan", "none"), ("scan", "dots"), ("unrolled", "attention"), ("unrolled", "block")])
def test_scanned_and_rematerialised_layers_hand_out_the_same_routes(way):
    plain = built(**MOH)[-1]
    other = built(**MOH, model__layers=way[0], model__remat=way[1])[-1]
    # Tolerance: float32 rounding of two programs.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), plain, other)


@pytest.mark.slow
def test_gradients_of_the_balance_loss_go_through_scans_and_checkpoints():
    def slopes(**options):
        spec, model, batch, _ = built(**MOH, **options)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        loss = lambda params: looked_into(spec, nnx.merge(graph, params, rest), batch)[1]["balance_loss"]  # noqa: E731
        return jax.jit(jax.grad(loss))(params)["decoder"]["blocks"][0]["attention"]["router"]["kernel"][...]

    plain = slopes()
    assert float(jnp.abs(plain).max()) > 1e-5
    np.testing.assert_allclose(slopes(model__layers="scan", model__remat="dots"), plain, rtol=1e-4, atol=1e-8)


@pytest.mark.slow
def test_a_cached_step_routes_and_spans_as_the_whole_stack_does():
    _, model, batch, _ = built(**MOH, **SPANS)
    x = model.tokens.embed(batch["inputs"][:2])
    whole, cache = jax.jit(lambda x: model.decoder(x, Causal()))(x), empty_cache(model.decoder, 2, x.shape[1])
    step = jax.jit(lambda x, position, cache: cached_step(model.decoder, x, position, cache))
    for position in range(x.shape[1]):
        y, cache = step(x[:, position, None], jnp.array(position), cache)
        # Tolerance: float32 sums in another order through two layers.
        np.testing.assert_allclose(y[:, 0], whole[:, position], atol=1e-5)
