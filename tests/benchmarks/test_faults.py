"""The campaign of faults: it tells what a kill has changed, and kills change nothing."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess

import pytest

from mha_jax.benchmarks import faults
from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.store import SweepDirectory

# The first kill is of a cell while it trains, the second of the driver at any moment.
SMALL = faults.Setting(kills=2, cells=2, steps=40, checkpoint_every=10, eval_every=15, seed=8)


@pytest.fixture
def pair(tmp_path):
    """A finished sweep and its copy, as if both had been run, without training."""
    calm, struck = (faults.Sweep(tmp_path / name, tmp_path / "faults.py") for name in ("calm", "struck"))
    study = grid.load(str(faults.write_config(tmp_path, SMALL)))
    made = SweepDirectory.create(calm.workdir, study, grid.cells(study), {})
    for run in made.runs:
        run.update(state="done", attempts=1)
        rows = [{"step": 40, "seed": 0, "split": "test", "name": "loss", "value": 1.5}]
        rows += [{"step": 40, "seed": 0, "split": "train", "name": "step_seconds", "value": 0.1}]
        (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (calm.workdir / "report").mkdir()
    (calm.workdir / "report" / "results.csv").write_text("run,seed,test/loss,step_seconds\na,0,1.5,0.1\n")
    shutil.copytree(calm.workdir, struck.workdir)
    struck.look()
    return calm, struck


def edit(file, old, new):
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_equal_sweeps_have_no_difference_whatever_they_took(pair):
    calm, struck = pair
    edit(struck.workdir / "report" / "results.csv", "0.1", "0.2")
    edit(SweepDirectory(struck.workdir).runs[0].path / "metrics.jsonl", "0.1", "0.2")
    assert faults.compare(calm, struck) == (2, dict.fromkeys(faults.compare(*pair)[1], 0))


def test_every_kind_of_difference_is_counted(pair):
    calm, struck = pair
    first, second = SweepDirectory(struck.workdir).runs
    edit(struck.workdir / "report" / "results.csv", "1.5", "1.5000001")
    edit(first.path / "metrics.jsonl", "1.5", "1.5000001")
    with (second.path / "metrics.jsonl").open("a") as file:
        file.write((second.path / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    second.update(attempts=2)
    assert list(faults.compare(calm, struck)[1].values()) == [1, 1, 1, 1]


def test_an_odd_number_of_cells_is_refused():
    with pytest.raises(UserError, match="cells=3 must be even"):
        faults.Setting(cells=3)


def test_everybody_is_asked_to_stop_where_all_are_hit(tmp_path, monkeypatch):
    driver, cell = processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    monkeypatch.setattr(faults.Sweep, "processes", lambda sweep: {cell.pid: []})
    try:
        sweep = faults.Sweep(tmp_path, tmp_path / "faults.py", driver=driver)
        assert faults._strike(sweep, faults.ALL, random.Random(0)) == {"training": 1}
        assert [process.wait(10) for process in processes] == [-signal.SIGTERM] * 2
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_kills_at_random_moments_change_no_result():
    result = faults.measure(SMALL)
    assert not any(result["differences"].values())
    assert len(result["kills"]) == 2 and result["counts"]["values compared"] > 100
    assert [row["state"] for row in result["rows"]] == ["done", "done"]
    text = faults.table({**result, "setting": dataclasses.asdict(SMALL)})
    assert "- values of metrics.jsonl that differ: 0" in text and "starts of the driver" in text
