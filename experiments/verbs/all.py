"""Looks into the heads of every finished run of a directory: `python -m experiments.heads all --workdir=DIR`.

Runs --verbs on each run, one after the other in this process, and skips what a run has already by the same flags at the
same step. Flags of a verb are given by --give, which may be repeated:

  python -m experiments.heads all --workdir=DIR --give="roles --treebank=en_ewt-ud-dev.conllu.gz"
  python -m experiments.heads table --workdir=DIR

A directory that holds no sweep, as one of imported runs, gets no report; each run has its page, RUN/heads/index.html.
A verb that cannot be run on a run is told at the end, and the others go on. RUN/heads/.given.json records
{VERB: {"flags": [...], "step": N}}.
"""

import importlib
import shlex
from typing import Any

from absl import flags
from etils import epath

from experiments import cli
from mha_jax.specs import UserError

DEFAULT = ("importance", "curve", "redundancy", "roles", "atlas")
KNOWN = (*DEFAULT, "probe", "maps")


def main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Directory of a sweep, or one with runs.", flag_values=values)
    flags.DEFINE_list("verbs", list(DEFAULT), f"Of {', '.join(KNOWN)}, in this order.", flag_values=values)
    flags.DEFINE_multi_string("give", [], "A verb and its flags; adds the verb to --verbs.", flag_values=values)
    cli.parse(values, argv, __doc__)
    if not values.workdir:
        raise UserError("--workdir is missing: the directory of a sweep, for instance runs/default")
    given = _given(values.verbs, values.give)

    from mha_jax.reporting import build_report  # matplotlib takes seconds to import

    workdir = epath.Path(values.workdir)
    is_sweep = (workdir / "sweep.json").exists()
    runs = _of_sweep(workdir) if is_sweep else _lying_in(workdir)
    if not runs:
        raise UserError(f"{workdir} has no finished run")
    failed = [fault for run in runs for fault in _look(str(run), given)]
    if is_sweep:
        print(f"report: {build_report(workdir)}")
    for fault in failed:
        cli.complain(fault)
    return 2 if failed else 0


def _of_sweep(workdir: epath.Path) -> list[epath.Path]:
    from mha_jax.reporting import results

    return [workdir / "runs" / run.run for cell in results.read(workdir).done for run in cell.counted]


def _lying_in(workdir: epath.Path) -> list[epath.Path]:
    from mha_jax.sweeps.store import RunDirectory

    found = [path for path in (workdir / "runs").glob("*") if (path / "config.json").exists()]
    return [path for path in sorted(found) if RunDirectory(path).state == "done"]


def _given(verbs: list[str], give: list[str]) -> dict[str, list[str]]:
    """{verb: its flags} in the order of KNOWN."""
    given: dict[str, list[str]] = {verb: [] for verb in verbs}
    for text in give:
        verb, *rest = shlex.split(text) or [""]
        given[verb] = rest
    for verb in given:
        if verb not in KNOWN:
            raise UserError(f"{verb!r} is no verb that looks into a run; known are {', '.join(KNOWN)}")
    for verb, rest in given.items():
        if any(flag.startswith(("--run=", "--workdir=")) or flag == "--run" for flag in rest):
            raise UserError(f"--give={shlex.join([verb, *rest])!r} names a run; all runs of the sweep are looked into")
    return {verb: given[verb] for verb in KNOWN if verb in given}


def _look(path: str, given: dict[str, list[str]]) -> list[str]:
    """Runs what the run lacks. Returns what could not be run, and why."""
    from mha_jax.sweeps.store import RunDirectory, write_json

    run, failed = RunDirectory(path), []
    file, step = run.path / "heads" / ".given.json", run.status.get("step")
    for verb, rest in given.items():
        if _had(file).get(verb) == {"flags": rest, "step": step}:
            print(f"{run.run_id}: {verb} is there")
            continue
        print(f"{run.run_id}: {verb}", flush=True)
        module = importlib.import_module(f"experiments.verbs.{verb}")
        try:
            module.main([verb, f"--run={path}", *rest])
        except UserError as error:
            failed.append(f"{run.run_id}: {verb}: {error}")
            continue
        # Read anew: another process may have run another verb meanwhile.
        write_json(file, {**_had(file), verb: {"flags": rest, "step": step}})
    return failed


def _had(file: epath.Path) -> dict[str, Any]:
    from mha_jax.sweeps.store import read_json

    return read_json(file) if file.exists() else {}
