"""Which group each head reads: one map for all layers, one a layer, or either by kind of attention."""

import pytest

from mha_jax.specs import HeadShape, UserError
from tests import tiny

UNEVEN = {"model__num_heads": (3, 0), "model__num_kv_heads": (2, 0)}


@pytest.mark.parametrize(
    ("overrides", "groups"),
    [
        ({"model__num_kv_heads": 2, "model__head_to_group": (1, 0, 1, 1)}, [(1, 0, 1, 1)] * 2),
        ({"model__num_kv_heads": 2, "model__head_to_group": (None, (1, 0, 1, 1))}, [(0, 0, 1, 1), (1, 0, 1, 1)]),
        (UNEVEN | {"model__head_to_group": ((0, 1, 1), None)}, [(0, 1, 1), ()]),
        (UNEVEN | {"model__head_to_group": ((0, 1, 1), ())}, [(0, 1, 1), ()]),
        (UNEVEN | {"model__head_to_group": {"decoder": ((0, 1, 1), None)}}, [(0, 1, 1), ()]),
    ],
)
def test_a_map_holds_for_all_layers_or_for_its_own(overrides, groups):
    assert [shape.groups for shape in tiny.run("lm", **overrides).model.heads("decoder")] == groups


def test_kinds_have_maps_of_their_own():
    maps = {"encoder": None, "decoder": ((0, 0, 1, 1), None), "cross": (1, 1, 0, 0)}
    model = tiny.run("translation", model__num_kv_heads=2, model__head_to_group=maps).model
    assert model.heads("encoder")[1].groups == model.heads("decoder")[1].groups == (0, 0, 1, 1)
    assert [shape.groups for shape in model.heads("cross")] == [(1, 1, 0, 0)] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__head_to_group": ((0, 1, 1),)}, "head_to_group lists 1 layers for 'decoder'; model.num_layers=2"),
        (UNEVEN, "num_heads=3 is not a multiple of num_kv_heads=2; 1 and 3 fit, or give head_to_group (model, decoder"),
        (UNEVEN | {"model__head_to_group": {"encoder": None}}, "has no entry for 'decoder'; it has 'encoder'"),
        (
            UNEVEN | {"model__head_to_group": (0, 1, 1)},
            "3 entries; num_heads=0 needs one a head (model, decoder",
        ),
        ({"model__head_to_group": (0, 1.5, 2, 3)}, "must be None or a list with the number of a group a head"),
        ({"model__head_to_group": {"decoder": 3}}, "head_to_group=3 must be None or a list"),
    ],
)
def test_a_map_that_does_not_fit_is_told_with_its_layer(overrides, message):
    with pytest.raises(UserError) as caught:
        tiny.run("lm", **overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("groups", [(0, 0.9, 1, 1), "0011"])
def test_a_map_of_one_layer_is_of_integers(groups):
    with pytest.raises(UserError, match=r"head_to_group=.* must be integers"):
        HeadShape.resolve(8, 4, 2, head_to_group=groups)
