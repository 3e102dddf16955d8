"""What a paper says about heads, checked: `python -m experiments.heads claims --run=DIR --config=configs/X.py`.

Reads RUN/heads/importance.json, curve.json, roles.json and probes.json, which the verbs write, and get_cuts() of the
config file; writes RUN/heads/claims.json and claims.md. Each is held, not held or undecided, by a 95 % interval over
seeds.
"""

import dataclasses

from absl import flags

from experiments import cli
from mha_jax.reporting.cuts import as_markdown, check_cuts
from mha_jax.reporting.heads import write_page
from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.store import RunDirectory, write_json


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("run", None, "A run whose heads have been looked into.", flag_values=values)
    flags.DEFINE_string("config", None, "The config file[:profile] that has get_cuts().", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.run or not values.config:
        raise UserError("--run and --config are both needed: a run's directory, and a config file with get_cuts()")
    directory = RunDirectory(values.run)
    config = directory.config
    study = grid.load(values.config)
    if not study.cuts:
        raise UserError(f"{values.config} says nothing about heads: it has no get_cuts()")
    verdicts = check_cuts(study.cuts, directory.path / "heads")
    facts = {"run": directory.run_id, "name": config["name"], "config_file": study.path, "sha256": study.sha256}
    write_json(
        directory.path / "heads" / "claims.json", {**facts, "verdicts": [dataclasses.asdict(v) for v in verdicts]}
    )
    table = as_markdown(verdicts)
    (directory.path / "heads" / "claims.md").write_text(table)
    write_page(directory.path)
    print(table)
    return 0
