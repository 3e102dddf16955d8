"""One cached token: does decoding cost one read of its cache, and does the cache cost G groups, not H heads?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mha_jax.benchmarks import environment
from mha_jax.benchmarks.attention import NO_TORCH
from mha_jax.benchmarks.programs import FORWARD, Devices, chosen_dtype, place, program, share_out, spread, use_devices
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.benchmarks.train_step import language_model
from mha_jax.models import LanguageModel, build_model
from mha_jax.models.cache import Cache, cached_step, empty_cache
from mha_jax.specs import HeadShape, UserError

OURS, FLOOR, TORCH = "mha_jax", "read the cache", "PyTorch SDPA, attention alone"
Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: a step of the decoder at the last position of a full cache, `num_kv_heads` as far as they fit."""

    heads: tuple[int, ...] = (8, 32)
    num_kv_heads: tuple[int, ...] = (1, 2, 8)
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    batch_size: int = 16
    d_model: int = 512
    d_ff: int = 512
    num_layers: int = 1
    rounds: int = 15
    dtype: str | None = None
    devices: int | None = None

    def __post_init__(self) -> None:
        for heads in self.heads:
            HeadShape.resolve(self.d_model, heads)
        if not self.shapes:
            raise UserError(f"num_kv_heads={self.num_kv_heads} has nothing that divides heads={self.heads}")

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Heads and groups of every model, where the groups divide the heads."""
        return [(H, G) for H in self.heads for G in self.num_kv_heads if H % G == 0]


def decoder(setting: Setting, heads: int, groups: int, length: int, dtype: str) -> LanguageModel:
    """The language model whose decoder is stepped."""
    run = language_model(
        heads,
        num_layers=setting.num_layers,
        d_model=setting.d_model,
        d_ff=setting.d_ff,
        length=length,
        batch_size=setting.batch_size,
    )
    model = dataclasses.replace(run.model, num_kv_heads=groups, dtype=dtype)
    built = build_model(dataclasses.replace(run, model=model), rngs=nnx.Rngs(0))
    assert isinstance(built, LanguageModel)
    return built


def random_cache(stack: Any, rows: int, length: int) -> Cache:
    """A cache with normal numbers where an empty one has zeros."""
    leaves, tree = jax.tree.flatten(empty_cache(stack, rows, length))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def step_call(model: LanguageModel, length: int, token: Any, cache: Cache, devices: Devices) -> Call:
    """One step that reuses the cache's memory and takes its own output for the next token."""
    graph, params, rest = nnx.split(model.decoder, nnx.Param, ...)

    def step(shared: Any, split: Any) -> tuple[Any, Any]:
        params, rest, position = shared
        y_N1D, cache = cached_step(nnx.merge(graph, params, rest), split[0], position, split[1])
        return (y_N1D.astype(split[0].dtype), cache), ()

    run = spread(step, devices, donate=True)
    shared, split = place((params, rest, jnp.array(length - 1)), jax.tree.map(jnp.copy, (token, cache)), devices)

    def call() -> Any:
        nonlocal split
        split, _ = jax.block_until_ready(run(shared, split))
        return split

    return call


def read_call(cache: Cache, devices: Devices) -> Call:
    """The cache read once: a sum a row."""

    def total(_: Any, cache: Cache) -> Any:
        return [leaf.sum(axis=(1, 2, 3), dtype=jnp.float32) for leaf in jax.tree.leaves(cache)]

    return program(total, FORWARD, (), cache, (), devices).call


def torch_call(setting: Setting, heads: int, groups: int, length: int, dtype: str, device: str) -> Call:
    """PyTorch's attention over as many cached keys and values, laid out as it wants them."""
    from mha_jax.benchmarks import peers_torch

    rng, width = np.random.default_rng(0), setting.d_model // heads
    q_BHK = rng.standard_normal((setting.batch_size, heads, width), np.float32)
    k, v = rng.standard_normal((2, setting.batch_size, groups, length, width), np.float32)
    return peers_torch.cache_program(q_BHK, k, v, setting.num_layers, dtype, device)


def measure(setting: Setting) -> dict[str, Any]:
    """Times a step at every length, head count and number of groups; those of one length are timed in turns.

    Returns: "rows", one a length, head count and number of groups: "seconds" by contestant, "ms" a token their summary,
    "ratio" of ours to each other, round by round, "cache_bytes" of all rows and layers, and "gbytes_per_second", those
    over the time; "notes".
    """
    devices = share_out(setting.batch_size, use_devices(setting.devices))
    dtype, torch_device = chosen_dtype(setting.dtype), environment.torch_device()
    rows = []
    for length in setting.lengths:
        calls: dict[tuple[int, int, str], Call] = {}
        sizes: dict[tuple[int, int], int] = {}
        for heads, groups in setting.shapes:
            model = decoder(setting, heads, groups, length, dtype)
            cache = random_cache(model.decoder, setting.batch_size, length)
            token = jax.random.normal(jax.random.key(2), (setting.batch_size, 1, setting.d_model), dtype)
            sizes[heads, groups] = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
            calls[heads, groups, OURS] = step_call(model, length, token, cache, devices)
            calls[heads, groups, FLOOR] = read_call(cache, devices)
            if torch_device is not None:
                calls[heads, groups, TORCH] = torch_call(setting, heads, groups, length, dtype, torch_device)
        seconds = race(calls, setting.rounds)
        for (heads, groups), size in sizes.items():
            times = {name: values for (*of, name), values in seconds.items() if of == [heads, groups]}
            ms = {name: summary([1e3 * s for s in values]) for name, values in times.items()}
            row = {"length": length, "num_heads": heads, "num_kv_heads": groups, "ms": ms, "cache_bytes": size}
            row["ratio"] = {name: paired_ratio(times[OURS], values) for name, values in times.items() if name != OURS}
            row["gbytes_per_second"] = {name: size / 1e6 / spread_ms["median"] for name, spread_ms in ms.items()}
            rows.append({**row, "seconds": times})
    return {"dtype": dtype, "devices_used": len(devices), "rows": rows, "notes": [] if torch_device else [NO_TORCH]}
