"""Runs that train together in one program end with the bits that each ends with alone."""

import jax
import pytest
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from mha_jax import config as configs
from mha_jax.sweeps.compile_cache import compile_cache
from mha_jax.training import loop
from tests.training.test_loop import assert_same, result, text_config

SHORT = {
    "training__steps": 6, "training__eval_every": 3, "training__checkpoint_every": 4, "training__log_every": 2,
    "model__num_layers": 1,
}  # fmt: skip
DIFFERENT = {
    "a": {"seeds": (0, 1), "optimizer__learning_rate": 3e-3, "optimizer__weight_decay": 0.1},
    "b": {"seeds": (1,), "optimizer__learning_rate": 1e-2, "optimizer__weight_decay": 0.0},
    "broken": {"seeds": (0,), "optimizer__learning_rate": 1e30, "optimizer__warmup_steps": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packs")


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_module(folder):
    """Compiled once each, though a training compiles anew: most of the time would go there."""
    compilation_cache.reset_cache()
    with compile_cache(epath.Path(folder)):
        yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def config(folder):
    # The schedule has no warm-up anywhere, as it is part of the program.
    common = {**SHORT, "optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
    return {name: text_config(folder, **{**common, **values}) for name, values in DIFFERENT.items()}


def train(folder, config, *names, within, stop_at=None):
    """Trains runs together in folder/within/name; gives how each ended and what it told."""
    asked, told = [], {name: {} for name in names}

    def should_stop():
        asked.append(None)
        return stop_at is not None and len(asked) > stop_at

    parts = [
        loop.Part(config[name], configs.resolve(config[name]), epath.Path(folder / within / name), told[name].update)
        for name in names
    ]
    ended = loop.train(parts, cache_dir=epath.Path(folder / "cache"), should_stop=should_stop, progress=False)
    return dict(zip(names, ended, strict=True)), told


@pytest.fixture(scope="module")
def alone(folder, config):
    for name in ("a", "b"):
        assert train(folder, config, name, within="alone")[0] == {name: "done"}
    return {name: result(folder / "alone" / name, config[name]) for name in ("a", "b")}


@pytest.mark.slow
def test_other_rates_decays_and_seeds_in_one_program_give_the_bits_of_each_alone(folder, config, alone):
    ended, told = train(folder, config, "a", "b", within="together")
    assert ended == {"a": "done", "b": "done"}
    for name in ("a", "b"):
        assert_same(alone[name], result(folder / "together" / name, config[name]))
    assert (told["a"]["packed_with"], told["b"]["packed_with"]) == (["b"], ["a"])
    # Two of three members are a's, and so is that share of the time.
    assert told["a"]["seconds"]["train"] == pytest.approx(2 * told["b"]["seconds"]["train"], abs=2e-3)


@pytest.mark.slow
def test_a_run_whose_loss_is_not_finite_leaves_the_pack_and_changes_no_other(folder, config, alone):
    ended, _ = train(folder, config, "a", "broken", "b", within="with broken")
    assert (ended["a"], ended["b"]) == ("done", "done")
    assert isinstance(ended["broken"], loop.NonFiniteLoss)
    assert str(ended["broken"]).startswith("loss is not finite at step 2, seed 0; first seen in ")
    for name in ("a", "b"):
        assert_same(alone[name], result(folder / "with broken" / name, config[name]))


@pytest.mark.slow
def test_a_pack_that_was_stopped_goes_on_apart_and_together_at_unequal_steps(folder, config, alone):
    assert train(folder, config, "a", "b", within="parts", stop_at=2)[0] == {"a": "stopped", "b": "stopped"}
    assert train(folder, config, "a", within="parts", stop_at=3)[0] == {"a": "stopped"}
    saved = {name: max(int(p.name) for p in (folder / "parts" / name / "checkpoints").iterdir()) for name in "ab"}
    assert saved == {"a": 5, "b": 2}
    assert train(folder, config, "a", "b", within="parts")[0] == {"a": "done", "b": "done"}
    for name in ("a", "b"):
        assert_same(alone[name], result(folder / "parts" / name, config[name]))
