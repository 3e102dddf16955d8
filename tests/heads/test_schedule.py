"""Gradual pruning: the schedule is the paper's cubic, and the least important heads go first and stay away."""

import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.heads import schedule
from tests import tiny


def test_heads_kept_fall_along_the_cubic_from_all_to_the_end():
    spec = tiny.run(model__num_heads=6, gates__prune_to=3, gates__prune_start=4, gates__prune_end=14)
    kept = [int(schedule.heads_kept(spec, step)) for step in range(21)]
    wanted = [int(np.ceil(3 + 9 * (1 - min(max((t - 4) / 10, 0), 1)) ** 3 - 1e-9)) for t in range(21)]
    assert kept == wanted
    assert kept[4] == 12 and kept[13] > 3 and kept[14] == 3 and kept[20] == 3


def table(**values):
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def test_the_least_important_heads_close_by_their_share_of_the_layers_norm():
    # Layer b's gradients are a hundred times as large: compared as they are, all heads of layer a would go first.
    gates, importance = table(a=[1, 1, 1], b=[1, 1]), table(a=[0.03, 0.01, 0.02], b=[5, 1])
    assert [np.asarray(g).tolist() for g in schedule.closed(gates, importance, jnp.asarray(3)).values()] == [
        [1, 0, 1],
        [1, 0],
    ]


def test_a_closed_head_stays_closed_however_important():
    gates, importance = table(a=[1, 0, 1]), table(a=[1, 100, 2])
    assert schedule.closed(gates, importance, jnp.asarray(2))["a"].tolist() == [1, 0, 1]
    assert schedule.closed(gates, importance, jnp.asarray(1))["a"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(("kept", "left"), [(0, [0, 0]), (2, [1, 1])])
def test_all_heads_may_go_and_none_must(kept, left):
    assert schedule.closed(table(a=[1, 1]), table(a=[0, 0]), jnp.asarray(kept))["a"].tolist() == left


def test_importance_is_a_running_mean_of_sizes():
    once = schedule.followed(table(a=[0, 0]), table(a=[-1, 2]))
    np.testing.assert_allclose(once["a"], [0.02, 0.04], rtol=1e-6)
    np.testing.assert_allclose(schedule.followed(once, table(a=[1, -2]))["a"], [0.0396, 0.0792], rtol=1e-6)


def test_gates_of_the_chosen_kinds_are_found_and_put_back():
    spec = tiny.run("translation", gates__prune_to=3, gates__where=("cross",))
    one, two, four, seven = (jnp.full(3, value) for value in (1.0, 2.0, 4.0, 7.0))
    constants = {
        "decoder": {"blocks": {0: {"attention": {"gate": one}, "cross_attention": {"gate": two}}}, "other": one},
        "encoder": {"blocks": {0: {"attention": {"gate": four}}}},
    }
    assert schedule.gates_of(tiny.run("translation"), constants) == {}
    gates = schedule.gates_of(spec, constants)
    assert list(gates) == ["decoder/0/cross_attention"] and gates["decoder/0/cross_attention"] is two
    changed = schedule.with_gates(constants, {"decoder/0/cross_attention": seven})
    assert changed["decoder"]["blocks"][0]["cross_attention"]["gate"] is seven
    assert changed["decoder"]["blocks"][0]["attention"]["gate"] is one and changed["decoder"]["other"] is one
    assert changed["encoder"]["blocks"][0]["attention"]["gate"] is four
