"""What keeps the function keeps it to rounding; what does not is as close as it says; every result trains on."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from mha_jax import config as configs
from mha_jax.heads.growing import add_heads, split_heads, to_groups
from mha_jax.heads.merging import merge_heads
from mha_jax.heads.surgery import edit, head_shapes
from mha_jax.specs import UserError
from mha_jax.training.step import init_state, train_step
from tests import tiny
from tests.heads.test_surgery import config, forward, random_state

# Float32 sums in another order, over logits of size 1 to 10.
TOLERANCE = {"rtol": 0, "atol": 2e-6}
FIRST, SECOND = "decoder/0/attention", "decoder/1/attention"


def as_run(parent: Any, section: Any) -> Any:
    return configs.resolve({**parent, "model": section})


def fits(run: Any, state: Any) -> None:
    """Every leaf has the name, shape and type that the config's own state has."""
    wanted = jax.eval_shape(lambda: init_state(run))
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for (path, leaf), want in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def model():
    """A grouped-query language model: its config, state, a batch and what it makes of it."""
    parent = config("lm", 2)
    run = configs.resolve(parent)
    state, batch = random_state(run), tiny.batches(run, 1)[0]
    return parent, state, batch, forward(run)(state, batch)


def test_a_split_head_and_a_fresh_one_keep_the_function_and_the_moments(model):
    parent, state, batch, before = model
    section, split = split_heads(parent, state, {FIRST: (1, 3), SECOND: (0,)})
    assert section["num_heads"] == {"decoder": [6, 5]} and section["num_kv_heads"] == {"decoder": [2, 2]}
    section, grown = add_heads({**parent, "model": section}, split, {FIRST: 1, SECOND: 2}, seed=5)
    run = as_run(parent, section)
    fits(run, grown)
    assert [shape.groups for shape in run.model.heads("decoder")] == [(0, 0, 0, 1, 1, 1, 0), (0, 0, 0, 1, 1, 1, 0)]
    np.testing.assert_allclose(forward(run)(grown, batch), before, **TOLERANCE)
    old, new = (s["optimizer"][1].nu["decoder"]["blocks"][0]["attention"] for s in (state, grown))
    np.testing.assert_array_equal(new["query"]["kernel"][:, :, [1, 2]], old["query"]["kernel"][:, :, [1, 1]])
    # Of five channels, the first copy writes two, the second three.
    for i, written in ((1, slice(0, 2)), (2, slice(2, 5))):
        rows = np.zeros_like(old["out"]["kernel"][:, 1])
        rows[:, written] = old["out"]["kernel"][:, 1, written]
        np.testing.assert_array_equal(new["out"]["kernel"][:, i], rows)
    assert not new["query"]["kernel"][:, :, 6].any() and not new["out"]["kernel"][:, 6].any()
    fresh = grown["params"]["decoder"]["blocks"][0]["attention"]
    assert np.abs(fresh["query"]["kernel"][:, :, 6]).min() > 0 and not fresh["out"]["kernel"][:, 6].any()


def test_heads_with_keys_of_their_own_get_keys_of_their_own():
    parent = config("lm", None)
    state = random_state(configs.resolve(parent))
    section, grown = split_heads(parent, state, {FIRST: (2,)})
    fits(as_run(parent, section), grown)
    assert section["num_kv_heads"] == {"decoder": [5, 4]} and section["head_to_group"] == {"decoder": [None, None]}
    old, new = (s["params"]["decoder"]["blocks"][0]["attention"]["value"]["kernel"] for s in (state, grown))
    np.testing.assert_array_equal(new, old[:, :, [0, 1, 2, 2, 3]])
    section, grown = add_heads(parent, state, {SECOND: 3}, seed=0)
    fits(as_run(parent, section), grown)
    assert section["num_kv_heads"] == {"decoder": [4, 7]} and section["head_to_group"] == {"decoder": [None, None]}


@pytest.mark.parametrize("groups", [pytest.param(None, id="multi-head"), pytest.param(1, id="multi-query")])
@pytest.mark.slow
def test_merging_the_halves_of_a_split_head_gives_the_function_back(groups: int | None):
    parent = config("lm", groups)
    run = configs.resolve(parent)
    state, batch = random_state(run), tiny.batches(run, 1)[0]
    section, split = split_heads(parent, state, {FIRST: (1,), SECOND: (0, 3)})
    section, merged = merge_heads({**parent, "model": section}, split, {FIRST: [(1, 2)], SECOND: [(0, 1), (5, 4)]})
    child = as_run(parent, section)
    fits(child, merged)
    assert head_shapes(child) == head_shapes(run)
    # A factorisation in float64, rounded to float32, and gates folded into `out`.
    np.testing.assert_allclose(forward(child)(merged, batch), forward(run)(state, batch), rtol=0, atol=2e-5)


