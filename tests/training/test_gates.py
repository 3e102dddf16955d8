"""Training with gates: the same on any devices and after any stop, and the same as before where they are off."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from etils import epath

from mha_jax import config as configs
from mha_jax.heads import gating
from mha_jax.specs import UserError
from mha_jax.training import step as steps
from mha_jax.training.finished import parent_state, restore_finished
from mha_jax.training.metrics import read_metrics
from mha_jax.training.parallel import make_program
from tests import tiny
from tests.training.test_loop import assert_same, result, text_config, train
from tests.training.test_parallel import LAYOUTS, largest_gap, trained

HARD = {"gates__kind": "hard_concrete", "gates__l0_weight": 0.05, "gates__learning_rate_multiplier": 20.0}
HARD |= {"gates__head_drop_rate": 0.2}
PRUNED = {"gates__kind": "scalar", "gates__prune_to": 3, "gates__prune_start": 2, "gates__prune_end": 6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gates", "layouts"), [(HARD, ("jit over seed, data and head", "pmap over data")), (PRUNED, ("pmap over data",))]
)
def test_eight_devices_equal_one_with_gates_in_float64(gates, layouts):
    # Tolerance: 8 Adam steps amplify float64 rounding (2e-16) to about 1e-13; another draw of gates shows at 1e-2.
    settings = {"model__dtype": "float64", "model__num_layers": 1, **gates}
    with jax.enable_x64(True):
        alone = tiny.run("lm", **settings)
        batches = tiny.batches(alone, 8)
        expected, losses = trained(alone, batches, 1)
        for layout in layouts:
            params, spread_losses = trained(tiny.run("lm", **settings, **LAYOUTS[layout]), batches, 8)
            assert np.abs(spread_losses - losses).max() <= 1e-9, layout
            assert largest_gap(params, expected) <= 1e-9, layout


def test_gates_and_their_state_are_split_over_the_head_axis_of_the_mesh():
    for gates, names in ((HARD, ["learned_gate", "log_alpha"]), (PRUNED, ["importance"])):
        program = make_program(tiny.run("lm", mesh__head=4, mesh__data=2, **gates), jax.devices())
        leaves = jax.tree_util.tree_leaves_with_path(program.abstract_state())
        found = [leaf for path, leaf in leaves if set(names) <= set(jax.tree_util.keystr(path).split("'"))]
        assert found and all(leaf.sharding.shard_shape(leaf.shape) == (2, 1) for leaf in found), names


@pytest.fixture(scope="module")
def stepped():
    """Six steps of one seed: the spec, the state before and after, the metrics of each step."""

    def run(**overrides):
        spec = tiny.run("lm", seeds=(0,), **overrides)
        step, state = jax.jit(functools.partial(steps.train_step, spec)), steps.init_state(spec)
        before, metrics = state, []
        for batch in tiny.batches(spec, 6):
            state, found = step(state, batch)
            metrics.append(found)
        return spec, before, state, metrics

    return run


@pytest.mark.slow
def test_heads_go_on_schedule_and_importance_is_kept_in_the_state(stepped):
    spec, _, state, _ = stepped(**PRUNED)
    one = jax.tree.map(lambda leaf: leaf[0], (state["params"], state["constants"]))
    assert int(gating.heads_alive(steps.merge(spec, *one))["heads_alive"]) == 3
    assert all((np.asarray(x_RH) > 0).all() for x_RH in state["importance"].values())


@pytest.mark.slow
def test_gates_learn_at_their_own_rate_and_frozen_parts_stay(stepped):
    _, before, after, metrics = stepped(**HARD, training__freeze=("tokens",), model__num_layers=1)
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before["params"], after["params"])
    assert gap["tokens"]["embedding"] == 0
    attention = gap["decoder"]["blocks"][0]["attention"]
    assert attention["learned_gate"]["log_alpha"] > 5 * attention["query"]["kernel"] > 0
    assert all(float(found["l0_loss"][0]) > 0 for found in metrics)


def test_gates_that_are_off_leave_state_and_program_as_they_were():
    spec = tiny.run("lm")
    state, batch = jax.eval_shape(lambda: steps.init_state(spec)), steps.abstract_batches(spec)[0]
    assert state.keys() == {"seed", "step", "params", "constants", "optimizer"}
    assert not any("learned_gate" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state))

    def program(run):
        return jax.jit(functools.partial(steps.train_step, run)).lower(state, batch).as_text()

    # Settings of what is off are read by nothing.
    other = dataclasses.replace(spec.gates, learning_rate_multiplier=3.0, where=("decoder",), prune_start=4)
    assert program(dataclasses.replace(spec, gates=other)) == program(spec)


@pytest.mark.slow
def test_a_run_that_prunes_and_drops_heads_stopped_at_odd_steps_ends_with_the_same_bits(tmp_path):
    gates = {**PRUNED, "gates__head_drop_rate": 0.2}
    periods = {"training__steps": 12, "training__eval_every": 4, "training__checkpoint_every": 4}
    config = text_config(tmp_path, model__num_layers=1, **periods, **gates)
    assert train(tmp_path, "whole", config)[0] == "done"
    assert train(tmp_path, "parts", config, stop_at=5)[0] == "stopped"
    assert train(tmp_path, "parts", config)[0] == "done"
    assert_same(result(tmp_path / "whole", config), result(tmp_path / "parts", config))
    rows, _ = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    rows = [row for row in rows if row["name"] == "heads_alive/decoder"]
    assert [row["step"] for row in rows if row["seed"] == 1 and row["split"] == "validation"] == [4, 8, 12]
    gates = json.loads((tmp_path / "whole" / "gates.json").read_text())
    alive = sum(gate != 0 for layer in gates["1"].values() for gate in layer)
    assert alive == [row["value"] for row in rows if row["seed"] == 1][-1]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A finished run of seeds 0 and 1, under the name that a sweep would give it."""
    folder = tmp_path_factory.mktemp("parent")
    periods = {"training__steps": 4, "training__eval_every": 4, "training__checkpoint_every": 4}
    config = text_config(folder, model__num_layers=1, **periods)
    directory = folder / configs.run_id(config, {})
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(configs.plain(config)))
    train(folder, directory.name, config)
    return directory


