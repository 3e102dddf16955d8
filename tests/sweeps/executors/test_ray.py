"""The Ray executor: on a cluster of two nodes, one of which dies, and with what Ray answers played."""

import concurrent.futures
import os
import random
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from mha_jax.specs import UserError
from mha_jax.sweeps import grid
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.executors import ray as executor
from mha_jax.sweeps.store import RunDirectory
from tests import tiny
from tests.end_to_end.test_sweep import rows
from tests.sweeps.executors.test_local import step, trace, wait_for

DRIVER = """
import sys
from mha_jax.sweeps.executors import ray
from mha_jax.sweeps.store import RunDirectory
address, paths, command = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
ray.connect(address, {"CPU": 1.0})
sys.exit(ray.run([[RunDirectory(path)] for path in paths], needs={"CPU": 1.0}, command=command, say=print))
"""


@pytest.fixture
def cells(config_file, tmp_path):
    def make(*names):
        config = {name: grid.load(config_file, {"mesh.data": 1, "name": name}).config for name in names}
        return [RunDirectory.create(tmp_path / "w" / "runs" / name, config[name]) for name in names]

    return make


@pytest.mark.parametrize("text", ["", "2", "{}", '{"CPU": "two"}', '{"CPU": 0}', '{"GPU": true}', '["CPU"]'])
def test_resources_that_are_none_are_refused(text):
    with pytest.raises(UserError, match="must be a JSON object of positive numbers"):
        executor.parse_resources(text)


def test_resources_are_read():
    assert executor.parse_resources('{"CPU": 2, "TPU-v5e-8-head": 1}') == {"CPU": 2, "TPU-v5e-8-head": 1}


def test_without_ray_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-ray\.txt"):
        executor.connect("auto", {"CPU": 1.0})


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not bind processes to cores")
def test_cells_on_one_node_have_cores_of_their_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1001, 1002, 1003})
    with executor._bound(2) as first, executor._bound(2) as second, executor._bound(None) as free:
        assert (first, second, free) == ({1001, 1002}, {1003}, set())
    with executor._bound(1) as again:
        assert again == {1001}


@pytest.mark.parametrize("needs, cores", [({"CPU": 2.0}, 2), ({"CPU": 2.0, "GPU": 1.0}, None), ({"TPU": 4.0}, None)])
def test_only_cells_that_train_on_cores_are_bound_to_them(needs, cores):
    assert executor._own_cores(needs) == cores


@pytest.mark.parametrize("alive, goes", [([], True), (["ghost"], False)])
def test_the_lock_of_a_machine_makes_way_only_when_ray_says_that_it_is_gone(monkeypatch, cells, alive, goes):
    (directory,) = cells("a")
    nodes = [{"NodeManagerHostname": name, "Alive": True} for name in alive]
    nodes.append({"NodeManagerHostname": "ghost", "Alive": False})
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(nodes=lambda: nodes))
    with directory.lock():
        (directory.path / "lock").write_text("process 7 on ghost\n")
        executor._forget_dead_holder(directory)
        assert directory.locked != goes


@pytest.fixture
def played(monkeypatch):
    """Ray's answers, one after the other: exit codes and errors."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: requirements-ray.txt")
    answers = []

    def get(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(executor._Task, "_submit", lambda task: setattr(task, "_ref", None))
    monkeypatch.setattr(executor, "_forget_dead_holder", lambda directory: None)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", get)
    return answers


def test_a_lost_node_is_no_attempt_of_the_run(played, cells):
    from ray.exceptions import LocalRayletDiedError, WorkerCrashedError

    directories, said = cells("a"), []
    played += [WorkerCrashedError(), LocalRayletDiedError(), Exit.FAILED, WorkerCrashedError(), Exit.FAILED]
    assert executor.run([directories], needs={"CPU": 1.0}, say=said.append) == Exit.FAILED
    assert played == []
    assert [line.split(": ")[1] for line in said] == [
        "WorkerCrashedError",
        "LocalRayletDiedError",
        "ended with exit code 1; trying once more",
        "WorkerCrashedError",
        "failed",
    ]


@pytest.mark.slow
def test_a_run_that_is_lost_again_and_again_fails_with_the_reason(played, cells):
    from ray.exceptions import WorkerCrashedError

    directories, said = cells("a"), []
    played += [WorkerCrashedError()] * 2 * executor._LOSSES
    assert executor.run([directories], needs={"CPU": 1.0}, say=said.append) == Exit.FAILED
    assert played == []
    assert said[-1].startswith("[1/1] a: failed: WorkerCrashedError: ")
    assert directories[0].state == "failed" and (directories[0].path / "error.txt").exists()


@pytest.mark.slow
def test_a_cell_that_hangs_on_a_node_is_ended_as_patience_wants_it(cells, cell_command):
    (directory,) = cells("hangs")
    assert executor._train(list(cell_command), [str(directory.path)], None, 1.5) == Exit.FAILED
    assert directory.status["error"] == "hung at step 5: nothing went on for 1.5 s"


# A node that is gone is noticed after three seconds instead of fifteen.
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
HEAD = {"num_cpus": 1, "include_dashboard": False, "_system_config": HEALTH}


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, started as in the background of a script; the second may be killed and replaced."""
    pytest.importorskip("ray", reason="Ray is not installed: requirements-ray.txt")
    from ray.cluster_utils import Cluster

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    cluster.add_node(num_cpus=1)
    signal.signal(signal.SIGINT, before)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def connected(cluster):
    import ray

    executor.connect(cluster.address, {"CPU": 1.0})
    yield cluster
    ray.shutdown()


