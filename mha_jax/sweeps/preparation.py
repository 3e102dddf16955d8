"""What a driver finds out before it starts the cells, without touching the devices that they will need."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from mha_jax import data
from mha_jax.specs import UserError
from mha_jax.sweeps.cell import data_dir
from mha_jax.sweeps.grid import Cell
from mha_jax.training import hosts

_MEET = """
from mha_jax.training import hosts
hosts.enrol(hosts.inherited())
hosts.meet()
"""
_CLUSTER = """
import json, jax
jax.distributed.initialize()
print(json.dumps([jax.process_count(), jax.process_index()]))
"""
_PROBE = """
import json, jax
d = jax.devices()
memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
print(json.dumps({"platform": d[0].platform, "kind": d[0].device_kind, "count": len(d), "memory": memory}))
"""


def devices() -> dict[str, Any]:
    """Platform, kind, count, bytes of memory each; in a process apart, as a driver would keep a TPU from its cells.

    Of several processes that train together all ask at once, and are told the devices of all.
    """
    return json.loads(_answer((_MEET if hosts.several() else "") + _PROBE, "JAX finds no devices"))


def meet() -> None:
    """Waits for the drivers of the other processes to come here; returns at once where there are none."""
    if hosts.several():
        _answer(_MEET + "print()", "the processes do not meet")


def cluster() -> hosts.Group:
    """The place that the cluster (TPU pod, Slurm, Open MPI) gives this process.

    Raises: UserError where there is no cluster.
    """
    wrong = "--multihost finds no cluster; give --coordinator, --num_processes and --process_id"
    count, index = json.loads(_answer(_CLUSTER, wrong))
    return hosts.Group(count, index)


def _answer(code: str, wrong: str) -> str:
    """The last line that Python code prints in a process of its own."""
    environment = {**os.environ, **hosts.group().environment()}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or ["no message"]
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(f"{wrong}: {(told or lines)[-1]}")
    return (answer.stdout.splitlines() or [""])[-1]


def prepare_data(cells: Sequence[Cell], workdir: epath.Path) -> None:
    """Prepares every data set that the legal cells need, once. Raises UserError for what is wrong with it."""
    runs = [cell.run for cell in cells if cell.reason is None]
    for run in {(repr(run.data), run.task): run for run in runs}.values():
        data.load(run.data, run.task, data_dir(run, workdir))
