"""Forward and backward over one long input in this very process: what it holds at its worst moment."""

import dataclasses
import resource
import sys
from typing import Any

import jax
import jax.numpy as jnp

from mha_jax.benchmarks.peers_jax import our_layer
from mha_jax.benchmarks.programs import BOTH, chosen_dtype, program, share_out, use_devices
from mha_jax.specs import HeadShape


@dataclasses.dataclass(frozen=True)
class Setting:
    """One causal self-attention layer with its projections."""

    length: int = 16384
    num_heads: int = 16
    d_model: int = 256
    batch_size: int = 1
    backend: str = "auto"
    dtype: str | None = None
    devices: int | None = None

    def __post_init__(self) -> None:
        HeadShape.resolve(self.d_model, self.num_heads)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(setting: Setting) -> dict[str, Any]:
    """Runs the layer forward and backward twice.

    Returns: "rows", one: "before_bytes" and "peak_bytes", the process's most resident memory before and after, and
    "planned_bytes", what XLA plans for arguments, results and in between; "notes".
    """
    devices = share_out(setting.batch_size, use_devices(setting.devices))
    dtype = chosen_dtype(setting.dtype)
    shape = (setting.batch_size, setting.length, setting.d_model)
    x, cotangent = (jax.random.normal(key, shape, jnp.dtype(dtype)) for key in jax.random.split(jax.random.key(0)))
    before = peak_resident_bytes()
    layer, params = our_layer(setting.d_model, setting.num_heads, setting.backend, dtype)
    one = program(layer, BOTH, params, x, cotangent, devices)
    for _ in range(2):
        one.call()
    row = {"length": setting.length, "num_heads": setting.num_heads, "before_bytes": before}
    row |= {"peak_bytes": peak_resident_bytes(), "planned_bytes": one.peak_bytes}
    return {"dtype": dtype, "rows": [row], "notes": []}
