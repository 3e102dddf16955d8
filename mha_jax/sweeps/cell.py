"""Runs cells: in this process, or as `python -m mha_jax.sweeps.cell DIRECTORY [DIRECTORY ...]` in a child of a driver.

Several directories are a pack: runs of one shape that train together in one program.
"""

import contextlib
import enum
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from mha_jax import config as configs
from mha_jax.specs import RunSpec, UserError
from mha_jax.storage import refusal
from mha_jax.sweeps import provenance
from mha_jax.sweeps.mending import mend_run
from mha_jax.sweeps.store import Busy, RunDirectory, SweepDirectory
from mha_jax.training import hosts
from mha_jax.training.limits import GivenUp


class Exit(enum.IntEnum):
    """Exit codes of the scripts. BUSY is told to a driver only."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    BUSY = 73
    STOPPED = 75


class OutOfMemory(RuntimeError):
    """A run wants more memory than there is; the message ends with what was predicted."""


def run_cell(directory: RunDirectory, *, started: float | None = None, progress: bool = True) -> Exit:
    """`run_cells` of one."""
    return run_cells([directory], started=started, progress=progress)[0]


def run_cells(
    directories: Sequence[RunDirectory], *, started: float | None = None, progress: bool = True
) -> list[Exit]:
    """Trains the runs of prepared directories together, each from its last checkpoint where it has one.

    SIGTERM and SIGINT end them after the step at hand with their state saved. What went wrong is in the status.json of
    the run that it went wrong with, or of all, and its traceback in error.txt.

    Args:    started: when the process began (time.time()), to account for the imports.
    Returns: how each of them ended.
    Raises:  Busy where another process is training one of them; UserError where a directory is no run's.
    """
    started = time.time() if started is None else started
    configurations = [directory.config for directory in directories]
    with contextlib.ExitStack() as held, stop_signals() as asked:
        hosts.join(directories[0].path, functools.partial(_record_line, directories), asked)
        should_stop = hosts.AgreedStop(asked)
        for directory in directories:
            held.enter_context(directory.lock())
            if not hosts.several():
                mend_run(directory)
        waiting = [(d, c) for d, c in zip(directories, configurations, strict=True) if d.state != "done"]
        facts = {"started": started, "versions": provenance.versions(), "commit": provenance.commit()}
        for directory, _ in waiting:
            before = directory.status
            again = {"attempts": before.get("attempts", 0) + 1, "incidents": _incidents(before)}
            directory.update(state="running", error=None, **again, **facts)
        try:
            outcomes = _train(waiting, started, should_stop, progress) if waiting else []
        except Exception as error:
            outcomes = [error] * len(waiting)
            if hosts.several():
                _fail_together(waiting, error)
        codes = {d.path: _settle(d, outcome) for (d, _), outcome in zip(waiting, outcomes, strict=True)}
        hosts.leave()
    return [codes.get(directory.path, Exit.DONE) for directory in directories]


def _incidents(status: dict[str, Any]) -> list[str]:
    """What the run has survived, the attempt before this one included where it was cut short."""
    ends = {"failed": status.get("error"), "running": f"killed at step {status.get('step', 0)} or later"}
    end = ends.get(status["state"])
    return [*status.get("incidents", []), *([f"attempt {status.get('attempts', 0)}: {end}"] if end else [])]


def _settle(directory: RunDirectory, outcome: Any) -> Exit:
    if isinstance(outcome, GivenUp):  # as good as done: there is nothing left to train
        directory.update(state="done", pruned=str(outcome), finished=time.time())
        return Exit.DONE
    if isinstance(outcome, Exception):
        outcome = _in_words(directory, outcome)
        _record(directory, outcome)
        return Exit.WRONG_INPUT if isinstance(outcome, UserError) else Exit.FAILED
    directory.update(state=outcome, finished=time.time())
    (directory.path / hosts.named("error.txt")).unlink(missing_ok=True)
    return Exit.DONE if outcome == "done" else Exit.STOPPED


def _train(
    cells: Sequence[tuple[RunDirectory, dict[str, Any]]],
    started: float,
    should_stop: Callable[[], bool],
    progress: bool,
) -> list[Any]:
    runs = [configs.resolve(config) for _, config in cells]
    # Imported here: a run that is done, busy or wrong answers without waiting seconds for JAX.
    import jax

    from mha_jax.sweeps.compile_cache import compile_cache
    from mha_jax.training import loop
    from mha_jax.training.devices import use_cores

    first, sweep = runs[0], cells[0][0].sweep
    use_cores(first)
    if first.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    with compile_cache(sweep):
        first.check_devices(jax.device_count())
        device = jax.devices()[0]
        devices = {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()}
        imports = max(time.time() - started, 0.0)  # a clock may be set back meanwhile
        parts = []
        for (directory, config), run in zip(cells, runs, strict=True):
            directory.update(devices=devices, steps=run.training.steps)
            share = len(run.seeds) / sum(len(other.seeds) for other in runs)
            parts.append(loop.Part(config, run, directory.path, _Report(directory, share * imports)))
        cache_dir = data_dir(first, sweep)
        return loop.train(parts, cache_dir=cache_dir, should_stop=should_stop, progress=progress)


class _Report:
    """Writes what the training loop tells to status.json; seconds and incidents add up over the attempts of a run."""

    def __init__(self, directory: RunDirectory, imports: float):
        self._directory = directory
        self._before = directory.status.get("seconds", {})
        self._imports = imports

    def __call__(self, facts: dict[str, Any]) -> None:
        if "seconds" in facts:
            now = {"imports": self._imports, **facts["seconds"]}
            names = [*self._before, *(name for name in now if name not in self._before)]
            facts = {**facts, "seconds": {n: round(self._before.get(n, 0) + now.get(n, 0), 3) for n in names}}
        facts = {name: value for name, value in facts.items() if value is not None}  # unknown this time, not undone
        if "incidents" in facts:
            facts = {**facts, "incidents": [*self._directory.status["incidents"], *facts["incidents"]]}
        self._directory.update(**facts)


def data_dir(run: RunSpec, workdir: epath.Path) -> epath.Path:
    """Where prepared data sets lie: `data.data_dir`, or else in the sweep's own cache."""
    return epath.Path(run.data.data_dir) if run.data.data_dir else workdir / ".cache" / "data"


