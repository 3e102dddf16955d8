"""What a study tunes for each of its cells, read from a config file's TUNING: which fields, by what, at what cost."""

import dataclasses
import importlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mha_jax import config as configs
from mha_jax.specs import LARGEST_SEED, UserError
from mha_jax.sweeps import grid
from mha_jax.training.metrics import lower_is_better

# What says which run this is, or what is compared: none of it is a setting of the training.
_NO_HYPERPARAMETERS = ("name", "task", "seeds", "parent", "training.start_from", "model.match_base")
_TASK_OF = {"bleu": "translation", "bits_per_byte": "lm"}


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval to draw from, evenly, or with `log` evenly in the logarithm; of integers where both ends are."""

    low: int | float
    high: int | float
    log: bool = False


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The search that every cell gets: the same values, or the same number of trials, on the validation split.

    A trial is a run of the cell with other values of `fields` and with `seeds`. The one whose metric is best at its
    last step, in the mean over those seeds, gives its values to the cell, which then trains with the study's seeds.
    """

    fields: Mapping[str, tuple[Any, ...] | Range]
    seeds: tuple[int, ...]
    metric: str = "validation/loss"
    method: Literal["grid", "optuna"] = "grid"
    trials: int = 0
    prune: bool = False

    @property
    def sign(self) -> int:
        """1 where a smaller metric is better, -1 where a larger is."""
        return 1 if lower_is_better(self.metric) else -1

    def combinations(self) -> list[dict[str, Any]]:
        """Every point of a grid, the last field fastest."""
        values = [value for value in self.fields.values() if isinstance(value, tuple)]
        return [dict(zip(self.fields, point, strict=True)) for point in itertools.product(*values)]

    def corners(self) -> list[dict[str, Any]]:
        """Every value or end of a range at least once, with the first of the other fields."""
        ends = {f: (v.low, v.high) if isinstance(v, Range) else v for f, v in self.fields.items()}
        first = {field: values[0] for field, values in ends.items()}
        return [{**first, field: value} for field, values in ends.items() for value in values]


def parse_tuning(study: grid.Study, cells: Sequence[grid.Cell]) -> Tuning | None:
    """The study's TUNING with its defaults filled in; None where it has none.

    `{"fields": {"optimizer.learning_rate": (5e-4, 1e-3, 2e-3)}}` tries every combination of the values. With
    `"method": "optuna", "trials": 12` a field may also be a range, `{"low": 1e-4, "high": 1e-2, "log": True}`, and
    Optuna draws; `"prune": True` gives a trial up where `search.limits` says so. "metric" is "validation/loss", and
    "seeds" the first of the study's, where they are not given.

    Raises: UserError, one line, for whatever could not be searched or would choose by the test split.
    """
    if study.tuning is None:
        return None
    given = dict(study.tuning)
    known = [field.name for field in dataclasses.fields(Tuning)]
    for name in given:
        if name not in known:
            raise UserError(f"TUNING has {name!r}; it may set {', '.join(known)}")
    base = configs.plain(study.config)
    method = given.get("method", "grid")
    if method not in ("grid", "optuna"):
        raise UserError(f"TUNING: method={method!r} is not one of 'grid', 'optuna'")
    tuning = Tuning(
        fields=_fields(given.get("fields"), method, study),
        seeds=_seeds(given.get("seeds", base["seeds"][:1])),
        metric=_metric(given.get("metric", "validation/loss"), base["task"]),
        method=method,
    )
    tuning = dataclasses.replace(tuning, trials=_trials(given.get("trials"), tuning), prune=_prune(given, tuning))
    _check_values(tuning, cells)
    return tuning


def _fields(given: Any, method: str, study: grid.Study) -> dict[str, tuple[Any, ...] | Range]:
    if not isinstance(given, Mapping) or not given:
        raise UserError(
            f"TUNING: fields={given!r} must name at least one, such as {{'optimizer.learning_rate': (1e-3, 2e-3)}}"
        )
    known = configs.flatten(study.config)
    for field in given:
        if field not in known:
            raise configs.unknown_field(field, list(known))
        if field in _NO_HYPERPARAMETERS or not _decides(study, field):
            raise UserError(f"TUNING: {field!r} is no hyperparameter of the training")
        if any(field in cell for cell in study.sweep):
            raise UserError(f"TUNING: {field!r} is set by the sweep's own cells; tune a field that they leave alone")
    return {field: _choices(field, value, method) for field, value in given.items()}


