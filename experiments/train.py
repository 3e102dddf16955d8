"""Trains one run: `python -m experiments.train --config=configs/default.py --workdir=DIR --config.model.num_heads=4`.

Run again with the same flags, it goes on where it was stopped. `--run=DIR/runs/NAME` goes on with a run of a sweep.
With --coordinator=HOST:PORT --num_processes=N --process_id=I it is one of N processes that train the run together.
"""

import dataclasses
import time

from absl import flags
from ml_collections import config_flags

from experiments import cli
from mha_jax.specs import UserError
from mha_jax.sweeps import grid, provenance
from mha_jax.sweeps.cell import Exit, run_cell
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.mending import mend_sweep
from mha_jax.sweeps.store import RunDirectory, SweepDirectory
from mha_jax.training import hosts

_STARTED = time.time()


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Where the run's files go: WORKDIR/runs/NAME.", flag_values=values)
    flags.DEFINE_string(
        "run", None, "A run directory to go on with, instead of --config and --workdir.", flag_values=values
    )
    flags.DEFINE_bool("progress", True, "Show a progress bar.", flag_values=values)
    cli.define_hosts(values)
    cli.parse(values, argv, __doc__)
    cli.enrol(values)
    directory = RunDirectory(values.run) if values.run else _prepare(values)
    print(f"run {directory.run_id} in {directory.path}")
    if hosts.several():
        code = local.run([[directory]])  # a child: JAX ends a process whose coordinator is gone, and we tell why
    else:
        code = run_cell(directory, started=_STARTED, progress=values.progress)
    if code == Exit.WRONG_INPUT:
        raise UserError(directory.status["error"])
    if code == Exit.FAILED:
        cli.complain(directory.failure)
    if code == Exit.STOPPED:
        print("stopped, state saved; run again to go on")
    return code


def _prepare(values: flags.FlagValues) -> RunDirectory:
    if not values.workdir:
        raise UserError("--workdir is missing: the directory that the run's files go to")
    study = cli.study(values)
    overrides = config_flags.get_override_values(values["config"])
    study = dataclasses.replace(study, sweep=[overrides], tuning=None)  # one run trains with what its config says
    made = grid.cells(study)
    for line in mend_sweep(values.workdir, made):
        print(f"warning: {line}")
    facts = {"versions": provenance.versions(), "commit": provenance.commit()}
    return SweepDirectory.create(values.workdir, study, made, facts).runs[0]


if __name__ == "__main__":
    cli.run(main)
