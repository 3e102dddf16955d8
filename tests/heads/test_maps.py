"""Maps of single examples are those of the whole batch without padding; what heads do together is made from them."""

import jax
import numpy as np
import pytest

from mha_jax.data.tokenizers import ByteTokenizer
from mha_jax.heads import attention_maps, attentions
from mha_jax.heads.examples import example, numbered
from mha_jax.heads.maps import example_maps
from mha_jax.heads.rollout import flow, rollout
from mha_jax.specs import UserError
from tests.heads.test_capture import BATCHES, make_model

BYTES = ByteTokenizer()
BATCH = BATCHES["translation"]
# The same model in programs of other shapes: a few float32 roundings.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model():
    return make_model("translation", model__num_heads=3, model__num_kv_heads=3)


@pytest.fixture(scope="module")
def second(model):
    return numbered([BATCH], model, BYTES, "validation", [1])[0]


@pytest.mark.slow
def test_an_example_has_the_tokens_of_its_row_without_padding(second):
    assert second.name == "validation 1"
    assert second.tokens["encoder"] == [chr(4), chr(0), "[end]"]
    assert second.sides("cross") == (second.tokens["decoder"], second.tokens["encoder"])
    assert second.sides("decoder") == (second.tokens["decoder"],) * 2 and len(second.tokens["decoder"]) == 4


def test_maps_are_those_of_the_batch_cut_to_its_tokens(model, second):
    whole = jax.jit(attention_maps)(model, BATCH)
    found = {(one.attention, one.head): one.weights_TS for one in example_maps(model, second)}
    for name in attentions(model):
        rows, columns = map(len, second.sides("cross" if "cross" in name else name.split("/")[0]))
        weights_HTS = np.asarray(whole[name])[1, :, :rows, :columns]
        for h in range(3):
            np.testing.assert_allclose(found[name, h], weights_HTS[h], atol=ATOL)
        np.testing.assert_allclose(found[name, "mean"], weights_HTS.mean(axis=0), atol=ATOL)
    stack = [np.stack([found[f"encoder/{layer}/attention", h] for h in range(3)]) for layer in range(2)]
    np.testing.assert_allclose(found["encoder/1/attention", "rollout"], rollout(stack)[1], atol=ATOL)
    np.testing.assert_allclose(found["encoder/1/attention", "flow"], flow(stack), atol=ATOL)
    assert ("encoder/0/attention", "flow") not in found and ("decoder/0/cross_attention", "rollout") not in found


@pytest.mark.slow
def test_a_text_too_long_for_all_heads_at_once_has_the_chosen_ones_alone(model, second, monkeypatch):
    monkeypatch.setattr("mha_jax.heads.maps._AT_ONCE", 10)
    whole = {(one.attention, one.head): one.weights_TS for one in example_maps(model, second, heads=[2, 0])}
    assert list(whole) == [(name, h) for name in attentions(model) for h in (2, 0)]
    monkeypatch.undo()
    chosen = example_maps(model, second, layers=["decoder/1/attention"], heads=[2], flow_tokens=3)
    again = {one.head: one.weights_TS for one in chosen}
    assert list(again) == [2, "mean", "rollout"]
    np.testing.assert_allclose(whole["decoder/1/attention", 2], again[2], atol=ATOL)


def test_examples_count_on_over_batches_and_past_rows_that_only_fill_one(model):
    padded = BATCH | {"weights": BATCH["weights"].at[0].set(0)}
    found = numbered([padded, BATCH], model, BYTES, "test", [2, 0])
    assert [one.name for one in found] == ["test 2", "test 0"]
    np.testing.assert_array_equal(found[1].batch["source"], BATCH["source"][1:])
    np.testing.assert_array_equal(found[0].batch["source"], BATCH["source"][1:])
    with pytest.raises(UserError, match="test has no example 3; there are 3, 0 to 2"):
        numbered([padded, BATCH], model, BYTES, "test", [3])


def test_tokens_of_an_encoder_are_named_where_only_some_are_predicted():
    model = make_model("masked_lm", model__num_heads=1, model__num_kv_heads=1, model__num_layers=1)
    one = {name: leaf[:1] for name, leaf in BATCHES["masked_lm"].items()}
    assert list(example("text", model, one, BYTES).tokens) == ["encoder"]
    assert example("text", model, one, BYTES).tokens["encoder"][2] == "[mask]"


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"heads": [3]}, "encoder/0/attention has no head 3; there are 3, 0 to 2"),
        ({"layers": ["encoder/2/attention"]}, "there is no attention 'encoder/2/attention'"),
        ({"residual": 1.5}, "residual=1.5 must lie between 0 and 1"),
    ],
)
def test_what_does_not_exist_is_refused(model, second, choice, fault):
    with pytest.raises(UserError, match=fault):
        list(example_maps(model, second, **choice))
