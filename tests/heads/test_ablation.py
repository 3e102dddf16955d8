"""Ablations that reuse what lies below agree with a gate of 0 in the whole model, and effects are told with their p."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from mha_jax.heads import attentions
from mha_jax.heads.ablation import Ablated, _donors, head_means, keep_one, leave_one_out
from mha_jax.heads.capture import real_queries
from mha_jax.heads.prefix import run_prefix, with_gates
from mha_jax.models import build_model
from mha_jax.models.losses import example_sums
from mha_jax.reporting.statistics import holm
from mha_jax.specs import UserError
from tests import tiny

# Heads differ from layer to layer, as groups do; one layer has none.
SHAPES = {
    "lm": {
        "model__num_heads": (3, 0, 3),
        "model__num_kv_heads": (1, 0, 1),
        "model__num_layers": 3,
        "model__use_bias": True,
    },
    "translation": {
        "model__num_heads": {"encoder": (4, 2), "decoder": (2, 2), "cross": (4, 4)},
        "model__num_kv_heads": {"encoder": (2, 2), "decoder": (1, 1), "cross": (2, 2)},
        "model__norm": "post",
        "data__buckets": (13,),
    },
    "masked_lm": {"model__norm": "post", "model__embedding_norm": True, "model__activation": "gelu_exact"},
    "classification": {"model__num_heads": (4, 1), "model__positions": "rope", "model__pooling": "first"},
}


@functools.partial(jax.jit, static_argnums=0)
def _sums(task, model, batch, gates):
    return example_sums(task, with_gates(model, gates), batch)


def ones(model):
    return {name: jnp.ones_like(layer.gate[...]) for name, layer in attentions(model).items()}


def build(task: str, **overrides):
    """A model whose gates are not 1 and whose attention is not even, and two batches of different shapes or values."""
    run = tiny.run(task, seeds=(0,), **(SHAPES[task] | overrides))

    @nnx.jit
    def made():
        model = build_model(run, rngs=nnx.Rngs(0))
        for i, layer in enumerate(attentions(model).values()):
            layer.query.kernel[...] *= 2
            layer.gate[...] = jax.random.uniform(jax.random.key(i), layer.gate.shape, layer.gate.dtype, 0.5, 1.5)
        return model

    batches = [{name: jnp.asarray(leaf[0]) for name, leaf in batch.items()} for batch in tiny.batches(run, 2)]
    return made(), batches


@functools.cache
def made(task: str):
    return build(task)


def by_hand(task, model, batches, name, gates_NH):
    """Loss and correct targets of every example, by the whole model with the gates of one attention set."""
    rows = []
    for gate_H in gates_NH:
        sums = [_sums(task, model, batch, {**ones(model), name: gate_H}) for batch in batches]
        rows.append({key: np.concatenate([np.asarray(s[key]) for s in sums]) for key in ("loss", "correct")})
    return {key: np.stack([row[key] for row in rows]) for key in ("loss", "correct")}


@pytest.mark.parametrize("task", ["lm", *(pytest.param(task, marks=pytest.mark.slow) for task in list(SHAPES)[1:])])
def test_every_head_left_out_is_the_whole_model_with_its_gate_at_0(task):
    model, batches = made(task)
    found = leave_one_out(task, model, batches)
    for name, layer in attentions(model).items():
        heads = layer.shape.num_heads
        assert found.sums["loss"][name].shape[0] == heads
        if heads:
            expected = by_hand(task, model, batches, name, 1 - np.eye(heads, dtype=np.float32))
            # Two compilations of float32: an example's loss is a sum of some 60 nats, whose last bit is 4e-6.
            np.testing.assert_allclose(found.sums["loss"][name], expected["loss"], rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(found.sums["correct"][name], expected["correct"])
            assert np.abs(found.sums["loss"][name] - found.whole["loss"][None]).max() > 1e-3


@pytest.mark.slow
def test_ablations_are_exact_in_float64():
    with jax.enable_x64(True):
        model, batches = build("lm", model__dtype="float64")
        found = keep_one("lm", model, batches)
        for name, layer in attentions(model).items():
            if layer.shape.num_heads:
                expected = by_hand("lm", model, batches, name, np.eye(layer.shape.num_heads))
                np.testing.assert_allclose(found.sums["loss"][name], expected["loss"], rtol=1e-13)


@pytest.mark.slow
def test_one_head_kept_alone_is_the_layer_itself_where_there_is_one_head():
    model, batches = made("classification")
    found = keep_one("classification", model, batches, names=["encoder/1/attention", "encoder/0/attention"])
    assert list(found.sums["loss"]) == ["encoder/1/attention", "encoder/0/attention"]
    np.testing.assert_allclose(found.sums["loss"]["encoder/1/attention"][0], found.whole["loss"], rtol=1e-6)
    expected = by_hand("classification", model, batches, "encoder/0/attention", np.eye(4, dtype=np.float32))
    np.testing.assert_allclose(found.sums["loss"]["encoder/0/attention"], expected["loss"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_many_gate_vectors_run_in_turns_and_come_back_in_order():
    model, batches = made("classification")
    prefix = run_prefix("classification", model, batches[0])
    gates = np.random.default_rng(0).uniform(size=(19, 4)).astype(np.float32)
    found = prefix.ablate("encoder/0/attention", jnp.asarray(gates))
    expected = by_hand("classification", model, batches[:1], "encoder/0/attention", gates)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6, atol=1e-6)


def test_a_mean_stands_for_a_head_as_a_bias_would():
    model, batches = made("lm")
    name = "decoder/2/attention"
    means = head_means("lm", model, batches)
    outputs = [run_prefix("lm", model, batch).outputs(name) for batch in batches]
    real = [np.asarray(real_queries(model, batch)["decoder"]) for batch in batches]
    expected = np.concatenate([np.asarray(o)[r] for o, r in zip(outputs, real, strict=True)]).mean(axis=0)
    np.testing.assert_allclose(means[name], expected, rtol=1e-5, atol=1e-6)
    assert means["decoder/1/attention"].shape[0] == 0
    # What head 1 puts out on average goes through its rows of the projection, as a constant would.
    biased = nnx.clone(model)
    layer = attentions(biased)[name]
    shift_D = attentions(model)[name].gate[1] * jnp.asarray(means[name], jnp.float32)[1] @ layer.out.kernel[1]
    layer.out.bias[...] += shift_D
    without = {**ones(model), name: np.array([1, 0, 1], np.float32)}
    found = leave_one_out("lm", model, batches, instead="mean", names=[name])
    expected = np.concatenate([np.asarray(_sums("lm", biased, batch, without)["loss"]) for batch in batches])
    np.testing.assert_allclose(found.sums["loss"][name][1], expected, rtol=1e-6, atol=1e-6)


def test_uniform_is_a_head_without_a_query():
    model, batches = made("lm")
    name = "decoder/2/attention"
    without = nnx.clone(model)
    query = attentions(without)[name].query
    query.kernel[...] = query.kernel[...].at[:, 1].set(0)
    query.bias[...] = query.bias[...].at[1].set(0)
    found = leave_one_out("lm", model, batches, instead="uniform", names=[name])
    expected = np.concatenate([np.asarray(_sums("lm", without, batch, ones(model))["loss"]) for batch in batches])
    np.testing.assert_allclose(found.sums["loss"][name][1], expected, rtol=1e-6, atol=1e-6)
    assert np.abs(expected - found.whole["loss"]).max() > 1e-3


def test_resampling_takes_a_head_from_real_positions_of_another_example():
    task, name = "lm", "decoder/0/attention"
    model, batches = made(task)
    found = leave_one_out(task, model, batches, instead="resample", names=[name], seed=3)
    again = leave_one_out(task, model, batches, instead="resample", names=[name], seed=3)
    other = leave_one_out(task, model, batches, instead="resample", names=[name], seed=4)
    np.testing.assert_array_equal(found.sums["loss"][name], again.sums["loss"][name])
    assert np.abs(found.sums["loss"][name] - other.sums["loss"][name]).max() > 1e-3
    # Where all examples are one, another example's head is the head itself: whatever its padding holds.
    batch = {key: jnp.broadcast_to(leaf[:1], leaf.shape) for key, leaf in batches[0].items()}
    batch["weights"] = jnp.ones_like(batch["weights"])
    same = leave_one_out(task, model, [batch, batch], instead="resample", names=[name])
    np.testing.assert_allclose(same.sums["loss"][name], same.whole["loss"][None].repeat(3, 0), rtol=1e-6)


def test_outputs_come_from_the_next_example_in_a_ring_counted_round_its_real_positions():
    real = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    rows_B1, positions_BT = _donors(jnp.asarray(real), np.random.default_rng(0))
    donors = rows_B1[:, 0].tolist()
    assert sorted(donors) == [0, 1, 2, 3]
    assert all(donor != row for row, donor in enumerate(donors) if row != 1)
    turns = {0: [0, 1, 3, 0], 1: positions_BT[1].tolist(), 2: [0, 0, 0, 0], 3: [0, 1, 2, 3]}
    assert positions_BT.tolist() == [turns[donor] for donor in donors]


def test_resampling_needs_another_example():
    model, batches = made("lm")
    alone = {**batches[0], "weights": jnp.zeros_like(batches[0]["weights"]).at[2].set(1)}
    with pytest.raises(UserError, match="another example in the batch; this one has 1 with targets"):
        leave_one_out("lm", model, [alone], instead="resample")


def test_differences_are_a_target_and_p_values_those_of_a_paired_test_without_padding():
    name, none = "decoder/0/attention", {"decoder/1/attention": np.zeros((0, 4))}
    whole = {"loss": np.array([2.0, 3, 4, 0]), "correct": np.array([1.0, 0, 2, 0]), "weight": np.array([2.0, 1, 3, 0])}
    loss = {name: np.array([[2.5, 3.25, 4.75, 0], [2, 3, 4, 0]]), **none}
    correct = {name: np.array([[0.0, 0, 2, 0], [1, 0, 2, 0]]), **none}
    effects = Ablated(whole, {"loss": loss, "correct": correct}, np.array([0, 0, 1, 1]))
    table = effects.table("loss")
    np.testing.assert_allclose(table.values[name], [[0.25, 0], [0.25, 0]])
    assert table.weights.tolist() == [3, 3]
    np.testing.assert_allclose(effects.table("accuracy").values[name], [[-1 / 3, 0], [0, 0]])
    expected = stats.ttest_rel([2.5, 3.25, 4.75], [2, 3, 4]).pvalue
    p_values = effects.p_values("loss")
    np.testing.assert_allclose(p_values[name], [expected, 1.0])
    assert p_values["decoder/1/attention"].shape == (0,)
    assert table.p_values is not None
    np.testing.assert_allclose(table.p_values[name], [2 * expected, 1.0])
    with pytest.raises(UserError, match="metric='bleu' is not one of"):
        effects.table("bleu")


def test_p_values_of_a_table_are_adjusted_as_reports_adjust_theirs():
    rng = np.random.default_rng(0)
    whole = {key: np.ones(9) for key in ("loss", "correct", "weight")}
    loss = {f"decoder/{i}/attention": 1 + 0.1 * i + 0.3 * rng.normal(size=(2 + i, 9)) for i in range(4)}
    effects = Ablated(whole, {"loss": loss, "correct": loss}, np.arange(9) // 3)
    raw = np.concatenate(list(effects.p_values().values()))
    adjusted = effects.table().p_values
    assert adjusted is not None
    assert [len(p) for p in adjusted.values()] == [2, 3, 4, 5]
    np.testing.assert_allclose(np.concatenate(list(adjusted.values())), holm(raw.tolist()))


def test_what_does_not_exist_is_refused():
    model, batches = made("lm")
    with pytest.raises(UserError, match="there is no attention 'decoder/3/attention'; there are decoder/0/attention"):
        leave_one_out("lm", model, batches, names=["decoder/3/attention"])
    with pytest.raises(UserError, match="instead='noise' is not one of"):
        leave_one_out("lm", model, batches, instead="noise")
    with pytest.raises(UserError, match=r"gates of decoder/0/attention have shape \(2, 5\); \[N, H=3\] would do"):
        run_prefix("lm", model, batches[0]).ablate("decoder/0/attention", jnp.ones((2, 5)))
    with pytest.raises(UserError, match="no batch with a target"):
        leave_one_out("lm", model, []).table()
