"""What a cell is expected to take: seconds a step, device-hours, memory. sweep.json keeps the basis for the report."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mha_jax.specs import MeshSpec
from mha_jax.sweeps.hardware import Device, Speed


@dataclasses.dataclass(frozen=True)
class Expectation:
    """How fast the devices of one cell are taken to be, and why."""

    device: str
    kinds: tuple[str, ...]  # what JAX calls the device
    devices: int  # that a cell has; on a CPU cores
    flops_per_second: Mapping[str, float]  # of one device, by model.dtype
    bytes_per_second: int | float | None  # of its memory
    basis: str

    def __str__(self) -> str:
        """ "4 × v5e", or on a CPU "1 core of AMD EPYC"."""
        if self.kinds != ("cpu",):
            return f"{self.devices} × {self.device}"
        return f"{self.devices} core{'s' * (self.devices > 1)} of {self.device}"

    def step_seconds(self, flops: int | float, update_bytes: int | float, dtype: str) -> float | None:
        """The longer of computing the step and of moving what the update moves; None for a dtype of unknown peak.

        Args: flops, update_bytes: of one step of all seeds, as `mha_jax.training.estimates` counts them.
        """
        if dtype not in self.flops_per_second:
            return None
        moving = update_bytes / self.bytes_per_second if self.bytes_per_second else 0.0
        return max(flops / (self.flops_per_second[dtype] * self.devices), moving)

    def device_hours(self, step_seconds: float, steps: int) -> float:
        """Of all the steps of a cell."""
        return step_seconds * steps * self.devices / 3600

    def facts(self) -> dict[str, Any]:
        """As JSON; `from_facts` reads it."""
        return dataclasses.asdict(self) | {"kinds": list(self.kinds)}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> "Expectation":
        return cls(**{**facts, "kinds": tuple(facts["kinds"])})


def expectation(
    device: Device, expected: Speed, mesh: MeshSpec, *, count: int, cores: int | None = None
) -> Expectation:
    """What a cell may expect of so many devices that its mesh is laid over, or of so many cores of a CPU."""
    seed, data, head = mesh.sizes(count)
    return Expectation(
        device.name,
        device.kinds,
        seed * data * head if cores is None else cores,
        expected.flops_per_second,
        device.bytes_per_second,
        expected.basis,
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that a step needs on each device, and that the device has; None where nobody says."""

    needed: int | None
    limit: int | None
    estimated: bool

    def __str__(self) -> str:
        """ "~12 MiB", "1.5 GiB of 16.0 GiB", "20.1 GiB of 16.0 GiB: 4.1 GiB too much"."""
        if self.needed is None:
            return "unknown"
        text = ("~" if self.estimated else "") + _size(self.needed)
        if self.limit is None or (self.estimated and self.needed <= self.limit):
            return text
        text += f" of {_size(self.limit)}"
        return text if self.needed <= self.limit else f"{text}: {_size(self.needed - self.limit)} too much"


def duration(seconds: float) -> str:
    """ "1.3 ms", "12 s", "3.4 min", "5.6 h"."""
    for size, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def _size(value: int) -> str:
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.0f} MiB"
