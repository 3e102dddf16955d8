"""What a driver finds out before it starts the cells, without touching the devices that they will need."""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from mha_jax import data
from mha_jax.specs import UserError
from mha_jax.sweeps.cell import data_dir
from mha_jax.sweeps.grid import Cell

_PROBE = """
import json, jax
d = jax.devices()
print(json.dumps({"platform": d[0].platform, "kind": d[0].device_kind, "count": len(d)}))
"""


def devices() -> dict[str, Any]:
    """Platform, kind and count, asked in another process: a driver that held a TPU would keep it from its cells."""
    answer = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"JAX finds no devices: {(answer.stderr.strip() or 'no message').splitlines()[-1]}")
    return json.loads(answer.stdout.splitlines()[-1])


def prepare_data(cells: Sequence[Cell], workdir: epath.Path) -> None:
    """Prepares every data set that the legal cells need, once. Raises UserError for what is wrong with it."""
    runs = [cell.run for cell in cells if cell.reason is None]
    for run in {(repr(run.data), run.task): run for run in runs}.values():
        data.load(run.data, run.task, data_dir(run, workdir))
