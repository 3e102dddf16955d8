"""Whether a sweep that is asked for is the one that a directory holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from mha_jax import config as configs
from mha_jax.specs import UserError
from mha_jax.sweeps import seeds


def check_same(path: epath.Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises UserError with the differences where two sweep.json are not of one sweep."""
    _check_seeds(path, old, new)
    changes = _changes(old, new)
    if changes:
        raise UserError(f"{path} holds another sweep: {'; '.join(changes)}")


def _check_seeds(path: epath.Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Other seeds are no other sweep, though a config cannot say so: the flag that can is named."""
    if [change.split(":")[0] for change in configs.diff(old["base_config"], new["base_config"])] != ["seeds"]:
        return
    before, after = (set(facts["base_config"]["seeds"]) for facts in (old, new))
    told = f"{path} holds this sweep with seeds {seeds.in_words(before)}, and the config says {seeds.in_words(after)}"
    more = f"add others, give --seeds={seeds.in_words(after - before)}"
    raise UserError(f"{told}; to {more if before < after else f'go on, give --seeds={seeds.in_words(before)}'}")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    names = [
        Path(facts["config_file"]).name + (":" + facts["profile"] if facts["profile"] else "") for facts in (old, new)
    ]
    changes = [f"config file: {names[0]} -> {names[1]}"] if names[0] != names[1] else []
    changes += configs.diff(old["base_config"], new["base_config"])
    # More values or trials are a wider search, not another sweep: what was tried stays tried.
    tuned = [sorted((facts.get("tuning") or {}).get("fields", ())) for facts in (old, new)]
    changes += [f"tuned fields: {tuned[0]} -> {tuned[1]}"] if tuned[0] != tuned[1] else []
    before, after = ([cell.get("untuned", cell["run"]) for cell in facts["cells"]] for facts in (old, new))
    changes += [f"cell {run} is gone" for run in before if run not in after]
    changes += [f"cell {run} is new" for run in after if run not in before]
    return changes
