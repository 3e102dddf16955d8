"""Contestants timed in turns, so that what slows the machine for a while slows them all."""

import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)
_BEFORE = 3


def race(contestants: Mapping[Name, Callable[[], object]], rounds: int) -> dict[Name, list[float]]:
    """Seconds of every call: each contestant once a round, every round in another order.

    A contestant returns when its result is there. Calls that go before are not counted: the first compiles, the others
    touch the memory that the rest will find again. Who went before leaves its mark too, on clocks and caches: orders
    are drawn (the same in every run), that nobody has one neighbour for good.
    """
    for _ in range(_BEFORE):
        for run in contestants.values():
            run()
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    order, draw = list(contestants), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios round by round."""
    return summary([a / b for a, b in zip(above, below, strict=True)])