def _record(directory: RunDirectory, error: Exception) -> None:
    (directory.path / hosts.named("error.txt")).write_text("".join(traceback.format_exception(error)))
    directory.update(state="failed", error=_line(error))


def _in_words(directory: RunDirectory, error: Exception) -> Exception:
    """The error as a user can act on it: what storage refuses is theirs to mend, memory is told with its prediction."""
    named = error
    if isinstance(error, UserError):
        return error
    if why := refusal(error):
        named = UserError(f"{why}: {getattr(error, 'filename', None) or directory.path}")
    elif isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        named = OutOfMemory(_line(error) + (directory.prediction and f";{directory.prediction}"))
    if named is not error:
        named.__cause__ = error
    return named


def _line(error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0] if text else type(error).__name__


def _record_line(directories: Sequence[RunDirectory], line: str, code: int) -> None:
    for directory in directories:
        if directory.state != "done" and code != Exit.BUSY:
            directory.update(state="failed", error=line)


def _fail_together(waiting: Sequence[tuple[RunDirectory, Any]], error: Exception) -> None:
    """What went wrong in one of several processes ends them all."""
    for directory, _ in waiting:
        _record(directory, error)
    hosts.fail(error, _line(error), Exit.WRONG_INPUT if isinstance(error, UserError) else Exit.FAILED)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields `should_stop`, true after SIGTERM or Ctrl-C; a second Ctrl-C interrupts at once."""
    asked = threading.Event()

    def handler(number: int, frame: Any) -> None:
        asked.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    earlier = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, action in earlier.items():
            signal.signal(number, action)


def _stop_with_parent() -> None:
    """A driver holds the other end of our standard input: when it dies, however, the pipe ends, and we stop too."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # not through sys.stdin: a thread inside its buffer aborts the interpreter's end
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _age() -> float:
    """Seconds since this process began, its interpreter's start included; 0 where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return 0.0


def main(paths: Sequence[str]) -> Exit:
    """A child of a driver: no progress bar, and BUSY told apart. Of several endings the one that asks for most."""
    started = time.time() - _age()
    faulthandler.register(signal.SIGUSR1)  # who asks where we stand finds every thread's stack in the log
    _stop_with_parent()
    directories = [RunDirectory(path) for path in paths]
    hosts.enrol(hosts.inherited().at(1 + SweepDirectory(directories[0].workdir).place(directories[0].run_id)))
    try:
        codes = run_cells(directories, started=started, progress=False)
    except Busy as error:
        hosts.fail(error, str(error), Exit.BUSY)
        return Exit.BUSY
    for directory, code in zip(directories, codes, strict=True):
        if code in (Exit.FAILED, Exit.WRONG_INPUT):
            print(directory.failure, file=sys.stderr)
    return next(code for code in (Exit.STOPPED, Exit.FAILED, Exit.WRONG_INPUT, Exit.DONE) if code in codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
