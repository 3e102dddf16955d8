"""On CPU every core is a device: a batch split over cores outruns operations that are each split over threads."""

import contextlib
import importlib.util
import os

import jax

from mha_jax.cores import num_cores
from mha_jax.data import batch_shapes
from mha_jax.specs import RunSpec
from mha_jax.training import hosts

# LLVM's second level: the same numbers in the same time as its third, but compiled a tenth to a half sooner.
_COMPILED_SOONER = "--xla_backend_optimization_level=2"


def cpu_devices(run: RunSpec, cores: int) -> int:
    """How many CPU devices a run is spread over: what its mesh asks for, or the most cores that divide all its batches.

    Where the mesh leaves `data` open and has seed or head axes, their product divides the number.
    """
    mesh = run.mesh
    fixed = mesh.seed * mesh.head
    if mesh.data is not None:
        return fixed * mesh.data
    rows = [batch["weights"].shape[0] for batch in batch_shapes(run.data, run.task)]
    fit = [data for data in range(1, cores // fixed + 1) if all(count % data == 0 for count in rows)]
    return fixed * max(fit, default=1)


def devices_each(run: RunSpec, processes: int) -> int:
    """How many CPU devices each of several processes makes: one, or as many as a mesh asks for that needs more.

    With more than one a process, every step is waited for (`hosts.settled`), and processes are as good as devices.
    """
    asked = run.mesh.seed * run.mesh.head * (run.mesh.data or 1)
    return -(-asked // processes)


def use_cores(run: RunSpec) -> None:
    """Tells JAX how many CPU devices to make, unless XLA_FLAGS does. Comes before anything else that touches a device.

    Where JAX finds an accelerator this changes nothing; where it can find none, CPU programs are compiled sooner.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    _compile_sooner()
    processes = hosts.group().num_processes
    count = devices_each(run, processes) if processes > 1 else cpu_devices(run, num_cores())
    with contextlib.suppress(RuntimeError):  # JAX has started, as in a notebook: its devices are what they are
        jax.config.update("jax_num_cpu_devices", count)


def _compile_sooner() -> None:
    """XLA reads its flags once, as the first device is touched: whether that is a CPU must be known before."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" in flags or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return
    os.environ["XLA_FLAGS"] = f"{flags} {_COMPILED_SOONER}".strip()
