"""Damaged files of a sweep: what they told is found again elsewhere where it can be, and named where it cannot.

Nothing that is finished is trained again: a run whose last step is saved repeats its evaluation only.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from mha_jax.specs import UserError
from mha_jax.sweeps.grid import Cell
from mha_jax.sweeps.seeds import with_seeds
from mha_jax.sweeps.store import Busy, RunDirectory, SweepDirectory, read_json, write_json
from mha_jax.sweeps.trials import tuned_cells
from mha_jax.training import manifests
from mha_jax.training.metrics import read_metrics


def mend_sweep(path: epath.PathLike, cells: Sequence[Cell]) -> list[str]:
    """Mends a sweep's directory before its cells run; one line for each file that was damaged. Runs in use are left.

    sweep.json and config.json follow from the grid and are removed, to be written anew; status.json and metrics.jsonl
    are those of `mend_run`.

    Raises: UserError where sweep.json is damaged and what was trained in the directory is of another sweep.
    """
    sweep = SweepDirectory(path)
    legal = [cell.run_id for cell in cells if cell.reason is None]
    found = []
    if damage := _damage(sweep.path / "sweep.json"):
        trained = [file.parent.name for file in (sweep.path / "runs").glob("*/metrics.jsonl")]
        if trained and not {*trained, *tuned_cells(path)} & set(legal):
            raise UserError(f"{damage}, and none of this sweep's cells was trained there, but {trained[0]} was")
        (sweep.path / "sweep.json").unlink()
        found.append(f"{damage}: written anew")
    added = [cell for batch in sweep.seeds[1:] for cell in with_seeds(cells, batch) if cell.reason is None]
    for directory in map(RunDirectory, map(sweep.run_path, [*legal, *(cell.run_id for cell in added)])):
        found += mend_directory(directory)
    return found


def mend_directory(directory: RunDirectory) -> list[str]:
    """Mends the files of one run, its config.json included, where it is there and nobody trains it."""
    found: list[str] = []
    if not directory.path.exists():
        return found
    with contextlib.suppress(Busy), directory.lock():
        if damage := _damage(directory.path / "config.json"):
            (directory.path / "config.json").unlink()  # its name ends with the hash of the cell's own config
            found.append(f"{damage}: written anew")
        found += mend_run(directory)
    return found


def mend_run(directory: RunDirectory) -> list[str]:
    """Mends status.json and metrics.jsonl of a run whose lock the caller holds; says what was damaged, a line each.

    A run without a readable status begins anew from its newest good checkpoint. One that is done, but whose metrics
    cannot all be read, is evaluated again where its last step is saved. The lines are kept as the run's incidents.
    """
    damage = _damage(directory.path / "status.json", "state")
    if damage:
        status: dict[str, Any] = {"state": "queued"}
        found = [f"{damage}: begun anew from the last good checkpoint"]
    else:
        status = directory.status
        found = _unread_metrics(directory, status) if status["state"] == "done" else []
    if found:
        incidents = [*status.get("incidents", []), *found]
        write_json(directory.path / "status.json", {**status, "state": "queued", "incidents": incidents})
    return found


def _unread_metrics(directory: RunDirectory, status: dict[str, Any]) -> list[str]:
    rows, corrupt = read_metrics(directory.path / "metrics.jsonl")
    last = status.get("step")
    if last != status.get("steps"):
        return []  # a trial that was given up
    if not corrupt and any(row["step"] == last and row["split"] != "train" for row in rows):
        return []
    try:
        manifests.read(directory.path / "checkpoints" / str(last))
    except manifests.Damaged:
        return []  # the report names the lines; training all over would cost more than they tell
    lost = corrupt or [f"{directory.path / 'metrics.jsonl'} has no evaluation of step {last}"]
    return [f"{line}: left out, and the last step evaluated again" for line in lost]


def _damage(file: epath.Path, *wanted: str) -> str | None:
    """What is wrong with a JSON object that should have these names; None where all is well or there is no file."""
    try:
        value = read_json(file) if file.exists() else dict.fromkeys(wanted)
    except UserError as error:
        return str(error)
    missing = [name for name in wanted if name not in value]
    return f"{file} is damaged (it has no {missing[0]!r})" if missing else None
