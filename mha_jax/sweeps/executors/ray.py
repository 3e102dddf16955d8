"""Runs packs of cells as tasks of a Ray cluster, each in a process of its own on the node that Ray chooses.

Ray says which node, and when it is gone; what a pack is, how often it is tried and how it is told is the local
executor's. Every node must see the sweep's directory at the same path or bucket, and have the packages installed; the
code itself goes with the tasks. The name of this file is the library's: imports here are absolute.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mha_jax.specs import UserError
from mha_jax.sweeps import provenance
from mha_jax.sweeps.cell import Exit
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.executors.hanging import HANG_SECONDS, Patience
from mha_jax.sweeps.store import RunDirectory

_Needs = Mapping[str, float]

_LOSSES = 5
_POLL_SECONDS = 0.1
_ROOT = Path(__file__).parents[3]
# As experiments/launch/tpu.sh, and what cells do not read: a driver on a TPU VM plans with the records in docs.
_LEFT_AT_HOME = ["/.git", "/.venv", "/.ci", "/runs", "/data", "/docs", "/tests"]


def parse_resources(text: str) -> dict[str, float]:
    """What each pack of cells takes of a node, from JSON such as {"CPU": 2, "GPU": 1} or {"TPU": 4}.

    Raises: UserError for what is no such object of positive numbers.
    """
    try:
        needs = json.loads(text)
    except ValueError:
        needs = None
    if not isinstance(needs, dict) or not needs or not all(_is_amount(amount) for amount in needs.values()):
        raise UserError(f'cell_resources={text!r} must be a JSON object of positive numbers, such as {{"CPU": 2}}')
    return {name: float(amount) for name, amount in needs.items()}


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def connect(address: str, needs: Mapping[str, float]) -> None:
    """Joins the cluster at an address ("auto": the one of this machine), or starts one here ("local").

    Raises: UserError where Ray is not installed, no cluster answers, or no node of it has what a cell needs: Ray itself
            would wait for such a node without a word.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")  # Ray prints pages where a node is lost; we say so too
    try:
        import ray
    except ImportError:
        raise UserError("the executor ray needs Ray: python -m pip install -r requirements-ray.txt") from None
    dashboard = False if address == "local" else None
    try:
        ray.init(
            address=address,
            runtime_env=_code(),
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}") from None
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes):
        ray.shutdown()
        raise UserError(
            f"no node of the Ray cluster has {_told(needs)} for a cell; it has {'; '.join(map(_told, nodes))}"
        )


def room(needs: Mapping[str, float]) -> int:
    """How many packs of cells the connected cluster has room for at once; at least 1."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return max(sum(min(int(node.get(name, 0) // amount) for name, amount in needs.items()) for node in nodes), 1)


def _told(resources: Mapping[str, float]) -> str:
    hidden = ("node:", "memory", "object_store_memory")
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items() if not name.startswith(hidden))


def _code() -> dict[str, Any]:
    """The clone that this module is part of, for nodes that have none; an installed package is theirs to install."""
    told = {"env_vars": {"MHA_JAX_COMMIT": provenance.commit() or ""}}
    if not (_ROOT / "pyproject.toml").exists():
        return told
    return {"working_dir": str(_ROOT), "excludes": _LEFT_AT_HOME, **told}


def run(
    packs: Sequence[Sequence[RunDirectory]],
    *,
    needs: Mapping[str, float],
    command: Sequence[str] = (),
    say: Callable[[str], None] = tqdm.write,
    hang_seconds: float = HANG_SECONDS,
) -> Exit:
    """Runs every cell that is not done, as many at once as the cluster has room for; `connect` comes first.

    A pack whose node or worker is lost goes on from its last checkpoint elsewhere, which is no attempt of its own; the
    fifth loss within an attempt ends that. Everything else is as in `local.run`: attempts, packs, SIGTERM, what is told
    and what hangs. Where this process dies, Ray ends the cells; run again, they go on from their last checkpoint.

    Args:    needs: what each pack takes of a node; see `parse_resources`.
             command: what a node starts, with the directories of a pack as its last arguments; default: the cell.
    Returns: see `local.run`.
    """
    return local.drive(_Queue(packs, needs, command, say, hang_seconds))


class _Queue(local.Queue):
    """Gives every pack to Ray at once, which makes those wait that it has no room for."""

    def __init__(self, packs: Sequence[Sequence[RunDirectory]], needs: _Needs, command: Any, say: Any, seconds: float):
        # Whether a process hangs is looked at on its node: one that waits for room does not.
        super().__init__(packs, len(packs), command, say, hang_seconds=math.inf)
        self._needs, self._seconds = needs, seconds

    def _spawn(self, pack: list[RunDirectory]) -> "_Task":
        return _Task(pack, self._needs, self._command, self._say, self._seconds)

    def show(self) -> None:
        packs = [child.directories for child in self._running if child.process.poll() is None]
        self._progress.show(len(self._ended), [pack for pack in packs if pack[0].state == "running"])


class _Task:
    """A pack in the hands of Ray, in the form of a `subprocess.Popen`."""

    stdin = None

    def __init__(self, pack: Sequence[RunDirectory], needs: _Needs, command: Any, say: Callable, seconds: float):
        self._pack, self._needs, self._command, self._say = pack, needs, command, say
        self._seconds = seconds
        self._losses = 0
        self._cancelled = False
        self.returncode: int | None = None
        self._submit()

    def _submit(self) -> None:
        import ray

        rest = {name: amount for name, amount in self._needs.items() if name not in ("CPU", "GPU", "memory")}
        task = ray.remote(_train).options(
            num_cpus=self._needs.get("CPU", 1),
            num_gpus=self._needs.get("GPU", 0),
            memory=self._needs.get("memory"),
            resources=rest,
            max_retries=0,  # counted here, where each loss is told
        )
        paths = [_absolute(directory) for directory in self._pack]
        self._ref = task.remote(list(self._command), paths, _own_cores(self._needs), self._seconds)

    def poll(self) -> int | None:
        import ray
        from ray import exceptions

        if self.returncode is None and ray.wait([self._ref], timeout=0)[0]:
            try:
                self.returncode = ray.get(self._ref)
            except exceptions.TaskCancelledError:
                self.returncode = Exit.STOPPED
            except (exceptions.OutOfMemoryError, exceptions.RuntimeEnvSetupError) as error:
                self._fail(error)
            except exceptions.RayError as error:
                self._lose(error)
        return self.returncode

    def _lose(self, error: Exception) -> None:
        self._losses += 1
        for directory in self._pack:
            _forget_dead_holder(directory)
        if self._cancelled:
            self.returncode = Exit.STOPPED
        elif self._losses == _LOSSES:
            self._fail(error)
        else:
            self._say(f"{self._pack[0].run_id}: {_line(error)}; going on elsewhere")
            self._submit()

    def _fail(self, error: Exception) -> None:
        for directory in self._pack:
            if directory.state != "done":
                (directory.path / "error.txt").write_text(str(error))
                directory.update(state="failed", error=_line(error))
        self.returncode = Exit.FAILED

    def send_signal(self, number: int) -> None:
        """Whatever the signal, the cell gets SIGTERM."""
        import ray

        self._cancelled = True
        ray.cancel(self._ref)

    def kill(self) -> None:
        import ray

        ray.cancel(self._ref, force=True)


def _line(error: Exception) -> str:
    """The last line says what happened; those before it, of a fault in the task, are its traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"


