"""From a config file to the cells of its sweep, the illegal ones kept with the reason."""

import dataclasses
import hashlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from mha_jax import config as configs
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps.claims import check_paper, parse

_MATCHED_FIELDS = ("num_heads", "num_kv_heads", "qk_dim", "v_dim")


@dataclasses.dataclass(frozen=True)
class Study:
    """A config file with its profile chosen and the overrides of the command line applied."""

    path: str
    profile: str
    sha256: str
    config: ConfigDict
    sweep: list[dict[str, Any]]
    paper: dict[str, Any] | None
    claims: list[dict[str, Any]]
    docstring: str
    cuts: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # what its paper says about cutting heads
    tuning: Mapping[str, Any] | None = None  # what each cell may choose for itself


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep. `reason` says why it cannot be run; None where it can.

    `overrides` are the grid's own. `tuned` are fields that were chosen for the cell on top of them, and `untuned` is
    the run's id without those; None where nothing was tuned.
    """

    run_id: str
    overrides: dict[str, Any]
    config: ConfigDict
    reason: str | None
    tuned: dict[str, Any] = dataclasses.field(default_factory=dict)
    untuned: str | None = None

    @property
    def run(self) -> RunSpec:
        return configs.resolve(self.config)


def load(config_argument: str, overrides: Mapping[str, Any] | None = None) -> Study:
    """Reads "configs/X.py" or "configs/X.py:profile".

    Args:    overrides: dotted fields set in the base config, below what the cells set.
    Raises:  UserError, one line, for a file that is missing or raises, a profile or a field that does not exist.
    """
    path, _, profile = config_argument.partition(":")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"config file {path!r} does not exist")
    module = _execute(file)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config()")
    config = _call(path, module.get_config, profile)
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}, not a ConfigDict")
    sweep = _dicts(path, "sweep", _call(path, module.get_sweep, profile)) if hasattr(module, "get_sweep") else [{}]
    if not sweep:
        raise UserError(f"{path}: get_sweep({profile!r}) gave no cells")
    paper, claims, cuts = (_of_profile(path, module, name, profile) for name in ("paper", "claims", "cuts"))
    if paper is not None:
        check_paper(paper)
    tuning = _of_profile(path, module, "tuning", profile)
    if not isinstance(tuning, Mapping | None):
        raise UserError(f"{path}: TUNING={tuning!r} must be a dict, such as {{'fields': {{...}}}}")
    claims = _dicts(path, "claims", claims or [])
    for claim in claims:
        parse(claim)
    return Study(
        path=path,
        profile=profile,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        config=_with_match_base(configs.override(config, overrides or {}), None),
        sweep=sweep,
        paper=paper,
        claims=claims,
        cuts=_dicts(path, "cuts", cuts or []),
        docstring=inspect.cleandoc(module.__doc__ or ""),
        tuning=tuning,
    )


def cells(study: Study, num_devices: int | None = None) -> list[Cell]:
    """Every cell of the study in the order of its file.

    Args:    num_devices: where given, cells whose batch or heads do not divide over so many devices are illegal too.
    Raises:  UserError for two cells that are the same run, a field that does not exist, or no legal cell at all.
    """
    made: dict[str, Cell] = {}
    for values in study.sweep:
        config = _with_match_base(configs.override(study.config, values), study.config)
        key = configs.config_hash(config)
        if key in made:
            raise UserError(f"{study.path}: cells {made[key].overrides} and {values} are the same run")
        made[key] = Cell(configs.run_id(config, values), values, config, _reason(config, num_devices))
    if all(cell.reason for cell in made.values()):
        first = next(iter(made.values()))
        raise UserError(f"{first.reason}" + (f" (no cell of {study.path} is legal)" if len(made) > 1 else ""))
    return list(made.values())


def varied(
    cell: Cell, values: Mapping[str, Any], seeds: tuple[int, ...] | None = None, num_devices: int | None = None
) -> Cell:
    """The cell with values tuned, and with other seeds where they are given; legal or not by itself."""
    config = configs.override(cell.config, {**values, **({} if seeds is None else {"seeds": seeds})})
    run_id = configs.run_id(config, {**cell.overrides, **values})
    return Cell(run_id, cell.overrides, config, _reason(config, num_devices), dict(values), cell.run_id)


def base_run_id(study: Study, made: list[Cell]) -> str:
    """The row that others are compared with: the cell that is the base config itself, or else the first legal cell.

    Tuning does not change which it is, even where it found no values for it.
    """
    base = configs.config_hash(study.config)
    legal = [cell for cell in made if cell.reason is None or cell.untuned]
    found = (cell.run_id for cell in legal if (cell.untuned or cell.run_id).endswith(base))
    return next(found, legal[0].run_id)


def _execute(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_config_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _faulty(str(file), error) from error
    return module


def _call(path: str, function: Callable[..., Any], profile: str) -> Any:
    if not profile:
        arguments = ()
    elif inspect.signature(function).parameters:
        arguments = (profile,)
    else:
        raise UserError(f"{path} has no profiles; {profile!r} was asked for")
    try:
        result = function(*arguments)
        return list(result) if isinstance(result, Iterator) else result
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _faulty(path, error) from error


def _dicts(path: str, what: str, given: Any) -> list[dict[str, Any]]:
    listed = isinstance(given, (tuple, list))
    odd = [one for one in given if not isinstance(one, (Mapping, ConfigDict))] if listed else [given]
    if odd:
        raise UserError(f"{path}: its {what} must be a list of dicts; {odd[0]!r} is no dict")
    return [dict(one) for one in given]


def _of_profile(path: str, module: ModuleType, name: str, profile: str) -> Any:
    """PAPER, CLAIMS or TUNING of a config file, or what its get_paper() and the like gives for the profile."""
    function = getattr(module, f"get_{name}", None)
    return getattr(module, name.upper(), None) if function is None else _call(path, function, profile)


def _faulty(path: str, error: BaseException) -> UserError:
    if isinstance(error, SyntaxError):
        line, text = error.lineno, error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line, text = next((f.lineno for f in reversed(frames) if f.filename.endswith(path)), None), str(error)
    return UserError(f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {text}")


def _with_match_base(config: ConfigDict, base: ConfigDict | None) -> ConfigDict:
    """`match` needs the head shape whose cost is to be met: the base config's, where the file names none."""
    model = configs.plain(config).get("model", {})
    if model.get("match", "none") == "none" or model.get("match_base") is not None:
        return config
    source = configs.plain(base or config)["model"]
    return configs.override(config, {"model.match_base": {name: source.get(name) for name in _MATCHED_FIELDS}})


def _reason(config: ConfigDict, num_devices: int | None) -> str | None:
    try:
        run = configs.resolve(config)
        if num_devices is not None:
            run.check_devices(num_devices)
        if run.model.match != "none":
            from mha_jax.models import cost  # flax takes seconds to import: only matched cells wait for it

            cost.matched_d_ff(run)
    except UserError as error:
        return str(error)
    return None
