"""What a plain matrix product reaches in each library: the rate that bounds everything made of products."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from mha_jax.benchmarks import environment
from mha_jax.benchmarks.programs import FORWARD, Devices, program
from mha_jax.benchmarks.rounds import race, summary


def matmul_rates(size: int, dtype: str, devices: Devices, rounds: int) -> dict[str, float]:
    """GFLOP/s of a size x size x size product, median of the rounds: JAX on one device and on all, and PyTorch."""
    a, b = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    left, right = jnp.asarray(a, dtype), jnp.asarray(b, dtype)

    def jax_call(devices: Devices) -> Callable[[], object]:
        return program(lambda b, a: jnp.matmul(a, b), FORWARD, right, left, left, devices).call

    calls = {"JAX on one device": jax_call(devices[:1])}
    if len(devices) > 1:
        calls[f"JAX on {len(devices)} devices"] = jax_call(devices)
    device = environment.torch_device()
    if device is not None:
        from mha_jax.benchmarks import peers_torch

        calls["PyTorch"] = peers_torch.product(a, b, dtype, device)
    return {name: 2e-9 * size**3 / summary(seconds)["median"] for name, seconds in race(calls, rounds).items()}