@pytest.mark.slow
def test_a_run_starts_from_the_parameters_of_its_parent_seed_by_seed(parent):
    folder = parent.parent
    place = {"seeds": (1,), "training__start_from": str(parent), "model__num_layers": 1}
    child = text_config(folder, training__steps=4, **place, **HARD)
    spec = configs.resolve(child)
    of_parent = configs.resolve(json.loads((parent / "config.json").read_text()))
    params = restore_finished(epath.Path(parent), of_parent).params
    found = parent_state(spec)["params"]["decoder"]["blocks"][0]["attention"]["query"]["kernel"]
    kernel = params["decoder"]["blocks"][0]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(found, kernel[1:])
    assert train(folder, "child", child)[0] == "done"
    rows = [row for row in read_metrics(folder / "child" / "metrics.jsonl")[0] if row["name"] == "heads_alive"]
    assert {row["seed"] for row in rows} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seeds": (0, 7)}, "has seeds [0, 1], and not 7"),
        ({"model__num_heads": 2}, "does not fit: constants/decoder/blocks/0/attention/gate is float32[4], wanted is"),
        ({"model__norm": "post"}, "does not fit: params/decoder/final_norm/bias is float32[12], wanted is none"),
        ({"training__start_from": "nowhere"}, "training.start_from='nowhere' is no run directory"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(parent, overrides, message):
    with pytest.raises(UserError) as caught:
        settings = {"training__start_from": str(parent), "model__num_layers": 1, **overrides}
        parent_state(configs.resolve(text_config(parent.parent, **settings)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_parent_that_was_renamed_or_is_not_finished_is_refused(parent, tmp_path):
    config = json.loads((parent / "config.json").read_text())
    for name, steps_, message in (("renamed", 4, "must keep the name"), ("", 9, "no finished checkpoint of step 9")):
        config["training"]["steps"] = steps_
        directory = tmp_path / (name or configs.run_id(config, {}))
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            child = text_config(tmp_path, training__start_from=str(directory), model__num_layers=1)
            parent_state(configs.resolve(child))
