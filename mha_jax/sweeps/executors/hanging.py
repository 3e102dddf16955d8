"""A process of cells that goes on no more: noticed, asked where it stands, and ended."""

import signal
import time
from collections.abc import Sequence
from typing import Protocol

from mha_jax.sweeps.store import RunDirectory

HANG_SECONDS = 1800.0  # compiling a large model, or decoding a whole test set, takes many minutes without a sign
_GRACE_SECONDS = 30.0
_SIGNS = ("status.json", "metrics.jsonl")


class Signalled(Protocol):
    def send_signal(self, number: int, /) -> None: ...


class Patience:
    """Watches one process through the files of its runs; clocks of files are compared with themselves only.

    A process that has changed none of them for `seconds` gets SIGUSR1, at which a cell prints the stacks of its
    threads, then SIGTERM, and in the end SIGKILL. `hung` then says where it stood; None before.
    """

    def __init__(self, process: Signalled, runs: Sequence[RunDirectory], seconds: float):
        self.hung: str | None = None
        self._process, self._runs, self._seconds = process, runs, seconds
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
            self._process.send_signal(self._due.pop(0)[1])

    def _give_up(self, now: float) -> None:
        step = max(int(run.status.get("step", 0)) for run in self._runs)
        self.hung = f"hung at step {step}: nothing went on for {self._seconds:g} s"
        stop, kill = now + min(self._seconds, 1), now + min(self._seconds, _GRACE_SECONDS)
        self._due = [(now, signal.SIGUSR1), (stop, signal.SIGTERM), (kill, signal.SIGKILL)]

    def _read(self) -> list[tuple[float, int]]:
        stats = [file.stat() for run in self._runs for name in _SIGNS if (file := run.path / name).exists()]
        return [(stat.mtime, stat.length) for stat in stats]
