"""A head whose gate is 0, a head whose rows of `out` are 0 and a head that is not there are one and the same."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax import config as configs
from mha_jax.heads.capture import attentions
from mha_jax.heads.surgery import edit, head_shapes, keep_heads
from mha_jax.models import build_model
from mha_jax.models.cost import matched_d_ff
from mha_jax.specs import UserError
from mha_jax.training.step import init_state, merge, train_step
from tests import tiny

# Sums of float32 in another order: one unit in the last place of an output of size 1 is 1e-7.
TOLERANCE = {"rtol": 0, "atol": 1e-6}
GROUPS = {"multi-head": None, "grouped": 2, "multi-query": 1}
# Heads that stay: of a layer none, of others some, of one group with all its heads gone, and of one layer all.
KEEP = {
    "lm": {"decoder/0/attention": (0, 3), "decoder/1/attention": ()},
    "translation": {
        "encoder/0/attention": (1, 2, 3),
        "decoder/0/attention": (2, 3),
        "decoder/0/cross_attention": (0,),
        "decoder/1/cross_attention": (),
    },
    "classification": {"encoder/0/attention": (2, 3), "encoder/1/attention": (0, 1, 3)},
}


def config(task: str, groups: int | None, **overrides: Any) -> dict[str, Any]:
    return configs.plain(tiny.config(task, seeds=(3,), model__num_kv_heads=groups, model__use_bias=True, **overrides))


def random_state(run) -> Any:
    """A state where no leaf is 0 or 1 throughout, so that a leaf left behind or mixed up shows."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.ones(leaf.shape, leaf.dtype)
        values = np.random.default_rng(sum(map(ord, name))).normal(size=leaf.shape).astype(leaf.dtype)
        return np.abs(values) if ".nu" in name or "gate" in name else values * 0.4

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: init_state(run)))


INPUTS = {
    "lm": ("inputs",),
    "translation": ("source", "source_lengths", "target_inputs"),
    "classification": ("inputs", "lengths"),
}


def forward(run):
    """(state, batch) -> logits [R, ...]; compiled once."""

    def one(params, constants, batch):
        return merge(run, params, constants)(*(batch[name] for name in INPUTS[run.task]))

    compiled = jax.jit(jax.vmap(one))
    return lambda state, batch: np.asarray(compiled(state["params"], state["constants"], batch))


def without(state: Any, keep: Any, leaf: str) -> Any:
    """The state with the gates, or the rows of `out`, of all other heads at 0."""

    def zeroed(name):
        def change(part):
            part = jax.tree.map(np.copy, part)
            array = part.get("gate") if leaf == "gate" else part.get("out", {}).get("kernel")
            if array is not None:
                array[:, [h for h in range(array.shape[1]) if h not in keep[name]]] = 0
            return part

        return change

    return edit(state, {name: zeroed(name) for name in keep})


QUICK = ("lm", "grouped")
CASES = [
    pytest.param(task, GROUPS[name], id=f"{task}-{name}", marks=[] if (task, name) == QUICK else pytest.mark.slow)
    for task, name in (*(("lm", name) for name in GROUPS), ("translation", "grouped"), ("classification", "multi-head"))
]


@pytest.mark.parametrize(("task", "groups"), CASES)
def test_a_closed_gate_zeroed_rows_and_a_removed_head_are_the_same(task: str, groups: int | None):
    parent = config(task, groups)
    run = configs.resolve(parent)
    state, batch, whole = random_state(run), tiny.batches(run, 1)[0], forward(run)
    closed = whole(without(state, KEEP[task], "gate"), batch)
    assert np.abs(closed - whole(state, batch)).max() > 0.01
    np.testing.assert_allclose(whole(without(state, KEEP[task], "out"), batch), closed, **TOLERANCE)
    section, pruned = keep_heads(parent, state, KEEP[task])
    child = configs.resolve({**parent, "model": section})
    np.testing.assert_allclose(forward(child)(pruned, batch), closed, **TOLERANCE)


@pytest.mark.parametrize("task", ["lm", "translation", "classification"])
def test_the_smaller_state_is_that_of_the_smaller_config_leaf_by_leaf(task: str):
    """Weight decay masks leaves by name, and a clipped optimiser has one state more: none is in the way."""
    parent = config(task, 2, optimizer__weight_decay=0.1, optimizer__clip_norm=1.0, model__match="params",
                    model__match_base={"num_heads": 3}, model__init="shared", model__v_dim=3)  # fmt: skip
    state = random_state(configs.resolve(parent))
    section, pruned = keep_heads(parent, state, KEEP[task])
    child = configs.resolve({**parent, "model": section})
    wanted = jax.eval_shape(lambda: init_state(child))
    assert jax.tree.structure(pruned) == jax.tree.structure(wanted)
    for (path, leaf), want in zip(jax.tree.leaves_with_path(pruned), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), jax.tree_util.keystr(path)
    assert child.model.d_ff == matched_d_ff(configs.resolve(parent)) != parent["model"]["d_ff"]


