"""Gates of a whole model: how many heads they leave, what they cost, and what a step draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.heads import attentions
from mha_jax.heads.gating import alive, draw_gates, head_gates, heads_alive, l0_loss
from mha_jax.models import build_model
from tests import tiny

ROWS, KEY = jnp.arange(3), jax.random.key(5)


@pytest.fixture
def hard_concrete():
    weights = {"encoder": 0.25, "cross": 0.5}
    spec = tiny.run(
        "translation", gates__kind="hard_concrete", gates__where=("encoder", "cross"), gates__l0_weight=weights
    )
    return spec, build_model(spec, rngs=nnx.Rngs(params=0))


def test_only_the_chosen_kinds_have_learned_gates(hard_concrete):
    _, model = hard_concrete
    gated = {name for name, layer in attentions(model).items() if layer.learned_gate is not None}
    assert gated == {f"{place}" for place in attentions(model) if "encoder" in place or "cross" in place}


def test_heads_alive_are_counted_by_kind(hard_concrete):
    _, model = hard_concrete
    layers = attentions(model)
    layers["encoder/1/attention"].learned_gate.log_alpha[...] = jnp.asarray([-3.0, 3.0, -2.5, 0.0])
    layers["decoder/0/attention"].gate[...] = jnp.asarray([1.0, 0.0, 0.0, 0.0])
    assert alive(model)["encoder/1/attention"].tolist() == [False, True, False, True]
    assert {name: int(count) for name, count in heads_alive(model).items()} == {
        "heads_alive": 19,
        "heads_alive/encoder": 6,
        "heads_alive/decoder": 5,
        "heads_alive/cross": 8,
    }


def test_the_penalty_is_the_weighted_sum_over_heads_of_their_chance_to_be_open(hard_concrete):
    spec, model = hard_concrete
    chance = 1 / (1 + np.exp(-(2.0 - 0.33 * np.log(0.1 / 1.1))))
    whole = l0_loss(spec.gates, model, lambda x: x)["l0_loss"]
    np.testing.assert_allclose(whole, (8 * 0.25 + 8 * 0.5) * chance, rtol=1e-5)
    np.testing.assert_allclose(l0_loss(spec.gates, model, lambda x: 4 * x)["l0_loss"], whole / 4, rtol=1e-6)
    assert l0_loss(tiny.run().gates, model, lambda x: x) == {}


def test_a_draw_is_one_gate_a_head_and_differs_between_layers_and_keys(hard_concrete):
    spec, model = hard_concrete
    found = []
    for key in (KEY, KEY, jax.random.key(6)):
        drawn = nnx.clone(model)
        for layer in attentions(drawn).values():
            if layer.learned_gate is not None:
                layer.learned_gate.log_alpha[...] = jnp.zeros(4)
        draw_gates(spec.gates, drawn, key, ROWS)
        found.append({name: np.asarray(gate) for name, gate in head_gates(drawn).items()})
    one, again, other = found
    assert all(gate_H.shape == (4,) and (one[name] == again[name]).all() for name, gate_H in again.items())
    assert (one["decoder/0/attention"] == 1).all()
    drawn = np.concatenate([one[name] for name in one if "encoder" in name or "cross" in name])
    assert len(np.unique(drawn[(drawn > 0) & (drawn < 1)])) == ((drawn > 0) & (drawn < 1)).sum() > 4
    assert (one["encoder/0/attention"] != other["encoder/0/attention"]).any()


def test_an_example_drops_the_same_heads_wherever_it_lies():
    spec = tiny.run("lm", gates__head_drop_rate=0.4)
    whole, part = (build_model(spec, rngs=nnx.Rngs(params=0)) for _ in range(2))
    draw_gates(spec.gates, whole, KEY, jnp.arange(8))
    draw_gates(spec.gates, part, KEY, jnp.asarray([6, 2]))
    gates, others = ([layer.gate[...] for layer in attentions(model).values()] for model in (whole, part))
    for gate_BH, other_BH in zip(gates, others, strict=True):
        np.testing.assert_array_equal(gate_BH[jnp.asarray([6, 2])], other_BH)
    first, second = map(np.asarray, gates)
    assert (first != second).any() and (first[0] != first).any()
