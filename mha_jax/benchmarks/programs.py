"""Compiled contestants of JAX: forward or forward and backward, the batch spread over devices.

A contestant is `layer(shared, inputs) -> y`: `shared` is the same on every device, as parameters are; all arrays of
`inputs` and y lead with the batch.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mha_jax.cores import num_cores
from mha_jax.specs import UserError
from mha_jax.training.step import peak_bytes

Devices = Sequence[Any]  # of jax.Device, which type checkers do not know as a type
Layer = Callable[[Any, Any], Any]
Split = Callable[[Any, Any], tuple[Any, Any]]
FORWARD, BOTH = "forward", "forward+backward"


class Program(NamedTuple):
    """How to start a call and to wait for its result, and what is planned to be held at worst, on all devices."""

    start: Callable[[], Any]
    wait: Callable[[Any], object]
    peak_bytes: int | None

    def call(self, times: int = 1) -> object:
        """Some calls, one after the other on the device: the last one's result, when it is there."""
        result = None
        for _ in range(times):
            result = self.start()
        return self.wait(result)


def check_modes(modes: Sequence[str]) -> None:
    """Raises: UserError for a mode that does not exist."""
    for mode in modes:
        if mode not in (FORWARD, BOTH):
            raise UserError(f"modes={mode!r} is not one of {FORWARD!r}, {BOTH!r}")


def chosen_dtype(dtype: str | None) -> str:
    """What arrays are of: float32 on CPU, bfloat16 on accelerators, unless it is given."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r} is not one of 'float32', 'bfloat16', 'float16'")
    return dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")


def use_devices(count: int | None) -> Devices:
    """The first `count` devices, or all; a CPU has one a core unless JAX has started or was told otherwise.

    Raises: UserError where there are fewer.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices are what they are
            jax.config.update("jax_num_cpu_devices", min(count or num_cores(), num_cores()))
    devices = jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise UserError(f"devices={count} must be between 1 and the {len(devices)} that JAX has here")
    return devices[:count]


def share_out(batch: int, devices: Devices) -> Devices:
    """As many of the devices as share the batch evenly."""
    return devices[: max(n for n in range(1, len(devices) + 1) if batch % n == 0)]


def spread(function: Split, devices: Devices, *, donate: bool = False) -> Any:
    """Compiles function(shared, split) -> (split, summed) for these devices; on one it is plain jit.

    Arrays of `split` are cut along their first axis, those of `summed` added up over the devices; with `donate` the
    memory of `split` is reused.
    """
    donated = (1,) if donate else ()
    if len(devices) == 1:
        return jax.jit(function, donate_argnums=donated)

    def on_one(shared: Any, split: Any) -> tuple[Any, Any]:
        out, summed = function(shared, split)
        return out, jax.lax.psum(summed, "data")

    mesh = Mesh(devices, ("data",))
    mapped = jax.shard_map(on_one, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P("data"), P()), check_vma=False)
    return jax.jit(mapped, donate_argnums=donated)


def place(shared: Any, split: Any, devices: Devices) -> tuple[Any, Any]:
    """Arguments of a spread function where it wants them."""
    if len(devices) == 1:
        return jax.device_put((shared, split), devices[0])
    mesh = Mesh(devices, ("data",))
    return jax.device_put(shared, NamedSharding(mesh, P())), jax.device_put(split, NamedSharding(mesh, P("data")))


def forward(layer: Layer) -> Split:
    """y of the inputs; the cotangent is not read."""
    return lambda shared, split: (layer(shared, split[0]), ())


def forward_backward(layer: Layer) -> Split:
    """y, and the gradients of sum(y * cotangent): those of the inputs, and those of what is shared."""

    def both(shared: Any, split: Any) -> tuple[Any, Any]:
        inputs, cotangent = split
        y, pull = jax.vjp(layer, shared, inputs)
        of_shared, of_inputs = pull(cotangent)
        return (y, of_inputs), of_shared

    return both


def program(layer: Layer, mode: str, shared: Any, inputs: Any, cotangent: Any, devices: Devices) -> Program:
    """The layer compiled in this mode for these devices, with its arguments in place."""
    function = spread({FORWARD: forward, BOTH: forward_backward}[mode](layer), devices)
    arguments = place(shared, (inputs, cotangent), devices)
    compiled = function.lower(*arguments).compile()
    planned = peak_bytes(compiled)
    everywhere = None if planned is None else planned * len(devices)
    return Program(lambda: compiled(*arguments), jax.block_until_ready, everywhere)
