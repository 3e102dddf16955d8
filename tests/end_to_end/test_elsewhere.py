"""Sweeps that are trained elsewhere, from the command line: on Ray, or by the jobs of an array."""

import pytest

from experiments import sweep
from mha_jax.sweeps.store import SweepDirectory

SMOKE = "--config=configs/default.py:smoke"
WRONG = {
    "cells and a config": ([SMOKE, "--workdir=w", "--cells=0:1"], "--cells goes with --workdir"),
    "cells of nowhere": (["--cells=0:1"], "--cells goes with --workdir"),
    "cells of a plan": (["--workdir=w", "--cells=0:1", "--dry_run"], "--dry_run does not go with --cells"),
    "cells with more seeds": (["--workdir=w", "--cells=0:1", "--seeds=3"], "--seeds does not go with --cells"),
    "an address of nothing": ([SMOKE, "--workdir=w", "--address=auto"], "--address goes with --executor=ray"),
    "resources of nothing": ([SMOKE, "--workdir=w", '--cell_resources={"CPU":1}'], "--cell_resources goes with"),
    "resources that are none": ([SMOKE, "--executor=ray", "--cell_resources=2"], "must be a JSON object"),
    "a plan for Ray's devices": (
        [SMOKE, "--executor=ray", '--cell_resources={"GPU":1}', "--dry_run"],
        "which GPU the cluster has is not asked",
    ),
    "workers on Ray": ([SMOKE, "--executor=ray", "--workers=2"], "--workers is of --executor=local"),
}


@pytest.mark.parametrize("case", WRONG)
def test_flags_that_do_not_go_together_are_answered_with_a_line(script, case):
    flags, complaint = WRONG[case]
    assert complaint in script(sweep.main, *flags).complaint


@pytest.mark.slow
def test_a_sweep_is_prepared_trained_in_parts_and_done_for_all(script, tmp_path):
    workdir = f"--workdir={tmp_path / 'w'}"
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {n} of the text" for n in range(80)))
    given = ["--config.mesh.data=1", "--config.data.source=text", f"--config.data.files.train={tmp_path / 'text.txt'}"]
    prepared = script(sweep.main, SMOKE, workdir, *given, "--prepare_only")
    assert prepared.code == 0, prepared.err
    assert prepared.out.splitlines()[-1] == f"2 cells prepared in {tmp_path / 'w'}"
    runs = SweepDirectory(tmp_path / "w").runs
    assert [run.state for run in runs] == ["queued", "queued"]
    assert script(sweep.main, workdir, "--cells=1:2").code == 0
    assert [run.state for run in runs] == ["queued", "done"]
    more = [SMOKE, workdir, *given, "--seeds=7..8", "--prepare_only"]
    said = [script(sweep.main, *more, *dry).out.splitlines()[-1] for dry in (["--dry_run"], [])]
    assert said == [f"4 cells {would}prepared in {tmp_path / 'w'}" for would in ("would be ", "")]
