"""Runs cells on this machine, each pack in a process of its own, so that memory and compiler caches end with it."""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from tqdm import tqdm

from mha_jax.sweeps.cell import Exit, stop_signals
from mha_jax.sweeps.executors.hanging import HANG_SECONDS, Patience
from mha_jax.sweeps.executors.progress import Progress
from mha_jax.sweeps.mending import mend_run
from mha_jax.sweeps.store import RunDirectory
from mha_jax.training import hosts

_CELL = (sys.executable, "-m", "mha_jax.sweeps.cell")
_ATTEMPTS = 2
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0  # for the step at hand and a checkpoint
# glibc's malloc keeps what a step frees for the next one, in one heap and large pages: on CPU, fetching it anew
# takes a fifth of a small step. Elsewhere nobody reads it.
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("arena_max=1", "hugetlb=1", "mmap_max=0", f"trim_threshold={2**34}", f"top_pad={2**28}")
)


@runtime_checkable  # for the checks of types while tests run
class Process(Protocol):
    """What trains a pack, as a queue sees it; a `subprocess.Popen` is one."""

    @property
    def returncode(self) -> int | None: ...
    @property
    def stdin(self) -> IO | None: ...
    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def kill(self) -> None: ...


@dataclasses.dataclass
class _Child:
    directories: list[RunDirectory]
    process: Process
    attempt: int
    patience: Patience


def run(
    packs: Sequence[Sequence[RunDirectory]],
    *,
    workers: int = 1,
    command: Sequence[str] = _CELL,
    say: Callable[[str], None] = tqdm.write,
    hang_seconds: float = HANG_SECONDS,
) -> Exit:
    """Runs every cell that is not done, `workers` packs at once; one that fails is run a second time.

    The cells of a pack are trained together in one process. Where that dies, the pack is tried once more, and then its
    cells one by one, so that one that takes too much memory does not take the others with it. Where one of them fails,
    it is tried once more by itself.

    Cells that another driver is training are waited for, or taken over where it dies. SIGTERM and Ctrl-C are passed on
    as SIGTERM; the cells save their state and the sweep goes on when it is run again.

    Args:    command: what is started, with the directories of a pack as its last arguments.
             hang_seconds: a process that neither reports nor measures anything for so long is ended; see `Patience`.
    Returns: DONE, STOPPED, FAILED where a run failed, WRONG_INPUT where every failure is the user's to mend.
    """
    return drive(Queue(packs, workers, command, say, hang_seconds))


def drive(queue: "Queue") -> Exit:
    """Runs a queue to its end, or until SIGTERM or Ctrl-C; see `run`."""
    with stop_signals() as should_stop, queue:
        while queue.open:
            if should_stop():
                queue.stop()
            queue.collect()
            queue.start()
            queue.show()
            time.sleep(_POLL_SECONDS)
    return queue.verdict()


def default_workers(platform: str, num_cells: int) -> int:
    """One cell at a time on an accelerator; on CPU one a core, up to 8: two small cells of a thread each outrun two
    that take turns on both cores."""
    return max(min(len(_cores(0)) or 1, num_cells, 8), 1) if platform == "cpu" else 1