def _absolute(directory: RunDirectory) -> str:
    path = os.fspath(directory.path)
    return path if "://" in path else os.path.abspath(path)


def _forget_dead_holder(directory: RunDirectory) -> None:
    """A file server may keep the lock of a machine that is gone; where Ray says that it is, the file makes way."""
    import ray

    lock = directory.beside("lock")
    if not lock.exists():
        return
    host = lock.read_text().strip().rpartition(" on ")[2]
    alive = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]} | {socket.gethostname()}
    if host and host not in alive and directory.locked:
        lock.unlink(missing_ok=True)


def _own_cores(needs: Mapping[str, float]) -> int | None:
    """How many cores a cell is bound to; where an accelerator does the work, None."""
    return int(needs["CPU"]) if needs.get("CPU", 0) >= 1 and not {"GPU", "TPU"} & set(needs) else None


def _train(command: list[str], paths: list[str], cores: int | None, hang_seconds: float) -> int:
    """On a node, in a worker of Ray: starts the cells and waits for them. Cancelling it is SIGTERM to them."""
    # Ray cancels by an interrupt, to which workers are deaf whose node was started in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    pack = [RunDirectory(path) for path in paths]
    for directory in pack:
        if not (directory.path / "config.json").exists():
            raise FileNotFoundError(f"node {socket.gethostname()} does not see {directory.path}")
    log = pack[0].beside("log.txt")
    with _bound(cores) as mine, log.open("ab") as file:
        # The cells hold the other end of their standard input: when this worker dies, however, they stop too.
        process = subprocess.Popen(
            [*(command or (sys.executable, "-m", "mha_jax.sweeps.cell")), *paths],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={"GLIBC_TUNABLES": local.KEEP_MEMORY, **os.environ},
        )
        if mine:
            os.sched_setaffinity(process.pid, mine)
        patience = Patience(process.send_signal, pack, hang_seconds)
        try:
            while process.poll() is None:
                patience.look()
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
    if patience.hung or process.returncode not in tuple(Exit):
        # Told here: the log may lie on this node only.
        for directory in pack:
            if directory.state != "done":
                local.record_death(directory, process.returncode, log, patience.hung)
        return Exit.FAILED
    return process.returncode


@contextlib.contextmanager
def _bound(count: int | None) -> Iterator[set[int]]:
    """Cores that no other cell on this node has: Ray counts cores and does not say which."""
    with contextlib.ExitStack() as held:
        mine: set[int] = set()
        for core in sorted(os.sched_getaffinity(0)) if count and hasattr(os, "sched_getaffinity") else ():
            name = f"mha_jax-{os.getuid()}-core-{core}"
            file = held.enter_context((Path(tempfile.gettempdir()) / name).open("a"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine.add(core)
            if len(mine) == count:
                break
        yield mine
