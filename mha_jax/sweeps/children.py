"""Runs made out of other runs: new directories whose config names their parent and whose state comes with them."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.sweeps.cell import data_dir
from mha_jax.sweeps.opening import OpenedRun
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training.checkpoints import Checkpoints
from mha_jax.training.part import Window
from mha_jax.training.step import State


def child_state(opened: OpenedRun, seed: int) -> State:
    """The state of one seed, still with a seed axis, of length 1.

    Its params are those that the run's table was computed with: averaged over checkpoints where the config says so.
    What a pruning schedule remembers of importance stays behind, as its child prunes no more.
    """
    opened.trees(seed)
    index = opened.run.seeds.index(seed)
    state = {**opened.state, "params": opened.params}
    state.pop("importance", None)
    return jax.tree.map(lambda leaf: leaf[index : index + 1], state)


def child_config(
    opened: OpenedRun, seed: int, model: Mapping[str, Any], surgery: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """The config of a run of one seed that goes on from the parent's last step with another model section.

    Args:   surgery: what was done, as JSON; it stands under "parent", with the parent's id, seed and step.
            steps: how many more the child trains. A schedule that ends with training is stretched to the new end.
    Raises: UserError where that config is no legal one.
    """
    if steps < 0:
        raise UserError(f"steps={steps} must be at least 0: how many more steps to train")
    old = opened.config
    config = {
        **old,
        "seeds": [seed],
        "mesh": {**old["mesh"], "seed": 1, "head": 1},  # one seed, and layers that no longer share a divisor
        "model": dict(model),
        "training": {**old["training"], "steps": opened.step + steps, "start_from": None},
        "gates": {**old.get("gates", {}), "prune_to": None},
        "parent": {"run": opened.directory.run_id, "seed": seed, "step": opened.step, **surgery},
    }
    config = configs.plain(config)
    configs.resolve(config)
    return config


def write_child(
    opened: OpenedRun,
    config: Mapping[str, Any],
    state: State,
    label: Mapping[str, Any],
    out: epath.PathLike | None = None,
) -> RunDirectory:
    """A new run directory with its first checkpoint, of the parent's last step; `open_run` and training find it there.

    Args:   label: what was done, for the directory's name: {"pruned_to": "8of16"}.
            out: the directory whose runs/ it goes to; default: that of the parent.
    Raises: UserError where the directory is there already.
    """
    if out is not None:
        # The data has been prepared beside the parent; where it lies does not count in the hash.
        place = os.fspath(data_dir(opened.run, opened.directory.workdir))
        config = {**config, "data": {**config["data"], "data_dir": place}}
    runs = opened.directory.path.parent if out is None else epath.Path(out) / "runs"
    directory = RunDirectory(runs / configs.run_id(config, {**label, "seed": config["seeds"][0]}))
    if (directory.path / "config.json").exists():
        raise UserError(f"{directory.path} is there already; remove it, or name another place with --out")
    return begin_run(directory.path, config, opened.step, state)


def begin_run(path: epath.PathLike, config: ConfigDict | Mapping[str, Any], step: int, state: State) -> RunDirectory:
    """A run directory that has its config and one checkpoint, from which training and `open_run` go on."""
    checkpoints = Checkpoints(epath.Path(path) / "checkpoints", keep_last=configs.resolve(config).training.keep_last)
    checkpoints.save(step, state, {"config_hash": configs.config_hash(config), "window": Window().as_dict()})
    checkpoints.close()
    # Last, as a directory without a config is no run: what was stopped half-way can be made again.
    return RunDirectory.create(path, config)
