"""Limits that a run's validation loss must keep: a trial that crosses one is given up, as others did better there."""

import json
from collections.abc import Mapping

from etils import epath


class GivenUp(Exception):
    """The validation loss crossed the run's limit. That is a result of the run, not a failure."""


def write_limits(directory: epath.PathLike, limits: Mapping[int, float]) -> None:
    """Puts step to limit beside the run that is to keep them; before it starts, so that nothing else reads there."""
    text = json.dumps({str(step): limit for step, limit in limits.items()})
    (epath.Path(directory) / "limits.json").write_text(text + "\n")


def read_limits(directory: epath.PathLike) -> dict[int, float]:
    """Step to limit; empty where the run has none."""
    file = epath.Path(directory) / "limits.json"
    return {int(step): limit for step, limit in json.loads(file.read_text()).items()} if file.exists() else {}
