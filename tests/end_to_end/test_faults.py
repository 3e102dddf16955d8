"""Storage that refuses and files that are damaged: told in a line, and the end is that of a run left alone."""

import csv
import os
import subprocess

import pytest

from experiments import report, train
from mha_jax.benchmarks import faults
from mha_jax.sweeps.store import SweepDirectory
from mha_jax.training import loop

SMOKE = "--config=configs/default.py:smoke"


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system of its own; None where that is not allowed."""
    places = []

    def mount(name, options):
        place = tmp_path / name
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def read_only(tmp_path, request):
    """A directory that cannot be written, also by root."""
    if os.geteuid():
        place = tmp_path / "closed"
        place.mkdir(0o500)
        return place
    return request.getfixturevalue("mounted")("closed", "ro,size=64k")


def test_a_workdir_that_cannot_be_written_is_told_in_one_line(script, read_only, tmp_path):
    complaint = script(train.main, SMOKE, f"--workdir={read_only}").complaint
    assert complaint.startswith(("error: read-only file system: ", "error: permission denied: "))
    assert str(read_only) in complaint and complaint.endswith("run again: what is saved is kept")
    (tmp_path / "file").touch()
    complaint = script(train.main, SMOKE, f"--workdir={tmp_path / 'file'}").complaint
    assert complaint.startswith("error: a file lies where a directory is wanted: ")


def test_a_disk_that_fills_up_stops_a_run_in_one_line_and_room_lets_it_go_on(script, mounted, monkeypatch):
    workdir = mounted("small", "size=256k")

    def train_on(parts, **_):
        for step in range(100):
            with (parts[0].directory / "metrics.jsonl").open("a") as file:
                file.write("x" * 8191 + "\n")
            parts[0].report({"step": step})
        return ["done"]

    monkeypatch.setattr(loop, "train", train_on)
    ended = script(train.main, SMOKE, f"--workdir={workdir}")
    assert ended.complaint.startswith("error: disk full")
    (run,) = SweepDirectory(workdir).runs
    assert 0 < run.status["step"] < 99, "the last status that was written whole"
    monkeypatch.setattr(loop, "train", lambda parts, **_: ["done"])
    (run.path / "metrics.jsonl").unlink()
    assert script(train.main, SMOKE, f"--workdir={workdir}").code == 0
    assert run.state == "done"


def numbers(workdir):
    """What was measured, timings aside: the rows of results.csv, and the lines of metrics.jsonl."""
    with (workdir / "report" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = [{name: value for name, value in row.items() if name not in faults.TIMINGS} for row in rows]
    (run,) = SweepDirectory(workdir).runs
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return kept, [line for line in lines if not any(name in line for name in faults.TIMINGS)]


@pytest.mark.slow
def test_damage_of_every_file_of_a_finished_run_leaves_its_numbers_and_trains_nothing(script, tmp_path):
    config = faults.write_config(tmp_path, faults.Setting(cells=2, steps=20, checkpoint_every=6, eval_every=9))
    workdir = tmp_path / "w"
    run_it = (train.main, f"--config={config}", f"--workdir={workdir}", "--noprogress")
    assert script(*run_it).code == 0
    assert script(report.main, f"--workdir={workdir}").code == 0
    (run,) = SweepDirectory(workdir).runs
    before, trained = numbers(workdir), run.status["seconds"]["train"]
    assert len(before[0]) == 2 and len(before[1]) > 20 and trained > 0

    metrics = run.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().rstrip(b"\n")[:-200] + b"\xff")
    script(*run_it)
    assert numbers(workdir)[1] == before[1], "the last step is evaluated again where its lines are corrupt"
    assert run.status["seconds"]["train"] == trained
    for name in ("status.json", "config.json"):
        (run.path / name).write_text('{"state": "do')
    (workdir / "sweep.json").write_text("[]")
    assert "sweep.json is damaged" in script(report.main, f"--workdir={workdir}").complaint
    ended = script(*run_it)
    assert ended.code == 0 and ended.out.count("warning: ") == 3, ended.out
    assert run.status["seconds"]["train"] == 0.0
    assert script(report.main, f"--workdir={workdir}").code == 0
    assert numbers(workdir) == before
    assert f"{run.run_id}: {run.path / 'status.json'} is damaged" in (workdir / "report" / "index.html").read_text()