def _decides(study: grid.Study, field: str) -> bool:
    """Whether the field counts in the hash of a run: where a run's files lie, for instance, does not."""
    return configs.config_hash(configs.override(study.config, {field: "another"})) != configs.config_hash(study.config)


def _choices(field: str, given: Any, method: str) -> tuple[Any, ...] | Range:
    if isinstance(given, Mapping):
        return _range(field, given, method)
    if not isinstance(given, (tuple, list)) or not given:
        raise UserError(f"TUNING: {field}={given!r} must be a tuple of values to try, at least one")
    if len(set(map(repr, given))) != len(given):
        raise UserError(f"TUNING: {field}={tuple(given)!r} has a value twice")
    return tuple(given)


def _range(field: str, given: Mapping[str, Any], method: str) -> Range:
    told = f"TUNING: {field}={dict(given)!r}"
    if method != "optuna":
        raise UserError(f"{told} is a range, which needs method='optuna'; a grid needs its values one by one")
    if not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        raise UserError(f"{told} must give low, high and, where it is drawn by the logarithm, log=True")
    low, high, log = given["low"], given["high"], given.get("log", False)
    numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (low, high))
    if not numbers or not -math.inf < low < high < math.inf or (log and low <= 0):
        raise UserError(f"{told} needs numbers low < high{', above 0 for log=True' if log else ''}")
    return Range(low, high, bool(log))


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = tuple(given) if isinstance(given, (tuple, list)) else ()
    legal = all(type(seed) is int and 0 <= seed <= LARGEST_SEED for seed in seeds)
    if not seeds or len(set(seeds)) != len(seeds) or not legal:
        raise UserError(f"TUNING: seeds={given!r} must be distinct integers from 0 to {LARGEST_SEED}, at least one")
    return seeds


def _metric(given: Any, task: str) -> str:
    split, _, name = str(given).partition("/")
    if split == "test":
        raise UserError(f"TUNING: metric={given!r} would tune on the test split; use 'validation/{name}'")
    if split != "validation":
        raise UserError(f"TUNING: metric={given!r} must be of the validation split, such as 'validation/loss'")
    lower_is_better(str(given))
    if _TASK_OF.get(name, task) != task:
        raise UserError(f"TUNING: metric={given!r} is measured for task={_TASK_OF[name]!r}; this is task={task!r}")
    return str(given)


def _trials(given: Any, tuning: Tuning) -> int:
    if tuning.method == "grid":
        if given is not None:
            raise UserError(f"TUNING: trials={given!r} is for method='optuna'; a grid tries all its values")
        return len(tuning.combinations())
    if type(given) is not int or given < 1:
        raise UserError(f"TUNING: trials={given!r} must be an integer of at least 1: how many each cell gets")
    try:
        importlib.import_module("optuna")  # an optional extra
    except ImportError:
        raise UserError("TUNING: method='optuna' needs Optuna: pip install -r requirements-optuna.txt") from None
    return given


def _prune(given: Mapping[str, Any], tuning: Tuning) -> bool:
    prune = given.get("prune", False)
    if type(prune) is not bool:
        raise UserError(f"TUNING: prune={prune!r} must be True or False")
    if prune and (tuning.method, tuning.metric) != ("optuna", "validation/loss"):
        raise UserError(
            "TUNING: prune=True compares the validation losses of a cell's trials one after another; it needs "
            f"method='optuna' and metric='validation/loss', not {tuning.method!r} and {tuning.metric!r}"
        )
    return prune


def _check_values(tuning: Tuning, cells: Sequence[grid.Cell]) -> None:
    """A value may be illegal for some cells, where it is left out; one that is illegal for all is a mistake."""
    legal = [cell for cell in cells if cell.reason is None]
    for values in tuning.corners():
        reasons = [grid.varied(cell, values).reason for cell in legal]
        if None not in reasons:
            raise UserError(f"TUNING: {reasons[0]}")
