"""Sweeps from the command line with real training: run, run again, stop, go on."""

import csv
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments import sweep, train
from mha_jax.sweeps.store import RunDirectory, SweepDirectory
from mha_jax.training.checkpoints import Checkpoints

SMOKE = "--config=configs/default.py:smoke"
TIMINGS = ("step_seconds", "tokens_per_second", "compile_seconds", "peak_bytes")


def rows(run):
    """Every measured value of a run by (step, seed, split, name); a line written twice is a fault."""
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["name"] not in TIMINGS]
    values = {(line["step"], line["seed"], line["split"], line["name"]): line["value"] for line in lines}
    assert len(values) == len(lines)
    return values


@pytest.fixture
def small(tmp_path):
    """The smoke sweep on a text that is read and evaluated in no time."""
    words = random.Random(5).choices(("head", "query", "key", "value", "wide", "narrow"), k=3000)
    documents = [" ".join(words[i : i + 30]) for i in range(0, len(words), 30)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    return [SMOKE, "--config.data.source=text", f"--config.data.files.train={tmp_path / 'text.txt'}"]


@pytest.fixture
def long(small):
    """A sweep long enough to be hit in its middle, with a checkpoint or an evaluation nearly always at hand."""
    numbers = {"training.steps": 60, "training.checkpoint_every": 3, "training.eval_every": 7, "training.log_every": 2}
    return [*small, "--config.mesh.data=1", *(f"--config.{name}={value}" for name, value in numbers.items())]


def start(flags, workdir):
    arguments = [sys.executable, "-m", "experiments.sweep", *flags, f"--workdir={workdir}"]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def training_cell(workdir, least=0):
    """The cell that is being trained, at step `least` or later, and its process; None where there is none."""
    for path in sorted((workdir / "runs").glob("*")):
        run = RunDirectory(path)
        holder = re.match(r"process (\d+) ", (path / "lock").read_text()) if run.locked else None
        if holder and run.state == "running" and run.status.get("step", -1) >= least:
            return run, int(holder[1])
    return None


@pytest.mark.slow
def test_a_sweep_gives_its_table_trains_nothing_again_and_its_cell_is_a_run_alone(script, small, tmp_path):
    numbers = {"training.steps": 10, "training.eval_every": 7, "training.log_every": 2}
    flags = [*small, *(f"--config.{name}={value}" for name, value in numbers.items())]
    ended = script(sweep.main, *flags, f"--workdir={tmp_path}")
    assert ended.code == 0, ended.out + ended.err
    runs = SweepDirectory(tmp_path).runs
    assert [run.state for run in runs] == ["done", "done"]
    assert (tmp_path / "report" / "index.html").exists()
    table = (tmp_path / "report" / "table.md").read_text()
    assert table.strip() in ended.out
    with (tmp_path / "report" / "results.csv").open() as file:
        results = list(csv.DictReader(file))
    assert [(row["model.num_heads"], row["seed"]) for row in results] == [
        ("1", "0"),
        ("1", "1"),
        ("8", "0"),
        ("8", "1"),
    ]
    assert all(float(row["validation/loss"]) > 0 for row in results)
    before = [run.status for run in runs]
    assert script(sweep.main, *flags, f"--workdir={tmp_path}").code == 0
    assert [run.status for run in runs] == before

    ended = script(train.main, *flags, "--config.model.num_heads=1", f"--workdir={tmp_path / 'alone'}", "--noprogress")
    assert ended.code == 0, ended.err
    (alone,) = SweepDirectory(tmp_path / "alone").runs
    # Its name tells every flag, where the cell tells what the sweep sets: the hash is the same.
    assert alone.run_id[-8:] == runs[0].run_id[-8:]
    assert rows(alone) == rows(runs[0])


@pytest.mark.slow
def test_a_dry_run_prices_every_cell_and_makes_nothing(script, tmp_path):
    ended = script(sweep.main, SMOKE, "--dry_run", f"--workdir={tmp_path / 'w'}", "--config.mesh.data=1")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert lines[0].split()[:3] == ["run", "heads", "kv"]
    assert lines[1].split()[1:5] == ["1", "1", "32", "32"]
    assert lines[2].split()[1:5] == ["8", "8", "4", "4"]
    assert lines[1].split()[5:8] == lines[2].split()[5:8], "parameters, FLOPs and cache are those of the fixed width"
    assert lines[1].split()[-1] == "MiB"
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_sigterm_saves_the_state_and_a_run_goes_on(script, long, tmp_path):
    workdir = tmp_path / "w"
    driver = start(long, workdir)
    while (found := training_cell(workdir, least=1)) is None:
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.1)
    stopped, _ = found
    driver.send_signal(signal.SIGTERM)
    out = driver.communicate(timeout=120)[0]
    assert driver.returncode == 75, out
    reached = stopped.status["step"]
    assert stopped.state == "stopped" and 0 < reached < 60
    assert Checkpoints(stopped.path / "checkpoints", keep_last=2).steps()[-1] == reached
    assert script(train.main, f"--run={stopped.path}", "--noprogress").code == 0
    assert stopped.status["attempts"] == 2


@pytest.mark.slow
def test_added_seeds_train_on_their_own_and_what_was_trained_stays_as_it_is(script, small, tmp_path):
    """Seeds 0 and 2, then 1: each run trains once, and the report merges them by seed."""
    numbers = {"mesh.data": 1, "training.steps": 10, "training.eval_every": 5}
    flags = [*small, *(f"--config.{name}={value}" for name, value in numbers.items()), f"--workdir={tmp_path}"]
    assert script(sweep.main, *flags, "--seeds=0,2").code == 0
    first = SweepDirectory(tmp_path).runs
    files = [run.path / name for run in first for name in ("metrics.jsonl", "status.json", "config.json")]
    kept = [file.read_bytes() for file in files]
    assert script(sweep.main, *flags, "--seeds=0..2").code == 0
    assert [file.read_bytes() for file in files] == kept
    runs = SweepDirectory(tmp_path).runs
    assert [run.config["seeds"] for run in runs] == [[0, 2], [0, 2], [1], [1]]
    with (tmp_path / "report" / "results.csv").open() as file:
        found = [(row["run"], row["model.num_heads"], row["seed"]) for row in csv.DictReader(file)]
    one, eight, one_more, eight_more = (run.run_id for run in runs)
    assert found[:3] == [(one, "1", "0"), (one, "1", "2"), (one_more, "1", "1")]
    assert found[3:] == [(eight, "8", "0"), (eight, "8", "2"), (eight_more, "8", "1")]
    assert "2 + 1 seeds, added in 2 batches" in (tmp_path / "report" / "table.md").read_text()
