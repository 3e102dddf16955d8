"""Causal self-attention with its projections: every backend of ours, other libraries, and the matrix products alone."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.attention import BACKENDS
from mha_jax.attention.attend import noting_backends
from mha_jax.benchmarks import environment, floor
from mha_jax.benchmarks.peers_jax import flax_layer, jax_nn_layer, our_layer
from mha_jax.benchmarks.programs import (
    BOTH,
    FORWARD,
    Devices,
    Program,
    check_modes,
    chosen_dtype,
    program,
    share_out,
    use_devices,
)
from mha_jax.benchmarks.rates import matmul_rates
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.benchmarks.train_step import language_model
from mha_jax.specs import HeadShape, UserError

OURS, FLOOR, RIVAL = "mha_jax auto", "matmul floor", "PyTorch SDPA"
# Of all contestants, that words may be checked before any is there.
NAMES = (
    *(f"mha_jax {backend}" for backend in ("auto", *BACKENDS)),
    FLOOR,
    *("jax.nn", "jax.nn cudnn", "flax.nnx", "jax.nn on one device", "flax.nnx on one device"),
    *(f"PyTorch {core}" for core in ("SDPA", "FlexAttention", "eager", "flash", "cuDNN")),
)
NO_TORCH = "PyTorch is not installed (requirements-bench.txt) or not for this device: not compared"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed; `contestants` are words that names must have one of, but for ours and the floor.

    On a GPU a single call of a fast layer is mostly waited for: --calls=8 waits for each eighth, and times are still
    those of one.
    """

    heads: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    modes: tuple[str, ...] = (FORWARD, BOTH)
    contestants: tuple[str, ...] = ("mha_jax", "jax.nn", "flax.nnx", "PyTorch")
    batch_size: int = 4
    length: int = 1024
    d_model: int = 512
    rounds: int = 7
    calls: int = 1
    matmul_size: int = 2048
    dtype: str | None = None
    devices: int | None = None

    def __post_init__(self) -> None:
        check_modes(self.modes)
        for word in self.contestants:
            if not any(word in name for name in NAMES):
                raise UserError(f"contestants={word!r} is in none of {', '.join(NAMES)}")
        for heads in self.heads:
            HeadShape.resolve(self.d_model, heads)

    def wants(self, name: str) -> bool:
        """Whether a contestant takes part."""
        return name in (OURS, FLOOR) or any(part in name for part in self.contestants)


