"""Heads go in the order of their worth, layer by layer or all together, alone or by groups; masks say who is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.heads.capture import attentions
from mha_jax.heads.pruning import (
    Unit,
    count_of_fraction,
    masked_sums,
    masks,
    random_scores,
    removal_order,
    reversed_scores,
    what_is_left,
)
from mha_jax.models import build_model
from mha_jax.models.losses import loss_sums
from mha_jax.specs import HeadShape, UserError
from tests import tiny

SHAPES = {"a": HeadShape(4, 2, 2, 5), "b": HeadShape(2, 2, 2, 5), "none": HeadShape(0, 0, 2, 5)}
SCORES = {"a": np.array([3.0, 1.0, 2.0, 9.0]), "b": np.array([0.5, 8.0]), "none": np.zeros(0)}


def heads_in(order: list[Unit]) -> list[str]:
    return [unit.name + "".join(map(str, unit.heads)) for unit in order]


def test_the_least_worth_goes_first_among_all_heads():
    assert heads_in(removal_order(SHAPES, SCORES)) == ["b0", "a1", "a2", "a0", "b1", "a3"]
    assert heads_in(removal_order(SHAPES, reversed_scores(SCORES))) == ["a3", "b1", "a0", "a2", "a1", "b0"]


def test_per_layer_every_attention_loses_its_share_at_any_moment():
    order = removal_order(SHAPES, SCORES, per_layer=True)
    assert heads_in(order) == ["a1", "b0", "a2", "a0", "b1", "a3"]
    assert what_is_left(SHAPES, order, 3) == {"a": (0, 3), "b": (1,), "none": ()}


def test_by_groups_heads_that_share_keys_go_together_at_their_mean_worth():
    assert heads_in(removal_order(SHAPES, SCORES, by_groups=True)) == ["b0", "a01", "a23", "b1"]


def test_random_orders_are_those_of_their_seed():
    one, same, other = (removal_order(SHAPES, random_scores(SHAPES, seed)) for seed in (0, 0, 1))
    assert one == same and one != other and sorted(one) == sorted(other)


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.25, 2), (0.5, 3), (1.0, 6)])
def test_a_fraction_is_a_whole_number_of_heads(fraction: float, count: int):
    assert count_of_fraction(removal_order(SHAPES, SCORES), fraction) == count


def test_only_scored_attentions_are_cut_and_masks_say_who_is_left():
    found = masks(SHAPES, removal_order(SHAPES, {"a": SCORES["a"]}), [0, 1, 4])
    np.testing.assert_array_equal(found["a"], [[1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(found["b"], np.ones((3, 2)))
    assert found["none"].shape == (3, 0)


WRONG = {
    "fraction=1.5 of the heads": lambda: count_of_fraction(removal_order(SHAPES, SCORES), 1.5),
    "count=7 cannot be removed: there are 6": lambda: what_is_left(SHAPES, removal_order(SHAPES, SCORES), 7),
    "it has 4 heads": lambda: removal_order(SHAPES, {"a": np.zeros(3)}),
    "no attention of the model": lambda: removal_order(SHAPES, {"c": np.zeros(3)}),
    "not all finite": lambda: removal_order(SHAPES, {"b": np.array([0, np.nan])}),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_removed_is_told(message: str):
    with pytest.raises(UserError, match=message):
        WRONG[message]()


@pytest.mark.slow
def test_masked_sums_are_those_of_the_model_with_its_gates_set():
    run = tiny.run("lm", seeds=(0,))
    model = nnx.jit(lambda: build_model(run, rngs=nnx.Rngs(0)))()
    batch = {name: jnp.asarray(leaf[0]) for name, leaf in tiny.batches(run, 1)[0].items()}
    names = list(attentions(model))
    mask = {names[0]: np.array([[1, 0, 1, 1], [1, 1, 1, 1]], np.float32), names[1]: np.ones((2, 4), np.float32)}
    found = jax.jit(masked_sums, static_argnums=0)("lm", model, batch, mask)
    attentions(model)[names[0]].gate[...] *= mask[names[0]][0]
    wanted = jax.jit(lambda model: loss_sums("lm", model, batch, None, 0.0))(model)
    np.testing.assert_allclose(found["loss"][0], wanted["loss"], rtol=1e-6)
    assert abs(found["loss"][1] - found["loss"][0]) > 1e-3
    assert found["weight"].tolist() == [wanted["weight"]] * 2
