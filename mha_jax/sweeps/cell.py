"""Runs one cell: in this process, or as `python -m mha_jax.sweeps.cell RUN_DIRECTORY` in a child of a driver."""

import contextlib
import enum
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from mha_jax import config as configs
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps import provenance
from mha_jax.sweeps.store import Busy, RunDirectory


class Exit(enum.IntEnum):
    """Exit codes of the scripts. BUSY is told to a driver only."""

    DONE = 0
    FAILED = 1
    WRONG_INPUT = 2
    BUSY = 73
    STOPPED = 75


def run_cell(directory: RunDirectory, *, started: float | None = None, progress: bool = True) -> Exit:
    """Trains the run of a prepared directory, from its last checkpoint where it has one.

    SIGTERM and SIGINT end it after the step at hand with the state saved. What went wrong is in status.json, and its
    traceback in error.txt.

    Args:    started: when the process began (time.time()), to account for the imports.
    Raises:  Busy where another process is training this run; UserError where the directory is no run's.
    """
    started = time.time() if started is None else started
    config = directory.config
    with directory.lock(), stop_signals() as should_stop:
        status = directory.status
        if status["state"] == "done":
            return Exit.DONE
        directory.update(
            state="running",
            error=None,
            attempts=status.get("attempts", 0) + 1,
            started=started,
            versions=provenance.versions(),
            commit=provenance.commit(),
        )
        try:
            outcome = _train(directory, config, started, should_stop, progress)
        except UserError as error:
            _record(directory, error)
            return Exit.WRONG_INPUT
        except Exception as error:
            _record(directory, error)
            return Exit.FAILED
        directory.update(state=outcome, finished=time.time())
        (directory.path / "error.txt").unlink(missing_ok=True)
        return Exit.DONE if outcome == "done" else Exit.STOPPED


def _train(
    directory: RunDirectory, config: dict[str, Any], started: float, should_stop: Callable[[], bool], progress: bool
) -> str:
    run = configs.resolve(config)
    # Imported here: a run that is done, busy or wrong answers without waiting seconds for JAX.
    import jax

    from mha_jax.training import loop

    _set_up_jax(run, directory.workdir)
    run.check_devices(jax.device_count())
    device = jax.devices()[0]
    directory.update(
        devices={"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        steps=run.training.steps,
    )
    report = _Report(directory, imports=time.time() - started)
    return loop.train(
        config,
        run,
        directory.path,
        cache_dir=data_dir(run, directory.workdir),
        report=report,
        should_stop=should_stop,
        progress=progress,
    )


class _Report:
    """Writes what the training loop tells to status.json; seconds add up over the attempts of a run."""

    def __init__(self, directory: RunDirectory, imports: float):
        self._directory = directory
        self._before = directory.status.get("seconds", {})
        self._imports = imports

    def __call__(self, facts: dict[str, Any]) -> None:
        if "seconds" in facts:
            now = {"imports": self._imports, **facts["seconds"]}
            names = [*self._before, *(name for name in now if name not in self._before)]
            facts = {**facts, "seconds": {n: round(self._before.get(n, 0) + now.get(n, 0), 3) for n in names}}
        self._directory.update(**facts)


def _set_up_jax(run: RunSpec, workdir: epath.Path) -> None:
    import jax

    from mha_jax.training.devices import use_cores

    use_cores(run)
    jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / ".cache" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if run.model.dtype == "float64":
        jax.config.update("jax_enable_x64", True)


def data_dir(run: RunSpec, workdir: epath.Path) -> epath.Path:
    """Where prepared data sets lie: `data.data_dir`, or else in the sweep's own cache."""
    return epath.Path(run.data.data_dir) if run.data.data_dir else workdir / ".cache" / "data"


def _record(directory: RunDirectory, error: Exception) -> None:
    (directory.path / "error.txt").write_text("".join(traceback.format_exception(error)))
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    directory.update(state="failed", error=text.splitlines()[0] if text else type(error).__name__)


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


def main(path: str) -> Exit:
    """A child of a driver: no progress bar, and BUSY told apart."""
    started = time.time()
    _stop_with_parent()
    directory = RunDirectory(path)
    try:
        code = run_cell(directory, started=started, progress=False)
    except Busy:
        return Exit.BUSY
    if code in (Exit.FAILED, Exit.WRONG_INPUT):
        print(directory.failure, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
