"""A sweep directory as rows, read at any moment: one row per (run, seed), and a reason for each cell that has none."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from typing import Any

from etils import epath

from mha_jax.config import flatten, plain
from mha_jax.specs import UserError
from mha_jax.sweeps.seeds import in_words
from mha_jax.sweeps.store import read_json
from mha_jax.sweeps.trials import Trial, read_trials, read_tuning
from mha_jax.training.metrics import read_metrics

MEDIANS = ("tokens_per_second", "step_seconds")
LARGEST = ("peak_bytes", "compile_seconds")
SHORT = {
    "model.num_heads": "h",
    "model.num_kv_heads": "h_kv",
    "model.qk_dim": "d_k",
    "model.v_dim": "d_v",
    "model.num_layers": "N",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run directory of a cell and what it holds so far: some of the cell's seeds."""

    run: str
    reason: str | None  # why its cell is illegal, None where it is not
    config: Mapping[str, Any] | None
    status: Mapping[str, Any]
    log: list[dict[str, Any]]
    has_heads: bool = False  # whether its heads have a page
    has_atlas: bool = False  # and an atlas
    gave_up: bool = False  # whether the reason is that tuning found no values for its cell

    @property
    def state(self) -> str:
        if self.reason:
            return "failed" if self.gave_up else "illegal"
        return str(self.status.get("state", "queued"))

    @property
    def seeds(self) -> list[int]:
        return list((self.config or {}).get("seeds", []))

    @property
    def summary(self) -> str:
        """One phrase on where the run stands, for instance "failed: out of memory"."""
        if self.reason:
            return f"{self.state}: {self.reason}"
        if self.state == "failed":
            return f"failed: {self.status.get('error') or 'no message'} (traceback: runs/{self.run}/error.txt)"
        if self.state in ("running", "stopped"):
            return f"{self.state} at step {self.status.get('step', 0)} of {self.status.get('steps', '?')}"
        return self.state


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of the grid: its run, then one for each batch of seeds that was added. Those that are done count, merged
    by seed; where none is, all do."""

    run: str
    overrides: Mapping[str, Any]
    runs: tuple[Run, ...]
    tuned: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what its trials chose, beside its overrides
    trials: tuple[Trial, ...] = ()

    @property
    def counted(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"] or list(self.runs)

    @property
    def state(self) -> str:
        return self.counted[0].state

    @property
    def summary(self) -> str:
        """One phrase on where the first run that counts stands."""
        return self.counted[0].summary

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.counted[0].config

    @property
    def status(self) -> Mapping[str, Any]:
        return self.counted[0].status

    @property
    def log(self) -> list[dict[str, Any]]:
        return [row for run in self.counted for row in run.log]

    @functools.cached_property
    def curves(self) -> dict[str, dict[int, dict[int, float]]]:
        """Metric to seed to step to value, in order of steps: curves["validation/loss"][0][400]."""
        curves: dict[str, dict[int, dict[int, float]]] = {}
        for row in sorted(self.log, key=lambda row: row["step"]):
            name = f"{row['split']}/{row['name']}"
            curves.setdefault(name, {}).setdefault(row["seed"], {})[row["step"]] = row["value"]
        return curves

    def values(self, metric: str) -> dict[int, float]:
        """Seed to value at the last step."""
        return {seed: list(points.values())[-1] for seed, points in self.curves.get(metric, {}).items()}

    def training(self, name: str) -> dict[int, float]:
        """Seed to the median (speeds) or the largest value (peaks) of the training log."""
        summarise = statistics.median if name in MEDIANS else max
        return {seed: summarise(points.values()) for seed, points in self.curves.get(f"train/{name}", {}).items()}


@dataclasses.dataclass(frozen=True)
class Results:
    """All cells of a sweep, and every line that could not be read."""

    sweep: Mapping[str, Any]
    cells: list[Cell]
    problems: list[str]
    tuning: Mapping[str, Any] | None = None  # what was searched for each cell, as tuning/trials.json records it

    @property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.state == "done"]

    @property
    def runs(self) -> list[Run]:
        """All runs of all cells, cell by cell."""
        return [run for cell in self.cells for run in cell.runs]

    @property
    def labels(self) -> list[str]:
        """What each of `runs` is called: as its cell, with its seeds where the cell has several runs."""
        called = []
        for cell in self.cells:
            label = self.label(cell.overrides)
            called += [f"{label}, seeds {in_words(r.seeds)}" if len(cell.runs) > 1 else label for r in cell.runs]
        return called

    @property
    def missing(self) -> list[tuple[str, str]]:
        """Label and reason of every run that has not finished."""
        return [(label, run.summary) for label, run in zip(self.labels, self.runs, strict=True) if run.state != "done"]

    @property
    def batches(self) -> list[list[int]]:
        """The seeds of the sweep; more than one list where some were added later, after a look at the others."""
        return self.sweep.get("batches") or [list((self.sweep.get("base_config") or {}).get("seeds", []))]

    @property
    def incidents(self) -> list[str]:
        """What went wrong on the way and was survived: attempts that were cut short, files that were damaged."""
        return [f"{run.run}: {line}" for run in self.runs for line in run.status.get("incidents", [])]

    @functools.cached_property
    def base(self) -> Cell | None:
        """The cell that differences are taken from; None where it is illegal."""
        return next((cell for cell in self.cells if cell.run == self.sweep.get("base")), None)

    @functools.cached_property
    def swept(self) -> list[str]:
        """Dotted names of the fields that any cell sets, in the order of the grid."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.overrides))

    @property
    def tuned(self) -> list[str]:
        """Dotted names of the fields that each cell chose for itself."""
        return list((self.tuning or {}).get("fields", {}))

    @functools.cached_property
    def metrics(self) -> list[str]:
        """Names of what was evaluated ("validation/loss", "test/bleu"), validation first."""
        names = {name for cell in self.cells for name in cell.curves if not name.startswith("train/")}
        order = ("loss", "perplexity", "bits_per_byte", "bleu", "accuracy")

        def rank(name: str) -> tuple[bool, int, str]:
            split, _, leaf = name.partition("/")
            return split != "validation", order.index(leaf) if leaf in order else len(order), name

        return sorted(names, key=rank)

    def find(self, overrides: Mapping[str, Any]) -> Cell | None:
        """The cell of these overrides; {} names the base, and a field set to what the base has need not be named."""
        if not overrides:
            return self.base
        wanted = self._without_base(overrides)
        return next((cell for cell in self.cells if self._without_base(cell.overrides) == wanted), None)

    def _without_base(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        base = flatten(self.sweep.get("base_config") or {})
        return {k: plain(v) for k, v in overrides.items() if k not in base or base[k] != plain(v)}

    def paper_row(self, cell: Cell) -> Mapping[str, Any] | None:
        """What the paper reported for the cell."""
        rows = (self.sweep.get("paper") or {}).get("rows", [])
        return next((row for row in rows if self.find(row["cell"]) is cell), None)

    def label(self, overrides: Mapping[str, Any]) -> str:
        """How a cell is called: as in the paper, or by what it sets ("h=4", "d_k=16")."""
        cell = self.find(overrides)
        paper = self.paper_row(cell) if cell else None
        if paper and "label" in paper:
            return paper["label"]
        return ", ".join(f"{SHORT.get(k, k.rsplit('.', 1)[-1])}={plain(v)}" for k, v in overrides.items()) or "base"

    def rows(self) -> list[dict[str, Any]]:
        """One row per finished (run, seed): run, seed, the swept fields, the metrics, speed and memory.

        What a run did not measure is absent from its row, never zero.
        """
        rows = []
        fields = (*self.swept, *self.tuned)
        for cell in self.done:
            columns = {name: cell.values(name) for name in self.metrics}
            columns |= {name: cell.training(name) for name in (*MEDIANS, *LARGEST)}
            for run in cell.counted:
                flat = flatten(run.config or {})
                for seed in run.seeds:
                    row = {"run": run.run, "seed": seed, **{name: flat.get(name) for name in fields}}
                    row |= {name: values[seed] for name, values in columns.items() if seed in values}
                    if "predicted_peak_bytes" in run.status:
                        row["predicted_peak_bytes"] = run.status["predicted_peak_bytes"]
                    rows.append(row)
        return rows


def read(workdir: epath.PathLike) -> Results:
    """Reads a sweep directory, finished or not. Raises UserError where there is none, or sweep.json is damaged."""
    workdir = epath.Path(workdir)
    if not (workdir / "sweep.json").exists():
        raise UserError(f"{workdir} holds no sweep: sweep.json is missing")
    problems: list[str] = []
    sweep = _json(workdir / "sweep.json", problems)
    if "cells" not in sweep:
        raise UserError(f"{workdir / 'sweep.json'} is damaged; run the sweep again, which writes it anew")
    tuning, trials = _tuning(workdir, problems)
    cells = []
    for cell in sweep.get("cells", []):
        names = [cell["run"], *cell.get("added", [])]
        runs = tuple(_run(workdir / "runs" / name, cell, problems) for name in names)
        tried = tuple(trial for trial in trials if trial.cell == cell.get("untuned", cell["run"]))
        cells.append(Cell(cell["run"], cell["overrides"], runs, cell.get("tuned") or {}, tried))
    return Results(sweep, cells, problems, tuning)


def _tuning(workdir: epath.Path, problems: list[str]) -> tuple[dict[str, Any] | None, list[Trial]]:
    try:
        return read_tuning(workdir), read_trials(workdir)
    except UserError as error:
        problems.append(str(error))
        return None, []


def _run(directory: epath.Path, cell: Mapping[str, Any], problems: list[str]) -> Run:
    log, corrupt = read_metrics(directory / "metrics.jsonl")
    problems += corrupt
    return Run(
        run=directory.name,
        reason=cell.get("reason"),
        config=_json(directory / "config.json", problems) or None,
        status=_json(directory / "status.json", problems),
        log=log,
        has_heads=(directory / "heads" / "index.html").exists(),
        has_atlas=(directory / "heads" / "atlas.html").exists(),
        gave_up="untuned" in cell,
    )


def _json(path: epath.Path, problems: list[str]) -> dict[str, Any]:
    """The object in a file; empty where there is none, and where it is corrupt, which is then named."""
    try:
        return read_json(path) if path.exists() else {}
    except UserError as error:
        problems.append(str(error))
        return {}
