"""Damaged files of a sweep: found again where they can be, named where they cannot, and nothing finished is trained."""

import json
from pathlib import Path

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.mending import mend_run, mend_sweep
from mha_jax.sweeps.store import RunDirectory, SweepDirectory
from mha_jax.training import manifests

DAMAGES = {"empty": b"", "truncated": b'{"state": "do', "no object": b"[]", "not text": b"\xff\xfe\x00"}
FACTS = {"versions": {}, "commit": None, "devices": {}}


@pytest.fixture
def sweep(config_file, tmp_path):
    """A sweep whose first run is done, its last step saved; with the cells that it was made of."""
    study = grid.load(config_file)
    cells = grid.cells(study)
    made = SweepDirectory.create(tmp_path / "w", study, cells, FACTS)
    done = made.runs[0]
    done.update(state="done", step=11, steps=11, attempts=3)
    rows = [{"step": s, "seed": 0, "split": "validation", "name": "loss", "value": 1.5} for s in (5, 11)]
    (done.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (done.path / "checkpoints" / "11").mkdir(parents=True)
    manifests.seal(done.path / "checkpoints" / "11", {})
    return made, cells, study


def files(path):
    found = [file for file in Path(path).rglob("*") if file.is_file() and file.name != "lock"]
    return {file: file.read_bytes() for file in found}


def test_what_is_whole_is_left_as_it_is(sweep):
    made, cells, _ = sweep
    before = files(made.path)
    assert mend_sweep(made.path, cells) == []
    assert files(made.path) == before


def test_a_directory_that_is_not_there_yet_is_whole(sweep, tmp_path):
    assert mend_sweep(tmp_path / "none", sweep[1]) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["sweep.json", "config.json"])
def test_what_follows_from_the_grid_is_written_anew(sweep, name, text):
    made, cells, study = sweep
    file = made.path / name if name == "sweep.json" else made.runs[1].path / name
    whole = file.read_bytes()
    file.write_bytes(text)
    (line,) = mend_sweep(made.path, cells)
    assert line.startswith(f"{file} is damaged (") and line.endswith(": written anew")
    SweepDirectory.create(made.path, study, cells, FACTS)
    assert file.read_bytes() == whole
    assert made.runs[0].state == "done"


def test_a_damaged_sweep_json_does_not_open_the_place_to_another_sweep(sweep, config_file):
    made, _, _ = sweep
    (made.path / "sweep.json").write_text("")
    before = files(made.path)
    with pytest.raises(UserError, match="none of this sweep's cells was trained there, but tiny-num_heads=1-"):
        mend_sweep(made.path, grid.cells(grid.load(config_file, {"training.steps": 12})))
    assert files(made.path) == before


@pytest.mark.parametrize("text", [*DAMAGES.values(), b"{}"], ids=[*DAMAGES, "no state"])
def test_a_run_without_a_readable_status_goes_on_from_its_last_checkpoint(sweep, text):
    made, cells, _ = sweep
    file = made.runs[0].path / "status.json"
    file.write_bytes(text)
    (line,) = mend_sweep(made.path, cells)
    assert line.startswith(f"{file} is damaged (") and "begun anew from the last good checkpoint" in line
    assert made.runs[0].status == {"state": "queued", "incidents": [line]}
    assert mend_sweep(made.path, cells) == []


def test_a_done_run_with_a_corrupt_line_is_evaluated_again(sweep):
    made, cells, _ = sweep
    file = made.runs[0].path / "metrics.jsonl"
    file.write_text("{" + file.read_text())
    (line,) = mend_sweep(made.path, cells)
    assert f"{file}: line 1 is corrupt" in line and line.endswith("left out, and the last step evaluated again")
    status = made.runs[0].status
    assert (status["state"], status["attempts"], status["incidents"]) == ("queued", 3, [line])


def test_a_done_run_whose_last_lines_are_gone_is_evaluated_again(sweep):
    made, cells, _ = sweep
    file = made.runs[0].path / "metrics.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")
    (line,) = mend_sweep(made.path, cells)
    assert f"{file} has no evaluation of step 11" in line
    assert made.runs[0].state == "queued"


def test_a_done_run_whose_last_step_is_not_saved_stays_done(sweep):
    made, cells, _ = sweep
    (made.runs[0].path / "checkpoints" / "11" / manifests.FILE_NAME).unlink()
    (made.runs[0].path / "metrics.jsonl").write_text("{\n")
    assert mend_sweep(made.path, cells) == []
    assert made.runs[0].state == "done"


def test_corrupt_lines_of_an_unfinished_run_are_left_to_its_training(sweep):
    made, cells, _ = sweep
    made.runs[1].update(state="stopped", step=5)
    (made.runs[1].path / "metrics.jsonl").write_text("{\n")
    assert mend_sweep(made.path, cells) == []


def test_a_run_in_use_is_left_alone(sweep):
    made, cells, _ = sweep
    (made.runs[0].path / "status.json").write_text("")
    with made.runs[0].lock():
        assert mend_sweep(made.path, cells) == []
    assert len(mend_sweep(made.path, cells)) == 1


def test_incidents_add_up(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.update(state="done", step=11, steps=11, incidents=["attempt 1: killed"])
    (tmp_path / "checkpoints" / "11").mkdir(parents=True)
    manifests.seal(directory.path / "checkpoints" / "11", {})
    assert len(mend_run(directory)) == 1
    assert directory.status["incidents"][0] == "attempt 1: killed" and len(directory.status["incidents"]) == 2
