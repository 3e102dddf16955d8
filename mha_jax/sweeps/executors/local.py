"""Runs cells on this machine, each in a process of its own, so that memory and compiler caches end with the cell."""

import collections
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from mha_jax.sweeps.cell import Exit, stop_signals
from mha_jax.sweeps.store import RunDirectory

_CELL = (sys.executable, "-m", "mha_jax.sweeps.cell")
_ATTEMPTS = 2
_POLL_SECONDS = 0.2
# glibc's malloc keeps what a step frees for the next one, in one heap and large pages: on CPU, fetching it anew
# takes a fifth of a small step. Elsewhere nobody reads it.
_KEEP_MEMORY = ":".join(
    f"glibc.malloc.{setting}"
    for setting in ("arena_max=1", "hugetlb=1", "mmap_max=0", f"trim_threshold={2**34}", f"top_pad={2**28}")
)


@dataclasses.dataclass
class _Child:
    directory: RunDirectory
    process: subprocess.Popen
    attempt: int


def run(
    directories: Sequence[RunDirectory],
    *,
    workers: int = 1,
    command: Sequence[str] = _CELL,
    say: Callable[[str], None] = tqdm.write,
) -> Exit:
    """Runs every cell that is not done, `workers` at once; one that fails is run a second time.

    Cells that another driver is training are waited for, or taken over where it dies. SIGTERM and Ctrl-C are passed on
    as SIGTERM; the cells save their state and the sweep goes on when it is run again.

    Args:    command: what is started, with the run's directory as its last argument.
    Returns: DONE, STOPPED, FAILED where a run failed, WRONG_INPUT where every failure is the user's to mend.
    """
    with stop_signals() as should_stop, _Queue(directories, workers, command, say) as queue:
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


class _Queue:
    """The cells that wait, the ones that run, and how the others ended."""

    def __init__(self, directories: Sequence[RunDirectory], workers: int, command: Sequence[str], say: Callable):
        self._all = list(directories)
        self._waiting = collections.deque((directory, 1) for directory in directories)
        self._running: list[_Child] = []
        self._ended: dict[str, Exit] = {}
        self._workers, self._command, self._say = workers, command, say
        self._stopping = False
        self._progress = _Progress(self._all)

    def __enter__(self) -> "_Queue":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._running:  # only after an interrupt or a fault of ours: nothing is left to run unseen
            child.process.kill()
        self._progress.close()

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
        for child in [child for child in self._running if child.process.poll() is not None]:
            self._running.remove(child)
            if child.process.stdin:
                child.process.stdin.close()
            self._settle(child)

    def _settle(self, child: _Child) -> None:
        directory, code = child.directory, child.process.returncode
        if directory.state == "done":  # also where the process fell over after its work
            self._end(directory, Exit.DONE)
        elif code == Exit.STOPPED and self._stopping:
            self._end(directory, Exit.STOPPED)
        elif code == Exit.BUSY:
            self._again(directory, child.attempt)
        elif code == Exit.WRONG_INPUT:
            self._end(directory, Exit.WRONG_INPUT)
        else:
            if code not in (Exit.FAILED, Exit.STOPPED):
                _record_death(directory, code)
            if child.attempt < _ATTEMPTS and not self._stopping:
                self._say(f"{directory.run_id}: {directory.status.get('error') or 'stopped'}; trying once more")
                self._again(directory, child.attempt + 1)
            else:
                self._end(directory, Exit.STOPPED if code == Exit.STOPPED else Exit.FAILED)

    def _again(self, directory: RunDirectory, attempt: int) -> None:
        if not self._stopping:
            self._waiting.append((directory, attempt))

    def _end(self, directory: RunDirectory, code: Exit) -> None:
        self._ended[directory.run_id] = code
        failed = code in (Exit.FAILED, Exit.WRONG_INPUT)
        text = f"failed: {directory.status.get('error')}" if failed else code.name.lower()
        self._say(f"[{len(self._ended)}/{len(self._all)}] {directory.run_id}: {text}")

    def start(self) -> None:
        """Starts what may start; a cell that another driver holds goes to the end of the line."""
        for _ in range(len(self._waiting)):
            if len(self._running) == self._workers:
                return
            directory, attempt = self._waiting.popleft()
            if directory.state == "done":
                self._end(directory, Exit.DONE)
            elif directory.locked:
                self._waiting.append((directory, attempt))
            else:
                self._running.append(_Child(directory, self._spawn(directory), attempt))

    def _spawn(self, directory: RunDirectory) -> subprocess.Popen:
        with directory.beside("log.txt").open("ab") as log:
            # A session of its own: Ctrl-C reaches us alone, and we pass it on once.
            process = subprocess.Popen(
                [*self._command, str(directory.path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={"GLIBC_TUNABLES": _KEEP_MEMORY, **os.environ},
            )
        self._give_cores(process.pid)
        return process

    def _give_cores(self, pid: int) -> None:
        """Workers side by side get disjoint cores: two cells of one thread each outrun two that share both."""
        cores = sorted(_cores(0))
        if self._workers == 1 or not cores:
            return
        taken = {core for child in self._running for core in _cores(child.process.pid)}
        free = [core for core in cores if core not in taken] or cores
        os.sched_setaffinity(pid, free[: max(len(cores) // self._workers, 1)])

    def show(self) -> None:
        self._progress.show(len(self._ended), [child.directory for child in self._running])

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


def _record_death(directory: RunDirectory, code: int) -> None:
    """What a cell that was killed could not write itself."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    log = directory.beside("log.txt").read_text(errors="replace")[-4000:]
    (directory.path / "error.txt").write_text(f"{how}{hint}\n\nThe end of its output:\n{log}")
    directory.update(state="failed", error=how + hint)


class _Progress:
    """One bar over the training steps of all cells, so that the time left is a fair guess."""

    def __init__(self, directories: Sequence[RunDirectory]):
        self._directories = directories
        self._steps = {d.run_id: d.config["training"]["steps"] for d in directories}
        self._at = {d.run_id: self._step(d) for d in directories}
        done = sum(self._at.values())
        self._bar = tqdm(
            total=sum(self._steps.values()), initial=done, unit="step", disable=None, dynamic_ncols=True, smoothing=0.05
        )
        self._read = 0.0

    def _step(self, directory: RunDirectory) -> int:
        status = directory.status
        return self._steps[directory.run_id] if status["state"] == "done" else int(status.get("step", 0))

    def show(self, ended: int, running: Sequence[RunDirectory]) -> None:
        if self._bar.disable or time.monotonic() < self._read + 1:
            return
        self._read = time.monotonic()
        self._at |= {directory.run_id: self._step(directory) for directory in self._directories}
        names = [f"{d.run_id} {self._at[d.run_id]}/{self._steps[d.run_id]}" for d in running]
        self._bar.set_description(f"{ended}/{len(self._directories)} cells")
        self._bar.set_postfix_str(", ".join(names), refresh=False)
        self._bar.n = sum(self._at.values())
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
