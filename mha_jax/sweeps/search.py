"""Chooses the tuned fields of each cell: its trials are runs like any other, and the best gives its values."""

import dataclasses
import importlib
import math
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from mha_jax import config as configs
from mha_jax.sweeps.cell import Exit, data_dir
from mha_jax.sweeps.grid import Cell, varied
from mha_jax.sweeps.mending import mend_directory
from mha_jax.sweeps.store import RunDirectory
from mha_jax.sweeps.trials import Trial, read_trial, trial_path, write_trials
from mha_jax.sweeps.tuning import Range, Tuning
from mha_jax.training.limits import write_limits

Train = Callable[[Sequence[RunDirectory]], Exit]


def search(
    tuning: Tuning, cells: Sequence[Cell], workdir: epath.PathLike, train: Train, num_devices: int | None = None
) -> tuple[list[Cell], Exit]:
    """Trains the trials of every legal cell under DIR/tuning and gives each cell the values of its best.

    Run again, it goes on: which trials are asked for is a function of the results of those before, so nothing but the
    run directories needs to be kept. A trial that fails loses; a cell of which all fail is left out with the reason.

    Args:    train: runs directories that are not done, as the sweep's executor does, and says how it ended.
    Returns: the cells in their order, and STOPPED (where the cells are as they were), FAILED or WRONG_INPUT as `train`
             said where a cell is left out, or DONE.
    """
    told: dict[str, list[Trial]] = {cell.run_id: [] for cell in cells if cell.reason is None}
    asked: list[Cell] = []
    code = Exit.DONE
    while wave := _next(tuning, cells, told, num_devices):
        asked += wave
        write_trials(workdir, tuning, asked)
        directories = [
            _directory(workdir, trial, limits(tuning, told[str(trial.untuned)], trial.run.training.steps))
            for trial in wave
            if trial.reason is None
        ]
        unsettled = {trial.run_id for trial in wave if not _read(workdir, tuning, trial).settled}
        open_runs = [directory for directory in directories if directory.run_id in unsettled]
        ended = train(open_runs) if open_runs else Exit.DONE
        if ended == Exit.STOPPED:
            return list(cells), ended
        code = ended if ended != Exit.DONE else code
        for trial in wave:
            told[str(trial.untuned)].append(_read(workdir, tuning, trial))
    chosen = [cell if cell.reason else _with_best(tuning, cell, told[cell.run_id], num_devices) for cell in cells]
    left_out = any(cell.untuned and cell.reason for cell in chosen)
    return chosen, (code if code != Exit.DONE else Exit.FAILED) if left_out else Exit.DONE


def outcomes(cells: Sequence[Cell]) -> list[str]:
    """One line a tuned cell: its id and what it chose, or why it is left out."""
    return [
        f"{cell.untuned}: {cell.reason or ', '.join(f'{field}={value}' for field, value in cell.tuned.items())}"
        for cell in cells
        if cell.untuned
    ]


def best(tuning: Tuning, trials: Sequence[Trial]) -> Trial | None:
    """The trial with the best metric, of equals the first that was asked for; None where none has a value."""
    finished = [(tuning.sign * trial.value, i) for i, trial in enumerate(trials) if trial.value is not None]
    return trials[min(finished)[1]] if finished else None


def propose(tuning: Tuning, told: Sequence[Trial]) -> list[dict[str, Any]]:
    """The values that a cell tries next, given the trials that it has had: a whole grid at once, or one draw at a time.

    Empty where the search is over. The same trials give the same answer, so a search goes on where it was stopped.
    """
    if len(told) >= tuning.trials:
        return []
    return tuning.combinations() if tuning.method == "grid" else [_draw(tuning, told)]


