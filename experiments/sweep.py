"""Runs a grid: `python -m experiments.sweep --config=configs/default.py[:profile] --workdir=DIR`.

Run again, it skips what is done and goes on with the rest. `--seeds=3..9` adds those seeds to every cell.
`--dry_run` prints what each cell would cost.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from experiments import cli, elsewhere, planning, together
from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.sweeps import grid, packing, preparation, provenance, seeds
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.executors.hanging import HANG_SECONDS
from mha_jax.sweeps.mending import mend_sweep
from mha_jax.sweeps.search import outcomes, search
from mha_jax.sweeps.store import RunDirectory, SweepDirectory
from mha_jax.sweeps.tuning import parse_tuning
from mha_jax.training import hosts


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    cli.define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Where the sweep's files go.", flag_values=values)
    flags.DEFINE_enum("executor", "local", ["local", "ray"], "What runs the cells.", flag_values=values)
    flags.DEFINE_integer(
        "workers", None, "Cells at once; left out: one, or on CPU one a core.", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "seeds",
        None,
        "Seeds to add to the sweep in --workdir, as 3..9 or 3,5,8; those that are there are left alone. "
        "In a fresh directory they take the place of the config's.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "hang_seconds",
        HANG_SECONDS,
        "A cell that reports nothing for so long is ended and tried once more.",
        lower_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_bool("dry_run", False, "Print the cells and what they cost; train nothing.", flag_values=values)
    elsewhere.define(values)
    planning.define(values)
    cli.define_hosts(values)
    cli.parse(values, argv, __doc__)
    cli.enrol(values)
    elsewhere.check(values)
    together.check(values)
    if not hosts.first():
        return together.follow(values)
    if values.cells is not None:
        return elsewhere.train_part(values, lambda runs: _run_local(runs, values, preparation.devices()))
    return together.lead(lambda: _sweep(values)) if hosts.several() else _sweep(values)


def _sweep(values: flags.FlagValues) -> int:
    study, more_seeds = _with_seeds(cli.study(values), values)
    devices = planning.devices(values) if elsewhere.trained_here(values) or values.dry_run else {}
    cells = grid.cells(study, devices.get("count"))
    tuning = parse_tuning(study, cells)
    if tuning is not None and hosts.several():
        raise UserError("a sweep that tunes is for one process; leave --num_processes out")
    if values.prepare_only and tuning is not None:
        raise UserError("--prepare_only does not go with a sweep that tunes: which runs there are follows from trials")
    if values.dry_run:
        new = seeds.with_seeds(cells, more_seeds) if more_seeds else cells
        print(planning.table(values, devices, new, tuning))
        if values.prepare_only and values.workdir:
            print(elsewhere.would_be_prepared(values.workdir, cells, more_seeds))
        return Exit.DONE
    if not values.workdir:
        raise UserError("--workdir is missing: the directory that the sweep's files go to")
    on_ray = elsewhere.ray_trainer(values) if values.executor == "ray" and not values.prepare_only else None
    for line in mend_sweep(values.workdir, cells):
        print(f"warning: {line}")
    facts = {"versions": provenance.versions(), "commit": provenance.commit(), "devices": devices or None}
    facts["expectation"] = planning.facts(values, devices, cells) if devices else None
    sweep = SweepDirectory.create(values.workdir, study, cells, facts, more_seeds)
    for cell in cells:
        if cell.reason:
            print(f"left out: {cell.run_id}: {cell.reason}")
    preparation.prepare_data(cells, sweep.path)
    if values.prepare_only:
        return elsewhere.tell_prepared(sweep)
    preparation.meet()

    def train(runs: Sequence[RunDirectory]) -> Exit:
        return on_ray(runs) if on_ray else _run_local(runs, values, devices)

    tuned = Exit.DONE
    if tuning is not None:
        cells, tuned = search(tuning, cells, sweep.path, train, devices.get("count"))
        if tuned != Exit.STOPPED:
            print("\n".join(f"tuned: {line}" for line in outcomes(cells)))
            mend_sweep(values.workdir, cells)
            sweep = SweepDirectory.create(values.workdir, study, cells, facts, more_seeds)
    code = tuned if tuned == Exit.STOPPED else train(sweep.runs)
    if code == Exit.STOPPED:
        print("stopped, state saved; run again to go on")
        return code
    return _report(sweep, code or tuned)


def _with_seeds(study: grid.Study, values: flags.FlagValues) -> tuple[grid.Study, list[int]]:
    """The study with the seeds that --workdir began with, or else with those of --seeds; and those that it lacks."""
    if values.seeds is None:
        return study, []
    given = seeds.parse(values.seeds)
    there = SweepDirectory(values.workdir).seeds_there(grid.cells(study)) if values.workdir else []
    study = dataclasses.replace(study, config=configs.override(study.config, {"seeds": there[0] if there else given}))
    known = [seed for batch in there for seed in batch] or given
    return study, [seed for seed in given if seed not in known]


def _run_local(runs: Sequence[RunDirectory], values: flags.FlagValues, devices: dict[str, Any]) -> Exit:
    if hosts.several():
        return together.train(runs, values.hang_seconds)
    workers = values.workers or local.default_workers(devices["platform"], len(runs))
    packs = packing.packs(runs, workers=workers, devices=devices)
    return local.run(packs, workers=workers, hang_seconds=values.hang_seconds)


def _report(sweep: SweepDirectory, code: int) -> int:
    from mha_jax.reporting import build_report  # matplotlib takes seconds to import

    page: epath.Path = build_report(sweep.path)
    print((sweep.path / "report" / "table.md").read_text())
    print(f"report: {page}")
    for run in sweep.runs:
        if run.state == "failed":
            cli.complain(run.failure)
    return code


if __name__ == "__main__":
    cli.run(main)
