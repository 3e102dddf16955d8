"""Flags and calls of sweeps whose cells other machines train: nodes of a Ray cluster, or the jobs of an array."""

from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from experiments import cli, planning
from mha_jax.specs import UserError
from mha_jax.sweeps import array, packing
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import ray
from mha_jax.sweeps.grid import Cell
from mha_jax.sweeps.store import RunDirectory, SweepDirectory

_NOT_WITH_CELLS = ("dry_run", "prepare_only", "seeds", *planning.FLAGS)

Train = Callable[[Sequence[RunDirectory]], Exit]


def define(values: flags.FlagValues) -> None:
    """The flags of the executor ray, and those of a sweep that is prepared here and trained by jobs of an array."""
    flags.DEFINE_string(
        "address", None, "With --executor=ray: auto (default), local, or HOST:PORT of the cluster.", flag_values=values
    )
    flags.DEFINE_string(
        "cell_resources",
        None,
        'With --executor=ray: what a cell takes of a node, such as {"CPU": 2, "GPU": 1}; default: {"CPU": 1}.',
        flag_values=values,
    )
    flags.DEFINE_bool("prepare_only", False, "Make the directories and the data; train nothing.", flag_values=values)
    flags.DEFINE_string(
        "cells",
        None,
        "FROM:TO, counted from 0: train only these cells of a prepared --workdir, without a report.",
        flag_values=values,
    )


def check(values: flags.FlagValues) -> None:
    """Raises UserError for flags that do not go together."""
    on_ray = values.executor == "ray"
    for name in ("address", "cell_resources"):
        if values[name].value is not None and not on_ray:
            raise UserError(f"--{name} goes with --executor=ray")
    if on_ray:
        accelerators = {"GPU", "TPU"} & set(ray.parse_resources(_resources(values)))
        if values.dry_run and accelerators and values.device is None and values.topology is None:
            raise UserError(f"which {accelerators.pop()} the cluster has is not asked: name it, as in --device=h100")
        if values.workers is not None:
            raise UserError("--workers is of --executor=local; on Ray, --cell_resources says how many cells fit")
    if values.cells is not None and (on_ray or values["config"].value is not None or not values.workdir):
        raise UserError("--cells goes with --workdir, which --prepare_only has made, and without --config")
    for name in _NOT_WITH_CELLS if values.cells is not None else ():
        if values[name].value not in (None, False):
            raise UserError(f"--{name} does not go with --cells, which trains what --prepare_only has made")


def trained_here(values: flags.FlagValues) -> bool:
    """Whether this machine trains. Elsewhere each cell finds out by itself whether it fits the devices."""
    return values.executor == "local" and not values.prepare_only


def ray_trainer(values: flags.FlagValues) -> Train:
    """Joins the cluster; gives what trains runs on it."""
    needs = ray.parse_resources(_resources(values))
    ray.connect(values.address or "auto", needs)
    platform = next((kind for kind in ("gpu", "tpu") if kind.upper() in needs), "cpu")
    devices: dict[str, Any] = {"platform": platform, "count": 1, "memory": None}

    def train(runs: Sequence[RunDirectory]) -> Exit:
        packs = packing.packs(runs, workers=ray.room(needs), devices=devices)
        return ray.run(packs, needs=needs, hang_seconds=values.hang_seconds)

    return train


def _resources(values: flags.FlagValues) -> str:
    return '{"CPU": 1}' if values.cell_resources is None else values.cell_resources


def tell_prepared(sweep: SweepDirectory) -> Exit:
    print(f"{len(sweep.runs)} cells prepared in {sweep.path}")
    return Exit.DONE


def would_be_prepared(workdir: str, cells: Sequence[Cell], more_seeds: Sequence[int]) -> str:
    """What `tell_prepared` would say, with the word "would": the runs that are there with added seeds count too."""
    batches = max(len(SweepDirectory(workdir).seeds), 1) + bool(more_seeds)
    return f"{sum(cell.reason is None for cell in cells) * batches} cells would be prepared in {workdir}"


def train_part(values: flags.FlagValues, train: Train) -> Exit:
    """Trains what an index of an array job trains; its directory was prepared before."""
    runs = array.part(values.workdir, values.cells)
    code = train(runs)
    for run in runs:
        if run.state == "failed":
            cli.complain(run.failure)
    return code
