"""What a sweep would cost, as a table, before anything is trained."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mha_jax.models import cost
from mha_jax.specs import ATTENTION_KINDS, RunSpec, UserError
from mha_jax.sweeps.grid import Cell, varied
from mha_jax.sweeps.plan import Expectation, Memory, duration
from mha_jax.sweeps.tuning import Tuning
from mha_jax.training import estimates

_HEADER = (
    "run",
    "heads",
    "kv",
    "d_k",
    "d_v",
    "parameters",
    "FLOPs/token",
    "KV bytes/token",
    "step",
    "device-hours",
    "peak memory",
)


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What a table tells of time and memory.

    `expectation` is a line that says why where nothing is known of the device; `memory` what a run needs on it.
    """

    expectation: Expectation | str
    workers: int  # cells at once
    memory: Callable[[RunSpec], Memory]
    memory_basis: str  # where those numbers are from


def table(cells: Sequence[Cell], outlook: Outlook) -> str:
    """One line a legal cell, then the illegal cells with their reasons, what the numbers rest on, and the total.

    FLOPs are of the forward pass per target token; K/V-cache bytes per token of one sequence, over all layers; "step"
    is the time of a training step of all seeds, and device-hours are those of all steps.
    """
    legal = [(cell, cell.run) for cell in cells if cell.reason is None]
    seconds = [_step_seconds(run, outlook.expectation) for _, run in legal]
    rows = [_HEADER, *(_row(cell, run, step, outlook) for (cell, run), step in zip(legal, seconds, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    lines = [
        "  ".join(_pad(text, width, i) for i, (text, width) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    illegal = [f"left out: {cell.run_id}: {cell.reason}" for cell in cells if cell.reason is not None]
    total = f"{_total(legal, seconds, outlook)}; nothing was trained"
    return "\n".join([line.rstrip() for line in lines] + illegal + _basis(outlook) + [total])


def search_total(tuning: Tuning, cells: Sequence[Cell], outlook: Outlook) -> str:
    """One line on what the trials of a search cost, before the cells themselves: each is a run with its seeds."""
    trials = [varied(cell, {}, tuning.seeds) for cell in cells if cell.reason is None]
    legal = [(trial, trial.run) for trial in trials for _ in range(tuning.trials) if trial.reason is None]
    seconds = {trial.run_id: _step_seconds(trial.run, outlook.expectation) for trial in trials if trial.reason is None}
    total = _total(legal, [seconds[trial.run_id] for trial, _ in legal], outlook, "runs")
    seeds = _count(len(tuning.seeds), "seed")
    return f"before them {tuning.trials} trials with {seeds} a cell, of {', '.join(tuning.fields)}: {total}"


def estimated_memory(run: RunSpec, devices: Mapping[str, Any], limit: int | None) -> Memory:
    """What a run needs on each of the devices ("platform", "count"), counted from its spec."""
    needed = estimates.estimated_peak_bytes(run, devices["count"], devices["platform"])
    return Memory(needed, limit, estimated=True)


def _row(cell: Cell, run: RunSpec, step: float | None, outlook: Outlook) -> tuple[str, ...]:
    counts = (cost.parameters(run), cost.flops_per_token(run), cost.kv_cache_bytes_per_token(run))
    hours = None if step is None else _device_hours(run, step, outlook.expectation)
    try:
        memory = str(outlook.memory(run))
    except UserError as error:
        memory = f"none: {error}"
    times = ("unknown" if step is None else duration(step), "unknown" if hours is None else f"{hours:,.3g}")
    return (cell.run_id, *_heads(run), *(f"{n:,}" for n in counts), *times, memory)


def _step_seconds(run: RunSpec, expected: Expectation | str) -> float | None:
    if isinstance(expected, str):
        return None
    return expected.step_seconds(estimates.step_flops(run), estimates.update_bytes(run), run.model.dtype)


def _device_hours(run: RunSpec, step: float, expected: Expectation | str) -> float | None:
    return None if isinstance(expected, str) else expected.device_hours(step, run.training.steps)


def _basis(outlook: Outlook) -> list[str]:
    expected, time = outlook.expectation, "time: unknown: "
    if isinstance(expected, Expectation):
        time = f"time: of the training steps alone, on {expected} a cell, with what one reaches taken to be "
        expected = expected.basis
    return [time + expected, f"memory: {outlook.memory_basis}"]


def _total(
    legal: Sequence[tuple[Cell, RunSpec]], seconds: Sequence[float | None], outlook: Outlook, noun: str = "cells"
) -> str:
    steps = sum(run.training.steps * len(run.seeds) for _, run in legal)
    total = f"{len(legal)} {noun}, {steps:,} steps over all seeds"
    known = [(run, step) for (_, run), step in zip(legal, seconds, strict=True) if step is not None]
    if len(known) == len(legal):
        hours = sum(_device_hours(run, step, outlook.expectation) or 0.0 for run, step in known)
        wall = sum(run.training.steps * step for run, step in known) / outlook.workers
        total += f", {hours:,.3g} device-hours: about {duration(wall)} with {_count(outlook.workers, 'cell')} at once"
    return total


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _heads(run: RunSpec) -> tuple[str, ...]:
    """Heads, groups and widths; where layers differ, each value that occurs."""
    shapes = [shape for kind in ATTENTION_KINDS[run.task] for shape in run.model.heads(kind)]
    return tuple(
        "/".join(dict.fromkeys(str(getattr(shape, field)) for shape in shapes))
        for field in ("num_heads", "num_kv_heads", "qk_dim", "v_dim")
    )


def _pad(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
