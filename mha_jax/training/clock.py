"""Where a run's wall time goes: data, compile, train, eval, save, in seconds."""

import contextlib
import time
from collections.abc import Iterator

CATEGORIES: tuple[str, ...] = ("data", "compile", "train", "eval", "save")


class Clock:
    """Adds up the seconds of this attempt at a run, by category."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._started = time.perf_counter()

    @property
    def other(self) -> float:
        """Seconds since the clock was made that are in no category."""
        return time.perf_counter() - self._started - sum(self.seconds.values())

    @contextlib.contextmanager
    def __call__(self, category: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[category] += time.perf_counter() - start

    def move(self, seconds: float, source: str, target: str) -> None:
        """Books seconds under another category, as for a compilation inside a training step."""
        self.seconds[source] -= seconds
        self.seconds[target] += seconds
