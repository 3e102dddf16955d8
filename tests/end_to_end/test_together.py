"""A sweep that several processes train."""

import os
import socket
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_mistake_that_the_first_process_finds_ends_them_all_with_its_line(tmp_path):
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    flags = ["--config=configs/default.py:smoke", f"--workdir={tmp_path}/w", "--seeds=three", "--num_processes=2"]
    command = [sys.executable, "-m", "experiments.sweep", *flags, f"--coordinator=localhost:{port}"]
    # One device a process: with the eight of the suite, processes of jax 0.10 may hang at their first meeting.
    xla_flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={process}"],
            env={**os.environ, "XLA_FLAGS": xla_flags},
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in (0, 1)
    ]
    try:
        told = [process.communicate(timeout=120)[1].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    mistake = "--seeds=three: 'three' is no seed; give numbers from 0 on, as 3..9 or 3,5,8"
    assert told == [f"error: {mistake}", f"error: process 0 failed: {mistake}"]
    assert [process.returncode for process in processes] == [2, 2] and not (tmp_path / "w").exists()
