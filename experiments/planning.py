"""Flags and calls of a plan: which devices a sweep is planned for, how fast they are taken to be, what cells need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mha_jax.cores import num_cores
from mha_jax.specs import UserError
from mha_jax.sweeps import hardware, preparation
from mha_jax.sweeps.executors import local
from mha_jax.sweeps.grid import Cell
from mha_jax.sweeps.plan import Expectation, expectation
from mha_jax.sweeps.tuning import Tuning

_FOR_DRY_RUNS = ("topology", "device", "device_count", "compile")
FLAGS = (*_FOR_DRY_RUNS, "devices_file", "records")


def define(values: flags.FlagValues) -> None:
    """The flags that go with --dry_run, and those that also tell a sweep what to expect."""
    flags.DEFINE_string(
        "topology",
        None,
        "With --dry_run: compile each shape of cell for a TPU slice, such as v5e:2x2, and say whether it fits.",
        flag_values=values,
    )
    flags.DEFINE_string("device", None, "With --dry_run: plan for this device, such as v5e.", flag_values=values)
    flags.DEFINE_integer("device_count", None, "With --device: so many of them.", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("compile", False, "With --dry_run: memory as the compiler here plans it.", flag_values=values)
    flags.DEFINE_string(
        "devices_file", None, "JSON with more devices, as mha_jax/sweeps/devices.json.", flag_values=values
    )
    flags.DEFINE_string(
        "records", None, "Directory with records of `bench train_step`, from which speeds follow.", flag_values=values
    )


def devices(values: flags.FlagValues) -> dict[str, Any]:
    """Platform, kind and count of the devices to plan for: a slice, a device that is named, or those that are here."""
    if not values.dry_run:
        _refuse(values)
        return preparation.devices()
    if values.device_count is not None and values.device is None:
        raise UserError(f"--device_count={values.device_count} goes with --device")
    if values.topology is not None:
        if values.device is not None or values.compile:
            raise UserError("--topology names the devices and compiles for them: leave --device and --compile out")
        slice_ = _slice(values.topology)
        return {"platform": "tpu", "kind": slice_[0].device_kind, "count": len(slice_)}
    if values.device is None:
        return preparation.devices()
    if values.compile:
        raise UserError("--compile asks the compiler of the devices here, and --device names others: leave one out")
    known = hardware.table(values.devices_file)
    device = hardware.find(known, values.device)
    if device is None:
        raise UserError(
            f"--device={values.device!r} is not in the table; {', '.join(known)} are, and --devices_file adds others"
        )
    platform = "tpu" if device.kinds[0].startswith("TPU") else "gpu"
    return {"platform": platform, "kind": device.kinds[0], "count": values.device_count or 1}


def expected(values: flags.FlagValues, found: dict[str, Any], cells: Sequence[Cell]) -> Expectation | str:
    """How fast the devices are taken to be, or one line that says why that is not known."""
    device = _device(values, found)
    if device is None:
        return f"{found['kind']!r} is not in the table of devices; --devices_file adds it"
    records = hardware.RECORDS if values.records is None else Path(values.records)
    if not records.is_dir() and values.records is not None:
        raise UserError(f"--records={values.records} is no directory")
    mesh = next(cell.run.mesh for cell in cells if cell.reason is None)
    cores = max(num_cores() // workers(values, found, cells), 1) if found["platform"] == "cpu" else None
    return expectation(device, hardware.speed(device, records), mesh, count=found["count"], cores=cores)


def facts(values: flags.FlagValues, found: dict[str, Any], cells: Sequence[Cell]) -> dict[str, Any] | None:
    """What is expected, as sweep.json keeps it; None where nothing is known of the devices."""
    expectation = expected(values, found, cells)
    return None if isinstance(expectation, str) else expectation.facts()


def workers(values: flags.FlagValues, found: dict[str, Any], cells: Sequence[Cell]) -> int:
    """How many cells train at once."""
    legal = sum(cell.reason is None for cell in cells)
    return values.workers or local.default_workers(found["platform"], legal)


def table(values: flags.FlagValues, found: dict[str, Any], cells: Sequence[Cell], tuning: Tuning | None) -> str:
    """What the cells would cost, and the search before them."""
    from mha_jax.sweeps import preview  # the models and JAX itself are needed here only

    device = _device(values, found)
    limit = None if device is None else device.memory_bytes
    memory, basis = _memory(values, found, limit)
    outlook = preview.Outlook(expected(values, found, cells), workers(values, found, cells), memory, basis)
    search = [] if tuning is None else [preview.search_total(tuning, cells, outlook)]
    return "\n".join([preview.table(cells, outlook), *search])


def _memory(values: flags.FlagValues, found: dict[str, Any], limit: int | None) -> tuple[Any, str]:
    """What tells the memory of a run, and one line on what that rests on."""
    from mha_jax.sweeps import preview

    if values.topology is None and not values.compile:
        basis = "counted from the spec, to about a fifth; --compile or --topology asks the compiler"
        return (lambda run: preview.estimated_memory(run, found, limit)), basis
    import jax

    from mha_jax.sweeps import slices

    there = _slice(values.topology) if values.topology is not None else jax.devices()
    where = f"the TPU slice {values.topology}" if values.topology else "the devices here"
    memory = slices.once_a_shape(lambda run: slices.planned_memory(run, there, limit))
    return memory, f"of each device, as the compiler plans it for {where}"


def _slice(topology: str) -> list[Any]:
    from mha_jax.sweeps.slices import slice_devices

    return slice_devices(topology)


def _device(values: flags.FlagValues, found: dict[str, Any]) -> hardware.Device | None:
    known = hardware.table(values.devices_file)
    device = hardware.find(known, found["kind"])
    return hardware.this_cpu() if device is None and found["platform"] == "cpu" else device


def _refuse(values: flags.FlagValues) -> None:
    for name in _FOR_DRY_RUNS:
        if values[name].value:
            raise UserError(f"--{name} goes with --dry_run: it plans, and trains nothing")
