"""Every measure of a head is what its definition says, for every task, with grouped heads and a layer without any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.heads.ablation import keep_one, leave_one_out
from mha_jax.heads.capture import attention_maps, attentions
from mha_jax.heads.gradients import gate_gradients, mean_sizes
from mha_jax.heads.importance import ATTENTION, GRADIENTS, MEASURES, importance
from mha_jax.heads.norms import NORMS
from mha_jax.heads.shapley import layer_shapley
from mha_jax.heads.spread import attention_spread
from mha_jax.models import build_model
from mha_jax.models.losses import example_sums
from mha_jax.specs import EOS, UserError
from tests import tiny

CHEAP = (*NORMS, *ATTENTION, *GRADIENTS)
MQA = {"model__num_layers": 1, "model__num_heads": 3, "model__num_kv_heads": 1}
SHAPE = {"model__num_heads": (6, 0), "model__num_kv_heads": (2, 0)}


def make(task="lm", num_batches=2, **overrides):
    """A model with gates that are not 1, and batches of one shape with an EOS within and padding at the end."""
    spec = tiny.run(task, seeds=(0,), **(SHAPE | overrides))

    def build():
        model = build_model(spec, rngs=nnx.Rngs(0))
        for i, layer in enumerate(attentions(model).values()):
            layer.query.kernel[...] *= 2
            layer.gate[...] = jax.random.uniform(jax.random.key(i), layer.gate.shape, layer.gate.dtype, 0.5, 1.5)
        return model

    every = len(spec.data.buckets or (0,))
    drawn = tiny.batches(spec, num_batches * every)[::every]
    return spec, nnx.jit(build)(), [_with_ends({name: x[0] for name, x in batch.items()}) for batch in drawn]


def _with_ends(batch):
    for name in {"inputs", "source"} & batch.keys():
        batch[name][:, 2] = EOS
    batch["weights"][-1] = 0
    batch["weights"][0] = 1
    return {name: jnp.asarray(leaf) for name, leaf in batch.items()}


@pytest.fixture(
    scope="module",
    params=[pytest.param(task, marks=pytest.mark.slow) for task in ("lm", "translation", "classification")],
)
def exact(request):
    """A task, a float64 model and its batch, and what one program finds in them."""

    def look(model, batch):
        gradients = gate_gradients(task, model, batch), mean_sizes(task, model, batch)
        return *gradients, attention_spread(model, batch), attention_maps(model, batch)

    task = request.param
    with jax.enable_x64(True):
        _, model, (batch, _) = make(task, model__dtype="float64")
        return task, model, batch, jax.jit(look)(model, batch)


def test_gradients_are_finite_differences_of_each_examples_loss(exact):
    task, model, batch, (gradients, *_) = exact

    @jax.jit
    def losses(model, gates):
        for layer, gate in zip(attentions(model).values(), gates, strict=True):
            layer.gate[...] = gate
        sums = example_sums(task, model, batch)
        return sums["loss"] / jnp.maximum(sums["weight"], 1)

    with jax.enable_x64(True):
        gates = [np.asarray(layer.gate[...]) for layer in attentions(model).values()]
        for place, name in enumerate(attentions(model)):
            found_BH = gradients[name]
            for head in range(found_BH.shape[1]):
                moved = [
                    [g * (1 + step * (np.arange(len(g)) == head)) if i == place else g for i, g in enumerate(gates)]
                    for step in (1e-4, -1e-4)
                ]
                difference_B = (losses(model, moved[0]) - losses(model, moved[1])) / 2e-4
                # The error of a central difference is of the order of the step squared.
                np.testing.assert_allclose(found_BH[:, head], difference_B, atol=1e-7, err_msg=f"{name} {head}")
        assert all(np.abs(x_BH).max(axis=0).min() > 1e-5 for x_BH in gradients.values() if x_BH.size)


def test_sizes_are_taken_before_the_mean_over_examples_with_targets(exact):
    _, _, batch, (gradients, (sizes, count), *_) = exact
    counted_B = np.asarray(batch["weights"]).reshape(len(batch["weights"]), -1).any(axis=1)
    assert count == counted_B.sum() < len(counted_B)
    for name, x_BH in gradients.items():
        x_BH = np.asarray(x_BH)
        np.testing.assert_array_equal(x_BH[~counted_B], 0)
        np.testing.assert_allclose(sizes[name], np.abs(x_BH[counted_B]).mean(axis=0))


def test_spread_is_that_of_the_attention_maps(exact):
    task, _, batch, (*_, found, maps) = exact
    for name, (confidence_H, variance_H) in found.items():
        w_BHTS = np.asarray(maps[name], np.float64)
        real_BT = _real(task, batch, name.split("/")[0])
        rows = [w.swapaxes(0, 1)[real] for w, real in zip(w_BHTS, real_BT, strict=True)]
        count = sum(map(len, rows))
        confidence = sum(w_THS.max(axis=2).sum(axis=0) for w_THS in rows) / count
        variance = sum(len(w_THS) * w_THS.var(axis=0).sum(axis=1) for w_THS in rows if len(w_THS)) / count
        # Statistics are float32, and sums of about a hundred weights.
        np.testing.assert_allclose(confidence_H, confidence, atol=1e-6)
        np.testing.assert_allclose(variance_H, variance, atol=1e-6)
        assert variance_H.size == 0 or variance.min() > 1e-3


def _real(task, batch, stack):
    batch = {name: np.asarray(x) for name, x in batch.items()}
    if stack == "decoder":
        tokens = batch["inputs" if task == "lm" else "target_inputs"]
        return (batch["weights"] > 0) & (tokens != EOS)
    words, lengths = ("source", "source_lengths") if task == "translation" else ("inputs", "lengths")
    inside = np.arange(batch[words].shape[1]) < batch[lengths][:, None]
    counted = np.array([np.any(row > 0) for row in batch["weights"]])
    return inside & counted[:, None] & (batch[words] != EOS)


@pytest.mark.slow
def test_head_that_looks_alike_from_everywhere_has_no_variance():
    _, model, (batch, _) = make("classification", **MQA)
    for layer in attentions(model).values():
        layer.query.kernel[...] = layer.query.kernel[...].at[:, 1].set(0)
    for _, variance_H in jax.jit(attention_spread)(model, batch).values():
        assert variance_H[1] < 1e-6 < 1e-4 < variance_H[0]


@pytest.fixture(scope="module")
def measured():
    spec, model, batches = make(num_batches=3)
    return spec, model, batches, importance("lm", model, batches, CHEAP)


def test_norms_are_those_of_each_heads_own_slices(measured):
    _, model, _, tables = measured
    layer = attentions(model)["decoder/0/attention"]
    query, key, value, out = (np.asarray(x.kernel[...]) for x in (layer.query, layer.key, layer.value, layer.out))
    for h, group in enumerate((0, 0, 0, 1, 1, 1)):
        slices = [query[:, h], key[:, group], value[:, group], float(layer.gate[h]) * out[h]]
        expected = [np.linalg.norm(x) for x in slices]
        found = [tables[measure].mean["decoder/0/attention"][h] for measure in NORMS]
        np.testing.assert_allclose(found, [*expected, np.linalg.norm(expected)], rtol=1e-6)


def test_every_measure_is_a_table_of_all_heads(measured):
    _, model, _, tables = measured
    assert tuple(tables) == CHEAP
    for measure, table in tables.items():
        assert {name: len(x) for name, x in table.mean.items()} == {
            name: layer.shape.num_heads for name, layer in attentions(model).items()
        }
        assert table.exact == measure.endswith("norm")
        assert table.exact or all((error > 0).all() for error in table.standard_error.values())


def test_batches_weigh_as_much_as_they_hold(measured):
    _, _, batches, tables = measured
    np.testing.assert_array_equal(tables["confidence"].weights, [np.sum(batch["weights"]) for batch in batches])
    counted = [np.any(np.asarray(batch["weights"]) > 0, axis=1).sum() for batch in batches]
    np.testing.assert_array_equal(tables["gradient"].weights, counted)


def test_normalised_gradients_of_a_layer_have_norm_one_and_keep_their_order(measured):
    tables = measured[-1]
    name = "decoder/0/attention"
    raw, normalised = tables["gradient"], tables["gradient_normalised"]
    norm = np.linalg.norm(raw.mean[name])
    np.testing.assert_allclose(np.linalg.norm(normalised.mean[name]), 1)
    np.testing.assert_allclose(normalised.standard_error[name] * norm, raw.standard_error[name])


def test_norm_times_variance_is_their_product(measured):
    tables = measured[-1]
    for name, product in tables["norm_variance"].mean.items():
        np.testing.assert_allclose(product, tables["norm"].mean[name] * tables["variance"].mean[name])


@pytest.mark.slow
def test_ablations_are_signed_so_that_more_is_more_important():
    spec, model, batches = make(**MQA)
    layers = ["decoder/0/attention"]
    tables = importance(spec.task, model, batches, MEASURES, layers)
    assert all(list(table.mean) == layers for table in tables.values())
    removed, alone = (ablation(spec.task, model, batches, names=layers) for ablation in (leave_one_out, keep_one))
    name = layers[0]
    np.testing.assert_array_equal(tables["leave_one_out"].mean[name], removed.table().mean[name])
    np.testing.assert_array_equal(tables["leave_one_out_accuracy"].mean[name], -removed.table("accuracy").mean[name])
    np.testing.assert_array_equal(tables["keep_one"].mean[name], -alone.table().mean[name])
    np.testing.assert_array_equal(tables["keep_one"].p_values[name], alone.table().p_values[name])
    for measure in ("mean", "uniform", "resample"):
        other = leave_one_out(spec.task, model, batches, instead=measure, names=layers).table()
        np.testing.assert_array_equal(tables[measure].mean[name], other.mean[name])
    np.testing.assert_array_equal(tables["shapley"].mean[name], layer_shapley("lm", model, batches).mean[name])


@pytest.mark.parametrize(
    ("batches", "measures", "message"),
    [
        (0, MEASURES, "importance needs data: there is no batch"),
        (1, MEASURES, "importance over 1 batch has no error bar; give at least 2"),
        (2, ("norm", "relevance"), "there is no measure 'relevance'; there are query_norm, key_norm"),
    ],
)
def test_what_cannot_be_measured_is_refused(measured, batches, measures, message):
    spec, model, given, _ = measured
    with pytest.raises(UserError, match=message):
        importance(spec.task, model, given[:batches], measures)
