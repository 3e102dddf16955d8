"""The local executor with cells that only play training, so that every ending can be had in a second or two."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mha_jax.sweeps import grid
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.store import RunDirectory

DRIVER = """
import sys
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.store import RunDirectory
paths, command = sys.argv[1].split(","), sys.argv[2].split(",")
sys.exit(local.run([[RunDirectory(path)] for path in paths], command=command, say=print))
"""


@pytest.fixture
def cells(config_file, tmp_path):
    def make(*names):
        config = {name: grid.load(config_file, {"mesh.data": 1, "name": name}).config for name in names}
        return [RunDirectory.create(tmp_path / "w" / "runs" / name, config[name]) for name in names]

    return make


@pytest.fixture
def drive(cell_command):
    started = []

    def start(directories):
        paths = ",".join(str(directory.path) for directory in directories)
        arguments = [sys.executable, "-c", DRIVER, paths, ",".join(cell_command)]
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def alone(directories):
    return [[directory] for directory in directories]


def trace(directory):
    file = Path(directory.workdir) / "trace.txt"
    return file.read_text().splitlines() if file.exists() else []


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def step(directory):
    return directory.status.get("step", 0)


def test_every_cell_runs_once_and_what_is_done_is_skipped(cells, cell_command):
    directories = cells("a", "b")
    assert local.run(alone(directories), command=cell_command) == Exit.DONE
    assert local.run(alone(directories), command=cell_command) == Exit.DONE
    assert [directory.state for directory in directories] == ["done", "done"]
    assert trace(directories[0]) == ["a from 0", "b from 0"]


@pytest.mark.slow
def test_workers_run_at_once(cells, cell_command):
    directories = cells("slow", "a")
    assert local.run(alone(directories), workers=2, command=cell_command) == Exit.DONE
    assert directories[1].status["finished"] < directories[0].status["finished"]


@pytest.mark.slow
def test_a_failing_cell_is_tried_twice_and_the_others_finish(cells, cell_command):
    directories = cells("broken", "a")
    said = []
    assert local.run(alone(directories), command=cell_command, say=said.append) == Exit.FAILED
    assert sorted(trace(directories[0])) == ["a from 0", "broken from 0", "broken from 0"]
    assert [directory.state for directory in directories] == ["failed", "done"]
    assert said[-1] == "[2/2] broken: failed: RuntimeError: planted"
    assert "planted" in (directories[0].path / "error.txt").read_text()


def test_a_second_attempt_may_succeed(cells, cell_command):
    (directory,) = cells("flaky")
    assert local.run([[directory]], command=cell_command) == Exit.DONE
    assert directory.status["attempts"] == 2


def test_a_cell_killed_by_the_system_goes_on_where_it_was(cells, cell_command):
    (directory,) = cells("killed")
    said = []
    assert local.run([[directory]], command=cell_command, say=said.append) == Exit.DONE
    assert trace(directory) == ["killed from 0", "killed from 5"]
    assert "killed by SIGKILL (out of memory?)" in said[0]


def test_what_the_user_must_mend_is_not_tried_again(cells, cell_command):
    (directory,) = cells("wrong")
    assert local.run([[directory]], command=cell_command) == Exit.WRONG_INPUT
    assert trace(directory) == ["wrong from 0"]


def test_a_damaged_status_fails_its_own_cell_only_and_that_goes_on_where_it_was(cells, cell_command):
    directories = cells("garbles", "a")
    said = []
    assert local.run(alone(directories), workers=2, command=cell_command, say=said.append) == Exit.DONE
    assert sorted(trace(directories[0])) == ["a from 0", "garbles from 0", "garbles from 6"]
    assert any("garbles: " in line and "status.json is damaged" in line for line in said)
    assert "status.json is damaged" in directories[0].status["incidents"][0]


def test_a_fault_of_the_drivers_own_stops_the_cells_with_their_state(cells, cell_command):
    (directory,) = cells("slow")

    def fail():
        if step(directory) >= 2:
            raise RuntimeError("planted")

    queue = local.Queue([[directory]], 1, cell_command, print)
    queue.show = fail
    with pytest.raises(RuntimeError, match="planted"):
        local.drive(queue)
    assert directory.state == "stopped"


def test_a_pack_is_trained_in_one_process_and_what_fails_in_it_once_more_by_itself(cells, cell_command):
    directories = cells("a", "broken", "b")
    said = []
    assert local.run([directories], command=cell_command, say=said.append) == Exit.FAILED
    assert trace(directories[0]) == ["a from 0", "broken from 0", "b from 0", "broken from 0"]
    assert [directory.state for directory in directories] == ["done", "failed", "done"]
    assert said[-1] == "[3/3] broken: failed: RuntimeError: planted"


@pytest.mark.slow
def test_a_pack_that_dies_twice_is_taken_apart(cells, cell_command):
    directories = cells("a", "greedy")
    said = []
    assert local.run([directories], command=cell_command, say=said.append) == Exit.FAILED
    # Both processes of the pack die with "greedy" before "a" is recorded; then each goes by itself.
    assert trace(directories[0]) == ["a from 0", "greedy from 0", *["a from 11", "greedy from 0"] * 2]
    assert [directory.state for directory in directories] == ["done", "failed"]
    assert said[-1] == "[2/2] greedy: failed: killed by SIGKILL (out of memory?)"


@pytest.mark.slow
def test_sigterm_to_the_driver_stops_the_cells_with_their_state(cells, cell_command, drive):
    directories = cells("slow", "a")
    driver = drive(directories)
    wait_for(lambda: step(directories[0]) >= 2)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(20) == Exit.STOPPED
    assert [directory.state for directory in directories] == ["stopped", "queued"]
    reached = step(directories[0])
    assert local.run(alone(directories), command=cell_command) == Exit.DONE
    assert trace(directories[0]) == ["slow from 0", f"slow from {reached}", "a from 0"]


@pytest.mark.slow
def test_cells_of_a_driver_that_is_killed_stop_and_are_continued(cells, cell_command, drive):
    (directory,) = cells("slow")
    driver = drive([directory])
    wait_for(lambda: step(directory) >= 2)
    driver.kill()
    driver.wait()
    wait_for(lambda: not directory.locked, seconds=5)
    assert directory.state == "stopped"
    assert local.run([[directory]], command=cell_command) == Exit.DONE
    assert directory.status["attempts"] == 2


@pytest.mark.slow
def test_two_drivers_share_the_cells_and_run_none_twice(cells, drive):
    directories = cells("slow", "a", "b", "c")
    drivers = [drive(directories), drive(directories)]
    assert [driver.wait(60) for driver in drivers] == [Exit.DONE, Exit.DONE]
    assert sorted(trace(directories[0])) == ["a from 0", "b from 0", "c from 0", "slow from 0"]


@pytest.mark.slow
def test_a_driver_takes_over_what_another_leaves(cells, cell_command, drive):
    (directory,) = cells("slow")
    first = drive([directory])
    wait_for(lambda: step(directory) >= 1)
    second = drive([directory])
    time.sleep(1.5)
    os.kill(first.pid, signal.SIGKILL)
    assert second.wait(60) == Exit.DONE
    assert len(trace(directory)) == 2
