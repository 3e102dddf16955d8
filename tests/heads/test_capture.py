"""What is seen of a model's heads is what the model computes, and looking changes nothing."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention import Causal, MultiHeadAttention, Padding, Segments
from mha_jax.attention.statistics import HeadStatistics
from mha_jax.heads import HeadSums, attention_maps, attentions, head_statistics, watch
from mha_jax.heads.tensors import WHATS, capture
from mha_jax.models import build_model
from mha_jax.specs import UserError
from tests import tiny

B, T = 2, 7
BATCHES = {
    "lm": {
        "inputs": jnp.array([[5, 9, 7, 200, 11, 6, 8], [8, 4, 77, 12, 12, 4, 9]]),
        "segments": jnp.array([[0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1]]),
        "weights": jnp.array([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
    },
    "translation": {
        "source": jnp.array([[5, 9, 7, 2, 0], [8, 4, 2, 0, 0]]),
        "source_lengths": jnp.array([4, 3]),
        "target_inputs": jnp.array([[1, 6, 6, 5, 9, 9, 8], [1, 9, 4, 7, 0, 0, 0]]),
        "weights": jnp.array([[1.0] * 7, [1.0] * 4 + [0.0] * 3]),
    },
    "masked_lm": {
        "inputs": jnp.array([[5, 9, 3, 200, 11, 6, 8], [8, 3, 77, 12, 12, 4, 9]]),
        "lengths": jnp.array([6, 3]),
        "weights": jnp.array([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 7]),
    },
    "classification": {
        "inputs": jnp.array([[5, 9, 7, 200, 11, 6, 8], [8, 4, 77, 12, 12, 4, 9]]),
        "lengths": jnp.array([6, 3]),
        "weights": jnp.array([1.0, 0.0]),
    },
}
# Real queries a row, as lengths and weights say.
REAL = {
    "lm": {"decoder": (7, 4)},
    "translation": {"encoder": (4, 3), "decoder": (7, 4)},
    "masked_lm": {"encoder": (6, 0)},
    "classification": {"encoder": (6, 0)},
}
SHAPE = {"model__num_heads": (6, 0), "model__num_kv_heads": (2, 0)}


def build(task: str = "lm", **overrides: Any):
    """Queries twice as long as drawn, so that weights are far from even, and gates that are not 1."""
    model = build_model(tiny.run(task, **({"model__positions": "rope"} | SHAPE | overrides)), rngs=nnx.Rngs(0))
    for i, layer in enumerate(attentions(model).values()):
        layer.query.kernel[...] *= 2
        layer.gate[...] = jax.random.uniform(jax.random.key(i), layer.gate.shape)
    return model


def make_model(task: str = "lm", **overrides: Any):
    return nnx.jit(lambda: build(task, **overrides))()


def make_abstract(task: str = "lm", **overrides: Any):
    return nnx.eval_shape(lambda: build(task, **overrides))


class FromMaps(nnx.Module):
    """An attention that takes its weights as given."""

    def __init__(self, layer: MultiHeadAttention, weights: jax.Array):
        self.layer, self.weights = layer, nnx.Variable(weights)

    def __call__(self, x, memory=None, **_):
        _, v_BSGV = self.layer.keys_values(x if memory is None else memory)
        v_BSHV = v_BSGV[:, :, np.asarray(self.layer.shape.groups, int)]
        return self.layer.output(jnp.einsum("bhts,bshv->bthv", self.weights[...], v_BSHV))


def run(model, batch):
    names = [name for name in ("inputs", "source", "source_lengths", "target_inputs", "lengths") if name in batch]
    segments = {"segments": batch["segments"]} if "segments" in batch else {}
    return model(*(batch[name] for name in names), **segments)


@pytest.fixture(
    scope="module",
    params=[pytest.param(task, marks=pytest.mark.slow) for task in BATCHES],
)
def seen(request):
    """A model, its batch, its output when nobody looks, and what one program that looks gives."""

    def look(model, batch):
        output, _ = watch(model, batch, lambda name, attended: None)
        found = {"statistics": head_statistics(model, batch), "maps": attention_maps(model, batch)}
        return found | {"output": output, "tensors": capture(model, batch, WHATS)}

    model, batch = make_model(request.param), BATCHES[request.param]
    return request.param, model, batch, jax.jit(run)(model, batch), jax.jit(look)(model, batch)


def test_looking_does_not_change_the_output(seen):
    _, _, _, output, found = seen
    np.testing.assert_array_equal(found["output"], output)


def test_weights_among_the_tensors_are_those_of_the_maps(seen):
    found = seen[-1]
    for name, tensors in found["tensors"].items():
        np.testing.assert_allclose(tensors["weights"], found["maps"][name], atol=1e-6)


def test_model_that_takes_its_weights_from_the_maps_gives_the_same_output(seen):
    _, model, batch, output, found = seen
    model = nnx.clone(model)
    assert set(found["maps"]) == set(attentions(model))
    for name, weights in found["maps"].items():
        assert weights.dtype == jnp.float32
        kind, layer, place = name.split("/")
        block = getattr(model, kind).blocks[int(layer)]
        setattr(block, place, FromMaps(getattr(block, place), weights))
    np.testing.assert_allclose(jax.jit(run)(model, batch), output, atol=1e-5)


def test_statistics_are_means_over_real_queries_of_the_maps(seen):
    task, *_, found = seen
    for name, weights_BHTS in found["maps"].items():
        lengths = REAL[task][name.split("/")[0]]
        rows = zip(np.asarray(weights_BHTS, np.float64).swapaxes(1, 2), lengths, strict=True)
        w_NHS = np.concatenate([row[:length] for row, length in rows])
        t = np.concatenate([np.arange(length) for length in lengths])[:, None, None]
        s = np.arange(w_NHS.shape[2])[None, None]
        expected = {
            "entropy": -(w_NHS * np.log(np.where(w_NHS > 0, w_NHS, 1))).sum(-1),
            "max_weight": w_NHS.max(-1),
            "distance": (w_NHS * abs(t - s)).sum(-1),
            "first": w_NHS[..., 0],
            "diagonal": (w_NHS * (t == s)).sum(-1),
        }
        sums = found["statistics"][name]
        assert sums.count == sum(lengths)
        for measure, value in expected.items():
            np.testing.assert_allclose(getattr(sums.mean, measure), value.mean(0), atol=1e-5)


def test_layer_without_heads_gives_empty_arrays(seen):
    found = seen[-1]
    name = next(name for name in sorted(found["maps"]) if name.endswith("/1/attention"))
    assert found["statistics"][name].mean.entropy.shape == (0,)
    assert found["maps"][name].shape == (B, 0, T, T)


def test_chosen_layers_heads_and_examples_are_those_of_the_whole(seen):
    _, model, batch, _, found = seen
    layers = [name for name in found["maps"] if "/0/" in name][-1:]
    part = jax.jit(lambda m, b: attention_maps(m, b, layers=layers, heads=(4, 1), examples=[1]))(model, batch)
    assert list(part) == layers
    np.testing.assert_allclose(part[layers[0]], found["maps"][layers[0]][1:, np.array([4, 1])], atol=1e-6)


@pytest.mark.slow
def test_sums_of_two_batches_are_those_of_both_together(seen):
    _, model, whole, _, found = seen
    rows = ({name: x[row : row + 1] for name, x in whole.items()} for row in range(B))
    one, other = map(functools.partial(jax.jit(head_statistics), model), rows)
    added = jax.tree.map(jnp.add, one, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), added, found["statistics"])


def test_mean_of_no_queries_is_zero():
    none = HeadSums(HeadStatistics(*[jnp.zeros(3)] * 5), jnp.zeros((), jnp.int32))
    np.testing.assert_array_equal(np.asarray(none.mean), np.zeros((5, 3)))


def test_what_is_seen_is_each_attentions_own_rule():
    def rules(model, batch):
        return watch(model, batch, lambda name, attended: attended.visibility)[1]

    seen = {task: jax.eval_shape(rules, make_abstract(task), BATCHES[task]) for task in ("lm", "translation")}
    assert seen["translation"]["decoder/1/attention"] == Causal()
    assert isinstance(seen["translation"]["encoder/0/attention"], Padding)
    assert isinstance(seen["translation"]["decoder/0/cross_attention"], Padding)
    assert [type(part) for part in seen["lm"]["decoder/0/attention"].parts] == [Causal, Segments]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
def test_scanned_model_shows_the_same_parameters_layer_by_layer(remat):
    equal = {"model__num_heads": 3, "model__num_kv_heads": 1, "model__qk_dim": 4}
    scanned = make_model(**equal, model__layers="scan", model__remat=remat)
    plain = nnx.clone(scanned)
    plain.decoder.layers, plain.decoder.remat = "unrolled", "none"

    @jax.jit
    def look(model, batch):
        return watch(model, batch, lambda name, attended: attended.k_BSGK), run(model, batch)

    (output, found), itself = look(scanned, BATCHES["lm"])
    (_, expected), _ = look(plain, BATCHES["lm"])
    assert found.keys() == expected.keys() == attentions(scanned).keys()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_allclose(output, itself, atol=1e-5)


def test_looking_leaves_the_model_as_it_was():
    model = make_model(model__layers="scan", model__remat="block")
    # Only the batch is traced, so that what looking did to the model would stay.
    jax.eval_shape(lambda batch: watch(model, batch, lambda name, attended: None)[0], BATCHES["lm"])
    assert (model.decoder.layers, model.decoder.remat) == ("scan", "block")
    assert all(isinstance(layer, MultiHeadAttention) for layer in attentions(model).values())


def test_statistics_never_hold_the_square_of_a_long_text():
    model = make_abstract(model__max_length=2048, model__num_heads=2, model__num_kv_heads=2)
    text = jax.jit(head_statistics).lower(model, {"inputs": jnp.ones((1, 2048), jnp.int32)}).as_text()
    assert "2048x" in text and "2048x2048" not in text


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"layers": ["decoder/2/attention"]},
            "there is no attention 'decoder/2/attention'; there are decoder/0/attention, decoder/1/attention",
        ),
        ({"layers": ["decoder/0/attention"], "heads": [6]}, "decoder/0/attention has no head 6; there are 6, 0 to 5"),
        ({"layers": ["decoder/1/attention"], "heads": [0]}, "decoder/1/attention has no head 0; there are none"),
        ({"examples": [-1]}, "the batch has no example -1; there are 2, 0 to 1"),
    ],
)
def test_choice_that_does_not_exist_is_refused(choice, message):
    with pytest.raises(UserError, match=message):
        attention_maps(make_abstract(), BATCHES["lm"], **choice)


@pytest.mark.parametrize("section", [{"model__routing__kind": "moh"}, {"model__adaptive_span__max_span": 8}])
def test_heads_that_a_router_or_a_span_changes_are_refused(section):
    model = make_abstract(model__num_heads=4, model__num_kv_heads=4, **section)
    with pytest.raises(UserError, match="changes what its heads do for each token"):
        head_statistics(model, {"inputs": jnp.ones((1, 5), jnp.int32)})
