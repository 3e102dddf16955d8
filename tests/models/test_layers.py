"""Layers unrolled or scanned, kept or computed again: the same numbers, from the same parameters, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention.visibility import Causal
from mha_jax.models.blocks import Stack
from mha_jax.models.losses import loss_sums
from mha_jax.specs import UserError
from mha_jax.training.parallel import make_program
from mha_jax.training.step import abstract_batches, dropout_keys, init_state, merge, train_step
from tests import tiny

DROPOUT = {"model__dropout_rate": 0.2, "model__attention_dropout_rate": 0.3}
EQUAL = {"model__num_layers": 2, "model__num_heads": 3}
HALF_WITHOUT_HEADS = {"model__num_layers": 4, "model__num_heads": (0, 0, 4, 4), "model__num_kv_heads": (0, 0, 2, 2)}
LAYERS, REMATS = ("unrolled", "scan"), ("none", "attention", "dots", "block")
# In float64 another order of sums shows at 1e-15; another layer's dropout, heads or parameters from 1e-3 on.
TOLERANCE = 1e-12


def losses_and_gradients(spec):
    """The training loss of one batch and its gradients, two seeds at once and dropout on, in one program.

    Parameters are drawn by numpy, gates too: norms and biases are not one and zero, and nothing is compiled to start.
    """

    def one(state, batch):
        keys = dropout_keys(state["seed"], state["step"], batch["row"])

        def objective(params):
            model = merge(spec, params, state["constants"])
            return loss_sums(spec.task, model, batch, keys, 0.1)["objective"]

        return jax.value_and_grad(objective)(state["params"])

    return jax.jit(jax.vmap(one))(drawn_state(spec), tiny.batches(spec, 1)[0])


def drawn_state(spec):
    rng = np.random.default_rng(5)
    state = jax.eval_shape(lambda: init_state(spec))
    drawn = jax.tree.map(lambda leaf: 0.4 * rng.normal(size=leaf.shape).astype(leaf.dtype), state)
    return {**drawn, "seed": np.array(spec.seeds), "step": np.full(len(spec.seeds), 3)}


def largest_gap(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    gaps = jax.tree.map(lambda x, y: np.max(np.abs(x - y), initial=0), *jax.device_get((a, b)))
    return np.max(jax.tree.leaves(gaps))  # a NaN wins, as it would not with the built-in max


@functools.cache
def plain(task, **model):
    with jax.enable_x64(True):
        return losses_and_gradients(tiny.run(task, model__dtype="float64", **DROPOUT, **model))


def assert_like_plain_layers(task, layers, remat, model):
    with jax.enable_x64(True):
        spec = tiny.run(task, model__dtype="float64", model__layers=layers, model__remat=remat, **DROPOUT, **model)
        assert largest_gap(losses_and_gradients(spec), plain(task, **model)) < TOLERANCE


def test_a_scan_gives_the_loss_and_gradients_of_plain_layers():
    assert_like_plain_layers("lm", "scan", "none", EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize("remat", REMATS[1:])
def test_what_is_computed_again_gives_the_loss_and_gradients_of_plain_layers(remat):
    assert_like_plain_layers("lm", "unrolled", remat, EQUAL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "remat", "model"),
    [
        ("lm", "none", {"model__num_layers": 3, "model__num_heads": (3, 3, 1)}),
        ("lm", "attention", HALF_WITHOUT_HEADS),
        ("classification", "dots", {"model__num_layers": 2, "model__positions": "rope"}),
        ("translation", "block", {"model__num_layers": 2, "model__norm": "post"}),
    ],
)
def test_scans_beside_others_and_alone_read_memories_padding_and_layers_without_heads(task, remat, model):
    assert_like_plain_layers(task, "scan", remat, model)


def scan_lengths(kind="decoder", cross=False, **model):
    spec = dataclasses.replace(tiny.run("lm", seeds=(0,)).model, layers="scan", **model)
    stack = nnx.eval_shape(lambda: Stack(spec, kind, 7, cross=cross, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 3, 12), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda stack, x: stack(x, Causal(), x if cross else None))(stack, x)
    return [eqn.params["length"] for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]


def test_one_scan_runs_neighbours_of_one_shape_and_a_layer_alone_has_none():
    assert scan_lengths(num_layers=5, num_heads=(3, 3, 1, 1, 2)) == [2, 2]
    assert scan_lengths(num_layers=5, num_heads=(2, 3, 3, 3, 2)) == [3]
    assert scan_lengths(num_layers=3, num_heads=(2, 1, 2)) == []


def test_layers_that_differ_in_cross_attention_alone_are_not_scanned_together():
    heads = {"decoder": 2, "cross": (1, 1, 1, 2)}
    assert scan_lengths(num_layers=4, num_heads=heads) == [4]
    assert scan_lengths(num_layers=4, num_heads=heads, cross=True) == [3]


@pytest.mark.slow
def test_a_state_trained_unrolled_goes_on_under_scan():
    with jax.enable_x64(True):
        specs = {way: tiny.run("lm", model__dtype="float64", model__layers=way, **DROPOUT) for way in LAYERS}
        step = {way: jax.jit(functools.partial(train_step, spec)) for way, spec in specs.items()}
        first = drawn_state(specs["scan"])
        first["optimizer"] = jax.tree.map(np.zeros_like, first["optimizer"])

        def trained(*ways):
            state = first
            for way, batch in zip(ways, tiny.batches(specs["scan"], len(ways)), strict=True):
                state, _ = step[way](state, batch)
            return state["params"]

        plain = trained("unrolled", "unrolled", "unrolled", "unrolled")
        # Adam's first steps divide rounding by small gradients.
        assert largest_gap(trained("unrolled", "unrolled", "scan", "scan"), plain) < 1e-9


def planned_bytes(remat):
    """Temporary bytes of a scanned stack's backward pass; the output is one number, so none of them are results."""
    model = dataclasses.replace(tiny.run("lm").model, num_layers=7, layers="scan", remat=remat)
    stack = nnx.eval_shape(lambda: Stack(model, "decoder", 41, rngs=nnx.Rngs(0)))

    def gradient_sum(stack, x):
        grads = jax.grad(lambda stack, x: jnp.sum(stack(x, Causal())), argnums=(0, 1))(stack, x)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(grads))

    compiled = jax.jit(gradient_sum).lower(stack, jax.ShapeDtypeStruct((32, 13, 12), jnp.float32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_what_is_computed_again_is_not_kept():
    kept = {remat: planned_bytes(remat) for remat in REMATS}
    assert kept["attention"] < 0.75 * kept["none"]
    assert kept["block"] < 0.75 * kept["dots"] < 0.5 * kept["none"]


def test_the_step_writes_its_new_state_over_the_old_one():
    spec = tiny.run("lm", seeds=(0,), model__num_layers=1)
    program = make_program(spec, jax.devices()[:1])
    state = jax.eval_shape(lambda: init_state(spec))
    compiled = program._step.lower(state, abstract_batches(spec)[0]).compile()
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)
    )


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("layers", "model.layers='loop' is not one of 'unrolled', 'scan'"),
        ("remat", "model.remat='loop' is not one of 'none', 'attention', 'dots', 'block'"),
    ],
)
def test_an_unknown_way_is_refused(field, words):
    with pytest.raises(UserError, match=words):
        tiny.run("lm", **{f"model__{field}": "loop"})
