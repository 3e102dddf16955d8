"""What a driver finds out before it starts the cells, without touching the devices that they will need."""

import contextlib
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

# Those that come wait for process 0, which may have found a mistake: then it comes with the line, instead of going on.
_MEET = """
import sys
from mha_jax.training import hosts
hosts.enrol(hosts.inherited())
hosts.meet()
mistake = hosts.line_from_first(sys.argv[1])
if mistake:
    print("error: " + mistake, file=sys.stderr)
    sys.exit(2)
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

_prepared = False  # whether all have met to train


def devices() -> dict[str, Any]:
    """Platform, kind, count, bytes of memory each; in a process apart, as a driver would keep a TPU from its cells.

    Of several processes that train together all ask at once, and are told the devices of all.
    """
    return json.loads(_answer((_MEET if hosts.several() else "") + _PROBE, "JAX finds no devices"))


def meet() -> None:
    """Waits for the drivers of the other processes to come here; returns at once where there are none."""
    global _prepared
    if hosts.several():
        _answer(_MEET + "print()", "the processes do not meet")
        _prepared = True


def refuse(mistake: str) -> None:
    """Process 0 tells the others, at the meeting that they wait in, what is wrong with the sweep: all end with that.

    Does nothing once they have met to train.
    """
    if _prepared:
        return
    print(f"telling the other processes: {mistake}", file=sys.stderr)
    with contextlib.suppress(UserError):  # which says the same, or that they do not come
        _answer(_MEET, "the processes do not meet", f"process 0 failed: {mistake}")


def cluster() -> hosts.Group:
    """The place that the cluster (TPU pod, Slurm, Open MPI) gives this process.

    Raises: UserError where there is no cluster.
    """
    wrong = "--multihost finds no cluster; give --coordinator, --num_processes and --process_id"
    count, index = json.loads(_answer(_CLUSTER, wrong))
    return hosts.Group(count, index)


def _answer(code: str, wrong: str, argument: str = "") -> str:
    """The last line that Python code prints in a process of its own; what that prints as an error is raised.

    Args: wrong: what is said before the error where that is not a user's mistake, which exits with code 2.
    """
    environment = {**os.environ, **hosts.group().environment()}
    answer = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, env=environment)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or ["no message"]
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(told[-1] if told and answer.returncode == 2 else f"{wrong}: {(told or lines)[-1]}")
    return (answer.stdout.splitlines() or [""])[-1]


def prepare_data(cells: Sequence[Cell], workdir: epath.Path) -> None:
    """Prepares every data set that the legal cells need, once. Raises UserError for what is wrong with it."""
    runs = [cell.run for cell in cells if cell.reason is None]
    for run in {(repr(run.data), run.task): run for run in runs}.values():
        data.load(run.data, run.task, data_dir(run, workdir))
