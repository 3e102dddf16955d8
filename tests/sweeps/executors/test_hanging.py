"""A process that goes on no more is told from one that is slow, and leaves word of where it stood."""

import signal
import time

import pytest

from mha_jax.sweeps import grid
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.executors.hanging import Patience
from mha_jax.sweeps.store import RunDirectory


@pytest.fixture
def moment(monkeypatch):
    """A clock that is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pass_by(seconds):
        now[0] += seconds

    return pass_by


def test_a_process_whose_files_change_is_left_alone_however_long_it_takes(tmp_path, moment):
    run, sent = RunDirectory(tmp_path), []
    patience = Patience(sent.append, [RunDirectory(tmp_path / "other"), run], seconds=40.0)
    for step in range(5):
        moment(39)
        run.update(step=step)
        patience.look()
    assert patience.hung is None and sent == []


def test_one_that_stands_still_is_asked_for_its_stacks_then_to_stop_and_then_killed(tmp_path, moment):
    run, sent = RunDirectory(tmp_path), []
    run.update(step=7)
    patience = Patience(sent.append, [run], seconds=40.0)
    stages = [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL]
    for seconds, count in ((39, 0), (2, 1), (2, 2), (30, 3)):
        moment(seconds)
        patience.look()
        assert sent == stages[:count]
    assert patience.hung == "hung at step 7: nothing went on for 40 s"


@pytest.mark.slow
def test_a_cell_that_hangs_is_tried_once_more_and_its_stacks_are_kept(config_file, cell_command, tmp_path):
    config = grid.load(config_file, {"mesh.data": 1, "name": "hangs"}).config
    run = RunDirectory.create(tmp_path / "w" / "runs" / "hangs", config)
    said, stacks = [], []

    def say(line):
        said.append(line)
        if "trying once more" in line:
            stacks.append((run.path / "error.txt").read_text())

    assert local.run([[run]], command=cell_command, say=say, hang_seconds=1.5) == Exit.DONE
    assert said[0] == "hangs: hung at step 5: nothing went on for 1.5 s; trying once more"
    assert "most recent call first" in stacks[0] and "in play_one" in stacks[0]
    assert run.status["incidents"] == ["attempt 1: hung at step 5: nothing went on for 1.5 s"]
    assert run.status["attempts"] == 2 and not (run.path / "error.txt").exists()