def causal_flops(setting: Setting, mode: str) -> int:
    """Of the matrix products: four projections and half of both squares; backward costs twice the forward."""
    tokens = setting.batch_size * setting.length
    forward = 2 * tokens * setting.d_model * (4 * setting.d_model + 2 * ((setting.length + 1) // 2))
    return forward * (3 if mode == BOTH else 1)


class _Cell:
    """The contestants of one head count and mode, each with what it says when it cannot run."""

    def __init__(self, setting: Setting, num_heads: int, mode: str, dtype: str, devices: Devices):
        self.setting, self.num_heads, self.mode, self.dtype, self.devices = setting, num_heads, mode, dtype, devices
        shape = (setting.batch_size, setting.length, setting.d_model)
        self.x, self.cotangent = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
        self.programs: dict[str, Program] = {}
        self.refused: dict[str, str] = {}
        self.chosen: list[str] = []

    def enter(self, name: str, build: Callable[[], Program], refusals: type[Exception]) -> None:
        """Adds a contestant, or the line that says why it does not run."""
        if not self.setting.wants(name):
            return
        start = time.perf_counter()
        try:
            self.programs[name] = build()
            told = f"{self.mode}, {self.num_heads} heads, {name}: made in {time.perf_counter() - start:.1f} s"
            print(told, file=sys.stderr, flush=True)
        except refusals as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            self.refused[f"{name} does not run {self.mode}"] = why

    def compile(self, layer: Any, params: Any, devices: Devices) -> Program:
        x, cotangent = (jnp.asarray(array, self.dtype) for array in (self.x, self.cotangent))
        return program(layer, self.mode, params, x, cotangent, devices)

    @functools.cached_property
    def params(self) -> Any:
        """Of our layer, which all peers are given."""
        return our_layer(self.setting.d_model, self.num_heads, "einsum", self.dtype)[1]

    def enter_ours(self) -> None:
        for backend in ("auto", *BACKENDS):

            def build(backend: str = backend) -> Program:
                layer, params = our_layer(self.setting.d_model, self.num_heads, backend, self.dtype)
                return self.compile(layer, params, self.devices)

            with noting_backends() as lines:
                self.enter(f"mha_jax {backend}", build, UserError)
            if backend == "auto":
                self.chosen = lines

    def enter_jax_peers(self) -> None:
        """The peers on all devices as ours, and on a single one."""
        layers = {
            "jax.nn": jax_nn_layer(None),
            "flax.nnx": flax_layer(self.setting.d_model, self.num_heads, self.dtype),
        }
        if jax.default_backend() == "gpu":
            layers["jax.nn cudnn"] = jax_nn_layer("cudnn")
        layouts = {"": self.devices} | ({" on one device": self.devices[:1]} if len(self.devices) > 1 else {})
        for name, layer in layers.items():
            for where, devices in layouts.items():
                self.enter(name + where, functools.partial(self.compile, layer, self.params, devices), Exception)

    def enter_floor(self) -> None:
        run = language_model(
            self.num_heads, num_layers=1, d_model=self.setting.d_model, length=self.setting.length, d_ff=1
        )
        weights = floor.draw_weights(run)["layers"][0]
        kernels = {name: weights[name].astype(self.dtype) for name in ("query", "key", "value", "out")}
        layer = functools.partial(floor.causal_layer, heads=run.model.heads("decoder")[0])
        self.enter(FLOOR, lambda: self.compile(layer, kernels, self.devices), Exception)

    def enter_torch(self, device: str) -> None:
        from mha_jax.benchmarks import peers_torch

        arguments = self.mode, self.params, self.x, self.cotangent, self.dtype, device
        for core in peers_torch.cores(device):
            self.enter(core, functools.partial(peers_torch.layer_program, core, *arguments), Exception)


def measure(setting: Setting) -> dict[str, Any]:
    """Times all contestants of all head counts and modes in turns.

    Returns: "rows", one a mode and head count, "gflops", what plain products reach, and "notes". A row has "seconds" of
    every round by contestant, "ms" their summary, "ratio" ours over each other contestant and "over_fewest_heads" ours
    over ours at the fewest heads, both round by round; "chosen" what auto took, "peak_bytes", "flops", and
    "rate_share" of the best plain product's rate.
    """
    devices = share_out(setting.batch_size, use_devices(setting.devices))
    dtype, torch_device = chosen_dtype(setting.dtype), environment.torch_device()
    rates = matmul_rates(setting.matmul_size, dtype, share_out(setting.matmul_size, devices), setting.rounds)
    cells: dict[tuple[str, int], _Cell] = {}
    for mode in setting.modes:
        for num_heads in setting.heads:
            cell = cells[mode, num_heads] = _Cell(setting, num_heads, mode, dtype, devices)
            cell.enter_ours()
            cell.enter_jax_peers()
            cell.enter_floor()
            if torch_device is not None:
                cell.enter_torch(torch_device)
    calls = {
        (*key, name): functools.partial(one.call, setting.calls)
        for key, cell in cells.items()
        for name, one in cell.programs.items()
    }
    seconds = {key: [s / setting.calls for s in times] for key, times in race(calls, setting.rounds).items()}
    fewest = {mode: seconds[mode, min(setting.heads), OURS] for mode in setting.modes}
    rows = []
    for (mode, num_heads), cell in cells.items():
        times = {name: seconds[mode, num_heads, name] for name in cell.programs}
        flops = causal_flops(setting, mode)
        rows.append(
            {
                "mode": mode,
                "num_heads": num_heads,
                "qk_dim": setting.d_model // num_heads,
                "ms": {name: summary([1e3 * s for s in values]) for name, values in times.items()},
                "ratio": {name: paired_ratio(times[OURS], values) for name, values in times.items() if name != OURS},
                "fewest_heads": min(setting.heads),
                "over_fewest_heads": paired_ratio(times[OURS], fewest[mode]),
                "chosen": cell.chosen,
                "peak_bytes": {name: one.peak_bytes for name, one in cell.programs.items()},
                "flops": flops,
                "rate_share": flops / summary(times[OURS])["median"] / (1e9 * max(rates.values())),
                "seconds": times,
            }
        )
    notes = ([] if torch_device else [NO_TORCH]) + _notes(list(cells.values()))
    return {"dtype": dtype, "devices_used": len(devices), "gflops": rates, "rows": rows, "notes": notes}


def _notes(cells: Sequence[_Cell]) -> list[str]:
    """One line for each contestant, mode and reason, with the head counts that it holds for."""
    heads: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for who, why in cell.refused.items():
            heads.setdefault((who, why), []).append(str(cell.num_heads))
    return [f"{who} at {', '.join(counts)} heads: {why}" for (who, why), counts in heads.items()]
