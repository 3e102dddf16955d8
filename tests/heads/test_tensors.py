"""The named tensors of heads add up to what the model computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.heads import attention_maps, attentions
from mha_jax.heads.capture import watch
from mha_jax.heads.tensors import WHATS, capture
from mha_jax.specs import UserError
from tests.heads.test_capture import BATCHES, make_abstract, make_model

# float32, sums of some ten products of numbers near 1: a few roundings of 1e-7 each.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model():
    return make_model("translation", model__attention_dropout_rate=0.4, model__use_bias=True)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.slow
def test_heads_add_up_to_the_output_of_every_layer(model, dropout):
    batch = BATCHES["translation"]
    keys = jax.random.split(jax.random.key(3), 2) if dropout else None

    def both(model):
        def whole(name, attended):
            layer, *inputs = attended
            return layer.output(layer.attended(*inputs))

        outputs = watch(model, batch, whole, dropout_keys=keys)[1]
        return outputs, capture(model, batch, WHATS, dropout_keys=keys)

    outputs, found = jax.jit(both)(model)
    assert set(found) == set(outputs) == set(attentions(model))
    for name, layer in attentions(model).items():
        parts = np.asarray(found[name]["head_output_residual"]).sum(axis=2) + np.asarray(layer.out.bias[...])
        np.testing.assert_allclose(parts, outputs[name], atol=ATOL)
        zeros = {what: float((np.asarray(found[name][what]) == 0).sum()) for what in WHATS}
        lost = zeros["weights_after_dropout"] > zeros["weights"]
        assert lost == (dropout and layer.shape.num_heads > 0)


def test_only_what_is_chosen_is_there(model):
    batch = BATCHES["translation"]
    what = ("logits", "head_output")
    found = jax.jit(
        lambda model: capture(model, batch, what, layers=["decoder/0/cross_attention"], heads=[5, 1], examples=[1])
    )(model)
    assert {name: set(tensors) for name, tensors in found.items()} == {"decoder/0/cross_attention": set(what)}
    tensors = found["decoder/0/cross_attention"]
    assert tensors["logits"].shape == (1, 2, 7, 5)
    assert tensors["head_output"].shape[:3] == (1, 7, 2)
    maps = jax.jit(lambda model: attention_maps(model, batch))(model)["decoder/0/cross_attention"]
    weights = np.exp(tensors["logits"])
    np.testing.assert_allclose(weights / weights.sum(-1, keepdims=True), maps[1:][:, [5, 1]], atol=ATOL)
    assert np.isneginf(tensors["logits"][..., 3:]).all()  # the source has 3 tokens


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"what": ["weight"]}, "there is no tensor 'weight'; there are logits, weights"),
        ({"heads": [6]}, "has no head 6; there are 6, 0 to 5"),
        ({"examples": [2]}, "has no example 2; there are 2, 0 to 1"),
        ({"layers": ["decoder/9/attention"]}, "there is no attention 'decoder/9/attention'"),
    ],
)
def test_what_does_not_exist_is_named(model, arguments, fault):
    arguments = {"layers": ["encoder/0/attention"], **arguments}
    with pytest.raises(UserError, match=fault):
        capture(model, BATCHES["translation"], **arguments)


@pytest.mark.slow
def test_one_head_of_a_long_text_takes_little_more_than_its_own_weights():
    heads = {"model__num_layers": 4, "model__num_heads": 12, "model__num_kv_heads": 12, "model__max_length": 4096}
    model, batch = make_abstract(**heads), {"inputs": jax.ShapeDtypeStruct((1, 4096), jnp.int32)}

    def look(what):
        def seen(model, batch):
            found = {}
            if what:
                found = capture(model, batch, what, layers=["decoder/2/attention"], heads=[3])
            return watch(model, batch, lambda name, attended: None, [])[0], found

        used = jax.jit(seen).lower(model, batch).compile().memory_analysis()
        return used.temp_size_in_bytes + used.output_size_in_bytes

    extra = look(("weights",)) - look(())
    assert 2**26 <= extra < 200e6  # the weights are 64 MiB


def test_a_long_map_is_that_of_its_rows():
    from mha_jax.attention import Causal, SlidingWindow, statistics

    q, k = (jax.random.normal(jax.random.key(i), (1, 1100, 2, 4)) for i in range(2))
    rule = Causal() & SlidingWindow(100)
    found = statistics.attention_weights(q, k, rule, heads=[1])
    logits = jnp.where(rule.mask(1100, 1100)[0, 0], q[0, :, 1] @ k[0, :, 1].T / 2, -jnp.inf)
    np.testing.assert_allclose(found[0, 0], jax.nn.softmax(logits), atol=ATOL)
