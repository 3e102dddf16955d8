"""The trials of a tuned sweep as they lie on disk: DIR/tuning/trials.json and a run directory each."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mha_jax.config import plain
from mha_jax.specs import UserError
from mha_jax.sweeps.grid import Cell
from mha_jax.sweeps.store import RunDirectory, read_json, write_json
from mha_jax.sweeps.tuning import Tuning
from mha_jax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run that tries values for a cell, and how far it got.

    `cell` is the id of the cell's run before it was tuned; `curve` the metric by step, in the mean over the seeds.
    """

    cell: str
    run: str
    values: Mapping[str, Any]
    state: str
    curve: Mapping[int, float]
    error: str | None

    @property
    def value(self) -> float | None:
        """The metric at the last step; None where the trial did not get there, or the value is not finite."""
        last = list(self.curve.values())[-1] if self.curve and self.state == "done" else math.nan
        return last if math.isfinite(last) else None

    @property
    def settled(self) -> bool:
        """Whether there is nothing left to train. A loss that is not finite is a result too: it would come again."""
        return self.state in ("done", "illegal", "pruned") or "not finite" in (self.error or "")

    @property
    def lost(self) -> str | None:
        """Why a settled trial has no value; None where it has one."""
        if self.value is not None:
            return None
        return self.error or ("the run has no such metric" if not self.curve else "its metric is not finite")


def write_trials(workdir: epath.PathLike, tuning: Tuning, asked: Sequence[Cell]) -> None:
    """Records what is searched and which runs try it."""
    trials = [{"cell": c.untuned, "run": c.run_id, "values": plain(c.tuned), "reason": c.reason} for c in asked]
    write_json(_file(workdir), {"tuning": plain(dataclasses.asdict(tuning)), "trials": trials})


def read_tuning(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The search as it was recorded: fields, seeds, metric, method, trials; None where nothing was tuned.

    Raises: UserError where the file is damaged.
    """
    return read_json(_file(workdir))["tuning"] if _file(workdir).exists() else None


def tuned_cells(workdir: epath.PathLike) -> set[str]:
    """The ids, before tuning, of the cells that have trials; none where trials.json is damaged."""
    try:
        return {trial["cell"] for trial in read_json(_file(workdir))["trials"]} if _file(workdir).exists() else set()
    except UserError:
        return set()


def read_trials(workdir: epath.PathLike) -> list[Trial]:
    """Every trial that was asked for, in order, as it stands now. Raises UserError where trials.json is damaged."""
    if not _file(workdir).exists():
        return []
    facts = read_json(_file(workdir))
    return [read_trial(workdir, facts["tuning"]["metric"], **trial) for trial in facts["trials"]]


def read_trial(
    workdir: epath.PathLike, metric: str, cell: str, run: str, values: Mapping[str, Any], reason: str | None
) -> Trial:
    """A trial from its run directory. `reason` says why it was never a run."""
    if reason is not None:
        return Trial(cell, run, values, "illegal", {}, reason)
    directory = RunDirectory(trial_path(workdir, run))
    status = directory.status
    pruned = status.get("pruned")
    state, error = ("pruned", pruned) if pruned else (status["state"], status.get("error"))
    return Trial(cell, run, values, state, _curve(directory, metric), error)


def trial_path(workdir: epath.PathLike, run: str) -> epath.Path:
    return epath.Path(workdir) / "tuning" / "runs" / run


def _file(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "tuning" / "trials.json"


def _curve(directory: RunDirectory, metric: str) -> dict[int, float]:
    rows, _ = read_metrics(directory.path / "metrics.jsonl")
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if f"{row['split']}/{row['name']}" == metric:
            by_step.setdefault(row["step"], []).append(row["value"])
    return {step: statistics.fmean(by_step[step]) for step in sorted(by_step)}