def limits(tuning: Tuning, told: Sequence[Trial], steps: int) -> dict[int, float]:
    """Where the next trial of a cell is given up: the median, at a step, of the losses of those that went before.

    The median rule (Golovin et al. 2017, section 3.2), from the first third of training on, where at least three
    came that far. The trials of a cell follow each other, so the limits of one are known before it starts.
    """
    if not tuning.prune:
        return {}
    reached: dict[int, list[float]] = {}
    for trial in told:
        for step, value in trial.curve.items():
            if steps / 3 <= step < steps and math.isfinite(value):
                reached.setdefault(step, []).append(value)
    return {step: statistics.median(values) for step, values in reached.items() if len(values) >= 3}


def _next(tuning: Tuning, cells: Sequence[Cell], told: dict[str, list[Trial]], num_devices: int | None) -> list[Cell]:
    return [
        varied(cell, values, tuning.seeds, num_devices)
        for cell in cells
        if cell.reason is None
        for values in propose(tuning, told[cell.run_id])
    ]


def _directory(workdir: epath.PathLike, trial: Cell, limits: dict[int, float]) -> RunDirectory:
    """Made, or mended. Trials read the data prepared for the sweep; where it lies does not count in their hash."""
    place = os.fspath(data_dir(trial.run, epath.Path(workdir)))
    path = trial_path(workdir, trial.run_id)
    for line in mend_directory(RunDirectory(path)):
        tqdm.write(f"warning: {line}")
    directory = RunDirectory.create(path, configs.override(trial.config, {"data.data_dir": place}))
    if limits:
        write_limits(path, limits)
    return directory


def _read(workdir: epath.PathLike, tuning: Tuning, trial: Cell) -> Trial:
    return read_trial(workdir, tuning.metric, str(trial.untuned), trial.run_id, trial.tuned, trial.reason)


def _with_best(tuning: Tuning, cell: Cell, trials: Sequence[Trial], num_devices: int | None) -> Cell:
    chosen = best(tuning, trials)
    if chosen is not None:
        return varied(cell, chosen.values, num_devices=num_devices)
    return dataclasses.replace(
        cell, untuned=cell.run_id, reason=f"none of its {len(trials)} trials has a result, the first: {trials[0].lost}"
    )


def _draw(tuning: Tuning, told: Sequence[Trial]) -> dict[str, Any]:
    """One draw of Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), after a third at random.

    Each draw has a sampler of its own, seeded by how many went before: no state is carried over but the results.
    """
    optuna: Any = importlib.import_module("optuna")  # an optional extra
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {field: _space(optuna.distributions, choices) for field, choices in tuning.fields.items()}
    sampler = optuna.samplers.TPESampler(
        seed=tuning.seeds[0] + len(told), n_startup_trials=max(math.ceil(tuning.trials / 3), 2)
    )
    study = optuna.create_study(sampler=sampler)
    state = optuna.trial.TrialState
    for trial in told:
        # What has no result counts as pruned: of those, the sampler takes what left no value behind for the worst.
        seen = {step: tuning.sign * value for step, value in trial.curve.items() if math.isfinite(value)}
        lost = {"state": state.PRUNED, "intermediate_values": seen if trial.state == "pruned" else {}}
        told_as = lost if trial.value is None else {"value": tuning.sign * trial.value}
        study.add_trial(optuna.create_trial(params=dict(trial.values), distributions=spaces, **told_as))
    drawn = study.ask(spaces).params
    return {field: _rounded(drawn[field], choices) for field, choices in tuning.fields.items()}


def _space(distributions: Any, choices: tuple[Any, ...] | Range) -> Any:
    if isinstance(choices, tuple):
        return distributions.CategoricalDistribution(choices)
    whole = isinstance(choices.low, int) and isinstance(choices.high, int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(choices.low, choices.high, log=choices.log)


def _rounded(value: Any, choices: tuple[Any, ...] | Range) -> Any:
    """Three digits, so that a run's name can be read and its value be typed."""
    if isinstance(choices, tuple) or not isinstance(value, float):
        return value
    return min(max(float(f"{value:.3g}"), choices.low), choices.high)