def test_merged_scores_and_values_are_the_closest_of_their_rank():
    parent = config("lm", None, model__v_dim=3)
    state = random_state(configs.resolve(parent))
    _, merged = merge_heads(parent, state, {FIRST: [(0, 2)]})
    part, gate = (state[tree]["decoder"]["blocks"][0]["attention"] for tree in ("params", "constants"))
    new = merged["params"]["decoder"]["blocks"][0]["attention"]

    def rows(p, role, head):
        return np.concatenate([p[role]["kernel"][0, :, head], p[role]["bias"][0, head][None]]).astype(np.float64)

    wanted = sum(gate["gate"][0, h] * rows(part, "value", h) @ part["out"]["kernel"][0, h] for h in (0, 2))
    got = rows(new, "value", 0) @ new["out"]["kernel"][0, 0]
    left = np.linalg.svd(wanted, compute_uv=False)[3:]
    assert np.linalg.norm(wanted - got) == pytest.approx(np.linalg.norm(left), rel=1e-4) and left[0] > 0.1
    scores = sum(rows(part, "query", h) @ rows(part, "key", h).T for h in (0, 2)) / 2
    got = rows(new, "query", 0) @ rows(new, "key", 0).T
    left = np.linalg.svd(scores, compute_uv=False)[2:]
    assert np.linalg.norm(scores - got) == pytest.approx(np.linalg.norm(left), rel=1e-4) and left[0] > 0.1
    assert merged["constants"]["decoder"]["blocks"][0]["attention"]["gate"][0, 0] == 1


def test_pooled_keys_and_values_are_means_and_equal_ones_keep_the_function(model):
    parent, state, *_ = model
    section, pooled = to_groups(parent, state, 1, [SECOND])
    fits(as_run(parent, section), pooled)
    assert section["num_kv_heads"] == {"decoder": [2, 1]}
    for tree, how in ((lambda s: s["params"], np.mean), (lambda s: s["optimizer"][1].mu, np.sum)):
        old, new = (tree(s)["decoder"]["blocks"][1]["attention"] for s in (state, pooled))
        for role in ("key", "value"):
            for kind in ("kernel", "bias"):
                np.testing.assert_allclose(new[role][kind], how(old[role][kind], axis=-2, keepdims=True), rtol=1e-6)
    _, first = to_groups(parent, state, 1, [SECOND], "first")
    old, new = (s["params"]["decoder"]["blocks"][1]["attention"]["key"]["kernel"] for s in (state, first))
    np.testing.assert_array_equal(new, old[:, :, :1])


@pytest.mark.slow
def test_pooling_equal_groups_keeps_the_function(model):
    parent, state, batch, _ = model

    def equal(part):
        return part | {
            role: {kind: np.broadcast_to(leaf[..., :1, :], leaf.shape) for kind, leaf in part[role].items()}
            for role in ("key", "value")
            if role in part
        }

    state = edit(state, {FIRST: equal, SECOND: equal})
    section, pooled = to_groups(parent, state, 1, [FIRST, SECOND])
    before, after = forward(configs.resolve(parent))(state, batch), forward(as_run(parent, section))(pooled, batch)
    np.testing.assert_allclose(after, before, **TOLERANCE)


WRONG = {
    "has no head 4": lambda p, s: split_heads(p, s, {FIRST: (4,)}),
    "at least 2 value channels": lambda p, s: split_heads({**p, "model": {**p["model"], "v_dim": 1}}, s, {FIRST: (0,)}),
    "0 heads cannot be added": lambda p, s: add_heads(p, s, {FIRST: 0}, 0),
    "no attention 'decoder/9/attention'": lambda p, s: add_heads(p, s, {"decoder/9/attention": 1}, 0),
    "has 2 key/value heads; to_groups=3 must divide them: 1 and 2": lambda p, s: to_groups(p, s, 3, [FIRST]),
    "names a head twice": lambda p, s: merge_heads(p, s, {FIRST: [(0, 0)]}),
    "they read groups 0 and 1, which other heads read too": lambda p, s: merge_heads(p, s, {FIRST: [(0, 2)]}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_done_is_told(message: str, model):
    with pytest.raises(UserError, match=message):
        WRONG[message](*model[:2])


@pytest.mark.slow
def test_every_result_trains_on():
    parent = config("lm", 2, model__num_layers=4)
    run = configs.resolve(parent)
    state = jax.jit(functools.partial(init_state, run))()
    section, made = split_heads(parent, state, {FIRST: (0,)})
    section, made = add_heads({**parent, "model": section}, made, {SECOND: 2}, seed=1)
    section, made = to_groups({**parent, "model": section}, made, 1, ["decoder/2/attention"])
    section, made = merge_heads({**parent, "model": section}, made, {"decoder/3/attention": [(0, 1)]})
    child = as_run(parent, section)
    fits(child, made)
    stepped, metrics = jax.jit(functools.partial(train_step, child))(made, tiny.batches(child, 1)[0])
    assert metrics["good"].all()
    first, second = (stepped["params"]["decoder"]["blocks"][layer]["attention"] for layer in (0, 1))
    assert np.abs(np.asarray(second["out"]["kernel"])[:, 4:]).max() > 0
    halves = np.asarray(first["query"]["kernel"])[:, :, :2]
    assert np.abs(halves[:, :, 0] - halves[:, :, 1]).max() > 0
