"""One run over several processes: the same numbers whatever their number, and one end for all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from etils import epath

from mha_jax import config as configs
from mha_jax.data import Share, load
from mha_jax.specs import UserError
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training import hosts, loop
from mha_jax.training.checkpoints import Checkpoints
from mha_jax.training.metrics import MetricsLog, read_metrics
from tests import tiny

TIMINGS = {"step_seconds", "tokens_per_second", "compile_seconds", "peak_bytes"}
DROPOUT = {"model__dropout_rate": 0.2, "model__attention_dropout_rate": 0.3}
STEPS = 50

# One of the processes: trains runs one after the other, and stops those that it is told to, asked by the last process.
MEMBER = """
import itertools, json, sys
import jax
from etils import epath
from mha_jax import config as configs
from mha_jax.data import Share, load
from mha_jax.training import hosts, loop
from mha_jax.training.devices import use_cores

hosts.enrol(hosts.inherited())
use_cores(configs.resolve(json.load(open(sys.argv[1] + "/config.json"))))
hosts.join(epath.Path(sys.argv[1]), lambda line, code: None, lambda: False)
for argument in sys.argv[1:]:
    directory, _, calls = argument.partition("@")
    config = json.load(open(directory + "/config.json"))
    run = configs.resolve(config)
    made = itertools.count()
    asked = lambda: next(made) == int(calls or -1) and hosts.group().process_id == hosts.group().num_processes - 1
    facts = {}
    with jax.enable_x64(run.model.dtype == "float64"):
        part = loop.Part(config, run, epath.Path(directory), facts.update)
        cache = epath.Path(directory).parent.parent / "cache"
        ended = loop.train([part], cache_dir=cache, should_stop=hosts.AgreedStop(asked), progress=False)
    assert ended == ["stopped" if calls else "done"], ended
hosts.leave()
"""


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def environment(process, processes, port, folder, watchdog_seconds=240.0):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": os.fspath(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    group = hosts.Group(processes, process, f"localhost:{port}", watchdog_seconds)
    # One device a process: the eight of the suite's settings are not for them.
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    return {**os.environ, **group.environment(), **cache, "PYTHONPATH": ".", "XLA_FLAGS": flags}


def start(command, processes, folder, **settings):
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(process, processes, port, folder, **settings),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]


def finish(started):
    """Exit codes and what was printed as errors."""
    try:
        printed = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], printed


def config(folder, **overrides):
    words = ["the", "a", "red", "old", "big", "cat", "dog", "hen", "sat", "on", "mat", "hat", "bat"]
    path = folder / "corpus.txt"
    if not path.exists():
        rng = np.random.default_rng(0)
        path.write_text("\n\n".join(" ".join(rng.choice(words, 7)) for _ in range(80)))
    values = {"data__files__train": str(path), "training__steps": STEPS, "training__eval_every": 25}
    values |= {
        "model__num_layers": 1,
        "training__checkpoint_every": STEPS,
        "training__log_every": 1,
        "optimizer__epsilon": 1e-6,
    }
    return tiny.config("lm", **{**values, **DROPOUT, **overrides})


def prepare(folder, name, made):
    directory = RunDirectory.create(folder / "runs" / name, made)
    return os.fspath(directory.path)


def train_here(directory, stop_at=None):
    """In this process, on one device."""
    made = json.loads((epath.Path(directory) / "config.json").read_text())
    made["mesh"] = {"seed": 1, "data": 1, "head": 1}
    run, calls = configs.resolve(made), []

    def should_stop():
        calls.append(None)
        return stop_at is not None and len(calls) > stop_at

    with jax.enable_x64(run.model.dtype == "float64"):
        part = loop.Part(made, run, epath.Path(directory), {}.update)
        cache = epath.Path(directory).parent.parent / "cache"
        return loop.train([part], cache_dir=cache, should_stop=should_stop, progress=False)


def metrics(directory):
    rows, problems = read_metrics(epath.Path(directory) / "metrics.jsonl")
    assert not problems
    return {
        (row["step"], row["seed"], row["split"], row["name"]): row["value"]
        for row in rows
        if row["name"] not in TIMINGS
    }


def newest(directory):
    """The step of the newest checkpoint."""
    return max(Checkpoints(epath.Path(directory) / "checkpoints", keep_last=2).steps(), default=0)


def gap(a, b, name="loss"):
    """The largest difference of a metric over all steps, seeds and splits."""
    a, b = metrics(a), metrics(b)
    assert a.keys() == b.keys()
    return max(abs(a[key] - b[key]) for key in a if key[3] == name)


# What is trained by 1, 2 and 4 processes, and how those of 2 and 4 lay it out.
RUNS = {
    "float64": ({"model__dtype": "float64"}, {2: {"mesh__data": 2}, 4: {"mesh__data": 2, "mesh__head": 2}}),
    "float32": ({"seeds": (1,)}, {2: {"mesh__head": 2}, 4: {"mesh__data": 4}}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories by (run, processes), and what happened to one that was handed from 1 to 2 to 4 to 1 process.

    Of its two processes first one is killed, and of the next two one is frozen.
    """
    folder = tmp_path_factory.mktemp("hosts")
    found = {
        (name, count): prepare(folder, f"{name}-{count}", config(folder, **values, **layouts.get(count, {})))
        for name, (values, layouts) in RUNS.items()
        for count in (1, 2, 4)
    }
    moved = prepare(folder, "moved", config(folder, **RUNS["float64"][0], training__checkpoint_every=5))
    for name in RUNS:
        assert train_here(found[name, 1]) == ["done"]
    assert train_here(moved, stop_at=7) == ["stopped"]
    train_in(2, [found[name, 2] for name in RUNS], folder)
    killed = disturb(moved, signal.SIGKILL, 240.0, folder)
    frozen = disturb(moved, signal.SIGSTOP, LIMIT, folder)
    before = newest(moved)
    train_in(4, [*(found[name, 4] for name in RUNS), f"{moved}@3"], folder)
    steps = newest(moved) - before
    assert train_here(moved) == ["done"]
    return found | {"moved": moved, "killed": killed, "frozen": frozen, "steps by 4": steps}


