"""Directories of runs and sweeps: atomic, locked, never of two configs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.store import Busy, RunDirectory, SweepDirectory

FACTS = {"versions": {"jax": "0"}, "commit": None, "devices": {"count": 1}}


def make(config_file, workdir, overrides=None):
    study = grid.load(config_file, overrides)
    return SweepDirectory.create(workdir, study, grid.cells(study), FACTS)


def test_sweep_json_records_the_grid_and_where_it_came_from(config_file, tmp_path):
    sweep = make(config_file, tmp_path / "w")
    facts = json.loads((tmp_path / "w" / "sweep.json").read_text())
    assert facts["base"] == facts["cells"][1]["run"]
    assert [cell["reason"] is None for cell in facts["cells"]] == [True, True, True, False]
    assert facts["paper"]["rows"][0]["label"] == "base"
    assert facts["claims"][0]["metric"] == "validation/loss"
    assert len(facts["config_sha256"]) == 64
    assert facts["devices"] == {"count": 1}
    assert [run.run_id for run in sweep.runs] == [cell["run"] for cell in facts["cells"][:3]]
    assert all(run.state == "queued" for run in sweep.runs)


def test_every_run_has_a_place_of_its_own_those_of_added_seeds_too(config_file, tmp_path):
    study = grid.load(config_file)
    sweep = SweepDirectory.create(tmp_path / "w", study, grid.cells(study), {}, more_seeds=(5,))
    assert [sweep.place(run.run_id) for run in sweep.runs] == list(range(6))


def test_opening_a_sweep_again_keeps_what_its_runs_hold(config_file, tmp_path):
    make(config_file, tmp_path).runs[0].update(state="done", step=11)
    again = make(config_file, tmp_path)
    assert again.runs[0].status == {"state": "done", "step": 11}


def test_another_sweep_is_refused_with_the_difference_once_something_was_trained(config_file, tmp_path):
    sweep = make(config_file, tmp_path / "w")
    (sweep.runs[0].path / "metrics.jsonl").touch()
    before = (tmp_path / "w" / "sweep.json").read_text()
    with pytest.raises(UserError, match=r"training.steps: 11 -> 12"):
        make(config_file, tmp_path / "w", {"training.steps": 12})
    with pytest.raises(UserError, match=r"tiny.py -> tiny.py:wide"):
        make(config_file + ":wide", tmp_path / "w")
    Path(config_file).write_text(Path(config_file).read_text().replace("(1, 2, 3, 5)", "(1, 3, 4)"))
    with pytest.raises(UserError, match=r"cell tiny-num_heads=2-\w+ is gone.*cell tiny-num_heads=4-\w+ is new"):
        make(config_file, tmp_path / "w")
    assert (tmp_path / "w" / "sweep.json").read_text() == before


def test_a_sweep_that_trained_nothing_gives_way(config_file, tmp_path):
    make(config_file, tmp_path / "w")
    sweep = make(config_file, tmp_path / "w", {"training.steps": 12})
    assert sweep.runs[0].config["training"]["steps"] == 12


def test_a_run_is_refused_another_config_with_the_difference(config_file, tmp_path):
    config = grid.load(config_file).config
    RunDirectory.create(tmp_path / "r", config)
    with pytest.raises(UserError, match=r"belongs to another config: model.d_model: 12 -> 22"):
        RunDirectory.create(tmp_path / "r", grid.load(config_file + ":wide").config)
    assert RunDirectory(tmp_path / "r").config["model"]["d_model"] == 12


def test_the_placement_may_change_between_attempts(config_file, tmp_path):
    RunDirectory.create(tmp_path / "r", grid.load(config_file).config)
    moved = grid.load(config_file, {"parallel": "pmap", "mesh.data": 2}).config
    assert RunDirectory.create(tmp_path / "r", moved).config["parallel"] == "pmap"


def test_update_keeps_the_other_facts(tmp_path):
    directory = RunDirectory(tmp_path / "r")
    directory.update(state="running", step=3)
    directory.update(step=4)
    assert directory.status == {"state": "running", "step": 4}


def test_a_directory_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        _ = RunDirectory(tmp_path).config


WRITER = """
import sys
from etils import epath
from mha_jax.sweeps.store import write_json
for number in range(1_000_000):
    write_json(epath.Path(sys.argv[1]), {"numbers": [number] * 1000})
"""


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "facts.json"
    for delay in (0.03, 0.11, 0.23):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        for _ in range(100):  # a reader at any moment, and after the kill
            assert len(set(json.loads(path.read_text())["numbers"])) == 1
        writer.kill()
        writer.wait()
        assert len(set(json.loads(path.read_text())["numbers"])) == 1


HOLDER = """
import sys, time
from mha_jax.sweeps.store import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_holds_a_run_and_kill_9_frees_it(tmp_path):
    directory = RunDirectory(tmp_path)
    assert not directory.locked
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert directory.locked
        with pytest.raises(Busy, match=f"is being trained by process {holder.pid} on "), directory.lock():
            pass
    finally:
        holder.kill()
        holder.wait()
    assert not directory.locked
    with directory.lock():
        assert directory.locked


def test_a_bucket_is_locked_on_this_machine():
    path = RunDirectory("gs://bucket/sweep/runs/a").beside("lock")
    assert path.is_absolute() and path.name.endswith("-lock")
    assert path != RunDirectory("gs://bucket/sweep/runs/b").beside("lock")
