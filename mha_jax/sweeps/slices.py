"""The compiler's own plan of a cell's memory: on the devices of this machine, or on a TPU slice that need not be here.

libtpu compiles for a slice without a TPU: requirements-tpu-test.txt.
"""

import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from mha_jax.attention.target import made_for
from mha_jax.specs import RunSpec, UserError
from mha_jax.sweeps.plan import Memory
from mha_jax.training.parallel import make_program

_SIZES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TOO_MUCH = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
# libtpu asks the cloud where it is, wants to be alone, and warns of everything that is not there.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "4",
    "TPU_STDERR_LOG_LEVEL": "4",
}


def slice_devices(topology: str) -> list[Any]:
    """The devices of a TPU slice, "v5e:2x2" or "v4:2x2x1", as something to compile for.

    Before JAX has started, it is told to leave the devices of this machine alone.

    Raises: UserError where libtpu is not installed or knows no such slice.
    """
    if find_spec("libtpu") is None:
        raise UserError(f"--topology={topology} needs libtpu: pip install -r requirements-tpu-test.txt")
    for name, value in _ALONE.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # The two cores of these chips are one device, as on a TPU VM.
    whole = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **whole).devices)
    except Exception as error:  # its kind depends on what libtpu dislikes
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"--topology={topology!r} is no TPU slice ({reason}); v5e:2x2, v6e:4x4 or v4:2x2x1 would do"
        ) from None


def planned_memory(run: RunSpec, devices: Sequence[Any], limit: int | None) -> Memory:
    """Bytes a device that the compiler plans for the run's largest step. Compiles; runs nothing.

    Args:   limit: bytes that a device has, where that is known.
    Raises: UserError where batch or heads do not fit the devices, or the backend refuses.
    """
    with made_for(devices[0].platform):
        program = make_program(run, devices)
        try:
            return Memory(program.plan_step(), limit, estimated=False)
        except jax.errors.JaxRuntimeError as error:
            found = _TOO_MUCH.search(str(error))
            if found is None:
                raise
            needed, available = (int(float(n) * _SIZES[unit]) for n, unit in (found.groups()[:2], found.groups()[2:]))
            return Memory(needed, available, estimated=False)


def once_a_shape(memory: Callable[[RunSpec], Memory]) -> Callable[[RunSpec], Memory]:
    """The function, called once for all runs that need the same: they differ in rates, steps and which seeds only."""
    known: dict[str, Memory] = {}

    def remembered(run: RunSpec) -> Memory:
        sections = (run.task, run.parallel, run.mesh, run.model, run.data, run.gates)
        key = repr((sections, len(run.seeds), run.training.freeze, run.training.label_smoothing))
        if key not in known:
            known[key] = memory(run)
        return known[key]

    return remembered