def train_in(processes, directories, folder):
    codes, printed = finish(start(["-c", textwrap.dedent(MEMBER), *directories], processes, folder))
    assert codes == [0] * processes, printed


LIMIT = 20.0


def disturb(directory, number, limit, folder):
    """Lets two processes train until there is a new checkpoint, sends process 1 a signal, and waits for the other."""
    before = newest(directory)
    for _ in range(4):  # on a busy machine the start alone may take longer than the watchdog allows
        both = start(["-m", "mha_jax.sweeps.cell", directory], 2, folder, watchdog_seconds=limit)
        while newest(directory) == before and both[0].poll() is both[1].poll() is None:
            time.sleep(0.02)
        if newest(directory) > before:
            break
        finish(both)
    both[1].send_signal(number)
    began = time.monotonic()
    try:
        both[0].communicate(timeout=120)
    finally:
        both[1].kill()
        both[1].communicate()
    stacks = [path.name for path in epath.Path(directory).glob("stacks-*.txt")]
    return both[0].returncode, time.monotonic() - began, RunDirectory(directory).status, stacks


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_losses_of_one_over_50_steps(trained, processes):
    # Tolerances: sums in another order differ by 1e-16 and 1e-7 a step, and Adam amplifies that; a wrong row by 1e-2.
    assert gap(trained["float64", 1], trained["float64", processes]) <= 1e-9
    assert gap(trained["float32", 1], trained["float32", processes]) <= 1e-4


@pytest.mark.slow
def test_kill_9_of_a_process_ends_the_other_with_a_line_that_names_it(trained):
    code, seconds, status, _ = trained["killed"]
    assert code == 1 and seconds < 60  # four beats of 5 s missed, and what a busy machine adds
    assert status["state"] == "failed" and status["error"].startswith("process 1 is gone, last heard of at ")


@pytest.mark.slow
def test_a_process_that_does_not_answer_is_named_within_the_limit_and_the_stacks_are_left(trained):
    code, seconds, status, stacks = trained["frozen"]
    assert code == 1 and LIMIT - 1 < seconds < 2 * LIMIT
    assert "process 1 does not answer, last heard of at " in status["error"]
    assert "stacks-0.txt" in stacks  # the frozen one can write none


@pytest.mark.slow
def test_all_processes_stop_together_when_one_is_asked_to(trained):
    assert trained["steps by 4"] == 4  # the last one is asked before its fourth step, and all stop one later


@pytest.mark.slow
def test_a_run_that_lost_processes_and_was_handed_from_1_to_2_to_4_to_1_ends_as_one_left_alone(trained):
    assert gap(trained["float64", 1], trained["moved"]) <= 1e-9


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_processes": 2, "process_id": 2}, "--process_id=2 is none of 2 processes; they are 0 to 1"),
        ({"coordinator": "host0"}, "--coordinator='host0' must be HOST:PORT"),
        ({"coordinator": "host0:99999"}, "--coordinator='host0:99999' must be HOST:PORT"),
        ({"watchdog_seconds": -1.0}, "--watchdog_seconds=-1.0 must be positive"),
    ],
)
def test_a_group_that_cannot_be_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        hosts.Group(**values)


def test_a_child_finds_the_place_that_its_driver_has(monkeypatch):
    group = hosts.Group(4, 3, "host0:8476", 60.0)
    assert hosts.inherited(group.environment()) == group
    assert hosts.inherited({}) == hosts.Group() and not hosts.Group().environment()
    assert group.at(2).coordinator == "host0:8478"


@pytest.mark.parametrize("task", ["lm", "masked_lm"])
def test_shares_of_a_batch_are_the_whole_batch(tmp_path, task):
    config(tmp_path)  # for its text
    spec = tiny.run(task, data__files__train=str(tmp_path / "corpus.txt")).data
    data = load(spec, task, epath.Path(tmp_path / "cache"))
    whole = data.train_batch(3, 5)
    parts = [data.train_batch(3, 5, Share(place, place + 1, 4)) for place in range(4)]
    for name, leaf in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), leaf, err_msg=name)
        assert all(len(part[name]) == 2 for part in parts)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    directory = RunDirectory.create(tmp_path / "runs" / "one", tiny.config("lm"))
    log = MetricsLog(tmp_path, (0,))
    monkeypatch.setattr(hosts, "_group", hosts.Group(2, 1, "host0:1"))
    directory.update(state="running")
    log.write(1, "train", {"loss": [1.0]})
    with directory.lock():
        assert not (directory.path / "lock").exists()
    assert directory.state == "queued" and not (tmp_path / "metrics.jsonl").exists()
    assert hosts.named("log.txt") == "log-1.txt"
