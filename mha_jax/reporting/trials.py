"""What each cell was tuned to and over which trials: a row a trial, and what a reader should know about the search."""

import math
from collections.abc import Mapping
from typing import Any

from mha_jax.reporting.results import Cell, Results
from mha_jax.reporting.tables import short
from mha_jax.sweeps.trials import Trial

_NEAR = 0.05  # of a range, at either end, counts as its edge


def rows(results: Results) -> list[dict[str, Any]]:
    """One row a trial: the cell, the run, the values tried, how it ended, the metric, and whether it was chosen."""
    if results.tuning is None:
        return []
    return [
        {"cell": results.label(cell.overrides), "run": trial.run, **trial.values, "state": trial.state}
        | {results.tuning["metric"]: trial.value, "chosen": trial is chosen(cell), "why not": trial.lost}
        for cell in results.cells
        for trial in cell.trials
    ]


def chosen(cell: Cell) -> Trial | None:
    """The trial that gave its values to the cell; None before the choice, or where none had a result."""
    return next((trial for trial in cell.trials if cell.tuned and trial.values == cell.tuned), None)


def notes(results: Results) -> list[tuple[str, str]]:
    """Name and text of what belongs under the table: what was searched and with what seeds, edges, failures."""
    if results.tuning is None:
        return []
    edges: dict[str, list[str]] = {}
    for cell in results.cells:
        for text in _edges(cell, results):
            edges.setdefault(text, []).append(results.label(cell.overrides))
    lost = [
        f"{results.label(cell.overrides)} with {_words(trial.values)}: {trial.lost}"
        for cell in results.cells
        for trial in cell.trials
        if trial.settled and trial.lost
    ]
    trials = [trial for cell in results.cells for trial in cell.trials]
    open_trials = sum(not trial.settled for trial in trials)
    return [
        ("tuning", _search(results)),
        ("tuning under way", f"{open_trials} of {len(trials)} trials have not ended" if open_trials else ""),
        ("at the edge of the search", "; ".join(f"{', '.join(cells)}: {text}" for text, cells in edges.items())),
        ("trials without a result", "; ".join(lost)),
    ]


def _search(results: Results) -> str:
    tuning: Mapping[str, Any] = results.tuning or {}
    seeds = ", ".join(map(str, tuning["seeds"]))
    shared = [seed for batch in results.batches for seed in batch if seed in tuning["seeds"]]
    reuse = (
        f"the table's runs use seed {', '.join(map(str, shared))} too, which flatters them a little"
        if shared
        else "the table's runs use others"
    )
    how = "drawn by Optuna" if tuning["method"] == "optuna" else "of a grid"
    searched = "; ".join(f"{field} in {_choices(values)}" for field, values in tuning["fields"].items())
    return (
        f"{searched}: each cell has the values that were best by {tuning['metric']} at the last step, "
        f"of {tuning['trials']} trials {how} with seed {seeds}; {reuse}"
    )


def _choices(values: Any) -> str:
    if isinstance(values, Mapping):
        return f"{values['low']:g} … {values['high']:g}"
    return ", ".join(short(value) for value in values)


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{field.rsplit('.', 1)[-1]}={short(value)}" for field, value in values.items())


def _edges(cell: Cell, results: Results) -> list[str]:
    """A sentence for each tuned number that lies at an end of what was searched: the best may lie beyond."""
    found = []
    for field, value in cell.tuned.items():
        place = _place(value, (results.tuning or {})["fields"].get(field))
        if place is not None and not _NEAR < place < 1 - _NEAR:
            end = "smallest" if place < 0.5 else "largest"
            found.append(f"{field}={short(value)} is at the {end} end: widen it")
    return found


def _place(value: Any, searched: Any) -> float | None:
    """Where the value lies in what was searched, from 0 to 1; None where that has no two ends."""
    if isinstance(searched, Mapping):
        low, high = searched["low"], searched["high"]
        scale = math.log if searched["log"] else float
        return (scale(value) - scale(low)) / (scale(high) - scale(low))
    if not isinstance(searched, list) or len(searched) < 2 or not all(map(is_number, searched)):
        return None
    return 0.0 if value == min(searched) else 1.0 if value == max(searched) else 0.5


def is_number(value: Any) -> bool:
    """Whether a setting lies on a scale, which True and "cosine" do not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
