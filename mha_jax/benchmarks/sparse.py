"""Attention over growing lengths under each rule: does a pattern cost what it looks at?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from scipy import stats

from mha_jax.attention import BigBird, Causal, Fixed, LogSparse, Rule, SlidingWindow, Strided, attend
from mha_jax.attention.attend import check_backend
from mha_jax.benchmarks.programs import (
    BOTH,
    FORWARD,
    Program,
    check_modes,
    chosen_dtype,
    program,
    share_out,
    use_devices,
)
from mha_jax.benchmarks.rounds import paired_ratio, race, summary
from mha_jax.specs import HeadShape, UserError

DENSE = "dense causal"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is timed: attention without projections; dense only up to `dense_limit`, fits only from `fit_from` on."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768)
    rules: tuple[str, ...] = ("dense", "window", "log", "bigbird", "strided", "fixed")
    modes: tuple[str, ...] = (FORWARD, BOTH)
    num_heads: int = 8
    d_model: int = 256
    batch_size: int = 1
    window: int = 256
    dense_limit: int = 16384
    fit_from: int = 2048
    rounds: int = 5
    backend: str = "auto"
    dtype: str | None = None
    devices: int | None = None

    def __post_init__(self) -> None:
        check_modes(self.modes)
        check_backend(self.backend)
        HeadShape.resolve(self.d_model, self.num_heads)
        known = rules_at(min(self.lengths), self.window)
        for name in self.rules:
            if name not in known:
                raise UserError(f"rules={name!r} is not one of {', '.join(map(repr, known))}")


def rules_at(length: int, window: int) -> dict[str, tuple[str, Rule]]:
    """The label and the rule of every pattern at this length; all are causal, so dense causal bounds them."""
    stride = 1 << round(np.log2(length) / 2)  # a power of two near the root of the length, as Child et al. have it
    return {
        "dense": (DENSE, Causal()),
        "window": (f"window {window}", Causal() & SlidingWindow(window)),
        "log": ("LogSparse", Causal() & LogSparse()),
        "bigbird": ("BigBird", Causal() & BigBird(64, 96, min(3, -(-length // 64)), 128, length)),
        "strided": ("Strided", Strided(stride)),
        "fixed": ("Fixed", Fixed(stride, max(1, stride // 16))),
    }


def exponent(lengths: Sequence[int], seconds: Sequence[float]) -> dict[str, float] | None:
    """The b of time = a * length ** b by least squares over logarithms, with its 95 % t-interval.

    None for fewer than three lengths, which leave no degree of freedom for an interval.
    """
    if len(lengths) < 3:
        return None
    fit: Any = stats.linregress(np.log(lengths), np.log(seconds))
    margin = float(stats.t.ppf(0.975, len(lengths) - 2) * fit.stderr)
    slope = float(fit.slope)
    return {"exponent": slope, "low": slope - margin, "high": slope + margin, "lengths": len(lengths)}


def core_program(setting: Setting, rule: Rule, length: int, mode: str, dtype: str) -> Program:
    """Attention under the rule; forward+backward gives the gradients of queries, keys and values."""
    shape = (setting.batch_size, length, setting.num_heads, setting.d_model // setting.num_heads)
    draws = (jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4))
    q, k, v, cotangent = draws

    def layer(_: Any, qkv: tuple[Array, Array, Array]) -> Array:
        return attend(*qkv, visibility=rule, backend=setting.backend)

    devices = share_out(setting.batch_size, use_devices(setting.devices))
    return program(layer, mode, (), (q, k, v), jnp.asarray(cotangent), devices)


def measure(setting: Setting) -> dict[str, Any]:
    """Times all rules, lengths and modes in turns.

    Returns: "rows", one a mode, rule and length: "seconds" of every round, "ms" their summary, "visible" the share of
    dense causal's pairs that the rule shows, and where dense was timed "speedup" over it and "cost_ratio", time over
    (visible * dense time), both round by round; "fits", one a mode and rule: the exponent of time over length; "notes".
    """
    use_devices(setting.devices)
    dtype = chosen_dtype(setting.dtype)
    chosen = {length: rules_at(length, setting.window) for length in setting.lengths}
    cells = [
        (mode, name, length)
        for mode in setting.modes
        for name in setting.rules
        for length in setting.lengths
        if name != "dense" or length <= setting.dense_limit
    ]
    programs = {
        (mode, name, length): core_program(setting, chosen[length][name][1], length, mode, dtype)
        for mode, name, length in cells
    }
    seconds = race({cell: one.call for cell, one in programs.items()}, setting.rounds)
    visible = {
        (name, length): chosen[length][name][1].describe(length).visible / Causal().describe(length).visible
        for _, name, length in cells
    }
    rows = []
    for mode, name, length in cells:
        own, dense = seconds[mode, name, length], seconds.get((mode, "dense", length))
        row = {"mode": mode, "rule": chosen[length][name][0], "length": length}
        row |= {"ms": summary([1e3 * s for s in own]), "visible": visible[name, length]}
        if dense is not None:
            row["speedup"] = paired_ratio(dense, own)
            row["cost_ratio"] = paired_ratio(own, [visible[name, length] * s for s in dense])
        rows.append({**row, "peak_bytes": programs[mode, name, length].peak_bytes, "seconds": own})
    return {"dtype": dtype, "rows": rows, "fits": fits(rows, setting.fit_from), "notes": []}


def fits(rows: Sequence[dict[str, Any]], fit_from: int) -> list[dict[str, Any]]:
    """The exponent of every mode and rule, over the medians of lengths of at least `fit_from`."""
    found = []
    for mode, rule in dict.fromkeys((row["mode"], row["rule"]) for row in rows):
        own = [r for r in rows if (r["mode"], r["rule"]) == (mode, rule) and r["length"] >= fit_from]
        fit = exponent([r["length"] for r in own], [r["ms"]["median"] for r in own])
        found.append({"mode": mode, "rule": rule, "fit": fit})
    return found
