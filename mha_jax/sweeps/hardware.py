"""What a plan knows of devices: their peaks from devices.json, and how much of a peak a training step reaches.

A user's file adds devices or replaces them, in the format of devices.json: a name, the kinds that JAX calls it by, the
peak of a dense matrix product for each model.dtype as JAX computes it by default, memory, bandwidth, and the source.
"""

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mha_jax.cores import num_cores, processor
from mha_jax.specs import UserError

RECORDS = Path(__file__).parents[2] / "docs" / "benchmarks"
# Of the peak, where no record tells. A guess: large models reach 40 to 70 % of a TPU's or GPU's peak, small ones less.
ASSUMED = 0.3
_DTYPES = ("float32", "bfloat16", "float64")
_FIELDS = ("kinds", "peak_tflops", "memory_gib", "memory_gb_per_second", "source")
_PROBE_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Device:
    """One device as JAX counts them; of a CPU one core, with the memory of the whole machine."""

    name: str
    kinds: tuple[str, ...]
    peak_flops: Mapping[str, float]  # a second, by model.dtype
    memory_bytes: int | None
    bytes_per_second: int | float | None  # of its memory; None: not known, and left out of account
    source: str


@dataclasses.dataclass(frozen=True)
class Speed:
    """FLOP/s that a training step is expected to reach on one device, by model.dtype, and what that rests on."""

    flops_per_second: Mapping[str, float]
    basis: str


def table(extra: str | None = None) -> dict[str, Device]:
    """The devices of devices.json by name, with those of a user's file added or in their place.

    Raises: UserError for a file that is missing, is not JSON, or says less or other than it has to.
    """
    known = _read(Path(__file__).parent / "devices.json")
    return known if extra is None else known | _read(Path(extra))


def find(devices: Mapping[str, Device], name: str) -> Device | None:
    """The device of that name, or of that kind in JAX's words, in any case; None where there is none."""
    wanted = name.lower()
    return next((d for d in devices.values() if wanted in (d.name.lower(), *map(str.lower, d.kinds))), None)


def this_cpu() -> Device:
    """A core of this machine, its peak timed by a NumPy product on all of them: a fifth of a second."""
    a = np.random.default_rng(0).standard_normal((_PROBE_SIZE, _PROBE_SIZE), np.float32)
    seconds = []
    for _ in range(4):  # the first one starts the threads
        start = time.perf_counter()
        np.matmul(a, a)
        seconds.append(time.perf_counter() - start)
    peak = 2 * _PROBE_SIZE**3 / min(seconds) / num_cores()
    # A CPU computes bfloat16 in float32, and half as much in words twice as wide.
    peaks = {"float32": peak, "bfloat16": peak, "float64": peak / 2}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(processor(), ("cpu",), peaks, memory, None, "a matrix product of NumPy, timed just now")


def speed(device: Device, records: Path = RECORDS) -> Speed:
    """What to expect of a device: what `bench train_step` reached on it, or else an assumed part of its peak.

    A record counts for its own kind of device, on a CPU for the same processor; other types than the record's are
    expected to reach the same part of their peaks.

    Args:   records: the directory with the benchmark's JSON files.
    """
    measured = _measured(device, records)
    if measured is None:
        basis = (
            f"{ASSUMED:.0%} of the peak of {_tera(device.peak_flops)} ({device.source}): an assumption, as there is no "
            "record of `bench train_step` on it"
        )
        return Speed({dtype: ASSUMED * peak for dtype, peak in device.peak_flops.items()}, basis)
    reached, dtype, file = measured
    part = reached / device.peak_flops[dtype]
    basis = f"{_tera({dtype: reached})}, as `bench train_step` reached on it ({file})"
    if device.kinds != ("cpu",):
        basis += f": {part:.0%} of the peak of {_tera(device.peak_flops)} ({device.source})"
    return Speed({dtype: part * peak for dtype, peak in device.peak_flops.items()}, basis)


def _measured(device: Device, records: Path) -> tuple[float, str, str] | None:
    """FLOP/s a device in the last record of its kind by file name, the median over its head counts; dtype, and file."""
    found = None
    for path in sorted(records.glob("*.json")):
        try:
            reached = _reached(json.loads(path.read_text()), device)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise UserError(f"{path} is no record of a benchmark: {type(error).__name__}: {error}") from None
        found = (*reached, path.name) if reached else found
    return found


def _reached(record: Any, device: Device) -> tuple[float, str] | None:
    if not isinstance(record, dict) or record.get("benchmark") != "train_step":
        return None
    machine, rows = record["environment"], [row for row in record["rows"] if "step_flops" in row]
    on_cpu = machine["device"] == "cpu"
    if machine["device"] not in device.kinds or (on_cpu and machine["processor"] != device.name) or not rows:
        return None
    count = machine["cores"] if on_cpu else record["setting"]["devices"] or machine["devices"]
    rates = [1e3 * row["step_flops"] / row["step_ms"]["mha_jax"]["median"] / count for row in rows]
    return statistics.median(rates), record.get("dtype", "float32")


def _tera(flops: Mapping[str, float]) -> str:
    """ "197 TFLOP/s in bfloat16 and float32"."""
    by_rate: dict[str, list[str]] = {}
    for dtype, rate in flops.items():
        told = f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
        by_rate.setdefault(told, []).append(dtype)
    return ", ".join(f"{rate} in {' and '.join(dtypes)}" for rate, dtypes in by_rate.items())


def _read(path: Path) -> dict[str, Device]:
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(f"{path} must be one object, with an object for each device's name")
    return {name: _device(path, name, entry) for name, entry in entries.items()}


def _device(path: Path, name: str, entry: Mapping[str, Any]) -> Device:
    where = f"{path}: device {name!r}"
    odd = sorted(set(entry) ^ set(_FIELDS))
    if odd:
        raise UserError(f"{where} {'has' if odd[0] in entry else 'lacks'} {odd[0]!r}; its fields are {_list(_FIELDS)}")
    peaks, kinds = entry["peak_tflops"], entry["kinds"]
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f"{where}: kinds={kinds!r} must be a list of names, as jax.devices()[0].device_kind gives them")
    if not isinstance(peaks, dict) or "float32" not in peaks:
        raise UserError(f"{where}: peak_tflops={peaks!r} must give TFLOP/s by dtype, at least for float32")
    unknown = next((dtype for dtype in peaks if dtype not in _DTYPES), None)
    if unknown is not None:
        raise UserError(f"{where}: peak_tflops names {unknown!r}, which is no dtype; {_list(_DTYPES)} are")
    numbers = {f"peak_tflops.{dtype}": peak for dtype, peak in peaks.items()}
    numbers |= {field: entry[field] for field in ("memory_gib", "memory_gb_per_second")}
    for field, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise UserError(f"{where}: {field}={number!r} must be a number above 0")
    return Device(
        name,
        tuple(kinds),
        {dtype: 1e12 * peak for dtype, peak in peaks.items()},
        int(entry["memory_gib"] * 2**30),
        1e9 * entry["memory_gb_per_second"],
        str(entry["source"]),
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