class Queue:
    """The packs that wait, the ones that run, and how the other cells ended."""

    def __init__(
        self,
        packs: Sequence[Sequence[RunDirectory]],
        workers: int,
        command: Sequence[str],
        say: Callable,
        hang_seconds: float = HANG_SECONDS,
    ):
        self._all = [directory for pack in packs for directory in pack]
        self._waiting = collections.deque((list(pack), 1) for pack in packs)
        self._running: list[_Child] = []
        self._ended: dict[str, Exit] = {}
        self._workers, self._command, self._say, self._hang_seconds = workers, command, say, hang_seconds
        self._stopping = False
        self._progress = Progress(self._all)

    def __enter__(self) -> "Queue":
        return self

    def __exit__(self, *_: object) -> None:
        """Only after an interrupt or a fault of ours does any still run: none is left to run unseen."""
        try:
            if not self._stopping:
                self._ask_to_stop()
        finally:
            for child in self._running:
                child.process.kill()
            self._progress.close()

    def _ask_to_stop(self) -> None:
        for child in self._running:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline and any(child.process.poll() is None for child in self._running):
            time.sleep(_POLL_SECONDS)

    @property
    def open(self) -> bool:
        return bool(self._waiting or self._running)

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._waiting.clear()
            self._say("stopping: the running cells save their state")
            for child in self._running:
                child.process.send_signal(signal.SIGTERM)

    def collect(self) -> None:
        for child in self._running:
            child.patience.look()
        for child in [child for child in self._running if child.process.poll() is not None]:
            self._running.remove(child)
            if child.process.stdin:
                child.process.stdin.close()
            self._settle(child)

    def _settle(self, child: _Child) -> None:
        code, left, hung = child.process.returncode, [], child.patience.hung
        assert code is not None  # it has ended
        for directory in child.directories:
            if directory.state == "done":  # also where the process fell over after its work
                self._end(directory, Exit.DONE)
            else:
                left.append(directory)
        if code == Exit.BUSY:
            self._again(left, child.attempt)
            return
        log = child.directories[0].beside(hosts.named("log.txt"))
        died = hung or code not in (Exit.FAILED, Exit.WRONG_INPUT, Exit.STOPPED)
        for directory in left:
            # One that failed has written so itself, unless its disk was full.
            if died or directory.state == "damaged" or (code != Exit.STOPPED and directory.state != "failed"):
                record_death(directory, code, log, hung)
        if code == Exit.WRONG_INPUT and len(child.directories) == 1:
            self._end(child.directories[0], Exit.WRONG_INPUT)
        elif left:
            self._retry(child, left)

    def _retry(self, child: _Child, left: list[RunDirectory]) -> None:
        code, last = child.process.returncode, child.attempt == _ATTEMPTS
        packed = len(child.directories) > 1
        if code == Exit.STOPPED and hosts.several():
            self.stop()  # one process has been asked to, and all stop
        if self._stopping or (last and not packed):
            for directory in left:
                stopped = code == Exit.STOPPED and directory.state != "failed"
                self._end(directory, Exit.STOPPED if stopped else Exit.FAILED)
            return
        for directory in left:
            self._say(f"{directory.run_id}: {directory.status.get('error') or 'stopped'}; trying once more")
        if packed and (last or code in (Exit.FAILED, Exit.WRONG_INPUT)):
            for directory in left:
                self._again([directory], _ATTEMPTS)
        else:
            self._again(left, child.attempt + 1)

    def _again(self, pack: list[RunDirectory], attempt: int) -> None:
        if pack and not self._stopping:
            self._waiting.append((pack, attempt))

    def _end(self, directory: RunDirectory, code: Exit) -> None:
        self._ended[directory.run_id] = code
        failed = code in (Exit.FAILED, Exit.WRONG_INPUT)
        text = f"failed: {directory.status.get('error')}" if failed else code.name.lower()
        self._say(f"[{len(self._ended)}/{len(self._all)}] {directory.run_id}: {text}")

    def start(self) -> None:
        """Starts what may start; a pack with a cell that another driver holds goes to the end of the line."""
        for _ in range(len(self._waiting)):
            if len(self._running) == self._workers:
                return
            pack, attempt = self._waiting.popleft()
            if any(directory.locked for directory in pack if directory.state != "done"):
                self._waiting.append((pack, attempt))
                continue
            left = []
            for directory in pack:
                if directory.state == "done":
                    self._end(directory, Exit.DONE)
                else:
                    left.append(directory)
            if left:
                process = self._spawn(left)
                patience = Patience(process.send_signal, left, self._hang_seconds)
                self._running.append(_Child(left, process, attempt, patience))

    def _spawn(self, pack: list[RunDirectory]) -> Process:
        with pack[0].beside(hosts.named("log.txt")).open("ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we pass it on once.
            process = subprocess.Popen(
                [*self._command, *(str(directory.path) for directory in pack)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"GLIBC_TUNABLES": KEEP_MEMORY, **os.environ, **hosts.group().environment()},
            )
        self._give_cores(process.pid)
        return process

    def _give_cores(self, pid: int) -> None:
        """Workers side by side get disjoint cores: two cells of one thread each outrun two that share both."""
        cores = sorted(_cores(0))
        if self._workers == 1 or not cores:
            return
        others = [child.process for child in self._running if isinstance(child.process, subprocess.Popen)]
        taken = {core for process in others for core in _cores(process.pid)}
        free = [core for core in cores if core not in taken] or cores
        os.sched_setaffinity(pid, free[: max(len(cores) // self._workers, 1)])

    def show(self) -> None:
        self._progress.show(len(self._ended), [child.directories for child in self._running])

    def verdict(self) -> Exit:
        codes = set(self._ended.values())
        if len(self._ended) < len(self._all) or Exit.STOPPED in codes:
            return Exit.STOPPED
        if Exit.FAILED in codes:
            return Exit.FAILED
        return Exit.WRONG_INPUT if Exit.WRONG_INPUT in codes else Exit.DONE


def _cores(pid: int) -> set[int]:
    """The cores that a process may use (0: this one); none where it is gone or the system does not tell."""
    try:
        return os.sched_getaffinity(pid)
    except (AttributeError, ProcessLookupError):
        return set()


def record_death(directory: RunDirectory, code: int, log: Path, hung: str | None = None) -> None:
    """What a cell that was killed could not write itself; `log`: what its process has printed, stacks included."""
    if directory.state == "damaged" and hosts.first():
        hung = "; ".join(mend_run(directory)) or hung
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    if code == -signal.SIGKILL:
        how += f" (out of memory?{directory.prediction})"
    printed = log.read_text(errors="replace")[-20_000:] if log.exists() else ""
    (directory.path / hosts.named("error.txt")).write_text(f"{hung or how}\n\nThe end of its output:\n{printed}")
    directory.update(state="failed", error=hung or how)