def test_moments_go_with_their_heads_and_groups_that_nobody_reads_go_too():
    parent = config("lm", 2)
    run = configs.resolve(parent)
    state = random_state(run)
    _, pruned = keep_heads(parent, state, {"decoder/0/attention": (1, 2), "decoder/1/attention": (3, 2)})
    for moment in ("mu", "nu"):
        old, new = ([getattr(s["optimizer"][1], moment)["decoder"]["blocks"][i]["attention"] for i in (0, 1)]
                    for s in (state, pruned))  # fmt: skip
        np.testing.assert_array_equal(new[0]["query"]["kernel"], old[0]["query"]["kernel"][:, :, 1:3])
        np.testing.assert_array_equal(new[0]["out"]["kernel"], old[0]["out"]["kernel"][:, 1:3])
        np.testing.assert_array_equal(new[0]["key"]["kernel"], old[0]["key"]["kernel"])
        np.testing.assert_array_equal(new[1]["query"]["bias"], old[1]["query"]["bias"][:, 2:])
        np.testing.assert_array_equal(new[1]["value"]["kernel"], old[1]["value"]["kernel"][:, :, 1:])
        np.testing.assert_array_equal(new[1]["out"]["bias"], old[1]["out"]["bias"])


def test_an_uneven_map_stays_with_the_heads_that_are_left():
    parent = config("lm", 3, model__num_heads=5, model__head_to_group=(2, 0, 2, 1, 0))
    section, _ = keep_heads(parent, {}, {"decoder/0/attention": (0, 2, 4), "decoder/1/attention": (1, 0)})
    assert section["num_heads"] == {"decoder": [3, 2]} and section["num_kv_heads"] == {"decoder": [2, 2]}
    assert section["head_to_group"] == {"decoder": [[1, 1, 0], [1, 0]]}
    again, _ = keep_heads(
        {**parent, "model": section}, {}, {"decoder/0/attention": (0, 2), "decoder/1/attention": (1,)}
    )
    assert again["head_to_group"] == {"decoder": [[1, 0], None]}


@pytest.mark.parametrize("task", ["lm", "translation", "classification"])
def test_attentions_have_the_names_and_the_order_of_the_model(task: str):
    run = tiny.run(task, model__num_heads=(3, 0))
    model = nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(0)))
    assert [(n, layer.shape) for n, layer in attentions(model).items()] == list(head_shapes(run).items())


WRONG = [
    ({"decoder/0/attention": (4,)}, None, "decoder/0/attention has no head 4; there are 4, 0 to 3"),
    ({"decoder/2/attention": (0,)}, None, "there is no attention 'decoder/2/attention'; there are decoder/0/attention"),
    ({"decoder/0/attention": (1, 1)}, None, "decoder/0/attention names a head twice: 1, 1"),
    ({"decoder/0/attention": (0, 2)}, {"decoder/0/attention": (0,)}, "group 1 cannot go while head 2, which reads it"),
    ({}, {"decoder/1/attention": (1,)}, "decoder/1/attention: group 0 cannot go while head 0, which reads it, stays"),
    ({}, {"decoder/1/attention": (2,)}, "decoder/1/attention has no group 2; there are 2, 0 to 1"),
]


@pytest.mark.parametrize(("keep", "groups", "message"), WRONG, ids=[message[-30:] for *_, message in WRONG])
def test_what_is_not_there_or_is_still_read_is_named_in_one_line(keep: Any, groups: Any, message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        keep_heads(config("lm", 2), {}, keep, groups)


@pytest.mark.slow
def test_a_smaller_model_trains_on_with_its_moments():
    parent = config("lm", 2)
    run = configs.resolve(parent)
    state = jax.jit(functools.partial(init_state, run))()
    section, pruned = keep_heads(parent, state, KEEP["lm"])
    child = configs.resolve({**parent, "model": section})
    stepped, metrics = jax.jit(functools.partial(train_step, child))(pruned, tiny.batches(child, 1)[0])
    assert metrics["good"].all() and int(stepped["step"][0]) == int(state["step"][0]) + 1
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max(initial=0)), stepped["params"], pruned["params"])
    assert moved["decoder"]["blocks"][0]["attention"]["query"]["kernel"] > 0