@pytest.mark.slow
def test_what_no_node_has_is_refused_with_what_there_is(cluster):
    with pytest.raises(UserError, match=r"no node of the Ray cluster has CPU 1, GPU 3 for a cell; it has CPU 1; CPU 1"):
        executor.connect(cluster.address, {"CPU": 1.0, "GPU": 3.0})


@pytest.mark.slow
def test_cells_end_as_they_do_here(connected, cells, cell_command, capfd):
    directories, said = cells("a", "broken", "killed"), []
    packs = [directories[:1], directories[1:2], directories[2:]]
    assert executor.run(packs, needs={"CPU": 1.0}, command=cell_command, say=said.append) == Exit.FAILED
    assert [directory.state for directory in directories] == ["done", "failed", "done"]
    lines = trace(directories[0])
    assert sorted(lines) == ["a from 0", *["broken from 0"] * 2, "killed from 0", "killed from 5"]
    assert "killed: killed by SIGKILL (out of memory?); trying once more" in said
    assert capfd.readouterr() == ("", ""), "Ray itself says nothing"


@pytest.fixture
def drive(cluster, cell_command):
    started = []

    def start(directory):
        arguments = [sys.executable, "-c", DRIVER, cluster.address, str(directory.path), ",".join(cell_command)]
        started.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_sigterm_to_the_driver_saves_the_state_and_its_death_ends_the_cells(cells, drive):
    (directory,) = cells("slower")
    driver = drive(directory)
    wait_for(lambda: step(directory) >= 1)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(40) == Exit.STOPPED, driver.communicate()[0]
    reached = step(directory)
    assert directory.state == "stopped" and trace(directory) == ["slower from 0"]
    second = drive(directory)
    wait_for(lambda: step(directory) > reached)
    second.kill()
    wait_for(lambda: not directory.locked, seconds=40)
    third = drive(directory)
    assert third.wait(60) == Exit.DONE, third.communicate()[0]
    starts = [int(line.split()[-1]) for line in trace(directory)]
    assert starts[:2] == [0, reached] and len(starts) == 3 and starts[2] > reached


def ancestors(pid):
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


@pytest.mark.slow
def test_a_node_that_dies_changes_no_result(connected, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"the {n} heads of layer {n % 7} look back" for n in range(400)))

    def runs(name):
        found = []
        for heads in (2, 4):
            config = tiny.config(
                seeds=(0,),
                data__files__train=str(tmp_path / "text.txt"),
                model__num_heads=heads,
                mesh__data=1,
                training__steps=200,
                training__eval_every=100,
                training__checkpoint_every=10,
            )
            found.append(RunDirectory.create(tmp_path / name / "runs" / f"h={heads}", config))
        return found

    calm, hit = runs("calm"), runs("hit")
    assert local.run([[run] for run in calm], workers=2) == Exit.DONE
    moment, said = random.randrange(120), []

    def kill_node():
        """When the second node trains, it goes at any moment with all that runs on it."""
        (node,) = [node for node in connected.list_all_nodes() if node is not connected.head_node]
        raylet = node.all_processes["raylet"][0].process.pid
        wait_for(lambda: trainer(raylet) is not None, seconds=120)
        victim = trainer(raylet)
        # All at once, as a machine goes: first who could still tell that the cell has died.
        for process in (ancestors(victim)[0], victim):
            os.kill(process, signal.SIGKILL)
        connected.remove_node(node, allow_graceful=False)

    def trainer(raylet):
        """The process below this one that has trained so many steps of a run."""
        for run in hit:
            locked = step(run) >= moment and (run.path / "lock").exists()
            holder = re.match(r"process (\d+) ", (run.path / "lock").read_text()) if locked else None
            if holder and run.state == "running" and raylet in ancestors(int(holder[1])):
                return int(holder[1])
        return None

    with concurrent.futures.ThreadPoolExecutor() as aside:
        killed = aside.submit(kill_node)
        assert executor.run([[run] for run in hit], needs={"CPU": 1.0}, say=said.append) == Exit.DONE
    killed.result()
    assert any("going on elsewhere" in line for line in said), (moment, said)
    assert [rows(run) for run in hit] == [rows(run) for run in calm], moment
    assert sorted(run.status["attempts"] for run in hit) == [1, 2]
