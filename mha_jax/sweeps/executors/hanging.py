"""A process of cells that goes on no more: noticed, asked where it stands, and ended."""

import signal
import time
from collections.abc import Callable, Sequence

from etils import epath

from mha_jax.sweeps.store import RunDirectory

HANG_SECONDS = 1800.0  # compiling a large model, or decoding a whole test set, takes many minutes without a sign
_GRACE_SECONDS = 30.0


class Patience:
    """Watches one process through what its runs report and measure, so that no clock but our own counts.

    A process that does neither for `seconds` gets SIGUSR1, at which a cell prints the stacks of its
    threads, then SIGTERM, and in the end SIGKILL. `hung` then says where it stood; None before.
    """

    def __init__(self, signal_process: Callable, runs: Sequence[RunDirectory], seconds: float):
        self.hung: str | None = None
        self._signal, self._runs, self._seconds = signal_process, runs, seconds
        self._signs, self._moved = self._read(), time.monotonic()
        self._looked = self._moved
        self._due: list[tuple[float, signal.Signals]] = []

    def look(self) -> None:
        now = time.monotonic()
        if self.hung is None and now >= self._looked + min(self._seconds / 20, 10):
            self._looked = now
            signs = self._read()
            if signs != self._signs:
                self._signs, self._moved = signs, now
            elif now - self._moved >= self._seconds:
                self._give_up(now)
        while self._due and now >= self._due[0][0]:
            self._signal(self._due.pop(0)[1])

    def _give_up(self, now: float) -> None:
        step = max(run.step for run in self._runs)
        self.hung = f"hung at step {step}: nothing went on for {self._seconds:g} s"
        stop, kill = now + min(self._seconds, 1), now + min(self._seconds, _GRACE_SECONDS)
        self._due = [(now, signal.SIGUSR1), (stop, signal.SIGTERM), (kill, signal.SIGKILL)]

    def _read(self) -> list[tuple[str, int]]:
        return [(_text(run.path / "status.json"), _length(run.path / "metrics.jsonl")) for run in self._runs]


def _text(file: epath.Path) -> str:
    return file.read_text() if file.exists() else ""


def _length(file: epath.Path) -> int:
    return file.stat().length if file.exists() else 0
