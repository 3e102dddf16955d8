"""One cell in this process: what is recorded, and which exit code each ending has."""

import json
import os
import signal

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.cell import Exit, run_cell
from mha_jax.sweeps.store import Busy, RunDirectory
from mha_jax.training import loop


@pytest.fixture
def directory(config_file, tmp_path):
    # One device, whatever the suite simulates: the batch of 5 must fit.
    config = grid.load(config_file, {"mesh.data": 1}).config
    return RunDirectory.create(tmp_path / "w" / "runs" / "tiny", config)


@pytest.fixture
def play(monkeypatch):
    """Replaces the training loop by a function of (report, should_stop) and gives what it was called with."""
    seen = []

    def use(act):
        def train(parts, *, cache_dir, should_stop, progress):
            for config, run, directory, _ in parts:
                seen.append({"config": config, "run": run, "directory": directory, "cache_dir": cache_dir})
            return [act(report, should_stop) for *_, report in parts]

        monkeypatch.setattr(loop, "train", train)
        monkeypatch.setattr(loop, "Part", lambda *arguments: arguments)
        return seen

    return use


def fail(error):
    def act(report, should_stop):
        raise error

    return act


def test_a_finished_run_is_recorded_and_not_run_again(directory, play):
    seen = play(lambda report, should_stop: report({"step": 11}) or "done")
    assert run_cell(directory) == Exit.DONE
    assert run_cell(directory) == Exit.DONE
    assert len(seen) == 1
    status = directory.status
    assert (status["state"], status["step"], status["steps"], status["attempts"]) == ("done", 11, 11, 1)
    assert status["devices"]["platform"] == "cpu"
    assert "jax" in status["versions"] and status["error"] is None


def test_the_loop_gets_the_resolved_config_and_the_caches_of_the_sweep(directory, play):
    seen = play(lambda report, should_stop: "done")
    run_cell(directory)
    assert seen[0]["config"] == directory.config
    assert seen[0]["run"].model.num_heads == 2
    assert seen[0]["cache_dir"] == directory.workdir / ".cache" / "data"


def test_a_trial_shares_the_caches_of_its_sweep(directory, play, tmp_path):
    trial = RunDirectory.create(tmp_path / "w" / "tuning" / "runs" / "tiny", directory.config)
    (trial.workdir / "trials.json").write_text("{}")
    seen = play(lambda report, should_stop: "done")
    assert run_cell(trial) == Exit.DONE
    assert seen[0]["cache_dir"] == directory.workdir / ".cache" / "data"


def test_seconds_add_up_over_attempts(directory, play):
    play(lambda report, should_stop: report({"seconds": {"train": 2.0, "data": 1.0}}) or "stopped")
    assert run_cell(directory) == Exit.STOPPED
    assert directory.state == "stopped"
    play(lambda report, should_stop: report({"seconds": {"train": 3.0}}) or "done")
    run_cell(directory)
    seconds = directory.status["seconds"]
    assert (seconds["train"], seconds["data"]) == (5.0, 1.0)
    assert seconds["imports"] >= 0
    assert directory.status["attempts"] == 2


def test_a_failure_leaves_its_traceback_and_success_removes_it(directory, play):
    play(fail(RuntimeError("loss is not finite\nat step 3")))
    assert run_cell(directory) == Exit.FAILED
    assert "in act\n    raise error" in (directory.path / "error.txt").read_text()
    assert directory.status["error"] == "RuntimeError: loss is not finite"
    assert directory.failure == (
        f"run tiny failed: RuntimeError: loss is not finite; its traceback lies in {directory.path}/error.txt"
    )
    play(lambda report, should_stop: "done")
    assert run_cell(directory) == Exit.DONE
    assert not (directory.path / "error.txt").exists()
    assert directory.status["error"] is None


def test_what_the_user_got_wrong_is_another_exit_code(directory, play):
    play(fail(UserError("the text is empty")))
    assert run_cell(directory) == Exit.WRONG_INPUT
    assert directory.status["error"] == "the text is empty"


def test_a_full_disk_is_the_users_to_mend(directory, play):
    def act(report, should_stop):
        with open("/dev/full", "w") as file:
            file.write("x")

    play(act)
    assert run_cell(directory) == Exit.WRONG_INPUT
    assert directory.status["error"] == f"disk full: {directory.path}"
    assert "No space left on device" in (directory.path / "error.txt").read_text()


@pytest.mark.parametrize("error", [MemoryError("18 GiB"), RuntimeError("RESOURCE_EXHAUSTED: 18 GiB of host memory")])
def test_memory_that_does_not_suffice_is_told_with_what_was_predicted(directory, play, error):
    def act(report, should_stop):
        report({"predicted_peak_bytes": 3 * 2**30})
        raise error

    play(act)
    assert run_cell(directory) == Exit.FAILED
    told = f"OutOfMemory: {type(error).__name__}: {error}; predicted: 3,072 MiB"
    assert directory.status["error"] == told


def test_what_an_attempt_was_cut_short_by_stays_with_the_run(directory, play):
    directory.update(state="running", step=4, attempts=1)
    play(fail(RuntimeError("planted")))
    run_cell(directory)
    play(lambda report, should_stop: report({"incidents": ["checkpoint step 8 is damaged"]}) or "stopped")
    run_cell(directory)
    play(lambda report, should_stop: "done")
    assert run_cell(directory) == Exit.DONE
    assert directory.status["incidents"] == [
        "attempt 1: killed at step 4 or later",
        "attempt 2: RuntimeError: planted",
        "checkpoint step 8 is damaged",
    ]


def test_a_damaged_status_costs_a_run_that_is_done_nothing_but_its_end(directory, play):
    (directory.path / "status.json").write_text("")
    seen = play(lambda report, should_stop: "done")
    assert run_cell(directory) == Exit.DONE
    assert len(seen) == 1 and "status.json is damaged" in directory.status["incidents"][0]


def test_a_clock_that_goes_back_makes_no_time_negative(directory, play, monkeypatch):
    now = iter(range(10**9, 0, -3600))
    monkeypatch.setattr("time.time", lambda: float(next(now)))
    play(lambda report, should_stop: report({"seconds": {"train": 2.0}}) or "done")
    assert run_cell(directory) == Exit.DONE
    status = directory.status
    assert status["finished"] < status["started"]
    assert status["seconds"] == {"imports": 0.0, "train": 2.0}


def test_devices_that_do_not_fit_stop_the_run_before_its_training(config_file, tmp_path, play):
    seen = play(lambda report, should_stop: "done")
    directory = RunDirectory.create(tmp_path / "runs" / "r", grid.load(config_file, {"mesh.data": 1000}).config)
    assert run_cell(directory) == Exit.WRONG_INPUT
    assert "needs 1000 devices" in directory.status["error"]
    assert not seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_loop_to_stop(directory, play, number):
    before = signal.getsignal(number)

    def act(report, should_stop):
        assert not should_stop()
        os.kill(os.getpid(), number)
        return "stopped" if should_stop() else "done"

    play(act)
    assert run_cell(directory) == Exit.STOPPED
    assert signal.getsignal(number) is before


def test_a_run_in_other_hands_is_left_alone(directory, play):
    seen = play(lambda report, should_stop: "done")
    with directory.lock(), pytest.raises(Busy):
        run_cell(directory)
    assert not seen and directory.state == "queued"


def test_status_is_json_at_every_report(directory, play):
    def act(report, should_stop):
        for step in range(3):
            report({"step": step})
            assert json.loads((directory.path / "status.json").read_text())["state"] == "running"
        return "done"

    play(act)
    assert run_cell(directory) == Exit.DONE
