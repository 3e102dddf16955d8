"""Sweeps whose every cell is trained by several processes: the drivers of all walk the cells in the same order."""

from collections.abc import Callable, Sequence

from absl import flags

from mha_jax.specs import UserError
from mha_jax.sweeps import preparation
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.store import RunDirectory, SweepDirectory
from mha_jax.training import hosts


def check(values: flags.FlagValues) -> None:
    """Raises UserError for flags that do not go with several processes."""
    if not hosts.several():
        return
    if not values.workdir:
        raise UserError("--workdir is missing: the directory, one for all processes, that the sweep's files go to")
    if values.executor != "local":
        raise UserError(f"--executor={values.executor} runs each cell in one process; leave --num_processes out")
    given = {"dry_run": values.dry_run, "prepare_only": values.prepare_only, "cells": values.cells is not None}
    for name in (name for name, is_given in given.items() if is_given):
        raise UserError(f"--{name} is for one process; leave --num_processes out")
    if values.workers not in (None, 1):
        raise UserError(f"--workers={values.workers}: several processes train one cell at a time")


def lead(sweep: Callable[[], int]) -> int:
    """What the first driver does: a mistake that it finds while it prepares the sweep is told to the others."""
    try:
        return sweep()
    except UserError as error:
        preparation.refuse(str(error))
        raise


def follow(values: flags.FlagValues) -> Exit:
    """What all drivers but the first do: wait until that one has prepared the sweep, and train its cells with it."""
    preparation.devices()
    preparation.meet()
    return train(SweepDirectory(values.workdir).runs, values.hang_seconds)


def train(runs: Sequence[RunDirectory], hang_seconds: float) -> Exit:
    """One cell at a time, none packed with others."""
    return local.run([[run] for run in runs], workers=1, hang_seconds=hang_seconds)
